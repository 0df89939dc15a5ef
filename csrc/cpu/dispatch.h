// The CPU kernels, compiled once per instruction set from one source and chosen when first called.
//
// What the clones share is included here, before any of them names its target: an inline function
// that the linker kept from the AVX-512 clone would end every other processor's run.
#pragma once
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <limits>
#include <memory>
#include <type_traits>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "../call.h"

namespace fastkd::cpu {

struct Kernels {
  const char* name;  // the instruction set's
  bool (*supported)();
  // Take rows from `next` on until N are done. Several threads share `next`, for rows that are
  // skipped cost nothing and often lie together.
  void (*dense_rows)(const DenseRows& call, std::atomic<int64_t>& next);
  void (*sparse_rows)(const SparseRows& call, std::atomic<int64_t>& next);
  void (*scale_rows)(const ScaleRows& call, std::atomic<int64_t>& next);
};

// The widest set this processor has, or a narrower one that `limit_kernels` asked for.
const Kernels& kernels();

// Take rows of double.
void dense_rows_double(const DenseRows& call, std::atomic<int64_t>& next);
void sparse_rows_double(const SparseRows& call, std::atomic<int64_t>& next);

// The sets this processor has, widest first; a null name ends them. For tests.
const Kernels* supported_kernels(int index);
void limit_kernels(int index);

}  // namespace fastkd::cpu
