// Conversion between the stored dtypes and the dtype of the arithmetic, written as loops over bits
// that vectorise at every instruction set (F16C intrinsics and library types do not).
#pragma once
#include "dispatch.h"

#define FASTKD_INLINE inline __attribute__((always_inline))
// A loop worth a call, compiled once however often it is used.
#define FASTKD_LOOP __attribute__((noinline))

namespace fastkd::cpu::FASTKD_ISA {

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

FASTKD_INLINE float from_bits(uint32_t bits) { return __builtin_bit_cast(float, bits); }
FASTKD_INLINE uint32_t to_bits(float value) { return __builtin_bit_cast(uint32_t, value); }

FASTKD_INLINE float load(float value) { return value; }
FASTKD_INLINE double load(double value) { return value; }
FASTKD_INLINE float load(BFloat16 value) { return from_bits(uint32_t{value.bits} << 16); }
FASTKD_INLINE float load(Half value) {
  const uint32_t sign = (uint32_t{value.bits} & 0x8000u) << 16;
  const uint32_t magnitude = (uint32_t{value.bits} & 0x7fffu) << 13;
  // 2^112 moves the exponent bias from 15 to 127 and makes subnormals normal, exactly.
  const uint32_t finite = to_bits(from_bits(magnitude) * 0x1p112f);
  return from_bits((magnitude >= 0x0f800000u ? magnitude | 0x7f800000u : finite) | sign);
}

FASTKD_INLINE bool is_nan(float value) { return value != value; }
FASTKD_INLINE bool is_nan(double value) { return value != value; }
FASTKD_INLINE bool is_nan(BFloat16 value) { return (value.bits & 0x7fff) > 0x7f80; }
FASTKD_INLINE bool is_nan(Half value) { return (value.bits & 0x7fff) > 0x7c00; }

// Round to nearest, ties to even; NaN stays NaN.
template <class To>
FASTKD_INLINE To store(float value);
template <class To>
FASTKD_INLINE To store(double value);

template <>
FASTKD_INLINE float store<float>(float value) {
  return value;
}
template <>
FASTKD_INLINE float store<float>(double value) {
  return static_cast<float>(value);
}
template <>
FASTKD_INLINE double store<double>(float value) {
  return value;
}
template <>
FASTKD_INLINE double store<double>(double value) {
  return value;
}
template <>
FASTKD_INLINE BFloat16 store<BFloat16>(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const bool nan = (bits & 0x7fffffffu) > 0x7f800000u;
  return {static_cast<uint16_t>(nan ? 0x7fc0u : rounded)};
}
template <>
FASTKD_INLINE Half store<Half>(float value) {
  const uint32_t bits = to_bits(value);
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Below 2^-14 the result is subnormal: adding 0.5 puts its last bit at the last bit of the sum.
  const uint32_t subnormal = to_bits(from_bits(magnitude) + 0.5f) - to_bits(0.5f);
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  uint32_t half = magnitude < 0x38800000u ? subnormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;  // rounds to 65536 or more: infinite
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000u))};
}
// A double gradient is only ever stored beside double logits, or into the student's narrower dtype.
template <>
FASTKD_INLINE BFloat16 store<BFloat16>(double value) {
  return store<BFloat16>(static_cast<float>(value));
}
template <>
FASTKD_INLINE Half store<Half>(double value) {
  return store<Half>(static_cast<float>(value));
}

// Calls fn with a null pointer of the type that `dtype` names. Where the arithmetic is in float no
// row is double, and nothing is compiled for that.
template <class T, class Fn>
FASTKD_INLINE void dispatch(DType dtype, const Fn& fn) {
  switch (dtype) {
    case DType::kFloat:
      return fn(static_cast<float*>(nullptr));
    case DType::kBFloat16:
      return fn(static_cast<BFloat16*>(nullptr));
    case DType::kHalf:
      return fn(static_cast<Half*>(nullptr));
    case DType::kDouble:
      if constexpr (sizeof(T) == sizeof(double)) fn(static_cast<double*>(nullptr));
  }
}

}  // namespace fastkd::cpu::FASTKD_ISA
