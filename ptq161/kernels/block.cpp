// What a decoder block computes between its matrix products, and the gradients: one pass each over the activations.
// What is computed is told in block.py. Inside, all is float32.

#include "bfloat16.h"
#include "exponential.h"
#include "floats.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cmath>
#include <cstdint>
#include <tuple>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 16;  // tokens of one task at least

const uint16_t* halves(const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == ScalarType::BFloat16, "not a whole bfloat16 tensor");
  return static_cast<const uint16_t*>(tensor.const_data_ptr());
}
uint16_t* mutable_halves(const Tensor& tensor) { return static_cast<uint16_t*>(tensor.mutable_data_ptr()); }

// Calls what(elements of x, elements of y) for two tensors of float32 or of bfloat16.
template <typename What>
void of_dtype(const Tensor& x, const Tensor& y, What what) {
  if (x.scalar_type() == ScalarType::BFloat16) {
    what(halves(x), mutable_halves(y));
  } else {
    STD_TORCH_CHECK(x.is_contiguous() && x.scalar_type() == ScalarType::Float, "not a whole float32 tensor");
    what(floats(x), mutable_floats(y));
  }
}

template <typename T>
void norm_row(const T* x, const float* weight, int64_t n, float epsilon, float* out, float* inverse) {
  float squares = 0.0f;
#pragma omp simd reduction(+ : squares)
  for (int64_t j = 0; j < n; ++j) squares += to_float(x[j]) * to_float(x[j]);
  const float r = 1.0f / std::sqrt(squares / static_cast<float>(n) + epsilon);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) out[j] = weight[j] * (to_float(x[j]) * r);
  *inverse = r;
}

std::tuple<Tensor, Tensor> rms_norm(Tensor x, Tensor weight, double epsilon) {
  const int64_t n_tokens = x.size(0), n = x.size(1);
  Tensor out = torch::stable::new_empty(x, {n_tokens, n}, ScalarType::Float);
  Tensor inverse = torch::stable::new_empty(x, {n_tokens}, ScalarType::Float);
  const float *w = floats(weight), e = static_cast<float>(epsilon);
  float *outs = mutable_floats(out), *inverses = mutable_floats(inverse);
  of_dtype(x, x, [&](const auto* xs, auto*) {
    torch::stable::parallel_for(0, n_tokens, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) norm_row(xs + i * n, w, n, e, outs + i * n, inverses + i);
    });
  });
  return {out, inverse};
}

template <typename T>
void norm_row_gradient(const float* grad, const T* x, const float* weight, int64_t n, float r, T* of_x) {
  float along = 0.0f;
#pragma omp simd reduction(+ : along)
  for (int64_t j = 0; j < n; ++j) along += grad[j] * weight[j] * to_float(x[j]);
  const float back = along * r * r / static_cast<float>(n);
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) store(of_x + j, r * (grad[j] * weight[j] - back * to_float(x[j])));
}

Tensor rms_norm_gradient(Tensor grad, Tensor x, Tensor weight, Tensor inverse) {
  const int64_t n_tokens = x.size(0), n = x.size(1);
  Tensor result = torch::stable::empty_like(x);
  const float *grads = floats(grad), *w = floats(weight), *inverses = floats(inverse);
  of_dtype(x, result, [&](const auto* xs, auto* of_xs) {
    torch::stable::parallel_for(0, n_tokens, kGrain, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        norm_row_gradient(grads + i * n, xs + i * n, w, n, inverses[i], of_xs + i * n);
      }
    });
  });
  return result;
}

inline float sigmoid(float x) {
  const float e = exp_of_negative(x < 0.0f ? x : -x), share = 1.0f / (1.0f + e);
  return x < 0.0f ? e * share : share;
}

Tensor gated(Tensor gate, Tensor up) {
  const int64_t n_tokens = gate.size(0), n = gate.size(1);
  Tensor result = torch::stable::empty_like(gate);
  const uint16_t *gates = halves(gate), *ups = halves(up);
  uint16_t* out = mutable_halves(result);
  torch::stable::parallel_for(0, n_tokens, kGrain, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t j = begin * n; j < end * n; ++j) {
      const float g = to_float(gates[j]);
      store(out + j, g * sigmoid(g) * to_float(ups[j]));
    }
  });
  return result;
}

std::tuple<Tensor, Tensor> gated_gradients(Tensor grad, Tensor gate, Tensor up) {
  const int64_t n_tokens = gate.size(0), n = gate.size(1);
  Tensor of_gate = torch::stable::empty_like(gate), of_up = torch::stable::empty_like(up);
  const uint16_t *grads = halves(grad), *gates = halves(gate), *ups = halves(up);
  uint16_t *to_gate = mutable_halves(of_gate), *to_up = mutable_halves(of_up);
  torch::stable::parallel_for(0, n_tokens, kGrain, [&](int64_t begin, int64_t end) {
#pragma omp simd
    for (int64_t j = begin * n; j < end * n; ++j) {
      const float out = to_float(grads[j]), g = to_float(gates[j]), s = sigmoid(g);
      store(to_gate + j, out * to_float(ups[j]) * (s * (1.0f + g * (1.0f - s))));
      store(to_up + j, out * (g * s));
    }
  });
  return {of_gate, of_up};
}

// Rotates pairs of features of each head by their position's angle, back if inverse: from [batch, seq, heads, width]
// to [batch, heads, seq, width], or the other way round if inverse.
Tensor rotate(Tensor x, Tensor cosines, Tensor sines, bool inverse) {
  const int64_t batch = x.size(0), seq = x.size(inverse ? 2 : 1), heads = x.size(inverse ? 1 : 2), width = x.size(3);
  const int64_t half = width / 2, shared = cosines.size(0) == 1 ? 0 : seq * width;
  STD_TORCH_CHECK(cosines.size(1) == seq && cosines.size(2) == width, "angles are of other positions");
  Tensor result = inverse ? torch::stable::new_empty(x, {batch, seq, heads, width})
                          : torch::stable::new_empty(x, {batch, heads, seq, width});
  const uint16_t* from = halves(x);
  uint16_t* to = mutable_halves(result);
  const float *cosine = floats(cosines), *sine = floats(sines);
  torch::stable::parallel_for(0, batch * seq, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t token = begin; token < end; ++token) {
      const int64_t b = token / seq, i = token % seq;
      const float *c = cosine + b * shared + i * width, *s = sine + b * shared + i * width;
      for (int64_t h = 0; h < heads; ++h) {
        const int64_t flat = (token * heads + h) * width, by_head = ((b * heads + h) * seq + i) * width;
        const uint16_t* in = from + (inverse ? by_head : flat);
        uint16_t* out = to + (inverse ? flat : by_head);
#pragma omp simd
        for (int64_t j = 0; j < half; ++j) {
          const float first = to_float(in[j]), second = to_float(in[j + half]);
          const float s1 = inverse ? -s[j + half] : s[j], s2 = inverse ? -s[j] : s[j + half];
          store(out + j, first * c[j] - second * s1);
          store(out + j + half, second * c[j + half] + first * s2);
        }
      }
    }
  });
  return result;
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ptq161, m) {
  m.def("rms_norm(Tensor x, Tensor weight, float epsilon) -> (Tensor, Tensor)");
  m.def("rms_norm_gradient(Tensor grad, Tensor x, Tensor weight, Tensor inverse) -> Tensor");
  m.def("gated(Tensor gate, Tensor up) -> Tensor");
  m.def("gated_gradients(Tensor grad, Tensor gate, Tensor up) -> (Tensor, Tensor)");
  m.def("rotate(Tensor x, Tensor cosines, Tensor sines, bool inverse) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ptq161, CPU, m) {
  m.impl("rms_norm", TORCH_BOX(&rms_norm));
  m.impl("rms_norm_gradient", TORCH_BOX(&rms_norm_gradient));
  m.impl("gated", TORCH_BOX(&gated));
  m.impl("gated_gradients", TORCH_BOX(&gated_gradients));
  m.impl("rotate", TORCH_BOX(&rotate));
}
