// The kernels of kernels.cu as launch.cu sees them: by pointers, for nvcc gives the host's half of
// a kernel template no name outside of its own file.
#pragma once
#include <cstddef>

#include "plan.h"

namespace fastkd::cuda {

// The kernels of one kind of exchange, and the dynamic shared memory that each of them takes.
struct Kernels {
  void (*dense_rows)(DenseRows, Plan, unsigned* workspace);
  // The student's rows, in a call that has no teacher.
  void (*sparse_rows)(DenseRows, SparseTeacher, Plan, unsigned* workspace);
  size_t shared_bytes;
};
Kernels kernels(bool clusters, Divergence divergence);

// scale_rows() takes a row in `parts` of this many steps, 1024 columns: each is one warp's work.
constexpr int kStepsPerWarp = 4;
using ScaleRowsKernel = void (*)(ScaleRows, unsigned parts);
ScaleRowsKernel scaling_kernel();

}  // namespace fastkd::cuda
