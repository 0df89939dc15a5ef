// The launches: what a call's plan follows from, the table of kernels, and the work enqueued.
#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>

#include "exchange.h"
#include "kernels.h"
#include "launch.h"

namespace fastkd::cuda {
namespace {

constexpr int kDevices = 64;
std::mutex mutex;
Device devices[kDevices];
bool known[kDevices];
Limits limits;

const char* text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

cudaLaunchConfig_t shape(const Plan& plan, int64_t N, size_t shared_bytes,
                         cudaLaunchAttribute* cluster) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(N * plan.parts));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = shared_bytes;
  if (plan.cluster) {
    cluster->id = cudaLaunchAttributeClusterDimension;
    cluster->val.clusterDim.x = static_cast<unsigned>(plan.parts);
    cluster->val.clusterDim.y = cluster->val.clusterDim.z = 1;
    config.attrs = cluster;
    config.numAttrs = 1;
  }
  return config;
}

Device ask(int device) {
  Device answer;
  int major = 0, processors = 0, places = 0;
  cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device);
  }
  answer.vectors = cluster_vectors(major);
  answer.places = 1 << 30;
  const auto prepare = [&](auto tickets, size_t shared_bytes, auto clusters) {
    if (error == cudaSuccess) {
      error =
          cudaOccupancyMaxActiveBlocksPerMultiprocessor(&places, tickets, kThreads, shared_bytes);
    }
    answer.places = std::min(answer.places, places * processors);
    if (major < 9 || error != cudaSuccess) return;
    error = cudaFuncSetAttribute(clusters, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  };
  Kernels clusters;
  for (const Divergence divergence :
       {Divergence::kForward, Divergence::kMixture, Divergence::kReverse}) {
    const Kernels tickets = kernels(false, divergence);
    clusters = kernels(true, divergence);
    prepare(tickets.dense_rows, tickets.shared_bytes, clusters.dense_rows);
    prepare(tickets.sparse_rows, tickets.shared_bytes, clusters.sparse_rows);
  }
  for (const int threads : {kThreads, kMaxThreads}) {
    for (int parts = 1; major >= 9 && error == cudaSuccess && parts <= kMaxCluster; ++parts) {
      Plan plan;
      plan.cluster = true;
      plan.parts = parts;
      plan.threads = threads;
      cudaLaunchAttribute attribute;
      const auto config = shape(plan, 1, clusters.shared_bytes, &attribute);
      int& active = answer.active[threads == kMaxThreads][parts];
      const cudaError_t refused =
          cudaOccupancyMaxActiveClusters(&active, clusters.dense_rows, &config);
      if (refused == cudaSuccess) continue;
      active = 0;  // more CTAs than a cluster of this GPU can have
      cudaGetLastError();
    }
  }
  answer.error = text(error);
  return answer;
}

Device ask_once() {
  int device = 0;
  if (const char* error = text(cudaGetDevice(&device))) return {error};
  const std::lock_guard<std::mutex> lock(mutex);
  if (device >= kDevices) return ask(device);
  if (!known[device])
    devices[device] = ask(device), known[device] = devices[device].error == nullptr;
  return devices[device];
}

// `sparse`: the teacher, where the call has none itself.
const char* launch(const DenseRows& call, const SparseTeacher* sparse, const Plan& plan,
                   unsigned* workspace, cudaStream_t stream) {
  const Kernels table = kernels(plan.cluster, call.divergence);
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = shape(plan, call.N, table.shared_bytes, &attribute);
  config.stream = stream;
  return text(sparse != nullptr
                  ? cudaLaunchKernelEx(&config, table.sparse_rows, call, *sparse, plan, workspace)
                  : cudaLaunchKernelEx(&config, table.dense_rows, call, plan, workspace));
}

TicketSpace ticket_space(const DenseRows& call, const Plan& plan) {
  return {call.N, plan.parts, plan.slots, call.teacher.keep != nullptr};
}

// The call without its teacher, which is a sparse one.
DenseRows student_rows(const SparseRows& call) {
  DenseRows rows;
  static_cast<Call&>(rows) = call;
  rows.teacher.logits.dtype = call.student.dtype;
  return rows;
}

const char* run(const DenseRows& call, const SparseTeacher* sparse, void* workspace, void* stream) {
  if (call.is_double) return "the CUDA kernels do not take float64 logits";
  if (call.N == 0) return nullptr;
  // Columns are int, and steps round them up.
  if (std::max({call.student.width, call.teacher.logits.width, call.dstudent.width}) >= 1 << 30) {
    return "rows of 2^30 classes and more are not supported";
  }
  const Plan layout = plan(call);
  if (layout.error != nullptr) return layout.error;
  if (call.N * layout.parts >= int64_t{1} << 31) return "more rows than one launch can have";
  const auto on = static_cast<cudaStream_t>(stream);
  auto* const counters = static_cast<unsigned*>(workspace);
  if (layout.cluster) return launch(call, sparse, layout, nullptr, on);
  const auto bytes = static_cast<size_t>(ticket_space(call, layout).counter_bytes());
  if (const char* error = text(cudaMemsetAsync(workspace, 0, bytes, on))) return error;
  return launch(call, sparse, layout, counters, on);
}

}  // namespace

void set_limits(const Limits& wanted) { limits = wanted; }

Plan plan(const DenseRows& call) {
  int64_t bytes = 2 * call.student.element_bytes();
  if (call.teacher.logits.data != nullptr)
    bytes += call.teacher.logits.element_bytes();  // else it is sparse
  return choose(call.N, call.vocab_size, static_cast<int>(bytes), ask_once(), limits);
}

size_t workspace_bytes(const DenseRows& call) {
  const Plan layout = plan(call);
  if (layout.cluster || layout.error != nullptr || call.N == 0) return 0;
  return static_cast<size_t>(ticket_space(call, layout).bytes());
}

size_t workspace_bytes(const SparseRows& call) { return workspace_bytes(student_rows(call)); }

const char* dense_rows(const DenseRows& call, void* workspace, void* stream) {
  return run(call, nullptr, workspace, stream);
}

const char* sparse_rows(const SparseRows& call, void* workspace, void* stream) {
  return run(student_rows(call), &call.teacher, workspace, stream);
}

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
      cudaLaunchKernelEx(&config, scaling_kernel(), call, static_cast<unsigned>(parts));
  return text(error);
}

}  // namespace fastkd::cuda
