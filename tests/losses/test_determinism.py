"""Two runs of one input give the same bits, on 1 thread and on 2."""

import pytest
import torch
from lib.backends import BETAS
from lib.bounds import INF, NAN
from lib.compare import check, run
from lib.logits import normal, pair, some_labels

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def bits(result) -> list[bytes]:
    tensors = (result.loss, result.soft, result.hard, result.gradient)
    return [t.flatten().view(torch.uint8).numpy().tobytes() for t in tensors if t is not None]


def same_bits(kernel, threads, *arguments, **options) -> None:
    kernel.need(arguments[0].dtype)
    seen = {1: [], 2: []}
    for count in (1, 2, 1, 2):
        threads(count)
        result = run(kernel, *arguments, return_terms=True, **options)
        seen[count].append(bits(result))
    assert seen[1][0] == seen[1][1] and seen[2][0] == seen[2][1]
    if kernel.name != "reference":  # there it is torch that splits a sum by the number of threads
        assert seen[1] == seen[2]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("beta", BETAS)
def test_bits(kernel, threads, dtype, beta):
    N = 12 if kernel.slow else 33
    V = 700 if kernel.interpreted else 2051
    s, t = pair(N, V, dtype=dtype)
    labels = some_labels(N, V, ignored=(0, 7, 8, 9, 11))
    for options in (
        {},
        {"alpha": 0.3, "temperature": 2.0},
        {"top_k": 50, "reduction": "none"},
        {"bottom_percentile": 20.0, "alpha": 0.5, "inplace": True, "grad_output": 1 / 3},
        {"temperature": torch.linspace(0.5, 4, N), "num_items": 8192},
    ):
        same_bits(kernel, threads, s, t, labels, beta=beta, **options)


@pytest.mark.parametrize("beta", BETAS)
def test_many_short_rows(backend, threads, beta):
    """Rows are handed to threads one by one; which thread takes which must not show."""
    N = 12 if backend.interpreted else 500 if backend.slow else 70000
    s, t = pair(N, 8)
    labels = some_labels(N, 8, ignored=tuple(range(0, N, 3)))
    same_bits(backend, threads, s, t, labels, beta=beta, alpha=0.5)
    same_bits(backend, threads, s, t, beta=beta, top_k=3)


def test_one_long_row(kernel, threads):
    s, t = pair(1, 200_003)
    same_bits(kernel, threads, s, t)
    same_bits(kernel, threads, s, t, top_k=77_777, beta=0.5)


def test_special_rows_do_not_disturb_the_others(kernel, threads):
    """What a thread's workspace held of a NaN or infinite row must not show in its next one."""
    s, t = pair(16, 3000)
    clean = run(kernel, s, t, reduction="none")
    odd = [0, 3, 4, 9, 15]
    s[odd[0]], t[odd[1]], s[odd[2]], t[odd[3], :2000] = NAN, -INF, INF, -INF
    s[odd[4], 5] = t[odd[4], 5] = -INF
    threads(1)
    spoilt = run(kernel, s, t, reduction="none")
    rest = [r for r in range(16) if r not in odd]
    assert torch.equal(spoilt.loss[rest], clean.loss[rest])
    assert torch.equal(spoilt.gradient[rest], clean.gradient[rest])
    same_bits(kernel, threads, s, t, some_labels(16, 3000), alpha=0.5)


def test_a_row_does_not_depend_on_its_neighbours(kernel, threads):
    s, t = pair(12, 2500)
    for beta in BETAS:
        together = run(kernel, s, t, beta=beta, reduction="none")
        for r in (0, 5, 11):
            alone = run(kernel, s[r : r + 1], t[r : r + 1], beta=beta, reduction="none")
            assert torch.equal(alone.loss[0], together.loss[r])
            assert torch.equal(alone.gradient[0], together.gradient[r])


def test_calls_of_other_sizes_between(kernel, threads):
    """The workspace is kept between calls and grows: no trace of an earlier, larger vocabulary."""
    threads(1)
    s, t = pair(3, 700)
    before = bits(run(kernel, s, t, beta=0.5, top_k=20))
    big = normal(2, 9000) * 30
    run(kernel, big, -big, beta=0.5, top_k=500)
    assert bits(run(kernel, s, t, beta=0.5, top_k=20)) == before


def test_float_mode_of_the_process_is_left_alone(kernel):
    """The kernel flushes subnormal results to 0; the arithmetic of its caller must not."""
    small = torch.full((100_000,), 1e-40)
    s, t = pair(2 if kernel.interpreted else 64, 4000)
    run(kernel, s, t)
    assert (small * 1.5 != 0).all()
    assert 1e-40 * 1.5 != 0.0 and torch.tensor(1e-40).mul(0.5).item() != 0.0


def test_same_result_for_every_alignment(kernel):
    """The offset of the storage decides nothing.

    In the Triton kernels it does: rows of student and teacher that begin at different places of a
    16-byte vector are read column by column, where a GPU adds up a lane's columns in another order.
    There it stays within the roundings of either order.
    """
    s, t = pair(3, 1500)
    expected = bits(run(kernel, s, t))
    for offset in (1, 3, 7):
        shifted = torch.zeros(s.numel() + offset)[offset:].view(s.shape).copy_(s)
        if kernel.name == "triton":
            check(kernel, shifted, t)
        else:
            assert bits(run(kernel, shifted, t)) == expected
