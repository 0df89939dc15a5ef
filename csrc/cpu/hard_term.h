// The hard term of one row: -log softmax(student)[label] at T = 1, over all classes.
#pragma once
#include "workspace.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
class HardTerm {
 public:
  HardTerm(Workspace<T>& work, bool keeps) : work_(work), keeps_(keeps) {}

  void read(const T* student, int64_t begin, int64_t n) {
    T* e = keeps_ ? work_.h() + begin : nullptr;
    if (begin == 0) frame_ = maximum(student, n);
    Sum<T> chunk = exponential(student, n, frame_, T(1), e);
    if (chunk.max - frame_ > 20 || !(frame_ > -kInf<T>)) {
      if (chunk.max > frame_) {
        sum_ *= std::exp(double{frame_} - double{chunk.max});
        frame_ = chunk.max;
      }
      chunk = exponential(student, n, frame_ > -kInf<T> ? frame_ : T(0), T(1), e);
    }
    sum_ += static_cast<double>(chunk.sum);
    work_.hard_frames()[begin / kChunk].lead = frame_;
  }

  double sum() const { return sum_; }
  T frame() const { return frame_; }

  // What turns the exponentials of a chunk into probabilities. Mostly all have the same frame.
  double scale(int64_t index) const {
    const double moved = double{work_.hard_frames()[index].lead} - double{frame_};
    return (moved == 0 ? 1.0 : std::exp(moved)) / sum_;
  }

 private:
  Workspace<T>& work_;
  const bool keeps_;  // the exponentials, for the gradient
  double sum_ = 0;
  T frame_ = -kInf<T>;
};

}  // namespace fastkd::cpu::FASTKD_ISA
