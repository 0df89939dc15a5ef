"""What the compiler made of the CUDA kernels: registers, spills, and figures from the machine code.

python tests/cuda_kernels/gate.py --update     measure, and write the table gate.json

Instructions are told apart by the source lines they come from (-lineinfo changes no code), inlined
functions included. Where the machine code comes from, and what reads it: cubins.py.
"""

import json
import os
import re
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import cubins
from cubins import KERNELS, ROOT

TABLE = Path(__file__).with_suffix(".json")
TARGETS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120")
REGISTERS_PER_SM = 65536
SMALL_VOCABULARY = 32768  # the smallest that the budgets are for
CAREFUL_LOADS, CAREFUL_STORES = 4, 1  # of 128 bits: 8 columns of both rows in float32; or any

Figures = dict[str, float]


def resources(report: str) -> dict[str, Figures]:
    """Per kernel, by its mangled name, what cuobjdump says; its stack is where spills go."""
    found = re.findall(r"Function (\S+):\s+REG:(\d+) STACK:(\d+)", report)
    return {name: {"registers": int(r), "stack_bytes": int(stack)} for name, r, stack in found}


class Instruction(NamedTuple):
    opcode: str  # with its modifiers: LDG.E.128.STRONG.GPU
    lines: tuple[tuple[str, int], ...]  # (file, line), innermost first


# A kernel's listing has a million lines and more, most of them origins.
SECTION = re.compile(r"\s*\.section\s+\.text\.([^,]+),")
ORIGIN = re.compile(r'\s*//## File "(?:[^"]*/)?([^"/]+)", line (\d+)')
OPCODE = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@!?U?P\w+\s+)?([A-Z][\w.]*)")


def instructions(code: str) -> dict[str, list[Instruction]]:
    """Per kernel, by its mangled name."""
    found: dict[str, list[Instruction]] = {}
    lines: list[tuple[str, int]] = []
    origins: tuple[tuple[str, int], ...] = ()  # of `lines`, once an instruction has them
    kernel: list[Instruction] = []
    for line in code.splitlines():
        if origin := ORIGIN.match(line):
            if origins:
                lines, origins = [], ()
            lines.append((origin[1], int(origin[2])))
        elif opcode := OPCODE.match(line):
            origins = origins or tuple(lines)
            kernel.append(Instruction(opcode[1], origins))
        elif section := SECTION.match(line):
            kernel = found.setdefault(section[1], [])
    return found


def function_lines(path: Path, name: str) -> range:
    """The lines of the device function `name`."""
    text = path.read_text()
    head = re.search(rf"__device__[^;{{}}]*\b{name}\([^;{{}}]*\{{", text)
    assert head is not None, f"{path.name} has no device function {name}"
    depth, end = 1, head.end()
    while depth:
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        end += 1
    return range(text.count("\n", 0, head.start()) + 1, text.count("\n", 0, end) + 2)


class Part:
    """The instructions that come from one function and from what it inlines; or all of them."""

    def __init__(self, code: list[Instruction], file: str = "", function: str = "") -> None:
        self.code = code
        if function:
            lines = function_lines(KERNELS / file, function)
            self.code = [i for i in code if any(f == file and n in lines for f, n in i.lines)]

    def beside(self, file: str) -> "Part":
        """Those that come from `file` too."""
        return Part([i for i in self.code if any(f == file for f, _ in i.lines)])

    def per(self, count: int) -> float:
        return round(len(self.code) / count, 2)

    def count(self, pattern: str) -> int:
        return sum(re.match(pattern, i.opcode) is not None for i in self.code)

    def wide(self, access: str) -> int:
        return self.count(rf"{access}\b.*\.128\b")


def sources() -> str:
    """The text of all that the kernels are made of."""
    paths = sorted(path for path in KERNELS.iterdir() if path.suffix in (".cu", ".h"))
    return "\n".join(path.read_text() for path in paths)


def constant(name: str) -> int:
    """As the sources have it, with one value wherever they do."""
    (value,) = set(re.findall(rf"constexpr int {name} = (\d+);", sources()))
    return int(value)


def vectors(variant: str, target: str) -> int:
    """How many vectors of 8 columns a thread of this variant of dense_rows holds in registers."""
    if "Cluster" not in variant:
        return constant("kTicketVectors")
    later = int(target.removeprefix("sm_")) >= 100
    return constant("kLaterClusterVectors" if later else "kClusterVectors")


def registers_allowed(kernel: str) -> int:
    """By the threads that a multiprocessor has to hold of it: its __launch_bounds__."""
    pattern = rf"__launch_bounds__\((\w+)(?:, (\d+))?\)\s+{kernel}_kernel\("
    ((threads, blocks),) = re.findall(pattern, sources())
    return min(255, REGISTERS_PER_SM // (constant(threads) * int(blocks or 1)))


EXPONENTIAL = r"MUFU\.EX2"
LOCAL = r"(LDL|STL)\b"


def core(name: str, target: str, code: list[Instruction]) -> Figures:
    """The core that keeps a slice in registers: its code is straight, a thread's pairs unrolled."""
    pairs = vectors(name, target) * constant("kPerLane")
    file = "fast.h"
    every = Part(code, file, "run")
    load, gradient = Part(code, "held.h", "load"), Part(code, file, "write_gradient")
    sums, logarithms = Part(code, file, "sum_soft"), Part(code, "classes.h", "take_logarithms")
    shifted = Part(load.code, "load.h", "load_shifted")
    # The label set apart: every warp looks for it, one has it, and one makes its term.
    apart = Part(code, "classes.h", "set_label_apart").code
    once = Part(apart, "row.h", "apart_index").code + Part(apart, "classes.h", "set_apart").code
    each = len(apart) - len(once)
    once += Part(code, file, "set_target").code
    warps = SMALL_VOCABULARY / (32 * pairs)
    careful = Part(code, "classes.h", "each_step")
    # What a row of the plain loss does not do, and what is counted by itself.
    others = ("sum_hard", "write_gradient", "mix", "set_target")
    aside = [apart, *(Part(code, file, f).code for f in others)]
    elsewhere = {id(i) for part in aside for i in part}
    plain = Part([i for i in every.code if id(i) not in elsewhere])
    # The sums over warps and CTAs are one warp's work for all of its CTA.
    shared = Part(plain.code, "row.h", "total").count(EXPONENTIAL)
    shared *= 1 - 32 / constant("kThreads")
    return {
        "local_accesses": every.count(LOCAL),
        "loads_of_128_bits": load.wide("LDG") - shifted.wide("LDG"),
        "stores_of_128_bits": Part(gradient.code, "load.h", "store_aligned").wide("STG"),
        "misaligned_loads_of_128_bits": shifted.wide("LDG"),
        "misaligned_stores_of_128_bits": Part(gradient.code, "load.h", "store_shifted").wide("STG"),
        "exponentials_per_pair": round((plain.count(EXPONENTIAL) - shared) / pairs, 3),
        "instructions_per_pair_of_the_sums": sums.per(pairs),
        # What a teacher's probabilities cost besides, and the label set apart.
        "instructions_per_pair_of_the_logarithms": logarithms.per(pairs),
        "instructions_per_pair_of_the_label": round((each + len(once) / warps) / pairs, 2),
        # Some of their lines are lost where ptxas has joined them, and not always the same: no more
        # is said than that each step has them. Not all of the stores name their function.
        "reread_loads_of_128_bits": min(CAREFUL_LOADS, careful.wide("LDG")),
        "reread_stores_of_128_bits": min(
            CAREFUL_STORES, Part(code).beside("careful.h").beside("load.h").wide("STG")
        ),
    }


def sparse_core(name: str, target: str, code: list[Instruction]) -> Figures:
    """The same of a sparse teacher's rows: by columns, where a slice is in registers."""
    columns = vectors(name, target) * constant("kPerLane")
    file = "sparse.h"
    load, held = Part(code, "held.h", "load"), Part(code, "held.h", "each")
    sums, gradient = Part(held.code, file, "sum_classes"), Part(held.code, file, "write_classes")
    shifted = Part(load.code, "load.h", "load_shifted")
    kept = {id(i) for i in held.code}

    def again(function: str) -> Part:
        """The code of the core that reads its slice again. Not all lines name every caller."""
        return Part([i for i in Part(code, file, function).code if id(i) not in kept])

    return {
        "local_accesses": Part(code).count(LOCAL),
        "loads_of_128_bits": load.wide("LDG") - shifted.wide("LDG"),
        "stores_of_128_bits": Part(gradient.code, "load.h", "store_aligned").wide("STG"),
        "misaligned_loads_of_128_bits": shifted.wide("LDG"),
        "misaligned_stores_of_128_bits": Part(gradient.code, "load.h", "store_shifted").wide("STG"),
        # In the gradient a second one for a hard term at another temperature.
        "exponentials_per_column_of_the_sums": round(sums.count(EXPONENTIAL) / columns, 3),
        "exponentials_per_column_of_the_gradient": round(gradient.count(EXPONENTIAL) / columns, 3),
        "instructions_per_column_of_the_sums": sums.per(columns),
        "reread_loads_of_128_bits": again("each_step").wide("LDG"),
        "reread_stores_of_128_bits": again("write_classes").wide("STG"),
    }


def variant(name: str) -> str | None:
    """A kernel's name in the table, from its mangled one."""
    found = re.search(
        r"\d(dense_rows|sparse_rows|scale_rows)_kernel(?:I.*?(Cluster|Tickets)(?:ELN.*?DivergenceE(\d))?)?",
        name,
    )
    if found is None:
        return None
    divergence = {None: None, "0": "forward", "1": "reverse", "2": "mixture"}[found[3]]
    return " ".join(part for part in (found[1], found[2], divergence) if part)


def empty(code: list[Instruction]) -> bool:
    """Whether a kernel does nothing: one with clusters on a GPU that has none."""
    return bool(code) and not any(i.opcode.startswith(("LDG", "STG")) for i in code)


def figures(cubin: cubins.Cubin, target: str) -> dict[str, Figures]:
    """Per variant."""
    code = instructions(cubin.code)
    found = {}
    for mangled, resource in resources(cubin.resources).items():
        name = variant(mangled)
        assert name is not None, f"a kernel the table knows no name for: {mangled}"
        kernel = code[mangled]
        if empty(kernel):
            continue
        found[name] = resource | {"instructions": len(kernel)}
        if name.startswith("dense_rows"):
            found[name] |= core(name, target, kernel)
        elif name.startswith("sparse_rows"):
            found[name] |= sparse_core(name, target, kernel)
        else:
            every = Part(kernel)
            found[name] |= {
                "local_accesses": every.count(LOCAL),
                "loads_of_128_bits": every.wide("LDG"),
                "stores_of_128_bits": every.wide("STG"),
            }
    return found


def problems(name: str, target: str, of: Figures) -> Iterator[str]:
    """What a variant does that no budget allows."""
    kernel = name.partition(" ")[0]
    allowed = registers_allowed(kernel)
    if of["registers"] > allowed:
        yield f"{name}: {of['registers']} registers, its launch bounds allow {allowed}"
    for what in ("stack_bytes", "local_accesses"):
        if of[what]:
            yield f"{name}: {what} is {of[what]}, not 0"
    held = 1 if kernel == "scale_rows" else vectors(name, target)
    rows = 2 if kernel == "dense_rows" else 1
    at_least = {
        # 16 bytes of a 16-bit dtype and twice 16 of float32.
        "loads_of_128_bits": 2 * rows * held,
        "stores_of_128_bits": 2 * held,
        # Where a row is not aligned, the two blocks around each.
        "misaligned_loads_of_128_bits": 4 * rows * held,
        "misaligned_stores_of_128_bits": 2 * held,
        "reread_loads_of_128_bits": 2 * rows,
        "reread_stores_of_128_bits": 1,
    }
    for what, least in at_least.items():
        if of.get(what, least) < least:
            yield f"{name}: {what} is {of[what]}, not {least} or more"
    at_most = {
        "exponentials_per_pair": 2.3,
        "exponentials_per_column_of_the_sums": 1,
        "exponentials_per_column_of_the_gradient": 2,
        # Less than 15 % of the 37 that a pair's sums have, to which its gradient is to be added.
        "instructions_per_pair_of_the_logarithms": 5.5,
        "instructions_per_pair_of_the_label": 5.5,
        # A sparse teacher's, as against the same 37; some hundreds for each class it names.
        "instructions_per_column_of_the_sums": 21,
    }
    for what, most in at_most.items():
        if of.get(what, 0) > most:
            yield f"{name}: {what} is {of[what]}, at most {most}"


def measure() -> dict[str, Any]:
    """The whole table."""
    module = os.environ.get("FASTKD_GATE_MODULE")
    sources = [KERNELS / "kernels.cu"]

    def of(source: Path, target: str) -> dict[str, Figures]:
        of_module = built[source.stem, target] if module else None
        return figures(of_module or cubins.compile_for(source, target), target)

    table: dict[str, dict[str, Figures]] = {target: {} for target in TARGETS}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        built = cubins.built(Path(module)) if module else {}
        jobs = [(t, pool.submit(of, source, t)) for t in TARGETS for source in sources]
        for target, job in jobs:
            table[target] |= job.result()
    return {
        "nvcc": cubins.release(cubins.nvcc()),
        "nvdisasm": cubins.release(cubins.tool("nvdisasm")),
        "targets": table,
    }


if __name__ == "__main__":
    if sys.argv[1:] != ["--update"] or cubins.missing():
        sys.exit(f"{__doc__}\nnot found: {', '.join(cubins.missing()) or 'nothing'}")
    measured = measure()
    TABLE.write_text(json.dumps(measured, indent=1) + "\n")
    over = [f"{target}: {problem}" for target, kernels in measured["targets"].items()
            for name, of in kernels.items() for problem in problems(name, target, of)]  # fmt: skip
    count = Counter(len(kernels) for kernels in measured["targets"].values())
    print(f"written to {TABLE.relative_to(ROOT)}: {dict(count)} kernels per target")
    sys.exit("\n".join(over))
