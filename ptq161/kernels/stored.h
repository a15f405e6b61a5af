// The tensors of a packed weight as the operators read them.

#pragma once

#include "bfloat16.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>
#include <vector>
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace packed_rows {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

constexpr int64_t kGrainWeights = 1 << 17;  // that a thread is woken for

// Floats of a stored tensor, in float32 or float16: the value of row o is the one at o * stride.
struct Stored {
  const void* data = nullptr;
  bool half = false;
  int64_t stride = 1;

  float operator[](int64_t o) const {
    if (!half) return static_cast<const float*>(data)[o * stride];
    const uint32_t bits = static_cast<const uint16_t*>(data)[o * stride];
#if defined(__F16C__)
    return _cvtsh_ss(static_cast<uint16_t>(bits));
#endif
    // Exponents of float16 are moved to those of float32 by a product, which is exact for small ones, too.
    const float magnitude = std::bit_cast<float>((bits & 0x7fffu) << 13) * 0x1p112f;
    return bits & 0x8000u ? -magnitude : magnitude;
  }
};

inline const uint8_t* bytes(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == ScalarType::Byte, "packed bytes are not whole");
  return static_cast<const uint8_t*>(tensor.const_data_ptr());
}

// `count` floats, from `first` on where each row has `stride` of them.
inline Stored stored(const Tensor& tensor, int64_t count, int64_t stride = 1, int64_t first = 0) {
  const bool half = tensor.scalar_type() == ScalarType::Half;
  STD_TORCH_CHECK(half || tensor.scalar_type() == ScalarType::Float, "stored floats are neither float32 nor float16");
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.numel() == count, "stored floats are not as many as the weight has");
  const auto* data = static_cast<const uint8_t*>(tensor.const_data_ptr());
  return {data + first * (half ? 2 : 4), half, stride};
}

// Bytes of n codes.
inline int64_t width(int64_t n, int64_t bits) { return (n * bits + 7) / 8; }

}  // namespace packed_rows
