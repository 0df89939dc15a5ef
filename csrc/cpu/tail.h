// The classes from vocab_size on, which the student has alone: the hard term's softmax is over them
// as well, and of all terms only its gradient reaches them.
#pragma once
#include "fast.h"
#include "load.h"
#include "sums.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
class Tail {
 public:
  // `saved`: their exponentials are, behind those of the hard term over the other classes.
  Tail(const Rows& student, Workspace<T>& work, int64_t row, int64_t vocab, bool saved)
      : student_(student),
        work_(work),
        row_(row),
        vocab_(vocab),
        sum_(T(1), saved ? work.h() + vocab : nullptr,
             work.hard_offsets() + (vocab + kChunk - 1) / kChunk) {}

  // Reads them and makes a sum over the other classes, relative to `offset`, one over all.
  void join(double& sum, T& offset) {
    const int64_t n = student_.width - vocab_;
    if (n == 0) return;
    for (int64_t begin = 0; begin < n; begin += kChunk) {
      const int64_t count = std::min(kChunk, n - begin);
      sum_.read(load_columns<T>(student_, row_, vocab_ + begin, count, work_.scratch(0)), begin,
                count);
    }
    // Without a finite logit a sum is 0 and its offset -inf.
    const T top = std::max(offset, sum_.offset());
    const auto moved = [&](double sum, T offset) {
      return sum == 0 || offset == top ? sum : sum * std::exp(double{offset} - double{top});
    };
    const double others = moved(sum, offset), own = moved(sum_.sum(), sum_.offset());
    sum = others + own;
    offset = top;
    others_ = others / sum;
    own_ = own / sum;
  }

  // The factor that turns a softmax over the other classes into one over all; 1 without a tail.
  double others() const { return others_; }

  // 1 less the probability of one of the other classes, from 1 less its probability among them
  // alone.
  double besides(double among_others) const {
    return others_ == 0 ? 1 : others_ * among_others + own_;
  }

  // Stores the tail's gradient. `lost`: it is NaN.
  template <class Out>
  void write(Out* out, T weight, int64_t label, bool lost) {
    const int64_t n = student_.width - vocab_;
    if (weight == 0 || lost) {
      std::fill(out + vocab_, out + vocab_ + n, store<Out>(weight == 0 ? T(0) : kNaN<T>));
      return;
    }
    for (int64_t begin = 0, index = 0; begin < n; begin += kChunk, ++index) {
      const int64_t count = std::min(kChunk, n - begin);
      const T* h = work_.h() + vocab_ + begin;
      const T factor = own_ > 0 ? static_cast<T>(weight * own_ * sum_.scale(index)) : T(0);
      combine<false, true>(h, h, h, count, T(0), T(0), factor, out + vocab_ + begin);
    }
    const int64_t column = label - vocab_;
    if (column < 0) return;
    double besides = own_ > 0 ? 1 - sum_.share(column) : 1;
    if (besides < 0.5) besides = sum_.share_besides(&column, 1, n);
    out[label] = store<Out>(static_cast<T>(weight * -(others_ + own_ * besides)));
  }

 private:
  const Rows& student_;
  Workspace<T>& work_;
  const int64_t row_, vocab_;
  OneSided<T> sum_;
  double others_ = 1, own_ = 0;  // shares of the sum over all
};

}  // namespace fastkd::cpu::FASTKD_ISA
