// forward:  state of the condition -> T = X̃ Aᵀ + b -> Z = act(ρ(T, state)) -> out = s Z B̂ᵀ + bias + x -> out += X Wᵀ
//           (or + base, where a foreign layer gave the base's output)
// backward: G = s dOut B̂ -> dB = s dOutᵀ Z -> dT, dstate -> dC, dY -> dA = dTᵀ X̃, dX = mask ∘ dT A -> dX += dOut W
// The base layer's product comes last and accumulates, so that no second full-size tensor exists; or, where it is ours
// and the route is not rank-one, in one pass with the update's. What is rank-wide (T, Z, G, dT, V) lives in Acc, or in
// bfloat16 where the input is of it and only products take it; nothing else is kept between the steps.
#include "cpu/routed.h"

#include <algorithm>
#include <optional>

#include "cpu/condition.h"
#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/rank_one.h"
#include "cpu/route.h"
#include "cpu/rows.h"

namespace routed_peft::cpu {
namespace {

template <class Acc>
Matrix acc(const Array<Acc>& data, int64_t rows, int64_t cols) {
  return dense(data.get(), accumulated_dtype<Acc>(), rows, cols);
}

// Factors of products with x and dout, and what is made of them, are rounded to bfloat16 where the input is; what only
// such products take lives in it.
bool rounds(const Problem& p) { return p.dtype == Dtype::kBFloat16; }

Epilogue product(const Problem& p) {
  Epilogue e;
  e.in_bfloat16 = rounds(p);
  return e;
}

// Forward the base layer's product has the weight's rows as its columns, backward not. A Conv1D's weight lies the other
// way round.
bool library_base(const Problem& p, bool forward) {
  const Matrix b = forward ? p.weight.transposed() : p.weight;
  const bool planned = plan::library_base(p.dtype, isa<float>().processor, p.x.rows, b.cols, b.rows, b.row_stride == 1);
  return plan::chosen(plan::forced.library_base, planned);
}

void base_gemm(const Host& host, const Problem& p, const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate,
               bool library) {
  if (out.rows == 0 || out.cols == 0) return;
  if (library && host.library_gemm(out, a, b, 1, accumulate)) return;
  Epilogue e = product(p);
  e.ours = true;
  e.accumulate = accumulate;
  if (out.dtype == Dtype::kFloat64) {
    gemm<double>(host, out, a, b, e);
  } else {
    gemm<float>(host, out, a, b, e);
  }
}

Matrix columns_of(const Matrix& m, int64_t start, int64_t length) { return m ? m.block(0, start, m.rows, length) : m; }

// The condition of a call, with the storage behind it.
template <class Acc>
struct Condition {
  State<Acc> state;
  Array<Acc> data, v, factor, pooled_y;
  Array<char> half;

  // gram and gram_relu on V itself instead of on S
  void use_tokens(const Problem& p, const Matrix& tokens) {
    factor = Array<Acc>(p.conditions.count);
    scale_factors(p, factor.get());
    state = {StateKind::kTokens, nullptr, tokens, factor.get()};
  }
  void use_matrix(const Host& host, const Problem& p) {
    data = Array<Acc>(p.conditions.count * p.state_size());
    encode_matrix(host, p, v.get(), data.get());
    state = {StateKind::kMatrix, data.get(), {}, nullptr};
  }
};

// A dense matrix, in bfloat16 or as Acc.
template <class Acc>
Matrix space(bool half, int64_t rows, int64_t cols, Array<char>& storage) {
  const Dtype dtype = half ? Dtype::kBFloat16 : accumulated_dtype<Acc>();
  storage = Array<char>(rows * cols * element_size(dtype));
  return dense(storage.get(), dtype, rows, cols);
}

template <class Acc>
void store_all(const Host& host, const Acc* from, const Matrix& to) {
  parallel(host, to.rows, double(to.rows * to.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) store_row(from + row * to.cols, to, row, 0, to.cols);
  });
}

template <class Acc>
void load_all(const Host& host, const Matrix& from, Acc* to) {
  parallel(host, from.rows, double(from.rows * from.cols), [&](int64_t begin, int64_t end) {
    for (int64_t row = begin; row < end; ++row) load_row(from, row, 0, from.cols, to + row * from.cols);
  });
}

// Encodes the condition of a forward; `want_state`: a state of the documented form, whatever order would be cheaper.
template <class Acc>
void encode_forward(const Host& host, const Problem& p, const Matrix& t, bool want_state, const Matrix& kept,
                    Condition<Acc>& c) {
  if (p.kind == StateKind::kVector) {
    c.data = Array<Acc>(p.conditions.count * p.width);
    if (!kept) c.pooled_y = Array<Acc>(p.conditions.count * p.y.cols);
    encode_vector(host, p, c.data.get(), kept ? static_cast<Acc*>(kept.data) : c.pooled_y.get());
    c.state = {StateKind::kVector, c.data.get(), {}, nullptr};
    return;
  }
  const bool through_v = p.kind == StateKind::kMatrix && !want_state && plan::gram_order(p) == plan::GramOrder::kTokens;
  const int64_t tokens = p.conditions.rows;
  if (through_v && half_tokens(p)) {
    if (!kept) c.half = Array<char>(tokens * p.width * element_size(p.dtype));
    const Matrix v = kept ? kept : dense(c.half.get(), p.dtype, tokens, p.width);
    project_tokens<Acc>(host, p, t, v);
    c.use_tokens(p, v);
    return;
  }
  c.v = Array<Acc>(tokens * p.width);
  const Matrix v = acc(c.v, tokens, p.width);
  project_tokens<Acc>(host, p, t, v);
  if (kept) store_all(host, c.v.get(), kept);
  if (p.kind == StateKind::kTokens) {
    c.state = {StateKind::kTokens, c.v.get(), {}, nullptr};
  } else if (through_v) {
    c.use_tokens(p, v);
  } else {
    c.use_matrix(host, p);
  }
}

template <class Acc>
void forward_as(const Host& host, const Problem& p, const ForwardResult& result) {
  const int64_t rows = p.inputs.rows;
  Condition<Acc> condition;
  const bool encodes = p.source == Source::kTokens || p.source == Source::kInSequence;
  if (p.source == Source::kState) {
    condition.state = {p.kind, static_cast<const Acc*>(p.state), {}, nullptr};
  }
  const auto encode_now = [&](const Matrix& t) {
    if (!encodes) return;
    encode_forward(host, p, t, result.state != nullptr, result.kept, condition);
    if (result.state == nullptr) return;
    const int64_t size = (p.kind == StateKind::kTokens ? p.conditions.rows : p.conditions.count) * p.state_size();
    std::copy_n(condition.state.data, size, static_cast<Acc*>(result.state));
  };
  const Segments cuts = cut(p);

  if (plan::rank_one(p)) {
    encode_now({});
    Array<Acc> c(result.t ? 0 : rows * p.groups);
    rank_one_forward(host, p, condition.state.data, cuts, result.out,
                     result.t ? static_cast<Acc*>(result.t.data) : c.get());
  } else {
    // T rounded to the input's dtype even when it is not saved, so that training and inference agree
    Array<char> t_storage(result.t ? 0 : rows * p.width * element_size(p.dtype));
    const Matrix t = result.t ? result.t : dense(t_storage.get(), p.dtype, rows, p.width);
    Epilogue down = product(p);
    down.bias = p.b_down;
    gemm<Acc>(host, t, Operand(p.x, p.drop_x), p.a.transposed(), down);
    encode_now(t);
    Array<char> z_storage;
    const Matrix z = space<Acc>(rounds(p), rows, p.width, z_storage), residual = p.residual ? p.x : p.base;
    route_forward<Acc>(host, p, condition.state, t, cuts, z, nullptr);
    const bool together = p.weight && !library_base(p, true);
    for (int64_t i = 0; i < p.slice_count; ++i) {
      const Slice& slice = p.slices[i];
      Epilogue up = product(p);
      up.alpha = p.scaling;
      up.bias = columns_of(p.bias, slice.start, slice.length);
      up.residual = columns_of(residual, slice.start, slice.length);
      std::optional<Factors> base;
      if (together) base = {p.x, p.weight.block(slice.start, 0, slice.length, p.x.cols).transposed()};
      up.plus = base ? &*base : nullptr;
      gemm<Acc>(host, columns_of(result.out, slice.start, slice.length), z.block(0, i * p.rank(), rows, p.rank()),
                p.b.block(slice.row, 0, slice.length, p.rank()).transposed(), up);
    }
    for (const auto& [start, stop] : untouched_columns(p)) {
      const int64_t length = stop - start;
      const Matrix out = columns_of(result.out, start, length), bias = columns_of(p.bias, start, length),
                   rest = columns_of(residual, start, length);
      if (!together) {
        fill_rows<Acc>(host, out, bias, rest);
        continue;
      }
      Epilogue e = product(p);
      e.ours = true;
      e.bias = bias;
      e.residual = rest;
      gemm<Acc>(host, out, p.x, p.weight.block(start, 0, length, p.x.cols).transposed(), e);
    }
    if (together) return;
  }
  if (p.weight) base_gemm(host, p, result.out, p.x, p.weight.transposed(), true, library_base(p, true));
}

template <class Acc>
void backward_as(const Host& host, const Problem& p, const Backward& io) {
  const int64_t rows = p.inputs.rows;
  const bool in_sequence = p.source == Source::kInSequence;
  const bool encodes = p.source == Source::kTokens || in_sequence;
  const bool want_dt = io.dx || io.da || io.db_down;
  const bool want_dstate = p.source == Source::kState ? io.dstate != nullptr
                           : in_sequence
                               ? want_dt
                               : encodes && (io.dy || io.dc || io.db_c || (p.shared && (io.da || io.db_down)));
  // With a shared C, its gradients are A's.
  const Matrix& dc = p.shared ? io.da : io.dc;
  const Matrix& db_c = p.shared ? io.db_down : io.db_c;

  Condition<Acc> condition;
  if (p.state != nullptr) {
    condition.state = {p.kind, static_cast<const Acc*>(p.state), {}, nullptr};
  }
  const bool through_v = encodes && p.kind == StateKind::kMatrix && p.state == nullptr;  // gram by tokens
  Matrix v = io.kept;
  const bool of_t = in_sequence && want_dstate && p.kind == StateKind::kMatrix;
  if (of_t || (through_v && v.dtype == Dtype::kFloat16)) {  // slow to read, and read several times
    condition.v = Array<Acc>(p.conditions.rows * p.width);
    v = acc(condition.v, p.conditions.rows, p.width);
    if (of_t) {
      project_tokens<Acc>(host, p, io.t, v);
    } else {
      load_all(host, io.kept, condition.v.get());
    }
  }
  if (through_v) condition.use_tokens(p, v);
  const bool by_token = condition.state.kind == StateKind::kTokens;
  const Segments cuts = cut(p);
  Array<char> dstate_storage, dv_storage;
  Matrix dstate;
  if (want_dstate && by_token) {
    const bool once = through_v && p.routing == Routing::kGram && cuts.once();
    dstate = space<Acc>(half_tokens(p) && once && !db_c, p.conditions.rows, p.width, dstate_storage);
  } else if (want_dstate) {
    dstate_storage = Array<char>(p.conditions.count * p.state_size() * int64_t{sizeof(Acc)});
    dstate = dense(dstate_storage.get(), accumulated_dtype<Acc>(), p.conditions.count, p.state_size());
  }
  Acc* const dstate_numbers = static_cast<Acc*>(dstate.data);
  Array<char> dt_storage, z_storage;
  Matrix dt, z;

  if (plan::rank_one(p)) {
    rank_one_backward<Acc>(host, p, condition.state.data, cuts, io, dstate_numbers);
  } else {
    Array<Acc> g;
    if (want_dt || want_dstate) {
      g = Array<Acc>(rows * p.width);
      const Matrix g_matrix = acc(g, rows, p.width);
      Epilogue scaled = product(p);
      scaled.alpha = p.scaling;
      for (int64_t i = 0; i < p.slice_count; ++i) {
        const Slice& slice = p.slices[i];
        gemm<Acc>(host, g_matrix.block(0, i * p.rank(), rows, p.rank()),
                  io.dout.block(0, slice.start, rows, slice.length), p.b.block(slice.row, 0, slice.length, p.rank()),
                  scaled);
      }
    }
    // Z again: for dB, and for the slope of the activation, without which it is made on the way back
    const bool sloped = p.activation != Activation::kNone, back = want_dt || want_dstate;
    if (io.db || sloped) z = space<Acc>(rounds(p), rows, p.width, z_storage);
    if (sloped || (io.db && !back)) route_forward<Acc>(host, p, condition.state, io.t, cuts, z, g.get());
    if (back) {
      // As Acc where more than products is made of it.
      if (want_dt) dt = space<Acc>(rounds(p) && !in_sequence && !io.db_down, rows, p.width, dt_storage);
      route_backward<Acc>(host, p, condition.state, io.t, cuts, g.get(), dt, dstate, io.db && !sloped ? z : Matrix{});
    }
    if (io.db) {
      Epilogue scaled = product(p);
      scaled.alpha = p.scaling;
      for (int64_t i = 0; i < p.slice_count; ++i) {
        const Slice& slice = p.slices[i];
        gemm<Acc>(host, io.db.block(slice.row, 0, slice.length, p.rank()),
                  io.dout.block(0, slice.start, rows, slice.length).transposed(),
                  z.block(0, i * p.rank(), rows, p.rank()), scaled);
      }
    }
  }

  Matrix dv = by_token ? dstate : Matrix{};
  if (want_dstate && condition.state.kind == StateKind::kMatrix && encodes) {
    dv = space<Acc>(half_tokens(p) && !in_sequence && !db_c, p.conditions.rows, p.width, dv_storage);
    matrix_backward(host, p, v, dstate_numbers, dv);
  }
  const bool rank_one = plan::rank_one(p), library = p.weight && library_base(p, false);
  const bool together = !rank_one && io.dx && p.weight && !library;
  if (in_sequence && dv && dt && !rank_one) {
    const Acc* dv_tokens = static_cast<const Acc*>(dv.data);
    Acc* sum = static_cast<Acc*>(dt.data);
    for (int64_t row = 0; row < rows; ++row) {  // V is rows of T
      if (!p.condition_mask[row]) continue;
      for (int64_t j = 0; j < p.width; ++j) sum[row * p.width + j] += dv_tokens[row * p.width + j];
    }
  }
  if (!rank_one) {
    if (io.da) gemm<Acc>(host, io.da, dt.transposed(), Operand(p.x, p.drop_x), product(p));
    if (io.db_down) column_sums<Acc>(host, io.db_down, dt, false);
    if (io.dx) {
      Epilogue masked = product(p);
      masked.mask = p.drop_x;
      if (p.residual) masked.residual = io.dout;
      std::optional<Factors> base;
      if (together) base = {io.dout, p.weight};
      masked.plus = base ? &*base : nullptr;
      gemm<Acc>(host, io.dx, dt, p.a, masked);
    }
  }
  if (want_dstate && encodes) {
    if (p.kind == StateKind::kVector) {
      const Matrix& dy = in_sequence ? io.dx : io.dy;
      vector_gradients<Acc>(host, p, dstate_numbers, static_cast<const Acc*>(io.kept.data), dy, in_sequence, dc, db_c,
                            p.shared);
    } else if (!in_sequence) {
      token_gradients<Acc>(host, p, dv, io.dy, dc, db_c, p.shared);
    }
  } else if (io.dstate != nullptr) {
    std::copy_n(dstate_numbers, dstate.rows * dstate.cols, static_cast<Acc*>(io.dstate));
  }

  if (io.dx && p.weight && !together) base_gemm(host, p, io.dx, io.dout, p.weight, true, library);
  if (io.dweight) base_gemm(host, p, io.dweight, io.dout.transposed(), p.x, false, library);
  if (io.dbias) column_sums<Acc>(host, io.dbias, io.dout, false);
}

template <class Acc>
void encode_as(const Host& host, const Problem& p, void* state, const Matrix& kept) {
  Condition<Acc> condition;
  encode_forward(host, p, {}, true, kept, condition);
  const int64_t size = (p.kind == StateKind::kTokens ? p.conditions.rows : p.conditions.count) * p.state_size();
  std::copy_n(condition.state.data, size, static_cast<Acc*>(state));
}

template <class Acc>
void encode_backward_as(const Host& host, const Problem& p, const void* dstate, const Matrix& kept, const Matrix& dy,
                        const Matrix& dc, const Matrix& db_c) {
  const Acc* gradient = static_cast<const Acc*>(dstate);
  if (p.kind == StateKind::kVector) {
    vector_gradients<Acc>(host, p, gradient, static_cast<const Acc*>(kept.data), dy, false, dc, db_c, false);
    return;
  }
  Array<char> storage;
  const bool matrix = p.kind == StateKind::kMatrix;
  const Matrix dv = space<Acc>(half_tokens(p) && matrix && !db_c, p.conditions.rows, p.width, storage);
  if (matrix) {
    matrix_backward(host, p, kept, gradient, dv);
  } else {
    std::copy_n(gradient, p.conditions.rows * p.width, static_cast<Acc*>(dv.data));
  }
  token_gradients<Acc>(host, p, dv, dy, dc, db_c, false);
}

}  // namespace

void forward(const Host& host, const Problem& p, const ForwardResult& result) {
  p.dtype == Dtype::kFloat64 ? forward_as<double>(host, p, result) : forward_as<float>(host, p, result);
}

void backward(const Host& host, const Problem& p, const Backward& io) {
  p.dtype == Dtype::kFloat64 ? backward_as<double>(host, p, io) : backward_as<float>(host, p, io);
}

void encode(const Host& host, const Problem& p, void* state, const Matrix& kept) {
  p.dtype == Dtype::kFloat64 ? encode_as<double>(host, p, state, kept) : encode_as<float>(host, p, state, kept);
}

void encode_backward(const Host& host, const Problem& p, const void* dstate, const Matrix& kept, const Matrix& dy,
                     const Matrix& dc, const Matrix& db_c) {
  p.dtype == Dtype::kFloat64 ? encode_backward_as<double>(host, p, dstate, kept, dy, dc, db_c)
                             : encode_backward_as<float>(host, p, dstate, kept, dy, dc, db_c);
}

}  // namespace routed_peft::cpu
