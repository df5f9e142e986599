// Blocks of out are the unit of parallel work. A block keeps its sums in Acc scratch and walks k in steps of kDepth:
// convert a tile of a (and drop it), lay b out in panels, run the micro kernel over the tile. b that lies turned over
// (a weight [n, k]) is laid out once for all blocks.
#include "cpu/gemm.h"

#include <algorithm>
#include <cstring>

#include "cpu/isa.h"
#include "kernels/plan.h"

namespace routed_peft::cpu {
namespace {

// A step is also the longest chain of additions: short chains round less, at some cost in speed (tests/test_accuracy.py
// is what a longer one fails).
constexpr int64_t kDepth = 64, kBlockRows = 128, kBlockColumns = 128, kWide = 256;

int64_t up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// Lines are what an operand is read along: the tensor's rows where dropout or `valid` speak of them, else whichever
// direction lies closer in memory. They are the factor's rows, or its columns.
bool lines_are_columns(const Operand& o) {
  if (o.dropout.threshold != 0 || o.valid != nullptr) return o.transposed;
  return o.matrix.row_stride < o.matrix.col_stride;
}

// n elements of a line from `offset` on.
template <class Acc>
void read_line(const Operand& o, bool columns, int64_t line, int64_t offset, int64_t n, Acc* to) {
  if (o.valid != nullptr && !o.valid[line]) {
    std::fill_n(to, n, Acc{0});
    return;
  }
  load_row(columns ? o.matrix.transposed() : o.matrix, line, offset, n, to);
  if (o.dropout.threshold != 0) isa<Acc>().drop(to, line, offset, n, o.dropout);
}

// rows × cols of a from (row, col) on: [padded rows, cols] if lines are rows, [cols, padded rows] if they are columns.
template <class Acc>
void read_tile(const Operand& a, bool columns, int64_t row, int64_t col, int64_t rows, int64_t cols, int64_t padded,
               Acc* to) {
  if (columns) {
    for (int64_t k = 0; k < cols; ++k) {
      read_line(a, true, col + k, row, rows, to + k * padded);
      std::fill_n(to + k * padded + rows, padded - rows, Acc{0});
    }
  } else {
    for (int64_t i = 0; i < rows; ++i) read_line(a, false, row + i, col, cols, to + i * cols);
    std::fill_n(to + rows * cols, (padded - rows) * cols, Acc{0});
  }
}

// depth × n of b from (k0, j0) on, as panels [padded n / nr][depth][nr].
template <class Acc>
void lay_panels(const Operand& b, int64_t k0, int64_t j0, int64_t depth, int64_t n, Acc* panels) {
  const int64_t nr = isa<Acc>().nr, padded = up(n, nr);
  thread_local Scratch<Acc> line_scratch;
  Acc* line = line_scratch.get(std::max(depth, padded));
  if (lines_are_columns(b)) {
    std::fill_n(line, depth, Acc{0});
    for (int64_t j = padded - 1; j >= 0; --j) {  // backwards: the padding comes first, while the line is still zero
      if (j < n) read_line(b, true, j0 + j, k0, depth, line);
      Acc* column = panels + j / nr * nr * depth + j % nr;
      for (int64_t k = 0; k < depth; ++k) column[k * nr] = line[k];
    }
  } else {
    for (int64_t k = 0; k < depth; ++k) {
      read_line(b, false, k0 + k, j0, n, line);
      std::fill_n(line + n, padded - n, Acc{0});
      for (int64_t j = 0; j < padded; j += nr)
        std::memcpy(panels + j * depth + k * nr, line + j, sizeof(Acc) * size_t(nr));
    }
  }
}

template <class Acc>
void finish(const Matrix& out, int64_t i0, int64_t j0, int64_t rows, int64_t cols, Acc* sums, int64_t ld,
            const Epilogue& e) {
  thread_local Scratch<Acc> other_scratch;
  Acc* other = other_scratch.get(cols);
  const Acc alpha = static_cast<Acc>(e.alpha);
  for (int64_t i = 0; i < rows; ++i) {
    Acc* sum = sums + i * ld;
    if (e.alpha != 1) {
      for (int64_t j = 0; j < cols; ++j) sum[j] *= alpha;
    }
    if (e.mask.threshold != 0) isa<Acc>().drop(sum, i0 + i, j0, cols, e.mask);
    const auto add = [&](const Matrix& m, int64_t row) {
      load_row(m, row, j0, cols, other);
      for (int64_t j = 0; j < cols; ++j) sum[j] += other[j];
    };
    if (e.bias) add(e.bias, 0);
    if (e.residual) add(e.residual, i0 + i);
    if (e.accumulate) add(out, i0 + i);
    store_row(sum, out, i0 + i, j0, cols);
  }
}

struct Blocking {
  int64_t rows, columns, row_blocks, column_blocks;
};

Blocking blocking(int64_t m, int64_t n) {
  const int64_t rows = m <= kWide ? m : kBlockRows, columns = n <= kWide ? n : kBlockColumns;
  return {rows, columns, (m + rows - 1) / rows, (n + columns - 1) / columns};
}

// Block number `block` of out. `laid`: all of b in panels, by (column block, depth step), or nullptr.
template <class Acc>
void run_block(const Matrix& out, const Operand& a, const Operand& b, const Epilogue& e, const Blocking& grid,
               int64_t block, const Acc* laid) {
  const Isa<Acc>& set = isa<Acc>();
  const int64_t k = a.matrix.cols;
  const int64_t i0 = block / grid.column_blocks * grid.rows, j0 = block % grid.column_blocks * grid.columns;
  const int64_t rows = std::min(grid.rows, out.rows - i0), cols = std::min(grid.columns, out.cols - j0);
  const int64_t padded_rows = up(rows, set.mr), padded_cols = up(cols, set.nr);
  thread_local Scratch<Acc> sum_scratch, tile_scratch, panel_scratch;
  Acc* sums = sum_scratch.get(padded_rows * padded_cols);
  Acc* tile = tile_scratch.get(padded_rows * kDepth);
  std::fill_n(sums, padded_rows * padded_cols, Acc{0});
  const bool columns = lines_are_columns(a);
  for (int64_t k0 = 0; k0 < k; k0 += kDepth) {
    const int64_t depth = std::min(kDepth, k - k0);
    read_tile(a, columns, i0, k0, rows, depth, padded_rows, tile);
    const Acc* panels = laid != nullptr ? laid + up(j0, set.nr) * k + padded_cols * k0 : nullptr;
    if (panels == nullptr) {
      Acc* fresh = panel_scratch.get(padded_cols * kDepth);
      lay_panels(b, k0, j0, depth, cols, fresh);
      panels = fresh;
    }
    const int64_t a_row = columns ? 1 : depth, a_col = columns ? padded_rows : 1;
    for (int64_t j = 0; j < padded_cols; j += set.nr) {
      for (int64_t i = 0; i < padded_rows; i += set.mr) {
        set.micro(depth, tile + i * a_row, a_row, a_col, panels + j * depth, sums + i * padded_cols + j, padded_cols);
      }
    }
  }
  finish(out, i0, j0, rows, cols, sums, padded_cols, e);
}

}  // namespace

template <class Acc>
void load_row(const Matrix& m, int64_t row, int64_t column, int64_t n, Acc* to) {
  if (m.col_stride == 1 || n == 1) {
    isa<Acc>().load(m.at(row, column), m.dtype, n, to);
  } else {
    for (int64_t i = 0; i < n; ++i) isa<Acc>().load(m.at(row, column + i), m.dtype, 1, to + i);
  }
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
void gemm_serial(const Matrix& out, const Operand& a, const Operand& b, const Epilogue& epilogue) {
  if (out.rows == 0 || out.cols == 0) return;
  const Blocking grid = blocking(out.rows, out.cols);
  for (int64_t block = 0; block < grid.row_blocks * grid.column_blocks; ++block) {
    run_block<Acc>(out, a, b, epilogue, grid, block, nullptr);
  }
}

// The factor in `dtype`, copied into `storage` unless it already is.
template <class Acc>
Matrix converted(const Host& host, const Matrix& m, Dtype dtype, Array<char>& storage) {
  if (m.dtype == dtype) return m;
  const bool turned = m.row_stride < m.col_stride;
  const Matrix from = turned ? m.transposed() : m;
  storage = Array<char>(from.rows * from.cols * element_size(dtype));
  const Matrix copy = dense(storage.get(), dtype, from.rows, from.cols);
  parallel(host, from.rows, double(from.rows * from.cols), [&](int64_t begin, int64_t end) {
    thread_local Scratch<Acc> scratch;
    Acc* line = scratch.get(from.cols);
    for (int64_t row = begin; row < end; ++row) {
      load_row(from, row, 0, from.cols, line);
      store_row(line, copy, row, 0, from.cols);
    }
  });
  return turned ? copy.transposed() : copy;
}

// The product by the library, if it is one for it. In bfloat16 only where the caller allows it: then the input is of
// that dtype, and what has to be converted is a weight or rank-wide. A residual stays here: it is added before
// rounding.
template <class Acc>
bool library_product(const Host& host, const Matrix& out, const Operand& a, const Operand& b, const Epilogue& e) {
  const bool plain = a.dropout.threshold == 0 && b.dropout.threshold == 0 && e.mask.threshold == 0 &&
                     a.valid == nullptr && b.valid == nullptr;
  const bool bias = e.bias || e.residual;
  const bool half = e.in_bfloat16;
  const Dtype dtype = half ? Dtype::kBFloat16 : out.dtype;
  const bool equal = out.dtype == a.matrix.dtype && out.dtype == b.matrix.dtype;
  if (!plain || (bias && e.accumulate) || (half ? bool(e.residual) : !equal || dtype == Dtype::kBFloat16) ||
      !plan::library_gemm(dtype, isa<Acc>().processor, out.rows, out.cols, a.matrix.cols)) {
    return false;
  }
  Array<char> a_storage, b_storage;
  const Matrix left = converted<Acc>(host, a.matrix, dtype, a_storage);
  const Matrix right = converted<Acc>(host, b.matrix, dtype, b_storage);
  if (out.dtype == dtype) {
    if (bias) fill_rows<Acc>(host, out, e.bias, e.residual);
    return host.library_gemm(out, left, right, e.alpha, bias || e.accumulate);
  }
  Array<char> storage(out.rows * out.cols * element_size(dtype));
  const Matrix rounded = dense(storage.get(), dtype, out.rows, out.cols);
  if (!host.library_gemm(rounded, left, right, e.alpha, false)) return false;
  Epilogue rest = e;
  rest.alpha = 1;
  parallel(host, out.rows, double(out.rows * out.cols), [&](int64_t begin, int64_t end) {
    thread_local Scratch<Acc> scratch;
    Acc* line = scratch.get(out.cols);
    for (int64_t row = begin; row < end; ++row) {
      load_row(rounded, row, 0, out.cols, line);
      finish(out, row, 0, 1, out.cols, line, out.cols, rest);
    }
  });
  return true;
}

template <class Acc>
void gemm(const Host& host, const Matrix& out, const Operand& a, const Operand& b, const Epilogue& epilogue) {
  const int64_t m = out.rows, n = out.cols, k = a.matrix.cols;
  if (m == 0 || n == 0 || library_product<Acc>(host, out, a, b, epilogue)) return;
  const Blocking grid = blocking(m, n);
  const Isa<Acc>& set = isa<Acc>();
  Array<Acc> laid;
  const bool lay_once = grid.row_blocks > 1 && lines_are_columns(b);
  if (lay_once) {
    laid = Array<Acc>(up(n, set.nr) * k);
    const int64_t steps = (k + kDepth - 1) / kDepth;
    parallel(host, grid.column_blocks * steps, double(n * k), [&](int64_t begin, int64_t end) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t j0 = item / steps * grid.columns, k0 = item % steps * kDepth;
        const int64_t cols = std::min(grid.columns, n - j0);
        lay_panels(b, k0, j0, std::min(kDepth, k - k0), cols, laid.get() + up(j0, set.nr) * k + up(cols, set.nr) * k0);
      }
    });
  }
  parallel(host, grid.row_blocks * grid.column_blocks, double(m) * double(n) * double(k),
           [&](int64_t begin, int64_t end) {
             for (int64_t block = begin; block < end; ++block) {
               run_block<Acc>(out, a, b, epilogue, grid, block, lay_once ? laid.get() : nullptr);
             }
           });
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

#define RP_INSTANTIATE(Acc)                                                                             \
  template void load_row<Acc>(const Matrix&, int64_t, int64_t, int64_t, Acc*);                          \
  template void store_row<Acc>(const Acc*, const Matrix&, int64_t, int64_t, int64_t);                   \
  template void gemm<Acc>(const Host&, const Matrix&, const Operand&, const Operand&, const Epilogue&); \
  template void gemm_serial<Acc>(const Matrix&, const Operand&, const Operand&, const Epilogue&);       \
  template void fill_rows<Acc>(const Host&, const Matrix&, const Matrix&, const Matrix&);               \
  template void column_sums<Acc>(const Host&, const Matrix&, const Matrix&, bool, const bool*);
RP_INSTANTIATE(float)
RP_INSTANTIATE(double)

}  // namespace routed_peft::cpu
