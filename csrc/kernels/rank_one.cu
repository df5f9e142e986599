// out_n = base_n + bias + residual x_n + Σ_g c_ng p_g, with c_ng = ⟨x̃_n, q_g⟩: what expand, ones and a gram of one
// token come to. With u = v, or the ones vector where a route sums, q_g = A_gᵀ u (expand: ones) and
// p = s B̂ u (ones: ones), in float32.
//
// directions: a block makes 128 columns of q or of p for 8 conditions, a column a thread.
//
// rank_one: a block takes up to 8 neighbouring rows, its threads share the columns.
//
//             columns of x ->                      columns of out ->
//   8 rows   | x̃ · q  | x̃ · q  | ...  -> c [8] ->  | + c p | + c p | ...     q and p are loaded once for the rows
//                                                                            that share a condition
//
// x is read twice where there is a residual: the second time from a cache, which costs less than the registers or the
// shared memory to keep it. Few rows make smaller blocks rather than an idle GPU; no sum depends on that.
#include <algorithm>
#include <limits>

#include "kernels/device/rows.cuh"
#include "kernels/device/strided.cuh"
#include "kernels/device/vector.cuh"
#include "kernels/directions.h"
#include "kernels/dispatch.h"
#include "kernels/launch.h"
#include "kernels/routed.h"

namespace routed_peft::cuda {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();

// Rows of q and p begin at 16 bytes.
int64_t padded(int64_t cols) { return (cols + 63) / 64 * 64; }

constexpr int kDirectionThreads = 128, kDirectionConditions = 8;
constexpr int kDepth = 64;  // of u in shared memory, and of a sum before it is added
constexpr int kRun = 8;     // numbers of a weight that are loaded together

RP_HOST_DEVICE unsigned direction_tiles(int64_t cols) {
  return static_cast<unsigned>((cols + kDirectionThreads - 1) / kDirectionThreads);
}

struct DirectionParams {
  const float* v;  // [conditions, width]
  Matrix a;        // [width, d], any dtype
  Matrix b;        // [selected o, rank], any dtype
  bool b_aligned;
  int64_t width, groups;
  int group_width, rank;
  Slice slices[kMaxSlices];
  int slice_count;
  int64_t conditions;
  bool q_shared, p_shared;  // one for all conditions, of the ones vector
  float scaling;
  int64_t q_stride, p_stride;
  unsigned q_tiles, tiles;  // of a group, or none if q is not wanted; of all columns of q and p
  float* q;                 // [conditions or 1, groups, q_stride]
  float* p;                 // [conditions or 1, p_stride]
};

__global__ __launch_bounds__(kDirectionThreads, 4) void directions_kernel(const DirectionParams p) {
  using Numbers = Elements<float, kDirectionConditions>;
  RP_SHARED(Numbers[kDepth], u);
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t first = int64_t{blockIdx.x / p.tiles} * kDirectionConditions;
  unsigned tile = blockIdx.x % p.tiles;

  // which sums: out[condition][n] = scale Σ_k u[condition][k] W[n][k]
  const unsigned q_tiles = static_cast<unsigned>(p.groups) * p.q_tiles;
  const bool is_q = tile < q_tiles;
  int64_t count, n_stride, k_stride;  // columns n
  int depth, from;                    // numbers k; their first column of v
  const void* weight;
  Dtype dtype;
  int64_t at;  // of the first column
  float* out;
  int64_t out_stride;
  if (is_q) {
    const unsigned group = tile / p.q_tiles;
    tile %= p.q_tiles;
    count = p.a.cols, depth = p.group_width, from = static_cast<int>(group) * depth;
    n_stride = p.a.col_stride, k_stride = p.a.row_stride;
    weight = p.a.data, dtype = p.a.dtype, at = from * k_stride;
    out = p.q + group * p.q_stride, out_stride = p.groups * p.q_stride;
  } else {
    tile -= q_tiles;
    int i = 0;
    for (; i < p.slice_count - 1; ++i) {
      const unsigned here = direction_tiles(p.slices[i].length);
      if (tile < here) break;
      tile -= here;
    }
    count = p.slices[i].length, depth = p.rank, from = i * depth;
    n_stride = p.b.row_stride, k_stride = p.b.col_stride;
    weight = p.b.data, dtype = p.b.dtype, at = p.slices[i].row * n_stride;
    out = p.p + p.slices[i].row, out_stride = p.p_stride;
  }
  const bool shared = is_q ? p.q_shared : p.p_shared;
  const int64_t conditions = shared ? 1 : p.conditions;
  if (first >= conditions) return;  // the whole block
  const int64_t n = int64_t{tile} * kDirectionThreads + tid;
  at += (n < count ? n : count - 1) * n_stride;  // the last column again, and not stored
  const bool vectors = !is_q && p.b_aligned;

  float acc[kDirectionConditions] = {};
  for (int k0 = 0; k0 < depth; k0 += kDepth) {
    const int here = min(depth - k0, kDepth);
    __syncthreads();
    for (int i = tid; i < kDepth * kDirectionConditions; i += kDirectionThreads) {
      const int k = i % kDepth;
      const int64_t condition = first + i / kDepth;
      u[k].e[i / kDepth] = k >= here || condition >= conditions ? 0.0f
                           : shared                             ? 1.0f
                                                                : p.v[condition * p.width + from + k0 + k];
    }
    __syncthreads();
    float sum[kDirectionConditions] = {};
    float w[kRun], next[kRun];
    const auto load = [&](int k) {
      load_strided(weight, dtype, at + (k0 + k) * k_stride, k_stride, 0, here - k, vectors, next);
    };
    load(0);
    RP_NO_UNROLL
    for (int k = 0; k < here; k += kRun) {
      RP_UNROLL
      for (int i = 0; i < kRun; ++i) w[i] = next[i];
      if (k + kRun < here) load(k + kRun);  // on its way while this one is multiplied
      RP_UNROLL
      for (int i = 0; i < kRun; ++i) {
        RP_UNROLL
        for (int c = 0; c < kDirectionConditions; ++c) sum[c] += w[i] * u[k + i].e[c];
      }
    }
    RP_UNROLL
    for (int c = 0; c < kDirectionConditions; ++c) acc[c] += sum[c];
  }
  if (n >= (is_q ? p.q_stride : count)) return;  // q is padded with zeros
  RP_UNROLL
  for (int c = 0; c < kDirectionConditions; ++c) {
    if (first + c < conditions)
      out[(first + c) * out_stride + n] = n >= count ? 0.0f : is_q ? acc[c] : p.scaling * acc[c];
  }
}

constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = 8, kOutRows = 4;  // of a block; that are written together
constexpr int64_t kBlocks = 264;        // enough for a large GPU

struct RankOneParams {
  Matrix x;     // [rows, d]
  Matrix out;   // [rows, o]
  Matrix base;  // [rows, o], or absent
  Matrix bias;  // [1, o], or absent
  bool residual;
  bool x_aligned;                             // for its dot
  bool x_vectors, out_vectors, base_vectors;  // to 16 bytes
  Sequences inputs;
  const int64_t* index;  // [samples], or nullptr
  int64_t conditions;
  int rows_per_block;
  int groups;
  const float* q;  // [conditions or 1, groups, q_stride]
  const float* p;  // [conditions or 1, p_stride]
  bool q_shared, p_shared;
  int64_t q_stride, p_stride;
  Slice slices[kMaxSlices];
  int slice_count;
  Dropout dropout;
  float dropout_scale;
  float* c;  // [rows, groups], or nullptr
};

// at[begin, end) of kCount neighbours; vectors: all of them, aligned to 16 bytes.
template <int kCount>
RP_DEVICE void load_between(const float* at, int begin, int end, bool vectors, float (&out)[kCount]) {
  if (vectors) return load_floats(at, kCount, true, out);
  RP_UNROLL
  for (int k = 0; k < kCount; ++k) out[k] = k >= begin && k < end ? at[k] : 0.0f;
}

template <class T, bool kDropout>
__global__ __launch_bounds__(kThreads, 4) void rank_one_kernel(const RankOneParams p) {
  using In = Columns<T, kDropout>;
  using Out = Columns<T, false>;
  constexpr int kAhead = kDropout ? 2 : 4;  // rows whose loads are in flight together
  RP_SHARED(int64_t[kRows], condition);
  RP_SHARED(float[kWarps][kRows], sums);
  RP_SHARED(float[kRows][kMaxSlices], coefficient);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int64_t row0 = int64_t{blockIdx.x} * p.rows_per_block, after = p.x.rows - row0;
  const int rows = static_cast<int>(after < p.rows_per_block ? after : p.rows_per_block);
  const T* x = static_cast<const T*>(p.x.data) + row0 * p.x.row_stride;
  const uint64_t seed =
      kDropout && p.dropout.seed_at != nullptr ? static_cast<uint64_t>(*p.dropout.seed_at) : p.dropout.seed;

  if (tid < kRows) {
    condition[tid] = tid < rows ? condition_of(p.index, p.conditions, sample_of(p.inputs, row0 + tid)) : -1;
  }
  __syncthreads();

  // c: the dots, group by group
  for (int group = 0; group < p.groups; ++group) {
    float acc[kRows] = {};
    for (int64_t unit = tid; unit < In::units(p.x.cols); unit += kThreads) {
      const int left = In::left(unit, p.x.cols);
      const T* at = x + In::first(unit);
      float q[In::kCount];
      int64_t loaded = -1;
      RP_UNROLL
      for (int r0 = 0; r0 < kRows; r0 += kAhead) {
        typename In::Raw raw[kAhead];
        RP_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          raw[i] = In::load(at + (r0 + i) * p.x.row_stride, condition[r0 + i] < 0 ? 0 : left, p.x_aligned);
        }
        RP_UNROLL
        for (int i = 0; i < kAhead; ++i) {
          const int64_t its = condition[r0 + i];
          if (its < 0) continue;
          const int64_t direction = p.q_shared ? 0 : its;
          if (direction != loaded) {
            In::load_padded(p.q + (direction * p.groups + group) * p.q_stride, unit, q);
            loaded = direction;
          }
          float v[In::kCount];
          In::to_floats(raw[i], v);
          if constexpr (kDropout) drop(seed, p.dropout, row0 + r0 + i, unit, v);
          RP_UNROLL
          for (int k = 0; k < In::kCount; ++k) acc[r0 + i] += v[k] * q[k];
        }
      }
    }
    const float sum = warp_sums(acc);
    if (lane < kRows) sums[warp][lane] = sum;
    __syncthreads();
    if (tid < rows) {
      float total = 0;
      RP_UNROLL
      for (int w = 0; w < kWarps; ++w) total += sums[w][tid];
      if (kDropout) total *= p.dropout_scale;
      if (condition[tid] < 0) total = kNan;
      coefficient[tid][group] = total;
      if (p.c != nullptr) p.c[(row0 + tid) * p.groups + group] = total;
    }
    __syncthreads();
  }

  // the rows of out
  for (int64_t unit = tid; unit < Out::units(p.out.cols); unit += kThreads) {
    const int64_t j0 = Out::first(unit);
    const int left = Out::left(unit, p.out.cols);
    float bias[Out::kCount] = {};
    if (p.bias.data != nullptr) {
      RP_UNROLL
      for (int k = 0; k < Out::kCount; ++k) {
        if (k < left) bias[k] = load_as_float(p.bias.data, p.bias.dtype, (j0 + k) * p.bias.col_stride);
      }
    }
    for (int r0 = 0; r0 < rows; r0 += kOutRows) {
      float line[kOutRows][Out::kCount];
      RP_UNROLL
      for (int r = 0; r < kOutRows; ++r) {
        RP_UNROLL
        for (int k = 0; k < Out::kCount; ++k) line[r][k] = bias[k];
      }
      const auto add = [&](const Matrix& m, bool vectors) {
        const T* at = static_cast<const T*>(m.data) + (row0 + r0) * m.row_stride + j0;
        typename Out::Raw raw[kOutRows];
        RP_UNROLL
        for (int r = 0; r < kOutRows; ++r) raw[r] = Out::load(at + r * m.row_stride, r0 + r < rows ? left : 0, vectors);
        RP_UNROLL
        for (int r = 0; r < kOutRows; ++r) {
          float v[Out::kCount];
          Out::to_floats(raw[r], v);
          RP_UNROLL
          for (int k = 0; k < Out::kCount; ++k) line[r][k] += v[k];
        }
      };
      if (p.base.data != nullptr) add(p.base, p.base_vectors);
      if (p.residual) add(p.x, p.x_vectors);

      for (int s = 0; s < p.slice_count; ++s) {
        const int64_t to_end = p.slices[s].start + p.slices[s].length - j0;
        if (p.slices[s].start >= j0 + Out::kCount || to_end <= 0) continue;
        const int begin = static_cast<int>(p.slices[s].start > j0 ? p.slices[s].start - j0 : 0);  // in this unit
        const int end = static_cast<int>(to_end < Out::kCount ? to_end : Out::kCount);
        const int64_t offset = p.slices[s].row + j0 - p.slices[s].start;
        const bool vectors = begin == 0 && end == Out::kCount && offset % 4 == 0;
        float up[Out::kCount];
        int64_t loaded = -1;
        RP_UNROLL
        for (int r = 0; r < kOutRows; ++r) {
          const int64_t its = condition[r0 + r];
          if (its < 0) continue;
          const int64_t direction = p.p_shared ? 0 : its;
          if (direction != loaded) {
            load_between(p.p + direction * p.p_stride + offset, begin, end, vectors, up);
            loaded = direction;
          }
          const float c = coefficient[r0 + r][p.groups == 1 ? 0 : s];
          RP_UNROLL
          for (int k = 0; k < Out::kCount; ++k) {
            if (k >= begin && k < end) line[r][k] += c * up[k];
          }
        }
      }

      RP_UNROLL
      for (int r = 0; r < kOutRows; ++r) {
        if (r0 + r >= rows) continue;
        T* at = static_cast<T*>(p.out.data) + (row0 + r0 + r) * p.out.row_stride + j0;
        const bool known = condition[r0 + r] >= 0;
        Elements<T, Out::kCount> stored;
        RP_UNROLL
        for (int k = 0; k < Out::kCount; ++k) stored.e[k] = from_float<T>(known ? line[r][k] : kNan);
        if (p.out_vectors && Out::kCount <= left) {
          store_vector(at, stored);
        } else {
          RP_UNROLL
          for (int k = 0; k < Out::kCount; ++k) {
            if (k < left) at[k] = stored.e[k];
          }
        }
      }
    }
  }
}

}  // namespace

Directions::Directions(const Problem& p)
    : q_shared(p.routing == Routing::kExpand),
      p_shared(p.routing == Routing::kOnes),
      q_stride(padded(p.a.cols)),
      p_stride(padded(p.b.rows)),
      q_numbers((q_shared ? 1 : p.conditions.count) * p.groups * q_stride),
      p_numbers((p_shared ? 1 : p.conditions.count) * p_stride) {}

cudaError_t make_directions(const Problem& p, const float* v, float* q, float* up, cudaStream_t stream) {
  const Directions layout(p);
  DirectionParams params{};
  params.v = v;
  params.a = p.a;
  params.b = p.b;
  params.b_aligned = aligned_rows(p.b, 16);
  params.width = p.width;
  params.groups = p.groups;
  params.group_width = static_cast<int>(p.group_width());
  params.rank = static_cast<int>(p.rank());
  std::copy_n(p.slices, p.slice_count, params.slices);
  params.slice_count = static_cast<int>(p.slice_count);
  params.conditions = p.conditions.count;
  params.q_shared = layout.q_shared;
  params.p_shared = layout.p_shared;
  params.scaling = static_cast<float>(p.scaling);
  params.q_stride = layout.q_stride;
  params.p_stride = layout.p_stride;
  params.q_tiles = q == nullptr ? 0 : direction_tiles(layout.q_stride);
  params.tiles = static_cast<unsigned>(p.groups) * params.q_tiles;
  for (int64_t i = 0; i < p.slice_count; ++i) params.tiles += direction_tiles(p.slices[i].length);
  params.q = q;
  params.p = up;
  const int64_t condition_tiles = (p.conditions.count + kDirectionConditions - 1) / kDirectionConditions;
  const dim3 grid(params.tiles * static_cast<unsigned>(condition_tiles));
  if (grid.x == 0) return cudaSuccess;
  return launch<directions_kernel>(grid, dim3(kDirectionThreads), 0, stream, params);
}

int64_t rank_one_scratch(const Problem& p) {
  const Directions layout(p);
  return (layout.q_numbers + layout.p_numbers) * int64_t{sizeof(float)};
}

cudaError_t rank_one(const Problem& p, const float* v, const Matrix& out, float* c, void* scratch,
                     cudaStream_t stream) {
  if (p.x.rows == 0) return cudaSuccess;
  if (p.slice_count > kMaxSlices || p.groups > kMaxSlices) return cudaErrorInvalidValue;
  if (p.dtype == Dtype::kFloat64) return cudaErrorInvalidValue;
  const Directions layout(p);
  float* q = static_cast<float*>(scratch);
  float* up = q + layout.q_numbers;
  const cudaError_t error = make_directions(p, v, q, up, stream);
  if (error != cudaSuccess) return error;

  const bool dropout = p.drop_x.threshold != 0;
  RankOneParams params{};
  params.x = p.x;
  params.out = out;
  params.base = p.base;
  params.bias = p.bias;
  params.residual = p.residual;
  params.x_aligned = aligned_rows(p.x, dropout ? 2 * element_size(p.dtype) : 16);
  params.x_vectors = aligned_rows(p.x, 16);
  params.out_vectors = aligned_rows(out, 16);
  params.base_vectors = aligned_rows(p.base, 16);
  params.inputs = p.inputs;
  params.index = p.index;
  params.conditions = p.conditions.count;
  params.rows_per_block = static_cast<int>(std::clamp<int64_t>(p.x.rows / kBlocks, 1, kRows));
  params.groups = static_cast<int>(p.groups);
  params.q = q;
  params.p = up;
  params.q_shared = layout.q_shared;
  params.p_shared = layout.p_shared;
  params.q_stride = layout.q_stride;
  params.p_stride = layout.p_stride;
  std::copy_n(p.slices, p.slice_count, params.slices);
  params.slice_count = static_cast<int>(p.slice_count);
  params.dropout = p.drop_x;
  params.dropout_scale = static_cast<float>(p.drop_x.scale());
  params.c = c;
  const dim3 grid(static_cast<unsigned>((p.x.rows + params.rows_per_block - 1) / params.rows_per_block));
  return dispatch_float(p.dtype, [&]<class T>() {
    return dispatch_bool(dropout, [&]<bool kDropout>() {
      return launch<rank_one_kernel<T, kDropout>>(grid, dim3(kThreads), 0, stream, params);
    });
  });
}

}  // namespace routed_peft::cuda
