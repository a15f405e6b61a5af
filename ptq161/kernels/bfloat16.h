// Reading and writing floats that are stored as float32 or as bfloat16.

#pragma once

#include <bit>
#include <cstdint>

inline float to_float(float value) { return value; }
inline float to_float(uint16_t value) { return std::bit_cast<float>(static_cast<uint32_t>(value) << 16); }

inline void store(float* target, float value) { *target = value; }
inline void store(uint16_t* target, float value) {  // to bfloat16, to nearest, ties to even
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  *target = static_cast<uint16_t>(value == value ? rounded : 0x7fc0u);
}

