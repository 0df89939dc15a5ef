// Reading and storing the columns of a row, whose dtypes are converted by loops over bits: those
// vectorise at every instruction set, where F16C intrinsics and library types do not.
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

constexpr int64_t kChunk = 1024;  // columns: 16 KiB of float logits and exponentials, half an L1

// Where the logits lie that are needed later, as they are stored: touched early, for the hardware's
// own prefetch ends with every page, which is every chunk.
struct Ahead {
  uintptr_t lead = 0, other = 0;            // where the first column lies that is to be touched
  int64_t lead_bytes = 0, other_bytes = 0;  // per column

  FASTKD_INLINE void touch(int64_t column) const {
    __builtin_prefetch(reinterpret_cast<const void*>(lead + column * lead_bytes), 0, 2);
    __builtin_prefetch(reinterpret_cast<const void*>(other + column * other_bytes), 0, 2);
  }
};
// How many columns later. A chunk that is converted before it is computed is read all at once: it
// has to be touched while the last but one is computed.
constexpr int64_t kAhead = 2 * kChunk;
// Where the columns lie that are touched while the chunk from `begin` on is computed: past the end
// of a row, at the beginning of the row `after` it.
inline uintptr_t address_ahead(const Rows& rows, int64_t row, int64_t after, int64_t columns,
                               int64_t begin) {
  const int64_t end = (columns + kChunk - 1) / kChunk * kChunk, ahead = begin + kAhead;
  return ahead < end ? rows.address(row, ahead) : rows.address(after, (ahead - end) % end);
}

// For a pass that does little but read a row: 0.14 ns a float from memory in place of 0.57 where it
// packs what it reads. The values need not exist.
FASTKD_INLINE void touch_ahead(const void* values) {
  __builtin_prefetch(static_cast<const char*>(values) + 8192);
}

// The loops over columns keep a sum for every lane of a cache line of columns, whatever the width
// of the vectors: so their rounding errors stay small, and nearly the same for every instruction
// set.
template <class T>
constexpr int kLanes = 64 / sizeof(T);

// Calls line(i) before each whole line of columns, and column(i, lane) for every one of n.
template <int kLanes, class Line, class Column>
FASTKD_INLINE void each_column(int64_t n, const Line& line, const Column& column) {
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    line(i);
#pragma omp simd
    for (int lane = 0; lane < kLanes; ++lane) column(i + lane, lane);
  }
  for (int lane = 0; i < n; ++i, ++lane) column(i, lane);
}
template <int kLanes, class Column>
FASTKD_INLINE void each_column(int64_t n, const Column& column) {
  each_column<kLanes>(n, [](int64_t) {}, column);
}

// The sum and the maximum of the lanes.
template <int kLanes, class T>
FASTKD_INLINE T sum_of(const T (&lanes)[kLanes]) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int lane = 0; lane < kLanes; ++lane) sum += lanes[lane];
  return sum;
}
template <int kLanes, class T>
FASTKD_INLINE T max_of(const T (&lanes)[kLanes]) {
  T max = lanes[0];
#pragma omp simd reduction(max : max)
  for (int lane = 0; lane < kLanes; ++lane) max = max < lanes[lane] ? lanes[lane] : max;
  return max;
}

// n logits of a row from column `begin` on, in the dtype T of the arithmetic: in place where they
// are stored so, else converted into `scratch`.
template <class T>
const T* load_columns(const Rows& rows, int64_t row, int64_t begin, int64_t n,
                      T* __restrict scratch) {
  const T* columns = scratch;
  dispatch<T>(rows.dtype, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    const Stored* __restrict source =
        static_cast<const Stored*>(rows.data) + rows.offset(row) + begin;
    const auto column = [&](int64_t i, int) __attribute__((always_inline)) {
      scratch[i] = static_cast<T>(load(source[i]));
    };
    if constexpr (std::is_same_v<Stored, T>) {
      columns = source;
    } else {
      constexpr int kLine = kLanes<Stored>;
      const auto line = [&](int64_t i) __attribute__((always_inline)) { touch_ahead(source + i); };
      n > kChunk ? each_column<kLine>(n, line, column) : each_column<kLine>(n, column);
    }
  });
  return columns;
}

// The logits of some columns of a row, into `gathered`, which is returned.
template <class T, class Index, class Out = T>
const Out* gather_columns(const Rows& rows, int64_t row, const Index* columns, int64_t n,
                          Out* __restrict gathered) {
  dispatch<T>(rows.dtype, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    const Stored* source = static_cast<const Stored*>(rows.data) + rows.offset(row);
    for (int64_t i = 0; i < n; ++i) gathered[i] = static_cast<T>(load(source[columns[i]]));
  });
  return gathered;
}

// NaN anywhere in a row as it is stored.
template <class Stored>
FASTKD_LOOP bool has_nan_stored(const Stored* values, int64_t n) {
  using Flag = std::conditional_t<sizeof(Stored) == 2, int16_t,
                                  std::conditional_t<sizeof(Stored) == 4, int32_t, int64_t>>;
  Flag nans[kLanes<Stored>] = {};
  const auto line = [&](int64_t i) __attribute__((always_inline)) { touch_ahead(values + i); };
  each_column<kLanes<Stored>>(n, line, [&](int64_t i, int lane) __attribute__((always_inline)) {
    nans[lane] |= is_nan(values[i]) ? Flag(1) : Flag(0);
  });
  return max_of(nans) != 0;
}

// NaN anywhere in the first n columns of a row.
template <class T>
bool row_has_nan(const Rows& rows, int64_t row, int64_t n) {
  bool found = false;
  dispatch<T>(rows.dtype, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    found = has_nan_stored(static_cast<const Stored*>(rows.data) + rows.offset(row), n);
  });
  return found;
}

// NaN anywhere in a chunk.
template <class T>
FASTKD_LOOP bool has_nan(const T* values, int64_t n) {
  T nans = 0;
#pragma omp simd reduction(+ : nans)
  for (int64_t i = 0; i < n; ++i) nans += values[i] != values[i] ? T(1) : T(0);
  return nans != 0;
}

}  // namespace fastkd::cpu::FASTKD_ISA
