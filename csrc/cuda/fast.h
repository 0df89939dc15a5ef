// The core of rows whose slices fit the registers: every logit is read once, its exponential stays
// where the logit was, one exchange, and the gradient is written from them.
#pragma once
#include "classes.h"

namespace fastkd::cuda {

template <class Exchange, Divergence kDivergence>
class Fast : HeldClasses<Exchange> {
 public:
  __device__ explicit Fast(Row<Exchange>& row) : HeldClasses<Exchange>(row) {}

  // False where the row has to be read again: infinities, sums that cancel, or a gradient that
  // does.
  __device__ bool run() {
    this->load([] {});
    if (own_hard()) sum_hard();
    if (row_.pruned()) this->prune();
    if (row_.teacher_probs()) this->take_logarithms();
    if constexpr (kDivergence == Divergence::kForward) this->set_label_apart();
    if (row_.has_soft()) sum_soft();
    if (row_.power() > 1) sum_powers();
    sums_.label = row_.student_label();
    sums_.label_teacher = row_.teacher_label();
    const Sums& total = row_.total(sums_, [&](Sums& sums) {
      if (kDivergence != Divergence::kMixture && row_.has_soft()) {
        row_.shared.divergence = divergence(sums);
        if (cancels(sums)) row_.shared.divergence.exact = false;
      }
      if (kDivergence == Divergence::kForward && row_.decoupled()) set_target(sums);
    });
    const float label = total.label;
    const Sums sums = total;
    SoftTerm soft{0, 0, 0, true};
    if (row_.has_soft()) {
      if constexpr (kDivergence == Divergence::kMixture) {
        soft.exact = sums.lead > 0 && sums.other > 0 && sums.lead + sums.other < kInf &&
                     !(has_soft_gradient() && is_sure(sums.other, row_.vocab()));
      } else {
        soft = row_.shared.divergence;
      }
      if (!soft.exact) return false;
    }
    float hard = 0;
    if (row_.power() > 0) {
      const float sum = row_.power() > 1 ? sums.hard : kReverse ? sums.lead : sums.other;
      const float offset = kReverse ? sums.lead_offset : sums.other_offset;
      hard = row_.hard_term(sum, offset, student_scale(), label, row_.power());
    } else if (row_.has_hard()) {
      hard = row_.hard_term(sums.hard, sums.hard_offset, kLog2E, label, 1);
    }
    if (row_.wants_gradient() && row_.hard_weight() != 0 && hard < kSureLabel) return false;
    const float lead = scale(sums_.lead_offset, sums.lead_offset, sums.lead);
    const float other = scale(sums_.other_offset, sums.other_offset, sums.other);
    float from_student = 0;
    if (kDivergence == Divergence::kMixture && row_.has_soft()) {
      const MixtureSums mixed = mix(lead, other);
      from_student = mixed.from_student;
      const float beta = row_.beta();
      soft.value = beta * mixed.from_teacher + (1 - beta) * mixed.from_student;
      const float limit = -log1pf(-beta);  // what ln(q / m) is where p is nothing
      const bool apart = (limit - from_student) * 4 < limit;
      const bool near = soft.value < kNear * beta * (1 - beta);
      if (has_soft_gradient() && (apart || near)) return false;
    }
    row_.write_terms(soft.value, hard);
    if (!row_.wants_gradient()) return true;
    if (row_.template is_lost<kDivergence>(soft.value, hard)) {
      row_.fill_gradient(kNaN);
    } else {
      find_factors(sums, soft, lead, other, from_student);
      float per_hard = scale(sums_.hard_offset, sums.hard_offset, sums.hard, row_.power());
      if (kDivergence == Divergence::kMixture && row_.power() > 1) {
        // mix() has left q there: times the sum, it is the exponential at the row's offset.
        from_q_ = sums.other;
        per_hard = 1 / sums.hard;
      }
      write_gradient(per_hard * row_.hard_weight());
      row_.fill_beyond();
    }
    return true;
  }

 private:
  static constexpr bool kReverse = kDivergence == Divergence::kReverse;
  using Base = HeldSlice<Exchange, true>;
  using Base::each, Base::each_in_turn, Base::kVectors, Base::last, Base::maximum, Base::rotate;
  using Base::row_, Base::step, Base::student_, Base::teacher_;

  __device__ bool has_soft_gradient() const {
    return row_.wants_gradient() && row_.soft_weight() != 0;
  }
  // By one thread: what is rounded of p and q would show in their difference.
  __device__ bool cancels(const Sums& sums) const {
    const bool sure =
        is_sure(sums.lead, row_.vocab()) && (kReverse || is_sure(sums.other, row_.vocab()));
    return has_soft_gradient() && (sure || row_.shared.divergence.value < kNear);
  }

  __device__ bool own_hard() const { return row_.has_hard() && row_.power() == 0; }
  __device__ float student_scale() const { return row_.student_inverse() * kLog2E; }
  __device__ float teacher_scale() const { return row_.teacher_inverse() * kLog2E; }

  __device__ __forceinline__ void sum_hard() {
    sums_.hard_offset = maximum(student_) * kLog2E;
    const float offset = used(sums_.hard_offset);
    float sum = 0;
    each([&](int i) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        sum += exp2_approx(fmaf(student_[i][j], kLog2E, -offset));
      }
    });
    sums_.hard = warp_sum(sum);
  }

  __device__ void set_target(const Sums& sums) {
    const float teacher = fmaf(sums.label_teacher, teacher_scale(), -sums.lead_offset) * kLn2;
    const float student = fmaf(sums.label, student_scale(), -sums.other_offset) * kLn2;
    const float teacher_odds = teacher - logf(sums.lead), odds = student - logf(sums.other);
    const float gap = odds - teacher_odds;
    row_.set_target(teacher_odds, odds, gap, sums.label > -kInf);
    const float target = row_.shared.target.divergence;
    // The odds may be of the size of 16, and are rounded there.
    const bool near = fabsf(gap) < 0.25f && row_.wants_gradient() && row_.target_weight() != 0;
    if (target != target || near) row_.shared.divergence.exact = false;
  }

  __device__ static __forceinline__ float used(float offset) { return offset > -kInf ? offset : 0; }

  // Puts the exponentials in the place of the logits. The offsets are the warp's own maxima: no
  // other warp is waited for.
  __device__ __forceinline__ void sum_soft() {
    auto& lead = kReverse ? student_ : teacher_;
    auto& other = kReverse ? teacher_ : student_;
    const float lead_scale = kReverse ? student_scale() : teacher_scale();
    const float other_scale = kReverse ? teacher_scale() : student_scale();
    // The product of maximum and scale, rounded, is itself the offset: every exponential and every
    // sum is relative to the same number.
    sums_.lead_offset = maximum(lead) * lead_scale;
    sums_.other_offset = maximum(other) * other_scale;
    const float lead_offset = used(sums_.lead_offset), other_offset = used(sums_.other_offset);
    float sum_lead = 0, sum_other = 0, difference = 0, excess = 0, cross = 0;
    each([&](int i) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const float u_lead = fmaf(lead[i][j], lead_scale, -lead_offset);
        const float u_other = fmaf(other[i][j], other_scale, -other_offset);
        const float e_lead = exp2_approx(u_lead), e_other = exp2_approx(u_other);
        sum_lead += e_lead;
        sum_other += e_other;
        lead[i][j] = e_lead;
        other[i][j] = e_other;
        if constexpr (kDivergence != Divergence::kMixture) {
          // -inf where the lead is, NaN where both are: such a class adds e_other, or nothing.
          const float x = fmaxf(u_lead - u_other, -kHuge);
          const float d = e_other - e_lead, weighted = e_lead * x;
          // x^2 phi of x = ln 2 times this one, for |x ln 2| < 1/4; relative error 3e-8.
          float phi = fmaf(x, 0.000154292415f, -0.00133582903f);
          phi = fmaf(x, phi, 0.00961811654f);
          phi = fmaf(x, phi, -0.0555040278f);
          phi = fmaf(x, phi, 0.240226507f);
          const float near = weighted * x * phi, far = fmaf(weighted, kLn2, d);
          difference += d;
          cross += weighted;
          excess += fabsf(x) < 0.36f ? near : far;
          if constexpr (kReverse) other[i][j] = weighted;
        }
      }
    });
    sums_.lead = warp_sum(sum_lead);
    sums_.other = warp_sum(sum_other);
    if constexpr (kDivergence != Divergence::kMixture) {
      sums_.difference = warp_sum(difference);
      sums_.excess = warp_sum(excess);
      sums_.cross = warp_sum(cross) * kLn2;
    }
  }

  __device__ static __forceinline__ float raised(float e, int power) {  // to 2, 3 or 4
    const float square = e * e;
    return power == 2 ? square : square * (power == 3 ? e : square);
  }
  // No more exponentials for a hard term beside a soft one at T = 2, 3 or 4: relative to those at
  // T = 1, T times the error of one.
  __device__ __forceinline__ void sum_powers() {
    sums_.hard_offset = kReverse ? sums_.lead_offset : sums_.other_offset;
    const int power = row_.power();
    float sum = 0;
    each([&](int i) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) sum += raised(student_[i][j], power);
    });
    sums_.hard = warp_sum(sum);
  }

  // What turns the exponentials of a warp, or powers of them, into probabilities.
  __device__ static float scale(float offset, float row_offset, float sum, int power = 1) {
    const float down = (offset - row_offset) * static_cast<float>(max(power, 1));
    return offset > -kInf ? exp2_approx(down) / sum : 0.0f;
  }

  // Leaves q where the student was, and q ln(q / m) where the teacher was. With y = (q - p) / m:
  // p/m = 1 - (1 - beta) y, q/m = 1 + beta y, and each divergence is a sum of r ln r - r + 1 over
  // m, without cancellation.
  __device__ __forceinline__ MixtureSums mix(float per_p, float per_q) {
    const float beta = row_.beta();
    float from_teacher = 0, from_student = 0;
    each([&](int i) {
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const float p = __fmul_rn(per_p, teacher_[i][j]), q = __fmul_rn(per_q, student_[i][j]);
        const float m = beta * p + (1 - beta) * q;
        const float per_m = __fdividef(1.0f, fmaxf(m, 0x1p-126f)), y = (q - p) * per_m;
        const LogTerms log_q = log_terms(beta * y, q * per_m);
        from_teacher += m * log_terms((beta - 1) * y, p * per_m).excess;
        from_student += m * log_q.excess;
        student_[i][j] = q;
        teacher_[i][j] = q * log_q.log;
      }
    });
    return row_.total_of(MixtureSums{warp_sum(from_teacher), warp_sum(from_student)});
  }

  // The gradient of a class is student a + teacher b, of what was saved of the class: forward q -
  // p; reverse q (ln(q/p) - D); mixture (1 - beta) q (ln(q/m) - KL(q || m)). All times the weight,
  // and the hard weight times q besides.
  __device__ __forceinline__ void find_factors(const Sums& sums, const SoftTerm& soft, float lead,
                                               float other, float from_student) {
    const float weight = row_.soft_weight() * row_.student_inverse();
    const float hard = row_.power() == 1                     ? row_.hard_weight()
                       : kDivergence == Divergence::kForward ? row_.target_factor()
                                                             : 0.0f;
    const bool off = row_.soft_weight() == 0;
    if constexpr (kDivergence == Divergence::kForward) {
      // q / p - 1 at this warp's offsets: small where the two sides agree.
      const float D = ((sums.other_offset - used(sums_.other_offset)) -
                       (sums.lead_offset - used(sums_.lead_offset))) *
                      kLn2;
      float gap = other - lead;
      if (fabsf(D) < 0.25f && fabsf(soft.ratio) < 0.5f && lead > 0 && other > 0) {
        gap = lead * (D * D * phi_series(D) - D - soft.ratio) / (1 + soft.ratio);
        other = lead + gap;
      }
      const float scaled = off ? 0 : weight;
      forward_ = Combination(other * (scaled + hard), lead * scaled, gap * scaled + other * hard);
    } else if constexpr (kDivergence == Divergence::kReverse) {
      const float shift = (used(sums_.lead_offset) - sums.lead_offset) -
                          (used(sums_.other_offset) - sums.other_offset);
      const float scaled = off ? 0 : weight * lead;
      a_ = scaled * (fmaf(shift, kLn2, soft.log_ratio) - soft.value) + hard * lead;
      b_ = scaled * kLn2;
    } else {
      const float scaled = off ? 0 : (1 - row_.beta()) * weight;
      a_ = hard - scaled * from_student;
      b_ = scaled;
    }
  }

  // The gradient of the soft term, and of a hard term that shares its exponentials.
  __device__ __forceinline__ void find_gradient(const float* student, const float* teacher,
                                                float hard, float* gradient) const {
    if (!row_.has_soft()) return;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if constexpr (kDivergence == Divergence::kForward) {
        gradient[j] = forward_(student[j] - teacher[j], student[j], teacher[j]);
      } else {
        gradient[j] = fmaf(student[j], a_, teacher[j] * b_);
      }
    }
    const int power = row_.power();
    if (power < 2 || row_.hard_weight() == 0) return;
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const float e = kDivergence == Divergence::kMixture ? student[j] * from_q_ : student[j];
      gradient[j] = fmaf(raised(e, power), hard, gradient[j]);
    }
  }
  // Adds that of a hard term with exponentials of its own. Their logits are in L2 since a moment
  // ago; no other thread has written over them.
  __device__ __forceinline__ void add_hard(int step, float hard, float* gradient) const {
    float logits[kPerLane];
    unpack(row_.student().dtype, load_packed(row_.student(), step), logits);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      const float e = exp2_approx(fmaf(logits[j], kLog2E, -used(sums_.hard_offset)));
      gradient[j] = fmaf(e, hard, gradient[j]);
    }
  }

  __device__ __forceinline__ void write_gradient(float hard) {
    const auto pack_gradient = [&](int step, const float* student, const float* teacher) {
      float gradient[kPerLane] = {};
      find_gradient(student, teacher, hard, gradient);
      row_.add_label(step, gradient);
      return pack(row_.dstudent().dtype, gradient);
    };
    const bool reads_again = own_hard() && row_.hard_weight() != 0;
    const int first = step(0), end = row_.end();
    if (!reads_again) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        const int step = first + i * warps();
        const View dstudent = row_.dstudent();
        if (step >= end || is_ragged(dstudent, step)) continue;
        store_whole(dstudent, step, pack_gradient(step, student_[i], teacher_[i]));
      }
      if (!is_ragged(row_.dstudent(), last())) return;
    }
    each_in_turn(
        [&](int i) {
          const View dstudent = row_.dstudent();
          if (!reads_again && !is_ragged(dstudent, step(i))) return;
          float gradient[kPerLane] = {};
          find_gradient(student_[0], teacher_[0], hard, gradient);
          if (reads_again) add_hard(step(i), hard, gradient);
          row_.add_label(step(i), gradient);
          store_packed(dstudent, step(i), pack(dstudent.dtype, gradient));
        },
        [&] {
          rotate(student_);
          rotate(teacher_);
        });
  }

  static constexpr float kHuge = 3e38f;
  static constexpr float kSureLabel = 0.28f;  // a hard term below: q > 3/4 at the label

  Sums sums_;  // this warp's
  Combination forward_;
  float a_ = 0, b_ = 0;
  float from_q_ = 0;
};

}  // namespace fastkd::cuda
