// Products of a few rows with weights that are vectors of codebooks, and their dense form; the tensors are described in
// ptq161/packed/vector.py.
//
// A vector is v rows of one column: y[v rows] += x[column] * centroid, which is one multiplication and one addition of
// a processor's vectors for each index. Nothing is multiplied in advance: a table of x times centroids, of which each
// column has its own, would be larger than the indices that read it. Indices of a row of vectors are spread to the
// places of their centroids in a table of float32, which stays in the processor's cache.

#include "float_rows.h"
#include "indices.h"

#include <limits>

namespace {

using namespace packed_rows;

constexpr int64_t kBlock = 512;          // columns whose indices are spread at once, in the processor's first cache
constexpr int kSums = 4;                 // of a row of y at once: the next addition need not wait for the last
#if defined(__AVX512VL__)
constexpr int kMostRows = 4;  // of x at once; processors with AVX-512 have registers for so many
#else
constexpr int kMostRows = 2;
#endif

// A codebook for each group of columns, in float32. Indices behind its last centroid, which no weight has, stand for
// NaN.
struct Codebook {
  Indices indices;
  std::vector<float> table;  // [groups, 2**bits, lanes]

  Codebook(const Tensor& centroids, const Tensor& packed, int64_t n_rows, int64_t n_columns, int64_t lanes) {
    const int64_t groups = centroids.size(0), k = centroids.size(1), v = centroids.size(2);
    indices = indices_of(packed, (n_rows + v - 1) / v * n_columns, k);
    const Stored values = stored(centroids, groups * k * v);
    const int64_t entries = int64_t{1} << indices.bits;
    table.assign(groups * entries * lanes, 0.0f);
    for (int64_t g = 0; g < groups; ++g) {
      float* to = table.data() + g * entries * lanes;
      for (int64_t i = 0; i < k; ++i) {
        for (int64_t e = 0; e < v; ++e) to[i * lanes + e] = values[(g * k + i) * v + e];
      }
      std::fill(to + k * lanes, to + entries * lanes, std::numeric_limits<float>::quiet_NaN());
    }
  }
};

// Columns that share codebooks and the length of vectors.
struct Coded {
  int64_t v = 0, lanes = 0;  // rows of a vector, filled up
  std::vector<int32_t> columns;
  std::vector<uint32_t> groups;  // of the columns
  std::vector<Codebook> books;   // whose vectors are added

  void add_book(const Tensor& centroids, const Tensor& packed, int64_t n_rows) {
    STD_TORCH_CHECK(centroids.dim() == 3 && centroids.size(2) > 0, "centroids are not [groups, k, v]");
    STD_TORCH_CHECK(books.empty() || centroids.size(2) == v, "vectors that are added have several lengths");
    const int64_t most = groups.empty() ? 0 : *std::max_element(groups.begin(), groups.end());
    STD_TORCH_CHECK(most < centroids.size(0), "a column's codebook is missing");
    v = centroids.size(2);
    lanes = v <= 4 ? 4 : v <= 8 ? 8 : (v + 15) / 16 * 16;
    books.emplace_back(centroids, packed, n_rows, columns.size(), lanes);
  }

  // The places in the table of n vectors of a row of them, from column `first` on.
  void places(const Codebook& book, int64_t row, int64_t first, int64_t n, uint32_t* to) const {
    book.indices.read(row * static_cast<int64_t>(columns.size()) + first, n, to);
    const auto entries = uint32_t{1} << book.indices.bits, size = static_cast<uint32_t>(lanes);
    const uint32_t* group = groups.data() + first;
#pragma omp simd
    for (int64_t j = 0; j < n; ++j) to[j] = (to[j] + group[j] * entries) * size;
  }
};

struct VectorWeight {
  int64_t rows, columns;
  std::vector<Coded> parts;
  Stored column_scale, column_offset, row_scale;  // without data: none
  float factor;
};

VectorWeight weight_of(const Tensor& centroids, const Tensor& indices, const Optional& residual_centroids,
                       const Optional& residual_indices, const Optional& outlier_centroids,
                       const Optional& outlier_indices, const Optional& labels, const Optional& column_scale,
                       const Optional& column_offset, const Optional& row_scale, int64_t rows, int64_t columns,
                       int64_t outliers, double factor) {
  STD_TORCH_CHECK(centroids.dim() == 3 && centroids.size(0) > 0, "centroids are not [groups, k, v]");
  const int64_t groups = centroids.size(0);
  std::vector<uint32_t> label(columns);
  if (labels) {
    indices_of(*labels, columns, groups + (outliers > 0)).read(0, columns, label.data());
  } else {
    const int64_t n = std::max<int64_t>(1, (columns - outliers) / groups);
    for (int64_t j = 0; j < columns; ++j) {
      label[j] = static_cast<uint32_t>(j < outliers ? groups : std::min((j - outliers) / n, groups - 1));
    }
  }
  Coded main, outlier;
  for (int64_t j = 0; j < columns; ++j) {
    Coded& part = label[j] == groups ? outlier : main;
    part.columns.push_back(static_cast<int32_t>(j));
    part.groups.push_back(label[j] == groups ? 0 : label[j]);
  }
  STD_TORCH_CHECK(static_cast<int64_t>(outlier.columns.size()) == outliers,
                  "the labels name another number of outliers");
  main.add_book(centroids, indices, rows);
  if (residual_centroids && residual_indices) main.add_book(*residual_centroids, *residual_indices, rows);
  VectorWeight w{rows, columns, {}, {}, {}, {}, static_cast<float>(factor)};
  w.parts.push_back(std::move(main));
  STD_TORCH_CHECK((outliers > 0) == (outlier_centroids && outlier_indices), "the outliers have no vectors");
  if (outliers > 0) {
    outlier.add_book(*outlier_centroids, *outlier_indices, rows);
    w.parts.push_back(std::move(outlier));
  }
  if (column_scale && column_offset) {
    w.column_scale = stored(*column_scale, columns);
    w.column_offset = stored(*column_offset, columns);
  }
  if (row_scale) w.row_scale = stored(*row_scale, rows);
  return w;
}

template <int L>
struct Lanes {
  typedef float type __attribute__((vector_size(4 * L), aligned(4), may_alias));
};

// Adds, for M rows x [n, M], those times the centroids at n places to sums [M, lanes], of L rows of y each.
template <int L, int M>
void accumulate(const float* table, const uint32_t* places, int64_t n, const float* x, float* to, int64_t lanes) {
  using V = typename Lanes<L>::type;
  V sums[M][kSums] = {};
  int64_t j = 0;
  for (; j + kSums <= n; j += kSums) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      const V centroid = *reinterpret_cast<const V*>(table + places[j + s]);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) sums[m][s] += centroid * x[(j + s) * M + m];
    }
  }
  for (; j < n; ++j) {
    const V centroid = *reinterpret_cast<const V*>(table + places[j]);
    for (int m = 0; m < M; ++m) sums[m][0] += centroid * x[j * M + m];
  }
  for (int m = 0; m < M; ++m) {
    const V sum = (sums[m][0] + sums[m][1]) + (sums[m][2] + sums[m][3]);
    for (int i = 0; i < L; ++i) to[m * lanes + i] += sum[i];
  }
}

template <int M>
void accumulate(const float* table, const uint32_t* places, int64_t n, const float* x, float* to, int64_t lanes) {
  switch (lanes) {
    case 4: return accumulate<4, M>(table, places, n, x, to, lanes);
    case 8: return accumulate<8, M>(table, places, n, x, to, lanes);
    default:
      for (int64_t l = 0; l < lanes; l += 16) accumulate<16, M>(table + l, places, n, x, to + l, lanes);
  }
}

// y [M, rows] += x W^T for one kind of columns.
template <int M>
void add_part(const Coded& part, const float* x, int64_t stride, float* y, int64_t rows) {
  const auto n = static_cast<int64_t>(part.columns.size());
  const int64_t n_vectors = (rows + part.v - 1) / part.v;
  const int64_t grain = std::max<int64_t>(1, kGrainWeights / std::max<int64_t>(1, part.v * n * M));
  std::vector<float> gathered(n * M);
  for (int64_t j = 0; j < n; ++j) {
    for (int m = 0; m < M; ++m) gathered[j * M + m] = x[m * stride + part.columns[j]];
  }
  torch::stable::parallel_for(0, n_vectors, grain, [&](int64_t begin, int64_t end) {
    uint32_t places[kBlock];
    std::vector<float> sums(M * part.lanes);
    for (int64_t r = begin; r < end; ++r) {
      std::fill(sums.begin(), sums.end(), 0.0f);
      for (const Codebook& book : part.books) {
        for (int64_t first = 0; first < n; first += kBlock) {
          const int64_t size = std::min(kBlock, n - first);
          part.places(book, r, first, size, places);
          accumulate<M>(book.table.data(), places, size, gathered.data() + first * M, sums.data(), part.lanes);
        }
      }
      const int64_t first = r * part.v, last = std::min(rows, first + part.v);
      for (int64_t m = 0; m < M; ++m) {
        for (int64_t o = first; o < last; ++o) y[m * rows + o] += sums[m * part.lanes + o - first];
      }
    }
  });
}

void multiply(const VectorWeight& w, const float* x, float* y, int64_t n_rows) {
  std::vector<float> scaled, added(n_rows, 0.0f);
  if (w.column_scale.data != nullptr) {
    scaled.resize(n_rows * w.columns);
    for (int64_t m = 0; m < n_rows; ++m) {
      for (int64_t j = 0; j < w.columns; ++j) {
        const float value = x[m * w.columns + j];
        scaled[m * w.columns + j] = value * w.column_scale[j];
        added[m] += value * w.column_offset[j];
      }
    }
    x = scaled.data();
  }
  std::fill_n(y, n_rows * w.rows, 0.0f);
  for (const Coded& part : w.parts) {
    int64_t m = 0;
    for (; m + kMostRows <= n_rows; m += kMostRows) {
      add_part<kMostRows>(part, x + m * w.columns, w.columns, y + m * w.rows, w.rows);
    }
    for (; m < n_rows; ++m) add_part<1>(part, x + m * w.columns, w.columns, y + m * w.rows, w.rows);
  }
  for (int64_t m = 0; m < n_rows; ++m) {
    for (int64_t o = 0; o < w.rows; ++o) {
      const float scale = w.row_scale.data == nullptr ? 1.0f : w.row_scale[o];
      y[m * w.rows + o] = w.factor * scale * (y[m * w.rows + o] + added[m]);
    }
  }
}

// Rows `start` to `stop`, rounded step by step as `values()` is.
template <typename T>
void dense_rows(const VectorWeight& w, int64_t start, int64_t stop, T* to) {
  const int64_t n = w.columns;
  std::vector<float> scale(n), offset(n);
  if (w.column_scale.data != nullptr) {
    for (int64_t j = 0; j < n; ++j) {
      scale[j] = w.column_scale[j];
      offset[j] = w.column_offset[j];
    }
  }
  const int64_t grain = std::max<int64_t>(1, kGrainWeights / 8 / std::max<int64_t>(1, n));
  torch::stable::parallel_for(start, stop, grain, [&](int64_t begin, int64_t end) {
    std::vector<std::vector<uint32_t>> places;
    for (const Coded& part : w.parts) {
      places.resize(places.size() + part.books.size(), std::vector<uint32_t>(part.columns.size()));
    }
    std::vector<float> values(n), merged(w.parts.size() > 1 ? n : 0);
    float* row = merged.empty() ? values.data() : merged.data();
    for (int64_t o = begin; o < end; ++o) {
      size_t b = 0;
      for (const Coded& part : w.parts) {
        const int64_t vector = o / part.v, element = o % part.v;
        const auto n_part = static_cast<int64_t>(part.columns.size());
        for (size_t i = 0; i < part.books.size(); ++i, ++b) {
          uint32_t* at = places[b].data();
          if (o == begin || element == 0) part.places(part.books[i], vector, 0, n_part, at);
          const float* table = part.books[i].table.data() + element;
          if (i == 0) {
            for (int64_t j = 0; j < n_part; ++j) values[j] = table[at[j]];
          } else {
            for (int64_t j = 0; j < n_part; ++j) values[j] += table[at[j]];
          }
        }
        if (w.parts.size() > 1) {
          for (int64_t j = 0; j < n_part; ++j) row[part.columns[j]] = values[j];
        }
      }
      if (w.column_scale.data != nullptr) {
#pragma omp simd
        for (int64_t j = 0; j < n; ++j) row[j] = row[j] * scale[j] + offset[j];
      }
      const float by_row = w.row_scale.data == nullptr ? 1.0f : w.row_scale[o];
      T* target = to + (o - start) * n;
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) store(target + j, row[j] * by_row * w.factor);
    }
  });
}

Tensor vector_rows(Tensor x, Tensor centroids, Tensor indices, Optional residual_centroids, Optional residual_indices,
                   Optional outlier_centroids, Optional outlier_indices, Optional labels, Optional column_scale,
                   Optional column_offset, Optional row_scale, Optional bias, int64_t rows, int64_t columns,
                   int64_t outliers, double factor) {
  const VectorWeight w =
      weight_of(centroids, indices, residual_centroids, residual_indices, outlier_centroids, outlier_indices, labels,
                column_scale, column_offset, row_scale, rows, columns, outliers, factor);
  return product_of(x, bias, rows, columns,
                    [&](const float* from, float* to, int64_t n_rows) { multiply(w, from, to, n_rows); });
}

Tensor vector_dense(Tensor centroids, Tensor indices, Optional residual_centroids, Optional residual_indices,
                    Optional outlier_centroids, Optional outlier_indices, Optional labels, Optional column_scale,
                    Optional column_offset, Optional row_scale, int64_t rows, int64_t columns, int64_t outliers,
                    double factor, ScalarType dtype, int64_t start, int64_t stop) {
  const VectorWeight w =
      weight_of(centroids, indices, residual_centroids, residual_indices, outlier_centroids, outlier_indices, labels,
                column_scale, column_offset, row_scale, rows, columns, outliers, factor);
  return dense_of(indices, start, stop, rows, columns, dtype, [&](auto* to) { dense_rows(w, start, stop, to); });
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ptq161, m) {
  m.def(
      "vector_rows(Tensor x, Tensor centroids, Tensor indices, Tensor? residual_centroids, Tensor? residual_indices, "
      "Tensor? outlier_centroids, Tensor? outlier_indices, Tensor? labels, Tensor? column_scale, "
      "Tensor? column_offset, Tensor? row_scale, Tensor? bias, int out_features, int in_features, int outliers, "
      "float factor) -> Tensor");
  m.def(
      "vector_dense(Tensor centroids, Tensor indices, Tensor? residual_centroids, Tensor? residual_indices, "
      "Tensor? outlier_centroids, Tensor? outlier_indices, Tensor? labels, Tensor? column_scale, "
      "Tensor? column_offset, Tensor? row_scale, int out_features, int in_features, int outliers, float factor, "
      "ScalarType dtype, int start, int stop) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ptq161, CPU, m) {
  m.impl("vector_rows", TORCH_BOX(&vector_rows));
  m.impl("vector_dense", TORCH_BOX(&vector_dense));
}
