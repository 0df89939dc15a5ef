// How a call is laid out on a GPU: the one table, and what it is derived from.
#pragma once
#include "../rows.h"

namespace fastkd::cuda {

// A thread holds so many times 8 columns of both rows in registers, 16 for each: as many as leave
// no kernel with registers spilled. From compute capability 10.0 on the compiler needs a few more
// registers than before; by tickets it needs some for the addresses of their buffers.
constexpr int kClusterVectors = 4;
constexpr int kLaterClusterVectors = 3;
constexpr int cluster_vectors(int major) {
  return major >= 10 ? kLaterClusterVectors : kClusterVectors;
}
constexpr int kTicketVectors = 3;
constexpr int kThreads = 256;     // of a CTA, mostly
constexpr int kMaxThreads = 512;  // with 128 registers each, all that a multiprocessor has
constexpr int kMaxWarps = kMaxThreads / 32;
constexpr int kMaxCluster = 16;
constexpr int kMaxTickets = 171;  // 2^20 classes in slices of 6144

struct Plan {
  const char* error = nullptr;
  bool cluster = false;  // a row's CTAs form a cluster; else they meet in global memory, by tickets
  int parts = 1;         // CTAs of a row
  int threads = kThreads;  // of a CTA
  int slots = 0;           // tickets: rows that have buffers in global memory at one time
};

// What a call may use, for tests that want several CTAs, or slices beyond the registers, at a few
// hundred columns.
struct Limits {
  int cluster = kMaxCluster;  // CTAs; 0: no clusters
  int tickets = kMaxTickets;  // CTAs of a row without a cluster; 0: always clusters
  int threads = kMaxThreads;
  int steps = 1 << 10;  // of a slice: 256 columns each
};
void set_limits(const Limits& limits);

Plan plan(const KdRows& call);

}  // namespace fastkd::cuda
