// Products of a few rows with codes that each stand for a level, under one scale for some columns of a row, and their
// dense forms: NF4, FP4, FP8 and GSE. The formats' tensors are described in ptq161/packed.

#include "decoded_rows.h"
#include "indices.h"

namespace {

using namespace packed_rows;

constexpr int64_t kBlock = 512;  // codes that are spread at once
constexpr int64_t kLeast = 32;   // levels of a table, filled up

// The level of each of n codes, times a scale.
void look_up(const std::vector<float>& levels, const uint32_t* codes, float scale, int64_t n, float* to) {
  const float* table = levels.data();
  int64_t j = 0;
#if defined(__AVX512F__)
  const __m512 low = _mm512_loadu_ps(table), high = _mm512_loadu_ps(table + 16), scales = _mm512_set1_ps(scale);
  const bool is_small = static_cast<int64_t>(levels.size()) == kLeast;
  for (; j + 16 <= n; j += 16) {
    const __m512i places = _mm512_loadu_si512(codes + j);
    const __m512 found =
        is_small ? _mm512_permutex2var_ps(low, places, high) : _mm512_i32gather_ps(places, table, 4);
    _mm512_storeu_ps(to + j, _mm512_mul_ps(found, scales));
  }
#elif defined(__AVX2__)
  const __m256 scales = _mm256_set1_ps(scale);
  for (; j + 8 <= n; j += 8) {
    const __m256i places = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes + j));
    _mm256_storeu_ps(to + j, _mm256_mul_ps(_mm256_i32gather_ps(table, places, 4), scales));
  }
#endif
  for (; j < n; ++j) to[j] = table[codes[j]] * scale;
}

// W[o, j] = levels[code[o, j]] * scale[o, group of j].
struct Levels {
  int64_t rows, columns, group_size, groups;
  Indices codes, scale_codes;
  int64_t row_bytes = 0;  // where each row begins on a byte; else they follow each other bit by bit
  std::vector<float> levels, scale_levels;
  Stored scales;
  bool one_scale = false;

  Levels(const Tensor& code, const Tensor& level, const Tensor& scale, const Optional& scale_level, int64_t rows,
         int64_t columns, int64_t group_size)
      : rows(rows), columns(columns), group_size(group_size) {
    STD_TORCH_CHECK(group_size > 0, "groups have columns");
    groups = (columns + group_size - 1) / group_size;
    levels = table(level);
    if (code.dim() == 1) {
      codes = indices_of(code, rows * columns, level.numel());
    } else {
      codes = {bytes(code), columns, bits_of(level.numel())};
      STD_TORCH_CHECK(codes.bits == 4 || codes.bits == 8, "codes have 4 or 8 bits");
      row_bytes = width(columns, codes.bits);
      STD_TORCH_CHECK(code.numel() == rows * row_bytes, "codes are not as many as the weight has");
    }
    if (scale_level) {
      scale_levels = table(*scale_level);
      scale_codes = indices_of(scale, rows * groups, scale_level->numel());
    } else {
      one_scale = scale.numel() == 1;
      scales = stored(scale, one_scale ? 1 : rows * groups);
    }
  }

  static std::vector<float> table(const Tensor& values) {
    const int64_t n = values.numel();
    STD_TORCH_CHECK(n > 1 && n <= 256 && std::has_single_bit(static_cast<uint64_t>(n)), "levels are 2, 4, ... or 256");
    const Stored value = stored(values, n);
    std::vector<float> found(std::max(n, kLeast));
    for (int64_t i = 0; i < n; ++i) found[i] = value[i];
    return found;
  }

  // Scales of n groups of row o.
  void read_scales(int64_t o, int64_t first, int64_t n, float* to) const {
    if (scale_levels.empty()) {
      for (int64_t g = 0; g < n; ++g) to[g] = scales[one_scale ? 0 : o * groups + first + g];
      return;
    }
    uint32_t found[kBlock + 1];
    scale_codes.read(o * groups + first, n, found);
    for (int64_t g = 0; g < n; ++g) to[g] = scale_levels[found[g]];
  }

  void operator()(int64_t o, float* row) const {
    uint32_t spread_codes[kBlock];
    const Indices own = row_bytes > 0 ? Indices{codes.data + o * row_bytes, columns, codes.bits} : codes;
    const int64_t first_of_row = row_bytes > 0 ? 0 : o * columns;
    float of_groups[kBlock + 1];
    for (int64_t first = 0; first < columns; first += kBlock) {
      const int64_t end = std::min(columns, first + kBlock);
      own.read(first_of_row + first, end - first, spread_codes);
      const int64_t group = first / group_size;
      read_scales(o, group, (end - 1) / group_size + 1 - group, of_groups);
      for (int64_t g = group, j = first; j < end; ++g) {
        const int64_t next = std::min(end, (g + 1) * group_size);
        look_up(levels, spread_codes + j - first, of_groups[g - group], next - j, row + j);
        j = next;
      }
    }
  }
};

Tensor levels_rows(Tensor x, Tensor codes, Tensor levels, Tensor scales, Optional scale_levels, Optional bias,
                   int64_t rows, int64_t columns, int64_t group_size, double factor) {
  return decoded_product(x, bias, rows, columns, factor,
                         Levels(codes, levels, scales, scale_levels, rows, columns, group_size));
}

Tensor levels_dense(Tensor codes, Tensor levels, Tensor scales, Optional scale_levels, int64_t rows, int64_t columns,
                    int64_t group_size, double factor, ScalarType dtype, int64_t start, int64_t stop) {
  return decoded_dense(codes, rows, columns, factor, dtype, start, stop,
                       Levels(codes, levels, scales, scale_levels, rows, columns, group_size));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ptq161, m) {
  m.def(
      "levels_rows(Tensor x, Tensor codes, Tensor levels, Tensor scales, Tensor? scale_levels, Tensor? bias, "
      "int out_features, int in_features, int group_size, float factor) -> Tensor");
  m.def(
      "levels_dense(Tensor codes, Tensor levels, Tensor scales, Tensor? scale_levels, int out_features, "
      "int in_features, int group_size, float factor, ScalarType dtype, int start, int stop) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ptq161, CPU, m) {
  m.impl("levels_rows", TORCH_BOX(&levels_rows));
  m.impl("levels_dense", TORCH_BOX(&levels_dense));
}
