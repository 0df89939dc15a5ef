// dstudent *= scale, one value or one per row, read on the device.
#include <cuda_runtime.h>

#include <algorithm>

#include "kernel.h"
#include "load.h"

namespace fastkd::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kStepsPerWarp = 4;  // 1024 columns: a warp for each part of a row

__global__ void __launch_bounds__(kThreads)
    scale_rows_kernel(const __grid_constant__ ScaleRows call, unsigned parts) {
  // The usual case: the gradient was scaled as it was written, and backward begins at 1.
  if (!call.per_row && call.scale_of(0) == 1) return;
  // Divisions of 32 bits: one of 64 is a function, around which registers are spilled.
  const int64_t rows = int64_t{gridDim.x / parts} * warps();
  for (int64_t row = int64_t{blockIdx.x / parts} * warps() + warp(); row < call.N; row += rows) {
    const auto scale = static_cast<float>(call.scale_of(row));
    if (scale == 1) continue;
    const View view(call.dstudent, row, call.dstudent.width,
                    call.dstudent.dtype == DType::kFloat ? View::kSplit : 0);
    const int steps = (view.columns + kStep - 1) / kStep;
    const int begin = static_cast<int>(blockIdx.x % parts) * kStepsPerWarp;
    for (int step = begin; step < min(begin + kStepsPerWarp, steps); ++step) {
      float values[kPerLane];
      unpack(view.dtype, load_packed(view, step), values);
#pragma unroll
      for (int j = 0; j < kPerLane; ++j) values[j] *= scale;
      store_packed(view, step, pack(view.dtype, values));
    }
  }
}

}  // namespace

const char* scale_rows(const ScaleRows& call, void* stream) {
  const int64_t parts = (call.dstudent.width + kStep * kStepsPerWarp - 1) / (kStep * kStepsPerWarp);
  if (call.N == 0 || parts == 0) return nullptr;
  constexpr int64_t kWarps = kThreads / kLanes, kMaxBlocks = 1 << 20;
  const int64_t blocks =
      std::min((call.N + kWarps - 1) / kWarps, std::max<int64_t>(kMaxBlocks / parts, 1));
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(blocks * parts));
  config.blockDim = dim3(kThreads);
  config.stream = static_cast<cudaStream_t>(stream);
  const cudaError_t error =
      cudaLaunchKernelEx(&config, scale_rows_kernel, call, static_cast<unsigned>(parts));
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

}  // namespace fastkd::cuda
