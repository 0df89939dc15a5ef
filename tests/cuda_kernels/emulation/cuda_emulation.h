// The CUDA execution model on a CPU, for kernels that use nothing but csrc/cuda/machine.h and the
// names below: every thread a fiber, several CTAs at a time, shared memory poisoned at the start
// and at the end, barriers that notice who does not come, stores that arrive late. Included before
// all else; machine.h leaves the machine to it.
//
// What it cannot show: memory that is visible here and not on a GPU, because an order between two
// CTAs is only relaxed.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <functional>
#include <source_location>
#include <string>
#include <type_traits>

namespace emulation {

// In which order fibers run and when asynchronous stores arrive.
enum class Schedule { kForward, kReverse, kRandom };

// Sets how all later launches run. `places`: how many CTAs run at one time.
void configure(Schedule schedule, unsigned seed, int places);
int places();

// The fiber that runs.
unsigned thread_index();
unsigned block_index();
unsigned block_size();
unsigned grid_size();
unsigned cluster_rank();
unsigned cluster_size();
void* shared_memory(unsigned rank);  // a CTA of the cluster has it
size_t shared_bytes();

using Site = std::source_location;
void block_barrier(Site site);
void warp_barrier(Site site);
void cluster_arrive(Site site);
void cluster_wait(Site site);
void spin();
void progress();  // something happened that a spinning fiber may wait for

// Where the lanes of a warp put what they exchange next: 32 places of 8 bytes.
uint64_t* warp_slots();

void mbarrier_init(uint64_t* barrier, unsigned arrivals);
void mbarrier_arrive_expect(uint64_t* barrier, unsigned bytes);
void mbarrier_wait(uint64_t* barrier, unsigned parity);
void store_async(void* to, const void* from, size_t bytes, uint64_t* barrier);

[[noreturn]] void fail(const std::string& what);

// Runs a grid to its end; throws std::runtime_error with what was found.
void launch(unsigned grid, unsigned block, unsigned cluster, size_t shared_bytes,
            const std::function<void()>& body);

// Every lane's value, from the lane that `from` names for it.
template <class T, class From>
T exchange(T value, const From& from, Site site) {
  static_assert(sizeof(T) <= 8);
  uint64_t* slots = warp_slots();
  const unsigned lane = thread_index() % 32;
  std::memcpy(&slots[lane], &value, sizeof value);
  warp_barrier(site);
  std::memcpy(&value, &slots[from(lane) % 32], sizeof value);
  return value;
}

// As inexact as the machine: off by up to 2^-23 either way, by the argument's bits; exact for
// integers.
inline float approximate(float exact, float argument) {
  uint32_t bits, hash;
  std::memcpy(&bits, &exact, 4);
  std::memcpy(&hash, &argument, 4);
  if (!(std::fabs(exact) >= 0x1p-126f && std::fabs(exact) < 0x1p126f)) return exact;
  hash = (hash ^ hash >> 15) * 0x9e3779b1u;
  bits += (hash >> 20) % 3 - 1;
  std::memcpy(&exact, &bits, 4);
  return exact;
}

}  // namespace emulation

#define FASTKD_CLUSTERS 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define FASTKD_NOINLINE __attribute__((noinline))
#define __grid_constant__
#define __launch_bounds__(...)

// Objects, not macros: launch configurations have members of these names.
inline constexpr struct {
  struct {
    operator unsigned() const { return emulation::thread_index(); }
  } x;
} threadIdx;
inline constexpr struct {
  struct {
    operator unsigned() const { return emulation::block_index(); }
  } x;
} blockIdx;
inline constexpr struct {
  struct {
    operator unsigned() const { return emulation::block_size(); }
  } x;
} blockDim;
inline constexpr struct {
  struct {
    operator unsigned() const { return emulation::grid_size(); }
  } x;
} gridDim;

struct uint4 {
  unsigned x, y, z, w;
};
struct float2 {
  float x, y;
};
using std::max;
using std::min;

inline void __syncthreads(emulation::Site site = emulation::Site::current()) {
  emulation::block_barrier(site);
}
inline void __syncwarp(emulation::Site site = emulation::Site::current()) {
  emulation::warp_barrier(site);
}
template <class T>
T __shfl_xor_sync(unsigned, T value, int mask, emulation::Site site = emulation::Site::current()) {
  return emulation::exchange(value, [=](unsigned lane) { return lane ^ mask; }, site);
}
template <class T>
T __shfl_sync(unsigned, T value, int lane, emulation::Site site = emulation::Site::current()) {
  return emulation::exchange(value, [=](unsigned) { return unsigned(lane); }, site);
}
template <class T>
T __shfl_up_sync(unsigned, T value, unsigned distance,
                 emulation::Site site = emulation::Site::current()) {
  const auto from = [=](unsigned lane) { return lane >= distance ? lane - distance : lane; };
  return emulation::exchange(value, from, site);
}
template <class T>
T __shfl_down_sync(unsigned, T value, unsigned distance,
                   emulation::Site site = emulation::Site::current()) {
  const auto from = [=](unsigned lane) { return lane + distance < 32 ? lane + distance : lane; };
  return emulation::exchange(value, from, site);
}
inline unsigned atomicAdd(unsigned* counter, unsigned value) {
  emulation::progress();
  const unsigned before = *counter;
  *counter += value;
  return before;
}
inline unsigned atomicOr(unsigned* word, unsigned bits) {
  emulation::progress();
  const unsigned before = *word;
  *word |= bits;
  return before;
}
inline unsigned __float_as_uint(float value) {
  unsigned bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
// Rounded by itself: the compiler may not make it part of an fma, as nvcc may not.
inline float __fmul_rn(float a, float b) {
  float product = a * b;
  asm volatile("" : "+m"(product));
  return product;
}
inline float __fdividef(float a, float b) { return emulation::approximate(a / b, b); }

namespace fastkd::cuda {

using emulation::cluster_rank;
using emulation::cluster_size;
using emulation::mbarrier_arrive_expect;
using emulation::mbarrier_init;
using emulation::mbarrier_wait;
using emulation::spin;

template <class T>
T& shared_memory() {
  if (sizeof(T) > emulation::shared_bytes())
    emulation::fail("more shared memory than launched with");
  return *static_cast<T*>(emulation::shared_memory(emulation::cluster_rank()));
}
inline float exp2_approx(float x) {
  const float y = std::exp2(x);
  if (y < 0x1p-126f) return 0;
  return x == std::floor(x) ? y : emulation::approximate(y, x);
}
inline float log2_subnormal(float x) { return emulation::approximate(std::log2(x), x); }
inline float log2_approx(float x) { return log2_subnormal(std::fabs(x) < 0x1p-126f ? 0 : x); }
inline float unknown(float x) { return x; }
uint32_t pack_bfloat16(float low, float high);
uint32_t pack_half(float low, float high);
float2 unpack_half(uint32_t word);

inline uint4 load_streaming(const void* address, bool wanted = true) {
  if (!wanted) return {};
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulation::fail("misaligned load");
  uint4 v;
  std::memcpy(&v, address, 16);
  return v;
}
inline uint4 load_cached(const void* address, bool wanted = true) {
  return load_streaming(address, wanted);
}
inline void store_streaming(void* address, uint4 v) {
  if (reinterpret_cast<uintptr_t>(address) % 16 != 0) emulation::fail("misaligned store");
  std::memcpy(address, &v, 16);
}
template <class T>
T load_shared_by_all(const T* address) {
  return *address;
}
template <class T>
void store_shared_by_all(T* address, T value) {
  *address = value;
}
inline void add_release(unsigned* counter) {
  ++*counter;
  emulation::progress();
}
inline unsigned load_acquire(const unsigned* counter) { return *counter; }

inline void cluster_arrive_relaxed(emulation::Site site = emulation::Site::current()) {
  emulation::cluster_arrive(site);
}
inline void cluster_wait(emulation::Site site = emulation::Site::current()) {
  emulation::cluster_wait(site);
}
inline void cluster_sync(emulation::Site site = emulation::Site::current()) {
  emulation::cluster_arrive(site);
  emulation::cluster_wait(site);
}
template <class T>
T* peer(T* variable, unsigned rank) {
  const auto* mine = static_cast<const char*>(emulation::shared_memory(emulation::cluster_rank()));
  const auto offset = reinterpret_cast<const char*>(variable) - mine;
  if (offset < 0 || static_cast<size_t>(offset) >= emulation::shared_bytes()) {
    emulation::fail("the variable of a peer is not in shared memory");
  }
  return reinterpret_cast<T*>(static_cast<char*>(emulation::shared_memory(rank)) + offset);
}
inline void mbarrier_init_fence() {}
inline void store_async(uint4* variable, uint4 v, uint64_t* barrier, unsigned rank) {
  emulation::store_async(peer(variable, rank), &v, sizeof v, peer(barrier, rank));
}

}  // namespace fastkd::cuda
