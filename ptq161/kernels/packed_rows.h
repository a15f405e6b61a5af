// Products of a few rows with a packed weight: y = x W^T, W read from its bytes.
//
// A packed weight is a list of segments, each a set of columns with codes of as many bits:
//     W[o, j] = (scale[o] * code[o, j] + shift[o]) * factor[j]
// so that y[o] = scale[o] * (codes of row o times v) + shift[o] * sum(v), v = factor * x over the segment's columns.
// With eight-bit activations v is rounded to 127 steps to either side, per row of x and segment.

#pragma once

#include "bfloat16.h"
#include "packed_dot.h"
#if defined(__x86_64__)
#include "packed_avx2.h"
#include "packed_avx512.h"
#endif

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdint>
#include <limits>
#include <optional>
#include <type_traits>
#include <vector>

namespace packed_rows {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

constexpr int64_t kGrainWeights = 1 << 17;  // that a thread is woken for

// Instruction sets in rising order; each holds as many rows of the weight in registers as it has room for.
enum Level { kPortable = 0, kAvx2 = 1, kAvx512 = 2 };

struct Portable {
  template <int M> static constexpr int rows = 4;
  template <int B, int R, int M, typename D> static void dot(const D& d) { dot_portable<B, R, M>(d); }
};

#if defined(__x86_64__)
struct Avx2 {
  template <int M> static constexpr int rows = M > 2 ? 2 : 4;
  template <int B, int R, int M, typename D> static void dot(const D& d) { dot_avx2<B, R, M>(d); }
};

struct Avx512 {
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

// Floats of a stored tensor, in float32 or float16: the value of row o is the one at o * stride.
struct Stored {
  const void* data = nullptr;
  bool half = false;
  int64_t stride = 1;

  float operator[](int64_t o) const {
    if (!half) return static_cast<const float*>(data)[o * stride];
    const uint32_t bits = static_cast<const uint16_t*>(data)[o * stride];
    // Exponents of float16 are moved to those of float32 by a product, which is exact for small ones, too.
    const float magnitude = std::bit_cast<float>((bits & 0x7fffu) << 13) * 0x1p112f;
    return bits & 0x8000u ? -magnitude : magnitude;
  }
};

// What is added to scale * code: a mean, with signs as codes; or minus scale times the code of zero.
enum class Shift { kMean, kZeroPoint, kZeroNibble, kConstant };

struct Segment {
  int bits;
  int64_t n;              // columns
  const uint8_t* codes;   // of row 0
  int64_t row_bytes;
  const uint8_t* end;     // of the tensor
  Stored scale;
  float step = 1.0f;      // times scale
  Shift shift = Shift::kConstant;
  Stored offset{};                   // of kMean and kZeroPoint
  const uint8_t* nibbles = nullptr;  // of kZeroNibble
  float constant = 0.0f;             // of kConstant
  bool scales_factor = false;        // the scale is rounded with the columns' factors, not with the codes

  // Scale and shift of row o.
  void terms(int64_t o, float& a, float& b) const {
    a = scale[o] * step;
    switch (shift) {
      case Shift::kMean:  // scale * (2 * code - 1) + mean
        b = offset[o] - a;
        a = 2.0f * a;
        break;
      case Shift::kZeroPoint: b = -a * offset[o]; break;
      case Shift::kZeroNibble: b = -a * static_cast<float>(nibbles[o / 2] >> (o % 2 * 4) & 15); break;
      case Shift::kConstant: b = -a * constant; break;
    }
  }

  // What the codes of row o stand for before the columns' factors, rounded as by the format's `values()`.
  float value(int64_t o, int code) const {
    const float c = static_cast<float>(code);
    switch (shift) {
      case Shift::kMean: return scale[o] * (2.0f * c - 1.0f) + offset[o];
      case Shift::kZeroPoint: return scale[o] * (c - offset[o]);
      case Shift::kZeroNibble: return (c - static_cast<float>(nibbles[o / 2] >> (o % 2 * 4) & 15)) * scale[o];
      default: return scales_factor ? (c - constant) * step : scale[o] * (c - constant);
    }
  }
};

struct Weight {
  int64_t rows, columns;
  std::vector<Segment> segments;
  std::vector<int32_t> segment_of;  // [columns]
  std::vector<float> factor;        // [columns]
  std::vector<float> divisor;       // [columns], whose inverse is the factor, or empty
  float scale = 1.0f;               // of everything
};

// Some rows of x, segment by segment and in the order in which codes are taken.
template <typename X>
struct Vectors {
  std::vector<X> values;         // [M, stride]
  int64_t stride = 0;
  std::vector<int64_t> start;    // of each segment
  std::vector<float> scale, sum;  // [segments, M]: of a value; of the segment's values, scaled
};

template <typename X>
constexpr bool kInt8 = std::is_same_v<X, int8_t>;

inline int64_t chunks_of(const Segment& s) { return (s.n + chunk_codes(s.bits) - 1) / chunk_codes(s.bits); }

// Values of one segment of one row, in place; returns scale and sum of what is placed.
template <typename X>
void place(const Segment& s, const float* v, X* to, float& scale, float& sum) {
  if constexpr (kInt8<X>) {
    float most = 0.0f;
    bool finite = true;
    for (int64_t j = 0; j < s.n; ++j) {
      most = std::max(most, std::fabs(v[j]));
      finite = finite && std::isfinite(v[j]);
    }
    scale = finite ? most / 127.0f : std::numeric_limits<float>::quiet_NaN();
    const float inverse = finite && most > 0.0f ? 127.0f / most : 0.0f;
    int64_t total = 0;
    for (int64_t j = 0; finite && j < s.n; ++j) {
      const auto q = static_cast<int8_t>(std::nearbyint(v[j] * inverse));
      to[place_int8(s.bits, j)] = q;
      total += q;
    }
    sum = scale * static_cast<float>(total);
  } else {
    scale = 1.0f;
    sum = 0.0f;
    for (int64_t j = 0; j < s.n; ++j) {
      to[place_float(s.bits, j)] = v[j];
      sum += v[j];
    }
  }
}

template <typename X, typename T>
Vectors<X> vectors_of(const Weight& w, const T* x, int64_t n_rows) {
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
      gathered[next[w.segment_of[j]]++] = to_float(x[m * w.columns + j]) * w.factor[j];
    }
    for (size_t s = 0; s < n_segments; ++s) {
      const size_t i = s * n_rows + m;
      place(w.segments[s], gathered.data() + first[s], v.values.data() + m * v.stride + v.start[s], v.scale[i],
            v.sum[i]);
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

// M rows of y; T is the dtype of x, y and bias.
template <typename Isa, typename X, int M, typename T>
void multiply(const Weight& w, const T* x, const T* bias, T* y) {
  constexpr int R = Isa::template rows<M>;
  using Sum = std::conditional_t<kInt8<X>, int32_t, float>;
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
        for (int m = 0; m < M; ++m) {
          const float sum = w.scale * total[r * M + m];
          store(y + m * w.rows + o + r, bias == nullptr ? sum : sum + to_float(bias[o + r]));
        }
      }
    }
  });
}

template <typename Isa, typename X, typename T>
void multiply_all(const Weight& w, const T* x, const T* bias, T* y, int64_t n_rows) {
  int64_t m = 0;
  for (; m + 4 <= n_rows; m += 4) multiply<Isa, X, 4>(w, x + m * w.columns, bias, y + m * w.rows);
  for (; m + 2 <= n_rows; m += 2) multiply<Isa, X, 2>(w, x + m * w.columns, bias, y + m * w.rows);
  for (; m < n_rows; ++m) multiply<Isa, X, 1>(w, x + m * w.columns, bias, y + m * w.rows);
}

template <typename Isa, typename T>
void multiply_as(const Weight& w, const T* x, const T* bias, T* y, int64_t n_rows, bool int8) {
  int8 ? multiply_all<Isa, int8_t>(w, x, bias, y, n_rows) : multiply_all<Isa, float>(w, x, bias, y, n_rows);
}

template <typename T>
void multiply_at(const Weight& w, const T* x, const T* bias, T* y, int64_t n_rows, bool int8, int64_t most) {
  switch (std::min<int64_t>(most, found_level(int8))) {
#if defined(__x86_64__)
    case kAvx512: return multiply_as<Avx512>(w, x, bias, y, n_rows, int8);
    case kAvx2: return multiply_as<Avx2>(w, x, bias, y, n_rows, int8);
#endif
    default: return multiply_as<Portable>(w, x, bias, y, n_rows, int8);
  }
}

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
inline Tensor dense(const Weight& w, const Tensor& codes, bool bfloat16) {
  const auto dtype = bfloat16 ? ScalarType::BFloat16 : ScalarType::Float;
  Tensor weight = torch::stable::new_empty(codes, {w.rows, w.columns}, dtype);
  void* to = weight.mutable_data_ptr();
  bfloat16 ? dense_rows(w, static_cast<uint16_t*>(to)) : dense_rows(w, static_cast<float*>(to));
  return weight;
}

// y [..., rows] of x [..., columns] in its dtype, float32 or bfloat16; `level` is the highest instruction set to use.
inline Tensor product(const Weight& w, const Tensor& x, const std::optional<Tensor>& bias, bool int8, int64_t level) {
  STD_TORCH_CHECK(x.dim() > 0 && x.size(x.dim() - 1) == w.columns && x.is_contiguous(), "x is not [..., in]");
  STD_TORCH_CHECK(!bias || (bias->numel() == w.rows && bias->scalar_type() == x.scalar_type()), "bias is not [out]");
  std::vector<int64_t> shape(x.sizes().begin(), x.sizes().end());
  shape.back() = w.rows;
  Tensor y = torch::stable::new_empty(x, shape);
  const int64_t n_rows = x.numel() / std::max<int64_t>(1, w.columns);
  const void* from = x.const_data_ptr();
  const void* added = bias ? bias->const_data_ptr() : nullptr;
  void* to = y.mutable_data_ptr();
  const auto run = [&]<typename T>(T*) {
    multiply_at(w, static_cast<const T*>(from), static_cast<const T*>(added), static_cast<T*>(to), n_rows, int8, level);
  };
  if (x.scalar_type() == ScalarType::BFloat16) {
    run(static_cast<uint16_t*>(nullptr));
  } else {
    STD_TORCH_CHECK(x.scalar_type() == ScalarType::Float, "x is neither float32 nor bfloat16");
    run(static_cast<float*>(nullptr));
  }
  return y;
}

}  // namespace packed_rows
