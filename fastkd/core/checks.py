"""Argument checks of the public losses: in Python, before any kernel, for every backend alike.

Only what the host already holds is looked at. A value that lives on another device is never read
back: there a bad label or a bad per-row temperature makes its row NaN.
"""

import math
import operator
from numbers import Real
from typing import Any

import torch
from torch import Tensor

LOGITS_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INDEX_DTYPES = (
    torch.int64,
    torch.int32,
    torch.int16,
    torch.int8,
    torch.uint8,
    torch.uint16,
    torch.uint32,
)
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


def as_int(name: str, value: Any, meaning: str = "an int") -> int:
    """What Python takes for an index: an int, one of NumPy's, an integer tensor of one value."""
    if type(value) is int:
        return value
    if isinstance(value, torch.SymInt):
        return value  # type: ignore[return-value]
    if not isinstance(value, bool):
        try:
            return operator.index(value)
        except TypeError:
            pass
    raise TypeError(f"{name} must be {meaning}, got {type(value).__name__}")


def check_one_logits(name: str, logits: Tensor) -> torch.Size:
    """A floating tensor [..., V]; returns its shape."""
    if not isinstance(logits, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor, got {type(logits).__name__}")
    if logits.layout != torch.strided:
        raise TypeError(
            f"{name} must be a dense tensor (torch.strided), got {logits.layout}: "
            + (
                "of nested tensors pass values(), whose rows are those of all sequences"
                if logits.layout == torch.jagged
                else "pass to_dense() of it"
            )
        )
    if logits.dtype not in LOGITS_DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {logits.dtype}")
    shape = logits.shape
    if len(shape) == 0 or shape[-1] == 0:
        raise ValueError(f"{name} must have shape [..., V] with V >= 1, got {tuple(shape)}")
    return shape


def check_index_dtype(name: str, values: Tensor) -> None:
    if values.dtype not in INDEX_DTYPES:
        raise TypeError(
            f"{name} must be of an integer dtype (int64 to int8, uint8 to uint32), "
            f"got {values.dtype}"
        )


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
    check_index_dtype("teacher_ids", ids)
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
        ids = ids.to(torch.int64)
        low, high = torch.aminmax(ids)
        if low < -1 or high >= vocab:
            bad = (ids < -1) | (ids >= vocab)
            raise ValueError(
                f"teacher_ids must lie in [0, {vocab}), or be -1 where there is none, "
                f"got {ids[bad][0].item()}"
            )
    return vocab


def check_log_probs(ids: Tensor, log_probs: Tensor) -> None:
    """Whether the rows of a sparse teacher can be log-probabilities, where the host can see it.

    Beyond 1e-3 a sum of probabilities may exceed 1 by what the rounding of a logarithm does to its
    probability, p |log p| eps.
    """
    if not (on_host(ids) and on_host(log_probs)) or log_probs.numel() == 0:
        return
    logs = log_probs.detach().masked_fill((ids < 0) | (log_probs == -math.inf), -1e4).float()
    p = logs.exp()
    rounding = torch.finfo(log_probs.dtype).eps * (p * logs.abs()).sum(-1)
    total = p.sum(-1)
    bad = total > 1 + 1e-3 + rounding
    if bad.any():
        raise ValueError(
            "teacher_log_probs must hold log-probabilities, whose exponentials sum to at most 1 in "
            f"a row, got a row of {total[bad][0].item():.6g}: pass log_softmax(logits), or "
            'repeated_ids="once" where a server names the sampled class a second time'
        )


def check_vocab_size(vocab_size: int | None, student: int, teacher: int | None) -> int:
    """How many leading classes take part; the sizes are those of the logits."""
    if vocab_size is None:
        if teacher is not None and student != teacher:
            raise ValueError(
                f"student_logits has {student} classes and teacher_logits {teacher}: "
                "pass vocab_size, the number of leading classes the two have in common"
            )
        return student
    vocab_size = as_int("vocab_size", vocab_size, "an int or None")
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
        if on_host(num_items) and not 0 <= num_items.item() < math.inf:
            raise ValueError(f"num_items must be finite and >= 0, got {num_items.item()}")
    elif not is_number(num_items):
        raise TypeError(
            f"num_items must be a number or a tensor of one, got {type(num_items).__name__}"
        )
    elif not 0 <= num_items < math.inf:
        raise ValueError(f"num_items must be finite and >= 0, got {num_items}")


def check_rows(name: str, values: Tensor, student: Tensor) -> Tensor:
    """One value per row, in the leading shape of the logits or flat; returned flat, [N]."""
    if not isinstance(values, Tensor):
        raise TypeError(f"{name} must be a torch.Tensor or None, got {type(values).__name__}")
    leading = student.shape[:-1]
    if values.shape != leading and tuple(values.shape) != (math.prod(leading),):
        hint = ""
        if len(leading) > 1 and values.shape == leading[:1] + student.shape[2:]:
            hint = (
                f": it fits logits of {student.shape[1]} classes in dimension 1, and a loss takes "
                "them in the last: pass logits.movedim(1, -1)"
            )
        raise ValueError(
            f"{name} must hold one value per row: shape {tuple(leading)} or "
            f"({math.prod(leading)},), got {tuple(values.shape)}{hint}"
        )
    if values.device != student.device:
        raise ValueError(f"{name} must be on the device of the logits, {student.device}, "
                         f"got {values.device}")  # fmt: skip
    if values.requires_grad and torch.is_grad_enabled():
        raise ValueError(f"{name} requires a gradient, but it is a constant here: detach it")
    return values.reshape(-1).contiguous()


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
    check_index_dtype("labels", labels)
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
    """A finite number > 0, or a flat tensor [N] of them; with `limit` the number may be inf.

    A tensor of one value is that for all rows, and one of shape [..., 1] has one for each, as a
    reduction with keepdim=True leaves it.
    """
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
    leading = student.shape[:-1]
    if temperature.dim() == len(leading) + 1 and temperature.shape[-1] == 1:
        temperature = temperature.squeeze(-1)
    if temperature.numel() == 1 and temperature.dim() < 2:
        temperature = temperature.reshape(()).expand(leading)
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
        top_k = as_int("top_k", top_k, "an int or None")
        if top_k < 1:
            raise ValueError(f"top_k must be >= 1, got {top_k}")


def number_kept(top_k: int | None, bottom_percentile: float, vocab_size: int) -> int:
    """min(top_k, V - floor(V * percentile / 100)), at least 1."""
    # 0.29 * 100 is 28.999999999999996 in binary: without the 1e-6 one class too few would go.
    keep = vocab_size - int(vocab_size * bottom_percentile / 100 + 1e-6)
    return max(keep if top_k is None else min(keep, top_k), 1)


def _extent(tensor: Tensor) -> tuple[int, int]:
    """The first address of its elements, and the one after the last."""
    last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    begin = tensor.data_ptr()
    return begin, begin + (last + 1) * tensor.element_size()


def check_inplace(student: Tensor, teacher: Tensor | None) -> None:
    """Whether the gradient may be written over the student's logits, of which `teacher` may be a
    view only if it is the same one: other rows would be read after they were overwritten."""
    if not student.requires_grad or not torch.is_grad_enabled():
        return
    base = student if student._base is None else student._base
    if base.is_leaf and base.requires_grad:
        raise ValueError(
            "inplace=True would overwrite student_logits, which is (a view of) a leaf that "
            "requires a gradient: pass inplace=False, or the output of the model"
        )
    if torch.compiler.is_compiling():  # strides may be symbols, which have no order
        return  # the ops look at the teacher's memory themselves
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
    if teacher is not None and type(student) is Tensor and type(teacher) is Tensor:
        check_overwritten(student, teacher)  # a fake tensor has no memory


def check_overwritten(student: Tensor, teacher: Tensor) -> None:
    """Whether what is written over the student's logits is the teacher's only in the same rows."""
    if student.numel() == 0 or student.is_meta:
        return
    if student.dtype == teacher.dtype and student.stride() == teacher.stride():
        if student.data_ptr() == teacher.data_ptr():
            return
    begin, end = _extent(student)
    teacher_begin, teacher_end = _extent(teacher)
    if begin < teacher_end and teacher_begin < end:
        raise ValueError(
            "inplace=True overwrites student_logits, and teacher_logits lies in the same memory "
            "without being the same view: pass teacher_logits.clone(), or inplace=False"
        )
