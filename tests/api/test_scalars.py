"""Every number through every compiled op and back, a scalar or a row's: under the stable ABI an
argument whose type drifts is not refused, it arrives as another number.
"""

import math
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from lib.backends import BETAS, INSTRUCTION_SETS, Backend
from lib.compare import check
from lib.logits import normal, pair, some_labels

import fastkd
from fastkd.spec import FORWARD, MIXTURE, REVERSE

pytestmark = pytest.mark.skipif(
    bool(fastkd.backends()["cpu"]), reason="; ".join(fastkd.backends()["cpu"])
)
OPS = ("dense_rows", "dense_rows_reference")


def call(
    op: str, student, teacher, *, keep=None, vocab_size=None, divergence=FORWARD, beta=None,
    labels=None, student_inverse=1.0, teacher_inverse=1.0, soft_weight=1.0, hard_weight=None,
):  # fmt: skip
    """(soft, hard, dstudent) of rows [N, V], straight from the op."""
    N, V = student.shape
    dstudent = torch.full((1, N, V), 77.0, dtype=student.dtype)

    def vector(value, dtype=student.dtype):
        return None if value is None else torch.tensor(value, dtype=dtype).expand(N).clone()

    soft, hard = getattr(torch.ops.fastkd, op)(
        student[None], teacher[None], labels, vector(student_inverse), vector(teacher_inverse),
        vector(soft_weight), vector(hard_weight), dstudent,
        vector(keep, torch.int64), V if vocab_size is None else vocab_size, divergence,
        vector(beta),
    )  # fmt: skip
    return soft, hard, dstudent[0]


def distinct(N: int, V: int) -> tuple[torch.Tensor, torch.Tensor]:
    return normal(N, V, dtype=torch.float64), normal(N, V, seed=1, dtype=torch.float64)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("keep", [2, 3, 4, 63, 64, 65, 255, 256, 257, 1999, 2000])
def test_keep(op, keep):
    s, t = distinct(2, 2000)
    gradient = call(op, s, t, keep=keep, student_inverse=0.1, teacher_inverse=0.1)[2]
    assert ((gradient != 0).sum(-1) == keep).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("keep", [50, 51, 2**31, 2**32 + 1, 2**32 + 3, 2**40 + 2, 2**62])
def test_keep_has_64_bits(op, keep):
    """As many as there are classes or more: all are kept, however the low bits read."""
    s, t = distinct(2, 50)
    for actual, expected in zip(call(op, s, t, keep=keep), call(op, s, t), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("keep", [0, -1, -(2**31), 1 - 2**32, -(2**63)])
def test_one_class_at_least_is_kept(op, keep):
    s, t = distinct(2, 50)
    for actual, expected in zip(call(op, s, t, keep=keep), call(op, s, t, keep=1), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("vocab_size", [2, 3, 255, 256, 257, 1023, 1024, 1025, 1999, 2000])
def test_vocab_size(op, vocab_size):
    s, t = distinct(2, 2000)
    gradient = call(op, s, t, vocab_size=vocab_size)[2]
    assert (gradient[:, :vocab_size] != 0).all()
    assert (gradient[:, vocab_size:] == 0).all()


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("beta", [*BETAS, 1e-6, 0.25, 1 / 3, 0.9999999, 1 - 2**-30])
def test_beta(op, beta):
    """Read back from two classes with p = (a, 1 - a), q = (b, 1 - b), to the last digits."""
    a, b = 0.3, 0.8

    def logits(x):
        return torch.tensor([[math.log(x), math.log(1 - x)]], dtype=torch.float64)

    def kl(x, y):
        return x * math.log(x / y) + (1 - x) * math.log((1 - x) / (1 - y))

    m = beta * a + (1 - beta) * b
    expected = beta * kl(a, m) + (1 - beta) * kl(b, m)
    if beta in (0, 1):
        expected = kl(a, b) if beta == 0 else kl(b, a)
    divergence = {0: FORWARD, 1: REVERSE}.get(beta, MIXTURE)
    given = beta if divergence == MIXTURE else None
    soft = call(op, logits(b), logits(a), divergence=divergence, beta=given)[0].item()
    assert abs(soft - expected) <= 1e-13 + 1e-11 * expected
    # That a neighbouring beta would have been seen:
    if 0 < beta < 1:
        near = beta * (1 - 1e-6)
        assert call(op, logits(b), logits(a), divergence=MIXTURE, beta=near)[0].item() != soft


@pytest.mark.parametrize("op", OPS)
def test_rows_have_numbers_of_their_own(op):
    """keep and beta of each row are those of no neighbour."""
    s, t = distinct(40, 3000)
    keep = torch.arange(40) ** 2 + 1
    keep[::7] = 3000
    beta = torch.linspace(0.01, 0.99, 40, dtype=torch.float64)
    options = {"student_inverse": 0.5, "teacher_inverse": 0.5, "divergence": MIXTURE}
    together = call(op, s, t, keep=keep.tolist(), beta=beta.tolist(), **options)
    for r in range(40):
        alone = call(op, s[r : r + 1], t[r : r + 1], keep=keep[r].item(), beta=beta[r].item(),
                     **options)  # fmt: skip
        for actual, expected in zip(together, alone, strict=True):
            assert torch.equal(actual[r : r + 1], expected)
        assert (together[2][r] != 0).sum() == keep[r]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("value", [0.0, 0.25, 1.0, 1 / 3, 1e-6, -2.0])
def test_per_row_vectors(op, value):
    """The four vectors, each in its own place."""
    s, t = distinct(3, 20)
    labels = torch.tensor([0, 5, 19])
    _, hard, base = call(op, s, t, labels=labels, soft_weight=1.0, hard_weight=0.0)
    _, _, weighted = call(op, s, t, labels=labels, soft_weight=value, hard_weight=0.0)
    torch.testing.assert_close(weighted, value * base)
    _, _, hard_base = call(op, s, t, labels=labels, soft_weight=0.0, hard_weight=1.0)
    _, _, weighted = call(op, s, t, labels=labels, soft_weight=0.0, hard_weight=value)
    torch.testing.assert_close(weighted, value * hard_base)
    _, _, both = call(op, s, t, labels=labels, soft_weight=value, hard_weight=0.5)
    torch.testing.assert_close(both, value * base + 0.5 * hard_base)
    expected = torch.nn.functional.cross_entropy(s, labels, reduction="none")
    torch.testing.assert_close(hard, expected)
    if value > 0:
        p, lq = torch.softmax(t * 0.5, -1), torch.log_softmax(s * value, -1)
        got = call(op, s, t, student_inverse=value, teacher_inverse=0.5)
        torch.testing.assert_close(got[0], (p * (p.log() - lq)).sum(-1))
        torch.testing.assert_close(got[2], value * (lq.exp() - p))


@pytest.mark.parametrize("op", OPS)
def test_labels_have_64_bits(op):
    """A label beyond 2^32 is no class, whatever its low bits."""
    s, t = distinct(3, 20)
    labels = torch.tensor([2**32, 2**32 + 5, 7])
    soft, hard, gradient = call(op, s, t, labels=labels, hard_weight=1.0)
    assert soft[:2].isnan().all() and hard[:2].isnan().all() and gradient[:2].isnan().all()
    assert soft[2].isfinite() and hard[2].isfinite() and gradient[2].isfinite().all()


@pytest.mark.parametrize("op", ["scale_rows_", "scale_rows_reference_"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("scale", [1.0, 0.0, -1.0, 1 / 3, 2.0**-40, 65536.0])
def test_scale(op, dtype, scale):
    scale_rows_ = getattr(torch.ops.fastkd, op)
    values = normal(2, 3, 70, dtype=dtype)
    expected = values * torch.tensor(scale, dtype=dtype)
    one = values.clone()
    scale_rows_(one, torch.tensor([scale], dtype=dtype))
    assert torch.equal(one, expected)
    rows = values.clone()
    factors = torch.linspace(-1, 1, 6, dtype=dtype) * scale
    scale_rows_(rows, factors)
    assert torch.equal(rows, values * factors.view(2, 3, 1))


def test_instruction_set_index():
    """The index arrives: another one, another name, and what is no index has none."""
    limit = torch.ops.fastkd.cpu_instruction_set
    try:
        names = [limit(i) for i in range(len(INSTRUCTION_SETS))]
        assert names == INSTRUCTION_SETS and len(set(names)) == len(names) >= 1
        for index in (len(names), 100, -1, 2**31, 2**32, 2**32 + 1, -(2**32)):
            assert limit(index) == "", index
    finally:
        assert limit(0) == INSTRUCTION_SETS[0]


@pytest.mark.skipif(len(INSTRUCTION_SETS) < 2, reason="this processor has one instruction set")
def test_limiting_the_instruction_set_has_an_effect():
    """The bits of sums over another number of lanes differ; back at 0 they are the first again."""
    s, t = (x.float() for x in distinct(4, 3001))
    limit, last = torch.ops.fastkd.cpu_instruction_set, len(INSTRUCTION_SETS) - 1
    first = call("dense_rows", s, t)
    try:
        limit(last)
        other = call("dense_rows", s, t)
    finally:
        limit(0)
    assert not torch.equal(first[2], other[2])
    assert torch.equal(first[2], call("dense_rows", s, t)[2])


@pytest.mark.parametrize("beta", BETAS)
def test_every_instruction_set_is_right(cpu_isa, beta):
    assert cpu_isa in INSTRUCTION_SETS
    s, t = pair(4, 3001)
    check(Backend("cpu"), s, t, some_labels(4, 3001), beta=beta, alpha=0.5, top_k=900)


# (position, what is put there) of the arguments of dense_rows; two rows of 20.
UNREADABLE = {
    "vector dtype": (3, torch.ones(2)),
    "vector length": (5, torch.ones(3).double()),
    "labels int32": (2, torch.tensor([1, 2]).int()),
    "labels length": (2, torch.tensor([1])),
    "no labels": (2, None),
    "keep int32": (8, torch.tensor([1, 2]).int()),
    "keep length": (8, torch.tensor([1])),
    "vocab_size 0": (9, 0),
    "vocab_size large": (9, 21),
    "divergence 3": (10, 3),
    "divergence -1": (10, -1),
    "divergence of 64 bits": (10, 2**32),
    "mixture without beta": (10, MIXTURE),
    "beta of no mixture": (11, torch.ones(2).double()),
    "student int": (0, torch.ones(1, 2, 20).int()),
    "student stride": (0, torch.ones(2, 20, 2).double()[..., 0]),
    "student 1-D": (0, torch.ones(40).double()),
    "teacher rows": (1, torch.ones(1, 1, 20).double()),
    "teacher rows 2-D": (1, torch.ones(3, 20).double()),
    "teacher narrow": (1, torch.ones(1, 2, 19).double()),
    "dstudent rows": (7, torch.ones(1, 1, 20).double()),
    "dstudent narrow": (7, torch.ones(1, 2, 19).double()),
    "dstudent wide": (7, torch.ones(2, 21).double()),
    "dstudent bool": (7, torch.ones(1, 2, 20).bool()),
}


@pytest.mark.parametrize("change", UNREADABLE)
def test_the_op_refuses_what_it_cannot_read(change):
    s, t = distinct(2, 20)
    like = {"dtype": torch.float64}
    args = [s[None], t[None], torch.tensor([1, 2]), *(torch.ones(2, **like) for _ in range(4)),
            torch.zeros(1, 2, 20, **like), torch.tensor([9, 20]), 20, FORWARD, None]  # fmt: skip
    torch.ops.fastkd.dense_rows(*args)
    at, args[at] = UNREADABLE[change]
    with pytest.raises(RuntimeError, match="fastkd"):
        torch.ops.fastkd.dense_rows(*args)


def test_the_op_takes_the_same_rows_in_other_shapes():
    """[N, V] beside [A, B, V]: the number of rows has to agree, not how it is written."""
    s, t = distinct(6, 20)
    ones = torch.ones(6, dtype=torch.float64)

    def gradient(*shapes):
        student, teacher = s.view(shapes[0]), t.view(shapes[1])
        dstudent = torch.zeros(shapes[2], dtype=torch.float64)
        torch.ops.fastkd.dense_rows(
            student, teacher, None, ones, ones, ones, None, dstudent, None, 20, FORWARD, None
        )
        return dstudent.view(6, 20)

    expected = gradient((6, 20), (6, 20), (6, 20))
    assert torch.equal(gradient((2, 3, 20), (6, 20), (3, 2, 20)), expected)


def test_messages_say_nothing_of_the_machine_that_built_them():
    with pytest.raises(RuntimeError, match="fastkd: scale must be") as caught:
        torch.ops.fastkd.scale_rows_(torch.ones(3, 4), torch.ones(2))
    assert ", csrc/" in str(caught.value)
    module = Path(find_spec("fastkd._C").origin).read_bytes()
    assert re.findall(rb"(?<![\w./-])/[\w./-]+\.(?:h|cpp)\b", module) == []


FORKED = """
import os, torch, fastkd
torch.set_num_threads(2)
s, t = torch.randn(64, 4000), torch.randn(64, 4000)
fastkd.kd_loss(s, t)
child = os.fork()
if child == 0:
    try:
        fastkd.kd_loss(s, t)
    except RuntimeError as error:
        assert "forked" in str(error) and "set_num_threads(1)" in str(error)
        torch.set_num_threads(1)
        os._exit(0 if fastkd.kd_loss(s, t).isfinite() else 1)
    os._exit(2)
assert os.waitpid(child, 0)[1] == 0
"""


def test_a_forked_process_raises_where_it_would_hang():
    """OpenMP waits in the child for threads that only the parent has."""
    subprocess.run([sys.executable, "-c", FORKED], check=True, timeout=60)


@pytest.mark.parametrize(
    ("dstudent", "scale"),
    [
        (torch.ones(2, 20), torch.ones(3)),
        (torch.ones(2, 20), torch.ones(0)),
        (torch.ones(2, 20), torch.ones(4)[::2]),
        (torch.ones(2, 20), torch.ones(2).half()),
        (torch.ones(2, 20), torch.ones(2).long()),
        (torch.ones(2, 20).int(), torch.ones(2)),
        (torch.ones(2, 40)[:, ::2], torch.ones(2)),
        (torch.ones(20), torch.ones(())),
    ],
    ids=["3 of 2", "none", "strided", "half", "int64", "dstudent int", "dstudent stride", "1-D"],
)
def test_scale_rows_refuses_what_it_cannot_read(dstudent, scale):
    with pytest.raises(RuntimeError, match="fastkd"):
        torch.ops.fastkd.scale_rows_(dstudent, scale)
    assert (dstudent == 1).all()
