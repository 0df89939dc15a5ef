#include "clone.h"

namespace fastkd::cpu {

#define FASTKD_DECLARE(isa)                                           \
  void kd_rows_##isa(const KdRows& call, std::atomic<int64_t>& next); \
  void scale_rows_##isa(const ScaleRows& call, std::atomic<int64_t>& next);
FASTKD_DECLARE(avx512)
FASTKD_DECLARE(avx2)
FASTKD_DECLARE(baseline)
#undef FASTKD_DECLARE

namespace {

constexpr Kernels kTable[] = {
#if defined(__x86_64__)
    {"AVX-512", [] { return __builtin_cpu_supports("x86-64-v4") != 0; }, kd_rows_avx512,
     scale_rows_avx512},
    {"AVX2", [] { return __builtin_cpu_supports("x86-64-v3") != 0; }, kd_rows_avx2,
     scale_rows_avx2},
#endif
    {"baseline", [] { return true; }, kd_rows_baseline, scale_rows_baseline},
};

std::atomic<int> limit{0};

}  // namespace

const Kernels* supported_kernels(int index) {
  if (index < 0) return nullptr;
  for (const Kernels& kernels : kTable) {
    if (kernels.supported() && index-- == 0) return &kernels;
  }
  return nullptr;
}

void limit_kernels(int index) { limit = index; }

const Kernels& kernels() { return *supported_kernels(limit); }

void kd_rows_double(const KdRows& call, std::atomic<int64_t>& next) { kd_rows<double>(call, next); }

}  // namespace fastkd::cpu
