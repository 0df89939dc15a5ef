"""What the shared tests meet in the Triton kernels by chance alone: alignments, offsets beyond 32
bits, the selection by itself. On a GPU, or with TRITON_INTERPRET=1 in Triton's interpreter.
"""

import pytest
import torch
from lib.backends import BACKENDS
from lib.bounds import INF, NAN
from lib.compare import check, run
from lib.logits import moved, normal, pair, some_labels

import fastkd

if fastkd.backends()["triton"]:
    pytest.skip("; ".join(fastkd.backends()["triton"]), allow_module_level=True)

import triton
import triton.language as tl

from fastkd.kernels.triton.load import row_offset
from fastkd.kernels.triton.select import kth_largest
from fastkd.kernels.triton.types import Tile
from fastkd.spec import FORWARD, MIXTURE

TRITON = next(backend for backend in BACKENDS if backend.name == "triton")
pytestmark = [] if TRITON.interpreted else [pytest.mark.gpu]  # what benchmarks/on_gpu.sh runs
V = 2067


def placed(values: torch.Tensor, pad: int, offset: int) -> torch.Tensor:
    """The same rows, each `pad` columns after the one before, `offset` elements into a storage."""
    N = values.shape[0]
    base = torch.zeros(offset + N * (V + pad), dtype=values.dtype)
    return base[offset:].view(N, V + pad)[:, :V].copy_(values)


@pytest.mark.parametrize("dtypes", [
    (torch.float32, torch.float32), (torch.bfloat16, torch.bfloat16),
    (torch.float32, torch.bfloat16), (torch.float16, torch.float32),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("places", [
    ((0, 0), (0, 0)),  # rows of 2067 begin anywhere, student, teacher and gradient alike
    ((5, 0), (5, 3)),  # whole vectors in none of the three alike
    ((0, 8), (8, 0)),  # and in all
    ((0, 3), (0, 3)),
    ((0, 1), (1, 0)),
])  # fmt: skip
def test_alignments(dtypes, places):
    s, t = pair(3, V, dtype=dtypes[0], teacher_dtype=dtypes[1])
    s, t = placed(s, *places[0]), placed(t, *places[1])
    labels = some_labels(3, V, ignored=(1,))
    for inplace in (False, True):
        check(TRITON, s, t, labels, alpha=0.5, inplace=inplace)
    check(TRITON, s, t, top_k=77, beta=1.0, inplace=True)
    check(TRITON, s, t, vocab_size=1000, beta=0.3)
    for options in ({"inplace": True}, {"top_k": 77, "beta": 0.3, "vocab_size": 1900}):
        at_limit, expected = (
            run(name, s, t, labels, alpha=0.5, temperature=INF, **options)
            for name in (TRITON, "reference")
        )
        torch.testing.assert_close(at_limit.loss, expected.loss, rtol=1e-6, atol=0)
        # A few roundings, and the spacing of float16's subnormal numbers: it is about places.
        rtol = 4 * torch.finfo(dtypes[0]).eps
        torch.testing.assert_close(at_limit.gradient, expected.gradient, rtol=rtol, atol=2**-23)


@pytest.mark.parametrize("inverse", [1.0, 0.0])
def test_nothing_is_written_beside_the_rows(inverse):
    """The gaps between rows, and what stands before the first and after the last."""
    for dtype in (torch.float32, torch.bfloat16):
        s, t = pair(3, V, dtype=dtype)
        base = torch.full((3, V + 13), 77.0, dtype=dtype, device=TRITON.device)
        base[:, 5 : 5 + V] = s
        vector = torch.ones(3, device=TRITON.device)
        t, rows, T = t.to(TRITON.device), base[:, 5 : 5 + V], inverse * vector
        torch.ops.fastkd.dense_rows_triton(
            rows, t, None, T, T, vector, None, rows, None, V, FORWARD, None
        )
        torch.ops.fastkd.scale_rows_triton_(rows, 2 * vector)
        assert (base[:, :5] == 77).all() and (base[:, 5 + V :] == 77).all()
        assert (rows != s.to(TRITON.device)).any(-1).all()


@pytest.mark.parametrize("outside", ["bucket", "restrict", "renormalize"])
def test_sparse_rows_lie_anywhere(outside):
    """Classes beside each other, at both ends and in every tile; nothing is written beside rows."""
    for dtype, pad, offset in ((torch.float32, 5, 3), (torch.bfloat16, 0, 1)):
        s = placed(normal(3, V, dtype=dtype), pad, offset)
        labels = torch.tensor([0, 1030, V - 1])  # among the classes, among them, not
        ids = torch.cat((torch.arange(7), torch.arange(1020, 1040), torch.arange(300, V - 1, 101)))
        ids = ids[torch.randperm(len(ids))].expand(3, -1)
        log_probs = normal(3, ids.shape[1], seed=4).log_softmax(-1) - 0.1
        results = []
        for name in ("triton", "reference"):
            base = torch.full((3, V + 13), 77.0, dtype=dtype)
            rows = base[:, 5 : 5 + V]
            rows.copy_(s)
            device = TRITON.device if name == "triton" else "cpu"
            base, inputs = base.to(device), [moved(x, device) for x in (ids, log_probs, labels)]
            leaf = base[:, 5 : 5 + V].requires_grad_()
            loss = fastkd.topk_kd_loss(
                leaf if name == "triton" else leaf.double(), *inputs, outside=outside, alpha=0.7,
                temperature=2.0, vocab_size=V - 1 if outside == "bucket" else None, backend=name,
                ignore_index=V - 1,
            )  # fmt: skip
            (gradient,) = torch.autograd.grad(loss, leaf)
            results.append((loss.cpu().double(), gradient.cpu().double()))
        (loss, gradient), (exact, expected) = results
        torch.testing.assert_close(loss, exact, rtol=1e-6, atol=0)
        eps = 2 ** (-24 if dtype == torch.float32 else -9)
        bound = eps * expected.abs() + 1e-6 * expected.abs().amax(-1, keepdim=True)
        # The reference's gradient has been rounded to bfloat16 as well.
        assert ((gradient - expected).abs() <= 2 * bound).all()


def test_sparse_gradients_stay_in_their_rows():
    s, vector = normal(3, 50), torch.ones(3, device=TRITON.device)
    base = torch.full((3, 70), 77.0, device=TRITON.device)
    rows = base[:, 5:55]
    rows.copy_(s)
    ids = torch.tensor([[0, 49, 50]], device=TRITON.device).repeat(3, 1)
    log_probs = torch.full((3, 3), -1.0, device=TRITON.device)
    out = torch.ops.fastkd.sparse_rows_triton(
        rows, ids, log_probs, -vector, None, vector, vector, vector, None, rows, 50, False
    )
    assert (base[:, :5] == 77).all() and (base[:, 55:] == 77).all() and out[0].isfinite().all()
    assert (rows.sum(-1).abs() < 1e-6).all() and (rows != s.to(TRITON.device)).all()
    ids[1, 0] = -1  # no class; of the bare op the row is spoilt, and nothing before it is read
    g = torch.empty_like(rows)
    soft, _ = torch.ops.fastkd.sparse_rows_triton(
        s.to(TRITON.device), ids, log_probs, -vector, None, vector, vector, vector, None, g, 50,
        False,
    )  # fmt: skip
    assert soft.isnan().tolist() == g.isnan().all(-1).tolist() == [False, True, False]


def test_probabilities_of_any_size():
    """Beyond what fits the usual unit; negative ones, also where they would be pruned."""
    z = normal(4, 900)
    P = normal(4, 900, seed=1).softmax(-1)
    P[0] *= 1e36
    P[1, 800] = 3e38  # found after the first tile
    P[2, :] = P[2] * 1e-42
    P[3, 5] = -1e-20
    for options in ({}, {"bottom_percentile": 90.0}, {"top_k": 2, "beta": 1.0}):
        results = []
        for name in ("triton", "reference"):
            device = TRITON.device if name == "triton" else "cpu"
            leaf = z.clone().to(device).requires_grad_()
            loss = fastkd.kd_loss(
                leaf, P.to(device), temperature=5.0, teacher_kind="probs", reduction="none",
                backend=name, **options,
            )  # fmt: skip
            loss.sum().backward()
            results.append((loss.detach().cpu(), leaf.grad.cpu()))
        torch.testing.assert_close(*results, rtol=2e-5, atol=2e-5, equal_nan=True)
        assert results[0][0].isnan().tolist() == [False, False, False, True]


def test_rows_of_two_and_of_three_dimensions():
    s, t = (x.to(TRITON.device) for x in pair(6, 30))
    vector = torch.linspace(0.5, 1, 6, device=TRITON.device)
    results = []
    for student_shape, teacher_shape in (((), ()), ((2, 3), ()), ((), (2, 3)), ((2, 3), (2, 3))):
        student, teacher = (
            s.view(*(student_shape or (6,)), 30),
            t.view(*(teacher_shape or (6,)), 30),
        )
        for shape in ((6, 30), (2, 3, 30)):
            g = torch.empty(shape, device=TRITON.device)
            soft, _ = torch.ops.fastkd.dense_rows_triton(
                student, teacher, None, vector, vector, vector, None, g, None, 30, FORWARD, None
            )
            results.append((soft, g.view(6, 30)))
    for soft, g in results[1:]:
        assert torch.equal(soft, results[0][0]) and torch.equal(g, results[0][1])


def test_the_bare_op_reads_nothing_that_is_not_there():
    s, vector = torch.zeros(3, 9), torch.ones(3)
    keep = torch.tensor([9, 8, 1])
    good = [s, s, None, vector, vector, vector, None, s.clone(), keep, 9, FORWARD, None]

    def refused(**replaced):
        arguments = list(good)
        for place, value in replaced.items():
            arguments[int(place[1:])] = value
        arguments = [x.to(TRITON.device) if torch.is_tensor(x) else x for x in arguments]
        with pytest.raises(ValueError, match="fastkd"):
            torch.ops.fastkd.dense_rows_triton(*arguments)

    refused(_1=s[:2])
    refused(_1=s[:, :8])
    refused(_1=s.T.contiguous().T)
    refused(_1=s.double())
    refused(_2=torch.zeros(2, dtype=torch.int64))
    refused(_2=torch.zeros(3, dtype=torch.int32))
    refused(_3=vector[:2])
    refused(_4=vector.double())
    refused(_5=torch.ones(6)[::2])
    refused(_6=vector)  # without labels
    refused(_7=s[:2].clone())
    refused(_7=torch.zeros(3, 10))
    refused(_8=torch.tensor([9, 8]))
    refused(_8=torch.tensor([9, 8, 1]).int())
    refused(_9=10)
    refused(_9=0)
    refused(_10=3)
    refused(_10=MIXTURE)  # without beta
    refused(_11=vector)  # of no mixture
    refused(_10=MIXTURE, _11=vector.double())
    with pytest.raises(ValueError, match="scale"):
        torch.ops.fastkd.scale_rows_triton_(s.to(TRITON.device), torch.ones(2))


@triton.jit
def offset_kernel(out, row, shift, inner, outer_stride: tl.int64, inner_stride: tl.int64):
    tl.store(out, row_offset(row, shift, inner, outer_stride, inner_stride))


def test_offsets_have_64_bits():
    out = torch.zeros(1, dtype=torch.int64, device=TRITON.device)
    for row, inner, outer, stride in (
        (8191, 8192, 0, 262144), (8191, 1, 262144, 7), (12345, 100, 2**33 + 1, 2**31 + 3),
    ):  # fmt: skip
        offset_kernel[(1,)](out, row, 5, inner, outer, stride)
        assert out.item() == 5 + row // inner * outer + row % inner * stride


@triton.jit
def threshold_kernel(
    values, out, columns, keep, stride, TILE: tl.constexpr, SAMPLE: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    threshold = kth_largest(values + row * stride, 0, columns, keep, TILE, SAMPLE)
    tl.store(out + row, threshold)


def families(n: int) -> dict[str, torch.Tensor]:
    base = normal(n)
    few = base.clone()
    few[::3] = -INF
    return {
        "normal": base,
        "rounded": base.round(),
        "sorted": base.sort().values,
        "two values": (base > 0).float(),
        "constant": torch.full((n,), -1.25),
        "zeros of both signs": torch.where(base > 0, 0.0, -0.0),
        "many -inf": few,
        "one finite": torch.full((n,), -INF).index_fill_(0, torch.tensor([n // 2]), 3.0),
        "some inf": base.clone().index_fill_(0, torch.tensor([0, n - 1]), INF),
        "subnormal": base * 1e-40,
        "extremes": base.sign() * 6e4 + base,
        "wide": base.sign() * 10 ** (base * 1.5),
        "heavy tail": base**5,
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_selection_is_exact(dtype):
    """All classes at least as large as the keep-th of torch.sort, and no other."""
    n = 1500
    values = torch.stack(list(families(n).values())).to(dtype)
    width = 512 if TRITON.interpreted else 2048
    out = torch.zeros(len(values), device=TRITON.device)
    on_device = torch.nn.functional.pad(values, (0, 36)).to(TRITON.device)
    for keep in (1, 300, 1499):
        threshold_kernel[(len(values),)](
            on_device, out, n, keep, n + 36, TILE=Tile(width, 4, 4, 4), SAMPLE=64
        )
        expected = values >= values.sort(-1, descending=True).values[:, keep - 1 : keep]
        actual = values >= out.cpu()[:, None].to(dtype)
        assert torch.equal(out.cpu(), out.cpu().to(dtype).float()), "not a number of this dtype"
        for i, name in enumerate(families(n)):
            assert torch.equal(actual[i], expected[i]), (name, keep, out[i].item())


def test_selection_keeps_a_nan():
    values = normal(1, 700)
    for count in (1, 5, 700):
        values[0, :count] = NAN
        out = torch.zeros(1, device=TRITON.device)
        for keep in (1, 3, 699):
            threshold_kernel[(1,)](
                values.to(TRITON.device), out, 700, keep, 700,
                TILE=Tile(512, 4, 4, 4), SAMPLE=64,
            )  # fmt: skip
            assert not (values[0, :count] < out.item()).any()
            assert out.item() == INF or (values[0, count:] >= out.item()).sum() == keep - count
