// The whole routed layer on the GPU: what csrc/torch calls, one function a direction. Everything a Problem points to is
// device memory here, and nothing waits for the device.
#pragma once

#include "kernels/launch.h"

namespace routed_peft::cuda {

// What a plan has to know of a device; no result depends on it.
struct Device {
  int64_t processors = 1;
  int64_t shared_bytes = 48 * 1024;  // that a block may ask for
};

// What the kernels ask of the program around them.
class Host {
 public:
  virtual ~Host() = default;
  virtual Device device() const = 0;
  virtual cudaStream_t stream() const = 0;
  // Uninitialised device memory, 256-byte aligned, that lives until the stream is past this call; never nullptr, which
  // says that nothing is wanted.
  virtual void* scratch(int64_t bytes) const = 0;
  // out = a b (+ out if accumulate), by the vendor's library, on the stream.
  virtual void base_gemm(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) const = 0;
};

cudaError_t forward(const Host& host, const Problem& problem, const ForwardResult& result);

// What the forward saved comes in with io and as problem.state.
cudaError_t backward(const Host& host, const Problem& problem, const Backward& io);

// A condition alone: its state, float32, and, if present, what its backward needs (as ForwardResult::kept).
cudaError_t encode(const Host& host, const Problem& problem, void* state, const Matrix& kept);
cudaError_t encode_backward(const Host& host, const Problem& problem, const void* dstate, const Matrix& kept,
                            const Matrix& dy, const Matrix& dc, const Matrix& db_c);

}  // namespace routed_peft::cuda
