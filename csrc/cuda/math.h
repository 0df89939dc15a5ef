// The formulas that know nothing of a row: series that lose no digit near 0, and the divergence of
// two classes. Definitions: fastkd/spec.py.
#pragma once
#include "machine.h"

namespace fastkd::cuda {

constexpr float kInf = __builtin_huge_valf();
constexpr float kNaN = __builtin_nanf("");
constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// phi(x) / x^2 for |x| < 1/4, relative error 3e-8.
__device__ __forceinline__ float phi_series(float x) {
  float p = fmaf(x, 0.00139121595f, -0.00834884867f);
  p = fmaf(x, p, 0.0416666120f);
  p = fmaf(x, p, -0.166666418f);
  return fmaf(x, p, 0.5f);
}

__device__ __forceinline__ float smaller_square(float x) { return fminf(fabsf(x), x * x); }

// For y >= -1 and r = 1 + y, to its own precision where y is near -1: ln r, and r ln r - y >= 0
// relative to its own size also where y is small; ln 0 is taken as ln of the smallest normal
// number.
struct LogTerms {
  float log, excess;
};
__device__ __forceinline__ LogTerms log_terms(float y, float r) {
  // ln(1 + y) = y - y^2 q(y), coefficients as for the CPU (csrc/cpu/math.h).
  float q = -0.0873475952f;
  q = fmaf(q, y, 0.14307497f);
  q = fmaf(q, y, -0.149179918f);
  q = fmaf(q, y, 0.165705125f);
  q = fmaf(q, y, -0.199620709f);
  q = fmaf(q, y, 0.250017551f);
  q = fmaf(q, y, -0.333339502f);
  q = fmaf(q, y, 0.499999916f);
  const float near_log = fmaf(-y * y, q, y);
  const float near_excess = y * y * fmaf(-(1.0f + y), q, 1.0f);
  r = fmaxf(r, 0x1p-126f);
  const float far_log = log2_approx(r) * kLn2;
  const bool near = y > -0.29f && y < 0.41f;
  return {near ? near_log : far_log, near ? near_excess : fmaf(r, far_log, -y)};
}

// a e_other - b e_lead as (e_other - e_lead) least + e_other of_other + e_lead of_lead, which keeps
// what is left where the two nearly cancel. `gap`: a - b, to its own precision; of one sign both.
struct Combination {
  float least = 0, of_other = 0, of_lead = 0;

  Combination() = default;
  __device__ Combination(float a, float b, float gap) {
    const bool larger = fabsf(a) >= fabsf(b);
    least = larger ? b : a;
    of_other = larger ? gap : 0;
    of_lead = larger ? 0 : gap;
  }
  __device__ __forceinline__ float operator()(float difference, float other, float lead) const {
    return fmaf(difference, least, fmaf(other, of_other, lead * of_lead));
  }
};

// The divergence of the label's class against all others together, from both sides' log-odds. By
// one thread of a row.
struct Binary {
  float divergence = 0;  // KL((p, 1 - p) || (q, 1 - q))
  float delta = 0;       // q - p
};

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
    return log_mass == -kInf ? 0.0f : log_ratio == kInf ? kInf : expf(log_mass) * log_ratio;
  };
  const float log_p = log_logistic(a), log_other = log_logistic(-a);
  return share(log_p, log_p - log_logistic(b)) + share(log_other, log_other - log_logistic(-b));
}

// p and q are the logistic functions of the odds, which are `gap` apart; no digit is lost where
// either is near 0 or 1, nor where the two agree.
__device__ inline Binary binary_divergence(float teacher_odds, float student_odds, float gap) {
  const float a = teacher_odds, b = student_odds;
  if (a != a || b != b) return {a + b, a + b};
  if (gap == 0 || (a == b && fabsf(a) == kInf)) return {};
  if (fabsf(a) == kInf || fabsf(b) == kInf) gap = b - a;
  const float minus_one = expm1f(-fabsf(gap));
  Binary result;
  result.delta =
      gap > 0 ? -logistic(b) * logistic(-a) * minus_one : logistic(a) * logistic(-b) * minus_one;
  const float divergence = fabsf(gap) < 1 ? near_divergence(a, b, gap) : far_divergence(a, b);
  result.divergence = fmaxf(divergence, 0.0f);
  return result;
}

}  // namespace fastkd::cuda
