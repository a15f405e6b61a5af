// exp for the numbers that a softmax takes it of.

#pragma once

#include <bit>
#include <cmath>
#include <cstdint>

// exp(x) for x <= 0, to 2 units in the last place; 2^-126 below, NaN of NaN.
inline float exp_of_negative(float x) {
  const float least = x < -87.0f ? -87.0f : x;
  const float n = std::nearbyint(least * 1.44269504088896341f);
  const float r = std::fma(n, 2.12194440e-4f, std::fma(n, -0.693359375f, least));  // least - n log 2
  float p = 1.9875691500e-4f;  // Cephes' polynomial
  p = std::fma(p, r, 1.3981999507e-3f);
  p = std::fma(p, r, 8.3334519073e-3f);
  p = std::fma(p, r, 4.1665795894e-2f);
  p = std::fma(p, r, 1.6666665459e-1f);
  p = std::fma(p, r, 5.0000001201e-1f);
  p = std::fma(p * r, r, r) + 1.0f;
  return p * std::bit_cast<float>((static_cast<int32_t>(n) + 127) << 23);
}
