// The CUDA backend's ops: device, stream and scratch memory for the kernels. Schemas are defined in
// Python (fastkd/core/ops.py). Neither torch's CUDA headers nor a torch with CUDA is needed to
// compile.
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include <stdexcept>
#include <string>

#include "../module.h"
#include "../torch_ops.h"
#include "launch.h"

namespace fastkd {
namespace {

using torch::stable::accelerator::DeviceGuard;

void check(const char* error) {
  if (error != nullptr) throw std::runtime_error(std::string("fastkd, cuda: ") + error);
}

void* current_stream(int32_t device) {
  void* stream = nullptr;
  if (aoti_torch_get_current_cuda_stream(device, &stream) != AOTI_TORCH_SUCCESS)
    check("torch has no current stream on this device");
  return stream;
}

// Runs cuda::dense_rows or cuda::sparse_rows on the student's device and stream.
template <auto run, class Call>
void launch(const Call& call, const Tensor& student) {
  if (call.is_double || call.dstudent.dtype == DType::kDouble)
    check("the kernels take float32, bfloat16 and float16 logits, got float64");
  if (call.N == 0) return;
  const int32_t device = student.get_device_index();
  const DeviceGuard guard(device);
  // It comes from torch's caching allocator, and goes back when this returns, to be used again no
  // earlier than the work enqueued here is done, for that is on the same stream.
  const size_t bytes = cuda::workspace_bytes(call);
  std::optional<Tensor> workspace;
  if (bytes > 0)
    workspace = torch::stable::new_empty(student, {static_cast<int64_t>(bytes)}, ScalarType::Byte);
  check(run(call, workspace ? workspace->data_ptr() : nullptr, current_stream(device)));
}

void scale_rows_cuda(const ScaleRows& call, const Tensor& dstudent) {
  if (call.dstudent.dtype == DType::kDouble)
    check("the kernels take float32, bfloat16 and float16 gradients, got float64");
  if (call.N == 0) return;
  const int32_t device = dstudent.get_device_index();
  const DeviceGuard guard(device);
  check(cuda::scale_rows(call, current_stream(device)));
}

// The CUDA version that the kernels are built with, and for what: "13.0 sm_80 sm_90 compute_120".
std::string cuda_build() { return FASTKD_CUDA_BUILD; }

}  // namespace
}  // namespace fastkd

STABLE_TORCH_LIBRARY_FRAGMENT(fastkd, m) { m.def("cuda_build() -> str"); }

STABLE_TORCH_LIBRARY_IMPL(fastkd, CompositeExplicitAutograd, m) {
  m.impl("cuda_build", TORCH_BOX(&fastkd::cuda_build));
}

STABLE_TORCH_LIBRARY_IMPL(fastkd, CUDA, m) {
  m.impl("dense_rows", TORCH_BOX(&fastkd::dense_rows<fastkd::launch<fastkd::cuda::dense_rows>>));
  m.impl("sparse_rows", TORCH_BOX(&fastkd::sparse_rows<fastkd::launch<fastkd::cuda::sparse_rows>>));
  m.impl("scale_rows_", TORCH_BOX(&fastkd::scale_rows<fastkd::scale_rows_cuda>));
}

FASTKD_MODULE(_C_cuda)
