"""Distils a small language model three ways: cross-entropy only, eager PyTorch, fastkd.

Trains a BPE vocabulary and a transformer teacher on real text (by default the source files of the
running Python's standard library), then the same student three times, from the same weights on the
same batches: with cross-entropy alone, and distilled with

    alpha * T^2 * KL(teacher || student) + (1 - alpha) * cross-entropy

once as one writes it in PyTorch, once as one call of `fastkd.kd_loss`. These two runs must agree to
rounding; the exit status is 1 if they do not. With --sparse-teacher K a fourth student learns from
the teacher's K likeliest classes alone, the others as one.

    pip install fastkd tokenizers tqdm matplotlib
    python examples/distill_lm.py                  # about 4 minutes on 2 cores
    python examples/distill_lm.py --device cuda --batch 32 --steps 2000 *.txt

At the end: a plot of the curves, and a table of
  validation loss  cross-entropy in nats per token of held-out text, after the last step;
  tokens/s         from the median step: teacher forward (if any), student forward, loss,
                   backward and optimizer;
  loss             the part of that step between the student's logits and their gradient;
  peak memory      the most that tensors hold at one time in a step, above what they hold before:
                   activations, logits and gradients, not weights.
"""

import argparse
import json
import math
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from distill_lm_report import agreement, averaged, environment, plot, table
from language_model import (
    SMALLEST_VOCAB,
    Size,
    Transformer,
    encode,
    read_texts,
    standard_library,
    train_tokenizer,
    windows,
)
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from tqdm import tqdm

import fastkd
from fastkd.schedules import pruning_percentile

# A loss takes the student's logits [N, V], the teacher's (None: no teacher), the labels [N], the
# percentile of the teacher's logits that the step leaves out, and the options.
Loss = Callable[[Tensor, Tensor | None, Tensor, float, argparse.Namespace], Tensor]

TEACHER = Size(width=192, layers=3, heads=3, learning_rate=2e-3)
STUDENT = Size(width=96, layers=2, heads=2, learning_rate=3e-3)
VALIDATION_WINDOWS = 64
EVALUATIONS = 8
WARM_UP_STEPS = 3  # not in the medians; the last of them is the one whose memory is measured
EPS = 1e-6
TOLERANCE = 1e-3


def cross_entropy(
    student: Tensor,
    teacher: Tensor | None,
    labels: Tensor,
    percentile: float,
    args: argparse.Namespace,
) -> Tensor:
    return F.cross_entropy(student, labels)


def distilled_fastkd(
    student: Tensor, teacher: Tensor, labels: Tensor, percentile: float, args: argparse.Namespace
) -> Tensor:
    return fastkd.kd_loss(
        student,
        teacher,
        labels,
        temperature=args.temperature,
        alpha=args.alpha,
        top_k=args.top_k,
        bottom_percentile=percentile,
        inplace=True,  # nothing else needs the logits: their gradient takes their place
    )


def distilled_sparse(
    student: Tensor, teacher: Tensor, labels: Tensor, percentile: float, args: argparse.Namespace
) -> Tensor:
    """From what a cache of the teacher would hold; its making is part of the loss's time."""
    return fastkd.topk_kd_loss(
        student,
        *fastkd.topk_teacher(teacher, args.sparse_teacher),
        labels,
        temperature=args.temperature,
        alpha=args.alpha,
        inplace=True,
    )


def distilled_eager(
    student: Tensor, teacher: Tensor, labels: Tensor, percentile: float, args: argparse.Namespace
) -> Tensor:
    """The same, as one writes it in PyTorch."""
    hard = F.cross_entropy(student, labels)
    student, scaled = student / args.temperature, teacher / args.temperature
    V = teacher.shape[-1]
    keep = max(1, min(args.top_k or V, V - int(V * percentile / 100 + 1e-6)))
    if keep < V:
        pruned = teacher < teacher.kthvalue(V - keep + 1, keepdim=True).values
        # Not -inf: F.kl_div would multiply the student's by a probability of 0.
        lowest = torch.finfo(student.dtype).min
        student, scaled = student.masked_fill(pruned, lowest), scaled.masked_fill(pruned, lowest)
    log_q, p = F.log_softmax(student, dim=-1), F.softmax(scaled, dim=-1)
    soft = F.kl_div(log_q, p, reduction="batchmean") * args.temperature**2
    return args.alpha * soft + (1 - args.alpha) * hard


@dataclass
class Run:
    """What one training run leaves behind."""

    name: str
    training: list[float] = field(default_factory=list)  # the run's own loss, per step
    validation: dict[int, float] = field(default_factory=dict)  # step: cross-entropy
    tokens_per_second: float = 0.0
    step_ms: float = 0.0
    loss_ms: float = 0.0
    peak_mib: float = 0.0


def clock(device: torch.device) -> float:
    """Seconds, once the device has done what it was asked to."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


@contextmanager
def peak_memory(run: Run, device: torch.device) -> Iterator[None]:
    """Notes the most bytes that tensors hold at one time, above what they hold before."""
    if device.type == "cpu":
        # The profiler records every allocation (+) and release (-): their running sum.
        os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # it would write over the progress bar
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
            yield
        events = profiler.profiler.kineto_results.events()
        events = sorted((e for e in events if e.name() == "[memory]"), key=lambda e: e.start_ns())
        peak = max(accumulate(event.nbytes() for event in events))
    else:
        torch.accelerator.reset_peak_memory_stats(device)
        before = torch.accelerator.memory_allocated(device)
        yield
        peak = torch.accelerator.max_memory_allocated(device) - before
    run.peak_mib = peak / 2**20


class Trainer:
    """What all runs have in common: the text and the settings."""

    def __init__(self, tokens: Tensor, held_out: Tensor, args: argparse.Namespace):
        self.tokens, self.held_out = tokens.to(args.device), held_out.to(args.device)
        self.args = args

    @torch.no_grad()
    def validate(self, model: Transformer) -> float:
        """The mean cross-entropy of windows spread evenly over the held-out text."""
        last = len(self.held_out) - self.args.context - 1
        starts = torch.linspace(0, last, VALIDATION_WINDOWS).long()
        total = 0.0
        for batch in starts.split(self.args.batch):
            inputs, labels = windows(self.held_out, batch, self.args.context)
            total += F.cross_entropy(model(inputs), labels).item() * len(batch)
        return total / VALIDATION_WINDOWS

    def train(
        self, name: str, size: Size, steps: int, loss: Loss, teacher: Transformer | None = None
    ) -> tuple[Transformer, Run]:
        """AdamW with warm-up and cosine decay; equal sizes get equal weights and batches."""
        args, run, times = self.args, Run(name), []
        torch.manual_seed(args.seed)
        model = Transformer(size, args.classes, args.context).to(args.device)
        optimizer = torch.optim.AdamW(
            model.parameters(), lr=size.learning_rate, betas=(0.9, 0.95), eps=EPS, fused=True
        )
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda i: min(10 * (i + 1) / steps, (1 + math.cos(math.pi * i / steps)) / 2)
        )

        def advance(inputs: Tensor, labels: Tensor, percentile: float) -> None:
            """One step."""
            start = clock(args.device)
            teacher_logits = None
            if teacher is not None:
                with torch.no_grad():
                    teacher_logits = teacher(inputs)
            logits = model(inputs)

            loss_start = clock(args.device)
            loss_end = []
            logits.register_hook(lambda _: loss_end.append(clock(args.device)))

            value = loss(logits, teacher_logits, labels, percentile, args)
            value.backward()
            optimizer.step()
            optimizer.zero_grad()

            times.append((clock(args.device) - start, loss_end[0] - loss_start))
            run.training.append(value.item())

        every = max(10, math.ceil(steps / EVALUATIONS))
        progress = tqdm(range(1, steps + 1), desc=name, unit="step")
        for step in progress:
            starts = torch.randint(len(self.tokens) - args.context, (args.batch,))
            measured = step == WARM_UP_STEPS
            with peak_memory(run, args.device) if measured else nullcontext():
                percentile = pruning_percentile(step - 1, steps, args.percentiles)
                advance(*windows(self.tokens, starts, args.context), percentile)
            schedule.step()
            if step % every == 0 or step == steps:
                run.validation[step] = self.validate(model)
                progress.set_postfix_str(f"validation loss {run.validation[step]:.3f}")

        columns = zip(*times[WARM_UP_STEPS:], strict=True)
        run.step_ms, run.loss_ms = (1e3 * statistics.median(column) for column in columns)
        run.tokens_per_second = args.batch * args.context / run.step_ms * 1e3
        return model.requires_grad_(False), run


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


def arguments() -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """The parser, for errors that show later, and what it parsed."""
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n", 1)[0],
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("files", nargs="*", type=Path, help="texts (none: the standard library's)")
    for name, kind, default, text in (
        ("device", str, "cpu", "where to train: cpu, cuda, cuda:1"),
        ("vocab", number(int, SMALLEST_VOCAB), 32768, "size of the BPE vocabulary"),
        (
            "pad-vocab",
            number(int, SMALLEST_VOCAB),
            None,
            "classes of the models, where more than --vocab: some that the text never uses",
        ),
        ("steps", number(int, WARM_UP_STEPS + 1), 320, "of each student"),
        ("teacher-steps", number(int, WARM_UP_STEPS + 1), None, "(none: 2.5 times --steps)"),
        ("batch", number(int, 1), 4, "windows of text per step"),
        ("context", number(int, 1), 64, "tokens per window"),
        ("temperature", number(float, 0.01, 1000), 2.0, "of both softmaxes"),
        ("alpha", number(float, 0, 1), 0.7, "weight of the soft term; 1 - alpha: the hard one"),
        ("top-k", number(int, 1), None, "distil only the k likeliest classes of each row"),
        ("bottom-percentile", number(float, 0, 99.99), 0.0, "leave out the unlikeliest classes"),
        (
            "prune-to",
            number(float, 0, 99.99),
            None,
            "raise that to this, in four equal parts of the run",
        ),
        (
            "sparse-teacher",
            number(int, 1),
            None,
            "one more student, of a teacher that tells its k likeliest classes alone",
        ),
        ("seed", number(int, 0, 2**32 - 1), 0, "of weights and batches"),
        ("json", Path, None, "where to save results, settings and versions"),
        ("png", Path, None, "the plot (none: beside --json, or distill_lm.png)"),
    ):
        metavar = kind.__name__.upper()
        parser.add_argument(f"--{name}", type=kind, default=default, help=text, metavar=metavar)
    args = parser.parse_args()

    args.classes = max(args.vocab, args.pad_vocab or 0)
    args.teacher_steps = args.teacher_steps or 5 * args.steps // 2
    args.percentiles = [args.bottom_percentile]
    if args.prune_to is not None:
        step = (args.prune_to - args.bottom_percentile) / 3
        args.percentiles = [args.bottom_percentile + part * step for part in range(4)]
    args.png = args.png or (args.json or Path("distill_lm")).with_suffix(".png")
    try:
        for path in filter(None, (args.json, args.png)):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.is_dir() or not os.access(path.parent, os.W_OK):
                parser.error(f"cannot write {path}")
    except OSError as error:
        parser.error(f"cannot write {path}: {error.strerror}")
    try:
        args.device = torch.device(args.device)
        torch.zeros(1, device=args.device).item()
    except (RuntimeError, AssertionError) as error:
        parser.error(f"--device {args.device}: {str(error).splitlines()[0]}")
    return parser, args


def text_data(
    parser: argparse.ArgumentParser, args: argparse.Namespace
) -> tuple[tuple[Tensor, Tensor], str]:
    """The tokens to train on, those held out, and a description."""
    paths = args.files or standard_library()
    try:
        texts, held_out = read_texts(paths)
    except OSError as error:
        parser.error(f"cannot read {error.filename}: {error.strerror}")
    if not texts:
        parser.error("no text found; name text files")
    tokenizer = train_tokenizer(texts, args.vocab)
    if (vocab := tokenizer.get_vocab_size()) < args.vocab:
        parser.error(f"--vocab {args.vocab} is too large for this text, which yields {vocab}")
    tokens = encode(tokenizer, texts), encode(tokenizer, held_out)
    if min(map(len, tokens)) < args.context + 2:
        parser.error(f"the text is too short for --context {args.context}")
    files = (
        "Text files" if args.files else f"Standard library of Python {platform.python_version()}"
    )
    return tokens, f"{files}: {len(tokens[0]):,} tokens and {len(tokens[1]):,} held out"


def largest_difference(a: Iterable[float], b: Iterable[float]) -> float:
    return (torch.tensor(list(a)) - torch.tensor(list(b))).abs().max().item()


def main() -> None:
    started = time.perf_counter()
    parser, args = arguments()
    tokens, description = text_data(parser, args)
    print(description, flush=True)

    trainer = Trainer(*tokens, args)
    teacher, teacher_run = trainer.train("teacher", TEACHER, args.teacher_steps, cross_entropy)
    losses: list[tuple[str, Loss, Transformer | None]] = [
        ("cross-entropy", cross_entropy, None),
        ("distilled, eager", distilled_eager, teacher),
        ("distilled, fastkd", distilled_fastkd, teacher),
    ]
    if args.sparse_teacher:
        losses.append((f"of {args.sparse_teacher} classes, fastkd", distilled_sparse, teacher))
    students = [
        trainer.train(name, STUDENT, args.steps, loss, source)[1] for name, loss, source in losses
    ]
    _, eager, fused = students[:3]

    results = {
        **environment(args.device),
        "settings": {k: v for k, v in vars(args).items() if k not in ("files", "json", "png")},
        "text": description,
        "seconds": time.perf_counter() - started,
        "tolerance": TOLERANCE,
        "difference": {
            "training": largest_difference(eager.training, fused.training),
            "validation": largest_difference(eager.validation.values(), fused.validation.values()),
        },
        "runs": [
            {
                **asdict(run),
                "training": averaged(run.training),
                "validation": list(run.validation.items()),
            }
            for run in (teacher_run, *students)
        ],
    }
    if args.json:
        args.json.write_text(json.dumps(results, indent=1, default=str) + "\n", encoding="utf-8")
    plot(results, args.png)
    print(f"\n{table(results)}\n\n{agreement(results)}")
    print(f"Curves in {args.png}; {results['seconds']:.0f} s in all.")
    if not all(value <= TOLERANCE for value in results["difference"].values()):
        sys.exit("The distilled curves do NOT agree to rounding.")


if __name__ == "__main__":
    main()
