// Logarithms of probabilities.
#pragma once
#include "math.h"
#include "stream.h"

namespace fastkd::cpu::FASTKD_ISA {

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

// ln of each value. kNormal: true if all of them are normal numbers > 0, else the logarithms are
// not to be used.
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

// ln of each value.
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

// ln of each value.
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

}  // namespace fastkd::cpu::FASTKD_ISA
