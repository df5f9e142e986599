// dT, Z and the sums of the condition's gradient from grad_output's raw products in memory: the parts of a split sum
// added in order, then as there; from G ∘ act' that an earlier launch of either left (cross_gram's second step); or,
// where nothing but Z is wanted, without G.
//
// A block has 16 rows, because this is for few tokens or wide bottlenecks; its four warps share the columns.
#include "kernels/device/route_grad.cuh"
#include "kernels/dispatch.h"
#include "kernels/launch.h"

namespace routed_peft::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

template <class T, int kWidth>
__global__ __launch_bounds__(kThreads, 2) void route_grad_kernel(const GradOutputParams p) {
  using Space = RouteGradSpace<kWidth, kWarps>;
  RP_DYNAMIC_SMEM(shared);
  Space& space = *reinterpret_cast<Space*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const Team<kWarps> team{1, thread / 32, thread};
  const int64_t first_row = int64_t{blockIdx.x} * kRouteRows, rows = p.route.route.rows;
  const bool finished = p.partial == nullptr && p.route.g != nullptr;

  if (finished) {
    for (int i = thread; i < kRouteRows * kWidth; i += kThreads) {
      const int row = i / kWidth, column = i % kWidth;
      const bool there = first_row + row < rows && column < p.route.route.width;
      space.g[row * Space::kStride + column] = there ? p.route.g[(first_row + row) * p.route.stride + column] : 0.f;
    }
  } else if (p.partial != nullptr) {
    // Four columns a thread and load, as many loads under way as there are registers for.
    constexpr int kQuads = kRouteRows * kWidth / 4, kLoads = (kQuads + kThreads - 1) / kThreads;
    float4 sum[kLoads];
    RP_UNROLL
    for (int i = 0; i < kLoads; ++i) sum[i] = make_float4(0.f, 0.f, 0.f, 0.f);
    for (int split = 0; split < p.splits; ++split) {
      RP_UNROLL
      for (int i = 0; i < kLoads; ++i) {
        const int quad = thread + i * kThreads, row = quad / (kWidth / 4);
        if (quad >= kQuads || first_row + row >= rows) continue;
        const float* from = p.partial + (split * rows + first_row + row) * kWidth + quad % (kWidth / 4) * 4;
        const float4 part = *reinterpret_cast<const float4*>(from);
        sum[i] = make_float4(sum[i].x + part.x, sum[i].y + part.y, sum[i].z + part.z, sum[i].w + part.w);
      }
    }
    RP_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int quad = thread + i * kThreads;
      if (quad >= kQuads) continue;
      *reinterpret_cast<float4*>(space.g + quad / (kWidth / 4) * Space::kStride + quad % (kWidth / 4) * 4) =
          make_float4(p.scaling * sum[i].x, p.scaling * sum[i].y, p.scaling * sum[i].z, p.scaling * sum[i].w);
    }
  }
  team.sync();
  route_grad_tile<T>(space, team, first_row, p.route, finished);
}

}  // namespace

cudaError_t route_grad(const GradOutputParams& p, cudaStream_t stream) {
  if (p.route.route.rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((p.route.route.rows + kRouteRows - 1) / kRouteRows));
  return dispatch_float(p.dtype, [&]<class T>() {
    return dispatch_width(p.padded_width, [&]<int kWidth>() {
      constexpr size_t kShared = sizeof(RouteGradSpace<kWidth, kWarps>);
      return launch<route_grad_kernel<T, kWidth>>(grid, dim3(kThreads), kShared, stream, p);
    });
  });
}

}  // namespace routed_peft::cuda
