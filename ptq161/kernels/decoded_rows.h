// Products of a few rows with weights that are decoded row by row: a row is in the processor's first cache when it is
// multiplied, and is overwritten by the next.
//
// `decode(o, row)` writes row o of the weight [rows, columns] as the format's `values()` does, bit by bit; behind it
// are `kSlack` floats that it may overwrite.

#pragma once

#include "float_rows.h"
#include "planes.h"

#include <cstring>

namespace packed_rows {

constexpr int kLanes = 16, kSums = 4;
#if defined(__AVX512F__)
constexpr int kMostRows = 4;  // of x at once; processors with AVX-512 have registers for so many
#else
constexpr int kMostRows = 1;
#endif

// Products of a row with M rows of x, `stride` apart; the order of a sum depends on n alone.
template <int M>
void dot(const float* row, const float* x, int64_t stride, int64_t n, float* to, int64_t to_stride) {
  typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  Lanes sums[M][kSums] = {};
  int64_t j = 0;
  for (; j + kLanes * kSums <= n; j += kLanes * kSums) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      const Lanes part = *reinterpret_cast<const Lanes*>(row + j + s * kLanes);
#pragma GCC unroll 4
      for (int m = 0; m < M; ++m) {
        sums[m][s] += part * *reinterpret_cast<const Lanes*>(x + m * stride + j + s * kLanes);
      }
    }
  }
  for (int m = 0; m < M; ++m) {
    const Lanes sum = (sums[m][0] + sums[m][1]) + (sums[m][2] + sums[m][3]);
    float total = 0.0f;
    for (int i = 0; i < kLanes; ++i) total += sum[i];
    for (int64_t k = j; k < n; ++k) total += row[k] * x[m * stride + k];
    to[m * to_stride] = total;
  }
}

template <typename Decode>
Tensor decoded_product(const Tensor& x, const Optional& bias, int64_t rows, int64_t columns, double factor,
                       const Decode& decode) {
  return product_of(x, bias, rows, columns, [&](const float* from, float* to, int64_t n_rows) {
    const int64_t grain = std::max<int64_t>(1, kGrainWeights / 4 / std::max<int64_t>(1, columns * n_rows));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> row(columns + kSlack);
      for (int64_t o = begin; o < end; ++o) {
        decode(o, row.data());
        int64_t m = 0;
        for (; m + kMostRows <= n_rows; m += kMostRows) {
          dot<kMostRows>(row.data(), from + m * columns, columns, columns, to + m * rows + o, rows);
        }
        for (; m < n_rows; ++m) dot<1>(row.data(), from + m * columns, columns, columns, to + m * rows + o, rows);
        for (m = 0; m < n_rows; ++m) to[m * rows + o] *= static_cast<float>(factor);
      }
    });
  });
}

template <typename Decode>
Tensor decoded_dense(const Tensor& like, int64_t rows, int64_t columns, double factor, ScalarType dtype, int64_t start,
                     int64_t stop, const Decode& decode) {
  return dense_of(like, start, stop, rows, columns, dtype, [&](auto* to) {
    const int64_t grain = std::max<int64_t>(1, kGrainWeights / 4 / std::max<int64_t>(1, columns));
    torch::stable::parallel_for(start, stop, grain, [&](int64_t begin, int64_t end) {
      std::vector<float> row(columns + kSlack);
      for (int64_t o = begin; o < end; ++o) {
        decode(o, row.data());
        auto* target = to + (o - start) * columns;
        const float scale = static_cast<float>(factor);
#pragma omp simd
        for (int64_t j = 0; j < columns; ++j) store(target + j, row[j] * scale);
      }
    });
  });
}

// Bits, the first in the lowest of the first byte.
struct Bits {
  const uint8_t* data;
  int64_t nbytes;

  // 64 of them, zeros behind the last byte.
  uint64_t at(int64_t bit) const {
    const int64_t first = bit / 8;
    const int shift = static_cast<int>(bit % 8);
    uint64_t low = 0, high = 0;
    if (first + 9 <= nbytes) {
      std::memcpy(&low, data + first, 8);
      high = data[first + 8];
    } else if (first < nbytes) {
      std::memcpy(&low, data + first, static_cast<size_t>(std::min<int64_t>(8, nbytes - first)));
    }
    return shift == 0 ? low : low >> shift | high << (64 - shift);
  }
};

// A plane [rows, columns], or another number of bytes.
inline Bits bits_of(const Tensor& tensor, int64_t nbytes) {
  STD_TORCH_CHECK(tensor.numel() == nbytes, "a plane has another number of bytes than the weight");
  return {bytes(tensor), nbytes};
}

// Columns of one block, at most 64, and which of them belong to a set.
struct Span {
  int64_t first, n, block;
  uint64_t mask;
  int64_t before;  // members of the set among the columns in front
};

// `member(j)` tells whether column j belongs to the set.
template <typename Member>
std::vector<Span> spans_of(int64_t columns, int64_t block, const Member& member) {
  STD_TORCH_CHECK(block > 0, "blocks have columns");
  std::vector<Span> spans;
  int64_t before = 0;
  for (int64_t first = 0; first < columns;) {
    const int64_t n = std::min({int64_t{64}, columns - first, block - first % block});
    uint64_t mask = 0;
    for (int64_t j = 0; j < n; ++j) mask |= static_cast<uint64_t>(member(first + j)) << j;
    spans.push_back({first, n, first / block, mask, before});
    before += std::popcount(mask);
    first += n;
  }
  return spans;
}

}  // namespace packed_rows
