// Dot products of packed codes of 1 to 4 bits with vectors: what a row of bytes stands for is never written to memory.
//
// A row is read in chunks of 16 units. A unit is 4 bytes, or 3 of 3-bit codes, and holds 32, 16, 8 or 8 codes, the
// first of them in its lowest bits. Step s of a chunk takes code s of every unit, so that the vectors are stored in the
// order [chunk][step][unit], filled up with zeros (`place_*`). Eight-bit vectors are stored in the order in which
// shifts give the codes of whole bytes.
//
// The portable form is here; `packed_avx2.h` and `packed_avx512.h` have the same up to the order of sums.

#pragma once

#include <bit>
#include <cstdint>
#include <cstring>

static_assert(std::endian::native == std::endian::little, "codes are read as little-endian words");

constexpr int kUnits = 16;       // of a chunk
constexpr int kLoadBytes = 64;   // read at once: a chunk of 4-byte units

constexpr int unit_codes(int bits) { return bits == 1 ? 32 : bits == 2 ? 16 : 8; }
constexpr int chunk_bytes(int bits) { return kUnits * (bits == 3 ? 3 : 4); }
constexpr int chunk_codes(int bits) { return kUnits * unit_codes(bits); }

// Where value j of a float vector is stored.
template <int B>
inline int64_t place_float(int64_t j) {
  constexpr int64_t codes = unit_codes(B);
  const int64_t unit = j / codes;
  return (unit / kUnits * codes + j % codes) * kUnits + unit % kUnits;
}

// Where value j of an eight-bit vector is stored: codes of 3 bits four steps at a time, others byte by byte.
template <int B>
inline int64_t place_int8(int64_t j) {
  if constexpr (B == 3) {
    const int64_t unit = j / 8, step = j % 8;
    return unit / kUnits * 128 + step / 4 * 64 + unit % kUnits * 4 + step % 4;
  } else {
    constexpr int64_t codes = 8 / B;
    const int64_t byte = j / codes;
    return (byte / 64 * codes + j % codes) * 64 + byte % 64;
  }
}

// The bytes of the chunk at `from`, in a buffer where less than a load of them is left of the tensor. What lies behind
// a row's end is multiplied by zeros.
inline const uint8_t* whole_chunk(const uint8_t* from, const uint8_t* end, uint8_t* buffer) {
  if (end - from >= kLoadBytes) return from;
  std::memset(buffer, 0, kLoadBytes);
  std::memcpy(buffer, from, static_cast<size_t>(end - from));
  return buffer;
}

// The chunk of row r, with that of the rows that come next on its way: processors do not foresee many short streams.
template <int B, typename D>
inline const uint8_t* chunk_of(const D& d, int r, int64_t chunk, uint8_t* buffer) {
  const uint8_t* from = d.rows[r] + chunk * chunk_bytes(B);
  __builtin_prefetch(from + d.ahead, 0, 2);  // not to the first cache, in which rows of 2^k bytes would meet
  return whole_chunk(from, d.end, buffer);
}

// Out of R rows of bytes and M vectors: out[r * M + m] = sum of codes of row r times vector m.
template <typename X, typename Y>
struct Dot {
  const uint8_t* const* rows;  // [R]
  const uint8_t* end;          // of the tensor that holds the rows
  int64_t ahead;               // bytes to the rows that come next
  int64_t n_chunks;
  const X* x;        // [M], `stride` apart
  int64_t stride;
  Y* out;            // [R * M]
};
using FloatDot = Dot<float, float>;
using Int8Dot = Dot<int8_t, int32_t>;

template <int B>
inline void units_of(const uint8_t* bytes, uint32_t* units) {
  for (int i = 0; i < kUnits; ++i) {
    if constexpr (B == 3) {
      units[i] = bytes[3 * i] | bytes[3 * i + 1] << 8 | bytes[3 * i + 2] << 16;
    } else {
      std::memcpy(units + i, bytes + 4 * i, 4);
    }
  }
}

template <int B, int R, int M>
void dot_portable(const FloatDot& d) {
  float sums[R][M][kUnits] = {};
  uint8_t buffer[kLoadBytes];
  for (int64_t c = 0; c < d.n_chunks; ++c) {
    for (int r = 0; r < R; ++r) {
      uint32_t units[kUnits];
      units_of<B>(chunk_of<B>(d, r, c, buffer), units);
      for (int s = 0; s < unit_codes(B); ++s) {
        const float* x = d.x + (c * unit_codes(B) + s) * kUnits;
        for (int m = 0; m < M; ++m) {
          for (int i = 0; i < kUnits; ++i) {
            sums[r][m][i] += static_cast<float>(units[i] >> (B * s) & ((1u << B) - 1)) * x[m * d.stride + i];
          }
        }
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int m = 0; m < M; ++m) {
      float sum = 0.0f;
      for (int i = 0; i < kUnits; ++i) sum += sums[r][m][i];
      d.out[r * M + m] = sum;
    }
  }
}

template <int B, int R, int M>
void dot_portable(const Int8Dot& d) {
  uint8_t buffer[kLoadBytes];
  for (int r = 0; r < R; ++r) {
    int32_t sums[M] = {};
    for (int64_t c = 0; c < d.n_chunks; ++c) {
      const uint8_t* bytes = chunk_of<B>(d, r, c, buffer);
      uint32_t units[kUnits];
      units_of<B>(bytes, units);
      for (int j = 0; j < chunk_codes(B); ++j) {
        const int32_t code = units[j / unit_codes(B)] >> (j % unit_codes(B) * B) & ((1u << B) - 1);
        const int8_t* x = d.x + c * chunk_codes(B) + place_int8<B>(j);
        for (int m = 0; m < M; ++m) sums[m] += code * x[m * d.stride];
      }
    }
    for (int m = 0; m < M; ++m) d.out[r * M + m] = sums[m];
  }
}
