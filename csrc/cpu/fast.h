// The loops over the columns of a chunk of an ordinary row, whose logits are finite.
//
// What is saved of the exponentials for the gradient of a divergence, in two buffers a and b:
//   kNone     nothing
//   kForward  a = e_lead, b = e_other - e_lead; both 0 where other = -inf
//   kMixture  a = e_lead, b = e_other - e_lead
//   kReverse  a = e_lead, b = e_lead x
#pragma once
#include "load.h"
#include "math.h"
#include "sums.h"

namespace fastkd::cpu::FASTKD_ISA {

// One read of a chunk whose logits are finite and whose scaled differences stay below 2^127; where
// they do not, a sum comes out infinite or NaN and the caller comes again by
// `exponentials_careful`.
//
// The second exponential is e_lead times 2^y, y the difference of the logits: one polynomial gives
// it, the difference e_other - e_lead and phi, each to its own relative precision. Two exponentials
// formed apart and subtracted would have none of the digits a converged student is about. That
// needs an e_lead that does not underflow: it is held at 2^-126, the smallest there is but 0.
//
// The prefetches are spread over the lines of columns: as many at once would keep the core waiting,
// and the call would take 1.4 times as long.
//
// kPruned: classes whose teacher is below `threshold` do not take part; nothing of them is saved.
template <Divergence kSaved, bool kPruned, bool kTeacherLeads, bool kDirect, class T>
FASTKD_LOOP ChunkSums<T> exponentials_fast(const T* __restrict lead, const T* __restrict other,
                                           int64_t n, Offsets<T> offsets, Temperatures<T> inverse,
                                           T threshold, Ahead ahead, T* __restrict a,
                                           T* __restrict b) {
  using LevelType = typename Level<T>::Type;
  const T scale_lead = inverse.lead * kLog2E<T>, scale_other = inverse.other * kLog2E<T>;
  constexpr T kLowest = Level<T>::kLowest;
  const T lowest = offsets.lead + kLowest / scale_lead;
  const T shift = offsets.lead - offsets.other;
  constexpr int kLanes = cpu::FASTKD_ISA::kLanes<T>;
  T lead_sums[kLanes] = {}, other_sums[kLanes] = {}, differences[kLanes] = {},
    excesses[kLanes] = {}, crosses[kLanes] = {}, probes[kLanes] = {};
  T depths_lead[kLanes], depths_other[kLanes];  // minus the smallest logit
  LevelType levels_lead[kLanes], levels_ratio[kLanes];
  for (int lane = 0; lane < kLanes; ++lane) {
    depths_lead[lane] = depths_other[lane] = -kInf<T>;
    levels_lead[lane] = levels_ratio[lane] = Level<T>::kZero;
  }
  const auto column = [&](int64_t i, int lane) __attribute__((always_inline)) {
    T l = lead[i], o = other[i];
    const bool kept = !kPruned || (kTeacherLeads ? l : o) >= threshold;
    if constexpr (kPruned) {
      probes[lane] += (kTeacherLeads ? o : l) * T(0);
      l = kept ? l : offsets.lead;
      o = kept ? o : offsets.other;
    }
    depths_lead[lane] = depths_lead[lane] < -l ? -l : depths_lead[lane];
    depths_other[lane] = depths_other[lane] < -o ? -o : depths_other[lane];
    if constexpr (kDirect) l = l < lowest ? lowest : l;
    T u_lead = (l - offsets.lead) * scale_lead;
    if constexpr (!kDirect) u_lead = u_lead < kLowest ? kLowest : u_lead;
    const T y = kDirect ? (o - l + shift) * scale_lead : (o - offsets.other) * scale_other - u_lead;
    const Exponential<T> exponential = exp2_normal(u_lead);
    const T e_lead = kept ? exponential.value : T(0);
    const Ratio<T> to_other = ratio(y);
    LevelType& level_lead = levels_lead[lane];
    LevelType& level_ratio = levels_ratio[lane];
    level_lead = level_lead < exponential.level ? exponential.level : level_lead;
    level_ratio = level_ratio < to_other.level ? to_other.level : level_ratio;
    const T difference = e_lead * to_other.minus_one;
    lead_sums[lane] += e_lead;
    other_sums[lane] += e_lead * to_other.exp2;  // the sum with `difference` would cancel
    differences[lane] += difference;
    excesses[lane] += e_lead * to_other.phi;
    crosses[lane] += e_lead * y;
    if constexpr (kSaved != Divergence::kNone) {
      // An e_lead held at 2^-126 would show where x is large: 0 is saved in its place.
      const bool gone =
          kSaved == Divergence::kReverse && (kDirect ? l <= lowest : u_lead <= kLowest);
      const T saved = gone ? T(0) : e_lead;
      a[i] = saved;
      b[i] = kSaved == Divergence::kReverse ? saved * (y * -kLn2<T>) : difference;
    }
  };
  each_column<kLanes>(n, [&](int64_t i) __attribute__((always_inline)) { ahead.touch(i); }, column);
  T sum_lead = sum_of(lead_sums);
  const T sum_other = sum_of(other_sums);
  // A logit at -inf has to come out exactly 0, not 2^-126; so has one so low that 2^-126 times x
  // would show.
  constexpr T kFar = 1e6;
  if (!((offsets.lead + max_of(depths_lead)) * scale_lead < kFar) ||
      !((offsets.other + max_of(depths_other)) * scale_other < kFar)) {
    sum_lead = kNaN<T>;
  }
  const bool too_high = max_of(levels_lead) - Level<T>::kZero > 35 ||
                        max_of(levels_ratio) - Level<T>::kZero > -Level<T>::kLowest ||
                        sum_other > 0x1p50;
  return {sum_lead,
          sum_other,
          sum_of(differences),
          sum_of(excesses),
          sum_of(crosses) * -kLn2<T>,
          sum_of(probes),
          false,
          too_high,
          static_cast<T>(max_of(levels_lead) - Level<T>::kZero) + T(0.5)};
}

// The mixture's two divergences, from a = e_student and b = e_teacher - e_student. With y = (q - p)
// / m: p/m = 1 - (1 - beta) y, q/m = 1 + beta y, and each divergence is a sum of excess(r) =
// r ln r - r + 1 over m, without cancellation. Leaves a = q and b = q ln(q / m). Only p is formed
// from a sum that was rounded, which shows in m alone; q counts where it is smallest as well.
template <class T>
struct Mixture {
  T from_teacher = 0;  // KL(p || m)
  T from_student = 0;  // KL(q || m)
};

template <class T>
FASTKD_LOOP Mixture<T> mixture(T* __restrict a, T* __restrict b, int64_t n, T beta, T per_q,
                               T per_p, T difference_a) {
  // q = per_q a, p = per_p (a + b), q - p = difference_a a - per_p b
  constexpr T kTiny = std::numeric_limits<T>::min();
  T from_teacher[kLanes<T>] = {}, from_student[kLanes<T>] = {};
  each_column<kLanes<T>>(n, [&](int64_t i, int lane) __attribute__((always_inline)) {
    const T p = per_p * (a[i] + b[i]), q = per_q * a[i];
    const T m = beta * p + (1 - beta) * q;
    const T per_m = 1 / (m > kTiny ? m : kTiny);
    const T y = (difference_a * a[i] - per_p * b[i]) * per_m;
    const auto from_p = log_terms(-(1 - beta) * y, p * per_m);
    const auto from_q = log_terms(beta * y, q * per_m);
    from_teacher[lane] += m * from_p.excess;
    from_student[lane] += m * from_q.excess;
    a[i] = q;
    b[i] = q * from_q.log;
  });
  return {sum_of(from_teacher), sum_of(from_student)};
}

// dstudent = ca a + cb b (+ ch h), in float32 (float64) and rounded once, at the store.
template <bool kSoft, bool kHard, class Out, class T>
FASTKD_LOOP void combine(const T* __restrict a, const T* __restrict b, const T* __restrict h,
                         int64_t n, T ca, T cb, T ch, Out* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T value = 0;
    if constexpr (kSoft) value = ca * a[i] + cb * b[i];
    if constexpr (kHard) value = kSoft ? value + ch * h[i] : ch * h[i];
    out[i] = store<Out>(value);
  }
}

}  // namespace fastkd::cpu::FASTKD_ISA
