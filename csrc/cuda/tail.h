// The tail of a row: the classes from vocab_size on, which the student has alone. The hard term is
// over them too, where it is computed; each CTA has a share of them.
#pragma once
#include "row.h"

namespace fastkd::cuda {

// fn(column, logit) for this CTA's columns, by the same threads in every call.
template <class Exchange, class Fn>
__device__ void each_of_tail(const Row<Exchange>& row, const Fn& fn) {
  const View view = row.student();
  const int end = row.beyond(row.exchange.rank() + 1), threads = static_cast<int>(blockDim.x);
  for (int column = row.beyond(row.exchange.rank()) + static_cast<int>(threadIdx.x); column < end;
       column += threads) {
    fn(column, load_single(view, column));
  }
}

// The gradient there, of the hard term alone, whose softmax is factor * exponential(logit).
template <class Exchange, class Exponential>
__device__ void write_tail(const Row<Exchange>& row, float factor, float at_label,
                           const Exponential& exponential) {
  if (!row.has_tail() || row.hard_weight() == 0) return row.fill_beyond();
  each_of_tail(row, [&](int column, float logit) {
    float values[kPerLane] = {};
    values[0] = column == row.label() ? at_label : row.hard_weight() * factor * exponential(logit);
    store_single(row.dstudent(), column, pack(row.dstudent().dtype, values).first.x);
  });
}

}  // namespace fastkd::cuda
