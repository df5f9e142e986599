// T -> Z for 16 rows: what down_route does with its accumulators, and route where its products come from memory.
//
// Every route is Z = f(T) M ∘ v with an optional f (relu), an optional small matrix M and an optional row v:
//   add T + v     mul T ∘ v     expand (T 1) ∘ v     ones T u     gram T S, or (T v) ∘ v for one token
//   gram_relu T⁺ K, or (T⁺ v⁺) ∘ v     cross_gram T K, or (T u) ∘ v
// and T (VᵀV) may be taken as (T Vᵀ) V, some condition tokens at a time, where N and M are small against R. M is read
// from device memory straight into the fragments: 16 rows of one sample use all of it once, and it stays in L1 for the
// other warps. The rows may belong to several samples; each has its own M, so the product is made for each of
// them and its own rows are kept.
//
// T lies in shared memory meanwhile. In registers it would have to be unrolled, and an unrolled route is some thousand
// activations and loads to compile for what is a small part of the time; and T and Z leave in whole rows this way.
#pragma once

#include <type_traits>

#include "kernels/device/product.cuh"
#include "kernels/device/rows.cuh"
#include "kernels/launch.h"

namespace routed_peft::cuda {

// What Z is kept in between the two products. It may exceed float16.
template <class T>
using ZType = std::conditional_t<std::is_same_v<T, bfloat16>, bfloat16, float>;

constexpr int kRouteRows = 16;

// The warps that route 16 rows together, by the block's number of their barrier.
template <int kWarps>
struct Team {
  int barrier, warp, thread;
  RP_DEVICE void sync() const {
    if constexpr (kWarps == 1) {
      __syncwarp();
    } else {
      named_barrier(barrier, 32 * kWarps);
    }
  }
};

// A team's shared memory while it routes.
template <int kWidth, int kWarps>
struct RouteSpace {
  // Columns of Z of one product, and condition tokens of one step of (T Vᵀ) V. Four teams of two warps with 256 columns
  // must do with 99 KiB.
  static constexpr int kShare = kWidth / kWarps;
  static constexpr int kSlab = kShare < 8 ? 8 : kShare > 64 ? 32 : kShare, kTokens = kShare > 64 ? 16 : 32;
  static constexpr int kStride = kWidth + 4, kSlabStride = kSlab + 4, kScoreStride = kTokens + 4;  // banks
  float t[kRouteRows * kStride];
  float slab[kWarps][kRouteRows * kSlabStride];  // of Z
  float scores[kWarps][kRouteRows * kScoreStride];
  int64_t sample[kRouteRows];
  int64_t beside[kRouteRows];  // the row of v or V that stands beside a row of T; kNone, or kLost: there should be one
  static constexpr int64_t kNone = -1, kLost = -2;
};

// Two neighbouring elements, or the `left` < 2 of them that are there.
template <class T>
RP_DEVICE void store_pair(T* to, float first, float second, int left) {
  if (left >= 2 && reinterpret_cast<uintptr_t>(to) % (2 * sizeof(T)) == 0) {
    if constexpr (kIsFloat<T>) {
      *reinterpret_cast<float2*>(to) = make_float2(first, second);
    } else {
      *reinterpret_cast<uint32_t*>(to) = pack2<T>(first, second);
    }
    return;
  }
  if (left >= 1) to[0] = from_float<T>(first);
  if (left >= 2) to[1] = from_float<T>(second);
}

RP_DEVICE float activate(float z, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5f * z * (1.f + erff(z * 0.70710678118654752f));
    case Activation::kGeluTanh:
      return 0.5f * z * (1.f + tanhf(0.79788456080286536f * (z + 0.044715f * z * z * z)));
    case Activation::kRelu:
      return relu(z);
    case Activation::kSilu:
      return z / (1.f + expf(-z));
    case Activation::kNone:
      break;
  }
  return z;
}

// How many of the rows the mask holds true, by the whole warp.
RP_DEVICE int64_t count_valid(const bool* mask, const RowRange& rows) {
  if (mask == nullptr) return rows.end - rows.begin;
  int count = 0;
  for (int64_t i = rows.begin + threadIdx.x % 32; i < rows.end; i += 32) count += mask[i];
  RP_UNROLL
  for (int step = 16; step > 0; step /= 2) count += __shfl_xor_sync(~0u, count, step);
  return count;
}

// Raw products in space.t -> T: dropout's scale, bias, mask, rounding; and stores it where it is wanted.
template <class T, int kWidth, int kWarps>
RP_DEVICE void finish_t(RouteSpace<kWidth, kWarps>& space, const Team<kWarps>& team, int64_t first_row,
                        const RouteParams& p) {
  RP_NO_UNROLL
  for (int i = team.thread; i < kRouteRows * kWidth / 2; i += 32 * kWarps) {
    const int in_warp = i / (kWidth / 2), column = i % (kWidth / 2) * 2, left = p.width - column;
    const int64_t row = first_row + in_warp;
    const bool inside = row < p.rows, masked = inside && p.row_mask != nullptr && !p.row_mask[row];
    float* const pair = space.t + in_warp * space.kStride + column;
    float t[2], token[2];
    RP_UNROLL
    for (int e = 0; e < 2; ++e) {
      float value = p.keep_scale * pair[e];
      if (p.bias.data != nullptr && e < left) {
        value += load_as_float(p.bias.data, p.bias.dtype, (column + e) * p.bias.col_stride);
      }
      t[e] = masked || e >= left ? 0.f : to_float(from_float<T>(value));
      pair[e] = t[e];
      token[e] = p.tokens_unrounded && !masked && e < left ? value : t[e];
    }
    if (!inside) continue;
    if (p.t != nullptr) store_pair(static_cast<T*>(p.t) + row * p.t_stride + column, t[0], t[1], left);
    RP_UNROLL
    for (int e = 0; e < 2; ++e) {
      if (p.tokens[e] == nullptr) continue;
      const bool zero = p.token_mask[e] != nullptr && !p.token_mask[e][row];
      store_pair(p.tokens[e] + row * p.tokens_stride + column, zero ? 0.f : token[0], zero ? 0.f : token[1], left);
    }
  }
  team.sync();
}

// Sample and row of v of each of the rows; `pairs`: each token of a state of tokens stands beside one row.
template <class Space, int kWarps>
RP_DEVICE void find_conditions(Space& space, const Team<kWarps>& team, int64_t first_row, const RouteParams& p,
                               bool pairs) {
  const int i = team.thread;
  if (i < kRouteRows) {
    const int64_t row = first_row + i < p.rows ? first_row + i : p.rows - 1;
    const int64_t sample = sample_of(p.inputs, row), condition = condition_of(p.index, p.conditions.count, sample);
    int64_t beside = space.kNone;
    if (condition < 0) {
      beside = space.kLost;
    } else if (p.kind == StateKind::kVector) {
      beside = condition;
    } else if (p.kind == StateKind::kTokens && pairs) {
      const RowRange tokens = rows_of(p.conditions, condition);
      beside = tokens.begin + row - rows_of(p.inputs, sample).begin;
      if (beside < tokens.begin || beside >= tokens.end) beside = space.kLost;
    }
    space.sample[i] = sample;
    space.beside[i] = beside;
  }
  team.sync();
}

static __device__ const float kOne = 1.f;

// What a sample's rows are multiplied with.
RP_DEVICE SmallMatrix<> matrix_of(const RouteParams& p, int64_t sample, int64_t condition) {
  if (p.routing == Routing::kExpand) return {&kOne, 0, 0, false};
  if (p.routing == Routing::kCrossGram && p.sums != nullptr) return {p.sums + sample * p.state_stride, 1, 0, false};
  const float* state = p.state + (p.routing == Routing::kCrossGram ? sample : condition) * p.state_stride;
  if (p.kind == StateKind::kVector) return {state, 1, 0, p.routing == Routing::kGramRelu};
  return {state, p.group_width, 1, false};
}

// space.slab of the warp = f(T) M for columns n0 on, sample by sample and group by group: what one holds, were it NaN,
// is no other one's.
template <class T, int kWidth, int kWarps>
RP_DEVICE void route_product(RouteSpace<kWidth, kWarps>& space, int warp, const RouteParams& p, int n0) {
  using Space = RouteSpace<kWidth, kWarps>;
  constexpr bool kTensor = !kIsFloat<T>;
  constexpr int kTiles = Space::kSlab / 8;
  const LanePlace at;
  float* const slab = space.slab[warp];
  float* const scores_at = space.scores[warp];
  const int w = p.group_width, end = n0 + Space::kSlab < p.width ? n0 + Space::kSlab : p.width;
  RP_NO_UNROLL
  for (int i = 0; i < kRouteRows; ++i) {
    const int64_t sample = space.sample[i];
    if (i > 0 && sample == space.sample[i - 1]) continue;
    const int64_t condition = condition_of(p.index, p.conditions.count, sample);
    if (condition < 0) continue;  // its rows become NaN
    RP_NO_UNROLL
    for (int group = n0 / w; group * w < end; ++group) {
      float z[kTiles][4] = {};
      if (!p.by_tokens) {
        multiply_small<kTensor>(z, space.t, Space::kStride, n0, matrix_of(p, sample, condition),
                                Region{group * w, w, group * w, w});
      } else {
        const RowRange tokens = rows_of(p.conditions, condition);
        const bool positive = p.routing == Routing::kGramRelu;
        const float* v = p.state + tokens.begin * p.state_stride;
        RP_NO_UNROLL
        for (int left = static_cast<int>(tokens.end - tokens.begin); left > 0; left -= Space::kTokens) {
          const int here = left < Space::kTokens ? left : Space::kTokens;
          float scores[Space::kTokens / 8][4] = {};
          // the condition's tokens are the columns of the first product and the rows of the second
          multiply_small<kTensor>(scores, space.t, Space::kStride, 0, SmallMatrix<>{v, 1, p.state_stride, positive},
                                  Region{group * w, w, 0, here});
          __syncwarp();  // the last step's have been read
          store_rows(scores_at, Space::kScoreStride, scores);
          __syncwarp();
          multiply_small<kTensor>(z, scores_at, Space::kScoreStride, n0,
                                  SmallMatrix<>{v + group * w, p.state_stride, 1, false},
                                  Region{0, here, group * w, w});
          v += Space::kTokens * p.state_stride;
        }
        if (p.scale_by_tokens) {
          const int64_t valid = count_valid(p.condition_mask, tokens);
          const float factor = 1.f / static_cast<float>(valid > 0 ? valid : 1);
          RP_UNROLL
          for (int j = 0; j < kTiles; ++j) {
            RP_UNROLL
            for (int e = 0; e < 4; ++e) z[j][e] *= factor;
          }
        }
      }
      RP_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        RP_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int row = at.g + e / 2 * 8, column = 8 * j + 2 * at.q + e % 2;
          const bool mine = n0 + column >= group * w && n0 + column < group * w + w && space.sample[row] == sample;
          if (mine) slab[row * Space::kSlabStride + column] = z[j][e];
        }
      }
    }
  }
  __syncwarp();
}

// Raw products in space.t -> Z: emit(row, column, z0, z1) for each pair of columns. All of the team's threads come
// along.
template <class T, int kWidth, int kWarps, class Emit>
RP_DEVICE void route_tile(RouteSpace<kWidth, kWarps>& space, const Team<kWarps>& team, int64_t first_row,
                          const RouteParams& p, const Emit& emit) {
  using Space = RouteSpace<kWidth, kWarps>;
  finish_t<T>(space, team, first_row, p);
  const Routing routing = p.routing;
  const bool elementwise = routing == Routing::kNone || routing == Routing::kAdd || routing == Routing::kMul;
  const bool times_v = routing == Routing::kMul || routing == Routing::kExpand ||
                       (!elementwise && p.kind == StateKind::kVector && routing != Routing::kOnes);
  if (routing != Routing::kNone) find_conditions(space, team, first_row, p, routing != Routing::kCrossGram);
  if (routing == Routing::kGramRelu) {
    for (int i = team.thread; i < kRouteRows * kWidth; i += 32 * kWarps) {
      float& t = space.t[i / kWidth * Space::kStride + i % kWidth];
      t = relu(t);
    }
    team.sync();
  }
  RP_NO_UNROLL
  for (int n0 = team.warp * Space::kSlab; n0 < p.width; n0 += Space::kSlab * kWarps) {
    if (!elementwise) {
      __syncwarp();  // the last slab has been read
      route_product<T>(space, team.warp, p, n0);
    }
    RP_NO_UNROLL
    for (int i = threadIdx.x % 32; i < kRouteRows * Space::kSlab / 2; i += 32) {
      const int row = i / (Space::kSlab / 2), in_slab = i % (Space::kSlab / 2) * 2, column = n0 + in_slab;
      const float* from = elementwise ? space.t + row * Space::kStride + column
                                      : space.slab[team.warp] + row * Space::kSlabStride + in_slab;
      const int64_t beside = routing == Routing::kNone ? Space::kNone : space.beside[row];
      const float* v = beside >= 0 ? p.state + beside * p.state_stride + column : nullptr;
      float z[2];
      RP_UNROLL
      for (int e = 0; e < 2; ++e) {
        const bool inside = column + e < p.width;
        z[e] = inside ? from[e] : 0.f;
        if (!inside) continue;
        if (v != nullptr && times_v) z[e] *= v[e];
        if (v != nullptr && routing == Routing::kAdd) z[e] += v[e];
        z[e] = beside == Space::kLost ? nanf("") : activate(z[e], p.activation);
      }
      if (column < p.width) emit(row, column, z[0], z[1]);
    }
  }
}

// Z of one row, two columns, to memory as DownRouteParams::z says.
template <class T>
RP_DEVICE void store_z(const DownRouteParams& p, int64_t row, int column, float z0, float z1) {
  using Z = ZType<T>;
  if (row >= p.route.rows) return;
  const int slice = column / p.rank, in_slice = column % p.rank, gap = p.padded_rank - p.rank;
  Z* to = static_cast<Z*>(p.z) + row * p.z_stride + slice * p.padded_rank + in_slice;
  if (in_slice + 1 < p.rank) {
    store_pair(to, z0, z1, p.route.width - column);
  } else {  // the pair's second column is another slice's first
    to[0] = from_float<Z>(z0);
    if (column + 1 < p.route.width) to[1 + gap] = from_float<Z>(z1);
  }
}

// The columns between a slice's rank and its padding, which the products of up_project read.
template <class T, int kWarps>
RP_DEVICE void store_z_padding(const DownRouteParams& p, const Team<kWarps>& team, int64_t first_row) {
  using Z = ZType<T>;
  const int gap = p.padded_rank - p.rank, slices = p.route.width / p.rank;
  for (int i = team.thread; i < kRouteRows * slices * gap; i += 32 * kWarps) {
    const int64_t row = first_row + i / (slices * gap);
    const int slice = i / gap % slices;
    Z* const z = static_cast<Z*>(p.z) + row * p.z_stride + slice * p.padded_rank + p.rank + i % gap;
    if (row < p.route.rows) *z = from_float<Z>(0.f);
  }
}

}  // namespace routed_peft::cuda
