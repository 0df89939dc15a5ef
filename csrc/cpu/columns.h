// The loops over the columns of one chunk of a row. They know exponentials and sums, not the loss:
// `lead` is the distribution whose expectation the divergence takes (the teacher's in KL(p || q),
// the student's in KL(q || p)), `other` the second one.
#pragma once
#include "math.h"

namespace fastkd::cpu {

// What a chunk's exponentials are relative to. Any value within 2^40 of the maximum serves.
template <class T>
struct Frame {
  T lead = -kInf<T>;
  T other = -kInf<T>;
};

template <class T>
struct Temperatures {
  T lead, other;  // inverse
  bool same() const { return lead == other; }
};

// With e = exp((logit - frame) / T) and x = the scaled lead minus the scaled other:
template <class T>
struct Sums {
  T lead = 0;        // sum e_lead
  T other = 0;       // sum e_other
  T difference = 0;  // sum (e_other - e_lead)
  T excess = 0;      // sum e_lead phi(x) = sum (e_lead x + e_other - e_lead), no term < 0
  T forbidden = 0;   // number of columns with other = -inf < lead: the divergence is infinite
  Frame<T> max;      // largest logits seen
};

// What is kept of the exponentials for the gradient, in two buffers a and b.
enum class Keep {
  kNothing,
  kForward,  // a = e_lead, b = e_other - e_lead; both 0 where other = -inf
  kMixture,  // a = e_lead, b = e_other - e_lead
  kReverse,  // a = e_lead, b = e_lead x
};

template <class T>
FASTKD_INLINE T clamp(T value, T bound) {  // NaN becomes -bound
  value = value > -bound ? value : -bound;
  return value < bound ? value : bound;
}

// One read of a chunk. Without kGuarded the logits must be finite and the scaled differences must
// not overflow; where they are not, `excess` comes out infinite or NaN and the caller comes again.
// Near x = 0 the difference e_lead (exp(-x) - 1) is formed from x, whose logits are subtracted
// first: two exponentials subtracted would keep none of the digits a converged student is about.
template <Keep kKeep, bool kGuarded, bool kSameTemperature, class T>
FASTKD_INLINE Sums<T> exponentials(const T* __restrict lead, const T* __restrict other, int64_t n,
                                   Frame<T> frame, Temperatures<T> inverse, T* __restrict a,
                                   T* __restrict b) {
  constexpr T kHuge = sizeof(T) == 4 ? T(1e30) : T(1e300);
  const T scale_lead = inverse.lead * kLog2E<T>, scale_other = inverse.other * kLog2E<T>;
  const T shift = frame.other - frame.lead;
  T sum_lead = 0, sum_other = 0, sum_difference = 0, sum_excess = 0, forbidden = 0;
  T max_lead = -kInf<T>, max_other = -kInf<T>;
#pragma omp simd reduction(+ : sum_lead, sum_other, sum_difference, sum_excess, forbidden) \
    reduction(max : max_lead, max_other)
  for (int64_t i = 0; i < n; ++i) {
    const T l = lead[i], o = other[i];
    max_lead = max_lead < l ? l : max_lead;
    max_other = max_other < o ? o : max_other;
    const T u_lead = (l - frame.lead) * scale_lead, u_other = (o - frame.other) * scale_other;
    const T e_lead = exp2_(u_lead), e_other = exp2_(u_other);
    T x = kSameTemperature ? (l - o + shift) * inverse.lead : (u_lead - u_other) * kLn2<T>;
    if constexpr (kGuarded) x = clamp(x, kHuge);
    const bool small = (x < 0 ? -x : x) < T(0.25);
    const T phi = phi_small(small ? x : T(0));
    const T difference = small ? e_lead * (phi - x) : e_other - e_lead;
    const T excess = small ? e_lead * phi : e_lead * x + difference;
    sum_lead += e_lead;
    sum_other += e_other;
    sum_difference += difference;
    sum_excess += excess;
    if constexpr (kGuarded) forbidden += o == -kInf<T> && l > -kInf<T> ? T(1) : T(0);
    if constexpr (kKeep != Keep::kNothing) {
      const bool absent = kGuarded && kKeep == Keep::kForward && o == -kInf<T>;
      a[i] = absent ? T(0) : e_lead;
      b[i] = absent ? T(0) : kKeep == Keep::kReverse ? e_lead * x : difference;
    }
  }
  return {sum_lead, sum_other, sum_difference, sum_excess, forbidden, {max_lead, max_other}};
}

template <class T>
struct Sum {
  T sum, max;
};

// exp((logit - frame) / T) of one side alone, kept in `e` unless it is null.
template <class T>
FASTKD_INLINE Sum<T> exponential(const T* __restrict logits, int64_t n, T frame, T inverse,
                                 T* __restrict e) {
  const T scale = inverse * kLog2E<T>;
  T sum = 0, max = -kInf<T>;
  if (e == nullptr) {
#pragma omp simd reduction(+ : sum) reduction(max : max)
    for (int64_t i = 0; i < n; ++i) {
      max = max < logits[i] ? logits[i] : max;
      sum += exp2_((logits[i] - frame) * scale);
    }
  } else {
#pragma omp simd reduction(+ : sum) reduction(max : max)
    for (int64_t i = 0; i < n; ++i) {
      max = max < logits[i] ? logits[i] : max;
      const T value = exp2_((logits[i] - frame) * scale);
      sum += value;
      e[i] = value;
    }
  }
  return {sum, max};
}

template <class T>
FASTKD_INLINE T maximum(const T* __restrict values, int64_t n) {
  T max = -kInf<T>;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = max < values[i] ? values[i] : max;
  return max;
}

// Copies both sides with -inf in every class below the threshold: there they no longer exist.
template <class T>
FASTKD_INLINE void mask(const T* __restrict student, const T* __restrict teacher, int64_t n,
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
FASTKD_INLINE bool has_nan(const T* values, int64_t n) {
  T nans = 0;
#pragma omp simd reduction(+ : nans)
  for (int64_t i = 0; i < n; ++i) nans += values[i] != values[i] ? T(1) : T(0);
  return nans != 0;
}

// The mixture's two divergences, from a = e_teacher and b = e_student - e_teacher. With y = (q - p)
// / m: p/m = 1 - (1 - beta) y, q/m = 1 + beta y, and each divergence is a sum of excess(r) =
// r ln r - r + 1 over m, without cancellation. Leaves a = q and b = q ln(q / m).
template <class T>
struct Mixture {
  T from_teacher = 0;  // KL(p || m)
  T from_student = 0;  // KL(q || m)
};

template <class T>
FASTKD_INLINE Mixture<T> mixture(T* __restrict a, T* __restrict b, int64_t n, T beta, T per_q,
                                 T per_p, T difference_a) {
  // p = per_p a, q = per_q (a + b), q - p = per_q b + difference_a a
  constexpr T kTiny = std::numeric_limits<T>::min();
  T from_teacher = 0, from_student = 0;
#pragma omp simd reduction(+ : from_teacher, from_student)
  for (int64_t i = 0; i < n; ++i) {
    const T p = per_p * a[i], q = per_q * (a[i] + b[i]);
    const T m = beta * p + (1 - beta) * q;
    const T y = (per_q * b[i] + difference_a * a[i]) / (m > kTiny ? m : kTiny);
    const auto from_p = log_terms(-(1 - beta) * y);
    const auto from_q = log_terms(beta * y);
    from_teacher += m * from_p.excess;
    from_student += m * from_q.excess;
    a[i] = q;
    b[i] = q * from_q.log;
  }
  return {from_teacher, from_student};
}

// dstudent = ca a + cb b (+ ch h), in float32 (float64) and rounded once, at the store.
template <bool kSoft, bool kHard, class Out, class T>
FASTKD_INLINE void combine(const T* __restrict a, const T* __restrict b, const T* __restrict h,
                           int64_t n, T ca, T cb, T ch, Out* __restrict out) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    T value = 0;
    if constexpr (kSoft) value = ca * a[i] + cb * b[i];
    if constexpr (kHard) value = kSoft ? value + ch * h[i] : ch * h[i];
    out[i] = store<Out>(value);
  }
}

}  // namespace fastkd::cpu
