// The core of every row: slices of any length, read again for each step, and exact for infinities
// and for sums that cancel. It serves the rows that fast.h passes over.
#pragma once
#include "classes.h"
#include "tail.h"

namespace fastkd::cuda {

// The hard term with exponentials of its own, less the row's maximum.
template <class Exchange>
class HardTerm : protected StoredClasses<Exchange> {
 protected:
  using Base = StoredClasses<Exchange>;
  using Base::row_;

  __device__ explicit HardTerm(Row<Exchange>& row) : Base(row) {}

  __device__ static float exponential(float y) { return exp2_approx(y * kLog2E); }

  // All classes but the label, whose gradient is minus the sum of theirs: softmax less 1 would lose
  // what is small beside 1.
  __device__ float sum_hard(int step, const float* student) const {
    const int label = label_index(step);
    float sum = 0;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      sum += j == label ? 0.0f : exponential(student[j] - hard_offset_);
    }
    return sum;
  }
  // The sum with the label, from that of all classes besides.
  __device__ float hard_sum(float besides, float label) const {
    return besides + exponential(label - hard_offset_);
  }
  __device__ void add_hard(int step, const float* student, float factor, float* gradient) const {
    const int label = label_index(step);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const float e = j == label ? 0.0f : exponential(student[j] - hard_offset_);
      gradient[j] = fmaf(e, factor, gradient[j]);
    }
  }
  __device__ int label_index(int step) const {
    return row_.label() / kStep == step ? row_.student().index(step, row_.label()) : -1;
  }

  // The same three over the tail.
  __device__ void find_maximum_of_tail(float& max) const {
    if (row_.has_tail()) each_of_tail(row_, [&](int, float logit) { max = fmaxf(max, logit); });
  }
  __device__ float sum_tail() const {
    float sum = 0;
    if (row_.has_tail()) {
      each_of_tail(row_, [&](int column, float logit) {
        sum += column == row_.label() ? 0.0f : exponential(logit - hard_offset_);
      });
    }
    return sum;
  }
  __device__ void write_tail(float hard_sum) const {
    cuda::write_tail(row_, 1 / hard_sum, row_.at_label(),
                     [&](float logit) { return exponential(logit - hard_offset_); });
  }

  float hard_offset_ = 0;
};

template <class Exchange, Divergence kDivergence>
class Careful : HardTerm<Exchange> {
 public:
  __device__ explicit Careful(Row<Exchange>& row)
      : HardTerm<Exchange>(row),
        student_inverse_(row.student_inverse()),
        teacher_inverse_(row.teacher_inverse()),
        beta_(row.beta()) {}

  __device__ void run() {
    this->prune();
    find_maxima();
    SoftTerm soft{0, 0, 0, true};
    Sums sums = sum(soft);
    if (row_.has_soft() && sums.lead > 0 && sums.other > 0 && soft.log_ratio < kInf &&
        soft.log_ratio > -kInf && place_offsets(sums, soft)) {
      sums = sum(soft);
    }
    const float teacher_sum = kStudentLeads ? sums.other : sums.lead;
    const bool mass = sums.lead > 0 && sums.other > 0;  // and no NaN
    per_lead_ = 1 / sums.lead;
    per_other_ = 1 / sums.other;
    mean_ = sums.cross / sums.lead;
    // Without the label a side may have no class that has mass: nothing to match, or no way to.
    const bool empty = row_.decoupled() && (sums.lead == 0 || sums.other == 0);
    if (empty) {
      if (sums.lead == 0) per_lead_ = 0;
      if (sums.other == 0) per_other_ = 0;
    }
    const bool alike = fabsf(soft.ratio) < 0.5f;
    difference_ =
        Combination(per_other_, per_lead_,
                    alike ? -per_lead_ * soft.ratio / (1 + soft.ratio) : per_other_ - per_lead_);
    float value = soft.value;
    if (!row_.has_soft()) {
      value = 0;
    } else if (row_.decoupled() && is_nan(row_.shared.target.divergence)) {
      value = kNaN;
    } else if (empty && !is_nan(sums.lead) && !is_nan(sums.other)) {
      value = teacher_sum == 0 ? 0 : kInf;
    } else if (!mass) {
      value = kNaN;
    } else if (kDivergence == Divergence::kMixture) {
      const float odds = beta_ * (sums.lead / sums.other);
      share_of_p_ = odds < kInf ? odds / (odds + (1 - beta_)) : 1;
      share_of_q_ = (1 - beta_) / (odds + (1 - beta_));
      const MixtureSums mixed = mix();
      mean_ = mixed.log_q;
      value = beta_ * mixed.from_teacher + (1 - beta_) * mixed.from_student;
    } else if (sums.forbidden > 0) {
      value = kInf;
    }
    float hard = 0;
    if (row_.has_hard()) {
      const float sum = this->hard_sum(sums.hard, sums.label);
      hard = sum > 0 ? logf(sum) + (hard_offset_ - sums.label) : kNaN;
    }
    if (is_nan(value) && threadIdx.x == 0) row_.shared.target.divergence = kNaN;
    row_.write_terms(value, hard);
    if (!row_.wants_gradient()) return;
    if (row_.template is_lost<kDivergence>(value, hard)) {
      row_.fill_slice(kNaN);
    } else {
      write_gradient(empty, row_.hard_weight() / this->hard_sum(sums.hard, sums.label));
    }
    this->write_tail(this->hard_sum(sums.hard, sums.label));
  }

 private:
  static constexpr bool kReverse = kDivergence == Divergence::kReverse;
  static constexpr bool kStudentLeads = kDivergence != Divergence::kForward;
  using Base = HardTerm<Exchange>;
  using Base::each_step, Base::exponential, Base::hard_offset_, Base::row_, Base::only_kept;

  __device__ float lead_inverse() const {
    return kStudentLeads ? student_inverse_ : teacher_inverse_;
  }
  __device__ float other_inverse() const {
    return kStudentLeads ? teacher_inverse_ : student_inverse_;
  }

  __device__ static bool is_nan(float x) { return x != x; }

  template <class Fn>
  __device__ void each_pruned(const Fn& fn) {
    each_step([&](int step, float* student, float* teacher) {
      if (row_.has_soft()) only_kept(step, student, teacher);
      fn(step, student, teacher);
    });
  }

  struct Maxima {
    float lead, other = -kInf, hard = -kInf;

    __device__ Sums packed() const {
      Sums sums;
      sums.lead_offset = lead;
      sums.other_offset = other;
      sums.hard_offset = hard;
      return sums;
    }
    __device__ static Maxima of(const Sums& sums) {
      return {sums.lead_offset, sums.other_offset, sums.hard_offset};
    }
  };
  // In the logits as they are stored, what all exponentials are relative to; and what the other
  // side has where the lead has its maximum.
  __device__ void find_maxima() {
    float lead_max = -kInf, other_max = -kInf, hard_max = -kInf, beside = -kInf;
    bool nan = false;
    each_step([&](int step, float* student, float* teacher) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        hard_max = fmaxf(hard_max, student[j]);
        nan |= this->loses_nan(student[j], teacher[j]);
      }
      if (!row_.has_soft()) return;
      only_kept(step, student, teacher);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const float lead = kStudentLeads ? student[j] : teacher[j];
        const float other = kStudentLeads ? teacher[j] : student[j];
        beside = lead > lead_max ? other : beside;
        lead_max = fmaxf(lead_max, lead);
        other_max = fmaxf(other_max, other);
      }
    });
    if (nan) lost_ = kNaN;
    this->find_maximum_of_tail(hard_max);
    const Maxima total =
        row_.total_of(Maxima{warp_max(lead_max), warp_max(other_max), warp_max(hard_max)});
    const auto offset = [](float max) { return max > -kInf ? max : 0.0f; };
    lead_offset_ = offset(total.lead);
    other_offset_ = offset(total.other);
    hard_offset_ = offset(total.hard);
    __syncthreads();  // before the next sums come into the same place
    beside_ = row_.total_of(Maxima{warp_max(lead_max == lead_offset_ ? beside : -kInf)}).lead;
    __syncthreads();
  }

  // Whether the sums, whose offsets are the maxima, are to be had once more: with such offsets that
  // nothing of what is summed cancels, nor of the gradient.
  __device__ bool place_offsets(const Sums& sums, const SoftTerm& soft) {
    const float least = 1 / (1 + sure_besides(row_.vocab()));
    const float beside = (beside_ - other_offset_) * other_inverse();
    const float share = exponential(beside) / sums.other;  // that class's, of the other side
    const bool sure = 1 / sums.lead > least && (kStudentLeads || share > least);
    const bool wanted =
        sure || kDivergence == Divergence::kMixture || !soft.exact || soft.value < kNear;
    if (!wanted && !row_.decoupled()) return false;
    constexpr float kLowest = -60.0f;  // so that no exponential overflows
    if (sure && beside > kLowest) {
      other_offset_ = beside_;  // that class's own logit: its x is 0 then
    } else if (kStudentLeads) {
      // As much as ln(q / p) is in the mean.
      shift_ = fmaxf(-sums.cross / sums.lead, fminf(soft.log_ratio, 0.0f) + kLowest);
    } else {
      shift_ = soft.log_ratio;  // the two sides alike
    }
    return true;
  }

  // The expectation is over a class that the other side excludes.
  __device__ static bool is_forbidden(float student, float teacher) {
    return kReverse ? teacher == -kInf && student > -kInf : student == -kInf && teacher > -kInf;
  }
  // ln(e_lead / e_other), from the difference of the logits, which is exact where they nearly
  // agree, unless the difference of the offsets would cost more.
  __device__ float log_ratio(float lead, float other, float y_lead, float y_other) const {
    const float apart = lead_offset_ - other_offset_;
    const bool direct = lead_inverse() == other_inverse() && fabsf(apart) * lead_inverse() < 8;
    return direct ? fmaf(lead - other - apart, lead_inverse(), shift_) : y_lead - y_other;
  }
  __device__ float lead_exponent(float logit) const {
    return (logit - lead_offset_) * lead_inverse();
  }
  __device__ float other_exponent(float logit) const {
    return fmaf(logit - other_offset_, other_inverse(), -shift_);
  }
  __device__ Pair pair(float student, float teacher) const {
    const float l = kStudentLeads ? student : teacher, o = kStudentLeads ? teacher : student;
    const float y_lead = lead_exponent(l), y_other = other_exponent(o);
    return pair_of(exponential(y_lead), exponential(y_other), log_ratio(l, o, y_lead, y_other));
  }

  __device__ Sums sum(SoftTerm& soft) {
    Sums sums;
    sums.lead_offset = sums.other_offset = sums.hard_offset = 0;  // the same in every CTA
    sums.lead = lost_;
    each_step([&](int step, float* student, float* teacher) {
      if (row_.has_hard()) sums.hard += this->sum_hard(step, student);
      if (!row_.has_soft()) return;
      only_kept(step, student, teacher);
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
      if (kDivergence == Divergence::kForward && row_.decoupled()) set_target(sums);
      if (row_.has_hard())
        row_.set_hard_at_label(sums.hard / this->hard_sum(sums.hard, sums.label));
    });
    soft = row_.shared.divergence;
    __syncthreads();
    return total;
  }

  // ln 0 is -inf: all the odds are on the label where nothing is left of a side.
  __device__ void set_target(const Sums& sums) {
    const float teacher = lead_exponent(sums.label_teacher), student = other_exponent(sums.label);
    const float gap = -log_ratio(sums.label_teacher, sums.label, teacher, student) -
                      row_.shared.divergence.log_ratio;
    row_.set_target(teacher - logf(sums.lead), student - logf(sums.other), gap, sums.label > -kInf);
  }

  // q, and ln(q / m) less that of a class with logits at the offsets: nothing cancels where most of
  // q is there, nor where ln(q / m) is all but its limit -ln(1 - beta).
  struct Mixed {
    float q, log_q, from_teacher, from_student;
  };
  __device__ Mixed mixed(float student, float teacher) const {
    const Pair e = pair(student, teacher);
    const float q = __fmul_rn(e.lead, per_lead_), p = __fmul_rn(e.other, per_other_);
    const float m = beta_ * p + (1 - beta_) * q;
    const float per_m = 1 / fmaxf(m, 0x1p-126f);
    const float y = -difference_(e.difference, e.other, e.lead) * per_m;
    const float x = fminf(fmaxf(e.x, -80.0f), 200.0f);
    const LogTerms log_q =
        log_terms(share_of_p_ * expm1f(-x), fmaf(share_of_p_, expf(-x), share_of_q_));
    return {q, -log_q.log, m * log_terms((beta_ - 1) * y, p * per_m).excess,
            m * log_terms(beta_ * y, q * per_m).excess};
  }

  __device__ MixtureSums mix() {
    MixtureSums sums{0, 0};
    each_pruned([&](int, float* student, float* teacher) {
      float from_teacher = 0, from_student = 0, log_q = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const Mixed m = mixed(student[j], teacher[j]);
        from_teacher += m.from_teacher;
        from_student += m.from_student;
        log_q = fmaf(m.q, m.log_q, log_q);
      }
      sums.from_teacher += from_teacher;
      sums.from_student += from_student;
      sums.log_q += log_q;
    });
    return row_.total_of(MixtureSums{warp_sum(sums.from_teacher), warp_sum(sums.from_student),
                                     warp_sum(sums.log_q)});
  }

  __device__ void write_gradient(bool empty, float hard) {
    // Without a weight not even of a temperature that is NaN anything is left.
    const bool none = empty || row_.soft_weight() == 0;
    const float weight = none ? 0 : row_.soft_weight() * student_inverse_;
    const float of_q = row_.target_factor();  // besides
    each_step([&](int step, float* student, float* teacher) {
      float gradient[kPerLane] = {};
      if (row_.hard_weight() != 0) this->add_hard(step, student, hard, gradient);
      if (weight != 0 || of_q != 0) {
        only_kept(step, student, teacher);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          float q = 0, of_soft = 0;
          if constexpr (kDivergence == Divergence::kMixture) {
            const Mixed m = mixed(student[j], teacher[j]);
            of_soft = (1 - beta_) * m.q * (m.log_q - mean_);
          } else {
            const Pair e = pair(student[j], teacher[j]);
            q = __fmul_rn(kReverse ? e.lead : e.other, kReverse ? per_lead_ : per_other_);
            // Where the student is at -inf nothing can change: 0, whatever p is there.
            const float difference =
                student[j] > -kInf ? difference_(e.difference, e.other, e.lead) : 0;
            of_soft = kReverse ? q * (e.x - mean_) : difference;
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
  // In the logits as they are stored; the other side's exponents are lower by shift_ besides.
  float lead_offset_ = 0, other_offset_ = 0, shift_ = 0;
  float beside_ = 0;  // the other side's logit where the lead's is the largest
  float lost_ = 0;    // NaN where a pruned row has one: it is added to the sums
  float per_lead_ = 0, per_other_ = 0;
  Combination difference_;                 // other - lead, as probabilities
  float mean_ = 0;                         // the mean under q of x, or of the mixture's log_q
  float share_of_p_ = 0, share_of_q_ = 0;  // in m, of a class whose logits are the offsets
};

}  // namespace fastkd::cuda
