// torch.ops.routed_peft.* on the GPU: the kernels on torch's current stream, with torch's memory and its matrix
// product.
#include <cuda_runtime_api.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_cuda.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <mutex>

#include "torch/kernels.h"

namespace routed_peft {
namespace {

// The oldest GPUs that have what the kernels are written with: bfloat16 tensor cores and asynchronous copies.
constexpr int kLeastMajor = 8;

int attribute(cudaDeviceAttr which, int device) {
  int value = 0;
  const cudaError_t error = cudaDeviceGetAttribute(&value, which, device);
  STD_TORCH_CHECK(error == cudaSuccess, "routed_peft cannot ask the GPU: ", cudaGetErrorString(error));
  return value;
}

// Asked once for each GPU, which must be new enough.
const cuda::Device& facts_of(int device) {
  constexpr int kMost = 64;
  static std::once_flag asked[kMost];
  static cuda::Device facts[kMost];
  STD_TORCH_CHECK(device >= 0 && device < kMost, "routed_peft knows no GPU ", device);
  std::call_once(asked[device], [&] {
    const int major = attribute(cudaDevAttrComputeCapabilityMajor, device);
    const int minor = attribute(cudaDevAttrComputeCapabilityMinor, device);
    STD_TORCH_CHECK(major >= kLeastMajor, "routed_peft's CUDA kernels need compute capability ", kLeastMajor,
                    ".0 or newer, this GPU has ", major, ".", minor);
    facts[device] = {attribute(cudaDevAttrMultiProcessorCount, device),
                     attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, device)};
  });
  return facts[device];
}

class TorchGpu final : public cuda::Host {
 public:
  explicit TorchGpu(const Tensor& like)
      : place_{device_of(like), false},
        guard_(place_.device.index()),
        stream_(current_stream(place_)),
        facts_(facts_of(place_.device.index())) {}
  const Place& place() const { return place_; }

  cuda::Device device() const override { return facts_; }
  cudaStream_t stream() const override { return stream_; }

  // Freed when the call returns: torch's allocator hands it out again on the same stream only, behind the kernels.
  void* scratch(int64_t bytes) const override {
    scratch_.push_back(empty(place_, {std::max<int64_t>(bytes, 1)}, ScalarType::Byte));
    return scratch_.back().data_ptr();
  }

  void base_gemm(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) const override {
    multiply(aoti_torch_cuda_addmm_out, place_.device, out, a, b, 1, accumulate);
  }

  void check(cudaError_t error) const {
    STD_TORCH_CHECK(error == cudaSuccess, "routed_peft's CUDA kernels: ", cudaGetErrorString(error));
  }

 private:
  static torch::stable::Device device_of(const Tensor& like) {
    STD_TORCH_CHECK(like.is_cuda(), "routed_peft's CUDA kernels got tensors of several devices");
    return like.device();
  }
  static cudaStream_t current_stream(const Place& place) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(place.device.index(), &stream));
    return static_cast<cudaStream_t>(stream);
  }

  const Place place_;
  const torch::stable::accelerator::DeviceGuard guard_;  // before the stream, which is the device's
  const cudaStream_t stream_;
  const cuda::Device& facts_;
  mutable std::vector<Tensor> scratch_;
};

}  // namespace
}  // namespace routed_peft

STABLE_TORCH_LIBRARY_IMPL(routed_peft, CUDA, m) {
  routed_peft::implement_ops<routed_peft::Kernels<routed_peft::TorchGpu>>(m);
}
