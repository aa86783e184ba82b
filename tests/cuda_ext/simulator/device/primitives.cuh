// cuda_ext/src/device/primitives.cuh for a CPU that plays the GPU: the same functions, with the
// meaning that the PTX manual gives their instructions.
#pragma once

#include <cuda_runtime.h>

#include <mutex>

#include "weight.h"

namespace qlora {

inline unsigned char* shared_memory() {
  const auto start = reinterpret_cast<uintptr_t>(simulator::block->memory.data());
  return reinterpret_cast<unsigned char*>((start + 127) / 128 * 128);
}

// Compiled with -ffp-contract=off.
inline float multiply_rounded(float a, float b) { return a * b; }
inline float add_rounded(float a, float b) { return a + b; }

template <Dtype D>
uint16_t round_one(float value) {
  if constexpr (D == Dtype::bf16) {
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (std::isnan(value)) return uint16_t(bits >> 16 | 0x40);
    return uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
  } else {
    const _Float16 half = _Float16(value);
    uint16_t bits;
    std::memcpy(&bits, &half, 2);
    return bits;
  }
}

template <Dtype D>
uint32_t round_pair(float low, float high) {
  return uint32_t(round_one<D>(low)) | uint32_t(round_one<D>(high)) << 16;
}

template <Dtype D>
float to_float(uint16_t bits) {
  if constexpr (D == Dtype::bf16) {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  } else {
    _Float16 half;
    std::memcpy(&half, &bits, 2);
    return float(half);
  }
}

// As the hardware would, refuse an address that is not a multiple of the size.
template <typename T>
T load_aligned(const void* from) {
  if (reinterpret_cast<uintptr_t>(from) % sizeof(T)) std::abort();
  T value;
  std::memcpy(&value, from, sizeof(T));
  return value;
}

template <typename Vector = uint4>
inline Vector load_streaming(const void* from) {
  return load_aligned<Vector>(from);
}

inline uint32_t low_halves(uint32_t a, uint32_t b) { return (a & 0xffff) | b << 16; }
inline uint32_t high_halves(uint32_t a, uint32_t b) { return a >> 16 | (b & 0xffff0000); }

template <Dtype D>
void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  const auto half = [](uint32_t word, int index) {
    return to_float<D>(uint16_t(word >> (16 * index)));
  };
  uint64_t* mine = simulator::slot(simulator::lane());
  for (int i = 0; i < 4; ++i) mine[i] = a[i];
  mine[4] = b0, mine[5] = b1;
  simulator::sync_warp();
  const int group = simulator::lane() / 4, quarter = simulator::lane() % 4;
  for (int part = 0; part < 4; ++part) {
    const int row = group + part / 2 * 8, column = 2 * quarter + part % 2;
    float sum = 0;
    for (int k = 0; k < 16; ++k) {
      // a: register row / 8 + 2 (k / 8) of lane (row % 8, k % 8 / 2); b: register k / 8 of lane
      // (column, k % 8 / 2); in both, the low half holds the even k.
      const uint64_t* left = simulator::slot(row % 8 * 4 + k % 8 / 2);
      const uint64_t* right = simulator::slot(column * 4 + k % 8 / 2);
      sum += half(uint32_t(left[row / 8 + k / 8 * 2]), k % 2) *
             half(uint32_t(right[4 + k / 8]), k % 2);
    }
    c[part] += sum;
  }
  simulator::sync_warp();
}

template <bool transposed>
void load_matrices(uint32_t (&out)[4], const void* row) {
  *simulator::slot(simulator::lane()) = reinterpret_cast<uint64_t>(row);
  simulator::sync_warp();
  const int group = simulator::lane() / 4, quarter = simulator::lane() % 4;
  for (int matrix = 0; matrix < 4; ++matrix) {
    const auto at = [matrix](int row, int column) {
      const auto* start = reinterpret_cast<const uint16_t*>(*simulator::slot(8 * matrix + row));
      if (reinterpret_cast<uintptr_t>(start) % 16) std::abort();
      return uint32_t(start[column]);
    };
    const int two = 2 * quarter;
    out[matrix] = transposed ? at(two, group) | at(two + 1, group) << 16
                             : at(group, two) | at(group, two + 1) << 16;
  }
  simulator::sync_warp();
}

inline void copy_async(void* to, const void* from, bool valid) {
  if ((reinterpret_cast<uintptr_t>(to) | reinterpret_cast<uintptr_t>(from)) % 16) std::abort();
  auto& copies = simulator::block->fibers[simulator::block->current].copies;
  copies.push_back({to, valid ? from : nullptr});
}

inline void wait_for_copies() {
  auto& copies = simulator::block->fibers[simulator::block->current].copies;
  for (const simulator::Copy& copy : copies) {
    copy.from ? std::memcpy(copy.to, copy.from, 16) : std::memset(copy.to, 0, 16);
  }
  copies.clear();
}

template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared,
                   cudaStream_t, Parameters... parameters) {
  static std::mutex one_at_a_time;  // XLA's CPU client may call from several threads
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  int most = 0;
  cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, 0);
  if (shared > size_t(most) || grid.y > 65535 || grid.z > 65535 || !grid.x || !grid.y) {
    return cudaErrorInvalidValue;
  }
  std::function<void()> body = [&] { kernel(parameters...); };
  simulator::block_size = dim3(threads);
  simulator::grid_size = grid;
  for (unsigned z = 0; z < grid.z; ++z) {
    for (unsigned y = 0; y < grid.y; ++y) {
      for (unsigned x = 0; x < grid.x; ++x) {
        simulator::block_index = dim3(x, y, z);
        simulator::run_block(threads, shared, body);
      }
    }
  }
  return cudaSuccess;
}

}  // namespace qlora
