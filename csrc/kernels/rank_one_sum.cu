// The backward of rank_one.cu, the third launch of rank_one_grad.cu: sums over the rows of a condition.
//
// A block adds the chunks' parts, in order, for 128 columns and up to 16 conditions, and multiplies the sums, while
// they lie in shared memory, with 64 columns of A or B̂: a part of dv. Few conditions: several warps share the chunks of
// one. Other blocks count the tokens of a condition.
#include <algorithm>
#include <limits>

#include "kernels/device/strided.cuh"
#include "kernels/rank_one_grad.h"

namespace routed_peft::cuda::rank_one_backward {
namespace {

constexpr float kNan = std::numeric_limits<float>::quiet_NaN();
constexpr int kSumWarps = 8, kSumThreads = 32 * kSumWarps;
constexpr int kSumConditions = 16, kSumDepth = 64;
constexpr int kSumAhead = 8;  // chunks whose loads are in flight together

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
      const float* part[kSumAhead];
      RP_UNROLL
      for (int i = 0; i < kSumAhead; ++i) {
        const int owner = __popc(__ballot_sync(~0u, behind <= i0 + i));
        part[i] = from + (i0 + i + __shfl_sync(~0u, offset, owner % 32)) * p.parts.stride;
      }
      if (there && i0 + kSumAhead <= all) {  // the lanes' own loads, all on their way at once
        uint4 loaded[kSumAhead];
        RP_UNROLL
        for (int i = 0; i < kSumAhead; ++i) loaded[i] = load_16(part[i]);
        RP_UNROLL
        for (int i = 0; i < kSumAhead; ++i) {
          sum[0] += __uint_as_float(loaded[i].x), sum[1] += __uint_as_float(loaded[i].y);
          sum[2] += __uint_as_float(loaded[i].z), sum[3] += __uint_as_float(loaded[i].w);
        }
      } else if (there) {
        RP_UNROLL
        for (int i = 0; i < kSumAhead; ++i) {
          if (i0 + i >= all) break;
          const Elements<float, 4> one = load_vector<4>(part[i]);
          RP_UNROLL
          for (int k = 0; k < 4; ++k) sum[k] += one.e[k];
        }
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

int tiles_of(const Parts& parts) {
  if (parts.count == 0) return 0;
  const Part& last = parts.list[parts.count - 1];
  return last.tile + static_cast<int>(ceil_div(last.columns, kSumColumns));
}
}  // namespace

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

}  // namespace routed_peft::cuda::rank_one_backward
