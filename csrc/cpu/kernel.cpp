#include "kernel.h"

#include "kd_row.h"

namespace fastkd::cpu {
namespace {

// Kept from call to call: fresh memory would fault in page by page, each time anew.
template <class T>
Workspace<T>& workspace(int64_t vocab_size) {
  static thread_local std::unique_ptr<Workspace<T>> kept;
  if (!kept || kept->vocab_size < vocab_size) {
    kept.reset();
    kept = std::make_unique<Workspace<T>>(vocab_size);
  }
  return *kept;
}

template <class T>
FASTKD_INLINE void kd_rows(const KdRows& call, std::atomic<int64_t>& next) {
  const FlushToZero flush;
  Workspace<T>& work = workspace<T>(call.vocab_size);
  for (int64_t row; (row = next++) < call.N;) Row<T>(call, work, row).run();
}

template <class T, class Stored>
FASTKD_INLINE void scale_row(Stored* __restrict values, int64_t n, T scale) {
#pragma omp simd
  for (int64_t i = 0; i < n; ++i) {
    values[i] = store<Stored>(static_cast<T>(load(values[i])) * scale);
  }
}

FASTKD_INLINE void scale_rows(const ScaleRows& call, std::atomic<int64_t>& next) {
  dispatch(call.dstudent.dtype, [&](auto* stored) __attribute__((always_inline)) {
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

// One clone of everything above per instruction set; `target` decides how the loops vectorise.
#define FASTKD_KERNELS(isa, attributes)                                                   \
  attributes void kd_rows_##isa(const KdRows& call, std::atomic<int64_t>& next) {        \
    call.is_double ? kd_rows<double>(call, next) : kd_rows<float>(call, next);            \
  }                                                                                       \
  attributes void scale_rows_##isa(const ScaleRows& call, std::atomic<int64_t>& next) {  \
    scale_rows(call, next);                                                               \
  }

#if defined(__x86_64__)
FASTKD_KERNELS(avx512, __attribute__((flatten, target("arch=x86-64-v4,prefer-vector-width=512"))))
FASTKD_KERNELS(avx2, __attribute__((flatten, target("arch=x86-64-v3"))))
#endif
FASTKD_KERNELS(baseline, __attribute__((flatten)))

#undef FASTKD_KERNELS

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
  for (const Kernels& kernels : kTable) {
    if (kernels.supported() && index-- == 0) return &kernels;
  }
  return nullptr;
}

void limit_kernels(int index) { limit = index; }

const Kernels& kernels() { return *supported_kernels(limit); }

}  // namespace fastkd::cpu
