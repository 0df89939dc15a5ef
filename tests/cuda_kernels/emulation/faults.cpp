// Small kernels, each with one mistake that the emulation has to name. Argument: the mistake.
#include <cstdio>
#include <string>
#include <vector>

#include "cuda_emulation.h"
#include "cuda_runtime.h"

namespace {

struct Shared {
  uint64_t barrier;
  uint4 inbox;
  unsigned values[64];
};

using fastkd::cuda::shared_memory;

void nothing() { __syncthreads(); }

void a_thread_is_missing() {
  if (threadIdx.x != 5) __syncthreads();
}

void two_barriers() {
  if (threadIdx.x < 32) {
    __syncthreads();
  } else {
    __syncthreads();
  }
}

void a_lane_is_missing() {
  if (threadIdx.x % 32 != 7) __shfl_xor_sync(~0u, 1, 1);
}

void no_such_peer() { fastkd::cuda::peer(&shared_memory<Shared>().values[0], 2); }

void not_in_shared_memory() {
  static unsigned elsewhere;
  fastkd::cuda::peer(&elsewhere, 1);
}

void a_peer_has_ended() {
  if (blockIdx.x == 1) return;
  for (int i = 0; i < 10; ++i) __syncthreads();
  *fastkd::cuda::peer(&shared_memory<Shared>().values[0], 1) = 1;
}

void arrival_without_wait() { fastkd::cuda::cluster_arrive_relaxed(); }

void a_barrier_nobody_made() {
  if (threadIdx.x == 0) fastkd::cuda::mbarrier_wait(&shared_memory<Shared>().barrier, 0);
}

void bytes_that_never_come() {
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x != 0) return;
  fastkd::cuda::mbarrier_init(&shared.barrier, 1);
  fastkd::cuda::mbarrier_arrive_expect(&shared.barrier, 16);
  fastkd::cuda::mbarrier_wait(&shared.barrier, 0);
}

void gone_before_the_store_arrives() {
  auto& shared = shared_memory<Shared>();
  if (threadIdx.x == 0) {
    fastkd::cuda::mbarrier_init(&shared.barrier, 1);
    fastkd::cuda::mbarrier_arrive_expect(&shared.barrier, 16);
  }
  fastkd::cuda::cluster_sync();
  const unsigned other = 1 - fastkd::cuda::cluster_rank();
  if (threadIdx.x == 0) fastkd::cuda::store_async(&shared.inbox, {}, &shared.barrier, other);
}

void waits_for_a_cta_that_cannot_start() {
  static unsigned arrived;
  if (blockIdx.x == 0 && threadIdx.x == 0) arrived = 0;
  fastkd::cuda::add_release(&arrived);
  while (fastkd::cuda::load_acquire(&arrived) < 4 * 64) fastkd::cuda::spin();
}

void a_misaligned_vector() {
  static char memory[64];
  fastkd::cuda::load_streaming(memory + (reinterpret_cast<uintptr_t>(memory) % 16 == 8 ? 0 : 8));
}

const struct {
  const char* name;
  void (*kernel)();
} kKernels[] = {
    {"nothing", nothing},
    {"a_thread_is_missing", a_thread_is_missing},
    {"two_barriers", two_barriers},
    {"a_lane_is_missing", a_lane_is_missing},
    {"no_such_peer", no_such_peer},
    {"not_in_shared_memory", not_in_shared_memory},
    {"a_peer_has_ended", a_peer_has_ended},
    {"arrival_without_wait", arrival_without_wait},
    {"a_barrier_nobody_made", a_barrier_nobody_made},
    {"bytes_that_never_come", bytes_that_never_come},
    {"gone_before_the_store_arrives", gone_before_the_store_arrives},
    {"waits_for_a_cta_that_cannot_start", waits_for_a_cta_that_cannot_start},
    {"a_misaligned_vector", a_misaligned_vector},
};

}  // namespace

int main(int count, char** arguments) {
  if (count != 3) return 2;
  const int schedule = std::stoi(arguments[2]);
  emulation::configure(static_cast<emulation::Schedule>(schedule), 1, 2);
  for (const auto& [name, kernel] : kKernels) {
    if (std::string(name) != arguments[1]) continue;
    try {
      emulation::launch(4, 64, 2, sizeof(Shared), kernel);
    } catch (const std::exception& error) {
      std::printf("%s\n", error.what());
    }
    return 0;
  }
  return 2;
}
