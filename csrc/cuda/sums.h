// The sums a row's divergence is made of, their move from one offset to another, and the
// divergence. `lead` is the distribution whose expectation is taken (the teacher's in KL(p || q),
// the student's in KL(q || p)), `other` the second one; an offset is what is subtracted from logit
// / T before the exponential. Formulas: fastkd/spec.py.
#pragma once
#include "load.h"
#include "math.h"

namespace fastkd::cuda {

// The sums over some columns, with e = 2^(logit log2(e) / T - offset), x = ln e_lead - ln e_other,
// and phi(x) = x + exp(-x) - 1 >= 0. Moved between warps, CTAs and memory as vectors of 16 bytes.
struct alignas(16) Sums {
  float lead_offset = -kInf, other_offset = -kInf;  // -inf: no finite logit, and no sum
  float hard_offset = -kInf;
  float lead = 0;                         // sum e_lead
  float other = 0;                        // sum e_other
  float difference = 0;                   // sum (e_other - e_lead)
  float excess = 0;                       // sum e_lead phi(x)
  float cross = 0;                        // sum e_lead x
  float lead_moved = 0, other_moved = 0;  // see move()
  float hard = 0;       // the student's exponentials at T = 1 over all classes, see Row::power()
  float label = 0;      // the student's logit there, from whoever has it
  float forbidden = 0;  // columns with other = -inf < lead: the divergence is infinite
  float label_teacher = 0;  // what the teacher has at the label, as Row::teacher_label()
  float unused[2] = {};

  static constexpr int kOffsets = 3, kFields = 14;  // the offsets come first
  __device__ float* fields() { return &lead_offset; }
};
constexpr int kSumsVectors = sizeof(Sums) / 16;

// What is added up besides has names of its own, and travels in fields of Sums: maxima in those of
// the offsets, sums in the others, which are as they were where the offsets are the same in every
// CTA.
struct MixtureSums {
  float from_teacher, from_student;  // KL(p || m), KL(q || m)
  float log_q = 0;                   // sum q log_q, where that is wanted

  __device__ Sums packed() const {
    Sums sums;
    sums.lead_offset = sums.other_offset = 0;
    sums.lead = from_teacher;
    sums.other = from_student;
    sums.cross = log_q;
    return sums;
  }
  __device__ static MixtureSums of(const Sums& sums) { return {sums.lead, sums.other, sums.cross}; }
};

// Brings the sums to other offsets, which are not below the old ones. The hard sum is of powers of
// exponentials (see Row::power(); 0 is read as 1), and its offset that of the exponentials: as a
// product it would have been rounded.
//
// The excess of columns that only seem to differ, because the maxima of their two sides do, is
// large there and small after the move: it has lost what it was large against. lead_moved and
// other_moved add up how much, so that a divergence small beside them is known to be inexact.
__device__ inline void move(Sums& s, float lead_offset, float other_offset, float hard_offset,
                            int power) {
  const bool has_lead = s.lead_offset > -kInf, has_other = s.other_offset > -kInf;
  const float down_lead = has_lead ? lead_offset - s.lead_offset : 0.0f;
  const float down_other = has_other ? other_offset - s.other_offset : 0.0f;
  const float w_lead = exp2_approx(-down_lead), w_other = exp2_approx(-down_other);
  const float D = has_lead && has_other ? (down_other - down_lead) * kLn2 : 0.0f;
  const float lead = w_lead * s.lead, other = w_other * s.other;
  const float cross = w_lead * fmaf(D, s.lead, s.cross);
  if (fabsf(D) < 0.25f) {
    const float phi = D * D * phi_series(D), minus_one = phi - D;  // exp(-D) - 1
    s.excess = w_lead * (s.excess + fmaf(phi, s.lead, minus_one * s.difference));
    s.difference = w_lead * fmaf(minus_one, s.other, s.difference);
  } else {
    s.difference = other - lead;
    s.excess = cross + s.difference;
  }
  s.lead_moved = w_lead * fmaf(smaller_square(D), s.lead, s.lead_moved);
  s.other_moved = w_other * fmaf(smaller_square(D), s.other, s.other_moved);
  s.lead = lead;
  s.other = other;
  s.cross = cross;
  const float down_hard = s.hard_offset > -kInf ? hard_offset - s.hard_offset : 0.0f;
  s.hard *= exp2_approx(-down_hard * static_cast<float>(max(power, 1)));
}

// The sum of `count` parts, moved to the largest of their offsets, to `sum`; all of it in shared
// memory. By one warp, in a fixed order. Loops, not shuffles: unrolled they were a quarter of a
// kernel.
__device__ inline void combine(Sums* parts, int count, Sums& sum, int power) {
  float lead_offset = -kInf, other_offset = -kInf, hard_offset = -kInf;
#pragma unroll 4
  for (int i = 0; i < count; ++i) {
    lead_offset = fmaxf(lead_offset, parts[i].lead_offset);
    other_offset = fmaxf(other_offset, parts[i].other_offset);
    hard_offset = fmaxf(hard_offset, parts[i].hard_offset);
  }
  __syncwarp();
#pragma unroll 1
  for (int i = lane(); i < count; i += kLanes)
    move(parts[i], lead_offset, other_offset, hard_offset, power);
  __syncwarp();
  // A lane for each field.
  if (lane() >= Sums::kOffsets && lane() < Sums::kFields) {
    float total = 0;
#pragma unroll 4
    for (int i = 0; i < count; ++i) total += parts[i].fields()[lane()];
    sum.fields()[lane()] = total;
  }
  if (lane() == 0) {
    sum.lead_offset = lead_offset;
    sum.other_offset = other_offset;
    sum.hard_offset = hard_offset;
  }
  __syncwarp();
}

// One column, from its exponentials and x = ln lead - ln other, as far as that is finite.
struct Pair {
  float lead, other, x;
  float difference;  // other - lead
  float excess;      // lead phi(x)
};
__device__ __forceinline__ Pair pair_of(float lead, float other, float x) {
  Pair p{lead, other, fminf(fmaxf(x, -3.4028234e38f), 3.4028234e38f)};  // also of a NaN, two -inf
  const bool near = fabsf(p.x) < 0.25f;
  const float phi = p.x * p.x * phi_series(p.x);
  // From x, whose logits have been subtracted before they were scaled, while it is the more exact.
  const float minus_one = near ? phi - p.x : expm1f(-p.x);
  p.difference = fabsf(p.x) < 1 ? lead * minus_one : other - lead;
  p.excess = near ? lead * phi : fmaf(lead, p.x, p.difference);
  return p;
}

__device__ __forceinline__ void add(Sums& sums, const Pair& p) {
  sums.lead += p.lead;
  sums.other += p.other;
  sums.difference += p.difference;
  sums.excess += p.excess;
  sums.cross = fmaf(p.lead, p.x, sums.cross);
}
// What pairs are added to, over the warp.
__device__ __forceinline__ void sum_over_warp(Sums& sums) {
  sums.lead = warp_sum(sums.lead);
  sums.other = warp_sum(sums.other);
  sums.difference = warp_sum(sums.difference);
  sums.excess = warp_sum(sums.excess);
  sums.cross = warp_sum(sums.cross);
  sums.forbidden = warp_sum(sums.forbidden);
  sums.hard = warp_sum(sums.hard);
}

// Below that divergence ln(q / p) is so small, 0.1 about, that the roundings of p and q formed
// apart would be 1e-5 of the gradient.
constexpr float kNear = 0x1p-7f;

// From the sum whose offset is the maximum, whether a class may be so large a part of this side
// that its gradient is lost in its own rounding. That is 2^-22 of its share s, twice; all others
// have (1 - s) / sqrt(vocab) at least.
__device__ inline float sure_besides(int vocab) {  // (1 - s) / s
  return 0.048f * sqrtf(static_cast<float>(vocab));
}
__device__ inline bool is_sure(float sum, int vocab) { return sum < 1 + sure_besides(vocab); }

struct SoftTerm {
  float value;      // unweighted; not of a mixture
  float ratio;      // Z_other / Z_lead - 1
  float log_ratio;  // ln(Z_other / Z_lead), each relative to its offset
  bool exact;       // else the sums are to be had again, with offsets that balance the two sides
};

__device__ inline SoftTerm divergence(Sums& sums) {
  // `other` and `difference` were rounded apart from each other: one has to follow.
  float ratio = sums.difference / sums.lead;  // Z_other / Z_lead - 1
  const bool alike = fabsf(ratio) < 0.5f;
  if (alike) {
    sums.other = sums.lead * (1 + ratio);
  } else {
    ratio = sums.other / sums.lead - 1;
  }
  SoftTerm d;
  d.ratio = ratio;
  d.log_ratio = alike ? log1pf(ratio) : logf(sums.other / sums.lead);
  float lost;
  if (alike) {
    // cross / Z_lead + log_ratio without its cancellation, for excess = cross + ratio Z_lead; the
    // difference of log_ratio and ratio by its series.
    const float r = ratio;
    const float bracket =
        fabsf(r) < 0.0625f
            ? -r * r * (0.5f - r * (1.0f / 3 - r * (0.25f - r * (0.2f - r * (1.0f / 6 - r / 7)))))
            : d.log_ratio - r;
    d.value = sums.excess / sums.lead + bracket;
    lost =
        sums.lead_moved / sums.lead + sums.other_moved / sums.other + smaller_square(d.log_ratio);
  } else {
    d.value = sums.cross / sums.lead + d.log_ratio;
    lost = fabsf(sums.cross / sums.lead) + fabsf(d.log_ratio) + sums.lead_moved / sums.lead;
  }
  d.exact = d.value < kInf && lost <= 16 * d.value;  // false also for NaN
  d.value = fmaxf(d.value, 0.0f);
  return d;
}

}  // namespace fastkd::cuda
