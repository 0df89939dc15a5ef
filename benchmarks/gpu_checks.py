"""What a GPU has to show beyond the test suite, over every kernel variant.

python -m benchmarks.gpu_checks variants   each once, against the cpu backend; for the sanitizers
python -m benchmarks.gpu_checks bits       two runs of one input, the output poisoned between them
python -m benchmarks.gpu_checks graph      captured in a CUDA graph and replayed on other logits

--backend cpu rehearses it on tiny logits. Ends with status 1 if anything is wrong, and with 75 if
there was no time for every variant.
"""

import argparse
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

import fastkd

from .cases import Case, Logits
from .gpu import UNFINISHED, arguments, captured
from .measure import poison, relative_error

# One to sixteen CTAs in a row, slices that fit into registers and slices that do not, edges that
# are no multiple of any vector.
VOCABULARIES = (5, 1000, 4099, 8192, 32768, 50257, 65536, 128256, 151936, 262144, 1 << 20)
DTYPES = ("bfloat16", "float16", "float32")
OPTIONS: dict[str, dict[str, Any]] = {
    "forward": {},
    "reverse": {"beta": 1.0},
    "jsd": {"beta": 0.3},
    "hard": {"alpha": 0.5},  # at T = 2: by a square of the exponential kept
    "hard, T = 2.5": {"alpha": 0.5, "temperature": 2.5},
    "hard only": {"alpha": 0.0},
    "two temperatures": {"teacher_temperature": 1.5},
    "top_k": {"top_k": 3},
    "bottom_percentile": {"bottom_percentile": 20.0},
    "pruned, hard": {"top_k": 1000, "alpha": 0.3},
    "pruned, jsd": {"bottom_percentile": 50.0, "beta": 0.5},
}
# The losses beside kd_loss: of the student's logits, the teacher's, what else it is given of it
# (Variant.given), the labels.
METHODS: dict[str, Callable[..., Any]] = {
    "decoupled": lambda s, t, _, y, **o: fastkd.dkd_loss(s, t, y, hard_weight=0.5, **o),
    "decoupled, pruned": lambda s, t, _, y, **o: fastkd.dkd_loss(s, t, y, top_k=1000, **o),
    "probabilities": lambda s, t, given, y, **o: fastkd.kd_loss(
        s, given[0], y, teacher_kind="probs", **o
    ),
    "probabilities, pruned": lambda s, t, given, y, **o: fastkd.kd_loss(
        s, given[0], y, teacher_kind="probs", bottom_percentile=20.0, beta=0.3, **o
    ),
    "bucket": lambda s, t, given, y, **o: fastkd.topk_kd_loss(s, *given[1:], y, alpha=0.7, **o),
    "restrict": lambda s, t, given, y, **o: fastkd.topk_kd_loss(
        s, *given[1:], y, outside="restrict", **o
    ),
    "renormalize": lambda s, t, given, y, **o: fastkd.topk_kd_loss(
        s, *given[1:], y, outside="renormalize", alpha=0.7, **o
    ),
}
TOLERANCE = {"float32": 1e-5, "bfloat16": 4e-3, "float16": 1e-3}
Bits = list[Tensor]


class Variant:
    """One kind of call: its logits, and the loss with the terms per row."""

    def __init__(self, option: str, dtype: str, V: int, N: int, backend: str) -> None:
        self.name = f"{option}, {dtype}, V = {V}"
        self.device = "cpu" if backend == "cpu" else "cuda"
        self.dtype = dtype
        self.logits = Logits(Case("plain", dtype, V, N, self.device))
        self.labels = torch.arange(N, device=self.device) * 7919 % V
        self.labels[N // 2] = -100
        self.given: tuple[Tensor, ...] = ()
        if option in METHODS:
            probs = self.logits.teacher.float().softmax(-1).to(self.logits.teacher.dtype)
            self.given = (probs, *fastkd.topk_teacher(self.logits.teacher, 64))
        self.method = METHODS.get(option, lambda s, t, _, y, **o: fastkd.kd_loss(s, t, y, **o))
        self.loss = partial(
            self.method,
            **{"temperature": 2.0, **OPTIONS.get(option, {})},
            reduction="sum",
            return_terms=True,
        )
        self.backend = backend

    def run(self, backend: str, student: Tensor, teacher: Tensor) -> Bits:
        """Loss, terms and gradient; and once without a gradient, as in an evaluation."""
        labels = self.labels.to(student.device)
        given = [x.to(student.device) for x in self.given]
        with torch.no_grad():
            evaluated = self.loss(student, teacher, given, labels, backend=backend)
        leaf = student.detach().requires_grad_()
        output = self.loss(leaf, teacher, given, labels, backend=backend)
        (gradient,) = torch.autograd.grad(output.loss, leaf)
        return [*evaluated, *(term.detach() for term in output), gradient]

    def __call__(self) -> Bits:
        poison(self.logits.teacher)
        return self.run(self.backend, self.logits.student().detach(), self.logits.teacher)


def same(a: Tensor, b: Tensor) -> bool:
    return torch.equal(a.flatten().view(torch.uint8), b.flatten().view(torch.uint8))


def variants(variant: Variant) -> str:
    """Against the cpu backend, or that against the definition."""
    actual = [x.cpu().float() for x in variant()]
    other = "reference" if variant.backend == "cpu" else "cpu"
    student, teacher = variant.logits.student().detach().cpu(), variant.logits.teacher.cpu()
    expected = [x.float() for x in variant.run(other, student, teacher)]
    *terms, gradient = zip(actual, expected, strict=True)
    error = relative_error(*gradient)
    if not error < TOLERANCE[variant.dtype]:
        return f"the gradient differs by {error:.1e}"
    wrong = [(a.item(), b.item()) for a, b in terms if not abs(a - b) <= 1e-4 * abs(b)]
    return f"the terms differ: {wrong}" if wrong else ""


def bits(variant: Variant) -> str:
    first, second = variant(), variant()
    unequal = [str(index) for index, (a, b) in enumerate(zip(first, second, strict=True))
               if not same(a, b)]  # fmt: skip
    return f"two runs differ in outputs {', '.join(unequal)}" if unequal else ""


def graph(variant: Variant) -> str:
    """Replayed on logits that the capture did not see, against the same calls without a graph."""
    if variant.device != "cuda":
        return ""
    teacher = variant.logits.teacher
    student = variant.logits.student().detach().clone()

    def call() -> Bits:
        return variant.run(variant.backend, student, teacher)

    replayed, outputs = captured(call)
    for step in range(2):
        student.copy_(torch.roll(variant.logits.student().detach(), step, -1))
        expected = [x.clone() for x in call()]
        replayed.replay()
        if not all(same(a, b) for a, b in zip(outputs, expected, strict=True)):
            return f"replay {step} differs from the call"
    return ""


CHECKS: dict[str, Callable[[Variant], str]] = {"variants": variants, "bits": bits, "graph": graph}


def every_variant(check: str, backend: str) -> Iterator[Variant]:
    """Every V with each option and dtype; in strides, so that the first minutes see some of all."""
    vocabularies = VOCABULARIES if backend != "cpu" else VOCABULARIES[:3]
    options = (*OPTIONS, *METHODS)
    calls = [(V, dtype, option) for V in vocabularies for dtype in DTYPES for option in options]
    step = 17
    assert len(calls) % step, "a stride that divides the number of calls leaves some out"
    for index in range(len(calls)):
        V, dtype, option = calls[index * step % len(calls)]
        # Rows beyond what the GPU holds at a time, where the answer is not compared with the CPU.
        N = 3 if check == "variants" or backend == "cpu" else max(3, min(600, (1 << 25) // V))
        yield Variant(option, dtype, V, N, backend)


def main() -> int:
    parser = argparse.ArgumentParser(description="every kernel variant on a GPU")
    parser.add_argument("check", choices=CHECKS)
    given = arguments(parser, seconds=1e9)
    begin = time.monotonic()
    count = failed = 0
    unfinished = False
    for variant in every_variant(given.check, given.backend):
        if time.monotonic() - begin > given.seconds:
            unfinished = True
            break
        problem = CHECKS[given.check](variant)
        count += 1
        if problem:
            failed += 1
            print(f"{variant.name}: {problem}", flush=True)
    seconds = time.monotonic() - begin
    print(f"{given.check}: {failed} of {count} variants failed ({seconds:.0f} s)")
    if unfinished:
        print("there was no time for the others")
    return 1 if failed else UNFINISHED if unfinished else 0


if __name__ == "__main__":
    sys.exit(main())
