"""Argument checks of the public losses: in Python, before any kernel, for every backend alike.

Only what the host already holds is looked at. A value that lives on another device is never read
back: there a bad label or a bad per-row temperature makes its row NaN.
"""

import math
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LABEL_DTYPES = (torch.int64, torch.int32)
REDUCTIONS = ("batchmean", "sum", "none")
TEACHER_KINDS = ("logits", "probs")


def on_host(tensor: Tensor) -> bool:
    """Whether the values may be looked at without a device sync or a graph break."""
    if not tensor.is_cpu or torch.compiler.is_compiling():
        return False
    return type(tensor) in (Tensor, torch.nn.Parameter)  # a fake tensor holds no values


def is_number(value: Any) -> bool:
    if type(value) in (float, int):  # for speed: an abstract base class takes ten times as long
        return True
    return isinstance(value, Real) and not isinstance(value, bool)


def check_one_logits(name: str, logits: Tensor) -> torch.Size:
    """A floating tensor [..., V]; returns its shape."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(logits).__name__}")
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    shape = logits.shape
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., V] with V >= 1, got {tuple(shape)}")
    return shape


def check_constant(name: str, teacher: Tensor) -> None:
    """A teacher gets no gradient, and one that asks for it is a mistake of the caller."""
    if teacher.requires_grad and torch.is_grad_enabled():
        raise ValueError(
            f"{name} requires a gradient, but the teacher is a constant here: "
            f"pass {name}.detach(), or run the teacher under torch.no_grad()"
        )


def check_sparse_teacher(
    student: Tensor, ids: Tensor, log_probs: Tensor, vocab_size: int | None
) -> int:
    """Dtypes, devices, shapes and (on the host) the ids' range; how many classes take part."""
    check_one_logits("student_logits", student)
    for name, values in (("teacher_ids", ids), ("teacher_log_probs", log_probs)):
        if not isinstance(values, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(values).__name__}")
        if values.device != student.device:
            raise ValueError(
                f"{name} must be on the device of student_logits, {student.device}, "
                f"got {values.device}"
            )
        if values.dim() != student.dim() or values.shape[:-1] != student.shape[:-1]:
            raise ValueError(
                f"{name} must have shape {(*student.shape[:-1], 'k')}, got {tuple(values.shape)}"
            )
    if ids.dtype not in LABEL_DTYPES:
        raise TypeError(f"teacher_ids must be int64 or int32, got {ids.dtype}")
    if log_probs.dtype not in LOGITS_DTYPES:
        raise TypeError(f"teacher_log_probs must be of a floating dtype, got {log_probs.dtype}")
    if ids.shape != log_probs.shape or ids.shape[-1] == 0:
        raise ValueError(
            "teacher_ids and teacher_log_probs must have the same k >= 1, "
            f"got {ids.shape[-1]} and {log_probs.shape[-1]}"
        )
    check_constant("teacher_log_probs", log_probs)
    vocab = check_vocab_size(vocab_size, student.shape[-1], None)
    if on_host(ids) and ids.numel() > 0:
        low, high = torch.aminmax(ids)
        if low < -1 or high >= vocab:
            bad = (ids < -1) | (ids >= vocab)
            raise ValueError(
                f"teacher_ids must lie in [0, {vocab}), or be -1 where there is none, "
                f"got {ids[bad][0].item()}"
            )
    return vocab


def check_vocab_size(vocab_size: int | None, student: int, teacher: int | None) -> int:
    """How many leading classes take part; the sizes are those of the logits."""
    if vocab_size is None:
        if teacher is not None and student != teacher:
            raise ValueError(
                f"student_logits has {student} classes and teacher_logits {teacher}: "
                "pass vocab_size, the number of leading classes the two have in common"
            )
        return student
    if not isinstance(vocab_size, int) or isinstance(vocab_size, bool):
        raise TypeError(f"vocab_size must be an int or None, got {type(vocab_size).__name__}")
    largest = student if teacher is None else min(student, teacher)
    if not 1 <= vocab_size <= largest:
        sizes = f"student {student}" + ("" if teacher is None else f", teacher {teacher}")
        raise ValueError(
            f"vocab_size must lie in [1, {largest}], the classes the logits have ({sizes}), "
            f"got {vocab_size}"
        )
    return vocab_size


def check_logits(student: Tensor, teacher: Tensor, vocab_size: int | None) -> int:
    """Dtypes, devices and shapes of the two logits; returns how many classes take part."""
    student_shape = check_one_logits("student_logits", student)
    teacher_shape = check_one_logits("teacher_logits", teacher)
    if student.device != teacher.device:
        raise ValueError(
            f"teacher_logits must be on the device of student_logits, {student.device}, "
            f"got {teacher.device}"
        )
    if student_shape != teacher_shape and student_shape[:-1] != teacher_shape[:-1]:
        raise ValueError(
            "teacher_logits must have the leading shape of student_logits, "
            f"{tuple(student_shape[:-1])}, got {tuple(teacher_shape[:-1])}"
        )
    check_constant("teacher_logits", teacher)
    return check_vocab_size(vocab_size, student_shape[-1], teacher_shape[-1])


def check_unit_interval(name: str, value: float) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number in [0, 1], got {type(value).__name__}")
    if not 0 <= value <= 1:
        raise ValueError(f"{name} must lie in [0, 1], got {value}")


def check_reduction(reduction: str, num_items: float | Tensor | None) -> None:
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    if num_items is None:
        return
    if reduction != "batchmean":
        raise ValueError(f'num_items goes with reduction="batchmean", got {reduction!r}')
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one value, got shape {tuple(num_items.shape)}")
        if on_host(num_items) and not 0 < num_items.item() < math.inf:
            raise ValueError(f"num_items must be finite and > 0, got {num_items.item()}")
    elif not is_number(num_items):
        raise TypeError(
            f"num_items must be a number or a tensor of one, got {type(num_items).__name__}"
        )
    elif not 0 < num_items < math.inf:
        raise ValueError(f"num_items must be finite and > 0, got {num_items}")


def check_rows(name: str, values: Tensor, student: Tensor) -> Tensor:
    """One value per row, in the leading shape of the logits or flat; returned flat, [N]."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(values).__name__}")
    leading = student.shape[:-1]
    if values.shape != leading and tuple(values.shape) != (math.prod(leading),):
        raise ValueError(
            f"{name} must hold one value per row: shape {tuple(leading)} or "
            f"({math.prod(leading)},), got {tuple(values.shape)}"
        )
    if values.device != student.device:
        raise ValueError(f"{name} must be on the device of the logits, {student.device}, "
                         f"got {values.device}")  # fmt: skip
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but it is a constant here: detach it")
    return values.reshape(-1)


def check_alpha(alpha: float, labels: Tensor | None) -> None:
    """The weight of the soft term; what is left weighs the hard one, which needs labels."""
    check_unit_interval("alpha", alpha)
    if labels is None and alpha < 1:
        raise ValueError(
            f"alpha = {alpha} gives the hard term a weight of {1 - alpha}, which needs labels: "
            "pass labels, or alpha=1"
        )


def check_weight(name: str, value: float) -> None:
    if not is_number(value):
        raise TypeError(f"{name} must be a number >= 0, got {type(value).__name__}")
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and >= 0, got {value}")


def check_teacher_kind(teacher_kind: str) -> None:
    if teacher_kind not in TEACHER_KINDS:
        raise ValueError(
            f"teacher_kind must be one of {', '.join(TEACHER_KINDS)}, got {teacher_kind!r}"
        )


def check_labels(
    labels: Tensor | None, student: Tensor, vocab_size: int, ignore_index: int
) -> Tensor | None:
    """Dtype, shape and (on the host) range of the labels; returned flat, int64 [N]."""
    if labels is None:
        return None
    if not isinstance(labels, Tensor):
        raise TypeError(f"labels must be a torch.Tensor or None, got {type(labels).__name__}")
    if labels.dtype not in LABEL_DTYPES:
        raise TypeError(f"labels must be int64 or int32, got {labels.dtype}")
    if not isinstance(ignore_index, int) or isinstance(ignore_index, bool):
        raise TypeError(f"ignore_index must be an int, got {type(ignore_index).__name__}")
    flat = check_rows("labels", labels, student).to(torch.int64)
    if on_host(flat) and flat.numel():
        low, high = flat.aminmax()
        if low.item() < 0 or high.item() >= vocab_size:  # perhaps only by ignore_index
            bad = ((flat < 0) | (flat >= vocab_size)) & (flat != ignore_index)
            if bad.any():
                raise ValueError(
                    f"labels must lie in [0, {vocab_size}) or be ignore_index = {ignore_index}, "
                    f"got {flat[bad][0].item()}"
                )
    return flat


def check_temperature(
    name: str, temperature: float | Tensor, student: Tensor, limit: bool = False
) -> float | Tensor:
    """A finite number > 0, or a flat tensor [N] of them; with `limit` the number may be inf."""
    if not isinstance(temperature, Tensor):
        if not is_number(temperature):
            raise TypeError(
                f"{name} must be a number or a tensor of one per row, "
                f"got {type(temperature).__name__}"
            )
        if not 0 < temperature < math.inf and not (limit and temperature == math.inf):
            raise ValueError(f"{name} must be finite and > 0, got {temperature}")
        return float(temperature)
    if not temperature.is_floating_point():
        raise TypeError(f"{name} must be of a floating dtype, got {temperature.dtype}")
    flat = check_rows(name, temperature, student)
    if on_host(flat):
        bad = ~((flat > 0) & (flat < math.inf))
        if bad.any():
            raise ValueError(f"{name} must be finite and > 0, got {flat[bad][0].item()}")
    return flat


def check_limit(temperature: float | Tensor, teacher_temperature: float | Tensor | None) -> None:
    """T has to be infinite on both sides or on none: else there is no limit of T^2 D."""

    def infinite(value: float | Tensor) -> bool:
        return isinstance(value, float) and value == math.inf

    if teacher_temperature is None:
        return
    if infinite(temperature) != infinite(teacher_temperature):
        raise ValueError(
            "temperature and teacher_temperature must both be infinite or both finite, got "
            f"{temperature} and {teacher_temperature}"
        )


def check_pruning(top_k: int | None, bottom_percentile: float) -> None:
    """Types and ranges. In a graph they are compared with the ends of their ranges alone."""
    if not is_number(bottom_percentile):
        raise TypeError(
            f"bottom_percentile must be a number in [0, 100), "
            f"got {type(bottom_percentile).__name__}"
        )
    if not 0 <= bottom_percentile < 100:
        raise ValueError(f"bottom_percentile must lie in [0, 100), got {bottom_percentile}")
    if top_k is not None:
        if not isinstance(top_k, int) or isinstance(top_k, bool):
            raise TypeError(f"top_k must be an int or None, got {type(top_k).__name__}")
        if top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {top_k}")


def number_kept(top_k: int | None, bottom_percentile: float, vocab_size: int) -> int:
    """min(top_k, V - floor(V * percentile / 100)), at least 1."""
    # 0.29 * 100 is 28.999999999999996 in binary: without the 1e-6 one class too few would go.
    keep = vocab_size - int(vocab_size * bottom_percentile / 100 + 1e-6)
    return max(keep if top_k is None else min(keep, top_k), 1)


def check_inplace(student: Tensor) -> None:
    """Whether the gradient may be written over the student's logits."""
    if not student.requires_grad or not torch.is_grad_enabled():
        return
    base = student if student._base is None else student._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            "inplace=True would overwrite student_logits, which is (a view of) a leaf that "
            "requires a gradient: pass inplace=False, or the output of the model"
        )
    if torch.compiler.is_compiling():  # strides may be symbols, which have no order
        return
    # Ordered by stride, each dimension must step over the whole of the one before.
    reach = 0
    overlap = False
    for stride, size in sorted(zip(student.stride(), student.shape, strict=True)):
        if size > 1:
            overlap = overlap or stride <= reach
            reach += stride * (size - 1)
    if overlap:
        raise ValueError(
            "inplace=True needs student_logits whose elements each have memory of their own, got "
            f"an expanded or overlapping tensor of shape {tuple(student.shape)} with strides "
            f"{student.stride()}: pass student_logits.clone()"
        )
