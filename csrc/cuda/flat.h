// The core of rows at T >= 1000, whose two sides are all but flat. There p and q formed apart and
// subtracted would lose T roundings; here nothing cancels but the logits, which T^2 KL matches: at
// T = infinity it is half the variance of z - v over the classes. With K classes, and
//
//   u = T ln(q / p) = d - mean     d = z - v, and the mean makes the sum of q 1
//   w = T (q / p - 1) = T expm1(u / T)
//
//   T^2 KL(p || q) = sum p T^2 (exp(u / T) - 1 - u / T)       gradient: T (q - p) = p w
//   T^2 KL(q || p) = sum q T^2 (exp(-u / T) - 1 + u / T)                q (u - T KL)
//   of a mixture            sum beta KL(p || m) + (1 - beta) KL(q || m), likewise
//
// Such rows are rare: their slices are read three times, whatever their length.
#pragma once
#include "careful.h"

namespace fastkd::cuda {

template <class Exchange>
class Flat : HardTerm<Exchange> {
 public:
  __device__ explicit Flat(Row<Exchange>& row)
      : HardTerm<Exchange>(row),
        unit_(row.teacher_probs() ? kLn2 : 1.0f),
        inverse_(row.student_inverse()),
        beta_(row.beta()) {}

  // False: T is finite, and some logit is not, or so large that the sides are not flat. Nothing has
  // been written then.
  __device__ bool run() {
    this->prune();
    const First first = sum_differences();
    const float count = first.count;
    if (inverse_ > 0 && !(first.unusable == 0 && fabsf(first.apart) < kInf && count > 0)) {
      return false;
    }
    mean_ = first.apart / count;  // NaN without a class
    if (inverse_ > 0) {
      const float student = fmaf(inverse_, first.students / count, 1.0f);  // the mean of exp(z / T)
      per_p_ = 1 / fmaf(-inverse_, mean_, student);
      mean_ = -log1pf(-inverse_ * mean_ / student) / inverse_;
    }
    hard_offset_ = first.hard_max > -kInf ? first.hard_max : 0;
    const Second second = sum_centred();
    mean_error_ = second.off / count;
    from_student_ = second.from_student / count;
    float soft = second.divergence / count - mean_error_ * mean_error_ / 2;
    if (!is_nan(soft)) soft = curvature() * fmaxf(soft, 0.0f);
    // A class has a logit on one side only.
    if (first.unusable > 0) soft = is_nan(first.apart) ? kNaN : kInf;
    if (is(Divergence::kReverse)) from_student_ = fmaf(inverse_, soft, mean_error_);
    float hard = 0;
    if (row_.has_hard()) {
      const float sum = this->hard_sum(second.hard, second.label);
      hard = sum > 0 ? logf(sum) + (hard_offset_ - second.label) : kNaN;
    }
    // The weight has a T^2 that all above includes.
    const float scale = inverse_ > 0 ? inverse_ : 1;
    soft = soft * scale * scale;
    row_.write_terms(soft, hard);
    if (!row_.wants_gradient()) return true;
    if (row_.template is_lost<Divergence::kReverse>(soft, hard)) {  // an infinite value leaves none
      row_.fill_slice(kNaN);
    } else {
      write_gradient(row_.soft_weight() * scale * scale * curvature() / count,
                     row_.hard_weight() / this->hard_sum(second.hard, second.label));
    }
    this->write_tail(this->hard_sum(second.hard, second.label));
    return true;
  }

 private:
  using Base = HardTerm<Exchange>;
  using Base::each_step, Base::hard_offset_, Base::row_, Base::only_kept;

  // The largest |logit| / T at which the series still hold.
  static constexpr float kFlat = 1.0f / 16;

  __device__ static bool is_nan(float x) { return x != x; }
  __device__ bool is(Divergence divergence) const { return row_.call.divergence == divergence; }

  // The divergence's second derivative at equal logits, as a multiple of KL's.
  __device__ float curvature() const { return is(Divergence::kMixture) ? beta_ * (1 - beta_) : 1; }

  __device__ static bool is_there(float student, float teacher) {
    return student != -kInf || teacher != -kInf;
  }
  __device__ float difference(float student, float teacher) const {
    return fmaf(teacher, -unit_, student);
  }

  // T expm1(x / T) - x, and T^2 (exp(x / T) - 1 - x / T).
  __device__ float bend(float x) const { return x * (x * inverse_) * phi_series(-x * inverse_); }
  __device__ float square(float x) const { return x * x * phi_series(-x * inverse_); }

  // A class that is there: p and q times K, and u and w as above.
  struct Class {
    float p, q, u, w;
  };
  __device__ Class of(float student, float teacher) const {
    const float v = teacher * unit_, u = difference(student, teacher) - mean_, w = u + bend(u);
    const float p = fmaf(inverse_, v + bend(v), 1.0f) * per_p_;
    return {p, fmaf(inverse_ * w, p, p), u, w};
  }

  // The mixture m: p is m times 1 - (1 - beta) y / T, and q is m times 1 + beta y / T.
  struct Mixture {
    float m, y;
  };
  __device__ Mixture mixture(const Class& c) const {
    const float m = fmaf((1 - beta_) * inverse_, c.w, 1.0f);
    return {c.p * m, c.w / m};
  }
  // T ln(q / m) / beta.
  __device__ float beside_mixture(const Class& c) const {
    const float y = mixture(c).y, x = beta_ * inverse_ * y;
    float log = 0;  // ln(1 + x) / x
#pragma unroll
    for (int n = kTerms; n >= 1; --n) log = fmaf(log, -x, 1.0f / static_cast<float>(n));
    return y * log;
  }
  // ((1 + x) ln(1 + x) - x) / x^2
  __device__ static float entropy_series(float x) {
    float sum = 0;
#pragma unroll
    for (int n = kTerms; n >= 1; --n) sum = fmaf(sum, -x, 1.0f / static_cast<float>(n * (n + 1)));
    return sum;
  }

  // What a class adds to T^2 times the divergence, but for the curvature.
  __device__ float divergence(const Class& c) const {
    if (is(Divergence::kForward)) return c.p * square(c.u);
    if (is(Divergence::kReverse)) return c.q * square(-c.u);
    const auto [m, y] = mixture(c);
    const float from_p = entropy_series(-(1 - beta_) * inverse_ * y);
    return m * y * y * fmaf(beta_, entropy_series(beta_ * inverse_ * y), (1 - beta_) * from_p);
  }
  __device__ float gradient(const Class& c) const {
    if (is(Divergence::kForward)) return c.p * (c.w - mean_error_);
    return c.q * ((is(Divergence::kReverse) ? c.u : beside_mixture(c)) - from_student_);
  }

  // What the first pass finds; see MixtureSums.
  struct First {
    float hard_max;  // the student's largest logit in all classes
    float apart;     // sum z - v, or T (exp(z / T) - exp(v / T)) where T is finite
    float students;  // sum T expm1(z / T)
    float count;     // classes that are there
    float unusable;  // those of them with one logit only, or with one that is not small beside T

    __device__ Sums packed() const {
      Sums sums;
      sums.lead_offset = sums.other_offset = 0;
      sums.hard_offset = hard_max;
      sums.lead = apart;
      sums.cross = students;
      sums.other = count;
      sums.forbidden = unusable;
      return sums;
    }
    __device__ static First of(const Sums& s) {
      return {s.hard_offset, s.lead, s.cross, s.other, s.forbidden};
    }
  };
  __device__ First sum_differences() {
    float hard_max = -kInf, sum = 0, students = 0, count = 0, unusable = 0;
    each_step([&](int step, float* student, float* teacher) {
      float few = 0, few_students = 0;  // 8 at a time: a long slice's sum would swallow single ones
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        hard_max = fmaxf(hard_max, student[j]);
        if (this->loses_nan(student[j], teacher[j])) few = kNaN;
      }
      only_kept(step, student, teacher);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        const float z = student[j], v = teacher[j] * unit_;
        if (!is_there(z, v)) continue;
        const bool one = z == -kInf || v == -kInf;
        const bool out = one || fmaxf(fabsf(z), fabsf(v)) * inverse_ > kFlat;
        ++count;
        if (out) ++unusable;
        if (z < kInf && v < kInf) {
          few += out ? 0.0f : difference(z, teacher[j]) + (bend(z) - bend(v));
          few_students += out ? 0.0f : z + bend(z);
        } else {
          few = kNaN;
        }
      }
      sum += few;
      students += few_students;
    });
    this->find_maximum_of_tail(hard_max);
    return row_.total_of(First{warp_max(hard_max), warp_sum(sum), warp_sum(students),
                               warp_sum(count), warp_sum(unusable)});
  }

  // What the second pass finds, with the mean taken from the differences.
  struct Second {
    float off;           // sum p w: what the mean is off by
    float divergence;    // the sum that divergence() is of
    float from_student;  // sum q beside_mixture(), for the mixture's gradient
    float hard;          // the hard term's exponentials without the label's
    float label;         // the student's logit there

    __device__ Sums packed() const {
      Sums sums;
      sums.lead_offset = sums.other_offset = sums.hard_offset = 0;
      sums.lead = off;
      sums.other = divergence;
      sums.cross = from_student;
      sums.hard = hard;
      sums.label = label;
      return sums;
    }
    __device__ static Second of(const Sums& s) {
      return {s.lead, s.other, s.cross, s.hard, s.label};
    }
  };
  __device__ Second sum_centred() {
    float sum = 0, divergences = 0, from_student = 0, hard = 0;
    each_step([&](int step, float* student, float* teacher) {
      if (row_.has_hard()) hard += this->sum_hard(step, student);
      only_kept(step, student, teacher);
      float few = 0, few_divergences = 0, few_from_student = 0;
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) {
        if (!is_there(student[j], teacher[j])) continue;
        const Class c = of(student[j], teacher[j]);
        few = fmaf(c.p, c.w, few);
        few_divergences += divergence(c);
        if (beta_ != 0) few_from_student = fmaf(c.q, beside_mixture(c), few_from_student);
      }
      sum += few;
      divergences += few_divergences;
      from_student += few_from_student;
    });
    const Second mine{warp_sum(sum), warp_sum(divergences), warp_sum(from_student),
                      warp_sum(hard + this->sum_tail()), row_.student_label()};
    const Sums total = row_.total(mine.packed(), [&](Sums& sums) {
      row_.set_hard_at_label(sums.hard / this->hard_sum(sums.hard, sums.label));
    });
    return Second::of(total);
  }

  __device__ void write_gradient(float weight, float hard) {
    each_step([&](int step, float* student, float* teacher) {
      float values[kPerLane] = {};
      if (row_.hard_weight() != 0) this->add_hard(step, student, hard, values);
      if (row_.soft_weight() != 0) {
        only_kept(step, student, teacher);
#pragma unroll
        for (int j = 0; j < kPerLane; ++j) {
          if (!is_there(student[j], teacher[j])) continue;
          values[j] = fmaf(gradient(of(student[j], teacher[j])), weight, values[j]);
        }
      }
      row_.add_label(step, values);
      store_packed(row_.dstudent(), step, pack(row_.dstudent().dtype, values));
    });
  }

  static constexpr int kTerms = 12;  // each series has so many, for |x| < 0.29
  const float unit_;                 // what the teacher's logits are multiples of
  const float inverse_, beta_;
  float mean_ = 0, mean_error_ = 0, per_p_ = 1, from_student_ = 0;
};

}  // namespace fastkd::cuda
