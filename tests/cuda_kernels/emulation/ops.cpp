// The CUDA kernels' own source on CPU tensors, as ops of backends of their own: schemas are defined
// by tests/conftest.py.
#include <mutex>
#include <string>
#include <vector>

#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/plan.h"
#include "../../../csrc/module.h"
#include "../../../csrc/torch_ops.h"
#include "cuda_emulation.h"

namespace fastkd {
namespace {

std::mutex mutex;  // one machine

void check(const char* error) { STD_TORCH_CHECK(error == nullptr, error); }

// The layouts under test. Both with CTAs of two warps, so that a row of 1100 has several; but
// vocabularies of 2^15 and more are laid out as the wheel lays them out.
template <bool kClusters>
cuda::Limits layout(int64_t vocab_size) {
  const bool as_shipped = vocab_size >= 1 << 15;
  cuda::Limits limits;
  if (!as_shipped) limits.threads = 64;
  if (kClusters) {
    limits.tickets = 0;
    if (!as_shipped) limits.cluster = 4, limits.steps = 2;
  } else {
    limits.cluster = 0;
    if (!as_shipped) limits.tickets = 24, limits.steps = 3;
  }
  return limits;
}

template <bool kClusters, auto run, class Call>
void emulated(const Call& call, const Tensor&) {
  const std::lock_guard<std::mutex> lock(mutex);
  cuda::set_limits(layout<kClusters>(call.vocab_size));
  std::vector<uint4> workspace(cuda::workspace_bytes(call) / 16 + 1, {~0u, ~0u, ~0u, ~0u});
  check(run(call, workspace.data(), nullptr));
}
template <bool kClusters>
constexpr auto kDenseRows = dense_rows<emulated<kClusters, cuda::dense_rows>>;
template <bool kClusters>
constexpr auto kSparseRows = sparse_rows<emulated<kClusters, cuda::sparse_rows>>;

void scale_rows_emulated(const ScaleRows& call, const Tensor&) {
  const std::lock_guard<std::mutex> lock(mutex);
  check(cuda::scale_rows(call, nullptr));
}

// 0 forward, 1 reverse, from 2 on random with that seed; `places`: CTAs that run at one time.
void emulation_schedule(int64_t schedule, int64_t places) {
  const std::lock_guard<std::mutex> lock(mutex);
  const auto kind = schedule == 0   ? emulation::Schedule::kForward
                    : schedule == 1 ? emulation::Schedule::kReverse
                                    : emulation::Schedule::kRandom;
  emulation::configure(kind, static_cast<unsigned>(schedule), static_cast<int>(places));
}

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) {
  m.def("emulation_schedule(int schedule, int places) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("emulation_schedule", TORCH_BOX(&fastkd::emulation_schedule));
}
STABLE_TORCH_LIBRARY_IMPL(fastkd, CPU, m) {
  m.impl("dense_rows_cluster", TORCH_BOX(fastkd::kDenseRows<true>));
  m.impl("dense_rows_ticket", TORCH_BOX(fastkd::kDenseRows<false>));
  m.impl("sparse_rows_cluster", TORCH_BOX(fastkd::kSparseRows<true>));
  m.impl("sparse_rows_ticket", TORCH_BOX(fastkd::kSparseRows<false>));
  m.impl("scale_rows_cluster_", TORCH_BOX(&fastkd::scale_rows<fastkd::scale_rows_emulated>));
  m.impl("scale_rows_ticket_", TORCH_BOX(&fastkd::scale_rows<fastkd::scale_rows_emulated>));
}

FASTKD_MODULE(emulation)
