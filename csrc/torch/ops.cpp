// torch.ops.routed_peft.*: schemas and the CPU implementations, on the LibTorch Stable ABI alone, so that one binary
// serves torch 2.11 and everything after it. Gradients, shapes for tracing and the texts of errors are Python's.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/device.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "cpu/routed.h"
#include "kernels/plan.h"
#include "torch/checks.h"

namespace routed_peft {
namespace {

ScalarType type_of(Dtype dtype) {
  constexpr ScalarType kTypes[] = {ScalarType::Float, ScalarType::Double, ScalarType::BFloat16, ScalarType::Half};
  return kTypes[static_cast<int>(dtype)];
}

Dtype accumulated_dtype(Dtype dtype) { return dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32; }

// torch's threads and torch's matrix product, for the CPU path.
class TorchHost final : public cpu::Host {
 public:
  void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) const override {
    if (count > 0) torch::stable::parallel_for(0, count, 1, body);
  }

  bool library_gemm(const Matrix& out, const Matrix& a, const Matrix& b, double alpha, bool accumulate) const override {
    const Tensor to = wrap(out);
    TORCH_ERROR_CODE_CHECK(
        aoti_torch_cpu_addmm_out(to.get(), to.get(), wrap(a).get(), wrap(b).get(), accumulate ? 1.0 : 0.0, alpha));
    return true;
  }

 private:
  static Tensor wrap(const Matrix& m) {
    const int64_t sizes[] = {m.rows, m.cols}, strides[] = {m.row_stride, m.col_stride};
    return torch::stable::from_blob(m.data, {sizes, 2}, {strides, 2},
                                    torch::stable::Device(torch::headeronly::DeviceType::CPU), type_of(m.dtype));
  }
};

// The arguments that forward and backward share, checked and turned into a Problem.
struct Call {
  Problem problem;
  std::vector<Slice> slices;
};

Dropout dropout(double p, const MaybeTensor& seed, uint32_t stream) {
  Dropout d;
  d.threshold = static_cast<uint32_t>(std::lround(65536 * p));
  d.stream = stream;
  STD_TORCH_CHECK(p >= 0 && p <= 1, "dropout must lie in [0, 1], got ", p);
  if (d.threshold != 0) {
    STD_TORCH_CHECK(seed.has_value(), "dropout needs a seed");
    d.seed = static_cast<uint64_t>(*array_of<int64_t>("seed", seed, ScalarType::Long, 1));
  }
  return d;
}

void set_condition(Problem& p, const MaybeTensor& condition, const MaybeTensor& offsets) {
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
    STD_TORCH_CHECK((dims == 2 || dims == 3) && condition->is_contiguous() && condition->is_cpu() &&
                        condition->scalar_type() == accumulated_type(p.dtype),
                    "a state must be contiguous, on the CPU, and accumulated in float32 (float64 for float64)");
    p.kind = dims == 2 ? StateKind::kVector : matrix ? StateKind::kMatrix : StateKind::kTokens;
    const int64_t conditions = condition->size(0), tokens = p.kind == StateKind::kTokens ? condition->size(1) : 1;
    p.conditions = {conditions, conditions * tokens, nullptr};
    check_size("state", condition->numel(), conditions * tokens * p.state_size());
    p.state = condition->data_ptr();
    return;
  }
  p.y = rows_of("condition", *condition);
  STD_TORCH_CHECK(p.y.dtype == p.dtype, "condition must have the input's dtype");
  p.conditions = sequences_of("condition_cu_seqlens", offsets, condition->size(0), p.y.rows);
  const bool single = !offsets && (condition->dim() == 2 || condition->size(1) == 1);
  p.kind = plan::state_kind(p.routing, p.pool, single);
}

Call call(const Tensor& x, const Tensor& A, const Tensor& B, const MaybeTensor& condition, const MaybeTensor& C,
          const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& b_down, const MaybeTensor& b_C,
          const MaybeTensor& mask, const MaybeTensor& index, const MaybeTensor& input_mask,
          const MaybeTensor& cu_seqlens, const MaybeTensor& condition_cu_seqlens, const MaybeTensor& seed,
          int64_t samples, int64_t routing, int64_t source, int64_t pool, int64_t scale, int64_t groups,
          const std::vector<int64_t>& slices, int64_t out_features, double scaling, double dropout_p,
          double condition_dropout_p, int64_t activation, bool residual) {
  Call result;
  Problem& p = result.problem;
  p.x = rows_of("x", x);
  p.dtype = p.x.dtype;
  const int64_t rows = p.x.rows, d = p.x.cols;
  p.a = matrix_of("A", A, -1, d);
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
    result.slices = {{0, out_features, 0}};
  } else {
    STD_TORCH_CHECK(slices.size() % 2 == 0, "slices are pairs of start and stop");
    int64_t row = 0;
    for (size_t i = 0; i < slices.size(); i += 2) {
      STD_TORCH_CHECK(0 <= slices[i] && slices[i] < slices[i + 1] && slices[i + 1] <= out_features,
                      "slice out of range");
      result.slices.push_back({slices[i], slices[i + 1] - slices[i], row});
      row += slices[i + 1] - slices[i];
    }
  }
  p.slice_count = static_cast<int64_t>(result.slices.size());
  p.groups = groups;
  STD_TORCH_CHECK((groups == 1 || groups == p.slice_count) && p.width % p.slice_count == 0 && p.width > 0,
                  "groups must be 1 or the number of slices, and divide the width");
  int64_t selected = 0;
  for (const Slice& slice : result.slices) selected += slice.length;
  p.b = matrix_of("B", B, selected, p.width / p.slice_count);
  p.weight = matrix_of("weight", weight, out_features, d);
  STD_TORCH_CHECK(!p.weight || p.weight.dtype == p.dtype, "weight must have the input's dtype");
  STD_TORCH_CHECK(!residual || out_features == d, "a residual needs as many outputs as inputs");
  p.bias = vector_of("bias", bias, out_features);
  p.b_down = vector_of("b_down", b_down, p.width);
  p.inputs = sequences_of("cu_seqlens", cu_seqlens, samples, rows);
  p.input_mask = array_of<bool>("input_mask", input_mask, ScalarType::Bool, rows);
  p.drop_x = dropout(dropout_p, seed, 0);
  p.drop_y = dropout(condition_dropout_p, seed, 1);
  STD_TORCH_CHECK(p.source != Source::kInSequence || mask, "an in-sequence condition needs a mask");
  if (p.source == Source::kInSequence) p.condition_mask = array_of<bool>("mask", mask, ScalarType::Bool, rows);
  set_condition(p, condition, condition_cu_seqlens);
  if (p.source == Source::kTokens) {
    p.shared = !C.has_value();
    p.c = p.shared ? matrix_of("A", A, p.width, p.y.cols) : matrix_of("C", *C, p.width, p.y.cols);
    p.b_c = p.shared ? p.b_down : vector_of("b_C", b_C, p.width);
    p.condition_mask = array_of<bool>("mask", mask, ScalarType::Bool, p.y.rows);
  }
  STD_TORCH_CHECK(C ? p.source == Source::kTokens : !b_C, "C goes with a condition that is projected, and b_C with C");
  STD_TORCH_CHECK(!condition || p.source == Source::kTokens || p.source == Source::kState, "no condition is asked for");
  if (p.source == Source::kTokens || p.source == Source::kState) {
    p.index = array_of<int64_t>("index", index, ScalarType::Long, p.inputs.count);
    if (!p.index) check_size("condition", p.conditions.count, p.inputs.count);
    for (int64_t i = 0; p.index && i < p.inputs.count; ++i) {
      STD_TORCH_CHECK(p.index[i] >= 0 && p.index[i] < p.conditions.count, "condition_index ", p.index[i],
                      " is out of range for ", p.conditions.count, " conditions");
    }
    if (p.kind == StateKind::kTokens && (p.routing != Routing::kGram && p.routing != Routing::kGramRelu)) {
      for (int64_t s = 0; s < p.inputs.count; ++s) {
        const int64_t c = p.condition_of(s);
        check_size("an unpooled condition", p.conditions.end(c) - p.conditions.begin(c),
                   p.inputs.end(s) - p.inputs.begin(s));
      }
    }
  }
  return result;
}

Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

Tensor accumulated(const Problem& p, const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, accumulated_type(p.dtype));
}

// The state a condition of this problem has, as the Python side documents it.
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

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, Tensor A, Tensor B, MaybeTensor condition, MaybeTensor C, MaybeTensor weight, MaybeTensor bias,
    MaybeTensor b_down, MaybeTensor b_C, MaybeTensor mask, MaybeTensor index, MaybeTensor input_mask,
    MaybeTensor cu_seqlens, MaybeTensor condition_cu_seqlens, MaybeTensor seed, int64_t samples, int64_t routing,
    int64_t source, int64_t pool, int64_t scale, int64_t groups, std::vector<int64_t> slices, int64_t out_features,
    double scaling, double dropout_p, double condition_dropout_p, int64_t activation, bool residual, int64_t save) {
  Call c = call(x, A, B, condition, C, weight, bias, b_down, b_C, mask, index, input_mask, cu_seqlens,
                condition_cu_seqlens, seed, samples, routing, source, pool, scale, groups, slices, out_features,
                scaling, dropout_p, condition_dropout_p, activation, residual);
  Problem& p = c.problem;
  p.slices = c.slices.data();
  std::vector<int64_t> out_shape = shape_of(x);
  out_shape.back() = out_features;
  Tensor out = torch::stable::new_empty(x, out_shape), t = nothing(x), state = nothing(x), kept = nothing(x);
  ForwardResult result;
  result.out = dense(out.data_ptr(), p.dtype, p.x.rows, out_features);
  if (save != 0) {
    const bool one = plan::rank_one(p.routing, p.kind, p.activation, bool(p.b_down));
    t = one ? accumulated(p, x, {p.x.rows, p.groups}) : torch::stable::new_empty(x, {p.x.rows, p.width});
    result.t = matrix_of("T", t, -1, -1);
    const bool encodes = p.source == Source::kTokens || p.source == Source::kInSequence;
    if (encodes && (p.kind != StateKind::kMatrix || save == 1)) {
      state = accumulated(p, x, state_shape(p, condition, x));
      result.state = state.data_ptr();
    }
    if (encodes && save == 2 && p.kind == StateKind::kVector) {
      kept = accumulated(p, x, {p.conditions.count, p.y.cols});
    } else if (encodes && save == 2 && p.kind == StateKind::kMatrix && p.source == Source::kTokens) {
      kept = torch::stable::new_empty(x, {p.conditions.rows, p.width});
    }
    if (kept.dim() == 2) result.kept = matrix_of("kept", kept, -1, -1);
  }
  cpu::forward(TorchHost(), p, result);
  return {out, t, state, kept};
}

int64_t state_numbers(const Problem& p) {
  return (p.kind == StateKind::kTokens ? p.conditions.rows : p.conditions.count) * p.state_size();
}

// What a forward kept for the gradient of its condition, of the shape it has there; absent if the tensor is empty.
Matrix kept_of(const Problem& p, const Tensor& kept) {
  if (kept.dim() != 2) return {};
  const bool pooled = p.kind == StateKind::kVector;
  STD_TORCH_CHECK(pooled || p.kind == StateKind::kMatrix, "nothing is kept for this kind of condition");
  const int64_t rows = pooled ? p.conditions.count : p.conditions.rows, cols = pooled ? p.y.cols : p.width;
  const Dtype dtype = pooled ? accumulated_dtype(p.dtype) : p.dtype;
  return dense(saved_of("kept", kept, type_of(dtype), rows * cols), dtype, rows, cols);
}

// The gradient of an optional input: like it, contiguous, if bit `bit` of `needs` asks for it.
struct Gradient {
  Tensor tensor;
  Matrix matrix;
};

Gradient gradient(int64_t needs, int bit, const MaybeTensor& like, const Tensor& any, bool as_rows) {
  if (!(needs >> bit & 1) || !like) return {nothing(any), {}};
  Gradient g{torch::stable::new_empty(*like, shape_of(*like)), {}};
  const int64_t dims = like->dim(), last = dims > 0 ? like->size(dims - 1) : 1;
  const int64_t rows = dims == 1 ? 1 : as_rows ? (last > 0 ? like->numel() / last : 0) : like->size(0);
  g.matrix = dense(g.tensor.data_ptr(), dtype_of("gradient", g.tensor), rows, last);
  if (g.matrix.data == nullptr) g.matrix = {};  // nothing in it
  return g;
}

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

NineTensors backward(int64_t needs, Tensor dout, Tensor t, Tensor state, Tensor kept, Tensor x, Tensor A, Tensor B,
                     MaybeTensor condition, MaybeTensor C, MaybeTensor weight, MaybeTensor bias, MaybeTensor b_down,
                     MaybeTensor b_C, MaybeTensor mask, MaybeTensor index, MaybeTensor input_mask,
                     MaybeTensor cu_seqlens, MaybeTensor condition_cu_seqlens, MaybeTensor seed, int64_t samples,
                     int64_t routing, int64_t source, int64_t pool, int64_t scale, int64_t groups,
                     std::vector<int64_t> slices, int64_t out_features, double scaling, double dropout_p,
                     double condition_dropout_p, int64_t activation, bool residual) {
  Call c = call(x, A, B, condition, C, weight, bias, b_down, b_C, mask, index, input_mask, cu_seqlens,
                condition_cu_seqlens, seed, samples, routing, source, pool, scale, groups, slices, out_features,
                scaling, dropout_p, condition_dropout_p, activation, residual);
  Problem& p = c.problem;
  p.slices = c.slices.data();
  Backward io;
  io.dout = rows_of("dout", dout);
  check_size("dout", io.dout.rows, p.x.rows);
  check_size("dout", io.dout.cols, out_features);
  STD_TORCH_CHECK(io.dout.dtype == p.dtype, "dout must have the input's dtype");
  const bool one = plan::rank_one(p.routing, p.kind, p.activation, bool(p.b_down));
  const int64_t t_cols = one ? p.groups : p.width;
  const Dtype t_dtype = one ? accumulated_dtype(p.dtype) : p.dtype;
  io.t = dense(saved_of("T", t, type_of(t_dtype), p.x.rows * t_cols), t_dtype, p.x.rows, t_cols);
  const bool encodes = p.source == Source::kTokens || p.source == Source::kInSequence;
  io.kept = kept_of(p, kept);
  if (encodes && (p.kind != StateKind::kMatrix || state.numel() > 0)) {
    p.state = saved_of("state", state, accumulated_type(p.dtype), state_numbers(p));
  } else if (encodes) {
    STD_TORCH_CHECK(p.source == Source::kInSequence || kept.dim() == 2, "either the state or V must be saved");
  }
  constexpr int64_t kDx = 1, kDa = 2, kDy = 8, kDc = 16, kDbDown = 128, kDbC = 256;
  const bool uses_kept = p.kind == StateKind::kVector || (p.kind == StateKind::kMatrix && p.source == Source::kTokens);
  const int64_t into_condition = p.source == Source::kInSequence ? kDx | kDa | kDbDown
                                 : p.shared                      ? kDy | kDa | kDbDown
                                                                 : kDy | kDc | kDbC;
  STD_TORCH_CHECK(!encodes || !uses_kept || (needs & into_condition) == 0 || kept.dim() == 2,
                  "the forward saved nothing for a gradient of the condition; call it with save=2");

  Gradient dx = gradient(needs, 0, x, x, true), da = gradient(needs, 1, A, x, false),
           db = gradient(needs, 2, B, x, false);
  Gradient dcondition = gradient(needs, 3, condition, x, true), dc = gradient(needs, 4, C, x, false);
  Gradient dweight = gradient(needs, 5, weight, x, false), dbias = gradient(needs, 6, bias, x, false);
  Gradient db_down = gradient(needs, 7, b_down, x, false), db_c = gradient(needs, 8, b_C, x, false);
  io.dx = dx.matrix, io.da = da.matrix, io.db = db.matrix, io.dc = dc.matrix, io.dweight = dweight.matrix;
  io.dbias = dbias.matrix, io.db_down = db_down.matrix, io.db_c = db_c.matrix;
  if (p.source == Source::kState) {
    io.dstate = dcondition.matrix.data;
  } else {
    io.dy = dcondition.matrix;
  }
  cpu::backward(TorchHost(), p, io);
  return {dx.tensor,      da.tensor,    db.tensor,      dcondition.tensor, dc.tensor,
          dweight.tensor, dbias.tensor, db_down.tensor, db_c.tensor};
}

// The part of a Problem that encoding a condition needs.
Problem encoding(const Tensor& y, const Tensor& C, const MaybeTensor& b_C, const MaybeTensor& mask, int64_t routing,
                 int64_t pool, int64_t scale, int64_t groups) {
  Problem p;
  STD_TORCH_CHECK(routing > 0 && routing <= static_cast<int64_t>(Routing::kOnes) && pool >= 0 && pool <= 2,
                  "unknown routing or pool");
  p.routing = static_cast<Routing>(routing);
  p.source = Source::kTokens;
  p.pool = static_cast<Pool>(pool);
  p.scale_by_tokens = scale != 0;
  p.y = rows_of("condition", y);
  p.dtype = p.y.dtype;
  p.c = matrix_of("C", C, -1, p.y.cols);
  p.width = p.c.rows;
  p.groups = groups;
  STD_TORCH_CHECK(groups > 0 && p.width % groups == 0, "groups must divide the width");
  p.b_c = vector_of("b_C", b_C, p.width);
  p.conditions = sequences_of("condition", std::nullopt, y.size(0), p.y.rows);
  p.condition_mask = array_of<bool>("mask", mask, ScalarType::Bool, p.y.rows);
  p.kind = plan::state_kind(p.routing, p.pool, y.dim() == 2 || y.size(1) == 1);
  return p;
}

std::tuple<Tensor, Tensor> encode(Tensor y, Tensor C, MaybeTensor b_C, MaybeTensor mask, int64_t routing, int64_t pool,
                                  int64_t scale, int64_t groups, bool save) {
  const Problem p = encoding(y, C, b_C, mask, routing, pool, scale, groups);
  Tensor state = accumulated(p, y, state_shape(p, y, y)), kept = nothing(y);
  if (save && p.kind == StateKind::kVector) kept = accumulated(p, y, {p.conditions.count, p.y.cols});
  if (save && p.kind == StateKind::kMatrix) kept = torch::stable::new_empty(y, {p.conditions.rows, p.width});
  cpu::encode(TorchHost(), p, state.data_ptr(), kept.dim() == 2 ? matrix_of("kept", kept, -1, -1) : Matrix{});
  return {state, kept};
}

std::tuple<Tensor, Tensor, Tensor> encode_backward(int64_t needs, Tensor dstate, Tensor kept, Tensor y, Tensor C,
                                                   MaybeTensor b_C, MaybeTensor mask, int64_t routing, int64_t pool,
                                                   int64_t scale, int64_t groups) {
  const Problem p = encoding(y, C, b_C, mask, routing, pool, scale, groups);
  void* const gradient_of_state = saved_of("dstate", dstate, accumulated_type(p.dtype), state_numbers(p));
  const Matrix saved = kept_of(p, kept);
  STD_TORCH_CHECK(p.kind == StateKind::kTokens || kept.dim() == 2, "encode was called without save");
  Gradient dy = gradient(needs, 0, y, y, true), dc = gradient(needs, 1, C, y, false),
           db_c = gradient(needs, 2, b_C, y, false);
  cpu::encode_backward(TorchHost(), p, gradient_of_state, saved, dy.matrix, dc.matrix, db_c.matrix);
  return {dy.tensor, dc.tensor, db_c.tensor};
}

}  // namespace
}  // namespace routed_peft

#define RP_TENSORS                                                                                                   \
  "Tensor x, Tensor A, Tensor B, Tensor? condition, Tensor? C, Tensor? weight, Tensor? bias, Tensor? b_down, "       \
  "Tensor? b_C, Tensor? mask, Tensor? index, Tensor? input_mask, Tensor? cu_seqlens, Tensor? condition_cu_seqlens, " \
  "Tensor? seed, SymInt samples, int routing, int source, int pool, int scale, int groups, int[] slices, "           \
  "SymInt out_features, float scaling, float dropout, float condition_dropout, int activation, bool residual"
#define RP_CONDITION "Tensor y, Tensor C, Tensor? b_C, Tensor? mask, int routing, int pool, int scale, int groups"

STABLE_TORCH_LIBRARY(routed_peft, m) {
  m.def("forward(" RP_TENSORS ", int save) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("backward(int needs, Tensor dout, Tensor T, Tensor state, Tensor kept, " RP_TENSORS
        ") -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor)");
  m.def("encode(" RP_CONDITION ", bool save) -> (Tensor, Tensor)");
  m.def("encode_backward(int needs, Tensor dstate, Tensor kept, " RP_CONDITION ") -> (Tensor, Tensor, Tensor)");
}

STABLE_TORCH_LIBRARY_IMPL(routed_peft, CPU, m) {
  m.impl("forward", TORCH_BOX(&routed_peft::forward));
  m.impl("backward", TORCH_BOX(&routed_peft::backward));
  m.impl("encode", TORCH_BOX(&routed_peft::encode));
  m.impl("encode_backward", TORCH_BOX(&routed_peft::encode_backward));
}
