// What surrounds the matrix products of a binarized linear in training: one pass over its inputs or outputs each.
// What is computed is told in binary_product.py, beside the same in torch.

#include "bfloat16.h"
#include "floats.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <bit>
#include <cstdint>
#include <tuple>
#include <utility>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kChunkTokens = 64;  // tokens whose sums are added up before those of other chunks
constexpr int64_t kGrain = 16;        // tokens, or rows of a weight, of one task at least

// Calls a function with a tensor's elements, as float* or as uint16_t* where they are bfloat16.
template <typename F>
auto with_elements(const Tensor& tensor, F&& function) {
  if (tensor.scalar_type() == ScalarType::BFloat16) {
    return function(static_cast<uint16_t*>(const_cast<void*>(tensor.const_data_ptr())));
  }
  return function(static_cast<float*>(const_cast<void*>(tensor.const_data_ptr())));
}

// Elements of a tensor that has the dtype of a pointer.
template <typename T>
const T* elements_like(const T*, const Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

// The value as it is stored in the type of a pointer: of bfloat16, the upper half of the bits is left.
inline float rounded(float value, const float*) { return value; }
inline float rounded(float value, const uint16_t*) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t nearest = (bits + 0x7fffu + ((bits >> 16) & 1u)) & 0xffff0000u;
  return value == value ? std::bit_cast<float>(nearest) : value;
}

// Writes a token's inputs and scaled inputs; returns the sum of the latter.
template <typename X, typename T>
float inputs_of_token(const X* given, const float* factors, int64_t n, T* input, T* scaled) {
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    const float value = rounded(to_float(given[j]), input);
    const float product = rounded(value * rounded(factors[j], input), scaled);
    store(input + j, value);
    store(scaled + j, product);
    total += product;
  }
  return total;
}

// Writes the gradient at a token's inputs, and adds its part of the factors' gradient.
template <typename T, typename X>
void input_gradients_of_token(const T* grad, const T* input, const float* factors, int64_t n, X* of_input,
                              float* of_factors) {
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const float gradient = to_float(grad[j]);
    of_factors[j] += gradient * to_float(input[j]);
    store(of_input + j, gradient * rounded(factors[j], grad));
  }
}

// Adds up rows of chunks, in an order that does not depend on the number of threads.
void add_chunks(const std::vector<float>& partial, int64_t n_chunks, int64_t n, float* sums) {
  std::fill(sums, sums + n, 0.0f);
  for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
    const float* from = partial.data() + chunk * n;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) sums[j] += from[j];
  }
}

std::tuple<Tensor, Tensor, Tensor> binary_inputs(Tensor x, Tensor column, Tensor salient, bool bfloat16) {
  const int64_t n_tokens = x.size(0), n = x.size(1), n_salient = salient.size(0), n_rest = n_salient + 1;
  const auto dtype = bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor input = torch::stable::new_empty(x, {n_tokens, n}, dtype);
  Tensor scaled = torch::stable::new_empty(x, {n_tokens, n}, dtype);
  Tensor rest = torch::stable::new_empty(x, {n_tokens, n_rest}, dtype);
  const float* factors = floats(column);
  const int64_t* index = static_cast<const int64_t*>(salient.const_data_ptr());
  with_elements(x, [&](const auto* from) {
    with_elements(input, [&](auto* inputs) {
      auto* scaleds = static_cast<decltype(inputs)>(scaled.mutable_data_ptr());
      auto* rests = static_cast<decltype(inputs)>(rest.mutable_data_ptr());
      torch::stable::parallel_for(0, n_tokens, kGrain, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) {
          auto *of_input = inputs + i * n, *of_rest = rests + i * n_rest;
          const float total = inputs_of_token(from + i * n, factors, n, of_input, scaleds + i * n);
          for (int64_t j = 0; j < n_salient; ++j) of_rest[j] = of_input[index[j]];
          store(of_rest + n_salient, total);
        }
      });
    });
  });
  return {input, scaled, rest};
}

std::tuple<Tensor, Tensor> binary_output_sums(Tensor grad, Tensor products, Tensor rest) {
  const int64_t n_tokens = grad.size(0), n = grad.size(1), n_rest = rest.size(1);
  const int64_t n_chunks = (n_tokens + kChunkTokens - 1) / kChunkTokens;
  Tensor of_products = torch::stable::new_empty(grad, {n, 1}, ScalarType::Float);
  Tensor of_total = torch::stable::new_empty(grad, {n, 1}, ScalarType::Float);
  std::vector<float> first(n_chunks * n, 0.0f), second(n_chunks * n, 0.0f);
  with_elements(grad, [&](const auto* grads) {
    const auto* z = elements_like(grads, products);
    const auto* rests = elements_like(grads, rest);
    torch::stable::parallel_for(0, n_chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kChunkTokens; i < std::min(end * kChunkTokens, n_tokens); ++i) {
        float *a = first.data() + i / kChunkTokens * n, *b = second.data() + i / kChunkTokens * n;
        const auto *g = grads + i * n, *zi = z + i * n;
        const float total = to_float(rests[i * n_rest + n_rest - 1]);
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float gradient = to_float(g[j]);
          a[j] += gradient * to_float(zi[j]);
          b[j] += gradient * total;
        }
      }
    });
  });
  add_chunks(first, n_chunks, n, mutable_floats(of_products));
  add_chunks(second, n_chunks, n, mutable_floats(of_total));
  return {of_products, of_total};
}

Tensor binary_effective_weight(Tensor sign, Tensor salient, Tensor scale, Tensor mean, Tensor binary) {
  const int64_t n_rows = sign.size(0), n = sign.size(1);
  Tensor weight = torch::stable::empty_like(sign);
  const float *scales = floats(scale), *means = floats(mean), *is_binary = floats(binary);
  with_elements(weight, [&](auto* weights) {
    const auto* signs = elements_like(weights, sign);
    const auto* salients = elements_like(weights, salient);
    torch::stable::parallel_for(0, n_rows, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        const float row_scale = scales[i], row_mean = means[i];
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) {
          const float value = to_float(signs[i * n + j]) * row_scale + is_binary[j] * row_mean;
          store(weights + i * n + j, value + to_float(salients[i * n + j]));
        }
      }
    });
  });
  return weight;
}

std::tuple<Tensor, Tensor> binary_input_gradients(Tensor grad, Tensor input, Tensor factor, bool bfloat16) {
  const int64_t n_tokens = grad.size(0), n = grad.size(1);
  const int64_t n_chunks = (n_tokens + kChunkTokens - 1) / kChunkTokens;
  Tensor of_column = torch::stable::new_empty(grad, {1, n}, ScalarType::Float);
  Tensor of_input =
      torch::stable::new_empty(grad, {n_tokens, n}, bfloat16 ? ScalarType::BFloat16 : ScalarType::Float);
  const float* factors = floats(factor);
  std::vector<float> partial(n_chunks * n, 0.0f);
  with_elements(grad, [&](const auto* grads) {
    const auto* inputs = elements_like(grads, input);
    with_elements(of_input, [&](auto* of_inputs) {
      torch::stable::parallel_for(0, n_chunks, 1, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin * kChunkTokens; i < std::min(end * kChunkTokens, n_tokens); ++i) {
          input_gradients_of_token(grads + i * n, inputs + i * n, factors, n, of_inputs + i * n,
                                   partial.data() + i / kChunkTokens * n);
        }
      });
    });
  });
  add_chunks(partial, n_chunks, n, mutable_floats(of_column));
  return {of_column, of_input};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ptq161, m) {
  m.def("binary_inputs(Tensor x, Tensor column, Tensor salient, bool bfloat16) -> (Tensor, Tensor, Tensor)");
  m.def("binary_output_sums(Tensor grad, Tensor products, Tensor rest) -> (Tensor, Tensor)");
  m.def(
      "binary_effective_weight(Tensor sign, Tensor salient, Tensor scale, Tensor mean, Tensor binary) -> Tensor");
  m.def("binary_input_gradients(Tensor grad, Tensor input, Tensor factor, bool bfloat16) -> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ptq161, CPU, m) {
  m.impl("binary_inputs", TORCH_BOX(&binary_inputs));
  m.impl("binary_output_sums", TORCH_BOX(&binary_output_sums));
  m.impl("binary_effective_weight", TORCH_BOX(&binary_effective_weight));
  m.impl("binary_input_gradients", TORCH_BOX(&binary_input_gradients));
}
