// One row of the loss against a teacher of few classes. The student's row is read once, its
// exponentials stay in a buffer that fits the cache, and the gradient is written once.
#pragma once
#include "fast.h"
#include "load.h"
#include "math.h"
#include "row.h"
#include "sums.h"

namespace fastkd::cpu::FASTKD_ISA {

// The classes that a sparse teacher names, and those outside of them as one more: vectors of n
// numbers, all in double, in memory for kVectors * n.
struct Named {
  static constexpr int64_t kVectors = 5;
  Named() = default;
  Named(double* memory, int64_t n)
      : log_p(memory), log_q(log_p + n), p(log_q + n), q(p + n), differences(q + n) {}

  double *log_p = nullptr, *log_q = nullptr, *p = nullptr, *q = nullptr;
  double* differences = nullptr;  // q - p
};

// Turns logarithms into logarithms of probabilities that sum to 1, and into those; false where none
// is above -inf, or one is NaN.
FASTKD_LOOP bool normalise(double* __restrict logs, int64_t n, double* __restrict shares) {
  double max = -kInf<double>;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = max < logs[i] ? logs[i] : max;
  if (!(max > -kInf<double>)) return false;
  double sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t i = 0; i < n; ++i) {
    const double log = logs[i] - max, share = exp_terms(log).exp;
    logs[i] = log;
    shares[i] = share;
    sum += share;
  }
  const double log_sum = std::log(sum), inverse = 1 / sum;
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    logs[i] -= log_sum;
    shares[i] *= inverse;
  }
  return !std::isnan(sum);
}

struct NamedSums {
  double divergence = 0;  // sum p ln(p / q) - p + q, no term < 0
  double mass = 0;        // sum q
};

// The divergence over these classes. kWhole: q is over more than these, and only its logarithm is
// known yet.
template <bool kWhole>
FASTKD_LOOP NamedSums divergence_of(const Named& named, int64_t n) {
  const double* __restrict log_p = named.log_p;
  const double* __restrict log_q = named.log_q;
  const double* __restrict p = named.p;
  const double* __restrict q = named.q;
  double* __restrict differences = named.differences;
  double divergence = 0, mass = 0;
#pragma omp simd reduction(+ : divergence, mass)
  for (int64_t i = 0; i < n; ++i) {
    const double d = log_p[i] - log_q[i];
    const bool near = (d < 0 ? -d : d) < 1;
    // What follows is precise relative to its own size, however small d is.
    const double excess = exp_terms(near ? d : 0).minus_one;  // p / q - 1
    const double near_q = p[i] / (1 + excess);
    const double far_q = kWhole ? exp_terms(log_q[i]).exp : q[i];
    const double other = near ? near_q : far_q;
    const double apart = log_q[i] == -kInf<double> ? 0 : far_q - p[i];
    differences[i] = near ? -near_q * excess : apart;
    // Infinite where the student forbids what the teacher has, also where that has underflowed.
    const double finite = p[i] == 0 ? far_q : p[i] * d - p[i] + far_q;
    const double far = d == kInf<double> ? d : finite;
    divergence += near ? p[i] * (d - excess / (1 + excess)) : far;
    mass += other;
  }
  return {divergence, mass};
}

template <class T>
class SparseRow : Row<T, SparseRows> {
 public:
  // `after`: the row that this thread is likely to compute next.
  SparseRow(const SparseRows& call, Workspace<T>& work, int64_t row, int64_t after)
      : Base(call, work, row),
        after_(after),
        ids_(call.teacher.ids + row * call.teacher.k),
        count_(present(ids_, call.teacher.k, vocab_)),
        student_inverse_(vector(call.student_inv_temperature)),
        // A bucket pools its classes at T = 1, before their sum is taken to the power 1 / T.
        outside_(call.teacher.log_rest ? T(1) : student_inverse_, work.a(), work.soft_offsets()) {}

  void run() {
    const bool skipped = soft_weight_ == 0 && hard_weight_ == 0;
    Base::run(skipped, call_.student.width, [&] { return compute(); });
  }

 private:
  using Base = Row<T, SparseRows>;
  using Base::call_, Base::work_, Base::row_, Base::vocab_, Base::soft_weight_, Base::hard_weight_,
      Base::hard_, Base::tail_, Base::lost_hard_;
  using Base::vector, Base::label, Base::wants_gradient, Base::student_at, Base::with_gradient,
      Base::fill;

  static int64_t present(const int64_t* ids, int64_t count, int64_t vocab) {
    while (count > 0 && ids[count - 1] >= vocab) --count;
    return count;
  }

  Terms<T> compute() {
    double soft = 0, hard = 0;
    const bool lost = read();
    const T at_label = call_.hard_weight ? student_at(label()) : T(0);
    // Now that the row is in the cache: before, each of them was a read from memory.
    if (call_.soft_weight) read_named();
    if (call_.soft_weight) soft = lost ? kNaN<double> : divergence();
    if (call_.hard_weight) {
      double sum = hard_.sum();
      T offset = hard_.offset();
      tail_.join(sum, offset);
      hard = sum > 0 ? std::log(sum) + double{offset} - double{at_label} : kNaN<double>;
      lost_hard_ = std::isnan(hard);
    }
    const Terms<T> terms{static_cast<T>(soft), static_cast<T>(hard)};
    if (!wants_gradient()) return terms;
    if ((soft_weight_ != 0 && std::isnan(soft)) || (hard_weight_ != 0 && lost_hard_)) {
      fill(kNaN<T>);
    } else {
      with_gradient([&](auto* out) { write_gradient(out); });
    }
    return terms;
  }

  // Where the student's later columns lie.
  Ahead ahead(int64_t begin) const {
    const uintptr_t student = address_ahead(call_.student, row_, after_, vocab_, begin);
    return {student, student, call_.student.element_bytes(), call_.student.element_bytes()};
  }

  // True: a NaN was met.
  bool read() {
    const bool sums = call_.soft_weight && !call_.teacher.restricted;
    bool lost = !call_.hard_weight && !sums && row_has_nan<T>(call_.student, row_, vocab_);
    int64_t next = 0;  // the first id not met yet
    for (int64_t begin = 0; begin < vocab_ && (call_.hard_weight || sums); begin += kChunk) {
      const int64_t n = std::min(kChunk, vocab_ - begin);
      const T* student = load_columns<T>(call_.student, row_, begin, n, work_.scratch(0));
      if (call_.hard_weight) hard_.read(student, begin, n);
      if (!call_.soft_weight) continue;
      if (call_.teacher.restricted) {
        lost |= has_nan(student, n);
        continue;
      }
      if (call_.teacher.log_rest && next < count_ && ids_[next] < begin + n) {
        T* outside = work_.scratch(0);  // where the columns were converted, if they were
        if (student != outside) std::copy(student, student + n, outside);
        for (; next < count_ && ids_[next] < begin + n; ++next) {
          lost |= std::isnan(outside[ids_[next] - begin]);
          outside[ids_[next] - begin] = -kInf<T>;
        }
        student = outside;
      }
      outside_.read(student, begin, n, ahead(begin));
    }
    return lost || std::isnan(outside_.sum());
  }

  void read_named() {
    const int64_t n = count_ + 1;
    named_ = {work_.doubles(static_cast<size_t>(Named::kVectors * n)), n};
    const T* log_probs = static_cast<const T*>(call_.teacher.log_probs) + row_ * call_.teacher.k;
    gather_columns<T>(call_.student, row_, ids_, count_, named_.log_q);
    const double teacher_inverse = vector(call_.teacher_inv_temperature);
    for (int64_t i = 0; i < count_; ++i) {
      named_.log_p[i] = double{log_probs[i]} * teacher_inverse;
      named_.log_q[i] *= student_inverse_;
    }
    if (call_.teacher.log_rest) {
      const double outside = outside_.sum() > 0 ? outside_.lse() : -kInf<double>;
      named_.log_p[count_] = double{vector(call_.teacher.log_rest)} * teacher_inverse;
      named_.log_q[count_] = outside * student_inverse_;
    }
  }

  double divergence() {
    const int64_t n = count_ + (call_.teacher.log_rest ? 1 : 0);
    if (!normalise(named_.log_p, n, named_.p)) return kNaN<double>;
    if (call_.teacher.restricted || call_.teacher.log_rest) {
      if (!normalise(named_.log_q, n, named_.q)) return kNaN<double>;
      const NamedSums sums = divergence_of<false>(named_, n);
      return std::fmax(sums.divergence, 0.0);
    }
    double log_q = outside_.lse();  // q is over all classes
    if (!(log_q > -kInf<double>)) return kNaN<double>;
    double mass = 0, besides = -1;
    for (int64_t i = 0; i < n; ++i) mass += exp_terms(named_.log_q[i] - log_q).exp;
    if (mass > 0.5) {
      // The sum has been rounded where these classes are, to which p may be near: in double then.
      const double scaled = double{outside_.offset()} * student_inverse_;
      const double sum_outside = outside_.sum() * outside_.share_besides(ids_, count_, vocab_);
      double sum = sum_outside;
      for (int64_t i = 0; i < n; ++i) sum += exp_terms(named_.log_q[i] - scaled).exp;
      outside_.set_sum(sum);
      log_q = outside_.lse();
      besides = sum_outside / sum;
    }
    for (int64_t i = 0; i < n; ++i) named_.log_q[i] -= log_q;
    const NamedSums sums = divergence_of<true>(named_, n);
    return std::fmax(sums.divergence + (besides < 0 ? 1 - sums.mass : besides), 0.0);
  }

  // The factor that turns the hard term's exponentials of a chunk into probabilities; they have
  // none where all of them are 0.
  double hard_scale(int64_t index) const {
    return tail_.others() == 0 ? 0 : tail_.others() * hard_.scale(index);
  }

  template <class Out>
  void write_gradient(Out* out) {
    const double weight = double{soft_weight_} * student_inverse_;
    // The gradient of the classes outside per unit of their share.
    const double shared = call_.teacher.restricted || soft_weight_ == 0 ? 0
                          : call_.teacher.log_rest ? weight * named_.differences[count_]
                                                   : weight;
    const bool own = shared != 0, hard = hard_weight_ != 0;
    for (int64_t begin = 0, index = 0; begin < vocab_; begin += kChunk, ++index) {
      const int64_t n = std::min(kChunk, vocab_ - begin);
      const T of_outside = own ? static_cast<T>(shared * outside_.scale(index)) : T(0);
      const T of_hard = hard ? static_cast<T>(hard_weight_ * hard_scale(index)) : T(0);
      const T *a = work_.a() + begin, *h = work_.h() + begin;
      if (own && hard) {
        combine<true, true>(a, a, h, n, of_outside, T(0), of_hard, out + begin);
      } else if (own) {
        combine<false, true>(a, a, a, n, T(0), T(0), of_outside, out + begin);
      } else if (hard) {
        combine<false, true>(h, h, h, n, T(0), T(0), of_hard, out + begin);
      } else {
        std::fill(out + begin, out + begin + n, store<Out>(T(0)));
      }
    }
    // The label's gradient, whose terms nearly cancel, and that of the named classes, of which the
    // buffers hold only what was rounded, are in double as far as the store.
    const bool at_label = hard && label() < vocab_;
    double besides_label = at_label ? 1 - hard_.share(label()) : 0;
    if (at_label && besides_label < 0.5) {  // else the roundings of q are small beside it
      besides_label = hard_.share_besides(call_.labels + row_, 1, vocab_);
    }
    besides_label = tail_.besides(besides_label);
    const auto of_hard = [&](int64_t column) {
      return hard_weight_ *
             (column == label() ? -besides_label : hard_scale(column / kChunk) * work_.h()[column]);
    };
    if (at_label) {
      const int64_t column = label();
      const double of_outside =
          own ? shared * outside_.scale(column / kChunk) * work_.a()[column] : 0;
      out[column] = store<Out>(static_cast<T>(of_outside + of_hard(column)));
    }
    for (int64_t i = 0; soft_weight_ != 0 && i < count_; ++i) {
      const double value = weight * named_.differences[i] + (hard ? of_hard(ids_[i]) : 0);
      out[ids_[i]] = store<Out>(static_cast<T>(value));
    }
  }

  const int64_t after_;
  const int64_t* ids_;
  const int64_t count_;  // how many ids are there
  const T student_inverse_;
  OneSided<T> outside_;  // over the classes outside, or over all
  Named named_;          // the ids, and what is outside of them
};

}  // namespace fastkd::cpu::FASTKD_ISA
