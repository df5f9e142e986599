// The backward of rank_one.cu, in four launches. With u = v, or the ones vector where a route sums:
//
//   dc_n = ⟨dout_n, p⟩   dp = Σ c_n dout_n   dq = Σ dc_n x̃_n   dx_n = mask ∘ Σ_g dc_n q_g (+ dout_n)
//   dv = A dq + s B̂ᵀ dp   dA = Σ u dqᵀ (+ Σ dv ȳᵀ if C is A)   dB̂ = s Σ dp uᵀ   dC = Σ dv ȳᵀ   dY_m = weight mask ∘ dv
//   C
//
// directions (rank_one.cu): q and p.
//
// sweep: a block takes a chunk of up to 64 neighbouring rows of one sample, its 4 warps share out the columns, 256 at a
// time; a lane has 8 of them, and keeps their sums over the chunk in registers.
//
//             columns of dout ->                          columns of x ->
//   a chunk  | warp 0 | warp 1 | warp 2 | ...  -> dc ->  | warp 0 | warp 1 | warp 2 | ...
//              sums: a part of dp                          sums: a part of dq; and the rows of dx
//
// sum: a block adds the chunks' parts, in order, for 128 columns and up to 16 conditions, and multiplies the sums,
// while they lie in shared memory, with 64 columns of A or B̂: a part of dv. Few conditions: several warps share the
// chunks of one. Other blocks count the tokens of a condition.
//
// weights: 64 × 64 tiles of dA, dB̂ and dC, which are products with one row a condition; rows of dY; dv itself.
//
// A chunk's sums go to memory and are added by the next launch, rather than by one block that walks over all of a
// condition's rows: one condition would leave a GPU idle. A row of them, like one of q and p, has 4 (groups d + o)
// bytes. There is one a chunk, and one a condition unless that is a single chunk. So the scratch space is a thirtieth
// of x and dout in bfloat16 for long samples, a seventh for samples of 50 rows, and for samples of a single row, at
// worst, twice x and dout in float32, or three times with an index.
#include <algorithm>
#include <limits>

#include "kernels/device/rows.cuh"
#include "kernels/device/strided.cuh"
#include "kernels/device/vector.cuh"
#include "kernels/directions.h"
#include "kernels/dispatch.h"
#include "kernels/plan.h"

namespace routed_peft::cuda {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kLane = 8, kItem = 32 * kLane;  // neighbouring columns of a lane, and of a warp
constexpr int kChain = 64;                    // numbers added one after the other: short chains round less

int64_t ceil_div(int64_t size, int64_t step) { return (size + step - 1) / step; }

// ---- chunks: the rows of a sample, cut at multiples of `rows`: where all samples are as long, of the sample's rows,
// and else of all rows, so that chunks are numbered without a look at the offsets: the one that has rows of sample i in
// [t rows, (t + 1) rows) is number t + i. Numbers that fall between two samples have no rows.
struct Chunks {
  Sequences samples;
  int64_t rows;
  int64_t each;   // of a sample, if all are as long
  int64_t count;  // numbers
};

struct Chunk {
  int64_t sample, begin, end;
};

RP_DEVICE Chunk chunk_at(const Chunks& chunks, int64_t number) {
  const Sequences& samples = chunks.samples;
  if (samples.offsets == nullptr) {
    const int64_t sample = number / chunks.each, end = samples.end(sample);
    const int64_t begin = samples.begin(sample) + number % chunks.each * chunks.rows;
    return {sample, begin, end - begin < chunks.rows ? end : begin + chunks.rows};
  }
  int64_t low = 0, high = samples.count - 1;  // the last sample whose first number is not larger
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (samples.offsets[middle] / chunks.rows + middle <= number) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  const RowRange range = rows_of(samples, low);
  const int64_t from = (number - low) * chunks.rows, to = from + chunks.rows;
  return {low, from > range.begin ? from : range.begin, to < range.end ? to : range.end};
}

struct ChunkRange {
  int first, count;
};

RP_DEVICE ChunkRange chunks_of(const Chunks& chunks, int64_t sample) {
  if (chunks.samples.offsets == nullptr) {
    return {static_cast<int>(sample * chunks.each), static_cast<int>(chunks.each)};
  }
  const RowRange range = rows_of(chunks.samples, sample);
  if (range.begin >= range.end) return {0, 0};
  const int64_t first = range.begin / chunks.rows, last = (range.end - 1) / chunks.rows;
  return {static_cast<int>(first + sample), static_cast<int>(last - first + 1)};
}

// ---- parts: what one group has of dq, or one slice of dp, as it lies in a row of sums
struct Part {
  int64_t at;           // of its first number in the row
  int64_t row;          // of B̂
  int columns;          // numbers, a multiple of 8
  int shift, length;    // number n belongs to column n - shift of the group or slice, of `length`; others are zero
  int k0, depth;        // its columns of the bottleneck
  int tile, grad_tile;  // its first one in the sums, and in the gradients
  bool is_q;
};
constexpr int kMaxParts = 2 * kMaxSlices;

struct Parts {
  int count;
  int64_t stride;     // numbers of a row
  bool q_one, p_one;  // a single sum over all conditions: u is the ones vector
  Part list[kMaxParts];
};

RP_DEVICE bool sums_all(const Parts& parts, const Part& part) { return part.is_q ? parts.q_one : parts.p_one; }

// A block of A or B̂, or of their gradients, by a part's own columns n and k.
struct View {
  int64_t at, n_stride, k_stride;
};
RP_DEVICE View view_of(const Part& part, const Matrix& a, const Matrix& b) {
  if (part.is_q) return {part.k0 * a.row_stride, a.col_stride, a.row_stride};
  return {part.row * b.row_stride, b.row_stride, b.col_stride};
}

// ---- eight neighbouring columns
template <class T>
struct Eight {
  using Piece = Columns<T, false>;
  typename Piece::Raw raw[kLane / Piece::kCount];
};

template <class T>
RP_DEVICE Eight<T> load_eight(const T* at, int left, bool aligned) {
  using Piece = Columns<T, false>;
  Eight<T> result;
  RP_UNROLL
  for (int i = 0; i < kLane / Piece::kCount; ++i) {
    result.raw[i] = Piece::load(at + i * Piece::kCount, left - i * Piece::kCount, aligned);
  }
  return result;
}

template <class T>
RP_DEVICE void to_floats(const Eight<T>& from, float (&out)[kLane]) {
  using Piece = Columns<T, false>;
  RP_UNROLL
  for (int i = 0; i < kLane / Piece::kCount; ++i) {
    float part[Piece::kCount];
    Piece::to_floats(from.raw[i], part);
    RP_UNROLL
    for (int k = 0; k < Piece::kCount; ++k) out[i * Piece::kCount + k] = part[k];
  }
}

template <class T>
RP_DEVICE void store_eight(T* at, const float (&v)[kLane], int left, bool aligned) {
  RP_UNROLL
  for (int i = 0; i < kLane; i += kVector<T>) {
    Elements<T, kVector<T>> run;
    RP_UNROLL
    for (int k = 0; k < kVector<T>; ++k) run.e[k] = from_float<T>(v[i + k]);
    if (aligned && i + kVector<T> <= left) {
      store_16(at + i, __builtin_bit_cast(uint4, run));
    } else {
      RP_UNROLL
      for (int k = 0; k < kVector<T>; ++k) {
        if (i + k < left) at[i + k] = run.e[k];
      }
    }
  }
}

RP_DEVICE int columns_left(int64_t col, int64_t cols) {
  const int64_t left = cols - col;
  return left < 0 ? 0 : left > kLane ? kLane : static_cast<int>(left);
}

// Which of the lane's eight columns dropout keeps: number i where bit i / 2 * 8 + i % 2 is set. The quad's lanes each
// make the one call that decides two columns of every lane, instead of four calls in every lane. For whole warps.
RP_DEVICE uint32_t kept_bits(uint64_t seed, const Dropout& dropout, int64_t row, int64_t col) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  const PhiloxWords words =
      philox(seed, static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
             static_cast<uint32_t>(col / 64 * 4 + lane % 4), 2 * dropout.stream + static_cast<uint32_t>(lane / 4 % 2));
  uint32_t kept = 0;
  RP_UNROLL
  for (int w = 0; w < 4; ++w) {
    kept |= static_cast<uint32_t>((words.word[w] & 0xFFFFu) >= dropout.threshold) << (2 * w);
    kept |= static_cast<uint32_t>(words.word[w] >> 16 >= dropout.threshold) << (2 * w + 1);
  }
  kept <<= 8 * (lane % 4);
  kept |= __shfl_xor_sync(~0u, kept, 1);
  kept |= __shfl_xor_sync(~0u, kept, 2);
  return kept >> (2 * (lane % 4));
}
RP_DEVICE bool keeps(uint32_t kept, int i) { return kept >> (i / 2 * 8 + i % 2) & 1; }

RP_DEVICE uint64_t seed_of(const Dropout& dropout) {
  return dropout.seed_at != nullptr ? static_cast<uint64_t>(*dropout.seed_at) : dropout.seed;
}

// ---- sweep
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

RP_DEVICE void store_sums(float* to, const float (&sum)[kLane]) {
  RP_UNROLL
  for (int i = 0; i < kLane; i += 4) {
    store_vector<4>(to + i, Elements<float, 4>{{sum[i], sum[i + 1], sum[i + 2], sum[i + 3]}});
  }
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

// ---- sum
constexpr int kSumWarps = 8, kSumThreads = 32 * kSumWarps;
constexpr int kSumColumns = 128, kSumConditions = 16, kSumDepth = 64;
constexpr int kSumAhead = 8;  // chunks whose loads are in flight together
constexpr int64_t kWantedBlocks = 264;

// What pooling makes of a condition's tokens.
struct Counted {
  float weight, bias_weight;
  int first;  // the first valid row, counted from the condition's first, or -1
};

struct SumParams {
  Parts parts;
  int tiles, tiles_per_split;  // of all parts
  unsigned condition_tiles, depth_tiles, blocks;
  int64_t conditions;
  int width;
  Chunks chunks;
  const int* order;   // or nullptr: condition i has sample i
  const int* starts;  // [conditions + 1]
  const float* partial;
  float* sums;  // [conditions, stride]; `partial` itself where each condition is one chunk
  Matrix a, b;
  bool b_aligned;
  float scaling;
  float* dv;  // [splits, conditions, width], or nullptr
  // the tokens of a condition
  Sequences tokens;
  const bool* mask;
  Pool pool;
  bool scale_by_tokens;
  Counted* counted;  // [conditions]
};

RP_DEVICE void count_tokens(const SumParams& p, int64_t condition) {
  RP_SHARED(int[kSumWarps], counts);
  RP_SHARED(int[kSumWarps], firsts);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const RowRange range = rows_of(p.tokens, condition);
  const int count = static_cast<int>(range.end - range.begin);
  int valid = 0, first = count;
  for (int row = tid; row < count; row += kSumThreads) {
    if (p.mask != nullptr && !p.mask[range.begin + row]) continue;
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
  if (tid != 0) return;
  for (int w = 1; w < kSumWarps; ++w) {
    valid += counts[w];
    if (firsts[w] < first) first = firsts[w];
  }
  const bool mean = p.pool == Pool::kMean || (p.pool == Pool::kNone && p.scale_by_tokens);
  Counted result{0, 0, -1};
  if (valid > 0) {
    const float tokens = static_cast<float>(valid);
    result = {mean ? 1 / tokens : 1.0f, mean || p.pool == Pool::kFirst ? 1.0f : tokens, first};
  }
  p.counted[condition] = result;
}

// The sum, over the samples at places [begin, end) of the order, of 4 columns a lane: of the chunks that this way has.
RP_DEVICE void sum_chunks(const SumParams& p, int begin, int end, int way, int ways, const float* from, bool there,
                          float (&total)[4]) {
  const int lane = static_cast<int>(threadIdx.x) % 32;
  float sum[4] = {};
  int chain = 0;
  for (int base = begin; base < end; base += 32) {
    ChunkRange mine{0, 0};
    if (base + lane < end) mine = chunks_of(p.chunks, p.order == nullptr ? base + lane : p.order[base + lane]);
    int behind = mine.count;  // chunks up to and with this lane's
    RP_UNROLL
    for (int o = 1; o < 32; o *= 2) {
      const int before = __shfl_up_sync(~0u, behind, o);
      if (lane >= o) behind += before;
    }
    const int all = __shfl_sync(~0u, behind, 31), offset = mine.first - (behind - mine.count);
    for (int i0 = way * kSumAhead; i0 < all; i0 += ways * kSumAhead) {
      Elements<float, 4> loaded[kSumAhead];
      RP_UNROLL
      for (int i = 0; i < kSumAhead; ++i) {
        const int owner = __popc(__ballot_sync(~0u, behind <= i0 + i));
        const int64_t number = i0 + i + __shfl_sync(~0u, offset, owner % 32);
        loaded[i] = Elements<float, 4>{};
        if (there && i0 + i < all) loaded[i] = load_vector<4>(from + number * p.parts.stride);
      }
      RP_UNROLL
      for (int i = 0; i < kSumAhead; ++i) {
        RP_UNROLL
        for (int k = 0; k < 4; ++k) sum[k] += loaded[i].e[k];
      }
      chain += kSumAhead;
      if (chain < kChain) continue;
      RP_UNROLL
      for (int k = 0; k < 4; ++k) total[k] += sum[k], sum[k] = 0;
      chain = 0;
    }
  }
  RP_UNROLL
  for (int k = 0; k < 4; ++k) total[k] += sum[k];
}

__global__ __launch_bounds__(kSumThreads, 2) void rank_one_sum_kernel(const SumParams p) {
  constexpr int kPitch = kSumColumns + 4, kWeightPitch = kSumDepth + 4;
  RP_SHARED(float[kSumConditions][kPitch], summed);
  RP_SHARED(float[kSumWarps][kSumColumns], ways_sums);
  RP_SHARED(float[kSumColumns][kWeightPitch], weights);
  if (blockIdx.x >= p.blocks) return count_tokens(p, blockIdx.x - p.blocks);
  const int tid = static_cast<int>(threadIdx.x), lane = tid % 32, warp = tid / 32;
  const unsigned condition_tile = blockIdx.x % p.condition_tiles, rest = blockIdx.x / p.condition_tiles;
  const int k_first = static_cast<int>(rest % p.depth_tiles) * kSumDepth,
            split = static_cast<int>(rest / p.depth_tiles);
  const bool first_of_depth = k_first == 0;
  const int64_t c0 = int64_t{condition_tile} * kSumConditions;
  const bool indexed = p.order != nullptr;
  const int samples = static_cast<int>(p.chunks.samples.count);
  const bool bad = indexed && p.starts[p.conditions] < samples;
  const int my_condition = tid / 16, my_k = tid % 16 * 4;  // in the product

  float dv[4] = {};
  const int last_tile = min((split + 1) * p.tiles_per_split, p.tiles);
  int at = 0;
  for (int tile = split * p.tiles_per_split; tile < last_tile; ++tile) {
    while (at + 1 < p.parts.count && p.parts.list[at + 1].tile <= tile) ++at;
    const Part& part = p.parts.list[at];
    const bool all = sums_all(p.parts, part);
    const bool multiply = p.dv != nullptr && !all && part.k0 < k_first + kSumDepth && part.k0 + part.depth > k_first;
    const bool store = first_of_depth && (all || p.sums != p.partial);
    if ((all && condition_tile != 0) || !(store || multiply)) continue;
    const int n0 = (tile - part.tile) * kSumColumns;
    const int64_t after = p.conditions - c0;
    const int count = all ? 1 : static_cast<int>(after < kSumConditions ? after : kSumConditions);
    __syncthreads();  // the last tile's product is done

    // the sums
    const int ways = count == 1 ? 8 : count == 2 ? 4 : count <= 4 ? 2 : 1;
    const bool there = n0 + 4 * lane < part.columns;
    for (int slot = warp / ways; slot < count; slot += kSumWarps / ways) {
      const int64_t condition = c0 + slot;
      int begin = 0, end = samples;
      if (!all) {
        begin = indexed ? p.starts[condition] : static_cast<int>(condition);
        end = indexed ? p.starts[condition + 1] : condition < samples ? begin + 1 : begin;
      }
      float total[4] = {};
      if (bad && (all || condition == 0)) {
        RP_UNROLL
        for (int k = 0; k < 4; ++k) total[k] = kNan;
      } else {
        const float* from = p.partial + part.at + n0 + 4 * lane;
        sum_chunks(p, begin, end, warp % ways, ways, from, there, total);
      }
      float* to = ways == 1 ? &summed[slot][4 * lane] : &ways_sums[warp][4 * lane];
      store_vector<4>(to, Elements<float, 4>{{total[0], total[1], total[2], total[3]}});
    }
    __syncthreads();
    for (int i = tid; ways > 1 && i < count * kSumColumns; i += kSumThreads) {
      const int slot = i / kSumColumns, n = i % kSumColumns;
      float total = 0;
      for (int way = 0; way < ways; ++way) total += ways_sums[slot * ways + way][n];
      summed[slot][n] = total;
    }
    for (int i = tid; store && i < count * kSumColumns; i += kSumThreads) {
      const int slot = i / kSumColumns, n = i % kSumColumns;
      if (n0 + n < part.columns) p.sums[(c0 + slot) * p.parts.stride + part.at + n0 + n] = summed[slot][n];
    }
    if (!multiply) continue;

    // their product with 64 columns of the bottleneck
    const View view = view_of(part, p.a, p.b);
    const Matrix& weight = part.is_q ? p.a : p.b;
    const int n = tid % kSumColumns, column = n0 + n - part.shift;
    const bool valid = column >= 0 && column < part.length;
    RP_NO_UNROLL
    for (int k = tid / kSumColumns * 8; k < kSumDepth; k += kSumThreads / kSumColumns * 8) {
      const int from = k_first + k - part.k0;  // of the part's columns
      float w[8];
      load_strided(weight.data, weight.dtype, view.at + column * view.n_stride + from * view.k_stride, view.k_stride,
                   -from, valid ? part.depth - from : 0, !part.is_q && p.b_aligned && from % 8 == 0, w);
      store_sums(&weights[n][k], w);
    }
    __syncthreads();
    if (my_condition >= count) continue;
    const float scale = part.is_q ? 1.0f : p.scaling;
    RP_NO_UNROLL
    for (int half = 0; half < kSumColumns; half += kChain) {
      float sum[4] = {};
      RP_UNROLL
      for (int i = half; i < half + kChain; i += 4) {
        const Elements<float, 4> left = load_vector<4>(&summed[my_condition][i]);
        RP_UNROLL
        for (int j = 0; j < 4; ++j) {
          const Elements<float, 4> right = load_vector<4>(&weights[i + j][my_k]);
          RP_UNROLL
          for (int k = 0; k < 4; ++k) sum[k] += left.e[j] * right.e[k];
        }
      }
      RP_UNROLL
      for (int k = 0; k < 4; ++k) {
        const int column = k_first + my_k + k - part.k0;
        if (column >= 0 && column < part.depth) dv[k] += scale * sum[k];
      }
    }
  }
  if (p.dv == nullptr || c0 + my_condition >= p.conditions) return;
  RP_UNROLL
  for (int k = 0; k < 4; ++k) {
    const int column = k_first + my_k + k;
    if (column < p.width) p.dv[(split * p.conditions + c0 + my_condition) * p.width + column] = dv[k];
  }
}

// ---- weights
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

// ---- what is wanted, and where everything lies
struct Wants {
  bool dv, dq, dp, dx, pooled_rows;
  Matrix dy;  // of the pooled rows
};

Wants wants_of(const Problem& p, const Backward& io) {
  const bool in_sequence = p.source == Source::kInSequence;
  Wants w{};
  w.dx = bool(io.dx);
  w.dv = p.source == Source::kState    ? io.dstate != nullptr
         : in_sequence                 ? io.dx || io.da
         : p.source == Source::kTokens ? io.dy || io.dc || io.db_c || (p.shared && io.da)
                                       : false;
  w.dq = io.da || (w.dv && p.routing != Routing::kExpand);
  w.dp = io.db || (w.dv && p.routing != Routing::kOnes);
  w.dy = in_sequence ? io.dx : io.dy;
  w.pooled_rows = w.dv && p.source != Source::kState && w.dy;
  return w;
}

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

Parts parts_of(const Problem& p, const Wants& wants) {
  Parts parts{};
  const Directions layout(p);
  parts.q_one = layout.q_shared;
  parts.p_one = layout.p_shared;
  const auto add = [&](Part part) {
    part.columns = static_cast<int>(plan::round_up(part.shift + part.length, kLane));
    part.at = parts.stride;
    parts.stride += part.columns;
    parts.list[parts.count++] = part;
  };
  for (int64_t g = 0; wants.dq && g < p.groups; ++g) {
    Part part{};
    part.is_q = true;
    part.length = static_cast<int>(p.a.cols);
    part.depth = static_cast<int>(p.group_width());
    part.k0 = static_cast<int>(g) * part.depth;
    add(part);
  }
  for (int64_t i = 0; wants.dp && i < p.slice_count; ++i) {
    Part part{};
    part.row = p.slices[i].row;
    part.shift = static_cast<int>(p.slices[i].start % kLane);
    part.length = static_cast<int>(p.slices[i].length);
    part.depth = static_cast<int>(p.rank());
    part.k0 = static_cast<int>(i) * part.depth;
    add(part);
  }
  int tile = 0;
  for (int i = 0; i < parts.count; ++i) {
    parts.list[i].tile = tile;
    tile += static_cast<int>(ceil_div(parts.list[i].columns, kSumColumns));
  }
  return parts;
}

int tiles_of(const Parts& parts) {
  if (parts.count == 0) return 0;
  const Part& last = parts.list[parts.count - 1];
  return last.tile + static_cast<int>(ceil_div(last.columns, kSumColumns));
}

struct Splits {
  unsigned condition_tiles, depth_tiles;
  int tiles, tiles_per_split, splits;
};

// Enough blocks for a large GPU, but no more parts of dv than that takes: they are read again to be added.
Splits splits_of(const Problem& p, const Wants& wants, const Parts& parts) {
  Splits s{};
  s.condition_tiles = static_cast<unsigned>(std::max<int64_t>(ceil_div(p.conditions.count, kSumConditions), 1));
  s.depth_tiles = wants.dv ? static_cast<unsigned>(ceil_div(p.width, kSumDepth)) : 1;
  s.tiles = tiles_of(parts);
  const int64_t wanted = kWantedBlocks / (int64_t{s.condition_tiles} * s.depth_tiles);
  const int64_t splits = std::clamp<int64_t>(wanted, 1, std::max(s.tiles, 1));
  s.tiles_per_split = static_cast<int>(ceil_div(std::max(s.tiles, 1), splits));
  s.splits = static_cast<int>(ceil_div(s.tiles, s.tiles_per_split));
  return s;
}

// Everything in the scratch space; with base nullptr only its size counts.
struct Space {
  float *q, *p, *partial, *sums, *dv;
  Counted* counted;
  int *order, *starts;
  int64_t bytes = 0;

  Space(const Problem& problem, const Wants& wants, const Chunks& chunks, const Parts& parts, int splits, void* base) {
    const auto take = [&]<class N>(N*& at, int64_t numbers) {
      at = base == nullptr || numbers == 0 ? nullptr : reinterpret_cast<N*>(static_cast<char*>(base) + bytes);
      bytes += plan::round_up(numbers * int64_t{sizeof(N)}, 256);
    };
    const Directions layout(problem);
    const int64_t conditions = problem.conditions.count;
    take(q, wants.dx ? layout.q_numbers : 0);
    take(p, wants.dx || wants.dq ? layout.p_numbers : 0);
    take(partial, chunks.count * parts.stride);
    const bool one_chunk = chunks.each == 1 && problem.index == nullptr && chunks.count == conditions;
    take(sums, one_chunk ? 0 : std::max<int64_t>(conditions, 1) * parts.stride);
    if (one_chunk) sums = partial;
    take(dv, wants.dv ? splits * conditions * problem.width : 0);
    take(counted, wants.dv ? conditions : 0);
    take(order, problem.index != nullptr ? problem.inputs.count : 0);
    take(starts, problem.index != nullptr ? conditions + 1 : 0);
  }
};

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

cudaError_t sum(const Problem& p, const Wants& wants, const Chunks& chunks, const Parts& parts, const Splits& splits,
                const Space& space, cudaStream_t stream) {
  SumParams params{};
  params.parts = parts;
  params.tiles = splits.tiles;
  params.tiles_per_split = splits.tiles_per_split;
  params.condition_tiles = splits.condition_tiles;
  params.depth_tiles = splits.depth_tiles;
  params.blocks = splits.condition_tiles * splits.depth_tiles * static_cast<unsigned>(splits.splits);
  params.conditions = p.conditions.count;
  params.width = static_cast<int>(p.width);
  params.chunks = chunks;
  params.order = space.order;
  params.starts = space.starts;
  params.partial = space.partial;
  params.sums = space.sums;
  params.a = p.a;
  params.b = p.b;
  params.b_aligned = aligned_rows(p.b, 16);
  params.scaling = static_cast<float>(p.scaling);
  params.dv = wants.dv ? space.dv : nullptr;
  params.tokens = p.conditions;
  params.mask = p.condition_mask;
  params.pool = p.pool;
  params.scale_by_tokens = p.scale_by_tokens;
  params.counted = space.counted;
  const bool count = wants.dv && p.source != Source::kState;
  const dim3 grid(params.blocks + static_cast<unsigned>(count ? p.conditions.count : 0));
  return launch<rank_one_sum_kernel>(grid, dim3(kSumThreads), 0, stream, params);
}

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

}  // namespace

int64_t rank_one_grad_scratch(const Problem& p, const Backward& io) {
  if (p.slice_count > kMaxSlices || p.groups > kMaxSlices) return 0;
  const Wants wants = wants_of(p, io);
  const Parts parts = parts_of(p, wants);
  return Space(p, wants, chunks_of_problem(p), parts, splits_of(p, wants, parts).splits, nullptr).bytes;
}

cudaError_t rank_one_grad(const Problem& p, const Backward& io, void* scratch, cudaStream_t stream) {
  if (p.slice_count > kMaxSlices || p.groups > kMaxSlices || p.dtype == Dtype::kFloat64) return cudaErrorInvalidValue;
  const Wants wants = wants_of(p, io);
  if (!wants.dx && !wants.dq && !wants.dp) return cudaSuccess;
  Problem problem = p;
  if (p.inputs.rows == 0) problem.index = nullptr;  // nothing to find: all sums are zero
  const Chunks chunks = chunks_of_problem(problem);
  const Parts parts = parts_of(problem, wants);
  const Splits splits = splits_of(problem, wants, parts);
  const Space space(problem, wants, chunks, parts, splits.splits, scratch);
  cudaError_t error = cudaSuccess;
  if (p.inputs.rows > 0) {
    const float* v = static_cast<const float*>(p.state);
    if (wants.dx || wants.dq) error = make_directions(problem, v, space.q, space.p, stream);
    if (error == cudaSuccess) error = sweep(problem, io, wants, chunks, parts, space, stream);
  }
  if (error != cudaSuccess || parts.count == 0) return error;
  error = sum(problem, wants, chunks, parts, splits, space, stream);
  if (error != cudaSuccess) return error;
  return weights(problem, io, wants, parts, splits, space, stream);
}

}  // namespace routed_peft::cuda
