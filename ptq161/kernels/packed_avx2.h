// `packed_dot.h` in AVX2: a chunk is two halves of 8 units.

#pragma once

#include "packed_dot.h"

#include <immintrin.h>

#define PTQ161_AVX2 __attribute__((target("avx2,fma")))

// Units of half a chunk, those of 3 bytes spread to 4.
template <int B>
PTQ161_AVX2 inline __m256i units_avx2(const uint8_t* bytes, int half) {
  if constexpr (B == 3) {
    const auto* low = reinterpret_cast<const __m128i*>(bytes + 24 * half);
    const auto* high = reinterpret_cast<const __m128i*>(bytes + 24 * half + 12);
    const __m256i packed = _mm256_set_m128i(_mm_loadu_si128(high), _mm_loadu_si128(low));
    const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    return _mm256_shuffle_epi8(packed, _mm256_broadcastsi128_si256(spread));
  } else {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(bytes + 32 * half));
  }
}

// The four codes in the lowest 12 bits of each unit, one to a byte.
PTQ161_AVX2 inline __m256i three_bit_bytes_avx2(__m256i units) {
  const __m256i pairs = _mm256_or_si256(_mm256_and_si256(units, _mm256_set1_epi32(0x3f)),
                                        _mm256_slli_epi32(_mm256_and_si256(units, _mm256_set1_epi32(0xfc0)), 10));
  return _mm256_or_si256(_mm256_and_si256(pairs, _mm256_set1_epi32(0x070007)),
                         _mm256_slli_epi32(_mm256_and_si256(pairs, _mm256_set1_epi32(0x380038)), 5));
}

PTQ161_AVX2 inline float sum_avx2(__m256 v) {
  const __m128 four = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
  const __m128 two = _mm_add_ps(four, _mm_movehl_ps(four, four));
  return _mm_cvtss_f32(_mm_add_ss(two, _mm_movehdup_ps(two)));
}

PTQ161_AVX2 inline int32_t sum_avx2(__m256i v) {
  const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(v), _mm256_extracti128_si256(v, 1));
  const __m128i two = _mm_add_epi32(four, _mm_unpackhi_epi64(four, four));
  return _mm_cvtsi128_si32(_mm_add_epi32(two, _mm_shuffle_epi32(two, 1)));
}

template <int B, int R, int M>
PTQ161_AVX2 void dot_avx2(const FloatDot& d) {
  // A permutation reads the lowest three bits of an index, of which a code of 1 or 2 bits is a part.
  constexpr float q = B == 3 ? 4.0f : 0.0f;
  const __m256 values = _mm256_setr_ps(0, 1, 2, 3, q, q + 1, q + 2, q + 3);
  const __m256i mask = _mm256_set1_epi32((1 << B) - 1);
  uint8_t buffers[R][kLoadBytes];
  __m256 sums[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = _mm256_setzero_ps();
  }
  for (int64_t c = 0; c < d.n_chunks; ++c) {
    const uint8_t* bytes[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) bytes[r] = chunk_of<B>(d, r, c, buffers[r]);
    for (int half = 0; half < 2; ++half) {
      __m256i units[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) units[r] = units_avx2<B>(bytes[r], half);
      for (int s = 0; s < unit_codes(B); ++s) {
        const float* x = d.x + (c * unit_codes(B) + s) * kUnits + 8 * half;
        __m256 vectors[M];
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) vectors[m] = _mm256_loadu_ps(x + m * d.stride);
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          if constexpr (B == 1) {
            const __m256 set = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(units[r], mask), mask));
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums[r][m] = _mm256_add_ps(sums[r][m], _mm256_and_ps(set, vectors[m]));
          } else {
            const __m256 codes = B == 4 ? _mm256_cvtepi32_ps(_mm256_and_si256(units[r], mask))
                                        : _mm256_permutevar8x32_ps(values, units[r]);
#pragma GCC unroll 8
            for (int m = 0; m < M; ++m) sums[r][m] = _mm256_fmadd_ps(codes, vectors[m], sums[r][m]);
          }
          units[r] = _mm256_srli_epi32(units[r], B);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) d.out[r * M + m] = sum_avx2(sums[r][m]);
  }
}

template <int B, int R, int M>
PTQ161_AVX2 void dot_avx2(const Int8Dot& d) {
  constexpr int steps = B == 3 ? 2 : 8 / B;
  const __m256i mask = _mm256_set1_epi8((1 << B) - 1), ones = _mm256_set1_epi16(1);
  uint8_t buffers[R][kLoadBytes];
  __m256i sums[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = _mm256_setzero_si256();
  }
  for (int64_t c = 0; c < d.n_chunks; ++c) {
    const uint8_t* bytes[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) bytes[r] = chunk_of<B>(d, r, c, buffers[r]);
    for (int half = 0; half < 2; ++half) {
      __m256i units[R];
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) units[r] = units_avx2<B>(bytes[r], half);
      for (int s = 0; s < steps; ++s) {
        const int8_t* x = d.x + (c * steps + s) * 64 + 32 * half;
#pragma GCC unroll 8
        for (int r = 0; r < R; ++r) {
          const __m256i codes = B == 3 ? three_bit_bytes_avx2(units[r]) : _mm256_and_si256(units[r], mask);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) {
            // Two products are at most 2 * 15 * 127 and do not saturate.
            const __m256i vector = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + m * d.stride));
            const __m256i products = _mm256_madd_epi16(_mm256_maddubs_epi16(codes, vector), ones);
            sums[r][m] = _mm256_add_epi32(sums[r][m], products);
          }
          units[r] = B == 3 ? _mm256_srli_epi32(units[r], 12) : _mm256_srli_epi16(units[r], B);
        }
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) d.out[r * M + m] = sum_avx2(sums[r][m]);
  }
}
