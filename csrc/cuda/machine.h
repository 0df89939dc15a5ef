// What the GPU does that C++ has no name for. The kernels use nothing below this header, so that
// tests/cuda_kernels/emulation/cuda_emulation.h, which comes before it there, can stand in for the
// machine.
#pragma once
#include "../call.h"

#ifdef __CUDACC__
#include <cuda_fp16.h>
#include <cuda_runtime.h>

// Thread-block clusters, their shared memory and its barriers begin with sm_90.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define FASTKD_CLUSTERS 1
#endif

#define FASTKD_NOINLINE __noinline__

namespace fastkd::cuda {

// The CTA's dynamic shared memory.
template <class T>
__device__ __forceinline__ T& shared_memory() {
  extern __shared__ __align__(16) unsigned char memory[];
  return *reinterpret_cast<T*>(memory);
}

// 2^x, relative error 2^-22, results below the smallest normal number are 0. Exact for integers.
__device__ __forceinline__ float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// log2(x), error 2^-22 relative to 1 or to the result, whichever is larger. What is below the
// smallest normal number is read as 0; by the second one exactly, for three instructions more.
__device__ __forceinline__ float log2_approx(float x) {
  float y;
  asm("lg2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ __forceinline__ float log2_subnormal(float x) {
  float y;
  asm("lg2.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// The same number, though the compiler does not know: what is made of it in a loop is made there,
// and not kept in registers throughout.
__device__ __forceinline__ float unknown(float x) {
  asm volatile("" : "+f"(x));
  return x;
}

// Two numbers rounded to the halves of a word, the first into its low half.
__device__ __forceinline__ uint32_t pack_bfloat16(float low, float high) {
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ uint32_t pack_half(float low, float high) {
  uint32_t word;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
  return word;
}
__device__ __forceinline__ float2 unpack_half(uint32_t word) {
  __half2 pair;
  memcpy(&pair, &word, sizeof word);
  return __half22float2(pair);
}

// 16 bytes of a tensor, aligned, or 0 where they are not `wanted`: no branch, so that nothing keeps
// the compiler from having many loads under way. Not through the read-only path, for the gradient
// may be written over them by the same kernel. `load_streaming`: each is read once.
#define FASTKD_LOAD(name, instruction)                                             \
  __device__ __forceinline__ uint4 name(const void* address, bool wanted = true) { \
    uint4 v = {};                                                                  \
    asm volatile(                                                                  \
        "{ .reg .pred p; setp.ne.u32 p, %5, 0;\n"                                  \
        "@p " instruction " {%0, %1, %2, %3}, [%4]; }"                             \
        : "+r"(v.x), "+r"(v.y), "+r"(v.z), "+r"(v.w)                               \
        : "l"(address), "r"(static_cast<unsigned>(wanted)));                       \
    return v;                                                                      \
  }
FASTKD_LOAD(load_streaming, "ld.global.L1::no_allocate.v4.u32")
FASTKD_LOAD(load_cached, "ld.global.v4.u32")
#undef FASTKD_LOAD
__device__ __forceinline__ void store_streaming(void* address, uint4 v) {
  asm volatile("st.global.cs.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(address), "r"(v.x), "r"(v.y),
               "r"(v.z), "r"(v.w)
               : "memory");
}

// Global memory shared with other CTAs: past the L1 caches, which know nothing of each other.
__device__ __forceinline__ uint4 load_shared_by_all(const uint4* address) {
  return __ldcg(address);
}
__device__ __forceinline__ void store_shared_by_all(uint4* address, uint4 v) { __stcg(address, v); }
__device__ __forceinline__ unsigned load_shared_by_all(const unsigned* address) {
  return __ldcg(address);
}
__device__ __forceinline__ void store_shared_by_all(unsigned* address, unsigned v) {
  __stcg(address, v);
}
// Adds 1 after everything this thread wrote or saw written, for whoever sees the count.
__device__ __forceinline__ void add_release(unsigned* counter) {
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(counter) : "memory");
}
__device__ __forceinline__ unsigned load_acquire(const unsigned* counter) {
  unsigned value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(counter) : "memory");
  return value;
}
// In a loop that waits for another CTA.
__device__ __forceinline__ void spin() { __nanosleep(20); }

#ifdef FASTKD_CLUSTERS

__device__ __forceinline__ unsigned shared_address(const void* pointer) {
  return static_cast<unsigned>(__cvta_generic_to_shared(pointer));
}
__device__ __forceinline__ unsigned cluster_rank() {
  unsigned rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}
__device__ __forceinline__ unsigned cluster_size() {
  unsigned size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}
// Every thread of the cluster arrives and then waits. Relaxed: publishes no memory but what a fence
// has made visible.
__device__ __forceinline__ void cluster_arrive_relaxed() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
}
__device__ __forceinline__ void cluster_wait() {
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}
// Publishes what each thread wrote to shared memory to all threads of the cluster.
__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
  cluster_wait();
}
// The same variable of another CTA of the cluster.
template <class T>
__device__ __forceinline__ T* peer(T* variable, unsigned rank) {
  uint64_t address;
  asm("mapa.u64 %0, %1, %2;" : "=l"(address) : "l"(variable), "r"(rank));
  return reinterpret_cast<T*>(address);
}

__device__ __forceinline__ void mbarrier_init(uint64_t* barrier, unsigned arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(shared_address(barrier)),
               "r"(arrivals)
               : "memory");
}
// Makes initialised barriers visible to the cluster, together with a relaxed arrival.
__device__ __forceinline__ void mbarrier_init_fence() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}
// Arrives, and has this phase wait for `bytes` of asynchronous stores.
__device__ __forceinline__ void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes) {
  asm volatile(
      "mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(shared_address(barrier)),
      "r"(bytes)
      : "memory");
}
// Until the phase of this parity is complete; what was stored is visible then.
__device__ __forceinline__ void mbarrier_wait(uint64_t* barrier, unsigned parity) {
  unsigned done = 0;
  while (!done) {
    asm volatile(
        "{ .reg .pred p;\n"
        "mbarrier.try_wait.parity.acquire.cluster.shared::cta.b64 p, [%1], %2;\n"
        "selp.u32 %0, 1, 0, p; }"
        : "=r"(done)
        : "r"(shared_address(barrier)), "r"(parity)
        : "memory");
  }
}
// Stores into the same variable of another CTA, whose own `barrier` counts the bytes.
__device__ __forceinline__ void store_async(uint4* variable, uint4 v, uint64_t* barrier,
                                            unsigned rank) {
  asm volatile(
      "{ .reg .b32 to, bar;\n"
      "mapa.shared::cluster.u32 to, %0, %6;\n"
      "mapa.shared::cluster.u32 bar, %1, %6;\n"
      "st.async.shared::cluster.mbarrier::complete_tx::bytes.v4.b32 [to], {%2, %3, %4, %5}, "
      "[bar]; }" ::"r"(shared_address(variable)),
      "r"(shared_address(barrier)), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w), "r"(rank)
      : "memory");
}

#endif  // FASTKD_CLUSTERS

}  // namespace fastkd::cuda
#endif  // __CUDACC__

namespace fastkd::cuda {

// Read now, and not kept in a register from an earlier time.
template <class T>
__device__ __forceinline__ T fresh(const T& in_shared_memory) {
  return *static_cast<const volatile T*>(&in_shared_memory);
}

constexpr unsigned kWholeWarp = ~0u;
constexpr int kLanes = 32;

__device__ __forceinline__ int lane() { return static_cast<int>(threadIdx.x % kLanes); }
__device__ __forceinline__ int warp() { return static_cast<int>(threadIdx.x / kLanes); }
__device__ __forceinline__ int warps() { return static_cast<int>(blockDim.x / kLanes); }

// Every lane gets the same bits: the tree is the same whichever lane looks at it.
__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value = fmaxf(value, __shfl_xor_sync(kWholeWarp, value, distance));
  }
  return value;
}
template <class T>
__device__ __forceinline__ T warp_sum(T value) {
#pragma unroll
  for (int distance = kLanes / 2; distance > 0; distance /= 2) {
    value += __shfl_xor_sync(kWholeWarp, value, distance);
  }
  return value;
}

// Lane 0 gets it from lane 31.
__device__ __forceinline__ uint4 from_previous_lane(uint4 v) {
  const int previous = (lane() + kLanes - 1) % kLanes;
  return {__shfl_sync(kWholeWarp, v.x, previous), __shfl_sync(kWholeWarp, v.y, previous),
          __shfl_sync(kWholeWarp, v.z, previous), __shfl_sync(kWholeWarp, v.w, previous)};
}

}  // namespace fastkd::cuda
