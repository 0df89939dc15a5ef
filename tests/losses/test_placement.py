"""What the tests hand to a backend's device lies there as it was made: else no test would meet
strides, offsets and alignments on a GPU. The meta device stands in for one.
"""

from typing import NamedTuple

import pytest
import torch
from lib import backends, logits
from lib.backends import Backend
from lib.compare import run
from lib.logits import STRIDES, at_backend, moved, normal, on
from torch import Tensor

import fastkd

META = Backend("reference", "meta")
LAYOUTS = {
    **STRIDES,
    "one row for all": lambda: normal(7).expand(4, 7),
    "one class for all": lambda: normal(4, 1).expand(4, 7),
    "rows that overlap": lambda: normal(10).unfold(0, 7, 1),
    "no rows": lambda: normal(9, 7)[4:4],
}


def place(tensor: Tensor) -> tuple:
    return tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.dtype


@pytest.mark.parametrize("layout", LAYOUTS)
def test_strides_and_offset_arrive(layout):
    tensor = LAYOUTS[layout]()
    for dtype in (torch.float32, torch.bfloat16):
        here = tensor if dtype == tensor.dtype else tensor.to(dtype)
        (there,) = on(META, here)
        assert there.device.type == "meta" and place(there) == place(here)
    assert moved(tensor, "cpu") is tensor
    copy = logits.copied(tensor, "cpu")
    assert place(copy) == place(tensor) and torch.equal(copy, tensor)
    assert copy.data_ptr() != tensor.data_ptr() or copy.numel() == 0


class Seen(Exception):
    pass


@pytest.mark.parametrize("layout", LAYOUTS)
def test_run_hands_on_what_it_was_given(monkeypatch, layout):
    """As it lies; a student with strides of 0 is made whole, for it takes a gradient."""
    given = []

    def loss(*tensors, backend, **options):
        given.extend((*tensors, *options.values()))
        raise Seen

    monkeypatch.setattr(fastkd, "kd_loss", loss)
    logits = LAYOUTS[layout]()
    rows = [logits[..., 0], logits[..., -1].expand(logits.shape[:-1])]
    labels = torch.zeros(*logits.shape[:-1], 2, dtype=torch.int64)[..., 1]
    with pytest.raises(Seen):
        run(META, logits, logits, labels, temperature=rows[0], token_weights=rows[1])
    assert all(tensor.device.type == "meta" for tensor in given)
    student, *others = map(place, given)
    assert others == [place(x) for x in (logits, labels, *rows)]
    whole = logits.clone(memory_format=torch.contiguous_format)
    assert student == place(whole if 0 in logits.stride() else logits)


class Output(NamedTuple):
    loss: Tensor
    hard: None


def test_a_loss_called_at_its_backend(monkeypatch):
    """What is given arrives as it lies, and still takes a gradient; what is returned comes back."""
    monkeypatch.setitem(backends.DEVICES, "reference", "meta")
    given = []

    def loss(student, teacher, labels=None, **options):
        given.append((student, teacher, options["temperature"]))
        return Output(torch.zeros(3), None)

    student = normal(6, 9)[::2, 1:].requires_grad_()
    teacher, T = normal(8).expand(3, 8), torch.ones(7)[1::2]
    out = at_backend(loss)(student, teacher, backend="reference", temperature=T)
    assert out.loss.shape == (3,) and out.hard is None
    for there, here in zip(given[0], (student, teacher, T), strict=True):
        assert there.device.type == "meta" and place(there) == place(here)
    assert given[0][0].requires_grad
