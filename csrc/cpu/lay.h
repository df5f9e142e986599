// How the factors of a product are read and laid out for the micro kernels of isa.h: for gemm.cpp alone.
#pragma once

#include <algorithm>
#include <cstring>
#include <type_traits>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace routed_peft::cpu {

constexpr int64_t kNearColumns = 128;  // of out, for which rows of a are multiplied as they lie wherever they do
constexpr int64_t kAheadBytes = 2048;  // how far lines are asked for before they are read

inline int64_t up(int64_t value, int64_t multiple) { return (value + multiple - 1) / multiple * multiple; }

// What the micro kernels take: `Unit`s of kEach numbers of k, or of one of the kParts that a number is the sum of.
// kNear: units of a panel that stay in the nearest cache; 0: all of a step.
template <class Acc>
struct Plain {
  using Unit = Acc;
  using Number = Acc;
  static constexpr int64_t kEach = 1, kParts = 1, kNear = 0;
  static constexpr Dtype kNumber = accumulated_dtype<Acc>();
  static int64_t row_step() { return isa<Acc>().row_step; }
  static int64_t unit_step() { return 1; }
  static auto micro(int64_t i, int64_t v) { return isa<Acc>().micro[i][v]; }
  static void open() {}
  static void close() {}
  // Whether a product asks ahead for out, which is added to or only written, and for the next step's rows.
  static bool asks_for_out(bool) { return true; }
  static bool asks_for_rows() { return true; }
  static void lay(const void* from, Dtype dtype, int64_t stride, int64_t depth, int64_t n, int64_t width, int64_t panel,
                  Unit* to) {
    isa<Acc>().lay_lines(from, dtype, stride, depth, n, width, panel, to);
  }
  static bool lays(Dtype) { return true; }
};
struct Pairs {
  using Unit = uint32_t;
  using Number = uint16_t;
  static constexpr int64_t kEach = 2, kParts = 1, kNear = 0;
  static constexpr Dtype kNumber = Dtype::kBFloat16;
  static int64_t row_step() { return isa<float>().half.row_step; }
  static int64_t unit_step() { return isa<float>().half.unit_step; }
  static auto micro(int64_t i, int64_t v) { return isa<float>().half.micro[i][v]; }
  static void open() {
    if (unit_step() > 1) isa<float>().half.open();
  }
  static void close() {
    if (unit_step() > 1) isa<float>().half.close();
  }
  static void lay(const void* from, Dtype dtype, int64_t stride, int64_t depth, int64_t n, int64_t width, int64_t panel,
                  Unit* to) {
    isa<float>().half.lay_lines(from, dtype, stride, depth, n, width, panel, to);
  }
  static bool lays(Dtype dtype) { return dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat32; }
  static bool asks_for_out(bool added_to) { return unit_step() == 1 || added_to; }
  static bool asks_for_rows() { return unit_step() == 1; }
};
// float32 by tiles, as Isa::Half's split_lines and lay_split make it.
struct Split {
  using Unit = uint32_t;
  using Number = float;
  static constexpr int64_t kEach = 2, kParts = cpu::kParts, kNear = 2 * kSplitStep / kEach * kParts;
  static constexpr Dtype kNumber = Dtype::kFloat32;
  static int64_t row_step() { return Pairs::row_step(); }
  static int64_t unit_step() { return kSplitStep / kEach; }
  static auto micro(int64_t i, int64_t v) { return isa<float>().half.split_micro[i][v]; }
  static void open() { isa<float>().half.open(); }
  static void close() { isa<float>().half.close(); }
  static void lay(const void* from, Dtype, int64_t stride, int64_t depth, int64_t n, int64_t width, int64_t panel,
                  Unit* to) {
    isa<float>().half.lay_split(static_cast<const float*>(from), stride, depth, n, width, panel, to);
  }
  static bool lays(Dtype dtype) { return dtype == Dtype::kFloat32; }
  // Not for what is added to: to ask took 4 % longer than to wait, where for what is only written it took 4 % less.
  static bool asks_for_out(bool added_to) { return !added_to; }
  static bool asks_for_rows() { return true; }
};

// Units that `depth` numbers of k are laid out as, in all parts: what is beyond them is zero.
template <class Format>
int64_t units_of(int64_t depth) {
  return up(depth, Format::kEach * Format::unit_step()) / Format::kEach * Format::kParts;
}

inline bool plain(const Operand& o) { return o.dropout.threshold == 0 && o.valid == nullptr; }

// Lines are what an operand is read along: the tensor's rows where dropout or `valid` speak of them, else whichever
// direction lies closer in memory. They are the factor's rows, or its columns.
inline bool lines_are_columns(const Operand& o) {
  if (!plain(o)) return o.transposed;
  return o.matrix.row_stride < o.matrix.col_stride;
}

// n numbers from `offset` on of `lines` lines, each to ld after the last; where they are rounded, dropped but not
// scaled.
template <class Acc, class Number>
void read_lines(const Operand& o, bool columns, int64_t first, int64_t lines, int64_t offset, int64_t n, Number* to,
                int64_t ld) {
  const Isa<Acc>& set = isa<Acc>();
  const Matrix m = columns ? o.matrix.transposed() : o.matrix;
  constexpr bool rounds = !std::is_same_v<Number, Acc>;
  if (plain(o) && m.col_stride == 1) {
    if constexpr (rounds) {
      set.half.round_lines(m.at(first, offset), m.dtype, m.row_stride, lines, n, to, ld);
    } else {
      set.load_lines(m.at(first, offset), m.dtype, m.row_stride, lines, n, to, ld);
    }
    return;
  }
  thread_local Scratch<Acc> scratch;
  Acc* line = scratch.get(n);
  // To draw a mask takes about as long as to wait for memory, and one would not overlap with the other.
  const int64_t size = element_size(m.dtype), bytes = std::max<int64_t>(n * size, 1);
  const int64_t ahead = std::max<int64_t>(kAheadBytes / bytes, 1);
  for (int64_t i = 0; i < lines; ++i, to += ld) {
    if (m.col_stride == 1 && i + ahead < lines) {
      const char* at = static_cast<const char*>(m.at(first + i + ahead, offset));
      for (int64_t byte = 0; byte < n * size; byte += kCacheLine) __builtin_prefetch(at + byte);
    }
    if (o.valid != nullptr && !o.valid[first + i]) {
      std::fill_n(to, n, Number{0});
      continue;
    }
    if constexpr (rounds) {
      const Number* from = to;
      if (m.dtype == Dtype::kBFloat16 && m.col_stride == 1) {
        from = static_cast<const Number*>(m.at(first + i, offset));
      } else {
        load_row(m, first + i, offset, n, line);
        set.half.round_lines(line, Dtype::kFloat32, n, 1, n, to, n);
      }
      if (o.dropout.threshold != 0) {
        set.half.mask(from, first + i, offset, n, o.dropout, to);
      } else if (from != to) {
        std::memcpy(to, from, size_t(n) * sizeof(Number));
      }
    } else {
      load_row(m, first + i, offset, n, to, o.dropout);
    }
  }
}

// Lines of k: depth × n from (k0, first) on, as columns of `width` units, `panel` after one another, of units_of(depth)
// each; what is beyond n in the last is zero.
template <class Acc, class Format>
void read_across(const Operand& o, bool columns, int64_t k0, int64_t first, int64_t depth, int64_t n, int64_t width,
                 int64_t panel, typename Format::Unit* to) {
  const Matrix m = columns ? o.matrix.transposed() : o.matrix;
  if (plain(o) && m.col_stride == 1 && Format::lays(m.dtype)) {
    Format::lay(m.at(k0, first), m.dtype, m.row_stride, depth, n, width, panel, to);
  } else {
    constexpr int64_t kLines = kSplitStep;  // at a time, which are still near when they are laid out
    thread_local Scratch<typename Format::Number> scratch;
    typename Format::Number* lines = scratch.get(kLines * n);
    for (int64_t k = 0; k < depth; k += kLines) {
      const int64_t count = std::min(kLines, depth - k);
      read_lines<Acc>(o, columns, k0 + k, count, first, n, lines, n);
      Format::lay(lines, Format::kNumber, n, count, n, width, panel, to + units_of<Format>(k) * width);
    }
  }
  if constexpr (Format::kParts > 1) return;  // which lays out whole steps
  const int64_t filled = up(depth, Format::kEach) / Format::kEach, units = units_of<Format>(depth);
  for (int64_t j = 0; filled < units && j < n; j += width, to += panel) {
    std::fill_n(to + filled * width, (units - filled) * width, typename Format::Unit{0});
  }
}

// read_along for numbers in parts.
inline void split_along(const Operand& o, bool columns, int64_t k0, int64_t first, int64_t depth, int64_t n,
                        uint32_t* to) {
  const Matrix m = columns ? o.matrix.transposed() : o.matrix;
  const int64_t units = units_of<Split>(depth);
  const auto split = isa<float>().half.split_lines;
  if (plain(o) && m.col_stride == 1 && m.dtype == Dtype::kFloat32) {
    return split(static_cast<const float*>(m.at(first, k0)), m.row_stride, n, depth, to, units);
  }
  constexpr int64_t kLines = 8;  // at a time, which are still near when they are split
  thread_local Scratch<float> scratch;
  float* lines = scratch.get(kLines * depth);
  for (int64_t i = 0; i < n; i += kLines) {
    const int64_t count = std::min(kLines, n - i);
    read_lines<float>(o, columns, first + i, count, k0, depth, lines, depth);
    split(lines, depth, count, depth, to + i * units, units);
  }
}

// Lines along k: n × depth from (first, k0) on, units [padded n][units_of(depth)]; what is beyond is zero.
template <class Acc, class Format>
void read_along(const Operand& o, bool columns, int64_t k0, int64_t first, int64_t depth, int64_t n, int64_t padded,
                typename Format::Unit* to) {
  const int64_t units = units_of<Format>(depth);
  if constexpr (Format::kParts > 1) {
    split_along(o, columns, k0, first, depth, n, to);
  } else {
    using Number = typename Format::Number;
    const int64_t numbers = units * Format::kEach;
    Number* lines = reinterpret_cast<Number*>(to);
    read_lines<Acc>(o, columns, first, n, k0, depth, lines, numbers);
    for (int64_t i = 0; depth < numbers && i < n; ++i) {
      std::fill_n(lines + i * numbers + depth, numbers - depth, Number{0});
    }
  }
  std::fill_n(to + n * units, (padded - n) * units, typename Format::Unit{0});
}

// The lines of k of an operand as they lie, `ld` units after one another; nullptr where they are no such units.
template <class Format>
const typename Format::Unit* lines_in_place(const Operand& o, bool columns, int64_t k0, int64_t first, int64_t depth,
                                            int64_t* ld) {
  const Matrix m = columns ? o.matrix.transposed() : o.matrix;
  if (Format::kParts > 1 || !plain(o) || m.dtype != Format::kNumber || m.col_stride != 1) return nullptr;
  if (depth % (Format::kEach * Format::unit_step()) != 0 || m.row_stride % Format::kEach != 0) return nullptr;
  const auto* at = static_cast<const typename Format::Unit*>(m.at(first, k0));
  *ld = m.row_stride / Format::kEach;
  return reinterpret_cast<uintptr_t>(at) % alignof(typename Format::Unit) == 0 ? at : nullptr;
}

// depth × n of b from (k0, j0) on, as panels of two vectors (the last perhaps of one):
// [panels][units_of(depth)][width].
template <class Acc, class Format>
void lay_panels(const Operand& b, int64_t k0, int64_t j0, int64_t depth, int64_t n, typename Format::Unit* panels) {
  using Unit = typename Format::Unit;
  const int64_t lanes = isa<Acc>().lanes, padded = up(n, lanes), units = units_of<Format>(depth);
  const int64_t wide = padded / (2 * lanes) * 2 * lanes;  // columns in panels of two vectors
  if (!lines_are_columns(b)) {
    if (wide > 0) {
      read_across<Acc, Format>(b, false, k0, j0, depth, std::min(n, wide), 2 * lanes, 2 * lanes * units, panels);
    }
    if (n > wide) read_across<Acc, Format>(b, false, k0, j0 + wide, depth, n - wide, lanes, 0, panels + wide * units);
    return;
  }
  // Lines along k that need no conversion are turned as they lie.
  int64_t ld = units;
  const Unit* lines = n == padded ? lines_in_place<Format>(b, true, k0, j0, depth, &ld) : nullptr;
  if (lines == nullptr) {
    thread_local Scratch<Unit> scratch;
    Unit* copy = scratch.get(units * padded);
    read_along<Acc, Format>(b, true, k0, j0, depth, n, padded, copy);
    lines = copy;
    ld = units;
  }
  for (int64_t j = 0; j < padded; j += lanes) {
    const int64_t width = j < wide ? 2 * lanes : lanes;
    isa<Acc>().turn(lines + j * ld, ld, units, panels + j / width * width * units + j % width, width);
  }
}

// Rows of a as the micro kernels take them, by strides.
template <class Unit>
struct Rows {
  const Unit* at;
  int64_t row, col;
};

// rows × depth of a from (i0, k0) on for products with `cols` columns, laid out in `tile` up to `padded` rows, or as
// they lie.
template <class Acc, class Format>
Rows<typename Format::Unit> read_rows(const Operand& a, int64_t k0, int64_t i0, int64_t depth, int64_t rows,
                                      int64_t padded, int64_t cols, typename Format::Unit* tile) {
  using Unit = typename Format::Unit;
  const int64_t units = units_of<Format>(depth);
  const bool tiles = Format::unit_step() > 1;
  if (!lines_are_columns(a)) {
    // Rows whose distance is half a page's take each other's place in the cache: too often for many panels.
    const bool apart = cols <= kNearColumns || a.matrix.row_stride * element_size(a.matrix.dtype) % 2048 != 0;
    int64_t ld = 0;
    const Unit* lines =
        tiles && apart && rows == padded ? lines_in_place<Format>(a, false, k0, i0, depth, &ld) : nullptr;
    if (lines != nullptr) return {lines, ld, 1};
    read_along<Acc, Format>(a, false, k0, i0, depth, rows, padded, tile);
    return {tile, units, 1};
  }
  if (!tiles) {
    read_across<Acc, Format>(a, true, k0, i0, depth, rows, padded, 0, tile);
    return {tile, 1, padded};
  }
  thread_local Scratch<Unit> scratch;
  const int64_t lanes = isa<Acc>().lanes;
  Unit* across = scratch.get(units * padded);
  read_across<Acc, Format>(a, true, k0, i0, depth, rows, padded, 0, across);
  for (int64_t u = 0; u < units; u += lanes) isa<Acc>().turn(across + u * padded, padded, padded, tile + u, units);
  return {tile, units, 1};
}

}  // namespace routed_peft::cpu
