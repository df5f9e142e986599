// G = s dOut B̂, and in the same launch dT, Z and the sums that the condition's gradient needs (device/route_grad.cuh).
//
// A block has 64 rows of dOut and all of the (padded) width, as down_route has of X; its columns go by slice, 128 bytes
// of a row at a time, beside the rows of B that belong to them:
//
//        o ->                    width
//   64 [ dOut stage ] · [ B stage ]  =  2 x 4 x [16 x width] accumulators -> G -> route's gradient -> dT, Z
//
// B lies with its rank columns where its slice's are in the bottleneck and zeros beside them; tiles of zeros alone are
// not multiplied. dB needs Z, and that sum over all rows is grad_input's: here it would be another accumulator as large
// as B in every block, or one more read of dOut by blocks of another role, which is what that launch is.
//
// Where few tokens would leave the machine idle, o is split over blockIdx.y and the raw products go to memory for
// route_grad, and always where the width leaves no shared memory for the route of four teams.
#include <algorithm>

#include "kernels/device/route_grad.cuh"
#include "kernels/device/vector.cuh"
#include "kernels/dispatch.h"
#include "kernels/launch.h"
#include "kernels/plan.h"

namespace routed_peft::cuda {
namespace {

constexpr int kThreads = 256, kBlockRows = 64, kTeams = 4, kTeamWarps = 2;

template <class T>
constexpr int kDepth = 128 / sizeof(T);  // columns of a stage
template <class T>
constexpr int kStride = (128 + 16) / sizeof(T);  // of a row of dOut in shared memory
template <class T, int kWidth>
constexpr int kBStride = kWidth + 16 / sizeof(T);
template <class T, int kWidth>
constexpr int kStage = kBlockRows * kStride<T> + kDepth<T> * kBStride<T, kWidth>;

struct KernelParams : GradOutputParams {
  bool dout_by_16, b_by_16;  // 16 bytes at a time
};

// Where a walk over the slices' columns is: kDepth of them at a time, counted slice by slice in units of 64. No slice
// is empty.
template <class T>
struct Cursor {
  int slice = 0;
  int64_t left = 0;  // columns of the slice; none, in float32's second half of a unit

  RP_DEVICE Cursor(const GradOutputParams& p, int64_t units) {
    while (slice < p.slice_count - 1 && units >= (p.slices[slice].length + 63) / 64) {
      units -= (p.slices[slice].length + 63) / 64;
      ++slice;
    }
    left = p.slices[slice].length - units * 64;
  }
  // Whether the next columns are another slice's.
  RP_DEVICE bool next(const GradOutputParams& p) {
    left -= kDepth<T>;
    const int64_t k = p.slices[slice].length - left;
    if (left > 0 || k % 64 != 0 || slice == p.slice_count - 1) return false;
    left = p.slices[++slice].length;
    return true;
  }
};

// Stages of dOut and B on their way: with 16 bytes a copy, a thread has the same 16 bytes of the same rows at every
// step.
template <class T, int kWidth>
struct Loader {
  static constexpr int kElements = 16 / sizeof(T);
  static constexpr int kRowsAtOnce = kThreads / 8, kCopies = kBlockRows / kRowsAtOnce;
  static constexpr int kChunks = kWidth / kElements;       // of a row of B
  static constexpr int kBRowsAtOnce = kThreads / kChunks;  // more than a stage has for the narrowest
  static constexpr int kBCopies = (kDepth<T> + kBRowsAtOnce - 1) / kBRowsAtOnce;

  const KernelParams& p;
  Cursor<T> at;
  int64_t block_row;
  const T* dout;  // this thread's first 16 bytes
  const T* b;
  uint32_t present;                  // bit j: row `row` + j kRowsAtOnce of dOut is there
  int row, column, b_row, b_column;  // in a stage
  bool dout_by_16, b_here;

  RP_DEVICE Loader(const KernelParams& params, int64_t units, int64_t first_row)
      : p(params),
        at(params, units),
        block_row(first_row),
        present(0),
        row(static_cast<int>(threadIdx.x) / 8),
        column(static_cast<int>(threadIdx.x) % 8 * kElements),
        b_row(static_cast<int>(threadIdx.x) / kChunks),
        b_column(static_cast<int>(threadIdx.x) % kChunks * kElements) {
    RP_UNROLL
    for (int j = 0; j < kCopies; ++j) {
      if (block_row + row + j * kRowsAtOnce < p.dout.rows) present |= 1u << j;
    }
    begin_slice();
  }

  RP_DEVICE void begin_slice() {
    const Slice& slice = p.slices[at.slice];
    const int64_t k = slice.length - at.left;
    const int first = at.slice * p.rank;  // of the slice's columns in the bottleneck
    dout = static_cast<const T*>(p.dout.data) + (block_row + row) * p.dout.row_stride + slice.start + k + column;
    dout_by_16 = p.dout_by_16 && slice.start % kElements == 0 && slice.length % kElements == 0;
    b = static_cast<const T*>(p.b.data) + (slice.row + k + b_row) * p.b.row_stride + b_column - first;
    b_here = b_column >= first && b_column < first + p.rank;
  }

  RP_DEVICE void load(T* stage) {
    T* const to = stage + kBlockRows * kStride<T>;
    const int left = at.left < kDepth<T> ? static_cast<int>(at.left) : kDepth<T>;
    if (dout_by_16) {
      RP_UNROLL
      for (int j = 0; j < kCopies; ++j) {
        const bool valid = column < left && (present >> j & 1);
        cp_async_16(stage + (row + j * kRowsAtOnce) * kStride<T> + column,
                    valid ? dout + j * kRowsAtOnce * p.dout.row_stride : static_cast<const T*>(p.dout.data), valid);
      }
    } else {
      const Slice& slice = p.slices[at.slice];
      const T* const from =
          static_cast<const T*>(p.dout.data) + block_row * p.dout.row_stride + slice.start + slice.length - at.left;
      RP_NO_UNROLL
      for (int i = threadIdx.x; i < kBlockRows * kDepth<T>; i += kThreads) {
        const int r = i / kDepth<T>, c = i % kDepth<T>;
        const bool valid = block_row + r < p.dout.rows && c < left;
        stage[r * kStride<T> + c] = valid ? from[r * p.dout.row_stride + c] : from_float<T>(0.f);
      }
    }
    if (p.b_by_16) {
      RP_UNROLL
      for (int j = 0; j < kBCopies; ++j) {
        const int r = b_row + j * kBRowsAtOnce;
        if (kBRowsAtOnce > kDepth<T> && r >= kDepth<T>) break;
        const bool valid = b_here && r < left;
        cp_async_16(to + r * kBStride<T, kWidth> + b_column,
                    valid ? b + j * kBRowsAtOnce * p.b.row_stride : static_cast<const T*>(p.b.data), valid);
      }
    } else {
      const Slice& slice = p.slices[at.slice];
      const T* const from = static_cast<const T*>(p.b.data) + (slice.row + slice.length - at.left) * p.b.row_stride;
      const int first = at.slice * p.rank;
      RP_NO_UNROLL
      for (int i = threadIdx.x; i < kDepth<T> * kWidth; i += kThreads) {
        const int r = i / kWidth, c = i % kWidth;
        const bool valid = r < left && c >= first && c < first + p.rank;
        to[r * kBStride<T, kWidth> + c] = valid ? from[r * p.b.row_stride + c - first] : from_float<T>(0.f);
      }
    }
    if (at.next(p)) {
      begin_slice();
    } else {
      dout += kDepth<T>;
      b += kDepth<T> * p.b.row_stride;
    }
  }
};

// Blocks that a processor's registers are to hold.
template <class T, int kWidth>
constexpr int kBlocksAtLeast = down_in_pairs(kIsFloat<T>, kWidth) ? 2 : 1;

template <class T, int kWidth>
__global__ __launch_bounds__(kThreads, kBlocksAtLeast<T, kWidth>) void grad_output_kernel(const KernelParams p) {
  RP_DYNAMIC_SMEM(shared);
  const LanePlace at;
  const int team = static_cast<int>(threadIdx.x) / 32 % kTeams, half = static_cast<int>(threadIdx.x) / 32 / kTeams;
  const int64_t block_row = int64_t{blockIdx.x} * kBlockRows, rows = p.dout.rows;
  const int64_t first_row = block_row + team * kRouteRows;
  int64_t units = 0;
  for (int i = 0; i < p.slice_count; ++i) units += (p.slices[i].length + 63) / 64;
  const int64_t begin = blockIdx.y * p.split_depth;
  const int64_t end = begin + p.split_depth < units ? begin + p.split_depth : units;
  const int steps = end > begin ? static_cast<int>((end - begin) * (64 / kDepth<T>)) : 0;
  T* const stages = reinterpret_cast<T*>(shared);
  const T* const last_stage = stages + (p.stages - 1) * kStage<T, kWidth>;

  // What the route will read first, on its way to L2.
  if (p.partial == nullptr && p.route.t != nullptr && first_row + at.lane / 2 < rows) {
    const T* const t = static_cast<const T*>(p.route.t) + (first_row + at.lane / 2) * p.route.t_stride;
    for (int column = (2 * half + at.lane % 2) * kDepth<T>; column < p.route.route.width; column += 4 * kDepth<T>) {
      prefetch_to_l2(t + column);
    }
  }
  Loader<T, kWidth> loader(p, begin, block_row);
  Cursor<T> computing = loader.at;
  T* filling = stages;
  const auto load = [&] {
    loader.load(filling);
    filling = filling == last_stage ? stages : filling + kStage<T, kWidth>;
  };
  float acc[kWidth / 8][4] = {};
  for (int step = 0; step < p.stages - 1; ++step) {
    if (step < steps) load();
    cp_async_commit();
  }
  const T* stage = stages;
  RP_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    cp_async_wait_for(p.stages - 2);
    __syncthreads();  // this stage is there for everyone, and everyone is done with the one before, refilled next
    if (step + p.stages - 1 < steps) load();
    cp_async_commit();
    constexpr int kHalf = kDepth<T> / 2;
    const T* x = stage + team * kRouteRows * kStride<T> + half * kHalf;
    const T* b = stage + kBlockRows * kStride<T> + half * kHalf * kBStride<T, kWidth>;
    const int first = computing.slice * p.rank / 8, last = ((computing.slice + 1) * p.rank - 1) / 8;
    computing.next(p);
    stage = stage == last_stage ? stages : stage + kStage<T, kWidth>;
    if constexpr (kIsFloat<T>) {
      multiply_float_by_rows(acc, x, kStride<T>, b, kBStride<T, kWidth>, kHalf, first, last);
    } else {
      multiply_tensor_by_rows<T, kWidth / 8, kHalf>(acc, x, kStride<T>, b, kBStride<T, kWidth>, first, last);
    }
  }
  __syncthreads();  // the stages make room
  if (first_row >= rows) return;

  // One half of the columns' products plus the other's, and s.
  constexpr bool kFused = kWidth <= kMaxFusedWidth;
  using Space = RouteGradSpace<kFused ? kWidth : 16, kTeamWarps>;
  constexpr int kRowStride = kWidth + 4;
  float* const g = kFused ? reinterpret_cast<Space*>(shared)[team].g
                          : reinterpret_cast<float*>(shared) + team * kRouteRows * kRowStride;
  const Team<kTeamWarps> warps{1 + team, half, 32 * half + at.lane};
  if (half == 1) store_rows(g, kRowStride, acc);
  warps.sync();
  if (half == 0) {
    RP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first_row + at.g + 8 * h;
      RP_UNROLL
      for (int j = 0; j < kWidth / 8; ++j) {
        float2* const pair = reinterpret_cast<float2*>(g + (at.g + 8 * h) * kRowStride + 8 * j + 2 * at.q);
        const float2 sum = make_float2(acc[j][2 * h] + pair->x, acc[j][2 * h + 1] + pair->y);
        *pair = make_float2(p.scaling * sum.x, p.scaling * sum.y);
        if (p.partial != nullptr && row < rows) {
          float* to = p.partial + (blockIdx.y * rows + row) * kWidth + 8 * j + 2 * at.q;
          *reinterpret_cast<float2*>(to) = sum;
        }
      }
    }
  }
  if (p.partial != nullptr) return;
  warps.sync();
  if constexpr (kFused) {
    route_grad_tile<T>(reinterpret_cast<Space*>(shared)[team], warps, first_row, p.route, false);
  }
}

template <class T, int kWidth>
cudaError_t launch_as(const GradOutputParams& params, cudaStream_t stream) {
  constexpr bool kFused = kWidth <= kMaxFusedWidth;
  if (!kFused && params.partial == nullptr) return cudaErrorInvalidValue;
  // 16 bytes of B never hold columns of two slices, or, of a single one, what lies behind its rows' padding
  constexpr int64_t kElements = 16 / sizeof(T);
  const bool whole = params.rank % kElements == 0 ||
                     (params.slice_count == 1 && params.b.row_stride >= plan::round_up(params.rank, kElements));
  const KernelParams p{params, aligned_rows(params.dout, 16), whole && aligned_rows(params.b, 16)};
  const dim3 grid(static_cast<unsigned>((params.dout.rows + kBlockRows - 1) / kBlockRows),
                  static_cast<unsigned>(params.splits));
  constexpr size_t kRoute = kFused ? kTeams * sizeof(RouteGradSpace < kFused ? kWidth : 16, kTeamWarps >)
                                   : kBlockRows * (kWidth + 4) * sizeof(float);
  static_assert(kRoute <= 99 << 10, "shared memory of the smaller devices");
  static_assert(kStage<T, kWidth> * sizeof(T) == grad_output_stage_bytes(sizeof(T), kWidth));
  const size_t shared = std::max(static_cast<size_t>(p.stages) * kStage<T, kWidth> * sizeof(T), kRoute);
  return launch<grad_output_kernel<T, kWidth>>(grid, dim3(kThreads), shared, stream, p);
}

}  // namespace

cudaError_t grad_output(const GradOutputParams& params, cudaStream_t stream) {
  if (params.dout.rows == 0) return cudaSuccess;
  return dispatch_float(params.dtype, [&]<class T>() {
    return dispatch_width(params.padded_width, [&]<int kWidth>() { return launch_as<T, kWidth>(params, stream); });
  });
}

}  // namespace routed_peft::cuda
