"""The numbers that fastkd is built to reach, and whether it does."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

from .cases import (
    CONVERGED,
    GPU_ROWS,
    HEADLINE,
    OPTIONS,
    OVERHEAD,
    PRUNING,
    SPARSE,
    SURE,
)
from .figures import (
    Record,
    Results,
    device_name,
    error,
    gradients,
    label,
    of_add,
    of_copy,
    ours,
    ratio,
    seconds,
    timed,
)

Which = Callable[[Record], bool]
Value = Callable[[Record], float | None]  # None: not measured there

DENSE = tuple(option for option in OPTIONS if option not in (*PRUNING, *SPARSE))
# A sparse teacher's own k classes of each row, in order, are memory beside the gradient.
WHOLE = (*DENSE, *PRUNING)
H200_VOCABULARIES = (32768, 128256, 151936, 262144)


class Budget(NamedTuple):
    """A number to reach in every case: at most or at least `limit`."""

    what: str
    limit: float
    aim: float | None
    which: Which
    value: Value
    at_most: bool = False

    def row(self, everything: Iterable[Results]) -> list[str]:
        limits = [
            f"{'at most' if self.at_most else 'at least'} {self.limit:g}",
            "" if self.aim is None else f"{self.aim:g}",
        ]
        measured = [
            (value, label(r), device_name(results))
            for results in everything
            for r in results["cases"]
            if r.get("providers") and self.which(r) and (value := self.value(r)) is not None
        ]
        if not measured:
            return [self.what, *limits, "", "", "not yet measured"]
        value, case, device = (max if self.at_most else min)(measured)
        several = len({device for *_, device in measured}) > 1
        where = f"{case}, {device}" if several else case
        return [self.what, *limits, f"{value:.3g}", where, self.verdict(value)]

    def verdict(self, value: float) -> str:
        def reached(limit: float) -> bool:
            return value <= limit if self.at_most else value >= limit

        if not reached(self.limit):
            return f"**missed by {abs(value / self.limit - 1):.1%}**"
        return "met, and the aim" if self.aim is not None and reached(self.aim) else "met"


def on(device: str, options: tuple[str, ...], dtype: str = "", V: tuple[int, ...] = ()) -> Which:
    """Forward and backward there; on a GPU with the rows that its budgets are for, where V is."""
    return lambda r: (
        r["device"] == device
        and r["backward"]
        and r["option"] in options
        and dtype in ("", r["dtype"])
        and (not V or (r["V"] in V and r["N"] == GPU_ROWS))
    )


def faster_than(name: str) -> Value:
    return lambda r: ratio(r, name, ours(r)) if timed(r, name, ours(r)) else None


def beside_plain(variant: str = "") -> Value:
    """Relative to kd_loss without options, on logits of the same size in the same rounds."""

    def value(r: Record) -> float | None:
        names = ours(r) + variant, f"{ours(r)}{variant}, plain"
        return ratio(r, *names) if timed(r, *names) else None

    return value


def of(figure: Callable[[Record, str], float | None], variant: str = "", name: str = "") -> Value:
    """A figure of fastkd, or of its variant, or of the provider `name`."""

    def value(r: Record) -> float | None:
        provider = (name or ours(r)) + variant
        return figure(r, provider) if timed(r, provider) else None

    return value


def roundings(r: Record, name: str) -> float | None:
    """The gradient's error beside what storing the exact one in its dtype costs."""
    value = error(r, name)
    return None if value is None else value / r["rounding"]


def gradient(r: Record) -> float | None:
    return error(r, ours(r)) if "providers" in r else None


def near_convergence(r: Record) -> float | None:
    return r["providers"].get(ours(r), {}).get("loss_error")


def _of_both(device: str, name: str) -> tuple[Budget, ...]:
    every = tuple(OPTIONS)
    return (
        Budget(f"{name}: memory, in gradients", 1.01, None,
               on(device, WHOLE), of(gradients), at_most=True),
        Budget(f"{name}, inplace: memory, in gradients", 0.01, None,
               on(device, WHOLE), of(gradients, ", inplace"), at_most=True),
        Budget(f"{name}, float32: error of the gradient", 1e-5, 1e-6,
               on(device, (*every, SURE), "float32"), gradient, at_most=True),
        Budget(f"{name}, bfloat16: the same, in roundings of the stored gradient", 1.01, None,
               on(device, every, "bfloat16"), of(roundings), at_most=True),
        Budget(f"{name}: error of the loss near convergence", 1e-3, 1e-5,
               on(device, (CONVERGED,)), near_convergence, at_most=True),
    )  # fmt: skip


def _beside_kd_loss(name: str, variant: str) -> tuple[Budget, ...]:
    return (
        Budget(f"{name}, dkd, probs, restrict: times kd_loss", 1.15, None,
               on("cpu", ("dkd", "probs", "restrict")), beside_plain(variant), at_most=True),
        *(Budget(f"{name}, {dtype}, a teacher of 64 classes: times kd_loss", 0.75, None,
                 on("cpu", SPARSE, dtype), beside_plain(variant), at_most=True)
          for dtype in ("bfloat16", "float32")),
    )  # fmt: skip


_H200 = on("cuda", ("plain",), "bfloat16", H200_VOCABULARIES)
_H200_PRUNED = on("cuda", PRUNING, "bfloat16", H200_VOCABULARIES)
_H200_HEADLINE = on("cuda", ("plain",), "bfloat16", (HEADLINE,))
BUDGETS = (
    Budget("CPU: times faster than eager", 6, 10, on("cpu", DENSE), faster_than("eager")),
    Budget("CPU: times faster than torch.compile", 3, 5,
           on("cpu", DENSE), faster_than("torch.compile")),
    Budget("CPU, float32, inplace: of the bandwidth of torch.add", 0.5, 0.7,
           on("cpu", ("plain",), "float32"), of(of_add, ", inplace")),
    Budget("CPU, pruned: times faster than eager", 10, None,
           on("cpu", PRUNING), faster_than("eager")),
    Budget("CPU, pruned: times its time without pruning", 1.6, None,
           on("cpu", PRUNING), beside_plain(), at_most=True),
    *_beside_kd_loss("CPU", ""),
    *_beside_kd_loss("CPU, inplace", ", inplace"),
    Budget("CPU: microseconds per call on tiny input", 60, 40,
           on("cpu", (OVERHEAD,)), of(lambda r, name: seconds(r, name) * 1e6), at_most=True),
    *_of_both("cpu", "CPU"),
    Budget("GPU, bfloat16, N = 8192: of the copy bandwidth", 0.88, 0.95, _H200, of(of_copy)),
    Budget("GPU, the same, pruned", 0.85, None, _H200_PRUNED, of(of_copy)),
    Budget("GPU, the same, Triton", 0.70, 0.85, _H200, of(of_copy, name="fastkd triton")),
    Budget("GPU, the same, V = 128256: times faster than eager", 8, 10,
           _H200_HEADLINE, faster_than("eager")),
    Budget("GPU, the same: than torch.compile", 2, 3,
           _H200_HEADLINE, faster_than("torch.compile")),
    Budget("GPU, the same: than Liger-Kernel", 8, 10,
           _H200_HEADLINE, faster_than("Liger-Kernel")),
    *_of_both("cuda", "GPU"),
)  # fmt: skip
HEADER = ["budget", "limit", "aim", "worst", "in", ""]


def rows(everything: Iterable[Results]) -> list[list[str]]:
    """Rows of a table: every budget, met or not, in the worst case of all devices of its kind."""
    everything = list(everything)
    return [budget.row(everything) for budget in BUDGETS]
