// Reading the columns of a row in order: chunks, lines of lanes, and what is touched early.
#pragma once
#include "load.h"

namespace fastkd::cpu::FASTKD_ISA {

constexpr int64_t kChunk = 1024;  // columns: 16 KiB of float logits and exponentials, half an L1

// Where the logits lie that are needed later, as they are stored: touched early, for the hardware's
// own prefetch ends with every page, which is every chunk.
struct Ahead {
  uintptr_t lead = 0, other = 0;            // of the first column that is to be touched
  int64_t lead_bytes = 0, other_bytes = 0;  // per column

  FASTKD_INLINE void touch(int64_t column) const {
    __builtin_prefetch(reinterpret_cast<const void*>(lead + column * lead_bytes), 0, 2);
    __builtin_prefetch(reinterpret_cast<const void*>(other + column * other_bytes), 0, 2);
  }
};
// Columns. Where a chunk is converted before it is computed, all of it is read at once: it has to
// be touched while the last but one is computed.
constexpr int64_t kAhead = 2 * kChunk;
// Where those columns lie while the chunk from `begin` on is computed: past the end of a row, at
// the beginning of the row `after` it.
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

// Of the lanes.
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

// The same of the first n columns of a row.
template <class T>
bool row_has_nan(const Rows& rows, int64_t row, int64_t n) {
  bool found = false;
  dispatch<T>(rows.dtype, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    found = has_nan_stored(static_cast<const Stored*>(rows.data) + rows.offset(row), n);
  });
  return found;
}

}  // namespace fastkd::cpu::FASTKD_ISA
