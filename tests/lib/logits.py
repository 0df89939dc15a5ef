"""Logits and labels for tests, and how they come to another device as they lie on this one."""

import functools
from collections.abc import Callable

import torch
from lib.backends import DEVICES, Backend
from torch import Tensor
from torch.utils._pytree import tree_map_only


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32, scale=3.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(dtype)


def pair(*shape: int, dtype=torch.float32, teacher_dtype=None, seed=0) -> tuple[Tensor, Tensor]:
    """Logits of a student and of a teacher that agree about as much as in training."""
    teacher = normal(*shape, seed=seed, dtype=torch.float64)
    student = teacher + normal(*shape, seed=seed + 1, dtype=torch.float64, scale=1.0)
    return student.to(dtype), teacher.to(teacher_dtype or dtype)


def some_labels(N: int, vocab: int, ignored: tuple[int, ...] = ()) -> Tensor:
    labels = torch.arange(N) * 7919 % vocab
    labels[list(ignored)] = -100
    return labels


def copied(tensor: Tensor, device: str) -> Tensor:
    """A copy of all its storage on that device, and there the strides and the offset of `tensor`.

    `.to` makes contiguous what has gaps, shares elements or begins later in its storage.
    """
    whole = tensor.detach().new_empty(0).set_(tensor.untyped_storage()).to(device, copy=True)
    place = (tensor.storage_offset(), tensor.shape, tensor.stride())
    return whole.new_empty(0).set_(whole.untyped_storage(), *place)


def moved(tensor: Tensor, device: str) -> Tensor:
    """As `.to(device)`, with a gradient as well; but on the other device it lies as here."""
    if tensor.device.type == torch.device(device).type:
        return tensor
    return _Moved.apply(tensor, device)


class _Moved(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor: Tensor, device: str) -> Tensor:
        ctx.device = tensor.device
        return copied(tensor, device)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.to(ctx.device), None


def on(backend: Backend, *tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(moved(tensor, backend.device) for tensor in tensors)


def at_backend(loss: Callable) -> Callable:
    """`loss` for tensors on the CPU, where its results come back to, on its backend's device."""

    @functools.wraps(loss)
    def call(*arguments, **options):
        device = DEVICES[options.get("backend", "cpu")]
        arguments, options = tree_map_only(
            Tensor, lambda tensor: moved(tensor, device), (arguments, options)
        )
        return tree_map_only(Tensor, Tensor.cpu, loss(*arguments, **options))

    return call


# How the rows of logits may lie, by a name for it; most have this many classes, which is odd.
STRIDED_V = 37
STRIDES = {
    "1-D": lambda: normal(STRIDED_V),
    "2-D": lambda: normal(5, STRIDED_V),
    "shifted 3-D": lambda: normal(3, 5, STRIDED_V)[:, :-1],
    "4-D": lambda: normal(2, 3, 2, STRIDED_V),
    "4-D shifted": lambda: normal(2, 3, 4, STRIDED_V)[:, :, :-1],
    "4-D permuted": lambda: normal(3, 2, 4, STRIDED_V).permute(1, 2, 0, 3),
    "5-D": lambda: normal(2, 1, 3, 2, STRIDED_V),
    "every other row": lambda: normal(10, STRIDED_V)[::2],
    "sequence first": lambda: normal(5, 3, STRIDED_V).transpose(0, 1),
    "columns of a wider tensor": lambda: normal(4, 2 * STRIDED_V)[:, 3 : 3 + STRIDED_V],
    "transposed": lambda: normal(STRIDED_V, 4).t(),
    "transposed inside": lambda: normal(2, STRIDED_V, 3).transpose(1, 2),
    "every other column": lambda: normal(4, 2 * STRIDED_V)[:, ::2],
    "misaligned": lambda: normal(4 * STRIDED_V + 1)[1:].view(4, STRIDED_V),
    "misaligned rows": lambda: normal(4, STRIDED_V + 1)[:, 1:],
    "one row": lambda: normal(1, STRIDED_V),
    "one column": lambda: normal(7, 1),
    "one strided column": lambda: normal(7, 3)[:, 1:2],
}
