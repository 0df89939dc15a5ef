"""Distils a small language model three ways: cross-entropy only, eager PyTorch, fastkd.

Trains a BPE vocabulary and a transformer teacher on real text (by default the source files of the
running Python's standard library), then the same student three times, from the same weights on the
same batches: with cross-entropy alone, and distilled with

    alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy

once as one writes it in PyTorch, once as one call of `fastkd.kd_loss`. These two runs must agree to
rounding; the exit status is 1 if they do not.

    pip install fastkd tokenizers tqdm matplotlib
    python examples/distill_lm.py                  # about 5 minutes on 2 cores
    python examples/distill_lm.py --device cuda --batch 32 --steps 2000 --teacher-steps 6000 *.txt

At the end: a plot of the curves, and a table of
  validation loss  cross-entropy in nats per token of held-out text, after the last step;
  tokens/s         from the median step: teacher forward (if any), student forward, loss,
                   backward and optimizer;
  loss, share      the part of that step from the student's logits to their gradient. For this every
                   run detaches the logits into a leaf, runs the loss forward and backward down to
                   it, and goes on from its gradient;
  peak memory      the most bytes that tensors hold at one time, above what they hold before: in a
                   whole step (activations and gradients, not weights) and in the loss alone (both
                   logits exist before). A GPU's allocator counts them; on a CPU it is the running
                   sum of the allocations and releases that torch's profiler records.
"""

import argparse
import dataclasses
import json
import math
import platform
import random
import statistics
import subprocess
import sysconfig
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import tokenizers
import torch
import torch.nn.functional as F
from matplotlib.figure import Figure
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor, nn
from tqdm import tqdm

import fastkd

Loss = Callable[[Tensor, Tensor | None, Tensor], Tensor]  # of student, teacher, labels


class Size(NamedTuple):
    width: int
    layers: int
    heads: int
    learning_rate: float


TEACHER = Size(width=192, layers=3, heads=3, learning_rate=2e-3)
STUDENT = Size(width=96, layers=2, heads=2, learning_rate=3e-3)
SMALLEST_VOCAB = len(ByteLevel.alphabet()) + 1  # every byte, and the end of a text
TEXT_CAP = 20_000_000  # characters; more would only keep the tokenizer busy
HOLD_OUT = 20  # one file in 20 is for validation; of fewer files, the last 20th of each
VALIDATION_WINDOWS = 64
EVALUATIONS = 8
WARM_UP_STEPS = 3  # not in the medians
# TODO bound
CURVE_BOUND = 1e-3


def standard_library() -> list[Path]:
    """Its source files less tests, tables and what pip installed; shuffled, but always alike."""
    root = Path(sysconfig.get_paths()["stdlib"])
    skipped = {"site-packages", "dist-packages", "test", "tests", "idle_test", "encodings"}
    paths = sorted(p for p in root.rglob("*.py") if not skipped & set(p.relative_to(root).parts))
    random.Random(0).shuffle(paths)
    return paths


def read_texts(paths: list[Path]) -> tuple[list[str], list[str]]:
    """The texts to train on and the texts held out."""
    texts, left = [], TEXT_CAP
    for path in paths:
        texts.append(path.read_text(encoding="utf-8", errors="replace")[:left])
        left -= len(texts[-1])
    texts = [text for text in texts if text.strip()]
    if len(texts) >= HOLD_OUT:
        return [text for i, text in enumerate(texts) if i % HOLD_OUT], texts[::HOLD_OUT]
    cuts = [len(text) - len(text) // HOLD_OUT for text in texts]
    return (
        [text[:cut] for text, cut in zip(texts, cuts, strict=True)],
        [text[cut:] for text, cut in zip(texts, cuts, strict=True)],
    )


def train_tokenizer(texts: list[str], vocab: int) -> tokenizers.Tokenizer:
    """A byte-level BPE, which encodes any text, of `vocab` tokens or as many as the text yields."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=sorted(ByteLevel.alphabet()),
    )
    tokenizer.train_from_iterator(texts, trainer, length=len(texts))
    return tokenizer


def encode(tokenizer: tokenizers.Tokenizer, texts: list[str]) -> Tensor:
    """The tokens of all texts in one row, each text after an end-of-text token (0)."""
    encoded = tokenizer.encode_batch_fast(texts)
    return torch.tensor([token for text in encoded for token in (0, *text.ids)])


def windows(tokens: Tensor, starts: Tensor, context: int) -> tuple[Tensor, Tensor]:
    """Inputs and labels, [len(starts), context] each."""
    index = starts[:, None] + torch.arange(context + 1)
    block = tokens[index.to(tokens.device)]
    return block[:, :-1], block[:, 1:]


class Block(nn.Module):
    """Attention and MLP, each behind a norm and added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.attention_norm, self.mlp_norm = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.project = nn.Linear(width, width, bias=False)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        heads = self.qkv(self.attention_norm(x)).unflatten(-1, (3, self.heads, -1))
        query, key, value = heads.permute(2, 0, 3, 1, 4)  # [batch, head, token, width / heads]
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + self.project(mixed.transpose(1, 2).flatten(2))
        return x + self.mlp(self.mlp_norm(x))


class Transformer(nn.Module):
    """A decoder-only language model, [B, S] tokens -> [B, S, V] logits, its head its embedding."""

    def __init__(self, size: Size, vocab: int, context: int) -> None:
        super().__init__()
        self.token = nn.Embedding(vocab, size.width)
        self.position = nn.Embedding(context, size.width)
        self.blocks = nn.Sequential(*(Block(size.width, size.heads) for _ in range(size.layers)))
        self.norm = nn.LayerNorm(size.width)
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        # Scaled (Vaswani et al. 2017, section 3.4): the weights are small for the head's sake.
        x = self.token(tokens) * self.token.embedding_dim**0.5
        x = x + self.position.weight[: tokens.shape[1]]
        return F.linear(self.norm(self.blocks(x)), self.token.weight)


def cross_entropy(student: Tensor, teacher: Tensor | None, labels: Tensor) -> Tensor:
    return F.cross_entropy(student.flatten(0, 1), labels.flatten())


def eager_loss(
    temperature: float, alpha: float, top_k: int | None, bottom_percentile: float
) -> Loss:
    """The distilled loss as one writes it in PyTorch."""

    def loss(student: Tensor, teacher: Tensor, labels: Tensor) -> Tensor:
        student, teacher = student.flatten(0, 1), teacher.flatten(0, 1)
        hard = F.cross_entropy(student, labels.flatten())
        student, teacher = student / temperature, teacher / temperature
        V = teacher.shape[-1]
        keep = min(top_k or V, max(1, V - int(V * bottom_percentile / 100 + 1e-6)))
        if keep < V:
            if top_k:
                smallest = teacher.topk(keep).values[:, -1:]
            else:
                smallest = teacher.kthvalue(V - keep + 1, keepdim=True).values
            # Not -inf: F.kl_div would multiply the student's by a probability of 0.
            lowest = torch.finfo(student.dtype).min
            pruned = teacher < smallest
            student = student.masked_fill(pruned, lowest)
            teacher = teacher.masked_fill(pruned, lowest)
        log_q, p = F.log_softmax(student, dim=-1), F.softmax(teacher, dim=-1)
        soft = F.kl_div(log_q, p, reduction="batchmean") * temperature**2
        return alpha * soft + (1 - alpha) * hard

    return loss


def fastkd_loss(**options: Any) -> Loss:
    """The same as one call."""
    return lambda student, teacher, labels: fastkd.kd_loss(student, teacher, labels, **options)


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def peak_mib(work: Callable[[], Any], device: torch.device) -> float:
    """The most memory that tensors hold at one time during `work`, above what they hold before."""
    if device.type != "cpu":
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        work()
        return (torch.accelerator.max_memory_allocated(device) - before) / 2**20
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder, "trace.json")
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text(encoding="utf-8"))["traceEvents"]
    held = peak = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        held += event["args"]["Bytes"]
        peak = max(peak, held)
    return peak / 2**20


@dataclasses.dataclass
class Run:
    """What one training run leaves behind."""

    name: str
    training: list[float] = dataclasses.field(default_factory=list)  # the run's own loss, per step
    validation: dict[int, float] = dataclasses.field(default_factory=dict)  # step: cross-entropy
    tokens_per_second: float = 0.0
    step_ms: float = 0.0
    loss_ms: float = 0.0
    step_peak_mib: float = 0.0
    loss_peak_mib: float = 0.0


class Trainer:
    """What all runs have in common: the text and the settings."""

    def __init__(self, tokens: Tensor, held_out: Tensor, vocab: int, args: argparse.Namespace):
        self.tokens, self.held_out = tokens.to(args.device), held_out.to(args.device)
        self.vocab, self.args = vocab, args

    @torch.no_grad()
    def validate(self, model: Transformer) -> float:
        """The mean cross-entropy of windows spread evenly over the held-out text."""
        last = len(self.held_out) - self.args.context - 1
        starts = torch.linspace(0, last, VALIDATION_WINDOWS).long()
        total = 0.0
        for batch in starts.split(self.args.batch):
            inputs, labels = windows(self.held_out, batch, self.args.context)
            total += cross_entropy(model(inputs), None, labels).item() * len(batch)
        return total / VALIDATION_WINDOWS

    def train(
        self, name: str, size: Size, steps: int, loss: Loss, teacher: Transformer | None = None
    ) -> tuple[Transformer, Run]:
        """AdamW with warm-up and cosine decay; equal sizes get equal weights and batches."""
        args, run, times = self.args, Run(name), []
        torch.manual_seed(args.seed)
        model = Transformer(size, self.vocab, args.context).to(args.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=size.learning_rate, betas=(0.9, 0.95), fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min(10 * (i + 1) / steps, (1 + math.cos(math.pi * i / steps)) / 2)
        )

        def forward(inputs: Tensor) -> tuple[Tensor, Tensor, Tensor | None]:
            with torch.no_grad():
                target = None if teacher is None else teacher(inputs)
            logits = model(inputs)
            return logits, logits.detach().requires_grad_(), target

        def gradients(inputs: Tensor, labels: Tensor) -> tuple[float, float]:
            """Returns the loss, and the seconds from the logits to their gradient."""
            logits, leaf, target = forward(inputs)
            start = clock(args.device)
            value = loss(leaf, target, labels)
            value.backward()
            seconds = clock(args.device) - start
            logits.backward(leaf.grad)
            return value.item(), seconds

        every = math.ceil(steps / EVALUATIONS)
        progress = tqdm(range(1, steps + 1), desc=name, unit="step")
        for step in progress:
            starts = torch.randint(len(self.tokens) - args.context, (args.batch,))
            inputs, labels = windows(self.tokens, starts, args.context)
            start = clock(args.device)
            value, loss_seconds = gradients(inputs, labels)
            optimizer.step()
            optimizer.zero_grad()
            times.append((clock(args.device) - start, loss_seconds))
            schedule.step()
            run.training.append(value)
            if step % every == 0 or step == steps:
                run.validation[step] = self.validate(model)
                progress.set_postfix_str(f"validation loss {run.validation[step]:.3f}")

        columns = zip(*times[WARM_UP_STEPS:] or times, strict=True)
        run.step_ms, run.loss_ms = (1e3 * statistics.median(column) for column in columns)
        run.tokens_per_second = args.batch * args.context / run.step_ms * 1e3
        _, leaf, target = forward(inputs)
        run.loss_peak_mib = peak_mib(lambda: loss(leaf, target, labels).backward(), args.device)
        run.step_peak_mib = peak_mib(lambda: gradients(inputs, labels), args.device)
        return model.requires_grad_(False), run


def table(runs: list[Run]) -> str:
    lines = [
        f"{'':18}{'validation':>11}{'tokens/s':>10}{'step':>11}{'loss':>11}{'share':>8}"
        f"{'peak: step':>13}{'loss':>11}"
    ]
    for run in runs:
        lines.append(
            f"{run.name:18}{list(run.validation.values())[-1]:11.4f}{run.tokens_per_second:10,.0f}"
            f"{run.step_ms:8.1f} ms{run.loss_ms:8.1f} ms{run.loss_ms / run.step_ms:8.1%}"
            f"{run.step_peak_mib:9,.0f} MiB{run.loss_peak_mib:7,.0f} MiB"
        )
    return "\n".join(lines)


def plot(teacher: Run, students: list[Run], path: Path) -> None:
    """The curves; the eager run is a wide line below the dashes of the fastkd run."""
    styles = [
        {"color": "0.5", "linewidth": 1.5},
        {"color": "#ffb870", "linewidth": 6},
        {"color": "#1f4e9c", "linewidth": 1.8, "linestyle": (0, (3, 2))},
    ]
    figure = Figure(figsize=(11, 4.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    for run, style in zip(students, styles, strict=True):
        left.plot(range(1, len(run.training) + 1), run.training, label=run.name, **style)
        right.plot(list(run.validation), list(run.validation.values()), label=run.name, **style)
    final = list(teacher.validation.values())[-1]
    right.axhline(final, color="0.2", linewidth=1, linestyle=":", label=teacher.name)
    left.set(title="Training: each run's own loss", xlabel="step", ylabel="loss")
    right.set(title="Validation: cross-entropy", xlabel="step", ylabel="nats per token")
    for axes in (left, right):
        axes.grid(alpha=0.25)
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def environment(device: torch.device) -> dict[str, Any]:
    """Where the numbers come from."""

    def output(*command: str) -> str | None:
        try:
            done = subprocess.run(command, capture_output=True, text=True, check=True)
        except (OSError, subprocess.CalledProcessError):
            return None
        return done.stdout.strip()

    git = ("git", "-C", str(Path(__file__).parent))
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text(encoding="utf-8").splitlines() if cpuinfo.exists() else []
    names = [line.partition(": ")[2] for line in lines if line.startswith("model name")]
    return {
        "commit": output(*git, "rev-parse", "HEAD"),
        "uncommitted": output(*git, "status", "--porcelain", "--untracked-files=no"),
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "processor": names[0] if names else platform.processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "platform": platform.platform(),
        "python": platform.python_version(),
        "versions": {module.__name__: module.__version__ for module in (fastkd, torch, tokenizers)},
        "backends": fastkd.backends(),
    }


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], Any]:
    """An argparse type."""

    def parse(text: str) -> Any:
        value = kind(text)
        if not low <= value <= high:
            bounds = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"must be {bounds}, got {text}")
        return value

    parse.__name__ = kind.__name__  # for argparse's "invalid int value"
    return parse


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path, help="texts (none: the standard library's)")
    for name, kind, default, text in (
        ("device", str, "cpu", "where to train: cpu, cuda, cuda:1"),
        ("vocab", number(int, SMALLEST_VOCAB), 32768, "size of the BPE vocabulary"),
        ("steps", number(int, 1), 200, "of each student"),
        ("teacher-steps", number(int, 1), 500, "of the teacher"),
        ("batch", number(int, 1), 4, "windows of text per step"),
        ("context", number(int, 1), 64, "tokens per window"),
        ("temperature", number(float, 0.01, 1000), 2.0, "of both softmaxes"),
        ("alpha", number(float, 0, 1), 0.7, "weight of the soft term; 1 - alpha: the hard one"),
        ("top-k", number(int, 1), None, "distil only the k likeliest classes of each row"),
        ("bottom-percentile", number(float, 0, 99.99), 0.0, "leave out the unlikeliest classes"),
        ("seed", number(int, 0), 0, "of weights and batches"),
        ("threads", number(int, 1), None, "CPU threads (none: torch's default)"),
        ("output", Path, Path("distill_lm.png"), "the plot, a PNG"),
        ("json", Path, None, "where to save results, curves, settings and versions"),
    ):
        metavar = kind.__name__.upper()
        parser.add_argument(f"--{name}", type=kind, default=default, help=text, metavar=metavar)
    return parser


def check(parser: argparse.ArgumentParser, args: argparse.Namespace) -> None:
    for path in args.files:
        if not path.is_file():
            parser.error(f"{path} is not a file")
    if args.output.suffix.lower() != ".png":
        parser.error(f"--output must end in .png, got {args.output}")
    for path in filter(None, (args.output, args.json)):
        if path.is_dir() or not path.parent.is_dir():
            parser.error(f"cannot write {path}: it is a folder, or its folder does not exist")
    if args.top_k is not None and args.top_k > args.vocab:
        parser.error(f"--top-k must be at most --vocab, {args.vocab}, got {args.top_k}")
    try:
        args.device = torch.device(args.device)
        torch.empty(1, device=args.device)
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")


def main() -> None:
    started = time.perf_counter()
    parser = make_parser()
    args = parser.parse_args()
    check(parser, args)
    texts, held_out = read_texts(args.files or standard_library())
    if args.threads:
        torch.set_num_threads(args.threads)

    tokenizer = train_tokenizer(texts, args.vocab)
    vocab = tokenizer.get_vocab_size()
    data = encode(tokenizer, texts), encode(tokenizer, held_out)
    if min(map(len, data)) < args.context + 2:
        parser.error(f"the text is too short for --context {args.context}")
    print(f"{len(data[0]):,} tokens of text, {len(data[1]):,} held out; vocabulary of {vocab:,}")
    if vocab < args.vocab:
        print(f"The text yields no more tokens than that: the models have {vocab}, not --vocab.")

    trainer = Trainer(*data, vocab, args)
    options = {
        name: getattr(args, name) for name in ("temperature", "alpha", "top_k", "bottom_percentile")
    }
    teacher, teacher_run = trainer.train("teacher", TEACHER, args.teacher_steps, cross_entropy)
    students = [
        trainer.train(name, STUDENT, args.steps, loss, source)[1]
        for name, loss, source in (
            ("cross-entropy", cross_entropy, None),
            ("distilled, eager", eager_loss(**options), teacher),
            ("distilled, fastkd", fastkd_loss(**options), teacher),
        )
    ]
    _, eager, fused = students
    differences = {
        "training": [abs(a - b) for a, b in zip(eager.training, fused.training, strict=True)],
        "validation": [
            abs(a - b)
            for a, b in zip(eager.validation.values(), fused.validation.values(), strict=True)
        ],
    }
    print(table([teacher_run, *students]))
    print({k: max(v) for k, v in differences.items()})
    print([f"{v:.1e}" for v in differences["training"]][::10])
    print(time.perf_counter() - started)
    plot(teacher_run, students, args.output)


if __name__ == "__main__":
    main()
