// torch.ops.routed_peft_emulated.*: the launchers and kernels of csrc/kernels on CPU tensors, so that the Python tests
// which run on a GPU run without one. Built by tests/emulated.py.
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cpu.h>
#include <torch/csrc/stable/library.h>

#include <cstring>

#include "torch/kernels.h"
#include "torch/schema.h"

namespace routed_peft {
namespace {

class EmulatedGpu final : public cuda::Host {
 public:
  explicit EmulatedGpu(const Tensor& like) : like_(like) {}
  const Place& place() const { return place_; }

  cuda::Device device() const override {
    return {132, static_cast<int64_t>(emulator::options().shared_bytes)};  // as many processors as an H200 has
  }
  cudaStream_t stream() const override { return nullptr; }

  // NaN in every dtype, so that a number which nobody wrote shows.
  void* scratch(int64_t bytes) const override {
    constexpr int64_t kAlign = 256;
    scratch_.push_back(torch::stable::new_empty(like_, {bytes + kAlign}, ScalarType::Byte));
    void* data = scratch_.back().data_ptr();
    std::memset(data, 0xFF, static_cast<size_t>(bytes + kAlign));
    return static_cast<char*>(data) + (kAlign - reinterpret_cast<uintptr_t>(data) % kAlign);
  }

  void base_gemm(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) const override {
    multiply(aoti_torch_cpu_addmm_out, place_.device, out, a, b, 1, accumulate);
  }

  void check(cudaError_t error) const { STD_TORCH_CHECK(error == cudaSuccess, cudaGetErrorString(error)); }

 private:
  const Tensor like_;
  const Place place_{torch::stable::Device(DeviceType::CPU), false};
  mutable std::vector<Tensor> scratch_;
};

}  // namespace
}  // namespace routed_peft

STABLE_TORCH_LIBRARY(routed_peft_emulated, m) { routed_peft::define_ops(m); }

STABLE_TORCH_LIBRARY_IMPL(routed_peft_emulated, CPU, m) {
  routed_peft::implement_ops<routed_peft::Kernels<routed_peft::EmulatedGpu>>(m);
}

// ---- for the tests, by ctypes

#define RP_EXPORT extern "C" __attribute__((visibility("default")))

// The kernels launched since the last call, by name, one a line.
RP_EXPORT const char* routed_peft_emulated_launches() {
  thread_local std::string names;
  names.clear();
  for (const std::string& name : routed_peft::emulator::launches()) names += name + '\n';
  routed_peft::emulator::reset_launches();
  return names.c_str();
}

// As parse_options reads them; false if it does not know one.
RP_EXPORT bool routed_peft_emulated_options(const char* text) {
  try {
    routed_peft::emulator::set_options(routed_peft::emulator::parse_options(text));
    return true;
  } catch (const routed_peft::emulator::Error&) {
    return false;
  }
}
