// A few rows through the kernels without torch, for tests of the emulation itself and for the
// sanitizers: prints a line for each case, with a hash of every bit that came out. Arguments:
// schedule, layout (0 clusters, 1 tickets), CTAs that run at one time, and the cases: "few"; "all"
// dtypes, divergences, terms, pruning, lengths and edges; or "large" vocabularies, which are laid
// out as the wheel lays them out.
#include <cstdio>
#include <cstdlib>
#include <limits>
#include <string>
#include <vector>

#include "../../../csrc/cuda/launch.h"
#include "../../../csrc/cuda/plan.h"
#include "cuda_emulation.h"

namespace {

using fastkd::DenseRows;
using fastkd::Divergence;
using fastkd::DType;
using fastkd::Rows;
using fastkd::SparseRows;

constexpr int64_t kN = 7;
constexpr float kBeyond = 1e4f;  // would be the largest logit of all
constexpr float kInf = std::numeric_limits<float>::infinity();

// What the hard term is made of, and what else there is.
enum class Terms {
  kSoft,
  kShared,
  kPower,
  kOwn,
  kPruned,
  kHardOnly,
  kDecoupled,
  kProbabilities,
  kLimit,   // T = infinity, in every other row
  kSparse,  // forward: with a bucket; reverse: restricted; else renormalised
  kEnd
};

struct Case {
  DType student = DType::kFloat, teacher = DType::kFloat;
  Divergence divergence = Divergence::kForward;
  Terms terms = Terms::kSoft;
  int64_t V = 1500, keep = 0;         // 0: of no row; else so many, and all of every third row
  int64_t N = kN;                     // rows, of those that the tensors have
  bool inplace = false, odd = false;  // odd: infinities and NaN
};

// Rows with columns beyond V that nobody may read or write, but for the last row, which the memory
// ends with; and a stride that no row but the first is aligned at.
struct Matrix {
  Matrix(unsigned seed, DType dtype, int64_t V, bool odd)
      : V(V), stride(V + 13 - V % 2), dtype(dtype), bytes((stride * (kN - 1) + V) * size()) {
    for (int64_t r = 0; r < kN; ++r) {
      for (int64_t i = 0; i < stride && r * stride + i < stride * (kN - 1) + V; ++i) {
        seed = seed * 1664525u + 1013904223u;
        float value = i < V ? static_cast<float>(seed >> 8) * 0x1p-21f - 4 : kBeyond;
        if (odd && r == 4 && i == V / 2) value = -kInf;
        if (odd && r == 5 && i == V - 1) value = std::numeric_limits<float>::quiet_NaN();
        if (odd && r == 6 && i < V / 3) value = -kInf;
        set(r, i, value);
      }
    }
  }
  int64_t size() const { return dtype == DType::kFloat ? 4 : 2; }
  void set(int64_t r, int64_t i, float value) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (dtype == DType::kBFloat16) bits = fastkd::cuda::pack_bfloat16(value, 0);
    if (dtype == DType::kHalf) bits = fastkd::cuda::pack_half(value, 0);
    std::memcpy(bytes.data() + (r * stride + i) * size(), &bits, static_cast<size_t>(size()));
  }
  void make_positive() {
    if (dtype == DType::kFloat) {
      for (size_t i = 3; i < bytes.size(); i += 4) bytes[i] &= 0x7f;
    } else {
      for (size_t i = 1; i < bytes.size(); i += 2) bytes[i] &= 0x7f;
    }
  }
  Rows rows() { return {bytes.data(), dtype, V, kN, 0, stride}; }
  // The bytes of row r from column i on.
  std::vector<char> part(int64_t r, int64_t i, int64_t end) const {
    const char* row = bytes.data() + r * stride * size();
    return {row + i * size(), row + end * size()};
  }

  const int64_t V, stride;
  const DType dtype;
  std::vector<char> bytes;
};

template <class T>
uint64_t hash(uint64_t seed, const std::vector<T>& values) {
  const char* bytes = reinterpret_cast<const char*>(values.data());
  for (size_t i = 0; i < values.size() * sizeof(T); ++i) {
    seed = (seed ^ static_cast<unsigned char>(bytes[i])) * 0x100000001b3u;
  }
  return seed;
}

// Ids in order, and for some rows fewer of them: k is more than a CTA has threads.
constexpr int64_t kIds = 100;
std::vector<int64_t> ids;
std::vector<float> log_probs, log_rest;

SparseRows sparse(const DenseRows& rows, const Case& c) {
  ids.clear();
  log_probs.clear();
  for (int64_t r = 0; r < kN; ++r) {
    for (int64_t i = 0; i < kIds; ++i) {
      const int64_t id = i * (c.V / kIds + 1) + r;
      ids.push_back(std::min(id, c.V));
      log_probs.push_back(-4 - static_cast<float>(i % 7));
    }
  }
  log_rest.assign(kN, -1);
  SparseRows call;
  static_cast<fastkd::Call&>(call) = rows;
  call.divergence = Divergence::kForward;  // c.divergence stands for what is outside
  call.beta = nullptr;
  call.teacher.ids = ids.data();
  call.teacher.log_probs = log_probs.data();
  if (c.divergence == Divergence::kForward) call.teacher.log_rest = log_rest.data();
  call.teacher.restricted = c.divergence == Divergence::kReverse;
  call.teacher.k = kIds;
  return call;
}

const char* launch(const auto& call, auto run) {
  std::vector<uint4> workspace((fastkd::cuda::workspace_bytes(call) + 15) / 16,
                               {~0u, ~0u, ~0u, ~0u});
  return run(call, workspace.data(), nullptr);
}

void run(const Case& c) {
  Matrix student(1, c.student, c.V, c.odd), teacher(2, c.teacher, c.V, c.odd);
  Matrix gradient(3, c.student, c.V, false);
  const float T = c.terms == Terms::kPower ? 3 : c.terms == Terms::kOwn ? 2.5f : 1;
  const std::vector<float> weight{1, 1, 1, 0, 1, 2, 3};
  std::vector<float> inverse(kN, 1 / T), teacher_inverse(kN, 1);
  for (int64_t r = 0; c.terms == Terms::kLimit && r < kN; r += 2) {
    inverse[r] = teacher_inverse[r] = r == 4 ? 1e-4f : 0;
  }
  std::vector<int64_t> labels{3, 700, -1, 1499, 0, 256, 1300};
  for (auto& label : labels) label = std::min(label, c.V - 1);
  const std::vector<float> beta{0.5f, 0.25f, 0.75f, 0.5f, 0.125f, 0.5f, 0.5f};
  std::vector<int64_t> keep(kN, c.keep);
  for (int64_t r = 2; r < kN; r += 3) keep[r] = c.V;
  std::vector<float> soft(kN, -7), hard(kN, -7), target(kN, -7);
  DenseRows call;
  call.student = student.rows();
  call.teacher.logits = teacher.rows();
  Matrix& written = c.inplace ? student : gradient;
  const Matrix before = written;
  call.dstudent = written.rows();
  call.labels = labels.data();
  call.student_inv_temperature = inverse.data();
  call.teacher_inv_temperature = teacher_inverse.data();
  if (c.terms != Terms::kHardOnly) call.soft_weight = weight.data();
  if (c.terms != Terms::kSoft) call.hard_weight = weight.data();
  call.soft = soft.data();
  call.hard = hard.data();
  call.N = c.N;
  call.vocab_size = c.V;
  call.divergence = c.divergence;
  if (c.keep != 0) call.teacher.keep = keep.data();
  if (c.divergence == Divergence::kMixture) call.beta = beta.data();
  if (c.terms == Terms::kDecoupled) {
    call.target_weight = weight.data();
    call.target = target.data();
  }
  call.teacher.probs = c.terms == Terms::kProbabilities;
  if (call.teacher.probs) teacher.make_positive();
  const char* error = c.terms == Terms::kSparse ? launch(sparse(call, c), fastkd::cuda::sparse_rows)
                                                : launch(call, fastkd::cuda::dense_rows);
  if (error != nullptr) {
    std::printf("%s\n", error);
    return;
  }
  for (int64_t r = 0; r + 1 < kN; ++r) {
    if (written.part(r, c.V, written.stride) != before.part(r, c.V, written.stride)) {
      std::printf("row %d is written beyond its end\n", int(r));
      return;
    }
  }
  std::printf(
      "divergence %d terms %d V %d: %016llx soft %.6f hard %.6f\n", static_cast<int>(c.divergence),
      static_cast<int>(c.terms), static_cast<int>(c.V),
      static_cast<unsigned long long>(hash(hash(hash(hash(0, soft), hard), target), written.bytes)),
      soft[0], hard[0]);
}

void run_all() {
  constexpr DType kFloat = DType::kFloat, kBFloat16 = DType::kBFloat16, kHalf = DType::kHalf;
  const DType dtypes[][2] = {{kFloat, kFloat},
                             {kBFloat16, kBFloat16},
                             {kHalf, kHalf},
                             {kFloat, kHalf},
                             {kBFloat16, kFloat}};
  const int64_t lengths[] = {1500, 9, 513, 1024, 2300};
  int index = 0;
  for (const auto& [student, teacher] : dtypes) {
    for (const Divergence divergence :
         {Divergence::kForward, Divergence::kReverse, Divergence::kMixture}) {
      for (int terms = 0; terms < static_cast<int>(Terms::kEnd); ++terms, ++index) {
        if (static_cast<Terms>(terms) == Terms::kDecoupled && divergence != Divergence::kForward)
          continue;
        Case c{student, teacher, divergence, static_cast<Terms>(terms), lengths[index % 5]};
        c.keep = c.terms == Terms::kPruned ? c.V / 4 : 0;
        c.inplace = index % 2 == 0;
        c.odd = index % 3 == 0;
        run(c);
      }
    }
  }
}

// GPT-2's vocabulary and Llama 3's.
void run_large() {
  for (const int64_t V : {50257, 128256}) {
    DenseRows call;
    call.student.dtype = call.teacher.logits.dtype = call.dstudent.dtype = DType::kBFloat16;
    call.teacher.logits.data = &call;  // for a sparse one has none
    call.N = 2;
    call.vocab_size = V;
    const fastkd::cuda::Plan plan = fastkd::cuda::plan(call);
    std::printf("V %d: %s of %d CTAs of %d threads\n", static_cast<int>(V),
                plan.cluster ? "clusters" : "tickets", plan.parts, plan.threads);
    Case c{DType::kBFloat16, DType::kBFloat16, Divergence::kForward, Terms::kOwn, V};
    c.N = call.N;
    run(c);
    c.terms = Terms::kPruned, c.keep = V / 4, c.inplace = true;
    run(c);
    c.terms = Terms::kSparse, c.keep = 0;
    run(c);
    c.terms = Terms::kShared, c.divergence = Divergence::kMixture;
    run(c);
  }
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 5) return 2;
  const int schedule = std::atoi(arguments[1]), places = std::atoi(arguments[3]);
  emulation::configure(schedule == 0   ? emulation::Schedule::kForward
                       : schedule == 1 ? emulation::Schedule::kReverse
                                       : emulation::Schedule::kRandom,
                       static_cast<unsigned>(schedule), places);
  const std::string cases = arguments[4];
  fastkd::cuda::Limits limits;
  if (cases != "large") limits.threads = 64, limits.steps = 2;
  (std::atoi(arguments[2]) == 1 ? limits.cluster : limits.tickets) = 0;
  fastkd::cuda::set_limits(limits);
  if (cases == "all") {
    run_all();
    return 0;
  }
  if (cases == "large") {
    run_large();
    return 0;
  }
  run({.terms = Terms::kShared});
  run({.divergence = Divergence::kReverse, .terms = Terms::kPruned, .keep = 400});
  run({.divergence = Divergence::kMixture, .terms = Terms::kPower});
  run({.terms = Terms::kDecoupled});
  run({.terms = Terms::kLimit});
  run({.terms = Terms::kSparse});
}
