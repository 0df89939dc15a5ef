// The CPU backend's ops: rows to threads. Schemas are defined in Python (fastkd/core/ops.py).
#if defined(__linux__)
#include <sys/mman.h>
#endif
#if defined(__unix__) || defined(__APPLE__)
#include <unistd.h>
#endif

#include <algorithm>
#include <string>

#include "../module.h"
#include "../torch_ops.h"
#include "dispatch.h"
#include "order_named.h"

namespace fastkd {
namespace {

// A process that was forked has the memory of a pool of threads and none of the threads: OpenMP
// would wait for them for ever.
void check_not_forked() {
#if defined(__unix__) || defined(__APPLE__)
  static std::atomic<pid_t> owner{0};  // the process that has the pool's threads
  const pid_t self = getpid();
  pid_t before = 0;
  STD_TORCH_CHECK(owner.compare_exchange_strong(before, self) || before == self,
                  "fastkd: this process was forked after its parent had computed a loss on several "
                  "threads, which do not exist here: call torch.set_num_threads(1), or start "
                  "processes by \"spawn\" or \"forkserver\"");
#endif
}

// Runs `work(next)` on as many threads as the pairs are worth.
template <class Work>
void parallel_rows(int64_t N, int64_t V, const Work& work) {
  constexpr int64_t kPairsPerThread = 16384;  // about 10 us, several times the cost of waking one
  const int64_t threads = std::min<int64_t>(
      {torch::stable::get_num_threads(), N, (N * V + kPairsPerThread - 1) / kPairsPerThread});
  std::atomic<int64_t> next{0};
  if (threads <= 1) return work(next);
  check_not_forked();
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

// The kernels of a call. A build of one instruction set alone (setup.py) may be on a processor that
// has not got it.
const cpu::Kernels& kernels() {
  STD_TORCH_CHECK(cpu::supported_kernels(0) != nullptr,
                  "fastkd: built for an instruction set that this processor does not have");
  return cpu::kernels();
}

// No kernel is compiled for a gradient wider than the arithmetic.
template <class Call>
void check_gradient(const Call& call) {
  STD_TORCH_CHECK(call.is_double || call.dstudent.dtype != DType::kDouble,
                  "fastkd: a double dstudent needs double logits");
}

void dense_rows_cpu(const DenseRows& call, const Tensor&) {
  check_gradient(call);
  const bool is_own = call.dstudent.data != nullptr && call.dstudent.data != call.student.data;
  if (is_own && call.dstudent.is_contiguous()) advise_huge_pages(call.dstudent, call.N);
  const auto compute = call.is_double ? cpu::dense_rows_double : kernels().dense_rows;
  parallel_rows(call.N, call.student.width,
                [&](std::atomic<int64_t>& next) { compute(call, next); });
}

void sparse_rows_cpu(const SparseRows& call, const Tensor&) {
  check_gradient(call);
  if (call.dstudent.data != nullptr && call.dstudent.data != call.student.data &&
      call.dstudent.is_contiguous()) {
    advise_huge_pages(call.dstudent, call.N);
  }
  const auto compute = call.is_double ? cpu::sparse_rows_double : kernels().sparse_rows;
  parallel_rows(call.N, call.student.width,
                [&](std::atomic<int64_t>& next) { compute(call, next); });
}

void scale_rows_cpu(const ScaleRows& call, const Tensor&) {
  if (!call.per_row && call.scale_of(0) == 1) return;
  const auto scale = kernels().scale_rows;
  parallel_rows(call.N, call.dstudent.width,
                [&](std::atomic<int64_t>& next) { scale(call, next); });
}

template <class T>
void order_named_of(const Tensor& ids, const Tensor& log_probs, const Tensor& ordered,
                    const Tensor& ordered_log_probs, const Tensor& log_rest, int64_t vocab_size,
                    bool bucket) {
  const cpu::OrderNamed<T> call{static_cast<const int64_t*>(ids.data_ptr()),
                                static_cast<const T*>(log_probs.data_ptr()),
                                static_cast<int64_t*>(ordered.data_ptr()),
                                static_cast<T*>(ordered_log_probs.data_ptr()),
                                bucket ? static_cast<T*>(log_rest.data_ptr()) : nullptr,
                                ids.size(0),
                                ids.size(1),
                                vocab_size};
  constexpr int64_t kPairsPerClass = 32;  // some 20 ns
  parallel_rows(call.N, call.k * kPairsPerClass,
                [&](std::atomic<int64_t>& next) { cpu::order_named(call, next); });
}

std::tuple<Tensor, Tensor, Tensor> order_named_cpu(const Tensor& ids, const Tensor& log_probs,
                                                   int64_t vocab_size, bool bucket) {
  const DType compute = dtype(log_probs);
  STD_TORCH_CHECK(ids.dim() == 2 && ids.scalar_type() == ScalarType::Long && ids.is_contiguous() &&
                      log_probs.numel() == ids.numel() && log_probs.is_contiguous() &&
                      (compute == DType::kFloat || compute == DType::kDouble),
                  "fastkd: ids and log_probs must be contiguous [N, k], int64 and float or double");
  STD_TORCH_CHECK(vocab_size >= 1, "fastkd: vocab_size out of range");
  Tensor ordered = torch::stable::empty_like(ids);
  Tensor ordered_log_probs = torch::stable::empty_like(log_probs);
  Tensor log_rest = new_vector(log_probs, bucket ? ids.size(0) : 0);
  (compute == DType::kDouble ? order_named_of<double>
                             : order_named_of<float>)(ids, log_probs, ordered, ordered_log_probs,
                                                      log_rest, vocab_size, bucket);
  return {ordered, ordered_log_probs, log_rest};
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
  m.impl("dense_rows", TORCH_BOX(&fastkd::dense_rows<fastkd::dense_rows_cpu>));
  m.impl("sparse_rows", TORCH_BOX(&fastkd::sparse_rows<fastkd::sparse_rows_cpu>));
  m.impl("order_named", TORCH_BOX(&fastkd::order_named_cpu));
  m.impl("scale_rows_", TORCH_BOX(&fastkd::scale_rows<fastkd::scale_rows_cpu>));
}

FASTKD_MODULE(_C)
