// The soft term of one row: the exponentials of both sides and their sums, chunk by chunk, then the
// divergence and what its gradient is made of. Formulas: fastkd/spec.py.
//
// How a chunk is read, read_chunk(): most go straight down.
//
//   T = infinity -----------> flat (flat.h): differences of logits, no exponentials
//    |
//    | any other T                             an offset is not finite
//    |---------------------------------------------------.
//    v                                                   |
//   fast (fast.h): one exponential per class             |
//    |   a logit is far above its offset: the            |
//    |   offsets move, and it is read fast once more;    |
//    |   not where a threshold prunes classes            |
//    |                                                   v
//    |---------------------> careful (careful.h): two exponentials per class,
//    |   still so, or an     for this chunk and all that the row reads after it
//    |   infinity, or a                                  |
//    v   sum overflowed                                  |
//   the row's sums <-------------------------------------'
//    |
//    '-- balance(): the offset of `other` moves where the sums are apart by a factor of 2
//
// What is read again when all chunks were read, finish(): mostly nothing.
//
//   read_again()  reads all chunks with their sums where the divergence is below 0.01 and the sums
//                 are not alike or were moved: they have to be exact then. Else, where they were
//                 moved and differences of exponentials are saved, it reads the chunks whose
//                 offsets are far from the row's.
//   refine()      reads all chunks of a sure row for its gradient: relative to the logits of a
//                 class that is all but 1, whose gradient would cancel; or, where a mixture's
//                 divergence is near its limit in most classes, relative to the mean class.
//
// A row is lost, its gradient NaN, at a NaN and where a side has no finite logit.
#pragma once
#include "careful.h"
#include "classes.h"
#include "fast.h"
#include "flat.h"
#include "math.h"
#include "sums.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
class SoftTerm {
 public:
  // The gradient of a column in terms of what is saved of it: a * work.a() + b * work.b().
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
        flat_(work) {
    const T teacher_inverse = static_cast<const T*>(call.teacher_inv_temperature)[row];
    inverse_ = student_leads_ ? Temperatures<T>{student_inverse_, teacher_inverse}
                              : Temperatures<T>{teacher_inverse, student_inverse_};
    saves_ = mixed_            ? Divergence::kMixture
             : !has_gradient() ? Divergence::kNone
             : reverse_        ? Divergence::kReverse
                               : Divergence::kForward;
  }

  bool has_gradient() const {
    return call_.dstudent.data != nullptr && (weight_ != 0 || target_weight_ != 0);
  }

  // Whether T is infinite. An infinite value leaves no gradient then.
  bool is_flat() const { return student_inverse_ == 0; }

  // Finds the classes that are kept, before any is read.
  void prune() {
    lost_ = !columns_.select();
    if (!columns_.has_threshold()) return;
    const Offsets<T> offsets = columns_.beside_top();  // teacher, student
    sums_.offsets = student_leads_ ? Offsets<T>{offsets.other, offsets.lead} : offsets;
  }

  // Reads one chunk, in order, beside the student's logits; none where the kept classes were
  // gathered.
  void read(const T* student, int64_t begin, int64_t n) {
    if (!lost_) read_first(columns_.load(begin, n, student), begin);
  }

  // The unweighted divergence, NaN where a logit is NaN or a side has no finite one.
  T finish() {
    if (lost_) return kNaN<T>;
    for (int64_t begin = 0; classes() && begin < columns(); begin += kChunk) {
      read_first(columns_.load(begin, std::min(kChunk, columns() - begin)), begin);
    }
    if (!lost_ && is_flat()) {
      return static_cast<T>(curvature() * flat_.finish(columns()));
    }
    read_again();
    if (lost_) return kNaN<T>;
    if (has_gradient()) find_top();
    if (columns_.decoupled()) return finish_decoupled();
    if (!(sums_.lead > 0) || !(sums_.other > 0)) return kNaN<T>;
    const T value = divergence();
    if (has_gradient()) refine();
    return value;
  }

  // The divergence of the label against all other classes, unweighted; NaN where `finish` is.
  T target() const { return static_cast<T>(target_.divergence); }
  // The gradient at the label, which the columns leave out.
  T at_label() const {
    const bool present = target_weight_ != 0 && columns_.label_student() > -kInf<T>;
    return present ? static_cast<T>(target_share() * target_.delta) : T(0);
  }

  // How many columns the buffers have, and which classes those are; null: all.
  int64_t columns() const { return columns_.count(); }
  const int32_t* classes() const { return columns_.classes(); }

  // The sum and the offset of the student's own exponentials, for a hard term that shares them.
  double student_sum() const { return student_leads_ ? sums_.lead : sums_.other; }
  T student_offset() const { return student_leads_ ? sums_.offsets.lead : sums_.offsets.other; }
  // The student's probability of one column, and that of all others, to its own precision where 1
  // less the column's would have none. It overwrites what is saved of the column.
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

  // The gradient, by divergence:
  //   forward  q - p = scale.other (a + b) - scale.lead a
  //   reverse  q (x - mean x), with x less what the offsets are apart
  //   mixture  (1 - beta) q (ln(q/m) - KL(q || m)); where refine() read it as it reads the reverse
  //            divergence, (1 - beta) times that
  // each times the weight, and `hard_weight` times q besides.
  Factors factors(int64_t index, double hard_weight) const {
    if (!has_gradient()) return {};
    if (is_flat()) {
      const double weight = curvature() * weight_;
      return {static_cast<T>(weight * flat_.a()), static_cast<T>(weight * flat_.b())};
    }
    if (target_weight_ != 0) hard_weight -= target_share() * target_.delta;
    const double weight = empty_ ? 0 : double{weight_} * student_inverse_;
    const Offsets<T> offsets = work_.soft_offsets()[index];
    const Scales scale = scales(offsets);
    double a = 0, b = 0;
    if (mixed_ && !refined_) {
      b = (1 - beta_) * weight;
      a = -b * from_student_ + hard_weight;
    } else if (!student_leads_) {
      const double hard = hard_weight * scale.other;
      a = weight * (scale.other - scale.lead) + hard;
      b = weight * scale.other + hard;
    } else if (scale.lead > 0) {
      const double shift = (double{offsets.lead} - sums_.offsets.lead) * inverse_.lead -
                           (double{offsets.other} - sums_.offsets.other) * inverse_.other;
      b = (mixed_ ? 1 - beta_ : 1) * weight * scale.lead;
      a = b * (shift - sums_.cross / sums_.lead) + hard_weight * scale.lead;
    }
    return {static_cast<T>(a), static_cast<T>(b)};
  }

 private:
  double target_share() const { return double{target_weight_} * student_inverse_; }

  using Chunk = typename KeptColumns<T>::Chunk;

  // The curvature of the divergence at p = q, relative to KL's.
  double curvature() const { return mixed_ ? beta_ * (1 - beta_) : 1; }

  void read_first(const Chunk& chunk, int64_t begin) {
    if (is_flat()) {
      lost_ |= has_nan(chunk.student, chunk.n);
      flat_.read(chunk.student, chunk.teacher, begin, chunk.n,
                 columns_.has_threshold() ? columns_.threshold() : -kInf<T>);
      return;
    }
    if (begin == 0 && !columns_.has_threshold()) sums_.offsets = offsets_of(chunk);
    sums_.add(read_chunk(chunk, begin));
    work_.soft_offsets()[begin / kChunk] = sums_.offsets;
    balance(2);
  }

  // Saved is e_other - e_lead, wanted is q - p: the two agree where both sums are alike, and where
  // Z_other falls far below Z_lead, q is lost in the rounding of e_lead. So the offset of `other`
  // is moved to where the sums seen so far are alike.
  void balance(double alike) {
    const double lead = sums_.lead, other = sums_.other;
    if (!(lead > alike * other || other > alike * lead)) return;
    Offsets<T> offsets = sums_.offsets;
    offsets.other += static_cast<T>(std::log(other / lead) / inverse_.other);
    if (lead > 0 && other > 0 && std::isfinite(offsets.other) && std::isfinite(offsets.lead)) {
      sums_.move(offsets, inverse_);
    }
  }

  // Reads again what was read too early for the offsets that the row came to, mostly its first
  // chunk or none; or all of it, where the distributions turned out to agree, so that the sums have
  // to be exact.
  void read_again() {
    const double log_ratio = std::log(sums_.other / sums_.lead);
    const bool saves_difference = saves_ == Divergence::kForward || saves_ == Divergence::kMixture;
    if (sums_.cross / sums_.lead + log_ratio < 0.01 &&
        (sums_.moved || std::fabs(log_ratio) > 0.01)) {
      balance(1);
      sums_ = {.offsets = sums_.offsets};
      read_columns(true);
    } else if (saves_difference && sums_.moved) {
      read_columns(false);
    }
  }

  // Reads all columns, with their sums; or those once more whose offsets are far from the row's.
  void read_columns(bool all) {
    constexpr double kTolerable = 3;  // costs one or two bits of q at worst
    for (int64_t begin = 0, index = 0; begin < columns(); begin += kChunk, ++index) {
      Offsets<T>& offsets = work_.soft_offsets()[index];
      if (!all) {
        const Scales scale = scales(offsets);
        if (!(scale.other > kTolerable * scale.lead)) continue;
      }
      const Chunk chunk = columns_.load(begin, std::min(kChunk, columns() - begin));
      const ChunkSums<T> sums = read_chunk(chunk, begin);
      if (all) sums_.add(sums);
      offsets = sums_.offsets;
    }
  }

  // Finds the class that is so large a part of the lead that its gradient may cancel. Few chunks,
  // mostly none, may have one.
  void find_top() {
    // Its gradient is off by some 2 eps times its share s where that of the others is as small as
    // (1 - s) / sqrt(columns), evenly spread: that is to be less than half of 1e-5.
    const double eps = std::numeric_limits<T>::epsilon();
    const double odds = 1e-5 / (4 * eps * std::sqrt(static_cast<double>(columns())));
    const double least = odds / (1 + odds) * sums_.lead;
    const double log_least = std::log2(least);
    double top = least;
    for (int64_t begin = 0, index = 0; begin < columns(); begin += kChunk, ++index) {
      const double shift = (double{work_.soft_offsets()[index].lead} - sums_.offsets.lead) *
                           inverse_.lead * kLog2E<double>;
      if (!(shift + work_.soft_tops()[index] > log_least)) continue;
      const int64_t n = columns_.load(begin, std::min(kChunk, columns() - begin)).n;
      const T* e = work_.a() + begin;
      const T max = maximum(e, n);
      if (!(max * std::exp2(shift) > top)) continue;
      top = max * std::exp2(shift);
      top_ = std::find(e, e + n, max) - work_.a();
    }
    if (top_ >= 0) top_saved_ = {work_.a()[top_], work_.b()[top_]};
  }

  // Reads the row once more, where the gradient of a class that is all but 1, or of all classes, is
  // a difference of what nearly agrees: relative to that class's logits its x, and with it all that
  // would cancel, is exactly 0. Such a row takes 1.3 to 1.8 times as long.
  void refine() {
    if (!(divergence_ < kInf<double>)) return;
    Offsets<T> offsets = sums_.offsets;
    bool wanted = false;
    if (top_ >= 0) {
      if (mixed_) top_saved_ = {work_.a()[top_], work_.b()[top_]};
      const Factors f = factors(top_ / kChunk, 0);
      // A gradient that is larger than that is large beside its own roundings.
      const T a = f.a * top_saved_.a, b = f.b * top_saved_.b, least = std::fabs(f.b * top_saved_.a);
      wanted = std::fabs(a + b) * 4 < std::fmax(std::fabs(a) + std::fabs(b), least);
      const int64_t begin = top_ / kChunk * kChunk;
      const Chunk chunk = columns_.load(begin, std::min(kChunk, columns() - begin));
      const T student = chunk.student[top_ - begin], teacher = chunk.teacher[top_ - begin];
      offsets = student_leads_ ? Offsets<T>{student, teacher} : Offsets<T>{teacher, student};
      wanted &= std::isfinite(offsets.lead) && std::isfinite(offsets.other);
      // Below that the odds would underflow; the class's ln(q / m) is the same by all its digits.
      const double too_low = kLeastLogOdds - log_odds(offsets);
      if (mixed_ && wanted && too_low > 0)
        offsets.other += static_cast<T>(too_low / inverse_.other);
    }
    const double limit = -std::log1p(-beta_);  // ln(q / m) where p is nothing
    if (mixed_ && !wanted && (limit - from_student_) * 4 < limit) {
      // The offsets are not those of a class, but of all of them in the mean.
      const double mean = std::fmin(sums_.cross / sums_.lead, -kLeastLogOdds - log_ratio_);
      offsets = sums_.offsets;
      offsets.other -= static_cast<T>(mean / inverse_.other);
      wanted = std::isfinite(offsets.other);
    }
    if (!wanted) return;
    const double odds = beta_ / (1 - beta_) * std::exp(log_odds(offsets));
    if (mixed_) saves_ = Divergence::kReverse;
    sums_ = {.offsets = offsets};
    refined_ = true;
    read_columns(true);
    if (columns_.decoupled()) columns_.put_label_back();
    if (!student_leads_) {
      const double ratio = sums_.difference / sums_.lead;
      if (std::fabs(ratio) < 0.5) sums_.other = sums_.lead * (1 + ratio);
    }
    if (!mixed_) return;
    const double share = odds < kInf<double> ? odds / (1 + odds) : 1;
    sums_.cross = 0;
    for (int64_t begin = 0; begin < columns(); begin += kChunk) {
      sums_.cross +=
          beside_class(work_.a() + begin, work_.b() + begin, std::min(kChunk, columns() - begin),
                       static_cast<T>(share), static_cast<T>(1 / (1 + odds)));
    }
  }

  static constexpr double kLeastLogOdds = -60;
  // ln(p / q) of a class whose logits are these, where the student leads.
  double log_odds(Offsets<T> logits) const {
    return (double{logits.other} - sums_.offsets.other) * inverse_.other -
           (double{logits.lead} - sums_.offsets.lead) * inverse_.lead - log_ratio_;
  }

  double student_scale(int64_t index) const {
    if (mixed_ && !refined_) return 1;
    const Scales scale = scales(work_.soft_offsets()[index]);
    return student_leads_ ? scale.lead : scale.other;
  }

  Offsets<T> offsets_of(const Chunk& chunk) const {
    const T student = maximum(chunk.student, chunk.n), teacher = maximum(chunk.teacher, chunk.n);
    return student_leads_ ? Offsets<T>{student, teacher} : Offsets<T>{teacher, student};
  }

  // The sums of one chunk relative to the row's offsets, its exponentials to the buffers.
  ChunkSums<T> read_chunk(const Chunk& chunk, int64_t begin) {
    ChunkSums<T> sums;
    careful_ |= !std::isfinite(sums_.offsets.lead) || !std::isfinite(sums_.offsets.other);
    if (!careful_) {
      sums = read_fast(chunk, begin);
      careful_ = !is_usable(sums);
    }
    if (careful_) sums = read_careful(chunk, begin);
    work_.soft_tops()[begin / kChunk] = sums.top;
    return sums;
  }

  ChunkSums<T> read_fast(const Chunk& chunk, int64_t begin) {
    ChunkSums<T> sums = run_fast(chunk, begin);
    if (sums.too_high && !refined_ && !columns_.has_threshold() && outgrown(offsets_of(chunk))) {
      sums = run_fast(chunk, begin);
    }
    if (sums.probe != 0) lost_ |= has_nan(chunk.student, chunk.n);
    return sums;
  }

  // Whether the sums of a fast read are what they should be. Of a row that is refined only what is
  // saved and the lead's own sums are used.
  bool is_usable(const ChunkSums<T>& sums) const {
    if (refined_) return std::isfinite(sums.lead + sums.cross);
    return !sums.too_high && std::isfinite(sums.excess) && std::isfinite(sums.lead + sums.other);
  }

  ChunkSums<T> read_careful(Chunk chunk, int64_t begin) {
    if (columns_.has_threshold()) {
      lost_ |= has_nan(chunk.student, chunk.n);
      T *student = work_.scratch(2), *teacher = work_.scratch(3);
      pruned_copies(chunk.student, chunk.teacher, chunk.n, columns_.threshold(), student, teacher);
      chunk = {student, teacher, chunk.n};
    }
    if (!refined_) outgrown(offsets_of(chunk));
    return run_careful(chunk, begin);
  }

  // Moves the row to new offsets where a chunk's maximum is far above the old ones.
  bool outgrown(Offsets<T> max) {
    constexpr T kFar = 20;  // e < 2^29, far from overflow also in sums
    const Offsets<T> old = sums_.offsets;
    const auto grow = [](T old, T max, T inverse) {
      return (max - old) * inverse > kFar || !(old > -kInf<T>) ? max : old;
    };
    const Offsets<T> offsets{grow(old.lead, max.lead, inverse_.lead),
                             grow(old.other, max.other, inverse_.other)};
    if (offsets.lead == old.lead && offsets.other == old.other) return false;
    sums_.move(offsets, inverse_);
    return true;
  }

  // The loops over columns are picked by what is saved, who leads, whether a threshold prunes
  // classes and whether x is formed directly.
  using Fast = decltype(&exponentials_fast<Divergence::kNone, false, false, false, T>);
  using Careful = decltype(&exponentials_careful<Divergence::kNone, false, T>);

  template <Divergence kSaved, bool kTeacherLeads>
  static Fast fast_loop(bool pruned, bool direct) {
    if (pruned) {
      return direct ? exponentials_fast<kSaved, true, kTeacherLeads, true, T>
                    : exponentials_fast<kSaved, true, kTeacherLeads, false, T>;
    }
    return direct ? exponentials_fast<kSaved, false, kTeacherLeads, true, T>
                  : exponentials_fast<kSaved, false, kTeacherLeads, false, T>;
  }
  Fast fast_loop(bool pruned, bool direct) const {
    switch (saves_) {
      case Divergence::kForward:
        return fast_loop<Divergence::kForward, true>(pruned, direct);
      case Divergence::kMixture:  // what it saves is the same where all logits are finite
        return fast_loop<Divergence::kForward, false>(pruned, direct);
      case Divergence::kReverse:
        return fast_loop<Divergence::kReverse, false>(pruned, direct);
      default:
        return reverse_ ? fast_loop<Divergence::kNone, false>(pruned, direct)
                        : fast_loop<Divergence::kNone, true>(pruned, direct);
    }
  }

  template <Divergence kSaved>
  static Careful careful_loop(bool direct) {
    return direct ? exponentials_careful<kSaved, true, T> : exponentials_careful<kSaved, false, T>;
  }
  Careful careful_loop(bool direct) const {
    switch (saves_) {
      case Divergence::kForward:
        return careful_loop<Divergence::kForward>(direct);
      case Divergence::kReverse:
        return careful_loop<Divergence::kReverse>(direct);
      case Divergence::kMixture:
        return careful_loop<Divergence::kMixture>(direct);
      default:
        return careful_loop<Divergence::kNone>(direct);
    }
  }

  ChunkSums<T> run_fast(const Chunk& chunk, int64_t begin) {
    const T* lead = student_leads_ ? chunk.student : chunk.teacher;
    const T* other = student_leads_ ? chunk.teacher : chunk.student;
    const Fast loop = fast_loop(columns_.has_threshold(), inverse_.direct(sums_.offsets));
    return loop(lead, other, chunk.n, sums_.offsets, inverse_, columns_.threshold(),
                columns_.ahead(begin), work_.a() + begin, work_.b() + begin);
  }

  ChunkSums<T> run_careful(const Chunk& chunk, int64_t begin) {
    const T* lead = student_leads_ ? chunk.student : chunk.teacher;
    const T* other = student_leads_ ? chunk.teacher : chunk.student;
    Offsets<T> offsets = sums_.offsets;  // any serves for a side without a finite logit so far
    if (offsets.lead == -kInf<T>) offsets.lead = 0;
    if (offsets.other == -kInf<T>) offsets.other = 0;
    return careful_loop(inverse_.direct(offsets))(lead, other, chunk.n, offsets, inverse_,
                                                  work_.a() + begin, work_.b() + begin);
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
        const Scales scale = scales(work_.soft_offsets()[index]);
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
      // This is the divergence without its cancellation: excess = cross + ratio Z_lead, so it is
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
    if (saves_ != Divergence::kNone) columns_.put_label_back();
    empty_ = sums_.lead == 0 || sums_.other == 0;
    T among_others = sums_.lead == 0 ? T(0) : kInf<T>;
    if (!empty_) among_others = divergence();
    const double lead = double{sums_.offsets.lead} * inverse_.lead + std::log(sums_.lead);
    const double other = double{sums_.offsets.other} * inverse_.other + std::log(sums_.other);
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
  Scales scales(Offsets<T> offsets) const {
    const double lead = (double{offsets.lead} - sums_.offsets.lead) * inverse_.lead;
    const double other = (double{offsets.other} - sums_.offsets.other) * inverse_.other;
    return {sums_.lead > 0 ? std::exp(lead) / sums_.lead : 0,
            sums_.other > 0 ? std::exp(other) / sums_.other : 0};
  }

  const DenseRows& call_;
  Workspace<T>& work_;
  KeptColumns<T> columns_;
  const T weight_, target_weight_, student_inverse_;
  const bool reverse_, mixed_;
  const double beta_;
  const bool student_leads_;  // else the teacher leads
  Temperatures<T> inverse_;
  Divergence saves_;      // what is saved for the gradient is this divergence's
  bool careful_ = false;  // the row's chunks are read so from here on
  bool lost_ = false;     // a NaN was met
  bool refined_ = false;  // refine() reads the row, or has read it
  int64_t top_ = -1;      // the column of a class that may be most of the lead; -1: none
  Factors top_saved_;     // what is saved of it
  RowSums<T> sums_;
  double log_ratio_ = 0;     // ln(Z_other / Z_lead) at the row's offsets
  double divergence_ = 0;    // unweighted
  double from_student_ = 0;  // KL(q || m)
  Flat<T> flat_;
  Binary target_;
  bool empty_ = false;  // a side has no finite logit beside the label's
};

}  // namespace fastkd::cpu::FASTKD_ISA
