"""What is kept between calls shows in none of them: modes and transforms of callers before."""

import pytest
import torch
from lib.compare import run
from lib.logits import pair
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from fastkd import kd_loss
from fastkd.core.call import _filled, _kept, _settled_on_host

T = 1.75  # of no other test


class Every(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        return function(*args, **(kwargs or {}))


def in_inference_mode(s, t):
    with torch.inference_mode():
        kd_loss(s, t, temperature=T)


def on_fake_tensors(s, t):
    with FakeTensorMode() as mode:
        kd_loss(mode.from_tensor(s), mode.from_tensor(t), temperature=T)


def in_a_trace(s, t):
    make_fx(lambda s, t: kd_loss(s, t, temperature=T, backend="reference"))(s, t)


def in_a_dispatch_mode(s, t):
    with Every():
        kd_loss(s, t, temperature=T)


def in_a_transform(s, t):
    transform = torch.func.vmap(lambda s, t: kd_loss(s[None], t[None], temperature=T))
    try:
        transform(s.expand(3, *s.shape)[:, 0], t.expand(3, *t.shape)[:, 0])
    except (RuntimeError, NotImplementedError):
        return  # an op without a rule for batches


@pytest.mark.parametrize(
    "first", [in_inference_mode, on_fake_tensors, in_a_trace, in_a_dispatch_mode, in_a_transform]
)
def test_a_call_after_one_of_another_kind(backend, first):
    s, t = pair(5, 40)
    expected = run(backend, s, t, temperature=T)
    for N in (5, 1):
        _kept.cache_clear()
        _settled_on_host.cache_clear()
        first(s[:N], t[:N])
        again = run(backend, s[:N], t[:N], temperature=T, num_items=5)
        assert torch.equal(again.gradient, expected.gradient[:N])


@pytest.mark.parametrize("N", [0, 1, 4096, 4097])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_filled_vectors(dtype, N):
    for value in (1 / 3, 1e-310, torch.finfo(dtype).max, 0.0):
        vector = _filled(value, N, torch.empty(2, 3), dtype)
        assert vector.dtype == dtype and vector.shape == (N,) and vector.is_contiguous()
        expected = torch.tensor(value, dtype=torch.float64).to(dtype)  # to the nearest
        assert torch.equal(vector, expected.expand(N))


@pytest.mark.parametrize("N", [3, 5000])
@pytest.mark.parametrize("options", [{"temperature": 1e25}, {"temperature": 1e-40},
                                     {"num_items": 1e-40}], ids=str)  # fmt: skip
def test_what_float32_does_not_hold(options, N):
    s, t = pair(N, 2)
    with pytest.raises(ValueError, match=r"temperature.*num_items"):
        kd_loss(s, t, **options)
    assert kd_loss(s.double(), t.double(), **options).dtype == torch.float64
    with pytest.raises(ValueError, match="float64"):
        kd_loss(s.double(), t.double(), temperature=1e200)
