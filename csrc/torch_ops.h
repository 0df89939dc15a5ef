// Tensors to the plain structs of call.h: what every native backend has in common. Arguments were
// checked in Python (fastkd/core/checks.py); what is checked here keeps a call of the bare op from
// reading memory that is not there.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <optional>
#include <tuple>

#include "call.h"

namespace fastkd {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType dtype(const Tensor& tensor) {
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

inline Rows rows(const Tensor& tensor) {  // [N, V] or [A, B, V]
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

inline int64_t number_of_rows(const Tensor& tensor) {
  return tensor.dim() == 3 ? tensor.size(0) * tensor.size(1) : tensor.size(0);
}

// Whether rows of the teacher would be read after the gradient was written over them. The very same
// rows are: a row is read before it is written.
inline bool overwrites_others(const Rows& dstudent, const Rows& teacher, int64_t N) {
  if (N == 0) return false;
  const bool same_rows = dstudent.data == teacher.data && dstudent.dtype == teacher.dtype &&
                         dstudent.offset(N - 1) == teacher.offset(N - 1) &&
                         dstudent.offset(N / 2) == teacher.offset(N / 2);
  return !same_rows && dstudent.address(0, 0) < teacher.address(N - 1, teacher.width) &&
         teacher.address(0, 0) < dstudent.address(N - 1, dstudent.width);
}

// [N] on the device of `like` and of its dtype. Not torch::stable::new_empty, which looks its op up
// by name: a microsecond more.
inline Tensor new_vector(const Tensor& like, int64_t N) {
  constexpr int64_t kStride = 1;
  int32_t scalar_type, device_type, device_index;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(like.get(), &scalar_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle vector;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(1, &N, &kStride, scalar_type, device_type, device_index, &vector));
  return Tensor(vector);
}

// What a call has whatever its teacher, checked, with the terms' vectors for the results.
struct CheckedCall {
  CheckedCall(Call& call, const Tensor& student, const std::optional<Tensor>& labels,
              const Tensor& student_inv_temperature, const Tensor& teacher_inv_temperature,
              const std::optional<Tensor>& soft_weight, const std::optional<Tensor>& hard_weight,
              const std::optional<Tensor>& dstudent, int64_t vocab_size)
      : call_(call), student_(student) {
    call.student = rows(student);
    call.N = number_of_rows(student);
    const DType compute = dtype(student_inv_temperature);
    call.is_double = compute == DType::kDouble;
    STD_TORCH_CHECK(compute == DType::kFloat || call.is_double,
                    "fastkd: the compute dtype must be float or double");
    STD_TORCH_CHECK(call.is_double || call.student.dtype != DType::kDouble,
                    "fastkd: double logits need vectors of double");
    if (dstudent) {
      call.dstudent = rows(*dstudent);
      STD_TORCH_CHECK(
          number_of_rows(*dstudent) == call.N && call.dstudent.width == call.student.width,
          "fastkd: dstudent must have the rows and the V of student");
      check_device(*dstudent);
    }
    STD_TORCH_CHECK(vocab_size >= 1 && vocab_size <= call.student.width,
                    "fastkd: vocab_size out of range");
    call.vocab_size = vocab_size;
    call.labels = integers(labels);
    call.student_inv_temperature = vector(student_inv_temperature);
    call.teacher_inv_temperature = vector(teacher_inv_temperature);
    call.soft_weight = vector(soft_weight);
    call.hard_weight = vector(hard_weight);
    STD_TORCH_CHECK(labels || !hard_weight, "fastkd: the hard term needs labels");
    soft = new_vector(student_inv_temperature, call.N);
    hard = new_vector(student_inv_temperature, call.N);
    call.soft = soft->data_ptr();
    call.hard = hard->data_ptr();
  }

  void check_device(const Tensor& tensor) const {
    STD_TORCH_CHECK(tensor.device() == student_.device(),
                    "fastkd: every tensor must be on the device of student");
  }
  // `per_row` numbers for each of the rows, of the compute dtype.
  void* vector(const Tensor& values, int64_t per_row = 1) const {
    check(values, per_row, dtype(values) == (call_.is_double ? DType::kDouble : DType::kFloat));
    return values.data_ptr();
  }
  void* vector(const std::optional<Tensor>& values) const {
    return values ? vector(*values) : nullptr;
  }
  const int64_t* integers(const Tensor& values, int64_t per_row = 1) const {
    check(values, per_row, values.scalar_type() == ScalarType::Long);
    return static_cast<const int64_t*>(values.data_ptr());
  }
  const int64_t* integers(const std::optional<Tensor>& values) const {
    return values ? integers(*values) : nullptr;
  }

  std::optional<Tensor> soft, hard;

 private:
  void check(const Tensor& values, int64_t per_row, bool fits) const {
    check_device(values);
    STD_TORCH_CHECK(values.numel() == call_.N * per_row && values.is_contiguous() && fits,
                    "fastkd: per-row tensors must be contiguous, [N] or [N, k]: labels, keep and "
                    "ids int64, the others of the compute dtype");
  }

  const Call& call_;
  const Tensor& student_;
};

// The op fastkd::dense_rows of a backend whose kernels `launch` runs. `student` tells it the
// device.
template <void (*launch)(const DenseRows& call, const Tensor& student)>
std::tuple<Tensor, Tensor> dense_rows(
    const Tensor& student, const Tensor& teacher, const std::optional<Tensor>& labels,
    const Tensor& student_inv_temperature, const Tensor& teacher_inv_temperature,
    const std::optional<Tensor>& soft_weight, const std::optional<Tensor>& hard_weight,
    const std::optional<Tensor>& dstudent, const std::optional<Tensor>& keep, int64_t vocab_size,
    int64_t divergence, const std::optional<Tensor>& beta,
    const std::optional<Tensor>& target_weight, const std::optional<Tensor>& target,
    bool teacher_probs) {
  DenseRows call;
  const CheckedCall checked(call, student, labels, student_inv_temperature, teacher_inv_temperature,
                            soft_weight, hard_weight, dstudent, vocab_size);
  call.teacher.logits = rows(teacher);
  call.teacher.keep = checked.integers(keep);
  call.teacher.probs = teacher_probs;
  checked.check_device(teacher);
  STD_TORCH_CHECK(number_of_rows(teacher) == call.N,
                  "fastkd: teacher must have as many rows as student");
  STD_TORCH_CHECK(vocab_size <= call.teacher.logits.width, "fastkd: vocab_size out of range");
  STD_TORCH_CHECK(call.is_double == (call.student.dtype == DType::kDouble ||
                                     call.teacher.logits.dtype == DType::kDouble),
                  "fastkd: the vectors must be double where either logits are, else float");
  STD_TORCH_CHECK(
      !dstudent || !soft_weight || !overwrites_others(call.dstudent, call.teacher.logits, call.N),
      "fastkd: dstudent lies over rows of the teacher that are not the same: pass "
      "teacher_logits.clone(), or inplace=False");
  call.divergence = static_cast<Divergence>(divergence);
  call.beta = checked.vector(beta);
  STD_TORCH_CHECK(divergence >= static_cast<int64_t>(Divergence::kForward) &&
                      divergence <= static_cast<int64_t>(Divergence::kMixture) &&
                      beta.has_value() == (call.divergence == Divergence::kMixture),
                  "fastkd: a divergence that is none, or a mixture without beta, or beta besides");
  call.target_weight = checked.vector(target_weight);
  call.target = checked.vector(target);
  STD_TORCH_CHECK(
      !target_weight ||
          (labels && target && soft_weight && call.divergence == Divergence::kForward),
      "fastkd: the target term needs labels, target, soft_weight and the forward divergence");
  if (!target_weight) call.target = nullptr;
  launch(call, student);
  return {*checked.soft, *checked.hard};
}

// The op fastkd::sparse_rows.
template <void (*launch)(const SparseRows& call, const Tensor& student)>
std::tuple<Tensor, Tensor> sparse_rows(
    const Tensor& student, const Tensor& ids, const Tensor& log_probs,
    const std::optional<Tensor>& log_rest, const std::optional<Tensor>& labels,
    const Tensor& student_inv_temperature, const Tensor& teacher_inv_temperature,
    const std::optional<Tensor>& soft_weight, const std::optional<Tensor>& hard_weight,
    const std::optional<Tensor>& dstudent, int64_t vocab_size, bool restricted) {
  SparseRows call;
  const CheckedCall checked(call, student, labels, student_inv_temperature, teacher_inv_temperature,
                            soft_weight, hard_weight, dstudent, vocab_size);
  STD_TORCH_CHECK(ids.dim() == 2, "fastkd: ids must be [N, k]");
  const int64_t k = ids.size(1);
  call.teacher = {checked.integers(ids, k), checked.vector(log_probs, k), checked.vector(log_rest),
                  k, restricted};
  launch(call, student);
  return {*checked.soft, *checked.hard};
}

// The op fastkd::scale_rows_.
template <void (*launch)(const ScaleRows& call, const Tensor& dstudent)>
void scale_rows(Tensor dstudent, const Tensor& scale) {
  ScaleRows call;
  call.dstudent = rows(dstudent);
  call.N = number_of_rows(dstudent);
  call.per_row = scale.numel() != 1;
  call.scale_is_double = dtype(scale) == DType::kDouble;
  STD_TORCH_CHECK((scale.numel() == 1 || scale.numel() == call.N) && scale.is_contiguous() &&
                      (call.scale_is_double || dtype(scale) == DType::kFloat),
                  "fastkd: scale must be contiguous, one value or N, float or double");
  call.scale = scale.data_ptr();
  STD_TORCH_CHECK(scale.device() == dstudent.device(),
                  "fastkd: scale must be on dstudent's device");
  launch(call, dstudent);
}

}  // namespace fastkd
