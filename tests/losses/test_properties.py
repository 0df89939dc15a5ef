"""hypothesis: shapes, strides, ties, infinities, NaN, subnormals, extreme temperatures."""

import pytest
import torch
from lib.backends import BETAS
from lib.bounds import INF, NAN
from lib.compare import check, run

pytest.importorskip("hypothesis")
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from fastkd.kernels import triton as triton_backend

# A fixed seed and no deadline: a failure here is a failure everywhere.
SETTINGS = settings(
    max_examples=6 if triton_backend.INTERPRETED else 100,
    derandomize=True,
    deadline=None,
    database=None,
    phases=[Phase.generate, Phase.shrink],
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)
DTYPES = st.sampled_from([torch.float32, torch.bfloat16, torch.float16])
TINY = 1e-40  # subnormal in float32 and bfloat16, 0 in float16
PLAIN = [0.0, -0.0, 1.0, -1.0, 2.5, -7.0, 20.0, TINY, -TINY, 6e-8, 3e-39]
ODD = [INF, -INF, -INF, -INF, NAN, 6e4, -6e4, 90.0, -90.0, 1000.0]
TEMPERATURES = st.one_of(
    st.sampled_from([1.0, 2.0, 0.5]),
    st.floats(min_value=-4, max_value=6).map(lambda e: 10.0**e),
)


@st.composite
def logits(draw, values, rows: int, V: int) -> torch.Tensor:
    """Mostly a smooth random row, with some classes replaced by drawn values: ties and specials."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 3.0, 30.0]))
    base = torch.randn(rows, V, generator=generator) * scale
    count = draw(st.integers(0, min(V, 6)))
    for _ in range(count):
        r, i = draw(st.integers(0, rows - 1)), draw(st.integers(0, V - 1))
        base[r, i] = draw(st.sampled_from(values))
    if draw(st.booleans()):
        base = torch.where(base.abs() < 1e4, (base * 2).round() / 2, base)  # many ties
    return base


def sizes(large: bool):
    return st.one_of(
        st.integers(1, 40), st.sampled_from([1023, 1024, 1025, 2048, 2500] if large else [64])
    )


@st.composite
def strided(draw, values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The same rows under other strides, offsets and alignments."""
    N, V = values.shape
    layout = draw(st.sampled_from(["dense", "wide", "offset", "skip", "columns", "every other"]))
    if layout == "dense":
        return values.to(dtype)
    pad = draw(st.integers(1, 9))
    target = {
        "wide": lambda: torch.zeros(N, V + pad, dtype=dtype)[:, :V],
        "offset": lambda: torch.zeros(N * V + pad, dtype=dtype)[pad:].view(N, V),
        "skip": lambda: torch.zeros(2 * N, V, dtype=dtype)[::2],
        "columns": lambda: torch.zeros(V, N, dtype=dtype).t(),
        "every other": lambda: torch.zeros(N, 2 * V, dtype=dtype)[:, ::2],
    }[layout]()
    return target.copy_(values)


@st.composite
def problems(draw, values=PLAIN, large=True, temperatures=TEMPERATURES):
    N, V = draw(st.integers(1, 4)), draw(sizes(large))
    student, teacher = draw(logits(values, N, V)), draw(logits(values, N, V))
    if draw(st.integers(0, 3)) == 0:
        student = teacher + 1e-3 * student.nan_to_num(0, 1, -1)
    options = {"beta": draw(st.sampled_from([*BETAS, 0.9, 1e-3]))}
    if draw(st.booleans()):
        options["temperature"] = draw(temperatures)
    if draw(st.integers(0, 3)) == 0:
        options["teacher_temperature"] = draw(temperatures)
    if draw(st.integers(0, 2)) == 0:
        options["top_k"] = draw(st.integers(1, V))
    if draw(st.integers(0, 2)) == 0:
        options["bottom_percentile"] = draw(st.floats(0, 99.9))
    if draw(st.integers(0, 2)) == 0:
        options["vocab_size"] = draw(st.integers(1, V))
    labels = None
    if draw(st.booleans()):
        rows = st.one_of(st.just(-100), st.integers(0, V - 1))
        labels = torch.tensor(draw(st.lists(rows, min_size=N, max_size=N)))
        options["alpha"] = draw(st.sampled_from([1.0, 0.5, 0.0]))
    if draw(st.integers(0, 3)) == 0:
        options["token_weights"] = torch.tensor(
            draw(st.lists(st.sampled_from([0.0, 1.0, 0.5, 30.0]), min_size=N, max_size=N))
        )
    options["reduction"] = draw(st.sampled_from(["batchmean", "sum", "none"]))
    options["inplace"] = draw(st.booleans())
    dtypes = draw(DTYPES), draw(DTYPES)
    s = draw(strided(student, dtypes[0]))
    t = draw(strided(teacher, dtypes[1]))
    return s, t, labels, options


@given(problem=problems())
@SETTINGS
def test_ties_subnormals_strides_and_temperatures(kernel, problem):
    s, t, labels, options = problem
    check(kernel, s, t, labels, **options)


@given(problem=problems(values=ODD, temperatures=st.sampled_from([1.0, 2.0, 0.5, 3.0])))
@SETTINGS
def test_infinities_and_nan(kernel, problem):
    s, t, labels, options = problem
    check(kernel, s, t, labels, **options)


@given(problem=problems(large=False))
@SETTINGS
def test_float64(backend, problem):
    s, t, labels, options = problem
    check(backend, s.double(), t, labels, **options)


SPECIAL = st.sampled_from([NAN, INF, -INF])


@given(data=st.data(), V=sizes(True), beta=st.sampled_from(BETAS))
@SETTINGS
def test_specials_stay_in_their_rows(kernel, data, V, beta):
    """Whatever a row holds, the others come out bit for bit as without it."""
    s, t = data.draw(logits(PLAIN, 3, V)), data.draw(logits(PLAIN, 3, V))
    clean = run(kernel, s, t, beta=beta, reduction="none")
    for side in (s, t):
        for i in data.draw(st.lists(st.integers(0, V - 1), max_size=4)):
            side[1, i] = data.draw(SPECIAL)
    spoilt = run(kernel, s, t, beta=beta, reduction="none")
    for r in (0, 2):
        assert torch.equal(spoilt.loss[r], clean.loss[r])
        assert torch.equal(spoilt.gradient[r], clean.gradient[r])


@given(problem=problems(large=True))
@SETTINGS
def test_soft_term_is_never_negative(kernel, problem):
    s, t, _, options = problem
    options = {**options, "reduction": "none"}
    for name in ("alpha", "inplace", "token_weights"):
        options.pop(name, None)
    loss = run(kernel, s, t, **options).loss
    assert not (loss < 0).any()


def test_selection_is_exact(kernel):
    """The classes with a gradient are those >= the keep-th largest of torch.sort, ties and all."""
    slow = kernel.emulated or kernel.interpreted
    sizes = st.sampled_from([3, 40] if kernel.interpreted else [3, 40, 2500, 5000])

    @given(data=st.data(), V=sizes, dtype=DTYPES)
    @settings(SETTINGS, max_examples=min(SETTINGS.max_examples, 25 if slow else 100))
    def check_selection(data, V, dtype):
        t = data.draw(logits([*PLAIN, -INF, 6e4, -6e4], 2, V)).to(dtype)
        k = data.draw(st.integers(1, V))
        kept = t >= t.sort(-1, descending=True).values[:, k - 1 : k]
        kept &= t > -INF
        s = torch.linspace(-1, 1, V).expand(2, V)
        # p is nearly the same for all classes kept, q differs from each to the next: none vanishes.
        options = {"temperature": 10.0, "teacher_temperature": 1e7}
        gradient = run(kernel, s, t, top_k=k, **options).gradient
        several = kept.sum(-1, keepdim=True) > 1
        allowed = kept | (t == -INF)
        assert (gradient[~allowed] == 0).all()
        missing = kept & several & (gradient == 0)
        assert missing.sum() <= 2  # q - p may cross 0 once in a row

    check_selection()
