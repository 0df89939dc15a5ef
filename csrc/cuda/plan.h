// How a call is laid out on a GPU: the one table, and the one choice from it.
#pragma once
#include <algorithm>

#include "../call.h"

namespace fastkd::cuda {

// A thread holds so many times 8 columns of both rows in registers, 16 for each: as many as leave
// no kernel with registers spilled. From compute capability 10.0 on the compiler needs a few more
// registers than before; by tickets it needs some for the addresses of their buffers.
constexpr int kClusterVectors = 4;
constexpr int kLaterClusterVectors = 3;
constexpr int cluster_vectors(int major) {
  return major < 10 ? kClusterVectors : kLaterClusterVectors;
}
constexpr int kTicketVectors = 3;
constexpr int kThreads = 256;     // a CTA has, mostly
constexpr int kMaxThreads = 512;  // with 128 registers each, all that a multiprocessor has
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kMaxCluster = 16;
constexpr int kMaxTickets = 171;  // 2^20 classes in slices of 6144

struct Plan {
  const char* error = nullptr;
  bool cluster = false;  // a row's CTAs form a cluster; else they meet in global memory, by tickets
  int parts = 1;         // CTAs of a row
  int threads = kThreads;  // a CTA has
  int slots = 0;           // tickets: rows that have buffers in global memory at one time
};

// What the plan asks about a GPU.
struct Device {
  const char* error = nullptr;
  int vectors = kClusterVectors;  // a thread of a cluster holds
  int places = 0;                 // CTAs of the ticket kernels that run at one time
  // Clusters that run at one time, by their CTAs, of kThreads and of kMaxThreads; 0: none can.
  int active[2][kMaxCluster + 1] = {};
};

// What a call may use, for tests that want several CTAs, or slices beyond the registers, at a few
// hundred columns.
struct Limits {
  int cluster = kMaxCluster;  // CTAs; 0: no clusters
  int tickets = kMaxTickets;  // CTAs of a row without a cluster; 0: always clusters
  int threads = kMaxThreads;
  int steps = 1 << 10;  // a slice has, 256 columns each
};
void set_limits(const Limits& limits);

// What a row takes of the time of a cluster, in bytes that one multiprocessor moves meanwhile.
//
// A slice of `steps` is read and written at the rate of the memory; but a row is also waited for,
// from its first load to the exchange and the stores, for about 1.5 us, in which an H200's
// multiprocessor moves 32 steps of bfloat16 [estimated: 4.3 TB/s over 132]; and for the sums of
// each CTA a little. Where a multiprocessor holds several CTAs, one moves bytes while another
// waits.
inline int64_t row_time(int64_t steps, int pair_bytes, int parts, int threads) {
  constexpr int64_t kWait = 32 * 6, kPerPart = 6;
  const int64_t bytes = steps * pair_bytes;
  return std::max(kMaxThreads / threads * bytes, bytes + kWait + kPerPart * parts);
}

// Registers hold up to 32 columns a thread of both rows. Of the clusters that hold a row in them,
// the one with the least time per row: with many rows, row_time() over the clusters that run at one
// time, which counts multiprocessors that a size leaves without work. How many rows there are must
// not matter: the order of a row's sums, and so its last bits, would depend on the rows beside it.
//
// A row that no cluster holds is split among as many CTAs as it needs, by tickets. Only where the
// GPU has too few places for those, slices are longer than the registers hold, and read again.
// Shared memory is not used for them. It could hold 100 KB of a slice for each multiprocessor of
// sm_86, 89 and 120, 25 thousand pairs of 16 bits or 12 thousand of float32, where registers hold
// 12 thousand of either: it would serve 16-bit rows of 2^18 classes on GPUs of 11 to 21
// multiprocessors, and of 2^20 on those of 42 to 85, at half the warps to hide waits with. There
// one row is in work at a time, whose 6 MB at most of 16-bit logits at 2^20 classes, read moments
// before, come from an L2 of 24 MB and more (sm_89, sm_120) at several times the rate of the
// memory.
inline Plan choose(int64_t N, int64_t vocab_size, int pair_bytes, const Device& device,
                   const Limits& limits) {
  constexpr int kColumns = 256;  // a step has
  Plan plan;
  plan.error = device.error;
  if (plan.error != nullptr) return plan;
  const int64_t steps = (vocab_size + kColumns - 1) / kColumns;
  const auto slice = [&](int threads, int vectors) -> int64_t {  // that registers hold
    return std::min(limits.steps, std::min(limits.threads, threads) / 32 * vectors);
  };
  int64_t best_time = 0, best_active = 0;
  int largest = 1;
  for (const int threads : {kThreads, kMaxThreads}) {
    for (int parts = 1; parts <= std::min<int64_t>(limits.cluster, steps); ++parts) {
      const int64_t active = device.active[threads == kMaxThreads][parts];
      if (active == 0) continue;
      largest = parts;
      const int64_t longest = (steps + parts - 1) / parts;
      if (longest > slice(threads, device.vectors)) continue;
      const int64_t time = row_time(longest, pair_bytes, parts, threads);
      if (plan.cluster && time * best_active >= best_time * active) continue;
      best_time = time, best_active = active;
      plan.cluster = true;
      plan.parts = parts;
      plan.threads = threads;
    }
  }
  if (!plan.cluster && limits.tickets == 0) {
    plan.cluster = true;
    plan.parts = largest;
    plan.threads = kMaxThreads;
  } else if (!plan.cluster) {
    plan.threads = kThreads;
    const int64_t parts =
        (steps + slice(kThreads, kTicketVectors) - 1) / slice(kThreads, kTicketVectors);
    plan.parts = static_cast<int>(std::min<int64_t>({parts, device.places, limits.tickets}));
    plan.slots = static_cast<int>(std::min<int64_t>(N, device.places / plan.parts + 2));
  }
  plan.threads = std::min(limits.threads, plan.threads);
  // No more warps than a short slice has steps; a power of two, which select.h counts on.
  while (plan.threads / 2 >= 32 && int64_t{plan.threads / 2 / 32} * plan.parts >= steps) {
    plan.threads /= 2;
  }
  return plan;
}

// The plan of a call on the current device.
Plan plan(const DenseRows& call);

}  // namespace fastkd::cuda
