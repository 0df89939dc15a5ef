// The sums a row's divergence is made of, their move from one frame to another, and the divergence.
// `lead` is the distribution whose expectation is taken (the teacher's in KL(p || q), the student's
// in KL(q || p)), `other` the second one. Formulas: fastkd/spec.py.
#pragma once
#include "columns.h"

namespace fastkd::cuda {

enum class Mode { kForward, kReverse, kMixture };

constexpr float kLog2E = 1.44269504f;
constexpr float kLn2 = 0.693147181f;

// Of some columns, with e = 2^(logit log2(e) / T - frame), x = ln e_lead - ln e_other and
// phi(x) = x + exp(-x) - 1 >= 0. Moved between lanes, CTAs and memory as four vectors of 16 bytes.
struct alignas(16) Sums {
  float lead_frame = -kInf, other_frame = -kInf;  // -inf: no finite logit, and no sum
  float lead = 0;                                 // sum e_lead
  float other = 0;                                // sum e_other
  float difference = 0;                           // sum (e_other - e_lead)
  float excess = 0;                               // sum e_lead phi(x)
  float cross = 0;                                // sum e_lead x
  float lead_moved = 0, other_moved = 0;          // see `moved`
  float hard_frame = -kInf, hard = 0;             // the student at T = 1 over all classes
  float label = 0;                                // the student's logit there, from whoever has it
  float forbidden = 0;  // columns with other = -inf < lead: the divergence is infinite
  float unused[3] = {};
};
constexpr int kSumsVectors = sizeof(Sums) / 16;

// phi(x) / x^2 for |x| < 1/4, relative error 3e-8.
__device__ __forceinline__ float phi_series(float x) {
  float p = fmaf(x, 0.00139121595f, -0.00834884867f);
  p = fmaf(x, p, 0.0416666120f);
  p = fmaf(x, p, -0.166666418f);
  return fmaf(x, p, 0.5f);
}

__device__ __forceinline__ float smaller_square(float x) { return fminf(fabsf(x), x * x); }

// The sums in other frames, which are not below the old ones.
//
// The excess of columns that only seem to differ, because the maxima of their two sides do, is
// large there and small after the move: it has lost what it was large against. `moved` adds up how
// much, so that a divergence small beside it is known to be inexact.
__device__ inline Sums moved(const Sums& s, float lead_frame, float other_frame) {
  const bool has_lead = s.lead_frame > -kInf, has_other = s.other_frame > -kInf;
  const float down_lead = has_lead ? lead_frame - s.lead_frame : 0.0f;
  const float down_other = has_other ? other_frame - s.other_frame : 0.0f;
  const float w_lead = exp2_approx(-down_lead), w_other = exp2_approx(-down_other);
  const float D = has_lead && has_other ? (down_other - down_lead) * kLn2 : 0.0f;
  Sums to = s;
  to.lead_frame = lead_frame;
  to.other_frame = other_frame;
  to.lead = w_lead * s.lead;
  to.other = w_other * s.other;
  to.cross = w_lead * fmaf(D, s.lead, s.cross);
  if (fabsf(D) < 0.25f) {
    const float phi = D * D * phi_series(D), minus_one = phi - D;  // exp(-D) - 1
    to.difference = w_lead * fmaf(minus_one, s.other, s.difference);
    to.excess = w_lead * (s.excess + fmaf(phi, s.lead, minus_one * s.difference));
  } else {
    to.difference = to.other - to.lead;
    to.excess = to.cross + to.difference;
  }
  to.lead_moved = w_lead * fmaf(smaller_square(D), s.lead, s.lead_moved);
  to.other_moved = w_other * fmaf(smaller_square(D), s.other, s.other_moved);
  return to;
}

// The sum of `count` parts in the frames of their maxima, by one warp; every lane returns it. The
// order of the sum is fixed.
template <class Part>
__device__ inline Sums combine(int count, const Part& part) {
  float lead_frame = -kInf, other_frame = -kInf, hard_frame = -kInf;
  for (int i = lane(); i < count; i += kLanes) {
    const Sums s = part(i);
    lead_frame = fmaxf(lead_frame, s.lead_frame);
    other_frame = fmaxf(other_frame, s.other_frame);
    hard_frame = fmaxf(hard_frame, s.hard_frame);
  }
  Sums sum;
  sum.lead_frame = warp_max(lead_frame);
  sum.other_frame = warp_max(other_frame);
  sum.hard_frame = warp_max(hard_frame);
  for (int i = lane(); i < count; i += kLanes) {
    const Sums raw = part(i);
    const Sums s = moved(raw, sum.lead_frame, sum.other_frame);
    sum.lead += s.lead;
    sum.other += s.other;
    sum.difference += s.difference;
    sum.excess += s.excess;
    sum.cross += s.cross;
    sum.lead_moved += s.lead_moved;
    sum.other_moved += s.other_moved;
    const float down = raw.hard_frame > -kInf ? sum.hard_frame - raw.hard_frame : 0.0f;
    sum.hard += exp2_approx(-down) * raw.hard;
    sum.label += raw.label;
    sum.forbidden += raw.forbidden;
  }
  sum.lead = warp_sum(sum.lead);
  sum.other = warp_sum(sum.other);
  sum.difference = warp_sum(sum.difference);
  sum.excess = warp_sum(sum.excess);
  sum.cross = warp_sum(sum.cross);
  sum.lead_moved = warp_sum(sum.lead_moved);
  sum.other_moved = warp_sum(sum.other_moved);
  sum.hard = warp_sum(sum.hard);
  sum.label = warp_sum(sum.label);
  sum.forbidden = warp_sum(sum.forbidden);
  return sum;
}

struct Divergence {
  float value;      // unweighted; not of a mixture
  float log_ratio;  // ln(Z_other / Z_lead), in the row's frames
  bool exact;       // else the sums are to be had again, in frames that balance the two sides
};

__device__ inline Divergence divergence(Sums& sums) {
  // `other` and `difference` were rounded apart from each other: one has to follow.
  float ratio = sums.difference / sums.lead;  // Z_other / Z_lead - 1
  const bool alike = fabsf(ratio) < 0.5f;
  if (alike) {
    sums.other = sums.lead * (1 + ratio);
  } else {
    ratio = sums.other / sums.lead - 1;
  }
  Divergence d;
  d.log_ratio = alike ? log1pf(ratio) : logf(sums.other / sums.lead);
  float lost;
  if (alike) {
    // cross / Z_lead + log_ratio without its cancellation, for excess = cross + ratio Z_lead; the
    // difference of log_ratio and ratio by its series.
    const float r = ratio;
    const float bracket =
        fabsf(r) < 0.0625f
            ? -r * r *
                  (0.5f - r * (1.0f / 3 - r * (0.25f - r * (0.2f - r * (1.0f / 6 - r / 7)))))
            : d.log_ratio - r;
    d.value = sums.excess / sums.lead + bracket;
    lost = sums.lead_moved / sums.lead + sums.other_moved / sums.other +
           smaller_square(d.log_ratio);
  } else {
    d.value = sums.cross / sums.lead + d.log_ratio;
    lost = fabsf(sums.cross / sums.lead) + fabsf(d.log_ratio) + sums.lead_moved / sums.lead;
  }
  d.exact = d.value < kInf && lost <= 16 * d.value;  // false also for NaN
  d.value = fmaxf(d.value, 0.0f);
  return d;
}

// Of y >= -1: ln(1 + y), and (1 + y) ln(1 + y) - y >= 0 relative to its own size also where y is
// small; ln 0 is taken as ln of the smallest normal number.
struct LogTerms {
  float log, excess;
};
__device__ __forceinline__ LogTerms log_terms(float y) {
  // ln(1 + y) = y - y^2 q(y), coefficients as for the CPU (csrc/cpu/math.h).
  float q = -0.0873475952f;
  q = fmaf(q, y, 0.14307497f);
  q = fmaf(q, y, -0.149179918f);
  q = fmaf(q, y, 0.165705125f);
  q = fmaf(q, y, -0.199620709f);
  q = fmaf(q, y, 0.250017551f);
  q = fmaf(q, y, -0.333339502f);
  q = fmaf(q, y, 0.499999916f);
  const float near_log = fmaf(-y * y, q, y);
  const float near_excess = y * y * fmaf(-(1.0f + y), q, 1.0f);
  const float r = fmaxf(1.0f + y, 0x1p-126f);
  const float far_log = log2_approx(r) * kLn2;
  const bool near = y > -0.29f && y < 0.41f;
  return {near ? near_log : far_log, near ? near_excess : fmaf(r, far_log, -y)};
}

}  // namespace fastkd::cuda
