// One row of the loss against a teacher of few classes: a sum of exponentials over the student's
// row, which is read once where its slices fit the registers, sums over the classes that the
// teacher names, each by the CTA that has its column, and the gradient. Formulas: fastkd/spec.py.
#pragma once
#include "held.h"
#include "kernels.h"
#include "tail.h"

namespace fastkd::cuda {

// kHeld: in registers; else the slice is read again for each step.
template <class Exchange, bool kHeld>
class SparseRow : HeldSlice<Exchange, false> {
 public:
  __device__ SparseRow(Row<Exchange>& row, const SparseTeacher& teacher)
      : HeldSlice<Exchange, false>(row),
        teacher_(teacher),
        shared_(row.shared.sparse),
        named_(row.shared.select.histogram),
        ids_(teacher.ids + row.exchange.row() * teacher.k),
        log_probs_(static_cast<const float*>(teacher.log_probs) + row.exchange.row() * teacher.k),
        bucket_(row.has_soft() && teacher.log_rest != nullptr),
        whole_(row.has_soft() && !bucket_ && !teacher.restricted) {}

  __device__ void run() {
    if constexpr (kHeld) {
      this->load([&] {
        if (row_.has_soft()) mark(row_.begin(), row_.end());
      });
    }
    Sums sums;
    sum_classes(sums);
    if (row_.has_soft()) sum_named(sums);
    sums.label = row_.student_label();
    const Sums total = row_.total(sums, [&](Sums& sums) {
      if (row_.has_soft()) normalise(sums);
    });
    Sums parts;
    parts.lead_offset = parts.other_offset = parts.hard_offset = 0;
    if (row_.has_soft()) sum_pairs(parts, total);
    if (row_.has_tail()) sum_tail(parts, total);
    const Sums second = row_.total(parts, [&](Sums& sums) { finish(total, sums); });
    if (fresh(shared_.near)) {
      parts.other = sum_outside();
      __syncthreads();
      row_.total(parts, [&](Sums& sums) { finish_near(second, sums.other); });
    }
    const float soft = row_.has_soft() ? fresh(row_.shared.divergence.value) : 0;
    float hard = 0;
    if (row_.has_hard()) hard = row_.hard_term(sum(), offset(), kLog2E, total.label, 1);
    if (row_.wants_gradient() && row_.hard_weight() != 0) {
      const float label = exp2_approx(fmaf(total.label, kLog2E, -offset()));
      float besides = 1 - label / sum();
      if (besides < 0.25f) {  // else the roundings of the sum are small beside it
        parts.hard = sum_besides_label();
        __syncthreads();
        const float rest_of_sum = row_.total(parts, [](Sums&) {}).hard;
        besides = rest_of_sum / (rest_of_sum + label);
      }
      hard_at_label_ = row_.hard_weight() * -besides;
    }
    row_.write_terms(soft, hard);
    if (!row_.wants_gradient()) return;
    if (row_.template is_lost<Divergence::kForward>(soft, hard)) {
      row_.fill_slice(kNaN);
    } else {
      const bool puts_back = row_.soft_weight() != 0;
      if (puts_back) write_named();
      __syncthreads();
      write_classes(total, puts_back);
    }
    write_tail(row_, 1 / sum(), hard_at_label_,
               [&](float logit) { return exp2_approx(fmaf(logit, kLog2E, -offset())); });
  }

 private:
  using Base = HeldSlice<Exchange, false>;
  using Base::row_;
  static constexpr int kMarked = kBins * 32 / kStep;  // steps whose columns have a bit each

  __device__ float sum() const { return fresh(shared_.sum); }
  __device__ float offset() const { return fresh(shared_.offset); }
  __device__ float student_scale() const { return row_.student_inverse() * kLog2E; }
  __device__ float teacher_scale() const { return row_.teacher_inverse() * kLog2E; }
  __device__ static float used(float offset) { return offset > -kInf ? offset : 0; }

  // --- the row's columns

  // A bit for each column of these steps that the teacher names.
  __device__ void mark(int begin, int end) {
    __syncthreads();
    const int words = (end - begin) * (kStep / 32);
    for (int i = static_cast<int>(threadIdx.x); i < words; i += static_cast<int>(blockDim.x)) {
      named_[i] = 0;
    }
    __syncthreads();
    each_named(begin, end, [&](int64_t, int column) {
      const int bit = column - begin * kStep;
      atomicOr(&named_[bit / 32], 1u << bit % 32);
    });
    __syncthreads();
  }
  // Which of the lane's 8 columns of a step the teacher names, a bit each.
  __device__ unsigned named(int marked, int step) const {
    const View view = row_.student();
    const int first = view.first(step) - marked * kStep,
              second = view.second(step) - marked * kStep;
    return (named_[first / 32] >> first % 32 & 15u) | (named_[second / 32] >> second % 32 & 15u)
                                                          << 4;
  }

  // fn(step, logits, which of the columns the teacher names: of 8, where `marked`)
  template <class Fn>
  __device__ __forceinline__ void each_step(bool marked, const Fn& fn) {
    if constexpr (kHeld) {
      Base::each([&](int i) {
        const int step = Base::step(i);
        fn(step, this->student_[i], marked ? named(row_.begin(), step) : 0u);
      });
    } else {
      for (int begin = row_.begin(); begin < row_.end(); begin += kMarked) {
        const int end = min(begin + kMarked, row_.end());
        if (marked) mark(begin, end);
        for (int step = begin + warp(); step < end; step += warps()) {
          float logits[kPerLane];
          unpack(row_.student().dtype, load_packed(row_.student(), step), logits);
          fn(step, logits, marked ? named(begin, step) : 0u);
        }
      }
    }
  }

  // Sums of exponentials: over all classes at T where q is over them all, and at T = 1: over those
  // outside for a bucket, which pools its classes before their sum is taken to the power 1 / T,
  // over all for the hard term.
  __device__ __forceinline__ void sum_classes(Sums& sums) {
    bool nan = false;
#pragma unroll 1
    for (int which = 0; which < 2; ++which) {
      const bool at_one = which == 1;
      const bool wanted = !at_one ? whole_ : bucket_ || (row_.has_hard() && !shares());
      const bool scan = at_one && teacher_.restricted;  // one outside is in none of the sums
      if (!wanted && !scan) continue;
      const bool outside = at_one && bucket_;
      const float scale = at_one ? kLog2E : student_scale();
      float max = -kInf;
      each_step(outside, [&](int, const float* logits, unsigned named) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          nan |= logits[j] != logits[j];
          max = fmaxf(max, named >> j & 1u ? -kInf : logits[j]);
        }
      });
      if (!wanted) continue;
      const float offset = warp_max(max) * scale, base = used(offset);
      float sum = 0;
      each_step(outside, [&](int, const float* logits, unsigned named) {
        float few = 0;
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          const float e = exp2_approx(fmaf(logits[j], scale, -base));
          few += named >> j & 1u ? 0.0f : e;
        }
        sum += few;
      });
      sum = warp_sum(sum);
      (at_one ? sums.hard_offset : sums.other_offset) = offset;
      (at_one ? sums.hard : sums.other) = sum;
    }
    // A NaN goes into the sum over the named classes, which is part of the soft term alone.
    sums.lead = warp_sum(nan ? kNaN : 0.0f);
  }
  // The hard term has the same exponentials as the soft one.
  __device__ bool shares() const { return whole_ && row_.student_inverse() == 1; }

  // --- the classes that the teacher names

  // fn(index, column) for those in these steps, by a thread each.
  template <class Fn>
  __device__ void each_named(int begin, int end, const Fn& fn) const {
    const int64_t first = int64_t{begin} * kStep;
    const int64_t last = min(int64_t{end} * kStep, int64_t{row_.vocab()});
    for (int64_t n = threadIdx.x; n < teacher_.k; n += blockDim.x) {
      const int64_t id = ids_[n];
      if (id >= first && id < last) fn(n, static_cast<int>(id));
    }
  }
  // fn(log_prob, logit, column) for those of this CTA.
  template <class Fn>
  __device__ void each_own(const Fn& fn) const {
    each_named(row_.begin(), row_.end(), [&](int64_t n, int column) {
      fn(log_probs_[n], row_.at(row_.student(), column), column);
    });
  }

  // A sum of 2^(x scale - offset), whose offset is the largest x scale so far.
  struct Online {
    float scale, offset = -kInf, sum = 0;
    __device__ void add(float x) {
      if (x == -kInf) return;
      const float higher = fmaxf(offset, x * scale);
      sum = sum * exp2_approx(offset - higher) + exp2_approx(fmaf(x, scale, -higher));
      offset = higher;
    }
    __device__ void over_warp() {
      const float highest = warp_max(offset);
      sum = warp_sum(offset > -kInf ? sum * exp2_approx(offset - highest) : sum);
      offset = highest;
    }
  };

  __device__ void sum_named(Sums& sums) const {
    Online p{teacher_scale()}, q{student_scale()};
    each_own([&](float log_prob, float logit, int) {
      p.add(log_prob);
      if (!whole_) q.add(logit);
    });
    p.over_warp();
    sums.lead_offset = p.offset;
    sums.lead += p.sum;
    if (whole_) return;
    q.over_warp();
    sums.other_offset = q.offset;
    sums.other = q.sum;
  }

  // By one thread: the offsets of the second sums, in which nothing cancels where both sides agree,
  // and what is outside.
  __device__ void normalise(const Sums& total) {
    float teacher = total.lead, teacher_offset = total.lead_offset;
    float student = total.other, student_offset = total.other_offset;
    const auto add = [](float& sum, float& offset, float log) {
      if (log == -kInf) return;
      const float higher = fmaxf(offset, log);
      sum = (offset > -kInf ? sum * exp2_approx(offset - higher) : sum) + exp2_approx(log - higher);
      offset = higher;
    };
    float log_rest = -kInf, log_outside = -kInf;
    if (bucket_) {
      log_rest = stored_log_rest() * teacher_scale();
      if (total.hard != 0) {
        log_outside = (total.hard_offset + logf(total.hard) * kLog2E) * row_.student_inverse();
      }
      add(teacher, teacher_offset, log_rest);
      add(student, student_offset, log_outside);
    }
    shared_.valid = teacher > 0 && student > 0;
    shared_.teacher_offset = teacher_offset + logf(teacher) * kLog2E;
    shared_.student_offset = student_offset + logf(student) * kLog2E;
    float apart = 0;  // how far the logits are apart, where T is the same
    if (log_outside > -kInf) {
      apart = stored_log_rest() - fmaf(total.hard_offset, kLn2, logf(total.hard));
    }
    shared_.outside =
        pair(log_rest - shared_.teacher_offset, log_outside - shared_.student_offset, apart);
    shared_.forbidden = log_outside == -kInf && log_rest > -kInf;
  }

  // One class, from base-2 logarithms, and from what its logits are `apart`: these keep their
  // digits where T is large. How far the offsets are apart is rounded, but the same for all.
  __device__ Pair pair(float teacher, float student, float apart) const {
    const bool direct = row_.teacher_inverse() == row_.student_inverse() && fabsf(apart) < kInf;
    const float offsets = (fresh(shared_.student_offset) - fresh(shared_.teacher_offset)) * kLn2;
    const float x =
        direct ? fmaf(apart, row_.student_inverse(), offsets) : (teacher - student) * kLn2;
    return pair_of(exp2_approx(teacher), exp2_approx(student), x);
  }
  __device__ Pair pair_at(float log_prob, float logit) const {
    return pair(fmaf(log_prob, teacher_scale(), -fresh(shared_.teacher_offset)),
                fmaf(logit, student_scale(), -fresh(shared_.student_offset)), log_prob - logit);
  }

  // The offset of the hard term's sum: with a bucket, that of the named classes at T = 1 as well.
  __device__ float common_offset(const Sums& total) const {
    const float named = bucket_ ? total.other_offset / row_.student_inverse() : -kInf;
    return used(fmaxf(total.hard_offset, named));
  }

  __device__ void sum_pairs(Sums& sums, const Sums& total) const {
    const float offset = common_offset(total);
    each_own([&](float log_prob, float logit, int) {
      add(sums, pair_at(log_prob, logit));
      sums.forbidden += logit == -kInf && log_prob > -kInf ? 1.0f : 0.0f;
      if (bucket_ && row_.has_hard()) sums.hard += exp2_approx(fmaf(logit, kLog2E, -offset));
    });
    sum_over_warp(sums);
  }

  // Adds the tail to what there is of the hard term, whose offset is the warp's own from here on.
  __device__ void sum_tail(Sums& sums, const Sums& total) const {
    Online tail{kLog2E};
    each_of_tail(row_, [&](int, float logit) { tail.add(logit); });
    tail.over_warp();
    sums.hard_offset = sums.hard == 0 ? -kInf : common_offset(total);
    join(sums.hard, sums.hard_offset, tail.sum, tail.offset);
  }
  // Adds a sum with another offset; a sum that is 0 has -inf.
  __device__ static void join(float& sum, float& offset, float other, float other_offset) {
    const float higher = fmaxf(offset, other_offset);
    sum =
        sum * exp2_approx(offset - used(higher)) + other * exp2_approx(other_offset - used(higher));
    offset = higher;
  }

  // By one thread: the divergence, what its gradient is made of, and the hard term's sum.
  __device__ void finish(const Sums& total, Sums& sums) {
    if (row_.has_soft()) {
      if (bucket_) add(sums, shared_.outside);
      shared_.lead = whole_ ? -1 : sums.lead;  // q may be of more classes than these
      shared_.other = sums.other;
      float value;
      if (whole_) {  // q is what it is; p ln(p / q) - p + q of those outside adds up to their q
        value = fmaxf(sums.excess + (1 - sums.other), 0.0f);
        shared_.gradient = Combination(1, 1, 0);
      } else {
        value = normalised(sums);
      }
      if (sums.forbidden > 0 || (bucket_ && shared_.forbidden)) value = kInf;
      const bool nan = total.lead != total.lead || total.other != total.other;
      row_.shared.divergence.value = shared_.valid && !nan ? value : kNaN;
      shared_.near =
          whole_ && sums.other > 0.5f;  // p may be: its sum is to have the same roundings
    } else {
      shared_.near = false;
    }
    if (row_.has_tail()) {
      float sum = shares() ? total.other : total.hard;
      float offset = shares() ? total.other_offset : total.hard_offset;
      join(sum, offset, sums.hard, sums.hard_offset);
      shared_.sum = sum, shared_.offset = used(offset);
      return;
    }
    shared_.offset = shares() ? total.other_offset : common_offset(total);
    float sum = shares() ? total.other : total.hard;
    if (bucket_) {
      const float down = used(total.hard_offset) - shared_.offset;
      sum = sums.hard + (sum == 0 ? 0 : sum * exp2_approx(down));
    }
    shared_.sum = sum;
  }

  // By one thread: the divergence of what has been summed, all classes of both sides.
  __device__ float normalised(Sums& sums) {
    const SoftTerm soft = divergence(sums);
    const float p = 1 / sums.lead, q = 1 / sums.other;
    const bool alike = fabsf(soft.ratio) < 0.5f;
    shared_.gradient = Combination(q, p, alike ? -p * soft.ratio / (1 + soft.ratio) : q - p);
    return soft.value;
  }
  // The same where q is over all classes: the sum over those outside is `outside`.
  __device__ void finish_near(Sums sums, float outside) {
    const bool is_finite = row_.shared.divergence.value < kInf;
    sums.other += outside;
    sums.difference += outside;
    sums.excess += outside;
    const float value = normalised(sums);
    if (is_finite) row_.shared.divergence.value = value;
    shared_.other = sums.other;
  }
  __device__ __forceinline__ float sum_outside() {
    const float scale = student_scale(), base = fresh(shared_.student_offset);
    float sum = 0;
    each_step(true, [&](int, const float* logits, unsigned named) {
      float few = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const float e = exp2_approx(fmaf(logits[j], scale, -base));
        few += named >> j & 1u ? 0.0f : e;
      }
      sum += few;
    });
    return warp_sum(sum);
  }
  // The exponentials of all classes but the label, at T = 1.
  __device__ __forceinline__ float sum_besides_label() {
    const float base = offset();
    float sum = 0;
    each_step(false, [&](int step, const float* logits, unsigned) {
      const int label = label_index(step);
      float few = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const float e = exp2_approx(fmaf(logits[j], kLog2E, -base));
        few += j == label ? 0.0f : e;
      }
      sum += few;
    });
    if (row_.has_tail()) {
      each_of_tail(row_, [&](int column, float logit) {
        sum += column == row_.label() ? 0.0f : exp2_approx(fmaf(logit, kLog2E, -base));
      });
    }
    return warp_sum(sum);
  }
  __device__ int label_index(int step) const {
    return row_.label() / kStep == step ? row_.student().index(step, row_.label()) : -1;
  }

  // --- the gradient

  // q - p, exactly 0 for a class that is all there is.
  __device__ float difference(const Pair& p) const {
    if (p.lead == shared_.lead && p.other == shared_.other) return 0;
    return shared_.gradient(p.difference, p.other, p.lead);
  }

  // Writes the gradient of the named classes, where write_classes() will find it.
  __device__ void write_named() const {
    const float weight = row_.soft_weight() * row_.student_inverse();
    const float hard = row_.hard_weight() == 0 ? 0 : row_.hard_weight() / sum();
    each_own([&](float log_prob, float logit, int column) {
      float gradient = logit > -kInf ? weight * difference(pair_at(log_prob, logit)) : 0;
      if (hard != 0) {
        gradient += column == row_.label() ? hard_at_label_
                                           : hard * exp2_approx(fmaf(logit, kLog2E, -offset()));
      }
      const float values[kPerLane] = {gradient};
      store_single(row_.dstudent(), column, pack(row_.dstudent().dtype, values).first.x);
    });
  }

  // One factor for the soft term's exponentials, and one for the hard term's: 0, where these are
  // the same.
  __device__ __forceinline__ void write_classes(const Sums& total, bool puts_back) {
    const float weight = row_.soft_weight() * row_.student_inverse();
    float scale = kLog2E, base = offset(), factor = 0, of_soft = 0, hard = 0;
    if (row_.hard_weight() != 0) hard = row_.hard_weight() / sum();
    if (whole_ && row_.soft_weight() != 0) {
      scale = student_scale(), base = used(total.other_offset), factor = weight / total.other;
      if (fresh(shared_.near)) {
        base = fresh(shared_.student_offset), factor = weight / fresh(shared_.other);
      }
      of_soft = factor;
    } else if (bucket_ && row_.soft_weight() != 0) {
      base = used(total.hard_offset);
      if (total.hard > 0) {  // else there is no mass outside
        of_soft = weight * difference(shared_.outside) / total.hard;
        factor = of_soft + hard * exp2_approx(base - offset());
      }
      hard = 0;
    }
    if (scale == kLog2E && base == offset()) factor += hard, hard = 0;
    const float hard_base = offset();
    float at_label = hard_at_label_;
    if (of_soft != 0) at_label += exp2_approx(fmaf(total.label, scale, -base)) * of_soft;
    each_step(puts_back, [&](int step, const float* logits, unsigned named) {
      float gradient[kPerLane] = {};
      if (factor != 0) {  // else the offset may be that of no logit here
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          gradient[j] = exp2_approx(fmaf(logits[j], scale, -base)) * factor;
        }
      }
      if (hard != 0) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          gradient[j] = fmaf(exp2_approx(fmaf(logits[j], kLog2E, -hard_base)), hard, gradient[j]);
        }
      }
      // The two terms nearly cancel there: before the rounding of the store.
      const int label = row_.hard_weight() != 0 ? label_index(step) : -1;
      if (label >= 0) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          if (j == label) gradient[j] = at_label;
        }
      }
      const View dstudent = row_.dstudent();
      if (named != 0) {
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          const int column = j < 4 ? dstudent.first(step) + j : dstudent.second(step) + j - 4;
          if (named >> j & 1u) gradient[j] = row_.at(dstudent, column);
        }
      }
      __syncwarp();
      store_packed(dstudent, step, pack(dstudent.dtype, gradient));
    });
  }

  __device__ float stored_log_rest() const {
    return static_cast<const float*>(teacher_.log_rest)[row_.exchange.row()];
  }

  const SparseTeacher& teacher_;
  SparseShared& shared_;
  unsigned* const named_;
  const int64_t* const ids_;
  const float* const log_probs_;
  const bool bucket_, whole_;
  float hard_at_label_ = 0;  // the gradient there of the hard term
};

}  // namespace fastkd::cuda
