// The exact keep-th largest value of a row, in time that hardly depends on keep.
#pragma once
#include "load.h"
#include "math.h"

namespace fastkd::cpu::FASTKD_ISA {

// Packing the values that a mask selects is the one loop that no compiler vectorises by itself: by
// hand it takes a sixth of the time with AVX-512, a third with AVX2.
#if defined(FASTKD_AVX512)
#define FASTKD_PACK 1

struct Lanes {
  static constexpr int64_t kCount = 16;
  using Mask = __mmask16;
  __m512 x;

  static Lanes load(const float* values) { return {_mm512_loadu_ps(values)}; }
  static Lanes all(float value) { return {_mm512_set1_ps(value)}; }
  Mask above(Lanes y) const { return _mm512_cmp_ps_mask(x, y.x, _CMP_GT_OQ); }
  Mask up_to(Lanes y, Mask of) const { return _mm512_mask_cmp_ps_mask(of, x, y.x, _CMP_LE_OQ); }
  Lanes plus_zero_times(Lanes y) const { return {_mm512_fmadd_ps(y.x, _mm512_setzero_ps(), x)}; }
  bool nan() const { return _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q) != 0; }
  // Packed in a register and stored whole: a packing store is slow on some processors.
  void store_packed(Mask mask, float* out) const {
    _mm512_storeu_ps(out, _mm512_maskz_compress_ps(mask, x));
  }
};

#elif defined(FASTKD_AVX2)
#define FASTKD_PACK 1

// The lanes that every mask selects, a byte each.
struct Selections {
  uint64_t lanes[256] = {};
  constexpr Selections() {
    for (uint32_t mask = 0; mask < 256; ++mask) {
      int count = 0;
      for (uint32_t lane = 0; lane < 8; ++lane) {
        if (mask >> lane & 1) lanes[mask] |= uint64_t{lane} << (8 * count++);
      }
    }
  }
};
inline constexpr Selections kSelections;

struct Lanes {
  static constexpr int64_t kCount = 8;
  using Mask = uint32_t;
  __m256 x;

  static Lanes load(const float* values) { return {_mm256_loadu_ps(values)}; }
  static Lanes all(float value) { return {_mm256_set1_ps(value)}; }
  Mask above(Lanes y) const { return mask(_mm256_cmp_ps(x, y.x, _CMP_GT_OQ)); }
  Mask up_to(Lanes y, Mask of) const { return of & mask(_mm256_cmp_ps(x, y.x, _CMP_LE_OQ)); }
  Lanes plus_zero_times(Lanes y) const { return {_mm256_fmadd_ps(y.x, _mm256_setzero_ps(), x)}; }
  bool nan() const { return mask(_mm256_cmp_ps(x, x, _CMP_UNORD_Q)) != 0; }
  void store_packed(Mask mask, float* out) const {
    const __m128i bytes = _mm_cvtsi64_si128(static_cast<int64_t>(kSelections.lanes[mask]));
    _mm256_storeu_ps(out, _mm256_permutevar8x32_ps(x, _mm256_cvtepu8_epi32(bytes)));
  }

 private:
  static Mask mask(__m256 lanes) { return static_cast<Mask>(_mm256_movemask_ps(lanes)); }
};

#endif

// What was found of the values of a row in and above a bracket.
struct Found {
  int64_t above = 0;   // values > high
  int64_t inside = 0;  // values in (low, high], collected
  bool nan = false;
};

// Collects the values in (low, high] to `found` [n + 16].
template <class T>
FASTKD_LOOP Found collect(const T* values, int64_t n, T low, T high, T* __restrict found) {
  int64_t begin = 0, count = 0, above = 0;
  int32_t nan = 0;
#if defined(FASTKD_PACK)
  if constexpr (std::is_same_v<T, float>) {
    const Lanes lows = Lanes::all(low), highs = Lanes::all(high);
    int64_t over = 0;
    Lanes odd = Lanes::all(0);  // NaN where a NaN or an infinity was met
    for (; begin + Lanes::kCount <= n; begin += Lanes::kCount) {
      touch_ahead(values + begin);
      const Lanes x = Lanes::load(values + begin);
      const Lanes::Mask over_low = x.above(lows), inside = x.up_to(highs, over_low);
      odd = odd.plus_zero_times(x);
      x.store_packed(inside, found + count);
      count += __builtin_popcount(inside);
      over += __builtin_popcount(over_low);
    }
    above = over - count;
    if (odd.nan()) nan = has_nan(values, begin);
  }
#endif
  constexpr int64_t kBlock = 128;
  for (; begin < n; begin += kBlock) {
    const T* block = values + begin;
    const int64_t size = std::min(kBlock, n - begin);
    int32_t inside[kBlock], inside_block = 0, above_block = 0;
#pragma omp simd reduction(+ : above_block, inside_block, nan)
    for (int64_t i = 0; i < size; ++i) {
      above_block += block[i] > high;
      inside[i] = (block[i] > low) & (block[i] <= high);
      inside_block += inside[i];
      nan += block[i] != block[i];
    }
    above += above_block;
    if (inside_block == 0) continue;
    for (int64_t i = 0; i < size; ++i) {  // without a branch: every other one would be missed
      found[count] = block[i];
      count += inside[i];
    }
  }
  return {above, count, nan != 0};
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

// The nth largest of values [n], from 1 on, none of which is NaN. Both buffers [n + 16] are used
// up.
//
// It parts the values by packing where that is done by vectors: of some hundred values the branches
// that std::nth_element misses cost eight times as much.
template <class T>
FASTKD_LOOP T nth_largest(T* values, int64_t n, int64_t nth, T* spare) {
#if defined(FASTKD_PACK)
  if constexpr (std::is_same_v<T, float>) {
    constexpr int64_t kFew = 24;
    for (int round = 0; round < 40 && n > kFew; ++round) {
      const T x = values[0], y = values[n / 2], z = values[n - 1];
      const T pivot = std::fmax(std::fmin(x, y), std::fmin(std::fmax(x, y), z));
      Found found = collect(values, n, pivot, kInf<T>, spare);
      if (nth > found.inside) {
        found = collect(values, n, -kInf<T>, std::nextafter(pivot, -kInf<T>), spare);
        if (nth <= found.above) return pivot;
        nth -= found.above;
        if (nth > found.inside) return -kInf<T>;
      }
      n = found.inside;
      std::swap(values, spare);
    }
  }
#endif
  std::nth_element(values, values + (nth - 1), values + n, [](T x, T y) { return x > y; });
  return values[nth - 1];
}

// The keep-th largest of values [n] that all lie in (low, high]; both buffers [n + 16] are used up.
//
// The answer is looked for as if they lay evenly there: around where it then is, six standard
// deviations of a uniform order statistic, 1 / (2 sqrt(n)), are collected. Every count is exact, so
// that a bad guess costs time and nothing else; after one, halves.
template <class T>
FASTKD_LOOP T nth_between(T* values, int64_t n, int64_t keep, T low, T high, T* spare) {
  constexpr int64_t kFew = 256;
  bool halve = false;
  for (int round = 0; round < 10 && n > kFew && high - low < kInf<T>; ++round) {
    const T width = high - low, count = static_cast<T>(n);
    const T guess = low + width * (static_cast<T>(n - keep) / count);
    const T deviation = width * 3 / std::sqrt(count);
    const T from = halve ? low : std::fmax(low, guess - deviation);
    const T to = halve ? low + width / 2 : std::fmin(high, guess + deviation);
    Found found = collect(values, n, from, to, spare);
    const int64_t up_to = found.above + found.inside;
    const bool hit = found.above < keep && keep <= up_to;
    if (hit) {
      low = from, high = to, keep -= found.above;
    } else if (keep <= found.above) {
      low = to;
      found = collect(values, n, low, high, spare);
    } else {
      high = from;
      found = collect(values, n, low, high, spare);
      keep -= up_to;
    }
    halve = !hit || found.inside > n / 2;
    n = found.inside;
    std::swap(values, spare);
  }
  return nth_largest(values, n, keep, spare);
}

// The keep-th largest of `values` [n], 1 <= keep < n; `scratch` and `spare` are [n + 64]. NaN where
// a value is NaN, which has no place in an order.
//
// A bracket around the answer is guessed from a sample; what lies in it is collected in one pass
// over the row, and searched.
template <class T>
FASTKD_LOOP T kth_largest(const T* values, int64_t n, int64_t keep, T* scratch, T* spare) {
  const int64_t sample_size = n < 65536 ? 256 : 512;
  if (n > 4 * sample_size) {
    const int64_t stride = n / sample_size;
    for (int64_t i = 0, shift = 0; i < sample_size; ++i) {
      scratch[i] = values[i * stride + shift];
      shift = shift + 7 < stride ? shift + 7 : 0;
    }
    if (has_nan(scratch, sample_size)) return kNaN<T>;
    // Expected position of the answer in the sample and its standard deviation.
    const double share = static_cast<double>(keep) / static_cast<double>(n);
    const double center = share * static_cast<double>(sample_size);
    const double deviation = std::sqrt(static_cast<double>(sample_size) * share * (1 - share)) + 1;
    const auto last = static_cast<int64_t>(center + 3.5 * deviation);
    const auto first = static_cast<int64_t>(center - 3.5 * deviation);
    T low = -kInf<T>, high = kInf<T>;
    T* copy = std::copy(scratch, scratch + sample_size, scratch + 2 * sample_size) - sample_size;
    if (last <= sample_size) low = nth_largest(scratch, sample_size, last, spare);
    if (first >= 1) high = nth_largest(copy, sample_size, first, spare);
    Found found = collect(values, n, low, high, scratch);
    if (found.nan) return kNaN<T>;
    if (keep <= found.above) {  // the sample misled
      low = high, high = kInf<T>;
      found = collect(values, n, low, high, scratch);
    } else if (keep > found.above + found.inside) {
      high = low, low = -kInf<T>;
      found = collect(values, n, low, high, scratch);
      if (keep > found.above + found.inside) return low;  // the bracket does not hold -inf itself
    }
    return nth_between(scratch, found.inside, keep - found.above, low, high, spare);
  }
  if (has_nan(values, n)) return kNaN<T>;
  std::copy(values, values + n, scratch);
  return nth_largest(scratch, n, keep, spare);
}

}  // namespace fastkd::cpu::FASTKD_ISA
