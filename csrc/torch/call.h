// The arguments of an op, checked and turned into a Problem; and the ops themselves, once for every device.
//
// A device is a class with a constructor from the tensor that the others must lie beside, `place`, and `forward`,
// `backward`, `encode` and `encode_backward` with the arguments of those of cpu/routed.h without their host.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>
#include <vector>

#include "kernels/plan.h"
#include "torch/checks.h"

namespace routed_peft {

struct Call {
  Problem problem;  // points to the slices
  std::vector<Slice> slices;
};

// What forward, infer and backward share.
Call make_call(const Place& place, const Tensor& x, const Tensor& A, const Tensor& B, const MaybeTensor& condition,
               const MaybeTensor& C, const MaybeTensor& weight, const MaybeTensor& bias, const MaybeTensor& b_down,
               const MaybeTensor& b_C, const MaybeTensor& mask, const MaybeTensor& index, const MaybeTensor& input_mask,
               const MaybeTensor& cu_seqlens, const MaybeTensor& condition_cu_seqlens, const MaybeTensor& seed,
               const MaybeTensor& base, int64_t samples, int64_t routing, int64_t source, int64_t pool, int64_t scale,
               int64_t groups, const std::vector<int64_t>& slices, int64_t out_features, double scaling,
               double dropout_p, double condition_dropout_p, int64_t activation, bool residual);

// The part of a Problem that encoding a condition needs.
Problem make_encoding(const Place& place, const Tensor& y, const Tensor& C, const MaybeTensor& b_C,
                      const MaybeTensor& mask, int64_t routing, int64_t pool, int64_t scale, int64_t groups);

// The state a condition of this problem has, as the Python side documents it.
std::vector<int64_t> state_shape(const Problem& p, const MaybeTensor& condition, const Tensor& x);

// Numbers in it.
int64_t state_numbers(const Problem& p);

// What a forward kept for the gradient of its condition, of the shape it has there; absent if the tensor is empty.
Matrix kept_of(const Place& place, const Problem& p, const Tensor& kept);

// The gradient of an optional input: like it, contiguous, if bit `bit` of `needs` asks for it.
struct Gradient {
  Tensor tensor;
  Matrix matrix;
};
Gradient gradient(const Place& place, Dtype nothing_of, int64_t needs, int bit, const MaybeTensor& like, bool as_rows);

// out = alpha · a b (+ out) by torch's matrix product on `device`.
using Addmm = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle a, AtenTensorHandle b,
                                 double beta, double alpha);
void multiply(Addmm addmm, const torch::stable::Device& device, const Matrix& out, const Matrix& a, const Matrix& b,
              double alpha, bool accumulate);

// A new contiguous tensor. Made through the shim, since the stable new_empty looks its op up by name in every call.
Tensor empty(const Place& place, const std::vector<int64_t>& shape, ScalarType type);

// What an op returns in place of a tensor nobody asked for.
inline Tensor nothing(const Place& place, ScalarType type) { return empty(place, {0}, type); }

inline std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

// save: 0 for no backward, 1 for one without a gradient of the condition, 2 for any.
template <class Device>
std::tuple<Tensor, Tensor, Tensor, Tensor> forward(
    Tensor x, Tensor A, Tensor B, MaybeTensor condition, MaybeTensor C, MaybeTensor weight, MaybeTensor bias,
    MaybeTensor b_down, MaybeTensor b_C, MaybeTensor mask, MaybeTensor index, MaybeTensor input_mask,
    MaybeTensor cu_seqlens, MaybeTensor condition_cu_seqlens, MaybeTensor seed, MaybeTensor base, int64_t samples,
    int64_t routing, int64_t source, int64_t pool, int64_t scale, int64_t groups, std::vector<int64_t> slices,
    int64_t out_features, double scaling, double dropout_p, double condition_dropout_p, int64_t activation,
    bool residual, int64_t save) {
  const Device device(x);
  const Place& place = device.place();
  const Call call =
      make_call(place, x, A, B, condition, C, weight, bias, b_down, b_C, mask, index, input_mask, cu_seqlens,
                condition_cu_seqlens, seed, base, samples, routing, source, pool, scale, groups, slices, out_features,
                scaling, dropout_p, condition_dropout_p, activation, residual);
  const Problem& p = call.problem;
  std::vector<int64_t> out_shape = shape_of(x);
  out_shape.back() = out_features;
  const ScalarType type = type_of(p.dtype), accumulated = accumulated_type(p.dtype);
  Tensor out = empty(place, out_shape, type);
  Tensor t = nothing(place, type), state = nothing(place, type), kept = nothing(place, type);
  ForwardResult result;
  result.out = dense(out.data_ptr(), p.dtype, p.x.rows, out_features);
  if (save != 0) {
    t = plan::rank_one(p) ? empty(place, {p.x.rows, p.groups}, accumulated) : empty(place, {p.x.rows, p.width}, type);
    result.t = place.matrix_of("T", t, -1, -1);
    const bool through_v = p.kind == StateKind::kMatrix && plan::gram_order(p) == plan::GramOrder::kTokens;
    if (p.encodes() && (save == 1 || !through_v)) {
      state = empty(place, state_shape(p, condition, x), accumulated);
      result.state = state.data_ptr();
    }
    if (p.encodes() && save == 2 && p.kind == StateKind::kVector) {
      kept = empty(place, {p.conditions.count, p.y.cols}, accumulated);
    } else if (save == 2 && p.kind == StateKind::kMatrix && p.source == Source::kTokens) {
      kept = empty(place, {p.conditions.rows, p.width}, type);
    }
    if (kept.dim() == 2) result.kept = place.matrix_of("kept", kept, -1, -1);
  }
  device.forward(p, result);
  return {out, t, state, kept};
}

// A forward that keeps nothing, of a call without dropout, masks and all else that most calls of a generation do not
// have: the fewer arguments, the sooner it starts. `choices`: routing, source, pool, scale, activation and residual, a
// byte each from the lowest on, and groups above them.
template <class Device>
Tensor infer(Tensor x, Tensor A, Tensor B, MaybeTensor condition, MaybeTensor weight, MaybeTensor bias,
             MaybeTensor base, MaybeTensor index, int64_t samples, int64_t choices, std::vector<int64_t> slices,
             int64_t out_features, double scaling) {
  const Device device(x);
  const Place& place = device.place();
  const MaybeTensor none;
  const auto choice = [&](int i) { return choices >> (8 * i) & 0xFF; };
  const Call call = make_call(place, x, A, B, condition, none, weight, bias, none, none, none, index, none, none, none,
                              none, base, samples, choice(0), choice(1), choice(2), choice(3), choices >> 48, slices,
                              out_features, scaling, 0, 0, choice(4), choice(5) != 0);
  std::vector<int64_t> out_shape = shape_of(x);
  out_shape.back() = out_features;
  Tensor out = empty(place, out_shape, type_of(call.problem.dtype));
  ForwardResult result;
  result.out = dense(out.data_ptr(), call.problem.dtype, call.problem.x.rows, out_features);
  device.forward(call.problem, result);
  return out;
}

template <class Device>
std::tuple<Tensor, Tensor> encode(Tensor y, Tensor C, MaybeTensor b_C, MaybeTensor mask, int64_t routing, int64_t pool,
                                  int64_t scale, int64_t groups, bool save) {
  const Device device(y);
  const Place& place = device.place();
  const Problem p = make_encoding(place, y, C, b_C, mask, routing, pool, scale, groups);
  const ScalarType type = type_of(p.dtype), accumulated = accumulated_type(p.dtype);
  Tensor state = empty(place, state_shape(p, y, y), accumulated), kept = nothing(place, type);
  if (save && p.kind == StateKind::kVector) kept = empty(place, {p.conditions.count, p.y.cols}, accumulated);
  if (save && p.kind == StateKind::kMatrix) kept = empty(place, {p.conditions.rows, p.width}, type);
  device.encode(p, state.data_ptr(), kept.dim() == 2 ? place.matrix_of("kept", kept, -1, -1) : Matrix{});
  return {state, kept};
}

using NineTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

template <class Device>
NineTensors backward(int64_t needs, Tensor dout, Tensor t, Tensor state, Tensor kept, Tensor x, Tensor A, Tensor B,
                     MaybeTensor condition, MaybeTensor C, MaybeTensor weight, MaybeTensor bias, MaybeTensor b_down,
                     MaybeTensor b_C, MaybeTensor mask, MaybeTensor index, MaybeTensor input_mask,
                     MaybeTensor cu_seqlens, MaybeTensor condition_cu_seqlens, MaybeTensor seed, int64_t samples,
                     int64_t routing, int64_t source, int64_t pool, int64_t scale, int64_t groups,
                     std::vector<int64_t> slices, int64_t out_features, double scaling, double dropout_p,
                     double condition_dropout_p, int64_t activation, bool residual) {
  const Device device(x);
  const Place& place = device.place();
  Call call = make_call(place, x, A, B, condition, C, weight, bias, b_down, b_C, mask, index, input_mask, cu_seqlens,
                        condition_cu_seqlens, seed, std::nullopt, samples, routing, source, pool, scale, groups, slices,
                        out_features, scaling, dropout_p, condition_dropout_p, activation, residual);
  Problem& p = call.problem;
  Backward io;
  io.dout = place.rows_of("dout", dout);
  check_size("dout", io.dout.rows, p.x.rows);
  check_size("dout", io.dout.cols, out_features);
  STD_TORCH_CHECK(io.dout.dtype == p.dtype, "dout must have the input's dtype");
  const bool one = plan::rank_one(p);
  const int64_t t_cols = one ? p.groups : p.width;
  const Dtype t_dtype = one ? accumulated_dtype(p.dtype) : p.dtype;
  io.t = dense(place.saved_of("T", t, type_of(t_dtype), p.x.rows * t_cols), t_dtype, p.x.rows, t_cols);
  io.kept = kept_of(place, p, kept);
  if (p.encodes() && (p.kind != StateKind::kMatrix || state.dim() == 3 || state.numel() > 0)) {
    p.state = place.saved_of("state", state, accumulated_type(p.dtype), state_numbers(p));
  } else if (p.encodes()) {
    STD_TORCH_CHECK(plan::gram_order(p) == plan::GramOrder::kTokens && kept.dim() == 2,
                    "either the state or V must be saved");
  }
  constexpr int64_t kDx = 1, kDa = 2, kDy = 8, kDc = 16, kDbDown = 128, kDbC = 256;
  const bool uses_kept = p.kind == StateKind::kVector || (p.kind == StateKind::kMatrix && p.source == Source::kTokens);
  const int64_t into_condition = p.source == Source::kInSequence ? kDx | kDa | kDbDown
                                 : p.shared                      ? kDy | kDa | kDbDown
                                                                 : kDy | kDc | kDbC;
  STD_TORCH_CHECK(!p.encodes() || !uses_kept || (needs & into_condition) == 0 || kept.dim() == 2,
                  "the forward saved nothing for a gradient of the condition; call it with save=2");

  const auto wanted = [&](int bit, const MaybeTensor& like, bool as_rows = false) {
    return gradient(place, p.dtype, needs, bit, like, as_rows);
  };
  Gradient dx = wanted(0, x, true), da = wanted(1, A), db = wanted(2, B);
  Gradient dcondition = wanted(3, condition, true), dc = wanted(4, C);
  Gradient dweight = wanted(5, weight), dbias = wanted(6, bias), db_down = wanted(7, b_down), db_c = wanted(8, b_C);
  io.dx = dx.matrix, io.da = da.matrix, io.db = db.matrix, io.dc = dc.matrix, io.dweight = dweight.matrix;
  io.dbias = dbias.matrix, io.db_down = db_down.matrix, io.db_c = db_c.matrix;
  if (p.source == Source::kState) {
    io.dstate = dcondition.matrix.data;
  } else {
    io.dy = dcondition.matrix;
  }
  device.backward(p, io);
  return {dx.tensor,      da.tensor,    db.tensor,      dcondition.tensor, dc.tensor,
          dweight.tensor, dbias.tensor, db_down.tensor, db_c.tensor};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> encode_backward(int64_t needs, Tensor dstate, Tensor kept, Tensor y, Tensor C,
                                                   MaybeTensor b_C, MaybeTensor mask, int64_t routing, int64_t pool,
                                                   int64_t scale, int64_t groups) {
  const Device device(y);
  const Place& place = device.place();
  const Problem p = make_encoding(place, y, C, b_C, mask, routing, pool, scale, groups);
  void* const gradient_of_state = place.saved_of("dstate", dstate, accumulated_type(p.dtype), state_numbers(p));
  const Matrix saved = kept_of(place, p, kept);
  STD_TORCH_CHECK(p.kind == StateKind::kTokens || kept.dim() == 2, "encode was called without save");
  Gradient dy = gradient(place, p.dtype, needs, 0, y, true), dc = gradient(place, p.dtype, needs, 1, C, false),
           db_c = gradient(place, p.dtype, needs, 2, b_C, false);
  device.encode_backward(p, gradient_of_state, saved, dy.matrix, dc.matrix, db_c.matrix);
  return {dy.tensor, dc.tensor, db_c.tensor};
}

template <class Device, class Library>
void implement_ops(Library& m) {
  m.impl("forward", TORCH_BOX(&forward<Device>));
  m.impl("infer", TORCH_BOX(&infer<Device>));
  m.impl("backward", TORCH_BOX(&backward<Device>));
  m.impl("encode", TORCH_BOX(&encode<Device>));
  m.impl("encode_backward", TORCH_BOX(&encode_backward<Device>));
}

}  // namespace routed_peft
