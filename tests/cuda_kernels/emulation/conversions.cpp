// The conversions of the machine, by those of the CPU backend.
#define FASTKD_ISA emulated
#include "../../../csrc/cpu/load.h"
// The header above comes first: it names no CUDA.
#include "cuda_emulation.h"

namespace fastkd::cuda {

using cpu::emulated::BFloat16;
using cpu::emulated::Half;

uint32_t pack_bfloat16(float low, float high) {
  const uint32_t top = cpu::emulated::store<BFloat16>(high).bits;
  return cpu::emulated::store<BFloat16>(low).bits | top << 16;
}
uint32_t pack_half(float low, float high) {
  const uint32_t top = cpu::emulated::store<Half>(high).bits;
  return cpu::emulated::store<Half>(low).bits | top << 16;
}
float2 unpack_half(uint32_t word) {
  return {cpu::emulated::load(Half{static_cast<uint16_t>(word)}),
          cpu::emulated::load(Half{static_cast<uint16_t>(word >> 16)})};
}

}  // namespace fastkd::cuda
