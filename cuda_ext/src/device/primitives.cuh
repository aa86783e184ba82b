// What the kernels ask of the hardware beyond CUDA C++, each with the meaning of its PTX
// instruction. Nothing else in this folder contains PTX; tests/cuda_ext/simulator has a second
// version of this file, in which a CPU plays the GPU.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "weight.h"

namespace qlora {

// The block's dynamic shared memory.
__device__ inline unsigned char* shared_memory() {
  extern __shared__ __align__(128) unsigned char memory[];
  return memory;
}

// Products and sums that are never contracted into a fused multiply-add.
__device__ inline float multiply_rounded(float a, float b) { return __fmul_rn(a, b); }
__device__ inline float add_rounded(float a, float b) { return __fadd_rn(a, b); }

// Two numbers rounded to nearest even, the first in the low half.
template <Dtype D>
__device__ inline uint32_t round_pair(float low, float high) {
  static_assert(D != Dtype::f32);
  if constexpr (D == Dtype::bf16) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  } else {
    const __half2 pair = __floats2half2_rn(low, high);
    return reinterpret_cast<const uint32_t&>(pair);
  }
}

template <Dtype D>
__device__ inline float to_float(uint16_t bits) {
  static_assert(D != Dtype::f32);
  if constexpr (D == Dtype::bf16) {
    return __uint_as_float(uint32_t(bits) << 16);
  } else {
    return __half2float(__ushort_as_half(bits));
  }
}

// Read once: leave the caches to others.
template <typename Vector = uint4>
__device__ inline Vector load_streaming(const void* from) {
  return __ldcs(reinterpret_cast<const Vector*>(from));
}

// Low halves of two words, and high halves: (a.low, b.low), (a.high, b.high).
__device__ inline uint32_t low_halves(uint32_t a, uint32_t b) { return __byte_perm(a, b, 0x5410); }
__device__ inline uint32_t high_halves(uint32_t a, uint32_t b) {
  return __byte_perm(a, b, 0x7632);
}

// c [16, 8] += a [16, 16] b [16, 8], by a warp; fragments as in the PTX manual, mma.m16n8k16.
template <Dtype D>
__device__ inline void multiply_add(float (&c)[4], const uint32_t (&a)[4], uint32_t b0,
                                    uint32_t b1) {
#if __CUDA_ARCH__ >= 800
  if constexpr (D == Dtype::bf16) {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  } else {
    asm(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
#else
  // Turing multiplies half as deep, and fp16 only: the handlers refuse bf16 there.
  if constexpr (D == Dtype::f16) {
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 "
        "{%0,%1,%2,%3}, {%4,%5}, {%6}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
  } else {
    __trap();
  }
#endif
}

// Four 8 x 8 matrices of 16-bit numbers from shared memory (ldmatrix): lanes 8i to 8i + 7 point to
// the eight rows of matrix i; lane l receives row l / 4, columns 2 (l % 4) and the next of each
// (transposed: column l / 4, those rows).
template <bool transposed>
__device__ inline void load_matrices(uint32_t (&out)[4], const void* row) {
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(row));
  if constexpr (transposed) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0,%1,%2,%3}, [%4];"
                 : "=r"(out[0]), "=r"(out[1]), "=r"(out[2]), "=r"(out[3])
                 : "r"(address)
                 : "memory");
  }
}

// Copies 16 bytes to shared memory in the background, or zeros where there is nothing to copy.
__device__ inline void copy_async(void* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
  const uint32_t address = static_cast<uint32_t>(__cvta_generic_to_shared(to));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from),
               "r"(valid ? 16 : 0)
               : "memory");
#else
  *static_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#endif
}

// Waits for this thread's copies; other threads see them after __syncthreads.
__device__ inline void wait_for_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}

// Starts a kernel on `stream`. Legal while a CUDA graph is captured: nothing is allocated.
template <typename... Parameters>
cudaError_t launch(void (*kernel)(Parameters...), dim3 grid, unsigned threads, size_t shared,
                   cudaStream_t stream, Parameters... parameters) {
  constexpr size_t kWithoutAsking = 48 << 10;
  if (shared > kWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(reinterpret_cast<const void*>(kernel),
                             cudaFuncAttributeMaxDynamicSharedMemorySize, int(shared));
    if (error != cudaSuccess) return error;
  }
  kernel<<<grid, threads, shared, stream>>>(parameters...);
  return cudaGetLastError();
}

}  // namespace qlora
