// out = scale · (Σ parts, in order), for all of a backward's parameters in one launch.
//
// A thread has four neighbouring numbers of one item and adds the parts one after another, which fixes the order of the
// sum; four parts are read at a time, since each comes from another place and nothing else hides the way there.
#include "kernels/device/vector.cuh"
#include "kernels/dispatch.h"
#include "kernels/launch.h"

namespace routed_peft::cuda {
namespace {

constexpr int kThreads = 256, kCount = 4, kBlockNumbers = kThreads * kCount, kPartsAtOnce = 4;

int64_t numbers(const ReduceItem& item) { return item.out.rows * item.out.cols; }
int64_t blocks_of(const ReduceItem& item) { return (numbers(item) + kBlockNumbers - 1) / kBlockNumbers; }

struct KernelParams : ReduceParams {
  int64_t first_block[kMaxReduced + 1];
  bool vectors[kMaxReduced];  // parts and out can be taken four numbers at a time
};

template <class T>
RP_DEVICE void store_numbers(void* out, int64_t first, int left, bool vectors, const float (&sum)[kCount],
                             float scale) {
  T* const to = static_cast<T*>(out) + first;
  if constexpr (std::is_same_v<T, double>) {
    for (int e = 0; e < left; ++e) to[e] = scale * sum[e];
  } else {
    Elements<T, kCount> result;
    RP_UNROLL
    for (int e = 0; e < kCount; ++e) result.e[e] = from_float<T>(scale * sum[e]);
    if (vectors) {
      store_vector<kCount>(to, result);
    } else {
      RP_UNROLL
      for (int e = 0; e < kCount; ++e) {
        if (e < left) to[e] = result.e[e];
      }
    }
  }
}

__global__ __launch_bounds__(kThreads) void reduce_kernel(const KernelParams p) {
  int i = 0;
  while (static_cast<int64_t>(blockIdx.x) >= p.first_block[i + 1]) ++i;
  const ReduceItem& item = p.items[i];
  const int64_t size = item.out.rows * item.out.cols;
  const int64_t first = (blockIdx.x - p.first_block[i]) * kBlockNumbers + int64_t{threadIdx.x} * kCount;
  if (first >= size) return;
  const int left = size - first < kCount ? static_cast<int>(size - first) : kCount;
  const bool vectors = p.vectors[i];
  float sum[kCount] = {};
  RP_UNROLL
  for (int which = 0; which < 2; ++which) {
    RP_NO_UNROLL
    for (int64_t s = 0; s < item.splits[which]; s += kPartsAtOnce) {
      float part[kPartsAtOnce][kCount];
      RP_UNROLL
      for (int k = 0; k < kPartsAtOnce; ++k) {
        const int there = s + k < item.splits[which] ? left : 0;
        load_floats<kCount>(item.parts[which] + (s + k) * size + first, there, vectors, part[k]);
      }
      RP_UNROLL
      for (int k = 0; k < kPartsAtOnce; ++k) {
        if (s + k >= item.splits[which]) break;
        RP_UNROLL
        for (int e = 0; e < kCount; ++e) sum[e] += part[k][e];
      }
    }
  }
  switch (item.out.dtype) {
    case Dtype::kBFloat16:
      return store_numbers<bfloat16>(item.out.data, first, left, vectors, sum, item.scale);
    case Dtype::kFloat16:
      return store_numbers<half>(item.out.data, first, left, vectors, sum, item.scale);
    case Dtype::kFloat64:
      return store_numbers<double>(item.out.data, first, left, vectors, sum, item.scale);
    case Dtype::kFloat32:
      return store_numbers<float>(item.out.data, first, left, vectors, sum, item.scale);
  }
}

}  // namespace

cudaError_t reduce(const ReduceParams& params, cudaStream_t stream) {
  KernelParams p{params, {}, {}};
  for (int i = 0; i < p.count; ++i) {
    const ReduceItem& item = p.items[i];
    const auto aligned = [](const void* at, int64_t bytes) { return reinterpret_cast<uintptr_t>(at) % bytes == 0; };
    p.vectors[i] = numbers(item) % kCount == 0 && aligned(item.parts[0], 16) && aligned(item.parts[1], 16) &&
                   aligned(item.out.data, kCount * element_size(item.out.dtype));
    p.first_block[i + 1] = p.first_block[i] + blocks_of(item);
  }
  const int64_t blocks = p.first_block[p.count];
  if (blocks == 0) return cudaSuccess;
  return launch<reduce_kernel>(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), 0, stream, p);
}

}  // namespace routed_peft::cuda
