// One row of the loss: each logit is read from memory once, its exponentials stay in buffers that
// fit the cache, and the gradient is combined from them.
#pragma once
#include "row_sum.h"
#include "soft.h"
#include "tail.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
class Row {
 public:
  // `after`: the row that this thread is likely to compute next.
  Row(const DenseRows& call, Workspace<T>& work, int64_t row, int64_t after)
      : call_(call),
        work_(work),
        row_(row),
        vocab_(call.vocab_size),
        soft_weight_(vector(call.soft_weight)),
        hard_weight_(vector(call.hard_weight)),
        target_weight_(vector(call.target_weight)),
        soft_(call, work, row, after, soft_weight_, target_weight_),
        hard_(T(1), wants_gradient() && hard_weight_ != 0 ? work.h() : nullptr, work.hard_frames()),
        tail_(call.student, work, row, vocab_, wants_gradient() && hard_weight_ != 0) {
    // The hard term's exponentials are the student's own at T = 1 over all classes.
    share_ = call.hard_weight && call.soft_weight && soft_weight_ != 0 &&
             call.kept(row) == vocab_ && !call.target_weight &&
             vector(call.student_inv_temperature) == 1;
  }

  void run() {
    T soft = 0, hard = 0, target = 0;
    if (soft_weight_ == 0 && hard_weight_ == 0 && target_weight_ == 0) {
      fill(T(0));
    } else if (call_.labels && !(label() >= 0 && label() < label_classes())) {
      soft = call_.soft_weight ? kNaN<T> : T(0);
      hard = call_.hard_weight ? kNaN<T> : T(0);
      target = kNaN<T>;
      lost_hard_ = true;
      fill(kNaN<T>);
    } else {
      compute(soft, hard, target);
    }
    static_cast<T*>(call_.soft)[row_] = soft;
    static_cast<T*>(call_.hard)[row_] = hard;
    if (call_.target) static_cast<T*>(call_.target)[row_] = target;
  }

 private:
  T vector(const void* values) const { return values ? static_cast<const T*>(values)[row_] : T(0); }
  int64_t label() const { return call_.labels[row_]; }
  // The decoupled terms set apart a class that the teacher has as well.
  int64_t label_classes() const { return call_.target_weight ? vocab_ : call_.student.width; }
  // Whether a class that the teacher has as well gets a gradient as the label.
  bool has_label() const { return (hard_weight_ != 0 || call_.target_weight) && label() < vocab_; }
  bool wants_gradient() const { return call_.dstudent.data != nullptr; }
  bool own_hard() const { return hard_weight_ != 0 && !share_; }

  void compute(T& soft, T& hard, T& target) {
    T label_logit = 0;
    if (call_.hard_weight) {
      label_logit = *load_columns<T>(call_.student, row_, label(), 1, work_.scratch(0));
    }
    if (call_.soft_weight) soft_.prune();
    const bool read_hard = call_.hard_weight && !share_;
    const bool read_soft = call_.soft_weight && !soft_.classes();
    for (int64_t begin = 0; begin < vocab_ && (read_hard || read_soft); begin += kChunk) {
      const int64_t n = std::min(kChunk, vocab_ - begin);
      const T* student = load_columns<T>(call_.student, row_, begin, n, work_.scratch(0));
      if (read_hard) hard_.read(student, begin, n);
      if (read_soft) soft_.read(student, begin, n);
    }
    if (call_.soft_weight) soft = soft_.finish();
    if (call_.target_weight) target = std::isnan(soft) ? soft : soft_.target();
    if (call_.hard_weight) {
      double sum = share_ ? soft_.student_sum() : hard_.sum();
      T frame = share_ ? soft_.student_frame() : hard_.frame();
      tail_.join(sum, frame);
      hard = static_cast<T>(std::log(sum) + (double{frame} - double{label_logit}));
      if (!(sum > 0)) hard = kNaN<T>;
      lost_hard_ = std::isnan(hard);
    }
    if (!wants_gradient()) return;
    const bool lost_if_infinite =
        call_.divergence == Divergence::kReverse || soft_.matches_logits();
    const bool soft_bad = std::isnan(soft) || (lost_if_infinite && std::isinf(soft));
    if ((soft_.has_gradient() && soft_bad) || (hard_weight_ != 0 && lost_hard_)) {
      fill(kNaN<T>);
    } else {
      write_gradient();
    }
  }

  // Of the hard term's own exponentials of a chunk; where all of them are 0, of no scale.
  T hard_factor(int64_t index) const {
    return tail_.others() == 0 ? T(0)
                               : static_cast<T>(hard_weight_ * tail_.others() * hard_.scale(index));
  }

  // The calls of fn get a null pointer of the stored type, and the row as such.
  template <class Fn>
  void with_gradient(const Fn& fn) {
    dispatch(call_.dstudent.dtype, [&](auto* stored) {
      using Out = std::remove_pointer_t<decltype(stored)>;
      Out* out = static_cast<Out*>(call_.dstudent.data) + call_.dstudent.offset(row_);
      fn(out);
      tail_.write(out, hard_weight_, call_.labels ? label() : -1, lost_hard_);
    });
  }

  void write_gradient() {
    with_gradient([&](auto* out) {
      const bool all = soft_.has_gradient() && !soft_.classes();
      if (has_label()) find_label(all);
      if (soft_.has_gradient() && soft_.classes()) {
        write_columns<false>(out);
        write_classes(out);
      } else if (soft_.has_gradient()) {
        write_columns<true>(out);
      } else {
        write_columns<false>(out);
      }
    });
  }

  // Every column; kSoft: the soft term's buffers hold them all.
  template <bool kSoft, class Out>
  void write_columns(Out* out) {
    if (!kSoft && !own_hard()) {
      std::fill(out, out + vocab_, store<Out>(T(0)));
      if (call_.target_weight) out[label()] = store<Out>(at_label_);
      return;
    }
    for (int64_t begin = 0, index = 0; begin < vocab_; begin += kChunk, ++index) {
      const int64_t n = std::min(kChunk, vocab_ - begin);
      const bool shared = share_ && hard_weight_ != 0;
      const auto f = soft_.factors(index, shared ? hard_weight_ * tail_.others() : 0.0);
      const T factor_h = own_hard() ? hard_factor(index) : T(0);
      const T *a = work_.a() + begin, *b = work_.b() + begin, *h = work_.h() + begin;
      if (own_hard()) {
        combine<kSoft, true>(a, b, h, n, f.a, f.b, factor_h, out + begin);
      } else {
        combine<kSoft, false>(a, b, h, n, f.a, f.b, factor_h, out + begin);
      }
    }
    if (has_label()) out[label()] = store<Out>(at_label_);
  }

  // The gradient at the label, before the rounding of the store: its terms nearly cancel. `all`:
  // the soft term's buffers hold every column.
  void find_label(bool all) {
    at_label_ = soft_.at_label();
    if (all) {
      const auto f = soft_.factors(label() / kChunk, 0);
      at_label_ += f.a * work_.a()[label()] + f.b * work_.b()[label()];
    }
    if (hard_weight_ == 0) return;
    double besides = 1 - (share_ ? soft_.share(label()) : hard_.share(label()));
    if (besides < 0.5) {  // else the roundings of q are small beside it
      besides = share_ ? soft_.share_besides(label())
                       : hard_.share_besides(call_.labels + row_, 1, vocab_);
    }
    hard_at_label_ = static_cast<T>(hard_weight_ * -tail_.besides(besides));
    at_label_ += hard_at_label_;
  }

  // The few classes of the soft term, anew with both terms.
  template <class Out>
  void write_classes(Out* out) {
    const int32_t* classes = soft_.classes();
    for (int64_t begin = 0, index = 0; begin < soft_.columns(); begin += kChunk, ++index) {
      const int64_t end = std::min(begin + kChunk, soft_.columns());
      const auto f = soft_.factors(index, 0);
      for (int64_t i = begin; i < end; ++i) {
        T value = f.a * work_.a()[i] + f.b * work_.b()[i];
        if (hard_weight_ != 0) {
          value += classes[i] == label() ? hard_at_label_
                                         : hard_factor(classes[i] / kChunk) * work_.h()[classes[i]];
        }
        out[classes[i]] = store<Out>(value);
      }
    }
  }

  // The same value in every class that takes part.
  void fill(T value) {
    if (!wants_gradient()) return;
    with_gradient([&](auto* out) {
      std::fill(out, out + vocab_, store<std::remove_pointer_t<decltype(out)>>(value));
    });
  }

  const DenseRows& call_;
  Workspace<T>& work_;
  const int64_t row_, vocab_;
  const T soft_weight_, hard_weight_, target_weight_;
  SoftTerm<T> soft_;
  RowSum<T> hard_;
  Tail<T> tail_;
  T at_label_ = 0, hard_at_label_ = 0;  // the gradient there
  bool share_ = false;                  // the hard term uses the soft term's exponentials
  bool lost_hard_ = false;              // it is NaN
};

}  // namespace fastkd::cpu::FASTKD_ISA
