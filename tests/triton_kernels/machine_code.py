"""What the machine code of a compiled Triton kernel says of itself."""

import re
import subprocess
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

import triton

TOOLS = Path(triton.__file__).parent / "backends/nvidia/bin"


@dataclass
class Loop:
    """One innermost loop that touches global memory."""

    instructions: int = 0
    loads: Counter = field(default_factory=Counter)  # number by bytes
    stores: Counter = field(default_factory=Counter)
    exponentials: int = 0  # and logarithms, of the same unit
    barriers: int = 0  # and shuffles
    polls: int = 0  # of a counter
    spills: int = 0

    @property
    def bytes_loaded(self) -> int:
        return sum(size * count for size, count in self.loads.items())

    @property
    def bytes_stored(self) -> int:
        return sum(size * count for size, count in self.stores.items())


@dataclass
class Report:
    registers: int
    spilled: int  # bytes
    shared: int
    instructions: int
    loops: list[Loop]


def _tool(name: str, *arguments: str) -> str:
    result = subprocess.run([TOOLS / name, *arguments], capture_output=True, text=True)
    return result.stdout + result.stderr


def report(kernel) -> Report:
    return _amd(kernel) if "amdgcn" in kernel.asm else _nvidia(kernel)


INSTRUCTION = re.compile(r"^\s*/\*([0-9a-f]{4,6})\*/\s+(.*?);")
WIDTHS = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16}


def _nvidia(kernel) -> Report:
    from triton.backends.nvidia.compiler import get_ptxas

    with tempfile.TemporaryDirectory() as folder:
        cubin, ptx = Path(folder, "k.cubin"), Path(folder, "k.ptx")
        cubin.write_bytes(kernel.asm["cubin"])
        ptx.write_text(kernel.asm["ptx"])
        target = re.search(r"\.target\s+(sm_\w+)", kernel.asm["ptx"])[1]
        ptxas = get_ptxas(int(re.sub(r"\D", "", target))).path
        log = subprocess.run(
            [ptxas, "-v", f"--gpu-name={target}", ptx, "-o", Path(folder, "o.cubin")],
            capture_output=True, text=True,
        ).stderr  # fmt: skip
        usage = _tool("cuobjdump", "-res-usage", str(cubin))
        sass = _tool("nvdisasm", "-c", str(cubin))
    # The kernel's and those of the function that it calls.
    spills = re.findall(r"(\d+) bytes spill stores, (\d+) bytes spill loads", log)
    code, labels = [], {}
    for line in sass.splitlines():
        if label := re.match(r"^(\.L_x_\d+):", line.strip()):
            labels[label[1]] = len(code)
        elif instruction := INSTRUCTION.match(line):
            code.append(instruction[2])
    return Report(
        registers=int(re.search(r"REG:(\d+)", usage)[1]),
        spilled=sum(int(stored) + int(loaded) for stored, loaded in spills),
        shared=kernel.metadata.shared,
        instructions=len(code),
        loops=[_census([code[i] for i in sorted(nodes)]) for nodes in _inner_loops(code, labels)],
    )


def _operation(text: str) -> str:
    return re.sub(r"^@!?U?P\w+\s+", "", text).split()[0]


def _inner_loops(code: list[str], labels: dict[str, int]) -> list[frozenset[int]]:
    """Natural loops without another inside: a branch backwards alone may be to a cold block."""
    n = len(code)
    successors: list[list[int]] = [[] for _ in range(n)]
    back = []
    for i, text in enumerate(code):
        guarded = text.startswith("@")
        name = _operation(text).split(".")[0]
        target = re.search(r"`\((\.L_x_\d+)\)", text) if name == "BRA" else None
        if target and target[1] in labels:
            j = labels[target[1]]
            conditional = guarded or re.search(r"BRA\S*\s+!?U?P", text)
            successors[i].append(j)
            if conditional and i + 1 < n:
                successors[i].append(i + 1)
            if j <= i:
                back.append((j, i))
        elif i + 1 < n and (guarded or name not in ("EXIT", "RET", "BRX", "JMX", "KILL")):
            successors[i].append(i + 1)
    predecessors: list[list[int]] = [[] for _ in range(n)]
    for i, after in enumerate(successors):
        for j in after:
            predecessors[j].append(i)
    loops = set()
    for head, tail in back:
        reached, todo = {head}, [head]
        while todo:
            for j in successors[todo.pop()]:
                if j not in reached:
                    reached.add(j)
                    todo.append(j)
        if tail not in reached:
            continue
        nodes, todo = {head, tail}, [tail]
        while todo:
            i = todo.pop()
            if i == head:
                continue
            for j in predecessors[i]:
                if j not in nodes and j in reached:
                    nodes.add(j)
                    todo.append(j)
        loops.add(frozenset(nodes))
    return sorted((a for a in loops if not any(b < a for b in loops)), key=min)


def _census(code: list[str]) -> Loop:
    loop = Loop(len(code))
    for text in code:
        operation = _operation(text)
        name, *modifiers = operation.split(".")
        size = next((WIDTHS[m] for m in modifiers if m in WIDTHS), 4)
        loop.loads[size] += name == "LDG" and "STRONG" not in modifiers
        loop.stores[size] += name == "STG"
        loop.exponentials += operation.startswith(("MUFU.EX2", "MUFU.LG2"))
        loop.barriers += name in ("BAR", "SHFL")
        loop.polls += name in ("LDG", "ATOMG") and "STRONG" in modifiers
        loop.spills += name in ("LDL", "STL")
    loop.loads, loop.stores = +loop.loads, +loop.stores
    return loop


def _amd(kernel) -> Report:
    """The report of an AMD kernel, with all its memory accesses as if in one loop."""
    text = kernel.asm["amdgcn"]

    def number(name: str) -> int:
        return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

    code = re.findall(r"^\t((?:[sv]|global|buffer|ds|flat|scratch)_\w+)", text, re.MULTILINE)
    loop = Loop(len(code))
    for name in code:
        if access := re.match(r"(?:global|buffer)_(load|store)_(\w+)", name):
            width = re.match(r"(?:dword|b)(?:x?(\d+))?$", access[2])
            size = 2
            if width:
                size = int(width[1] or 1) * (4 if "dword" in access[2] else 0.125)
            (loop.loads if access[1] == "load" else loop.stores)[int(size)] += 1
        loop.exponentials += name.startswith(("v_exp_f32", "v_log_f32"))
        loop.barriers += name == "s_barrier"
    inside = False  # a loop, as the compiler's comments say of a block; most are in one over rows
    for line in text.splitlines():
        if re.match(r"\.LBB|; %bb", line):
            inside = False
        inside |= "Loop" in line.partition(";")[2]
        loop.spills += inside and line.startswith("\tscratch_")
    return Report(
        registers=number("vgpr_count"),
        spilled=4 * number("vgpr_spill_count"),
        shared=kernel.metadata.shared,
        instructions=len(code),
        loops=[loop],
    )
