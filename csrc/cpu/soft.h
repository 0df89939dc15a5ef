// The soft term of one row: the exponentials of both sides and their sums, chunk by chunk, then the
// divergence and what its gradient is made of. Formulas: fastkd/spec.py.
#pragma once
#include "classes.h"
#include "decoupled.h"
#include "flat.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
class SoftTerm {
 public:
  // The gradient of a column in terms of what is kept of it: a * work.a() + b * work.b().
  struct Factors {
    T a = 0, b = 0;
  };

  // `target_weight`: the label is left out and its term computed besides, if the call is decoupled.
  SoftTerm(const DenseRows& call, Workspace<T>& work, int64_t row, int64_t after, T weight,
           T target_weight)
      : call_(call),
        work_(work),
        columns_(call, work, row, after),
        weight_(weight),
        target_weight_(target_weight),
        student_inverse_(static_cast<const T*>(call.student_inv_temperature)[row]),
        reverse_(call.divergence == Divergence::kReverse),
        mixed_(call.divergence == Divergence::kMixture),
        beta_(mixed_ ? static_cast<const T*>(call.beta)[row] : T(0)),
        student_leads_(reverse_ || mixed_),
        match_(work) {
    const T teacher_inverse = static_cast<const T*>(call.teacher_inv_temperature)[row];
    inverse_ = student_leads_ ? Temperatures<T>{student_inverse_, teacher_inverse}
                              : Temperatures<T>{teacher_inverse, student_inverse_};
    keep_ = mixed_            ? Keep::kMixture
            : !has_gradient() ? Keep::kNothing
            : reverse_        ? Keep::kReverse
                              : Keep::kForward;
  }

  bool has_gradient() const {
    return call_.dstudent.data != nullptr && (weight_ != 0 || target_weight_ != 0);
  }

  // At T = infinity, where an infinite value leaves no gradient.
  bool matches_logits() const { return student_inverse_ == 0; }

  // The classes that take part. To be called before any is read.
  void prune() {
    valid_ = columns_.select();
    if (!columns_.masked()) return;
    const Frame<T> frame = columns_.beside_top();  // teacher, student
    sums_.frame = student_leads_ ? Frame<T>{frame.other, frame.lead} : frame;
  }

  // One chunk of the student's logits, in order; none where the classes kept were gathered.
  void read(const T* student, int64_t begin, int64_t n) {
    if (valid_) read_first(columns_.load(begin, n, student), begin);
  }

  // The unweighted divergence, NaN where a logit is NaN or a side has no finite one.
  T finish() {
    if (!valid_) return kNaN<T>;
    for (int64_t begin = 0; classes() && begin < columns(); begin += kChunk) {
      read_first(columns_.load(begin, std::min(kChunk, columns() - begin)), begin);
    }
    if (valid_ && matches_logits()) {
      return static_cast<T>(curvature() * match_.finish(columns()));
    }
    read_again();
    if (!valid_) return kNaN<T>;
    if (has_gradient()) find_top();
    if (columns_.leaves_out_label()) return finish_decoupled();
    if (!(sums_.lead > 0) || !(sums_.other > 0)) return kNaN<T>;
    const T value = divergence();
    if (has_gradient()) refine();
    return value;
  }

  // Of the label against all other classes, unweighted; NaN where `finish` is.
  T target() const { return static_cast<T>(target_.divergence); }
  // The gradient at the label, which the columns leave out.
  T at_label() const {
    const bool present = target_weight_ != 0 && columns_.label_student() > -kInf<T>;
    return present ? static_cast<T>(target_share() * target_.delta) : T(0);
  }

  // Columns of the buffers, and the classes they are where they are not all: null.
  int64_t columns() const { return columns_.count(); }
  const int32_t* classes() const { return columns_.classes(); }

  // The student's own exponentials, for a hard term that shares them.
  double student_sum() const { return student_leads_ ? sums_.lead : sums_.other; }
  T student_frame() const { return student_leads_ ? sums_.frame.lead : sums_.frame.other; }
  // The student's probability of one column, and of all others, which is 1 less that to its own
  // precision. What is kept of the column is lost then.
  double share(int64_t column) const {
    const double e = work_.a()[column] + (student_leads_ ? T(0) : work_.b()[column]);
    return student_scale(column / kChunk) * e;
  }
  double share_besides(int64_t column) {
    work_.a()[column] = work_.b()[column] = 0;
    double sum = 0;
    for (int64_t begin = 0, index = 0; begin < columns(); begin += kChunk, ++index) {
      const int64_t n = std::min(kChunk, columns() - begin);
      double chunk = sum_of_columns(work_.a() + begin, n);
      if (!student_leads_) chunk += sum_of_columns(work_.b() + begin, n);
      sum += student_scale(index) * chunk;
    }
    return sum;
  }

  // Forward: q - p = scale.other (a + b) - scale.lead a. Reverse: q (x - mean x) with x less what
  // the frames are apart. Mixture: (1 - beta) q (ln(q/m) - KL(q || m)); where it was read again as
  // the reverse divergence is, (1 - beta) times that. All times the weight, and `hard_weight` times
  // q besides.
  Factors factors(int64_t index, double hard_weight) const {
    if (!has_gradient()) return {};
    if (matches_logits()) {
      const double weight = curvature() * weight_;
      return {static_cast<T>(weight * match_.a()), static_cast<T>(weight * match_.b())};
    }
    if (target_weight_ != 0) hard_weight -= target_share() * target_.delta;
    const double weight = empty_ ? 0 : double{weight_} * student_inverse_;
    const Frame<T> frame = work_.soft_frames()[index];
    const Scales scale = scales(frame);
    double a = 0, b = 0;
    if (mixed_ && !refined_) {
      b = (1 - beta_) * weight;
      a = -b * from_student_ + hard_weight;
    } else if (!student_leads_) {
      const double hard = hard_weight * scale.other;
      a = weight * (scale.other - scale.lead) + hard;
      b = weight * scale.other + hard;
    } else if (scale.lead > 0) {
      const double shift = (double{frame.lead} - sums_.frame.lead) * inverse_.lead -
                           (double{frame.other} - sums_.frame.other) * inverse_.other;
      b = (mixed_ ? 1 - beta_ : 1) * weight * scale.lead;
      a = b * (shift - sums_.cross / sums_.lead) + hard_weight * scale.lead;
    }
    return {static_cast<T>(a), static_cast<T>(b)};
  }

 private:
  double target_share() const { return double{target_weight_} * student_inverse_; }

  using Chunk = typename KeptColumns<T>::Chunk;

  // Of the divergence at p = q, beside that of KL.
  double curvature() const { return mixed_ ? beta_ * (1 - beta_) : 1; }

  void read_first(const Chunk& chunk, int64_t begin) {
    if (matches_logits()) {
      valid_ &= !has_nan(chunk.student, chunk.n);
      match_.read(chunk.student, chunk.teacher, begin, chunk.n,
                  columns_.masked() ? columns_.threshold() : -kInf<T>);
      return;
    }
    if (begin == 0 && !columns_.masked()) sums_.frame = frame_of(chunk);
    sums_.add(read_chunk(chunk, begin));
    work_.soft_frames()[begin / kChunk] = sums_.frame;
    balance(2);
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
      read_columns(true);
    } else if (kept && sums_.moved) {
      read_columns(false);
    }
  }

  // All, with their sums; or, into the row's frame, those that were read far from it.
  void read_columns(bool all) {
    constexpr double kTolerable = 3;  // costs one or two bits of q at worst
    for (int64_t begin = 0, index = 0; begin < columns(); begin += kChunk, ++index) {
      Frame<T>& frame = work_.soft_frames()[index];
      if (!all) {
        const Scales scale = scales(frame);
        if (!(scale.other > kTolerable * scale.lead)) continue;
      }
      const Chunk chunk = columns_.load(begin, std::min(kChunk, columns() - begin));
      const Sums<T> sums = read_chunk(chunk, begin);
      if (all) sums_.add(sums);
      frame = sums_.frame;
    }
  }

  // Few chunks, mostly none, have a class that may be so large a part of the lead.
  void find_top() {
    // Its gradient is off by some 2 eps times its share s where that of the others is as small as
    // (1 - s) / sqrt(columns), evenly spread: that is to be less than half of 1e-5.
    const double eps = std::numeric_limits<T>::epsilon();
    const double odds = 1e-5 / (4 * eps * std::sqrt(static_cast<double>(columns())));
    const double least = odds / (1 + odds) * sums_.lead;
    const double log_least = std::log2(least);
    double top = least;
    for (int64_t begin = 0, index = 0; begin < columns(); begin += kChunk, ++index) {
      const double shift = (double{work_.soft_frames()[index].lead} - sums_.frame.lead) *
                           inverse_.lead * kLog2E<double>;
      if (!(shift + work_.soft_tops()[index] > log_least)) continue;
      const int64_t n = columns_.load(begin, std::min(kChunk, columns() - begin)).n;
      const T* e = work_.a() + begin;
      const T max = maximum(e, n);
      if (!(max * std::exp2(shift) > top)) continue;
      top = max * std::exp2(shift);
      top_ = std::find(e, e + n, max) - work_.a();
    }
    if (top_ >= 0) top_kept_ = {work_.a()[top_], work_.b()[top_]};
  }

  // Reads the row once more, where the gradient of a class that is all but 1, or of all classes, is
  // a difference of what nearly agrees: in that class's frame, in which its x and with it all that
  // would cancel is exactly 0. Such a row takes 1.3 to 1.8 times as long.
  void refine() {
    if (!(divergence_ < kInf<double>)) return;
    Frame<T> frame = sums_.frame;
    bool wanted = false;
    if (top_ >= 0) {
      if (mixed_) top_kept_ = {work_.a()[top_], work_.b()[top_]};
      const Factors f = factors(top_ / kChunk, 0);
      // A gradient that is larger than that is large beside its own roundings.
      const T a = f.a * top_kept_.a, b = f.b * top_kept_.b, least = std::fabs(f.b * top_kept_.a);
      wanted = std::fabs(a + b) * 4 < std::fmax(std::fabs(a) + std::fabs(b), least);
      const int64_t begin = top_ / kChunk * kChunk;
      const Chunk chunk = columns_.load(begin, std::min(kChunk, columns() - begin));
      const T student = chunk.student[top_ - begin], teacher = chunk.teacher[top_ - begin];
      frame = student_leads_ ? Frame<T>{student, teacher} : Frame<T>{teacher, student};
      wanted &= std::isfinite(frame.lead) && std::isfinite(frame.other);
    }
    const double limit = -std::log1p(-beta_);  // of ln(q / m), where p is nothing
    if (mixed_ && !wanted && (limit - from_student_) * 4 < limit) {
      // No class's frame, but that of all of them in the mean.
      const double mean = std::fmin(sums_.cross / sums_.lead, 60 - log_ratio_);
      frame = sums_.frame;
      frame.other -= static_cast<T>(mean / inverse_.other);
      wanted = std::isfinite(frame.other);
    }
    if (!wanted) return;
    // ln(p / q) of a class at these frames.
    const double log_odds = (double{frame.other} - sums_.frame.other) * inverse_.other -
                            (double{frame.lead} - sums_.frame.lead) * inverse_.lead - log_ratio_;
    if (mixed_) keep_ = Keep::kReverse;
    sums_ = {.frame = frame};
    refined_ = true;
    read_columns(true);
    if (columns_.leaves_out_label()) columns_.put_label_back();
    if (!student_leads_) {
      const double ratio = sums_.difference / sums_.lead;
      if (std::fabs(ratio) < 0.5) sums_.other = sums_.lead * (1 + ratio);
    }
    if (!mixed_) return;
    const double odds = beta_ / (1 - beta_) * std::exp(log_odds);
    const double share = odds < kInf<double> ? odds / (1 + odds) : 1;
    sums_.cross = 0;
    for (int64_t begin = 0; begin < columns(); begin += kChunk) {
      sums_.cross +=
          beside_class(work_.a() + begin, work_.b() + begin, std::min(kChunk, columns() - begin),
                       static_cast<T>(share), static_cast<T>(1 / (1 + odds)));
    }
  }

  double student_scale(int64_t index) const {
    if (mixed_ && !refined_) return 1;
    const Scales scale = scales(work_.soft_frames()[index]);
    return student_leads_ ? scale.lead : scale.other;
  }

  Frame<T> frame_of(const Chunk& chunk) const {
    const T student = maximum(chunk.student, chunk.n), teacher = maximum(chunk.teacher, chunk.n);
    return student_leads_ ? Frame<T>{student, teacher} : Frame<T>{teacher, student};
  }

  // The sums of one chunk in the row's frame, its exponentials to the buffers.
  Sums<T> read_chunk(Chunk chunk, int64_t begin) {
    Sums<T> sums = exponentials_of(chunk, begin);
    work_.soft_tops()[begin / kChunk] = sums.top;
    return sums;
  }
  Sums<T> exponentials_of(Chunk chunk, int64_t begin) {
    Sums<T> sums;
    guarded_ |= !std::isfinite(sums_.frame.lead) || !std::isfinite(sums_.frame.other);
    if (!guarded_) {
      sums = run_exponentials(chunk, begin);
      if (sums.too_high && !refined_ && !columns_.masked() && outgrown(frame_of(chunk))) {
        sums = run_exponentials(chunk, begin);
      }
      // Read once more, only what is kept and the lead's own sums are wanted.
      guarded_ = refined_ ? !std::isfinite(sums.lead + sums.cross)
                          : sums.too_high || !std::isfinite(sums.excess) ||
                                !std::isfinite(sums.lead + sums.other);
      if (sums.probe != 0) valid_ &= !has_nan(chunk.student, chunk.n);
    }
    if (guarded_) {
      if (columns_.masked()) {
        valid_ &= !has_nan(chunk.student, chunk.n);
        T *student = work_.scratch(2), *teacher = work_.scratch(3);
        mask(chunk.student, chunk.teacher, chunk.n, columns_.threshold(), student, teacher);
        chunk = {student, teacher, chunk.n};
      }
      if (!refined_) outgrown(frame_of(chunk));
      sums = run_guarded(chunk, begin);
    }
    return sums;
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

  Sums<T> run_exponentials(const Chunk& chunk, int64_t begin) {
    T *a = work_.a() + begin, *b = work_.b() + begin;
    const Ahead ahead = columns_.ahead(begin);
    const auto run = [&]<Keep kKeep, bool kTeacherLeads, bool kPruned>() {
      const T* lead = kTeacherLeads ? chunk.teacher : chunk.student;
      const T* other = kTeacherLeads ? chunk.student : chunk.teacher;
      return inverse_.direct(sums_.frame) ? exponentials<kKeep, kPruned, kTeacherLeads, true>(
                                                lead, other, chunk.n, sums_.frame, inverse_,
                                                columns_.threshold(), ahead, a, b)
                                          : exponentials<kKeep, kPruned, kTeacherLeads, false>(
                                                lead, other, chunk.n, sums_.frame, inverse_,
                                                columns_.threshold(), ahead, a, b);
    };
    const auto pick = [&]<Keep kKeep, bool kTeacherLeads>() {
      return columns_.masked() ? run.template operator()<kKeep, kTeacherLeads, true>()
                               : run.template operator()<kKeep, kTeacherLeads, false>();
    };
    switch (keep_) {
      case Keep::kForward:
        return pick.template operator()<Keep::kForward, true>();
      case Keep::kMixture:
        return pick.template operator()<Keep::kForward, false>();
      case Keep::kReverse:
        return pick.template operator()<Keep::kReverse, false>();
      default:
        return reverse_ ? pick.template operator()<Keep::kNothing, false>()
                        : pick.template operator()<Keep::kNothing, true>();
    }
  }

  Sums<T> run_guarded(const Chunk& chunk, int64_t begin) {
    const T* lead = student_leads_ ? chunk.student : chunk.teacher;
    const T* other = student_leads_ ? chunk.teacher : chunk.student;
    const int64_t n = chunk.n;
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
      for (int64_t begin = 0, index = 0; begin < columns(); begin += kChunk, ++index) {
        const int64_t n = std::min(kChunk, columns() - begin);
        const Scales scale = scales(work_.soft_frames()[index]);
        const Mixture<T> chunk =
            mixture(work_.a() + begin, work_.b() + begin, n, static_cast<T>(beta_),
                    static_cast<T>(scale.lead), static_cast<T>(scale.other),
                    static_cast<T>(scale.lead - scale.other));
        total.from_teacher += chunk.from_teacher;
        total.from_student += chunk.from_student;
      }
      from_student_ = total.from_student;
      divergence_ = beta_ * total.from_teacher + (1 - beta_) * total.from_student;
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

  T finish_decoupled() {
    if (keep_ != Keep::kNothing) columns_.put_label_back();
    empty_ = sums_.lead == 0 || sums_.other == 0;
    T among_others = sums_.lead == 0 ? T(0) : kInf<T>;
    if (!empty_) among_others = divergence();
    const double lead = double{sums_.frame.lead} * inverse_.lead + std::log(sums_.lead);
    const double other = double{sums_.frame.other} * inverse_.other + std::log(sums_.other);
    target_ = binary_divergence(
        double{columns_.label_teacher()} * inverse_.lead - (sums_.lead == 0 ? -kInf<double> : lead),
        double{columns_.label_student()} * inverse_.other -
            (sums_.other == 0 ? -kInf<double> : other));
    if (!empty_ && has_gradient()) refine();
    return std::isnan(target_.divergence) ? kNaN<T> : among_others;
  }

  struct Scales {
    double lead, other;
  };
  // What turns a chunk's exponentials into probabilities.
  Scales scales(Frame<T> frame) const {
    const double lead = (double{frame.lead} - sums_.frame.lead) * inverse_.lead;
    const double other = (double{frame.other} - sums_.frame.other) * inverse_.other;
    return {sums_.lead > 0 ? std::exp(lead) / sums_.lead : 0,
            sums_.other > 0 ? std::exp(other) / sums_.other : 0};
  }

  const DenseRows& call_;
  Workspace<T>& work_;
  KeptColumns<T> columns_;
  const T weight_, target_weight_, student_inverse_;
  const bool reverse_, mixed_;
  const double beta_;
  const bool student_leads_;  // else the teacher
  Temperatures<T> inverse_;
  Keep keep_;
  bool guarded_ = false;  // an infinity was met in this row
  bool valid_ = true;     // no NaN so far
  bool refined_ = false;  // read for the last time
  int64_t top_ = -1;      // the column of a class that may be most of the lead; -1: none
  Factors top_kept_;      // of it
  RowSums<T> sums_;
  double log_ratio_ = 0;     // ln(Z_other / Z_lead) in the row's frame
  double divergence_ = 0;    // unweighted
  double from_student_ = 0;  // KL(q || m)
  LogitMatch<T> match_;
  Binary target_;
  bool empty_ = false;  // but for the label, a side has no finite logit
};

}  // namespace fastkd::cpu::FASTKD_ISA
