// A 4-bit weight of K x N as pallas_kernels/reference.py lays it out.
#pragma once

#include <cstdint>

namespace qlora {

enum class Dtype { f32, bf16, f16 };

// codes uint8 [K/2, N]: byte row r belongs to quantization block r / half (half = block / 2); its
// low nibbles are one row of W, its high ones the row half a block further on.
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
  int byte_rows, n;            // K/2 and N
  int half, log_half;
};

}  // namespace qlora
