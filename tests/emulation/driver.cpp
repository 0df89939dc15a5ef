// A few rows through the kernels without torch, for tests of the emulation itself: prints a line
// for each case, with a hash of every bit that came out. Arguments: schedule, layout (0 clusters, 1
// tickets), CTAs that run at one time.
#include <cstdio>
#include <cstdlib>
#include <vector>

#include "../../csrc/cuda/configuration.h"
#include "../../csrc/cuda/kernel.h"
#include "cuda_emulation.h"

namespace {

using fastkd::DType;
using fastkd::KdRows;
using fastkd::Rows;

constexpr int64_t kN = 4, kV = 1500, kStride = 1512;
constexpr float kBeyond = 1e4f;  // would be the largest logit of all

// float rows with columns beyond V that nobody may read or write.
struct Matrix {
  explicit Matrix(unsigned seed) : values(kN * kStride, kBeyond) {
    for (int64_t i = 0; i < kN * kV; ++i) {
      seed = seed * 1664525u + 1013904223u;
      values[i / kV * kStride + i % kV] = static_cast<float>(seed >> 8) * 0x1p-21f - 4;
    }
  }
  Rows rows() { return {values.data(), DType::kFloat, kV, kN, 0, kStride}; }
  std::vector<float> values;
};

uint64_t hash(uint64_t seed, const std::vector<float>& values) {
  for (const float value : values) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    seed = (seed ^ bits) * 0x100000001b3u;
  }
  return seed;
}

void run(double beta, int64_t keep, bool own_hard) {
  Matrix student(1), teacher(2), gradient(3);
  const std::vector<float> ones(kN, 1), inverse(kN, own_hard ? 0.5f : 1.0f);
  const std::vector<int64_t> labels{3, 700, -1, 1499};
  std::vector<float> weight{1, 1, 1, 0}, soft(kN, -7), hard(kN, -7);
  KdRows call;
  call.student = student.rows();
  call.teacher = teacher.rows();
  call.dstudent = gradient.rows();
  call.labels = labels.data();
  call.student_inv_temperature = inverse.data();
  call.teacher_inv_temperature = ones.data();
  call.soft_weight = call.hard_weight = weight.data();
  call.soft = soft.data();
  call.hard = hard.data();
  call.N = kN;
  call.keep = keep;
  call.vocab_size = kV;
  call.beta = beta;
  std::vector<uint4> workspace(fastkd::cuda::workspace_bytes(call) / 16 + 1, {~0u, ~0u, ~0u, ~0u});
  const char* error = fastkd::cuda::kd_rows(call, workspace.data(), nullptr);
  if (error != nullptr) {
    std::printf("%s\n", error);
    return;
  }
  for (int64_t i = 0; i < kN * kStride; ++i) {
    if (i % kStride >= kV && gradient.values[i] != kBeyond) {
      std::printf("column %d of row %d is written\n", int(i % kStride), int(i / kStride));
      return;
    }
  }
  std::printf("beta %g keep %d: %016llx soft %.6f hard %.6f\n", beta, static_cast<int>(keep),
              static_cast<unsigned long long>(hash(hash(hash(0, soft), hard), gradient.values)),
              soft[0], hard[0]);
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 4) return 2;
  const int schedule = std::atoi(arguments[1]), places = std::atoi(arguments[3]);
  emulation::configure(schedule == 0   ? emulation::Schedule::kForward
                       : schedule == 1 ? emulation::Schedule::kReverse
                                       : emulation::Schedule::kRandom,
                       static_cast<unsigned>(schedule), places);
  fastkd::cuda::Limits limits;
  limits.threads = 64;
  limits.steps = 2;
  (std::atoi(arguments[2]) == 0 ? limits.tickets : limits.cluster) = 0;
  fastkd::cuda::set_limits(limits);
  run(0, kV, false);
  run(1, 400, true);
  run(0.5, kV, true);
}
