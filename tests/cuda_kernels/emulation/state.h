// The emulated machine: what runs, what it waits for, and what is under way. For its scheduler and
// for what the kernels call.
#pragma once
#include <deque>
#include <memory>
#include <random>
#include <vector>

#include "cuda_emulation.h"
#include "fiber.h"

namespace emulation {

struct Barrier {
  unsigned arrived = 0, generation = 0;
  Site site;
};

struct Block;

struct Fiber {
  Context context;
  Block* block = nullptr;
  unsigned thread = 0;
  bool done = true;
  const unsigned* generation = nullptr;  // waits until it is no longer `seen`
  unsigned seen = 0;
  uint64_t* mbarrier = nullptr;  // waits for its phase of `parity` to end
  unsigned parity = 0;
  bool spins = false;  // asks again and again for something in memory
  bool arrived_at_cluster = false;
  unsigned cluster_seen = 0;
};

struct Warp {
  Barrier barrier;
  uint64_t slots[2][32];
};

struct Cluster;

struct Block {
  Cluster* cluster = nullptr;
  unsigned index = 0, rank = 0;
  unsigned live = 0;  // threads that have not ended
  Barrier barrier;
  std::vector<Warp> warps;
  std::vector<Fiber> fibers;
  std::vector<uint32_t> shared;
};

struct Cluster {
  Barrier barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  unsigned live = 0;
};

struct Store {
  void* to;
  char bytes[16];
  size_t size;
  uint64_t* barrier;
};

struct Settings {
  Schedule schedule = Schedule::kForward;
  unsigned seed = 0;
  int places = 64;
};

struct Launch {
  unsigned grid, block, cluster;
  size_t shared_bytes;
  const std::function<void()>* body;
  std::deque<Store> stores;
  std::mt19937 random;
  bool moved = false;  // since the last look
  std::string error;
};

inline Settings settings;
inline Launch* now = nullptr;
inline Fiber* current = nullptr;
inline Context scheduler;

// An mbarrier in 8 bytes: a mark, arrivals of a phase and how many are still missing, bytes still
// missing, and the parity of the phase.
struct MBarrier {
  uint64_t mark : 8, arrivals : 8, missing : 8, parity : 1;
  int64_t bytes : 39;
};
static_assert(sizeof(MBarrier) == 8);
constexpr uint64_t kMark = 0x5b;

template <class Fn>
void with(uint64_t* memory, const Fn& fn) {
  MBarrier barrier;
  std::memcpy(&barrier, memory, 8);
  if (barrier.mark != kMark) fail("an mbarrier is used that was not initialised, or no longer is");
  fn(barrier);
  if (barrier.missing == 0 && barrier.bytes == 0) {
    barrier.missing = barrier.arrivals;
    barrier.parity ^= 1;
    now->moved = true;
  }
  std::memcpy(memory, &barrier, 8);
}

inline bool is_over(uint64_t* memory, unsigned parity) {  // the phase of that parity
  MBarrier barrier;
  std::memcpy(&barrier, memory, 8);
  return barrier.parity != parity;
}

inline std::string at(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.thread) + " of CTA " + std::to_string(fiber.block->index);
}
inline std::string at(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

inline void yield() { switch_context(current->context, scheduler); }

}  // namespace emulation
