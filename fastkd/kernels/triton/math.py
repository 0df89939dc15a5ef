"""Formulas of one class or of two, without loops: what csrc/formulas-inl.h is to C++.

Arguments of exponentials carry log2(e): exp2 is one instruction on every GPU, exp several.
"""

import triton
import triton.language as tl
from triton.language.target_info import is_cuda

from .. import triton as backend

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
NINF = tl.constexpr(float("-inf"))
LOWEST = tl.constexpr(-3.4028234663852886e38)
INTERPRETED = tl.constexpr(backend.INTERPRETED)


@triton.jit
def log2_of(P):
    """log2 of a number that is 0 or normal, in one instruction; tl.log2 takes 20 of them."""
    if not INTERPRETED and is_cuda():
        return tl.inline_asm_elementwise(
            "lg2.approx.ftz.f32 $0, $1;", "=r,r", [P], dtype=tl.float32, is_pure=True, pack=1
        )
    else:
        return tl.log2(P)


@triton.jit
def excess(a, b, d, a_absent, b_absent):
    """a d - a + b for d = ln(a / b), whose sum is KL(a || b): no term is < 0, none cancels.

    Below |d| = 1/4 by the series of d + exp(-d) - 1. A class of logit -inf has a = 0 and leaves b;
    b absent where a is not is +inf, also where a has underflowed.
    """
    series = (((((-1 / 5040.0) * d + 1 / 720.0) * d - 1 / 120.0) * d + 1 / 24.0) * d - 1 / 6.0) * d
    near = a * (d * d) * (series + 0.5)
    far = tl.where(a > 0, a * d, 0.0) + (b - a)
    value = tl.where(tl.abs(d) < 0.25, near, far)
    return tl.where(a_absent, b, tl.where(b_absent, float("inf"), value))


@triton.jit
def log_terms(y):
    """ln(1 + y), and (1 + y) ln(1 + y) - y to its own precision also near y = 0; y >= -1.

    ln 0 is taken as ln of the smallest normal number. ln(1 + f) = f - f^2 q(f).
    """
    r = tl.maximum(1.0 + y, 1.1754943508222875e-38)
    bits = r.to(tl.int32, bitcast=True)
    k = (bits - 0x3F3504F3) >> 23  # r = 2^k * [sqrt(1/2), sqrt(2))
    reduced = (bits - (k << 23)).to(tl.float32, bitcast=True) - 1.0
    f = tl.where(k == 0, y, reduced)
    q = -0.0873475952 * f + 0.14307497
    q = q * f - 0.149179918
    q = q * f + 0.165705125
    q = q * f - 0.199620709
    q = q * f + 0.250017551
    q = q * f - 0.333339502
    q = q * f + 0.499999916
    log = f - f * f * q + k.to(tl.float32) * LN2
    return log, tl.where(k == 0, f * f * (1.0 - (1.0 + f) * q), r * log - y)


@triton.jit
def expm1(x):
    series = 1 / 6.0 + x * (1 / 24.0 + x * (1 / 120.0 + x * (1 / 720.0)))
    series = 1.0 + x * (1 / 2.0 + x * series)
    return tl.where(tl.abs(x) < 0.25, x * series, tl.exp2(x * LOG2E) - 1.0)


@triton.jit
def logistic(x):
    return 1.0 / (1.0 + tl.exp2(-x * LOG2E))


@triton.jit
def log_logistic(x):
    log, _ = log_terms(tl.exp2(-tl.abs(x) * LOG2E))
    return tl.minimum(x, 0.0) - log


@triton.jit
def log_quotient(delta, b, otherwise):
    """ln((b + delta) / b), from `delta` where that is small."""
    near = tl.abs(delta) < 0.25 * b
    log, _ = log_terms(tl.where(near, delta / b, 0.0))
    return tl.where(near, log, otherwise)


@triton.jit
def binary_divergence(a, b, gap):
    """KL((p, 1 - p) || (q, 1 - q)) and q - p, of the odds a = ln(p / (1 - p)) and b of q, and of
    b - a. No digit is lost where either is near 0 or 1, nor where the two agree; the odds may be
    infinite."""
    p = logistic(a)
    q = logistic(b)
    p_not = logistic(-a)
    q_not = logistic(-b)
    fall = expm1(-tl.abs(gap))
    delta = tl.where(gap > 0, -q * p_not * fall, p * q_not * fall)
    log = log_quotient(-delta, q, log_logistic(a) - log_logistic(b))
    log_not = log_quotient(delta, q_not, log_logistic(-a) - log_logistic(-b))
    infinity = float("inf")
    divergence = excess(p, q, log, a == -infinity, b == -infinity)
    return divergence + excess(p_not, q_not, log_not, a == infinity, b == infinity), delta


@triton.jit
def mixture_terms(p, q, difference, beta):
    """ln(q / m) of the mixture m = beta p + (1 - beta) q, and what a class adds to KL(p || m) and
    to KL(q || m); `difference` is q - p.

    p / m = 1 - (1 - beta) y and q / m = 1 + beta y: each divergence is a sum of r ln r - r + 1 over
    m, without cancellation.
    """
    m = beta * p + (1.0 - beta) * q
    y = difference / tl.maximum(m, 1.1754943508222875e-38)
    log, from_q = log_terms(beta * y)
    _, from_p = log_terms(-(1.0 - beta) * y)
    return log, m * from_p, m * from_q


@triton.jit
def difference(s, t, s_zero, t_zero, ratio, less, less_low):
    """(s - s_zero) - (t - t_zero) ratio - less, rounded once where ratio is 1 and so the zeros 0:
    what the first difference is rounded by is found and added."""
    a = s - s_zero
    b = (t - t_zero) * ratio
    apart = a - b
    moved = apart - a
    low = (a - (apart - moved)) - (b + moved)
    low = tl.where(tl.abs(apart) < float("inf"), low - less_low, 0.0)
    return (apart - less) + low
