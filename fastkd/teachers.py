"""Teachers: several into one, and what is done to a student beside its loss.

What else the literature does with teachers is a line or two on :func:`fastkd.kd_loss`:

Mutual learning (Zhang et al. 2018): two students learn from each other and from the labels, each
with the other held constant. With alpha = 0.5 every term has half the paper's weight. Of more than
two, each learns from the ensemble of the others, whose gradient is that of the paper's mean of KLs:

>>> one, two = student(inputs), peer(inputs)
>>> loss = fastkd.kd_loss(one, two.detach(), labels, alpha=0.5)
>>> loss += fastkd.kd_loss(two, one.detach(), labels, alpha=0.5)
>>> loss.backward()

Teacher assistant (Mirzadeh et al. 2020): a model of a size between the two is distilled first, then
teaches; nothing but the teacher changes. Self-distillation (Furlanello et al. 2018): the same, with
a teacher of the student's own shape, trained before.

>>> for smaller, larger in ((assistant, teacher), (student, assistant)):
...     with torch.no_grad():
...         larger_logits = larger(inputs)
...     smaller_logits = smaller(inputs)
...     fastkd.kd_loss(smaller_logits, larger_logits, labels, temperature=4.0, alpha=0.9).backward()

Self-distillation among the exits of one network (Zhang et al. 2019): every shallow exit learns from
the deepest one.

>>> *shallow, deepest = (torch.randn(8, 10, requires_grad=True) for _ in range(3))
>>> loss = F.cross_entropy(deepest, labels)
>>> for logits in shallow:
...     loss += fastkd.kd_loss(logits, deepest.detach(), labels, temperature=3.0, alpha=0.1)
>>> loss.backward()

Specialists (Hinton et al. 2015, section 5): a model of a few confusable classes, whose last logit
is that of all others together, the dustbin. It is trained on examples of which half are of its own
classes; before use, that is taken back by adding to the dustbin's logit the logarithm of how many
times too often its classes were shown:

>>> specialist_logits[..., -1] += math.log((0.5 / own_share) / (0.5 / (1 - own_share)))
"""

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .core.checks import (
    as_int,
    check_constant,
    check_labels,
    check_one_logits,
    check_temperature,
    check_vocab_size,
    is_number,
)
from .core.chunks import chunks, take

MEANS = ("probs", "logits")


def _weights(weights: Sequence[float] | Tensor | None, count: int) -> list[float]:
    """One per teacher, of sum 1."""
    if weights is None:
        return [1 / count] * count
    values = weights.tolist() if isinstance(weights, Tensor) else list(weights)
    if len(values) != count:
        raise ValueError(f"weights must hold one per teacher, {count}, got {len(values)}")
    for weight in values:
        if not is_number(weight):
            raise TypeError(f"weights must hold numbers, got {type(weight).__name__}")
        if not 0 <= weight < math.inf:
            raise ValueError(f"weights must be finite and >= 0, got {weight}")
    total = math.fsum(values)
    if total == 0:
        raise ValueError("weights must not all be 0")
    return [weight / total for weight in values]


def _check_teachers(teachers: Sequence[Tensor]) -> None:
    if not teachers:
        raise ValueError("teacher_logits_list must hold at least one teacher's logits")
    first = teachers[0]
    for index, logits in enumerate(teachers):
        name = f"teacher_logits_list[{index}]"
        check_one_logits(name, logits)
        check_constant(name, logits)
        if logits.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of the first, {tuple(first.shape)}, got "
                f"{tuple(logits.shape)}: where vocabularies are padded, slice them to their classes"
            )
        if logits.device != first.device:
            raise ValueError(
                f"{name} must be on the device of the first, {first.device}, got {logits.device}"
            )


def ensemble(
    teacher_logits_list: Iterable[Tensor],
    weights: Sequence[float] | Tensor | None = None,
    temperature: float | Tensor = 1.0,
    mean: str = "probs",
) -> Tensor:
    r"""The logits of several teachers' mean, to be passed as `teacher_logits`.

    ``mean="probs"``: the mean of their distributions at `temperature`, as Hinton et al. (2015)
    distil an ensemble. The result is ``T * log(sum_m w_m softmax(v_m / T))``, so that its softmax
    at the same T is that mean, and the loss must be taken at the same T::

        kd_loss(student, ensemble(teachers, temperature=T), temperature=T)

    At T = 1 it holds log-probabilities. The gradient equals that of the weighted mean of the
    teachers' own losses, ``sum_m w_m kd_loss(student, v_m)``; that loss is larger by the constant
    ``T^2 sum_m w_m KL(p_m || mean)``.

    ``mean="logits"``: ``sum_m w_m v_m``, whose softmax is the normalised geometric mean of the
    distributions, at every temperature. Its reverse KL (``beta=1``) has the gradient of the
    weighted mean of the teachers' own reverse KLs.

    A class at -inf in one teacher has the others' share of the mean of probabilities, and is at
    -inf in the mean of logits; at -inf in all of them it is so in both. A NaN stays in its row.

    Args:
        teacher_logits_list: tensors [..., V] of one shape and device; float32, bfloat16, float16
            and float64 may be mixed. Any strides.
        weights: one number >= 0 per teacher, a sequence or a tensor [M] of them (which is read to
            the host), normalised to sum 1; None: equal. A teacher of weight 0 is not read.
        temperature: T > 0, a number or a floating tensor with one value per row.
        mean: "probs" or "logits".

    Returns:
        [..., V], float32 (float64 where one of them is float64), without a gradient. Teachers are
        read in chunks of rows: beside the result there is only memory for a few chunks.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: no teachers, shapes or devices that do not fit, a value out of range, a teacher
            that requires a gradient.

    Examples:
        >>> teachers = [torch.randn(8, 32000) for _ in range(3)]
        >>> p = F.softmax(fastkd.ensemble(teachers, temperature=2.0) / 2.0, dim=-1)
        >>> torch.allclose(p, sum(F.softmax(v / 2.0, dim=-1) for v in teachers) / 3)
        True
    """
    teachers = list(teacher_logits_list)
    _check_teachers(teachers)
    shares = _weights(weights, len(teachers))
    if mean not in MEANS:
        raise ValueError(f"mean must be one of {', '.join(MEANS)}, got {mean!r}")
    first = teachers[0]
    temperature = check_temperature("temperature", temperature, first)

    members = [(v, share) for v, share in zip(teachers, shares, strict=True) if share > 0]
    double = any(v.dtype == torch.float64 for v in teachers)
    dtype = torch.float64 if double else torch.float32
    V = first.shape[-1]
    with torch.no_grad():
        result = torch.empty(math.prod(first.shape[:-1]), V, dtype=dtype, device=first.device)
        for rows in chunks(first):
            T = temperature
            if isinstance(T, Tensor):
                T = T[rows].to(dtype).unsqueeze(-1)
            chunk = result[rows]
            for i, (v, share) in enumerate(members):
                values = take(v, rows).to(dtype)
                if mean == "logits":
                    values = values * share
                    chunk.copy_(values if i == 0 else chunk + values)
                else:
                    values = F.log_softmax(values / T, dim=-1) + math.log(share)
                    chunk.copy_(values if i == 0 else torch.logaddexp(chunk, values))
            if mean == "probs":
                chunk.mul_(T)
    return result.reshape(first.shape)


def class_bias(
    logits: Tensor,
    labels: Tensor,
    classes: Sequence[int],
    *,
    ignore_index: int = -100,
) -> float:
    """The offset to the logits of `classes` under which the fewest labelled rows are misclassified.

    A student that never saw a class learns from its teacher what it looks like, but not how often
    it occurs; one number repairs that (Hinton et al. 2015, section 3, who found +3.5 for a missing
    digit and -7.6 for the only two shown)::

        delta = fastkd.class_bias(student(inputs), labels, [3])  # on held-out data
        student.output.bias.data[[3]] += delta

    Found exactly, from the points at which each row's prediction enters or leaves `classes`.

    Args:
        logits: [..., V], of any floating dtype.
        labels: of any integer dtype, one per row; rows labelled `ignore_index` do not count.
        classes: the classes that share the offset: some, not all, of the V.
        ignore_index: the label of rows that do not count.

    Returns:
        A float: 0.0 where no offset does better, else the middle of the widest range of the best.

    Raises:
        TypeError: a wrong type or dtype.
        ValueError: classes or labels out of range, no classes, all of them, or one of them twice.

    Examples:
        >>> logits = torch.tensor([[1.0, 0.0], [5.0, 0.0]])
        >>> fastkd.class_bias(logits, torch.tensor([1, 0]), [1])
        3.0
    """
    check_one_logits("logits", logits)
    V = logits.shape[-1]
    inside = [as_int("classes", index, "a sequence of ints") for index in classes]
    for index in inside:
        if not 0 <= index < V:
            raise ValueError(f"classes must lie in [0, {V}), got {index}")
    if not 0 < len(set(inside)) == len(inside) < V:
        raise ValueError(f"classes must be some of the {V}, not all, each once, got {inside}")
    if labels is None:
        raise TypeError("labels must be a torch.Tensor, got NoneType")
    ignore_index = as_int("ignore_index", ignore_index)
    flat = check_labels(labels, logits, V, ignore_index)
    assert flat is not None

    counting = flat != ignore_index
    z = logits.detach().reshape(-1, V)[counting].double().cpu()
    flat = flat[counting].cpu()
    member = torch.zeros(V, dtype=torch.bool, device="cpu")
    member[inside] = True
    best_inside = z.masked_fill(~member, -math.inf).max(-1)
    best_outside = z.masked_fill(member, -math.inf).max(-1)
    # Above this offset a row's prediction is one of `classes`, below it another.
    crossing = best_outside.values - best_inside.values
    finite = crossing.isfinite()  # the others are right or wrong whatever the offset
    crossing, order = crossing[finite].sort()
    if len(crossing) == 0:
        return 0.0
    right_above = (best_inside.indices == flat)[finite][order].long()
    right_below = (best_outside.indices == flat)[finite][order].long()
    # Correct rows in each of the n + 1 ranges that the crossings divide the offsets into, of which
    # the outer two, without end, are taken to be 2 wide.
    correct = F.pad(right_above.cumsum(0), (1, 0)) + F.pad(
        right_below.flip(0).cumsum(0).flip(0), (0, 1)
    )
    edges = torch.cat([crossing[:1] - 2, crossing, crossing[-1:] + 2])
    ranges: list[tuple[float, float]] = []
    wide = edges.diff() > 0
    best = correct[wide].max()
    for low, high, count in zip(
        edges[:-1].tolist(), edges[1:].tolist(), correct.tolist(), strict=True
    ):
        if high == low:
            continue
        if count == best and ranges and ranges[-1][1] == low:
            ranges[-1] = (ranges[-1][0], high)
        elif count == best:
            ranges.append((low, high))
    if any(
        (low < 0 or low == edges[0]) and (high > 0 or high == edges[-1]) for low, high in ranges
    ):
        return 0.0
    low, high = max(ranges, key=lambda r: r[1] - r[0])
    return (low + high) / 2


class TopKTeacher(NamedTuple):
    """What :func:`topk_teacher` returns; the second and third argument of topk_kd_loss."""

    ids: Tensor  # [..., k] int64
    log_probs: Tensor  # [..., k] float32 (float64 of float64), at T = 1


def topk_teacher(teacher_logits: Tensor, k: int, vocab_size: int | None = None) -> TopKTeacher:
    """The k most probable classes of every row with their log-probabilities, largest first.

    Args:
        teacher_logits: [..., V]; read a few rows at a time, nothing of N x V is made.
        k: how many; all where there are fewer.
        vocab_size: number of leading classes that take part, and over which the probabilities sum
            to 1; None: all.

    Raises:
        TypeError, ValueError: as :func:`kd_loss`.

    Examples:
        >>> ids, log_probs = fastkd.topk_teacher(torch.randn(8, 32000), 64)
        >>> student = torch.randn(8, 32000, requires_grad=True)
        >>> fastkd.topk_kd_loss(student, ids, log_probs, temperature=2.0).backward()
    """
    check_one_logits("teacher_logits", teacher_logits)
    vocab = check_vocab_size(vocab_size, teacher_logits.shape[-1], None)
    k = as_int("k", k)
    if k < 1:
        raise ValueError(f"k must be >= 1, got {k}")
    leading = teacher_logits.shape[:-1]
    dtype = torch.float64 if teacher_logits.dtype == torch.float64 else torch.float32
    shape = (math.prod(leading), min(k, vocab))
    ids = torch.empty(shape, dtype=torch.int64, device=teacher_logits.device)
    log_probs = torch.empty(shape, dtype=dtype, device=teacher_logits.device)
    for rows in chunks(teacher_logits):
        logits = take(teacher_logits.detach(), rows)[:, :vocab]
        values, ids[rows] = logits.topk(shape[1], dim=-1)
        lse = logits.to(dtype).logsumexp(-1, keepdim=True)
        log_probs[rows] = values.to(dtype) - lse
    return TopKTeacher(ids.view(*leading, shape[1]), log_probs.view(*leading, shape[1]))
