// T = drop(X) Aᵀ + b, Z = act(ρ(T, state)), in one launch: T never leaves the block in between.
//
// A block has 64 rows of X and all of the (padded) width. X and A come through a ring of shared-memory stages of 128
// bytes a row, filled by cp.async as far ahead as the block's shared memory reaches. Eight warps: four times 16 rows,
// and of each stage's columns one half to four of them and one half to the others, whose products are added at the end.
// Four warps with all of the columns would be too few to hide a load behind.
//
//        d ->                    width
//   64 [ X stage ] · [ A stage ]ᵀ  =  2 x 4 x [16 x width] accumulators -> T -> route -> Z
//
// Dropout is drawn on the fragments: a thread's part of a row's 32 columns is exactly the eight slots of one call of
// the random numbers (device/philox.cuh). Where few tokens would leave the machine idle, d is split over blockIdx.y and
// the raw products go to memory; route.cu then adds and routes them.
//
// One width for all rows of A rather than a loop over its column tiles: X is the large operand, and is read once.
#include <algorithm>

#include "kernels/device/philox.cuh"
#include "kernels/device/route.cuh"
#include "kernels/dispatch.h"
#include "kernels/launch.h"

namespace routed_peft::cuda {
namespace {

constexpr int kThreads = 256, kBlockRows = 64, kTeams = 4, kTeamWarps = 2;

struct KernelParams : DownRouteParams {
  bool x_by_16, a_by_16;  // rows can be copied 16 bytes at a time
};

template <class T>
constexpr int kDepth = 128 / sizeof(T);  // columns of a stage
template <class T>
constexpr int kStride = (128 + 16) / sizeof(T);  // of a row in shared memory: no bank conflicts for ldmatrix

// Rows of X or A on their way to the stages, kRows at a time: with 16 bytes a copy, a thread has the same 16 bytes of
// rows i, i + 32, ... at every step.
template <class T, int kRows>
struct Loader {
  static constexpr int kElements = 16 / sizeof(T), kRowsAtOnce = kThreads / 8;
  static constexpr int kCopies = (kRows + kRowsAtOnce - 1) / kRowsAtOnce;
  const T* data;
  const T* next;  // this thread's 16 bytes of its first row
  int64_t stride, col_stride, k, k_end;
  uint32_t present;  // bit j: row i + 32 j is there
  int row, column;
  bool by_16;

  template <class Present>
  RP_DEVICE Loader(const Matrix& from, int64_t first, int64_t k_begin, int64_t end, bool vector, const Present& is)
      : data(static_cast<const T*>(from.data)),
        stride(from.row_stride),
        col_stride(from.col_stride),
        k(k_begin),
        k_end(end),
        present(0),
        row(static_cast<int>(threadIdx.x) / 8),
        column(static_cast<int>(threadIdx.x) % 8 * kElements),
        by_16(vector) {
    data += first * stride;
    next = data + row * stride + k + column;
    RP_UNROLL
    for (int j = 0; j < kCopies; ++j) {
      if (row + j * kRowsAtOnce < kRows && is(row + j * kRowsAtOnce)) present |= 1u << j;
    }
  }

  // The next columns, zeros where there are none.
  template <class Present>
  RP_DEVICE void load(T* to, const Present& is) {
    if (by_16) {
      const bool inside = k + column < k_end;
      RP_UNROLL
      for (int j = 0; j < kCopies; ++j) {
        if (kRows % kRowsAtOnce != 0 && row + j * kRowsAtOnce >= kRows) break;
        const bool valid = inside && (present >> j & 1);
        cp_async_16(to + (row + j * kRowsAtOnce) * kStride<T> + column, valid ? next + j * kRowsAtOnce * stride : data,
                    valid);
      }
      next += kDepth<T>;
    } else {
      RP_NO_UNROLL
      for (int i = threadIdx.x; i < kRows * kDepth<T>; i += kThreads) {
        const int r = i / kDepth<T>, c = i % kDepth<T>;
        const bool valid = k + c < k_end && is(r);
        to[r * kStride<T> + c] = valid ? data[r * stride + (k + c) * col_stride] : from_float<T>(0.f);
      }
    }
    k += kDepth<T>;
  }
};

// Two halfwords of random bits -> a mask of the two elements they keep.
RP_DEVICE uint32_t keep_mask(uint32_t word, uint32_t threshold) {
  return ((word & 0xFFFFu) >= threshold ? 0xFFFFu : 0u) | ((word >> 16) >= threshold ? 0xFFFF0000u : 0u);
}

// Blocks that a processor's registers are to hold; without it the compiler aims too low for some, and spills.
template <class T, int kWidth>
constexpr int kBlocksAtLeast = down_in_pairs(kIsFloat<T>, kWidth) ? 2 : 1;

template <class T, int kWidth, bool kDropout>
__global__ __launch_bounds__(kThreads, kBlocksAtLeast<T, kWidth>) void down_route_kernel(const KernelParams p) {
  RP_DYNAMIC_SMEM(shared);
  const LanePlace at;
  const int team = static_cast<int>(threadIdx.x) / 32 % kTeams, half = static_cast<int>(threadIdx.x) / 32 / kTeams;
  const int64_t block_row = int64_t{blockIdx.x} * kBlockRows, rows = p.x.rows;
  const int64_t first_row = block_row + team * kRouteRows;
  const int64_t k_begin = blockIdx.y * p.split_depth;
  const int64_t k_end = k_begin + p.split_depth < p.x.cols ? k_begin + p.split_depth : p.x.cols;
  const int steps = k_end > k_begin ? static_cast<int>((k_end - k_begin + kDepth<T> - 1) / kDepth<T>) : 0;
  T* const stages = reinterpret_cast<T*>(shared);
  constexpr int kStage = (kBlockRows + kWidth) * kStride<T>;

  const auto x_there = [&](int row) {
    return block_row + row < rows && (p.route.row_mask == nullptr || p.route.row_mask[block_row + row]);
  };
  const auto a_there = [&](int row) { return row < p.a.rows; };
  Loader<T, kBlockRows> x_loader(p.x, block_row, k_begin, k_end, p.x_by_16, x_there);
  Loader<T, kWidth> a_loader(p.a, 0, k_begin, k_end, p.a_by_16, a_there);
  T* filling = stages;
  const T* const last_stage = stages + (p.stages - 1) * kStage;
  const auto load = [&] {
    x_loader.load(filling, x_there);
    a_loader.load(filling + kBlockRows * kStride<T>, a_there);
    filling = filling == last_stage ? stages : filling + kStage;
  };

  uint64_t seed = 0;
  if constexpr (kDropout) seed = p.drop.seed_at != nullptr ? static_cast<uint64_t>(*p.drop.seed_at) : p.drop.seed;
  // The eight slots of 32 columns from k on.
  const auto random = [&](int h, int64_t k) {
    const uint64_t row = static_cast<uint64_t>(first_row + at.g + 8 * h);
    return philox(seed, static_cast<uint32_t>(row), static_cast<uint32_t>(row >> 32),
                  static_cast<uint32_t>(k / 64 * 4 + at.q), 2 * p.drop.stream + static_cast<uint32_t>(k % 64 / 32));
  };

  float acc[kWidth / 8][4] = {};
  for (int step = 0; step < p.stages - 1; ++step) {
    if (step < steps) load();
    cp_async_commit();
  }
  T* stage = stages;
  RP_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    cp_async_wait_for(p.stages - 2);
    __syncthreads();  // this stage is there for everyone, and everyone is done with the one before, refilled next
    if (step + p.stages - 1 < steps) load();
    cp_async_commit();
    constexpr int kHalf = kDepth<T> / 2;
    T* x = stage + team * kRouteRows * kStride<T> + half * kHalf;
    const T* a = stage + kBlockRows * kStride<T> + half * kHalf;
    const int64_t k = k_begin + int64_t{step} * kDepth<T> + half * kHalf;
    stage = stage == last_stage ? stages : stage + kStage;
    if constexpr (kIsFloat<T>) {
      if (kDropout && p.drop.threshold != 0) {
        // 16 columns, which is half of one call's slots; a lane blanks those of its two rows in place.
        RP_UNROLL
        for (int h = 0; h < 2; ++h) {
          const PhiloxWords words = random(h, k);
          T* row = x + (at.g + 8 * h) * kStride<T> + 2 * at.q;
          RP_UNROLL
          for (int slot = 0; slot < 4; ++slot) {
            const uint32_t word = half == 0 ? words.word[slot / 2] : words.word[2 + slot / 2];
            const uint32_t halfword = word >> (16 * (slot % 2)) & 0xFFFFu;
            if (halfword < p.drop.threshold) row[slot / 2 * 8 + slot % 2] = 0.f;
          }
        }
        __syncwarp();
      }
      multiply_float(acc, x, kStride<T>, a, kStride<T>, kHalf);
    } else {
      uint32_t keep[2][4];
      if constexpr (kDropout) {
        RP_UNROLL
        for (int h = 0; h < 2; ++h) {
          const PhiloxWords words = random(h, k);
          RP_UNROLL
          for (int i = 0; i < 4; ++i) keep[h][i] = keep_mask(words.word[i], p.drop.threshold);
        }
      }
      multiply_tensor<T, kWidth / 8, kHalf>(acc, x, kStride<T>, a, kStride<T>, [&](int k16, auto& fragment) {
        if constexpr (kDropout) {
          fragment[0] &= keep[0][2 * k16];
          fragment[1] &= keep[1][2 * k16];
          fragment[2] &= keep[0][2 * k16 + 1];
          fragment[3] &= keep[1][2 * k16 + 1];
        }
      });
    }
  }
  __syncthreads();  // the stages make room for the routing
  if (first_row >= rows) return;

  // One half of the columns' products plus the other's.
  using Space = RouteSpace<kWidth, kTeamWarps>;
  Space& space = reinterpret_cast<Space*>(shared)[team];
  const Team<kTeamWarps> warps{1 + team, half, 32 * half + at.lane};
  if (half == 1) store_rows(space.t, Space::kStride, acc);
  warps.sync();
  if (half == 0) {
    RP_UNROLL
    for (int h = 0; h < 2; ++h) {
      const int64_t row = first_row + at.g + 8 * h;
      RP_UNROLL
      for (int j = 0; j < kWidth / 8; ++j) {
        float2* const pair = reinterpret_cast<float2*>(space.t + (at.g + 8 * h) * Space::kStride + 8 * j + 2 * at.q);
        *pair = make_float2(acc[j][2 * h] + pair->x, acc[j][2 * h + 1] + pair->y);
        if (p.partial != nullptr && row < rows) {
          float* to = p.partial + (blockIdx.y * rows + row) * kWidth + 8 * j + 2 * at.q;
          *reinterpret_cast<float2*>(to) = *pair;
        }
      }
    }
  }
  warps.sync();
  if (p.z != nullptr) {
    route_tile<T>(space, warps, first_row, p.route,
                  [&](int row, int column, float z0, float z1) { store_z<T>(p, first_row + row, column, z0, z1); });
    store_z_padding<T>(p, warps, first_row);
  } else if (p.route.t != nullptr || p.route.tokens[0] != nullptr || p.route.tokens[1] != nullptr) {
    finish_t<T>(space, warps, first_row, p.route);
  }
}

template <class T>
bool rows_by_16(const Matrix& m) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return m.col_stride == 1 && m.cols % kElements == 0 && (m.rows <= 1 || m.row_stride % kElements == 0) &&
         reinterpret_cast<uintptr_t>(m.data) % 16 == 0;
}

template <class T, int kWidth, bool kDropout>
cudaError_t launch_as(const DownRouteParams& params, cudaStream_t stream) {
  KernelParams p{params, rows_by_16<T>(params.x), rows_by_16<T>(params.a)};
  if (params.drop.threshold >= 65536) p.x.cols = 0;  // all is dropped: no products at all
  const dim3 grid(static_cast<unsigned>((params.x.rows + kBlockRows - 1) / kBlockRows),
                  static_cast<unsigned>(params.splits));
  static_assert(kTeams * sizeof(RouteSpace<kWidth, kTeamWarps>) <= 99 << 10, "shared memory of the smaller devices");
  const size_t shared = std::max<size_t>(static_cast<size_t>(p.stages * down_stage_bytes(kWidth)),
                                         kTeams * sizeof(RouteSpace<kWidth, kTeamWarps>));
  return launch<down_route_kernel<T, kWidth, kDropout>>(grid, dim3(kThreads), shared, stream, p);
}

}  // namespace

cudaError_t down_route(const DownRouteParams& params, cudaStream_t stream) {
  if (params.x.rows == 0) return cudaSuccess;
  [[maybe_unused]] const bool dropout = params.drop.threshold != 0;
  return dispatch_float(params.dtype, [&]<class T>() {
    return dispatch_width(params.padded_width, [&]<int kWidth>() {
      if constexpr (kIsFloat<T>) {  // one kernel for both: there, dropout is a step of its own
        return launch_as<T, kWidth, true>(params, stream);
      } else {
        return dropout ? launch_as<T, kWidth, true>(params, stream) : launch_as<T, kWidth, false>(params, stream);
      }
    });
  });
}

}  // namespace routed_peft::cuda
