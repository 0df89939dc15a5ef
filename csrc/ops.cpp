// What knows torch: tensors to the plain structs of rows.h, and rows to threads. Arguments were
// checked in Python (fastkd/arguments.py); schemas are defined there too (fastkd/ops.py).
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>

#include "cpu/kernel.h"
#include "module.h"

namespace fastkd {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

DType dtype(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float:
      return DType::kFloat;
    case ScalarType::BFloat16:
      return DType::kBFloat16;
    case ScalarType::Half:
      return DType::kHalf;
    case ScalarType::Double:
      return DType::kDouble;
    default:
      STD_TORCH_CHECK(false, "fastkd: unsupported dtype");
  }
}

Rows rows(const Tensor& tensor) {  // [N, V] or [A, B, V]
  const int64_t dim = tensor.dim();
  STD_TORCH_CHECK(
      (dim == 2 || dim == 3) && (tensor.stride(dim - 1) == 1 || tensor.size(dim - 1) == 1),
      "fastkd: rows must come as [N, V] or [A, B, V] with stride 1 in V");
  return {tensor.data_ptr(),
          dtype(tensor),
          tensor.size(dim - 1),
          tensor.size(dim - 2),
          dim == 3 ? tensor.stride(0) : 0,
          tensor.stride(dim - 2)};
}

int64_t number_of_rows(const Tensor& tensor) {
  return tensor.dim() == 3 ? tensor.size(0) * tensor.size(1) : tensor.size(0);
}

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
  constexpr int64_t kSizes[] = {4, 2, 2, 8};  // by DType
  const int64_t bytes = N * rows.width * kSizes[static_cast<int>(rows.dtype)];
  if (bytes < kWorthwhile) return;
  const auto begin = (reinterpret_cast<uintptr_t>(rows.data) + kPage - 1) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), static_cast<size_t>(bytes - kPage), MADV_HUGEPAGE);
#endif
}

const void* data(const std::optional<Tensor>& tensor) {
  return tensor ? tensor->data_ptr() : nullptr;
}

std::tuple<Tensor, Tensor> kd_rows_cpu(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
    const Tensor& student_inv_temperature, const Tensor& teacher_inv_temperature,
    const std::optional<Tensor>& soft_weight, const std::optional<Tensor>& hard_weight,
    const std::optional<Tensor>& dstudent, int64_t keep, int64_t vocab_size, double beta) {
  KdRows call;
  call.student = rows(student);
  call.teacher = rows(teacher);
  call.N = number_of_rows(student);
  STD_TORCH_CHECK(number_of_rows(teacher) == call.N,
                  "fastkd: teacher must have as many rows as student");
  if (dstudent) {
    call.dstudent = rows(*dstudent);
    STD_TORCH_CHECK(
        number_of_rows(*dstudent) == call.N && call.dstudent.width == call.student.width,
        "fastkd: dstudent must have the rows and the V of student");
    const bool inplace = call.dstudent.data == call.student.data;
    if (!inplace && dstudent->is_contiguous()) advise_huge_pages(call.dstudent, call.N);
  }
  call.keep = keep;
  call.vocab_size = vocab_size;
  call.beta = beta;
  call.is_double = call.student.dtype == DType::kDouble || call.teacher.dtype == DType::kDouble;
  const auto check = [&](const Tensor& vector, DType expected) {
    STD_TORCH_CHECK(vector.numel() == call.N && vector.is_contiguous() && dtype(vector) == expected,
                    "fastkd: a per-row vector must be contiguous, [N] and of the compute dtype");
  };
  const DType compute = call.is_double ? DType::kDouble : DType::kFloat;
  check(student_inv_temperature, compute);
  check(teacher_inv_temperature, compute);
  if (soft_weight) check(*soft_weight, compute);
  if (hard_weight) check(*hard_weight, compute);
  STD_TORCH_CHECK(!labels || (labels->numel() == call.N && labels->is_contiguous() &&
                              labels->scalar_type() == ScalarType::Long),
                  "fastkd: labels must be contiguous int64 [N]");
  STD_TORCH_CHECK(labels || !hard_weight, "fastkd: the hard term needs labels");
  STD_TORCH_CHECK(keep >= 1 && vocab_size >= 1 && vocab_size <= call.student.width &&
                      vocab_size <= call.teacher.width,
                  "fastkd: keep or vocab_size out of range");
  call.labels = static_cast<const int64_t*>(data(labels));
  call.student_inv_temperature = student_inv_temperature.data_ptr();
  call.teacher_inv_temperature = teacher_inv_temperature.data_ptr();
  call.soft_weight = data(soft_weight);
  call.hard_weight = data(hard_weight);
  Tensor soft = torch::stable::new_empty(student_inv_temperature, {call.N});
  Tensor hard = torch::stable::new_empty(student_inv_temperature, {call.N});
  call.soft = soft.data_ptr();
  call.hard = hard.data_ptr();
  parallel_rows(call.N, call.student.width, [&](std::atomic<int64_t>& next) {
    (call.is_double ? cpu::kd_rows_double : cpu::kernels().kd_rows)(call, next);
  });
  return {soft, hard};
}

void scale_rows_cpu(Tensor dstudent, const Tensor& scale) {
  ScaleRows call;
  call.dstudent = rows(dstudent);
  call.N = number_of_rows(dstudent);
  call.per_row = scale.numel() != 1;
  call.scale_is_double = dtype(scale) == DType::kDouble;
  STD_TORCH_CHECK((scale.numel() == 1 || scale.numel() == call.N) && scale.is_contiguous() &&
                      (call.scale_is_double || dtype(scale) == DType::kFloat),
                  "fastkd: scale must be contiguous, one value or N, float or double");
  call.scale = scale.data_ptr();
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
  m.impl("kd_rows", TORCH_BOX(&fastkd::kd_rows_cpu));
  m.impl("scale_rows_", TORCH_BOX(&fastkd::scale_rows_cpu));
}

FASTKD_MODULE(_C)
