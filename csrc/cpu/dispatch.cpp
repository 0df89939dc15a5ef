#include "dispatch.h"

namespace fastkd::cpu {

// Declared weak, a clone is null where a build leaves it out.
#define FASTKD_DECLARE(isa)                                                           \
  namespace isa {                                                                     \
  [[gnu::weak]] void dense_rows(const DenseRows& call, std::atomic<int64_t>& next);   \
  [[gnu::weak]] void sparse_rows(const SparseRows& call, std::atomic<int64_t>& next); \
  [[gnu::weak]] void scale_rows(const ScaleRows& call, std::atomic<int64_t>& next);   \
  }
FASTKD_DECLARE(avx512)
FASTKD_DECLARE(avx2)
FASTKD_DECLARE(baseline)
#undef FASTKD_DECLARE

namespace {

constexpr Kernels kTable[] = {
#if defined(__x86_64__)
    {"AVX-512", [] { return __builtin_cpu_supports("x86-64-v4") != 0; }, avx512::dense_rows,
     avx512::sparse_rows, avx512::scale_rows},
    {"AVX2", [] { return __builtin_cpu_supports("x86-64-v3") != 0; }, avx2::dense_rows,
     avx2::sparse_rows, avx2::scale_rows},
#endif
    {"baseline", [] { return true; }, baseline::dense_rows, baseline::sparse_rows,
     baseline::scale_rows},
};

std::atomic<int> limit{0};

}  // namespace

const Kernels* supported_kernels(int index) {
  if (index < 0) return nullptr;
  for (const Kernels& kernels : kTable) {
    if (kernels.dense_rows && kernels.supported() && index-- == 0) return &kernels;
  }
  return nullptr;
}

void limit_kernels(int index) { limit = index; }

const Kernels& kernels() { return *supported_kernels(limit); }

}  // namespace fastkd::cpu
