// torch.ops.routed_peft.*: schemas and the CPU implementations, on the LibTorch Stable ABI alone, so that one binary
// serves torch 2.11 and everything after it. Gradients, shapes for tracing and the texts of errors are Python's.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include "cpu/routed.h"
#include "torch/call.h"
#include "torch/schema.h"

namespace routed_peft {
namespace {

const torch::stable::Device kCpu(DeviceType::CPU);

// torch's threads and torch's matrix product, for the CPU path.
class TorchHost final : public cpu::Host {
 public:
  void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) const override {
    if (count > 0) torch::stable::parallel_for(0, count, 1, body);
  }

  bool library_gemm(const Matrix& out, const Matrix& a, const Matrix& b, double alpha, bool accumulate) const override {
    multiply(aoti_torch_cpu_addmm_out, kCpu, out, a, b, alpha, accumulate);
    return true;
  }
};

class Cpu {
 public:
  explicit Cpu(const Tensor&) {}
  const Place& place() const { return place_; }
  void forward(const Problem& p, const ForwardResult& result) const { cpu::forward(TorchHost(), p, result); }
  void encode(const Problem& p, void* state, const Matrix& kept) const { cpu::encode(TorchHost(), p, state, kept); }

 private:
  const Place place_{kCpu, true};
};

// What a forward kept for the gradient of its condition, of the shape it has there; absent if the tensor is empty.
Matrix kept_of(const Place& place, const Problem& p, const Tensor& kept) {
  if (kept.dim() != 2) return {};
  const bool pooled = p.kind == StateKind::kVector;
  STD_TORCH_CHECK(pooled || p.kind == StateKind::kMatrix, "nothing is kept for this kind of condition");
  const int64_t rows = pooled ? p.conditions.count : p.conditions.rows, cols = pooled ? p.y.cols : p.width;
  const Dtype dtype = pooled ? accumulated_dtype(p.dtype) : p.dtype;
  return dense(place.saved_of("kept", kept, type_of(dtype), rows * cols), dtype, rows, cols);
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
  const Place place{kCpu, true};
  Call call = make_call(place, x, A, B, condition, C, weight, bias, b_down, b_C, mask, index, input_mask, cu_seqlens,
                        condition_cu_seqlens, seed, std::nullopt, samples, routing, source, pool, scale, groups, slices,
                        out_features, scaling, dropout_p, condition_dropout_p, activation, residual);
  Problem& p = call.problem;
  Backward io;
  io.dout = place.rows_of("dout", dout);
  check_size("dout", io.dout.rows, p.x.rows);
  check_size("dout", io.dout.cols, out_features);
  STD_TORCH_CHECK(io.dout.dtype == p.dtype, "dout must have the input's dtype");
  const bool one = is_rank_one(p);
  const int64_t t_cols = one ? p.groups : p.width;
  const Dtype t_dtype = one ? accumulated_dtype(p.dtype) : p.dtype;
  io.t = dense(place.saved_of("T", t, type_of(t_dtype), p.x.rows * t_cols), t_dtype, p.x.rows, t_cols);
  const bool encodes = p.source == Source::kTokens || p.source == Source::kInSequence;
  io.kept = kept_of(place, p, kept);
  if (encodes && (p.kind != StateKind::kMatrix || state.numel() > 0)) {
    p.state = place.saved_of("state", state, accumulated_type(p.dtype), state_numbers(p));
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

std::tuple<Tensor, Tensor, Tensor> encode_backward(int64_t needs, Tensor dstate, Tensor kept, Tensor y, Tensor C,
                                                   MaybeTensor b_C, MaybeTensor mask, int64_t routing, int64_t pool,
                                                   int64_t scale, int64_t groups) {
  const Place place{kCpu, true};
  const Problem p = make_encoding(place, y, C, b_C, mask, routing, pool, scale, groups);
  void* const gradient_of_state = place.saved_of("dstate", dstate, accumulated_type(p.dtype), state_numbers(p));
  const Matrix saved = kept_of(place, p, kept);
  STD_TORCH_CHECK(p.kind == StateKind::kTokens || kept.dim() == 2, "encode was called without save");
  Gradient dy = gradient(needs, 0, y, y, true), dc = gradient(needs, 1, C, y, false),
           db_c = gradient(needs, 2, b_C, y, false);
  cpu::encode_backward(TorchHost(), p, gradient_of_state, saved, dy.matrix, dc.matrix, db_c.matrix);
  return {dy.tensor, dc.tensor, db_c.tensor};
}

}  // namespace
}  // namespace routed_peft

STABLE_TORCH_LIBRARY(routed_peft, m) { routed_peft::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(routed_peft, CPU, m) {
  m.impl("forward", TORCH_BOX(&routed_peft::forward<routed_peft::Cpu>));
  m.impl("backward", TORCH_BOX(&routed_peft::backward));
  m.impl("encode", TORCH_BOX(&routed_peft::encode<routed_peft::Cpu>));
  m.impl("encode_backward", TORCH_BOX(&routed_peft::encode_backward));
}
