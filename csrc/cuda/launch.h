// The CUDA kernels as the host sees them: neither torch nor CUDA is needed to call them.
#pragma once
#include <cstddef>

#include "../call.h"

namespace fastkd::cuda {

// All pointers of a call are device memory of the current device; dtypes are float, bfloat16, half.

// Bytes of scratch memory that this call needs; 0: none.
size_t workspace_bytes(const DenseRows& call);
size_t workspace_bytes(const SparseRows& call);

// Enqueue the work on `stream`, a cudaStream_t of the current device. Return null, or what is
// wrong.
const char* dense_rows(const DenseRows& call, void* workspace, void* stream);
const char* sparse_rows(const SparseRows& call, void* workspace, void* stream);
const char* scale_rows(const ScaleRows& call, void* stream);

}  // namespace fastkd::cuda
