// Products of a few rows with the weights of BiLLM, PB-LLM and Quant-dLLM, and their dense forms; the formats' tensors
// are described in ptq161/packed.

#include "decoded_rows.h"

namespace {

using namespace packed_rows;

// BiLLM: a sign and a group of every weight, or two signs in salient columns.
struct BiLLM {
  int64_t rows, columns, blocks, n_salient;
  std::vector<Span> spans;  // of salient columns
  Bits signs, second_signs, sparse;
  Stored scales, means;  // [4, rows, blocks], [3, rows, blocks]

  BiLLM(const Tensor& salient, const Tensor& sign, const Tensor& second, const Tensor& group, const Tensor& scale,
        const Tensor& mean, int64_t rows, int64_t columns, int64_t column_block, int64_t n_salient)
      : rows(rows), columns(columns), n_salient(n_salient) {
    const Bits mask = bits_of(salient, width(columns, 1));
    spans = spans_of(columns, column_block, [&](int64_t j) { return mask.data[j / 8] >> (j % 8) & 1; });
    int64_t found = 0;
    for (const Span& span : spans) found += std::popcount(span.mask);
    STD_TORCH_CHECK(found == n_salient, "the mask has another number of salient columns");
    blocks = (columns + column_block - 1) / column_block;
    signs = bits_of(sign, rows * width(columns, 1));
    second_signs = bits_of(second, rows * width(n_salient, 1));
    sparse = bits_of(group, rows * width(columns - n_salient, 1));
    scales = stored(scale, 4 * rows * blocks);
    means = stored(mean, 3 * rows * blocks);
  }

  void operator()(int64_t o, float* row) const {
    const int64_t sign_row = 8 * o * width(columns, 1), second_row = 8 * o * width(n_salient, 1);
    const int64_t sparse_row = 8 * o * width(columns - n_salient, 1);
    float table[8];
    int64_t block = -1;
    for (const Span& span : spans) {
      if (span.block != block) {
        block = span.block;
        float scale[4], mean[3];
        for (int i = 0; i < 4; ++i) scale[i] = scales[(i * rows + o) * blocks + block];
        for (int i = 0; i < 3; ++i) mean[i] = means[(i * rows + o) * blocks + block];
        for (int i = 0; i < 8; ++i) {
          const float sign = i & 1 ? 1.0f : -1.0f, second = i & 2 ? 1.0f : -1.0f;
          const int group = i >> 1 & 1;
          table[i] = i < 4 ? sign * scale[group] + mean[group] : sign * scale[2] + second * scale[3] + mean[2];
        }
      }
      const uint64_t other = ~span.mask & lowest(span.n);
      const uint64_t second = spread(second_signs.at(second_row + span.before), span.mask);
      const uint64_t group = spread(sparse.at(sparse_row + span.first - span.before), other);
      look_up(table, signs.at(sign_row + span.first), second | group, span.mask, span.n, row + span.first);
    }
  }
};

// PB-LLM: a sign of every weight, or a code of each salient one; both are stored for all rows one behind the other.
struct PBLLM {
  int64_t rows, columns;
  int bits;
  std::vector<int64_t> before;  // salient weights in front of each row
  Bits salient, signs, codes;
  Stored means, scales, high_scales, high_zero_points;

  PBLLM(const Tensor& mask, const Tensor& sign, const Tensor& code, const Tensor& mean, const Tensor& scale,
        const Tensor& high_scale, const Tensor& high_zero_point, int64_t rows, int64_t columns, int64_t high_bit,
        int64_t n_salient)
      : rows(rows), columns(columns), bits(static_cast<int>(high_bit)), before(rows + 1) {
    STD_TORCH_CHECK(1 <= high_bit && high_bit <= 8, "codes have 1 to 8 bits");
    salient = bits_of(mask, rows * width(columns, 1));
    torch::stable::parallel_for(0, rows, std::max<int64_t>(1, 16 * kGrainWeights / std::max<int64_t>(1, columns)),
                                [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        for (int64_t j = 0; j < columns; j += 64) before[o + 1] += std::popcount(chosen(o, j));
      }
    });
    for (int64_t o = 0; o < rows; ++o) before[o + 1] += before[o];
    STD_TORCH_CHECK(before[rows] == n_salient, "the mask has another number of salient weights");
    signs = bits_of(sign, width(rows * columns - n_salient, 1));
    codes = bits_of(code, width(n_salient, high_bit));
    means = stored(mean, rows);
    scales = stored(scale, rows);
    high_scales = stored(high_scale, rows);
    high_zero_points = stored(high_zero_point, rows);
  }

  // Which of the 64 columns from j on are salient in row o.
  uint64_t chosen(int64_t o, int64_t j) const {
    return salient.at(8 * o * width(columns, 1) + j) & lowest(columns - j);
  }

  void operator()(int64_t o, float* row) const {
    const float mean = means[o], scale = scales[o], step = high_scales[o], zero_point = high_zero_points[o];
    float values[256];
#pragma omp simd
    for (int code = 0; code < 1 << bits; ++code) values[code] = step * (static_cast<float>(code) - zero_point);
    int64_t sign = o * columns - before[o], code = before[o] * bits;
    const uint32_t mask = (1u << bits) - 1;
    for (int64_t j = 0; j < columns; j += 64) {
      uint64_t places = chosen(o, j);
      const uint64_t others = ~places & lowest(columns - j);
      choose(mean - scale, mean + scale, spread(signs.at(sign), others), std::min<int64_t>(64, columns - j), row + j);
      sign += std::popcount(others);
#if defined(__AVX512BW__)
      if (bits == 8 && code / 8 + 64 <= codes.nbytes) {  // without a branch that no processor foresees
        const int64_t n = std::min<int64_t>(64, columns - j);
        code += 8 * place_codes(codes.data + code / 8, places, step, zero_point, n, row + j);
        continue;
      }
#endif
      for (; places != 0; places &= places - 1, code += bits) {
        row[j + std::countr_zero(places)] = values[code_at(code) & mask];
      }
    }
  }

#if defined(__AVX512BW__)
  // Writes n values, at most 64, where `places` are set, from as many codes of 8 bits; returns how many.
  static int place_codes(const uint8_t* from, uint64_t places, float step, float zero_point, int64_t n, float* to) {
    const __m512 steps = _mm512_set1_ps(step), zeros = _mm512_set1_ps(zero_point);
    const int count = std::popcount(places);
    for (int64_t j = 0; j < n; j += 16) {
      const __m512i codes = _mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
      const __m512 values = _mm512_mul_ps(steps, _mm512_sub_ps(_mm512_cvtepi32_ps(codes), zeros));
      from += std::popcount(places & 0xffff);
      const __mmask16 mask = next_mask(places);
      _mm512_storeu_ps(to + j, _mm512_mask_expand_ps(_mm512_loadu_ps(to + j), mask, values));
    }
    return count;
  }
#endif

  // The code at a bit, with other bits above it.
  uint32_t code_at(int64_t bit) const {
    const uint8_t* from = codes.data + bit / 8;
    const int shift = static_cast<int>(bit % 8);
    return shift + bits <= 8 ? from[0] >> shift : (from[0] | from[1] << 8) >> shift;
  }
};

// Quant-dLLM: up to three signs of a weight, each times a scale of its row and block and one of its column.
struct RowColumnBinary {
  struct Term {
    std::vector<Span> spans;            // of the columns that have it
    std::vector<int64_t> place;         // of each block's scale in a row of them
    std::vector<float> column_scale;    // [columns], zeros where there is none
    int64_t first = 0;                  // sign of a row
  };

  // Signs that lie together in a row and share its scale.
  struct Piece {
    int64_t first, n, place;
  };

  int64_t rows, columns, n_signs = 0, n_scales = 0;
  std::vector<Term> terms;
  std::vector<Piece> pieces;
  std::vector<int32_t> column_of;  // [n_signs]
  Bits signs;
  Stored row_scales, column_scales;

  RowColumnBinary(const Tensor& orders, const Tensor& sign, const Tensor& row_scale, const Tensor& column_scale,
                  int64_t rows, int64_t columns, int64_t column_block, int64_t order_block)
      : rows(rows), columns(columns) {
    STD_TORCH_CHECK(order_block > 0 && column_block > 0, "blocks have columns");
    const Bits order = bits_of(orders, width((columns + order_block - 1) / order_block, 2));
    const auto order_of = [&](int64_t j) {
      const int64_t i = j / order_block;
      return 1 + (order.data[i / 4] >> (i % 4 * 2) & 3);
    };
    int most = 0;
    for (int64_t j = 0; j < columns; ++j) most = std::max(most, order_of(j));
    terms.resize(most);
    column_scales = stored(column_scale, column_scale.numel());
    for (int k = 0; k < most; ++k) {
      Term& term = terms[k];
      term.first = n_signs;
      term.spans = spans_of(columns, column_block, [&](int64_t j) { return order_of(j) > k; });
      term.place.resize((columns + column_block - 1) / column_block, -1);
      term.column_scale.resize(columns);
      for (const Span& span : term.spans) {
        if (span.mask != 0 && term.place[span.block] < 0) term.place[span.block] = n_scales++;
      }
      for (int64_t j = 0; j < columns; ++j) {
        if (order_of(j) <= k) continue;
        STD_TORCH_CHECK(n_signs < column_scale.numel(), "a column's scale is missing");
        term.column_scale[j] = column_scales[n_signs++];
        column_of.push_back(static_cast<int32_t>(j));
      }
      for (const Span& span : term.spans) {
        if (span.mask == 0) continue;
        pieces.push_back({term.first + span.before, std::popcount(span.mask), term.place[span.block]});
      }
    }
    STD_TORCH_CHECK(n_signs == column_scale.numel(), "there are more scales than columns");
    signs = bits_of(sign, rows * width(n_signs, 1));
    row_scales = stored(row_scale, rows * n_scales);
  }

  void operator()(int64_t o, float* row) const {
    std::fill_n(row, columns, 0.0f);
    for (const Term& term : terms) {
      for (const Span& span : term.spans) {
        if (span.mask == 0) continue;
        const int64_t bit = 8 * o * width(n_signs, 1) + term.first + span.before;
        const uint64_t plus = spread(signs.at(bit), span.mask);
        const float scale = row_scales[o * n_scales + term.place[span.block]];
        add_signed(scale, term.column_scale.data() + span.first, ~plus, span.n, row + span.first);
      }
    }
  }

  // M rows of y. A piece adds its scale times twice the values with a plus, less all of them; the values are those of x
  // times the columns' scales, in the order of the signs.
  template <int M>
  void multiply(const float* x, float factor, float* y) const {
    const int64_t stride = n_signs + kSlack;
    std::vector<float> values(M * stride), sums(M * pieces.size());
    for (int m = 0; m < M; ++m) {
      for (int64_t i = 0; i < n_signs; ++i) values[m * stride + i] = x[m * columns + column_of[i]] * column_scales[i];
      for (size_t p = 0; p < pieces.size(); ++p) {
        const float* first = values.data() + m * stride + pieces[p].first;
        for (int64_t i = 0; i < pieces[p].n; ++i) sums[p * M + m] += first[i];
      }
    }
    const int64_t grain = std::max<int64_t>(1, kGrainWeights / 2 / std::max<int64_t>(1, n_signs * M));
    torch::stable::parallel_for(0, rows, grain, [&](int64_t begin, int64_t end) {
      for (int64_t o = begin; o < end; ++o) {
        Floats16 totals[M] = {};
        float less[M] = {};
        const int64_t row = 8 * o * width(n_signs, 1);
        for (size_t p = 0; p < pieces.size(); ++p) {
          const Piece& piece = pieces[p];
          const float scale = row_scales[o * n_scales + piece.place];
          uint64_t plus = signs.at(row + piece.first) & lowest(piece.n);
          Floats16 chosen[M] = {};
          for (int64_t j = 0; j < piece.n; j += 16, plus >>= 16) {
            for (int m = 0; m < M; ++m) add_where(plus, values.data() + m * stride + piece.first + j, chosen[m]);
          }
          for (int m = 0; m < M; ++m) {
            totals[m] += chosen[m] * (2.0f * scale);
            less[m] += scale * sums[p * M + m];
          }
        }
        for (int m = 0; m < M; ++m) {
          float total = 0.0f;
          for (int i = 0; i < 16; ++i) total += totals[m][i];
          y[m * rows + o] = factor * (total - less[m]);
        }
      }
    });
  }
};

Tensor billm_rows(Tensor x, Tensor salient, Tensor signs, Tensor second_signs, Tensor sparse, Tensor scales,
                  Tensor means, Optional bias, int64_t rows, int64_t columns, int64_t column_block, int64_t n_salient,
                  double factor) {
  return decoded_product(
      x, bias, rows, columns, factor,
      BiLLM(salient, signs, second_signs, sparse, scales, means, rows, columns, column_block, n_salient));
}

Tensor billm_dense(Tensor salient, Tensor signs, Tensor second_signs, Tensor sparse, Tensor scales, Tensor means,
                   int64_t rows, int64_t columns, int64_t column_block, int64_t n_salient, double factor,
                   ScalarType dtype, int64_t start, int64_t stop) {
  return decoded_dense(
      signs, rows, columns, factor, dtype, start, stop,
      BiLLM(salient, signs, second_signs, sparse, scales, means, rows, columns, column_block, n_salient));
}

Tensor pb_llm_rows(Tensor x, Tensor salient, Tensor signs, Tensor codes, Tensor means, Tensor scales,
                   Tensor high_scales, Tensor high_zero_points, Optional bias, int64_t rows, int64_t columns,
                   int64_t high_bit, int64_t n_salient, double factor) {
  return decoded_product(x, bias, rows, columns, factor,
                         PBLLM(salient, signs, codes, means, scales, high_scales, high_zero_points, rows, columns,
                               high_bit, n_salient));
}

Tensor pb_llm_dense(Tensor salient, Tensor signs, Tensor codes, Tensor means, Tensor scales, Tensor high_scales,
                    Tensor high_zero_points, int64_t rows, int64_t columns, int64_t high_bit, int64_t n_salient,
                    double factor, ScalarType dtype, int64_t start, int64_t stop) {
  return decoded_dense(signs, rows, columns, factor, dtype, start, stop,
                       PBLLM(salient, signs, codes, means, scales, high_scales, high_zero_points, rows, columns,
                             high_bit, n_salient));
}

Tensor row_column_binary_rows(Tensor x, Tensor orders, Tensor signs, Tensor row_scales, Tensor column_scales,
                              Optional bias, int64_t rows, int64_t columns, int64_t column_block, int64_t order_block,
                              double factor) {
  const RowColumnBinary w(orders, signs, row_scales, column_scales, rows, columns, column_block, order_block);
  return product_of(x, bias, rows, columns, [&](const float* from, float* to, int64_t n_rows) {
    int64_t m = 0;
    for (; m + kMostRows <= n_rows; m += kMostRows) {
      w.multiply<kMostRows>(from + m * columns, static_cast<float>(factor), to + m * rows);
    }
    for (; m < n_rows; ++m) w.multiply<1>(from + m * columns, static_cast<float>(factor), to + m * rows);
  });
}

Tensor row_column_binary_dense(Tensor orders, Tensor signs, Tensor row_scales, Tensor column_scales, int64_t rows,
                               int64_t columns, int64_t column_block, int64_t order_block, double factor,
                               ScalarType dtype, int64_t start, int64_t stop) {
  return decoded_dense(
      signs, rows, columns, factor, dtype, start, stop,
      RowColumnBinary(orders, signs, row_scales, column_scales, rows, columns, column_block, order_block));
}

}  // namespace

STABLE_TORCH_LIBRARY_FRAGMENT(ptq161, m) {
  m.def(
      "billm_rows(Tensor x, Tensor salient, Tensor signs, Tensor second_signs, Tensor sparse, Tensor scales, "
      "Tensor means, Tensor? bias, int out_features, int in_features, int column_block, int n_salient, "
      "float factor) -> Tensor");
  m.def(
      "billm_dense(Tensor salient, Tensor signs, Tensor second_signs, Tensor sparse, Tensor scales, Tensor means, "
      "int out_features, int in_features, int column_block, int n_salient, float factor, ScalarType dtype, int start, "
      "int stop) -> Tensor");
  m.def(
      "pb_llm_rows(Tensor x, Tensor salient, Tensor signs, Tensor codes, Tensor means, Tensor scales, "
      "Tensor high_scales, Tensor high_zero_points, Tensor? bias, int out_features, int in_features, int high_bit, "
      "int n_salient, float factor) -> Tensor");
  m.def(
      "pb_llm_dense(Tensor salient, Tensor signs, Tensor codes, Tensor means, Tensor scales, Tensor high_scales, "
      "Tensor high_zero_points, int out_features, int in_features, int high_bit, int n_salient, float factor, "
      "ScalarType dtype, int start, int stop) -> Tensor");
  m.def(
      "row_column_binary_rows(Tensor x, Tensor orders, Tensor signs, Tensor row_scales, Tensor column_scales, "
      "Tensor? bias, int out_features, int in_features, int column_block, int order_block, float factor) -> Tensor");
  m.def(
      "row_column_binary_dense(Tensor orders, Tensor signs, Tensor row_scales, Tensor column_scales, "
      "int out_features, int in_features, int column_block, int order_block, float factor, ScalarType dtype, int start, "
      "int stop) -> Tensor");
}

STABLE_TORCH_LIBRARY_IMPL(ptq161, CPU, m) {
  m.impl("billm_rows", TORCH_BOX(&billm_rows));
  m.impl("billm_dense", TORCH_BOX(&billm_dense));
  m.impl("pb_llm_rows", TORCH_BOX(&pb_llm_rows));
  m.impl("pb_llm_dense", TORCH_BOX(&pb_llm_dense));
  m.impl("row_column_binary_rows", TORCH_BOX(&row_column_binary_rows));
  m.impl("row_column_binary_dense", TORCH_BOX(&row_column_binary_dense));
}
