// y = x W and y = x W^T for many rows of x, on the tensor cores (mma.sync).
//
// A thread block computes up to 128 rows of y by 128 outputs. In each step over the contraction it
// decodes one tile of W into shared memory, once for all its rows, with the very numbers that
// reference.dequantize gives: fp32 level times fp32 absmax, rounded once. While the tensor cores
// multiply a tile, other warps decode the next one; the bytes of the one after that, and the next
// tile of x, are on their way.
//
// The two products differ in which side of W's tile is summed over, and so in which way ldmatrix
// hands it to mma. A tile is 32 byte rows x 128 columns (sum over the rows of W, which are
// 32 low and 32 high nibbles) or, transposed, 64 byte rows x 64 columns (sum over the columns).

#include <algorithm>

#include "kernels.h"
#include "store.cuh"
#include "weight.cuh"

namespace qlora {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kLanes;
constexpr int kOutputs = 128;  // of a block
constexpr int kDepth = 64;     // of the contraction in a step
constexpr int kChunk = 8;      // 16-bit numbers in 16 bytes, the unit of copies and swizzling

template <bool transposed>
struct Tile {
  static constexpr int byte_rows = transposed ? 64 : 32;
  static constexpr int columns = transposed ? kDepth : kOutputs;
  static constexpr int chunks = columns / kChunk;  // of a decoded row
  static constexpr int code_bytes = byte_rows * columns;
  static constexpr int most_scale_rows = byte_rows / 16;  // blocks of 32 have 16 byte rows
};

// A tile of 16-bit numbers in shared memory whose rows have `chunks` chunks: chunks change places
// by the row's number, so that eight rows of one chunk, as ldmatrix reads them, lie in all banks.
template <int chunks>
__device__ int place(int row, int chunk) {
  return (row * chunks + (chunk ^ (row & 7))) * kChunk;
}

template <int rows, bool transposed>
struct Shared {
  using T = Tile<transposed>;
  alignas(16) uint16_t x[2][rows * kDepth];
  alignas(16) uint16_t w[2][kOutputs * kDepth];
  alignas(16) uint8_t codes[2][T::code_bytes];
  alignas(16) float scales[2][T::most_scale_rows * T::columns];
  float table[16 * kLanes];
};

template <Dtype D, int rows, bool transposed>
struct Block {
  using T = Tile<transposed>;
  const Product& p;
  Shared<rows, transposed>& shared;
  int first_row, first_output;  // of y; the latter in columns of W or, transposed, in byte rows
  int first_step;

  // Where in W step `step` begins.
  __device__ int byte_row(int step) const {
    return transposed ? first_output : (first_step + step) * T::byte_rows;
  }
  __device__ int column(int step) const {
    return transposed ? (first_step + step) * T::columns : first_output;
  }

  __device__ void load_x(int step) const {
    const Weight& w = p.weight;
    const int width = transposed ? w.n : 2 * w.byte_rows;
    uint16_t* to = shared.x[step % 2];
#pragma unroll
    for (int i = threadIdx.x; i < rows * kDepth / kChunk; i += kThreads) {
      const int row = i / (kDepth / kChunk), chunk = i % (kDepth / kChunk);
      int from = column(step) + chunk * kChunk;
      if (!transposed) {
        // Columns of x in the order of the decoded rows: low nibbles, then high ones.
        const int among = chunk * kChunk % T::byte_rows;
        from = row_of(w, byte_row(step) + among, chunk * kChunk / T::byte_rows);
      }
      const bool valid = first_row + row < p.m && from < width;
      const size_t at = valid ? size_t(first_row + row) * width + from : 0;
      copy_async(to + place<kDepth / kChunk>(row, chunk), p.x + at, valid);
    }
  }

  __device__ void load_codes(int step) const {
    const Weight& w = p.weight;
    constexpr int kAcross = T::columns / 16;  // copies of 16 bytes along a row
    static_assert(T::byte_rows * kAcross == kThreads);
    {
      const int row = threadIdx.x / kAcross, across = threadIdx.x % kAcross * 16;
      const bool valid = byte_row(step) + row < w.byte_rows && column(step) + across < w.n;
      const size_t at = valid ? size_t(byte_row(step) + row) * w.n + column(step) + across : 0;
      copy_async(shared.codes[step % 2] + row * T::columns + across, w.codes + at, valid);
    }
    constexpr int kFours = T::columns / 4;
    static_assert(T::most_scale_rows * kFours <= kThreads);
    if (threadIdx.x < T::most_scale_rows * kFours) {
      const int row = threadIdx.x / kFours, across = threadIdx.x % kFours * 4;
      const int from = (byte_row(step) >> w.log_half) + row;
      const bool valid = from < w.byte_rows >> w.log_half && column(step) + across < w.n;
      const size_t at = valid ? size_t(from) * w.n + column(step) + across : 0;
      copy_async(shared.scales[step % 2] + row * T::columns + across, w.absmax + at, valid);
    }
  }

  __device__ void decode(int step) const {
    const uint8_t* codes = shared.codes[step % 2];
    const float* lane_table = shared.table + threadIdx.x % kLanes;
    uint16_t* to = shared.w[step % 2];
#pragma unroll
    for (int i = threadIdx.x; i < T::byte_rows * T::chunks; i += kThreads) {
      const int row = i / T::chunks, chunk = i % T::chunks;
      const uint2 bytes =
          *reinterpret_cast<const uint2*>(codes + row * T::columns + chunk * kChunk);
      // A tile begins with a block or lies within one.
      const float* from = shared.scales[step % 2] + (row >> p.weight.log_half) * T::columns;
      float scales[kChunk];
#pragma unroll
      for (int j = 0; j < kChunk; ++j) scales[j] = from[chunk * kChunk + j];
#pragma unroll
      for (int nibble = 0; nibble < 2; ++nibble) {
        float values[kChunk];
        decode8(bytes, nibble, lane_table, scales, values);
        store8<D>(to + place<T::chunks>(row + nibble * T::byte_rows, chunk), values);
      }
    }
  }

  // Warps lie 2 x 4 over y (rows x outputs), or 1 x 8 over the lowest tile.
  static constexpr int kWarpsDown = rows >= 64 ? 2 : 1, kWarpsAcross = kWarps / kWarpsDown;
  static constexpr int kRowTiles = rows / kWarpsDown / 16;
  static constexpr int kOutputTiles = kOutputs / kWarpsAcross / 8;
  using Sums = float[kRowTiles][kOutputTiles][4];

  __device__ static int warp_row() { return threadIdx.x / kLanes / kWarpsAcross * kRowTiles * 16; }
  __device__ static int warp_output() {
    return threadIdx.x / kLanes % kWarpsAcross * kOutputTiles * 8;
  }

  __device__ void multiply(int step, Sums& sums) const {
    const uint16_t* x = shared.x[step % 2];
    const uint16_t* w = shared.w[step % 2];
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int k = 0; k < kDepth; k += 16) {
      uint32_t left[kRowTiles][4];
#pragma unroll
      for (int i = 0; i < kRowTiles; ++i) {
        const int row = warp_row() + 16 * i + lane % 16;
        load_matrices<false>(left[i], x + place<kDepth / kChunk>(row, k / kChunk + lane / 16));
      }
#pragma unroll
      for (int j = 0; j < kOutputTiles; j += 2) {
        const int output = warp_output() + 8 * j;
        uint32_t right[4];  // k to k + 7 and the next eight, of 8 outputs; and of the next 8
        if constexpr (transposed) {
          const int row = output + lane % 8 + lane / 16 * 8;
          load_matrices<false>(right, w + place<T::chunks>(row, k / kChunk + lane / 8 % 2));
        } else {
          const int row = k + lane % 16;
          load_matrices<true>(right, w + place<T::chunks>(row, output / kChunk + lane / 16));
        }
#pragma unroll
        for (int i = 0; i < kRowTiles; ++i) {
          multiply_add<D>(sums[i][j], left[i], right[0], right[1]);
          multiply_add<D>(sums[i][j + 1], left[i], right[2], right[3]);
        }
      }
    }
  }

  __device__ void store(const Sums& sums) const {
    const Weight& w = p.weight;
    const int width = transposed ? 2 * w.byte_rows : w.n;
    const int lane = threadIdx.x % kLanes;
#pragma unroll
    for (int j = 0; j < kOutputTiles; ++j) {
      const int among = warp_output() + 8 * j + lane % 4 * 2;
      int to = first_output + among;
      bool valid = to < w.n;
      if (transposed) {
        const int row = first_output + among % T::byte_rows;
        valid = row < w.byte_rows;
        to = row_of(w, row, among / T::byte_rows);
      }
#pragma unroll
      for (int i = 0; i < 2 * kRowTiles; ++i) {
        const int row = first_row + warp_row() + 8 * i + lane / 4;
        if (!valid || row >= p.m) continue;
        const float* pair = sums[i / 2][j] + i % 2 * 2;
        store_pair(p.y, p.y_dtype, (size_t(blockIdx.z) * p.m + row) * width + to, pair[0],
                   pair[1]);
      }
    }
  }
};

template <Dtype D, int rows, bool transposed>
__global__ void __launch_bounds__(kThreads, 2)
    many_rows(const Product p, const int steps_per_split) {
  using T = Tile<transposed>;
  auto& shared = *reinterpret_cast<Shared<rows, transposed>*>(shared_memory());
  const Weight& w = p.weight;
  const int all_steps =
      transposed ? (w.n + T::columns - 1) / T::columns : w.byte_rows / T::byte_rows;
  const int first_step = blockIdx.z * steps_per_split;
  const int steps = min(steps_per_split, all_steps - first_step);
  const int width = transposed ? T::byte_rows : T::columns;
  const Block<D, rows, transposed> block{p, shared, int(blockIdx.x) * rows,
                                         int(blockIdx.y) * width, first_step};
  typename Block<D, rows, transposed>::Sums sums = {};
  if (steps > 0) {
    block.load_x(0);
    block.load_codes(0);
    if (steps > 1) block.load_codes(1);
    fill_codebook(shared.table, w.codebook);
    wait_for_copies();
    __syncthreads();
    block.decode(0);
  }
  for (int step = 0; step < steps; ++step) {
    // All have decoded this step's tile, and multiplied the one before, whose place is free now.
    wait_for_copies();
    __syncthreads();
    if (step + 1 < steps) block.load_x(step + 1);
    if (step + 2 < steps) block.load_codes(step + 2);
    if (step + 1 < steps) block.decode(step + 1);
    block.multiply(step, sums);
  }
  block.store(sums);
}

template <Dtype D, int rows, bool transposed>
cudaError_t run(const Product& p, cudaStream_t stream) {
  using T = Tile<transposed>;
  const Weight& w = p.weight;
  const int steps = transposed ? (w.n + T::columns - 1) / T::columns : w.byte_rows / T::byte_rows;
  const int outputs = transposed ? w.byte_rows : w.n;
  const int across = transposed ? T::byte_rows : T::columns;
  const dim3 grid((p.m + rows - 1) / rows, (outputs + across - 1) / across, p.splits);
  return launch(many_rows<D, rows, transposed>, grid, kThreads, sizeof(Shared<rows, transposed>),
                stream, p, (steps + p.splits - 1) / p.splits);
}

template <Dtype D, bool transposed>
cudaError_t run(const Product& p, cudaStream_t stream) {
  if (p.m <= 32) return run<D, 32, transposed>(p, stream);
  int device = 0, most = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (error != cudaSuccess) return error;
  // 128 rows take 76 KiB of shared memory; Turing has 64.
  const bool tall = p.m > 64 && most >= int(sizeof(Shared<128, transposed>));
  return tall ? run<D, 128, transposed>(p, stream) : run<D, 64, transposed>(p, stream);
}

template <Dtype D>
cudaError_t run(const Product& p, bool transposed, cudaStream_t stream) {
  return transposed ? run<D, true>(p, stream) : run<D, false>(p, stream);
}

}  // namespace

cudaError_t matmul(const Product& p, bool transposed, cudaStream_t stream) {
  return p.x_dtype == Dtype::bf16 ? run<Dtype::bf16>(p, transposed, stream)
                                  : run<Dtype::f16>(p, transposed, stream);
}

}  // namespace qlora
