// XLA's foreign functions. Every argument is checked here, with a status that says what was wrong;
// the kernels behind rely on it. Nothing is allocated, and all work goes to the stream that XLA
// gives, so that the calls may be captured in CUDA graphs (XLA's command buffers).

#include <cstdint>
#include <optional>
#include <sstream>
#include <string>

#include "kernels.h"
#include "xla/ffi/api/c_api.h"
#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace qlora {
namespace {

using ffi::AnyBuffer;
using ffi::DataType;
using ffi::Error;

template <typename... Parts>
Error invalid(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  return Error(ffi::ErrorCode::kInvalidArgument, message.str());
}

Error status(cudaError_t error, const char* kernel) {
  if (error == cudaSuccess) return Error::Success();
  return Error(ffi::ErrorCode::kInternal, std::string(kernel) + ": " + cudaGetErrorString(error));
}

const char* name(DataType type) {
  switch (type) {
    case DataType::F32: return "float32";
    case DataType::BF16: return "bfloat16";
    case DataType::F16: return "float16";
    case DataType::U8: return "uint8";
    default: return "another dtype";
  }
}

std::optional<Dtype> floating(DataType type) {
  switch (type) {
    case DataType::F32: return Dtype::f32;
    case DataType::BF16: return Dtype::bf16;
    case DataType::F16: return Dtype::f16;
    default: return std::nullopt;
  }
}

std::string shape(AnyBuffer buffer) {
  std::ostringstream text;
  text << name(buffer.element_type()) << "[";
  const char* comma = "";
  for (int64_t size : buffer.dimensions()) text << comma << size, comma = ", ";
  text << "]";
  return text.str();
}

// One array: its dtype, its shape, and that it begins at a multiple of 16 bytes.
Error check(const char* what, AnyBuffer buffer, DataType type,
            std::initializer_list<int64_t> dimensions) {
  const auto sizes = buffer.dimensions();
  bool fits = buffer.element_type() == type && sizes.size() == dimensions.size();
  size_t axis = 0;
  for (int64_t size : dimensions) fits = fits && sizes[axis++] == size;
  if (!fits) {
    std::ostringstream wanted;
    const char* comma = "";
    for (int64_t size : dimensions) wanted << comma << size, comma = ", ";
    return invalid(what, " must be ", name(type), "[", wanted.str(), "], got ", shape(buffer));
  }
  if (reinterpret_cast<uintptr_t>(buffer.untyped_data()) % 16) {
    return invalid(what, " must begin at a multiple of 16 bytes");
  }
  return Error::Success();
}

constexpr int64_t kLargest = INT32_MAX;  // of a side: indices of rows and columns are ints

// codes, scales (fp32; or uint8 with nested, offset and levels) and code book of one weight.
Error read_weight(AnyBuffer codes, AnyBuffer codebook, AnyBuffer scales,
                  ffi::RemainingArgs nested, Weight& w) {
  const auto sizes = codes.dimensions();
  if (sizes.size() != 2 || scales.dimensions().size() != 2) {
    return invalid("codes must be uint8[K/2, N] and scales [K/block, N], got ", shape(codes),
                   " and ", shape(scales));
  }
  const int64_t k = 2 * sizes[0], n = sizes[1], blocks = scales.dimensions()[0];
  if (k <= 0 || n <= 0 || k % 64 || n % 16 || k > kLargest || n > kLargest) {
    return invalid("K must be a multiple of 64 and N one of 16, got K=", k, " x N=", n);
  }
  const int64_t block = blocks > 0 && k % blocks == 0 ? k / blocks : 0;
  if (block < 32 || block > 4096 || (block & (block - 1))) {
    return invalid("the block size must be a power of two from 32 to 4096, but K=", k, " in ",
                   blocks, " blocks makes ", k, "/", blocks);
  }
  if (Error e = check("codes", codes, DataType::U8, {k / 2, n}); e.failure()) return e;
  if (Error e = check("codebook", codebook, DataType::F32, {16}); e.failure()) return e;
  w = Weight{};
  w.codes = static_cast<const uint8_t*>(codes.untyped_data());
  w.codebook = static_cast<const float*>(codebook.untyped_data());
  w.byte_rows = static_cast<int>(k / 2), w.n = static_cast<int>(n);
  w.half = static_cast<int>(block / 2);
  while (1 << w.log_half < w.half) ++w.log_half;
  if (nested.size() == 0) {
    if (Error e = check("scales", scales, DataType::F32, {blocks, n}); e.failure()) return e;
    w.absmax = static_cast<const float*>(scales.untyped_data());
    return Error::Success();
  }
  if (nested.size() != 3) {
    return invalid("double-quantized scales come with nested, offset and levels: 3 arrays, got ",
                   nested.size());
  }
  // RemainingArgs knows its size; an index below it is there, and any dtype is an AnyBuffer.
  const AnyBuffer absmax = *nested.get<AnyBuffer>(0), offset = *nested.get<AnyBuffer>(1),
                  levels = *nested.get<AnyBuffer>(2);
  const int64_t groups = (blocks * n + 255) / 256;
  if (Error e = check("scales", scales, DataType::U8, {blocks, n}); e.failure()) return e;
  if (Error e = check("nested", absmax, DataType::F32, {groups}); e.failure()) return e;
  if (Error e = check("offset", offset, DataType::F32, {}); e.failure()) return e;
  if (Error e = check("levels", levels, DataType::F32, {256}); e.failure()) return e;
  w.absmax_codes = static_cast<const uint8_t*>(scales.untyped_data());
  w.nested = static_cast<const float*>(absmax.untyped_data());
  w.offset = static_cast<const float*>(offset.untyped_data());
  w.nested_levels = static_cast<const float*>(levels.untyped_data());
  return Error::Success();
}

// Tensor cores multiply bf16 from compute capability 8.0 on, fp16 from 7.5.
Error check_device(Dtype dtype) {
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  }
  if (error == cudaSuccess) {
    error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  }
  if (error != cudaSuccess) return status(error, "device");
  const int capability = 10 * major + minor;
  if (capability < (dtype == Dtype::bf16 ? 80 : 75)) {
    return Error(ffi::ErrorCode::kUnimplemented,
                 std::string(dtype == Dtype::bf16 ? "bfloat16 needs compute capability 8.0"
                                                  : "these kernels need compute capability 7.5") +
                     ", this GPU has " + std::to_string(major) + "." + std::to_string(minor));
  }
  return Error::Success();
}

Error matmul_handler(cudaStream_t stream, AnyBuffer x, AnyBuffer codes, AnyBuffer codebook,
                     AnyBuffer scales, ffi::RemainingArgs nested, ffi::Result<AnyBuffer> y,
                     bool transposed) {
  Product p{};
  if (Error e = read_weight(codes, codebook, scales, nested, p.weight); e.failure()) return e;
  const std::optional<Dtype> x_dtype = floating(x.element_type());
  if (!x_dtype || *x_dtype == Dtype::f32) {
    return invalid("x must be bfloat16 or float16, got ", shape(x));
  }
  const std::optional<Dtype> y_dtype = floating(y->element_type());
  if (!y_dtype) return invalid("y must be float32, bfloat16 or float16, got ", shape(*y));
  const auto rows = x.dimensions(), parts = y->dimensions();
  if (rows.size() != 2 || parts.size() != 3) {
    return invalid("x must be [M, K] and y [splits, M, N], got ", shape(x), " and ", shape(*y));
  }
  const int64_t m = rows[0], splits = parts[0];
  const int64_t in = transposed ? p.weight.n : 2 * p.weight.byte_rows;
  const int64_t out = transposed ? 2 * p.weight.byte_rows : p.weight.n;
  if (m > kLargest / 2 || splits < 1 || splits > 65535 || (splits > 1 && *y_dtype != Dtype::f32)) {
    return invalid("y must be of 1 to 65535 parts, of float32 where they are several, got ",
                   shape(*y), " for x ", shape(x));
  }
  if (Error e = check("x", x, x.element_type(), {m, in}); e.failure()) return e;
  if (Error e = check("y", *y, y->element_type(), {splits, m, out}); e.failure()) return e;
  const bool few = !transposed && m <= kFewRows;
  if (!few && !p.weight.absmax) {
    return invalid("double-quantized scales are read for at most ", kFewRows,
                   " rows of x and not for the transposed product, got M=", m);
  }
  if (m == 0) return Error::Success();
  p.x_dtype = *x_dtype, p.y_dtype = *y_dtype;
  if (Error e = check_device(p.x_dtype); e.failure()) return e;
  p.x = static_cast<const uint16_t*>(x.untyped_data());
  p.y = y->untyped_data();
  p.m = static_cast<int>(m), p.splits = static_cast<int>(splits);
  return few ? status(matmul_few_rows(p, stream), "matmul_few_rows")
             : status(matmul(p, transposed, stream), "matmul");
}

Error dequantize_handler(cudaStream_t stream, AnyBuffer codes, AnyBuffer codebook,
                         AnyBuffer scales, ffi::RemainingArgs nested, ffi::Result<AnyBuffer> y) {
  Weight w;
  if (Error e = read_weight(codes, codebook, scales, nested, w); e.failure()) return e;
  const std::optional<Dtype> dtype = floating(y->element_type());
  if (!dtype) return invalid("y must be float32, bfloat16 or float16, got ", shape(*y));
  if (Error e = check("y", *y, y->element_type(), {2 * w.byte_rows, w.n}); e.failure()) return e;
  return status(dequantize(w, y->untyped_data(), *dtype, stream), "dequantize");
}

Error quantize_handler(cudaStream_t stream, AnyBuffer x, AnyBuffer thresholds, AnyBuffer code_of,
                       ffi::Result<AnyBuffer> codes, ffi::Result<AnyBuffer> absmax) {
  const std::optional<Dtype> dtype = floating(x.element_type());
  const auto sizes = x.dimensions(), packed = codes->dimensions(), scales = absmax->dimensions();
  if (!dtype || sizes.size() != 2 || sizes[0] < 1 || sizes[1] < 1 || sizes[1] % 16 ||
      sizes[0] > kLargest / 2 || sizes[1] > kLargest) {
    return invalid("x must be [K, N] of float32, bfloat16 or float16, N a multiple of 16, got ",
                   shape(x));
  }
  if (packed.size() != 2 || scales.size() != 2 || scales[0] < 1) {
    return invalid("codes must be [K/2, N] and absmax [K/block, N], got ", shape(*codes), " and ",
                   shape(*absmax));
  }
  const int64_t n = sizes[1], k = 2 * packed[0], blocks = scales[0];
  const int64_t block = k % blocks == 0 ? k / blocks : 0;
  if (block < 32 || block > 4096 || (block & (block - 1)) || k < sizes[0] ||
      k - sizes[0] >= block) {
    return invalid("blocks must be a power of two from 32 to 4096 and just cover K: x ", shape(x),
                   ", codes ", shape(*codes), ", absmax ", shape(*absmax));
  }
  if (Error e = check("x", x, x.element_type(), {sizes[0], n}); e.failure()) return e;
  if (Error e = check("thresholds", thresholds, DataType::F32, {15}); e.failure()) return e;
  if (Error e = check("code_of", code_of, DataType::U8, {16}); e.failure()) return e;
  if (Error e = check("codes", *codes, DataType::U8, {k / 2, n}); e.failure()) return e;
  if (Error e = check("absmax", *absmax, DataType::F32, {blocks, n}); e.failure()) return e;
  Quantization q{};
  q.x = x.untyped_data(), q.dtype = *dtype;
  q.thresholds = static_cast<const float*>(thresholds.untyped_data());
  q.code_of = static_cast<const uint8_t*>(code_of.untyped_data());
  q.codes = static_cast<uint8_t*>(codes->untyped_data());
  q.absmax = static_cast<float*>(absmax->untyped_data());
  q.rows = static_cast<int>(sizes[0]), q.k = static_cast<int>(k), q.n = static_cast<int>(n);
  q.half = static_cast<int>(block / 2);
  return status(quantize(q, stream), "quantize");
}

using Stream = ffi::PlatformStream<cudaStream_t>;
constexpr auto kInGraphs = ffi::Traits::kCmdBufferCompatible;

}  // namespace
}  // namespace qlora

// The version of the interface that this library was built for; XLA refuses a newer minor one.
extern "C" int qlora_ffi_major() { return XLA_FFI_API_MAJOR; }
extern "C" int qlora_ffi_minor() { return XLA_FFI_API_MINOR; }

XLA_FFI_DEFINE_HANDLER_SYMBOL(qlora_matmul, qlora::matmul_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<qlora::Stream>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>()
                                  .Attr<bool>("transposed"),
                              {qlora::kInGraphs});

XLA_FFI_DEFINE_HANDLER_SYMBOL(qlora_dequantize, qlora::dequantize_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<qlora::Stream>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .RemainingArgs()
                                  .Ret<ffi::AnyBuffer>(),
                              {qlora::kInGraphs});

XLA_FFI_DEFINE_HANDLER_SYMBOL(qlora_quantize, qlora::quantize_handler,
                              ffi::Ffi::Bind()
                                  .Ctx<qlora::Stream>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>()
                                  .Ret<ffi::AnyBuffer>(),
                              {qlora::kInGraphs});
