// `packed_dot.h` in AVX-512, for eight-bit vectors with VNNI.

#pragma once

#include "packed_dot.h"

#include <immintrin.h>

#define PTQ161_AVX512 __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl")))
#define PTQ161_VNNI __attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512vnni")))

// Units of a chunk, those of 3 bytes spread to 4.
template <int B>
PTQ161_AVX512 inline __m512i units_avx512(const uint8_t* bytes) {
  const __m512i packed = _mm512_loadu_si512(bytes);
  if constexpr (B == 3) {
    const __m512i quarters = _mm512_setr_epi32(0, 1, 2, 0, 3, 4, 5, 0, 6, 7, 8, 0, 9, 10, 11, 0);
    const __m128i spread = _mm_setr_epi8(0, 1, 2, -1, 3, 4, 5, -1, 6, 7, 8, -1, 9, 10, 11, -1);
    return _mm512_shuffle_epi8(_mm512_permutexvar_epi32(quarters, packed), _mm512_broadcast_i32x4(spread));
  } else {
    return packed;
  }
}

// The four codes in the lowest 12 bits of each unit, one to a byte.
PTQ161_AVX512 inline __m512i three_bit_bytes_avx512(__m512i units) {
  const __m512i pairs = _mm512_or_si512(_mm512_and_si512(units, _mm512_set1_epi32(0x3f)),
                                        _mm512_slli_epi32(_mm512_and_si512(units, _mm512_set1_epi32(0xfc0)), 10));
  return _mm512_or_si512(_mm512_and_si512(pairs, _mm512_set1_epi32(0x070007)),
                         _mm512_slli_epi32(_mm512_and_si512(pairs, _mm512_set1_epi32(0x380038)), 5));
}

template <int B, int R, int M>
PTQ161_AVX512 void dot_avx512(const FloatDot& d) {
  // A permutation reads the lowest four bits of an index: values repeat for codes of fewer.
  constexpr int q = (1 << B) - 1;
  const __m512 values = _mm512_setr_ps(0, 1 & q, 2 & q, 3 & q, 4 & q, 5 & q, 6 & q, 7 & q, 8 & q, 9 & q, 10 & q, 11 & q,
                                       12 & q, 13 & q, 14 & q, 15 & q);
  const __m512i mask = _mm512_set1_epi32(q);
  uint8_t buffers[R][kLoadBytes];
  __m512 sums[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = _mm512_setzero_ps();
  }
  for (int64_t c = 0; c < d.n_chunks; ++c) {
    __m512i units[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) units[r] = units_avx512<B>(chunk_of<B>(d, r, c, buffers[r]));
    __m512i bit = mask;
    for (int s = 0; s < unit_codes(B); ++s) {
      const float* x = d.x + (c * unit_codes(B) + s) * kUnits;
      __m512 vectors[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) vectors[m] = _mm512_loadu_ps(x + m * d.stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        if constexpr (B == 1) {
          const __mmask16 set = _mm512_test_epi32_mask(units[r], bit);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) sums[r][m] = _mm512_mask_add_ps(sums[r][m], set, sums[r][m], vectors[m]);
        } else {
          const __m512 codes = _mm512_permutexvar_ps(units[r], values);
#pragma GCC unroll 8
          for (int m = 0; m < M; ++m) sums[r][m] = _mm512_fmadd_ps(codes, vectors[m], sums[r][m]);
          units[r] = _mm512_srli_epi32(units[r], B);
        }
      }
      bit = _mm512_slli_epi32(bit, 1);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) d.out[r * M + m] = _mm512_reduce_add_ps(sums[r][m]);
  }
}

template <int B, int R, int M>
PTQ161_VNNI void dot_vnni(const Int8Dot& d) {
  constexpr int steps = B == 3 ? 2 : 8 / B;
  const __m512i mask = _mm512_set1_epi8((1 << B) - 1);
  uint8_t buffers[R][kLoadBytes];
  __m512i sums[R][M];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) sums[r][m] = _mm512_setzero_si512();
  }
  for (int64_t c = 0; c < d.n_chunks; ++c) {
    __m512i units[R];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) units[r] = units_avx512<B>(chunk_of<B>(d, r, c, buffers[r]));
    for (int s = 0; s < steps; ++s) {
      const int8_t* x = d.x + (c * steps + s) * 64;
      __m512i vectors[M];
#pragma GCC unroll 8
      for (int m = 0; m < M; ++m) vectors[m] = _mm512_loadu_si512(x + m * d.stride);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const __m512i codes = B == 3 ? three_bit_bytes_avx512(units[r]) : _mm512_and_si512(units[r], mask);
#pragma GCC unroll 8
        for (int m = 0; m < M; ++m) sums[r][m] = _mm512_dpbusd_epi32(sums[r][m], codes, vectors[m]);
        units[r] = B == 3 ? _mm512_srli_epi32(units[r], 12) : _mm512_srli_epi16(units[r], B);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r) {
#pragma GCC unroll 8
    for (int m = 0; m < M; ++m) d.out[r * M + m] = _mm512_reduce_add_epi32(sums[r][m]);
  }
}
