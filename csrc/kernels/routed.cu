// forward: pack parameters -> condition (v, S or V) -> down_route -> up_project -> the base layer's product on top.
//
// The general case is one launch each of down_route and up_project. Three things need T in memory before it can be
// routed: few tokens (d is split), an in-sequence condition (V is rows of T) and cross_gram (sums over the input's own
// rows). There down_route leaves its raw products, and route goes on from them.
//
// A bottleneck of more columns than a kernel holds in registers is taken in chunks of whole groups: unmixed slices are
// independent of each other until the output.
#include "kernels/steps.h"

namespace routed_peft::cuda {
namespace {

// A, B and C, those that are read in the input's dtype alone.
cudaError_t pack_all(const Host& host, Problem& p) {
  Matrix none;
  const bool rows = !plan::rank_one(p), shares = p.encodes() && p.shared,
             own_c = p.source == Source::kTokens && !p.shared;
  RP_TRY(pack_parameters(host, p, {rows || shares ? &p.a : &none, rows ? &p.b : &none, own_c ? &p.c : &none}));
  if (p.shared && p.a) p.c = p.a;
  return cudaSuccess;
}

// down_route's part that is the same for x and for y.
DownRouteParams down_params(const Host& host, const Problem& p, const Matrix& x, const Matrix& a, const Matrix& bias,
                            const Dropout& drop, const Chunk& chunk) {
  DownRouteParams d;
  d.dtype = p.dtype;
  d.padded_width = plan::padded_width(chunk.width);
  d.x = x;
  d.a = a.block(chunk.first, 0, chunk.width, a.cols);
  d.drop = drop;
  d.split_depth = plan::round_up(x.cols, 64);
  const Device device = host.device();
  d.stages = plan::ring_stages(plan::round_up(x.rows, 64) / 64, device.processors,
                               down_in_pairs(p.dtype == Dtype::kFloat32, d.padded_width), device.shared_bytes,
                               down_stage_bytes(d.padded_width));
  d.route.rows = x.rows;
  d.route.width = static_cast<int>(chunk.width);
  d.route.group_width = static_cast<int>(p.group_width());
  d.route.keep_scale = drop.threshold != 0 ? static_cast<float>(drop.scale()) : 1.f;
  if (bias) d.route.bias = bias.block(0, chunk.first, 1, chunk.width);
  return d;
}

// Splits d over several blocks if there are few rows, or leaves the raw products in memory if `always`.
void split_down(const Host& host, DownRouteParams& d, bool always) {
  d.split_depth = plan::down_split_depth(d.x.rows, d.x.cols);
  d.splits = static_cast<int>(std::max<int64_t>((d.x.cols + d.split_depth - 1) / d.split_depth, 1));
  if (d.splits > 1 || always) d.partial = scratch<float>(host, d.splits * d.x.rows * d.padded_width);
}

// V [y_rows, R] in float32, zero in masked rows, and in y's dtype to `kept` if present.
cudaError_t project_tokens(const Host& host, const Problem& p, float* v, const Matrix& kept) {
  for (const Chunk& chunk : chunks_of(p)) {
    DownRouteParams d = down_params(host, p, p.y, p.c, p.b_c, p.drop_y, chunk);
    d.route.row_mask = p.condition_mask;
    split_down(host, d, false);
    if (d.partial != nullptr) RP_TRY(down_route(d, host.stream()));
    d.route.tokens[0] = v + chunk.first;
    d.route.tokens_stride = p.width;
    d.route.tokens_unrounded = true;
    if (kept) {
      d.route.t = kept.at(0, chunk.first);
      d.route.t_stride = p.width;
    }
    RP_TRY(d.partial != nullptr ? route(d, host.stream()) : down_route(d, host.stream()));
  }
  return cudaSuccess;
}

GramParams state_gram(const Problem& p, const float* v, float* out) {
  GramParams g;
  g.left = g.right = v;
  g.left_rows = g.right_rows = p.conditions;
  g.mask = p.condition_mask;
  g.scale_by_tokens = p.scale_by_tokens;
  g.positive = p.routing == Routing::kGramRelu;
  g.out = out;
  return g;
}

// From y alone; what needs T comes later. `state`: where it is wanted, or nullptr.
cudaError_t encode_condition(const Host& host, const Problem& p, void* state, const Matrix& kept, bool may_take_tokens,
                             Condition& c) {
  c.stride = state_stride(p);
  float* to = static_cast<float*>(state);
  if (p.kind == StateKind::kVector) {
    if (to == nullptr) to = scratch<float>(host, p.conditions.count * p.width);
    void* space = host.scratch(encode_vector_scratch(p));
    c.state = to;
    return encode_vector(p, to, static_cast<float*>(kept.data), space, host.stream());
  }
  const bool tokens = p.kind == StateKind::kTokens;
  float* v = tokens && to != nullptr ? to : scratch<float>(host, p.conditions.rows * p.width);
  RP_TRY(project_tokens(host, p, v, kept));
  c.state = v;
  if (tokens) return cudaSuccess;
  if (to == nullptr && may_take_tokens && plan::gram_order(p) == plan::GramOrder::kTokens) {
    c.by_tokens = true;
    c.stride = p.width;
    return cudaSuccess;
  }
  if (to == nullptr) to = scratch<float>(host, p.conditions.count * p.state_size());
  c.state = to;
  return make_gram(host, p, state_gram(p, v, to));
}

// T in memory first: V of an in-sequence condition, and cross_gram's sums over the input's rows.
cudaError_t encode_from_t(const Host& host, const Problem& p, const std::vector<Chunk>& chunks,
                          std::vector<DownRouteParams>& downs, void* state, Condition& c) {
  const bool in_sequence = p.source == Source::kInSequence && p.kind != StateKind::kVector;
  const bool cross = p.routing == Routing::kCrossGram;
  const int64_t numbers = p.inputs.rows * p.width;
  float* v = nullptr;
  if (in_sequence) {
    v = p.kind == StateKind::kTokens && state != nullptr ? static_cast<float*>(state) : scratch<float>(host, numbers);
  }
  float* t = cross ? scratch<float>(host, numbers) : nullptr;
  for (size_t i = 0; i < chunks.size(); ++i) {
    DownRouteParams& d = downs[i];
    if (in_sequence) {
      d.route.tokens[0] = v + chunks[i].first;
      d.route.token_mask[0] = p.condition_mask;
    }
    if (cross) {
      d.route.tokens[1] = t + chunks[i].first;
      d.route.token_mask[1] = p.input_mask;
    }
    d.route.tokens_stride = p.width;
    if (d.splits > 1) {  // only the whole sum is T
      DownRouteParams raw = d;
      raw.route.t = nullptr;
      raw.route.tokens[0] = raw.route.tokens[1] = nullptr;
      RP_TRY(down_route(raw, host.stream()));
    }
    RP_TRY(d.splits > 1 ? route(d, host.stream()) : down_route(d, host.stream()));
    d.route.tokens[0] = d.route.tokens[1] = nullptr;
    d.route.t = nullptr;  // stored
  }
  if (in_sequence) {
    c.state = v;
    c.stride = p.width;
    if (p.kind == StateKind::kMatrix) {
      float* s =
          state != nullptr ? static_cast<float*>(state) : scratch<float>(host, p.conditions.count * p.state_size());
      RP_TRY(make_gram(host, p, state_gram(p, v, s)));
      c.state = s;
      c.stride = p.state_size();
    }
  }
  if (!cross) return cudaSuccess;
  if (p.kind == StateKind::kVector) {
    float* sums = scratch<float>(host, p.inputs.count * p.width);
    PoolParams sum{dense(t, Dtype::kFloat32, p.inputs.rows, p.width), p.inputs, nullptr, Pool::kNone, false, sums};
    void* space = host.scratch(pool_scratch(sum));
    RP_TRY(pool(sum, space, host.stream()));
    c.sums = sums;
    return cudaSuccess;
  }
  GramParams g;
  g.left = t;
  g.right = c.state;
  g.left_rows = p.inputs;
  g.right_rows = p.conditions;
  g.index = p.index;
  float* k = scratch<float>(host, p.inputs.count * p.width * p.group_width());
  g.out = k;
  RP_TRY(make_gram(host, p, g));
  c.state = k;
  c.stride = p.width * p.group_width();
  return cudaSuccess;
}

cudaError_t low_rank(const Host& host, const Problem& p, const ForwardResult& result, Condition& c) {
  const bool t_first =
      p.routing == Routing::kCrossGram || (p.source == Source::kInSequence && p.kind != StateKind::kVector);
  const std::vector<Chunk> chunks = chunks_of(p);
  const int padded_rank = static_cast<int>(plan::round_up(p.rank(), 16));
  const Dtype z_dtype = p.dtype == Dtype::kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32;
  const int64_t z_stride = p.slice_count * padded_rank;
  char* const z = scratch<char>(host, p.x.rows * z_stride * element_size(z_dtype));

  std::vector<DownRouteParams> downs;
  for (const Chunk& chunk : chunks) {
    DownRouteParams d = down_params(host, p, p.x, p.a, p.b_down, p.drop_x, chunk);
    split_down(host, d, t_first);
    if (result.t) {
      d.route.t = result.t.at(0, chunk.first);
      d.route.t_stride = p.width;
    }
    d.rank = static_cast<int>(p.rank());
    d.padded_rank = padded_rank;
    downs.push_back(d);
  }
  if (t_first) RP_TRY(encode_from_t(host, p, chunks, downs, result.state, c));
  for (size_t i = 0; i < chunks.size(); ++i) {
    DownRouteParams& d = downs[i];
    d.route = route_params(p, d.route, c, chunks[i]);
    if (d.partial != nullptr && !t_first) {
      DownRouteParams raw = d;
      raw.route.t = nullptr;
      RP_TRY(down_route(raw, host.stream()));
    }
    const int64_t first_slice = p.groups == 1 ? 0 : chunks[i].first_group;
    d.z = z + first_slice * padded_rank * element_size(z_dtype);
    d.z_stride = z_stride;
    RP_TRY(d.partial != nullptr ? route(d, host.stream()) : down_route(d, host.stream()));
  }
  for (size_t i = 0; i < chunks.size(); ++i) {
    UpProjectParams u;
    u.dtype = p.dtype;
    u.rows = p.x.rows;
    u.z = z;
    u.z_stride = z_stride;
    u.rank = downs[i].rank;
    u.padded_rank = padded_rank;
    u.b = p.b;
    u.out = result.out;
    u.base = p.base;
    u.bias = p.bias;
    if (p.residual) u.residual = p.x;
    u.scaling = static_cast<float>(p.scaling);
    for (const Segment& segment : segments_of(p, chunks[i], padded_rank)) u.segments[u.segment_count++] = segment;
    RP_TRY(up_project(u, host.stream()));
  }
  return cudaSuccess;
}

}  // namespace

cudaError_t forward(const Host& host, const Problem& problem, const ForwardResult& result) {
  Problem p = problem;
  if (p.group_width() > kMaxWidth || p.slice_count > kMaxSlices) return cudaErrorInvalidValue;
  RP_TRY(pack_all(host, p));
  Condition c;
  if (p.source == Source::kState) {
    c.state = static_cast<const float*>(p.state);
    c.stride = state_stride(p);
  } else if (p.encodes() && (p.source == Source::kTokens || p.kind == StateKind::kVector)) {
    RP_TRY(encode_condition(host, p, result.state, result.kept, true, c));
  }
  if (plan::rank_one(p)) {
    void* space = host.scratch(rank_one_scratch(p));
    RP_TRY(rank_one(p, c.state, result.out, static_cast<float*>(result.t.data), space, host.stream()));
  } else {
    RP_TRY(low_rank(host, p, result, c));
  }
  if (p.weight && p.x.rows > 0) host.base_gemm(result.out, p.x, p.weight.transposed(), true);
  return cudaSuccess;
}

cudaError_t encode(const Host& host, const Problem& problem, void* state, const Matrix& kept) {
  Problem p = problem;
  if (p.group_width() > kMaxWidth) return cudaErrorInvalidValue;
  RP_TRY(pack_all(host, p));
  Condition c;
  return encode_condition(host, p, state, kept, false, c);
}

}  // namespace routed_peft::cuda
