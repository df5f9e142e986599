// T and Z from down_route's raw products in memory: the parts of a split sum added in order, then as there.
//
// A block has 16 rows, because this is for few tokens; its four warps add up the parts together and share the columns
// of the route. Without a z, T is all that is wanted.
#include "kernels/device/route.cuh"
#include "kernels/dispatch.h"
#include "kernels/launch.h"

namespace routed_peft::cuda {
namespace {

constexpr int kWarps = 4, kThreads = 32 * kWarps;

template <class T, int kWidth>
__global__ __launch_bounds__(kThreads, kIsFloat<T> ? 2 : 3) void route_kernel(const DownRouteParams p) {
  using Space = RouteSpace<kWidth, kWarps>;
  RP_DYNAMIC_SMEM(shared);
  Space& space = *reinterpret_cast<Space*>(shared);
  const int thread = static_cast<int>(threadIdx.x);
  const Team<kWarps> team{1, thread / 32, thread};
  const int64_t first_row = int64_t{blockIdx.x} * kRouteRows, rows = p.route.rows;

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
    *reinterpret_cast<float4*>(space.t + quad / (kWidth / 4) * Space::kStride + quad % (kWidth / 4) * 4) = sum[i];
  }
  team.sync();
  if (p.z == nullptr) {
    finish_t<T>(space, team, first_row, p.route);
    return;
  }
  route_tile<T>(space, team, first_row, p.route,
                [&](int row, int column, float z0, float z1) { store_z<T>(p, first_row + row, column, z0, z1); });
  store_z_padding<T>(p, team, first_row);
}

}  // namespace

cudaError_t route(const DownRouteParams& p, cudaStream_t stream) {
  if (p.route.rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((p.route.rows + kRouteRows - 1) / kRouteRows));
  return dispatch_float(p.dtype, [&]<class T>() {
    return dispatch_width(p.padded_width, [&]<int kWidth>() {
      return launch<route_kernel<T, kWidth>>(grid, dim3(kThreads), sizeof(RouteSpace<kWidth, kWarps>), stream, p);
    });
  });
}

}  // namespace routed_peft::cuda
