// Products of a few rows with weights that are decoded row by row: a row is in the processor's first cache when it is
// multiplied, and is overwritten by the next.
//
// `decode(o, row)` writes row o of the weight [rows, columns] as the format's `values()` does, bit by bit; behind it are
// `kSlack` floats that it may overwrite.

#pragma once

#include "float_rows.h"
#include "planes.h"

#include <cstring>

namespace packed_rows {

constexpr int kLanes = 16, kSums = 4;

// A sum whose order depends on n alone.
inline float dot(const float* a, const float* b, int64_t n) {
  typedef float Lanes __attribute__((vector_size(4 * kLanes), aligned(4), may_alias));
  Lanes sums[kSums] = {};
  int64_t j = 0;
  for (; j + kLanes * kSums <= n; j += kLanes * kSums) {
#pragma GCC unroll 4
    for (int s = 0; s < kSums; ++s) {
      sums[s] += *reinterpret_cast<const Lanes*>(a + j + s * kLanes) *
                 *reinterpret_cast<const Lanes*>(b + j + s * kLanes);
    }
  }
  const Lanes sum = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  float total = 0.0f;
  for (int i = 0; i < kLanes; ++i) total += sum[i];
  for (; j < n; ++j) total += a[j] * b[j];
  return total;
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
        for (int64_t m = 0; m < n_rows; ++m) {
          to[m * rows + o] = static_cast<float>(factor) * dot(row.data(), from + m * columns, columns);
        }
      }
    });
  });
}

template <typename Decode>
Tensor decoded_dense(const Tensor& like, int64_t rows, int64_t columns, double factor, bool bfloat16, int64_t start,
                     int64_t stop, const Decode& decode) {
  return dense_of(like, start, stop, rows, columns, bfloat16, [&](auto* to) {
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
