// to[i] = from[i] in one dtype, row-major: parameters kept in float32 under a bfloat16 input.
//
// A thread makes eight neighbours of one row, so that it stores 16 bytes at once; what it reads is small beside a
// layer's weight and is left to the caches. One kernel for every pair of dtypes: it is far from any limit but latency.
#include "kernels/device/vector.cuh"
#include "kernels/launch.h"

namespace routed_peft::cuda {
namespace {

constexpr int kPackThreads = 256, kPackRun = 8;

RP_HOST_DEVICE int64_t packs(int64_t cols) { return (cols + kPackRun - 1) / kPackRun; }

template <class T>
RP_DEVICE void pack_run(const Matrix& from, void* to, int64_t to_cols, int64_t row, int64_t col) {
  T* out = static_cast<T*>(to) + row * to_cols + col;
  const int64_t left = from.cols - col, there = to_cols - col;
  T v[kPackRun];
  RP_UNROLL
  for (int i = 0; i < kPackRun; ++i) {
    const int64_t at = row * from.row_stride + (col + i) * from.col_stride;
    v[i] = from_float<T>(i < left ? load_as_float(from.data, from.dtype, at) : 0.0f);
  }
  if (there >= kPackRun && reinterpret_cast<uintptr_t>(out) % 16 == 0) {
    RP_UNROLL
    for (int i = 0; i < kPackRun; i += kVector<T>) {
      Elements<T, kVector<T>> part;
      RP_UNROLL
      for (int k = 0; k < kVector<T>; ++k) part.e[k] = v[i + k];
      store_vector(out + i, part);
    }
    return;
  }
  RP_UNROLL
  for (int i = 0; i < kPackRun; ++i) {
    if (i < there) out[i] = v[i];
  }
}

__global__ __launch_bounds__(kPackThreads) void pack_kernel(const PackParams p) {
  int64_t item = int64_t{blockIdx.x} * kPackThreads + threadIdx.x;
  RP_UNROLL
  for (int i = 0; i < kMaxPacked; ++i) {
    if (i >= p.count) return;
    const Matrix& from = p.from[i];
    const int64_t runs = packs(p.to_cols[i]), items = from.rows * runs;
    if (item < items) {
      const int64_t row = item / runs, col = item % runs * kPackRun;
      if (p.dtype == Dtype::kBFloat16) {
        pack_run<bfloat16>(from, p.to[i], p.to_cols[i], row, col);
      } else if (p.dtype == Dtype::kFloat16) {
        pack_run<half>(from, p.to[i], p.to_cols[i], row, col);
      } else {
        pack_run<float>(from, p.to[i], p.to_cols[i], row, col);
      }
      return;
    }
    item -= items;
  }
}

}  // namespace

cudaError_t pack(const PackParams& params, cudaStream_t stream) {
  if (params.dtype == Dtype::kFloat64 || params.count > kMaxPacked) return cudaErrorInvalidValue;
  int64_t items = 0;
  for (int i = 0; i < params.count; ++i) items += params.from[i].rows * packs(params.to_cols[i]);
  if (items == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((items + kPackThreads - 1) / kPackThreads));
  return launch<pack_kernel>(grid, dim3(kPackThreads), 0, stream, params);
}

}  // namespace routed_peft::cuda
