// The sums of exponentials: those of a chunk and of a row over both sides, relative to offsets that
// a row may change while it is read, and those of one side alone. `lead` is the distribution whose
// expectation the divergence takes (the teacher's in KL(p || q), the student's in KL(q || p)),
// `other` the second one.
#pragma once
#include "load.h"
#include "math.h"

namespace fastkd::cpu::FASTKD_ISA {

// What is subtracted from the logits of either side before their exponentials. Any value within
// 2^40 of the maximum serves; chunks of a row may differ in theirs.
template <class T>
struct Offsets {
  T lead = -kInf<T>;
  T other = -kInf<T>;
};

template <class T>
struct Temperatures {
  T lead, other;  // inverse

  // Whether x is best formed from the difference of the two logits, which is exact where they
  // nearly agree; each is centred first where their temperatures or offsets differ.
  bool direct(Offsets<T> offsets) const {
    return lead == other && std::fabs(offsets.lead - offsets.other) * lead < 8 &&
           std::fabs(offsets.lead) * lead < 100;
  }
};

// The sums of a chunk, with e = exp((logit - offset) / T) of either side and x = the scaled lead
// minus the scaled other.
template <class T>
struct ChunkSums {
  T lead = 0;              // sum e_lead
  T other = 0;             // sum e_other
  T difference = 0;        // sum (e_other - e_lead)
  T excess = 0;            // sum e_lead phi(x) = sum (e_lead x + e_other - e_lead), no term < 0
  T cross = 0;             // sum e_lead x
  T probe = 0;             // NaN where a pruned class holds an infinity or a NaN
  bool forbidden = false;  // a column with other = -inf < lead: the divergence is infinite
  bool too_high = false;   // a logit too far above its offset: the sums are not to be used
  T top = kInf<T>;         // no e_lead is above 2^top
};

// The sums of a whole row, relative to the offsets of its last chunk, in double.
template <class T>
struct RowSums {
  double lead = 0, other = 0, difference = 0, excess = 0, cross = 0;
  bool forbidden = false;
  bool moved = false;    // to other offsets, so that chunks differ in theirs
  bool inexact = false;  // `difference` and `excess` lost digits in a move
  Offsets<T> offsets;

  // Moves the sums to new offsets. With D = the shift of x, e_other / e_lead shrinks by exp(-D):
  // difference' = w (difference + expm1(-D) other), and so on; nothing cancels for small D.
  void move(Offsets<T> to, Temperatures<T> inverse) {
    if (lead != 0 || other != 0) {
      const double by_lead = (double{to.lead} - offsets.lead) * inverse.lead;
      const double by_other = (double{to.other} - offsets.other) * inverse.other;
      const double D = by_other - by_lead;
      moved |= !(std::fabs(D) < 1e-3);
      const double w = std::exp(-by_lead);
      if (std::isfinite(D) && w > 0) {
        const double ratio = std::expm1(-D);
        inexact |= std::fabs(D) > 2;
        cross = w * (cross + lead * D);
        excess = w * (excess + lead * (D + ratio) + ratio * difference);
        difference = w * (difference + ratio * other);
      } else {  // one side has had no finite logit so far
        difference = std::exp(-by_other) * other - w * lead;
        excess = w > 0 ? w * excess : difference;
        cross = 0;  // nothing, or infinite and counted as such
        moved = inexact = true;
      }
      lead *= w;
      other *= std::exp(-by_other);
    }
    offsets = to;
  }

  void add(const ChunkSums<T>& chunk) {
    lead += chunk.lead;
    other += chunk.other;
    difference += chunk.difference;
    excess += chunk.excess;
    cross += chunk.cross;
    forbidden |= chunk.forbidden;
  }
};

// The working memory of a thread, for rows of `vocab_size` columns, or for rows of as many with
// those of the tail, which lie behind the others.
template <class T>
struct Workspace {
  explicit Workspace(int64_t vocab_size)
      : vocab_size(vocab_size),
        stride((vocab_size + 2 * 64 + 15) / 16 * 16),
        chunks((vocab_size + kChunk - 1) / kChunk),
        memory(new T[6 * stride + 6 * kChunk]),
        offsets(new Offsets<T>[2 * chunks + 1]),
        tops(new T[chunks]),
        columns(new int32_t[stride]) {}

  T* a() { return memory.get(); }
  T* b() { return a() + stride; }
  T* h() { return b() + stride; }        // exponentials of the hard term
  T* teacher() { return h() + stride; }  // the converted teacher, where classes are selected
  T* kept_student() { return teacher() + stride; }  // the selected classes alone
  T* kept_teacher() { return kept_student() + stride; }
  T* scratch(int k) { return kept_teacher() + stride + k * kChunk; }
  Offsets<T>* soft_offsets() { return offsets.get(); }
  Offsets<T>* hard_offsets() { return offsets.get() + chunks; }
  T* soft_tops() { return tops.get(); }  // ChunkSums::top of each chunk
  int32_t* kept_columns() { return columns.get(); }
  double* doubles(size_t n) {
    if (few.size() < n) few.resize(n);
    return few.data();
  }

  int64_t vocab_size, stride, chunks;
  std::unique_ptr<T[]> memory;  // what is not touched is not resident: few rows need all of it
  std::unique_ptr<Offsets<T>[]> offsets;
  std::unique_ptr<T[]> tops;
  std::unique_ptr<int32_t[]> columns;
  std::vector<double> few;  // as many as a row's sparse teacher needs
};

template <class T>
FASTKD_LOOP T sum_of_columns(const T* __restrict values, int64_t n) {
  T sums[kLanes<T>] = {};
  each_column<kLanes<T>>(
      n, [&](int64_t i, int lane) __attribute__((always_inline)) { sums[lane] += values[i]; });
  return sum_of(sums);
}

template <class T>
struct SideSum {
  T sum, max;
};

// exp((logit - offset) / T) of one side alone, saved in `e` unless it is null.
template <class T>
FASTKD_LOOP SideSum<T> exponential(const T* __restrict logits, int64_t n, T offset, T inverse,
                                   Ahead ahead, T* __restrict e) {
  const T scale = inverse * kLog2E<T>;
  T sums[kLanes<T>] = {}, maxima[kLanes<T>];
  std::fill(maxima, maxima + kLanes<T>, -kInf<T>);
  const auto run = [&]<bool kSave>() __attribute__((always_inline)) {
    const auto line = [&](int64_t i) __attribute__((always_inline)) {
      if (ahead.lead != 0) ahead.touch(i);
    };
    each_column<kLanes<T>>(n, line, [&](int64_t i, int lane) __attribute__((always_inline)) {
      const T value = exp2_flushed((logits[i] - offset) * scale);
      maxima[lane] = maxima[lane] < logits[i] ? logits[i] : maxima[lane];
      sums[lane] += value;
      if constexpr (kSave) e[i] = value;
    });
  };
  e == nullptr ? run.template operator()<false>() : run.template operator()<true>();
  return {sum_of(sums), max_of(maxima)};
}

template <class T>
FASTKD_LOOP T maximum(const T* __restrict values, int64_t n) {  // passes over NaN
  T max = -kInf<T>;
#pragma omp simd reduction(max : max)
  for (int64_t i = 0; i < n; ++i) max = max < values[i] ? values[i] : max;
  return max;
}

// The exponentials of a row of one side at some temperature, and their sum. The hard term, -log
// softmax(student)[label], is one at T = 1 over all classes.
template <class T>
class OneSided {
 public:
  // `saved` [vocab_size]: where the exponentials go; null: nowhere. `offsets`: one for every chunk.
  OneSided(T inverse, T* saved, Offsets<T>* offsets)
      : inverse_(inverse), saved_(saved), offsets_(offsets) {}

  // Reads one chunk, in order. `ahead`: what is needed later, read early.
  void read(const T* logits, int64_t begin, int64_t n, Ahead ahead = {}) {
    T* e = saved_ ? saved_ + begin : nullptr;
    if (begin == 0) offset_ = maximum(logits, n);
    SideSum<T> chunk = exponential(logits, n, offset_, inverse_, ahead, e);
    if ((chunk.max - offset_) * inverse_ > 20 || !(offset_ > -kInf<T>)) {
      if (chunk.max > offset_) {
        sum_ *= std::exp((double{offset_} - double{chunk.max}) * inverse_);
        offset_ = chunk.max;
      }
      chunk = exponential(logits, n, offset_ > -kInf<T> ? offset_ : T(0), inverse_, ahead, e);
    }
    sum_ += static_cast<double>(chunk.sum);
    offsets_[begin / kChunk].lead = offset_;
  }

  double sum() const { return sum_; }
  void set_sum(double sum) { sum_ = sum; }

  // The probability of one column, and that of all columns but some, to its own precision where 1
  // less theirs would have none. It overwrites what is saved of those columns.
  double share(int64_t column) const { return scale(column / kChunk) * saved_[column]; }
  double share_besides(const int64_t* columns, int64_t count, int64_t vocab) {
    for (int64_t i = 0; i < count; ++i) saved_[columns[i]] = 0;
    double sum = 0;
    for (int64_t begin = 0, index = 0; begin < vocab; begin += kChunk, ++index) {
      sum += scale(index) * double{sum_of_columns(saved_ + begin, std::min(kChunk, vocab - begin))};
    }
    return sum;
  }
  T offset() const { return offset_; }
  double lse() const { return std::log(sum_) + double{offset_} * inverse_; }

  // The factor that turns the exponentials of a chunk into probabilities; mostly all chunks have
  // the same offset.
  double scale(int64_t index) const {
    const double moved = double{offsets_[index].lead} - double{offset_};
    return (moved == 0 ? 1.0 : std::exp(moved * inverse_)) / sum_;
  }

 private:
  const T inverse_;
  T* const saved_;
  Offsets<T>* const offsets_;
  double sum_ = 0;
  T offset_ = -kInf<T>;
};

}  // namespace fastkd::cpu::FASTKD_ISA
