// A codebook and its vectors: which centroid is the nearest, the sums over each centroid's vectors, and the weight that
// packed indices stand for, with its gradient. What is computed is told in codebook.py, beside the same in torch.

#include "floats.h"
#include "indices.h"

#include <atomic>
#include <cmath>
#include <limits>
#include <tuple>

namespace {

using packed_rows::Indices;
using packed_rows::indices_of;
using packed_rows::Optional;
using packed_rows::ScalarType;
using packed_rows::Tensor;

constexpr int64_t kBlock = 32;               // vectors whose distances are held in registers
constexpr int64_t kGrainProducts = 1 << 18;  // that a thread is woken for
constexpr int64_t kParts = 16;               // of a sum: its order does not depend on the number of threads

const int64_t* integers(const Tensor& tensor) { return static_cast<const int64_t*>(tensor.const_data_ptr()); }

// Sums `size` numbers over n things: `add(sums, begin, end)` adds those of some things.
template <typename Add>
std::vector<double> summed(int64_t n, int64_t size, const Add& add) {
  std::vector<double> parts(kParts * size, 0.0);
  torch::stable::parallel_for(0, kParts, 1, [&](int64_t begin, int64_t end) {
    for (int64_t p = begin; p < end; ++p) add(parts.data() + p * size, p * n / kParts, (p + 1) * n / kParts);
  });
  std::vector<double> totals(size, 0.0);
  for (int64_t p = 0; p < kParts; ++p) {
    for (int64_t i = 0; i < size; ++i) totals[i] += parts[p * size + i];
  }
  return totals;
}

// For kBlock vectors, [v][kBlock], the centroid c with the largest x c - c^2 / 2. kLength is v, or 0 for any.
template <int64_t kLength>
void nearest_of_block(const float* x, const float* centroids, const float* half, int64_t k, int64_t v, int32_t* found) {
  float best[kBlock];
  std::fill_n(best, kBlock, -std::numeric_limits<float>::infinity());
  std::fill_n(found, kBlock, 0);
  const int64_t length = kLength ? kLength : v;
  for (int64_t c = 0; c < k; ++c) {
    float closeness[kBlock];
    std::fill_n(closeness, kBlock, half[c]);
    for (int64_t d = 0; d < length; ++d) {
      const float value = centroids[c * length + d];
#pragma omp simd
      for (int64_t b = 0; b < kBlock; ++b) closeness[b] = std::fma(x[d * kBlock + b], value, closeness[b]);
    }
#pragma omp simd
    for (int64_t b = 0; b < kBlock; ++b) {
      const bool better = closeness[b] > best[b];
      best[b] = better ? closeness[b] : best[b];
      found[b] = better ? static_cast<int32_t>(c) : found[b];
    }
  }
}

Tensor nearest(Tensor vectors, Tensor centroids) {
  const int64_t n = vectors.size(0), v = vectors.size(1), k = centroids.size(0);
  Tensor result = torch::stable::new_empty(vectors, {n}, ScalarType::Long);
  auto* indices = static_cast<int64_t*>(result.mutable_data_ptr());
  const float *from = floats(vectors), *table = floats(centroids);
  std::vector<float> half(k);
  for (int64_t c = 0; c < k; ++c) {
    float square = 0.0f;
    for (int64_t d = 0; d < v; ++d) square += table[c * v + d] * table[c * v + d];
    half[c] = square / -2.0f;
  }
  const auto of_block = v == 4   ? nearest_of_block<4>
                        : v == 6 ? nearest_of_block<6>
                        : v == 8 ? nearest_of_block<8>
                                 : nearest_of_block<0>;
  const int64_t blocks = (n + kBlock - 1) / kBlock, grain = 1 + kGrainProducts / (kBlock * v * k);
  torch::stable::parallel_for(0, blocks, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> x(v * kBlock);
    int32_t found[kBlock];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t first = block * kBlock, count = std::min(kBlock, n - first);
      for (int64_t b = 0; b < count; ++b) {
        for (int64_t d = 0; d < v; ++d) x[d * kBlock + b] = from[(first + b) * v + d];
      }
      of_block(x.data(), table, half.data(), k, v, found);
      std::copy_n(found, count, indices + first);
    }
  });
  return result;
}

std::tuple<Tensor, Tensor> cluster_sums(Tensor vectors, Tensor weights, Tensor labels, int64_t k) {
  const int64_t n = vectors.size(0), v = vectors.size(1);
  Tensor masses = torch::stable::new_empty(weights, {k}), sums = torch::stable::new_empty(weights, {k, v});
  const float* from = floats(vectors);
  const auto* weight = static_cast<const double*>(weights.const_data_ptr());
  const int64_t* label = integers(labels);
  const auto totals = summed(n, k * (v + 1), [&](double* mass, int64_t begin, int64_t end) {
    double* sum = mass + k;
    for (int64_t i = begin; i < end; ++i) {
      mass[label[i]] += weight[i];
      for (int64_t d = 0; d < v; ++d) sum[label[i] * v + d] += weight[i] * static_cast<double>(from[i * v + d]);
    }
  });
  std::copy_n(totals.begin(), k, static_cast<double*>(masses.mutable_data_ptr()));
  std::copy_n(totals.begin() + k, k * v, static_cast<double*>(sums.mutable_data_ptr()));
  return {masses, sums};
}

// The columns of a weight as vectors of codebooks, row of vectors by row of vectors.
struct Coded {
  Indices indices;
  std::vector<uint32_t> first;  // of each column's codebook in the table
  int64_t columns;
  uint32_t last;  // place in the table
  mutable std::atomic<bool> beyond = false;

  Coded(const Tensor& packed, const Optional& groups, int64_t columns, int64_t rows, int64_t size, int64_t entries)
      : indices(indices_of(packed, rows * columns, size)), first(columns, 0), columns(columns), last(entries - 1) {
    for (int64_t j = 0; groups && j < columns; ++j) first[j] = static_cast<uint32_t>(integers(*groups)[j] * size);
  }

  // Writes the places in the table of a row of vectors.
  void read(int64_t row, uint32_t* to) const {
    indices.read(row * columns, columns, to);
    uint32_t most = 0;
#pragma omp simd reduction(max : most)
    for (int64_t j = 0; j < columns; ++j) {
      to[j] += first[j];
      most = std::max(most, to[j]);
    }
    if (most <= last) return;
    beyond = true;
    std::fill_n(to, columns, 0u);
  }

  void check() const { STD_TORCH_CHECK(!beyond, "an index is beyond its codebook"); }
};

// The table with its entries as columns: [v][entries].
std::vector<float> by_row_of(const Tensor& table) {
  const int64_t entries = table.size(0), v = table.size(1);
  std::vector<float> by_row(entries * v);
  for (int64_t c = 0; c < entries; ++c) {
    for (int64_t d = 0; d < v; ++d) by_row[d * entries + c] = floats(table)[c * v + d];
  }
  return by_row;
}

Tensor codebook_weight(Tensor table, Tensor packed, Optional groups, Optional row_scale, int64_t size, int64_t out,
                       int64_t columns) {
  const int64_t entries = table.size(0), v = table.size(1), rows = (out + v - 1) / v;
  const Coded coded(packed, groups, columns, rows, size, entries);
  Tensor result = torch::stable::new_empty(table, {out, columns});
  float* weight = mutable_floats(result);
  const float* scales = row_scale ? floats(*row_scale) : nullptr;
  const auto by_row = by_row_of(table);
  const int64_t grain = 1 + packed_rows::kGrainWeights / (v * columns + 1);
  torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<uint32_t> at(columns);
    for (int64_t row = begin; row < end; ++row) {
      coded.read(row, at.data());
      for (int64_t d = 0; d < std::min(v, out - row * v); ++d) {
        float* to = weight + (row * v + d) * columns;
        const float* values = by_row.data() + d * entries;
        const float scale = scales ? scales[row * v + d] : 1.0f;
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) to[j] = values[at[j]] * scale;
      }
    }
  });
  coded.check();
  return result;
}

std::tuple<Tensor, Tensor> codebook_gradients(Tensor grad, Tensor table, Tensor packed, Optional groups,
                                              Optional row_scale, int64_t size) {
  const int64_t out = grad.size(0), columns = grad.size(1), entries = table.size(0), v = table.size(1);
  const int64_t rows = (out + v - 1) / v;
  const Coded coded(packed, groups, columns, rows, size, entries);
  Tensor of_table = torch::stable::empty_like(table), of_rows = torch::stable::new_empty(grad, {out, 1});
  float* of_row = mutable_floats(of_rows);
  const float *from = floats(grad), *scales = row_scale ? floats(*row_scale) : nullptr;
  const auto by_row = by_row_of(table);
  const auto totals = summed(rows, entries * v, [&](double* sums, int64_t begin, int64_t end) {
    std::vector<uint32_t> at(columns);
    for (int64_t row = begin; row < end; ++row) {
      coded.read(row, at.data());
      for (int64_t d = 0; d < std::min(v, out - row * v); ++d) {
        const int64_t o = row * v + d;
        const float *g = from + o * columns, *values = by_row.data() + d * entries;
        const float scale = scales ? scales[o] : 1.0f;
        float product = 0.0f;
#pragma omp simd reduction(+ : product)
        for (int64_t j = 0; j < columns; ++j) product += g[j] * values[at[j]];
        of_row[o] = product;
        for (int64_t j = 0; j < columns; ++j) sums[at[j] * v + d] += static_cast<double>(g[j] * scale);
      }
    }
  });
  coded.check();
  std::copy_n(totals.begin(), entries * v, mutable_floats(of_table));
  return {of_table, of_rows};
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ptq161, m) {
  m.def("nearest(Tensor vectors, Tensor centroids) -> Tensor");
  m.def("cluster_sums(Tensor vectors, Tensor weights, Tensor labels, int k) -> (Tensor, Tensor)");
  m.def(
      "codebook_weight(Tensor table, Tensor packed, Tensor? groups, Tensor? row_scale, int size, int out, int columns) "
      "-> Tensor");
  m.def(
      "codebook_gradients(Tensor grad, Tensor table, Tensor packed, Tensor? groups, Tensor? row_scale, int size) "
      "-> (Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(ptq161, CPU, m) {
  m.impl("nearest", TORCH_BOX(&nearest));
  m.impl("cluster_sums", TORCH_BOX(&cluster_sums));
  m.impl("codebook_weight", TORCH_BOX(&codebook_weight));
  m.impl("codebook_gradients", TORCH_BOX(&codebook_gradients));
}
