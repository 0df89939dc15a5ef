// The exponentials of a row of one side at some temperature, and their sum. The hard term,
// -log softmax(student)[label], is one at T = 1 over all classes.
#pragma once
#include "workspace.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
class RowSum {
 public:
  // `kept` [vocab_size]: where the exponentials go; null: nowhere. `frames`: one for every chunk.
  RowSum(T inverse, T* kept, Frame<T>* frames) : inverse_(inverse), kept_(kept), frames_(frames) {}

  // One chunk, in order. `ahead`: what is needed later, read early.
  void read(const T* logits, int64_t begin, int64_t n, Ahead ahead = {}) {
    T* e = kept_ ? kept_ + begin : nullptr;
    if (begin == 0) frame_ = maximum(logits, n);
    Sum<T> chunk = exponential(logits, n, frame_, inverse_, ahead, e);
    if ((chunk.max - frame_) * inverse_ > 20 || !(frame_ > -kInf<T>)) {
      if (chunk.max > frame_) {
        sum_ *= std::exp((double{frame_} - double{chunk.max}) * inverse_);
        frame_ = chunk.max;
      }
      chunk = exponential(logits, n, frame_ > -kInf<T> ? frame_ : T(0), inverse_, ahead, e);
    }
    sum_ += static_cast<double>(chunk.sum);
    frames_[begin / kChunk].lead = frame_;
  }

  double sum() const { return sum_; }
  void set_sum(double sum) { sum_ = sum; }

  // The probability of one column, and of all but some, which is 1 less theirs to its own
  // precision. What is kept of those is lost then.
  double share(int64_t column) const { return scale(column / kChunk) * kept_[column]; }
  double share_besides(const int64_t* columns, int64_t count, int64_t vocab) {
    for (int64_t i = 0; i < count; ++i) kept_[columns[i]] = 0;
    double sum = 0;
    for (int64_t begin = 0, index = 0; begin < vocab; begin += kChunk, ++index) {
      sum += scale(index) * double{sum_of_columns(kept_ + begin, std::min(kChunk, vocab - begin))};
    }
    return sum;
  }
  T frame() const { return frame_; }
  double lse() const { return std::log(sum_) + double{frame_} * inverse_; }

  // What turns the exponentials of a chunk into probabilities. Mostly all have the same frame.
  double scale(int64_t index) const {
    const double moved = double{frames_[index].lead} - double{frame_};
    return (moved == 0 ? 1.0 : std::exp(moved * inverse_)) / sum_;
  }

 private:
  const T inverse_;
  T* const kept_;
  Frame<T>* const frames_;
  double sum_ = 0;
  T frame_ = -kInf<T>;
};

}  // namespace fastkd::cpu::FASTKD_ISA
