// backward: G = s dOut B̂ through the route -> dT, Z, and the gradient of the state -> dV or dv -> one sweep over x,
// dOut and y for dA, dX, dB, dC and dY -> their parts summed; the base layer's products last, on top of dX.
//
//   [pack] grad_output [route_grad] | state_grad [pooled_grad]        | grad_input reduce
//                                   | gram gram_grad, or gram_grad    |
//
// What nobody asks for is not computed: without a gradient into the condition the middle falls away, without one into T
// the beginning. cross_gram takes the route in two steps, with sums over each sample between them; an in-sequence
// condition adds V's gradient to dT, whose rows it shares.
#include "kernels/steps.h"

namespace routed_peft::cuda {
namespace {

Dtype z_dtype(const Problem& p) { return p.dtype == Dtype::kBFloat16 ? Dtype::kBFloat16 : Dtype::kFloat32; }

// Rank-wide rows [rows, R] of Z's type.
Matrix z_rows(const Host& host, const Problem& p, int64_t rows) {
  return dense(host.scratch(rows * p.width * element_size(z_dtype(p))), z_dtype(p), rows, p.width);
}

// Gradients that a call can want, and what they are made of.
struct Wanted {
  bool dt, dstate;
  explicit Wanted(const Problem& p, const Backward& io) {
    dt = io.dx || io.da || io.db_down;
    if (p.source == Source::kState) {
      dstate = io.dstate != nullptr;
    } else if (p.source == Source::kInSequence) {
      dstate = dt;
    } else {
      dstate = p.source == Source::kTokens && (io.dy || io.dc || io.db_c || (p.shared && (io.da || io.db_down)));
    }
  }
};

// The parts of the parameters' gradients, and the sums of them.
class Reductions {
 public:
  void add(const Matrix& out, const float* parts, int64_t splits, const float* more = nullptr, int64_t more_splits = 0,
           double scale = 1) {
    if (!out) return;
    items_.push_back({{parts, more}, {splits, more_splits}, out, static_cast<float>(scale)});
  }
  cudaError_t run(const Host& host) const {
    for (size_t i = 0; i < items_.size(); i += kMaxReduced) {
      ReduceParams params;
      for (size_t j = i; j < items_.size() && params.count < kMaxReduced; ++j) params.items[params.count++] = items_[j];
      RP_TRY(reduce(params, host.stream()));
    }
    return cudaSuccess;
  }

 private:
  std::vector<ReduceItem> items_;
};

// Σ L ᵀ X and Σ L of one tall matrix, in parts.
struct Sums {
  float* product = nullptr;
  float* l_sums = nullptr;  // [chunk][splits, width]
  int64_t splits = 0;
};

// The sweep over x (rows dT), dOut (rows Z) and y (rows dV), chunk by chunk of the bottleneck.
class Sweep {
 public:
  Sweep(const Host& host, const Problem& p) : host_(host), p_(p), chunks_(chunks_of(p)) {
    for (const Chunk& chunk : chunks_) widest_ = std::max(widest_, plan::padded_width(chunk.width));
  }

  // dX = mask ∘ (L A) + residual, and the parts of `da` and `db`, which are [R, cols] and [1, R].
  void tall(const Matrix& x, const bool* row_mask, const Dropout& drop, const Matrix& l, const Matrix& a,
            const Matrix& dx, const Matrix& residual, bool da, bool db, Sums& sums) {
    if (x.rows == 0 || (!dx && !da && !db)) return;  // the sum of no parts is zero
    sums.splits = grad_input_splits(p_.dtype, widest_, x.rows, x.cols);
    if (da) sums.product = scratch<float>(host_, sums.splits * p_.width * x.cols);
    if (db) sums.l_sums = scratch<float>(host_, sums.splits * p_.width);
    for (size_t i = 0; i < chunks_.size(); ++i) {
      const Chunk& chunk = chunks_[i];
      GradInputParams& launch = launch_of(i);
      GradInputJob job;
      job.x = x;
      if (!da) job.x.data = nullptr;
      job.rows = x.rows;
      job.row_mask = row_mask;
      job.drop = drop;
      set_rows(job, l, chunk.first, chunk.width);
      job.first_segment = segments_of_[i];
      job.segment_count = 1;
      launch.segments[segments_of_[i]++] = {0, x.cols, 0, 0};
      job.a = a.block(chunk.first, 0, chunk.width, a.cols);
      job.dx = dx;
      job.residual = i == 0 ? residual : dx;
      job.splits = static_cast<int>(sums.splits);
      if (da) job.product = sums.product + chunk.first * x.cols;
      job.product_size = p_.width * x.cols;
      job.product_col_stride = 1;
      job.product_l_stride = x.cols;
      if (db) job.l_sums = sums.l_sums + sums.splits * chunk.first;
      launch.jobs[launch.job_count++] = job;
    }
  }

  // The parts of dB [selected o, rank] and of dbias [1, o].
  void output(const Matrix& dout, const Matrix& z, bool db, bool dbias, Sums& b, Sums& bias) {
    if (dout.rows == 0 || (!db && !dbias)) return;
    const int64_t size = p_.b.rows * p_.b.cols, columns = dbias ? dout.cols : p_.b.rows;  // with something to do
    b.splits = bias.splits = grad_input_splits(p_.dtype, widest_, dout.rows, columns);
    if (db) b.product = scratch<float>(host_, b.splits * size);
    if (dbias) bias.product = scratch<float>(host_, bias.splits * dout.cols);
    for (size_t i = 0; i < chunks_.size(); ++i) {
      GradInputParams& launch = launch_of(i);
      GradInputJob job;
      job.x = dout;
      job.rows = dout.rows;
      if (db) set_rows(job, z, 0, p_.rank());
      job.first_segment = segments_of_[i];
      for (Segment segment : segments_of(p_, chunks_[i], static_cast<int>(p_.rank()))) {
        if (!db) segment.b_row = -1;
        if (segment.b_row < 0 && !dbias) continue;
        launch.segments[segments_of_[i]++] = segment;
        ++job.segment_count;
      }
      job.splits = static_cast<int>(b.splits);
      job.product = b.product;
      job.product_size = size;
      job.product_col_stride = p_.b.cols;
      job.product_l_stride = 1;
      job.column_sums = bias.product;
      if (job.segment_count > 0) launch.jobs[launch.job_count++] = job;
    }
  }

  cudaError_t run() {
    for (GradInputParams& launch : launches_) RP_TRY(grad_input(launch, host_.stream()));
    return cudaSuccess;
  }

  const std::vector<Chunk>& chunks() const { return chunks_; }

 private:
  GradInputParams& launch_of(size_t chunk) {
    while (launches_.size() <= chunk) {
      launches_.emplace_back();
      launches_.back().dtype = p_.dtype;
      launches_.back().padded_width = widest_;
      launches_.back().processors = host_.device().processors;
      launches_.back().shared_bytes = host_.device().shared_bytes;
      segments_of_.push_back(0);
    }
    return launches_[chunk];
  }
  static void set_rows(GradInputJob& job, const Matrix& l, int64_t first, int64_t width) {
    job.l = l.at(0, first);
    job.l_stride = l.row_stride;
    job.width = static_cast<int>(width);
  }

  const Host& host_;
  const Problem& p_;
  const std::vector<Chunk> chunks_;
  int widest_ = 0;
  std::vector<GradInputParams> launches_;
  std::vector<int> segments_of_;
};

// The rows that the route's gradient leaves in memory; absent ones are not wanted.
struct Rows {
  Matrix z, dt;  // of Z's type
  // [rows, R] of numbers, as RouteGradParams has them
  float *dt_unrounded = nullptr, *g = nullptr, *dstate = nullptr, *second = nullptr;
};

RouteGradParams route_grad_params(const Problem& p, const Backward& io, const Condition& c, const Chunk& chunk) {
  RouteGradParams r;
  r.route.rows = p.x.rows;
  r.route.width = static_cast<int>(chunk.width);
  r.route.group_width = static_cast<int>(p.group_width());
  r.route = route_params(p, r.route, c, chunk);
  r.t = io.t.at(0, chunk.first);
  r.t_stride = io.t.row_stride;
  if (c.by_tokens) {
    r.v = io.kept.at(0, chunk.first);
    r.v_stride = io.kept.row_stride;
  }
  r.input_mask = p.input_mask;
  if (p.routing == Routing::kCrossGram && p.kind == StateKind::kTokens) {
    r.v_rows = static_cast<const float*>(p.state) + chunk.first;
    r.v_rows_stride = p.width;
  }
  r.stride = p.width;
  return r;
}

// G of a chunk, and the first step of the route's gradient.
cudaError_t make_grad_output(const Host& host, const Problem& p, const Backward& io, const Chunk& chunk,
                             const RouteGradParams& route) {
  GradOutputParams o;
  o.dtype = p.dtype;
  o.padded_width = plan::padded_width(chunk.width);
  o.dout = io.dout;
  o.b = p.b;
  o.scaling = static_cast<float>(p.scaling);
  o.rank = static_cast<int>(p.rank());
  o.route = route;
  int64_t units = 0;
  const bool mixed = p.groups == 1;
  for (int64_t i = 0; i < p.slice_count; ++i) {
    if (!mixed && (i < chunk.first_group || i >= chunk.first_group + chunk.groups)) continue;
    o.slices[o.slice_count++] = p.slices[i];
    units += (p.slices[i].length + 63) / 64;
  }
  o.split_depth = plan::grad_output_split_depth(p.x.rows, units);
  o.splits = static_cast<int>(std::max<int64_t>((units + o.split_depth - 1) / o.split_depth, 1));
  const Device device = host.device();
  o.stages = plan::ring_stages(plan::round_up(p.x.rows, 64) / 64, device.processors,
                               down_in_pairs(p.dtype == Dtype::kFloat32, o.padded_width), device.shared_bytes,
                               grad_output_stage_bytes(element_size(p.dtype), o.padded_width));
  if (o.splits > 1 || o.padded_width > kMaxFusedWidth) {
    o.partial = scratch<float>(host, o.splits * p.x.rows * o.padded_width);
  }
  RP_TRY(grad_output(o, host.stream()));
  return o.partial != nullptr ? route_grad(o, host.stream()) : cudaSuccess;
}

// The route's second step, from G ∘ act'; or Z alone.
cudaError_t route_alone(const Host& host, const Problem& p, const Chunk& chunk, const RouteGradParams& route) {
  GradOutputParams o;
  o.dtype = p.dtype;
  o.padded_width = plan::padded_width(chunk.width);
  o.route = route;
  return route_grad(o, host.stream());
}

// Σ f(T)ᵀ G of each sample [splits, samples, R, w], in parts.
GramParams input_gram(const Problem& p, const Backward& io, const float* g) {
  GramParams d;
  d.left = io.t.data;
  d.left_dtype = io.t.dtype;
  d.right = g;
  d.left_rows = d.right_rows = p.inputs;
  d.positive = p.routing == Routing::kGramRelu;
  return d;
}

StateGradParams sums_of(const Problem& p) {
  StateGradParams s;
  s.dtype = p.dtype;
  s.tokens = p.kind == StateKind::kTokens;
  s.from_stride = p.width;
  s.width = static_cast<int>(p.width);
  s.inputs = p.inputs;
  s.conditions = p.conditions;
  s.index = p.index;
  s.mask = p.condition_mask;
  s.pool = p.pool;
  s.scale_by_tokens = p.scale_by_tokens;
  return s;
}

GramGradParams gram_grad_params(const Problem& p) {
  GramGradParams g;
  g.dtype = p.dtype;
  g.relu = p.routing == Routing::kGramRelu;
  g.scale_by_tokens = p.scale_by_tokens;
  g.width = static_cast<int>(p.width);
  g.group_width = static_cast<int>(p.group_width());
  g.inputs = p.inputs;
  g.conditions = p.conditions;
  g.index = p.index;
  g.mask = p.condition_mask;
  return g;
}

// gram and gram_relu: dV into `dv`, in sequence dT + dV, or the gradient of the state.
cudaError_t matrix_gradient(const Host& host, const Problem& p, const Backward& io, const Condition& c,
                            const Rows& rows, const Matrix& dv) {
  GramGradParams gradient = gram_grad_params(p);
  const bool in_sequence = p.source == Source::kInSequence;
  if (c.by_tokens) {
    gradient.t = io.t.data;
    gradient.t_stride = io.t.row_stride;
    gradient.g = rows.g;
    gradient.g_stride = p.width;
  } else {
    GramParams d = input_gram(p, io, rows.g);
    d.tensor = p.dtype != Dtype::kFloat32;
    d.width = static_cast<int>(p.width);
    d.group_width = static_cast<int>(p.group_width());
    constexpr int64_t kMostParts = 4;  // gram_grad reads them once for every tile of V
    d.splits = static_cast<int>(
        std::min(kMostParts, plan::gram_splits(p.inputs.count, p.groups, p.group_width(), p.inputs.rows)));
    d.partial = scratch<float>(host, d.splits * p.inputs.count * p.width * p.group_width());
    RP_TRY(gram(d, host.stream()));
    gradient.d = d.partial;
    gradient.splits = d.splits;
  }
  if (p.source == Source::kState) {
    gradient.dstate = static_cast<float*>(io.dstate);
  } else {
    const Matrix& v = in_sequence ? io.t : io.kept;  // V is rows of T
    gradient.v = v.data;
    gradient.v_stride = v.row_stride;
    gradient.rows = dv.data;
    gradient.rows_stride = dv.row_stride;
    if (in_sequence) gradient.dt = rows.dt_unrounded;
  }
  return gram_grad(gradient, host.stream());
}

// Whether a sample's rows are worth it to be summed in parts, which another launch adds.
bool long_samples(const Problem& p) { return p.inputs.rows > 512 * p.inputs.count; }

// The condition as the forward had it, and what cross_gram sums over each sample.
cudaError_t condition_again(const Host& host, const Problem& p, const Backward& io, Condition& c) {
  if (p.routing == Routing::kNone) return cudaSuccess;
  c.state = static_cast<const float*>(p.state);
  c.stride = state_stride(p);
  if (p.kind == StateKind::kMatrix && p.state == nullptr) {
    c.by_tokens = true;
    c.stride = p.width;
  }
  if (p.routing != Routing::kCrossGram) return cudaSuccess;
  if (p.kind == StateKind::kVector) {
    float* sums = scratch<float>(host, p.inputs.count * p.width);
    const PoolParams sum{io.t, p.inputs, p.input_mask, Pool::kNone, false, sums, !long_samples(p)};
    RP_TRY(pool(sum, host.scratch(pool_scratch(sum)), host.stream()));
    c.sums = sums;
    return cudaSuccess;
  }
  GramParams g = input_gram(p, io, c.state);
  g.left_mask = p.input_mask;
  g.right_rows = p.conditions;
  g.index = p.index;
  float* k = scratch<float>(host, p.inputs.count * p.width * p.group_width());
  g.out = k;
  RP_TRY(make_gram(host, p, g, long_samples(p) ? 0 : 1));
  c.state = k;
  c.stride = p.width * p.group_width();
  return cudaSuccess;
}

// G through the route: T's gradient and Z into `rows`, the state's into `dv` (rows of Z's type: V's), `dvector` or
// io.dstate.
cudaError_t route_gradient(const Host& host, const Problem& p, const Backward& io, const Wanted& want,
                           const std::vector<Chunk>& chunks, Rows& rows, const Matrix& dv, float* dvector) {
  const bool in_sequence = p.source == Source::kInSequence, cross = p.routing == Routing::kCrossGram;
  const bool vector = p.kind == StateKind::kVector, matrix = p.kind == StateKind::kMatrix;
  const bool own_tokens = in_sequence && p.kind == StateKind::kTokens;  // dV goes into dT row by row
  const bool into_dt = in_sequence && !own_tokens && want.dt;           // or is added to it afterwards
  // Two steps: w = Σ dc T for dT, or D = Σ TᵀG for dT and dV, both of the finished G.
  const bool of_g = want.dt || want.dstate;  // else nothing but Z
  const bool two_steps = cross && (want.dt || (!vector && want.dstate));
  const auto numbers = [&](bool wanted) { return wanted ? scratch<float>(host, p.x.rows * p.width) : nullptr; };
  rows.dt_unrounded = numbers(into_dt);
  rows.g = numbers(two_steps || (matrix && want.dstate));
  rows.dstate = numbers(want.dstate && !matrix && (!own_tokens || cross));
  rows.second = numbers(two_steps && vector);
  Condition c;
  RP_TRY(condition_again(host, p, io, c));

  float* second_sums = nullptr;
  const auto step = [&](bool first, bool last) -> cudaError_t {
    for (const Chunk& chunk : chunks) {
      const auto part = [&](float* all) { return all == nullptr ? nullptr : all + chunk.first; };
      RouteGradParams r = route_grad_params(p, io, c, chunk);
      r.g = part(rows.g);
      if (first && rows.z) r.z = rows.z.at(0, chunk.first);
      if (first) r.second = part(rows.second);
      if (!first) r.second_sums = second_sums + chunk.first * (vector ? 1 : p.group_width());
      if (last && into_dt) r.dt_unrounded = part(rows.dt_unrounded);
      if (last && !into_dt && want.dt) r.dt = rows.dt.at(0, chunk.first);
      if (vector ? first : last) r.dstate = part(rows.dstate);
      if (own_tokens) r.own_mask = p.condition_mask;
      RP_TRY(first && of_g ? make_grad_output(host, p, io, chunk, r) : route_alone(host, p, chunk, r));
    }
    return cudaSuccess;
  };
  const auto sum = [&](bool of_state, bool second) -> cudaError_t {
    StateGradParams s = sums_of(p);
    if (of_state) {
      s.from = rows.dstate;
      s.out = p.source == Source::kState ? static_cast<float*>(io.dstate) : dvector;
      s.rows = into_dt ? rows.dt.data : dv.data;
      s.rows_stride = p.width;
      s.dt = rows.dt_unrounded;
    }
    if (second) {
      s.second_from = rows.second;
      s.second_out = second_sums;
    }
    return state_grad(s, host.stream());
  };

  RP_TRY(step(true, !two_steps));
  if (two_steps) {
    second_sums = scratch<float>(host, p.inputs.count * p.width * (vector ? 1 : p.group_width()));
    if (vector) {
      RP_TRY(sum(want.dstate && !into_dt, true));
    } else {
      GramParams d = input_gram(p, io, rows.g);
      d.out = second_sums;
      RP_TRY(make_gram(host, p, d, long_samples(p) ? 0 : 1));
    }
    RP_TRY(step(false, true));
  }
  if (!want.dstate || own_tokens) return cudaSuccess;
  if (matrix) return matrix_gradient(host, p, io, c, rows, into_dt ? rows.dt : dv);
  if (two_steps && vector && !into_dt) return cudaSuccess;  // summed between the steps
  return sum(true, false);
}

// The gradients of what y is projected with, and of y itself, from those of V or v.
struct ConditionSums {
  Sums y;               // by tokens
  PooledGradParams of;  // pooled
};

cudaError_t condition_gradient(const Host& host, const Problem& p, bool dc, bool db_c, const Matrix& dy,
                               const Matrix& kept, const Matrix& dv, const float* dvector, Sweep& sweep,
                               ConditionSums& sums) {
  if (p.kind != StateKind::kVector) {
    sweep.tall(p.y, p.condition_mask, p.drop_y, dv, p.c, dy, {}, dc, db_c, sums.y);
    return cudaSuccess;
  }
  sums.of.dv = dvector;
  sums.of.pooled_y = static_cast<const float*>(kept.data);
  if (dc) sums.of.dc = scratch<float>(host, p.width * p.y.cols);
  if (db_c) sums.of.db_c = scratch<float>(host, p.width);
  sums.of.dy = dy;
  sums.y.product = sums.of.dc;
  sums.y.l_sums = sums.of.db_c;
  sums.y.splits = 1;
  return pooled_grad(p, sums.of, host.stream());
}

// Σ L of each chunk into its part of a bias's gradient.
void add_sums(Reductions& reductions, const Sweep& sweep, const Matrix& out, const Sums& first, const Sums& second) {
  if (!out) return;
  for (const Chunk& chunk : sweep.chunks()) {
    const auto part = [&](const Sums& sums) {
      return sums.l_sums == nullptr ? nullptr : sums.l_sums + sums.splits * chunk.first;
    };
    reductions.add(out.block(0, chunk.first, 1, chunk.width), part(first), first.splits, part(second), second.splits);
  }
}

cudaError_t low_rank(const Host& host, const Problem& p, const Backward& io) {
  const Wanted want(p, io);
  const bool of_tokens = p.source == Source::kTokens && want.dstate;
  Rows rows;
  Matrix dv;
  float* dvector = nullptr;
  if (of_tokens && p.kind == StateKind::kVector) dvector = scratch<float>(host, p.conditions.count * p.width);
  if (of_tokens && p.kind != StateKind::kVector) dv = z_rows(host, p, p.conditions.rows);
  if (want.dt) rows.dt = z_rows(host, p, p.x.rows);
  // Z of plain LoRA is T
  const bool z_is_t = p.routing == Routing::kNone && p.activation == Activation::kNone && p.dtype == z_dtype(p);
  if (io.db && !z_is_t) rows.z = z_rows(host, p, p.x.rows);
  Sweep sweep(host, p);
  if (want.dt || want.dstate || rows.z) {
    RP_TRY(route_gradient(host, p, io, want, sweep.chunks(), rows, dv, dvector));
  }

  Sums of_x, of_b, of_bias;
  ConditionSums of_y;
  sweep.tall(p.x, nullptr, p.drop_x, rows.dt, p.a, io.dx, p.residual ? io.dout : Matrix{}, bool(io.da),
             bool(io.db_down), of_x);
  if (of_tokens) {
    const bool dc = p.shared ? bool(io.da) : bool(io.dc), db_c = p.shared ? bool(io.db_down) : bool(io.db_c);
    RP_TRY(condition_gradient(host, p, dc, db_c, io.dy, io.kept, dv, dvector, sweep, of_y));
  }
  sweep.output(io.dout, z_is_t ? io.t : rows.z, bool(io.db), bool(io.dbias), of_b, of_bias);
  RP_TRY(sweep.run());

  const Sums none, &through_y = p.shared ? of_y.y : none;
  Reductions sums;
  sums.add(io.da, of_x.product, of_x.splits, through_y.product, through_y.splits);
  sums.add(io.db, of_b.product, of_b.splits, nullptr, 0, p.scaling);
  sums.add(io.dbias, of_bias.product, of_bias.splits);
  add_sums(sums, sweep, io.db_down, of_x, through_y);
  if (!p.shared) {
    sums.add(io.dc, of_y.y.product, of_y.y.splits);
    add_sums(sums, sweep, io.db_c, of_y.y, none);
  }
  return sums.run(host);
}

cudaError_t rank_one_backward(const Host& host, const Problem& p, const Backward& io) {
  void* space = host.scratch(rank_one_grad_scratch(p, io));
  RP_TRY(rank_one_grad(p, io, space, host.stream()));
  if (!io.dbias) return cudaSuccess;
  Sweep sweep(host, p);
  Sums none, of_bias;
  sweep.output(io.dout, {}, false, true, none, of_bias);
  RP_TRY(sweep.run());
  Reductions sums;
  sums.add(io.dbias, of_bias.product, of_bias.splits);
  return sums.run(host);
}

}  // namespace

cudaError_t backward(const Host& host, const Problem& problem, const Backward& io) {
  Problem p = problem;
  if (p.group_width() > kMaxWidth || p.slice_count > kMaxSlices) return cudaErrorInvalidValue;
  if (plan::rank_one(p)) {
    RP_TRY(rank_one_backward(host, p, io));
  } else {
    const Wanted want(p, io);
    // A and C as they are, unless of another dtype: to load them would then take longer than the launch that packs B.
    Matrix none;
    const auto other = [&](Matrix& m, bool wanted) { return wanted && m.dtype != p.dtype ? &m : &none; };
    RP_TRY(pack_parameters(host, p,
                           {want.dt || want.dstate ? &p.b : &none, other(p.a, bool(io.dx)),
                            other(p.c, io.dy && p.source == Source::kTokens && !p.shared)},
                           p.slice_count == 1));
    if (p.shared && p.a) p.c = p.a;
    RP_TRY(low_rank(host, p, io));
  }
  if (io.dx && p.weight && p.x.rows > 0) host.base_gemm(io.dx, io.dout, p.weight, true);
  if (io.dweight) host.base_gemm(io.dweight, io.dout.transposed(), p.x, false);
  return cudaSuccess;
}

cudaError_t encode_backward(const Host& host, const Problem& p, const void* dstate, const Matrix& kept,
                            const Matrix& dy, const Matrix& dc, const Matrix& db_c) {
  if (p.group_width() > kMaxWidth) return cudaErrorInvalidValue;
  const float* gradient = static_cast<const float*>(dstate);
  Matrix dv;
  if (p.kind != StateKind::kVector) dv = z_rows(host, p, p.conditions.rows);
  if (p.kind == StateKind::kMatrix) {
    GramGradParams g = gram_grad_params(p);
    g.inputs = p.conditions;  // each condition its own sample
    g.index = nullptr;
    g.d = gradient;
    g.v = kept.data;
    g.v_stride = kept.row_stride;
    g.rows = dv.data;
    g.rows_stride = p.width;
    RP_TRY(gram_grad(g, host.stream()));
  } else if (p.kind == StateKind::kTokens) {
    StateGradParams s = sums_of(p);
    s.inputs = p.conditions;
    s.index = nullptr;
    s.from = gradient;
    s.rows = dv.data;
    s.rows_stride = p.width;
    RP_TRY(state_grad(s, host.stream()));
  }
  Sweep sweep(host, p);
  ConditionSums sums;
  RP_TRY(condition_gradient(host, p, bool(dc), bool(db_c), dy, kept, dv, gradient, sweep, sums));
  RP_TRY(sweep.run());
  Reductions reductions;
  reductions.add(dc, sums.y.product, sums.y.splits);
  add_sums(reductions, sweep, db_c, sums.y, {});
  return reductions.run(host);
}

}  // namespace routed_peft::cuda
