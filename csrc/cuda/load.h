// The columns of one row, as a warp reads and writes them: 256 at a time, 8 to a lane, in vectors
// of 16 bytes whatever the alignment of the row and wherever it ends. Which lane has which column
// depends on nothing but the dtypes, so that neither the alignment nor the neighbours of a row show
// in the order of its sums.
#pragma once
#include "machine.h"

namespace fastkd::cuda {

constexpr int kPerLane = 8;
constexpr int kStep = kLanes * kPerLane;  // columns a warp handles together

// 8 columns as stored; a 16-bit dtype has all of them in `first`.
struct Packed {
  uint4 first, second;
};

// One row of a tensor.
struct View {
  char* data;
  DType dtype;
  int columns;  // those that take part: what lies beyond is never read, and read as no mass
  // kSplit: a lane's 8 columns are twice 4, so that a warp's loads of float are dense.
  enum Traits : uint8_t { kSplit = 1, kProbabilities = 2 };
  uint8_t traits;

  View() = default;
  __device__ View(const Rows& rows, int64_t row, int64_t columns, int traits)
      : data(static_cast<char*>(rows.data) + rows.offset(row) * rows.element_bytes()),
        dtype(rows.dtype),
        columns(static_cast<int>(columns)),
        traits(static_cast<uint8_t>(traits)) {}

  // A copy of one in shared memory.
  static __device__ __forceinline__ View again(const View& v) {
    View copy;
    copy.data = fresh(v.data);
    copy.dtype = fresh(v.dtype);
    copy.columns = fresh(v.columns);
    copy.traits = fresh(v.traits);
    return copy;
  }

  __device__ bool is_float() const { return dtype == DType::kFloat; }
  __device__ bool split() const { return (traits & kSplit) != 0; }
  __device__ bool holds_probabilities() const { return (traits & kProbabilities) != 0; }
  __device__ int per_vector() const { return is_float() ? 4 : 8; }  // columns of 16 bytes
  // What a block of 16 bytes has before the column at which a vector of the row begins.
  __device__ unsigned misaligned_bytes() const {
    return static_cast<unsigned>(reinterpret_cast<uintptr_t>(data)) % 16;
  }
  __device__ int misaligned() const {
    return static_cast<int>(misaligned_bytes()) >> (is_float() ? 2 : 1);
  }

  // The lane's first 4 and last 4 columns.
  __device__ int first(int step) const { return step * kStep + lane() * (split() ? 4 : kPerLane); }
  __device__ int second(int step) const { return first(step) + (split() ? kStep / 2 : 4); }
  // Where a column of the lane's step is among its 8, or a number outside.
  __device__ int index(int step, int column) const {
    const int i = column - first(step), j = column - second(step);
    return j >= 0 && j < 4 ? 4 + j : i >= 0 && i < 4 ? i : -1;
  }
};

__device__ __forceinline__ char* address_of(const View& view, int column) {
  return view.data + (int64_t{column} << (view.is_float() ? 2 : 1));
}

// What has no mass, in every half, or as a float: -inf, or a probability of 0.
__device__ __forceinline__ uint32_t no_mass(const View& view) {
  return view.holds_probabilities()       ? 0u
         : view.dtype == DType::kFloat    ? 0xff800000u
         : view.dtype == DType::kBFloat16 ? 0xff80ff80u
                                          : 0xfc00fc00u;
}

__device__ __forceinline__ uint32_t load_word(const View& view, int column) {
  if (view.is_float()) {
    return column < view.columns ? reinterpret_cast<const uint32_t*>(view.data)[column]
                                 : no_mass(view);
  }
  const uint16_t* halves = reinterpret_cast<const uint16_t*>(view.data);
  const uint32_t none = no_mass(view) & 0xffffu;
  const uint32_t low = column < view.columns ? halves[column] : none;
  const uint32_t high = column + 1 < view.columns ? halves[column + 1] : none;
  return low | high << 16;
}

// The 16 bytes that begin `bytes`, less than 16, into the 32 of a and b.
__device__ __forceinline__ uint4 shifted(uint4 a, uint4 b, unsigned bytes) {
  if (bytes & 8) a.x = a.z, a.y = a.w, a.z = b.x, a.w = b.y, b.x = b.z, b.y = b.w;
  if (bytes & 4) a.x = a.y, a.y = a.z, a.z = a.w, a.w = b.x, b.x = b.y;
  if (bytes & 2) {
    a.x = a.x >> 16 | a.y << 16;
    a.y = a.y >> 16 | a.z << 16;
    a.z = a.z >> 16 | a.w << 16;
    a.w = a.w >> 16 | b.x << 16;
  }
  return a;
}

// Whether the 16 bytes from `column` on are in the row, and the aligned blocks around them as well.
__device__ __forceinline__ bool is_inside(const View& view, int column) {
  const int count = view.per_vector(), before = view.misaligned();
  // No branch: both are always evaluated.
  return (column >= before) & (column - before + (before == 0 ? count : 2 * count) <= view.columns);
}

// As two aligned loads; of a row that is aligned, one.
__device__ __forceinline__ uint4 load_shifted(const View& view, int column, bool wanted) {
  const unsigned off = view.misaligned_bytes();
  const char* aligned = address_of(view, column) - off;
  return shifted(load_cached(aligned, wanted), load_cached(aligned + 16, wanted & (off != 0)), off);
}
// By single columns: where a block would reach beyond the row.
__device__ __forceinline__ uint4 load_words(const View& view, int column) {
  const int words = view.is_float() ? 1 : 2;  // columns of a word
  return {load_word(view, column), load_word(view, column + words),
          load_word(view, column + 2 * words), load_word(view, column + 3 * words)};
}
__device__ __forceinline__ uint4 load_vector(const View& view, int column) {
  return is_inside(view, column) ? load_shifted(view, column, true) : load_words(view, column);
}

// Whether every vector of these steps is inside the row.
__device__ __forceinline__ bool is_whole(const View& view, int first, int last) {
  return is_inside(view, first * kStep) && is_inside(view, (last + 1) * kStep - view.per_vector());
}
// What is not wanted or not inside comes out as 0: patch() is for the latter.
template <bool kAligned>
__device__ __forceinline__ uint4 load_inside(const View& view, int column, bool wanted) {
  wanted = wanted & is_inside(view, column);
  return kAligned ? load_streaming(address_of(view, column), wanted)
                  : load_shifted(view, column, wanted);
}
__device__ __forceinline__ void patch(const View& view, int step, Packed& packed) {
  const auto patch = [&](int column, uint4& vector) {
    if (!is_inside(view, column)) vector = load_words(view, column);
  };
  patch(view.first(step), packed.first);
  if (view.is_float()) patch(view.second(step), packed.second);
}

__device__ __forceinline__ Packed load_packed(const View& view, int step) {
  Packed packed = {};
  packed.first = load_vector(view, view.first(step));
  if (view.is_float()) packed.second = load_vector(view, view.second(step));
  return packed;
}

__device__ __forceinline__ float as_float(uint32_t bits) { return __uint_as_float(bits); }

__device__ __forceinline__ void unpack(DType dtype, const Packed& packed, float* values) {
  const uint32_t a[4] = {packed.first.x, packed.first.y, packed.first.z, packed.first.w};
  if (dtype == DType::kFloat) {
    const uint32_t b[4] = {packed.second.x, packed.second.y, packed.second.z, packed.second.w};
#pragma unroll
    for (int j = 0; j < 4; ++j) values[j] = as_float(a[j]), values[4 + j] = as_float(b[j]);
  } else if (dtype == DType::kBFloat16) {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      values[2 * j] = as_float(a[j] << 16);
      values[2 * j + 1] = as_float(a[j] & 0xffff0000u);
    }
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) {
      const float2 pair = unpack_half(a[j]);
      values[2 * j] = pair.x;
      values[2 * j + 1] = pair.y;
    }
  }
}

__device__ __forceinline__ Packed pack(DType dtype, const float* values) {
  uint32_t a[4], b[4] = {};
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (dtype == DType::kFloat) {
      a[j] = __float_as_uint(values[j]);
      b[j] = __float_as_uint(values[4 + j]);
    } else if (dtype == DType::kBFloat16) {
      a[j] = pack_bfloat16(values[2 * j], values[2 * j + 1]);
    } else {
      a[j] = pack_half(values[2 * j], values[2 * j + 1]);
    }
  }
  return {{a[0], a[1], a[2], a[3]}, {b[0], b[1], b[2], b[3]}};
}

__device__ __forceinline__ void store_word(const View& view, int column, uint32_t word) {
  if (view.is_float()) {
    if (column < view.columns) reinterpret_cast<uint32_t*>(view.data)[column] = word;
    return;
  }
  uint16_t* halves = reinterpret_cast<uint16_t*>(view.data);
  if (column < view.columns) halves[column] = static_cast<uint16_t>(word);
  if (column + 1 < view.columns) halves[column + 1] = static_cast<uint16_t>(word >> 16);
}

// A step that is all in an aligned row.
__device__ __forceinline__ void store_aligned(const View& view, int step, const Packed& packed) {
  store_streaming(address_of(view, view.first(step)), packed.first);
  if (view.is_float()) store_streaming(address_of(view, view.second(step)), packed.second);
}
// A step that is all in a row that is not aligned: what lies in an aligned block of 16 bytes is
// stored by the lane that has its end, together with what the lane before has of it; and what is
// left over at both ends of the step, 16 bytes in all, column by column.
__device__ __forceinline__ void store_shifted(const View& view, int step, const Packed& packed) {
  const unsigned off = view.misaligned_bytes();
  uint4 before = from_previous_lane(packed.first);
  if (view.is_float()) {
    uint4 before_second = from_previous_lane(packed.second);
    if (!view.split()) before = before_second, before_second = packed.first;
    if (view.split() && lane() == 0) before_second = before;
    store_streaming(address_of(view, view.second(step)) - off,
                    shifted(before_second, packed.second, 16 - off));
  }
  if (lane() > 0) {
    store_streaming(address_of(view, view.first(step)) - off,
                    shifted(before, packed.first, 16 - off));
  }
  if (lane() > 0 && lane() < kLanes - 1) return;
  const bool is_last = lane() > 0 && view.is_float();
  const int column = is_last ? view.second(step) : view.first(step);
  const uint4 v = is_last ? packed.second : packed.first;
  const uint32_t words[4] = {v.x, v.y, v.z, v.w};
  const int boundary = view.per_vector() - view.misaligned();
#pragma unroll
  for (int j = 0; j < kPerLane; ++j) {
    if (j >= view.per_vector() || (j < boundary) != (lane() == 0)) continue;
    if (view.is_float()) {
      reinterpret_cast<uint32_t*>(view.data)[column + j] = words[j % 4];
    } else {
      reinterpret_cast<uint16_t*>(view.data)[column + j] =
          static_cast<uint16_t>(words[j / 2] >> j % 2 * 16);
    }
  }
}
// The step in which the row ends.
__device__ __forceinline__ void store_ragged(const View& view, int step, const Packed& packed) {
  const auto store = [&](int column, uint4 v) {
    if (view.misaligned() == 0 && column + view.per_vector() <= view.columns) {
      return store_streaming(address_of(view, column), v);
    }
    const int words = view.is_float() ? 1 : 2;
    store_word(view, column, v.x);
    store_word(view, column + words, v.y);
    store_word(view, column + 2 * words, v.z);
    store_word(view, column + 3 * words, v.w);
  };
  store(view.first(step), packed.first);
  if (view.is_float()) store(view.second(step), packed.second);
}

__device__ __forceinline__ bool is_ragged(const View& view, int step) {
  return (step + 1) * kStep > view.columns;
}
__device__ __forceinline__ void store_whole(const View& view, int step, const Packed& packed) {
  view.misaligned() == 0 ? store_aligned(view, step, packed) : store_shifted(view, step, packed);
}
// By whole warps.
__device__ __forceinline__ void store_packed(const View& view, int step, const Packed& packed) {
  is_ragged(view, step) ? store_ragged(view, step, packed) : store_whole(view, step, packed);
}

// One column, and nothing of its neighbours.
__device__ __forceinline__ float load_single(const View& view, int column) {
  const uint32_t word = view.is_float() ? reinterpret_cast<const uint32_t*>(view.data)[column]
                                        : reinterpret_cast<const uint16_t*>(view.data)[column];
  float values[kPerLane];
  unpack(view.dtype, {{word, 0, 0, 0}, {0, 0, 0, 0}}, values);
  return values[0];
}
// One column, of the low half of a word or of all of it.
__device__ __forceinline__ void store_single(const View& view, int column, uint32_t word) {
  if (view.is_float()) {
    reinterpret_cast<uint32_t*>(view.data)[column] = word;
  } else {
    reinterpret_cast<uint16_t*>(view.data)[column] = static_cast<uint16_t>(word);
  }
}

// Columns [begin, end) become `value`; by the whole CTA.
__device__ FASTKD_NOINLINE inline void fill(View view, int begin, int end, float value) {
  const float values[kPerLane] = {value, value, value, value, value, value, value, value};
  const uint4 v = pack(view.dtype, values).first;
  const int shift = view.is_float() ? 2 : 1;
  const int count = 16 >> shift;
  // The first column at a multiple of 16 bytes, and the vectors from there on.
  const auto address = reinterpret_cast<uintptr_t>(address_of(view, begin));
  const int head = min(end, begin + static_cast<int>((16 - address % 16) % 16 >> shift));
  const int vectors = (end - head) / count;
  const int tail = head + vectors * count;
  const int thread = static_cast<int>(threadIdx.x), threads = static_cast<int>(blockDim.x);
  for (int i = thread; i < vectors; i += threads) {
    store_streaming(address_of(view, head + i * count), v);
  }
  for (int i = begin + thread; i < head; i += threads) store_single(view, i, v.x);
  for (int i = tail + thread; i < end; i += threads) store_single(view, i, v.x);
}

}  // namespace fastkd::cuda
