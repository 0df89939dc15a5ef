// The elementary functions of the loss: branch-free, so that loops over them vectorise.
#pragma once
#include <cmath>
#include <cstdint>
#include <limits>

#include "dtypes.h"

namespace fastkd::cpu {

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
template <class T>
constexpr T kLog2E = static_cast<T>(1.442695040888963407);
template <class T>
constexpr T kLn2 = static_cast<T>(0.6931471805599453094);

// 2^u for u < 127, 0 below -126; relative error 1.4e-7. NaN stays NaN.
FASTKD_INLINE float exp2_(float u) {
  constexpr float kShift = 0x1.8p23f + 127;  // the sum's low bits are the rounded u, plus the bias
  u = u < -127.0f ? -127.0f : u;
  const float shifted = u + kShift;
  const float f = u - (shifted - kShift);  // in [-1/2, 1/2]
  const float f2 = f * f;
  const float p0 = 0.693146978f * f + 1.0f;
  const float p1 = 0.0555073376f * f + 0.240222421f;
  const float p2 = 0.00132647242f * f + 0.00967151324f;
  return ((p2 * f2 + p1) * f2 + p0) * from_bits(to_bits(shifted) << 23);
}
FASTKD_INLINE double exp2_(double u) { return std::exp2(u); }

// phi(x) = x + exp(-x) - 1 >= 0 for |x| < 1/4, where the sum as written would cancel.
FASTKD_INLINE float phi_small(float x) {
  const float x2 = x * x;
  const float high = -0.0083488485f * x + 0.0416665879f;
  const float low = -0.166666424f * x + 0.5f;
  return x2 * ((0.00139160386f * x2 + high) * x2 + low);
}
FASTKD_INLINE double phi_small(double x) { return x + std::expm1(-x); }

struct LogTerms {
  float log;     // ln(1 + y)
  float excess;  // (1 + y) ln(1 + y) - y, >= 0, relative to its own size also where y is small
};
struct LogTermsDouble {
  double log, excess;
};

// For y >= -1; ln 0 is taken as ln of the smallest normal number.
FASTKD_INLINE LogTerms log_terms(float y) {
  float r = 1.0f + y;
  r = r < 0x1p-126f ? 0x1p-126f : r;
  constexpr int32_t kSqrtHalf = 0x3f3504f3;  // bits of sqrt(1/2)
  const int32_t bits = static_cast<int32_t>(to_bits(r));
  const int32_t k = (bits - kSqrtHalf) >> 23;  // r = 2^k * [sqrt(1/2), sqrt(2))
  const float f = k == 0 ? y : from_bits(static_cast<uint32_t>(bits - k * (1 << 23))) - 1.0f;
  float q = -0.0873475952f;  // ln(1 + f) = f - f^2 q(f)
  q = q * f + 0.14307497f;
  q = q * f - 0.149179918f;
  q = q * f + 0.165705125f;
  q = q * f - 0.199620709f;
  q = q * f + 0.250017551f;
  q = q * f - 0.333339502f;
  q = q * f + 0.499999916f;
  const float log = f - f * f * q + static_cast<float>(k) * kLn2<float>;
  return {log, k == 0 ? f * f * (1.0f - (1.0f + f) * q) : r * log - y};
}
FASTKD_INLINE LogTermsDouble log_terms(double y) {
  const double r = std::fmax(1 + y, std::numeric_limits<double>::min());
  const double log = std::fabs(y) < 0.5 ? std::log1p(y) : std::log(r);
  // Below 1/32 the series sum (-y)^k / (k (k - 1)); its tenth term is below 1e-16 of the first.
  double series = 0;
  for (int k = 12; k >= 2; --k) series = 1.0 / (k * (k - 1)) - y * series;
  return {log, std::fabs(y) < 1.0 / 32 ? y * y * series : r * log - y};
}

// Flushes results below the smallest normal number to 0 while it lives: a tail of subnormal
// probabilities costs a hundred cycles each on some processors. Inputs are still read exactly,
// for the selection of classes compares them.
class FlushToZero {
 public:
#if defined(__x86_64__)
  FlushToZero() : saved_(__builtin_ia32_stmxcsr()) { __builtin_ia32_ldmxcsr(saved_ | 0x8000u); }
  ~FlushToZero() { __builtin_ia32_ldmxcsr(saved_); }

 private:
  unsigned saved_;
#endif
};

}  // namespace fastkd::cpu
