// gram and gram_relu -> gradients of V or S: dV = f (V (D + Dᵀ)) or f (V⁺ D + (V Dᵀ) ∘ [V > 0]) with D = Σ T⁽⁺⁾ᵀ G over
// the samples that use a condition, or, with P = V⁽⁺⁾ T⁽⁺⁾ᵀ and dP = V Gᵀ, dV = f Σ (dP T⁽⁺⁾ ∘ [V > 0] + P G).
//
// By D: a block makes 64 rows x 64 columns of dV, its four warps 32 x 32 each. D is summed in shared memory, 64 x 64 of
// it at a time, with its mirror image:
//
//      V [64, k]  x  D[k, n] and D[n, k]ᵀ,   k = n + 1, n + 2, ..., n
//
// k = n comes last, where one tile serves twice and the V that decides V > 0 is at hand.
//
// By tokens: a block makes 64 rows of dV in all columns of a group, for 32 rows of x at a time. Two warps make P and
// two dP, 64 columns of the group after another; through shared memory these become the left factors of products that
// are added to dV, which stays in registers.
//
// Every block sums the parts of D again that it needs, from a cache: one launch less, and no scratch.
#include <limits>

#include "kernels/device/condition.cuh"
#include "kernels/device/route.cuh"
#include "kernels/device/vector.cuh"
#include "kernels/dispatch.h"

namespace routed_peft::cuda {
namespace {

constexpr int kChain = 64;  // numbers that are added up before their sum is added: short chains round less

constexpr int kThreads = 128, kTile = 64, kChunk = 32;  // kChunk: rows of x
// Banks: 8q + g for (k, column) = (q, g), and for pairs of neighbours in k no conflicts either.
constexpr int kStride = kTile + 8;
constexpr int kScoreStride = kChunk + 4;

struct KernelParams {
  GramGradParams p;
  unsigned tiles, column_tiles;  // of the rows of V; of a group's columns, or of the numbers of a state
  bool d_aligned, t_aligned, g_aligned, v_aligned;
};

// acc [32, 32] of a warp += L R with R [depth, 32], or L Rᵀ with R [32, depth], in shared memory with zeros up to a
// multiple of 8; depth at most 64. Numbers of L below `least` count as that.
template <bool kTensor, bool kTransposed>
RP_DEVICE void multiply(float (&acc)[2][4][4], const float* l, int l_stride, const float* r, int r_stride, int depth,
                        float least) {
  const LanePlace at;
  const auto bounded = [&](float value) { return value < least ? least : value; };  // NaN stays
  if constexpr (kTensor) {
    // A lane's two of every eight k: neighbours where both factors lie along k, which are loaded together.
    RP_NO_UNROLL
    for (int k = 0; k < depth; k += 8) {
      uint32_t a[2][4];
      RP_UNROLL
      for (int i = 0; i < 4; ++i) {
        const float* row = l + (8 * i + at.g) * l_stride + k;
        float2 pair;
        if constexpr (kTransposed) {
          pair = *reinterpret_cast<const float2*>(row + 2 * at.q);
        } else {
          pair = make_float2(row[at.q], row[at.q + 4]);
        }
        a[i / 2][i % 2] = to_tf32(bounded(pair.x));
        a[i / 2][i % 2 + 2] = to_tf32(bounded(pair.y));
      }
      RP_UNROLL
      for (int j = 0; j < 4; ++j) {
        float2 pair;
        if constexpr (kTransposed) {
          pair = *reinterpret_cast<const float2*>(r + (8 * j + at.g) * r_stride + k + 2 * at.q);
        } else {
          const float* column = r + (k + at.q) * r_stride + 8 * j + at.g;
          pair = make_float2(column[0], column[4 * r_stride]);
        }
        mma_tf32_16x8x8(acc[0][j], a[0], to_tf32(pair.x), to_tf32(pair.y));
        mma_tf32_16x8x8(acc[1][j], a[1], to_tf32(pair.x), to_tf32(pair.y));
      }
    }
  } else {
    constexpr int kStep = 2;  // columns of eight that share what is read of l; more would need more registers
    RP_UNROLL
    for (int j0 = 0; j0 < 4; j0 += kStep) {
      float sum[kStep][4][2] = {};
      RP_NO_UNROLL
      for (int k = 0; k < depth; k += 2) {
        float2 a[4];
        RP_UNROLL
        for (int i = 0; i < 4; ++i) {
          a[i] = *reinterpret_cast<const float2*>(l + (8 * i + at.g) * l_stride + k);
          a[i] = make_float2(bounded(a[i].x), bounded(a[i].y));
        }
        RP_UNROLL
        for (int j = 0; j < kStep; ++j) {
          const int column = 8 * (j0 + j) + 2 * at.q;
          const float* from = r + (kTransposed ? column * r_stride + k : k * r_stride + column);
          const float2 one = *reinterpret_cast<const float2*>(from);
          const float2 two = *reinterpret_cast<const float2*>(from + r_stride);
          RP_UNROLL
          for (int i = 0; i < 4; ++i) {
            sum[j][i][0] += a[i].x * one.x;
            sum[j][i][0] += a[i].y * (kTransposed ? one.y : two.x);
            sum[j][i][1] += a[i].x * (kTransposed ? two.x : one.y);
            sum[j][i][1] += a[i].y * two.y;
          }
        }
      }
      RP_UNROLL
      for (int j = 0; j < kStep; ++j) {
        RP_UNROLL
        for (int i = 0; i < 8; ++i) acc[i / 4][j0 + j][i % 4] += sum[j][i / 2][i % 2];
      }
    }
  }
}

// body(row, column, pair of an accumulator) for all of a warp's 32 x 32.
template <class Body>
RP_DEVICE void for_pairs(float (&acc)[2][4][4], const Body& body) {
  const LanePlace at;
  RP_UNROLL
  for (int i = 0; i < 4; ++i) {
    RP_UNROLL
    for (int j = 0; j < 4; ++j) body(8 * i + at.g, 8 * j + 2 * at.q, acc[i / 2][j] + i % 2 * 2);
  }
}

// to [kRows, kTile] = rows of T with zeros around the `rows` x `cols` that are there.
template <int kRows, class T>
RP_DEVICE void load_tile(float* to, const T* from, int64_t stride, int64_t rows, int cols, bool aligned,
                         bool positive) {
  using Lane = Columns<T, false>;
  constexpr int kUnits = kTile / Lane::kCount, kEach = kRows * kUnits / kThreads, kBatch = 2;
  static_assert(kEach * kThreads == kRows * kUnits && kEach % kBatch == 0);
  RP_NO_UNROLL
  for (int first = static_cast<int>(threadIdx.x); first < kRows * kUnits; first += kBatch * kThreads) {
    typename Lane::Raw raw[kBatch];
    RP_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int row = (first + b * kThreads) / kUnits, column = (first + b * kThreads) % kUnits * Lane::kCount;
      raw[b] = Lane::load(from + row * stride + column, row < rows ? cols - column : 0, aligned);
    }
    RP_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int row = (first + b * kThreads) / kUnits, column = (first + b * kThreads) % kUnits * Lane::kCount;
      float value[Lane::kCount];
      Lane::to_floats(raw[b], value);
      RP_UNROLL
      for (int e = 0; e < Lane::kCount; e += 4) {
        RP_UNROLL
        for (int c = e; c < e + 4; ++c) value[c] = positive ? relu(value[c]) : value[c];
        *reinterpret_cast<float4*>(to + row * kStride + column + e) =
            make_float4(value[e], value[e + 1], value[e + 2], value[e + 3]);
      }
    }
  }
}

// Σ D of a condition, for the eight runs of four numbers that at(i, left) names to a thread, the last ones of them
// missing where left < 4: put(i, sum, fresh), to be added to the earlier ones unless fresh.
constexpr int kRuns = kTile * kTile / 4 / kThreads;
template <class At, class Put>
RP_DEVICE void sum_d(const KernelParams& k, int64_t condition, const At& at, const Put& put) {
  const GramGradParams& p = k.p;
  const int64_t size = int64_t{p.width} * p.group_width;
  float sum[kRuns][4] = {};
  int chain = 0;
  bool fresh = true;
  const auto flush = [&] {
    RP_UNROLL
    for (int i = 0; i < kRuns; ++i) {
      put(i, sum[i], fresh);
      RP_UNROLL
      for (int e = 0; e < 4; ++e) sum[i][e] = 0.f;
    }
    fresh = false, chain = 0;
  };
  for_samples<kThreads>(p.inputs, p.index, condition, [&](int64_t sample) {
    RP_NO_UNROLL
    for (int64_t split = 0; split < p.splits; ++split) {
      const float* d = p.d + (split * p.inputs.count + sample) * size;
      float value[kRuns][4];
      RP_UNROLL
      for (int i = 0; i < kRuns; ++i) {
        int left;
        const int64_t from = at(i, left);
        load_floats(d + from, left, k.d_aligned, value[i]);
      }
      RP_UNROLL
      for (int i = 0; i < kRuns; ++i) {
        RP_UNROLL
        for (int e = 0; e < 4; ++e) sum[i][e] += value[i][e];
      }
      if (++chain == kChain) flush();
    }
  });
  flush();
}

// to [kTile, kTile] = rows i0 on, columns j0 on, of a group's D, with zeros around it.
RP_DEVICE void sum_tile(float* to, const KernelParams& k, int64_t condition, int group, int i0, int j0) {
  const int w = k.p.group_width, tid = static_cast<int>(threadIdx.x), row = tid / 16, column = tid % 16 * 4;
  constexpr int kStep = kThreads / 16;  // rows
  sum_d(
      k, condition,
      [&](int i, int& left) {
        const int at = i0 + row + i * kStep;
        left = at < w ? w - j0 - column : 0;
        return (int64_t{group} * w + at) * w + j0 + column;
      },
      [&](int i, const float (&sum)[4], bool fresh) {
        float4* const at = reinterpret_cast<float4*>(to + (row + i * kStep) * kStride + column);
        const float4 old = fresh ? make_float4(0.f, 0.f, 0.f, 0.f) : *at;
        *at = make_float4(old.x + sum[0], old.y + sum[1], old.z + sum[2], old.w + sum[3]);
      });
}

// Rows m on, columns from `column` of the bottleneck on, of dV; `tile` without the factor. By the whole block. A masked
// row of V may hold anything, which is nowhere but in the same row of the tile.
template <class T>
RP_DEVICE void store_tile(const GramGradParams& p, const float* tile, int64_t m, int64_t rows, int column, int cols,
                          float factor) {
  constexpr int kBatch = 4, kPairs = kTile / 2, kStep = kThreads / kPairs;  // rows
  const int in_tile = static_cast<int>(threadIdx.x) % kPairs * 2, left = cols - in_tile;
  if (left <= 0) return;
  RP_NO_UNROLL
  for (int first = static_cast<int>(threadIdx.x) / kPairs; first < kTile; first += kBatch * kStep) {
    float value[kBatch][2];
    RP_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int row = first + b * kStep;
      const int64_t at = (m + row) * p.rows_stride + column + in_tile;
      const bool counted = row < rows && (p.mask == nullptr || p.mask[m + row]);
      RP_UNROLL
      for (int e = 0; e < 2; ++e) {
        value[b][e] = p.dt != nullptr && row < rows && e < left ? p.dt[at + e] : 0.f;
        if (counted) value[b][e] += factor * tile[row * kStride + in_tile + e];
      }
    }
    RP_UNROLL
    for (int b = 0; b < kBatch; ++b) {
      const int row = first + b * kStep;
      if (row >= rows) continue;
      ZType<T>* const to = static_cast<ZType<T>*>(p.rows) + (m + row) * p.rows_stride + column + in_tile;
      store_pair(to, value[b][0], value[b][1], left);
    }
  }
}

RP_DEVICE float factor_of(const GramGradParams& p, const RowRange& tokens) {
  if (!p.scale_by_tokens) return 1.f;
  const int64_t valid = count_valid(p.mask, tokens);
  return 1.f / static_cast<float>(valid > 0 ? valid : 1);
}

constexpr float kNoBound = -std::numeric_limits<float>::infinity();

template <class T>
__global__ __launch_bounds__(kThreads, 2) void gram_matrix_kernel(const KernelParams k) {
  constexpr bool kTensor = !kIsFloat<T>;
  RP_DYNAMIC_SMEM(shared);
  float* const v = reinterpret_cast<float*>(shared);  // [kTile, kStride]
  float* const d = v + kTile * kStride;               // D[k, n]
  float* const mirror = d + kTile * kStride;          // D[n, k]
  const GramGradParams& p = k.p;
  const int w = p.group_width, groups = p.width / w, warp = static_cast<int>(threadIdx.x) / 32;
  const int row0 = warp % 2 * 32, column0 = warp / 2 * 32;  // the warp's part of the tile
  const int columns = static_cast<int>(k.column_tiles), n = static_cast<int>(blockIdx.x) % columns;
  const unsigned item = blockIdx.x / k.column_tiles / k.tiles;
  const int group = static_cast<int>(item) % groups;
  const int64_t condition = static_cast<int>(item) / groups;
  const RowRange tokens = rows_of(p.conditions, condition);
  const float factor = factor_of(p, tokens), least = p.relu ? 0.f : kNoBound;

  RP_NO_UNROLL
  for (int64_t m = tokens.begin + int64_t{blockIdx.x / k.column_tiles % k.tiles} * kTile; m < tokens.end;
       m += int64_t{k.tiles} * kTile) {
    float acc[2][4][4] = {}, mirrored[2][4][4] = {};
    RP_NO_UNROLL
    for (int i = 1; i <= columns; ++i) {
      const int step = (n + i) % columns, left = w - step * kTile;
      __syncthreads();  // the last step's have been read
      load_tile<kTile>(v, static_cast<const T*>(p.v) + m * p.v_stride + group * w + step * kTile, p.v_stride,
                       tokens.end - m, left, k.v_aligned, false);
      sum_tile(d, k, condition, group, step * kTile, n * kTile);
      if (step != n) sum_tile(mirror, k, condition, group, n * kTile, step * kTile);
      __syncthreads();
      const int depth = left < kTile ? (left + 7) / 8 * 8 : kTile;
      multiply<kTensor, false>(acc, v + row0 * kStride, kStride, d + column0, kStride, depth, least);
      multiply<kTensor, true>(mirrored, v + row0 * kStride, kStride, (step == n ? d : mirror) + column0 * kStride,
                              kStride, depth, kNoBound);
    }
    __syncthreads();
    RP_UNROLL
    for (int i = 0; i < 32; ++i) {
      const LanePlace at;
      const int row = row0 + i / 16 * 16 + i % 4 / 2 * 8 + at.g, column = column0 + i / 4 % 4 * 8 + 2 * at.q + i % 2;
      float& here = v[row * kStride + column];
      here = acc[i / 16][i / 4 % 4][i % 4] + (!p.relu || here > 0.f ? mirrored[i / 16][i / 4 % 4][i % 4] : 0.f);
    }
    __syncthreads();
    store_tile<T>(p, v, m, tokens.end - m, group * w + n * kTile, w - n * kTile, factor);
  }
}

template <class T, int kSlabs>
__global__ __launch_bounds__(kThreads, kSlabs > 1    ? 2
                                       : kIsFloat<T> ? 3
                                                     : 4) void gram_tokens_kernel(const KernelParams k) {
  constexpr bool kTensor = !kIsFloat<T>;
  RP_DYNAMIC_SMEM(shared);
  float* const v = reinterpret_cast<float*>(shared);     // [kTile, kStride]
  float* const t = v + kTile * kStride;                  // [kChunk, kStride], T⁽⁺⁾
  float* const g = t + kChunk * kStride;                 // [kChunk, kStride]
  float* const scores = g + kChunk * kStride;            // [kTile, kScoreStride] of V⁽⁺⁾ T⁽⁺⁾ᵀ
  float* const dscores = scores + kTile * kScoreStride;  // and of V Gᵀ
  const GramGradParams& p = k.p;
  const int w = p.group_width, groups = p.width / w, warp = static_cast<int>(threadIdx.x) / 32;
  const int row0 = warp % 2 * 32, column0 = warp / 2 * 32;
  const bool derives = warp / 2 == 1;  // it makes dP, and not P
  const unsigned item = blockIdx.x / k.tiles;
  const int group = static_cast<int>(item) % groups;
  const int64_t condition = static_cast<int>(item) / groups;
  const RowRange tokens = rows_of(p.conditions, condition);
  const float factor = factor_of(p, tokens), least = p.relu && !derives ? 0.f : kNoBound;
  const int last = (w - 1) / kTile;

  RP_NO_UNROLL
  for (int64_t m = tokens.begin + int64_t{blockIdx.x % k.tiles} * kTile; m < tokens.end;
       m += int64_t{k.tiles} * kTile) {
    float acc[kSlabs][2][4][4] = {};
    bool fresh = true;  // V is yet to be loaded, where all of it stays
    for_samples<kThreads>(p.inputs, p.index, condition, [&](int64_t sample) {
      const RowRange rows = rows_of(p.inputs, sample);
      RP_NO_UNROLL
      for (int64_t row = rows.begin; row < rows.end; row += kChunk) {
        const auto load = [&](int slab, bool with_v) {
          const int column = group * w + slab * kTile, left = w - slab * kTile;
          __syncthreads();  // the last slab has been read
          if (with_v) {
            load_tile<kTile>(v, static_cast<const T*>(p.v) + m * p.v_stride + column, p.v_stride, tokens.end - m, left,
                             k.v_aligned, false);
          }
          load_tile<kChunk>(t, static_cast<const T*>(p.t) + row * p.t_stride + column, p.t_stride, rows.end - row, left,
                            k.t_aligned, p.relu);
          load_tile<kChunk>(g, p.g + row * p.g_stride + column, p.g_stride, rows.end - row, left, k.g_aligned, false);
          __syncthreads();
        };
        float made[2][4][4] = {};
        RP_NO_UNROLL
        for (int slab = 0; slab <= last; ++slab) {
          load(slab, kSlabs > 1 || fresh);
          const int left = w - slab * kTile, depth = left < kTile ? (left + 7) / 8 * 8 : kTile;
          multiply<kTensor, true>(made, v + row0 * kStride, kStride, derives ? g : t, kStride, depth, least);
        }
        fresh = false;
        for_pairs(made, [&](int i, int j, const float* pair) {
          float* const to = (derives ? dscores : scores) + (row0 + i) * kScoreStride + j;
          *reinterpret_cast<float2*>(to) = make_float2(pair[0], pair[1]);
        });
        __syncthreads();
        const int depth = rows.end - row < kChunk ? static_cast<int>(rows.end - row + 7) / 8 * 8 : kChunk;
        RP_UNROLL
        for (int i = 0; i < kSlabs; ++i) {  // the last slab is still there
          const int slab = kSlabs - 1 - i;
          if (slab > last) continue;
          if (kSlabs > 1 && slab < last) load(slab, p.relu);
          float through[2][4][4] = {};
          multiply<kTensor, false>(through, dscores + row0 * kScoreStride, kScoreStride, t + column0, kStride, depth,
                                   kNoBound);
          if (p.relu) {
            for_pairs(through, [&](int y, int x, float* pair) {
              const float* here = v + (row0 + y) * kStride + column0 + x;
              pair[0] = here[0] > 0.f ? pair[0] : 0.f;
              pair[1] = here[1] > 0.f ? pair[1] : 0.f;
            });
          }
          RP_UNROLL
          for (int e = 0; e < 32; ++e) acc[slab][e / 16][e / 4 % 4][e % 4] += through[e / 16][e / 4 % 4][e % 4];
          multiply<kTensor, false>(acc[slab], scores + row0 * kScoreStride, kScoreStride, g + column0, kStride, depth,
                                   kNoBound);
        }
      }
    });
    RP_UNROLL
    for (int slab = 0; slab < kSlabs; ++slab) {
      if (slab > last) continue;
      __syncthreads();  // V, or the last slab of dV, has been read
      for_pairs(acc[slab], [&](int i, int j, const float* pair) {
        float* const to = v + (row0 + i) * kStride + column0 + j;
        *reinterpret_cast<float2*>(to) = make_float2(pair[0], pair[1]);
      });
      __syncthreads();
      store_tile<T>(p, v, m, tokens.end - m, group * w + slab * kTile, w - slab * kTile, factor);
    }
  }
}

__global__ __launch_bounds__(kThreads) void gram_state_kernel(const KernelParams k) {
  const int64_t size = int64_t{k.p.width} * k.p.group_width, condition = blockIdx.x / k.column_tiles;
  const int64_t first = int64_t{blockIdx.x % k.column_tiles} * kTile * kTile + 4 * threadIdx.x;
  sum_d(
      k, condition,
      [&](int i, int& left) {
        const int64_t at = first + i * 4 * kThreads;
        left = at < size ? static_cast<int>(size - at < 4 ? size - at : 4) : 0;
        return at;
      },
      [&](int i, const float (&sum)[4], bool fresh) {
        float* const to = k.p.dstate + condition * size + first + i * 4 * kThreads;
        RP_UNROLL
        for (int e = 0; e < 4; ++e) {
          if (first + i * 4 * kThreads + e < size) to[e] = fresh ? sum[e] : to[e] + sum[e];
        }
      });
}

template <class Pointer>
bool aligned(Pointer data, int64_t bytes) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && bytes % 16 == 0;
}

}  // namespace

cudaError_t gram_grad(const GramGradParams& params, cudaStream_t stream) {
  const int64_t w = params.group_width, conditions = params.conditions.count, tokens = params.conditions.rows;
  if (conditions == 0 || params.width == 0 || (params.dstate == nullptr && tokens == 0)) return cudaSuccess;
  const int64_t groups = params.width / w, size = element_size(params.dtype), floats = sizeof(float);
  const int64_t part = groups > 1 ? w : 0;  // where groups begin
  KernelParams k{params, 1, 1, false, false, false, false};
  k.v_aligned = aligned(params.v, params.v_stride * size) && part * size % 16 == 0;
  k.t_aligned = aligned(params.t, params.t_stride * size) && part * size % 16 == 0;
  k.g_aligned = aligned(params.g, params.g_stride * floats) && part * floats % 16 == 0;
  const dim3 block(kThreads);
  if (params.dstate != nullptr) {
    k.d_aligned = aligned(params.d, params.width * w * floats);
    k.column_tiles = static_cast<unsigned>(pieces(params.width * w, kTile * kTile));
    return launch<gram_state_kernel>(dim3(static_cast<unsigned>(conditions * k.column_tiles)), block, 0, stream, k);
  }
  k.d_aligned = aligned(params.d, w * floats);
  k.tiles = pieces_of(params.conditions, 1, kTile);
  const int64_t items = conditions * groups * k.tiles;
  return dispatch_float(params.dtype, [&]<class T>() {
    if (params.d != nullptr) {
      k.column_tiles = static_cast<unsigned>(pieces(w, kTile));
      const dim3 grid(static_cast<unsigned>(items * k.column_tiles));
      return launch<gram_matrix_kernel<T>>(grid, block, 3 * kTile * kStride * sizeof(float), stream, k);
    }
    const dim3 grid(static_cast<unsigned>(items));
    constexpr size_t kShared = ((kTile + 2 * kChunk) * kStride + 2 * kTile * kScoreStride) * sizeof(float);
    return w <= kTile ? launch<gram_tokens_kernel<T, 1>>(grid, block, kShared, stream, k)
                      : launch<gram_tokens_kernel<T, 4>>(grid, block, kShared, stream, k);
  });
}

}  // namespace routed_peft::cuda
