// The exact keep-th largest value of a row, in time that hardly depends on keep.
#pragma once
#include "columns.h"

namespace fastkd::cpu::FASTKD_ISA {

// How many values exceed each of four ascending pivots, and how many are NaN (counted on demand).
template <class T>
struct Counts {
  int64_t above[4];
  int64_t nan;
};

template <bool kCountNaN, class T>
FASTKD_LOOP Counts<T> count_above(const T* __restrict values, int64_t n, const T* pivots) {
  const T p0 = pivots[0], p1 = pivots[1], p2 = pivots[2], p3 = pivots[3];
  int32_t c0 = 0, c1 = 0, c2 = 0, c3 = 0, nan = 0;
#pragma omp simd reduction(+ : c0, c1, c2, c3, nan)
  for (int64_t i = 0; i < n; ++i) {
    c0 += values[i] > p0;
    c1 += values[i] > p1;
    c2 += values[i] > p2;
    c3 += values[i] > p3;
    if constexpr (kCountNaN) nan += values[i] != values[i];
  }
  return {{c0, c1, c2, c3}, nan};
}

template <class T>
FASTKD_INLINE bool any_inside(const T* __restrict values, int64_t n, T low, T high) {
  int32_t hits = 0;
#pragma omp simd reduction(+ : hits)
  for (int64_t i = 0; i < n; ++i) hits += !(values[i] <= low) && values[i] <= high;
  return hits != 0;
}

// Writes the values in (low, high] to `found` [n + 16]; low may be NaN: no lower bound. Few are
// expected: blocks and then parts of blocks without any cost a vector comparison.
template <class T>
FASTKD_LOOP int64_t collect(const T* __restrict values, int64_t n, T low, T high,
                            T* __restrict found) {
  constexpr int64_t kBlock = 128, kPart = 16;
  int64_t count = 0, begin = 0;
  const auto take = [&](int64_t from, int64_t length) __attribute__((always_inline)) {
    for (int64_t i = from; i < from + length; ++i) {
      found[count] = values[i];
      count += !(values[i] <= low) && values[i] <= high;
    }
  };
  for (; begin + kBlock <= n; begin += kBlock) {
    if (!any_inside(values + begin, kBlock, low, high)) continue;
    for (int64_t part = begin; part < begin + kBlock; part += kPart) {
      if (any_inside(values + part, kPart, low, high)) take(part, kPart);
    }
  }
  take(begin, n - begin);
  return count;
}

// The columns whose value is at least `threshold`, ascending, to `columns` [limit + 128]. More than
// `limit`: there are more, and the rest is not written.
template <class T>
FASTKD_LOOP int64_t columns_from(const T* __restrict values, int64_t n, T threshold, int64_t limit,
                                 int32_t* __restrict columns) {
  constexpr int64_t kBlock = 128, kPart = 16;
  int64_t count = 0;
  const auto any = [&](int64_t from, int64_t length) __attribute__((always_inline)) {
    int32_t hits = 0;
#pragma omp simd reduction(+ : hits)
    for (int64_t i = from; i < from + length; ++i) hits += values[i] >= threshold;
    return hits != 0;
  };
  const auto take = [&](int64_t from, int64_t length) __attribute__((always_inline)) {
    for (int64_t i = from; i < from + length; ++i) {
      columns[count] = static_cast<int32_t>(i);
      count += values[i] >= threshold;
    }
  };
  int64_t begin = 0;
  for (; begin + kBlock <= n && count <= limit; begin += kBlock) {
    if (!any(begin, kBlock)) continue;
    for (int64_t part = begin; part < begin + kBlock && count <= limit; part += kPart) {
      if (any(part, kPart)) take(part, kPart);
    }
  }
  if (count <= limit) take(begin, n - begin);
  return count;
}

template <class T>
FASTKD_LOOP T nth_largest(T* values, int64_t n, int64_t nth) {  // nth counts from 1
  std::nth_element(values, values + (nth - 1), values + n, [](T x, T y) { return x > y; });
  return values[nth - 1];
}

// `values` [n], 1 <= keep < n; `scratch` [n + 64]. NaN where a value is NaN.
//
// A bracket (low, high] around the answer is guessed from a sample and made narrower by counting
// against four pivots at a time, which the vector units do at the speed of the cache; what is left
// in it is collected and searched. Every count is exact, so a bad guess costs time and nothing
// else.
template <class T>
FASTKD_LOOP T kth_largest(const T* values, int64_t n, int64_t keep, T* scratch) {
  constexpr int64_t kFew = 512;
  const int64_t sample_size = n < 65536 ? 256 : 512;
  T low = -kInf<T>, high = kInf<T>;
  int64_t above_low = n, above_high = 0;  // values > low, values > high
  if (n > 4 * sample_size) {
    const int64_t stride = n / sample_size;
    for (int64_t i = 0; i < sample_size; ++i) scratch[i] = values[i * stride + (i * 7) % stride];
    if (has_nan(scratch, sample_size)) return kNaN<T>;  // NaN has no place in an order
    // Expected position of the answer in the sample and its standard deviation.
    const double share = static_cast<double>(keep) / static_cast<double>(n);
    const double center = share * static_cast<double>(sample_size);
    const double deviation = std::sqrt(static_cast<double>(sample_size) * share * (1 - share)) + 1;
    int64_t position[4];
    const double offsets[4] = {3.5, 1.0, -1.0, -3.5};  // pivots ascend, positions descend
    T pivots[4];
    int64_t end = sample_size;
    for (int j = 0; j < 4; ++j) {
      position[j] = static_cast<int64_t>(center + offsets[j] * deviation);
      position[j] = std::clamp<int64_t>(position[j], 1, sample_size);
      pivots[j] = nth_largest(scratch, end, position[j]);
      end = position[j];
    }
    for (int round = 0; round < 4; ++round) {
      const Counts<T> counts =
          round == 0 ? count_above<true>(values, n, pivots) : count_above<false>(values, n, pivots);
      if (counts.nan > 0) return kNaN<T>;
      for (int j = 0; j < 4; ++j) {
        const int64_t above = counts.above[j];
        if (above >= keep && pivots[j] > low) low = pivots[j], above_low = above;
        if (above < keep && pivots[j] < high) high = pivots[j], above_high = above;
      }
      const int64_t inside = above_low - above_high;
      if (inside <= kFew || !(high - low < kInf<T>)) break;
      // As if the values lay evenly in the bracket: where the answer then is, and around it the
      // standard deviation of a uniform order statistic, 1 / (2 sqrt(inside)), thrice and more.
      const T width = high - low;
      const T guess = low + width * (static_cast<T>(above_low - keep) / static_cast<T>(inside));
      if (!(guess > low && guess < high)) break;  // neighbouring numbers: nothing to narrow
      const T deviation = width / std::sqrt(static_cast<T>(inside));
      pivots[0] = guess - T(6.0) * deviation;
      pivots[1] = guess - T(1.5) * deviation;
      pivots[2] = guess + T(1.5) * deviation;
      pivots[3] = guess + T(6.0) * deviation;
    }
    const int64_t inside = above_low - above_high;
    if (inside < n / 2) {
      const int64_t count = collect(values, n, above_low == n ? kNaN<T> : low, high, scratch);
      return nth_largest(scratch, count, keep - above_high);
    }
  }
  if (has_nan(values, n)) return kNaN<T>;
  std::copy(values, values + n, scratch);
  return nth_largest(scratch, n, keep);
}

}  // namespace fastkd::cpu::FASTKD_ISA
