// The soft term at T = infinity, where T^2 KL has become half the variance of z - v over the
// classes (Hinton et al. 2015, section 2.1: matching logits).
#pragma once
#include "load.h"
#include "sums.h"

namespace fastkd::cpu::FASTKD_ISA {

template <class T>
struct Differences {
  T sum = 0, count = 0, open = 0;
};
// Sets difference[i] = z - v and kept[i] = 1; both are 0 where a class is not kept. `open`: how
// many classes have a logit on one side only.
template <class T>
FASTKD_LOOP Differences<T> differences(const T* __restrict student, const T* __restrict teacher,
                                       int64_t n, T threshold, T* __restrict difference,
                                       T* __restrict kept) {
  T sums[kLanes<T>] = {}, counts[kLanes<T>] = {}, opens[kLanes<T>] = {};
  each_column<kLanes<T>>(n, [&](int64_t i, int lane) __attribute__((always_inline)) {
    const T z = student[i], v = teacher[i];
    const bool no_z = z == -kInf<T>, no_v = v == -kInf<T>;
    const bool there = !(v < threshold) && !(no_z && no_v);
    const bool finite = z < kInf<T> && v < kInf<T>;
    kept[i] = there ? T(1) : T(0);
    difference[i] = !there ? T(0) : !finite ? kNaN<T> : no_z || no_v ? T(0) : z - v;
    sums[lane] += difference[i];
    counts[lane] += kept[i];
    opens[lane] += there && (no_z || no_v) ? T(1) : T(0);
  });
  return {sum_of(sums), sum_of(counts), sum_of(opens)};
}

template <class T>
struct Moments {
  T first = 0, second = 0;
};
// Subtracts the mean from `difference` where kept; the sums of what is left and of its squares.
template <class T>
FASTKD_LOOP Moments<T> centre(T* __restrict difference, const T* __restrict kept, int64_t n,
                              T mean) {
  T firsts[kLanes<T>] = {}, seconds[kLanes<T>] = {};
  each_column<kLanes<T>>(n, [&](int64_t i, int lane) __attribute__((always_inline)) {
    const T d = difference[i] - kept[i] * mean;
    difference[i] = d;
    firsts[lane] += d;
    seconds[lane] += d * d;
  });
  return {sum_of(firsts), sum_of(seconds)};
}

template <class T>
class Flat {
 public:
  explicit Flat(Workspace<T>& work) : work_(work) {}

  // Classes whose teacher logit is below `threshold` do not exist.
  void read(const T* student, const T* teacher, int64_t begin, int64_t n, T threshold) {
    const Differences<T> chunk =
        differences(student, teacher, n, threshold, work_.a() + begin, work_.b() + begin);
    sum_ += chunk.sum;
    count_ += chunk.count;
    open_ |= chunk.open > 0;
  }

  // Half the variance. NaN without a class, infinite where one has a logit on one side only.
  double finish(int64_t columns) {
    if (open_) return std::isnan(sum_) ? kNaN<double> : kInf<double>;
    const T mean = static_cast<T>(sum_ / count_);
    double second = 0;
    for (int64_t begin = 0; begin < columns; begin += kChunk) {
      const Moments<T> chunk =
          centre(work_.a() + begin, work_.b() + begin, std::min(kChunk, columns - begin), mean);
      mean_error_ += chunk.first;
      second += chunk.second;
    }
    mean_error_ /= count_;
    const double variance = second / count_ - mean_error_ * mean_error_;
    return std::isnan(variance) ? kNaN<double> : std::fmax(variance, 0.0) / 2;
  }

  // The gradient of a column is (a work.a() + b work.b()): (d - mean) / count.
  double a() const { return 1 / count_; }
  double b() const { return -mean_error_ / count_; }

 private:
  Workspace<T>& work_;
  double sum_ = 0, count_ = 0;
  double mean_error_ = 0;  // what `mean` is off by
  bool open_ = false;
};

}  // namespace fastkd::cpu::FASTKD_ISA
