// The elementary functions of the loss, branch-free, so that loops over them vectorise; and the
// formulas that take one number of either side.
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

// The exponent u that an exponential had, rounded, in a form whose maximum is cheap to keep: kZero
// stands for u = 0. kLowest is the smallest exponent of a normal number.
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

// 2^u for -126 <= u < 127, and the level of u. NaN stays NaN, with a level above all others.
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

// ln x; -inf for 0, NaN for what is negative, no number or infinite. kNormal: x is a normal number
// > 0, half of the instructions.
template <bool kNormal>
FASTKD_INLINE float logarithm(float x) {
  const bool small = !kNormal && x < 0x1p-126f;
  const int32_t bits = static_cast<int32_t>(to_bits(small ? x * 0x1p23f : x));
  const int32_t above = bits - kSqrtHalf, k = above >> 23;
  const float f = from_bits(static_cast<uint32_t>(bits - (above & ~0x7fffff))) - 1.0f;
  const float log =
      f - f * f * log_remainder(f) + static_cast<float>(small ? k - 23 : k) * kLn2<float>;
  if constexpr (kNormal) return log;
  const float defined = x > 0 && x < kInf<float> ? log : kNaN<float>;
  return x == 0 ? -kInf<float> : defined;
}
template <bool kNormal>
FASTKD_INLINE double logarithm(double x) {
  return x < kInf<double> ? std::log(x) : kNaN<double>;
}

// Below kOdd for normal numbers > 0 alone.
constexpr uint32_t kOdd = 0x7f000000;
FASTKD_INLINE uint32_t oddity(float x) { return to_bits(x) - 0x00800000u; }
FASTKD_INLINE uint32_t oddity(double x) {
  return x >= std::numeric_limits<double>::min() && x < kInf<double> ? 0 : kOdd;
}

// Takes ln of each value. kNormal: true if all of them are normal numbers > 0, else the logarithms
// are not to be used.
template <bool kNormal, class Stored, class T>
FASTKD_LOOP bool logarithms_of(const Stored* __restrict values, int64_t n, T* __restrict logs) {
  uint32_t oddest = 0;
#pragma omp simd reduction(max : oddest)
  for (int64_t i = 0; i < n; ++i) {
    const T value = static_cast<T>(load(values[i]));
    const uint32_t odd = kNormal ? oddity(value) : 0;
    oddest = oddest < odd ? odd : oddest;
    logs[i] = logarithm<kNormal>(value);
  }
  return oddest < kOdd;
}

// Takes ln of each value.
template <class Stored, class T>
void logarithms(const Stored* values, int64_t n, T* logs) {
  if (!logarithms_of<true>(values, n, logs)) logarithms_of<false>(values, n, logs);
}

#if defined(FASTKD_AVX512)

// ln x of 16 values, from tables of 32: x = 2^k m, m in [1, 2) by its first five bits near 1 / c,
// so ln x = k ln 2 - ln c + ln(1 + r), r = m c - 1, |r| < 1/64. Ten instructions, where the
// polynomial over the whole of an octave takes seventeen. Over all floats > 0 the error is at most
// 7e-8 where |ln x| < 1, and 1.4e-7 of ln x elsewhere; -inf for 0, NaN for what is negative or no
// number, inf for inf.
struct LogTables {
  alignas(64) float c[32], minus_ln_c[32];
};
inline constexpr LogTables kLogTables = {
    {0.984615386f, 0.955223858f, 0.927536249f, 0.901408434f, 0.876712322f, 0.853333354f,
     0.83116883f,  0.810126603f, 0.790123463f, 0.771084309f, 0.752941191f, 0.735632181f,
     0.719101131f, 0.703296721f, 0.688172042f, 0.673684239f, 0.659793794f, 0.646464646f,
     0.633663356f, 0.621359229f, 0.609523833f, 0.598130822f, 0.587155938f, 0.576576591f,
     0.566371679f, 0.556521714f, 0.547008574f, 0.537815154f, 0.528925598f, 0.520325184f,
     0.512000024f, 0.503937006f},
    {0.015504186f, 0.0458095595f, 0.0752234012f, 0.10379681f,  0.131576359f, 0.158605009f,
     0.184922338f, 0.210564747f,  0.235566065f,  0.259957552f, 0.283768147f, 0.307025045f,
     0.32975328f,  0.351976395f,  0.373716414f,  0.394993752f, 0.41582793f,  0.436236769f,
     0.456237435f, 0.475845903f,  0.495077223f,  0.513945758f, 0.532464862f, 0.55064708f,
     0.568504751f, 0.58604908f,   0.603290796f,  0.620240331f, 0.636907518f, 0.653301299f,
     0.669430614f, 0.685303986f}};

FASTKD_INLINE __m512 logarithm(__m512 x) {
  const auto look_up = [&](const float (&table)[32], __m512i index) {
    return _mm512_permutex2var_ps(_mm512_load_ps(table), index, _mm512_load_ps(table + 16));
  };
  const __m512 k = _mm512_getexp_ps(x);
  const __m512 m = _mm512_getmant_ps(x, _MM_MANT_NORM_1_2, _MM_MANT_SIGN_nan);
  const __m512i index = _mm512_srli_epi32(_mm512_castps_si512(m), 18);  // all but 5 bits unread
  const __m512 one = _mm512_set1_ps(1);
  const __m512 r = _mm512_fmsub_ps(m, look_up(kLogTables.c, index), one);
  const __m512 whole =
      _mm512_fmadd_ps(k, _mm512_set1_ps(kLn2<float>), look_up(kLogTables.minus_ln_c, index));
  __m512 q = _mm512_fmadd_ps(r, _mm512_set1_ps(0.33338016f), _mm512_set1_ps(-0.50004894f));
  q = _mm512_fmadd_ps(r, q, one);
  return _mm512_fmadd_ps(r, q, whole);
}

FASTKD_INLINE __m512 load16(const float* values, __mmask16 mask) {
  return _mm512_maskz_loadu_ps(mask, values);
}
FASTKD_INLINE __m512 load16(const Half* values, __mmask16 mask) {
  return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(mask, values));
}
FASTKD_INLINE __m512 load16(const BFloat16* values, __mmask16 mask) {
  const __m512i bits = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(mask, values));
  return _mm512_castsi512_ps(_mm512_slli_epi32(bits, 16));
}

// Takes ln of each value.
template <class Stored>
FASTKD_LOOP void logarithms(const Stored* __restrict values, int64_t n, float* __restrict logs) {
  const auto some = [&](int64_t i, __mmask16 mask) __attribute__((always_inline)) {
    _mm512_mask_storeu_ps(logs + i, mask, logarithm(load16(values + i, mask)));
  };
  int64_t i = 0;
  for (; i + 16 <= n; i += 16) {
    if (n > kChunk) touch_ahead(values + i);
    some(i, 0xffff);
  }
  if (i < n) some(i, static_cast<__mmask16>((1u << (n - i)) - 1));
}

#endif

// e^x, 0 below e^-708, and e^x - 1 also near 0, each with a relative error of at most 3e-16; for
// x <= 709. NaN stays NaN.
struct ExpTerms {
  double exp, minus_one;
};
FASTKD_INLINE ExpTerms exp_terms(double x) {
  constexpr double kLn2High = 0x1.62e42fee00000p-1, kLn2Low = 0x1.a39ef35793c76p-33;
  constexpr double kRoundDouble = 0x1.8p52;  // what kRound is for float
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

// The divergence of the label's class against all others together, from both sides' log-odds.
struct Binary {
  double divergence = 0;  // KL((p, 1 - p) || (q, 1 - q))
  double delta = 0;       // q - p
};

// p and q are the logistic functions of the odds; no digit is lost where either is near 0 or 1, nor
// where the two agree.
inline Binary binary_divergence(double teacher_odds, double student_odds) {
  double a = teacher_odds, b = student_odds;
  if (std::isnan(a) || std::isnan(b)) return {kNaN<double>, kNaN<double>};
  if (a == b) return {};  // perhaps both infinite
  const auto logistic = [](double x) { return 1 / (1 + std::exp(-x)); };
  const auto softplus = [](double x) {
    return (x > 0 ? x : 0) + std::log1p(std::exp(-std::fabs(x)));
  };
  const double gap = b - a;
  const double delta = gap > 0 ? -logistic(b) * logistic(-a) * std::expm1(-gap)
                               : logistic(a) * logistic(-b) * std::expm1(gap);
  if (std::fabs(gap) < 1) {
    // Sum of q ((1 + y) ln(1 + y) - y) with 1 + y = p / q: what follows would cancel.
    const double y = logistic(-a) * std::expm1(-gap), y_others = logistic(a) * std::expm1(gap);
    return {logistic(b) * log_terms(y, 1 + y).excess +
                logistic(-b) * log_terms(y_others, 1 + y_others).excess,
            delta};
  }
  // KL = softplus(b) - softplus(a) - p (b - a), of either class: of the rarer one in q. Either of
  // the odds may be infinite.
  const double sign = b > 0 ? -1 : 1;
  const double p = logistic(sign * a), size = std::fabs(a);
  const auto product = [](double x, double y) { return x == 0 ? 0 : x * y; };
  const double divergence =
      softplus(sign * b) - softplus(-size) - product(logistic(-size), size) - product(p, sign * b);
  return {std::fmax(divergence, 0.0), delta};
}

// Flushes results below the smallest normal number to 0 while it lives: a tail of subnormal
// probabilities costs a hundred cycles each on some processors. Inputs are still read exactly, for
// the selection of classes compares them.
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
