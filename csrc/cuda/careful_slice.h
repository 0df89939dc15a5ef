// The slice of a row that is read again for each step, of any length: its classes, and the hard
// term over them.
#pragma once
#include "row.h"

namespace fastkd::cuda {

template <class Exchange>
class RereadSlice {
 protected:
  __device__ explicit RereadSlice(Row<Exchange>& row) : row_(row) {}

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

  // The logits of the classes that take part, of probabilities in units of ln 2; the others, pruned
  // or the label set apart, are at -inf on both sides.
  __device__ void take_part(int step, float* student, float* teacher) const {
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
    const int index = row_.left_out(step);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (j == index) student[j] = teacher[j] = -kInf;
    }
  }
  // A NaN of a pruned class is lost with it: it has to show in the sums.
  __device__ bool loses_nan(float student, float teacher) const {
    return row_.pruned() && (student != student || !(teacher >= none()));
  }

  // --- the hard term with exponentials of its own, in the frame of the row's maximum

  __device__ static float exponential(float y) { return exp2_approx(y * kLog2E); }

  // All classes but the label, whose gradient is less theirs: softmax less 1 would lose what is
  // small beside 1.
  __device__ float sum_hard(int step, const float* student) const {
    const int label = label_index(step);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      sum += j == label ? 0.0f : exponential(student[j] - hard_frame_);
    }
    return sum;
  }
  // With the label.
  __device__ float hard_sum(const Sums& sums) const {
    return sums.hard + exponential(sums.label - hard_frame_);
  }
  __device__ void add_hard(int step, const float* student, float factor, float* gradient) const {
    const int label = label_index(step);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const float e = j == label ? 0.0f : exponential(student[j] - hard_frame_);
      gradient[j] = fmaf(e, factor, gradient[j]);
    }
  }
  __device__ int label_index(int step) const {
    return row_.label() / kStep == step ? row_.student().index(step, row_.label()) : -1;
  }

  // The same over the tail.
  __device__ void find_maximum_of_tail(float& max) const {
    if (row_.has_tail()) row_.each_of_tail([&](int, float logit) { max = fmaxf(max, logit); });
  }
  __device__ float sum_tail() const {
    float sum = 0;
    if (row_.has_tail()) {
      row_.each_of_tail([&](int column, float logit) {
        sum += column == row_.label() ? 0.0f : exponential(logit - hard_frame_);
      });
    }
    return sum;
  }
  __device__ void write_tail(float hard_sum) const {
    row_.write_tail(1 / hard_sum, row_.at_label(),
                    [&](float logit) { return exponential(logit - hard_frame_); });
  }

  __device__ float none() const { return row_.teacher_probs() ? 0.0f : -kInf; }

  Row<Exchange>& row_;
  float hard_frame_ = 0;

 private:
  // A function by itself: there is one for all cores.
  static __device__ FASTKD_NOINLINE float threshold(const DenseRows& call, Exchange exchange,
                                                    RowShared& shared) {
    Row<Exchange> row(call, exchange, shared);
    RereadSlice slice(row);
    return kth_largest(exchange, shared.select, row.teacher().dtype, row.keep(), slice.none(),
                       [&](const auto& fn) {
                         slice.each_step([&](int, const float*, const float* teacher) {
                           for (int j = 0; j < kPerLane; ++j) fn(teacher[j]);
                         });
                       });
  }

  float threshold_ = -kInf;
};

}  // namespace fastkd::cuda
