// K = factor · Σ_n f(L_n)ᵀ V_n for each sample and group: S = VᵀV (gram), relu(V)ᵀV (gram_relu), TᵀV (cross_gram).
//
// A block makes 64 x 64 of one group's K from a part of the sample's rows, 32 rows at a time through shared memory;
// each of its four warps has 16 of the 64. The parts are summed in order by a second kernel, which a state of few
// tokens does without. K is float32 and stays it to about 1e-6: on the tensor cores each factor is split into two TF32
// numbers, and three of the four products are taken; and since these cut their sums off where others round, a sum of 32
// rows is added to the last ones by the ordinary units. K is small beside the product that made V, so this costs
// little.
#include "kernels/device/product.cuh"
#include "kernels/device/rows.cuh"
#include "kernels/dispatch.h"
#include "kernels/launch.h"

namespace routed_peft::cuda {
namespace {

constexpr int kThreads = 128, kTile = 64, kRows = 32;
constexpr int kStride = kTile + 8;  // banks 8q + g: no conflicts

// 1 / max(1, valid rows) of a sample, by all threads of the block.
RP_DEVICE float factor_of(const GramParams& p, int64_t sample) {
  if (!p.scale_by_tokens) return 1.f;
  const RowRange rows = rows_of(p.left_rows, sample);
  if (p.mask == nullptr) return 1.f / static_cast<float>(rows.end > rows.begin ? rows.end - rows.begin : 1);
  int valid = 0;
  for (int64_t i = rows.begin + threadIdx.x % 32; i < rows.end; i += 32) valid += p.mask[i];
  RP_UNROLL
  for (int step = 16; step > 0; step /= 2) valid += __shfl_xor_sync(~0u, valid, step);
  return 1.f / static_cast<float>(valid > 0 ? valid : 1);
}

RP_DEVICE void split_tf32(float value, uint32_t& high, uint32_t& low) {
  high = to_tf32(value);
  float rounded;
  memcpy(&rounded, &high, sizeof rounded);
  low = to_tf32(value - rounded);
}

template <class L, bool kTensor>
__global__ __launch_bounds__(kThreads) void gram_kernel(const GramParams p) {
  RP_DYNAMIC_SMEM(shared);
  float* const left = reinterpret_cast<float*>(shared);  // [kRows, kStride]
  float* const right = left + kRows * kStride;
  const LanePlace at;
  const int warp = static_cast<int>(threadIdx.x) / 32, w = p.group_width;
  const int tiles = (w + kTile - 1) / kTile, blocks = p.width / w * tiles * tiles;  // of a sample
  const int block = static_cast<int>(blockIdx.x) % blocks;
  const int group = block / (tiles * tiles), i0 = block / tiles % tiles * kTile, j0 = block % tiles * kTile;
  const int64_t sample = static_cast<int>(blockIdx.x) / blocks, part = blockIdx.y;

  const RowRange rows = rows_of(p.left_rows, sample);
  const int64_t other = condition_of(p.index, p.right_rows.count, sample);
  const RowRange right_rows = other < 0 ? RowRange{0, 0} : rows_of(p.right_rows, other);
  const int64_t length = rows.end - rows.begin, right_length = right_rows.end - right_rows.begin;
  const bool lost = other < 0 || length != right_length;  // nothing stands beside a row: what the caller gave is wrong
  // Parts of whole kRows, so that a part's sums do not depend on how many parts there are behind it.
  const int64_t steps = (length + kRows - 1) / kRows, each = (steps + p.splits - 1) / p.splits;
  const int64_t begin = part * each * kRows;
  const int64_t end = begin + each * kRows < length ? begin + each * kRows : length;

  float acc[kTile / 8][4] = {};
  for (int64_t n = begin; n < end; n += kRows) {
    __syncthreads();  // the last step's readers are done
    // A thread has a column of every second row. All loads of eight rows are under way before the first is stored.
    constexpr int kAhead = 8, kStep = kThreads / kTile;
    const int column = static_cast<int>(threadIdx.x) % kTile;
    RP_UNROLL
    for (int first = static_cast<int>(threadIdx.x) / kTile; first < kRows; first += kAhead * kStep) {
      L from_left[kAhead];
      float from_right[kAhead];
      RP_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const int64_t row = n + first + i * kStep;
        const bool inside = row < end && row < right_length;
        const bool there = inside && i0 + column < w && (p.left_mask == nullptr || p.left_mask[rows.begin + row]);
        const int64_t l = (rows.begin + row) * p.width + group * w + i0 + column;
        const int64_t r = (right_rows.begin + row) * p.width + group * w + j0 + column;
        from_left[i] = there ? static_cast<const L*>(p.left)[l] : from_float<L>(0.f);
        from_right[i] = inside && j0 + column < w ? p.right[r] : 0.f;
      }
      RP_UNROLL
      for (int i = 0; i < kAhead; ++i) {
        const float value = to_float(from_left[i]);
        left[(first + i * kStep) * kStride + column] = p.positive ? relu(value) : value;
        right[(first + i * kStep) * kStride + column] = from_right[i];
      }
    }
    __syncthreads();
    float sum[kTile / 8][4] = {};
    if constexpr (kTensor) {
      RP_UNROLL
      for (int k = 0; k < kRows; k += 8) {
        const float* a = left + (k + at.q) * kStride + warp * 16 + at.g;
        uint32_t high[4], low[4];
        split_tf32(a[0], high[0], low[0]);
        split_tf32(a[8], high[1], low[1]);
        split_tf32(a[4 * kStride], high[2], low[2]);
        split_tf32(a[4 * kStride + 8], high[3], low[3]);
        RP_UNROLL
        for (int j = 0; j < kTile / 8; ++j) {
          const float* b = right + (k + at.q) * kStride + 8 * j + at.g;
          uint32_t b_high[2], b_low[2];
          split_tf32(b[0], b_high[0], b_low[0]);
          split_tf32(b[4 * kStride], b_high[1], b_low[1]);
          mma_tf32_16x8x8(sum[j], low, b_high[0], b_high[1]);
          mma_tf32_16x8x8(sum[j], high, b_low[0], b_low[1]);
          mma_tf32_16x8x8(sum[j], high, b_high[0], b_high[1]);
        }
      }
    } else {
      for (int k = 0; k < kRows; ++k) {
        const float a0 = left[k * kStride + warp * 16 + at.g], a1 = left[k * kStride + warp * 16 + at.g + 8];
        RP_UNROLL
        for (int j = 0; j < kTile / 8; ++j) {
          const float2 b = *reinterpret_cast<const float2*>(right + k * kStride + 8 * j + 2 * at.q);
          sum[j][0] += a0 * b.x;
          sum[j][1] += a0 * b.y;
          sum[j][2] += a1 * b.x;
          sum[j][3] += a1 * b.y;
        }
      }
    }
    RP_UNROLL
    for (int j = 0; j < kTile / 8; ++j) {
      RP_UNROLL
      for (int e = 0; e < 4; ++e) acc[j][e] += sum[j][e];
    }
  }

  const bool whole = p.splits == 1 && p.out != nullptr;
  float factor = whole ? factor_of(p, sample) : 1.f;
  if (lost) factor = nanf("");
  float* const out = (whole ? p.out : p.partial + part * p.left_rows.count * p.width * w) + sample * p.width * w;
  RP_UNROLL
  for (int j = 0; j < kTile / 8; ++j) {
    RP_UNROLL
    for (int e = 0; e < 4; ++e) {
      const int i = i0 + warp * 16 + at.g + e / 2 * 8, column = j0 + 8 * j + 2 * at.q + e % 2;
      if (i < w && column < w) out[(int64_t{group} * w + i) * w + column] = factor * acc[j][e];
    }
  }
}

__global__ __launch_bounds__(kThreads) void gram_reduce_kernel(const GramParams p) {
  const int64_t size = int64_t{p.width} * p.group_width;
  const int blocks = static_cast<int>((size + kThreads - 1) / kThreads);  // of a sample
  const int64_t sample = static_cast<int>(blockIdx.x) / blocks;
  const int64_t i = int64_t{static_cast<int>(blockIdx.x) % blocks} * kThreads + threadIdx.x;
  const float factor = factor_of(p, sample);
  if (i >= size) return;
  float sum = 0.f;
  for (int part = 0; part < p.splits; ++part) sum += p.partial[(part * p.left_rows.count + sample) * size + i];
  p.out[sample * size + i] = factor * sum;
}

}  // namespace

cudaError_t gram(const GramParams& p, cudaStream_t stream) {
  if (p.left_rows.count == 0) return cudaSuccess;
  const int64_t tiles = (p.group_width + kTile - 1) / kTile, groups = p.width / p.group_width;
  const dim3 grid(static_cast<unsigned>(p.left_rows.count * groups * tiles * tiles), static_cast<unsigned>(p.splits));
  constexpr size_t kShared = 2 * kRows * kStride * sizeof(float);
  const cudaError_t error = dispatch_float(p.left_dtype, [&]<class L>() {
    if constexpr (std::is_same_v<L, float>) {
      if (!p.tensor) return launch<gram_kernel<L, false>>(grid, dim3(kThreads), kShared, stream, p);
    }
    return launch<gram_kernel<L, true>>(grid, dim3(kThreads), kShared, stream, p);
  });
  if (error != cudaSuccess || p.splits == 1 || p.out == nullptr) return error;
  const int64_t blocks = (int64_t{p.width} * p.group_width + kThreads - 1) / kThreads;
  return launch<gram_reduce_kernel>(dim3(static_cast<unsigned>(p.left_rows.count * blocks)), dim3(kThreads), 0, stream,
                                    p);
}

}  // namespace routed_peft::cuda
