// Pooled conditions, backward: dC = dvᵀ ȳ, db_c = Σ bias_weight dv, dY_m = mask ∘ weight (dv C). One launch, its blocks
// in three roles; y is not read.
//
//   dc    32 x 32 of dC. Eight warps take the conditions in turn, each with all of the tile in its registers and
//         nothing in shared memory: there is no barrier but the one before their sums meet.
//   db_c  32 columns. The threads first find the weights of 256 conditions.
//   dy    256 columns of up to eight conditions: dv C, a column a thread; then their rows, eight columns a lane, which
//         are all the same but for the rows that do not count and for what dropout took.
//
// Eight neighbouring columns lie in four of dropout's calls, and a call is shared by four lanes. So each lane makes one
// call and the four exchange words: no call is made twice, and a row still leaves in 16-byte stores.
#include "kernels/device/condition.cuh"
#include "kernels/device/vector.cuh"
#include "kernels/dispatch.h"
#include "kernels/launch.h"

namespace routed_peft::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kChain = 64;  // numbers that are added up before their sum is added: short chains round less
constexpr int kTile = 32;   // of dc, and columns of db_c
constexpr int kColumns = kThreads, kConditions = kWarps, kDepth = 64;  // of dy
constexpr int kRun = 8, kRowGroup = 8;                                 // columns of a lane, rows of a warp at a time
constexpr int64_t kWantedBlocks = 264, kSplitRows = 64;

struct KernelParams {
  PooledGradParams p;
  Matrix c;  // [width, cols], any dtype
  Sequences conditions;
  const bool* mask;
  Pool pool;
  bool scale_by_tokens;
  Dropout drop;
  float drop_scale;
  int64_t width, cols;
  unsigned dc_tiles, dc_blocks, db_blocks;  // tiles of the columns
  unsigned dy_tiles, each, splits;          // conditions of a block; blocks that share a condition's rows
  bool dv_aligned, pooled_aligned, dy_aligned;
};

RP_DEVICE void weight_block(const KernelParams& k, unsigned block, float* shared) {
  constexpr int kBatch = 2;  // conditions loaded at once
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int64_t row0 = int64_t{block / k.dc_tiles} * kTile, column0 = int64_t{block % k.dc_tiles} * kTile;
  const int64_t row = row0 + lane / 4 * 4, column = column0 + lane % 4 * 8;
  const int rows = static_cast<int>(k.width - row < 4 ? k.width - row : 4);
  const int columns = static_cast<int>(k.cols - column < 8 ? k.cols - column : 8);
  float* const parts = shared + warp * kTile * kTile + lane;  // of the warp: [4 x 8][lane]
  RP_UNROLL
  for (int e = 0; e < kTile; ++e) parts[e * 32] = 0.f;
  float acc[4][8] = {};
  int chain = 0;
  const auto flush = [&] {
    RP_UNROLL
    for (int e = 0; e < kTile; ++e) {
      parts[e * 32] += acc[e / 8][e % 8];
      acc[e / 8][e % 8] = 0.f;
    }
    chain = 0;
  };
  RP_NO_UNROLL
  for (int64_t first = warp; first < k.conditions.count; first += kBatch * kWarps) {
    float dv[kBatch][4], y[kBatch][8];
    RP_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int64_t condition = first + b * kWarps;
      const bool there = condition < k.conditions.count;
      load_floats(k.p.dv + condition * k.width + row, there ? rows : 0, k.dv_aligned, dv[b]);
      load_floats(k.p.pooled_y + condition * k.cols + column, there ? columns : 0, k.pooled_aligned, y[b]);
    }
    RP_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      RP_UNROLL
      for (int e = 0; e < kTile; ++e) acc[e / 8][e % 8] += dv[b][e / 8] * y[b][e % 8];
    }
    if ((chain += kBatch) == kChain) flush();
  }
  flush();
  __syncthreads();
  RP_NO_UNROLL
  for (int i = tid; i < kTile * kTile; i += kThreads) {
    const int r = i / kTile, c = i % kTile;
    const float* from = shared + (r % 4 * 8 + c % 8) * 32 + r / 4 * 4 + c / 8;
    float sum = 0.f;
    RP_UNROLL
    for (int w = 0; w < kWarps; ++w) sum += from[w * kTile * kTile];
    if (row0 + r < k.width && column0 + c < k.cols) k.p.dc[(row0 + r) * k.cols + column0 + c] = sum;
  }
}

// One thread's own condition: of its rows it mostly sees the first.
RP_DEVICE float bias_weight(const KernelParams& k, int64_t condition) {
  const RowRange rows = rows_of(k.conditions, condition);
  const bool sum = k.pool == Pool::kNone && !k.scale_by_tokens;
  int64_t valid = k.mask == nullptr ? rows.end - rows.begin : 0;
  for (int64_t row = rows.begin; k.mask != nullptr && row < rows.end && (sum || valid == 0); ++row) {
    valid += k.mask[row];
  }
  return sum ? static_cast<float>(valid) : valid > 0 ? 1.f : 0.f;
}

RP_DEVICE void bias_block(const KernelParams& k, unsigned block, float* shared) {
  float* const weights = shared;           // [kThreads]
  float* const parts = shared + kThreads;  // [kWarps, kTile]
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int64_t column = int64_t{block} * kTile + lane;
  float total = 0.f;
  RP_NO_UNROLL
  for (int64_t first = 0; first < k.conditions.count; first += kThreads) {
    __syncthreads();  // the last ones have been read
    weights[tid] = first + tid < k.conditions.count ? bias_weight(k, first + tid) : 0.f;
    __syncthreads();
    float sum = 0.f;
    for (int i = warp; i < kThreads; i += kWarps) {
      if (weights[i] != 0.f && column < k.width) sum += weights[i] * k.p.dv[(first + i) * k.width + column];
    }
    total += sum;
  }
  parts[warp * kTile + lane] = total;
  __syncthreads();
  if (warp != 0 || column >= k.width) return;
  float sum = 0.f;
  for (int w = 0; w < kWarps; ++w) sum += parts[w * kTile + lane];
  k.p.db_c[column] = sum;
}

// acc[n] += Σ_k u[k][n] c[k] for the `depth` <= kDepth numbers of one column of C; u has zeros behind them.
template <class S>
RP_DEVICE void project(float (&acc)[kConditions], const Elements<float, kConditions>* u, const void* c, int64_t at,
                       int64_t stride, int depth) {
  constexpr int kAtOnce = 8;
  const S* from = static_cast<const S*>(c) + at;
  float sum[kConditions] = {};
  RP_NO_UNROLL
  for (int k = 0; k < depth; k += kAtOnce) {
    float value[kAtOnce];
    RP_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      value[i] = 0.f;
      if (k + i >= depth) continue;
      if constexpr (std::is_same_v<S, double>) {
        value[i] = static_cast<float>(from[(k + i) * stride]);
      } else {
        value[i] = to_float(from[(k + i) * stride]);
      }
    }
    RP_UNROLL
    for (int i = 0; i < kAtOnce; ++i) {
      const Elements<float, kConditions> here = u[k + i];
      RP_UNROLL
      for (int n = 0; n < kConditions; ++n) sum[n] += here.e[n] * value[i];
    }
  }
  RP_UNROLL
  for (int n = 0; n < kConditions; ++n) acc[n] += sum[n];
}

// Eight neighbouring elements as they are stored.
template <class T>
struct Run {
  uint32_t word[kRun * sizeof(T) / 4];
};

// Dropout's numbers for the eight columns from 8 unit on of a row, two in each word: of four neighbouring lanes, whose
// units are neighbours, each makes one call, of which every one of the four needs one word.
RP_DEVICE PhiloxWords random_words(uint64_t seed, const Dropout& dropout, int64_t row, int64_t unit) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  PhiloxWords words =
      philox(seed, static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
             static_cast<uint32_t>(unit / 8 * 4 + unit % 4), 2 * dropout.stream + static_cast<uint32_t>(unit % 8 / 4));
  RP_UNROLL
  for (int step = 1; step <= 2; step *= 2) {  // a 4 x 4 transpose
    const bool upper = lane & step;
    RP_UNROLL
    for (int i = 0; i < 4; ++i) {
      if (i & step) continue;
      uint32_t &low = words.word[i], &high = words.word[i + step];
      const uint32_t got = __shfl_xor_sync(~0u, upper ? low : high, step);
      low = upper ? got : low;
      high = upper ? high : got;
    }
  }
  return words;
}

template <class T>
RP_DEVICE void drop(Run<T>& run, const PhiloxWords& words, uint32_t threshold) {
  RP_UNROLL
  for (int i = 0; i < kRun / 2; ++i) {
    const bool low = (words.word[i] & 0xFFFFu) < threshold, high = words.word[i] >> 16 < threshold;
    if constexpr (sizeof(T) == 4) {
      if (low) run.word[2 * i] = 0;
      if (high) run.word[2 * i + 1] = 0;
    } else {
      run.word[i] &= (low ? 0u : 0xFFFFu) | (high ? 0u : 0xFFFF0000u);
    }
  }
}

template <class T>
RP_DEVICE void store_run(T* to, const Run<T>& run, int64_t left, bool aligned) {
  if (aligned && left >= kRun) {
    RP_UNROLL
    for (int i = 0; i < kRun / kVector<T>; ++i) {
      store_16(to + i * kVector<T>,
               make_uint4(run.word[4 * i], run.word[4 * i + 1], run.word[4 * i + 2], run.word[4 * i + 3]));
    }
    return;
  }
  const auto elements = __builtin_bit_cast(Elements<T, kRun>, run);
  RP_UNROLL
  for (int i = 0; i < kRun; ++i) {
    if (i < left) to[i] = elements.e[i];
  }
}

template <class T>
RP_DEVICE void rows_block(const KernelParams& k, unsigned block, float* shared) {
  using Numbers = Elements<float, kConditions>;
  RP_SHARED(PooledRows[kConditions], pooled);
  float* const lines = shared;                                                     // [kConditions, kColumns]
  Numbers* const u = reinterpret_cast<Numbers*>(shared + kConditions * kColumns);  // [kDepth]
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int64_t column0 = int64_t{block % k.dy_tiles} * kColumns;
  const int64_t split = block / k.dy_tiles % k.splits, first = int64_t{block / k.dy_tiles / k.splits} * k.each;
  const int here = static_cast<int>(k.conditions.count - first < k.each ? k.conditions.count - first : k.each);
  if (warp < here) {
    const PooledRows mine = pooled_rows(k.pool, k.scale_by_tokens, k.mask, rows_of(k.conditions, first + warp));
    if (lane == 0) pooled[warp] = mine;
  }

  // dv C
  const int64_t column = column0 + tid < k.cols ? column0 + tid : k.cols - 1;  // the last one again, and not stored
  float acc[kConditions] = {};
  RP_NO_UNROLL
  for (int64_t k0 = 0; k0 < k.width; k0 += kDepth) {
    const int depth = static_cast<int>(k.width - k0 < kDepth ? k.width - k0 : kDepth);
    __syncthreads();  // the last ones have been read
    for (int i = tid; i < kDepth * kConditions; i += kThreads) {
      const int n = i / kDepth, at = i % kDepth;
      u[at].e[n] = n < here && at < depth ? k.p.dv[(first + n) * k.width + k0 + at] : 0.f;
    }
    __syncthreads();
    const int64_t at = k0 * k.c.row_stride + column * k.c.col_stride, stride = k.c.row_stride;
    switch (k.c.dtype) {
      case Dtype::kFloat32:
        project<float>(acc, u, k.c.data, at, stride, depth);
        break;
      case Dtype::kFloat64:
        project<double>(acc, u, k.c.data, at, stride, depth);
        break;
      case Dtype::kBFloat16:
        project<bfloat16>(acc, u, k.c.data, at, stride, depth);
        break;
      case Dtype::kFloat16:
        project<half>(acc, u, k.c.data, at, stride, depth);
        break;
    }
  }
  RP_UNROLL
  for (int n = 0; n < kConditions; ++n) lines[n * kColumns + tid] = acc[n];
  __syncthreads();

  // to the rows
  const uint64_t seed = k.drop.seed_at != nullptr ? static_cast<uint64_t>(*k.drop.seed_at) : k.drop.seed;
  const int64_t own = column0 + lane * kRun, left = k.cols - own;
  int64_t turn = 0;  // groups of rows before this condition's: the warps take them in turn
  RP_NO_UNROLL
  for (int n = 0; n < here; ++n) {
    const RowRange rows = rows_of(k.conditions, first + n);
    const int64_t share = (rows.end - rows.begin + k.splits - 1) / k.splits, begin = rows.begin + split * share;
    const int64_t end = begin + share < rows.end ? begin + share : rows.end;
    Run<T> values, zeros = {};
    const float scale = pooled[n].weight * k.drop_scale;
    RP_UNROLL
    for (int i = 0; i < kRun; i += 2) {
      const float2 pair = *reinterpret_cast<const float2*>(lines + n * kColumns + lane * kRun + i);
      if constexpr (sizeof(T) == 4) {
        values.word[i] = __float_as_uint(scale * pair.x);
        values.word[i + 1] = __float_as_uint(scale * pair.y);
      } else {
        values.word[i / 2] = pack2<T>(scale * pair.x, scale * pair.y);
      }
    }
    RP_NO_UNROLL
    for (int64_t row = begin + ((warp - turn) & (kWarps - 1)) * kRowGroup; row < end; row += kWarps * kRowGroup) {
      const bool mine = lane < kRowGroup && row + lane < end && counts(k.pool, pooled[n], k.mask, row + lane);
      const uint32_t counted = __ballot_sync(~0u, mine);
      RP_NO_UNROLL
      for (int i = 0; i < kRowGroup && row + i < end; ++i) {
        Run<T> run = zeros;
        if (counted >> i & 1) {
          run = values;
          if (k.drop.threshold != 0) drop(run, random_words(seed, k.drop, row + i, own / kRun), k.drop.threshold);
        }
        store_run(static_cast<T*>(k.p.dy.data) + (row + i) * k.p.dy.row_stride + own, run, left, k.dy_aligned);
      }
    }
    turn += begin < end ? (end - begin + kRowGroup - 1) / kRowGroup : 0;
  }
}

template <class T>
__global__ __launch_bounds__(kThreads, 2) void pooled_grad_kernel(const KernelParams k) {
  using Numbers = Elements<float, kConditions>;
  RP_SHARED(Numbers[kWarps * kTile * kTile / kConditions], shared);
  float* const floats = reinterpret_cast<float*>(&shared);
  unsigned block = blockIdx.x;
  if (block < k.dc_blocks) return weight_block(k, block, floats);
  block -= k.dc_blocks;
  if (block < k.db_blocks) return bias_block(k, block, floats);
  rows_block<T>(k, block - k.db_blocks, floats);
}

}  // namespace

cudaError_t pooled_grad(const Problem& p, const PooledGradParams& params, cudaStream_t stream) {
  const int64_t conditions = p.conditions.count, cols = p.y.cols;
  KernelParams k{};
  k.p = params;
  k.c = p.c;
  k.conditions = p.conditions;
  k.mask = p.condition_mask;
  k.pool = p.pool;
  k.scale_by_tokens = p.scale_by_tokens;
  k.drop = p.drop_y;
  k.drop_scale = static_cast<float>(p.drop_y.scale());
  k.width = p.width;
  k.cols = cols;
  k.dv_aligned = aligned_rows(dense(const_cast<float*>(params.dv), Dtype::kFloat32, conditions, p.width), 16);
  k.pooled_aligned = aligned_rows(dense(const_cast<float*>(params.pooled_y), Dtype::kFloat32, conditions, cols), 16);
  k.dy_aligned = aligned_rows(params.dy, 16);
  k.dc_tiles = static_cast<unsigned>(pieces(cols, kTile));
  k.dc_blocks = params.dc == nullptr ? 0 : static_cast<unsigned>(pieces(p.width, kTile) * k.dc_tiles);
  k.db_blocks = params.db_c == nullptr ? 0 : static_cast<unsigned>(pieces(p.width, kTile));
  int64_t dy_blocks = 0;
  if (params.dy && conditions > 0 && cols > 0) {
    k.dy_tiles = static_cast<unsigned>(pieces(cols, kColumns));
    const int64_t blocks = k.dy_tiles * conditions;
    k.each = static_cast<unsigned>(std::clamp<int64_t>(blocks / kWantedBlocks, 1, kConditions));
    k.splits = static_cast<unsigned>(
        std::clamp<int64_t>(kWantedBlocks / blocks, 1, std::max<int64_t>(p.conditions.length() / kSplitRows, 1)));
    dy_blocks = int64_t{k.dy_tiles} * k.splits * pieces(conditions, k.each);
  }
  const dim3 grid(k.dc_blocks + k.db_blocks + static_cast<unsigned>(dy_blocks));
  if (grid.x == 0) return cudaSuccess;
  return dispatch_float(p.dtype,
                        [&]<class T>() { return launch<pooled_grad_kernel<T>>(grid, dim3(kThreads), 0, stream, k); });
}

}  // namespace routed_peft::cuda
