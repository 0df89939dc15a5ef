// The loops over the columns of one chunk of a row. They know exponentials and sums, not the loss:
// `lead` is the distribution whose expectation the divergence takes (the teacher's in KL(p || q),
// the student's in KL(q || p)), `other` the second one.
#pragma once
#include "math.h"
#include "stream.h"

namespace fastkd::cpu::FASTKD_ISA {

// What a chunk's exponentials are relative to. Any value within 2^40 of the maximum serves.
template <class T>
struct Frame {
  T lead = -kInf<T>;
  T other = -kInf<T>;
};

template <class T>
struct Temperatures {
  T lead, other;  // inverse

  // Whether x is best formed from the difference of the two logits, which is exact where they
  // nearly agree; each is centred first where their temperatures or offsets differ.
  bool direct(Frame<T> frame) const {
    return lead == other && std::fabs(frame.lead - frame.other) * lead < 8 &&
           std::fabs(frame.lead) * lead < 100;
  }
};

// With e = exp((logit - frame) / T) and x = the scaled lead minus the scaled other:
template <class T>
struct Sums {
  T lead = 0;              // sum e_lead
  T other = 0;             // sum e_other
  T difference = 0;        // sum (e_other - e_lead)
  T excess = 0;            // sum e_lead phi(x) = sum (e_lead x + e_other - e_lead), no term < 0
  T cross = 0;             // sum e_lead x
  T probe = 0;             // NaN where a pruned class holds an infinity or a NaN
  bool forbidden = false;  // a column with other = -inf < lead: the divergence is infinite
  bool too_high = false;   // a logit too far above the frame: the sums are not to be used
  T top = kInf<T>;         // no e_lead is above 2^top
};

// What is kept of the exponentials for the gradient, in two buffers a and b.
enum class Keep {
  kNothing,
  kForward,  // a = e_lead, b = e_other - e_lead; both 0 where other = -inf
  kMixture,  // a = e_lead, b = e_other - e_lead
  kReverse,  // a = e_lead, b = e_lead x
};

// One read of a chunk whose logits are finite and whose scaled differences stay below 2^127; where
// they do not, a sum comes out infinite or NaN and the caller comes again by
// `exponentials_guarded`.
//
// The second exponential is e_lead times 2^y, y the difference of the logits: one polynomial gives
// it, the difference e_other - e_lead and phi, each to its own relative precision. Two exponentials
// formed apart and subtracted would keep none of the digits a converged student is about. That
// needs an e_lead that does not underflow: it is held at 2^-126, the smallest there is but 0.
//
// The prefetches lie between the lines: as many together would keep the core waiting (1.4 times the
// time of the call).
//
// kPruned: classes whose teacher is below `threshold` do not exist; nothing of them is kept.
template <Keep kKeep, bool kPruned, bool kTeacherLeads, bool kDirect, class T>
FASTKD_LOOP Sums<T> exponentials(const T* __restrict lead, const T* __restrict other, int64_t n,
                                 Frame<T> frame, Temperatures<T> inverse, T threshold, Ahead ahead,
                                 T* __restrict a, T* __restrict b) {
  using LevelType = typename Level<T>::Type;
  const T scale_lead = inverse.lead * kLog2E<T>, scale_other = inverse.other * kLog2E<T>;
  constexpr T kLowest = Level<T>::kLowest;
  const T lowest = frame.lead + kLowest / scale_lead;
  const T shift = frame.lead - frame.other;
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
    const bool keep = !kPruned || (kTeacherLeads ? l : o) >= threshold;
    if constexpr (kPruned) {
      probes[lane] += (kTeacherLeads ? o : l) * T(0);
      l = keep ? l : frame.lead;
      o = keep ? o : frame.other;
    }
    depths_lead[lane] = depths_lead[lane] < -l ? -l : depths_lead[lane];
    depths_other[lane] = depths_other[lane] < -o ? -o : depths_other[lane];
    if constexpr (kDirect) l = l < lowest ? lowest : l;
    T u_lead = (l - frame.lead) * scale_lead;
    if constexpr (!kDirect) u_lead = u_lead < kLowest ? kLowest : u_lead;
    const T y = kDirect ? (o - l + shift) * scale_lead : (o - frame.other) * scale_other - u_lead;
    const Exponential<T> exponential = exp2_normal(u_lead);
    const T e_lead = keep ? exponential.value : T(0);
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
    if constexpr (kKeep != Keep::kNothing) {
      // Beside a large x even 2^-126 would show: there it is 0.
      const bool gone = kKeep == Keep::kReverse && (kDirect ? l <= lowest : u_lead <= kLowest);
      const T kept = gone ? T(0) : e_lead;
      a[i] = kept;
      b[i] = kKeep == Keep::kReverse ? kept * (y * -kLn2<T>) : difference;
    }
  };
  each_column<kLanes>(n, [&](int64_t i) __attribute__((always_inline)) { ahead.touch(i); }, column);
  T sum_lead = sum_of(lead_sums);
  const T sum_other = sum_of(other_sums);
  // A logit at -inf has to come out exactly 0, not 2^-126; so has one so low that 2^-126 times x
  // would show.
  constexpr T kFar = 1e6;
  if (!((frame.lead + max_of(depths_lead)) * scale_lead < kFar) ||
      !((frame.other + max_of(depths_other)) * scale_other < kFar)) {
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

template <class T>
FASTKD_INLINE T clamp(T value, T bound) {  // NaN becomes -bound
  value = value > -bound ? value : -bound;
  return value < bound ? value : bound;
}

// The same for any logits, with two exponentials; pruned classes come as -inf in both. What is kept
// is 0 where both are -inf, and for the forward divergence where the other is.
template <Keep kKeep, bool kDirect, class T>
FASTKD_LOOP Sums<T> exponentials_guarded(const T* __restrict lead, const T* __restrict other,
                                         int64_t n, Frame<T> frame, Temperatures<T> inverse,
                                         T* __restrict a, T* __restrict b) {
  constexpr T kHuge = std::numeric_limits<T>::max();
  const T scale_lead = inverse.lead * kLog2E<T>, scale_other = inverse.other * kLog2E<T>;
  const T shift = frame.other - frame.lead;
  T lead_sums[kLanes<T>] = {}, other_sums[kLanes<T>] = {}, differences[kLanes<T>] = {},
    excesses[kLanes<T>] = {}, crosses[kLanes<T>] = {}, forbidden[kLanes<T>] = {};
  each_column<kLanes<T>>(n, [&](int64_t i, int lane) __attribute__((always_inline)) {
    const T l = lead[i], o = other[i];
    const T u_lead = (l - frame.lead) * scale_lead, u_other = (o - frame.other) * scale_other;
    // In a frame that is not the maximum's the sum of `other` is not used.
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
    if constexpr (kKeep != Keep::kNothing) {
      const bool absent = kKeep == Keep::kForward && o == -kInf<T>;
      a[i] = absent ? T(0) : e_lead;
      b[i] = absent ? T(0) : kKeep == Keep::kReverse ? e_lead * x : difference;
    }
  });
  return {sum_of(lead_sums),     sum_of(other_sums),
          sum_of(differences),   sum_of(excesses),
          sum_of(crosses),       0,
          sum_of(forbidden) > 0, false};
}

template <class T>
struct Sum {
  T sum, max;
};

// exp((logit - frame) / T) of one side alone, kept in `e` unless it is null.
template <class T>
FASTKD_LOOP Sum<T> exponential(const T* __restrict logits, int64_t n, T frame, T inverse,
                               Ahead ahead, T* __restrict e) {
  const T scale = inverse * kLog2E<T>;
  T sums[kLanes<T>] = {}, maxima[kLanes<T>];
  std::fill(maxima, maxima + kLanes<T>, -kInf<T>);
  const auto run = [&]<bool kKeep>() __attribute__((always_inline)) {
    const auto line = [&](int64_t i) __attribute__((always_inline)) {
      if (ahead.lead != 0) ahead.touch(i);
    };
    each_column<kLanes<T>>(n, line, [&](int64_t i, int lane) __attribute__((always_inline)) {
      const T value = exp2_flushed((logits[i] - frame) * scale);
      maxima[lane] = maxima[lane] < logits[i] ? logits[i] : maxima[lane];
      sums[lane] += value;
      if constexpr (kKeep) e[i] = value;
    });
  };
  e == nullptr ? run.template operator()<false>() : run.template operator()<true>();
  return {sum_of(sums), max_of(maxima)};
}

template <class T>
FASTKD_LOOP T maximum(const T* __restrict values, int64_t n) {  // passes over NaN
  T max = -kInf<T>;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = max < values[i] ? values[i] : max;
  return max;
}

// Copies both sides with -inf in every class below the threshold: there they no longer exist.
template <class T>
FASTKD_LOOP void mask(const T* __restrict student, const T* __restrict teacher, int64_t n,
                      T threshold, T* __restrict masked_student, T* __restrict masked_teacher) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    const bool keep = teacher[i] >= threshold;
    masked_student[i] = keep ? student[i] : -kInf<T>;
    masked_teacher[i] = keep ? teacher[i] : -kInf<T>;
  }
}

// NaN anywhere in a chunk.
template <class T>
FASTKD_LOOP bool has_nan(const T* values, int64_t n) {
  T nans = 0;
#pragma omp simd reduction(+ : nans)
  for (int64_t i = 0; i < n; ++i) nans += values[i] != values[i] ? T(1) : T(0);
  return nans != 0;
}

// The mixture's two divergences, from a = e_student and b = e_teacher - e_student. With y = (q - p)
// / m: p/m = 1 - (1 - beta) y, q/m = 1 + beta y, and each divergence is a sum of excess(r) =
// r ln r - r + 1 over m, without cancellation. Leaves a = q and b = q ln(q / m). It is p that is
// rounded where the other one is, which shows in m only: of q the smallest counts as well.
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

// From a = e_student and b = e_student x, x = ln(q / p) less that of a class (or of none) for which
// beta p / m is `share` and (1 - beta) q / m is `rest`: leaves b = e_student L with L = ln(q / m)
// less that of this class, and returns its sum. Nothing of it cancels where q is all but 1, nor
// where p is so far away that ln(q / m) is -ln(1 - beta) in most classes.
template <class T>
FASTKD_LOOP T beside_class(const T* __restrict a, T* __restrict b, int64_t n, T share, T rest) {
  constexpr T kLeast = sizeof(T) == 8 ? -700 : -80;  // of x, as far as an exponential reaches
  T sums[kLanes<T>] = {};
  each_column<kLanes<T>>(n, [&](int64_t i, int lane) __attribute__((always_inline)) {
    const bool there = a[i] > 0;
    T x = b[i] / (there ? a[i] : T(1));
    x = x < 200 ? x : T(200);     // where ln(q / m) has come to its limit
    x = x > kLeast ? x : kLeast;  // a q that is nothing beside p
    const Ratio<T> back = ratio(x * -kLog2E<T>);
    b[i] = there ? -a[i] * log_terms(share * back.minus_one, share * back.exp2 + rest).log : T(0);
    sums[lane] += b[i];
  });
  return sum_of(sums);
}

template <class T>
FASTKD_LOOP T sum_of_columns(const T* __restrict values, int64_t n) {
  T sums[kLanes<T>] = {};
  each_column<kLanes<T>>(
      n, [&](int64_t i, int lane) __attribute__((always_inline)) { sums[lane] += values[i]; });
  return sum_of(sums);
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
