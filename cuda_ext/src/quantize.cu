// Rounding a dense weight to 4 bits, by the rules of qlora_jax/quant/blockwise.py to the bit.

#include <device/primitives.cuh>

#include "kernels.h"
#include "weight.cuh"

namespace qlora {
namespace {

constexpr int kThreads = 128;
constexpr int kColumns = 4;  // of a thread, which rounds one block of each

// x[index .. index + 4] in fp32; index is a multiple of 4.
template <Dtype D>
__device__ void load4(const void* x, size_t index, float (&out)[kColumns]) {
  if constexpr (D == Dtype::f32) {
    const float4 four = *reinterpret_cast<const float4*>(static_cast<const float*>(x) + index);
    out[0] = four.x, out[1] = four.y, out[2] = four.z, out[3] = four.w;
  } else {
    const uint2 four = *reinterpret_cast<const uint2*>(static_cast<const uint16_t*>(x) + index);
    out[0] = to_float<D>(four.x & 0xffff), out[1] = to_float<D>(four.x >> 16);
    out[2] = to_float<D>(four.y & 0xffff), out[3] = to_float<D>(four.y >> 16);
  }
}

template <Dtype D>
__global__ void __launch_bounds__(kThreads) round_blocks(const Quantization q) {
  __shared__ float thresholds[16 * kLanes];
  __shared__ uint32_t codes_by_rank[16 * kLanes];
  for (int i = threadIdx.x; i < 16 * kLanes; i += kThreads) {
    thresholds[i] = i / kLanes < 15 ? q.thresholds[i / kLanes] : 0;
    codes_by_rank[i] = q.code_of[i / kLanes];
  }
  __syncthreads();
  const int lane = threadIdx.x % kLanes;
  const int across = q.n / kColumns;
  const size_t index = size_t(blockIdx.x) * kThreads + threadIdx.x;
  const int column = index % across * kColumns, block = int(index / across);
  if (block >= q.k / (2 * q.half)) return;

  float absmax[kColumns] = {}, inverse[kColumns];
  const int first = block * 2 * q.half, last = min(first + 2 * q.half, q.rows);
  for (int row = first; row < last; ++row) {
    float x[kColumns];
    load4<D>(q.x, size_t(row) * q.n + column, x);
#pragma unroll
    for (int i = 0; i < kColumns; ++i) absmax[i] = fmaxf(absmax[i], fabsf(x[i]));
  }
#pragma unroll
  for (int i = 0; i < kColumns; ++i) {
    // Below the normal numbers counts as zero, as XLA has it.
    inverse[i] = absmax[i] >= 0x1p-126f ? 1.0f / absmax[i] : 0.0f;
  }
  *reinterpret_cast<float4*>(q.absmax + size_t(block) * q.n + column) =
      float4{absmax[0], absmax[1], absmax[2], absmax[3]};

  for (int i = 0; i < q.half; ++i) {
    uint32_t packed = 0;
#pragma unroll
    for (int nibble = 0; nibble < 2; ++nibble) {
      const int row = first + i + nibble * q.half;
      float x[kColumns] = {};  // beyond the rows: zeros
      if (row < q.rows) load4<D>(q.x, size_t(row) * q.n + column, x);
#pragma unroll
      for (int j = 0; j < kColumns; ++j) {
        const float scaled = multiply_rounded(x[j], inverse[j]);
        // How many thresholds lie below: a search in four steps, since they ascend.
        int rank = 0;
#pragma unroll
        for (int step = 8; step > 0; step /= 2) {
          if (scaled > thresholds[(rank + step - 1) * kLanes + lane]) rank += step;
        }
        packed |= codes_by_rank[rank * kLanes + lane] << (8 * j + 4 * nibble);
      }
    }
    *reinterpret_cast<uint32_t*>(q.codes + (size_t(block) * q.half + i) * q.n + column) = packed;
  }
}

template <Dtype D>
cudaError_t run(const Quantization& q, cudaStream_t stream) {
  const size_t threads = size_t(q.k / (2 * q.half)) * (q.n / kColumns);
  const dim3 grid((threads + kThreads - 1) / kThreads);
  return launch(round_blocks<D>, grid, kThreads, 0, stream, q);
}

}  // namespace

cudaError_t quantize(const Quantization& q, cudaStream_t stream) {
  switch (q.dtype) {
    case Dtype::f32: return run<Dtype::f32>(q, stream);
    case Dtype::bf16: return run<Dtype::bf16>(q, stream);
    default: return run<Dtype::f16>(q, stream);
  }
}

}  // namespace qlora
