// The divergence between two distributions over a few categories, all in double: the classes that a
// sparse teacher names, and what is outside of them as one more.
#pragma once
#include "math.h"

namespace fastkd::cpu::FASTKD_ISA {

// Of n categories each, in memory for kVectors * n.
struct Categories {
  static constexpr int64_t kVectors = 5;
  Categories() = default;
  Categories(double* memory, int64_t n)
      : log_p(memory), log_q(log_p + n), p(log_q + n), q(p + n), differences(q + n) {}

  double *log_p = nullptr, *log_q = nullptr, *p = nullptr, *q = nullptr;
  double* differences = nullptr;  // q - p
};

// e^x, 0 below e^-708, and e^x - 1 also near 0, each with a relative error of at most 3e-16; for
// x <= 709. NaN stays NaN.
struct ExpTerms {
  double exp, minus_one;
};
FASTKD_INLINE ExpTerms exp_terms(double x) {
  constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  constexpr double kRoundDouble = 0x1.8p52;  // as kRound
  const bool gone = x < -708;
  const double held = gone ? -708 : x;
  const double rounded = held * kLog2E<double> + kRoundDouble;
  const double k = rounded - kRoundDouble;
  const double r = (held - k * kLn2High) - k * kLn2Low;
  // e^r = sum r^n / n!; the term n = 14 is below 2e-17 of the first for |r| <= ln(2) / 2.
  double q = 1.0 / 6227020800;
  q = q * r + 1.0 / 479001600;
  q = q * r + 1.0 / 39916800;
  q = q * r + 1.0 / 3628800;
  q = q * r + 1.0 / 362880;
  q = q * r + 1.0 / 40320;
  q = q * r + 1.0 / 5040;
  q = q * r + 1.0 / 720;
  q = q * r + 1.0 / 120;
  q = q * r + 1.0 / 24;
  q = q * r + 1.0 / 6;
  q = q * r + 1.0 / 2;
  const double fraction = r + r * r * q;
  const double power =
      __builtin_bit_cast(double, (__builtin_bit_cast(uint64_t, rounded) + 1023) << 52);
  return {gone ? 0.0 : power * fraction + power, gone ? -1.0 : power * fraction + (power - 1)};
}

// Turns logarithms into logarithms of probabilities that sum to 1, and into those; false where none
// is above -inf, or one is NaN.
FASTKD_LOOP bool normalise(double* __restrict logs, int64_t n, double* __restrict shares) {
  double max = -kInf<double>;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = max < logs[i] ? logs[i] : max;
  if (!(max > -kInf<double>)) return false;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const double log = logs[i] - max, share = exp_terms(log).exp;
    logs[i] = log;
    shares[i] = share;
    sum += share;
  }
  const double log_sum = std::log(sum), inverse = 1 / sum;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    logs[i] -= log_sum;
    shares[i] *= inverse;
  }
  return !std::isnan(sum);
}

struct CategorySums {
  double divergence = 0;  // sum p ln(p / q) - p + q, no term < 0
  double mass = 0;        // sum q
};

// kWhole: q is over more than these categories, and not yet known but for its logarithm.
template <bool kWhole>
FASTKD_LOOP CategorySums divergence_of(const Categories& categories, int64_t n) {
  const double* __restrict log_p = categories.log_p;
  const double* __restrict log_q = categories.log_q;
  const double* __restrict p = categories.p;
  const double* __restrict q = categories.q;
  double* __restrict differences = categories.differences;
  double divergence = 0, mass = 0;
#pragma omp simd reduction(+ : divergence, mass)
  for (int64_t i = 0; i < n; ++i) {
    const double d = log_p[i] - log_q[i];
    const bool near = (d < 0 ? -d : d) < 1;
    // Relative to their own size, however small d.
    const double excess = exp_terms(near ? d : 0).minus_one;  // p / q - 1
    const double near_q = p[i] / (1 + excess);
    const double far_q = kWhole ? exp_terms(log_q[i]).exp : q[i];
    const double other = near ? near_q : far_q;
    const double apart = log_q[i] == -kInf<double> ? 0 : far_q - p[i];
    differences[i] = near ? -near_q * excess : apart;
    // Infinite where the student forbids what the teacher has, also where that has underflowed.
    const double finite = p[i] == 0 ? far_q : p[i] * d - p[i] + far_q;
    const double far = d == kInf<double> ? d : finite;
    divergence += near ? p[i] * (d - excess / (1 + excess)) : far;
    mass += other;
  }
  return {divergence, mass};
}

}  // namespace fastkd::cpu::FASTKD_ISA
