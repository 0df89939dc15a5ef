// Runs the fibers of a launch, warp by warp, in the order of the schedule.
#include <stdexcept>
#include <utility>

#include "state.h"

namespace emulation {
namespace {

constexpr uint32_t kPoisonAtStart = 0xffc0dead;  // a NaN
constexpr uint32_t kPoisonAtEnd = 0xffc0dea1;

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
