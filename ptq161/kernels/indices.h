// Indices of up to 16 bits, stored in parts of 8, 4, 2 and 1 bits: `pack_indices` of ptq161/packed/bits.py.

#pragma once

#include "stored.h"

#include <cstring>

namespace packed_rows {

// Bits of the next part of an index of which so many are left; the lowest part is the first.
constexpr int next_width(int bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }

// Writes W bits of each of n indices, from index `first` of a part on. Those of further parts are added to what is
// there.
template <int W, bool kFirst>
void read_part(const uint8_t* part, int64_t first, int64_t n, int shift, uint32_t* to) {
  constexpr uint32_t mask = (1u << W) - 1;
  constexpr int64_t per_word = W == 8 ? 4 : W == 4 ? 8 : 16;
  const auto put = [&](uint32_t& index, uint32_t bits) { index = kFirst ? bits : index | bits << shift; };
  const auto read_one = [&](int64_t i) {
    const int64_t bit = (first + i) * W;
    put(to[i], part[bit / 8] >> (bit % 8) & mask);
  };
  int64_t i = 0;
  for (; i < n && (first + i) * W % 8 != 0; ++i) read_one(i);
  const uint8_t* from = part + (first + i) * W / 8;
  if constexpr (W == 8) {
#pragma omp simd
    for (int64_t k = i; k < n; ++k) put(to[k], from[k - i]);
    return;
  }
  for (; i + per_word <= n; i += per_word, from += per_word * W / 8) {
    uint32_t word = 0;
    std::memcpy(&word, from, per_word * W / 8);
#pragma omp simd
    for (int64_t k = 0; k < per_word; ++k) put(to[i + k], word >> (k * W) & mask);
  }
  for (; i < n; ++i) read_one(i);
}

template <bool kFirst>
void read_part(int bits, const uint8_t* part, int64_t first, int64_t n, int shift, uint32_t* to) {
  switch (bits) {
    case 8: return read_part<8, kFirst>(part, first, n, shift, to);
    case 4: return read_part<4, kFirst>(part, first, n, shift, to);
    case 2: return read_part<2, kFirst>(part, first, n, shift, to);
    default: return read_part<1, kFirst>(part, first, n, shift, to);
  }
}

// Indices of 0 to 16 bits, in parts one behind the other.
struct Indices {
  const uint8_t* data = nullptr;
  int64_t count = 0;
  int bits = 0;

  void read(int64_t first, int64_t n, uint32_t* to) const {
    if (bits == 0) std::fill_n(to, n, 0u);
    const uint8_t* part = data;
    for (int shift = 0; shift < bits;) {
      const int w = next_width(bits - shift);
      shift == 0 ? read_part<true>(w, part, first, n, shift, to) : read_part<false>(w, part, first, n, shift, to);
      part += width(count, w);
      shift += w;
    }
  }
};

inline int bits_of(int64_t count) { return count > 1 ? std::bit_width(static_cast<uint64_t>(count - 1)) : 0; }

// The indices of `count` things into `entries` others.
inline Indices indices_of(const Tensor& packed, int64_t count, int64_t entries) {
  const Indices indices{bytes(packed), count, bits_of(entries)};
  int64_t nbytes = 0;
  for (int shift = 0; shift < indices.bits;) {
    const int w = next_width(indices.bits - shift);
    nbytes += width(count, w);
    shift += w;
  }
  STD_TORCH_CHECK(indices.bits <= 16 && packed.numel() == nbytes, "indices are not as many as the weight has");
  return indices;
}

}  // namespace packed_rows
