// The core of rows at T = infinity, where the soft term is half the variance of z - v over the
// classes. They are rare: their slices are read three times, whatever their length.
#pragma once
#include "reread_slice.h"

namespace fastkd::cuda {

template <class Exchange>
class LogitMatch : RereadSlice<Exchange> {
 public:
  __device__ explicit LogitMatch(Row<Exchange>& row)
      : RereadSlice<Exchange>(row), unit_(row.teacher_probs() ? kLn2 : 1.0f) {}

  __device__ void run() {
    this->prune();
    const Sums first = sum_differences();
    const float count = first.other;
    mean_ = first.lead / count;  // NaN without a class
    hard_frame_ = first.hard_frame > -kInf ? first.hard_frame : 0;
    const Sums second = sum_centred();
    rest_ = second.lead / count;
    float soft = second.other / count - rest_ * rest_;
    if (!is_nan(soft)) soft = curvature() * fmaxf(soft, 0.0f) / 2;
    // A class has a logit on one side only.
    if (first.forbidden > 0) soft = is_nan(first.lead) ? kNaN : kInf;
    float hard = 0;
    if (row_.has_hard()) {
      hard = second.hard > 0 ? logf(second.hard) + (hard_frame_ - second.label) : kNaN;
    }
    row_.write_terms(soft, hard);
    if (!row_.wants_gradient()) return;
    if (row_.template is_lost<Mode::kReverse>(soft, hard)) {  // an infinite value leaves none
      row_.fill_gradient(kNaN);
    } else {
      write_gradient(row_.soft_weight() * curvature() / count, row_.hard_weight() / second.hard);
      row_.fill_beyond();
    }
  }

 private:
  using Base = RereadSlice<Exchange>;
  using Base::each_step, Base::hard_frame_, Base::row_, Base::take_part;

  __device__ static bool is_nan(float x) { return x != x; }

  // Of the divergence at equal logits, beside that of KL.
  __device__ float curvature() const {
    const double beta = row_.call.beta;
    return beta == 0 || beta == 1 ? 1 : static_cast<float>(beta * (1 - beta));
  }

  __device__ static bool is_there(float student, float teacher) {
    return student != -kInf || teacher != -kInf;
  }
  __device__ float difference(float student, float teacher) const {
    return fmaf(teacher, -unit_, student);
  }
  __device__ float centred(float student, float teacher) const {
    return is_there(student, teacher) ? difference(student, teacher) - mean_ : 0;
  }

  // The sum of z - v as `lead`, the classes as `other`, and those with one logit as `forbidden`.
  __device__ Sums sum_differences() {
    float hard_max = -kInf, sum = 0, count = 0, one_sided = 0;
    each_step([&](int step, float* student, float* teacher) {
      float few = 0;  // 8 at a time: the sum of a long slice would swallow single ones
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        hard_max = fmaxf(hard_max, student[j]);
        if (this->loses_nan(student[j], teacher[j])) few = kNaN;
      }
      take_part(step, student, teacher);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const float z = student[j], v = teacher[j];
        if (!is_there(z, v)) continue;
        const bool one = z == -kInf || v == -kInf;
        ++count;
        if (one) ++one_sided;
        few += z < kInf && v < kInf ? (one ? 0.0f : difference(z, v)) : kNaN;
      }
      sum += few;
    });
    Sums sums;
    sums.lead_frame = sums.other_frame = 0;  // the same in every CTA
    sums.hard_frame = warp_max(hard_max);
    sums.lead = warp_sum(sum);
    sums.other = warp_sum(count);
    sums.forbidden = warp_sum(one_sided);
    return row_.total(sums, [](Sums&) {});
  }

  // What is left of each difference without the mean, and its square: their sums as `lead` and
  // `other`. The first is what the mean is off by.
  __device__ Sums sum_centred() {
    float sum = 0, squares = 0, hard = 0;
    each_step([&](int step, float* student, float* teacher) {
      if (row_.has_hard()) hard += this->sum_hard(student);
      take_part(step, student, teacher);
      float few = 0, few_squares = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const float d = centred(student[j], teacher[j]);
        few += d;
        few_squares = fmaf(d, d, few_squares);
      }
      sum += few;
      squares += few_squares;
    });
    Sums sums;
    sums.lead_frame = sums.other_frame = sums.hard_frame = 0;
    sums.lead = warp_sum(sum);
    sums.other = warp_sum(squares);
    sums.hard = warp_sum(hard);
    sums.label = row_.student_label();
    return row_.total(sums, [](Sums&) {});
  }

  __device__ void write_gradient(float weight, float hard) {
    each_step([&](int step, float* student, float* teacher) {
      float gradient[kPerLane] = {};
      if (row_.hard_weight() != 0) this->add_hard(student, hard, gradient);
      if (row_.soft_weight() != 0) {
        take_part(step, student, teacher);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          if (!is_there(student[j], teacher[j])) continue;
          gradient[j] = fmaf(centred(student[j], teacher[j]) - rest_, weight, gradient[j]);
        }
      }
      row_.add_label(step, gradient);
      store_packed(row_.dstudent(), step, pack(row_.dstudent().dtype, gradient));
    });
  }

  const float unit_;  // of the teacher's logits
  float mean_ = 0, rest_ = 0;
};

}  // namespace fastkd::cuda
