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

  int64_t threads() const override { return torch::stable::get_num_threads(); }

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
  void backward(const Problem& p, const Backward& io) const { cpu::backward(TorchHost(), p, io); }
  void encode(const Problem& p, void* state, const Matrix& kept) const { cpu::encode(TorchHost(), p, state, kept); }
  void encode_backward(const Problem& p, const void* dstate, const Matrix& kept, const Matrix& dy, const Matrix& dc,
                       const Matrix& db_c) const {
    cpu::encode_backward(TorchHost(), p, dstate, kept, dy, dc, db_c);
  }

 private:
  const Place place_{kCpu, true};
};

}  // namespace
}  // namespace routed_peft

STABLE_TORCH_LIBRARY(routed_peft, m) { routed_peft::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(routed_peft, CPU, m) { routed_peft::implement_ops<routed_peft::Cpu>(m); }
