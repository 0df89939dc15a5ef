// One row of the loss against a teacher of few classes. The student's row is read once, its
// exponentials stay in a buffer that fits the cache, and the gradient is written once.
#pragma once
#include "row_sum.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
class TopkRow {
 public:
  // `after`: the row that this thread is likely to compute next.
  TopkRow(const TopkRows& call, Workspace<T>& work, int64_t row, int64_t after)
      : call_(call),
        work_(work),
        row_(row),
        after_(after),
        vocab_(call.vocab_size),
        ids_(call.ids + row * call.k),
        count_(present(ids_, call.k, vocab_)),
        soft_weight_(vector(call.soft_weight)),
        hard_weight_(vector(call.hard_weight)),
        student_inverse_(vector(call.student_inv_temperature)),
        // A bucket pools its classes at T = 1, before their sum is taken to the power 1 / T.
        others_(call.log_rest ? T(1) : student_inverse_, work.a(), work.soft_frames()),
        hard_(T(1), work.h(), work.hard_frames()) {}

  void run() {
    double soft = 0, hard = 0;
    if (soft_weight_ == 0 && hard_weight_ == 0) {
      fill(T(0));
    } else if (call_.labels && !(label() >= 0 && label() < vocab_)) {
      soft = call_.soft_weight ? kNaN<double> : 0;
      hard = call_.hard_weight ? kNaN<double> : 0;
      fill(kNaN<T>);
    } else {
      compute(soft, hard);
    }
    static_cast<T*>(call_.soft)[row_] = static_cast<T>(soft);
    static_cast<T*>(call_.hard)[row_] = static_cast<T>(hard);
  }

 private:
  // A class of the teacher, or all of its others.
  struct Category {
    double log_p, log_q, p = 0, q = 0, difference = 0;  // q - p
  };

  static int64_t present(const int64_t* ids, int64_t count, int64_t vocab) {
    while (count > 0 && ids[count - 1] >= vocab) --count;
    return count;
  }
  T vector(const void* values) const { return values ? static_cast<const T*>(values)[row_] : T(0); }
  int64_t label() const { return call_.labels[row_]; }
  T student_at(int64_t column) const {
    T value;
    return *load_columns<T>(call_.student, row_, column, 1, &value);
  }

  void compute(double& soft, double& hard) {
    const bool valid = read();
    const T at_label = call_.hard_weight ? student_at(label()) : T(0);
    categories_.reserve(static_cast<size_t>(count_) + 1);
    // Now that the row is in the cache: before, each of them was a read from memory.
    for (int64_t i = 0; call_.soft_weight && i < count_; ++i) {
      const T log_prob = static_cast<const T*>(call_.log_probs)[row_ * call_.k + i];
      categories_.push_back({double{log_prob}, double{student_at(ids_[i])} * student_inverse_});
    }
    if (call_.soft_weight) soft = valid ? divergence() : kNaN<double>;
    if (call_.hard_weight) {
      hard = hard_.sum() > 0 ? hard_.lse() - double{at_label} : kNaN<double>;
    }
    if (!call_.dstudent.data) return;
    if ((soft_weight_ != 0 && std::isnan(soft)) || (hard_weight_ != 0 && std::isnan(hard))) {
      fill(kNaN<T>);
    } else {
      with_gradient([&](auto* out) { write_gradient(out); });
    }
  }

  // The student's later columns.
  Ahead ahead(int64_t begin) const {
    const uintptr_t student = address_ahead(call_.student, row_, after_, vocab_, begin);
    return {student, student, call_.student.element_bytes(), call_.student.element_bytes()};
  }

  // False: a NaN was met.
  bool read() {
    const bool sums = call_.soft_weight && !call_.restricted;
    bool valid = call_.hard_weight || sums || !row_has_nan(call_.student, row_, vocab_);
    int64_t next = 0;  // of the ids
    for (int64_t begin = 0; begin < vocab_ && (call_.hard_weight || sums); begin += kChunk) {
      const int64_t n = std::min(kChunk, vocab_ - begin);
      const T* student = load_columns<T>(call_.student, row_, begin, n, work_.scratch(0));
      if (call_.hard_weight) hard_.read(student, begin, n);
      if (!call_.soft_weight) continue;
      if (call_.restricted) {
        valid &= !has_nan(student, n);
        continue;
      }
      if (call_.log_rest && next < count_ && ids_[next] < begin + n) {
        T* others = work_.scratch(0);  // where they were converted
        if (student != others) std::copy(student, student + n, others);
        for (; next < count_ && ids_[next] < begin + n; ++next) {
          valid &= !std::isnan(others[ids_[next] - begin]);
          others[ids_[next] - begin] = -kInf<T>;
        }
        student = others;
      }
      others_.read(student, begin, n, ahead(begin));
    }
    return valid && !std::isnan(others_.sum());
  }

  // Turns logarithms into logarithms of probabilities that sum to 1, and into those; false where
  // none is above -inf.
  bool normalise(double Category::* log, double Category::* share) {
    double max = -kInf<double>, sum = 0;
    for (const Category& category : categories_) max = std::fmax(max, category.*log);
    if (!(max > -kInf<double>)) return false;
    for (Category& category : categories_) {
      category.*log -= max;
      sum += category.*share = std::exp(category.*log);
    }
    const double log_sum = std::log(sum);
    for (Category& category : categories_) {
      category.*log -= log_sum;
      category.*share /= sum;
    }
    return !std::isnan(sum);
  }

  double divergence() {
    if (call_.log_rest) {
      const double others = others_.sum() > 0 ? others_.lse() : -kInf<double>;
      categories_.push_back({double{vector(call_.log_rest)}, others * student_inverse_});
    }
    const double teacher_inverse = vector(call_.teacher_inv_temperature);
    for (Category& category : categories_) category.log_p *= teacher_inverse;
    if (!normalise(&Category::log_p, &Category::p)) return kNaN<double>;
    const bool whole = !call_.restricted && !call_.log_rest;  // q is over all classes
    if (whole) {
      const double log_q = others_.lse();
      if (!(log_q > -kInf<double>)) return kNaN<double>;
      for (Category& category : categories_) category.log_q -= log_q;
    } else if (!normalise(&Category::log_q, &Category::q)) {
      return kNaN<double>;
    }
    double sum = 0, mass = 0;
    for (Category& category : categories_) {
      const double p = category.p, d = category.log_p - category.log_q;
      double q = category.q;
      if (std::fabs(d) < 1) {                 // relative to their own size, however small d
        const double excess = std::expm1(d);  // p / q - 1
        q = p / (1 + excess);
        category.difference = -q * excess;
        sum += p * (d - excess / (1 + excess));  // p d - p + q
      } else {
        if (whole) q = std::exp(category.log_q);
        category.difference = category.log_q == -kInf<double> ? 0 : q - p;
        sum += p == 0 ? q : p * d - p + q;  // not below 0
      }
      mass += q;
    }
    return std::fmax(whole ? sum + (1 - mass) : sum, 0.0);
  }

  template <class Out>
  void write_gradient(Out* out) {
    const double weight = double{soft_weight_} * student_inverse_;
    // What the other classes get per unit of their share.
    const double shared = call_.restricted || soft_weight_ == 0 ? 0
                          : call_.log_rest ? weight * categories_.back().difference
                                           : weight;
    const bool own = shared != 0, hard = hard_weight_ != 0;
    const auto value = [&](int64_t column) {
      const int64_t index = column / kChunk;
      return (own ? shared * others_.scale(index) * work_.a()[column] : 0) +
             (hard ? double{hard_weight_} * hard_.scale(index) * work_.h()[column] : 0) -
             (hard && column == label() ? double{hard_weight_} : 0);
    };
    for (int64_t begin = 0, index = 0; begin < vocab_; begin += kChunk, ++index) {
      const int64_t n = std::min(kChunk, vocab_ - begin);
      const T of_others = own ? static_cast<T>(shared * others_.scale(index)) : T(0);
      const T of_hard = hard ? static_cast<T>(hard_weight_ * hard_.scale(index)) : T(0);
      const T *a = work_.a() + begin, *h = work_.h() + begin;
      if (own && hard) {
        combine<true, true>(a, a, h, n, of_others, T(0), of_hard, out + begin);
      } else if (own) {
        combine<false, true>(a, a, a, n, T(0), T(0), of_others, out + begin);
      } else if (hard) {
        combine<false, true>(h, h, h, n, T(0), T(0), of_hard, out + begin);
      } else {
        std::fill(out + begin, out + begin + n, store<Out>(T(0)));
      }
    }
    if (hard) out[label()] = store<Out>(static_cast<T>(value(label())));
    for (int64_t i = 0; soft_weight_ != 0 && i < count_; ++i) {
      // Of the whole softmax q is there already, and rounded: all of it anew.
      const bool whole = own && !call_.log_rest;
      const double others =
          whole ? shared * others_.scale(ids_[i] / kChunk) * work_.a()[ids_[i]] : 0;
      out[ids_[i]] =
          store<Out>(static_cast<T>(weight * categories_[i].difference + value(ids_[i]) - others));
    }
  }

  template <class Fn>
  void with_gradient(const Fn& fn) {
    dispatch(call_.dstudent.dtype, [&](auto* stored) {
      using Out = std::remove_pointer_t<decltype(stored)>;
      Out* out = static_cast<Out*>(call_.dstudent.data) + call_.dstudent.offset(row_);
      fn(out);
      std::fill(out + vocab_, out + call_.dstudent.width, store<Out>(T(0)));
    });
  }
  void fill(T value) {
    if (!call_.dstudent.data) return;
    with_gradient([&](auto* out) {
      std::fill(out, out + vocab_, store<std::remove_pointer_t<decltype(out)>>(value));
    });
  }

  const TopkRows& call_;
  Workspace<T>& work_;
  const int64_t row_, after_, vocab_;
  const int64_t* ids_;
  const int64_t count_;  // of the ids that are there
  const T soft_weight_, hard_weight_, student_inverse_;
  RowSum<T> others_;  // of the classes outside, or of all
  RowSum<T> hard_;
  std::vector<Category> categories_;  // the ids, and what is outside of them
};

}  // namespace fastkd::cpu::FASTKD_ISA
