// The weight of a linear whose codes are learned, and its gradients: one pass over the latents each.
// What is computed is told in latent.py, beside the same in torch.

#include "bfloat16.h"
#include "floats.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <tuple>
#include <vector>

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr float kSlack = 0.75f;    // cells outside of the grid within which a latent has a gradient
constexpr int64_t kChunkRows = 16;  // rows whose column sums are added up before those of other chunks

// What describes the columns of a weight, [in] each, and its rows, [out] each.
struct Grid {
  const float *levels, *center, *ranged, *step, *column;
  const float *row, *scale, *zero_point, *mean;
};

inline float code_of(float latent, float levels, float softness) {
  const float least = latent > 0.0f ? latent : 0.0f;
  const float soft = least < levels ? least : levels;
  const float nearest = std::nearbyint(soft);
  return softness == 0.0f ? nearest : nearest + softness * (soft - nearest);
}

template <typename T>
void weight_of_row(const Grid& g, const float* latent, T* weight, int64_t i, int64_t n, float softness) {
  // Read through the grid inside of the loop, they would keep it from becoming vector instructions.
  const float *levels = g.levels, *center = g.center, *is_ranged = g.ranged, *step = g.step, *column = g.column;
  const float row = g.row[i], scale = g.scale[i], zero_point = g.zero_point[i], mean = g.mean[i];
#pragma omp simd
  for (int64_t j = 0; j < n; ++j) {
    const bool ranged = is_ranged[j] != 0.0f;
    const float cell = ranged ? scale : row * (column[j] * step[j]);
    const float offset = ranged ? zero_point : center[j];
    const float shift = ranged ? 0.0f : mean * column[j];
    store(weight + j, cell * (code_of(latent[j], levels[j], softness) - offset) + shift);
  }
}

template <typename T>
void gradients_of_row(const Grid& g, const float* latent, const T* grad, int64_t i, int64_t n, float softness,
                      float* grad_latent, float* grad_row, float* grad_scale, float* grad_mean, float* grad_column) {
  // The compiler does not know that the sums below leave the grid's pointers as they are.
  const float *levels = g.levels, *center = g.center, *is_ranged = g.ranged, *step = g.step, *column = g.column;
  const float row = g.row[i], scale = g.scale[i], zero_point = g.zero_point[i], mean = g.mean[i];
  float of_row = 0.0f, of_scale = 0.0f, of_mean = 0.0f;
#pragma omp simd reduction(+ : of_row, of_scale, of_mean)
  for (int64_t j = 0; j < n; ++j) {
    const bool ranged = is_ranged[j] != 0.0f;
    const float cell = ranged ? scale : row * (column[j] * step[j]);
    const float offset = ranged ? zero_point : center[j];
    const float out = to_float(grad[j]);
    const float below = latent[j] < -kSlack ? 0.0f : cell;
    grad_latent[j] = out * (latent[j] > levels[j] + kSlack ? 0.0f : below);
    const float by_cell = out * (code_of(latent[j], levels[j], softness) - offset);
    const float scaled = ranged ? 0.0f : by_cell, shifted = ranged ? 0.0f : out;
    of_row += scaled * (column[j] * step[j]);
    of_scale += ranged ? by_cell : 0.0f;
    of_mean += shifted * column[j];
    grad_column[j] += row * step[j] * scaled + mean * shifted;
  }
  grad_row[i] = of_row;
  grad_scale[i] = of_scale;
  grad_mean[i] = of_mean;
}

Grid grid_of(const std::vector<Tensor>& columns, const std::vector<Tensor>& rows) {
  return {floats(columns[0]), floats(columns[1]), floats(columns[2]), floats(columns[3]), floats(columns[4]),
          floats(rows[0]),    floats(rows[1]),    floats(rows[2]),    floats(rows[3])};
}

Tensor latent_weight(Tensor latent, std::vector<Tensor> columns, std::vector<Tensor> rows, double softness,
                     bool bfloat16) {
  const int64_t n_rows = latent.size(0), n = latent.size(1);
  const auto dtype = bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor weight = torch::stable::new_empty(latent, {n_rows, n}, dtype);
  const Grid grid = grid_of(columns, rows);
  const float* from = floats(latent);
  const auto fill = [&](auto* to) {
    torch::stable::parallel_for(0, n_rows, kChunkRows, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        weight_of_row(grid, from + i * n, to + i * n, i, n, static_cast<float>(softness));
      }
    });
  };
  if (bfloat16) {
    fill(static_cast<uint16_t*>(weight.mutable_data_ptr()));
  } else {
    fill(mutable_floats(weight));
  }
  return weight;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> latent_gradients(Tensor grad, Tensor latent,
                                                                    std::vector<Tensor> columns,
                                                                    std::vector<Tensor> rows, double softness) {
  const int64_t n_rows = latent.size(0), n = latent.size(1), n_chunks = (n_rows + kChunkRows - 1) / kChunkRows;
  Tensor of_latent = torch::stable::new_empty(latent, {n_rows, n});
  Tensor of_row = torch::stable::new_empty(latent, {n_rows, 1});
  Tensor of_scale = torch::stable::new_empty(latent, {n_rows, 1});
  Tensor of_mean = torch::stable::new_empty(latent, {n_rows, 1});
  Tensor of_column = torch::stable::new_zeros(latent, {n});
  const Grid grid = grid_of(columns, rows);
  const float* from = floats(latent);
  std::vector<float> partial(n_chunks * n, 0.0f);
  const auto fill = [&](const auto* out) {
    torch::stable::parallel_for(0, n_chunks, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin * kChunkRows; i < std::min(end * kChunkRows, n_rows); ++i) {
        gradients_of_row(grid, from + i * n, out + i * n, i, n, static_cast<float>(softness),
                         mutable_floats(of_latent) + i * n, mutable_floats(of_row), mutable_floats(of_scale),
                         mutable_floats(of_mean), partial.data() + i / kChunkRows * n);
      }
    });
  };
  if (grad.scalar_type() == ScalarType::BFloat16) {
    fill(static_cast<const uint16_t*>(grad.const_data_ptr()));
  } else {
    fill(floats(grad));
  }
  // The order of these sums does not depend on the number of threads.
  float* sums = mutable_floats(of_column);
  for (int64_t chunk = 0; chunk < n_chunks; ++chunk) {
    for (int64_t j = 0; j < n; ++j) sums[j] += partial[chunk * n + j];
  }
  return {of_latent, of_row, of_scale, of_mean, of_column};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ptq161, m) {
  m.def("latent_weight(Tensor latent, Tensor[] columns, Tensor[] rows, float softness, bool bfloat16) -> Tensor");
  m.def(
      "latent_gradients(Tensor grad, Tensor latent, Tensor[] columns, Tensor[] rows, float softness)"
      " -> (Tensor, Tensor, Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ptq161, CPU, m) {
  m.impl("latent_weight", TORCH_BOX(&latent_weight));
  m.impl("latent_gradients", TORCH_BOX(&latent_gradients));
}
