// The backward of rank_one.cu, the second launch of rank_one_grad.cu: one look at each row of dout and x.
//
// A block takes a chunk of up to 64 neighbouring rows of one sample, its 4 warps share out the columns, 256 at a time;
// a lane has 8 of them, and keeps their sums over the chunk in registers.
//
//             columns of dout ->                          columns of x ->
//   a chunk  | warp 0 | warp 1 | warp 2 | ...  -> dc ->  | warp 0 | warp 1 | warp 2 | ...
//              sums: a part of dp                          sums: a part of dq; and the rows of dx
#include <algorithm>
#include <limits>

#include "kernels/dispatch.h"
#include "kernels/rank_one_grad.h"

namespace routed_peft::cuda::rank_one_backward {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kItem = 32 * kLane;  // neighbouring columns of a warp
constexpr int kWarps = 4, kThreads = 32 * kWarps;
constexpr int kRows = kChain;  // of a chunk, at most
constexpr int kBatch = 4;      // rows whose loads are in flight together
constexpr int64_t kWantedChunks = 512;
constexpr int kFewestRows = 4;  // of a chunk that is made small to have more of them

struct SweepParams {
  Matrix x, dout, dx;  // dx absent: not wanted
  const float* c;      // [rows, groups]
  int64_t c_stride;
  bool x_aligned, dout_aligned, dx_aligned;  // to 16 bytes
  bool want_dq, want_dp, residual;
  Chunks chunks;
  const int64_t* index;  // [samples], or nullptr
  int64_t conditions;
  int groups;
  const float* q;  // [conditions or 1, groups, q_stride]
  const float* p;  // [conditions or 1, p_stride]
  bool q_shared, p_shared;
  int64_t q_stride, p_stride;
  Slice slices[kMaxSlices];
  int slice_count;
  Dropout dropout;
  float dropout_scale;
  float* partial;  // [chunks, stride]
  int64_t stride;
  int64_t q_at[kMaxSlices], p_at[kMaxSlices];  // of groups and slices in a row of `partial`
  unsigned order_blocks;
  int* order;   // [samples]: the samples by their condition
  int* starts;  // [conditions + 1]: where each condition's begin; behind the last are those with a bad index
};

// A thread places one sample: behind those of smaller conditions, and behind the earlier ones of its own.
RP_DEVICE void order_samples(const SweepParams& p) {
  RP_SHARED(int[kThreads], keys);
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t samples = p.chunks.samples.count, me = int64_t{blockIdx.x} * kThreads + tid;
  const auto key_of = [&](int64_t sample) {
    const int64_t condition = condition_of(p.index, p.conditions, sample);
    return static_cast<int>(condition < 0 ? p.conditions : condition);
  };
  const int mine = me < samples ? key_of(me) : 0;
  int place = 0, start = 0;
  for (int64_t base = 0; base < samples; base += kThreads) {
    __syncthreads();
    if (base + tid < samples) keys[tid] = key_of(base + tid);
    __syncthreads();
    const int count = static_cast<int>(samples - base < kThreads ? samples - base : kThreads);
    for (int i = 0; i < count; ++i) {
      place += keys[i] < mine || (keys[i] == mine && base + i < me);
      start += keys[i] < me;
    }
  }
  if (me < samples) p.order[place] = static_cast<int>(me);
  if (me <= p.conditions) p.starts[me] = start;
}

// How the warps share `items` runs of columns: `workers` take them in turn, and each of their `ways` teams has a part
// of the rows. With more than one way a worker has one item at most.
struct Shares {
  int workers, worker, ways, way;
};
RP_DEVICE Shares shares_of(int64_t items, int warp) {
  const int workers = items == 1 ? 1 : items == 2 ? 2 : kWarps;
  return {workers, warp % workers, kWarps / workers, warp / workers};
}

struct Rows {
  int begin, end;
};
RP_DEVICE Rows rows_of_way(const Shares& shares, int rows) {
  const int share = ((rows + shares.ways - 1) / shares.ways + kBatch - 1) / kBatch * kBatch, begin = share * shares.way;
  return {begin, begin + share < rows ? begin + share : rows};
}

// The sums of all ways, stored by the first; `to` is nullptr where there is nothing to store. For all threads.
RP_DEVICE void store_ways(const Shares& shares, float (*others)[kItem], float* to, float (&sum)[kLane]) {
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  if (shares.ways == 1) {
    if (to != nullptr) store_sums(to, sum);
    return;
  }
  __syncthreads();
  store_sums(others[warp] + lane * kLane, sum);
  __syncthreads();
  if (shares.way > 0 || to == nullptr) return;
  for (int way = 1; way < shares.ways; ++way) {
    RP_UNROLL
    for (int i = 0; i < kLane; ++i) sum[i] += others[warp + way * shares.workers][lane * kLane + i];
  }
  store_sums(to, sum);
}

template <class T>
__global__ __launch_bounds__(kThreads, 4) void rank_one_sweep_kernel(const SweepParams p) {
  RP_DYNAMIC_SMEM(shared);
  RP_SHARED(float[kWarps][kItem], others);
  if (blockIdx.x < p.order_blocks) return order_samples(p);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const int64_t number = blockIdx.x - p.order_blocks;
  const Chunk chunk = chunk_at(p.chunks, number);
  if (chunk.begin >= chunk.end) return;
  const int rows = static_cast<int>(chunk.end - chunk.begin);
  const int64_t condition = condition_of(p.index, p.conditions, chunk.sample), row0 = chunk.begin;
  const T* dout = static_cast<const T*>(p.dout.data) + row0 * p.dout.row_stride;
  const T* x = static_cast<const T*>(p.x.data) + row0 * p.x.row_stride;
  const bool want_dx = p.dx.data != nullptr;
  T* dx = want_dx ? static_cast<T*>(p.dx.data) + row0 * p.dx.row_stride : nullptr;
  if (condition < 0) {  // its gradients are NaN; `sum` sees to the other ones
    for (int64_t i = tid; want_dx && i < rows * p.dx.cols; i += kThreads) {
      dx[i / p.dx.cols * p.dx.row_stride + i % p.dx.cols] = from_float<T>(kNan);
    }
    return;
  }
  const bool want_dc = want_dx || p.want_dq;
  float* partial = p.want_dq || p.want_dp ? p.partial + number * p.stride : nullptr;
  float* c = reinterpret_cast<float*>(shared);  // [groups][kRows]
  float* dc = c + p.groups * kRows;             // [groups][kRows]
  float* dots = dc + p.groups * kRows;          // [warps][groups][kRows]
  for (int i = tid; i < p.groups * kRows; i += kThreads) {
    const int row = i % kRows;
    c[i] = p.want_dp && row < rows ? p.c[(row0 + row) * p.c_stride + i / kRows] : 0.0f;
    for (int w = 0; w < kWarps; ++w) dots[w * p.groups * kRows + i] = 0;
  }
  __syncthreads();

  // dout: dp's sums, and the dots
  int64_t items = 0;
  for (int s = 0; s < p.slice_count; ++s) {
    items += (p.slices[s].start % kLane + p.slices[s].length + kItem - 1) / kItem;
  }
  {
    const Shares shares = shares_of(items, warp);
    const Rows mine = rows_of_way(shares, rows);
    const float* up = p.p + (p.p_shared ? 0 : condition) * p.p_stride;
    float sum[kLane] = {};
    float* to = nullptr;
    int64_t item = 0;
    for (int s = 0; s < p.slice_count; ++s) {
      const Slice slice = p.slices[s];
      const int shift = static_cast<int>(slice.start % kLane), group = p.groups == 1 ? 0 : s;
      for (int64_t n0 = 0; n0 < shift + slice.length; n0 += kItem, ++item) {
        if (item % shares.workers != shares.worker) continue;
        const int64_t n = n0 + lane * kLane, col = slice.start - shift + n;  // the lane's first column of the slice
        const int begin = n == 0 ? shift : 0, end = columns_left(n, shift + slice.length);
        const int left = end > 0 ? columns_left(col, p.dout.cols) : 0;
        float weight[kLane];
        RP_UNROLL
        for (int k = 0; k < kLane; ++k) {
          weight[k] = want_dc && k >= begin && k < end ? up[slice.row + n - shift + k] : 0.0f;
        }
        RP_UNROLL
        for (int k = 0; k < kLane; ++k) sum[k] = 0;
        const T* at = dout + mine.begin * p.dout.row_stride + col;
        RP_NO_UNROLL
        for (int r0 = mine.begin; r0 < mine.end; r0 += kBatch) {
          float dot[kBatch] = {};
          Eight<T> raw[kBatch];
          RP_UNROLL
          for (int r = 0; r < kBatch; ++r) {
            raw[r] = load_eight(at, r0 + r < mine.end ? left : 0, p.dout_aligned);
            at += p.dout.row_stride;
          }
          RP_UNROLL
          for (int r = 0; r < kBatch; ++r) {
            float v[kLane];
            to_floats(raw[r], v);
            const float its = c[group * kRows + r0 + r];
            RP_UNROLL
            for (int k = 0; k < kLane; ++k) {
              if (k < begin || k >= end) v[k] = 0;  // another slice's
              dot[r] += v[k] * weight[k];
              sum[k] += v[k] * its;
            }
          }
          const float total = warp_sums(dot);
          if (lane < kBatch) dots[(warp * p.groups + group) * kRows + r0 + lane] += total;
        }
        to = p.want_dp && end > 0 ? partial + p.p_at[s] + n : nullptr;
        if (shares.ways == 1 && to != nullptr) store_sums(to, sum);
      }
    }
    if (shares.ways > 1) store_ways(shares, others, to, sum);
  }
  if (!want_dc) return;
  __syncthreads();
  for (int i = tid; i < p.groups * kRows; i += kThreads) {
    float total = 0;
    for (int w = 0; w < kWarps; ++w) total += dots[w * p.groups * kRows + i];
    dc[i] = total;
  }
  __syncthreads();

  // x: dq's sums and dx
  const uint64_t seed = seed_of(p.dropout);
  const bool dropout = p.dropout.threshold != 0;
  items = (p.x.cols + kItem - 1) / kItem;
  const Shares shares = shares_of(items, warp);
  const Rows mine = rows_of_way(shares, rows);
  const float* q = want_dx ? p.q + (p.q_shared ? 0 : condition) * p.groups * p.q_stride : nullptr;
  const int passes = p.want_dq ? p.groups : 1;
  for (int64_t item = shares.worker; item < items; item += shares.workers) {
    const int64_t col = item * kItem + lane * kLane;
    const int left = columns_left(col, p.x.cols);
    for (int group = 0; group < passes; ++group) {
      const bool make_dx = want_dx && group == 0;
      float sum[kLane] = {}, direction[kLane] = {};
      if (make_dx) load_floats(q + col, left > 0 ? kLane : 0, true, direction);
      const T* at = x + mine.begin * p.x.row_stride + col;
      RP_NO_UNROLL
      for (int r0 = mine.begin; r0 < mine.end; r0 += kBatch) {
        Eight<T> raw[kBatch];
        RP_UNROLL
        for (int r = 0; r < kBatch; ++r) {
          const bool there = p.want_dq && r0 + r < mine.end;
          raw[r] = load_eight(at, there ? left : 0, p.x_aligned);
          at += p.x.row_stride;
        }
        RP_UNROLL
        for (int r = 0; r < kBatch; ++r) {
          const int row = r0 + r;
          if (row >= mine.end) continue;
          const uint32_t kept = dropout ? kept_bits(seed, p.dropout, row0 + row, col) : ~0u;
          const float its = dc[group * kRows + row];
          float v[kLane];
          to_floats(raw[r], v);
          RP_UNROLL
          for (int k = 0; k < kLane; ++k) {
            if (keeps(kept, k)) sum[k] += its * v[k];
          }
          if (!make_dx) continue;
          float line[kLane];
          RP_UNROLL
          for (int k = 0; k < kLane; ++k) line[k] = its * direction[k];
          RP_NO_UNROLL
          for (int other = 1; other < p.groups; ++other) {
            const float weight = dc[other * kRows + row];
            float its_direction[kLane];
            load_floats(q + other * p.q_stride + col, left > 0 ? kLane : 0, true, its_direction);
            RP_UNROLL
            for (int k = 0; k < kLane; ++k) line[k] += weight * its_direction[k];
          }
          float added[kLane] = {};
          if (p.residual) to_floats(load_eight(dout + row * p.dout.row_stride + col, left, p.dout_aligned), added);
          RP_UNROLL
          for (int k = 0; k < kLane; ++k) line[k] = (keeps(kept, k) ? p.dropout_scale * line[k] : 0.0f) + added[k];
          store_eight(dx + row * p.dx.row_stride + col, line, left, p.dx_aligned);
        }
      }
      if (!p.want_dq) continue;
      RP_UNROLL
      for (int k = 0; k < kLane; ++k) sum[k] *= p.dropout_scale;
      store_ways(shares, others, left > 0 ? partial + p.q_at[group] + col : nullptr, sum);
    }
  }
}

}  // namespace

Chunks chunks_of_problem(const Problem& p) {
  Chunks chunks{};
  chunks.samples = p.inputs;
  chunks.rows = std::clamp<int64_t>(ceil_div(p.inputs.rows, kWantedChunks), kFewestRows, kRows);
  if (p.inputs.offsets == nullptr && p.inputs.length() > 0) {  // as long as each other
    chunks.each = std::max(p.inputs.length() / chunks.rows, ceil_div(p.inputs.length(), kRows));
    chunks.rows = ceil_div(p.inputs.length(), chunks.each);
    chunks.each = ceil_div(p.inputs.length(), chunks.rows);  // none behind the last row
  }
  chunks.count = p.inputs.rows == 0            ? 0
                 : p.inputs.offsets == nullptr ? chunks.each * p.inputs.count
                                               : ceil_div(p.inputs.rows, chunks.rows) + p.inputs.count;
  return chunks;
}

cudaError_t sweep(const Problem& p, const Backward& io, const Wants& wants, const Chunks& chunks, const Parts& parts,
                  const Space& space, cudaStream_t stream) {
  const Directions layout(p);
  SweepParams params{};
  params.x = p.x;
  params.dout = io.dout;
  params.dx = io.dx;
  params.c = static_cast<const float*>(io.t.data);
  params.c_stride = io.t.row_stride;
  params.x_aligned = aligned_rows(p.x, 16);
  params.dout_aligned = aligned_rows(io.dout, 16);
  params.dx_aligned = aligned_rows(io.dx, 16);
  params.want_dq = wants.dq;
  params.want_dp = wants.dp;
  params.residual = p.residual;
  params.chunks = chunks;
  params.index = p.index;
  params.conditions = p.conditions.count;
  params.groups = static_cast<int>(p.groups);
  params.q = space.q;
  params.p = space.p;
  params.q_shared = layout.q_shared;
  params.p_shared = layout.p_shared;
  params.q_stride = layout.q_stride;
  params.p_stride = layout.p_stride;
  std::copy_n(p.slices, p.slice_count, params.slices);
  params.slice_count = static_cast<int>(p.slice_count);
  params.dropout = p.drop_x;
  params.dropout_scale = static_cast<float>(p.drop_x.scale());
  params.partial = space.partial;
  params.stride = parts.stride;
  int q_count = 0, p_count = 0;
  for (int i = 0; i < parts.count; ++i) {
    const Part& part = parts.list[i];
    (part.is_q ? params.q_at[q_count++] : params.p_at[p_count++]) = part.at;
  }
  if (p.index != nullptr && parts.count > 0) {
    params.order_blocks = static_cast<unsigned>(ceil_div(std::max(p.inputs.count, p.conditions.count + 1), kThreads));
  }
  params.order = space.order;
  params.starts = space.starts;
  const dim3 grid(params.order_blocks + static_cast<unsigned>(chunks.count));
  const size_t shared = static_cast<size_t>(p.groups) * kRows * (2 + kWarps) * sizeof(float);
  return dispatch_float(p.dtype, [&]<class T>() {
    return launch<rank_one_sweep_kernel<T>>(grid, dim3(kThreads), shared, stream, params);
  });
}

}  // namespace routed_peft::cuda::rank_one_backward
