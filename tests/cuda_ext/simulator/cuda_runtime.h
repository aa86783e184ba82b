// A CPU in place of a GPU: enough of CUDA to run the kernels of cuda_ext in tests, from the same
// sources, behind the same FFI handlers.
//
// Every thread of a block is a fiber. Fibers run one after the other, each to its next barrier, in
// an order that QLORA_SIMULATOR_ORDER turns round: code that lacks a barrier then computes other
// numbers. Shared memory starts as NaN, and background copies arrive only when they are waited for.
#pragma once

#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>

#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// A static array of a block: there is one block at a time, and its fibers share a thread.
#define __shared__ static

struct dim3 {
  unsigned x, y, z;
  dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
struct uint2 {
  uint32_t x, y;
};
struct alignas(16) uint4 {
  uint32_t x, y, z, w;
};
struct float2 {
  float x, y;
};
struct alignas(16) float4 {
  float x, y, z, w;
};
using std::max;
using std::min;

// Errors, streams and the one device.
using cudaStream_t = struct SimulatedStream*;
enum cudaError_t { cudaSuccess, cudaErrorInvalidValue };
enum cudaDeviceAttr {
  cudaDevAttrComputeCapabilityMajor,
  cudaDevAttrComputeCapabilityMinor,
  cudaDevAttrMaxSharedMemoryPerBlockOptin,
};
inline const char* cudaGetErrorString(cudaError_t) { return "invalid value"; }
inline cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }

inline int simulator_setting(const char* name, int otherwise) {
  const char* value = std::getenv(name);
  return value ? std::atoi(value) : otherwise;
}

inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  const int capability = simulator_setting("QLORA_SIMULATOR_CAPABILITY", 80);
  switch (attribute) {
    case cudaDevAttrComputeCapabilityMajor: *value = capability / 10; break;
    case cudaDevAttrComputeCapabilityMinor: *value = capability % 10; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin:
      *value = capability < 80 ? 64 << 10 : 99 << 10;
      break;
  }
  return cudaSuccess;
}

namespace simulator {

constexpr int kWarp = 32;

struct Copy {
  void* to;
  const void* from;  // null: zeros
};

struct Fiber {
  ucontext_t context;
  std::vector<char> stack = std::vector<char>(256 << 10);
  bool finished = false;
  std::vector<Copy> copies;
};

struct Block {
  std::vector<Fiber> fibers;
  std::vector<int> at_barrier;  // how many barriers of the block each fiber has reached
  std::vector<int> at_warp;     // and of its warp
  std::vector<unsigned char> memory;
  std::vector<uint64_t> exchange;  // 8 words a thread, for what a warp does together
  ucontext_t scheduler;
  int current = 0;
};

inline Block* block = nullptr;
inline dim3 thread_index, block_index, block_size, grid_size;

inline void yield() {
  swapcontext(&block->fibers[block->current].context, &block->scheduler);
  thread_index.x = unsigned(block->current);
}

inline void sync_block() {
  const int mine = ++block->at_barrier[block->current];
  const auto behind = [mine](int reached) { return reached < mine; };
  while (std::any_of(block->at_barrier.begin(), block->at_barrier.end(), behind)) yield();
}

inline void sync_warp() {
  const int mine = ++block->at_warp[block->current];
  const auto first = block->at_warp.begin() + block->current / kWarp * kWarp;
  const auto behind = [mine](int reached) { return reached < mine; };
  while (std::any_of(first, first + kWarp, behind)) yield();
}

// What lane `lane` of this warp has put into its slot.
inline uint64_t* slot(int lane) {
  return block->exchange.data() + (block->current / kWarp * kWarp + lane) * 8;
}
inline int lane() { return block->current % kWarp; }

inline std::function<void()>* body = nullptr;

inline void enter() {
  (*body)();
  Fiber& fiber = block->fibers[block->current];
  if (!fiber.copies.empty()) std::abort();  // a kernel must not end with copies under way
  fiber.finished = true;
  // A thread that has ended holds nobody up.
  block->at_barrier[block->current] = block->at_warp[block->current] = INT32_MAX;
  swapcontext(&fiber.context, &block->scheduler);
}

inline void run_block(unsigned threads, size_t shared, std::function<void()>& kernel) {
  static Block only;
  block = &only;
  body = &kernel;
  if (only.fibers.size() < threads) only.fibers = std::vector<Fiber>(threads);
  only.at_barrier.assign(threads, 0);
  only.at_warp.assign(threads, 0);
  only.exchange.assign(threads * 8, 0);
  only.memory.assign(shared + 128, 0xff);
  for (unsigned i = 0; i < threads; ++i) {
    Fiber& fiber = only.fibers[i];
    fiber.finished = false;
    getcontext(&fiber.context);
    fiber.context.uc_stack.ss_sp = fiber.stack.data();
    fiber.context.uc_stack.ss_size = fiber.stack.size();
    fiber.context.uc_link = nullptr;
    makecontext(&fiber.context, enter, 0);
  }
  const bool backwards = simulator_setting("QLORA_SIMULATOR_ORDER", 1) < 0;
  for (bool left = true; left;) {
    left = false;
    for (unsigned i = 0; i < threads; ++i) {
      only.current = int(backwards ? threads - 1 - i : i);
      Fiber& fiber = only.fibers[only.current];
      if (fiber.finished) continue;
      thread_index.x = unsigned(only.current);
      swapcontext(&only.scheduler, &fiber.context);
      left = true;
    }
  }
}

}  // namespace simulator

#define threadIdx (::simulator::thread_index)
#define blockIdx (::simulator::block_index)
#define blockDim (::simulator::block_size)
#define __syncthreads ::simulator::sync_block
