// The loops over the columns of a chunk whose logits may be infinite or far apart, or whose
// gradient is a difference of what nearly agrees.
#pragma once
#include "fast.h"
#include "load.h"
#include "math.h"
#include "sums.h"

namespace fastkd::cpu::FASTKD_ISA {

// Copies both sides with -inf in every class below the threshold: that is how a class is left out.
template <class T>
FASTKD_LOOP void pruned_copies(const T* __restrict student, const T* __restrict teacher, int64_t n,
                               T threshold, T* __restrict kept_student,
                               T* __restrict kept_teacher) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const bool kept = teacher[i] >= threshold;
    kept_student[i] = kept ? student[i] : -kInf<T>;
    kept_teacher[i] = kept ? teacher[i] : -kInf<T>;
  }
}

template <class T>
FASTKD_INLINE T clamp(T value, T bound) {  // turns NaN into -bound
  value = value > -bound ? value : -bound;
  return value < bound ? value : bound;
}

// The sums of a chunk of any logits, by two exponentials; pruned classes come as -inf in both. What
// is saved is 0 where both are -inf, and for the forward divergence where the other is.
template <Divergence kSaved, bool kDirect, class T>
FASTKD_LOOP ChunkSums<T> exponentials_careful(const T* __restrict lead, const T* __restrict other,
                                              int64_t n, Offsets<T> offsets,
                                              Temperatures<T> inverse, T* __restrict a,
                                              T* __restrict b) {
  constexpr T kHuge = std::numeric_limits<T>::max();
  const T scale_lead = inverse.lead * kLog2E<T>, scale_other = inverse.other * kLog2E<T>;
  const T shift = offsets.other - offsets.lead;
  T lead_sums[kLanes<T>] = {}, other_sums[kLanes<T>] = {}, differences[kLanes<T>] = {},
    excesses[kLanes<T>] = {}, crosses[kLanes<T>] = {}, forbidden[kLanes<T>] = {};
  each_column<kLanes<T>>(n, [&](int64_t i, int lane) __attribute__((always_inline)) {
    const T l = lead[i], o = other[i];
    const T u_lead = (l - offsets.lead) * scale_lead, u_other = (o - offsets.other) * scale_other;
    // Relative to an offset far below the maximum e_other is held; its sum is not used then.
    constexpr T kHighest = -Level<T>::kLowest;
    const T e_lead = exp2_flushed(u_lead);
    const T e_other = exp2_flushed(u_other > kHighest ? kHighest : u_other);
    const T x =
        clamp(kDirect ? (l - o + shift) * inverse.lead : (u_lead - u_other) * kLn2<T>, kHuge);
    const bool small = (x < 0 ? -x : x) < T(0.25);
    const Ratio<T> to_other = ratio(small ? x * -kLog2E<T> : T(0));
    const T difference = small ? e_lead * to_other.minus_one : e_other - e_lead;
    lead_sums[lane] += e_lead;
    other_sums[lane] += e_other;
    differences[lane] += difference;
    excesses[lane] += small ? e_lead * to_other.phi : e_lead * x + difference;
    crosses[lane] += e_lead * x;
    forbidden[lane] += o == -kInf<T> && l > -kInf<T> ? T(1) : T(0);
    if constexpr (kSaved != Divergence::kNone) {
      const bool absent = kSaved == Divergence::kForward && o == -kInf<T>;
      a[i] = absent ? T(0) : e_lead;
      b[i] = absent ? T(0) : kSaved == Divergence::kReverse ? e_lead * x : difference;
    }
  });
  return {sum_of(lead_sums),     sum_of(other_sums),
          sum_of(differences),   sum_of(excesses),
          sum_of(crosses),       0,
          sum_of(forbidden) > 0, false};
}

// From a = e_student and b = e_student x, x = ln(q / p) less that of a class (or of none) for which
// beta p / m is `teacher_share` and (1 - beta) q / m is `student_share`: leaves b = e_student L
// with L = ln(q / m) less that of this class, and returns its sum. Nothing of it cancels where q is
// all but 1, nor where p is so far away that ln(q / m) is -ln(1 - beta) in most classes.
template <class T>
FASTKD_LOOP T beside_class(const T* __restrict a, T* __restrict b, int64_t n, T teacher_share,
                           T student_share) {
  constexpr T kLeast = sizeof(T) == 8 ? -700 : -80;  // of x, as far as an exponential reaches
  T sums[kLanes<T>] = {};
  each_column<kLanes<T>>(n, [&](int64_t i, int lane) __attribute__((always_inline)) {
    const bool there = a[i] > 0;
    T x = b[i] / (there ? a[i] : T(1));
    x = x < 200 ? x : T(200);     // where ln(q / m) has come to its limit
    x = x > kLeast ? x : kLeast;  // a q that is nothing beside p
    const Ratio<T> back = ratio(x * -kLog2E<T>);
    b[i] = there ? -a[i] * log_terms(teacher_share * back.minus_one,
                                     teacher_share * back.exp2 + student_share)
                               .log
                 : T(0);
    sums[lane] += b[i];
  });
  return sum_of(sums);
}

}  // namespace fastkd::cpu::FASTKD_ISA
