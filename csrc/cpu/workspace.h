// The working memory of a thread, and the sums that a row keeps while it is read.
#pragma once
#include "fast.h"

namespace fastkd::cpu::FASTKD_ISA {

// For rows of `vocab_size` columns, or of as many in all, those behind the first of them apart.
template <class T>
struct Workspace {
  explicit Workspace(int64_t vocab_size)
      : vocab_size(vocab_size),
        stride((vocab_size + 2 * 64 + 15) / 16 * 16),
        chunks((vocab_size + kChunk - 1) / kChunk),
        memory(new T[6 * stride + 6 * kChunk]),
        frames(new Frame<T>[2 * chunks + 1]),
        tops(new T[chunks]),
        columns(new int32_t[stride]) {}

  T* a() { return memory.get(); }
  T* b() { return a() + stride; }
  T* h() { return b() + stride; }        // exponentials of the hard term
  T* teacher() { return h() + stride; }  // the converted teacher, where classes are selected
  T* kept_student() { return teacher() + stride; }  // the selected classes alone
  T* kept_teacher() { return kept_student() + stride; }
  T* scratch(int k) { return kept_teacher() + stride + k * kChunk; }
  Frame<T>* soft_frames() { return frames.get(); }
  Frame<T>* hard_frames() { return frames.get() + chunks; }
  T* soft_tops() { return tops.get(); }  // of each chunk, Sums::top
  int32_t* kept_columns() { return columns.get(); }
  double* doubles(size_t n) {
    if (few.size() < n) few.resize(n);
    return few.data();
  }

  int64_t vocab_size, stride, chunks;
  std::unique_ptr<T[]> memory;  // not touched, not resident: few rows need all of it
  std::unique_ptr<Frame<T>[]> frames;
  std::unique_ptr<T[]> tops;
  std::unique_ptr<int32_t[]> columns;
  std::vector<double> few;  // as many as a row's sparse teacher needs
};

// The sums of a whole row, relative to the frame of its last chunk, in double.
template <class T>
struct RowSums {
  double lead = 0, other = 0, difference = 0, excess = 0, cross = 0;
  bool forbidden = false;
  bool moved = false;    // to another frame, so that chunks differ in theirs
  bool inexact = false;  // `difference` and `excess` lost digits in a move
  Frame<T> frame;

  // Moves the sums to a new frame. With D = the shift of x, e_other / e_lead shrinks by exp(-D):
  // difference' = w (difference + expm1(-D) other), and so on; nothing cancels for small D.
  void move(Frame<T> to, Temperatures<T> inverse) {
    if (lead != 0 || other != 0) {
      const double by_lead = (double{to.lead} - frame.lead) * inverse.lead;
      const double by_other = (double{to.other} - frame.other) * inverse.other;
      const double D = by_other - by_lead;
      moved |= !(std::fabs(D) < 1e-3);
      const double w = std::exp(-by_lead);
      if (std::isfinite(D) && w > 0) {
        const double ratio = std::expm1(-D);
        inexact |= std::fabs(D) > 2;
        cross = w * (cross + lead * D);
        excess = w * (excess + lead * (D + ratio) + ratio * difference);
        difference = w * (difference + ratio * other);
      } else {  // one side has had no finite logit so far
        difference = std::exp(-by_other) * other - w * lead;
        excess = w > 0 ? w * excess : difference;
        cross = 0;  // nothing, or infinite and counted as such
        moved = inexact = true;
      }
      lead *= w;
      other *= std::exp(-by_other);
    }
    frame = to;
  }

  void add(const Sums<T>& chunk) {
    lead += chunk.lead;
    other += chunk.other;
    difference += chunk.difference;
    excess += chunk.excess;
    cross += chunk.cross;
    forbidden |= chunk.forbidden;
  }
};

}  // namespace fastkd::cpu::FASTKD_ISA
