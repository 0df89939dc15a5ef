"""Every backend against the definition in float64: dtype x shape x option x stride.

The error is bounded by the rounding of what is stored and of float32 arithmetic (lib/compare.py).
"""

import itertools

import pytest
import torch
from lib.backends import BETAS, DTYPES
from lib.bounds import INF
from lib.compare import check, run
from lib.logits import STRIDES, normal, pair, some_labels

from fastkd import kd_loss

HALVES = (torch.bfloat16, torch.float16)
NARROW = (torch.float32, *HALVES)


def name(value) -> str:
    return str(value).removeprefix("torch.").replace(" ", "")


@pytest.mark.parametrize("teacher_dtype", DTYPES, ids=name)
@pytest.mark.parametrize("dtype", DTYPES, ids=name)
def test_dtypes(kernel, dtype, teacher_dtype):
    s, t = pair(5, 1025, dtype=dtype, teacher_dtype=teacher_dtype)
    labels = some_labels(5, 1025, ignored=(3,))
    for beta in BETAS:
        check(kernel, s, t, labels, beta=beta, alpha=0.3, temperature=2.0)
        check(kernel, s, t, labels, beta=beta, top_k=300)


# 1, 2, 5: no vector is full; 1023..1025, 2049: around a chunk of 1024 columns; 32003: many chunks
# and a tail of 3.
@pytest.mark.parametrize("V", [1, 2, 5, 16, 17, 100, 1000, 1023, 1024, 1025, 2049, 32003])
@pytest.mark.parametrize("dtype", NARROW, ids=name)
def test_shapes(kernel, dtype, V):
    s, t = pair(3 if V < 10_000 else 1, V, dtype=dtype)
    labels = some_labels(s.shape[0], V)
    for beta in BETAS:
        check(kernel, s, t, beta=beta)
        check(kernel, s, t, labels, beta=beta, alpha=0.3, temperature=1.7)
    check(kernel, s, t, beta=0.1, bottom_percentile=20.0)
    check(kernel, s[:1], t[:1], labels[:1], alpha=0.0)


def rows(*values: float) -> torch.Tensor:
    return torch.tensor(values)


OPTIONS = [
    {"temperature": 4.0},
    {"temperature": 0.5, "teacher_temperature": 2.0},
    {"temperature": 2.0, "teacher_temperature": 1.0},
    {"temperature": rows(1.0, 2.0, 0.7, 3.0, 10.0, 0.25)},
    {"temperature": rows(1.0, 2.0, 0.7, 3.0, 10.0, 0.25), "teacher_temperature": 2.0},
    {"teacher_temperature": rows(1.0, 2.0, 0.7, 3.0, 10.0, 0.25), "temperature": 2.0},
    {"temperature": rows(1.0, 2.0, 0.5, 3.0, 10.0, 0.25).half()},
    {"alpha": 0.0},
    {"alpha": 0.3},
    {"alpha": 0.3, "temperature": 3.0},
    {"alpha": 0.7, "top_k": 5},
    {"alpha": 0.7, "vocab_size": 1000, "temperature": 2.0},
    {"top_k": 1},
    {"top_k": 2},
    {"top_k": 1024},
    {"top_k": 1099},
    {"top_k": 1100},
    {"top_k": 10**12},
    {"bottom_percentile": 20.0},
    {"bottom_percentile": 99.9},
    {"bottom_percentile": 1e-3},
    {"bottom_percentile": 50.0, "top_k": 40},
    {"bottom_percentile": 98.0, "top_k": 400},
    {"bottom_percentile": 50.0, "temperature": rows(1.0, 2.0, 0.7, 3.0, 10.0, 0.25)},
    {"vocab_size": 1},
    {"vocab_size": 1024},
    {"vocab_size": 1025, "top_k": 100},
    {"token_weights": rows(1.0, 0.0, 0.5, 2.0, 0.0, 1e-3)},
    {"token_weights": rows(1, 0, 3, 2, 0, 1).long(), "alpha": 0.3},
    {"token_weights": rows(-1.0, 0.25, 0.5, 2.0, 0.0, 1e-3), "reduction": "none"},
    {"num_items": 8192},
    {"num_items": 2.5, "token_weights": rows(1.0, 0.0, 0.5, 2.0, 0.0, 1e-3)},
    {"num_items": torch.tensor(64)},
    {"num_items": torch.tensor([64.0]), "alpha": 0.3},
    {"reduction": "sum"},
    {"reduction": "sum", "alpha": 0.3, "temperature": 2.0},
    {"reduction": "none"},
    {"reduction": "none", "alpha": 0.3, "temperature": 2.0},
    {"ignore_index": 5},
    {"ignore_index": 5, "alpha": 0.3},
]


def describe(options: dict) -> str:
    def show(value) -> str:
        return f"{value.dtype}".removeprefix("torch.") if torch.is_tensor(value) else str(value)

    return "-".join(f"{k}={show(v)}" for k, v in options.items())


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("options", OPTIONS, ids=describe)
def test_options(kernel, options, inplace):
    for dtype, beta in itertools.product((torch.float32, torch.float16), BETAS):
        s, t = pair(6, 1100, dtype=dtype)
        ignored = () if "ignore_index" in options else (2, 5)
        labels = some_labels(6, options.get("vocab_size", 1100), ignored)
        labels[3] = 5 % options.get("vocab_size", 1100)
        if options.get("ignore_index") == 5:
            assert (labels == 5).any()
        check(kernel, s, t, labels, beta=beta, inplace=inplace, **options)
        if options.get("alpha", 1.0) == 1 and dtype == torch.float32:
            check(kernel, s, t, beta=beta, inplace=inplace, **options)


@pytest.mark.parametrize("k", [1, 2, 3, 63, 64, 65, 500, 2500, 4999, 5000])
def test_selection_in_long_rows(kernel, k):
    """Rows long enough to be sampled: normal, with ties by rounding, sorted, of two values, of one;
    of sizes from 1e-30 to 1000; half and nearly all -inf; and such as mislead the cpu's sample."""
    base = normal(11, 5000)
    base[1] = base[1].round()
    base[2] = base[2].sort().values
    base[3] = (base[3] > 0).float()
    base[4] = 0
    base[5] = base[5].sign() * torch.logspace(-30, 3, 5000).roll(1234)
    base[6, normal(5000, seed=7) > 0] = -INF
    base[7, 5:4990] = -INF
    sampled = torch.arange(256)
    sampled = sampled * 19 + sampled * 7 % 19
    for row, value in ((8, 50.0), (9, -50.0), (10, -INF)):
        base[row, sampled] = value
    student = normal(11, 5000, seed=3)
    for dtype in NARROW:
        check(kernel, student.to(dtype), base.to(dtype), top_k=k, temperature=2.0)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize(("V_s", "V_t"), [(30, 40), (40, 30), (1500, 1100), (1030, 2050)])
def test_different_vocabularies(kernel, V_s, V_t, inplace):
    vocab = min(V_s, V_t) - 2
    for dtype in NARROW:
        s, t = normal(4, V_s, dtype=dtype), normal(4, V_t, seed=1, dtype=dtype)
        t[:, vocab:] = float("nan")  # what lies beyond is never read, but by the hard term
        unread = s.clone()
        unread[:, vocab:] = float("nan")
        labels = some_labels(4, vocab, ignored=(1,))
        for beta in BETAS:
            options = {"vocab_size": vocab, "beta": beta, "inplace": inplace}
            check(kernel, s, t, labels, alpha=0.5, **options)
            result = check(kernel, unread, t, top_k=3, **options)
            assert (result.gradient[:, vocab:] == 0).all()


V = 37


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
@pytest.mark.parametrize("dtype", NARROW, ids=name)
@pytest.mark.parametrize("layout", STRIDES)
def test_strides(backend, layout, dtype, inplace):
    strided = STRIDES[layout]()
    dense = normal(*strided.shape, seed=1)
    strided = _cast(strided, dtype)
    labels = some_labels(strided[..., 0].numel(), strided.shape[-1]).reshape(strided.shape[:-1])
    for student, teacher in ((strided, dense), (dense.to(dtype), strided), (strided, strided / 2)):
        for options in ({}, {"alpha": 0.5, "top_k": 11}, {"beta": 0.5, "reduction": "none"}):
            check(backend, student, teacher, labels, inplace=inplace, **options)


def _cast(tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """With the strides and the offset of `tensor`."""
    base = torch.zeros(tensor.untyped_storage().nbytes() // tensor.element_size(), dtype=dtype)
    view = base.as_strided(tensor.shape, tensor.stride(), tensor.storage_offset())
    return view.copy_(tensor)


@pytest.mark.parametrize("shape", [(4, 1), (2, 3, 1), (2, 3, 4, 1)])
def test_expanded_teacher(backend, shape):
    """One row for all: strides of 0."""
    s = normal(*shape[:-1], V)
    check(backend, s, normal(V, seed=2).expand(s.shape))
    check(backend, s, normal(V, seed=2).expand(s.shape), beta=0.5, top_k=3)


def test_expanded_student(backend):
    s = normal(V).expand(4, V)
    check(backend, s, normal(4, V, seed=1))
    s = normal(4, 1).expand(4, V)
    check(backend, s, normal(4, V, seed=1))


@pytest.mark.parametrize("shape", [(0, 5), (2, 0, 5), (0,) * 3 + (5,)])
def test_no_rows(backend, shape):
    for reduction in ("batchmean", "sum", "none"):
        for options in ({}, {"alpha": 0.5, "top_k": 2}):
            s = torch.zeros(shape)
            result = run(backend, s, s, s[..., 0].long(), reduction=reduction, **options)
            expected = torch.zeros(shape[:-1]) if reduction == "none" else torch.zeros(())
            assert torch.equal(result.loss, expected)
            assert result.gradient.shape == shape


@pytest.mark.parametrize("grad_output", [0.0, 1.0, -2.0, 1 / 3, 65536.0])
@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_grad_output(kernel, grad_output, inplace):
    for dtype in NARROW:
        s, t = pair(5, 1025, dtype=dtype)
        options = {"grad_output": grad_output, "inplace": inplace}
        check(kernel, s, t, num_items=8192, **options)
        check(kernel, s, t, some_labels(5, 1025), alpha=0.5, beta=0.5, num_items=8192, **options)


@pytest.mark.parametrize("inplace", [False, True], ids=["", "inplace"])
def test_grad_output_per_row(kernel, inplace):
    for dtype in NARROW:
        s, t = pair(6, 1025, dtype=dtype)
        g = torch.tensor([0.0, 1.0, -2.0, 1 / 3, 7.0, 1e-3])
        labels = some_labels(6, 1025, ignored=(3,))
        common = {"reduction": "none", "inplace": inplace}
        check(kernel, s, t, labels, grad_output=g, **common)
        check(kernel, s.view(2, 3, -1), t.view(2, 3, -1), labels.view(2, 3),
              grad_output=g.view(2, 3), alpha=0.5, **common)  # fmt: skip
        check(kernel, s[:1], t[:1], labels[:1], grad_output=g[2:3], **common)
        # A grad_output with strides of 0, which is what .sum() hands down.
        check(kernel, s, t, labels, grad_output=torch.tensor(3.0).expand(6), **common)


def test_float16_gradients_do_not_underflow_through_the_mean(kernel):
    """1 / (8192 V) is below the smallest float16; scaled by 65536 as GradScaler does, it is not."""
    s, t = pair(4, 8000, dtype=torch.float16)
    result = check(kernel, s, t, num_items=8192, grad_output=65536.0)
    exact = run("reference", s.double(), t.double(), num_items=8192, grad_output=65536.0)
    lost = (result.gradient - exact.gradient).norm() / exact.gradient.norm()
    assert lost < 2**-11
    assert (exact.gradient[result.gradient == 0].abs() < 2**-24).all()


@pytest.mark.parametrize("dtype", NARROW, ids=name)
@pytest.mark.parametrize("reduction", ["batchmean", "none"])
def test_retained_backward_is_the_same_backward(backend, dtype, reduction):
    """With and without retain_graph, the first time and the second: the same bits."""
    s, t = pair(5, 300, dtype=dtype)

    def loss(leaf):
        return kd_loss(leaf, t.to(backend.device), temperature=3.0, reduction=reduction,
                       backend=backend.name)  # fmt: skip

    leaf = s.to(backend.device).requires_grad_()
    for scale in (1.0, 1 / 3, 65536.0):
        out = loss(leaf)
        g = torch.full_like(out, scale)
        once = torch.autograd.grad(loss(leaf), leaf, g)[0]
        first = torch.autograd.grad(out, leaf, g, retain_graph=True)[0]
        kept = first.clone()
        second = torch.autograd.grad(out, leaf, 2 * g, retain_graph=True)[0]
        third = torch.autograd.grad(out, leaf, g)[0]
        assert torch.equal(first, kept), "a later backward wrote over what an earlier one returned"
        assert torch.equal(once, first) and torch.equal(once, third)
        exact = run("reference", s.double(), t.double(), temperature=3.0, reduction=reduction,
                    grad_output=2 * g.cpu().double())  # fmt: skip
        torch.testing.assert_close(second.cpu().double(), exact.gradient, rtol=2e-2, atol=1e-3)


def test_second_backward_without_retain_graph_raises(backend):
    s = normal(3, 7).to(backend.device).requires_grad_()
    loss = kd_loss(s, torch.zeros_like(s), backend=backend.name)
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


@pytest.mark.parametrize("retain", [False, True])
def test_second_backward_of_inplace_raises(backend, retain):
    root = normal(3, 7).to(backend.device).requires_grad_()
    loss = kd_loss(root * 1, torch.zeros_like(root), inplace=True, backend=backend.name)
    loss.backward(retain_graph=retain)
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()
