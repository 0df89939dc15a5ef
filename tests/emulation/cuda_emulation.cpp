#include "cuda_emulation.h"

#include <deque>
#include <memory>
#include <random>
#include <stdexcept>
#include <utility>
#include <vector>

#include "fiber.h"

namespace emulation {
namespace {

constexpr uint32_t kPoisonAtStart = 0xffc0dead;  // a NaN
constexpr uint32_t kPoisonAtEnd = 0xffc0dea1;

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
} settings;

struct Launch {
  unsigned grid, block, cluster;
  size_t shared_bytes;
  const std::function<void()>* body;
  std::deque<Store> stores;
  std::mt19937 random;
  bool moved = false;  // since the last look
  std::string error;
};

Launch* now = nullptr;
Fiber* current = nullptr;
Context scheduler;

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

bool is_over(uint64_t* memory, unsigned parity) {  // the phase of that parity
  MBarrier barrier;
  std::memcpy(&barrier, memory, 8);
  return barrier.parity != parity;
}

std::string at(const Fiber& fiber) {
  return "thread " + std::to_string(fiber.thread) + " of CTA " + std::to_string(fiber.block->index);
}
std::string at(const Site& site) {
  const std::string file = site.file_name();
  return file.substr(file.rfind('/') + 1) + ":" + std::to_string(site.line());
}

void yield() { switch_context(current->context, scheduler); }

void wait_for(const unsigned& generation, unsigned seen) {
  while (generation == seen) {
    current->generation = &generation;
    current->seen = seen;
    yield();
  }
  current->generation = nullptr;
}

// Returns the generation to wait for the end of.
unsigned arrive(Barrier& barrier, unsigned expected, const Site& site, const char* what) {
  if (barrier.arrived > 0 && (barrier.site.line() != site.line() ||
                              std::strcmp(barrier.site.file_name(), site.file_name()) != 0)) {
    fail(std::string(what) + " diverges: " + at(*current) + " is at " + at(site) +
         ", others are at " + at(barrier.site));
  }
  barrier.site = site;
  const unsigned generation = barrier.generation;
  if (++barrier.arrived == expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    now->moved = true;
  }
  return generation;
}

void poison(Block& block, uint32_t pattern) {
  std::fill(block.shared.begin(), block.shared.end(), pattern);
}

void thread_main() {
  (*now->body)();
  Block& block = *current->block;
  if (block.barrier.arrived > 0) {
    fail(at(*current) + " has ended while others wait at " + at(block.barrier.site));
  }
  if (block.warps[current->thread / 32].barrier.arrived > 0) {
    fail(at(*current) + " has ended while its warp waits at " +
         at(block.warps[current->thread / 32].barrier.site));
  }
  if (current->arrived_at_cluster) fail(at(*current) + " has ended without cluster_wait()");
  current->done = true;
  now->moved = true;
  if (--block.live == 0) {
    const char* begin = reinterpret_cast<const char*>(block.shared.data());
    for (const Store& store : now->stores) {
      const char* to = static_cast<const char*>(store.to);
      if (to >= begin && to < begin + now->shared_bytes) {
        fail("CTA " + std::to_string(block.index) +
             " has ended before what its peers store into its shared memory has arrived");
      }
    }
    poison(block, kPoisonAtEnd);
    --block.cluster->live;
  }
  yield();
}

void deliver() {
  size_t which = 0;
  if (settings.schedule == Schedule::kReverse) which = now->stores.size() - 1;
  if (settings.schedule == Schedule::kRandom) which = now->random() % now->stores.size();
  const Store store = now->stores[which];
  now->stores.erase(now->stores.begin() + static_cast<std::ptrdiff_t>(which));
  std::memcpy(store.to, store.bytes, store.size);
  with(store.barrier, [&](MBarrier& b) { b.bytes -= static_cast<int64_t>(store.size); });
  now->moved = true;
}

bool is_ready(const Fiber& fiber) {
  if (fiber.done) return false;
  if (fiber.generation != nullptr) return *fiber.generation != fiber.seen;
  return fiber.mbarrier == nullptr || is_over(fiber.mbarrier, fiber.parity);
}

// Clusters in memory, used again: their stacks and their shared memory.
std::vector<std::unique_ptr<Cluster>> pool;

void start(Cluster& cluster, unsigned first) {
  cluster.barrier = {};
  cluster.live = now->cluster;
  cluster.blocks.resize(now->cluster);
  for (unsigned rank = 0; rank < now->cluster; ++rank) {
    if (!cluster.blocks[rank]) cluster.blocks[rank] = std::make_unique<Block>();
    Block& block = *cluster.blocks[rank];
    block.cluster = &cluster;
    block.index = first + rank;
    block.rank = rank;
    block.live = now->block;
    block.barrier = {};
    block.warps.assign(now->block / 32, {});
    block.shared.resize((now->shared_bytes + 3) / 4);
    poison(block, kPoisonAtStart);
    if (block.fibers.size() < now->block) block.fibers = std::vector<Fiber>(now->block);
    for (unsigned t = 0; t < now->block; ++t) {
      Fiber& fiber = block.fibers[t];
      fiber.block = &block;
      fiber.thread = t;
      fiber.done = false;
      fiber.generation = nullptr;
      fiber.mbarrier = nullptr;
      fiber.spins = fiber.arrived_at_cluster = false;
      prepare(fiber.context, thread_main);
    }
  }
}

// Runs the lanes of one warp until none can go on.
void run_warp(Block& block, unsigned warp) {
  const bool reverse = settings.schedule == Schedule::kReverse;
  unsigned rotation = 0;
  if (settings.schedule == Schedule::kRandom) rotation = now->random();
  for (int rounds = 0; rounds < 64; ++rounds) {
    bool ran = false;
    for (unsigned i = 0; i < 32; ++i) {
      unsigned lane = reverse ? 31 - i : i;
      if (settings.schedule == Schedule::kRandom) lane = (lane * 11 + rotation) % 32;
      Fiber& fiber = block.fibers[warp * 32 + lane];
      if (!is_ready(fiber)) continue;
      current = &fiber;
      const bool spun = std::exchange(fiber.spins, false);
      switch_context(scheduler, fiber.context);
      ran |= !(spun && fiber.spins);
      now->moved |= ran;
      if (!now->error.empty()) return;
      // Threads that have drifted apart show what a missing barrier would let them do.
      if (settings.schedule == Schedule::kRandom && now->random() % 64 == 0) {
        now->moved = true;
        return;
      }
    }
    if (!ran) return;
  }
}

std::string stuck(const std::vector<Cluster*>& running) {
  for (const Cluster* cluster : running) {
    for (const auto& block : cluster->blocks) {
      for (const Fiber& fiber : block->fibers) {
        if (fiber.block != block.get() || fiber.done || fiber.thread >= now->block) continue;
        const char* what = fiber.mbarrier != nullptr     ? "waits for an mbarrier"
                              : fiber.generation == nullptr ? "spins"
                                                         : "waits at a barrier";
        std::string where;
        if (fiber.generation == &block->barrier.generation) where = at(block->barrier.site);
        if (fiber.generation == &cluster->barrier.generation) where = at(cluster->barrier.site);
        for (const Warp& warp : block->warps) {
          if (fiber.generation == &warp.barrier.generation) where = at(warp.barrier.site);
        }
        return "deadlock: " + at(fiber) + " " + what + " " + where;
      }
    }
  }
  return "deadlock";
}

void run() {
  const unsigned clusters = now->grid / now->cluster;
  const unsigned resident = std::max(1u, static_cast<unsigned>(settings.places) / now->cluster);
  while (pool.size() < std::min(resident, clusters)) pool.push_back(std::make_unique<Cluster>());
  std::vector<Cluster*> running, idle;
  for (const auto& cluster : pool) idle.push_back(cluster.get());
  unsigned next = 0;
  std::vector<std::pair<Block*, unsigned>> warps;
  while (next < clusters || !running.empty()) {
    while (next < clusters && running.size() < resident) {
      start(*idle.back(), next++ * now->cluster);
      running.push_back(idle.back());
      idle.pop_back();
    }
    warps.clear();
    for (Cluster* cluster : running) {
      for (const auto& block : cluster->blocks) {
        if (block->live == 0) continue;
        for (unsigned w = 0; w < now->block / 32; ++w) warps.emplace_back(block.get(), w);
      }
    }
    if (settings.schedule == Schedule::kReverse) std::reverse(warps.begin(), warps.end());
    if (settings.schedule == Schedule::kRandom) {
      std::shuffle(warps.begin(), warps.end(), now->random);
    }
    now->moved = false;
    for (const auto& [block, warp] : warps) {
      run_warp(*block, warp);
      if (!now->error.empty()) return;
      if (settings.schedule == Schedule::kRandom && !now->stores.empty() &&
          now->random() % 2 == 0) {
        deliver();
      }
    }
    if (!now->moved) {
      if (now->stores.empty()) {
        now->error = stuck(running);
        return;
      }
      current = nullptr;
      deliver();
    }
    std::erase_if(running, [&](Cluster* cluster) {
      if (cluster->live == 0) idle.push_back(cluster);
      return cluster->live == 0;
    });
  }
  if (!now->stores.empty()) now->error = "asynchronous stores that nobody waited for";
}

}  // namespace

void configure(Schedule schedule, unsigned seed, int places) {
  settings = {schedule, seed, places};
}
int places() { return settings.places; }

unsigned thread_index() { return current->thread; }
unsigned block_index() { return current->block->index; }
unsigned block_size() { return now->block; }
unsigned grid_size() { return now->grid; }
unsigned cluster_rank() { return current->block->rank; }
unsigned cluster_size() { return now->cluster; }
size_t shared_bytes() { return now->shared_bytes; }
void* shared_memory(unsigned rank) {
  if (rank >= now->cluster) fail("no CTA " + std::to_string(rank) + " in the cluster");
  Block& block = *current->block->cluster->blocks[rank];
  if (block.live == 0) fail("the shared memory of a CTA that has ended is used");
  return block.shared.data();
}

void block_barrier(Site site) {
  Block& block = *current->block;
  const unsigned generation = arrive(block.barrier, now->block, site, "__syncthreads()");
  wait_for(block.barrier.generation, generation);
}
void warp_barrier(Site site) {
  Barrier& barrier = current->block->warps[current->thread / 32].barrier;
  const unsigned generation = arrive(barrier, 32, site, "a warp");
  wait_for(barrier.generation, generation);
}
uint64_t* warp_slots() {
  // Two sets in turns: a lane may still read the one while another writes the next.
  Warp& warp = current->block->warps[current->thread / 32];
  return warp.slots[warp.barrier.generation & 1];
}
void cluster_arrive(Site site) {
  if (current->arrived_at_cluster) fail("cluster_arrive() twice without cluster_wait()");
  current->arrived_at_cluster = true;
  Cluster& cluster = *current->block->cluster;
  current->cluster_seen = arrive(cluster.barrier, now->block * now->cluster, site, "the cluster");
}
void cluster_wait(Site) {
  if (!current->arrived_at_cluster) fail("cluster_wait() without cluster_arrive()");
  wait_for(current->block->cluster->barrier.generation, current->cluster_seen);
  current->arrived_at_cluster = false;
}
void spin() {
  current->spins = true;
  yield();
}
void progress() { now->moved = true; }

void mbarrier_init(uint64_t* memory, unsigned arrivals) {
  const MBarrier barrier{kMark, arrivals, arrivals, 0, 0};
  std::memcpy(memory, &barrier, 8);
}
void mbarrier_arrive_expect(uint64_t* memory, unsigned bytes) {
  with(memory, [&](MBarrier& barrier) {
    if (barrier.missing == 0) fail("more arrivals at an mbarrier than it has");
    barrier.bytes += bytes;
    --barrier.missing;
  });
}
void mbarrier_wait(uint64_t* memory, unsigned parity) {
  with(memory, [](MBarrier&) {});
  while (!is_over(memory, parity)) {
    current->mbarrier = memory;
    current->parity = parity;
    yield();
  }
  current->mbarrier = nullptr;
}
void store_async(void* to, const void* from, size_t bytes, uint64_t* barrier) {
  Store store{to, {}, bytes, barrier};
  std::memcpy(store.bytes, from, bytes);
  now->stores.push_back(store);
  now->moved = true;
}

void fail(const std::string& what) {
  if (now == nullptr || current == nullptr) throw std::runtime_error(what);
  now->error = what;
  for (;;) yield();
}

void launch(unsigned grid, unsigned block, unsigned cluster, size_t shared_bytes,
            const std::function<void()>& body) {
  if (block == 0 || block % 32 != 0 || cluster == 0 || grid % cluster != 0) {
    throw std::runtime_error("no shape that a GPU launches");
  }
  Launch launch{grid, block, cluster, shared_bytes, &body, {}, std::mt19937(settings.seed)};
  now = &launch;
  try {
    run();
  } catch (const std::exception& error) {
    launch.error = error.what();
  }
  now = nullptr;
  current = nullptr;
  if (!launch.error.empty()) {
    pool.clear();
    throw std::runtime_error(launch.error);
  }
}

}  // namespace emulation
