// A packed weight as a list of segments, each a set of columns with codes of as many bits:
//     W[o, j] = (scale[o] * code[o, j] + shift[o]) * factor[j]

#pragma once

#include "stored.h"

#include <algorithm>
#include <cstdint>
#include <vector>

namespace packed_rows {

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

}  // namespace packed_rows
