#include "torch/call.h"

#include <algorithm>
#include <cmath>

namespace routed_peft {
namespace {

Dropout dropout(const Place& place, double p, const MaybeTensor& seed, uint32_t stream) {
  STD_TORCH_CHECK(p >= 0 && p <= 1, "dropout must lie in [0, 1], got ", p);
  Dropout d;
  d.threshold = static_cast<uint32_t>(std::nearbyint(65536 * p));  // ties to even, as the definition does
  d.stream = stream;
  if (d.threshold == 0) return d;
  STD_TORCH_CHECK(seed.has_value(), "dropout needs a seed");
  const int64_t* at = place.array_of<int64_t>("seed", seed, ScalarType::Long, 1);
  if (place.readable) {
    d.seed = static_cast<uint64_t>(*at);
  } else {
    d.seed_at = at;
  }
  return d;
}

void set_condition(const Place& place, Problem& p, const MaybeTensor& condition, const MaybeTensor& offsets) {
  if (p.source == Source::kNone) return;
  if (p.source == Source::kInSequence) {
    p.y = p.x;
    p.c = p.a;
    p.b_c = p.b_down;
    p.shared = true;
    p.drop_y = p.drop_x;  // V is rows of T
    p.conditions = p.inputs;
    p.kind = plan::state_kind(p.routing, p.pool, p.inputs.offsets == nullptr && p.inputs.length() == 1);
    return;
  }
  STD_TORCH_CHECK(condition.has_value(), "the condition is missing");
  if (p.source == Source::kState) {
    const bool matrix = p.routing == Routing::kGram || p.routing == Routing::kGramRelu;
    const int64_t dims = condition->dim();
    STD_TORCH_CHECK(
        (dims == 2 || dims == 3) && condition->is_contiguous() && condition->scalar_type() == accumulated_type(p.dtype),
        "a state must be contiguous and accumulated in float32 (float64 for float64)");
    p.kind = dims == 2 ? StateKind::kVector : matrix ? StateKind::kMatrix : StateKind::kTokens;
    const int64_t conditions = condition->size(0), tokens = p.kind == StateKind::kTokens ? condition->size(1) : 1;
    p.conditions = {conditions, conditions * tokens, nullptr};
    check_size("state", condition->numel(), conditions * tokens * p.state_size());
    p.state = place.data_of("state", *condition);
    return;
  }
  p.y = place.rows_of("condition", *condition);
  STD_TORCH_CHECK(p.y.dtype == p.dtype, "condition must have the input's dtype");
  p.conditions = place.sequences_of("condition_cu_seqlens", offsets, condition->size(0), p.y.rows);
  const bool single = !offsets && (condition->dim() == 2 || condition->size(1) == 1);
  p.kind = plan::state_kind(p.routing, p.pool, single);
}

// Every sample finds its condition, and where tokens are paired, as many of them as it has itself.
void check_pairs(const Place& place, const Problem& p) {
  if (!p.index) check_size("condition", p.conditions.count, p.inputs.count);
  for (int64_t i = 0; place.readable && p.index && i < p.inputs.count; ++i) {
    STD_TORCH_CHECK(p.index[i] >= 0 && p.index[i] < p.conditions.count, "condition_index ", p.index[i],
                    " is out of range for ", p.conditions.count, " conditions");
  }
  if (p.kind != StateKind::kTokens || p.routing == Routing::kGram || p.routing == Routing::kGramRelu) return;
  if (!place.readable) {
    STD_TORCH_CHECK(!p.inputs.offsets == !p.conditions.offsets,
                    "an unpooled condition must be flat where the input is");
    if (!p.inputs.offsets && p.inputs.count > 0) {
      check_size("an unpooled condition", p.conditions.length(), p.inputs.length());
    }
    return;
  }
  for (int64_t s = 0; s < p.inputs.count; ++s) {
    const int64_t c = p.condition_of(s);
    check_size("an unpooled condition", p.conditions.end(c) - p.conditions.begin(c),
               p.inputs.end(s) - p.inputs.begin(s));
  }
}

}  // namespace

Call make_call(const Place& place, const Tensor& x, const Tensor& A, const Tensor& B, const MaybeTensor& condition,
               const MaybeTensor& C, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& b_down,
               const MaybeTensor& b_C, const MaybeTensor& mask, const MaybeTensor& index, const MaybeTensor& input_mask,
               const MaybeTensor& cu_seqlens, const MaybeTensor& condition_cu_seqlens, const MaybeTensor& seed,
               const MaybeTensor& base, int64_t samples, int64_t routing, int64_t source, int64_t pool, int64_t scale,
               int64_t groups, const std::vector<int64_t>& slices, int64_t out_features, double scaling,
               double dropout_p, double condition_dropout_p, int64_t activation, bool residual) {
  Call call;
  Problem& p = call.problem;
  p.x = place.rows_of("x", x);
  p.dtype = p.x.dtype;
  const int64_t rows = p.x.rows, d = p.x.cols;
  p.a = place.matrix_of("A", A, -1, d);
  p.width = p.a.rows;
  STD_TORCH_CHECK(routing >= 0 && routing <= static_cast<int64_t>(Routing::kOnes), "unknown routing ", routing);
  STD_TORCH_CHECK(source >= 0 && source <= 3 && pool >= 0 && pool <= 2 && activation >= 0 && activation <= 4,
                  "unknown source, pool or activation");
  p.routing = static_cast<Routing>(routing);
  p.source = static_cast<Source>(source);
  p.pool = static_cast<Pool>(pool);
  p.activation = static_cast<Activation>(activation);
  STD_TORCH_CHECK((p.routing == Routing::kNone) == (p.source == Source::kNone),
                  "a route needs a condition, and only a route");
  p.scale_by_tokens = scale != 0;
  p.residual = residual;
  p.scaling = scaling;
  p.out_features = out_features;
  if (slices.empty()) {
    call.slices = {{0, out_features, 0}};
  } else {
    STD_TORCH_CHECK(slices.size() % 2 == 0, "slices are pairs of start and stop");
    int64_t row = 0;
    for (size_t i = 0; i < slices.size(); i += 2) {
      STD_TORCH_CHECK(0 <= slices[i] && slices[i] < slices[i + 1] && slices[i + 1] <= out_features,
                      "slice out of range");
      for (const Slice& other : call.slices) {
        STD_TORCH_CHECK(slices[i + 1] <= other.start || other.start + other.length <= slices[i], "slices overlap");
      }
      call.slices.push_back({slices[i], slices[i + 1] - slices[i], row});
      row += slices[i + 1] - slices[i];
    }
  }
  p.slices = call.slices.data();
  p.slice_count = static_cast<int64_t>(call.slices.size());
  p.groups = groups;
  STD_TORCH_CHECK((groups == 1 || groups == p.slice_count) && p.width % p.slice_count == 0 && p.width > 0,
                  "groups must be 1 or the number of slices, and divide the width");
  int64_t selected = 0;
  for (const Slice& slice : call.slices) selected += slice.length;
  p.b = place.matrix_of("B", B, selected, p.width / p.slice_count);
  p.weight = place.matrix_of("weight", weight, out_features, d);
  STD_TORCH_CHECK(!p.weight || p.weight.dtype == p.dtype, "weight must have the input's dtype");
  STD_TORCH_CHECK(!residual || out_features == d, "a residual needs as many outputs as inputs");
  STD_TORCH_CHECK(!base || !residual, "a base's output takes the place of a residual");
  if (base) {
    p.base = place.rows_of("base", *base);
    check_size("base", p.base.rows, rows);
    check_size("base", p.base.cols, out_features);
    STD_TORCH_CHECK(p.base.dtype == p.dtype, "base must have the input's dtype");
  }
  p.bias = place.vector_of("bias", bias, out_features);
  p.b_down = place.vector_of("b_down", b_down, p.width);
  p.inputs = place.sequences_of("cu_seqlens", cu_seqlens, samples, rows);
  p.input_mask = place.array_of<bool>("input_mask", input_mask, ScalarType::Bool, rows);
  p.drop_x = dropout(place, dropout_p, seed, 0);
  p.drop_y = dropout(place, condition_dropout_p, seed, 1);
  STD_TORCH_CHECK(p.source != Source::kInSequence || mask, "an in-sequence condition needs a mask");
  if (p.source == Source::kInSequence) {
    p.condition_mask = place.array_of<bool>("mask", mask, ScalarType::Bool, rows);
  }
  set_condition(place, p, condition, condition_cu_seqlens);
  if (p.source == Source::kTokens) {
    p.shared = !C.has_value();
    p.c = p.shared ? place.matrix_of("A", A, p.width, p.y.cols) : place.matrix_of("C", *C, p.width, p.y.cols);
    p.b_c = p.shared ? p.b_down : place.vector_of("b_C", b_C, p.width);
    p.condition_mask = place.array_of<bool>("mask", mask, ScalarType::Bool, p.y.rows);
  }
  STD_TORCH_CHECK(C ? p.source == Source::kTokens : !b_C, "C goes with a condition that is projected, and b_C with C");
  STD_TORCH_CHECK(!condition || p.source == Source::kTokens || p.source == Source::kState, "no condition is asked for");
  if (p.source == Source::kTokens || p.source == Source::kState) {
    p.index = place.array_of<int64_t>("index", index, ScalarType::Long, p.inputs.count);
    check_pairs(place, p);
  }
  return call;
}

Problem make_encoding(const Place& place, const Tensor& y, const Tensor& C, const MaybeTensor& b_C,
                      const MaybeTensor& mask, int64_t routing, int64_t pool, int64_t scale, int64_t groups) {
  Problem p;
  STD_TORCH_CHECK(routing > 0 && routing <= static_cast<int64_t>(Routing::kOnes) && pool >= 0 && pool <= 2,
                  "unknown routing or pool");
  p.routing = static_cast<Routing>(routing);
  p.source = Source::kTokens;
  p.pool = static_cast<Pool>(pool);
  p.scale_by_tokens = scale != 0;
  p.y = place.rows_of("condition", y);
  p.dtype = p.y.dtype;
  p.c = place.matrix_of("C", C, -1, p.y.cols);
  p.width = p.c.rows;
  p.groups = groups;
  STD_TORCH_CHECK(groups > 0 && p.width % groups == 0, "groups must divide the width");
  p.b_c = place.vector_of("b_C", b_C, p.width);
  p.conditions = place.sequences_of("condition", std::nullopt, y.size(0), p.y.rows);
  p.condition_mask = place.array_of<bool>("mask", mask, ScalarType::Bool, p.y.rows);
  p.kind = plan::state_kind(p.routing, p.pool, y.dim() == 2 || y.size(1) == 1);
  return p;
}

std::vector<int64_t> state_shape(const Problem& p, const MaybeTensor& condition, const Tensor& x) {
  if (p.kind == StateKind::kVector) return {p.conditions.count, p.width};
  if (p.kind == StateKind::kMatrix) return {p.conditions.count, p.width, p.group_width()};
  std::vector<int64_t> shape;
  if (condition) {
    shape = shape_of(*condition);
  } else if (p.inputs.offsets != nullptr) {
    shape = shape_of(x);
  } else {
    shape = {p.inputs.count, p.inputs.length(), 0};
  }
  shape.back() = p.width;
  return shape;
}

int64_t state_numbers(const Problem& p) {
  return (p.kind == StateKind::kTokens ? p.conditions.rows : p.conditions.count) * p.state_size();
}

Matrix kept_of(const Place& place, const Problem& p, const Tensor& kept) {
  if (kept.dim() != 2) return {};
  const bool pooled = p.kind == StateKind::kVector;
  STD_TORCH_CHECK(pooled || p.kind == StateKind::kMatrix, "nothing is kept for this kind of condition");
  const int64_t rows = pooled ? p.conditions.count : p.conditions.rows, cols = pooled ? p.y.cols : p.width;
  const Dtype dtype = pooled ? accumulated_dtype(p.dtype) : p.dtype;
  return dense(place.saved_of("kept", kept, type_of(dtype), rows * cols), dtype, rows, cols);
}

Tensor empty(const Place& place, const std::vector<int64_t>& shape, ScalarType type) {
  const auto shim = [](auto value) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(value)); };
  std::vector<int64_t> strides(shape.size(), 1);
  for (size_t i = shape.size(); i-- > 1;) strides[i - 1] = strides[i] * std::max<int64_t>(shape[i], 1);
  AtenTensorHandle made = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(), strides.data(),
                                                  shim(type), shim(place.device.type()), place.device.index(), &made));
  return Tensor(made);
}

Gradient gradient(const Place& place, Dtype nothing_of, int64_t needs, int bit, const MaybeTensor& like, bool as_rows) {
  if (!(needs >> bit & 1) || !like) return {nothing(place, type_of(nothing_of)), {}};
  Gradient g{empty(place, shape_of(*like), like->scalar_type()), {}};
  const int64_t dims = like->dim(), last = dims > 0 ? like->size(dims - 1) : 1;
  const int64_t rows = dims == 1 ? 1 : as_rows ? (last > 0 ? like->numel() / last : 0) : like->size(0);
  g.matrix = dense(g.tensor.data_ptr(), dtype_of("gradient", g.tensor), rows, last);
  if (g.matrix.data == nullptr) g.matrix = {};  // nothing in it
  return g;
}

void multiply(Addmm addmm, const torch::stable::Device& device, const Matrix& out, const Matrix& a, const Matrix& b,
              double alpha, bool accumulate) {
  const auto wrap = [&](const Matrix& m) {
    const int64_t sizes[] = {m.rows, m.cols}, strides[] = {m.row_stride, m.col_stride};
    return torch::stable::from_blob(m.data, {sizes, 2}, {strides, 2}, device, type_of(m.dtype));
  };
  const Tensor to = wrap(out);
  TORCH_ERROR_CODE_CHECK(addmm(to.get(), to.get(), wrap(a).get(), wrap(b).get(), accumulate ? 1.0 : 0.0, alpha));
}

}  // namespace routed_peft
