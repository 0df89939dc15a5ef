// The plain structs between what knows torch (torch_ops.h) and what knows the machine.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define FASTKD_HOST_DEVICE __host__ __device__
#else
#define FASTKD_HOST_DEVICE
#endif

namespace fastkd {

// Which divergence the soft term is; the numbers are those of fastkd/spec.py. kNone: none, where
// nothing has to be saved for a gradient.
enum class Divergence { kNone = -1, kForward, kReverse, kMixture };

enum class DType { kFloat, kBFloat16, kHalf, kDouble };

// The rows of a tensor [A, B, V] with stride 1 in V; row r = a * B + b.
struct Rows {
  void* data = nullptr;
  DType dtype = DType::kFloat;
  int64_t width = 0;         // V
  int64_t inner = 1;         // B
  int64_t outer_stride = 0;  // elements from a to a + 1: rows * V exceeds 2^31
  int64_t inner_stride = 0;  // elements from b to b + 1

  FASTKD_HOST_DEVICE int64_t offset(int64_t row) const {
    return row / inner * outer_stride + row % inner * inner_stride;
  }
  FASTKD_HOST_DEVICE int64_t element_bytes() const {
    return dtype == DType::kDouble ? 8 : dtype == DType::kFloat ? 4 : 2;
  }
  bool is_contiguous() const {
    return inner_stride == width && (outer_stride == 0 || outer_stride == inner * width);
  }
  // A column need not exist: this is for prefetching.
  uintptr_t address(int64_t row, int64_t column) const {
    return reinterpret_cast<uintptr_t>(data) +
           static_cast<uintptr_t>((offset(row) + column) * element_bytes());
  }
};

// What a call has whatever its teacher; the meaning of every field is defined in fastkd/spec.py.
// The vectors [N] are double where either logits are, else float.
struct Call {
  Rows student;
  Rows dstudent;                    // data null: no gradient; may alias student
  const int64_t* labels = nullptr;  // null: no labels
  const void* student_inv_temperature = nullptr;
  const void* teacher_inv_temperature = nullptr;
  const void* soft_weight = nullptr;  // null: the soft term is not computed
  const void* hard_weight = nullptr;  // null: the hard term is not computed
  // Not null: decoupled. The soft term leaves out the label, which has a term of its own.
  const void* target_weight = nullptr;
  void* soft = nullptr;
  void* hard = nullptr;
  void* target = nullptr;  // not null where target_weight is not
  int64_t N = 0;
  int64_t vocab_size = 0;
  Divergence divergence = Divergence::kForward;
  const void* beta = nullptr;  // of a mixture, else null
  bool is_double = false;
};

// A teacher of all classes.
struct DenseTeacher {
  Rows logits;
  const int64_t* keep = nullptr;  // [N]; null: nothing is pruned
  bool probs = false;             // the logits are probabilities
};

// A teacher of k classes a row.
struct SparseTeacher {
  const int64_t* ids = nullptr;  // [N, k], ascending, each once; those >= vocab_size are not there
  const void* log_probs = nullptr;  // [N, k]
  const void* log_rest = nullptr;   // [N]: all other classes are one more; null: they have no p
  int64_t k = 0;
  bool restricted = false;  // the student's softmax is over the ids as well
};

// One call of fastkd::dense_rows.
struct DenseRows : Call {
  DenseTeacher teacher;

  // How many classes of a row are kept: the values of a vector are checked nowhere.
  FASTKD_HOST_DEVICE int64_t kept(int64_t row) const {
    if (teacher.keep == nullptr || teacher.keep[row] >= vocab_size) return vocab_size;
    return teacher.keep[row] > 1 ? teacher.keep[row] : 1;
  }
};

// One call of fastkd::sparse_rows.
struct SparseRows : Call {
  SparseTeacher teacher;
};

// One call of fastkd::scale_rows_.
struct ScaleRows {
  Rows dstudent;
  const void* scale = nullptr;  // one value, or N
  bool per_row = false;
  bool scale_is_double = false;  // else float
  int64_t N = 0;

  FASTKD_HOST_DEVICE double scale_of(int64_t row) const {
    const int64_t index = per_row ? row : 0;
    return scale_is_double ? static_cast<const double*>(scale)[index]
                           : static_cast<const float*>(scale)[index];
  }
};

}  // namespace fastkd
