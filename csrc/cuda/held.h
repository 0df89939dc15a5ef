// The slice of a row in the registers of its CTA: loading it, and going over what each thread has.
#pragma once
#include <type_traits>

#include "row.h"

namespace fastkd::cuda {

// kPair: of both rows, else of the student's.
template <class Exchange, bool kPair>
class HeldSlice {
 protected:
  static constexpr int kVectors = Exchange::kVectors;

  __device__ explicit HeldSlice(Row<Exchange>& row) : row_(row) {}

  __device__ bool has_teacher() const { return kPair && row_.has_soft(); }
  __device__ int step(int i) const { return row_.begin() + warp() + i * warps(); }
  __device__ int last() const {  // the last step of this warp, or one beyond the slice
    int step = row_.begin() + warp();
    while (step + warps() < row_.end()) step += warps();
    return step;
  }

  template <class Fn>
  __device__ __forceinline__ void each(const Fn& fn) {
    const int first = step(0), end = row_.end();
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (first + i * warps() < end) fn(i);
    }
  }

  // Once per step of the warp, in a loop that is not unrolled, for what is long and rare: what is
  // held of each step moves up by one, so that every access has a fixed place in the registers.
  template <class Fn, class Rotate>
  __device__ __forceinline__ void each_in_turn(const Fn& fn, const Rotate& rotate) {
#pragma unroll 1
    for (int i = 0; i < kVectors; ++i) {
      if (step(i) < row_.end()) fn(i);
      rotate();
    }
  }
  static __device__ __forceinline__ void rotate(Packed* items) {
    const Packed first = items[0];
#pragma unroll
    for (int i = 0; i + 1 < kVectors; ++i) items[i] = items[i + 1];
    items[kVectors - 1] = first;
  }
  static __device__ __forceinline__ void rotate(float (&items)[kVectors][kPerLane]) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const float first = items[0][j];
#pragma unroll
      for (int i = 0; i + 1 < kVectors; ++i) items[i][j] = items[i + 1][j];
      items[kVectors - 1][j] = first;
    }
  }

  // All loads are under way before the first is waited for; `meanwhile` runs then.
  template <class Meanwhile>
  __device__ __forceinline__ void load(const Meanwhile& meanwhile) {
    Packed student[kVectors] = {}, teacher[kPair ? kVectors : 1] = {};
    // A teacher that is not asked for has no columns.
    const auto load_all = [&](auto aligned, const View& from, const View& of_teacher) {
      constexpr bool kAligned = decltype(aligned)::value;
      const int first = step(0), end = row_.end();
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int step = first + i * warps();
        student[i].first = load_inside<kAligned>(from, from.first(step), step < end);
        if constexpr (kPair) {
          teacher[i].first = load_inside<kAligned>(of_teacher, of_teacher.first(step), step < end);
        }
      }
      // One tensor after the other: the two blocks around every vector of both are more than the
      // registers hold.
      const auto load_second = [&](const View& view, Packed* packed) {
        if (!view.is_float()) return;
#pragma unroll
        for (int i = 0; i < kVectors; ++i) {
          const int step = first + i * warps();
          packed[i].second = load_inside<kAligned>(view, view.second(step), step < end);
        }
      };
      load_second(from, student);
      if constexpr (kPair) load_second(of_teacher, teacher);
    };
    const auto is_aligned = [&] {
      return row_.student().misaligned() == 0 &&
             (!has_teacher() || row_.teacher().misaligned() == 0);
    };
    if (is_aligned()) {
      load_all(std::true_type(), row_.student(), row_.teacher());
    } else {
      load_all(std::false_type(), row_.student(), row_.teacher());
    }
    meanwhile();
    const int last = this->last();
    if (!is_whole(row_.student(), step(0), last) ||
        (has_teacher() && !is_whole(row_.teacher(), step(0), last))) {
      each_in_turn(
          [&](int i) {
            patch(row_.student(), step(i), student[0]);
            if (has_teacher()) patch(row_.teacher(), step(i), teacher[0]);
          },
          [&] {
            rotate(student);
            if constexpr (kPair) rotate(teacher);
          });
    }
    row_.exchange.ready();
    unpack_all(row_.student().dtype, student, student_);
    if constexpr (kPair) unpack_all(row_.teacher().dtype, teacher, teacher_);
  }

  __device__ __forceinline__ void unpack_all(DType dtype, const Packed* packed,
                                             float (&values)[kVectors][kPerLane]) {
    // No branch around a step beyond the slice: the loads left 0 there.
    const auto all = [&](DType dtype) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) unpack(dtype, packed[i], values[i]);
    };
    dtype == DType::kFloat      ? all(DType::kFloat)
    : dtype == DType::kBFloat16 ? all(DType::kBFloat16)
                                : all(DType::kHalf);
  }

  __device__ __forceinline__ float maximum(const float (&values)[kVectors][kPerLane]) {
    float max = -kInf;
    each([&](int i) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) max = fmaxf(max, values[i][j]);
    });
    return warp_max(max);
  }

  Row<Exchange>& row_;
  float student_[kVectors][kPerLane], teacher_[kPair ? kVectors : 1][kPerLane];
};

}  // namespace fastkd::cuda
