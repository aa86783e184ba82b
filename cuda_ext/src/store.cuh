// Numbers as they leave a kernel.
#pragma once

#include <device/primitives.cuh>

namespace qlora {

// y[index], y[index + 1] = low, high, index even. The branch is the same for all threads.
__device__ inline void store_pair(void* y, Dtype dtype, size_t index, float low, float high) {
  if (dtype == Dtype::f32) {
    *reinterpret_cast<float2*>(static_cast<float*>(y) + index) = float2{low, high};
  } else {
    const uint32_t pair = dtype == Dtype::bf16 ? round_pair<Dtype::bf16>(low, high)
                                               : round_pair<Dtype::f16>(low, high);
    *reinterpret_cast<uint32_t*>(static_cast<uint16_t*>(y) + index) = pair;
  }
}

// Eight numbers at `to`, which is aligned to 16 bytes.
template <Dtype D>
__device__ inline void store8(void* to, const float (&values)[8]) {
  if constexpr (D == Dtype::f32) {
    float4* wide = static_cast<float4*>(to);
    wide[0] = float4{values[0], values[1], values[2], values[3]};
    wide[1] = float4{values[4], values[5], values[6], values[7]};
  } else {
    *static_cast<uint4*>(to) =
        uint4{round_pair<D>(values[0], values[1]), round_pair<D>(values[2], values[3]),
              round_pair<D>(values[4], values[5]), round_pair<D>(values[6], values[7])};
  }
}

}  // namespace qlora
