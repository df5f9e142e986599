// Which algorithm a call takes. Pure functions of shape and dtype, so that they are tested without running anything.
#pragma once

#include <algorithm>
#include <cstdint>

#include "kernels/params.h"

namespace routed_peft::plan {

// What a choice comes out as instead of the one below: for benchmarks that time the alternatives and for tests. Set
// while no call runs, and the same for a forward and its backward; -1 is as planned.
struct Forced {
  int rank_one = -1, gram_order = -1, library_gemm = -1, library_base = -1, by_lines = -1, split = -1,
      reduction_splits = -1;
};
inline Forced forced;

constexpr int64_t chosen(int by_force, int64_t planned) { return by_force < 0 ? planned : by_force; }

// The form of a condition's state. `single`: it has exactly one token.
constexpr StateKind state_kind(Routing routing, Pool pool, bool single) {
  if (routing == Routing::kNone) return StateKind::kNone;
  if (single || pool != Pool::kNone || routing == Routing::kOnes) return StateKind::kVector;
  return routing == Routing::kGram || routing == Routing::kGramRelu ? StateKind::kMatrix : StateKind::kTokens;
}

// Z = c vᵀ with one number c a row: then out_n += ⟨x_n, q⟩ p and no R-wide product is needed. An activation after the
// route needs all of Z; a bias before it is the Adapter's, which has one. Sizes matter only where an index may leave
// conditions without a row: q and p cost R products a condition, T and the update R products a row.
constexpr bool rank_one(Routing routing, StateKind kind, Activation activation, bool has_down_bias) {
  return kind == StateKind::kVector && activation == Activation::kNone && !has_down_bias &&
         (routing == Routing::kExpand || routing == Routing::kGram || routing == Routing::kOnes);
}

inline bool rank_one(const Problem& p) {
  const bool worth = p.conditions.count == p.inputs.count || p.conditions.count <= p.inputs.rows;
  return chosen(forced.rank_one, worth) && rank_one(p.routing, p.kind, p.activation, bool(p.b_down));
}

// gram and gram_relu: T (VᵀV) through the R×R matrix S, or (T Vᵀ) V through an N×M one that lives in a tile.
enum class GramOrder { kMatrix, kTokens };

struct GramShape {
  double samples, conditions;  // B, and how many conditions they share
  double rows, tokens;         // of x and of y, all samples together
  double width;                // of a group; how many groups there are changes both costs alike
};

// Time is taken as flops + kFlopsPerByte · bytes: about what one core's arithmetic is worth against its memory.
constexpr double kFlopsPerByte = 8;

// Of a forward, in units of 2 width groups / conditions flops: whole numbers, which the shapes for tracing
// (routed_peft/ops.py) compare as well. Numbers in memory are float32 whatever the dtype: S, and V as it is read.
constexpr double gram_cost(const GramShape& s, GramOrder order) {
  if (order == GramOrder::kMatrix) {  // S is written and read
    return s.conditions * s.width * (s.tokens + s.rows + 4 * kFlopsPerByte * s.conditions);
  }
  return 2 * s.tokens * (s.rows + kFlopsPerByte * s.samples);  // V is read again for each sample
}

constexpr GramOrder gram_order(const GramShape& s) {
  return gram_cost(s, GramOrder::kMatrix) <= gram_cost(s, GramOrder::kTokens) ? GramOrder::kMatrix : GramOrder::kTokens;
}

// How a call goes that is not asked for S: the forward, and the backward with what that one saved. Where V is rows of T
// and where S is given, it is S.
inline GramOrder gram_order(const Problem& p) {
  if (p.source != Source::kTokens) return GramOrder::kMatrix;
  const GramShape shape{double(p.inputs.count), double(p.conditions.count), double(p.inputs.rows),
                        double(p.conditions.rows), double(p.group_width())};
  return static_cast<GramOrder>(chosen(forced.gram_order, static_cast<int64_t>(gram_order(shape))));
}

// What the processor offers to a product.
struct Processor {
  bool wide_vectors = false;     // AVX2 or more: ours are as fast as the library's on rank-wide shapes, or faster
  bool native_bfloat16 = false;  // products of bfloat16 pairs, which the library uses
  bool outruns_library = false;  // 512-bit arithmetic at full width, of which the library uses half
  bool tiles = false;            // products of bfloat16 tiles (AMX)
  bool library_leads = false;    // Intel: in float32 and float64 the library is faster on most rank-wide shapes too
};

// Whether a product [m, k] × [k, n] with sums in float32 goes by tiles, its numbers in three parts of bfloat16 each:
// six products for one, of which each takes a sixteenth of its time. Each number that is split needs multiplications
// enough to make up for that, more where the library would have taken the product than where it stays here anyway
// (`alone`).
constexpr bool split(Processor processor, int64_t m, int64_t n, int64_t k, bool alone = false) {
  if (!processor.tiles || std::min(m, n) < 64) return false;
  if (alone && k >= 32 && double(m) * double(n) * double(k) >= 16e6) return true;
  return m >= 1024 && k >= 64;
}

// Whether a product [m, k] × [k, n] in `dtype` goes to torch's library: where it is faster, and large enough to make up
// for the call. Ours by tiles is as fast as the library's while the largest of the three matrices stays near, and the
// rank low, and takes a `bias` along in a pass over out that the library takes a second one for. Where the library
// leads, ours in float32 still is faster for many rows at a low rank, up with a bias at a higher one too. float16 stays
// here: the library has no product of it worth the name on a CPU.
constexpr bool library_gemm(Dtype dtype, Processor processor, int64_t m, int64_t n, int64_t k, bool bias = false) {
  const double products = double(m) * double(n) * double(k);
  const int64_t shortest = std::min({m, n, k});
  if (shortest < 8 || products < (processor.library_leads ? 1e6 : 8e6)) return false;
  if (dtype == Dtype::kBFloat16 && processor.tiles) {
    const bool far = products > 1e7 * double(shortest) || std::max({m, n, k}) >= 8192;
    return !bias && products >= (far ? 6e7 : 4e8) && (far || shortest > 128);
  }
  if (dtype == Dtype::kBFloat16) return processor.native_bfloat16 && products >= 16e6;
  const bool low_rank = m >= 256 && (n <= 64 || (k <= (bias && k <= n ? 128 : 64) && k > 32));
  if (dtype == Dtype::kFloat32 && processor.library_leads && low_rank) return false;
  return dtype != Dtype::kFloat16 && (!processor.wide_vectors || processor.library_leads);
}

// A product [rows, k] × [k, n] of a few rows takes its second factor line by line as it lies, if the lines are long: to
// lay it out takes longer than the product. Not a small one, whose numbers would depend on how many rows share a call.
// `tiles`: the product is one of tiles, of which a few rows leave most empty, but which are that much faster.
constexpr int64_t kFewRows = 16;
constexpr int64_t kRowsInPlace = 48;  // of a product whose second factor is read as it lies where its rows run along n
constexpr bool worth_lines(int64_t n, int64_t k) { return n * k >= 16384; }
constexpr bool by_lines(bool tiles, int64_t rows, int64_t n, int64_t k) {
  const int64_t few = !tiles ? kFewRows : n * k <= 32768 ? 4 : 2;
  return rows <= few && k >= (rows > 4 ? 64 : tiles ? 8 : 16) * rows && worth_lines(n, k);
}

// Whether the base layer's product [rows, k] × [k, n] goes to torch's library, or is ours, which takes the update along
// in one pass over out. `lines`: the weight lies along k, as an nn.Linear's does forward. A few rows wait for the
// memory that it comes from, where it does not stay in a cache.
constexpr bool library_base(Dtype dtype, Processor processor, int64_t rows, int64_t n, int64_t k, bool lines) {
  constexpr int64_t kMillion = 1 << 20;
  const bool half = dtype == Dtype::kBFloat16, fast = processor.outruns_library;
  if (dtype == Dtype::kFloat16 || !processor.wide_vectors) return true;
  if (half && processor.tiles) {
    const bool few = rows <= (lines ? 8 : n * k > 4 * kMillion ? 1 : 2) * kFewRows;
    return !few && (rows > 1024 || n * k > kMillion);
  }
  const bool as_it_lies = lines && by_lines(false, rows, n, k);
  if (half) {
    if (as_it_lies && rows <= kFewRows / 4) return false;
    const bool near = n * k <= (rows <= kFewRows / 2 ? 4 * kMillion : 2 * kMillion);
    return !(fast && processor.native_bfloat16 && near && rows <= 2 * kFewRows);
  }
  if (as_it_lies) return false;
  if (!lines && rows <= kRowsInPlace) return rows == 1 && n * k > (fast ? 4 * kMillion : kMillion / 2);
  return !fast && (rows > 2 * kFewRows || n * k > kMillion);
}

// Rows of a piece of work that never spans two samples.
constexpr int64_t kSegmentRows = 128;

// In how many ordered parts the rows of one condition are summed. By shape alone, never by the number of threads, so
// that the sums, and with them every bit, stay the same on any machine.
constexpr int64_t reduction_splits(int64_t conditions, int64_t segments) {
  if (conditions <= 0) return 1;
  return std::clamp<int64_t>(std::min(int64_t{16} / conditions, segments / conditions / 2), 1, 16);
}

inline int64_t splits(int64_t conditions, int64_t segments) {
  return chosen(forced.reduction_splits, reduction_splits(conditions, segments));
}

// Rank-one: conditions worked on at a time, so that q and p of many small samples never become a full-size tensor.
constexpr int64_t kConditionBlock = 256;

// ---- the kernels. How often a sum is split depends on shapes alone, so that a result has the same bits on any device.

// The width that a bottleneck of `width` columns is padded to, or 0: too wide.
constexpr int padded_width(int64_t width) {
  for (const int padded : {16, 32, 64, 128, 256}) {
    if (width <= padded) return padded;
  }
  return 0;
}

constexpr int64_t round_up(int64_t size, int64_t step) { return (size + step - 1) / step * step; }

// Blocks that a launch wants at least; below, it splits its sums. Twice as many as the largest devices have processors
// would hide more latency, but every part of a split is written and read again.
constexpr int64_t kWantedBlocks = 128;

// Columns of x in one part of down_route's split of d: all of them where there are rows enough. A part has at least
// 128, and there are no more than eight: they are read again to be added.
constexpr int64_t down_split_depth(int64_t rows, int64_t d) {
  const int64_t blocks = std::max<int64_t>(round_up(rows, 64) / 64, 1);
  const int64_t splits = std::clamp<int64_t>(std::min<int64_t>(kWantedBlocks / blocks, d / 128), 1, 8);
  return std::max<int64_t>(round_up((d + splits - 1) / splits, 64), 64);
}

// The same for grad_output, whose columns come in units of 64: units in one part, at least two.
constexpr int64_t grad_output_split_depth(int64_t rows, int64_t units) {
  const int64_t blocks = std::max<int64_t>(round_up(rows, 64) / 64, 1);
  const int64_t splits = std::clamp<int64_t>(std::min<int64_t>(kWantedBlocks / blocks, units / 2), 1, 8);
  return std::max<int64_t>((units + splits - 1) / splits, 1);
}

// Parts of the rows of a sample in gram; a part has at least 64 rows.
constexpr int64_t gram_splits(int64_t samples, int64_t groups, int64_t group_width, int64_t rows) {
  const int64_t tiles = round_up(group_width, 64) / 64, blocks = samples * groups * tiles * tiles;
  if (blocks <= 0) return 1;
  return std::clamp<int64_t>(kWantedBlocks / blocks, 1, std::clamp<int64_t>(rows / samples / 64, 1, 16));
}

// Stages of a ring in shared memory: as many as fit beside what else a block has there, so that loads run far ahead,
// into half of a processor's where two blocks will share it with `least` stages each, and 1 KiB that every block costs.
// `pairs`: a processor has registers for two.
constexpr int ring_stages(int64_t blocks, int64_t processors, bool pairs, int64_t shared_bytes, int64_t stage_bytes,
                          int64_t beside = 0, int64_t least = 3) {
  const int64_t half = ((shared_bytes - 1024) / 2 - beside) / stage_bytes;
  const int64_t stages = pairs && blocks > processors && half >= least ? half : (shared_bytes - beside) / stage_bytes;
  return static_cast<int>(std::clamp<int64_t>(stages, 2, 8));
}

}  // namespace routed_peft::plan
