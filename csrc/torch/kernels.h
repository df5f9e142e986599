// The kernels as a device of call.h, for a Host of theirs: the GPU's (ops_cuda.cpp) or the emulator's.
#pragma once

#include "kernels/routed.h"
#include "torch/call.h"

namespace routed_peft {

// Host: constructor from a tensor that lies on the device, `place`, and `check` for what a launcher returned.
template <class Host>
class Kernels {
 public:
  explicit Kernels(const Tensor& x) : host_(x) {}
  const Place& place() const { return host_.place(); }
  void forward(const Problem& p, const ForwardResult& result) const {
    check_limits(p);
    host_.check(cuda::forward(host_, p, result));
  }
  void backward(const Problem& p, const Backward& io) const {
    check_limits(p);
    host_.check(cuda::backward(host_, p, io));
  }
  void encode(const Problem& p, void* state, const Matrix& kept) const {
    check_limits(p);
    host_.check(cuda::encode(host_, p, state, kept));
  }
  void encode_backward(const Problem& p, const void* dstate, const Matrix& kept, const Matrix& dy, const Matrix& dc,
                       const Matrix& db_c) const {
    check_limits(p);
    host_.check(cuda::encode_backward(host_, p, dstate, kept, dy, dc, db_c));
  }

 private:
  // What routed_peft/ops.py asks before it chooses this backend.
  static void check_limits(const Problem& p) {
    STD_TORCH_CHECK(p.dtype != Dtype::kFloat64, "the CUDA kernels do not compute in float64");
    STD_TORCH_CHECK(p.group_width() <= cuda::kMaxWidth, "width ", p.group_width(),
                    " is not supported by the CUDA kernels (supported: 1..", cuda::kMaxWidth, ")");
    STD_TORCH_CHECK(p.slice_count <= cuda::kMaxSlices, "the CUDA kernels take at most ", cuda::kMaxSlices, " slices");
  }

  const Host host_;
};

}  // namespace routed_peft
