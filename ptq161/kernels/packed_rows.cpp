// Products of a few rows with the packed weights of three formats, and their dense forms, told in packed_weight.h,
// packed_rows.h and packed_dense.h; the formats' tensors are described in ptq161/packed.

#include "packed_dense.h"
#include "packed_rows.h"

namespace {

using namespace packed_rows;

// Codes [rows, width(n, bits)], from byte `first` of each row on.
Segment segment_of(const Tensor& codes, int64_t rows, int64_t bits, int64_t n, int64_t row_bytes, int64_t first = 0) {
  STD_TORCH_CHECK(bits >= 1 && bits <= 4, "codes have 1 to 4 bits");
  STD_TORCH_CHECK(codes.numel() == rows * row_bytes && first + width(n, bits) <= row_bytes,
                  "codes are not as many as the weight has");
  const uint8_t* data = bytes(codes);
  return {static_cast<int>(bits), n, data + first, row_bytes, data + rows * row_bytes, {}};
}

Weight structured_binary(const Tensor& mask, const Tensor& sign, const Tensor& scale, const Tensor& mean,
                         const Tensor& column_angle, const Tensor& codes, const Tensor& salient_scale,
                         const Tensor& salient_zero_point, int64_t in_features, int64_t salient_bits, double factor) {
  const int64_t rows = sign.size(0);
  Weight w{rows, in_features, {}, std::vector<int32_t>(in_features), std::vector<float>(in_features, 1.0f)};
  w.scale = static_cast<float>(factor);
  STD_TORCH_CHECK(mask.numel() == width(in_features, 1), "the mask is not [in]");
  const uint8_t* salient = bytes(mask);
  const int64_t n_binary = column_angle.numel();
  const Stored angle = stored(column_angle, n_binary);
  int64_t next = 0;
  for (int64_t j = 0; j < in_features; ++j) {
    w.segment_of[j] = salient[j / 8] >> (j % 8) & 1;
    if (w.segment_of[j] == 0) {
      STD_TORCH_CHECK(next < n_binary, "the mask has more binary channels than are stored");
      w.factor[j] = angle[next++];
    }
  }
  STD_TORCH_CHECK(next == n_binary, "the mask has fewer binary channels than are stored");
  Segment binary = segment_of(sign, rows, 1, n_binary, width(n_binary, 1));
  binary.scale = stored(scale, rows);
  binary.shift = Shift::kMean;
  binary.offset = stored(mean, rows);
  w.segments.push_back(binary);
  if (const int64_t n = in_features - n_binary; n > 0) {
    Segment high = segment_of(codes, rows, salient_bits, n, width(n, salient_bits));
    high.scale = stored(salient_scale, rows);
    high.shift = Shift::kZeroPoint;
    high.offset = stored(salient_zero_point, rows);
    w.segments.push_back(high);
  }
  return w;
}

Tensor structured_binary_rows(Tensor x, Tensor mask, Tensor sign, Tensor scale, Tensor mean, Tensor column_angle,
                              Tensor codes, Tensor salient_scale, Tensor salient_zero_point, Optional bias,
                              int64_t in_features, int64_t salient_bits, double factor, bool int8, int64_t level) {
  return product(structured_binary(mask, sign, scale, mean, column_angle, codes, salient_scale, salient_zero_point,
                                   in_features, salient_bits, factor),
                 x, bias, int8, level);
}

Tensor structured_binary_dense(Tensor mask, Tensor sign, Tensor scale, Tensor mean, Tensor column_angle, Tensor codes,
                               Tensor salient_scale, Tensor salient_zero_point, int64_t in_features,
                               int64_t salient_bits, double factor, ScalarType dtype) {
  return dense(structured_binary(mask, sign, scale, mean, column_angle, codes, salient_scale, salient_zero_point,
                                 in_features, salient_bits, factor),
               sign, dtype);
}

Weight uniform(const Tensor& codes, const Tensor& scales, const Optional& zero_points, const Optional& input_scales,
               int64_t in_features, int64_t bits, int64_t group_size, double factor) {
  STD_TORCH_CHECK(group_size > 0 && (group_size >= in_features || group_size * bits % 8 == 0),
                  "groups do not start on a byte");
  const int64_t rows = codes.size(0), groups = (in_features + group_size - 1) / group_size;
  Weight w{rows, in_features, {}, std::vector<int32_t>(in_features), std::vector<float>(in_features, 1.0f)};
  w.scale = static_cast<float>(factor);
  if (input_scales) {
    const Stored scale = stored(*input_scales, in_features);
    for (int64_t j = 0; j < in_features; ++j) {
      w.divisor.push_back(scale[j]);
      w.factor[j] = 1.0f / scale[j];
    }
  }
  for (int64_t g = 0; g < groups; ++g) {
    const int64_t first = g * group_size, n = std::min(group_size, in_features - first);
    std::fill_n(w.segment_of.begin() + first, n, static_cast<int32_t>(g));
    Segment segment = segment_of(codes, rows, bits, n, width(in_features, bits), first * bits / 8);
    segment.scale = stored(scales, rows * groups, groups, g);
    segment.constant = static_cast<float>(1 << (bits - 1));
    if (zero_points) {
      segment.shift = Shift::kZeroPoint;
      segment.offset = stored(*zero_points, rows * groups, groups, g);
    }
    w.segments.push_back(segment);
  }
  return w;
}

Tensor uniform_rows(Tensor x, Tensor codes, Tensor scales, Optional zero_points, Optional input_scales, Optional bias,
                    int64_t in_features, int64_t bits, int64_t group_size, double factor, bool int8, int64_t level) {
  return product(uniform(codes, scales, zero_points, input_scales, in_features, bits, group_size, factor), x, bias,
                 int8, level);
}

Tensor uniform_dense(Tensor codes, Tensor scales, Optional zero_points, Optional input_scales, int64_t in_features,
                     int64_t bits, int64_t group_size, double factor, ScalarType dtype) {
  return dense(uniform(codes, scales, zero_points, input_scales, in_features, bits, group_size, factor), codes,
               dtype);
}

Weight allotted(const Optional& labels, const std::vector<Tensor>& codes, const Optional& row, const Optional& column,
                const Optional& ranged_scale, const Optional& zero_point, const std::vector<int64_t>& tiers,
                const std::vector<double>& steps, int64_t in_features, double factor) {
  // `codes` are those of each tier, none of one without channels.
  STD_TORCH_CHECK(!codes.empty() && codes.size() == tiers.size(), "there are not codes of each tier");
  const int64_t rows = codes[0].size(0), label_bits = tiers.size() <= 2 ? 1 : 2;
  Weight w{rows, in_features, {}, std::vector<int32_t>(in_features), std::vector<float>(in_features, 1.0f)};
  w.scale = static_cast<float>(factor);
  const uint8_t* packed = labels ? bytes(*labels) : nullptr;
  STD_TORCH_CHECK(!labels || labels->numel() == width(in_features, label_bits), "the labels are not [in]");
  std::vector<int64_t> counts(tiers.size());
  for (int64_t j = 0; j < in_features; ++j) {
    const int64_t bit = j * label_bits;
    const size_t label = packed == nullptr ? 0 : packed[bit / 8] >> (bit % 8) & ((1 << label_bits) - 1);
    STD_TORCH_CHECK(label < tiers.size(), "a label names no tier");
    w.segment_of[j] = static_cast<int32_t>(label);
    ++counts[label];
  }
  std::vector<int32_t> place(tiers.size());
  int64_t n_scaled = 0;
  for (size_t t = 0; t < tiers.size(); ++t) {
    place[t] = static_cast<int32_t>(w.segments.size());
    if (counts[t] == 0) {
      STD_TORCH_CHECK(codes[t].numel() == 0, "there are codes of a tier without channels");
      continue;
    }
    Segment segment = segment_of(codes[t], rows, tiers[t], counts[t], width(counts[t], tiers[t]));
    if (tiers[t] == 4) {
      STD_TORCH_CHECK(ranged_scale && zero_point && zero_point->numel() == width(rows, 4), "a 4-bit grid is missing");
      segment.scale = stored(*ranged_scale, rows);
      segment.shift = Shift::kZeroNibble;
      segment.nibbles = bytes(*zero_point);
    } else {
      STD_TORCH_CHECK(row && column && tiers[t] <= static_cast<int64_t>(steps.size()), "a grid is missing");
      segment.scale = stored(*row, rows);
      segment.step = static_cast<float>(steps[tiers[t] - 1]);
      segment.constant = static_cast<float>((1 << tiers[t]) - 1) / 2.0f;
      segment.scales_factor = true;
      n_scaled += counts[t];
    }
    w.segments.push_back(segment);
  }
  const Stored factors = n_scaled > 0 ? stored(*column, n_scaled) : Stored{};
  int64_t next = 0;
  for (int64_t j = 0; j < in_features; ++j) {
    const int32_t label = w.segment_of[j];
    if (tiers[label] != 4) w.factor[j] = factors[next++];
    w.segment_of[j] = place[label];
  }
  return w;
}

Tensor allotted_rows(Tensor x, Optional labels, std::vector<Tensor> codes, Optional row, Optional column,
                     Optional ranged_scale, Optional zero_point, Optional bias, std::vector<int64_t> tiers,
                     std::vector<double> steps, int64_t in_features, double factor, bool int8, int64_t level) {
  return product(allotted(labels, codes, row, column, ranged_scale, zero_point, tiers, steps, in_features, factor), x,
                 bias, int8, level);
}

Tensor allotted_dense(Optional labels, std::vector<Tensor> codes, Optional row, Optional column, Optional ranged_scale,
                      Optional zero_point, std::vector<int64_t> tiers, std::vector<double> steps, int64_t in_features,
                      double factor, ScalarType dtype) {
  return dense(allotted(labels, codes, row, column, ranged_scale, zero_point, tiers, steps, in_features, factor),
               codes[0], dtype);
}

}  // namespace

// Their schemas are in packed_rows.py.
STABLE_TORCH_LIBRARY_IMPL(ptq161, CPU, m) {
  m.impl("structured_binary_rows", TORCH_BOX(&structured_binary_rows));
  m.impl("uniform_rows", TORCH_BOX(&uniform_rows));
  m.impl("allotted_rows", TORCH_BOX(&allotted_rows));
  m.impl("structured_binary_dense", TORCH_BOX(&structured_binary_dense));
  m.impl("uniform_dense", TORCH_BOX(&uniform_dense));
  m.impl("allotted_dense", TORCH_BOX(&allotted_dense));
}
