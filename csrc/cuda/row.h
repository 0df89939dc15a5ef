// What the cores of a row share (fast.h, careful.h, flat.h): its arguments, its slice,
// the sums over all its CTAs, and what is written of it besides the gradient proper.
#pragma once
#include "select.h"

namespace fastkd::cuda {

// A row's arguments, found by one thread and kept in shared memory: every register is needed for
// the logits.
struct RowArguments {
  View student, teacher, dstudent;
  float soft_weight, hard_weight, target_weight, student_inverse;
  float teacher_inverse;  // times ln 2 where the teacher's logits are log2 of its probabilities
  float at_label;  // what the gradient has at the label alone, of the hard term and of its own term
  float beta;      // the teacher's share of a mixture
  int vocab, keep;
  int begin, end;  // the slice of this CTA, in steps
  int longest;     // slice of the row, in steps; with a tail, more than any registers hold
  int label;       // -1: no class
  bool has_soft, has_hard;
  bool has_tail;   // a hard term, and classes from vocab on, which the student has alone
  bool decoupled;  // the soft term leaves out the label
  bool pruned;
  bool is_flat;  // T is large: the soft term is that of flat.h, where logits are not
  // exp(z) = exp(z / T)^T: for a student's T of 1 to 4 the hard term takes this power of the soft
  // term's exponentials, and has none of its own. 0: it has, for T is another, or not the same
  // classes are in both terms.
  int power;

  __device__ bool is_skipped() const {
    return fresh(soft_weight) == 0 && fresh(hard_weight) == 0 && fresh(target_weight) == 0;
  }
};

// The largest 1 / T of rows that are left to flat.h: from there on it is the more exact one.
constexpr float kFlatInverse = 1e-3f;

// Where part `rank` of `size` begins.
__device__ __forceinline__ int share(int all, int rank, int size) {
  const int each = all / size, over = all - each * size;
  return each * rank + min(rank, over);
}

__device__ inline RowArguments row_arguments(const DenseRows& call, int row, int rank, int size) {
  const auto vector = [&](const void* values) {
    return values != nullptr ? static_cast<const float*>(values)[row] : 0.0f;
  };
  const bool split =
      call.student.dtype == DType::kFloat && call.teacher.logits.dtype == DType::kFloat;
  const int traits = split ? View::kSplit : 0;
  const int probabilities = call.teacher.probs ? View::kProbabilities : 0;
  const int vocab = static_cast<int>(call.vocab_size);
  RowArguments a;
  a.student = View(call.student, row, vocab, traits);
  a.teacher = View(call.teacher.logits, row, call.soft_weight != nullptr ? vocab : 0,
                   traits | probabilities);
  a.dstudent = View(call.dstudent, row, vocab, traits);
  a.soft_weight = vector(call.soft_weight);
  a.hard_weight = vector(call.hard_weight);
  a.target_weight = vector(call.target_weight);
  a.at_label = -a.hard_weight;
  a.student_inverse = vector(call.student_inv_temperature);
  a.teacher_inverse = vector(call.teacher_inv_temperature) * (call.teacher.probs ? kLn2 : 1.0f);
  a.beta = vector(call.beta);
  a.vocab = vocab;
  a.keep = static_cast<int>(call.kept(row));
  const int steps = (vocab + kStep - 1) / kStep;
  a.begin = share(steps, rank, size);
  a.end = share(steps, rank + 1, size);
  a.longest = (steps + size - 1) / size;
  const int64_t label = call.labels != nullptr ? call.labels[row] : 0;
  // The decoupled terms set apart a class that the teacher has as well.
  const int64_t classes = call.target_weight != nullptr ? vocab : call.student.width;
  a.label = label >= 0 && label < classes ? static_cast<int>(label) : -1;
  a.has_soft = call.soft_weight != nullptr;
  a.has_hard = call.hard_weight != nullptr;
  a.has_tail = a.has_hard && call.student.width > call.vocab_size;
  if (a.has_tail) a.longest = 1 << 30;
  a.decoupled = call.target_weight != nullptr;
  a.pruned = a.has_soft && a.keep < vocab;
  a.is_flat = a.has_soft && !a.decoupled && a.student_inverse <= kFlatInverse &&
              a.student_inverse == vector(call.teacher_inv_temperature);
  a.power = 0;
  for (int power = 1; power <= 4; ++power) {
    const bool same = a.has_hard && a.has_soft && !a.has_tail && !a.pruned && !a.decoupled &&
                      call.teacher.logits.data != nullptr;  // not a sparse one
    if (same && a.student_inverse == 1.0f / power) a.power = power;
  }
  return a;
}

// What the CTAs' threads share of a row with a sparse teacher; see sparse.h.
struct SparseShared {
  float teacher_offset, student_offset;  // with which both sides' sums are about 1
  Pair outside;                          // all classes outside, of a bucket
  bool valid, forbidden;
  float offset, sum;  // the student's exponentials at T = 1 over all classes
  Combination gradient;
  float lead, other;  // the second sums
  bool near;          // q is over all classes, most of it in those that the teacher names
};

struct RowShared {
  RowArguments arguments;
  Sums warps[kMaxWarps];
  Sums total;
  SoftTerm divergence;
  Binary target;          // a decoupled row's term of the label
  float target_at_label;  // the gradient there
  SparseShared sparse;
  SelectShared select;
};

template <class Exchange>
class Row {
 public:
  __device__ Row(const DenseRows& call, Exchange& exchange, RowShared& shared)
      : call(call), exchange(exchange), shared(shared), a(shared.arguments) {}

  __device__ float soft_weight() const { return fresh(a.soft_weight); }
  __device__ float hard_weight() const { return fresh(a.hard_weight); }
  __device__ float target_weight() const { return fresh(a.target_weight); }
  __device__ float student_inverse() const { return fresh(a.student_inverse); }
  __device__ float teacher_inverse() const { return fresh(a.teacher_inverse); }
  __device__ int begin() const { return fresh(a.begin); }
  __device__ int end() const { return fresh(a.end); }
  __device__ int longest() const { return fresh(a.longest); }
  __device__ int label() const { return fresh(a.label); }
  __device__ float beta() const { return fresh(a.beta); }
  __device__ float at_label() const { return fresh(a.at_label); }
  __device__ int vocab() const { return fresh(a.vocab); }
  __device__ int keep() const { return fresh(a.keep); }
  __device__ bool has_soft() const { return fresh(a.has_soft); }
  __device__ bool has_hard() const { return fresh(a.has_hard); }
  __device__ bool has_tail() const { return fresh(a.has_tail); }
  __device__ bool decoupled() const { return fresh(a.decoupled); }
  __device__ bool pruned() const { return fresh(a.pruned); }
  __device__ bool is_flat() const { return fresh(a.is_flat); }
  __device__ int power() const { return fresh(a.power); }
  __device__ View student() const { return View::again(a.student); }
  __device__ View teacher() const { return View::again(a.teacher); }
  __device__ View dstudent() const { return View::again(a.dstudent); }

  // Finds the row's arguments; by the whole CTA.
  __device__ void start() {
    if (threadIdx.x == 0) {
      shared.target_at_label = 0;
      shared.arguments = row_arguments(call, exchange.row(), exchange.rank(), exchange.size());
    }
    __syncthreads();
  }

  __device__ bool is_skipped() const { return a.is_skipped(); }
  __device__ bool wants_gradient() const { return call.dstudent.data != nullptr; }

  // The row's terms; that of the label set apart is in shared memory, where set_target() left it.
  __device__ void write_terms(float soft, float hard) const {
    if (exchange.rank() != 0 || threadIdx.x != 0) return;
    static_cast<float*>(call.soft)[exchange.row()] = has_soft() ? soft : 0.0f;
    static_cast<float*>(call.hard)[exchange.row()] = has_hard() ? hard : 0.0f;
    if (decoupled()) static_cast<float*>(call.target)[exchange.row()] = shared.target.divergence;
  }

  // Writes a row of which nothing has to be computed: 0 everywhere, or NaN.
  __device__ void write_row(float terms, float gradient) {
    if (threadIdx.x == 0) shared.target.divergence = terms;
    write_terms(terms, terms);
    if (!wants_gradient()) return;
    fill_slice(gradient);
    fill_beyond(hard_weight() == 0 ? 0 : gradient);
  }

  // The same gradient in every class of the slice; 0 beyond them all.
  __device__ void fill_gradient(float value) const {
    if (!wants_gradient()) return;
    fill_slice(value);
    fill_beyond();
  }
  __device__ void fill_slice(float value) const {
    fill(dstudent(), begin() * kStep, min(end() * kStep, vocab()), value);
  }
  // Where part `rank`'s share of the classes from vocab on begins.
  __device__ int beyond(int rank) const {
    return vocab() + share(static_cast<int>(call.student.width) - vocab(), rank, exchange.size());
  }
  __device__ void fill_beyond(float value = 0) const {
    const int width = static_cast<int>(call.dstudent.width) - vocab();
    if (width != 0) fill(dstudent(), beyond(exchange.rank()), beyond(exchange.rank() + 1), value);
  }

  // Whether nothing but NaN can be said of the gradient.
  template <Divergence kDivergence>
  __device__ bool is_lost(float soft, float hard) const {
    const bool infinite = kDivergence == Divergence::kReverse && soft == kInf;
    return ((soft_weight() != 0 || target_weight() != 0) && (soft != soft || infinite)) ||
           (hard_weight() != 0 && hard != hard);
  }

  __device__ static float at(const View& view, int column) {
    float values[kPerLane];
    unpack(view.dtype, {{load_word(view, column), 0, 0, 0}, {0, 0, 0, 0}}, values);
    return values[0];
  }

  // What a row has at the label, for the one thread that adds it to the sums: read by the CTA that
  // may write over it later. The student's logit; the teacher's, or log2 of its probability.
  __device__ float student_label() const {
    return (has_hard() || decoupled()) && adds_label() ? load_single(student(), label()) : 0;
  }
  __device__ float teacher_label() const {
    if (!decoupled() || !adds_label()) return 0;
    const float value = at(teacher(), label());
    if (!teacher_probs()) return value;
    return value < kInf ? log2_subnormal(value) : kNaN;
  }

  // The label's term of a decoupled row, by one thread, from the log-odds of both sides, which are
  // `gap` apart.
  __device__ void set_target(float teacher_odds, float student_odds, float gap, bool has_gradient) {
    shared.target = binary_divergence(teacher_odds, student_odds, gap);
    const float weight = has_gradient ? target_weight() : 0.0f;
    const float of_target = weight == 0 ? 0 : weight * student_inverse() * shared.target.delta;
    shared.arguments.at_label = of_target - hard_weight();
    shared.target_at_label = of_target;
  }
  // The gradient at the label but for the soft term's, from what all other classes have of the hard
  // one: that is 1 less the label's share to its own precision. By one thread, after set_target().
  __device__ void set_hard_at_label(float besides) {
    const float of_hard = hard_weight() == 0 ? 0 : hard_weight() * -besides;
    shared.arguments.at_label = of_hard + shared.target_at_label;
  }
  // The factor of q in the gradient of every class but the label, which the label's own term adds.
  __device__ float target_factor() const {
    if (!decoupled() || target_weight() == 0) return 0;
    return -target_weight() * student_inverse() * fresh(shared.target.delta);
  }
  __device__ bool teacher_probs() const {
    return (fresh(a.teacher.traits) & View::kProbabilities) != 0;
  }
  // Where a lane has the label of a decoupled row among its 8 columns of a step, or a number
  // outside.
  __device__ int apart_index(int step) const {
    return decoupled() && label() / kStep == step ? student().index(step, label()) : -1;
  }

  // Sums over the row of what each warp has, moved to the row's offsets, the largest of the warps';
  // they stay in shared memory until the next call. `finish(sums)` runs on them once.
  template <class Finish>
  __device__ const Sums& total(const Sums& warp_sums, const Finish& finish) {
    if (lane() == 0) shared.warps[warp()] = warp_sums;
    __syncthreads();
    if (warp() == 0) {
      combine(shared.warps, warps(), shared.total, power());
      if (exchange.size() > 1) {
        exchange.send(shared.total);
        combine(exchange.parts(), exchange.size(), shared.total, power());
      }
      if (lane() == 0) finish(shared.total);
    }
    exchange.advance();
    __syncthreads();
    return shared.total;
  }

  // The same of sums that have names of their own; see MixtureSums.
  template <class Named>
  __device__ Named total_of(const Named& mine) {
    // A copy: read field by field from shared memory they took a few instructions more.
    const Sums sums = total(mine.packed(), [](Sums&) {});
    return Named::of(sums);
  }

  // -log softmax(student)[label], from a sum of 2^(logit scale - offset) to the power.
  __device__ float hard_term(float sum, float offset, float scale, float logit, int power) const {
    if (!(sum > 0)) return kNaN;
    return logf(sum) - static_cast<float>(power) * fmaf(logit, scale, -offset) * kLn2;
  }

  // The label's share of the gradient, before it is rounded for the store: the two nearly cancel.
  __device__ void add_label(int step, float* gradient) const {
    if (at_label() == 0 || label() / kStep != step) return;
    const int index = dstudent().index(step, label());
#pragma unroll
    for (int j = 0; j < kPerLane; ++j) {
      if (j == index) gradient[j] += at_label();
    }
  }

  const DenseRows& call;
  Exchange& exchange;
  RowShared& shared;

 private:
  __device__ bool adds_label() const {
    const bool in_tail = label() >= vocab();
    const int first = in_tail ? beyond(exchange.rank()) : begin() * kStep;
    const int last = in_tail ? beyond(exchange.rank() + 1) : end() * kStep;
    return threadIdx.x == 0 && label() >= first && label() < last;
  }

  const RowArguments& a;
};

}  // namespace fastkd::cuda
