// The kernels of one instruction set. A clone of them is a source file that includes dispatch.h,
// sets its target, names the namespace FASTKD_ISA after it and includes this.
#pragma once
#include "load.h"
#include "math.h"
#include "row.h"
#include "sparse.h"
#include "sums.h"

namespace fastkd::cpu::FASTKD_ISA {

// The working memory of this thread, kept from call to call: fresh memory would fault in page by
// page, each time anew.
template <class T>
Workspace<T>& workspace(int64_t vocab_size) {
  static thread_local std::unique_ptr<Workspace<T>> kept;
  if (!kept || kept->vocab_size < vocab_size) {
    kept.reset();
    kept = std::make_unique<Workspace<T>>(vocab_size);
  }
  return *kept;
}

// Calls compute(row, after) for rows from `next` on. A row is taken while the one before is
// computed, so that its first logits can be read early; not near the end, where a thread would be
// left without one.
template <class Compute>
void each_row(int64_t N, std::atomic<int64_t>& next, const Compute& compute) {
  constexpr int64_t kLast = 16;
  for (int64_t row = next++, after; row < N; row = after) {
    after = row + kLast < N ? next++ : N;
    compute(row, std::min(after, N - 1));
    if (after == N) after = next++;
  }
}

// The columns of a row that the terms are over.
template <class Call>
int64_t columns(const Call& call) {
  return call.hard_weight ? call.student.width : call.vocab_size;
}

template <class T>
void dense_rows_of(const DenseRows& call, std::atomic<int64_t>& next) {
  const FlushToZero flush;
  Workspace<T>& work = workspace<T>(columns(call));
  each_row(call.N, next,
           [&](int64_t row, int64_t after) { DenseRow<T>(call, work, row, after).run(); });
}

template <class T>
void sparse_rows_of(const SparseRows& call, std::atomic<int64_t>& next) {
  const FlushToZero flush;
  Workspace<T>& work = workspace<T>(columns(call));
  each_row(call.N, next,
           [&](int64_t row, int64_t after) { SparseRow<T>(call, work, row, after).run(); });
}

template <class T, class Stored>
void scale_row(Stored* __restrict values, int64_t n, T scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    values[i] = store<Stored>(static_cast<T>(load(values[i])) * scale);
  }
}

void scale_rows(const ScaleRows& call, std::atomic<int64_t>& next) {
  dispatch<double>(call.dstudent.dtype, [&](auto* stored) {
    using Stored = std::remove_pointer_t<decltype(stored)>;
    using T = std::conditional_t<std::is_same_v<Stored, double>, double, float>;
    for (int64_t row; (row = next++) < call.N;) {
      const T scale = static_cast<T>(call.scale_of(row));
      if (scale == 1) continue;
      Stored* values = static_cast<Stored*>(call.dstudent.data) + call.dstudent.offset(row);
      scale_row(values, call.dstudent.width, scale);
    }
  });
}

void dense_rows(const DenseRows& call, std::atomic<int64_t>& next) {
  dense_rows_of<float>(call, next);
}
void sparse_rows(const SparseRows& call, std::atomic<int64_t>& next) {
  sparse_rows_of<float>(call, next);
}

}  // namespace fastkd::cpu::FASTKD_ISA

// double is for accuracy, not for speed: only one clone has it, the baseline or the only one built.
#if defined(FASTKD_DOUBLE)
void fastkd::cpu::dense_rows_double(const DenseRows& call, std::atomic<int64_t>& next) {
  FASTKD_ISA::dense_rows_of<double>(call, next);
}
void fastkd::cpu::sparse_rows_double(const SparseRows& call, std::atomic<int64_t>& next) {
  FASTKD_ISA::sparse_rows_of<double>(call, next);
}
#endif
