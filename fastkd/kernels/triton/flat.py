"""Rows at T >= 1000, whose two sides are all but flat; T = infinity has an inverse of 0.

There p and q formed apart and subtracted would lose T roundings. Here nothing cancels but the
logits, which T^2 KL matches: at T = infinity it is logit_match in fastkd/spec.py. With K classes,

    u = T ln(q / p) = d - mean     d = z - v, and the mean makes the sum of q 1
    w = T (q / p - 1) = T expm1(u / T)

    T^2 KL(p || q) = sum p T^2 (exp(u / T) - 1 - u / T)       gradient: T (q - p) = p w
    T^2 KL(q || p) = sum q T^2 (exp(-u / T) - 1 + u / T)                q (u - T KL)
    of a mixture            sum beta KL(p || m) + (1 - beta) KL(q || m), likewise

They are rare. So this is kept out of the passes that matter, reads a row up to four times by loops
that take every tile for a ragged one, and is the work of one program, of a split row too.
"""

import triton
import triton.language as tl

from .load import LN2, LOG2E, NINF, load_tile, log2_of, positions, store_tile, to_float
from .sums import FORWARD, MIXTURE, REVERSE, hard_slope, hard_terms, kept_classes
from .tail import LOWEST, joined

MATCHES_LOGITS = tl.constexpr(1e-3)  # 1 / T from which on this is the more exact way
FLAT = tl.constexpr(1 / 16)  # of |logit| / T, where the series still hold


@triton.jit
def exponential_series(y):
    """(exp(y) - 1 - y) / y^2 for |y| < 1/4."""
    series = 1 / 24.0 + y * (1 / 120.0 + y * (1 / 720.0 + y * (1 / 5040.0)))
    return 0.5 + y * (1 / 6.0 + y * series)


@triton.jit
def log_series(x):
    """ln(1 + x) / x for |x| < 0.29."""
    series = x * 0.0
    for i in tl.static_range(12):
        series = 1 / (12.0 - i) - x * series
    return series


@triton.jit
def entropy_series(x):
    """((1 + x) ln(1 + x) - x) / x^2, likewise."""
    series = x * 0.0
    for i in tl.static_range(12):
        series = 1 / ((12.0 - i) * (13.0 - i)) - x * series
    return series


@triton.jit
def bend(x, inverse):
    """T expm1(x / T) - x."""
    return x * (x * inverse) * exponential_series(x * inverse)


@triton.jit
def classes(
    s_row, t_row, start, low, high, threshold,
    PRUNE: tl.constexpr, PROBS: tl.constexpr,
    VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr, LAST: tl.constexpr,
):  # fmt: skip
    """A tile of both sides' logits, and of the classes that have one."""
    s = load_tile(s_row, start, low, high, VECTOR, BLOCK, LANE, True, LAST)
    t = load_tile(t_row, start, low, high, VECTOR, BLOCK, LANE, True, LAST)
    kept = kept_classes(t, threshold, start, low, high, low, PRUNE, PROBS, False, BLOCK, LANE, True)
    if PROBS:  # see logits_of; the row's largest is not known here
        small = t < 2.0**-100
        t = LN2 * (log2_of(t * tl.where(small, 2.0**24, 1.0)) - tl.where(small, 24.0, 0.0))
    return s, t, kept & ~((s == NINF) & (t == NINF))


@triton.jit
def is_flat(
    s_row, t_row, low, high, threshold, inverse,
    PRUNE: tl.constexpr, PROBS: tl.constexpr, ROW_VECTOR: tl.constexpr, ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Whether a row has classes, and all their logits are small beside T: no NaN, none infinite."""
    LANE: tl.constexpr = 4
    BLOCK: tl.constexpr = ROW_BLOCK // 2
    VECTOR: tl.constexpr = min(ROW_VECTOR, LANE)
    count = tl.zeros([BLOCK // LANE], tl.int32)
    steep = count
    for start in tl.range(0, high, BLOCK):
        s, t, kept = classes(
            s_row, t_row, start, low, high, threshold, PRUNE, PROBS, VECTOR, BLOCK, LANE, False
        )
        flat = (tl.abs(s) * inverse <= FLAT) & (tl.abs(t) * inverse <= FLAT)
        steep += tl.sum(((kept & ~flat) | (s != s)).to(tl.int32), 1)
        count += tl.sum(kept.to(tl.int32), 1)
    return (tl.sum(steep, 0) == 0) & (tl.sum(count, 0) > 0)


@triton.jit
def limit_pass(
    s_row, t_row, g_row, low, high, threshold, inverse, mean, rest_of_mean, per_p, beta, rest,
    from_student, factor, hard_weight, at_label, top, h_log, label_slope, lost,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr, PROBS: tl.constexpr, HARD: tl.constexpr,
    VALUE: tl.constexpr, GRADIENT: tl.constexpr,
    VECTOR: tl.constexpr, G_VECTOR: tl.constexpr, BLOCK: tl.constexpr, LANE: tl.constexpr,
):  # fmt: skip
    """T^2 D times K, but for its curvature, and what a mixture's gradient takes off every class."""
    divergence = tl.zeros([BLOCK // LANE], tl.float32)
    student = divergence
    for start in tl.range(0, high, BLOCK):
        s, t, kept = classes(
            s_row, t_row, start, low, high, threshold, PRUNE, PROBS, VECTOR, BLOCK, LANE, GRADIENT
        )
        u = ((s - t) - mean) - rest_of_mean
        w = u + bend(u, inverse)
        p = (1.0 + inverse * (t + bend(t, inverse))) * per_p
        q = p + p * (inverse * w)
        if DIVERGENCE == FORWARD:
            value = p * u * u * exponential_series(u * inverse)
            slope = p * w
        if DIVERGENCE == REVERSE:
            value = q * u * u * exponential_series(-u * inverse)
            slope = q * (u - from_student)
        if DIVERGENCE == MIXTURE:
            # p is 1 - rest y / T of the mixture m, and q is 1 + beta y / T.
            per_m = 1.0 + rest * inverse * w
            y = w / per_m
            of_p = entropy_series(-rest * inverse * y)
            of_q = entropy_series(beta * inverse * y)
            value = p * per_m * y * y * (rest * of_p + beta * of_q)
            log = y * log_series(beta * inverse * y)
            student += tl.sum(tl.where(kept, q * log, 0.0), 1)
            slope = q * (log - from_student)
        if VALUE:
            divergence += tl.sum(tl.where(kept, value, 0.0), 1)
        if GRADIENT:
            gradient = tl.where(kept, tl.where(factor != 0, factor * slope, 0.0), 0.0)
            if HARD:
                hard = hard_slope(s, start, at_label, top, h_log, label_slope, True, BLOCK, LANE)
                gradient += tl.where(hard_weight != 0, hard_weight * hard, 0.0)
            gradient = tl.where(lost, float("nan"), gradient)
            store_tile(g_row, gradient, start, low, high, G_VECTOR, BLOCK, True)
    return tl.sum(divergence, 0), tl.sum(student, 0)


@triton.jit
def limit_row(
    s_row, t_row, g_row, low, high, threshold, label, inverse, soft_weight, hard_weight, tail_max,
    tail_z, beta, rest,
    DIVERGENCE: tl.constexpr, PRUNE: tl.constexpr, PROBS: tl.constexpr, HARD: tl.constexpr,
    TAIL: tl.constexpr, GRADIENT: tl.constexpr,
    ROW_VECTOR: tl.constexpr, ROW_G_VECTOR: tl.constexpr, ROW_BLOCK: tl.constexpr,
):  # fmt: skip
    """Both terms, of a row that is flat, or at T = infinity; the frame and the logarithm of the
    hard term's sum. Writes the gradient, of the tail not."""
    # Half a tile of the other passes, for the registers.
    LANE: tl.constexpr = 4
    BLOCK: tl.constexpr = ROW_BLOCK // 2
    VECTOR: tl.constexpr = min(ROW_VECTOR, LANE)
    G_VECTOR: tl.constexpr = min(ROW_G_VECTOR, LANE)
    label_logit = 0.0
    if HARD:  # before any thread can have written the gradient over it
        label_logit = to_float(tl.load(s_row + low + label))
    total = tl.zeros([BLOCK // LANE], tl.float64)
    students = tl.zeros([BLOCK // LANE], tl.float32)
    count = tl.zeros([BLOCK // LANE], tl.int32)
    h_max = tl.full([BLOCK // LANE], LOWEST, tl.float32)
    zh = tl.zeros([BLOCK // LANE], tl.float32)
    for start in tl.range(0, high, BLOCK):
        s, t, kept = classes(
            s_row, t_row, start, low, high, threshold, PRUNE, PROBS, VECTOR, BLOCK, LANE, False
        )
        # Infinite where a class has a logit on one side only, and NaN where it spoils the row.
        d = s - t
        d = tl.where(d == NINF, float("inf"), d)
        d = tl.where((s < float("inf")) & (t < float("inf")), d, float("nan"))
        finite = tl.abs(d) < float("inf")
        bent = bend(s, inverse)
        d += tl.where(finite, bent - bend(t, inverse), 0.0)
        total += tl.sum(tl.where(kept, d, tl.where(s != s, s, 0.0)).to(tl.float64), 1)
        students += tl.sum(tl.where(kept & finite, s + bent, 0.0), 1)
        count += tl.sum(kept.to(tl.int32), 1)
        if HARD:
            h = tl.where(positions(start, BLOCK, LANE) == low + label, NINF, s)
            above = tl.maximum(h_max, tl.max(h, 1))
            zh *= tl.exp2((h_max - above) * LOG2E)
            zh += tl.sum(tl.exp2((h - above[:, None]) * LOG2E), 1)
            h_max = above
    sum_d = tl.sum(total, 0)
    K = tl.sum(count, 0).to(tl.float32)
    # exp(z / T) is `student` in the mean, exp(v / T) is 1 / per_p.
    student = 1.0 + inverse * (tl.sum(students, 0) / K)
    per_p = 1.0 / (student - inverse * (sum_d / K).to(tl.float32))
    mean_d = sum_d / (K * student)
    mean_d *= log_series(-inverse * mean_d)
    # In two parts: what the mean is off by, all classes would share.
    mean = mean_d.to(tl.float32)
    rest_of_mean = (mean_d - mean.to(tl.float64)).to(tl.float32)
    hard = tl.full([], 0.0, tl.float32)
    top = hard
    h_log = hard
    label_slope = hard
    if HARD:
        top = tl.maximum(tl.max(h_max, 0), label_logit)
        others = tl.sum(zh * tl.exp2((h_max - top) * LOG2E), 0)
        if TAIL:
            top, others = joined(top, others, tail_max, tail_z, label_logit)
        hard, h_log, label_slope = hard_terms(others, top, label_logit)
    lost = ~(tl.abs(sum_d) < float("inf")) | (K == 0)
    lost = (lost & (soft_weight != 0)) | ((hard != hard) & (hard_weight != 0))
    # The weight has a T^2 that all of this includes.
    scale = tl.where(inverse > 0, inverse, 1.0)
    curvature = beta * rest if DIVERGENCE == MIXTURE else 1.0
    factor = soft_weight * scale * scale * curvature / K
    from_student = tl.full([], 0.0, tl.float32)
    soft, of_mixture = limit_pass(
        s_row, t_row, g_row, low, high, threshold, inverse, mean, rest_of_mean, per_p, beta, rest,
        from_student, factor, hard_weight, low + label, top, h_log, label_slope, lost,
        DIVERGENCE, PRUNE, PROBS, HARD, True, GRADIENT and DIVERGENCE == FORWARD,
        VECTOR, G_VECTOR, BLOCK, LANE,
    )  # fmt: skip
    soft = curvature * soft / K
    if GRADIENT and DIVERGENCE != FORWARD:  # it needs the divergence first
        if DIVERGENCE == REVERSE:
            from_student = inverse * soft
        else:
            from_student = of_mixture / K
        limit_pass(
            s_row, t_row, g_row, low, high, threshold, inverse, mean, rest_of_mean, per_p, beta,
            rest, from_student, factor, hard_weight, low + label, top, h_log, label_slope, lost,
            DIVERGENCE, PRUNE, PROBS, HARD, False, True, VECTOR, G_VECTOR, BLOCK, LANE,
        )  # fmt: skip
    soft = tl.where(sum_d == float("inf"), float("inf"), soft * scale * scale)
    return soft, hard, top, h_log, label_slope
