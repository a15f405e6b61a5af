// What the operators take and give, in float32 or bfloat16: rows, whose products are computed in float32, and weights.

#pragma once

#include "stored.h"

namespace packed_rows {

// y = sums + bias in the dtype T.
template <typename T>
void finish(const float* sums, const T* bias, T* y, int64_t n_rows, int64_t n) {
  for (int64_t m = 0; m < n_rows; ++m, sums += n, y += n) {
    if (bias == nullptr) {
#pragma omp simd
      for (int64_t o = 0; o < n; ++o) store(y + o, sums[o]);
    } else {
#pragma omp simd
      for (int64_t o = 0; o < n; ++o) store(y + o, sums[o] + to_float(bias[o]));
    }
  }
}

// y [..., rows] of x [..., columns] in its dtype, float32 or bfloat16; `multiply(x, y, n_rows)` writes sums in float32.
template <typename Multiply>
Tensor product_of(const Tensor& x, const Optional& bias, int64_t rows, int64_t columns, const Multiply& multiply) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == columns && x.is_contiguous(), "x is not [..., in]");
  STD_TORCH_CHECK(!bias || (bias->numel() == rows && bias->scalar_type() == x.scalar_type()), "bias is not [out]");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = rows;
  Tensor y = torch::stable::new_empty(x, shape);
  const int64_t n_rows = x.numel() / std::max<int64_t>(1, columns);
  const void* added = bias ? bias->const_data_ptr() : nullptr;
  if (x.scalar_type() == ScalarType::BFloat16) {
    const auto* from = static_cast<const uint16_t*>(x.const_data_ptr());
    std::vector<float> floats(x.numel()), sums(n_rows * rows);
    for (size_t i = 0; i < floats.size(); ++i) floats[i] = to_float(from[i]);
    multiply(floats.data(), sums.data(), n_rows);
    auto* to = static_cast<uint16_t*>(y.mutable_data_ptr());
    finish(sums.data(), static_cast<const uint16_t*>(added), to, n_rows, rows);
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x is neither float32 nor bfloat16");
    auto* to = static_cast<float*>(y.mutable_data_ptr());
    multiply(static_cast<const float*>(x.const_data_ptr()), to, n_rows);
    if (added != nullptr) finish(to, static_cast<const float*>(added), to, n_rows, rows);
  }
  return y;
}

// Rows `start` to `stop` of a weight [rows, columns], by `write(to)`, on the device of `like`.
template <typename Write>
Tensor dense_of(const Tensor& like, int64_t start, int64_t stop, int64_t rows, int64_t columns, ScalarType dtype,
                const Write& write) {
  STD_TORCH_CHECK(0 <= start && start <= stop && stop <= rows, "these are no rows of the weight");
  STD_TORCH_CHECK(dtype == ScalarType::BFloat16 || dtype == ScalarType::Float, "neither float32 nor bfloat16");
  Tensor weight = torch::stable::new_empty(like, {stop - start, columns}, dtype);
  void* to = weight.mutable_data_ptr();
  dtype == ScalarType::BFloat16 ? write(static_cast<uint16_t*>(to)) : write(static_cast<float*>(to));
  return weight;
}

}  // namespace packed_rows
