// The classes that a teacher names, as fastkd::sparse_rows takes them; defined in fastkd/spec.py.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <vector>

namespace fastkd::cpu {

// One call of fastkd::order_named.
template <class T>
struct OrderNamed {
  const int64_t* ids;  // [N, k], in any order; -1: none
  const T* log_probs;  // [N, k]; -inf: none, whatever the id
  int64_t* ordered;    // [N, k]
  T* ordered_log_probs;
  T* log_rest;  // [N]; null: no bucket
  int64_t N, k, vocab_size;
};

struct NamedClass {
  int64_t id;
  double log_prob;
};

// Ascending, those of the same id as they came. By digits of their ids: of 64 a third of the time
// of std::sort, whose branches are missed.
inline void sort_by_id(std::vector<NamedClass>& named, std::vector<NamedClass>& spare,
                       int64_t end) {
  constexpr int kBits = 6;  // as few counters as there are classes, about
  constexpr size_t kDigits = size_t{1} << kBits;
  spare.resize(named.size());
  for (int shift = 0; end >> shift > 0; shift += kBits) {
    uint32_t places[kDigits + 1] = {};
    const auto digit = [&](const NamedClass& one) {
      return static_cast<size_t>(one.id >> shift) % kDigits;
    };
    for (const NamedClass& one : named) ++places[digit(one) + 1];
    for (size_t i = 0; i < kDigits; ++i) places[i + 1] += places[i];
    for (const NamedClass& one : named) spare[places[digit(one)]++] = one;
    named.swap(spare);
  }
}

inline double log_add(double x, double y) {
  if (x == y) return x + std::log(2.0);  // -inf too
  const double high = x > y ? x : y, low = x > y ? y : x;
  return high + std::log1p(std::exp(low - high));
}

inline double log_sum(const std::vector<NamedClass>& named) {
  double max = -std::numeric_limits<double>::infinity(), sum = 0;
  for (const NamedClass& one : named) max = std::fmax(max, one.log_prob);
  if (std::isfinite(max)) {
    for (const NamedClass& one : named) sum += std::exp(one.log_prob - max);
    return max + std::log(sum);
  }
  for (const NamedClass& one : named) max += one.log_prob;  // inf, or NaN; none: -inf
  return max;
}

template <class T>
void order_row(const OrderNamed<T>& call, int64_t row, std::vector<NamedClass>& named,
               std::vector<NamedClass>& spare) {
  const int64_t begin = row * call.k;
  bool lost = false;
  named.clear();
  for (int64_t i = begin; i < begin + call.k; ++i) {
    const int64_t id = call.ids[i];
    if (id >= 0 && id < call.vocab_size) named.push_back({id, double{call.log_probs[i]}});
    lost |= id < -1 || id >= call.vocab_size;
  }
  const auto before = [](const NamedClass& x, const NamedClass& y) { return x.id < y.id; };
  if (named.size() <= 16) {
    std::sort(named.begin(), named.end(), before);
  } else if (!std::is_sorted(named.begin(), named.end(), before)) {
    sort_by_id(named, spare, call.vocab_size - 1);
  }
  size_t count = 0;
  for (const NamedClass& one : named) {
    if (count > 0 && named[count - 1].id == one.id) {
      named[count - 1].log_prob = log_add(named[count - 1].log_prob, one.log_prob);
    } else {
      named[count++] = one;
    }
  }
  named.resize(count);
  constexpr T kNaN = std::numeric_limits<T>::quiet_NaN(), kInf = std::numeric_limits<T>::infinity();
  const bool everything = static_cast<int64_t>(count) == call.vocab_size;
  std::erase_if(named, [](const NamedClass& one) { return one.log_prob == -kInf; });
  count = named.size();

  double excess = 0;
  if (call.log_rest) {
    const double total = log_sum(named);
    if (total > 0) excess = total;
    const double rest = std::log(-std::expm1(total > 0 ? 0 : total));
    call.log_rest[row] = lost ? kNaN : everything ? -kInf : static_cast<T>(rest);
  }
  for (int64_t i = 0; i < call.k; ++i) {
    const bool there = i < static_cast<int64_t>(count);
    const double log_prob = there ? named[static_cast<size_t>(i)].log_prob - excess : -kInf;
    call.ordered[begin + i] = there ? named[static_cast<size_t>(i)].id : call.vocab_size;
    call.ordered_log_probs[begin + i] = lost ? kNaN : static_cast<T>(log_prob);
  }
}

// Takes rows from `next` on.
template <class T>
void order_named(const OrderNamed<T>& call, std::atomic<int64_t>& next) {
  std::vector<NamedClass> named, spare;
  for (int64_t row; (row = next++) < call.N;) order_row(call, row, named, spare);
}

}  // namespace fastkd::cpu
