// TWILIGHT_PHASE names the phase of the fused decode kernel that ends there. It is empty unless
// bench/phases.py defines TWILIGHT_READS_PHASES: then block 0 reads the clock.
#pragma once

#ifndef TWILIGHT_READS_PHASES

#define TWILIGHT_PHASE(name)
#define TWILIGHT_REMEMBER_CLOCK()

#else

#include <cuda_runtime.h>

#include <type_traits>

namespace twilight {

constexpr int kPhaseSlots = 1024;
// CRC-32 of a name, as the bench has it from zlib.
constexpr int phase_slot(const char* name) {
  unsigned crc = ~0u;
  for (; *name != 0; ++name) {
    crc ^= static_cast<unsigned char>(*name);
    for (int bit = 0; bit < 8; ++bit) crc = crc >> 1 ^ (crc & 1 ? 0xedb88320u : 0);
  }
  return ~crc % kPhaseSlots;
}
// Cycles and nanoseconds at which block 0 of a kernel of this file last passed each mark.
static __device__ long long phase_clock[kPhaseSlots][2];
// That of the kernel launched last.
inline void* last_phase_clock = nullptr;

__device__ __forceinline__ void mark_phase(int slot) {
  if (blockIdx.x != 0 || threadIdx.x != 0) return;
  long long time;
  asm volatile("mov.u64 %0, %%globaltimer;" : "=l"(time));
  phase_clock[slot][0] = clock64();
  phase_clock[slot][1] = time;
}

}  // namespace twilight

#define TWILIGHT_PHASE(name) mark_phase(std::integral_constant<int, phase_slot(name)>::value)
#define TWILIGHT_REMEMBER_CLOCK() cudaGetSymbolAddress(&last_phase_clock, phase_clock)

// Copies the clocks and sets them to 0: the next call may pass fewer marks, on a multiprocessor with another clock.
extern "C" __attribute__((used, visibility("default"))) inline int read_phase_clock(void* to) {
  constexpr size_t kBytes = sizeof(long long) * 2 * twilight::kPhaseSlots;
  const cudaError_t error = cudaMemcpy(to, twilight::last_phase_clock, kBytes, cudaMemcpyDeviceToHost);
  return error != cudaSuccess ? error : cudaMemset(twilight::last_phase_clock, 0, kBytes);
}

#endif
