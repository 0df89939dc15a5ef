// What both cores of a row share (registers.h, reread.h): its arguments, its slice, the sums over
// all its CTAs, and what is written of it besides the gradient proper.
#pragma once
#include "select.h"

namespace fastkd::cuda {

struct RowShared {
  Sums warps[kMaxWarps];
  Sums total;
  Divergence divergence;
  SelectShared select;
};

constexpr float kNaN = __builtin_nanf("");

template <class Exchange>
class Row {
 public:
  __device__ Row(const KdRows& call, Exchange& exchange, RowShared& shared)
      : call(call),
        exchange(exchange),
        shared(shared),
        row(exchange.row()),
        vocab(static_cast<int>(call.vocab_size)),
        student(call.student, row, vocab, is_split(call)),
        teacher(call.teacher, row, vocab, is_split(call)),
        dstudent(call.dstudent, row, vocab, is_split(call)),
        soft_weight(vector(call.soft_weight)),
        hard_weight(vector(call.hard_weight)),
        student_inverse(vector(call.student_inv_temperature)),
        teacher_inverse(vector(call.teacher_inv_temperature)) {
    const int steps = (vocab + kStep - 1) / kStep;
    longest = (steps + exchange.size() - 1) / exchange.size();
    begin = share(steps, exchange.rank());
    end = share(steps, exchange.rank() + 1);
    has_soft = call.soft_weight != nullptr;
    has_hard = call.hard_weight != nullptr;
    pruned = has_soft && call.keep < call.vocab_size;
    // The hard term's exponentials are the student's own at T = 1 over all classes.
    shares = has_hard && has_soft && !pruned && student_inverse == 1;
    own_hard = has_hard && !shares;
    const int64_t of_row = call.labels != nullptr ? call.labels[row] : 0;
    label = of_row >= 0 && of_row < vocab ? static_cast<int>(of_row) : -1;
  }

  __device__ bool is_skipped() const { return soft_weight == 0 && hard_weight == 0; }
  __device__ bool wants_gradient() const { return call.dstudent.data != nullptr; }

  __device__ void write_terms(float soft, float hard) const {
    if (exchange.rank() != 0 || threadIdx.x != 0) return;
    static_cast<float*>(call.soft)[row] = has_soft ? soft : 0.0f;
    static_cast<float*>(call.hard)[row] = has_hard ? hard : 0.0f;
  }

  // The same gradient in every class of the slice; 0 beyond them all.
  __device__ void fill_gradient(float value) const {
    if (!wants_gradient()) return;
    fill(dstudent, begin * kStep, min(end * kStep, vocab), value);
    fill_beyond();
  }
  __device__ void fill_beyond() const {
    const int width = static_cast<int>(call.dstudent.width) - vocab;
    if (width == 0) return;
    fill(dstudent, vocab + share(width, exchange.rank()), vocab + share(width, exchange.rank() + 1),
         0.0f);
  }

  // Whether nothing but NaN can be said of the gradient.
  template <Mode kMode>
  __device__ bool is_lost(float soft, float hard) const {
    const bool infinite = kMode == Mode::kReverse && soft == kInf;
    return (soft_weight != 0 && (soft != soft || infinite)) || (hard_weight != 0 && hard != hard);
  }

  // The student's logit at the label, for the one thread that adds it to the sums: read by the CTA
  // that may write over it later.
  __device__ float label_logit() const {
    if (!has_hard || threadIdx.x != 0) return 0;
    if (label < begin * kStep || label >= end * kStep) return 0;
    const uint32_t word = load_word(student, label);
    float values[kPerLane];
    unpack(student.dtype, {{word, 0, 0, 0}, {0, 0, 0, 0}}, values);
    return values[0];
  }

  // Sums over the row of what each warp has, in the frames of the row's maxima; in shared memory,
  // until the next call. `finish(sums)` runs on them once.
  template <class Finish>
  __device__ const Sums& total(const Sums& warp_sums, const Finish& finish) {
    if (lane() == 0) shared.warps[warp()] = warp_sums;
    __syncthreads();
    if (warp() == 0) {
      combine(shared.warps, warps(), shared.total);
      if (exchange.size() > 1) {
        exchange.send(shared.total);
        combine(exchange.parts(), exchange.size(), shared.total);
      }
      if (lane() == 0) finish(shared.total);
    }
    exchange.advance();
    __syncthreads();
    return shared.total;
  }

  // -log softmax(student)[label], from a sum of 2^(logit scale - frame).
  __device__ float hard_term(float sum, float frame, float scale, float logit) const {
    if (!(sum > 0)) return kNaN;
    return logf(sum) - fmaf(logit, scale, -frame) * kLn2;
  }

  // The label's share of the gradient, before it is rounded for the store: the two nearly cancel.
  __device__ void add_label(int step, float* gradient) const {
    if (!has_hard || label / kStep != step) return;
    const int index = dstudent.index(step, label);
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (j == index) gradient[j] -= hard_weight;
    }
  }

  const KdRows& call;
  Exchange& exchange;
  RowShared& shared;
  const int row;
  const int vocab;
  const View student, teacher, dstudent;
  const float soft_weight, hard_weight, student_inverse, teacher_inverse;
  int begin, end;  // the slice of this CTA, in steps
  int longest;     // slice of the row
  int label;     // -1: no class
  bool has_soft, has_hard;
  bool pruned;
  bool shares;    // the hard term uses the soft term's exponentials
  bool own_hard;  // the hard term has exponentials of its own

 private:
  // Where the part of CTA `rank` begins.
  __device__ int share(int all, int rank) const {
    const int each = all / exchange.size(), over = all - each * exchange.size();
    return each * rank + min(rank, over);
  }
  __device__ float vector(const void* values) const {
    return values != nullptr ? static_cast<const float*>(values)[row] : 0.0f;
  }
  static __device__ bool is_split(const KdRows& call) {
    return call.student.dtype == DType::kFloat && call.teacher.dtype == DType::kFloat;
  }
};

}  // namespace fastkd::cuda
