// The elementary functions of the loss: branch-free, so that loops over them vectorise.
#pragma once

#include "load.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
constexpr T kInf = std::numeric_limits<T>::infinity();
template <class T>
constexpr T kNaN = std::numeric_limits<T>::quiet_NaN();
template <class T>
constexpr T kLog2E = static_cast<T>(1.442695040888963407);
template <class T>
constexpr T kLn2 = static_cast<T>(0.6931471805599453094);

// Adding it leaves u rounded to an integer in the low bits of the sum, as a two's complement.
constexpr float kRound = 0x1.8p23f;
constexpr int32_t kRoundBits = 0x4b400000;

// 2^f for f in [-1/2, 1/2]; relative error 1e-7.
FASTKD_INLINE float exp2_fraction(float f) {
  float p = 0.00132647242f * f + 0.00967151324f;
  p = p * f + 0.0555073376f;
  p = p * f + 0.240222421f;
  p = p * f + 0.693146978f;
  return p * f + 1.0f;
}

// 2^u for u < 127, 0 below -126. NaN stays NaN.
FASTKD_INLINE float exp2_flushed(float u) {
  u = u < -127.0f ? -127.0f : u;
  const float rounded = u + (kRound + 127.0f);
  const float f = u - (rounded - (kRound + 127.0f));
  return exp2_fraction(f) * from_bits(to_bits(rounded) << 23);
}
FASTKD_INLINE double exp2_flushed(double u) { return std::exp2(u); }

// How large an exponent was: comparable, its zero at u = 0. The smallest exponent of a normal
// number.
template <class T>
struct Level {
  using Type = int32_t;
  static constexpr Type kZero = kRoundBits;
  static constexpr int kLowest = -126;
};
template <>
struct Level<double> {
  using Type = double;
  static constexpr Type kZero = 0;
  static constexpr int kLowest = -1022;
};

// 2^u for -126 <= u < 127. NaN stays NaN, with a level above all others.
template <class T>
struct Exponential {
  T value;
  typename Level<T>::Type level;
};
FASTKD_INLINE Exponential<float> exp2_normal(float u) {
  const float rounded = u + kRound;
  const float p = exp2_fraction(u - (rounded - kRound));
  return {from_bits(to_bits(p) + (to_bits(rounded) << 23)), static_cast<int32_t>(to_bits(rounded))};
}
FASTKD_INLINE Exponential<double> exp2_normal(double u) { return {std::exp2(u), u}; }

// 2^y, 2^y - 1 relative to its own size also near y = 0, and phi(x) = x + exp(-x) - 1 >= 0 for x =
// -y ln 2 also where the sum as written would cancel; for y < 127.
template <class T>
struct Ratio {
  T exp2, minus_one, phi;
  typename Level<T>::Type level;
};
FASTKD_INLINE Ratio<float> ratio(float y) {
  const float rounded = y + (kRound + 127.0f);
  const float f = y - (rounded - (kRound + 127.0f));
  // 2^f - 1 - f ln 2 = f^2 q(f), relative error 1.2e-7: the polynomial of 2^f is a hundred times
  // worse for it.
  const float f2 = f * f;
  const float q1 = 0.0555038101f * f + 0.240226508f;
  const float q2 = 0.00133813064f * f + 0.00961806185f;
  const float phi = ((0.000154614463f * f2 + q2) * f2 + q1) * f2;
  const float fraction = 0.693147182f * f + phi;  // 2^f - 1
  const int32_t bits = static_cast<int32_t>(to_bits(rounded));
  // Whatever rounds below -127 becomes 2^-127, whose bits are those of 0.
  const int32_t held = bits > kRoundBits ? bits : kRoundBits;
  const float power = from_bits(static_cast<uint32_t>(held) << 23);
  const float minus_one = power * fraction + (power - 1.0f);
  return {power * fraction + power, minus_one,
          bits == kRoundBits + 127 ? phi : minus_one - y * kLn2<float>, bits - 127};
}
FASTKD_INLINE Ratio<double> ratio(double y) {
  const double x = -y * kLn2<double>, minus_one = std::expm1(-x);
  return {std::exp2(y), minus_one, x + minus_one, y};
}

// ln(1 + f) = f - f^2 q(f) for 1 + f in [sqrt(1/2), sqrt(2)); relative error of q 1e-7.
FASTKD_INLINE float log_remainder(float f) {
  float q = -0.0873475952f;
  q = q * f + 0.14307497f;
  q = q * f - 0.149179918f;
  q = q * f + 0.165705125f;
  q = q * f - 0.199620709f;
  q = q * f + 0.250017551f;
  q = q * f - 0.333339502f;
  return q * f + 0.499999916f;
}
constexpr int32_t kSqrtHalf = 0x3f3504f3;  // bits of sqrt(1/2)

struct LogTerms {
  float log;     // ln(1 + y)
  float excess;  // (1 + y) ln(1 + y) - y, >= 0, relative to its own size also where y is small
};
struct LogTermsDouble {
  double log, excess;
};

// For y >= -1 and r = 1 + y, to its own precision where y is near -1; ln 0 is taken as ln of the
// smallest normal number.
FASTKD_INLINE LogTerms log_terms(float y, float r) {
  r = r < 0x1p-126f ? 0x1p-126f : r;
  const int32_t bits = static_cast<int32_t>(to_bits(r));
  const int32_t k = (bits - kSqrtHalf) >> 23;  // r = 2^k * [sqrt(1/2), sqrt(2))
  const float f = k == 0 ? y : from_bits(static_cast<uint32_t>(bits - k * (1 << 23))) - 1.0f;
  const float q = log_remainder(f);
  const float log = f - f * f * q + static_cast<float>(k) * kLn2<float>;
  return {log, k == 0 ? f * f * (1.0f - (1.0f + f) * q) : r * log - y};
}
FASTKD_INLINE LogTermsDouble log_terms(double y, double given) {
  const double r = std::fmax(given, std::numeric_limits<double>::min());
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

}  // namespace fastkd::cpu::FASTKD_ISA
