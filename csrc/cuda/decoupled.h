// The divergence of the label's class against all others together, from both sides' log-odds. By
// one thread of a row.
#pragma once
#include "machine.h"

namespace fastkd::cuda {

struct Binary {
  float divergence = 0;  // KL((p, 1 - p) || (q, 1 - q))
  float delta = 0;       // q - p
};

constexpr float kInfinite = __builtin_huge_valf();

__device__ inline float logistic(float x) { return 1 / (1 + expf(-x)); }
__device__ inline float log_logistic(float x) { return fminf(x, 0.0f) - log1pf(expf(-fabsf(x))); }

// p psi(q / p - 1) + (1 - p) psi((1 - q) / (1 - p) - 1), psi(r) = r - ln(1 + r) >= 0.
__device__ inline float near_divergence(float a, float b, float gap) {
  const auto psi = [](float r) {
    const float series = r * r * (0.5f - r * (1.0f / 3 - r * (0.25f - r * (0.2f - r / 6))));
    return fabsf(r) < 0.03125f ? series : r - log1pf(r);
  };
  return logistic(a) * psi(logistic(-b) * expm1f(gap)) +
         logistic(-a) * psi(logistic(b) * expm1f(-gap));
}
// p ln(p / q) and the like, which lose nothing far apart.
__device__ inline float far_divergence(float a, float b) {
  const auto share = [](float log_mass, float log_ratio) {
    return log_mass == -kInfinite   ? 0.0f
           : log_ratio == kInfinite ? kInfinite
                                    : expf(log_mass) * log_ratio;
  };
  const float log_p = log_logistic(a), log_rest = log_logistic(-a);
  return share(log_p, log_p - log_logistic(b)) + share(log_rest, log_rest - log_logistic(-b));
}

// p and q are the logistic functions of the odds, which are `gap` apart; no digit is lost where
// either is near 0 or 1, nor where the two agree.
__device__ inline Binary binary_divergence(float teacher_odds, float student_odds, float gap) {
  const float a = teacher_odds, b = student_odds;
  if (a != a || b != b) return {a + b, a + b};
  if (gap == 0 || (a == b && fabsf(a) == kInfinite)) return {};
  if (fabsf(a) == kInfinite || fabsf(b) == kInfinite) gap = b - a;
  const float minus_one = expm1f(-fabsf(gap));
  Binary result;
  result.delta =
      gap > 0 ? -logistic(b) * logistic(-a) * minus_one : logistic(a) * logistic(-b) * minus_one;
  const float divergence = fabsf(gap) < 1 ? near_divergence(a, b, gap) : far_divergence(a, b);
  result.divergence = fmaxf(divergence, 0.0f);
  return result;
}

}  // namespace fastkd::cuda
