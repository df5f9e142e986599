#include "cpu/rows.h"

#include <algorithm>

#include "cpu/isa.h"

namespace routed_peft::cpu {

template <class Acc>
void load_row(const Matrix& m, int64_t row, int64_t column, int64_t n, Acc* to, const Dropout& dropout) {
  const Isa<Acc>& set = isa<Acc>();
  const bool lies = m.col_stride == 1 || n == 1, drops = dropout.threshold != 0;
  if (drops && lies && m.dtype == accumulated_dtype<Acc>()) {
    return set.drop(static_cast<const Acc*>(m.at(row, column)), row, column, n, dropout, to);
  }
  if (lies) {
    set.load(m.at(row, column), m.dtype, n, to);
  } else {
    for (int64_t i = 0; i < n; ++i) set.load(m.at(row, column + i), m.dtype, 1, to + i);
  }
  if (drops) set.drop(to, row, column, n, dropout, to);
}

template <class Acc>
void store_row(const Acc* from, const Matrix& m, int64_t row, int64_t column, int64_t n) {
  if (m.col_stride == 1 || n == 1) {
    isa<Acc>().store(from, n, m.dtype, m.at(row, column));
  } else {
    for (int64_t i = 0; i < n; ++i) isa<Acc>().store(from + i, 1, m.dtype, m.at(row, column + i));
  }
}

template <class Acc>
void finish(const Matrix& out, int64_t i0, int64_t j0, int64_t rows, int64_t cols, Acc* sums, int64_t ld,
            const Epilogue& e) {
  const Isa<Acc>& set = isa<Acc>();
  thread_local Scratch<Acc> bias_scratch, other_scratch;
  Acc* bias = e.bias ? bias_scratch.get(cols) : nullptr;
  if (bias) load_row(e.bias, 0, j0, cols, bias);
  const Dropout* mask = e.mask.threshold != 0 ? &e.mask : nullptr;
  const Acc alpha = static_cast<Acc>(e.alpha);
  const bool straight =
      out.col_stride == 1 && (!e.residual || (e.residual.dtype == out.dtype && e.residual.col_stride == 1));
  for (int64_t i = 0; i < rows; ++i) {
    Acc* sum = sums + i * ld;
    if (straight) {
      set.finish(sum, cols, alpha, mask, i0 + i, j0, bias, e.residual ? e.residual.at(i0 + i, j0) : nullptr,
                 e.accumulate, out.dtype, out.at(i0 + i, j0));
      continue;
    }
    set.finish(sum, cols, alpha, mask, i0 + i, j0, bias, nullptr, false, accumulated_dtype<Acc>(), sum);
    Acc* other = other_scratch.get(cols);
    for (const Matrix& m : {e.residual, e.accumulate ? out : Matrix{}}) {
      if (!m) continue;
      load_row(m, i0 + i, j0, cols, other);
      for (int64_t j = 0; j < cols; ++j) sum[j] += other[j];
    }
    store_row(sum, out, i0 + i, j0, cols);
  }
}

template <class Acc>
void fill_rows(const Host& host, const Matrix& out, const Matrix& bias, const Matrix& residual) {
  Array<Acc> row(out.cols);
  if (bias) {
    load_row(bias, 0, 0, out.cols, row.get());
  } else {
    std::fill_n(row.get(), out.cols, Acc{0});
  }
  parallel(host, out.rows, double(out.rows * out.cols), [&](int64_t begin, int64_t end) {
    thread_local Scratch<Acc> scratch;
    Acc* sum = scratch.get(out.cols);
    for (int64_t i = begin; i < end; ++i) {
      if (residual) {
        load_row(residual, i, 0, out.cols, sum);
        for (int64_t j = 0; j < out.cols; ++j) sum[j] += row[j];
      }
      store_row(residual ? sum : row.get(), out, i, 0, out.cols);
    }
  });
}

template <class Acc>
void column_sums(const Host& host, const Matrix& out, const Matrix& a, bool accumulate, const bool* valid) {
  constexpr int64_t kColumns = 64;
  parallel(host, (out.cols + kColumns - 1) / kColumns, double(a.rows * out.cols), [&](int64_t begin, int64_t end) {
    Acc line[kColumns];
    double sum[kColumns];
    for (int64_t block = begin; block < end; ++block) {
      const int64_t j0 = block * kColumns, n = std::min(kColumns, out.cols - j0);
      std::fill_n(sum, n, 0.0);
      for (int64_t i = 0; i < a.rows; ++i) {
        if (valid != nullptr && !valid[i]) continue;
        load_row(a, i, j0, n, line);
        for (int64_t j = 0; j < n; ++j) sum[j] += line[j];
      }
      if (accumulate) {
        load_row(out, 0, j0, n, line);
        for (int64_t j = 0; j < n; ++j) sum[j] += line[j];
      }
      for (int64_t j = 0; j < n; ++j) line[j] = static_cast<Acc>(sum[j]);
      store_row(line, out, 0, j0, n);
    }
  });
}

#define RP_INSTANTIATE(Acc)                                                                     \
  template void load_row<Acc>(const Matrix&, int64_t, int64_t, int64_t, Acc*, const Dropout&);  \
  template void store_row<Acc>(const Acc*, const Matrix&, int64_t, int64_t, int64_t);           \
  template void fill_rows<Acc>(const Host&, const Matrix&, const Matrix&, const Matrix&);       \
  template void column_sums<Acc>(const Host&, const Matrix&, const Matrix&, bool, const bool*); \
  template void finish<Acc>(const Matrix&, int64_t, int64_t, int64_t, int64_t, Acc*, int64_t, const Epilogue&);
RP_INSTANTIATE(float)
RP_INSTANTIATE(double)

}  // namespace routed_peft::cpu
