// A 4-bit weight of K x N as pallas_kernels/reference.py lays it out, and where its numbers are.
#pragma once

#include <cstdint>

#include <device/primitives.cuh>

namespace qlora {

// codes uint8 [K/2, N]: byte row r belongs to quantization block r / half (half = block / 2); its
// low nibbles are row `row_of(r, 0)` of W, its high ones `row_of(r, 1)`, half a block further on.
struct Weight {
  const uint8_t* codes;
  const float* codebook;  // [16]
  // The absmax of each block, [K/block, N]: fp32, or (absmax null) 8-bit codes of it, grouped by
  // 256 along the columns of W: nested_levels[code] * nested[group] + offset.
  const float* absmax;
  const uint8_t* absmax_codes;
  const float* nested;
  const float* offset;
  const float* nested_levels;  // [256]
  int k, n, half, log_half;

  __host__ __device__ int byte_rows() const { return k / 2; }

  __device__ int row_of(int byte_row, int nibble) const {
    return ((byte_row >> log_half) * 2 + nibble) * half + (byte_row & (half - 1));
  }

  // absmax of `count` (a multiple of 4) columns from `column` on, in the block of `byte_row`.
  template <int count>
  __device__ void scales(int byte_row, int column, float (&out)[count]) const {
    const int row = byte_row >> log_half;
    if (absmax) {
      const float4* from = reinterpret_cast<const float4*>(absmax + size_t(row) * n + column);
#pragma unroll
      for (int i = 0; i < count / 4; ++i) {
        const float4 four = from[i];
        out[4 * i] = four.x, out[4 * i + 1] = four.y;
        out[4 * i + 2] = four.z, out[4 * i + 3] = four.w;
      }
      return;
    }
    const size_t rows = byte_rows() >> log_half;
    const float mean = *offset;
#pragma unroll
    for (int i = 0; i < count; ++i) {
      const float level = nested_levels[absmax_codes[size_t(row) * n + column + i]];
      const float group = nested[((column + i) * rows + row) >> 8];
      // Rounded twice, as bitsandbytes does, not fused.
      out[i] = add_rounded(multiply_rounded(level, group), mean);
    }
  }
};

// A table of `entries` words in shared memory, a copy for each lane: entry e of lane l lies at
// e * 32 + l, in bank l, so that 32 lanes look up 32 different entries in one access.
constexpr int kLanes = 32;

// The code book as such a table of 16 floats, by all threads of a block; the caller synchronizes.
__device__ inline void fill_codebook(float* table, const float* codebook) {
  for (int i = threadIdx.x; i < 16 * kLanes; i += blockDim.x) table[i] = codebook[i / kLanes];
}

// 8 codes of one nibble (0 low, 1 high) of 8 neighbouring bytes -> 8 numbers, scaled in fp32.
__device__ inline void decode8(const uint2 bytes, int nibble, const float* lane_table,
                               const float (&scales)[8], float (&out)[8]) {
#pragma unroll
  for (int i = 0; i < 8; ++i) {
    const uint32_t word = i < 4 ? bytes.x : bytes.y;
    const uint32_t code = word >> (8 * (i & 3) + 4 * nibble) & 15;
    out[i] = lane_table[code * kLanes] * scales[i];
  }
}

}  // namespace qlora
