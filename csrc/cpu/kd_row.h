// One row of the loss: each logit is read from memory once, its exponentials stay in buffers that
// fit the cache, and the gradient is combined from them. Formulas: fastkd/spec.py.
#pragma once
#include <memory>

#include "select.h"

namespace fastkd::cpu {

constexpr int64_t kChunk = 1024;  // columns: 16 KiB of float logits and exponentials, half an L1

// The working memory of one thread, for rows of `vocab_size` columns.
template <class T>
struct Workspace {
  explicit Workspace(int64_t vocab_size)
      : vocab_size(vocab_size),
        stride((vocab_size + 2 * 64 + 15) / 16 * 16),
        chunks((vocab_size + kChunk - 1) / kChunk),
        memory(new T[4 * stride + 4 * kChunk]),
        frames(new Frame<T>[2 * chunks]) {}

  T* a() { return memory.get(); }
  T* b() { return a() + stride; }
  T* h() { return b() + stride; }        // exponentials of the hard term
  T* teacher() { return h() + stride; }  // the converted teacher, where classes are selected
  T* scratch(int k) { return teacher() + stride + k * kChunk; }
  Frame<T>* soft_frames() { return frames.get(); }
  Frame<T>* hard_frames() { return frames.get() + chunks; }

  int64_t vocab_size, stride, chunks;
  std::unique_ptr<T[]> memory;
  std::unique_ptr<Frame<T>[]> frames;
};

// The sums of a whole row, relative to the frame of its last chunk, in double.
template <class T>
struct RowSums {
  double lead = 0, other = 0, difference = 0, excess = 0, cross = 0;
  bool forbidden = false;
  bool moved = false;    // to another frame, so that chunks differ in theirs
  bool inexact = false;  // `difference` and `excess` lost digits in a move
  Frame<T> frame;

  // Moves the sums to a new frame. With D = the shift of x, e_other / e_lead shrinks by exp(-D):
  // difference' = w (difference + expm1(-D) other), and so on; nothing cancels for small D.
  void move(Frame<T> to, Temperatures<T> inverse) {
    if (lead != 0 || other != 0) {
      const double by_lead = (double{to.lead} - frame.lead) * inverse.lead;
      const double by_other = (double{to.other} - frame.other) * inverse.other;
      const double D = by_other - by_lead;
      moved |= !(std::fabs(D) < 1e-3);
      const double w = std::exp(-by_lead);
      if (std::isfinite(D) && w > 0) {
        const double ratio = std::expm1(-D);
        inexact |= std::fabs(D) > 2;
        cross = w * (cross + lead * D);
        excess = w * (excess + lead * (D + ratio) + ratio * difference);
        difference = w * (difference + ratio * other);
      } else {  // one side has had no finite logit so far
        difference = std::exp(-by_other) * other - w * lead;
        excess = w > 0 ? w * excess : difference;
        cross = 0;  // nothing, or infinite and counted as such
        moved = inexact = true;
      }
      lead *= w;
      other *= std::exp(-by_other);
    }
    frame = to;
  }

  void add(const Sums<T>& chunk) {
    lead += chunk.lead;
    other += chunk.other;
    difference += chunk.difference;
    excess += chunk.excess;
    cross += chunk.cross;
    forbidden |= chunk.forbidden;
  }
};

template <class T>
class Row {
 public:
  FASTKD_INLINE Row(const KdRows& call, Workspace<T>& work, int64_t row)
      : call_(call), work_(work), row_(row), vocab_(call.vocab_size) {
    student_inverse_ = vector(call.student_inv_temperature);
    teacher_inverse_ = vector(call.teacher_inv_temperature);
    soft_weight_ = call.soft_weight ? vector(call.soft_weight) : T(0);
    hard_weight_ = call.hard_weight ? vector(call.hard_weight) : T(0);
  }

  FASTKD_INLINE void run() {
    T soft = 0, hard = 0;
    if (soft_weight_ == 0 && hard_weight_ == 0) {
      fill(T(0));
    } else if (call_.labels && !(label() >= 0 && label() < vocab_)) {
      soft = call_.soft_weight ? kNaN<T> : T(0);
      hard = call_.hard_weight ? kNaN<T> : T(0);
      fill(kNaN<T>);
    } else {
      compute(soft, hard);
    }
    static_cast<T*>(call_.soft)[row_] = soft;
    static_cast<T*>(call_.hard)[row_] = hard;
  }

 private:
  T vector(const void* values) const { return static_cast<const T*>(values)[row_]; }
  int64_t label() const { return call_.labels[row_]; }
  bool wants_gradient() const { return call_.dstudent.data != nullptr; }

  FASTKD_INLINE void compute(T& soft, T& hard) {
    pruned_ = call_.soft_weight && call_.keep < vocab_;
    reverse_ = call_.beta == 1;
    mixed_ = call_.beta > 0 && call_.beta < 1;
    // The hard term's exponentials are the student's own at T = 1 over all classes.
    share_ = call_.hard_weight && call_.soft_weight && soft_weight_ != 0 && !pruned_ &&
             student_inverse_ == 1;
    keep_ = mixed_                                   ? Keep::kMixture
            : !wants_gradient() || soft_weight_ == 0 ? Keep::kNothing
            : reverse_                               ? Keep::kReverse
                                                     : Keep::kForward;
    inverse_ = reverse_ ? Temperatures<T>{student_inverse_, teacher_inverse_}
                        : Temperatures<T>{teacher_inverse_, student_inverse_};
    T label_logit = 0;
    if (call_.hard_weight) {
      label_logit = *load_columns<T>(call_.student, row_, label(), 1, work_.scratch(0));
    }

    bool lost = pruned_ && !prune();
    if (lost) pruned_ = false;  // the hard term is still to be computed
    lost |= !read();

    Coefficients gradient;
    if (call_.soft_weight) {
      lost |= !(sums_.lead > 0) || !(sums_.other > 0);
      soft = lost ? kNaN<T> : finish_soft(gradient);
    }
    if (call_.hard_weight) {
      const double sum = !share_ ? hard_sum_ : reverse_ ? sums_.lead : sums_.other;
      const T frame = !share_ ? hard_frame_ : reverse_ ? sums_.frame.lead : sums_.frame.other;
      hard = static_cast<T>(std::log(sum) + (double{frame} - double{label_logit}));
      if (!(sum > 0)) hard = kNaN<T>;
    }
    if (!wants_gradient()) return;
    const bool soft_bad = std::isnan(soft) || (reverse_ && std::isinf(soft));
    if ((soft_weight_ != 0 && soft_bad) || (hard_weight_ != 0 && std::isnan(hard))) {
      fill(kNaN<T>);
    } else {
      write_gradient(gradient);
    }
  }

  // Every column once: exponentials to the buffers, sums to the row. False where it holds a NaN.
  FASTKD_INLINE bool read() {
    bool valid = true;
    for (int64_t begin = 0, index = 0; begin < vocab_; begin += kChunk, ++index) {
      const int64_t n = std::min(kChunk, vocab_ - begin);
      const T* student = load_columns<T>(call_.student, row_, begin, n, work_.scratch(0));
      if (call_.hard_weight && !share_) read_hard(student, begin, n, index);
      if (!call_.soft_weight) continue;
      const T* teacher = load_teacher(begin, n);
      if (begin == 0 && !pruned_) sums_.frame = frame_of(student, teacher, n);
      sums_.add(read_soft(student, teacher, begin, n, valid));
      work_.soft_frames()[index] = sums_.frame;
      balance(2);
    }
    if (call_.soft_weight) read_again(valid);
    return valid;
  }

  FASTKD_INLINE const T* load_teacher(int64_t begin, int64_t n) {
    return teacher_row_ ? teacher_row_ + begin
                        : load_columns<T>(call_.teacher, row_, begin, n, work_.scratch(1));
  }

  // e_other - e_lead is kept, q - p wanted: the two agree where both sums are alike, and where
  // Z_other falls far below Z_lead, q is lost in the rounding of e_lead. So the frame of `other` is
  // moved to where the sums seen so far are alike.
  FASTKD_INLINE void balance(double alike) {
    const double lead = sums_.lead, other = sums_.other;
    if (!(lead > alike * other || other > alike * lead)) return;
    Frame<T> frame = sums_.frame;
    frame.other += static_cast<T>(std::log(other / lead) / inverse_.other);
    if (lead > 0 && other > 0 && std::isfinite(frame.other) && std::isfinite(frame.lead)) {
      sums_.move(frame, inverse_);
    }
  }

  // What was read too early for the frame that the row came to, mostly its first chunk or none. All
  // of it where the distributions turned out to agree, so that the sums have to be exact.
  FASTKD_INLINE void read_again(bool& valid) {
    constexpr double kTolerable = 3;  // costs one or two bits of q at worst
    const double log_ratio = std::log(sums_.other / sums_.lead);
    const bool all =
        sums_.cross / sums_.lead + log_ratio < 0.01 && (sums_.moved || std::fabs(log_ratio) > 0.01);
    const bool kept = keep_ == Keep::kForward || keep_ == Keep::kMixture;
    if (all) {
      balance(1);
      sums_ = {.frame = sums_.frame};
    }
    if (!all && !(kept && sums_.moved)) return;
    for (int64_t begin = 0, index = 0; begin < vocab_; begin += kChunk, ++index) {
      Frame<T>& frame = work_.soft_frames()[index];
      if (!all) {
        const Scales scale = scales(frame);
        if (!(scale.other > kTolerable * scale.lead)) continue;
      }
      const int64_t n = std::min(kChunk, vocab_ - begin);
      const T* student = load_columns<T>(call_.student, row_, begin, n, work_.scratch(0));
      const Sums<T> chunk = read_soft(student, load_teacher(begin, n), begin, n, valid);
      if (all) sums_.add(chunk);
      frame = sums_.frame;
    }
  }

  FASTKD_INLINE Frame<T> frame_of(const T* student, const T* teacher, int64_t n) const {
    const T of_student = maximum(student, n), of_teacher = maximum(teacher, n);
    return reverse_ ? Frame<T>{of_student, of_teacher} : Frame<T>{of_teacher, of_student};
  }

  // The threshold of the classes kept, and a frame: the logits of both sides where the teacher is
  // large. False where a NaN leaves the teacher without an order.
  FASTKD_INLINE bool prune() {
    teacher_row_ = load_columns<T>(call_.teacher, row_, 0, vocab_, work_.teacher());
    threshold_ = kth_largest(teacher_row_, vocab_, call_.keep, work_.a());
    if (std::isnan(threshold_)) return false;
    int64_t top = 0;
    const int64_t stride = vocab_ / 256 + 1;
    for (int64_t i = 0; i < vocab_; i += stride) {
      if (teacher_row_[i] > teacher_row_[top]) top = i;
    }
    T beside;
    beside = *load_columns<T>(call_.student, row_, top, 1, &beside);
    if (!std::isfinite(beside)) beside = -kInf<T>;  // of a class that is perhaps pruned
    sums_.frame =
        reverse_ ? Frame<T>{beside, teacher_row_[top]} : Frame<T>{teacher_row_[top], beside};
    return true;
  }

  // The sums of one chunk in the row's frame, its exponentials to the buffers.
  FASTKD_INLINE Sums<T> read_soft(const T* student, const T* teacher, int64_t begin, int64_t n,
                                  bool& valid) {
    Sums<T> chunk;
    guarded_ |= !std::isfinite(sums_.frame.lead) || !std::isfinite(sums_.frame.other);
    if (!guarded_) {
      chunk = run_exponentials(student, teacher, begin, n);
      if (chunk.too_high && !pruned_ && outgrown(frame_of(student, teacher, n))) {
        chunk = run_exponentials(student, teacher, begin, n);
      }
      guarded_ = chunk.too_high || !std::isfinite(chunk.excess) ||
                 !std::isfinite(chunk.lead + chunk.other);
      if (chunk.probe != 0) valid &= !has_nan(student, n);
    }
    if (guarded_) {
      if (pruned_) {
        valid &= !has_nan(student, n);
        mask(student, teacher, n, threshold_, work_.scratch(2), work_.scratch(3));
        student = work_.scratch(2), teacher = work_.scratch(3);
      }
      outgrown(frame_of(student, teacher, n));
      chunk = run_guarded(reverse_ ? student : teacher, reverse_ ? teacher : student, begin, n);
    }
    return chunk;
  }

  // Moves the row to a new frame where a chunk's maximum is far above the old one.
  FASTKD_INLINE bool outgrown(Frame<T> max) {
    constexpr T kFar = 20;  // e < 2^29, far from overflow also in sums
    const Frame<T> old = sums_.frame;
    const auto grow = [](T old, T max, T inverse) __attribute__((always_inline)) {
      return (max - old) * inverse > kFar || !(old > -kInf<T>) ? max : old;
    };
    const Frame<T> frame{grow(old.lead, max.lead, inverse_.lead),
                         grow(old.other, max.other, inverse_.other)};
    if (frame.lead == old.lead && frame.other == old.other) return false;
    sums_.move(frame, inverse_);
    return true;
  }

  FASTKD_INLINE Sums<T> run_exponentials(const T* student, const T* teacher, int64_t begin,
                                         int64_t n) {
    T *a = work_.a() + begin, *b = work_.b() + begin;
    const auto run =
        [&]<Keep kKeep, bool kTeacherLeads, bool kPruned>() __attribute__((always_inline)) {
          const T* lead = kTeacherLeads ? teacher : student;
          const T* other = kTeacherLeads ? student : teacher;
          return inverse_.direct(sums_.frame)
                     ? exponentials<kKeep, kPruned, kTeacherLeads, true>(
                           lead, other, n, sums_.frame, inverse_, threshold_, a, b)
                     : exponentials<kKeep, kPruned, kTeacherLeads, false>(
                           lead, other, n, sums_.frame, inverse_, threshold_, a, b);
        };
    const auto pick = [&]<Keep kKeep, bool kTeacherLeads>() __attribute__((always_inline)) {
      return pruned_ ? run.template operator()<kKeep, kTeacherLeads, true>()
                     : run.template operator()<kKeep, kTeacherLeads, false>();
    };
    switch (keep_) {
      case Keep::kForward:
      case Keep::kMixture:
        return pick.template operator()<Keep::kForward, true>();
      case Keep::kReverse:
        return pick.template operator()<Keep::kReverse, false>();
      default:
        return reverse_ ? pick.template operator()<Keep::kNothing, false>()
                        : pick.template operator()<Keep::kNothing, true>();
    }
  }

  FASTKD_INLINE Sums<T> run_guarded(const T* lead, const T* other, int64_t begin, int64_t n) {
    Frame<T> frame = sums_.frame;  // a side without a finite logit so far: any frame serves
    if (frame.lead == -kInf<T>) frame.lead = 0;
    if (frame.other == -kInf<T>) frame.other = 0;
    T *a = work_.a() + begin, *b = work_.b() + begin;
    const auto run = [&]<Keep kKeep>() __attribute__((always_inline)) {
      return inverse_.direct(frame)
                 ? exponentials_guarded<kKeep, true>(lead, other, n, frame, inverse_, a, b)
                 : exponentials_guarded<kKeep, false>(lead, other, n, frame, inverse_, a, b);
    };
    switch (keep_) {
      case Keep::kForward:
        return run.template operator()<Keep::kForward>();
      case Keep::kReverse:
        return run.template operator()<Keep::kReverse>();
      case Keep::kMixture:
        return run.template operator()<Keep::kMixture>();
      default:
        return run.template operator()<Keep::kNothing>();
    }
  }

  FASTKD_INLINE void read_hard(const T* student, int64_t begin, int64_t n, int64_t index) {
    T* e = wants_gradient() && hard_weight_ != 0 ? work_.h() + begin : nullptr;
    if (begin == 0) hard_frame_ = maximum(student, n);
    Sum<T> chunk = exponential(student, n, hard_frame_, T(1), e);
    if (chunk.max - hard_frame_ > 20 || !(hard_frame_ > -kInf<T>)) {
      if (chunk.max > hard_frame_) {
        hard_sum_ *= std::exp(double{hard_frame_} - double{chunk.max});
        hard_frame_ = chunk.max;
      }
      const T frame = hard_frame_ > -kInf<T> ? hard_frame_ : T(0);
      chunk = exponential(student, n, frame, T(1), e);
    }
    hard_sum_ += static_cast<double>(chunk.sum);
    work_.hard_frames()[index].lead = hard_frame_;
  }

  // gradient = ca a + cb b, with the frames of a chunk and of the row: see `coefficients`.
  struct Coefficients {
    double log_ratio = 0;     // ln(Z_other / Z_lead) in the row's frame
    double divergence = 0;    // unweighted
    double from_student = 0;  // KL(q || m)
  };
  struct Factors {
    T a, b, h;
  };

  FASTKD_INLINE T finish_soft(Coefficients& gradient) {
    // `other` and `difference` were rounded apart from each other: one has to follow.
    double ratio = sums_.difference / sums_.lead;  // Z_other / Z_lead - 1
    const bool alike = !sums_.inexact && std::fabs(ratio) < 0.5;
    if (alike) {
      sums_.other = sums_.lead * (1 + ratio);
    } else {
      ratio = sums_.other / sums_.lead - 1;
    }
    gradient.log_ratio = std::fabs(ratio) < 0.5 ? std::log1p(ratio) : std::log(1 + ratio);
    if (mixed_) {
      Mixture<double> total;
      for (int64_t begin = 0, index = 0; begin < vocab_; begin += kChunk, ++index) {
        const int64_t n = std::min(kChunk, vocab_ - begin);
        const Scales scale = scales(work_.soft_frames()[index]);
        const Mixture<T> chunk =
            mixture(work_.a() + begin, work_.b() + begin, n, static_cast<T>(call_.beta),
                    static_cast<T>(scale.other), static_cast<T>(scale.lead),
                    static_cast<T>(scale.other - scale.lead));
        total.from_teacher += chunk.from_teacher;
        total.from_student += chunk.from_student;
      }
      gradient.from_student = total.from_student;
      gradient.divergence = call_.beta * total.from_teacher + (1 - call_.beta) * total.from_student;
    } else if (sums_.forbidden) {
      gradient.divergence = kInf<double>;
    } else {
      // E[x] + ln(1 + ratio), or, where that would cancel, with excess = cross + ratio Z_lead:
      // excess / Z_lead + ln(1 + ratio) - ratio, the difference by its series.
      const double r = ratio;
      if (!alike) {
        gradient.divergence = sums_.cross / sums_.lead + gradient.log_ratio;
      } else {
        const double bracket = std::fabs(r) < 1e-3
                                   ? -r * r * (0.5 - r * (1.0 / 3 - r * (0.25 - r * 0.2)))
                                   : gradient.log_ratio - r;
        gradient.divergence = sums_.excess / sums_.lead + bracket;
      }
      gradient.divergence = std::fmax(gradient.divergence, 0.0);
    }
    return static_cast<T>(gradient.divergence);
  }

  struct Scales {
    double lead, other;
  };
  // What turns a chunk's exponentials into probabilities.
  FASTKD_INLINE Scales scales(Frame<T> frame) const {
    const double lead = (double{frame.lead} - sums_.frame.lead) * inverse_.lead;
    const double other = (double{frame.other} - sums_.frame.other) * inverse_.other;
    return {std::exp(lead) / sums_.lead, std::exp(other) / sums_.other};
  }

  // Forward: q - p = scale.other (a + b) - scale.lead a. Reverse: q (ln(q/p) - D) with
  // ln(q/p) = x + shift + log_ratio. Mixture: (1 - beta) q (ln(q/m) - KL(q || m)).
  FASTKD_INLINE Factors coefficients(int64_t index, const Coefficients& gradient) const {
    Factors factors{0, 0, 0};
    const double weight = double{soft_weight_} * student_inverse_;
    if (soft_weight_ != 0) {
      const Frame<T> frame = work_.soft_frames()[index];
      const Scales scale = scales(frame);
      double a = 0, b = 0;
      if (mixed_) {
        b = (1 - call_.beta) * weight;
        a = -b * gradient.from_student + (share_ ? double{hard_weight_} : 0.0);
      } else if (!reverse_) {
        const double hard = share_ ? double{hard_weight_} * scale.other : 0.0;
        a = weight * (scale.other - scale.lead) + hard;
        b = weight * scale.other + hard;
      } else if (scale.lead > 0) {
        const double shift = (double{frame.lead} - sums_.frame.lead) * inverse_.lead -
                             (double{frame.other} - sums_.frame.other) * inverse_.other;
        b = weight * scale.lead;
        a = b * (shift + gradient.log_ratio - gradient.divergence) +
            (share_ ? double{hard_weight_} * scale.lead : 0.0);
      }
      factors.a = static_cast<T>(a);
      factors.b = static_cast<T>(b);
    }
    if (hard_weight_ != 0 && !share_) {
      const double frame = double{work_.hard_frames()[index].lead} - double{hard_frame_};
      factors.h = static_cast<T>(double{hard_weight_} * std::exp(frame) / hard_sum_);
    }
    return factors;
  }

  FASTKD_INLINE void write_gradient(const Coefficients& gradient) {
    dispatch(call_.dstudent.dtype, [&](auto* stored) __attribute__((always_inline)) {
      using Out = std::remove_pointer_t<decltype(stored)>;
      Out* out = static_cast<Out*>(call_.dstudent.data) + call_.dstudent.offset(row_);
      const bool own_hard = hard_weight_ != 0 && !share_;
      for (int64_t begin = 0, index = 0; begin < vocab_; begin += kChunk, ++index) {
        const int64_t n = std::min(kChunk, vocab_ - begin);
        const Factors f = coefficients(index, gradient);
        const T *a = work_.a() + begin, *b = work_.b() + begin, *h = work_.h() + begin;
        if (soft_weight_ == 0) {
          combine<false, true>(a, b, h, n, f.a, f.b, f.h, out + begin);
        } else if (own_hard) {
          combine<true, true>(a, b, h, n, f.a, f.b, f.h, out + begin);
        } else {
          combine<true, false>(a, b, h, n, f.a, f.b, f.h, out + begin);
        }
        if (hard_weight_ != 0 && label() >= begin && label() < begin + n) {
          // Before the rounding of the store: at the label the two terms nearly cancel.
          const int64_t i = label() - begin;
          T value = 0;
          if (soft_weight_ != 0) value = f.a * a[i] + f.b * b[i];
          if (own_hard) value += f.h * h[i];
          out[begin + i] = store<Out>(value - hard_weight_);
        }
      }
      for (int64_t i = vocab_; i < call_.dstudent.width; ++i) out[i] = store<Out>(T(0));
    });
  }

  // The same value in every class that takes part, 0 beyond.
  FASTKD_INLINE void fill(T value) {
    if (!wants_gradient()) return;
    dispatch(call_.dstudent.dtype, [&](auto* stored) __attribute__((always_inline)) {
      using Out = std::remove_pointer_t<decltype(stored)>;
      Out* out = static_cast<Out*>(call_.dstudent.data) + call_.dstudent.offset(row_);
      std::fill(out, out + vocab_, store<Out>(value));
      std::fill(out + vocab_, out + call_.dstudent.width, store<Out>(T(0)));
    });
  }

  const KdRows& call_;
  Workspace<T>& work_;
  const int64_t row_, vocab_;
  T student_inverse_, teacher_inverse_, soft_weight_, hard_weight_;
  Temperatures<T> inverse_;
  bool reverse_ = false, mixed_ = false, pruned_ = false;
  Keep keep_ = Keep::kNothing;
  const T* teacher_row_ = nullptr;  // converted whole, where classes are pruned
  T threshold_ = 0;                 // the smallest teacher logit kept
  bool share_ = false;              // the hard term uses the soft term's exponentials
  bool guarded_ = false;            // an infinity was met in this row
  RowSums<T> sums_;
  double hard_sum_ = 0;
  T hard_frame_ = -kInf<T>;
};

}  // namespace fastkd::cpu
