// Bits of planes as floats, 64 columns at a time. What is written is filled up to whole vectors: `kSlack` floats may
// follow the last.

#pragma once

#include <bit>
#include <cstdint>
#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace packed_rows {

constexpr int64_t kSlack = 16;

// The lowest bits of `source` in the places that are set in `mask`, in their order.
inline uint64_t spread(uint64_t source, uint64_t mask) {
#if defined(__BMI2__)
  return _pdep_u64(source, mask);
#else
  uint64_t found = 0;
  for (; mask != 0; mask &= mask - 1, source >>= 1) found |= source & 1 ? mask & -mask : 0;
  return found;
#endif
}

inline uint64_t lowest(int64_t n) { return n >= 64 ? ~uint64_t{0} : (uint64_t{1} << n) - 1; }

#if defined(__AVX512BW__)
// The lowest 16 bits as a mask; they are shifted where integers are, since masks and permutations share one port.
inline __mmask16 next_mask(uint64_t& bits) {
  const auto mask = static_cast<__mmask16>(bits);
  bits >>= 16;
  asm("" : "+r"(bits));
  return mask;
}
#endif

// `high` where a bit is set, `low` elsewhere.
inline void choose(float low, float high, uint64_t bits, int64_t n, float* to) {
#if defined(__AVX512BW__)
  const __m512 lows = _mm512_set1_ps(low), highs = _mm512_set1_ps(high);
  for (int64_t j = 0; j < n; j += 16) {
    _mm512_storeu_ps(to + j, _mm512_mask_blend_ps(next_mask(bits), lows, highs));
  }
#elif defined(__AVX2__)
  const __m256 lows = _mm256_set1_ps(low), highs = _mm256_set1_ps(high);
  const __m256i places = _mm256_setr_epi32(1, 2, 4, 8, 16, 32, 64, 128);
  for (int64_t j = 0; j < n; j += 8, bits >>= 8) {
    const __m256i set = _mm256_and_si256(_mm256_set1_epi32(static_cast<int>(bits)), places);
    const __m256 chosen = _mm256_castsi256_ps(_mm256_cmpeq_epi32(set, places));
    _mm256_storeu_ps(to + j, _mm256_blendv_ps(lows, highs, chosen));
  }
#else
  for (int64_t j = 0; j < n; ++j) to[j] = bits >> j & 1 ? high : low;
#endif
}

// Values of a table of eight: the bit of `a` counts one, that of `b` two, that of `c` four.
inline void look_up(const float* table, uint64_t a, uint64_t b, uint64_t c, int64_t n, float* to) {
#if defined(__AVX512BW__)
  const __m512 values = _mm512_castps256_ps512(_mm256_loadu_ps(table));
  __m512i indices = _mm512_maskz_set1_epi8(a, 1);
  indices = _mm512_mask_add_epi8(indices, b, indices, _mm512_set1_epi8(2));
  indices = _mm512_mask_add_epi8(indices, c, indices, _mm512_set1_epi8(4));
  alignas(64) uint8_t of_columns[64];
  _mm512_store_si512(of_columns, indices);
  for (int64_t j = 0; j < n; j += 16) {
    const __m128i part = _mm_load_si128(reinterpret_cast<const __m128i*>(of_columns + j));
    _mm512_storeu_ps(to + j, _mm512_permutexvar_ps(_mm512_cvtepu8_epi32(part), values));
  }
#elif defined(__AVX2__)
  // A permutation reads the lowest three bits of an index: three bits side by side for each column.
  const __m256 values = _mm256_loadu_ps(table);
  const __m256i shifts = _mm256_setr_epi32(0, 3, 6, 9, 12, 15, 18, 21);
  for (int64_t j = 0; j < n; j += 8, a >>= 8, b >>= 8, c >>= 8) {
    const uint64_t bits = spread(a, 0x249249) | spread(b, 0x492492) | spread(c, 0x924924);
    const __m256i places = _mm256_srlv_epi32(_mm256_set1_epi32(static_cast<int>(bits)), shifts);
    _mm256_storeu_ps(to + j, _mm256_permutevar8x32_ps(values, places));
  }
#else
  for (int64_t j = 0; j < n; ++j) to[j] = table[(a >> j & 1) | (b >> j & 1) << 1 | (c >> j & 1) << 2];
#endif
}

typedef float Floats16 __attribute__((vector_size(64), aligned(4), may_alias));
typedef int32_t Ints16 __attribute__((vector_size(64), aligned(4), may_alias));

// Adds those of 16 values whose bits are set.
inline void add_where(uint64_t bits, const float* values, Floats16& sum) {
#if defined(__AVX512BW__)
  const __m512 before = _mm512_loadu_ps(&sum);
  const __m512 after = _mm512_mask_add_ps(before, static_cast<__mmask16>(bits), before, _mm512_loadu_ps(values));
  _mm512_storeu_ps(&sum, after);
#else
  const Ints16 places = {1,     2,     4,      8,      0x10,   0x20,   0x40,   0x80,
                         0x100, 0x200, 0x400,  0x800,  0x1000, 0x2000, 0x4000, 0x8000};
  const Ints16 set = (places & static_cast<int32_t>(bits & 0xffff)) == places;
  const Ints16 chosen = *reinterpret_cast<const Ints16*>(values) & set;
  sum += reinterpret_cast<const Floats16&>(chosen);
#endif
}

// Adds `scale * factors`, or minus that where a bit is set, to n values and to no more.
inline void add_signed(float scale, const float* factors, uint64_t minus, int64_t n, float* to) {
  int64_t j = 0;
#if defined(__AVX512BW__)
  const __m512 scales = _mm512_set1_ps(scale);
  const __m512 sign = _mm512_set1_ps(-0.0f);
  for (; j + 16 <= n; j += 16) {
    const __m512 term = _mm512_mul_ps(scales, _mm512_loadu_ps(factors + j));
    const __m512 turned = _mm512_mask_xor_ps(term, next_mask(minus), term, sign);
    _mm512_storeu_ps(to + j, _mm512_add_ps(_mm512_loadu_ps(to + j), turned));
  }
#elif defined(__AVX2__)
  const __m256 scales = _mm256_set1_ps(scale), sign = _mm256_set1_ps(-0.0f);
  const __m256i shifts = _mm256_setr_epi32(31, 30, 29, 28, 27, 26, 25, 24);
  for (; j + 8 <= n; j += 8, minus >>= 8) {
    const __m256i bits = _mm256_sllv_epi32(_mm256_set1_epi32(static_cast<int>(minus)), shifts);
    const __m256 term = _mm256_mul_ps(scales, _mm256_loadu_ps(factors + j));
    const __m256 turned = _mm256_xor_ps(term, _mm256_and_ps(_mm256_castsi256_ps(bits), sign));
    _mm256_storeu_ps(to + j, _mm256_add_ps(_mm256_loadu_ps(to + j), turned));
  }
#endif
  for (; j < n; ++j, minus >>= 1) to[j] += minus & 1 ? -(scale * factors[j]) : scale * factors[j];
}

}  // namespace packed_rows
