// What a forward and a backward share (routed.cu, routed_grad.cu).
#pragma once

#include <algorithm>
#include <initializer_list>
#include <vector>

#include "kernels/plan.h"
#include "kernels/routed.h"

namespace routed_peft::cuda {

#define RP_TRY(call)                          \
  do {                                        \
    const cudaError_t error_ = (call);        \
    if (error_ != cudaSuccess) return error_; \
  } while (false)

// Uninitialised numbers that live until the stream is past this call.
template <class T>
T* scratch(const Host& host, int64_t count) {
  return static_cast<T*>(host.scratch(count * static_cast<int64_t>(sizeof(T))));
}

// The parameters in the input's dtype with neighbouring columns, and, if `by_16`, rows of whole 16 bytes: copies where
// they are not.
inline cudaError_t pack_parameters(const Host& host, Problem& p, std::initializer_list<Matrix*> parameters,
                                   bool by_16 = false) {
  PackParams packed{};
  packed.dtype = p.dtype;
  for (Matrix* m : parameters) {
    const int64_t cols = by_16 ? plan::round_up(m->cols, 16 / element_size(p.dtype)) : m->cols;
    if (!*m || (m->dtype == p.dtype && m->col_stride == 1 && cols == m->cols)) continue;
    void* to = host.scratch(m->rows * cols * element_size(p.dtype));
    packed.from[packed.count] = *m;
    packed.to[packed.count] = to;
    packed.to_cols[packed.count++] = cols;
    *m = dense(to, p.dtype, m->rows, m->cols);
    m->row_stride = cols;
  }
  return packed.count > 0 ? pack(packed, host.stream()) : cudaSuccess;
}

// Groups that are routed together.
struct Chunk {
  int64_t first_group, groups;
  int64_t first, width;  // columns of the bottleneck
};

inline std::vector<Chunk> chunks_of(const Problem& p) {
  const int64_t w = p.group_width(), at_once = std::max<int64_t>(kMaxWidth / w, 1);
  std::vector<Chunk> chunks;
  for (int64_t g = 0; g < p.groups; g += at_once) {
    const int64_t groups = std::min(at_once, p.groups - g);
    chunks.push_back({g, groups, g * w, groups * w});
  }
  return chunks;
}

// K [left_rows.count, R, w] from rows that are in memory; `splits` of them, or as many as the shape says.
inline cudaError_t make_gram(const Host& host, const Problem& p, GramParams g, int64_t splits = 0) {
  g.tensor = p.dtype != Dtype::kFloat32;
  g.width = static_cast<int>(p.width);
  g.group_width = static_cast<int>(p.group_width());
  if (splits == 0) splits = plan::gram_splits(g.left_rows.count, p.groups, p.group_width(), g.left_rows.rows);
  g.splits = static_cast<int>(splits);
  if (g.splits > 1) g.partial = scratch<float>(host, g.splits * g.left_rows.count * p.width * p.group_width());
  return gram(g, host.stream());
}

// The condition as the route reads it.
struct Condition {
  const float* state = nullptr;
  int64_t stride = 0;
  bool by_tokens = false;
  const float* sums = nullptr;
};

inline int64_t state_stride(const Problem& p) { return p.kind == StateKind::kMatrix ? p.state_size() : p.width; }

inline RouteParams route_params(const Problem& p, const RouteParams& base, const Condition& c, const Chunk& chunk) {
  RouteParams r = base;
  r.routing = p.routing;
  r.kind = p.kind;
  r.activation = p.activation;
  r.by_tokens = c.by_tokens;
  r.scale_by_tokens = p.scale_by_tokens;
  r.inputs = p.inputs;
  r.conditions = p.conditions;
  r.index = p.index;
  r.condition_mask = p.condition_mask;
  r.state_stride = c.stride;
  const bool matrix = c.stride == p.state_size() && p.kind == StateKind::kMatrix && !c.by_tokens;
  const bool cross = p.routing == Routing::kCrossGram && p.kind == StateKind::kTokens;
  if (c.state != nullptr) r.state = c.state + chunk.first * (matrix || cross ? p.group_width() : 1);
  if (c.sums != nullptr) r.sums = c.sums + chunk.first;
  return r;
}

// The columns of the output: the chunk's slices, and with the first chunk those that no slice covers. Slice i of the
// chunk's has its columns of the bottleneck at z_stride · i.
inline std::vector<Segment> segments_of(const Problem& p, const Chunk& chunk, int z_stride) {
  const bool mixed = p.groups == 1;
  std::vector<int64_t> order(static_cast<size_t>(p.slice_count));
  for (int64_t i = 0; i < p.slice_count; ++i) order[static_cast<size_t>(i)] = i;
  std::sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return p.slices[a].start < p.slices[b].start; });
  std::vector<Segment> segments;
  int64_t covered = 0;
  const auto gap = [&](int64_t end) {
    if (end > covered && chunk.first == 0) segments.push_back({covered, end - covered, -1, 0});
  };
  for (const int64_t i : order) {
    const Slice& slice = p.slices[i];
    gap(slice.start);
    covered = slice.start + slice.length;
    if (!mixed && (i < chunk.first_group || i >= chunk.first_group + chunk.groups)) continue;
    segments.push_back({slice.start, slice.length, slice.row, static_cast<int>(i) * z_stride});
  }
  gap(p.out_features);
  return segments;
}

}  // namespace routed_peft::cuda
