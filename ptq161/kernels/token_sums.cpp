// Sums of squares and products over the features of each token, and their gradient: one pass over the outputs each.
// What is computed is told in token_sums.py, beside the same in torch.

#include "floats.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <vector>

namespace {

using torch::stable::Tensor;

constexpr int64_t kGrain = 16;  // tokens of one task at least

std::vector<const float*> pointers(const std::vector<Tensor>& tensors) {
  std::vector<const float*> found;
  for (const Tensor& tensor : tensors) found.push_back(floats(tensor));
  return found;
}

Tensor token_sums(Tensor output, std::vector<Tensor> targets) {
  const int64_t n_tokens = output.size(0), n = output.size(1), n_targets = static_cast<int64_t>(targets.size());
  Tensor result = torch::stable::new_empty(output, {1 + 3 * n_targets, n_tokens});
  float* sums = mutable_floats(result);
  const float* outputs = floats(output);
  const auto from = pointers(targets);
  torch::stable::parallel_for(0, n_tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* y = outputs + i * n;
      float size = 0.0f;
#pragma omp simd reduction(+ : size)
      for (int64_t j = 0; j < n; ++j) size += y[j] * y[j];
      sums[i] = size;
      for (int64_t t = 0; t < n_targets; ++t) {
        const float* target = from[t] + i * n;
        float error = 0.0f, product = 0.0f, target_size = 0.0f;
#pragma omp simd reduction(+ : error, product, target_size)
        for (int64_t j = 0; j < n; ++j) {
          const float difference = y[j] - target[j];
          error += difference * difference;
          product += y[j] * target[j];
          target_size += target[j] * target[j];
        }
        sums[(1 + t) * n_tokens + i] = error;
        sums[(1 + n_targets + t) * n_tokens + i] = product;
        sums[(1 + 2 * n_targets + t) * n_tokens + i] = target_size;
      }
    }
  });
  return result;
}

Tensor token_sums_gradient(Tensor grad, Tensor output, std::vector<Tensor> targets) {
  const int64_t n_tokens = output.size(0), n = output.size(1), n_targets = static_cast<int64_t>(targets.size());
  Tensor result = torch::stable::empty_like(output);
  float* of_outputs = mutable_floats(result);
  const float *outputs = floats(output), *of_sums = floats(grad);
  const auto from = pointers(targets);
  torch::stable::parallel_for(0, n_tokens, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const float* y = outputs + i * n;
      float* of_output = of_outputs + i * n;
      const float of_size = 2.0f * of_sums[i];
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) of_output[j] = of_size * y[j];
      for (int64_t t = 0; t < n_targets; ++t) {
        const float* target = from[t] + i * n;
        const float of_error = 2.0f * of_sums[(1 + t) * n_tokens + i];
        const float of_product = of_sums[(1 + n_targets + t) * n_tokens + i];
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) of_output[j] += of_error * (y[j] - target[j]) + of_product * target[j];
      }
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ptq161, m) {
  m.def("token_sums(Tensor output, Tensor[] targets) -> Tensor");
  m.def("token_sums_gradient(Tensor grad, Tensor output, Tensor[] targets) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ptq161, CPU, m) {
  m.impl("token_sums", TORCH_BOX(&token_sums));
  m.impl("token_sums_gradient", TORCH_BOX(&token_sums_gradient));
}
