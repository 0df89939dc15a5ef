// The exact keep-th largest teacher logit of a row: radix select over keys in the order of the
// logits, 11 bits at a time, with a histogram per CTA that the CTAs of the row add up.
#pragma once
#include "exchange.h"

namespace fastkd::cuda {

struct SelectShared {
  unsigned histogram[kBins];
  unsigned warps[kMaxWarps];
  int bin;
  unsigned above;  // how many logits lie in higher bins
};

// Ascending with the logits; -0 equals +0.
__device__ __forceinline__ unsigned key_of(float logit) {
  const unsigned bits = __float_as_uint(logit + 0.0f);
  return bits & 0x80000000u ? ~bits : bits | 0x80000000u;
}
__device__ __forceinline__ float logit_of(unsigned key) {
  return __uint_as_float(key & 0x80000000u ? key & 0x7fffffffu : ~key);
}

// Adds up the histograms of the row's CTAs: each CTA some of the bins, in its own histogram.
template <class Exchange>
__device__ inline void merge(Exchange& exchange, unsigned* histogram) {
  const int size = exchange.size();
  exchange.publish(histogram);
  exchange.barrier();
  const int begin = kBins * exchange.rank() / size, end = kBins * (exchange.rank() + 1) / size;
  for (int i = begin + static_cast<int>(threadIdx.x); i < end; i += static_cast<int>(blockDim.x)) {
    unsigned total = 0;
    for (int part = 0; part < size; ++part) total += exchange.bin(histogram, part, i);
    exchange.set_bin(histogram, i, total);  // only this CTA reads these bins of its histogram
  }
  exchange.barrier();
}

// Finds the bin with the rank-th logit from the top; bin = -1 where there are fewer.
template <class Exchange>
__device__ inline void find_bin(Exchange& exchange, SelectShared& shared, unsigned rank) {
  const int size = exchange.size();
  const int threads = static_cast<int>(blockDim.x), thread = static_cast<int>(threadIdx.x);
  const int each = kBins / threads;
  const auto total = [&](int i) {  // bin i from the top
    const int bin = kBins - 1 - i;
    if (size == 1) return shared.histogram[bin];
    int owner = bin * size / kBins;  // or the next one, whose bins begin at kBins * owner / size
    while (owner + 1 < size && bin >= kBins * (owner + 1) / size) ++owner;
    return exchange.bin(shared.histogram, owner, bin);
  };
  unsigned sum = 0;
  for (int i = thread * each; i < (thread + 1) * each; ++i) sum += total(i);
  unsigned upto = sum;
  for (int distance = 1; distance < kLanes; distance *= 2) {
    const unsigned before = __shfl_up_sync(kWholeWarp, upto, distance);
    if (lane() >= distance) upto += before;
  }
  if (lane() == kLanes - 1) shared.warps[warp()] = upto;
  if (thread == 0) shared.bin = -1;
  __syncthreads();
  unsigned above = upto - sum;
  for (int w = 0; w < warp(); ++w) above += shared.warps[w];
  if (above < rank && rank <= above + sum) {
    int i = thread * each;
    for (unsigned in_bin = total(i); above + in_bin < rank; in_bin = total(++i)) above += in_bin;
    shared.bin = kBins - 1 - i;
    shared.above = above;
  }
  __syncthreads();
}

// The keep-th largest of the row's teacher, logits or probabilities; -inf where no more than keep -
// 1 are above `none`, which has no mass. Of a row with a NaN it is some number. `each(fn)` calls fn
// for every one of this CTA's slice.
template <class Exchange, class Each>
__device__ inline float kth_largest(Exchange& exchange, SelectShared& shared, DType dtype,
                                    int64_t keep, float none, const Each& each) {
  // The bits of a key that can differ: a float16 holds 11 of the 24 of a float's significand.
  const int last = dtype == DType::kFloat ? 0 : dtype == DType::kBFloat16 ? 16 : 13;
  unsigned rank = static_cast<unsigned>(keep), prefix = 0;
  int shift = 32;
  while (shift > last) {
    const int below = shift - 11 > last ? shift - 11 : last;
    const unsigned mask = (1u << (shift - below)) - 1;
    for (int i = static_cast<int>(threadIdx.x); i < kBins; i += static_cast<int>(blockDim.x)) {
      shared.histogram[i] = 0;
    }
    __syncthreads();
    each([&](float logit) {
      const unsigned key = key_of(logit);
      // What has no mass is counted nowhere: there may be many, and any number of columns that do
      // not exist.
      const bool counts = shift == 32 || key >> (shift & 31) == prefix;
      if (counts && logit > none) atomicAdd(&shared.histogram[key >> below & mask], 1u);
    });
    __syncthreads();
    if (exchange.size() > 1) merge(exchange, shared.histogram);
    find_bin(exchange, shared, rank);
    const int bin = shared.bin;
    rank -= shared.above;
    // Nobody clears a histogram that another CTA still reads.
    if (exchange.size() > 1) exchange.barrier();
    __syncthreads();
    if (bin < 0) return -kInf;
    prefix = prefix << (shift - below) | static_cast<unsigned>(bin);
    shift = below;
  }
  const unsigned key = prefix << last;
  return logit_of(key & 0x80000000u ? key : key | ((1u << last) - 1));
}

}  // namespace fastkd::cuda
