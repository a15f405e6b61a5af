// The elements of tensors of float32.

#pragma once

#include <torch/csrc/stable/tensor.h>

inline const float* floats(const torch::stable::Tensor& tensor) {
  return static_cast<const float*>(tensor.const_data_ptr());
}
inline float* mutable_floats(const torch::stable::Tensor& tensor) {
  return static_cast<float*>(tensor.mutable_data_ptr());
}
