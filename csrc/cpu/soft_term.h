// The soft term of one row: the exponentials of both sides and their sums, chunk by chunk, then the
// divergence and what its gradient is made of. Formulas: fastkd/spec.py.
#pragma once
#include "select.h"
#include "workspace.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
class SoftTerm {
 public:
  // The gradient of a column in terms of what is kept of it: a * work.a() + b * work.b().
  struct Factors {
    T a = 0, b = 0;
  };

  SoftTerm(const KdRows& call, Workspace<T>& work, int64_t row, int64_t after, T weight)
      : call_(call),
        work_(work),
        row_(row),
        after_(after),
        columns_(call.vocab_size),
        weight_(weight),
        student_inverse_(static_cast<const T*>(call.student_inv_temperature)[row]),
        reverse_(call.beta == 1),
        mixed_(call.beta > 0 && call.beta < 1) {
    const T teacher_inverse = static_cast<const T*>(call.teacher_inv_temperature)[row];
    inverse_ = reverse_ ? Temperatures<T>{student_inverse_, teacher_inverse}
                        : Temperatures<T>{teacher_inverse, student_inverse_};
    keep_ = mixed_                                ? Keep::kMixture
            : !call.dstudent.data || weight_ == 0 ? Keep::kNothing
            : reverse_                            ? Keep::kReverse
                                                  : Keep::kForward;
  }

  // The classes that take part. To be called before any is read.
  void prune() {
    if (call_.keep >= call_.vocab_size) return;
    teacher_ = load_columns<T>(call_.teacher, row_, 0, columns_, work_.teacher());
    threshold_ = kth_largest(teacher_, columns_, call_.keep, work_.a(), work_.b());
    if (std::isnan(threshold_)) {  // a NaN leaves the teacher without an order
      valid_ = false;
    } else if (!gather()) {
      mask_from(threshold_);
    }
  }

  // One chunk of the student's logits, in order; none where the classes kept were gathered.
  void read(const T* student, int64_t begin, int64_t n) {
    if (!valid_) return;
    const T* teacher = load_teacher(begin, n);
    if (begin == 0 && !masked_) sums_.frame = frame_of(student, teacher, n);
    sums_.add(read_chunk(student, teacher, begin, n));
    work_.soft_frames()[begin / kChunk] = sums_.frame;
    balance(2);
  }

  // The unweighted divergence, NaN where a logit is NaN or a side has no finite one.
  T finish() {
    if (!valid_) return kNaN<T>;
    if (student_) read_columns(Columns::kFirst);
    read_again();
    if (!valid_ || !(sums_.lead > 0) || !(sums_.other > 0)) return kNaN<T>;
    return divergence();
  }

  // Columns of the buffers, and the classes they are where they are not all: null.
  int64_t columns() const { return columns_; }
  const int32_t* classes() const { return student_ ? work_.kept_columns() : nullptr; }

  // The student's own exponentials, for a hard term that shares them.
  double student_sum() const { return reverse_ ? sums_.lead : sums_.other; }
  T student_frame() const { return reverse_ ? sums_.frame.lead : sums_.frame.other; }

  // Forward: q - p = scale.other (a + b) - scale.lead a. Reverse: q (ln(q/p) - D) with
  // ln(q/p) = x + shift + log_ratio. Mixture: (1 - beta) q (ln(q/m) - KL(q || m)). All times the
  // weight, and `hard_weight` times q besides.
  Factors factors(int64_t index, double hard_weight) const {
    if (weight_ == 0) return {};
    const double weight = double{weight_} * student_inverse_;
    const Frame<T> frame = work_.soft_frames()[index];
    const Scales scale = scales(frame);
    double a = 0, b = 0;
    if (mixed_) {
      b = (1 - call_.beta) * weight;
      a = -b * from_student_ + hard_weight;
    } else if (!reverse_) {
      const double hard = hard_weight * scale.other;
      a = weight * (scale.other - scale.lead) + hard;
      b = weight * scale.other + hard;
    } else if (scale.lead > 0) {
      const double shift = (double{frame.lead} - sums_.frame.lead) * inverse_.lead -
                           (double{frame.other} - sums_.frame.other) * inverse_.other;
      b = weight * scale.lead;
      a = b * (shift + log_ratio_ - divergence_) + hard_weight * scale.lead;
    }
    return {static_cast<T>(a), static_cast<T>(b)};
  }

 private:
  // Few classes are taken out of their rows: the others cost no exponential. False where ties make
  // them many.
  bool gather() {
    const int64_t few = columns_ / 32;
    if (call_.keep > few) return false;
    int32_t* classes = work_.kept_columns();
    const int64_t count = columns_from(teacher_, columns_, threshold_, few, classes);
    if (count > few) return false;
    T* teacher = work_.kept_teacher();
    for (int64_t i = 0; i < count; ++i) teacher[i] = teacher_[classes[i]];
    student_ = gather_columns<T>(call_.student, row_, classes, count, work_.kept_student());
    teacher_ = teacher;
    columns_ = count;
    valid_ = !row_has_nan();
    return true;
  }

  // A NaN in the student's logits, of which this is then the only reading.
  bool row_has_nan() const {
    bool found = false;
    dispatch(call_.student.dtype, [&](auto* stored) {
      using Stored = std::remove_pointer_t<decltype(stored)>;
      const auto* student =
          static_cast<const Stored*>(call_.student.data) + call_.student.offset(row_);
      found = has_nan_stored(student, call_.vocab_size, ahead(0));
    });
    return found;
  }

  // The others stay where they are and are passed over. The frame: the logits of both sides where
  // the teacher is large.
  void mask_from(T threshold) {
    masked_ = true;
    int64_t top = 0;
    const int64_t stride = columns_ / 256 + 1;
    for (int64_t i = 0; i < columns_; i += stride) {
      if (teacher_[i] > teacher_[top]) top = i;
    }
    T beside;
    beside = *load_columns<T>(call_.student, row_, top, 1, &beside);
    if (!std::isfinite(beside)) beside = -kInf<T>;  // of a class that is perhaps pruned
    sums_.frame = reverse_ ? Frame<T>{beside, teacher_[top]} : Frame<T>{teacher_[top], beside};
  }

  const T* load_teacher(int64_t begin, int64_t n) {
    return teacher_ ? teacher_ + begin
                    : load_columns<T>(call_.teacher, row_, begin, n, work_.scratch(1));
  }

  // e_other - e_lead is kept, q - p wanted: the two agree where both sums are alike, and where
  // Z_other falls far below Z_lead, q is lost in the rounding of e_lead. So the frame of `other` is
  // moved to where the sums seen so far are alike.
  void balance(double alike) {
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
  void read_again() {
    const double log_ratio = std::log(sums_.other / sums_.lead);
    const bool kept = keep_ == Keep::kForward || keep_ == Keep::kMixture;
    if (sums_.cross / sums_.lead + log_ratio < 0.01 &&
        (sums_.moved || std::fabs(log_ratio) > 0.01)) {
      balance(1);
      sums_ = {.frame = sums_.frame};
      read_columns(Columns::kAll);
    } else if (kept && sums_.moved) {
      read_columns(Columns::kUnbalanced);
    }
  }

  enum class Columns { kFirst, kAll, kUnbalanced };

  void read_columns(Columns which) {
    constexpr double kTolerable = 3;  // costs one or two bits of q at worst
    for (int64_t begin = 0, index = 0; begin < columns_; begin += kChunk, ++index) {
      Frame<T>& frame = work_.soft_frames()[index];
      if (which == Columns::kUnbalanced) {
        const Scales scale = scales(frame);
        if (!(scale.other > kTolerable * scale.lead)) continue;
      }
      const int64_t n = std::min(kChunk, columns_ - begin);
      const T* student = student_
                             ? student_ + begin
                             : load_columns<T>(call_.student, row_, begin, n, work_.scratch(0));
      const T* teacher = load_teacher(begin, n);
      if (which == Columns::kFirst && begin == 0) sums_.frame = frame_of(student, teacher, n);
      const Sums<T> chunk = read_chunk(student, teacher, begin, n);
      if (which != Columns::kUnbalanced) sums_.add(chunk);
      frame = sums_.frame;
      if (which == Columns::kFirst) balance(2);
    }
  }

  Frame<T> frame_of(const T* student, const T* teacher, int64_t n) const {
    const T of_student = maximum(student, n), of_teacher = maximum(teacher, n);
    return reverse_ ? Frame<T>{of_student, of_teacher} : Frame<T>{of_teacher, of_student};
  }

  // The sums of one chunk in the row's frame, its exponentials to the buffers.
  Sums<T> read_chunk(const T* student, const T* teacher, int64_t begin, int64_t n) {
    Sums<T> chunk;
    guarded_ |= !std::isfinite(sums_.frame.lead) || !std::isfinite(sums_.frame.other);
    if (!guarded_) {
      chunk = run_exponentials(student, teacher, begin, n);
      if (chunk.too_high && !masked_ && outgrown(frame_of(student, teacher, n))) {
        chunk = run_exponentials(student, teacher, begin, n);
      }
      guarded_ = chunk.too_high || !std::isfinite(chunk.excess) ||
                 !std::isfinite(chunk.lead + chunk.other);
      if (chunk.probe != 0) valid_ &= !has_nan(student, n);
    }
    if (guarded_) {
      if (masked_) {
        valid_ &= !has_nan(student, n);
        mask(student, teacher, n, threshold_, work_.scratch(2), work_.scratch(3));
        student = work_.scratch(2), teacher = work_.scratch(3);
      }
      outgrown(frame_of(student, teacher, n));
      chunk = run_guarded(reverse_ ? student : teacher, reverse_ ? teacher : student, begin, n);
    }
    return chunk;
  }

  // Moves the row to a new frame where a chunk's maximum is far above the old one.
  bool outgrown(Frame<T> max) {
    constexpr T kFar = 20;  // e < 2^29, far from overflow also in sums
    const Frame<T> old = sums_.frame;
    const auto grow = [](T old, T max, T inverse) {
      return (max - old) * inverse > kFar || !(old > -kInf<T>) ? max : old;
    };
    const Frame<T> frame{grow(old.lead, max.lead, inverse_.lead),
                         grow(old.other, max.other, inverse_.other)};
    if (frame.lead == old.lead && frame.other == old.other) return false;
    sums_.move(frame, inverse_);
    return true;
  }

  // The student's later columns, and the teacher's: of the next row where this one has been read.
  Ahead ahead(int64_t begin) const {
    return {teacher_ ? call_.teacher.address(after_, begin)
                     : call_.teacher.address(row_, begin + kAhead),
            call_.student.address(row_, begin + kAhead), call_.teacher.element_bytes(),
            call_.student.element_bytes()};
  }

  Sums<T> run_exponentials(const T* student, const T* teacher, int64_t begin, int64_t n) {
    T *a = work_.a() + begin, *b = work_.b() + begin;
    const Ahead ahead = this->ahead(begin);
    const auto run = [&]<Keep kKeep, bool kTeacherLeads, bool kPruned>() {
      const T* lead = kTeacherLeads ? teacher : student;
      const T* other = kTeacherLeads ? student : teacher;
      return inverse_.direct(sums_.frame)
                 ? exponentials<kKeep, kPruned, kTeacherLeads, true>(
                       lead, other, n, sums_.frame, inverse_, threshold_, ahead, a, b)
                 : exponentials<kKeep, kPruned, kTeacherLeads, false>(
                       lead, other, n, sums_.frame, inverse_, threshold_, ahead, a, b);
    };
    const auto pick = [&]<Keep kKeep, bool kTeacherLeads>() {
      return masked_ ? run.template operator()<kKeep, kTeacherLeads, true>()
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

  Sums<T> run_guarded(const T* lead, const T* other, int64_t begin, int64_t n) {
    Frame<T> frame = sums_.frame;  // a side without a finite logit so far: any frame serves
    if (frame.lead == -kInf<T>) frame.lead = 0;
    if (frame.other == -kInf<T>) frame.other = 0;
    T *a = work_.a() + begin, *b = work_.b() + begin;
    const auto run = [&]<Keep kKeep>() {
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

  T divergence() {
    // `other` and `difference` were rounded apart from each other: one has to follow.
    double ratio = sums_.difference / sums_.lead;  // Z_other / Z_lead - 1
    const bool alike = !sums_.inexact && std::fabs(ratio) < 0.5;
    if (alike) {
      sums_.other = sums_.lead * (1 + ratio);
    } else {
      ratio = sums_.other / sums_.lead - 1;
    }
    log_ratio_ = std::fabs(ratio) < 0.5 ? std::log1p(ratio) : std::log(1 + ratio);
    if (mixed_) {
      Mixture<double> total;
      for (int64_t begin = 0, index = 0; begin < columns_; begin += kChunk, ++index) {
        const int64_t n = std::min(kChunk, columns_ - begin);
        const Scales scale = scales(work_.soft_frames()[index]);
        const Mixture<T> chunk =
            mixture(work_.a() + begin, work_.b() + begin, n, static_cast<T>(call_.beta),
                    static_cast<T>(scale.other), static_cast<T>(scale.lead),
                    static_cast<T>(scale.other - scale.lead));
        total.from_teacher += chunk.from_teacher;
        total.from_student += chunk.from_student;
      }
      from_student_ = total.from_student;
      divergence_ = call_.beta * total.from_teacher + (1 - call_.beta) * total.from_student;
    } else if (sums_.forbidden) {
      divergence_ = kInf<double>;
    } else if (!alike) {
      divergence_ = std::fmax(sums_.cross / sums_.lead + log_ratio_, 0.0);
    } else {
      // The same without its cancellation: excess = cross + ratio Z_lead, so it is
      // excess / Z_lead + ln(1 + ratio) - ratio, the difference by its series.
      const double r = ratio;
      const double bracket = std::fabs(r) < 1e-3
                                 ? -r * r * (0.5 - r * (1.0 / 3 - r * (0.25 - r * 0.2)))
                                 : log_ratio_ - r;
      divergence_ = std::fmax(sums_.excess / sums_.lead + bracket, 0.0);
    }
    return static_cast<T>(divergence_);
  }

  struct Scales {
    double lead, other;
  };
  // What turns a chunk's exponentials into probabilities.
  Scales scales(Frame<T> frame) const {
    const double lead = (double{frame.lead} - sums_.frame.lead) * inverse_.lead;
    const double other = (double{frame.other} - sums_.frame.other) * inverse_.other;
    return {std::exp(lead) / sums_.lead, std::exp(other) / sums_.other};
  }

  const KdRows& call_;
  Workspace<T>& work_;
  const int64_t row_, after_;
  int64_t columns_;
  const T weight_, student_inverse_;
  const bool reverse_, mixed_;
  Temperatures<T> inverse_;
  Keep keep_;
  const T* teacher_ = nullptr;  // converted whole where classes are pruned, or gathered
  const T* student_ = nullptr;  // gathered
  T threshold_ = 0;             // the smallest teacher logit kept
  bool masked_ = false;         // classes below the threshold are passed over
  bool guarded_ = false;        // an infinity was met in this row
  bool valid_ = true;           // no NaN so far
  RowSums<T> sums_;
  double log_ratio_ = 0;     // ln(Z_other / Z_lead) in the row's frame
  double divergence_ = 0;    // unweighted
  double from_student_ = 0;  // KL(q || m)
};

}  // namespace fastkd::cpu::FASTKD_ISA
