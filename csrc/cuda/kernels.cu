// The kernels: the loss, row by row, and the scaling of its gradient. Formulas: fastkd/spec.py.
#include "careful.h"
#include "fast.h"
#include "flat.h"
#include "kernels.h"
#include "sparse.h"

namespace fastkd::cuda {
namespace {

template <class Exchange>
struct Shared {
  typename Exchange::Shared exchange;
  RowShared row;
};

// Rare rows, by functions apart from the kernel's body and from each other: their code and their
// registers would be in the way of more usual rows.
template <class Exchange>
__device__ FASTKD_NOINLINE bool flat(const DenseRows& call, Exchange exchange, RowShared& shared) {
  Row<Exchange> row(call, exchange, shared);
  return Flat<Exchange>(row).run();
}
template <class Exchange, Divergence kDivergence>
__device__ FASTKD_NOINLINE void careful(const DenseRows& call, Exchange exchange,
                                        RowShared& shared) {
  Row<Exchange> row(call, exchange, shared);
  if (row.is_flat() && flat(call, exchange, shared)) return;
  Careful<Exchange, kDivergence>(row).run();
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

template <class Exchange, Divergence kDivergence>
__global__ void __launch_bounds__(kMaxThreads)
    dense_rows_kernel(const __grid_constant__ DenseRows call, const __grid_constant__ Plan plan,
                      unsigned* workspace) {
  if constexpr (kExists<Exchange>) {
    auto& shared = shared_memory<Shared<Exchange>>();
    run_row(call, plan, workspace, shared, [&](Row<Exchange>& row, Exchange& exchange) {
      bool done = false;
      if (row.longest() <= warps() * Exchange::kVectors && !row.is_flat()) {
        done = Fast<Exchange, kDivergence>(row).run();
      } else {
        exchange.ready();
      }
      if (!done) careful<Exchange, kDivergence>(call, exchange, shared.row);
    });
  }
}

template <class Exchange>
__device__ FASTKD_NOINLINE void careful(const DenseRows& call, const SparseTeacher& teacher,
                                        Exchange exchange, RowShared& shared) {
  Row<Exchange> row(call, exchange, shared);
  SparseRow<Exchange, false>(row, teacher).run();
}

// The bounds name one CTA: left to itself the compiler takes 64 registers, and spills a few.
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
        careful<Exchange>(call, teacher, exchange, shared.row);
      }
    });
  }
}

// dstudent *= scale, one value or one per row, read on the device.
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

template <class Exchange>
Kernels kernels(Divergence divergence) {
  static_assert(sizeof(Shared<Exchange>) <= 48 << 10);  // more than 48 KB has to be asked for
  return {divergence == Divergence::kForward   ? dense_rows_kernel<Exchange, Divergence::kForward>
          : divergence == Divergence::kReverse ? dense_rows_kernel<Exchange, Divergence::kReverse>
                                               : dense_rows_kernel<Exchange, Divergence::kMixture>,
          sparse_rows_kernel<Exchange>, sizeof(Shared<Exchange>)};
}

}  // namespace

Kernels kernels(bool clusters, Divergence divergence) {
  return clusters ? kernels<Cluster>(divergence) : kernels<Tickets>(divergence);
}

ScaleRowsKernel scaling_kernel() { return scale_rows_kernel; }

}  // namespace fastkd::cuda
