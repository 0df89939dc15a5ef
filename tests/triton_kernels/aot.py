"""Kernels compiled for GPUs that are not here, and the table of what they compile to.

The host side of the backend runs as it is, on CPU tensors and under a driver that knows a target
and no device: every launch becomes a compilation, specialised as a launch on that GPU would be.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
import triton
from machine_code import Loop, Report, report
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from fastkd.kernels.triton import launch as triton_launch
from fastkd.kernels.triton import plan as triton_plan
from fastkd.spec import FORWARD, MIXTURE, REVERSE

TARGETS = {
    **{f"sm_{cc}": GPUTarget("cuda", cc, 32) for cc in (80, 90, 100, 120)},
    "gfx942": GPUTarget("hip", "gfx942", 64),
    "gfx1100": GPUTarget("hip", "gfx1100", 32),
}


class _Driver:
    """A target without a device."""

    def __init__(self, target: GPUTarget) -> None:
        self.target = target

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def set_current_device(self, device: int) -> None:
        pass

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@contextlib.contextmanager
def captured(target: GPUTarget) -> Iterator[list]:
    """The compiled kernels of all launches inside, in order."""
    kernels: list = []
    launch, driver = JITFunction.run, triton.runtime.driver
    active = driver._active
    seen = set()

    def run(self, *args, grid, warmup, **options):
        if id(self) not in seen:  # what is cached per device belongs to another target
            seen.add(id(self))
            self.device_caches.clear()
        kernel = launch(self, *args, grid=grid, warmup=True, **options)
        kernels.append(kernel)
        return kernel

    driver.set_active(_Driver(target))
    device = triton_plan.device_of
    found = triton_plan.device_like(target.arch, 132, 50 << 20, target.warp_size)
    triton_plan.device_of = lambda _: found
    triton_plan.plan.cache_clear()
    JITFunction.run = run
    try:
        yield kernels
    finally:
        JITFunction.run, driver._active = launch, active
        triton_plan.device_of = device
        triton_plan.plan.cache_clear()


LONG = {"V": 262145}  # rows are split
VARIANTS: dict[str, dict] = {
    "forward": {},
    "forward, no gradient": {"gradient": False},
    "forward + hard": {"hard": True},
    "reverse": {"divergence": REVERSE},
    "mixture": {"divergence": MIXTURE},
    "pruned": {"pruned": True},
    "pruned mixture + hard": {"pruned": True, "divergence": MIXTURE, "hard": True},
    "hard": {"hard": True, "soft": False},
    "decoupled": {"decoupled": True},
    "decoupled + hard": {"decoupled": True, "hard": True},
    "decoupled, pruned": {"decoupled": True, "pruned": True},
    "probabilities": {"probs": True},
    "probabilities, pruned": {"probs": True, "pruned": True},
    "probabilities mixture": {"probs": True, "divergence": MIXTURE},
    "decoupled probs + hard": {"decoupled": True, "probs": True, "hard": True},
    "sparse bucket": {"named": 64},
    "sparse bucket + hard": {"named": 64, "hard": True},
    "sparse restricted": {"named": 64, "outside": "restrict"},
    "sparse whole": {"named": 64, "outside": "renormalize"},
    "sparse whole + hard": {"named": 64, "outside": "renormalize", "hard": True},
    "sparse, no gradient": {"named": 64, "gradient": False},
    "float32 teacher": {"teacher_dtype": torch.float32},
    "rows not alike": {"teacher_pad": 1},
    "split": LONG,
    "split, no gradient": {"gradient": False, **LONG},
    "split + hard": {"hard": True, **LONG},
    "split reverse": {"divergence": REVERSE, **LONG},
    "split mixture": {"divergence": MIXTURE, **LONG},
    "split hard": {"hard": True, "soft": False, **LONG},
    "split decoupled + hard": {"decoupled": True, "hard": True, **LONG},
    "split probabilities": {"probs": True, **LONG},
    "V = 50": {"V": 50},
    "V = 50, pruned": {"V": 50, "pruned": True},
    "V = 5003": {"V": 5003},
    "V = 5003, pruned": {"V": 5003, "pruned": True},
}


def launch(
    dtype: torch.dtype = torch.bfloat16, N: int = 4, V: int = 20001, *,
    teacher_dtype: torch.dtype | None = None, teacher_pad: int = 0, pruned: bool = False,
    divergence: int = FORWARD, hard: bool = False, soft: bool = True, gradient: bool = True,
    decoupled: bool = False, probs: bool = False, named: int = 0, outside: str = "bucket",
    tail: int = 0,
) -> None:  # fmt: skip
    """One call of the op; inside `captured` nothing is read or written."""
    student = torch.empty(N, V + tail, dtype=dtype)
    teacher = torch.empty(N, V + teacher_pad, dtype=teacher_dtype or dtype)
    vector = torch.empty(N)
    if named:
        triton_launch.sparse_rows(
            student, torch.empty(N, named, dtype=torch.int64), torch.empty(N, named),
            vector if outside == "bucket" else None,
            torch.empty(N, dtype=torch.int64) if hard else None, vector, vector, vector,
            vector if hard else None, torch.empty_like(student) if gradient else None, V,
            outside == "restrict",
        )  # fmt: skip
        return
    triton_launch.dense_rows(
        student, teacher,
        torch.empty(N, dtype=torch.int64) if hard or decoupled else None, vector, vector,
        vector if soft else None, vector if hard else None,
        torch.empty_like(student) if gradient else None,
        torch.empty(N, dtype=torch.int64) if pruned else None, V, divergence,
        vector if divergence == MIXTURE else None, vector if decoupled else None,
        torch.empty(N) if decoupled else None, probs,
    )  # fmt: skip


class Costs(NamedTuple):
    """Loops of the first read, and of the second read of ordinary and of careful rows."""

    sums: Loop
    fast: Loop
    careful: Loop
    pairs: int  # per iteration of the first two
    careful_pairs: int


def costs(report: Report, bytes_per_pair: int) -> Costs:
    """The loops of KL(p || q), found by what they do; those of ragged tiles are longer."""
    loops = [loop for loop in report.loops if loop.exponentials]
    sums = [loop for loop in loops if not loop.stores]
    second = [loop for loop in loops if loop.stores and min(loop.stores) == 16]
    first, fast = min(sums, key=size), min(second, key=size)
    careful = max(second, key=size)
    pairs = first.bytes_loaded // bytes_per_pair
    careful_pairs = careful.bytes_loaded // bytes_per_pair
    assert first.bytes_loaded == fast.bytes_loaded == pairs * bytes_per_pair
    assert careful.bytes_loaded == careful_pairs * bytes_per_pair
    return Costs(first, fast, careful, pairs, careful_pairs)


def size(loop: Loop) -> int:
    return loop.instructions


# Variants whose instructions per pair the table holds.
COUNTED = ("forward", "split", "decoupled", "probabilities")
NAME = 8 + 1 + 9 + 1 + 22  # columns of what a row of the table is about


def table_row(target: str, dtype: torch.dtype, variant: str, report: Report) -> str:
    row = f"{target:8} {str(dtype)[6:]:9} {variant:22} {report.registers:4} {report.spilled:4} "
    row += f"{report.shared:5} {report.instructions:6}"
    if target.startswith("sm_") and variant in COUNTED:
        c = costs(report, 2 * dtype.itemsize)
        row += f"  {c.sums.instructions / c.pairs:5.2f} {c.fast.instructions / c.pairs:5.2f} "
        row += f"{c.careful.instructions / c.careful_pairs:5.2f} "
        row += f"{(c.sums.exponentials + c.fast.exponentials) / c.pairs:5.2f}"
    return row


def cases() -> list[tuple[str, torch.dtype, str]]:
    """Every variant in bfloat16 for one target, the main ones for all targets and dtypes."""
    found = [("sm_90", torch.bfloat16, variant) for variant in VARIANTS]
    for target in TARGETS:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            found.append((target, dtype, "forward"))
        found += [
            (target, torch.bfloat16, v)
            for v in (
                "pruned mixture + hard",
                "reverse",
                "split + hard",
                "probabilities",
                "decoupled probs + hard",
                "split decoupled + hard",
                "sparse bucket + hard",
            )
        ]
    for variant in ("split", "decoupled", "probabilities", "sparse bucket"):
        found += [("sm_90", dtype, variant) for dtype in (torch.float16, torch.float32)]
    found += [(target, torch.bfloat16, "split") for target in ("sm_80", "gfx942")]
    return list(dict.fromkeys(found))


VERSION = ".".join(triton.__version__.split(".")[:2])
TABLE = Path(__file__).with_name(f"table_{VERSION}.txt")
HEADER = f"""# What the Triton kernels compile to: python tests/triton_kernels/aot.py
# Spilled bytes are scalars of the row: none is spilled in a loop. Per pair, of KL(p || q):
# instructions of the first read, of the second one in ordinary and in careful rows, and
# exponentials of ordinary rows.
# triton {triton.__version__}
# target  dtype     variant                regs spill shared instr    sums  fast careful exp2
"""


def main() -> None:
    rows = []
    for target, dtype, variant in cases():
        with captured(TARGETS[target]) as kernels:
            launch(dtype, **VARIANTS[variant])
        rows.append(table_row(target, dtype, variant, report(kernels[0])))
        print(rows[-1], flush=True)
    TABLE.write_text(HEADER + "\n".join(rows) + "\n")


if __name__ == "__main__":
    main()
