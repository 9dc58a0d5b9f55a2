// Just enough CUDA to run the fused decode kernel on a CPU: the twin of csrc/sm90/hopper.cuh and of the runtime headers
// it includes.
//
// Every CUDA thread is a fiber of one OS thread. A fiber runs until it reaches a collective (a shuffle, a matrix
// product, a barrier), so the lanes of a warp drift as far apart as the memory model lets them. Warps and blocks take
// turns in a seeded random order. Shared memory starts as NaNs. A collective that not all its threads reach, or that
// they reach at different calls, ends the process with a message. Compiled with -fsanitize=thread, ThreadSanitizer sees
// the fibers and the barriers, and reports every race in shared and global memory.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <memory>
#include <random>
#include <utility>
#include <vector>

#ifdef __SANITIZE_THREAD__
#include <sanitizer/tsan_interface.h>
#endif
#define EMULATOR_OWN __attribute__((no_sanitize("thread")))  // bookkeeping of the emulator, not the kernel's memory

#define __device__
#define __host__
#define __global__
#define __forceinline__ inline
#define __grid_constant__
#define __launch_bounds__(...)

struct alignas(8) uint2 {
  uint32_t x, y;
};
struct alignas(8) int2 {
  int x, y;
};
struct alignas(8) float2 {
  float x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
inline uint2 make_uint2(uint32_t x, uint32_t y) { return {x, y}; }
inline int2 make_int2(int x, int y) { return {x, y}; }
inline float2 make_float2(float x, float y) { return {x, y}; }
struct int3 {
  int x, y, z;
};
inline int3 make_int3(int x, int y, int z) { return {x, y, z}; }
inline uint4 make_uint4(uint32_t x, uint32_t y, uint32_t z, uint32_t w) { return {x, y, z, w}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }

template <typename To, typename From>
inline To emulated_bits(From x) {
  static_assert(sizeof(To) == sizeof(From), "same size");
  To out;
  memcpy(&out, &x, sizeof(To));
  return out;
}
inline float __int_as_float(int x) { return emulated_bits<float>(x); }
inline float __uint_as_float(uint32_t x) { return emulated_bits<float>(x); }
inline uint32_t __float_as_uint(float x) { return emulated_bits<uint32_t>(x); }
inline int __popc(uint32_t x) { return __builtin_popcount(x); }
inline int __ffs(uint32_t x) { return __builtin_ffs(static_cast<int>(x)); }
inline int __clz(int x) { return x == 0 ? 32 : __builtin_clz(static_cast<unsigned>(x)); }
inline float __log2f(float x) { return std::log2(x); }
inline uint32_t __byte_perm(uint32_t low, uint32_t high, uint32_t selector) {
  const uint64_t bytes = static_cast<uint64_t>(high) << 32 | low;
  uint32_t out = 0;
  for (int i = 0; i < 4; ++i) out |= static_cast<uint32_t>(bytes >> (8 * (selector >> (4 * i) & 7)) & 0xff) << (8 * i);
  return out;
}
using std::isnan;
using std::max;
using std::min;

struct __half {
  uint16_t bits = 0;
  __half() = default;
  explicit __half(float x) : bits(emulated_bits<uint16_t>(static_cast<_Float16>(x))) {}
};
struct __half2 {
  __half x, y;
};
struct __nv_bfloat16 {
  uint16_t bits = 0;
  __nv_bfloat16() = default;
  explicit __nv_bfloat16(float x) {
    const uint32_t wide = emulated_bits<uint32_t>(x);
    bits = std::isnan(x) ? 0x7fff : static_cast<uint16_t>((wide + 0x7fff + ((wide >> 16) & 1)) >> 16);
  }
};
inline __half __float2half_rn(float x) { return __half(x); }
inline float __half2float(__half x) { return static_cast<float>(emulated_bits<_Float16>(x.bits)); }
inline float2 __half22float2(__half2 x) { return {__half2float(x.x), __half2float(x.y)}; }
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __nv_bfloat16(x); }
inline float __bfloat162float(__nv_bfloat16 x) { return emulated_bits<float>(static_cast<uint32_t>(x.bits) << 16); }

namespace emulated {

[[noreturn]] inline void fail(const char* what) {
  fprintf(stderr, "cuda emulator: %s\n", what);
  abort();
}

struct Index {
  int x, y, z;
};

struct Barrier {
  int expected = 0, arrived = 0;
  unsigned generation = 0;
  const char* call = nullptr;
};

struct Block {
  std::unique_ptr<char[]> memory;
  char* shared;
  size_t bytes;
  Index index;
  int rank;
  Barrier barrier;
};

struct Warp {
  Block* block;
  Barrier barrier;
  uint32_t exchange[2][32][8];  // a collective's operands, two collectives deep
};

struct Copy {
  void* to;
  const void* from;  // null: zeros
  int group;
};

struct Thread {
  std::deque<Copy> copies;  // started and not waited for
  int copy_groups = 0;
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Warp* warp;
  int index, lane;
  unsigned collectives = 0;
  bool done = false;
  const Barrier* waits_for = nullptr;
  unsigned waits_generation = 0;
  void* fiber = nullptr;
};

struct Machine {
  int cluster_blocks = 1;
  Barrier cluster_barrier;
  std::vector<std::unique_ptr<Block>> blocks;
  Thread* running = nullptr;
  ucontext_t scheduler;
  void* scheduler_fiber = nullptr;
  std::function<void()> kernel;
  std::function<void()> earlier_kernels;  // write what they have to once a thread awaits them
};

inline Machine& machine() {
  static Machine m;
  return m;
}
inline Thread& self() { return *machine().running; }
inline Block& block() { return *self().warp->block; }

// Gives the processor to a fiber, or back to the scheduler, without ordering their memory accesses.
inline void switch_to(ucontext_t& from, ucontext_t& to, [[maybe_unused]] void* fiber) {
#ifdef __SANITIZE_THREAD__
  __tsan_switch_to_fiber(fiber, __tsan_switch_to_fiber_no_sync);
#endif
  swapcontext(&from, &to);
}

EMULATOR_OWN inline void arrive_and_wait(Barrier& barrier, const char* call) {
#ifdef __SANITIZE_THREAD__
  struct Order {
    Barrier& barrier;
    explicit Order(Barrier& b) : barrier(b) { __tsan_release(&barrier); }
    ~Order() { __tsan_acquire(&barrier); }
  } order(barrier);
#endif
  if (barrier.arrived > 0 && strcmp(barrier.call, call) != 0) fail("threads meet at different collectives");
  barrier.call = call;
  Thread& thread = self();
  thread.waits_generation = barrier.generation;
  if (++barrier.arrived == barrier.expected) {
    barrier.arrived = 0;
    ++barrier.generation;
    return;
  }
  thread.waits_for = &barrier;
  switch_to(thread.context, machine().scheduler, machine().scheduler_fiber);
}

// Every lane gives up to eight words and sees those of all lanes.
template <typename... Words>
inline const uint32_t (&exchange(const char* call, Words... words))[32][8] {
  Thread& thread = self();
  auto& slots = thread.warp->exchange[thread.collectives++ % 2];
  const uint32_t own[] = {words...};
  std::copy(std::begin(own), std::end(own), slots[thread.lane]);
  arrive_and_wait(thread.warp->barrier, call);
  return slots;
}

template <typename V>
inline V take_from(const char* call, V value, int lane) {
  uint32_t words[2] = {};
  memcpy(words, &value, sizeof(V));
  const auto& slots = exchange(call, words[0], words[1]);
  memcpy(&value, slots[lane], sizeof(V));
  return value;
}

inline Index thread_index() { return {self().index, 0, 0}; }
inline Index block_index() { return block().index; }

// Orders what comes before the kernel and after it with its threads.
inline void order_with_kernel() {
#ifdef __SANITIZE_THREAD__
  __tsan_acquire(&machine());
  __tsan_release(&machine());
#endif
}

EMULATOR_OWN inline void enter() {
  order_with_kernel();
  machine().kernel();
  order_with_kernel();
  self().done = true;
  switch_to(self().context, machine().scheduler, machine().scheduler_fiber);
}

// Runs one cluster to its end; `first_block` is the grid index of its first block.
EMULATOR_OWN inline void run_cluster(Index first_block, int blocks, int threads, size_t shared_bytes, unsigned seed,
                                     const std::function<void()>& kernel) {
  Machine& m = machine();
  m.cluster_blocks = blocks;
  m.cluster_barrier = {blocks * threads};
  m.kernel = kernel;
  m.blocks.clear();
  std::vector<std::unique_ptr<Warp>> warps;
  std::vector<std::unique_ptr<Thread>> fibers;
  constexpr size_t kStack = 64 * 1024;
  for (int b = 0; b < blocks; ++b) {
    auto block = std::make_unique<Block>();
    block->memory = std::make_unique<char[]>(shared_bytes + 16);
    block->shared = reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(block->memory.get()) + 15) & ~uintptr_t{15});
    block->bytes = shared_bytes;
    memset(block->shared, 0xff, shared_bytes);
    block->index = {first_block.x + b, first_block.y, first_block.z};
    block->rank = b;
    block->barrier.expected = threads;
    for (int i = 0; i < threads; ++i) {
      if (i % 32 == 0) {
        warps.push_back(std::make_unique<Warp>());
        warps.back()->block = block.get();
        warps.back()->barrier.expected = 32;
      }
      auto thread = std::make_unique<Thread>();
      thread->stack = std::make_unique<char[]>(kStack);
      thread->warp = warps.back().get();
      thread->index = i;
      thread->lane = i % 32;
      getcontext(&thread->context);
      thread->context.uc_stack.ss_sp = thread->stack.get();
      thread->context.uc_stack.ss_size = kStack;
      thread->context.uc_link = nullptr;
      makecontext(&thread->context, enter, 0);
#ifdef __SANITIZE_THREAD__
      thread->fiber = __tsan_create_fiber(0);
#endif
      fibers.push_back(std::move(thread));
    }
    m.blocks.push_back(std::move(block));
  }
#ifdef __SANITIZE_THREAD__
  m.scheduler_fiber = __tsan_get_current_fiber();
#endif
  order_with_kernel();
  std::mt19937 random(seed);
  std::vector<size_t> order(warps.size());
  for (size_t i = 0; i < order.size(); ++i) order[i] = i;
  size_t left = fibers.size();
  while (left > 0) {
    std::shuffle(order.begin(), order.end(), random);
    bool any = false;
    for (const size_t w : order) {
      for (bool progress = true; progress;) {
        progress = false;
        for (size_t lane = 0; lane < 32; ++lane) {
          Thread& thread = *fibers[w * 32 + lane];
          if (thread.done || (thread.waits_for != nullptr && thread.waits_for->generation == thread.waits_generation))
            continue;
          thread.waits_for = nullptr;
          m.running = &thread;
          switch_to(m.scheduler, thread.context, thread.fiber);
          progress = any = true;
          left -= thread.done;
        }
      }
    }
    if (!any) fail("deadlock: a collective is not reached by all of its threads");
  }
  order_with_kernel();
#ifdef __SANITIZE_THREAD__
  for (const auto& thread : fibers) __tsan_destroy_fiber(thread->fiber);
#endif
}

}  // namespace emulated

#define threadIdx (emulated::thread_index())
#define blockIdx (emulated::block_index())
#define dynamic_shared (emulated::block().shared)

inline void __syncwarp() { emulated::exchange("__syncwarp", 0u); }
inline uint32_t __ballot_sync(uint32_t, bool predicate) {
  const auto& slots = emulated::exchange("__ballot_sync", static_cast<uint32_t>(predicate));
  uint32_t bits = 0;
  for (int lane = 0; lane < 32; ++lane) bits |= slots[lane][0] << lane;
  return bits;
}
template <typename V>
inline V __shfl_sync(uint32_t, V value, int lane) {
  return emulated::take_from("__shfl_sync", value, lane & 31);
}
template <typename V>
inline V __shfl_xor_sync(uint32_t, V value, int mask) {
  return emulated::take_from("__shfl_xor_sync", value, emulated::self().lane ^ mask);
}
template <typename V>
inline V __shfl_up_sync(uint32_t, V value, int step) {
  const int lane = emulated::self().lane;
  return emulated::take_from("__shfl_up_sync", value, lane >= step ? lane - step : lane);
}

template <typename V, typename A>
inline V atomicAdd(V* p, A amount) {
  return __atomic_fetch_add(p, static_cast<V>(amount), __ATOMIC_RELAXED);
}
template <typename V>
inline V __ldg(const V* p) {
  return *p;
}

namespace twilight {

inline float exp2_fast(float x) {
  const float y = std::exp2(x);
  return y < 0x1p-126f ? 0.0f : y;
}

inline float max_nan(float a, float b) { return a != a || a > b ? a : b; }

// Exact where the sum fits a double, which is then cut off.
inline float fma_rz(float a, float b, float c) {
  const double exact = static_cast<double>(a) * b + c;
  const float near = static_cast<float>(exact);
  return std::abs(static_cast<double>(near)) > std::abs(exact) ? std::nextafter(near, 0.0f) : near;
}

inline void prefetch_line(const void*) {}

inline uint4 load_stream(const void* p) {
  uint4 v;
  memcpy(&v, p, sizeof(v));
  return v;
}

inline uint2 load_stream8(const void* p) {
  uint2 v;
  memcpy(&v, p, sizeof(v));
  return v;
}

inline uint4 load_host(const void* p) { return load_stream(p); }
inline uint2 load_host8(const void* p) { return load_stream8(p); }

inline float from_e4m3(uint8_t code) {
  const int exponent = code >> 3 & 15, mantissa = code & 7;
  const float size = (code & 0x7f) == 0x7f ? NAN
                     : exponent == 0       ? std::ldexp(mantissa, -9)
                                           : std::ldexp(8 + mantissa, exponent - 10);
  return code & 0x80 ? -size : size;
}
inline float2 from_e4m3x2(uint16_t codes) { return {from_e4m3(codes & 0xff), from_e4m3(codes >> 8)}; }
inline uint8_t to_e4m3(float x) {
  if (std::isnan(x)) return 0x7f;
  const float size = std::min(std::abs(x), 448.0f);
  const int exponent = size < 0x1p-6f ? -6 : std::ilogb(size);
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 3 - exponent)));  // 16 is the next exponent's 8
  return static_cast<uint8_t>((exponent + 6) * 8 + steps + (std::signbit(x) ? 0x80 : 0));
}

template <typename T>
inline uint32_t pack2(float low, float high, T) {
  return T(low).bits | static_cast<uint32_t>(T(high).bits) << 16;
}

inline uint32_t transpose8(uint32_t row_pair) {
  const auto& slots = emulated::exchange("transpose8", row_pair);
  const int row = emulated::self().lane >> 2, column = 2 * (emulated::self().lane & 3);
  const auto element = [&](int r, int c) { return slots[r * 4 + c / 2][0] >> (16 * (c % 2)) & 0xffffu; };
  return element(column, row) | element(column + 1, row) << 16;
}

inline float operand(uint32_t packed, int half, __half) {
  __half x;
  x.bits = static_cast<uint16_t>(packed >> (16 * half));
  return __half2float(x);
}
inline float operand(uint32_t packed, int half, __nv_bfloat16) {
  __nv_bfloat16 x;
  x.bits = static_cast<uint16_t>(packed >> (16 * half));
  return __bfloat162float(x);
}

// mma.m16n8k16: lane (g, t) holds columns 2t, 2t + 1, 2t + 8, 2t + 9 of rows g and g + 8 of a, the same rows of column
// g of b, and columns 2t, 2t + 1 of rows g and g + 8 of the sum.
template <typename T>
inline void mma(float (&acc)[4], uint32_t a0, uint32_t a1, uint32_t a2, uint32_t a3, uint32_t b0, uint32_t b1, T type) {
  const auto& slots = emulated::exchange("mma", a0, a1, a2, a3, b0, b1);
  const int g = emulated::self().lane >> 2, t = emulated::self().lane & 3;
  for (int i = 0; i < 4; ++i) {
    const int row = g + 8 * (i / 2), column = 2 * t + i % 2;
    double sum = acc[i];
    for (int k = 0; k < 16; ++k) {
      const int from = (k % 8) / 2, upper = k / 8;
      const float a = operand(slots[(row % 8) * 4 + from][row / 8 + 2 * upper], k % 2, type);
      const float b = operand(slots[column * 4 + from][4 + upper], k % 2, type);
      sum += static_cast<double>(a) * b;
    }
    acc[i] = static_cast<float>(sum);
  }
}

inline int cluster_blocks() { return emulated::machine().cluster_blocks; }
inline int cluster_rank() { return emulated::block().rank; }
inline void sync_block(const char* reached) { emulated::arrive_and_wait(emulated::block().barrier, reached); }
inline void cluster_barrier(const char* reached) {
  emulated::arrive_and_wait(emulated::machine().cluster_barrier, reached);
}
inline void cluster_start() {}
inline void cluster_started() { emulated::arrive_and_wait(emulated::machine().cluster_barrier, "cluster_started"); }

template <typename V>
inline V* cluster_place(const V* p, int peer) {
  const size_t offset = reinterpret_cast<const char*>(p) - emulated::block().shared;
  if (peer < 0 || peer >= cluster_blocks()) emulated::fail("no such block in the cluster");
  if (offset + sizeof(V) > emulated::block().bytes) emulated::fail("address outside shared memory");
  return reinterpret_cast<V*>(emulated::machine().blocks[peer]->shared + offset);
}
template <typename V>
inline V cluster_read(const V* p, int peer) {
  V out;
  memcpy(&out, cluster_place(p, peer), sizeof(V));
  return out;
}
template <typename V>
inline void cluster_write(V* p, int peer, V value) {
  memcpy(cluster_place(p, peer), &value, sizeof(V));
}

inline void await_earlier_kernels() {
  emulated::order_with_kernel();
  if (const auto write = std::exchange(emulated::machine().earlier_kernels, nullptr)) write();
  emulated::order_with_kernel();
}

// A copy takes its place when it starts, and brings its bytes when its thread waits for it.
EMULATOR_OWN inline void start_copy(void* to, const void* from, bool there) {
  memset(to, 0xff, 16);
  emulated::self().copies.push_back({to, there ? from : nullptr, emulated::self().copy_groups});
}
inline void end_copies() { ++emulated::self().copy_groups; }
template <int kLeft>
EMULATOR_OWN inline void wait_copies() {
  auto& copies = emulated::self().copies;
  for (; !copies.empty() && copies.front().group + kLeft < emulated::self().copy_groups; copies.pop_front()) {
    const emulated::Copy& copy = copies.front();
    copy.from == nullptr ? memset(copy.to, 0, 16) : memcpy(copy.to, copy.from, 16);
  }
}

}  // namespace twilight
