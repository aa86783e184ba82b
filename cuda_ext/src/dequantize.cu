// A 4-bit weight made dense. The time is that of writing the result.

#include "kernels.h"
#include "store.cuh"
#include "weight.cuh"

namespace qlora {
namespace {

constexpr int kThreads = 256;
// Of a thread: one block's scales serve all its rows, and what a warp stores at a time is one piece
// of a row, whole sectors of memory.
constexpr int kColumns = 8, kByteRows = 8;

template <Dtype D>
__global__ void __launch_bounds__(kThreads) dense_rows(const Weight w, unsigned char* dense) {
  __shared__ float table[16 * kLanes];
  fill_codebook(table, w.codebook);
  __syncthreads();
  const float* lane_table = table + threadIdx.x % kLanes;
  const int across = w.n / kColumns;
  const size_t index = size_t(blockIdx.x) * kThreads + threadIdx.x;
  const int column = index % across * kColumns, byte_row = int(index / across) * kByteRows;
  if (byte_row >= w.byte_rows) return;
  // All at once: the compiler would not move a load ahead of a store that might change it.
  uint2 bytes[kByteRows];
#pragma unroll
  for (int i = 0; i < kByteRows; ++i) {
    bytes[i] = load_streaming<uint2>(w.codes + size_t(byte_row + i) * w.n + column);
  }
  float scales[kColumns];
  read_scales(w, byte_row, column, scales);
  constexpr size_t kSize = D == Dtype::f32 ? 4 : 2;
#pragma unroll
  for (int i = 0; i < kByteRows; ++i) {
#pragma unroll
    for (int nibble = 0; nibble < 2; ++nibble) {
      float values[kColumns];
      decode8(bytes[i], nibble, lane_table, scales, values);
      store8<D>(dense + (size_t(row_of(w, byte_row + i, nibble)) * w.n + column) * kSize, values);
    }
  }
}

template <Dtype D>
cudaError_t run(const Weight& w, void* dense, cudaStream_t stream) {
  const size_t threads = size_t(w.byte_rows / kByteRows) * (w.n / kColumns);
  const dim3 grid((threads + kThreads - 1) / kThreads);
  return launch(dense_rows<D>, grid, kThreads, 0, stream, w, static_cast<unsigned char*>(dense));
}

}  // namespace

cudaError_t dequantize(const Weight& w, void* dense, Dtype dtype, cudaStream_t stream) {
  switch (dtype) {
    case Dtype::f32: return run<Dtype::f32>(w, dense, stream);
    case Dtype::bf16: return run<Dtype::bf16>(w, dense, stream);
    default: return run<Dtype::f16>(w, dense, stream);
  }
}

}  // namespace qlora
