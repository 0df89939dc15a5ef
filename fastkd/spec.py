"""The definition of the loss, in plain torch: the "reference" backend and the oracle of every test.

Row by row, with z the student's and v the teacher's logits, y the label and T the temperatures:

    K    = {i < vocab_size : v_i >= the keep-th largest v}, without classes at -inf in both rows
    p    = softmax(v / T_teacher) over K        q = softmax(z / T_student) over K
    soft = KL(p || q)                                       FORWARD
         = KL(q || p)                                       REVERSE
         = beta KL(p || m) + (1 - beta) KL(q || m)          MIXTURE, m = beta p + (1 - beta) q
    hard = -log softmax(z)[y]                               at T = 1, over all V_s of the student

Decoupled, with `target_weight`: the label joins K, soft is taken over K without it, and

    target = KL((p_y, 1 - p_y) || (q_y, 1 - q_y))

At T = infinity on both sides, given as an inverse of 0, soft stands for the limit of T^2 D:

    soft = c sum_K (d - mean d)^2 / (2 |K|)     d = z - v; c = 1, of a mixture beta (1 - beta)

With `teacher_probs` the teacher's row holds probabilities P: v = log P.

The classes from vocab_size on are the student's alone. The soft term does not look at them and has
a gradient of exactly 0 there; the hard term is `F.cross_entropy(z, y)` whatever vocab_size is, and
a label may be any class of the student. Decoupled, the label has to be one of the teacher's too.

Weights, T^2, means and masks are folded into one weight per row and term by the caller
(:mod:`fastkd.core.call`). Sources: Hinton et al. 2015 (arXiv:1503.02531) for the tempered softmax,
T^2 and its limit; Agarwal et al. 2024 (arXiv:2306.13649) for beta; Zhao et al. 2022
(arXiv:2203.08679) for the decoupled terms.
"""

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

INF = float("inf")
NAN = float("nan")

FORWARD, REVERSE, MIXTURE = range(3)  # which divergence soft is; as in csrc/call.h


def compute_dtype(student: Tensor, teacher: Tensor) -> torch.dtype:
    """The dtype of all arithmetic, of the per-row vectors and of the loss."""
    double = torch.float64 in (student.dtype, teacher.dtype)
    return torch.float64 if double else torch.float32


def kept_classes(v: Tensor, keep: Tensor | None) -> Tensor:
    """Mask [N, V] of each row's `keep` largest teacher logits; ties at the last are all kept.

    `keep` [N] is taken to the nearest number in [1, V]; None: every class.
    """
    if keep is None:
        return torch.ones_like(v, dtype=torch.bool)
    keep = keep.clamp(1, v.shape[-1])
    # On the host all the largest that a row wants: elsewhere no number is read back.
    largest = int(keep.amax()) if keep.is_cpu else v.shape[-1]
    return v >= v.topk(largest, dim=-1).values.gather(-1, keep.unsqueeze(-1) - 1)


def excess(la: Tensor, lb: Tensor) -> Tensor:
    """a log(a/b) - a + b from the logarithms of a and b: its sum is KL(a || b), no term is < 0.

    a = 0 leaves b; b = 0 < a is +inf. Below |d| = 1, a (d + expm1(-d)) does not cancel.
    """
    a, b, d = la.exp(), lb.exp(), la - lb
    value = torch.where(d.abs() < 1, a * (d + torch.expm1(-d)), a * d - a + b)
    return torch.where(la == -INF, b, torch.where(lb == -INF, INF, value))


def soft_term(
    x: Tensor, y: Tensor, kept: Tensor, divergence: int, beta: Tensor | None
) -> tuple[Tensor, Tensor]:
    """The divergence D [N] of softmax(x) from softmax(y) over `kept`, and dD/dx [N, V].

    `beta` [N]: of a mixture. A row whose D is NaN, or of the reverse one infinite, has a NaN
    gradient in every class.
    """
    kept = kept & ~((x == -INF) & (y == -INF))
    lq = F.log_softmax(x.masked_fill(~kept, -INF), dim=-1)
    lp = F.log_softmax(y.masked_fill(~kept, -INF), dim=-1)
    p, q = lp.exp(), lq.exp()

    def kl(la: Tensor, lb: Tensor) -> Tensor:
        return torch.where(kept, excess(la, lb), 0).sum(-1, keepdim=True)

    if divergence == FORWARD:
        value = kl(lp, lq)
        gradient = q - p
    elif divergence == REVERSE:
        value = kl(lq, lp)
        gradient = q * (lq - lp - value)
    else:
        assert beta is not None, "a mixture needs beta"
        share = beta.to(x.dtype).unsqueeze(-1)
        lm = torch.logaddexp(share.log() + lp, torch.log1p(-share) + lq)
        from_q = kl(lq, lm)
        value = share * kl(lp, lm) + (1 - share) * from_q
        gradient = (1 - share) * q * (lq - lm - from_q)
    gradient = gradient.masked_fill(~kept | (x == -INF), 0)
    value = value.masked_fill(~kept.any(-1, keepdim=True), NAN)  # no class, no p
    lost = value.isnan()
    if divergence == REVERSE:
        lost = lost | (value == INF)
    return value.squeeze(-1), gradient.masked_fill(lost, NAN)


def flat_term(z: Tensor, v: Tensor, kept: Tensor, beta: Tensor | None) -> tuple[Tensor, Tensor]:
    """The limit of T^2 D [N] at T = infinity, and its gradient with respect to z [N, V].

    Infinite, and without a gradient, where a class has a logit on one side only.
    """
    kept = kept & ~((z == -INF) & (v == -INF))
    count = kept.sum(-1, keepdim=True)
    d = (z - v).masked_fill(~kept, 0)
    d = (d - d.sum(-1, keepdim=True) / count).masked_fill(~kept, 0)
    curvature = torch.ones_like(count, dtype=z.dtype)
    if beta is not None:
        share = beta.to(z.dtype).unsqueeze(-1)
        curvature = share * (1 - share)
    value = curvature * d.square().sum(-1, keepdim=True) / (2 * count)
    nowhere = kept & ((z == INF) | (v == INF))
    one_sided = kept & ((z == -INF) | (v == -INF))
    value = value.masked_fill(one_sided.any(-1, keepdim=True), INF)
    value = value.masked_fill(nowhere.any(-1, keepdim=True) | (count == 0), NAN)
    return value.squeeze(-1), (curvature * d / count).masked_fill(~value.isfinite(), NAN)


def target_term(
    x: Tensor, y: Tensor, kept: Tensor, target: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The decoupled divergences of softmax(x) from softmax(y) over `kept`, `target` one of them.

    Returns KL(p' || q') of the other classes among themselves, its gradient with respect to x, the
    binary divergence of the target against them all, and its gradient. By the log-odds
    a = x_y - logsumexp(others), never by 1 - q. Where the teacher has no mass among the others
    there is nothing to match: the first term is 0. Where only the student has none, it is infinite.
    """
    others = kept & ~target & ~((x == -INF) & (y == -INF))
    row_x, row_y = x.masked_fill(~others, -INF), y.masked_fill(~others, -INF)
    lse_x, lse_y = (row.logsumexp(-1, keepdim=True) for row in (row_x, row_y))
    none_x, none_y = lse_x == -INF, lse_y == -INF
    nontarget, gradient = soft_term(row_x, row_y, others, FORWARD, None)
    nontarget = nontarget.masked_fill((none_x & ~none_y).squeeze(-1), INF)
    nontarget = nontarget.masked_fill(none_y.squeeze(-1), 0)
    gradient = gradient.masked_fill(none_x | none_y, 0)

    def at_target(row: Tensor) -> Tensor:
        return row.masked_fill(~target, -INF).amax(-1, keepdim=True)

    odds_x, odds_y = at_target(x) - lse_x, at_target(y) - lse_y
    lq = torch.cat((F.logsigmoid(odds_x), F.logsigmoid(-odds_x)), -1)
    lp = torch.cat((F.logsigmoid(odds_y), F.logsigmoid(-odds_y)), -1)
    # The smaller of the two probabilities of each side keeps the digits of their difference.
    delta = torch.where(odds_x + odds_y > 0, lp[:, 1:].exp() - lq[:, 1:].exp(),
                        lq[:, :1].exp() - lp[:, :1].exp())  # fmt: skip
    shares = (row_x - lse_x).exp().masked_fill(none_x, 0)
    binary = torch.where(target & (x > -INF), delta, -delta * shares)
    return nontarget, gradient, excess(lp, lq).sum(-1), binary


def hard_term(z: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """-log softmax(z)[label] [N] and its gradient [N, V]; NaN where the label is no class."""
    valid = ((labels >= 0) & (labels < z.shape[-1])).unsqueeze(-1)
    index = torch.where(valid, labels.unsqueeze(-1), 0)
    lq = F.log_softmax(z, dim=-1).masked_fill(~valid, NAN)
    hard = -lq.gather(-1, index)
    gradient = lq.exp().scatter_add(-1, index, -torch.ones_like(hard))
    return hard.squeeze(-1), gradient.masked_fill(hard.isnan(), NAN)


def _rows_at_a_time(rows_of: Callable) -> Callable:
    """`rows_of` for logits [N, V], as an op of logits [A, B, V], a few rows at a time: that bounds
    the memory of its float64. Every tensor has one entry a row, or is logits.
    """
    signature = inspect.signature(rows_of)

    @functools.wraps(rows_of)
    def op(*arguments: Any) -> tuple[Tensor, Tensor]:
        given = signature.bind(*arguments).arguments
        student, dstudent = given["student"], given["dstudent"]
        N, width = student.shape[:-1].numel(), student.shape[-1]
        for name in ("student", "teacher"):
            if name in given:
                given[name] = given[name].reshape(N, given[name].shape[-1])
        gradient = None
        if dstudent is not None:
            gradient = given["dstudent"] = dstudent.new_empty(N, width)
        dtype = given["student_inv_temperature"].dtype
        soft, hard = student.new_zeros(2, N, dtype=dtype)
        step = max(1, (1 << 22) // width)
        for rows in (slice(begin, begin + step) for begin in range(0, N, step)):
            soft[rows], hard[rows] = rows_of(
                **{name: x[rows] if isinstance(x, Tensor) else x for name, x in given.items()}
            )
        if gradient is not None:
            dstudent.copy_(gradient.view_as(dstudent))
        return soft.clone(), hard.clone()  # an op's results share no memory

    return op


@_rows_at_a_time
def dense_rows(
    student: Tensor,  # [A, B, V_student], rows r = a * B + b, N = A * B
    teacher: Tensor,  # [A, B, V_teacher]
    labels: Tensor | None,  # [N] int64
    student_inv_temperature: Tensor,  # [N]
    teacher_inv_temperature: Tensor,  # [N]
    soft_weight: Tensor | None,  # [N]; None: the soft term is not computed
    hard_weight: Tensor | None,  # [N]; None: the hard term is not computed
    dstudent: Tensor | None,  # [A, B, V_student]; receives the gradient; may be `student`
    keep: Tensor | None,  # [N] int64; None: nothing is pruned
    vocab_size: int,
    divergence: int,
    beta: Tensor | None,  # [N], given for a MIXTURE only
    target_weight: Tensor | None = None,  # [N]; given: decoupled, beside a soft_weight, FORWARD
    target: Tensor | None = None,  # [N]; receives the target term
    teacher_probs: bool = False,
) -> tuple[Tensor, Tensor]:
    """Per-row terms (soft [N], hard [N]), and into `dstudent` the gradient of their weighted sum.

    The terms come unweighted, the gradient weighted. A row whose weights are all 0 is skipped: its
    terms and its gradient are 0 whatever its logits hold. A term of weight 0 in another row is
    computed and leaves no trace in the gradient. A label that is no class makes its row NaN, but
    beyond vocab_size, where only the hard term has a gradient, not without one.
    """
    width = student.shape[-1]
    label_classes = width if target_weight is None else vocab_size
    # In float64 wherever there is one: rounding is the business of the backends that are fast.
    dtype = torch.float32 if student.device.type == "mps" else torch.float64
    weights = [w for w in (soft_weight, hard_weight, target_weight) if w is not None]
    skipped = torch.stack([w == 0 for w in weights]).all(0)
    whole = student if hard_weight is not None else student[:, :vocab_size]
    v = teacher[:, :vocab_size]
    whole, v = (x.to(dtype).masked_fill(skipped.unsqueeze(-1), 0) for x in (whole, v))
    if teacher_probs:
        v = v.masked_fill(skipped.unsqueeze(-1), 1).log()  # NaN where negative
    z = whole[:, :vocab_size]
    lost = z.isnan().any(-1)
    if labels is not None:
        labels = labels.masked_fill(skipped, 0)
        lost = lost | (labels < 0) | (labels >= label_classes)
    soft = hard = of_label = z.new_zeros(z.shape[0])
    gradient = torch.zeros_like(z)

    def add(gradient: Tensor, weight: Tensor, term: Tensor, slope: Tensor | None = None) -> Tensor:
        scaled = weight if slope is None else weight * slope
        product = scaled.unsqueeze(-1) * term
        return gradient + product.masked_fill((weight == 0).unsqueeze(-1), 0)

    if soft_weight is not None:
        x = z * student_inv_temperature.unsqueeze(-1)
        y = v * teacher_inv_temperature.unsqueeze(-1)
        kept = kept_classes(v, keep)
        bad = lost | v.isnan().any(-1)
        slope = student_inv_temperature
        if target_weight is None:
            soft, dx = soft_term(x, y, kept, divergence, beta)
            limit = student_inv_temperature == 0
            soft_limit, dz = flat_term(z, v, kept, beta)
            soft = torch.where(limit, soft_limit, soft)
            dx = torch.where(limit.unsqueeze(-1), dz, dx)
            slope = slope.masked_fill(limit, 1)
        else:
            assert labels is not None, "the decoupled terms need labels"
            index = torch.where(lost, 0, labels).unsqueeze(-1)
            label = torch.zeros_like(kept).scatter_(-1, index, True)
            soft, dx, of_label, dtarget = target_term(x, y, kept | label, label)
            bad = bad | of_label.isnan()
            of_label, dtarget = (
                of_label.masked_fill(bad, NAN),
                dtarget.masked_fill(bad.unsqueeze(-1), NAN),
            )
            gradient = add(gradient, target_weight, dtarget, slope)
        soft, dx = soft.masked_fill(bad, NAN), dx.masked_fill(bad.unsqueeze(-1), NAN)
        gradient = add(gradient, soft_weight, dx, slope)
    if hard_weight is not None:
        assert labels is not None, "the hard term needs labels"
        hard, dz = hard_term(whole, labels)
        hard, dz = hard.masked_fill(lost, NAN), dz.masked_fill(lost.unsqueeze(-1), NAN)
        gradient = add(F.pad(gradient, (0, whole.shape[-1] - z.shape[-1])), hard_weight, dz)
    if dstudent is not None:
        gradient = gradient.masked_fill(skipped.unsqueeze(-1), 0)
        dstudent.copy_(F.pad(gradient, (0, width - gradient.shape[-1])))
    if target is not None:
        target.copy_(of_label.masked_fill(skipped, 0))
    return soft.masked_fill(skipped, 0), hard.masked_fill(skipped, 0)


def order_named(
    ids: Tensor,  # [N, k] int64, in any order; -1: none
    log_probs: Tensor,  # [N, k], at T = 1; -inf: none, whatever the id
    vocab_size: int,
    bucket: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """ids and log_probs as sparse_rows takes them, and log_rest [N] ([0] without a bucket).

    The probabilities of equal ids are added up, without atomics, whose order is not defined: sums
    over ever longer parts of a run. Where all sum to more than 1 a bucket is empty and they are
    scaled to 1. An id that is no class leaves only NaN of its row: nothing here is read back.
    """
    dtype = log_probs.dtype
    spoiled = ((ids < -1) | (ids >= vocab_size)).any(-1, keepdim=True)
    absent = (ids < 0) | (ids >= vocab_size)
    ids, order = ids.masked_fill(absent, vocab_size).sort(dim=-1)
    log_probs = log_probs.masked_fill(absent, -INF).gather(-1, order).double()
    step = 1
    while step < ids.shape[-1]:
        same = (ids[:, step:] == ids[:, :-step]) & (ids[:, step:] < vocab_size)
        both = torch.logaddexp(log_probs[:, :-step], log_probs[:, step:])
        added = torch.where(same, both, log_probs[:, :-step])
        log_probs = torch.cat((added, log_probs[:, -step:]), -1)
        step *= 2
    again = F.pad(ids[:, 1:] == ids[:, :-1], (1, 0))
    everything = ((ids < vocab_size) & ~again).sum(-1) == vocab_size
    dropped = again | (log_probs == -INF)
    ids, order = ids.masked_fill(dropped, vocab_size).sort(dim=-1)
    log_probs = log_probs.masked_fill(dropped, -INF).gather(-1, order)
    log_probs = log_probs.masked_fill(spoiled, NAN)
    log_rest = log_probs.new_empty(0)
    if bucket:
        total = log_probs.logsumexp(-1, keepdim=True)
        log_probs = torch.where(total > 0, log_probs - total, log_probs)
        log_rest = (-torch.expm1(total.clamp_max(0))).log().squeeze(-1)
        log_rest = log_rest.masked_fill(everything & ~spoiled.squeeze(-1), -INF)
    return ids, log_probs.to(dtype), log_rest.to(dtype)


@_rows_at_a_time
def sparse_rows(
    student: Tensor,  # [A, B, V_student]
    ids: Tensor,  # [N, k] int64, ascending, each once; those >= vocab_size are not there
    log_probs: Tensor,  # [N, k]
    log_rest: Tensor | None,  # [N]; given: all other classes are one more class of both sides
    labels: Tensor | None,  # [N] int64
    student_inv_temperature: Tensor,  # [N]
    teacher_inv_temperature: Tensor,  # [N]
    soft_weight: Tensor | None,
    hard_weight: Tensor | None,
    dstudent: Tensor | None,
    vocab_size: int,
    restricted: bool,  # q is a softmax over the ids too; else, without log_rest, over all classes
) -> tuple[Tensor, Tensor]:
    """dense_rows for a teacher of k classes, KL(p || q) only; p = softmax(log_probs / T_teacher).

    The bucket's logit is logsumexp of the student's others: pooled first, at T = 1, then taken to
    the power 1 / T like every class, so that equal distributions have zero loss at every T.
    """
    width = student.shape[-1]
    whole = (student if hard_weight is not None else student[:, :vocab_size]).double()
    weights = [w for w in (soft_weight, hard_weight) if w is not None]
    skipped = torch.stack([w == 0 for w in weights]).all(0)
    whole = whole.masked_fill(skipped.unsqueeze(-1), 0)
    z = whole[:, :vocab_size]
    lost = z.isnan().any(-1)
    if labels is not None:
        labels = labels.masked_fill(skipped, 0)
        lost = lost | (labels < 0) | (labels >= width)
    soft = hard = z.new_zeros(z.shape[0])
    gradient = torch.zeros_like(z)
    if soft_weight is not None:
        there = ids < vocab_size
        inside = torch.zeros(z.shape[0], vocab_size + 1, dtype=torch.bool, device=z.device)
        inside = inside.scatter(-1, ids.clamp_max(vocab_size), True)[:, :vocab_size]
        y = z.new_full((z.shape[0], vocab_size + 1), -INF)
        y = y.scatter(-1, ids.clamp_max(vocab_size), log_probs.double())[:, :vocab_size]
        y = y.masked_fill(skipped.unsqueeze(-1), 0).masked_fill(~inside, -INF)
        lost = lost | (log_probs.isnan() & there).any(-1) & ~skipped
        if log_rest is None:
            x = z * student_inv_temperature.unsqueeze(-1)
            kept = inside if restricted else torch.ones_like(inside)
        else:  # one more column, whose gradient goes to the others by their share of it
            others = z.masked_fill(inside, -INF)
            pooled = others.logsumexp(-1, keepdim=True)
            share = (others - pooled).exp().masked_fill(pooled == -INF, 0)
            x = torch.cat((z, pooled), -1) * student_inv_temperature.unsqueeze(-1)
            y = torch.cat((y, log_rest.double().unsqueeze(-1)), -1)
            kept = F.pad(inside, (0, 1), value=True)
        y = y * teacher_inv_temperature.unsqueeze(-1)
        soft, dx = soft_term(x, y, kept, FORWARD, None)
        if log_rest is not None:
            dx = torch.where(inside, dx[:, :-1], dx[:, -1:] * share)
        soft, dx = soft.masked_fill(lost, NAN), dx.masked_fill(lost.unsqueeze(-1), NAN)
        weight = (soft_weight * student_inv_temperature).unsqueeze(-1)
        gradient = (weight * dx).masked_fill((soft_weight == 0).unsqueeze(-1), 0)
    if hard_weight is not None:
        assert labels is not None, "the hard term needs labels"
        hard, dz = hard_term(whole, labels)
        weight = hard_weight.unsqueeze(-1)
        gradient = F.pad(gradient, (0, width - vocab_size))
        gradient = gradient + torch.where(weight == 0, 0, weight * dz)
    if dstudent is not None:
        gradient = gradient.masked_fill(skipped.unsqueeze(-1), 0)
        dstudent.copy_(F.pad(gradient, (0, width - gradient.shape[-1])))
    return soft.masked_fill(skipped, 0), hard.masked_fill(skipped, 0)


def scale_rows_(dstudent: Tensor, scale: Tensor) -> None:
    """Multiply the rows of `dstudent` [A, B, V] in place by `scale`, one value or N of them."""
    if scale.numel() != 1:
        scale = scale.view(*dstudent.shape[:-1], 1)
    dstudent.mul_(scale)
