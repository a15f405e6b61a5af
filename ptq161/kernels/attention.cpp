// Softmax over the past of each query, and its gradient: one pass over the scores each, in their own memory.
// What is computed is told in attention.py, beside the same in torch.

#include "bfloat16.h"
#include "exponential.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <limits>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrain = 16;  // rows of one task at least
constexpr int64_t kLanes = 16;  // values of a loop without a rest, whatever the vectors of the processor

// Scores [n, rows, columns] in bfloat16; row r is that of position first + r % period, which sees the keys up to it.
struct Rows {
  uint16_t* data;
  int64_t n, columns, first, period;

  Rows(const Tensor& tensor, int64_t first, int64_t period) : first(first), period(period) {
    STD_TORCH_CHECK(tensor.is_contiguous() && tensor.scalar_type() == ScalarType::BFloat16, "scores are not bfloat16");
    STD_TORCH_CHECK(tensor.size(1) % period == 0 && first + period <= tensor.size(2), "scores lack keys");
    data = static_cast<uint16_t*>(tensor.mutable_data_ptr());
    n = tensor.size(0) * tensor.size(1);
    columns = tensor.size(2);
  }
  uint16_t* row(int64_t r) const { return data + r * columns; }
  int64_t seen(int64_t r) const { return first + r % period + 1; }  // the rows of a batch are whole periods
  int64_t read(int64_t seen) const { return std::min((seen + kLanes - 1) / kLanes * kLanes, columns); }
};

// Leaves of kLanes values the first ones, of keys that are seen.
void forget(float* values, int32_t seen) {
  for (int32_t l = 0; l < kLanes; ++l) values[l] = l < seen ? values[l] : -std::numeric_limits<float>::infinity();
}

// The largest of n values, n a multiple of kLanes.
float largest(const float* values, int64_t n) {
  float most[kLanes];
  std::copy(values, values + kLanes, most);
  for (int64_t j = kLanes; j < n; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) most[l] = values[j + l] > most[l] ? values[j + l] : most[l];
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) most[l] = most[l + half] > most[l] ? most[l + half] : most[l];
  }
  return most[0];
}

// Replaces n values by exp(value - most), n a multiple of kLanes; returns their sum.
float exponentials(float* values, int64_t n, float most) {
  float sums[kLanes] = {};
  for (int64_t j = 0; j < n; j += kLanes) {
    for (int64_t l = 0; l < kLanes; ++l) {
      values[j + l] = exp_of_negative(values[j + l] - most);
      sums[l] += values[j + l];
    }
  }
  for (int64_t half = kLanes / 2; half > 0; half /= 2) {
    for (int64_t l = 0; l < half; ++l) sums[l] += sums[l + half];
  }
  return sums[0];
}

void causal_softmax(Tensor scores, int64_t first, int64_t period, double scale) {
  const Rows rows(scores, first, period);
  const float factor = static_cast<float>(scale);
  torch::stable::parallel_for(0, rows.n, kGrain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffer(rows.columns + kLanes);
    float* values = buffer.data();
    for (int64_t r = begin; r < end; ++r) {
      uint16_t* row = rows.row(r);
      const int64_t seen = rows.seen(r), read = rows.read(seen);
      const int64_t whole = (seen + kLanes - 1) / kLanes * kLanes;
      for (int64_t j = 0; j < read; ++j) values[j] = to_float(row[j]) * factor;
      forget(values + whole - kLanes, seen - whole + kLanes);
      const float share = 1.0f / exponentials(values, whole, largest(values, whole));
      for (int64_t j = 0; j < read; ++j) store(row + j, values[j] * share);
      std::fill(row + seen, row + rows.columns, uint16_t{0});
    }
  });
}

void causal_softmax_gradient(Tensor gradient, Tensor probabilities, int64_t first, int64_t period, double scale) {
  const Rows rows(gradient, first, period), shares(probabilities, first, period);
  STD_TORCH_CHECK(rows.n == shares.n && rows.columns == shares.columns, "shapes differ");
  const float factor = static_cast<float>(scale);
  torch::stable::parallel_for(0, rows.n, kGrain, [&](int64_t begin, int64_t end) {
    for (int64_t r = begin; r < end; ++r) {
      uint16_t* row = rows.row(r);
      const uint16_t* share = shares.row(r);
      const int64_t read = rows.read(rows.seen(r));  // probabilities of the future are zero
      float expected = 0.0f;
#pragma omp simd reduction(+ : expected)
      for (int64_t j = 0; j < read; ++j) expected += to_float(row[j]) * to_float(share[j]);
#pragma omp simd
      for (int64_t j = 0; j < read; ++j) {
        store(row + j, (to_float(row[j]) - expected) * (to_float(share[j]) * factor));
      }
      std::fill(row + read, row + rows.columns, uint16_t{0});
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ptq161, m) {
  m.def("causal_softmax(Tensor(a!) scores, int first, int period, float scale) -> ()");
  m.def("causal_softmax_gradient(Tensor(a!) gradient, Tensor probabilities, int first, int period, float scale) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(ptq161, CPU, m) {
  m.impl("causal_softmax", TORCH_BOX(&causal_softmax));
  m.impl("causal_softmax_gradient", TORCH_BOX(&causal_softmax_gradient));
}
