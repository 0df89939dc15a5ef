// The core of every row: slices of any length, read again for each step, and exact for infinities
// and for sums that cancel. It serves the rows that registers.h passes over.
#pragma once
#include "reread_slice.h"

namespace fastkd::cuda {

template <class Exchange, Mode kMode>
class Reread : RereadSlice<Exchange> {
 public:
  __device__ explicit Reread(Row<Exchange>& row)
      : RereadSlice<Exchange>(row),
        student_inverse_(row.student_inverse()),
        teacher_inverse_(row.teacher_inverse()),
        beta_(row.beta()) {}

  __device__ void run() {
    this->prune();
    find_maxima();
    Divergence soft{0, 0, 0, true};
    Sums sums = sum(soft);
    if (row_.has_soft() && kMode != Mode::kMixture && !soft.exact && sums.lead > 0 &&
        sums.other > 0 && soft.log_ratio < kInf && soft.log_ratio > -kInf) {
      // Once more, with the two sides alike: nothing of what is summed then cancels.
      other_frame() += soft.log_ratio;
      sums = sum(soft);
    }
    const float student_sum = kReverse ? sums.lead : sums.other;
    const float teacher_sum = kReverse ? sums.other : sums.lead;
    const bool mass = sums.lead > 0 && sums.other > 0;  // and no NaN
    per_q_ = 1 / student_sum;
    per_p_ = 1 / teacher_sum;
    // Without the label a side may have no class that has mass: nothing to match, or no way to.
    const bool empty = row_.decoupled() && (sums.lead == 0 || sums.other == 0);
    if (empty) {
      if (student_sum == 0) per_q_ = 0;
      if (teacher_sum == 0) per_p_ = 0;
    }
    float value = soft.value, from_student = 0;
    if (!row_.has_soft()) {
      value = 0;
    } else if (row_.decoupled() && is_nan(row_.shared.target.divergence)) {
      value = kNaN;
    } else if (empty && !is_nan(sums.lead) && !is_nan(sums.other)) {
      value = sums.lead == 0 ? 0 : kInf;
    } else if (!mass) {
      value = kNaN;
    } else if (kMode == Mode::kMixture) {
      const Sums mixed = mix();
      from_student = mixed.other;
      value = beta_ * mixed.lead + (1 - beta_) * mixed.other;
    } else if (sums.forbidden > 0) {
      value = kInf;
    }
    float hard = 0;
    if (row_.has_hard()) {
      // The frame of the shared exponentials is in natural units, and T is 1.
      const float sum = shares() ? student_sum : sums.hard;
      const float frame = shares() ? student_frame_ : hard_frame_;
      hard = sum > 0 ? logf(sum) + (frame - sums.label) : kNaN;
    }
    if (is_nan(value) && threadIdx.x == 0) row_.shared.target.divergence = kNaN;
    row_.write_terms(value, hard);
    if (!row_.wants_gradient()) return;
    if (row_.template is_lost<kMode>(value, hard)) {
      row_.fill_slice(kNaN);
    } else {
      write_gradient(soft, empty, from_student, row_.hard_weight() / sums.hard);
    }
    this->write_tail(sums.hard);
  }

 private:
  static constexpr bool kReverse = kMode == Mode::kReverse;
  using Base = RereadSlice<Exchange>;
  using Base::each_step, Base::exponential, Base::hard_frame_, Base::row_, Base::take_part;

  __device__ bool shares() const { return row_.power() == 1; }
  __device__ bool own_hard() const { return row_.has_hard() && !shares(); }
  __device__ float& other_frame() { return kReverse ? teacher_frame_ : student_frame_; }

  __device__ static bool is_nan(float x) { return x != x; }

  template <class Fn>
  __device__ void each_pruned(const Fn& fn) {
    each_step([&](int step, float* student, float* teacher) {
      if (row_.has_soft()) take_part(step, student, teacher);
      fn(step, student, teacher);
    });
  }

  // Of the logits as they are stored, then times 1 / T: what all exponentials are relative to.
  __device__ void find_maxima() {
    float student_max = -kInf, teacher_max = -kInf, hard_max = -kInf;
    bool nan = false;
    each_step([&](int step, float* student, float* teacher) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        hard_max = fmaxf(hard_max, student[j]);
        nan |= this->loses_nan(student[j], teacher[j]);
      }
      if (!row_.has_soft()) return;
      take_part(step, student, teacher);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        student_max = fmaxf(student_max, student[j]);
        teacher_max = fmaxf(teacher_max, teacher[j]);
      }
    });
    if (nan) poison_ = kNaN;
    this->find_maximum_of_tail(hard_max);
    Sums sums;
    sums.lead_frame = warp_max(student_max);
    sums.other_frame = warp_max(teacher_max);
    sums.hard_frame = warp_max(hard_max);
    const Sums& total = row_.total(sums, [](Sums&) {});
    const auto frame = [](float max, float inverse) { return max > -kInf ? max * inverse : 0.0f; };
    student_frame_ = frame(total.lead_frame, student_inverse_);
    teacher_frame_ = frame(total.other_frame, teacher_inverse_);
    hard_frame_ = frame(total.hard_frame, 1);
    __syncthreads();  // before the next sums come into the same place
  }

  // The expectation is over a class that the other side excludes.
  __device__ static bool is_forbidden(float student, float teacher) {
    return kReverse ? teacher == -kInf && student > -kInf : student == -kInf && teacher > -kInf;
  }
  __device__ Pair pair(float student, float teacher) const {
    const float l = kReverse ? student : teacher, o = kReverse ? teacher : student;
    const float lead_frame = kReverse ? student_frame_ : teacher_frame_;
    const float other_frame = kReverse ? teacher_frame_ : student_frame_;
    const float lead_inverse = kReverse ? student_inverse_ : teacher_inverse_;
    const float other_inverse = kReverse ? teacher_inverse_ : student_inverse_;
    const float y_lead = fmaf(l, lead_inverse, -lead_frame);
    const float y_other = fmaf(o, other_inverse, -other_frame);
    // From the difference of the logits, which is exact where they nearly agree, unless that of
    // the frames would cost more.
    const bool direct = lead_inverse == other_inverse && fabsf(lead_frame - other_frame) < 8;
    const float difference =
        direct ? fmaf(l - o, lead_inverse, other_frame - lead_frame) : y_lead - y_other;
    return pair_of(exponential(y_lead), exponential(y_other), difference);
  }

  __device__ Sums sum(Divergence& soft) {
    Sums sums;
    sums.lead_frame = sums.other_frame = sums.hard_frame = 0;  // the same in every CTA
    sums.lead = poison_;
    each_step([&](int step, float* student, float* teacher) {
      if (own_hard()) sums.hard += this->sum_hard(student);
      if (!row_.has_soft()) return;
      take_part(step, student, teacher);
      Sums few;  // 8 at a time: the sums of a long slice would swallow single ones
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const Pair p = pair(student[j], teacher[j]);
        add(few, p);
        few.forbidden += is_forbidden(student[j], teacher[j]) ? 1.0f : 0.0f;
      }
      sums.lead += few.lead;
      sums.other += few.other;
      sums.difference += few.difference;
      sums.excess += few.excess;
      sums.cross += few.cross;
      sums.forbidden += few.forbidden;
    });
    sums.hard += this->sum_tail();
    sum_over_warp(sums);
    sums.label = row_.student_label();
    sums.label_teacher = row_.teacher_label();
    const Sums total = row_.total(sums, [&](Sums& sums) {
      row_.shared.divergence = divergence(sums);
      if (kMode == Mode::kForward && row_.decoupled()) set_target(sums);
    });
    soft = row_.shared.divergence;
    __syncthreads();
    return total;
  }

  // ln 0 is -inf: all the odds are on the label where nothing is left of a side.
  __device__ void set_target(const Sums& sums) {
    row_.set_target(fmaf(sums.label_teacher, teacher_inverse_, -teacher_frame_) - logf(sums.lead),
                    fmaf(sums.label, student_inverse_, -student_frame_) - logf(sums.other),
                    sums.label > -kInf);
  }

  struct Mixed {
    float q, log_q, from_teacher, from_student;  // log_q: ln(q / m)
  };
  __device__ Mixed mixed(float student, float teacher) const {
    const float q =
        __fmul_rn(per_q_, exponential(fmaf(student, student_inverse_, -student_frame_)));
    const float p =
        __fmul_rn(per_p_, exponential(fmaf(teacher, teacher_inverse_, -teacher_frame_)));
    const float m = beta_ * p + (1 - beta_) * q;
    const float y = __fdividef(q - p, fmaxf(m, 0x1p-126f));
    const LogTerms from_q = log_terms(beta_ * y);
    return {q, from_q.log, m * log_terms((beta_ - 1) * y).excess, m * from_q.excess};
  }

  __device__ Sums mix() {
    Sums sums;
    sums.lead_frame = sums.other_frame = 0;
    each_pruned([&](int, float* student, float* teacher) {
      float from_teacher = 0, from_student = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const Mixed m = mixed(student[j], teacher[j]);
        from_teacher += m.from_teacher;
        from_student += m.from_student;
      }
      sums.lead += from_teacher;
      sums.other += from_student;
    });
    sums.lead = warp_sum(sums.lead);
    sums.other = warp_sum(sums.other);
    return row_.total(sums, [](Sums&) {});
  }

  __device__ void write_gradient(const Divergence& soft, bool empty, float from_student,
                                 float hard) {
    const float weight = empty ? 0 : row_.soft_weight() * student_inverse_;
    const float of_q = shares() ? row_.hard_weight() : row_.target_factor();  // besides
    const bool alike = fabsf(soft.ratio) < 0.5f;
    const Combination forward(per_q_, per_p_,
                              alike ? -per_p_ * soft.ratio / (1 + soft.ratio) : per_q_ - per_p_);
    each_step([&](int step, float* student, float* teacher) {
      float gradient[kPerLane] = {};
      if (own_hard() && row_.hard_weight() != 0) this->add_hard(student, hard, gradient);
      if (weight != 0 || of_q != 0) {
        take_part(step, student, teacher);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          float q = 0, of_soft = 0;
          if constexpr (kMode == Mode::kMixture) {
            const Mixed m = mixed(student[j], teacher[j]);
            q = m.q;
            of_soft = (1 - beta_) * q * (m.log_q - from_student);
          } else {
            const Pair e = pair(student[j], teacher[j]);
            q = __fmul_rn(kReverse ? e.lead : e.other, per_q_);
            // Where the student is at -inf nothing can change: 0, whatever p is there.
            const float difference =
                student[j] > -kInf ? forward(e.difference, e.other, e.lead) : 0;
            of_soft = kReverse ? q * (e.x + soft.log_ratio - soft.value) : difference;
          }
          if (weight != 0) gradient[j] = fmaf(of_soft, weight, gradient[j]);
          if (of_q != 0) gradient[j] = fmaf(q, of_q, gradient[j]);
        }
      }
      row_.add_label(step, gradient);
      store_packed(row_.dstudent(), step, pack(row_.dstudent().dtype, gradient));
    });
  }

  const float student_inverse_, teacher_inverse_, beta_;
  float student_frame_ = 0, teacher_frame_ = 0;  // in units of the logits times 1/T, as hard_frame_
  float poison_ = 0;                             // NaN where a logit is, with pruning
  float per_p_ = 0, per_q_ = 0;
};

}  // namespace fastkd::cuda
