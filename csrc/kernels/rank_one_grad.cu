// The backward of rank_one.cu, in four launches. With u = v, or the ones vector where a route sums:
//
//   dc_n = ⟨dout_n, p⟩   dp = Σ c_n dout_n   dq = Σ dc_n x̃_n   dx_n = mask ∘ Σ_g dc_n q_g (+ dout_n)
//   dv = A dq + s B̂ᵀ dp   dA = Σ u dqᵀ (+ Σ dv ȳᵀ if C is A)   dB̂ = s Σ dp uᵀ   dC = Σ dv ȳᵀ   dY_m = weight mask ∘ dv
//   C
//
// directions (rank_one.cu):       q and p
// sweep (rank_one_sweep.cu):      dc and dx; for chunks of rows their parts of dp and dq
// sum (rank_one_sum.cu):          the parts together, and what they come to in dv
// weights (rank_one_weights.cu):  dA, dB̂, dC, dY and dv
//
// A chunk's sums go to memory and are added by the next launch, rather than by one block that walks over all of a
// condition's rows: one condition would leave a GPU idle. A row of them, like one of q and p, has 4 (groups d + o)
// bytes. There is one a chunk, and one a condition unless that is a single chunk. So the scratch space is a thirtieth
// of x and dout in bfloat16 for long samples, a seventh for samples of 50 rows, and for samples of a single row, at
// worst, twice x and dout in float32, or three times with an index.
#include <algorithm>

#include "kernels/rank_one_grad.h"

namespace routed_peft::cuda {
namespace rank_one_backward {

Space::Space(const Problem& problem, const Wants& wants, const Chunks& chunks, const Parts& parts, int splits,
             void* base) {
  const auto take = [&]<class N>(N*& at, int64_t numbers) {
    at = base == nullptr || numbers == 0 ? nullptr : reinterpret_cast<N*>(static_cast<char*>(base) + bytes);
    bytes += plan::round_up(numbers * int64_t{sizeof(N)}, 256);
  };
  const Directions layout(problem);
  const int64_t conditions = problem.conditions.count;
  take(q, wants.dx ? layout.q_numbers : 0);
  take(p, wants.dx || wants.dq ? layout.p_numbers : 0);
  take(partial, chunks.count * parts.stride);
  const bool one_chunk = chunks.each == 1 && problem.index == nullptr && chunks.count == conditions;
  take(sums, one_chunk ? 0 : std::max<int64_t>(conditions, 1) * parts.stride);
  if (one_chunk) sums = partial;
  take(dv, wants.dv ? splits * conditions * problem.width : 0);
  take(counted, wants.dv ? conditions : 0);
  take(order, problem.index != nullptr ? problem.inputs.count : 0);
  take(starts, problem.index != nullptr ? conditions + 1 : 0);
}

namespace {

Wants wants_of(const Problem& p, const Backward& io) {
  const bool in_sequence = p.source == Source::kInSequence;
  Wants w{};
  w.dx = bool(io.dx);
  w.dv = p.source == Source::kState    ? io.dstate != nullptr
         : in_sequence                 ? io.dx || io.da
         : p.source == Source::kTokens ? io.dy || io.dc || io.db_c || (p.shared && io.da)
                                       : false;
  w.dq = io.da || (w.dv && p.routing != Routing::kExpand);
  w.dp = io.db || (w.dv && p.routing != Routing::kOnes);
  w.dy = in_sequence ? io.dx : io.dy;
  w.pooled_rows = w.dv && p.source != Source::kState && w.dy;
  return w;
}

Parts parts_of(const Problem& p, const Wants& wants) {
  Parts parts{};
  const Directions layout(p);
  parts.q_one = layout.q_shared;
  parts.p_one = layout.p_shared;
  const auto add = [&](Part part) {
    part.columns = static_cast<int>(plan::round_up(part.shift + part.length, kLane));
    part.at = parts.stride;
    parts.stride += part.columns;
    parts.list[parts.count++] = part;
  };
  for (int64_t g = 0; wants.dq && g < p.groups; ++g) {
    Part part{};
    part.is_q = true;
    part.length = static_cast<int>(p.a.cols);
    part.depth = static_cast<int>(p.group_width());
    part.k0 = static_cast<int>(g) * part.depth;
    add(part);
  }
  for (int64_t i = 0; wants.dp && i < p.slice_count; ++i) {
    Part part{};
    part.row = p.slices[i].row;
    part.shift = static_cast<int>(p.slices[i].start % kLane);
    part.length = static_cast<int>(p.slices[i].length);
    part.depth = static_cast<int>(p.rank());
    part.k0 = static_cast<int>(i) * part.depth;
    add(part);
  }
  int tile = 0;
  for (int i = 0; i < parts.count; ++i) {
    parts.list[i].tile = tile;
    tile += static_cast<int>(ceil_div(parts.list[i].columns, kSumColumns));
  }
  return parts;
}

}  // namespace
}  // namespace rank_one_backward

using namespace rank_one_backward;

int64_t rank_one_grad_scratch(const Problem& p, const Backward& io) {
  if (p.slice_count > kMaxSlices || p.groups > kMaxSlices) return 0;
  const Wants wants = wants_of(p, io);
  const Parts parts = parts_of(p, wants);
  return Space(p, wants, chunks_of_problem(p), parts, splits_of(p, wants, parts).splits, nullptr).bytes;
}

cudaError_t rank_one_grad(const Problem& p, const Backward& io, void* scratch, cudaStream_t stream) {
  if (p.slice_count > kMaxSlices || p.groups > kMaxSlices || p.dtype == Dtype::kFloat64) return cudaErrorInvalidValue;
  const Wants wants = wants_of(p, io);
  if (!wants.dx && !wants.dq && !wants.dp) return cudaSuccess;
  Problem problem = p;
  if (p.inputs.rows == 0) problem.index = nullptr;  // nothing to find: all sums are zero
  const Chunks chunks = chunks_of_problem(problem);
  const Parts parts = parts_of(problem, wants);
  const Splits splits = splits_of(problem, wants, parts);
  const Space space(problem, wants, chunks, parts, splits.splits, scratch);
  cudaError_t error = cudaSuccess;
  if (p.inputs.rows > 0) {
    const float* v = static_cast<const float*>(p.state);
    if (wants.dx || wants.dq) error = make_directions(problem, v, space.q, space.p, stream);
    if (error == cudaSuccess) error = sweep(problem, io, wants, chunks, parts, space, stream);
  }
  if (error != cudaSuccess || parts.count == 0) return error;
  error = sum(problem, wants, chunks, parts, splits, space, stream);
  if (error != cudaSuccess) return error;
  return weights(problem, io, wants, parts, splits, space, stream);
}

}  // namespace routed_peft::cuda
