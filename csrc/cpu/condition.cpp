#include "cpu/condition.h"

#include <algorithm>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace routed_peft::cpu {
namespace {

bool valid_row(const Problem& p, int64_t row) { return p.condition_mask == nullptr || p.condition_mask[row]; }

template <class Acc>
Matrix acc(const Acc* data, int64_t rows, int64_t cols) {
  return dense(const_cast<Acc*>(data), accumulated_dtype<Acc>(), rows, cols);
}

// The rows of one condition that pooling counts: body(row).
template <class Body>
void counted_rows(const Problem& p, int64_t condition, const Body& body) {
  for (int64_t row = p.conditions.begin(condition); row < p.conditions.end(condition); ++row) {
    if (!valid_row(p, row)) continue;
    body(row);
    if (p.pool == Pool::kFirst) return;
  }
}

}  // namespace

Pooled pooled(const Problem& p, int64_t condition) {
  Pooled result;
  for (int64_t row = p.conditions.begin(condition); row < p.conditions.end(condition); ++row)
    result.valid += valid_row(p, row);
  if (result.valid == 0) return result;
  const double count = static_cast<double>(result.valid);
  if (p.pool == Pool::kMean) {
    result.weight = 1 / count;
  } else if (p.pool == Pool::kFirst) {
    result.weight = 1;
  } else {  // one token, or ones: a sum
    result.weight = p.scale_by_tokens ? 1 / count : 1;
  }
  result.bias_weight = p.pool == Pool::kFirst ? 1 : result.weight * count;
  return result;
}

template <class Acc>
void scale_factors(const Problem& p, Acc* factor) {
  for (int64_t c = 0; c < p.conditions.count; ++c) {
    const int64_t valid = p.scale_by_tokens ? pooled(p, c).valid : 1;
    factor[c] = Acc{1} / static_cast<Acc>(std::max<int64_t>(valid, 1));
  }
}

// Whether a vector condition's products take bfloat16 factors: each condition is one row as it is, so that nothing is
// rounded that was not.
bool half_rows(const Problem& p) {
  return p.dtype == Dtype::kBFloat16 && p.y.dtype == Dtype::kBFloat16 && p.c.dtype == Dtype::kBFloat16 &&
         p.conditions.rows == p.conditions.count && p.conditions.offsets == nullptr && p.drop_y.threshold == 0;
}

template <class Acc>
void encode_vector(const Host& host, const Problem& p, Acc* v, Acc* pooled_y) {
  const int64_t conditions = p.conditions.count, features = p.y.cols;
  constexpr int64_t kColumns = 256;  // a piece of work: so many columns of one condition
  const int64_t pieces = (features + kColumns - 1) / kColumns;
  parallel(host, conditions * pieces, 2.0 * double(p.conditions.rows * features), [&](int64_t begin, int64_t end) {
    Acc line[kColumns], part[kColumns];
    for (int64_t item = begin; item < end; ++item) {
      const int64_t c = item / pieces, j0 = item % pieces * kColumns, n = std::min(kColumns, features - j0);
      Acc* sum = pooled_y + c * features + j0;
      std::fill_n(sum, n, Acc{0});
      RowSums<Acc> rows(sum, part, n);
      counted_rows(p, c, [&](int64_t row) {
        load_row(p.y, row, j0, n, line, p.drop_y);
        for (int64_t j = 0; j < n; ++j) part[j] += line[j];
        rows.end_row();
      });
      rows.flush();
      const Acc weight = static_cast<Acc>(pooled(p, c).weight);
      for (int64_t j = 0; j < n; ++j) sum[j] *= weight;
    }
  });
  Epilogue exact;
  exact.in_bfloat16 = half_rows(p);
  gemm<Acc>(host, acc(v, conditions, p.width), acc(pooled_y, conditions, features), p.c.transposed(), exact);
  if (!p.b_c) return;
  Array<Acc> bias(p.width);
  load_row(p.b_c, 0, 0, p.width, bias.get());
  for (int64_t c = 0; c < conditions; ++c) {
    isa<Acc>().axpy(p.width, static_cast<Acc>(pooled(p, c).bias_weight), bias.get(), v + c * p.width);
  }
}

// Rows of a dense matrix that the condition's mask leaves out, made zero.
void clear_masked(const Problem& p, const Matrix& m) {
  const int64_t bytes = m.cols * element_size(m.dtype);
  for (int64_t row = 0; p.condition_mask != nullptr && row < m.rows; ++row) {
    if (!p.condition_mask[row]) std::memset(m.at(row, 0), 0, static_cast<size_t>(bytes));
  }
}

template <class Acc>
void project_tokens(const Host& host, const Problem& p, const Matrix& t, const Matrix& v) {
  if (p.source == Source::kInSequence) {
    parallel(host, v.rows, double(v.rows * p.width), [&](int64_t begin, int64_t end) {
      for (int64_t row = begin; row < end; ++row) load_row(t, row, 0, p.width, static_cast<Acc*>(v.at(row, 0)));
    });
  } else {
    Epilogue with_bias;
    with_bias.bias = p.b_c;
    // Only where both are of it: what is rounded here is in every number of S.
    with_bias.in_bfloat16 = half_tokens(p);
    gemm<Acc>(host, v, Operand(p.y, p.drop_y, p.condition_mask), p.c.transposed(), with_bias);
  }
  clear_masked(p, v);
}

template <class Acc>
void encode_matrix(const Host& host, const Problem& p, const Acc* v, Acc* s) {
  const int64_t w = p.group_width(), groups = p.groups;
  Array<Acc> factor(p.conditions.count);
  scale_factors(p, factor.get());
  parallel(host, p.conditions.count * groups, double(p.conditions.rows * p.width * w), [&](int64_t begin, int64_t end) {
    thread_local Scratch<Acc> scratch;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t c = item / groups, g = item % groups;
      const int64_t first = p.conditions.begin(c), rows = p.conditions.end(c) - first;
      const Matrix vg = acc(v, p.conditions.rows, p.width).block(first, g * w, rows, w);
      Matrix left = vg;
      if (p.routing == Routing::kGramRelu) {
        Acc* positive = scratch.get(rows * w);
        for (int64_t m = 0; m < rows; ++m) {
          const Acc* row = v + (first + m) * p.width + g * w;
          for (int64_t j = 0; j < w; ++j) positive[m * w + j] = std::max(row[j], Acc{0});
        }
        left = acc(positive, rows, w);
      }
      Epilogue scaled;
      scaled.alpha = factor[c];
      scaled.in_bfloat16 = half_tokens(p);
      gemm_serial<Acc>(acc(s + (c * groups + g) * w * w, w, w), left.transposed(), vg, scaled);
    }
  });
}

template <class Acc>
void matrix_backward(const Host& host, const Problem& p, const Matrix& v, const Acc* ds, const Matrix& dv) {
  const int64_t w = p.group_width(), groups = p.groups;
  Array<Acc> factor(p.conditions.count);
  scale_factors(p, factor.get());
  parallel(host, p.conditions.count * groups, double(p.conditions.rows * p.width * w), [&](int64_t begin, int64_t end) {
    thread_local Scratch<Acc> sum_scratch, positive_scratch, dv_scratch;
    for (int64_t item = begin; item < end; ++item) {
      const int64_t c = item / groups, g = item % groups;
      const int64_t first = p.conditions.begin(c), rows = p.conditions.end(c) - first;
      const Acc* d = ds + (c * groups + g) * w * w;
      const Matrix vg = v.block(first, g * w, rows, w), target = dv.block(first, g * w, rows, w);
      Epilogue scaled;
      scaled.alpha = factor[c];
      scaled.in_bfloat16 = half_tokens(p);
      if (p.routing == Routing::kGram) {  // V (D + Dᵀ)
        Acc* sum = sum_scratch.get(w * w);
        for (int64_t i = 0; i < w; ++i) {
          for (int64_t j = 0; j <= i; ++j) sum[i * w + j] = sum[j * w + i] = d[i * w + j] + d[j * w + i];
        }
        gemm_serial<Acc>(target, vg, acc(sum, w, w), scaled);
        continue;
      }
      // relu(V) D + (V Dᵀ) ∘ [V > 0]
      Acc* positive = positive_scratch.get(rows * w);
      Acc* out = dv_scratch.get(rows * w);
      gemm_serial<Acc>(acc(out, rows, w), vg, acc(d, w, w).transposed(), scaled);
      for (int64_t m = 0; m < rows; ++m) {
        Acc* line = positive + m * w;
        load_row(vg, m, 0, w, line);
        for (int64_t j = 0; j < w; ++j) {
          if (!(line[j] > 0)) out[m * w + j] = 0;
          line[j] = std::max(line[j], Acc{0});
        }
      }
      scaled.residual = acc(out, rows, w);
      gemm_serial<Acc>(target, acc(positive, rows, w), acc(d, w, w), scaled);
    }
  });
}

template <class Acc>
void vector_gradients(const Host& host, const Problem& p, const Acc* dv, const Acc* pooled_y, const Matrix& dy,
                      bool add_dy, const Matrix& dc, const Matrix& db_c, bool add_dc) {
  const int64_t conditions = p.conditions.count, features = p.y.cols;
  const Matrix dv_matrix = acc(dv, conditions, p.width);
  if (dc) {
    Epilogue added;
    added.accumulate = add_dc;
    added.in_bfloat16 = half_rows(p) && dc.dtype == Dtype::kBFloat16;
    gemm<Acc>(host, dc, dv_matrix.transposed(), acc(pooled_y, conditions, features), added);
  }
  if (db_c) {
    Array<Acc> weighted(conditions * p.width);
    for (int64_t c = 0; c < conditions; ++c) {
      const Acc weight = static_cast<Acc>(pooled(p, c).bias_weight);
      for (int64_t j = 0; j < p.width; ++j) weighted[c * p.width + j] = weight * dv[c * p.width + j];
    }
    column_sums<Acc>(host, db_c, acc(weighted.get(), conditions, p.width), add_dc);
  }
  if (!dy) return;
  Array<Acc> dpooled(conditions * features);
  Epilogue rounded;
  rounded.in_bfloat16 = half_rows(p);
  gemm<Acc>(host, acc(dpooled.get(), conditions, features), dv_matrix, p.c, rounded);
  parallel(host, conditions, 2.0 * double(p.conditions.rows * features), [&](int64_t begin, int64_t end) {
    thread_local Scratch<Acc> line_scratch, old_scratch;
    Acc* line = line_scratch.get(features);
    for (int64_t c = begin; c < end; ++c) {
      const Acc weight = static_cast<Acc>(pooled(p, c).weight);
      bool counts = true;  // rows behind the first valid one do not, under Pool::kFirst
      for (int64_t row = p.conditions.begin(c); row < p.conditions.end(c); ++row) {
        const bool used = counts && valid_row(p, row);
        if (used && p.pool == Pool::kFirst) counts = false;
        if (!used && add_dy) continue;
        for (int64_t j = 0; j < features; ++j) line[j] = used ? weight * dpooled[c * features + j] : Acc{0};
        if (used && p.drop_y.threshold != 0) isa<Acc>().drop(line, row, 0, features, p.drop_y, line);
        if (add_dy) {
          Acc* old = old_scratch.get(features);
          load_row(dy, row, 0, features, old);
          for (int64_t j = 0; j < features; ++j) line[j] += old[j];
        }
        store_row(line, dy, row, 0, features);
      }
    }
  });
}

template <class Acc>
void token_gradients(const Host& host, const Problem& p, const Matrix& dv, const Matrix& dy, const Matrix& dc,
                     const Matrix& db_c, bool add_dc) {
  clear_masked(p, dv);
  if (dc) {
    Epilogue added;
    added.accumulate = add_dc;
    added.in_bfloat16 = half_tokens(p);
    gemm<Acc>(host, dc, dv.transposed(), Operand(p.y, p.drop_y, p.condition_mask), added);
  }
  if (db_c) column_sums<Acc>(host, db_c, dv, add_dc);
  if (dy) {
    Epilogue masked;
    masked.mask = p.drop_y;
    masked.in_bfloat16 = p.dtype == Dtype::kBFloat16;
    gemm<Acc>(host, dy, dv, p.c, masked);
  }
}

#define RP_INSTANTIATE(Acc)                                                                                     \
  template void scale_factors<Acc>(const Problem&, Acc*);                                                       \
  template void encode_vector<Acc>(const Host&, const Problem&, Acc*, Acc*);                                    \
  template void project_tokens<Acc>(const Host&, const Problem&, const Matrix&, const Matrix&);                 \
  template void encode_matrix<Acc>(const Host&, const Problem&, const Acc*, Acc*);                              \
  template void matrix_backward<Acc>(const Host&, const Problem&, const Matrix&, const Acc*, const Matrix&);    \
  template void vector_gradients<Acc>(const Host&, const Problem&, const Acc*, const Acc*, const Matrix&, bool, \
                                      const Matrix&, const Matrix&, bool);                                      \
  template void token_gradients<Acc>(const Host&, const Problem&, const Matrix&, const Matrix&, const Matrix&,  \
                                     const Matrix&, bool);
RP_INSTANTIATE(float)
RP_INSTANTIATE(double)

}  // namespace routed_peft::cpu
