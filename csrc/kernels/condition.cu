// v = pooled(ỹ) Cᵀ + weight · b_C, one row a condition: the projection is linear, so y is pooled before it is projected
// and is read once, whatever R is.
//
// pool: a block sums a part of one condition's rows over 32 units of columns (256 of a 16-bit dtype, 512 with dropout).
//
//        columns ->  | chunk 0 | chunk 1 | ...         8 warps take the rows in turn; their sums meet in shared memory.
//   rows   split 0   |  block  |  block  |             The number of splits follows from the shape alone, and whoever
//    |     split 1   |  block  |  block  |             reads the partial sums adds them in order.
//
// project: a block makes 8 conditions × 4 rows of C, its threads share the columns.
//
// Rows are counted by every block again, from the mask: the alternative is a launch of its own for a handful of bytes.
#include <algorithm>

#include "kernels/device/rows.cuh"
#include "kernels/device/vector.cuh"
#include "kernels/dispatch.h"
#include "kernels/launch.h"

namespace routed_peft::cuda {
namespace {

constexpr int kPoolWarps = 8, kPoolThreads = 32 * kPoolWarps;
constexpr int kPoolChain = 32;  // rows that a warp adds up before it adds the sum: short chains round less
constexpr int64_t kPoolBlocks = 264, kPoolMaxSplits = 32, kPoolSplitRows = 32;

struct PoolKernelParams {
  const void* from;  // [rows, cols]
  int64_t cols, row_stride;
  bool aligned;
  Sequences rows;
  const bool* mask;  // [rows], or nullptr
  Pool pool;
  bool scale_by_tokens;
  Dropout dropout;
  float dropout_scale;
  unsigned chunks, splits;
  float* sums;         // [splits, conditions, cols]
  float* bias_weight;  // [conditions], or nullptr
};

template <class T, bool kDropout>
__global__ __launch_bounds__(kPoolThreads, kDropout ? 2 : 3) void pool_kernel(const PoolKernelParams p) {
  using Lane = Columns<T, kDropout>;
  constexpr int kChunk = 32 * Lane::kCount;
  constexpr int kBatch = kDropout ? 2 : 4;  // rows loaded at once
  RP_SHARED(float[kPoolWarps][kChunk], sums);
  RP_SHARED(int[kPoolWarps], counts);
  RP_SHARED(int[kPoolWarps], firsts);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const unsigned item = blockIdx.x / p.chunks, chunk = blockIdx.x % p.chunks;
  const unsigned condition = item / p.splits, split = item % p.splits;
  const RowRange range = rows_of(p.rows, condition);
  const int count = static_cast<int>(range.end - range.begin);

  // the rows that count
  const bool* mask = p.mask == nullptr ? nullptr : p.mask + range.begin;
  int valid = count, first = 0;
  if (mask != nullptr) {
    valid = 0, first = count;
    for (int row = tid; row < count; row += kPoolThreads) {
      if (!mask[row]) continue;
      ++valid;
      if (row < first) first = row;
    }
    RP_UNROLL
    for (int o = 16; o > 0; o /= 2) {
      valid += __shfl_xor_sync(~0u, valid, o);
      const int other = __shfl_xor_sync(~0u, first, o);
      if (other < first) first = other;
    }
    if (lane == 0) counts[warp] = valid, firsts[warp] = first;
    __syncthreads();
    valid = 0;
    for (int w = 0; w < kPoolWarps; ++w) {
      valid += counts[w];
      if (firsts[w] < first) first = firsts[w];
    }
  }
  const bool one_row = p.pool == Pool::kFirst;
  const int share = (count + static_cast<int>(p.splits) - 1) / static_cast<int>(p.splits);
  int begin = min(share * static_cast<int>(split), count), end = min(begin + share, count);
  if (one_row) begin = first, end = first < count ? first + 1 : count;

  // their sums: of each lane over every eighth row
  const int64_t unit = int64_t{chunk} * 32 + lane;
  const int left = Lane::left(unit, p.cols);
  const T* from = static_cast<const T*>(p.from) + range.begin * p.row_stride + Lane::first(unit);
  const uint64_t seed =
      kDropout && p.dropout.seed_at != nullptr ? static_cast<uint64_t>(*p.dropout.seed_at) : p.dropout.seed;
  float total[Lane::kCount] = {};
  for (int chain = begin + warp; chain < end; chain += kPoolChain * kPoolWarps) {
    const int stop = end - chain > kPoolChain * kPoolWarps ? chain + kPoolChain * kPoolWarps : end;
    float sum[Lane::kCount] = {};
    for (int row = chain; row < stop; row += kBatch * kPoolWarps) {
      typename Lane::Raw raw[kBatch];
      bool used[kBatch];
      RP_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const int at = row + b * kPoolWarps;
        used[b] = at < stop && (mask == nullptr || mask[at]);
      }
      RP_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        const T* at = from + (row + b * kPoolWarps) * p.row_stride;
        raw[b] = Lane::load(at, used[b] ? left : 0, p.aligned);
      }
      RP_UNROLL
      for (int b = 0; b < kBatch; ++b) {
        if (!used[b]) continue;
        float v[Lane::kCount];
        Lane::to_floats(raw[b], v);
        if constexpr (kDropout) drop(seed, p.dropout, range.begin + row + b * kPoolWarps, unit, v);
        RP_UNROLL
        for (int i = 0; i < Lane::kCount; ++i) sum[i] += v[i];
      }
    }
    RP_UNROLL
    for (int i = 0; i < Lane::kCount; ++i) total[i] += sum[i];
  }
  RP_UNROLL
  for (int i = 0; i < Lane::kCount; ++i) sums[warp][Lane::first(lane) + Lane::offset(i)] = total[i];
  __syncthreads();

  // the warps' sums, weighted
  const float tokens = static_cast<float>(valid);
  const bool mean = p.pool == Pool::kMean || (p.pool == Pool::kNone && p.scale_by_tokens);
  const float weight = mean && valid > 0 ? 1.0f / tokens : 1.0f;
  for (int i = tid; i < kChunk; i += kPoolThreads) {
    const int64_t col = int64_t{chunk} * kChunk + i;
    if (col >= p.cols) break;
    float sum = 0;
    for (int w = 0; w < kPoolWarps; ++w) sum += sums[w][i];
    if (kDropout) sum *= p.dropout_scale;
    p.sums[(int64_t{split} * p.rows.count + condition) * p.cols + col] = sum * weight;
  }
  if (p.bias_weight != nullptr && split == 0 && chunk == 0 && tid == 0) {
    p.bias_weight[condition] = valid == 0 ? 0.0f : mean || one_row ? 1.0f : tokens;
  }
}

unsigned pool_chunks(Dtype dtype, bool dropout, int64_t cols) {
  const int64_t chunk = 32 * (dropout ? 16 : 16 / element_size(dtype));
  return static_cast<unsigned>((cols + chunk - 1) / chunk);
}

// As many as keep a large GPU busy, each with rows enough to be worth a block.
unsigned pool_splits(Pool pool, const Sequences& rows, unsigned chunks) {
  if (pool == Pool::kFirst || rows.count == 0 || chunks == 0) return 1;
  const int64_t wanted = kPoolBlocks / (rows.count * chunks), worth = rows.length() / kPoolSplitRows;
  return static_cast<unsigned>(std::clamp<int64_t>(std::min(wanted, worth), 1, kPoolMaxSplits));
}

cudaError_t launch_pool(PoolKernelParams& params, Dtype dtype, cudaStream_t stream) {
  const bool dropout = params.dropout.threshold != 0;
  const dim3 grid(static_cast<unsigned>(params.rows.count * params.chunks * params.splits));
  if (grid.x == 0) return cudaSuccess;
  params.dropout_scale = static_cast<float>(params.dropout.scale());
  return dispatch_float(dtype, [&]<class T>() {
    return dispatch_bool(dropout, [&]<bool kDropout>() {
      return launch<pool_kernel<T, kDropout>>(grid, dim3(kPoolThreads), 0, stream, params);
    });
  });
}

struct SumSplitsParams {
  const float* parts;  // [splits, size]
  float* out;          // [size]
  int64_t splits, size;
};

constexpr int kSumThreads = 256;

__global__ __launch_bounds__(kSumThreads) void sum_splits_kernel(const SumSplitsParams p) {
  const int64_t i = int64_t{blockIdx.x} * kSumThreads + threadIdx.x;
  if (i >= p.size) return;
  float sum = 0;
  for (int64_t split = 0; split < p.splits; ++split) sum += p.parts[split * p.size + i];
  p.out[i] = sum;
}

constexpr int kProjectWarps = 4, kProjectThreads = 32 * kProjectWarps;
constexpr int kProjectConditions = 8, kProjectRows = 4, kProjectSums = kProjectConditions * kProjectRows;

struct ProjectParams {
  const float* pooled;  // [splits, conditions, cols]
  int64_t splits;
  bool pooled_aligned;
  const float* bias_weight;  // [conditions]
  // or, where every condition is one row: that row itself, of T
  const void* y;  // [conditions, cols], or nullptr
  int64_t y_row_stride;
  bool y_aligned;
  const bool* mask;  // [conditions], or nullptr
  Matrix c;          // [R, cols]
  bool c_aligned;    // rows, to 16 bytes
  Matrix bias;       // [1, R], or absent
  int64_t conditions, cols;
  unsigned tiles;   // of R
  float* v;         // [conditions, R]
  float* pooled_y;  // [conditions, cols] where the partial sums are added up once more for the caller, or nullptr
};

template <class T>
__global__ __launch_bounds__(kProjectThreads) void project_kernel(const ProjectParams p) {
  using Lane = Columns<T, false>;
  RP_SHARED(float[kProjectWarps][kProjectSums], sums);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int64_t k0 = int64_t{blockIdx.x % p.tiles} * kProjectRows;
  const int64_t first = int64_t{blockIdx.x / p.tiles} * kProjectConditions;
  const T* c = static_cast<const T*>(p.c.data);

  float acc[kProjectSums] = {};  // [conditions][rows of C]
  for (int64_t unit = tid; unit < Lane::units(p.cols); unit += kProjectThreads) {
    const int64_t j0 = Lane::first(unit);
    const int left = Lane::left(unit, p.cols);
    float weight[kProjectRows][Lane::kCount];
    RP_UNROLL
    for (int k = 0; k < kProjectRows; ++k) {
      const int here = k0 + k < p.c.rows ? left : 0;
      Lane::to_floats(Lane::load(c + (k0 + k) * p.c.row_stride + j0, here, p.c_aligned), weight[k]);
    }
    RP_UNROLL
    for (int n = 0; n < kProjectConditions; ++n) {
      const int64_t condition = first + n;
      if (condition >= p.conditions) break;
      float y[Lane::kCount] = {};
      if (p.y != nullptr) {
        const bool use = p.mask == nullptr || p.mask[condition];
        const T* at = static_cast<const T*>(p.y) + condition * p.y_row_stride + j0;
        Lane::to_floats(Lane::load(at, use ? left : 0, p.y_aligned), y);
      } else {
        constexpr int kAhead = 2;  // splits whose loads are in flight together
        for (int64_t split = 0; split < p.splits; split += kAhead) {
          float part[kAhead][Lane::kCount];
          RP_UNROLL
          for (int s = 0; s < kAhead; ++s) {
            const int64_t at = split + s < p.splits ? split + s : p.splits - 1;  // the last again, and not added
            load_floats(p.pooled + (at * p.conditions + condition) * p.cols + j0, left, p.pooled_aligned, part[s]);
          }
          RP_UNROLL
          for (int s = 0; s < kAhead; ++s) {
            if (split + s >= p.splits) break;
            RP_UNROLL
            for (int i = 0; i < Lane::kCount; ++i) y[i] += part[s][i];
          }
        }
        if (p.pooled_y != nullptr && k0 == 0) {
          RP_UNROLL
          for (int i = 0; i < Lane::kCount; ++i) {
            if (i < left) p.pooled_y[condition * p.cols + j0 + i] = y[i];
          }
        }
      }
      RP_UNROLL
      for (int k = 0; k < kProjectRows; ++k) {
        RP_UNROLL
        for (int i = 0; i < Lane::kCount; ++i) acc[n * kProjectRows + k] += y[i] * weight[k][i];
      }
    }
  }
  sums[warp][lane] = warp_sums(acc);
  __syncthreads();
  if (warp != 0) return;
  const int64_t condition = first + lane / kProjectRows, k = k0 + lane % kProjectRows;
  if (condition >= p.conditions || k >= p.c.rows) return;
  float sum = 0;
  RP_UNROLL
  for (int w = 0; w < kProjectWarps; ++w) sum += sums[w][lane];
  if (p.bias.data != nullptr) {
    const float weight = p.y == nullptr                           ? p.bias_weight[condition]
                         : p.mask == nullptr || p.mask[condition] ? 1.0f
                                                                  : 0.0f;
    sum += weight * load_as_float(p.bias.data, p.bias.dtype, k * p.bias.col_stride);
  }
  p.v[condition * p.c.rows + k] = sum;
}

// One row a condition, as it lies in y: then pooling would only copy it.
bool unpooled(const Problem& p) {
  return p.conditions.offsets == nullptr && p.conditions.length() == 1 && p.drop_y.threshold == 0;
}

unsigned vector_splits(const Problem& p) {
  return pool_splits(p.pool, p.conditions, pool_chunks(p.dtype, p.drop_y.threshold != 0, p.y.cols));
}

}  // namespace

int64_t encode_vector_scratch(const Problem& p) {
  return (vector_splits(p) * p.y.cols + 1) * p.conditions.count * int64_t{sizeof(float)};
}

cudaError_t encode_vector(const Problem& p, float* v, float* pooled_y, void* scratch, cudaStream_t stream) {
  const int64_t conditions = p.conditions.count, cols = p.y.cols;
  if (conditions == 0 || p.width == 0) return cudaSuccess;
  if (p.c.col_stride != 1 && cols > 1) return cudaErrorInvalidValue;
  ProjectParams project{};
  if (unpooled(p) && pooled_y == nullptr) {
    project.y = p.y.data;
    project.y_row_stride = p.y.row_stride;
    project.y_aligned = aligned_rows(p.y, 16);
    project.mask = p.condition_mask;
  } else {
    PoolKernelParams pool{};
    pool.from = p.y.data;
    pool.cols = cols;
    pool.row_stride = p.y.row_stride;
    pool.aligned = aligned_rows(p.y, p.drop_y.threshold != 0 ? 2 * element_size(p.dtype) : 16);
    pool.rows = p.conditions;
    pool.mask = p.condition_mask;
    pool.pool = p.pool;
    pool.scale_by_tokens = p.scale_by_tokens;
    pool.dropout = p.drop_y;
    pool.chunks = pool_chunks(p.dtype, p.drop_y.threshold != 0, cols);
    pool.splits = vector_splits(p);
    float* sums = static_cast<float*>(scratch);
    pool.sums = pool.splits == 1 && pooled_y != nullptr ? pooled_y : sums;
    pool.bias_weight = sums + pool.splits * conditions * cols;
    const cudaError_t error = launch_pool(pool, p.dtype, stream);
    if (error != cudaSuccess) return error;
    project.pooled = pool.sums;
    project.splits = pool.splits;
    project.pooled_aligned = aligned_rows(dense(pool.sums, Dtype::kFloat32, conditions, cols), 16);
    project.bias_weight = pool.bias_weight;
    project.pooled_y = pool.sums == pooled_y ? nullptr : pooled_y;
  }
  project.c = p.c;
  project.c_aligned = aligned_rows(p.c, 16);
  project.bias = p.b_c;
  project.conditions = conditions;
  project.cols = cols;
  project.tiles = static_cast<unsigned>((p.width + kProjectRows - 1) / kProjectRows);
  project.v = v;
  const int64_t condition_tiles = (conditions + kProjectConditions - 1) / kProjectConditions;
  const dim3 grid(static_cast<unsigned>(project.tiles * condition_tiles));
  return dispatch_float(
      p.dtype, [&]<class T>() { return launch<project_kernel<T>>(grid, dim3(kProjectThreads), 0, stream, project); });
}

int64_t pool_scratch(const PoolParams& params) {
  const unsigned chunks = pool_chunks(params.from.dtype, false, params.from.cols);
  const unsigned splits = params.whole ? 1 : pool_splits(params.pool, params.rows, chunks);
  return splits == 1 ? 0 : splits * params.rows.count * params.from.cols * int64_t{sizeof(float)};
}

cudaError_t pool(const PoolParams& params, void* scratch, cudaStream_t stream) {
  const int64_t size = params.rows.count * params.from.cols;
  if (size == 0) return cudaSuccess;
  PoolKernelParams pool{};
  pool.from = params.from.data;
  pool.cols = params.from.cols;
  pool.row_stride = params.from.row_stride;
  pool.aligned = aligned_rows(params.from, 16);
  pool.rows = params.rows;
  pool.mask = params.mask;
  pool.pool = params.pool;
  pool.scale_by_tokens = params.scale_by_tokens;
  pool.chunks = pool_chunks(params.from.dtype, false, pool.cols);
  pool.splits = params.whole ? 1 : pool_splits(params.pool, params.rows, pool.chunks);
  pool.sums = pool.splits == 1 ? params.out : static_cast<float*>(scratch);
  const cudaError_t error = launch_pool(pool, params.from.dtype, stream);
  if (error != cudaSuccess || pool.splits == 1) return error;
  const SumSplitsParams sum{pool.sums, params.out, pool.splits, size};
  const dim3 grid(static_cast<unsigned>((size + kSumThreads - 1) / kSumThreads));
  return launch<sum_splits_kernel>(grid, dim3(kSumThreads), 0, stream, sum);
}

}  // namespace routed_peft::cuda
