// y = x W for at most 16 rows of x: generating text. The time is that of reading W once.
//
// A warp multiplies W^T [128 columns, 16 rows of W at a time] by x^T on the tensor cores, straight
// from the bytes that its lanes have loaded: a byte holds two rows of W of one column, which is
// just the pair that a register of mma's left operand wants, if x's columns are paired alike. So
// one look-up in a table of 256 pairs decodes two weights, without shuffles or shared tiles.
// The levels of the code book are rounded to x's dtype; each block's sums are scaled in fp32 by its
// absmax, which costs a multiplication for every 16th weight (8 rows) instead of for each.

#include "kernels.h"
#include "store.cuh"
#include "weight.cuh"

namespace qlora {
namespace {

constexpr int kWarps = 8;       // of a thread block; they share its columns and divide its rows
constexpr int kColumns = 128;   // of a thread block: 16 neighbours for each of 8 groups of lanes
constexpr int kTileRows = 8;    // of x in one mma
constexpr int kTable = 256 * kLanes;  // words: a pair of levels for each byte, a copy for each lane
// Sums of a warp: [row of x][group][16 columns + 1], padded so that lanes meet few banks twice.
constexpr int kGroupSums = 17;
constexpr int kWarpSums = kTileRows * 8 * kGroupSums;

// What a lane loads of a unit of W: 4 byte rows a lane (units of 16, for blocks of 32), or 8.
template <int depth>
struct Codes {
  uint4 rows[depth];
};

template <int depth>
__device__ Codes<depth> load_codes(const Weight& w, int byte_row, int column) {
  Codes<depth> codes;
#pragma unroll
  for (int i = 0; i < depth; ++i) {
    // n is a multiple of 16: a lane's columns are all inside or all outside.
    codes.rows[i] = column < w.n ? load_streaming(w.codes + size_t(byte_row + i) * w.n + column)
                                 : uint4{0, 0, 0, 0};
  }
  return codes;
}

// x[row, from .. from + depth) as words of two.
template <int depth>
__device__ void load_row(uint32_t (&out)[depth / 2], const uint16_t* from) {
  if constexpr (depth == 8) {
    const uint4 words = *reinterpret_cast<const uint4*>(from);
    out[0] = words.x, out[1] = words.y, out[2] = words.z, out[3] = words.w;
  } else {
    const uint2 words = *reinterpret_cast<const uint2*>(from);
    out[0] = words.x, out[1] = words.y;
  }
}

__device__ inline uint32_t word(const uint4& four, int i) {
  return i == 0 ? four.x : i == 1 ? four.y : i == 2 ? four.z : four.w;
}

template <Dtype D, int tiles, int depth>
__global__ void __launch_bounds__(kWarps * kLanes, tiles == 1 ? 2 : 1)
    few_rows(const Product p, const int units_per_split) {
  const Weight& w = p.weight;
  const int lane = threadIdx.x % kLanes, warp = threadIdx.x / kLanes;
  const int group = lane / 4, quarter = lane % 4;  // as mma numbers its lanes
  const int column = blockIdx.x * kColumns + 16 * group;
  constexpr int kUnit = 4 * depth;  // byte rows of a unit, all of one quantization block

  uint32_t* table = reinterpret_cast<uint32_t*>(shared_memory());
  float* levels = reinterpret_cast<float*>(table + kTable);

  const int begin = blockIdx.y * units_per_split;
  const int end = min(begin + units_per_split, w.byte_rows / kUnit);
  int unit = begin + warp;
  Codes<depth> codes{};
  // Under way while the table is made.
  if (unit < end) codes = load_codes<depth>(w, unit * kUnit + quarter * depth, column);

  if (threadIdx.x < 16) levels[threadIdx.x] = w.codebook[threadIdx.x];
  __syncthreads();
  for (int byte = warp; byte < 256; byte += kWarps) {
    table[byte * kLanes + lane] = round_pair<D>(levels[byte & 15], levels[byte >> 4]);
  }
  __syncthreads();

  float total[tiles][8][4] = {};
  while (unit < end) {
    const int byte_row = unit * kUnit + quarter * depth;  // of this lane's first
    uint32_t x[tiles][depth];  // pairs of x: columns of the low and of the high nibble
#pragma unroll
    for (int tile = 0; tile < tiles; ++tile) {
      const int row = tile * kTileRows + group;
      uint32_t low[depth / 2] = {}, high[depth / 2] = {};
      if (row < p.m) {
        load_row<depth>(low, p.x + size_t(row) * (2 * w.byte_rows) + row_of(w, byte_row, 0));
        load_row<depth>(high, p.x + size_t(row) * (2 * w.byte_rows) + row_of(w, byte_row, 1));
      }
#pragma unroll
      for (int i = 0; i < depth / 2; ++i) {
        x[tile][2 * i] = low_halves(low[i], high[i]);
        x[tile][2 * i + 1] = high_halves(low[i], high[i]);
      }
    }
    float sums[tiles][8][4] = {};
#pragma unroll
    for (int i = 0; i < depth; i += 2) {
#pragma unroll
      for (int pair = 0; pair < 8; ++pair) {  // of this lane's 16 columns: rows g, g + 8 of mma
        uint32_t left[4];
#pragma unroll
        for (int part = 0; part < 4; ++part) {
          const int byte = 2 * pair + part % 2;
          const uint32_t four = word(codes.rows[i + part / 2], byte / 4);
          left[part] = table[(four >> (8 * (byte % 4)) & 255) * kLanes + lane];
        }
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) {
          multiply_add<D>(sums[tile][pair], left, x[tile][i], x[tile][i + 1]);
        }
      }
    }
    unit += kWarps;
    if (unit < end) codes = load_codes<depth>(w, unit * kUnit + quarter * depth, column);
    if (column < w.n) {
#pragma unroll
      for (int four = 0; four < 4; ++four) {
        float scales[4];
        read_scales(w, byte_row, column + 4 * four, scales);
#pragma unroll
        for (int tile = 0; tile < tiles; ++tile) {
#pragma unroll
          for (int i = 0; i < 8; ++i) {
            const int pair = 2 * four + i / 4;
            total[tile][pair][i % 4] += scales[i / 2] * sums[tile][pair][i % 4];
          }
        }
      }
    }
  }

  // The warps' sums, added in their order, whatever order they finish in.
  float* all = reinterpret_cast<float*>(shared_memory());
#pragma unroll
  for (int tile = 0; tile < tiles; ++tile) {
    __syncthreads();  // the table, or the tile before, is no longer read
#pragma unroll
    for (int i = 0; i < 32; ++i) {
      const int pair = i / 4, part = i % 4;
      const int row = 2 * quarter + part % 2, among = 2 * pair + part / 2;
      all[warp * kWarpSums + (row * 8 + group) * kGroupSums + among] = total[tile][pair][part];
    }
    __syncthreads();
    for (int i = 2 * threadIdx.x; i < kTileRows * kColumns; i += 2 * blockDim.x) {
      const int row = tile * kTileRows + i / kColumns, to = blockIdx.x * kColumns + i % kColumns;
      if (row >= p.m || to >= w.n) continue;
      const int from = (i / 16) * kGroupSums + i % 16;  // row * 8 + group, column among 16
      float low = 0, high = 0;
      for (int other = 0; other < kWarps; ++other) {
        low += all[other * kWarpSums + from];
        high += all[other * kWarpSums + from + 1];
      }
      store_pair(p.y, p.y_dtype, (size_t(blockIdx.y) * p.m + row) * w.n + to, low, high);
    }
  }
}

template <Dtype D, int tiles, int depth>
cudaError_t run(const Product& p, cudaStream_t stream) {
  const int units = p.weight.byte_rows / (4 * depth);
  const int per_split = (units + p.splits - 1) / p.splits;
  const dim3 grid((p.weight.n + kColumns - 1) / kColumns, p.splits);
  constexpr size_t kShared =
      sizeof(float) * (kTable + 16 > kWarps * kWarpSums ? kTable + 16 : kWarps * kWarpSums);
  return launch(few_rows<D, tiles, depth>, grid, kWarps * kLanes, kShared, stream, p, per_split);
}

template <Dtype D>
cudaError_t run(const Product& p, cudaStream_t stream) {
  const bool one_tile = p.m <= kTileRows;
  if (p.weight.half < 32) return one_tile ? run<D, 1, 4>(p, stream) : run<D, 2, 4>(p, stream);
  return one_tile ? run<D, 1, 8>(p, stream) : run<D, 2, 8>(p, stream);
}

}  // namespace

cudaError_t matmul_few_rows(const Product& p, cudaStream_t stream) {
  return p.x_dtype == Dtype::bf16 ? run<Dtype::bf16>(p, stream) : run<Dtype::f16>(p, stream);
}

}  // namespace qlora
