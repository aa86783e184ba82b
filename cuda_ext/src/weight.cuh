// Where the numbers of a 4-bit weight are, and what they are.
#pragma once

#include <device/primitives.cuh>

#include "weight.h"

namespace qlora {

// The row of W whose codes are the low (0) or high (1) nibbles of a byte row.
__device__ inline int row_of(const Weight& w, int byte_row, int nibble) {
  return ((byte_row >> w.log_half) * 2 + nibble) * w.half + (byte_row & (w.half - 1));
}

// absmax of `count` (a multiple of 4) columns from `column` on, in the block of `byte_row`.
template <int count>
__device__ void read_scales(const Weight& w, int byte_row, int column, float (&out)[count]) {
  const int row = byte_row >> w.log_half;
  if (w.absmax) {
    const float4* from = reinterpret_cast<const float4*>(w.absmax + size_t(row) * w.n + column);
#pragma unroll
    for (int i = 0; i < count / 4; ++i) {
      const float4 four = from[i];
      out[4 * i] = four.x, out[4 * i + 1] = four.y;
      out[4 * i + 2] = four.z, out[4 * i + 3] = four.w;
    }
    return;
  }
  const size_t rows = w.byte_rows >> w.log_half;
  const float mean = *w.offset;
  const uint32_t* from =
      reinterpret_cast<const uint32_t*>(w.absmax_codes + size_t(row) * w.n + column);
#pragma unroll
  for (int i = 0; i < count; ++i) {
    const float level = w.nested_levels[from[i / 4] >> (8 * (i & 3)) & 255];
    const float group = w.nested[((column + i) * rows + row) >> 8];
    // Rounded twice, as bitsandbytes does, not fused.
    out[i] = add_rounded(multiply_rounded(level, group), mean);
  }
}

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
