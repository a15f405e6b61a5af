// The divergence of two distributions given by logits, and its gradient: every logit is read once from memory.
// What is computed is told in divergence.py, beside the same in torch.

#include "bfloat16.h"
#include "exponential.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <cstdint>
#include <limits>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Writes logits - max and its exp; returns the sum of the latter.
template <typename T>
float exponentials(const T* logits, int64_t n, float* centered, float* exps) {
  float most = -std::numeric_limits<float>::infinity();
#pragma omp simd reduction(max : most)
  for (int64_t j = 0; j < n; ++j) {
    const float logit = to_float(logits[j]);
    most = logit > most ? logit : most;
  }
  float sum = 0.0f;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) {
    centered[j] = to_float(logits[j]) - most;
    exps[j] = exp_of_negative(centered[j]);
    sum += exps[j];
  }
  return sum;
}

template <typename T>
float divergence_of_row(const T* student, const T* teacher, T* gradient, int64_t n, float* buffer) {
  float *log_q = buffer, *q = buffer + n, *log_p = buffer + 2 * n, *p = buffer + 3 * n;
  const float sum_q = exponentials(student, n, log_q, q), sum_p = exponentials(teacher, n, log_p, p);
  const float share_q = 1.0f / sum_q, share_p = 1.0f / sum_p, shift = std::log(sum_q) - std::log(sum_p);
  float total = 0.0f;
#pragma omp simd reduction(+ : total)
  for (int64_t j = 0; j < n; ++j) {
    const float probability = p[j] * share_p;
    store(gradient + j, q[j] * share_q - probability);
    total += probability * ((log_p[j] - log_q[j]) + shift);
  }
  return total;
}

std::tuple<Tensor, Tensor> divergence(Tensor student, Tensor teacher) {
  const int64_t n_tokens = student.size(0), n = student.size(1);
  Tensor gradient = torch::stable::empty_like(student);
  Tensor totals = torch::stable::new_empty(student, {n_tokens}, ScalarType::Float);
  float* total = static_cast<float*>(totals.mutable_data_ptr());
  const auto fill = [&](const auto* s, const auto* t, auto* g) {
    torch::stable::parallel_for(0, n_tokens, 1, [&](int64_t begin, int64_t end) {
      std::vector<float> buffer(4 * n);
      for (int64_t i = begin; i < end; ++i) {
        total[i] = divergence_of_row(s + i * n, t + i * n, g + i * n, n, buffer.data());
      }
    });
  };
  if (student.scalar_type() == ScalarType::BFloat16) {
    fill(static_cast<const uint16_t*>(student.const_data_ptr()), static_cast<const uint16_t*>(teacher.const_data_ptr()),
         static_cast<uint16_t*>(gradient.mutable_data_ptr()));
  } else {
    fill(static_cast<const float*>(student.const_data_ptr()), static_cast<const float*>(teacher.const_data_ptr()),
         static_cast<float*>(gradient.mutable_data_ptr()));
  }
  return {totals, gradient};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ptq161, m) { m.def("divergence(Tensor student, Tensor teacher) -> (Tensor, Tensor)"); }

STABLE_TORCH_LIBRARY_IMPL(ptq161, CPU, m) { m.impl("divergence", TORCH_BOX(&divergence)); }
