// The backward of rank_one.cu, the last launch of rank_one_grad.cu: 64 × 64 tiles of dA, dB̂ and dC, which are products
// with one row a condition; rows of dY; dv itself.
#include <algorithm>

#include "kernels/device/strided.cuh"
#include "kernels/dispatch.h"
#include "kernels/rank_one_grad.h"

namespace routed_peft::cuda::rank_one_backward {
namespace {

constexpr int kGradThreads = 256, kGradTile = 64, kGradSteps = 32;  // conditions that are loaded together
constexpr int kGradPitch = kGradTile + 4;
constexpr int kRowConditions = 8;              // whose rows of dY one block makes
constexpr int64_t kRowColumns = kGradThreads;  // of dY
static_assert(2 * kGradSteps * kGradPitch >= kGradTile * (kGradTile + 1), "the tile is turned where its factors were");
static_assert(2 * kGradSteps * kGradPitch >= kRowConditions * (kGradTile + kRowColumns));

struct WeightParams {
  Parts parts;
  int64_t conditions;
  int width;
  const float* v;     // [conditions, width]
  bool v_aligned;     // and pooled_aligned: rows, to 16 bytes
  const float* sums;  // [conditions, stride]
  const float* dv;    // [splits, conditions, width]
  int splits;
  float scaling;
  Matrix da, db;               // absent: not wanted
  const float* shared_pooled;  // dA has dv's part too: ȳ [conditions, d]; or nullptr
  // dC and db_c
  const float* pooled;  // [conditions, features]
  bool pooled_aligned;
  int64_t features;
  Matrix dc, db_c;
  const Counted* counted;
  // dY
  Matrix c;              // [width, features], any dtype
  Matrix dy;             // [y_rows, features]
  bool dy_aligned, add;  // add: to what is there, in the rows that count
  Sequences tokens;
  const bool* mask;
  bool first_only;
  Dropout dropout;
  float dropout_scale;
  int row_conditions;  // of a block
  unsigned row_tiles, row_parts;
  float* dstate;                                // [conditions, width], or nullptr
  unsigned part_blocks, dc_blocks, row_blocks;  // then dstate's
  int dc_tiles;                                 // of its columns, and the one of db_c
};

// The total of dv's parts, [condition][column, column + 8) of which `left` are there.
RP_DEVICE void load_dv(const WeightParams& p, int64_t condition, int column, int left, float (&out)[8]) {
  RP_UNROLL
  for (int i = 0; i < 8; ++i) out[i] = 0;
  for (int split = 0; split < p.splits; ++split) {
    float part[8];
    const float* from = p.dv + (split * p.conditions + condition) * p.width + column;
    load_floats(from, left, p.width % 4 == 0 && column % 4 == 0, part);
    RP_UNROLL
    for (int i = 0; i < 8; ++i) out[i] += part[i];
  }
}

enum class Left { kOnes, kV, kDv };

// One sum over conditions: of u[condition][k] · right[condition][n].
struct Term {
  Left left;
  int k, k_left;       // first column of u in this tile, and how many are there
  const float* right;  // at the tile's first column
  int64_t stride;
  int n_left;
  bool aligned;
  int bias_at;  // this column is the weight of the bias, or -1
  int64_t conditions;
};

// sum[i][j] += column 4 my_n + i of right with column 4 my_k + j of u.
RP_DEVICE void add_term(const WeightParams& p, const Term& term, float* shared, int my_n, int my_k,
                        float (&sum)[4][4]) {
  float* lefts = shared;
  float* rights = shared + kGradSteps * kGradPitch;
  const int tid = static_cast<int>(threadIdx.x), step = tid / 8, column = tid % 8 * 8;
  float left[8], right[8];
  const auto load = [&](int64_t c0) {  // 8 numbers of each for one condition
    const int64_t condition = c0 + step;
    const bool there = condition < term.conditions;
    const int k_left = there ? term.k_left - column : 0, n_left = there ? term.n_left - column : 0;
    load_floats(term.right + condition * term.stride + column, n_left, term.aligned, right);
    if (there && term.bias_at >= column && term.bias_at < column + 8) {
      RP_UNROLL
      for (int i = 0; i < 8; ++i) {
        if (column + i == term.bias_at) right[i] = p.counted[condition].bias_weight;
      }
    }
    if (term.left == Left::kDv) {
      load_dv(p, condition, term.k + column, k_left, left);
    } else if (term.left == Left::kV) {
      load_floats(p.v + condition * p.width + term.k + column, k_left, p.v_aligned && term.k % 4 == 0, left);
    } else {
      RP_UNROLL
      for (int i = 0; i < 8; ++i) left[i] = i < k_left ? 1.0f : 0.0f;
    }
  };
  float chain[4][4] = {};
  load(0);
  RP_NO_UNROLL
  for (int64_t c0 = 0; c0 < term.conditions; c0 += kGradSteps) {
    __syncthreads();
    store_sums(lefts + step * kGradPitch + column, left);
    store_sums(rights + step * kGradPitch + column, right);
    __syncthreads();
    load(c0 + kGradSteps);  // of the next ones, while these are multiplied
    RP_UNROLL
    for (int s = 0; s < kGradSteps; ++s) {
      const Elements<float, 4> u = load_vector<4>(lefts + s * kGradPitch + 4 * my_k);
      const Elements<float, 4> w = load_vector<4>(rights + s * kGradPitch + 4 * my_n);
      RP_UNROLL
      for (int i = 0; i < 4; ++i) {
        RP_UNROLL
        for (int j = 0; j < 4; ++j) chain[i][j] += w.e[i] * u.e[j];
      }
    }
    if (c0 / kGradSteps % (kChain / kGradSteps) == 0 && c0 + kGradSteps < term.conditions) continue;
    RP_UNROLL
    for (int i = 0; i < 4; ++i) {
      RP_UNROLL
      for (int j = 0; j < 4; ++j) sum[i][j] += chain[i][j], chain[i][j] = 0;
    }
  }
}

// A tile of dA, dB̂ or dC.
RP_DEVICE void weight_tile(const WeightParams& p, float* shared) {
  const int tid = static_cast<int>(threadIdx.x);
  const int my_n = tid % 16, my_k = tid / 16;
  float sum[4][4] = {};
  const bool is_c = blockIdx.x >= p.part_blocks;
  int n0, k0, depth, shift = 0, length;
  float scale = 1;
  const Matrix* grad = &p.dc;
  View view{0, p.dc.col_stride, p.dc.row_stride};
  if (is_c) {
    const int tile = static_cast<int>(blockIdx.x - p.part_blocks);
    n0 = tile % p.dc_tiles * kGradTile, k0 = tile / p.dc_tiles * kGradTile, depth = p.width;
    length = p.dc.data != nullptr ? static_cast<int>(p.features) : 0;
    const float* right = length > 0 ? p.pooled + n0 : p.pooled;
    add_term(p,
             {Left::kDv, k0, depth - k0, right, p.features, length - n0, p.pooled_aligned,
              p.db_c.data != nullptr ? length - n0 : -1, p.conditions},
             shared, my_n, my_k, sum);
  } else {
    int at = 0;
    while (at + 1 < p.parts.count && p.parts.list[at + 1].grad_tile <= static_cast<int>(blockIdx.x)) ++at;
    const Part& part = p.parts.list[at];
    const int tile = static_cast<int>(blockIdx.x) - part.grad_tile;
    const int tiles = (part.columns + kGradTile - 1) / kGradTile;
    n0 = tile % tiles * kGradTile, k0 = tile / tiles * kGradTile, depth = part.depth;
    shift = part.shift, length = part.length;
    grad = part.is_q ? &p.da : &p.db;
    view = view_of(part, p.da, p.db);
    if (!part.is_q) scale = p.scaling;
    const bool all = sums_all(p.parts, part);
    add_term(p,
             {all ? Left::kOnes : Left::kV, part.k0 + k0, depth - k0, p.sums + part.at + n0, p.parts.stride,
              part.columns - n0, true, -1, all ? 1 : p.conditions},
             shared, my_n, my_k, sum);
    if (part.is_q && p.shared_pooled != nullptr) {
      add_term(p,
               {Left::kDv, part.k0 + k0, depth - k0, p.shared_pooled + n0, part.length, part.length - n0,
                p.pooled_aligned, -1, p.conditions},
               shared, my_n, my_k, sum);
    }
  }
  // through shared memory, so that neighbouring threads store neighbouring numbers
  __syncthreads();
  RP_UNROLL
  for (int i = 0; i < 4; ++i) {
    RP_UNROLL
    for (int j = 0; j < 4; ++j) shared[(4 * my_n + i) * (kGradTile + 1) + 4 * my_k + j] = scale * sum[i][j];
  }
  __syncthreads();
  const bool along_n = view.n_stride < view.k_stride;
  RP_NO_UNROLL
  for (int i = tid; i < kGradTile * kGradTile; i += kGradThreads) {
    const int n = along_n ? i % kGradTile : i / kGradTile, k = along_n ? i / kGradTile : i % kGradTile;
    const int64_t column = n0 + n - shift;
    if (k0 + k >= depth || column < 0) continue;
    const float value = shared[n * (kGradTile + 1) + k];
    if (column < length) {
      store_as(grad->data, grad->dtype, view.at + column * view.n_stride + (k0 + k) * view.k_stride, value);
    } else if (is_c && column == length && p.db_c.data != nullptr) {
      store_as(p.db_c.data, p.db_c.dtype, (k0 + k) * p.db_c.col_stride, value);
    }
  }
}

// 256 columns of dY in a part of the rows of up to 8 conditions.
template <class T>
RP_DEVICE void token_rows(const WeightParams& p, float* shared) {
  float* dv = shared;                                    // [kGradTile][kRowConditions]
  float* dpooled = shared + kGradTile * kRowConditions;  // [kRowConditions][kRowColumns]
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  unsigned block = blockIdx.x - p.part_blocks - p.dc_blocks;
  const int64_t col0 = int64_t{block % p.row_tiles} * kRowColumns;
  block /= p.row_tiles;
  const int part = static_cast<int>(block % p.row_parts), parts = static_cast<int>(p.row_parts);
  const int64_t first = int64_t{block / p.row_parts} * p.row_conditions;
  const int64_t after = p.conditions - first;
  const int count = static_cast<int>(after < p.row_conditions ? after : p.row_conditions);

  // dv C of the conditions, a column a thread
  const int64_t mine = col0 + tid < p.features ? col0 + tid : p.features - 1;  // the last one again, and not stored
  float total[kRowConditions] = {};
  for (int k0 = 0; k0 < p.width; k0 += kGradTile) {
    const int here = min(p.width - k0, kGradTile);
    __syncthreads();
    if (tid < kGradTile) {
      const int condition = tid / 8, k = tid % 8 * 8;
      float values[8] = {};
      if (condition < count) load_dv(p, first + condition, k0 + k, here - k, values);
      RP_UNROLL
      for (int i = 0; i < 8; ++i) dv[(k + i) * kRowConditions + condition] = values[i];
    }
    __syncthreads();
    float sum[kRowConditions] = {};
    RP_NO_UNROLL
    for (int k = 0; k < here; k += 8) {
      float w[8];
      load_strided(p.c.data, p.c.dtype, (k0 + k) * p.c.row_stride + mine * p.c.col_stride, p.c.row_stride, 0, here - k,
                   false, w);
      RP_UNROLL
      for (int i = 0; i < 8; ++i) {
        RP_UNROLL
        for (int c = 0; c < kRowConditions; ++c) sum[c] += w[i] * dv[(k + i) * kRowConditions + c];
      }
    }
    RP_UNROLL
    for (int c = 0; c < kRowConditions; ++c) total[c] += sum[c];
  }
  RP_UNROLL
  for (int c = 0; c < kRowConditions; ++c) dpooled[c * kRowColumns + tid] = total[c];
  __syncthreads();

  // the rows
  const int64_t col = col0 + lane * kLane;
  const int left = columns_left(col, p.features);
  const uint64_t seed = seed_of(p.dropout);
  const bool dropout = p.dropout.threshold != 0;
  for (int c = 0; c < count; ++c) {
    const Counted counted = p.counted[first + c];
    const RowRange range = rows_of(p.tokens, first + c);
    const int64_t length = range.end - range.begin, share = (length + parts - 1) / parts;
    const int64_t end = share * (part + 1) < length ? share * (part + 1) : length;
    float value[kLane];
    load_floats(dpooled + c * kRowColumns + lane * kLane, kLane, true, value);
    RP_UNROLL
    for (int k = 0; k < kLane; ++k) value[k] *= counted.weight * p.dropout_scale;
    constexpr int kStep = kGradThreads / 32;
    for (int64_t i0 = share * part + warp; i0 < end; i0 += 32 * kStep) {  // the warp's next 32 rows
      const int64_t mine = i0 + lane * kStep;
      const bool counts =
          mine < end && (p.first_only ? mine == counted.first : p.mask == nullptr || p.mask[range.begin + mine]);
      const uint32_t counting = __ballot_sync(~0u, counts);
      RP_NO_UNROLL
      for (int r = 0; r < 32 && i0 + r * kStep < end; ++r) {
        const int64_t row = range.begin + i0 + r * kStep;
        const bool used = counting >> r & 1;
        if (p.add && !used) continue;
        T* at = static_cast<T*>(p.dy.data) + row * p.dy.row_stride + col;
        const uint32_t kept = dropout && used ? kept_bits(seed, p.dropout, row, col) : ~0u;
        float line[kLane] = {};
        if (p.add) to_floats(load_eight(at, left, p.dy_aligned), line);
        RP_UNROLL
        for (int k = 0; k < kLane; ++k) {
          if (used && keeps(kept, k)) line[k] += value[k];
        }
        store_eight(at, line, left, p.dy_aligned);
      }
    }
  }
}

template <class T>
__global__ __launch_bounds__(kGradThreads, 2) void rank_one_weights_kernel(const WeightParams p) {
  RP_SHARED(float4[2 * kGradSteps * kGradPitch / 4], space);
  float* shared = &space[0].x;
  if (blockIdx.x < p.part_blocks + p.dc_blocks) return weight_tile(p, shared);
  if (blockIdx.x < p.part_blocks + p.dc_blocks + p.row_blocks) return token_rows<T>(p, shared);
  const unsigned block = blockIdx.x - p.part_blocks - p.dc_blocks - p.row_blocks;
  const int64_t i = int64_t{block} * kGradThreads + threadIdx.x, size = p.conditions * p.width;
  if (i >= size) return;
  float sum = 0;
  for (int split = 0; split < p.splits; ++split) sum += p.dv[split * size + i];
  p.dstate[i] = sum;
}

}  // namespace

cudaError_t weights(const Problem& p, const Backward& io, const Wants& wants, const Parts& parts, const Splits& splits,
                    const Space& space, cudaStream_t stream) {
  const int64_t conditions = p.conditions.count;
  WeightParams params{};
  params.parts = parts;
  params.conditions = conditions;
  params.width = static_cast<int>(p.width);
  params.v = static_cast<const float*>(p.state);
  params.v_aligned = aligned_rows(dense(const_cast<void*>(p.state), Dtype::kFloat32, conditions, p.width), 16);
  params.sums = space.sums;
  params.dv = space.dv;
  params.splits = splits.splits;
  params.scaling = static_cast<float>(p.scaling);
  params.da = io.da;
  params.db = io.db;
  params.counted = space.counted;
  for (int i = 0; i < parts.count; ++i) {
    Part& part = params.parts.list[i];
    part.grad_tile = static_cast<int>(params.part_blocks);
    if (part.is_q ? !io.da : !io.db) continue;
    params.part_blocks += static_cast<unsigned>(ceil_div(part.columns, kGradTile) * ceil_div(part.depth, kGradTile));
  }
  if (wants.dv && p.source != Source::kState) {
    params.pooled = static_cast<const float*>(io.kept.data);
    params.pooled_aligned = aligned_rows(dense(io.kept.data, Dtype::kFloat32, conditions, p.y.cols), 16);
    params.features = p.y.cols;
    if (p.shared) {
      if (io.da) params.shared_pooled = params.pooled;
    } else {
      params.dc = io.dc;
      params.db_c = io.db_c;
      params.dc_tiles = static_cast<int>(ceil_div((io.dc ? p.y.cols : 0) + bool(io.db_c), kGradTile));
      params.dc_blocks = static_cast<unsigned>(params.dc_tiles * ceil_div(p.width, kGradTile));
    }
  }
  if (wants.pooled_rows && conditions > 0) {
    params.c = p.c;
    params.dy = wants.dy;
    params.dy_aligned = aligned_rows(wants.dy, 16);
    params.add = p.source == Source::kInSequence;
    params.tokens = p.conditions;
    params.mask = p.condition_mask;
    params.first_only = p.pool == Pool::kFirst;
    params.dropout = p.drop_y;
    params.dropout_scale = static_cast<float>(p.drop_y.scale());
    params.row_tiles = static_cast<unsigned>(ceil_div(p.y.cols, kRowColumns));
    const int64_t blocks = std::max<int64_t>(conditions * params.row_tiles, 1);
    params.row_conditions = static_cast<int>(std::clamp<int64_t>(blocks / kWantedBlocks, 1, kRowConditions));
    const int64_t groups = ceil_div(conditions, params.row_conditions);
    // four times as many, since the rows that count may all lie in one part
    const int64_t wanted = 4 * kWantedBlocks / std::max<int64_t>(groups * params.row_tiles, 1);
    params.row_parts = static_cast<unsigned>(std::clamp<int64_t>(std::min(wanted, p.conditions.length() / 32), 1, 64));
    params.row_blocks = params.row_tiles * params.row_parts * static_cast<unsigned>(groups);
  }
  int64_t state_blocks = 0;
  if (wants.dv && p.source == Source::kState) {
    params.dstate = static_cast<float*>(io.dstate);
    state_blocks = ceil_div(conditions * p.width, kGradThreads);
  }
  const dim3 grid(params.part_blocks + params.dc_blocks + params.row_blocks + static_cast<unsigned>(state_blocks));
  if (grid.x == 0) return cudaSuccess;
  return dispatch_float(p.dtype, [&]<class T>() {
    return launch<rank_one_weights_kernel<T>>(grid, dim3(kGradThreads), 0, stream, params);
  });
}

}  // namespace routed_peft::cuda::rank_one_backward
