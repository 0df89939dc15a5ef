// The layout that choose() takes for calls on a GPU that need not be there. Arguments: vectors of a
// thread, the largest cluster, and the multiprocessors of each group that a cluster has to lie in.
// Reads V and the bytes of a pair until its input ends; prints for each the layout, the CTAs of a
// row and their threads, and how many such rows the GPU has in work at one time.
#include "../../../csrc/cuda/plan.h"

#include <cstdio>
#include <cstdlib>

int main(int count, char** arguments) {
  using namespace fastkd::cuda;
  if (count < 4) return 2;
  Device device;
  device.vectors = std::atoi(arguments[1]);
  for (int i = 3; i < count; ++i) {
    const int group = std::atoi(arguments[i]);
    device.places += 2 * group;
    for (int parts = 1; parts <= std::atoi(arguments[2]); ++parts) {
      device.active[0][parts] += 2 * group / parts;
      device.active[1][parts] += group / parts;
    }
  }
  long long V;
  int bytes;
  while (std::scanf("%lld %d", &V, &bytes) == 2) {
    const Plan plan = choose(8192, V, bytes, device, Limits());
    const int active = plan.cluster ? device.active[plan.threads > kThreads][plan.parts]
                                    : device.places / plan.parts;
    std::printf("%s %d %d %d\n", plan.cluster ? "cluster" : "tickets", plan.parts, plan.threads,
                active);
  }
}
