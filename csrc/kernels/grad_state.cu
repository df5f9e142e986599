// The routes' sums over samples -> gradients of the conditions' vectors or tokens.
//
// vectors: a block sums 32 columns of one condition's tile sums, its 8 warps take them in turn; where the condition is
// a part of x itself, it goes on to spread the sum over some of the condition's rows. tokens: a block sums 1024 pairs
// of numbers of one condition.
//
// The samples of a condition are found by every block again, from the index. The alternative is a launch that sorts,
// and some hundred indices are a load or two a thread.
#include "kernels/device/condition.cuh"
#include "kernels/device/route.cuh"

namespace routed_peft::cuda {
namespace {

constexpr int kChain = 64;  // numbers that are added up before their sum is added: short chains round less

constexpr int kThreads = 256, kWarps = kThreads / 32;
constexpr int kColumns = 32;      // of a vector in a block
constexpr int kSpreadRows = 256;  // of x in a block
constexpr int kPairs = 4;         // of tokens' numbers in a thread
constexpr int kBatch = 4;         // rows loaded at once

struct KernelParams {
  StateGradParams p;
  unsigned tiles, chunks;  // of the columns; of the rows or tokens of a condition
};

RP_DEVICE void store_as(void* rows, Dtype dtype, int64_t at, float value) {
  if (dtype == Dtype::kBFloat16) {
    static_cast<bfloat16*>(rows)[at] = from_float<bfloat16>(value);
  } else {
    static_cast<float*>(rows)[at] = value;
  }
}

__global__ __launch_bounds__(kThreads, 4) void state_vectors_kernel(const KernelParams k) {
  RP_SHARED(float[kWarps][kColumns], parts);
  const StateGradParams& p = k.p;
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const unsigned chunk = blockIdx.x / k.tiles % k.chunks;
  int64_t item = blockIdx.x / k.tiles / k.chunks;
  const int64_t first = p.from == nullptr ? 0 : p.conditions.count;
  const bool second = item >= first;
  if (second) item -= first;
  if (second && chunk > 0) return;  // the whole block
  const int64_t column = int64_t{blockIdx.x % k.tiles} * kColumns + lane;
  const bool inside = column < p.width;

  // the tile sums, counted through all samples; every warp has each eighth
  const float* from = (second ? p.second_from : p.from) + column;
  float total = 0.f, sum = 0.f;
  int chain = 0;
  int64_t before = 0;
  for_samples<kThreads>(p.inputs, second ? nullptr : p.index, item, [&](int64_t sample) {
    const RowRange rows = rows_of(p.inputs, sample);
    const int64_t tile = rows.begin / kRouteRows;
    const int64_t count = rows.begin < rows.end ? (rows.end - 1) / kRouteRows - tile + 1 : 0;
    RP_NO_UNROLL
    for (int64_t i = (warp - before) & (kWarps - 1); i < count; i += kBatch * kWarps) {
      float value[kBatch];
      RP_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int64_t at = i + b * kWarps, row = at == 0 ? rows.begin : (tile + at) * kRouteRows;
        value[b] = inside && at < count ? from[row * p.from_stride] : 0.f;
      }
      RP_UNROLL
      for (int b = 0; b < kBatch; ++b) sum += value[b];
      if ((chain += kBatch) < kChain) continue;
      total += sum;
      sum = 0.f, chain = 0;
    }
    before += count;
  });
  parts[warp][lane] = total + sum;
  __syncthreads();
  sum = 0.f;
  RP_UNROLL
  for (int w = 0; w < kWarps; ++w) sum += parts[w][lane];
  float* const out = second ? p.second_out : p.out;
  if (out != nullptr && inside && chunk == 0 && warp == 0) out[item * p.width + column] = sum;
  if (second || p.dt == nullptr) return;

  // in sequence: its share of the condition's rows
  const RowRange rows = rows_of(p.conditions, item);
  const PooledRows pooled = pooled_rows(p.pool, p.scale_by_tokens, p.mask, rows);
  const float spread = pooled.weight * sum;
  const int64_t share = (rows.end - rows.begin + k.chunks - 1) / k.chunks, begin = rows.begin + chunk * share;
  const int64_t end = begin + share < rows.end ? begin + share : rows.end;
  RP_NO_UNROLL
  for (int64_t i = begin + warp; i < end; i += kBatch * kWarps) {
    float value[kBatch];
    bool counted[kBatch];
    RP_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int64_t row = i + b * kWarps;
      value[b] = inside && row < end ? p.dt[row * p.from_stride + column] : 0.f;
      counted[b] = row < end && counts(p.pool, pooled, p.mask, row);
    }
    RP_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int64_t row = i + b * kWarps;
      if (counted[b]) value[b] += spread;
      if (inside && row < end) store_as(p.rows, p.dtype, row * p.rows_stride + column, value[b]);
    }
  }
}

__global__ __launch_bounds__(kThreads, 2) void state_tokens_kernel(const KernelParams k) {
  constexpr int kBlockPairs = kThreads * kPairs;
  const StateGradParams& p = k.p;
  const int64_t condition = blockIdx.x / k.chunks, pairs = (p.width + 1) / 2;
  const RowRange tokens = rows_of(p.conditions, condition);
  const int64_t size = (tokens.end - tokens.begin) * pairs, step = int64_t{k.chunks} * kBlockPairs;
  RP_NO_UNROLL
  for (int64_t first = int64_t{blockIdx.x % k.chunks} * kBlockPairs; first < size; first += step) {
    int64_t token[kPairs];
    int column[kPairs], left[kPairs];
    bool counted[kPairs];
    float sum[kPairs][2] = {}, total[kPairs][2] = {};
    RP_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const int64_t pair = first + i * kThreads + threadIdx.x;
      token[i] = pair / pairs;
      column[i] = static_cast<int>(pair % pairs) * 2;
      left[i] = pair < size ? p.width - column[i] : 0;
      counted[i] = pair < size && (p.mask == nullptr || p.mask[tokens.begin + token[i]]);
    }
    int chain = 0;
    for_samples<kThreads>(p.inputs, p.index, condition, [&](int64_t sample) {
      const RowRange rows = rows_of(p.inputs, sample);
      RP_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        const int64_t row = rows.begin + token[i];
        const float* from = p.from + row * p.from_stride + column[i];
        if (!counted[i] || row >= rows.end) continue;
        sum[i][0] += from[0];
        if (left[i] > 1) sum[i][1] += from[1];
      }
      if (++chain < kChain) return;
      chain = 0;
      RP_UNROLL
      for (int i = 0; i < kPairs; ++i) {
        total[i][0] += sum[i][0], total[i][1] += sum[i][1];
        sum[i][0] = sum[i][1] = 0.f;
      }
    });
    RP_UNROLL
    for (int i = 0; i < kPairs; ++i) {
      const int64_t row = tokens.begin + token[i], at = row * p.rows_stride + column[i];
      const float s0 = total[i][0] + sum[i][0], s1 = total[i][1] + sum[i][1];
      if (p.out != nullptr) store_pair(p.out + row * p.width + column[i], s0, s1, left[i]);
      if (p.rows == nullptr) continue;
      if (p.dtype == Dtype::kBFloat16) {
        store_pair(static_cast<bfloat16*>(p.rows) + at, s0, s1, left[i]);
      } else {
        store_pair(static_cast<float*>(p.rows) + at, s0, s1, left[i]);
      }
    }
  }
}

}  // namespace

cudaError_t state_grad(const StateGradParams& params, cudaStream_t stream) {
  if (params.width == 0) return cudaSuccess;
  KernelParams k{params, 1, 1};
  const dim3 block(kThreads);
  if (params.tokens) {
    if (params.conditions.rows == 0) return cudaSuccess;
    k.chunks = pieces_of(params.conditions, (params.width + 1) / 2, kThreads * kPairs);
    const dim3 grid(static_cast<unsigned>(params.conditions.count * k.chunks));
    return launch<state_tokens_kernel>(grid, block, 0, stream, k);
  }
  const int64_t items = (params.from == nullptr ? 0 : params.conditions.count) +
                        (params.second_from == nullptr ? 0 : params.inputs.count);
  if (items == 0) return cudaSuccess;
  k.tiles = static_cast<unsigned>(pieces(params.width, kColumns));
  if (params.dt != nullptr && params.conditions.count > 0) k.chunks = pieces_of(params.conditions, 1, kSpreadRows);
  const dim3 grid(static_cast<unsigned>(items * k.chunks * k.tiles));
  return launch<state_vectors_kernel>(grid, block, 0, stream, k);
}

}  // namespace routed_peft::cuda
