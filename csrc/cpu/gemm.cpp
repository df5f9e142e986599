// Blocks of out are the unit of parallel work. A block keeps its sums in scratch and walks k in steps: read a tile of a
// (convert it, drop it), lay b out in panels, run the micro kernels over both. A rank-wide b is laid out once for all
// blocks, of a large one a block lays out its part for many rows, and for few rows it is read as it lies; where k is
// short, a tile of a serves all columns.
// A second product (Epilogue::plus) adds to the same sums. The micro kernels take numbers of Acc or, where the caller
// allows it and the processor has such products, pairs of bfloat16; by tiles also float32 in parts of bfloat16, as
// exact as float32's own. A few rows are products of lines.
#include "cpu/gemm.h"

#include <algorithm>
#include <type_traits>

#include "cpu/isa.h"
#include "cpu/lay.h"
#include "cpu/rows.h"
#include "kernels/plan.h"

namespace routed_peft::cpu {
namespace {

constexpr int64_t kBlockRows = 96, kBlockColumns = 128, kWide = 256;
constexpr int64_t kDepth = 256;  // of a step: long runs of a row are read
// Rows of a large b that a step reads as they lie: as many streams as a processor can read ahead of.
constexpr int64_t kStreams = 32, kPanelsAhead = 2;
// Up to this k all of a block's rows of a are kept, for columns that are worked on kShortColumns at a time: their
// panels stay near, and long runs of a row are written.
constexpr int64_t kShort = 256, kShortColumns = 512;
constexpr int64_t kWidest = 512;        // columns of a block of few rows
constexpr int64_t kWidestLying = 2048;  // and of one that reads b as it lies
// Of a block of so few rows that lays out rows of b: to read b takes about as long as to multiply by it. It has no more
// than kRunsSums sums, which stay near.
constexpr int64_t kWidestRuns = 1024, kRunsSums = 1 << 17;
constexpr double kSharedProduct = 4e6;  // multiplications that are worth it to cut a rank-wide product of few rows
constexpr int64_t kManyRows = 480;      // of a block that lays out its part of a large b itself
constexpr int64_t kLaid = 1 << 22;      // numbers of b that are laid out at once: 16 MiB, in parts 24
constexpr int64_t kPieces = 4;  // blocks of a product for each thread, so that the last ones hardly wait for another

// Whether the product reads b as it lies: where it serves few rows, and its rows are what the micro kernels take.
template <class Format>
bool reads_in_place(const Matrix& out, const Factors& f) {
  const Matrix& b = f.b.matrix;
  return out.rows <= plan::kRowsInPlace && Format::kEach == 1 && plain(f.b) && b.dtype == Format::kNumber &&
         b.col_stride == 1;
}

struct Blocking {
  int64_t rows, columns, row_blocks, column_blocks;
  int64_t near;  // columns of a block that are worked on at a time, and of b that are laid out together
  int64_t pieces() const { return row_blocks * column_blocks; }
};

// The longer the rows of b in a block are the better where b is read as it lies (`lies`), or laid out row by row
// (`runs`).
Blocking blocking(int64_t m, int64_t n, int64_t k, int64_t threads, bool lies, bool runs) {
  const int64_t wanted = threads > 1 && !lies ? kPieces * threads : threads, even = lies ? 32 : kBlockColumns;
  Blocking grid{};
  const auto spread = [](int64_t size, int64_t most) {  // blocks of much the same size
    const int64_t count = (size + most - 1) / most;
    return up((size + count - 1) / count, 16);
  };
  if (k <= kShort) {
    grid.rows = m <= kBlockRows ? m : kBlockRows;
    const int64_t groups = std::max<int64_t>(wanted * grid.rows / m, 1);
    grid.columns = up((n + groups - 1) / groups, even);
    if (grid.columns > kShortColumns) grid.columns = up(grid.columns, kShortColumns);
    grid.near = std::min(grid.columns, kShortColumns);
  } else if (n <= kWide) {
    const bool shared = double(m * n) * double(k) >= kSharedProduct;
    grid.rows = m > kWide ? kBlockRows : shared ? spread(m, (m + threads - 1) / threads) : m;
    grid.columns = grid.near = n;
  } else {  // large both ways: what is laid out of b serves many rows
    // Wide ones for few rows, for which b's memory counts, and how often a page of it is looked up.
    const bool few_runs = runs && m <= kWide;
    const int64_t widest = lies             ? kWidestLying
                           : few_runs       ? std::min(kWidestRuns, kRunsSums / m)
                           : m < kBlockRows ? kWidest
                                            : kWide,
                  row_blocks = (m + kManyRows - 1) / kManyRows, least = few_runs ? threads : wanted;
    const int64_t fair = up((n * row_blocks + least - 1) / least, even);
    grid.columns = std::min(fair, widest);
    grid.near = few_runs ? std::min(grid.columns, kWide) : grid.columns;
    const int64_t column_blocks = (n + grid.columns - 1) / grid.columns;
    // More pieces of fewer rows, only where threads would wait: each block of rows lays out its part of b again.
    const auto enough = [&](int64_t parts) {
      const int64_t pieces = parts * column_blocks;
      return pieces >= least || (pieces >= 2 * threads && pieces % threads == 0);
    };
    int64_t parts = row_blocks;
    while (!enough(parts) && parts * kBlockRows < m) ++parts;
    grid.rows = spread(m, (m + parts - 1) / parts);
  }
  grid.row_blocks = (m + grid.rows - 1) / grid.rows;
  grid.column_blocks = (n + grid.columns - 1) / grid.columns;
  return grid;
}

// Where in the whole of b, laid out, the panels of columns [j0, ..) and numbers [k0, ..) of k begin.
template <class Acc, class Format>
int64_t laid_at(int64_t j0, int64_t cols, int64_t k0, int64_t k) {
  const int64_t lanes = isa<Acc>().lanes;
  return up(j0, lanes) * units_of<Format>(k) + up(cols, lanes) * units_of<Format>(k0);
}

// Micro kernels' rows for `left` that remain: as many as `most` steps, and none left over that one kernel cannot take.
int64_t strip_rows(int64_t left, int64_t step, int64_t most) {
  const int64_t steps = left / step;
  return step * (steps == 4 ? 2 : std::min(steps, most));
}

// rows × cols of m from (i, j) on, asked for in `asks` times; nothing where a cache is likely to have them.
Wanted wanted_of(const Matrix& m, int64_t i, int64_t j, int64_t rows, int64_t cols, int64_t asks) {
  const int64_t size = element_size(m.dtype);
  if (m.col_stride != 1 || m.rows * m.cols * size < kFar) return {};
  Wanted wanted{};
  wanted.at = static_cast<const char*>(m.at(i, j));
  wanted.stride = m.row_stride * size;
  wanted.bytes = cols * size;
  wanted.rows = rows;
  wanted.each = (rows * ((wanted.bytes + kCacheLine - 1) / kCacheLine) + asks - 1) / asks;
  return wanted;
}

// The same of out and of what is added to it. Nothing where they come while a mask is drawn, nor where the format says
// that it takes longer to ask than to wait.
template <class Format>
Wanted wanted_of(const Matrix& out, const Epilogue& e, int64_t i, int64_t j, int64_t rows, int64_t cols, int64_t asks) {
  if (e.mask.threshold != 0 || !Format::asks_for_out(e.accumulate || e.residual)) return {};
  Wanted wanted = wanted_of(out, i, j, rows, cols, asks);
  if (e.residual && e.residual.dtype == out.dtype && e.residual.col_stride == 1) {
    wanted.other = static_cast<const char*>(e.residual.at(i, j));
    wanted.other_stride = e.residual.row_stride * element_size(out.dtype);
  }
  return wanted;
}

// The sums as they stand: alpha and the mask are of the first product alone where a second one follows.
template <class Acc>
void scale_sums(int64_t i0, int64_t j0, int64_t rows, int64_t cols, Acc* sums, int64_t ld, const Epilogue& e) {
  const Dropout* mask = e.mask.threshold != 0 ? &e.mask : nullptr;
  for (int64_t i = 0; i < rows; ++i) {
    isa<Acc>().finish(sums + i * ld, cols, static_cast<Acc>(e.alpha), mask, i0 + i, j0, nullptr, nullptr, false,
                      accumulated_dtype<Acc>(), sums + i * ld);
  }
}

// Block number `block` of out. `laid`: all of b in panels, or nullptr; of e.plus in the second place. `turned`: out and
// the factors are turned over, and what e names is not.
template <class Acc, class Format>
void run_block(const Matrix& out, const Factors& factors, const Epilogue& e, const Blocking& grid, int64_t block,
               const typename Format::Unit* const* laid, bool turned) {
  using Unit = typename Format::Unit;
  const Isa<Acc>& set = isa<Acc>();
  const int64_t i0 = block / grid.column_blocks * grid.rows, left = block % grid.column_blocks * grid.columns;
  const int64_t rows = std::min(grid.rows, out.rows - i0), right = std::min(left + grid.columns, out.cols);
  const int64_t near_rows = rows <= kWide ? rows : kBlockRows;  // a tile's; there are several where b is laid out here
  const int64_t most_steps = Format::unit_step() > 1 ? 2 : 3;   // of rows, in a micro kernel
  const int64_t wide = 2 * set.lanes, row_step = Format::row_step(),
                tile_size = up(near_rows, row_step) * units_of<Format>(kDepth);
  thread_local Scratch<Acc> sum_scratch, step_scratch, turned_scratch;
  thread_local Scratch<Unit> tile_scratch, panel_scratch;
  Rows<Unit> a{};
  Unit* tile = tile_scratch.get(tile_size);
  Epilogue last = e;
  if (e.plus) last.alpha = 1, last.mask = {};
  const auto lies = [&](const Factors& f) { return laid[&f == e.plus] == nullptr && reads_in_place<Format>(out, f); };
  const auto large = [&](const Factors& f) { return lies(f) && plan::worth_lines(f.b.matrix.cols, f.b.matrix.rows); };
  const auto step_of = [&](const Factors& f) { return large(f) ? kStreams : kDepth; };
  // One step of k: then the sums of the columns at hand are all there are at a time.
  const bool once = !e.plus && factors.a.matrix.cols <= step_of(factors);
  const int64_t padded_rows = up(rows, row_step), width = right - left;
  Acc* const all_sums = sum_scratch.get(padded_rows * up(once ? std::min(grid.near, width) : width, set.lanes));
  const auto finish_block = [&](Acc* sums, int64_t j0, int64_t cols) {
    const int64_t ld = up(cols, set.lanes), line = up(rows, set.lanes);
    if (!turned) return finish(out, i0, j0, rows, cols, sums, ld, last);
    Acc* const lines = turned_scratch.get(ld * line);
    for (int64_t row = 0; row < rows; row += set.lanes) set.turn(sums + row * ld, ld, ld, lines + row, line);
    finish(out.transposed(), j0, i0, cols, rows, lines, line, last);
  };
  for (const Factors* f = &factors; f != nullptr; f = f == e.plus ? nullptr : e.plus) {
    const bool second = f == e.plus, final = second || !e.plus, empty = factors.a.matrix.cols == 0;
    const int64_t k = f->a.matrix.cols;
    const Unit* const all_panels = laid[second];
    const bool lying_rows = lies(*f), ahead = large(*f);  // b's rows are read as they lie; and asked for ahead
    const int64_t step = step_of(*f);
    // Columns within steps of k: what rows of b a step needs are read to the block's end while their pages are known.
    for (int64_t k0 = 0; k0 == 0 || k0 < k; k0 += step) {
      const int64_t depth = std::min(step, k - k0), units = units_of<Format>(depth);
      const bool add = empty || second || k0 > 0;
      for (int64_t j0 = left; j0 < right; j0 += grid.near) {
        const int64_t cols = std::min(grid.near, right - j0), ld = up(cols, set.lanes);
        Acc* const sums = all_sums + (once ? 0 : padded_rows * (j0 - left));
        if (empty && !second) std::fill_n(sums, padded_rows * ld, Acc{0});
        if (second && k0 == 0) scale_sums(i0, j0, rows, cols, sums, ld, e);
        if (k == 0) {
          if (final) finish_block(sums, j0, cols);
          continue;
        }
        const int64_t lying = lying_rows ? cols / wide * wide : 0;  // columns whose panels are read as they lie
        const Unit *panels = nullptr, *in_place = nullptr;
        if (all_panels != nullptr) {
          panels = all_panels + laid_at<Acc, Format>(j0, cols, k0, k);
        } else {
          if (lying > 0) in_place = static_cast<const Unit*>(f->b.matrix.at(k0, j0));
          Unit* fresh = panel_scratch.get((ld - lying) * units_of<Format>(kDepth));
          if (lying < cols) lay_panels<Acc, Format>(f->b, k0, j0 + lying, depth, cols - lying, fresh);
          panels = fresh;
        }
        // What is written after this step, or read for the next one.
        Wanted wanted{};
        const int64_t strip = most_steps * row_step;
        const int64_t calls = (ld + wide - 1) / wide * ((padded_rows + strip - 1) / strip);
        const int64_t asks = calls * ((units + Wanted::kSteps - 1) / Wanted::kSteps);
        if (final && k0 + depth == k) {
          wanted = turned ? wanted_of<Format>(out.transposed(), last, j0, i0, cols, rows, asks)
                          : wanted_of<Format>(out, last, i0, j0, rows, cols, asks);
        } else if (Format::asks_for_rows() && k0 + depth < k && j0 == left && plain(f->a) && !lines_are_columns(f->a)) {
          wanted = wanted_of(f->a.matrix, i0, k0 + depth, rows, std::min(step, k - k0 - depth), asks);
        }
        for (int64_t part = 0; part < rows; part += near_rows) {
          const int64_t part_rows = std::min(near_rows, rows - part), padded = up(part_rows, row_step);
          if (j0 == left) {  // a tile serves all parts of the columns; where there are several tiles, there is one part
            a = read_rows<Acc, Format>(f->a, k0, i0 + part, depth, part_rows, padded, cols, tile);
          }
          // Tiles make long chains of additions: each step's from zero, so that they round no more than eager's.
          Acc* const here = sums + part * ld;
          Acc* const to = Format::kParts > 1 && add ? step_scratch.get(padded * ld) : here;
          // What of a panel stays in the nearest cache while rows go past it.
          const int64_t near = Format::kNear > 0 ? Format::kNear : units;
          for (int64_t u = 0; u < units; u += near) {
            for (int64_t j = 0; j < ld; j += wide) {
              const int64_t vectors = std::min<int64_t>((ld - j) / set.lanes, 2), count = std::min(near, units - u);
              const int64_t panel_row = j < lying ? f->b.matrix.row_stride : vectors * set.lanes;
              const Unit* panel = (j < lying ? in_place + j : panels + (j - lying) * units) + u * panel_row;
              if (ahead && j + kPanelsAhead * wide < lying) {
                expect(f->b.matrix, k0, j0 + j + kPanelsAhead * wide, depth, wide);
              }
              for (int64_t i = 0, taken; i < padded; i += taken) {
                taken = strip_rows(padded - i, row_step, most_steps);
                Format::micro(taken / row_step - 1, vectors - 1)(count, a.at + i * a.row + u * a.col, a.row, a.col,
                                                                 panel, panel_row, u > 0 || (add && to == here),
                                                                 to + i * ld + j, ld, wanted);
              }
            }
          }
          if (to != here) set.axpy(padded * ld, 1, to, here);
        }
        if (final && k0 + depth == k) finish_block(sums, j0, cols);
      }
    }
  }
}

// All of b in panels.
template <class Acc, class Format>
Array<typename Format::Unit> lay_all(const Host& host, const Operand& b, const Blocking& grid) {
  const int64_t k = b.matrix.rows, n = b.matrix.cols, width = grid.near;
  const int64_t steps = (k + kDepth - 1) / kDepth;
  Array<typename Format::Unit> laid(up(n, isa<Acc>().lanes) * units_of<Format>(k));
  parallel(host, (n + width - 1) / width * steps, double(n * k), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t j0 = item / steps * width, k0 = item % steps * kDepth, cols = std::min(width, n - j0);
      lay_panels<Acc, Format>(b, k0, j0, std::min(kDepth, k - k0), cols,
                              laid.get() + laid_at<Acc, Format>(j0, cols, k0, k));
    }
  });
  return laid;
}

template <class Acc, class Format>
void blocked(const Host* host, const Matrix& out, const Factors& factors, const Epilogue& e, bool turned = false) {
  const int64_t k = std::max(factors.a.matrix.cols, e.plus ? e.plus->a.matrix.cols : 0);
  const bool lies = reads_in_place<Format>(out, e.plus ? *e.plus : factors);
  const bool runs = !lies && !lines_are_columns((e.plus ? *e.plus : factors).b);
  const Blocking grid = blocking(out.rows, out.cols, k, host != nullptr ? host->threads() : 1, lies, runs);
  Array<typename Format::Unit> laid[2];
  const bool narrow = !lies && (!e.plus || turned) && std::min(out.cols, k) <= kWide && out.cols * k <= kLaid;
  if (host != nullptr && grid.row_blocks > 1 && narrow) {
    laid[0] = lay_all<Acc, Format>(*host, factors.b, grid);
    if (e.plus) laid[1] = lay_all<Acc, Format>(*host, e.plus->b, grid);
  }
  const typename Format::Unit* const all[] = {laid[0].get(), laid[1].get()};
  const auto run = [&](int64_t block) {
    Format::open();
    run_block<Acc, Format>(out, factors, e, grid, block, all, turned);
    Format::close();
  };
  parallel_pieces(host, grid.pieces(), double(out.rows) * double(out.cols) * double(k), run);
}

// Whether the columns of b lie in memory as lines of Acc, or of bfloat16.
template <class Acc>
bool readable_lines(const Operand& b) {
  const bool half = std::is_same_v<Acc, float> && b.matrix.dtype == Dtype::kBFloat16;
  return plain(b) && b.matrix.row_stride == 1 && (b.matrix.dtype == accumulated_dtype<Acc>() || half);
}

// All of a, a few rows, as [rows, k]; rows up to `padded` are zero.
template <class Acc, class Number>
void read_few(const Operand& a, int64_t padded, Number* rows) {
  const int64_t m = a.matrix.rows, k = a.matrix.cols;
  if (lines_are_columns(a)) {
    thread_local Scratch<Number> turned_scratch;
    Number* turned = turned_scratch.get(m * k);
    read_lines<Acc>(a, true, 0, k, 0, m, turned, m);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < k; ++j) rows[i * k + j] = turned[j * m + i];
    }
  } else {
    read_lines<Acc>(a, false, 0, m, 0, k, rows, k);
  }
  std::fill_n(rows + m * k, (padded - m) * k, Number{0});
}

// A few rows times a b whose lines run along k: each number of out is a product of two lines. As pairs of bfloat16
// where Number is uint16_t, which all of b then is.
template <class Acc, class Number>
void few_rows(const Host* host, const Matrix& out, const Factors& factors, const Epilogue& e) {
  constexpr int64_t kColumns = 32;  // of a piece at most; fewer where there are not enough for all threads
  const int64_t threads = host != nullptr ? host->threads() : 1;
  const int64_t columns = std::min(kColumns, up((out.cols + threads - 1) / threads, 4));
  const int64_t m = out.rows, n = out.cols, padded = m <= 2 ? m : up(m, 4), each = std::min<int64_t>(padded, 4);
  thread_local Scratch<Number> first_scratch, second_scratch;
  Number* rows[2] = {first_scratch.get(padded * factors.a.matrix.cols), nullptr};
  read_few<Acc>(factors.a, padded, rows[0]);
  if (e.plus) {
    rows[1] = second_scratch.get(padded * e.plus->a.matrix.cols);
    read_few<Acc>(e.plus->a, padded, rows[1]);
  }
  Epilogue last = e;
  if (e.plus) last.alpha = 1, last.mask = {};
  const auto run = [&](int64_t piece) {
    Acc sums[plan::kFewRows * kColumns], more[plan::kFewRows * kColumns];
    const auto multiply = [&](const Factors& f, const Number* a, int64_t j0, int64_t cols, Acc* to) {
      const Matrix lines = f.b.matrix.transposed();
      const int64_t k = lines.cols;
      for (int64_t j = 0; j < cols; j += 4) {
        const void* four[4];
        for (int64_t i = 0; i < 4; ++i) four[i] = lines.at(std::min(j0 + j + i, n - 1), 0);
        for (int64_t i = 0; i < padded; i += each) {
          Acc* at = to + i * kColumns + j;
          if constexpr (std::is_same_v<Number, Acc>) {
            isa<Acc>().dots(each, a + i * k, k, four, lines.dtype, k, at, kColumns);
          } else {
            isa<Acc>().half.dots(each, a + i * k, k, four, k, at, kColumns);
          }
        }
      }
    };
    const int64_t j0 = piece * columns, cols = std::min(columns, n - j0);
    multiply(factors, rows[0], j0, cols, sums);
    if (e.plus) {
      scale_sums(0, j0, m, cols, sums, kColumns, e);
      multiply(*e.plus, rows[1], j0, cols, more);
      for (int64_t i = 0; i < m; ++i) isa<Acc>().axpy(cols, 1, more + i * kColumns, sums + i * kColumns);
    }
    finish(out, 0, j0, m, cols, sums, kColumns, last);
  };
  const int64_t k = std::max(factors.a.matrix.cols, e.plus ? e.plus->a.matrix.cols : 0);
  parallel_pieces(host, (n + columns - 1) / columns, double(m) * double(n) * double(k), run);
}

bool unmasked(const Factors& f, const Epilogue& e) { return plain(f.a) && plain(f.b) && e.mask.threshold == 0; }

// The dtype that the library would take a product in.
Dtype library_dtype(const Matrix& out, const Epilogue& e) { return e.in_bfloat16 ? Dtype::kBFloat16 : out.dtype; }

// Whether the product is one for the library, where the host has one. In bfloat16 only where the caller allows it: then
// the input is of that dtype, and what has to be converted is a weight or rank-wide. A residual stays here: it is added
// before rounding.
template <class Acc>
bool for_library(const Matrix& out, const Factors& f, const Epilogue& e) {
  const Matrix &a = f.a.matrix, &b = f.b.matrix;
  const Dtype dtype = library_dtype(out, e);
  // Ours has sums in float32 where the library would round them.
  if (e.in_bfloat16 && out.dtype != Dtype::kBFloat16 && isa<float>().half.micro[0][0] != nullptr) return false;
  if (e.ours || e.plus || !unmasked(f, e) || ((e.bias || e.residual) && e.accumulate)) return false;
  const bool equal = out.dtype == a.dtype && out.dtype == b.dtype;
  if (e.in_bfloat16 ? bool(e.residual) : !equal || dtype == Dtype::kBFloat16) return false;
  const bool planned = plan::library_gemm(dtype, isa<Acc>().processor, out.rows, out.cols, a.cols, bool(e.bias));
  return plan::chosen(plan::forced.library_gemm, planned);
}

// Whether the product goes by tiles of its numbers' parts: the same with any host, and without one.
template <class Acc>
bool splits(const Matrix& out, const Factors& f, const Epilogue& e) {
  const plan::Processor& processor = isa<float>().processor;
  if (!std::is_same_v<Acc, float> || !processor.tiles || e.in_bfloat16 || e.plus) return false;
  const bool planned = plan::split(processor, out.rows, out.cols, f.b.matrix.rows, !for_library<Acc>(out, f, e));
  return plan::chosen(plan::forced.split, planned);
}

template <class Acc>
void product(const Host* host, const Matrix& out, const Factors& factors, const Epilogue& e) {
  const Factors& largest = e.plus ? *e.plus : factors;
  const bool tiles = e.in_bfloat16 && isa<float>().processor.tiles;
  const bool planned = plan::by_lines(tiles, out.rows, out.cols, largest.b.matrix.rows);
  const bool by_lines = out.rows <= plan::kFewRows && plan::chosen(plan::forced.by_lines, planned) &&
                        readable_lines<Acc>(factors.b) && readable_lines<Acc>(largest.b);
  // A weight's gradient, both of whose factors lie across k: by tiles the large one as rows, laid out without being
  // turned.
  const bool large_across = !e.plus && e.mask.threshold == 0 && out.cols <= kWide && out.rows > out.cols &&
                            factors.a.matrix.cols > kShort && lines_are_columns(factors.a) &&
                            !lines_are_columns(factors.b);
  const Factors turned{factors.b.turned(), factors.a.turned()};
  if constexpr (std::is_same_v<Acc, float>) {
    if (e.in_bfloat16 && isa<float>().half.micro[0][0] != nullptr) {
      Epilogue scaled = e;  // dropout's factors here, where they are not rounded
      for (const Operand* o : {&factors.a, &factors.b}) {
        if (o->dropout.threshold != 0) scaled.alpha *= o->dropout.scale();
      }
      // Fewer rows than b has lines along k: these are multiplied as they lie.
      if (!by_lines && tiles && out.rows <= kWide && out.rows < out.cols && e.mask.threshold == 0 &&
          largest.b.matrix.rows > kShort && lines_are_columns(largest.b)) {
        const Factors second{largest.b.turned(), largest.a.turned()};
        if (e.plus) scaled.plus = &second;
        return blocked<Acc, Pairs>(host, out.transposed(), turned, scaled, true);
      }
      if (!by_lines && tiles && large_across) return blocked<Acc, Pairs>(host, out.transposed(), turned, scaled, true);
      if (!by_lines) return blocked<Acc, Pairs>(host, out, factors, scaled);
      if (factors.b.matrix.dtype == Dtype::kBFloat16 && largest.b.matrix.dtype == Dtype::kBFloat16) {
        return few_rows<Acc, uint16_t>(host, out, factors, scaled);
      }
    } else if (!by_lines && splits<Acc>(out, factors, e)) {
      if (large_across) return blocked<Acc, Split>(host, out.transposed(), turned, e, true);
      return blocked<Acc, Split>(host, out, factors, e);
    }
  }
  by_lines ? few_rows<Acc, Acc>(host, out, factors, e) : blocked<Acc, Plain<Acc>>(host, out, factors, e);
}

}  // namespace

template <class Acc>
void gemm_serial(const Matrix& out, const Operand& a, const Operand& b, const Epilogue& epilogue) {
  if (out.rows > 0 && out.cols > 0) product<Acc>(nullptr, out, {a, b}, epilogue);
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

// alpha a b + bias by the library in one pass over out: the bias is one more line of b, beside a column of ones.
template <class Acc>
bool library_with_bias(const Host& host, const Matrix& out, const Matrix& a, const Matrix& b, const Matrix& bias,
                       double alpha) {
  const int64_t k = a.cols, ld = up(k + 1, kCacheLine / int64_t{sizeof(Acc)});
  Array<Acc> left(out.rows * ld), right(out.cols * ld), last(out.cols);
  load_row(bias, 0, 0, out.cols, last.get());
  const auto copy = [&](const Matrix& from, double scale, const Acc* added, Acc* to) {
    parallel(host, from.rows, double(from.rows * k), [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) {
        Acc* line = to + i * ld;
        load_row(from, i, 0, k, line);
        for (int64_t j = 0; j < k; ++j) line[j] *= static_cast<Acc>(scale);
        line[k] = added != nullptr ? added[i] : Acc{1};
      }
    });
  };
  copy(a, 1, nullptr, left.get());
  copy(b.transposed(), alpha, last.get(), right.get());
  const Matrix wide{left.get(), accumulated_dtype<Acc>(), out.rows, k + 1, ld, 1};
  const Matrix lines{right.get(), accumulated_dtype<Acc>(), out.cols, k + 1, ld, 1};
  return host.library_gemm(out, wide, lines.transposed(), 1, false);
}

// The product by the library, if it is one for it.
template <class Acc>
bool library_product(const Host& host, const Matrix& out, const Operand& a, const Operand& b, const Epilogue& e) {
  const bool bias = e.bias || e.residual;
  const Dtype dtype = library_dtype(out, e);
  if (!for_library<Acc>(out, {a, b}, e)) return false;
  if (plan::forced.library_gemm < 0 && splits<Acc>(out, {a, b}, e)) return false;
  // Where less is copied than a pass over out reads and writes.
  const int64_t copied = (out.rows + out.cols) * (a.matrix.cols + 16);
  if (e.bias && !e.residual && dtype == accumulated_dtype<Acc>() && copied <= out.rows * out.cols) {
    return library_with_bias<Acc>(host, out, a.matrix, b.matrix, e.bias, e.alpha);
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
  if (out.rows == 0 || out.cols == 0 || library_product<Acc>(host, out, a, b, epilogue)) return;
  product<Acc>(&host, out, {a, b}, epilogue);
}

#define RP_INSTANTIATE(Acc)                                                                             \
  template void gemm<Acc>(const Host&, const Matrix&, const Operand&, const Operand&, const Epilogue&); \
  template void gemm_serial<Acc>(const Matrix&, const Operand&, const Operand&, const Epilogue&);
RP_INSTANTIATE(float)
RP_INSTANTIATE(double)

}  // namespace routed_peft::cpu
