// What the kernels call: who they are, barriers, shared memory, asynchronous stores.
#include "cuda_emulation.h"

#include <stdexcept>

#include "state.h"

namespace emulation {
namespace {

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

}  // namespace

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
  yield();  // others that saw the same may be far ahead by now
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

}  // namespace emulation
