// The CPU backend's ops: rows to threads. Schemas are defined in Python (fastkd/ops.py).
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <string>

#include "../module.h"
#include "../tensors.h"
#include "kernel.h"

namespace fastkd {
namespace {

// Runs `work(next)` on as many threads as the pairs are worth.
template <class Work>
void parallel_rows(int64_t N, int64_t V, const Work& work) {
  constexpr int64_t kPairsPerThread = 16384;  // about 10 us, several times the cost of waking one
  const int64_t threads = std::min<int64_t>(
      {torch::stable::get_num_threads(), N, (N * V + kPairsPerThread - 1) / kPairsPerThread});
  std::atomic<int64_t> next{0};
  if (threads <= 1) return work(next);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) { work(next); });
}

// A large gradient is fresh memory, and its first touch one fault per page: with pages of 4 KiB
// that cost more than the loss itself (1.3 of 2.1 ns per float32 pair). Only advice, and only where
// the memory is whole pages of its own.
void advise_huge_pages(const Rows& rows, int64_t N) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr int64_t kPage = 4096, kWorthwhile = 8 << 20;
  const int64_t bytes = N * rows.width * rows.element_bytes();
  if (bytes < kWorthwhile) return;
  const auto begin = (reinterpret_cast<uintptr_t>(rows.data) + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(bytes - kPage), MADV_HUGEPAGE);
#endif
}

void kd_rows_cpu(const KdRows& call, const Tensor&) {
  const bool is_own = call.dstudent.data != nullptr && call.dstudent.data != call.student.data;
  if (is_own && call.dstudent.is_contiguous()) advise_huge_pages(call.dstudent, call.N);
  parallel_rows(call.N, call.student.width, [&](std::atomic<int64_t>& next) {
    (call.is_double ? cpu::kd_rows_double : cpu::kernels().kd_rows)(call, next);
  });
}

void topk_rows_cpu(const TopkRows& call, const Tensor&) {
  if (call.dstudent.data != nullptr && call.dstudent.data != call.student.data &&
      call.dstudent.is_contiguous()) {
    advise_huge_pages(call.dstudent, call.N);
  }
  parallel_rows(call.N, call.student.width, [&](std::atomic<int64_t>& next) {
    (call.is_double ? cpu::topk_rows_double : cpu::kernels().topk_rows)(call, next);
  });
}

void scale_rows_cpu(const ScaleRows& call, const Tensor&) {
  if (!call.per_row && call.scale_of(0) == 1) return;
  parallel_rows(call.N, call.dstudent.width,
                [&](std::atomic<int64_t>& next) { cpu::kernels().scale_rows(call, next); });
}

// The instruction set in use, after limiting it to the index-th of those this processor has, widest
// first; "" where there are fewer. For tests and `python -m fastkd`.
std::string cpu_instruction_set(int64_t index) {
  index = std::clamp<int64_t>(index, -1, 99);
  const cpu::Kernels* kernels = cpu::supported_kernels(static_cast<int>(index));
  if (kernels == nullptr) return "";
  cpu::limit_kernels(static_cast<int>(index));
  return kernels->name;
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) { m.def("cpu_instruction_set(int index) -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("cpu_instruction_set", TORCH_BOX(&fastkd::cpu_instruction_set));
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("kd_rows", TORCH_BOX(&fastkd::kd_rows<fastkd::kd_rows_cpu>));
  m.impl("topk_rows", TORCH_BOX(&fastkd::topk_rows<fastkd::topk_rows_cpu>));
  m.impl("scale_rows_", TORCH_BOX(&fastkd::scale_rows<fastkd::scale_rows_cpu>));
}

FASTKD_MODULE(_C)
