// The loss, row by row: kernels, the table of launches, and the launch. Formulas: fastkd/spec.py.
#include <cuda_runtime.h>

#include <algorithm>
#include <mutex>

#include "careful.h"
#include "fast.h"
#include "flat.h"
#include "kernel.h"
#include "sparse.h"

namespace fastkd::cuda {
namespace {

template <class Exchange>
struct Shared {
  typename Exchange::Shared exchange;
  RowShared row;
};

// Apart from the kernel's body, and from each other: their code and their registers would be in the
// way of more usual rows.
template <class Exchange>
__device__ FASTKD_NOINLINE bool match_logits(const DenseRows& call, Exchange exchange,
                                             RowShared& shared) {
  Row<Exchange> row(call, exchange, shared);
  return LogitMatch<Exchange>(row).run();
}
template <class Exchange, Mode kMode>
__device__ FASTKD_NOINLINE void reread(const DenseRows& call, Exchange exchange,
                                       RowShared& shared) {
  Row<Exchange> row(call, exchange, shared);
  if (row.matches_logits() && match_logits(call, exchange, shared)) return;
  Reread<Exchange, kMode>(row).run();
}

// Whether the GPU has what the exchange needs.
#if !defined(__CUDACC__) || defined(FASTKD_CLUSTERS)
template <class Exchange>
constexpr bool kExists = true;
#else
template <class Exchange>
constexpr bool kExists = std::is_same_v<Exchange, Tickets>;
#endif

// compute(row, exchange) of this CTA's row, if there is something to compute.
template <class Exchange, class Compute>
__device__ __forceinline__ void run_row(const DenseRows& call, const Plan& plan,
                                        unsigned* workspace, Shared<Exchange>& shared,
                                        const Compute& compute) {
  Exchange exchange(shared.exchange, call, plan, workspace);
  exchange.start();
  Row<Exchange> row(call, exchange, shared.row);
  row.start();
  if (row.is_skipped()) {
    exchange.ready();
    row.write_row(0, 0);
  } else if (row.label() < 0) {
    exchange.ready();
    row.write_row(kNaN, kNaN);
  } else {
    compute(row, exchange);
  }
  exchange.end();
}

template <class Exchange, Mode kMode>
__global__ void __launch_bounds__(kMaxThreads)
    dense_rows_kernel(const __grid_constant__ DenseRows call, const __grid_constant__ Plan plan,
                      unsigned* workspace) {
  if constexpr (kExists<Exchange>) {
    auto& shared = shared_memory<Shared<Exchange>>();
    run_row(call, plan, workspace, shared, [&](Row<Exchange>& row, Exchange& exchange) {
      bool done = false;
      if (row.longest() <= warps() * Exchange::kVectors && !row.matches_logits()) {
        done = Registers<Exchange, kMode>(row).run();
      } else {
        exchange.ready();
      }
      if (!done) reread<Exchange, kMode>(call, exchange, shared.row);
    });
  }
}

template <class Exchange>
__device__ FASTKD_NOINLINE void reread(const DenseRows& call, const SparseTeacher& teacher,
                                       Exchange exchange, RowShared& shared) {
  Row<Exchange> row(call, exchange, shared);
  SparseRow<Exchange, false>(row, teacher).run();
}

// One CTA at least: left to itself the compiler takes 64 registers, and spills a few.
template <class Exchange>
__global__ void __launch_bounds__(kMaxThreads, 1)
    sparse_rows_kernel(const __grid_constant__ DenseRows call,
                       const __grid_constant__ SparseTeacher teacher,
                       const __grid_constant__ Plan plan, unsigned* workspace) {
  if constexpr (kExists<Exchange>) {
    auto& shared = shared_memory<Shared<Exchange>>();
    run_row(call, plan, workspace, shared, [&](Row<Exchange>& row, Exchange& exchange) {
      if (row.longest() <= warps() * Exchange::kVectors) {
        SparseRow<Exchange, true>(row, teacher).run();
      } else {
        exchange.ready();
        reread<Exchange>(call, teacher, exchange, shared.row);
      }
    });
  }
}

template <class Exchange>
auto kernel_of(const DenseRows& call) {
  return call.divergence == Mode::kForward   ? dense_rows_kernel<Exchange, Mode::kForward>
         : call.divergence == Mode::kReverse ? dense_rows_kernel<Exchange, Mode::kReverse>
                                             : dense_rows_kernel<Exchange, Mode::kMixture>;
}

constexpr int kDevices = 64;
std::mutex mutex;
Device devices[kDevices];
bool known[kDevices];
Limits limits;

const char* text(cudaError_t error) {
  return error == cudaSuccess ? nullptr : cudaGetErrorString(error);
}

template <class Exchange>
cudaLaunchConfig_t shape(const Plan& plan, int64_t N, cudaLaunchAttribute* cluster) {
  cudaLaunchConfig_t config = {};
  config.gridDim = dim3(static_cast<unsigned>(N * plan.parts));
  config.blockDim = dim3(static_cast<unsigned>(plan.threads));
  config.dynamicSmemBytes = sizeof(Shared<Exchange>);
  static_assert(sizeof(Shared<Exchange>) <= 48 << 10);  // what needs no leave of the driver
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
  DenseRows call;
  answer.places = 1 << 30;
  const auto prepare = [&](auto tickets, auto clusters) {
    if (error == cudaSuccess) {
      error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&places, tickets, kThreads,
                                                            sizeof(Shared<Tickets>));
    }
    answer.places = std::min(answer.places, places * processors);
    if (major < 9 || error != cudaSuccess) return;
    error = cudaFuncSetAttribute(clusters, cudaFuncAttributeNonPortableClusterSizeAllowed, 1);
  };
  prepare(sparse_rows_kernel<Tickets>, sparse_rows_kernel<Cluster>);
  for (const Mode divergence : {Mode::kForward, Mode::kMixture, Mode::kReverse}) {
    call.divergence = divergence;
    prepare(kernel_of<Tickets>(call), kernel_of<Cluster>(call));
  }
  for (const int threads : {kThreads, kMaxThreads}) {
    for (int parts = 1; major >= 9 && error == cudaSuccess && parts <= kMaxCluster; ++parts) {
      Plan plan;
      plan.cluster = true;
      plan.parts = parts;
      plan.threads = threads;
      cudaLaunchAttribute attribute;
      const auto config = shape<Cluster>(plan, 1, &attribute);
      int& active = answer.active[threads == kMaxThreads][parts];
      const cudaError_t refused =
          cudaOccupancyMaxActiveClusters(&active, kernel_of<Cluster>(call), &config);
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
template <class Exchange>
const char* launch(const DenseRows& call, const SparseTeacher* sparse, const Plan& plan,
                   unsigned* workspace, cudaStream_t stream) {
  cudaLaunchAttribute attribute;
  cudaLaunchConfig_t config = shape<Exchange>(plan, call.N, &attribute);
  config.stream = stream;
  return text(sparse != nullptr
                  ? cudaLaunchKernelEx(&config, sparse_rows_kernel<Exchange>, call, *sparse, plan,
                                       workspace)
                  : cudaLaunchKernelEx(&config, kernel_of<Exchange>(call), call, plan, workspace));
}

TicketSpace ticket_space(const DenseRows& call, const Plan& plan) {
  return {call.N, plan.parts, plan.slots, call.keep != nullptr};
}

// The call without its teacher, which is a sparse one.
DenseRows student_rows(const SparseRows& call) {
  DenseRows rows;
  rows.student = call.student;
  rows.teacher.dtype = call.student.dtype;
  rows.dstudent = call.dstudent;
  rows.labels = call.labels;
  rows.student_inv_temperature = call.student_inv_temperature;
  rows.teacher_inv_temperature = call.teacher_inv_temperature;
  rows.soft_weight = call.soft_weight;
  rows.hard_weight = call.hard_weight;
  rows.soft = call.soft;
  rows.hard = call.hard;
  rows.N = call.N;
  rows.vocab_size = call.vocab_size;
  rows.is_double = call.is_double;
  return rows;
}

const char* run(const DenseRows& call, const SparseTeacher* sparse, void* workspace, void* stream) {
  if (call.is_double) return "the CUDA kernels do not take float64 logits";
  if (call.N == 0) return nullptr;
  // Columns are int, and steps round them up.
  if (std::max({call.student.width, call.teacher.width, call.dstudent.width}) >= 1 << 30) {
    return "rows of 2^30 classes and more are not supported";
  }
  const Plan layout = plan(call);
  if (layout.error != nullptr) return layout.error;
  if (call.N * layout.parts >= int64_t{1} << 31) return "more rows than one launch can have";
  const auto on = static_cast<cudaStream_t>(stream);
  auto* const counters = static_cast<unsigned*>(workspace);
  if (layout.cluster) return launch<Cluster>(call, sparse, layout, nullptr, on);
  const auto bytes = static_cast<size_t>(ticket_space(call, layout).counter_bytes());
  if (const char* error = text(cudaMemsetAsync(workspace, 0, bytes, on))) return error;
  return launch<Tickets>(call, sparse, layout, counters, on);
}

}  // namespace

void set_limits(const Limits& wanted) { limits = wanted; }

Plan plan(const DenseRows& call) {
  int64_t bytes = 2 * call.student.element_bytes();
  if (call.teacher.data != nullptr) bytes += call.teacher.element_bytes();  // else it is sparse
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
  const SparseTeacher teacher{call.ids, static_cast<const float*>(call.log_probs),
                              static_cast<const float*>(call.log_rest), call.k, call.restricted};
  return run(student_rows(call), &teacher, workspace, stream);
}

}  // namespace fastkd::cuda
