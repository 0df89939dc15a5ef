"""The CUDA kernels as compiled: no spills, wide accesses, and the figures of the committed table.

The instruments come first: each is shown to find what it is there to find.
"""

import json
import re

import cubins
import gate
import pytest

# One worker of pytest-xdist compiles for all.
pytestmark = [pytest.mark.gate, pytest.mark.xdist_group("compile")]
needs_tools = pytest.mark.skipif(
    bool(cubins.missing()),
    reason=f"neither a toolkit nor triton has {' or '.join(cubins.missing())}",
)

GOOD = {
    "registers": 128, "stack_bytes": 0, "local_accesses": 0,
    "loads_of_128_bits": 48, "stores_of_128_bits": 12,
    "misaligned_loads_of_128_bits": 96, "misaligned_stores_of_128_bits": 12,
    "exponentials_per_pair": 2.25,
    "reread_loads_of_128_bits": 16, "reread_stores_of_128_bits": 2,
}  # fmt: skip

PLANTED = """
__global__ void __launch_bounds__(1024, 2) spilling_kernel(const float4* in, float4* out) {
  float4 all[24];
#pragma unroll
  for (int i = 0; i < 24; ++i) all[i] = in[threadIdx.x + i * 1024];
  __syncthreads();
#pragma unroll
  for (int i = 0; i < 24; ++i) {
    all[i].x = exp2f(all[i].x) + all[23 - i].y;
    out[threadIdx.x + i * 1024] = all[i];
  }
}
__global__ void narrow_kernel(const unsigned short* in, unsigned short* out) {
  out[threadIdx.x] = in[threadIdx.x] + 1;
}
"""


@pytest.fixture(scope="module")
def planted(tmp_path_factory):
    source = tmp_path_factory.mktemp("planted") / "planted.cu"
    source.write_text(PLANTED)
    return cubins.compile_for(source, "sm_90")


@pytest.fixture(scope="module")
def measured():
    return gate.measure()


def test_problems_are_found():
    assert not list(gate.problems("dense_rows", "sm_90", GOOD))
    for what, bad in (
        ("registers", 129),
        ("stack_bytes", 8),
        ("local_accesses", 1),
        ("loads_of_128_bits", 0),
        ("stores_of_128_bits", 0),
        ("misaligned_loads_of_128_bits", 0),
        ("misaligned_stores_of_128_bits", 0),
        ("reread_loads_of_128_bits", 0),
        ("reread_stores_of_128_bits", 0),
        ("exponentials_per_pair", 4.0),
        ("instructions_per_pair_of_the_logarithms", 6.0),
        ("instructions_per_pair_of_the_label", 6.0),
        ("instructions_per_column_of_the_sums", 24.0),
    ):
        assert len(list(gate.problems("dense_rows", "sm_90", {**GOOD, what: bad}))) == 1, what


@needs_tools
def test_a_planted_spill_is_seen(planted):
    found = gate.resources(planted.resources)
    spilling = next(of for name, of in found.items() if "spilling" in name)
    narrow = next(of for name, of in found.items() if "narrow" in name)
    assert spilling["registers"] <= 32 and spilling["stack_bytes"] > 0
    assert narrow["stack_bytes"] == 0
    assert any("stack_bytes" in x for x in gate.problems("dense_rows", "sm_90", GOOD | spilling))


@needs_tools
def test_widths_and_local_memory_are_seen(planted):
    code = gate.instructions(planted.code)
    spilling = next(code[name] for name in code if "spilling" in name)
    narrow = next(code[name] for name in code if "narrow" in name)

    def opcodes(kernel, start):
        return [i.opcode for i in kernel if i.opcode.startswith(start)]

    assert opcodes(spilling, ("LDL", "STL")) and not opcodes(narrow, ("LDL", "STL"))
    assert sum(".128" in x for x in opcodes(spilling, "LDG")) == 24
    assert len(opcodes(spilling, "MUFU.EX2")) == 24
    assert opcodes(narrow, "LDG") and not any(".128" in x for x in opcodes(narrow, ("LDG", "STG")))
    # Every instruction knows its line: the load is in the fifth, the exponential in the ninth.
    assert {i.lines[-1][1] for i in spilling if i.opcode.startswith("LDG")} == {5}
    assert any(line == 9 for i in spilling if i.opcode == "MUFU.EX2" for _, line in i.lines)


def test_every_target_of_the_wheel_is_measured():
    setup = (cubins.ROOT / "setup.py").read_text()
    (wheel,) = re.findall(r"^ARCHITECTURES = \((.*)\)$", setup, re.MULTILINE)
    assert tuple(f"sm_{x}{y}" for x, y in re.findall(r'"(\d+)\.(\d)"', wheel)) == gate.TARGETS


@needs_tools
@pytest.mark.slow  # compiles the kernels for six targets; see cubins.py for when it does not
@pytest.mark.parametrize("target", gate.TARGETS)
def test_budgets(measured, target):
    kernels = measured["targets"][target]
    assert len(kernels) >= 5, "three modes of the loss, a sparse teacher, and the scaling"
    assert not [
        problem for name, of in kernels.items() for problem in gate.problems(name, target, of)
    ]


@needs_tools
@pytest.mark.slow  # as above
def test_the_committed_table_is_this_source(measured):
    committed = json.loads(gate.TABLE.read_text())
    if committed["nvcc"] != measured["nvcc"]:
        pytest.skip(f"the table is of nvcc {committed['nvcc']}, this is {measured['nvcc']}")
    assert committed["targets"] == measured["targets"], (
        "refresh it: python tests/cuda_kernels/gate.py --update"
    )
