// Products of a few rows with a packed weight: y = x W^T, W read from its bytes.
//
// A segment adds scale[o] * (codes of row o times v) + shift[o] * sum(v) to y[o], v = factor * x over its columns. With
// eight-bit activations v is rounded to 127 steps to either side, per row of x and segment.

#pragma once

#include "float_rows.h"
#include "packed_dot.h"
#include "packed_weight.h"
#if defined(__x86_64__)
#include "packed_avx2.h"
#include "packed_avx512.h"
#endif

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

namespace packed_rows {

// Instruction sets in rising order; each holds as many rows of the weight in registers as it has room for.
enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

struct Portable {
  static constexpr int most = 1;  // rows of x at once
  template <int M> static constexpr int rows = 4;
  template <int B, int R, int M, typename D> static void dot(const D& d) { dot_portable<B, R, M>(d); }
};

#if defined(__x86_64__)
struct Avx2 {
  static constexpr int most = 4;
  template <int M> static constexpr int rows = M > 2 ? 2 : 4;
  template <int B, int R, int M, typename D> static void dot(const D& d) { dot_avx2<B, R, M>(d); }
};

struct Avx512 {
  static constexpr int most = 4;
  template <int M> static constexpr int rows = M > 1 ? 4 : 8;
  template <int B, int R, int M> static void dot(const FloatDot& d) { dot_avx512<B, R, M>(d); }
  template <int B, int R, int M> static void dot(const Int8Dot& d) { dot_vnni<B, R, M>(d); }
};
#endif

inline Level found_level(bool int8) {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
      (!int8 || __builtin_cpu_supports("avx512vnni"))) {
    return kAvx512;
  }
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return kAvx2;
#endif
  return kPortable;
}

// Some rows of x, segment by segment and in the order in which codes are taken.
template <typename X>
struct Vectors {
  std::vector<X> values;         // [M, stride]
  int64_t stride = 0;
  std::vector<int64_t> start;    // of each segment
  std::vector<float> scale, sum;  // [segments, M]: of a value; of the segment's values, scaled
};

inline int64_t chunks_of(const Segment& s) { return (s.n + chunk_codes(s.bits) - 1) / chunk_codes(s.bits); }

// Puts the n values of one segment of one row in place; returns scale and sum of what is placed.
template <int B>
void place(const float* v, int64_t n, float* to, float& scale, float& sum) {
  scale = 1.0f;
  double total = 0.0;  // of rotated rows it may be many times the products that it is subtracted from
  for (int64_t j = 0; j < n; ++j) {
    to[place_float<B>(j)] = v[j];
    total += v[j];
  }
  sum = static_cast<float>(total);
}

template <int B>
void place(const float* v, int64_t n, int8_t* to, float& scale, float& sum) {
  float most = 0.0f;
  bool finite = true;
  for (int64_t j = 0; j < n; ++j) {
    most = std::max(most, std::fabs(v[j]));
    finite = finite && std::isfinite(v[j]);
  }
  scale = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
  const float inverse = finite && most > 0.0f ? 127.0f / most : 0.0f;
  int64_t total = 0;
  for (int64_t j = 0; finite && j < n; ++j) {
    const auto q = static_cast<int8_t>(std::nearbyint(v[j] * inverse));
    to[place_int8<B>(j)] = q;
    total += q;
  }
  sum = scale * static_cast<float>(total);
}

template <typename X>
void place(int bits, const float* v, int64_t n, X* to, float& scale, float& sum) {
  switch (bits) {
    case 1: return place<1>(v, n, to, scale, sum);
    case 2: return place<2>(v, n, to, scale, sum);
    case 3: return place<3>(v, n, to, scale, sum);
    default: return place<4>(v, n, to, scale, sum);
  }
}

template <typename X>
Vectors<X> vectors_of(const Weight& w, const float* x, int64_t n_rows) {
  const size_t n_segments = w.segments.size();
  Vectors<X> v;
  std::vector<int64_t> first(n_segments);  // of each segment's columns, before they are placed
  int64_t columns = 0;
  for (size_t s = 0; s < n_segments; ++s) {
    v.start.push_back(v.stride);
    v.stride += chunks_of(w.segments[s]) * chunk_codes(w.segments[s].bits);
    first[s] = columns;
    columns += w.segments[s].n;
  }
  v.values.assign(n_rows * v.stride, X{0});
  v.scale.resize(n_segments * n_rows);
  v.sum.resize(n_segments * n_rows);
  std::vector<float> gathered(columns);
  std::vector<int64_t> next(n_segments);
  for (int64_t m = 0; m < n_rows; ++m) {
    next = first;
    for (int64_t j = 0; j < w.columns; ++j) {
      gathered[next[w.segment_of[j]]++] = x[m * w.columns + j] * w.factor[j];
    }
    for (size_t s = 0; s < n_segments; ++s) {
      const size_t i = s * n_rows + m;
      place(w.segments[s].bits, gathered.data() + first[s], w.segments[s].n,
            v.values.data() + m * v.stride + v.start[s], v.scale[i], v.sum[i]);
    }
  }
  return v;
}

template <typename Isa, int R, int M, typename D>
void dot(int bits, const D& d) {
  switch (bits) {
    case 1: return Isa::template dot<1, R, M>(d);
    case 2: return Isa::template dot<2, R, M>(d);
    case 3: return Isa::template dot<3, R, M>(d);
    default: return Isa::template dot<4, R, M>(d);
  }
}

// M rows of y.
template <typename Isa, typename X, int M>
void multiply(const Weight& w, const float* x, float* y) {
  constexpr int R = Isa::template rows<M>;
  using Sum = std::conditional_t<std::is_same_v<X, int8_t>, int32_t, float>;
  const Vectors<X> v = vectors_of<X>(w, x, M);
  const int64_t n_blocks = (w.rows + R - 1) / R;
  const int64_t grain = std::max<int64_t>(1, kGrainWeights / (R * M * std::max<int64_t>(1, w.columns)));
  torch::stable::parallel_for(0, n_blocks, grain, [&](int64_t begin, int64_t end) {
    for (int64_t o = begin * R; o < std::min(end * R, w.rows); o += R) {
      const int64_t last = std::min<int64_t>(o + R, w.rows) - 1;
      float total[R * M] = {};
      for (size_t s = 0; s < w.segments.size(); ++s) {
        const Segment& segment = w.segments[s];
        const uint8_t* rows[R];  // behind the last row, that row again
        for (int r = 0; r < R; ++r) rows[r] = segment.codes + std::min(o + r, last) * segment.row_bytes;
        Sum sums[R * M];
        const X* vectors = v.values.data() + v.start[s];
        dot<Isa, R, M>(segment.bits, Dot<X, Sum>{rows, segment.end, R * segment.row_bytes, chunks_of(segment),
                                                  vectors, v.stride, sums});
        for (int r = 0; r <= last - o; ++r) {
          float a, b;
          segment.terms(o + r, a, b);
          for (int m = 0; m < M; ++m) {
            const size_t i = s * M + m;
            total[r * M + m] += a * v.scale[i] * static_cast<float>(sums[r * M + m]) + b * v.sum[i];
          }
        }
      }
      for (int r = 0; r <= last - o; ++r) {
        for (int m = 0; m < M; ++m) y[m * w.rows + o + r] = w.scale * total[r * M + m];
      }
    }
  });
}

template <typename Isa, typename X>
void multiply_all(const Weight& w, const float* x, float* y, int64_t n_rows) {
  int64_t m = 0;
  if constexpr (Isa::most == 4) {
    for (; m + 4 <= n_rows; m += 4) multiply<Isa, X, 4>(w, x + m * w.columns, y + m * w.rows);
    for (; m + 2 <= n_rows; m += 2) multiply<Isa, X, 2>(w, x + m * w.columns, y + m * w.rows);
  }
  for (; m < n_rows; ++m) multiply<Isa, X, 1>(w, x + m * w.columns, y + m * w.rows);
}

template <typename Isa>
void multiply_as(const Weight& w, const float* x, float* y, int64_t n_rows, bool int8) {
  int8 ? multiply_all<Isa, int8_t>(w, x, y, n_rows) : multiply_all<Isa, float>(w, x, y, n_rows);
}

inline void multiply_at(const Weight& w, const float* x, float* y, int64_t n_rows, bool int8, int64_t most) {
  switch (std::min<int64_t>(most, found_level(int8))) {
#if defined(__x86_64__)
    case kAvx512: return multiply_as<Avx512>(w, x, y, n_rows, int8);
    case kAvx2: return multiply_as<Avx2>(w, x, y, n_rows, int8);
#endif
    default: return multiply_as<Portable>(w, x, y, n_rows, int8);
  }
}

// y [..., rows] of x [..., columns] in its dtype; `level` is the highest instruction set to use.
inline Tensor product(const Weight& w, const Tensor& x, const Optional& bias, bool int8, int64_t level) {
  return product_of(x, bias, w.rows, w.columns, [&](const float* from, float* to, int64_t n_rows) {
    multiply_at(w, from, to, n_rows, int8, level);
  });
}

}  // namespace packed_rows
