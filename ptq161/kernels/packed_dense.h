// The dense form of a packed weight, bit by bit what its format's `dequantize()` gives.

#pragma once

#include "float_rows.h"
#include "packed_weight.h"

#include <cstring>

namespace packed_rows {

// What n codes at `bytes` stand for; 8 codes are as many bytes as a code has bits.
template <int B>
void values_of(const float* values, const uint8_t* bytes, int64_t n, float* to) {
  constexpr uint32_t mask = (1u << B) - 1;
  for (; n >= 8; n -= 8, bytes += B, to += 8) {
    uint32_t word = 0;
    std::memcpy(&word, bytes, B);
    for (int k = 0; k < 8; ++k) to[k] = values[word >> (B * k) & mask];
  }
  uint32_t word = 0;
  std::memcpy(&word, bytes, static_cast<size_t>((n * B + 7) / 8));
  for (int64_t k = 0; k < n; ++k) to[k] = values[word >> (B * k) & mask];
}

// The columns of a segment: their places in the weight, and their factors side by side.
struct Places {
  std::vector<int32_t> columns;
  std::vector<float> factor;
  bool together = true;  // one behind the other
};

inline std::vector<Places> places_of(const Weight& w) {
  std::vector<Places> places(w.segments.size());
  for (int64_t j = 0; j < w.columns; ++j) {
    Places& p = places[w.segment_of[j]];
    p.together = p.together && (p.columns.empty() || p.columns.back() == j - 1);
    p.columns.push_back(static_cast<int32_t>(j));
    p.factor.push_back(w.divisor.empty() ? w.factor[j] : w.divisor[j]);
  }
  return places;
}

// Columns of row o in a segment; `buffer` has room for them.
inline void dense_segment(const Segment& s, const Places& p, bool divide, int64_t o, float* buffer, float* row) {
  float values[16];
  for (int c = 0; c < 1 << s.bits; ++c) values[c] = s.value(o, c);
  float* to = p.together && s.n > 0 ? row + p.columns[0] : buffer;
  const uint8_t* bytes = s.codes + o * s.row_bytes;
  switch (s.bits) {
    case 1: values_of<1>(values, bytes, s.n, to); break;
    case 2: values_of<2>(values, bytes, s.n, to); break;
    case 3: values_of<3>(values, bytes, s.n, to); break;
    default: values_of<4>(values, bytes, s.n, to); break;
  }
  const float* factor = p.factor.data();
  const float scale = s.scales_factor ? s.scale[o] : 1.0f;
  if (divide) {
#pragma omp simd
    for (int64_t j = 0; j < s.n; ++j) to[j] /= factor[j];
  } else {
#pragma omp simd
    for (int64_t j = 0; j < s.n; ++j) to[j] *= scale * factor[j];
  }
  if (to == buffer) {
    for (int64_t j = 0; j < s.n; ++j) row[p.columns[j]] = buffer[j];
  }
}

template <typename T>
void dense_rows(const Weight& w, T* to) {
  const std::vector<Places> places = places_of(w);
  const int64_t n = w.columns, grain = std::max<int64_t>(1, kGrainWeights / 8 / std::max<int64_t>(1, n));
  const float scale = w.scale;
  torch::stable::parallel_for(0, w.rows, grain, [&](int64_t begin, int64_t end) {
    std::vector<float> buffers(2 * n);
    float* row = buffers.data();
    for (int64_t o = begin; o < end; ++o) {
      for (size_t i = 0; i < w.segments.size(); ++i) {
        dense_segment(w.segments[i], places[i], !w.divisor.empty(), o, row + n, row);
      }
#pragma omp simd
      for (int64_t j = 0; j < n; ++j) store(to + o * n + j, row[j] * scale);
    }
  });
}

// The weight [rows, columns], bit by bit what the format's `dequantize()` gives; `codes` tells the device.
inline Tensor dense(const Weight& w, const Tensor& codes, ScalarType dtype) {
  return dense_of(codes, 0, w.rows, w.rows, w.columns, dtype, [&](auto* to) { dense_rows(w, to); });
}

}  // namespace packed_rows
