// How the CTAs of one row meet. Two ways with one interface: a cluster, through distributed shared
// memory; and where there are none, CTAs that take their row by ticket, through global memory.
//
// row() is the row this CTA works on, rank() its part of it. To be called
//
//   start()    by all threads, before all else
//   ready()    by all threads, before the first of what follows
//   barrier()  what any CTA wrote before is seen by all after; by all threads
//   send()     sums in shared memory to every CTA of the row; by warp 0, once between two calls
//              of advance()
//   parts()    in shared memory, what each CTA sent; by warp 0
//   advance()  by all threads, after each parts() and before a barrier of the CTA
//   bin()      of the histogram that CTA i published, between two barriers; set_bin() changes one
//   end()      by all threads, after all else
//
// The buffers of an exchange are used again two exchanges later. A CTA sends into them only after
// it has everyone's part of the exchange between, which each sends only after it has read this
// one's: so nobody is still reading.
#pragma once
#include "plan.h"
#include "sums.h"

namespace fastkd::cuda {

constexpr int kBins = 2048;  // a histogram's, see select.h

__device__ __forceinline__ uint4 vector_of(const Sums& sums, int i) {
  uint4 vector;
  memcpy(&vector, reinterpret_cast<const char*>(&sums) + 16 * i, sizeof vector);
  return vector;
}

class Cluster {
 public:
#if defined(__CUDA_ARCH__)
  static constexpr int kVectors = cluster_vectors(__CUDA_ARCH__ / 100);
#else
  static constexpr int kVectors = kClusterVectors;
#endif
  struct Shared {
    Sums inbox[2][kMaxCluster];
    uint64_t barrier[2];
    int row, count;
  };

  __device__ Cluster(Shared& shared, const DenseRows&, const Plan& plan, unsigned*)
      : shared_(shared), plan_(plan) {}
#ifdef FASTKD_CLUSTERS
  __device__ void start() {
    if (threadIdx.x == 0) {
      shared_.row = static_cast<int>(blockIdx.x) / size();
      shared_.count = 0;
    }
    if (size() == 1) return;
    if (threadIdx.x == 0) {
      mbarrier_init(&shared_.barrier[0], 1);
      mbarrier_init(&shared_.barrier[1], 1);
      mbarrier_init_fence();
    }
    __syncwarp();  // the barriers of a cluster are for warps that have not diverged
    cluster_arrive_relaxed();
  }
  // Before the first exchange: by then the row is on its way and the other CTAs have begun.
  __device__ void ready() {
    __syncwarp();
    if (size() > 1) cluster_wait();
  }
  __device__ void barrier() {
    __syncwarp();
    if (size() > 1) {
      cluster_sync();
    } else {
      __syncthreads();
    }
  }
  __device__ void send(const Sums& sums) {
    const int buffer = count() & 1;
    if (lane() == 0) mbarrier_arrive_expect(&shared_.barrier[buffer], size() * sizeof(Sums));
    for (int i = lane(); i < size() * kSumsVectors; i += kLanes) {
      const int to = i / kSumsVectors, word = i % kSumsVectors;
      store_async(reinterpret_cast<uint4*>(&shared_.inbox[buffer][rank()]) + word,
                  vector_of(sums, word), &shared_.barrier[buffer], static_cast<unsigned>(to));
    }
  }
  // A CTA that has everyone's last part has nothing more to come, and nobody reads its memory: it
  // may exit.
  __device__ Sums* parts() {
    mbarrier_wait(&shared_.barrier[count() & 1], static_cast<unsigned>(count() >> 1 & 1));
    return shared_.inbox[count() & 1];
  }

  // The bins lie in the shared memory of their CTAs.
  __device__ void publish(const unsigned*) {}
  __device__ unsigned bin(const unsigned* mine, int i, int bin) const {
    return *peer(mine + bin, static_cast<unsigned>(i));
  }
  __device__ void set_bin(unsigned* mine, int bin, unsigned value) { mine[bin] = value; }

  __device__ void end() {}
  __device__ void advance() {
    if (threadIdx.x == 0) ++shared_.count;
  }
  // Nothing of these is kept: the registers are needed for the row.
  __device__ int rank() const { return static_cast<int>(cluster_rank()); }
  __device__ int size() const { return plan_.parts; }
  __device__ int row() const { return fresh(shared_.row); }
#endif

 private:
  __device__ int count() const { return fresh(shared_.count); }

  Shared& shared_;
  const Plan& plan_;
};

// The workspace of the tickets: three kinds of counters, all 0 at the start of the kernel, and the
// buffers of `slots` rows at a time.
struct TicketSpace {
  static constexpr int64_t kAlign = 256;
  int64_t N, parts, slots;
  bool bins;

  FASTKD_HOST_DEVICE int64_t counter_bytes() const {  // the ticket, and two for each row
    return ((1 + 2 * N) * 4 + kAlign - 1) / kAlign * kAlign;
  }
  FASTKD_HOST_DEVICE int64_t slot_bytes() const {
    return parts * 2 * static_cast<int64_t>(sizeof(Sums)) + (bins ? parts * kBins * 4 : 0);
  }
  FASTKD_HOST_DEVICE int64_t bytes() const { return counter_bytes() + slots * slot_bytes(); }
};

// Forward progress without a cooperative launch. Tickets are handed out in the order in which CTAs
// begin, so of all rows only the last one begun can lack CTAs that have not begun. A CTA waits for
// the other CTAs of its row, and before it writes into a slot for the CTAs of an earlier row: by
// induction over the rows, all earlier ones end, their CTAs leave, and the places they leave are
// taken by the CTAs that the last row lacks. That needs as many places as a row has parts, which
// the plan sees to. Nothing is left behind for the next launch: a memset precedes each.
class Tickets {
 public:
  static constexpr int kVectors = kTicketVectors;
  struct Shared {
    Sums inbox[kMaxTickets];
    int row, rank, count;
  };

  __device__ Tickets(Shared& shared, const DenseRows& call, const Plan& plan, unsigned* workspace)
      : shared_(shared), call_(call), plan_(plan), workspace_(workspace) {}
  __device__ void start() {
    if (threadIdx.x == 0) {
      const unsigned ticket = atomicAdd(workspace_, 1u), size = static_cast<unsigned>(plan_.parts);
      shared_.row = static_cast<int>(ticket / size);
      shared_.rank = static_cast<int>(ticket % size);
      shared_.count = 0;
    }
    __syncthreads();
  }

  __device__ void ready() {}
  __device__ void barrier() {
    __syncthreads();
    if (threadIdx.x == 0) {
      arrive();
      await();
      ++shared_.count;
    }
    __syncthreads();
  }
  __device__ void send(const Sums& mine) {
    if (lane() == 0) wait_for_slot();
    __syncwarp();
    if (lane() < kSumsVectors) store_shared_by_all(sums(rank()) + lane(), vector_of(mine, lane()));
    __syncwarp();
    if (lane() == 0) arrive();
  }
  __device__ Sums* parts() {
    if (lane() == 0) await();
    __syncwarp();
    for (int i = lane(); i < size() * kSumsVectors; i += kLanes) {
      const uint4 vector = load_shared_by_all(sums(0) + i);
      memcpy(reinterpret_cast<char*>(shared_.inbox) + 16 * i, &vector, sizeof vector);
    }
    __syncwarp();
    return shared_.inbox;
  }
  __device__ void publish(const unsigned* mine) {
    if (threadIdx.x == 0) wait_for_slot();
    __syncthreads();
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
      store_shared_by_all(bins(rank()) + i, mine[i]);
    }
  }
  __device__ unsigned bin(const unsigned*, int i, int bin) const {
    return load_shared_by_all(bins(i) + bin);
  }
  __device__ void set_bin(unsigned*, int bin, unsigned value) {
    store_shared_by_all(bins(rank()) + bin, value);
  }

  // This CTA no longer touches the row's buffers, and nor does any row that had them before: a row
  // that never used them has to wait for that as well, for the next one asks only about this one.
  __device__ void end() {
    __syncthreads();
    if (threadIdx.x != 0) return;
    wait_for_slot();
    add_release(finished(row()));
  }
  __device__ void advance() {
    if (threadIdx.x == 0) ++shared_.count;
  }
  __device__ int rank() const { return shared_.rank; }
  __device__ int size() const { return plan_.parts; }
  __device__ int row() const { return shared_.row; }

 private:
  // Nothing of this is kept: the registers are needed for the row.
  __device__ int count() const { return fresh(shared_.count); }
  __device__ TicketSpace space() const {
    return {call_.N, plan_.parts, plan_.slots, call_.teacher.keep != nullptr};
  }
  __device__ unsigned* arrived(int row) const { return workspace_ + 1 + row; }
  __device__ unsigned* finished(int row) const { return arrived(row) + call_.N; }
  __device__ char* slot() const {
    const TicketSpace s = space();
    return reinterpret_cast<char*>(workspace_) + s.counter_bytes() +
           row() % plan_.slots * s.slot_bytes();
  }
  __device__ uint4* sums(int i) const {
    return reinterpret_cast<uint4*>(slot()) + ((count() & 1) * size() + i) * kSumsVectors;
  }
  __device__ unsigned* bins(int i) const {
    return reinterpret_cast<unsigned*>(slot() + 2 * size() * sizeof(Sums)) + i * kBins;
  }
  __device__ void arrive() { add_release(arrived(row())); }
  __device__ void await() const {
    const unsigned all = static_cast<unsigned>(size() * (count() + 1));
    while (load_acquire(arrived(row())) < all) spin();
  }
  __device__ void wait_for_slot() {
    if (row() < plan_.slots) return;
    while (load_acquire(finished(row() - plan_.slots)) < static_cast<unsigned>(size())) spin();
  }

  Shared& shared_;
  const DenseRows& call_;
  const Plan& plan_;
  unsigned* const workspace_;
};

}  // namespace fastkd::cuda
