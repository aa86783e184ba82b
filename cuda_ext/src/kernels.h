// The kernels, as the handlers call them. Shapes are checked there; all pointers are device memory.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

#include "weight.h"

namespace qlora {

// y = x W (x [m, k], y [m, n]), or x W^T (x [m, n], y [m, k]), summed in `splits` parts:
// y [splits, m, ...]. W's columns are a multiple of 16, its rows of 64; x is bf16 or fp16.
struct Product {
  Weight weight;
  const uint16_t* x;
  void* y;
  Dtype x_dtype, y_dtype;
  int m, splits;
};

constexpr int kFewRows = 16;

// At most kFewRows rows of x.
cudaError_t matmul_few_rows(const Product& product, cudaStream_t stream);

// Any number of rows; the weight's absmax in fp32.
cudaError_t matmul(const Product& product, bool transposed, cudaStream_t stream);

// dense [k, n] of `dtype`.
cudaError_t dequantize(const Weight& weight, void* dense, Dtype dtype, cudaStream_t stream);

// x [rows, n] of `dtype` -> codes [k/2, n], absmax [k/(2 half), n], with k the rows rounded up to
// whole blocks. thresholds [15] between the code book's levels in ascending order; code_of [16]:
// the code of each of these levels.
struct Quantization {
  const void* x;
  Dtype dtype;
  const float* thresholds;
  const uint8_t* code_of;
  uint8_t* codes;
  float* absmax;
  int rows, k, n, half;
};

cudaError_t quantize(const Quantization& quantization, cudaStream_t stream);

}  // namespace qlora
