// The classes of a row that take part in its soft term, the kept ones: all, or those that pruning
// leaves; without the label where it has a term of its own. StoredClasses is for slices that are
// read again for each step, HeldClasses for those in registers.
#pragma once
#include "held.h"

namespace fastkd::cuda {

template <class Exchange>
class StoredClasses {
 protected:
  __device__ explicit StoredClasses(Row<Exchange>& row) : row_(row) {}

  // To be called before any class is read.
  __device__ void prune() {
    if (row_.pruned()) threshold_ = threshold(row_.call, row_.exchange, row_.shared);
  }

  // fn(step, student, teacher): 8 columns as they are stored.
  template <class Fn>
  __device__ void each_step(const Fn& fn) {
    for (int step = row_.begin() + warp(); step < row_.end(); step += warps()) {
      float student[kPerLane], teacher[kPerLane];
      const Packed packed_student = load_packed(row_.student(), step);
      if (row_.has_soft()) unpack(row_.teacher().dtype, load_packed(row_.teacher(), step), teacher);
      unpack(row_.student().dtype, packed_student, student);
      fn(step, student, teacher);
    }
  }

  // Leaves the logits of the kept classes, from probabilities in units of ln 2. All others, pruned
  // or the label set apart, come out at -inf on both sides.
  __device__ void only_kept(int step, float* student, float* teacher) const {
    if (row_.pruned()) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (teacher[j] >= threshold_) continue;
        student[j] = -kInf;
        teacher[j] = none();
      }
    }
    if (row_.teacher_probs()) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) teacher[j] = log2_subnormal(teacher[j]);
    }
    const int index = row_.apart_index(step);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (j == index) student[j] = teacher[j] = -kInf;
    }
  }
  // A NaN of a pruned class is lost with it: it has to show in the sums.
  __device__ bool loses_nan(float student, float teacher) const {
    return row_.pruned() && (student != student || !(teacher >= none()));
  }

  __device__ float none() const { return row_.teacher_probs() ? 0.0f : -kInf; }

  Row<Exchange>& row_;

 private:
  // Not inlined: one function serves all cores.
  static __device__ FASTKD_NOINLINE float threshold(const DenseRows& call, Exchange exchange,
                                                    RowShared& shared) {
    Row<Exchange> row(call, exchange, shared);
    StoredClasses slice(row);
    return kth_largest(exchange, shared.select, row.teacher().dtype, row.keep(), slice.none(),
                       [&](const auto& fn) {
                         slice.each_step([&](int, const float*, const float* teacher) {
                           for (int j = 0; j < kPerLane; ++j) fn(teacher[j]);
                         });
                       });
  }

  float threshold_ = -kInf;
};

template <class Exchange>
class HeldClasses : protected HeldSlice<Exchange, true> {
 protected:
  using Base = HeldSlice<Exchange, true>;
  using Base::each, Base::row_, Base::step, Base::student_, Base::teacher_;

  __device__ explicit HeldClasses(Row<Exchange>& row) : Base(row) {}

  // Classes below the threshold no longer exist on either side.
  __device__ __forceinline__ void prune() {
    const float none = row_.teacher_probs() ? 0.0f : -kInf;
    const float threshold = kth_largest(row_.exchange, row_.shared.select, row_.teacher().dtype,
                                        row_.keep(), none, [&](const auto& fn) {
                                          each([&](int i) {
#pragma unroll
                                            for (int j = 0; j < kPerLane; ++j)
                                              fn(unknown(teacher_[i][j]));
                                          });
                                        });
    bool nan = false;
    each([&](int i) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const float s = student_[i][j], t = teacher_[i][j];
        nan |= s != s || !(t >= none);
        const bool keep = t >= threshold;
        student_[i][j] = keep ? s : -kInf;
        teacher_[i][j] = keep ? t : none;
      }
    });
    // A NaN is lost with its class: it has to show in the sums.
    if (nan) student_[0][0] = teacher_[0][0] = kNaN;
  }

  // Turns probabilities into logits in units of ln 2: NaN where one is negative.
  __device__ __forceinline__ void take_logarithms() {
    each([&](int i) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) teacher_[i][j] = log2_subnormal(teacher_[i][j]);
    });
  }

  // Takes the label out of both sides where it has a term of its own: by the warp that has it. A
  // NaN stays, for it has to show in the sums.
  __device__ __forceinline__ void set_label_apart() {
    if (!row_.decoupled()) return;
    const int of_label = row_.label() / kStep;
    each([&](int i) {
      if (step(i) == of_label) set_apart(i, row_.apart_index(of_label));
    });
  }
  __device__ __forceinline__ void set_apart(int i, int index) {
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (j != index) continue;
      if (student_[i][j] == student_[i][j]) student_[i][j] = -kInf;
      if (teacher_[i][j] == teacher_[i][j]) teacher_[i][j] = -kInf;
    }
  }
};

}  // namespace fastkd::cuda
