// The arguments of an op, checked and turned into a Problem; and forward and encode themselves, once for every device.
//
// A device is a class with a constructor from the tensor that the others must lie beside, `place`, `forward` and
// `encode`; the last two have the arguments of cpu::forward and cpu::encode without their host.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
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

// What forward and backward share.
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

// out = alpha · a b (+ out) by torch's matrix product on `device`.
using Addmm = AOTITorchError (*)(AtenTensorHandle out, AtenTensorHandle self, AtenTensorHandle a, AtenTensorHandle b,
                                 double beta, double alpha);
void multiply(Addmm addmm, const torch::stable::Device& device, const Matrix& out, const Matrix& a, const Matrix& b,
              double alpha, bool accumulate);

inline bool is_rank_one(const Problem& p) { return plan::rank_one(p.routing, p.kind, p.activation, bool(p.b_down)); }

inline Tensor nothing(const Tensor& like) { return torch::stable::new_empty(like, {0}); }

inline std::vector<int64_t> shape_of(const Tensor& t) { return {t.sizes().begin(), t.sizes().end()}; }

inline Tensor accumulated(const Problem& p, const Tensor& like, const std::vector<int64_t>& shape) {
  return torch::stable::new_empty(like, shape, accumulated_type(p.dtype));
}

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
  Tensor out = torch::stable::new_empty(x, out_shape), t = nothing(x), state = nothing(x), kept = nothing(x);
  ForwardResult result;
  result.out = dense(out.data_ptr(), p.dtype, p.x.rows, out_features);
  if (save != 0) {
    t = is_rank_one(p) ? accumulated(p, x, {p.x.rows, p.groups}) : torch::stable::new_empty(x, {p.x.rows, p.width});
    result.t = place.matrix_of("T", t, -1, -1);
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
    if (kept.dim() == 2) result.kept = place.matrix_of("kept", kept, -1, -1);
  }
  device.forward(p, result);
  return {out, t, state, kept};
}

template <class Device>
std::tuple<Tensor, Tensor> encode(Tensor y, Tensor C, MaybeTensor b_C, MaybeTensor mask, int64_t routing, int64_t pool,
                                  int64_t scale, int64_t groups, bool save) {
  const Device device(y);
  const Problem p = make_encoding(device.place(), y, C, b_C, mask, routing, pool, scale, groups);
  Tensor state = accumulated(p, y, state_shape(p, y, y)), kept = nothing(y);
  if (save && p.kind == StateKind::kVector) kept = accumulated(p, y, {p.conditions.count, p.y.cols});
  if (save && p.kind == StateKind::kMatrix) kept = torch::stable::new_empty(y, {p.conditions.rows, p.width});
  device.encode(p, state.data_ptr(), kept.dim() == 2 ? device.place().matrix_of("kept", kept, -1, -1) : Matrix{});
  return {state, kept};
}

}  // namespace routed_peft
