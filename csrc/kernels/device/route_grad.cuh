// G -> dT for 16 rows, and Z, G ∘ act' and the sums that the condition's gradient needs: what grad_output does with its
// accumulators, and route_grad where its products come from memory.
//
// Routes without a small matrix are written with two numbers a row and group, c and dc:
//             Z          dT               gradient of v
//   add       T + v      G                G
//   mul       T ∘ v      G ∘ v            G ∘ T
//   expand    c v        dc 1             c G              c = T 1,    dc = ⟨G, v⟩
//   ones      c 1        dc v             dc T             c = ⟨T, v⟩, dc = G 1
//   gram      c v        dc v             c G + dc T       c = ⟨T, v⟩, dc = ⟨G, v⟩
//   gram_relu c v        dc v⁺ ∘ [T > 0]  c G + dc T⁺ ∘ [v > 0]        with T⁺, v⁺
//   cross     c v        dc u + w         c G              c = ⟨T, u⟩, w = Σ dc_n T_n
// and the others with one product a row, as in the forward: dT = G Sᵀ, or (G Vᵀ) V, or G Cᵀ + V Dᵀ. The gradients of S
// and V are sums over a whole sample, and made from G in memory (gram.cu, grad_state.cu).
#pragma once

#include "kernels/device/route.cuh"
#include "kernels/device/vector.cuh"

namespace routed_peft::cuda {

// A team's shared memory meanwhile.
template <int kWidth, int kWarps>
struct RouteGradSpace {
  static constexpr int kShare = kWidth / kWarps;
  // As in RouteSpace. Four teams of two warps with 128 columns must do with 99 KiB.
  static constexpr int kSlab = kShare < 8 ? 8 : kShare > 32 ? kWarps == 2 ? 16 : 32 : kShare;
  static constexpr int kTokens = kShare > 32 ? 16 : 32;
  static constexpr int kStride = kWidth + 4, kSlabStride = kSlab + 4, kScoreStride = kTokens + 4;  // banks
  float t[kRouteRows * kStride];  // T, or T⁺; in the end of cross_gram V
  float g[kRouteRows * kStride];  // G, then G ∘ act'
  float slab[kWarps][kRouteRows * kSlabStride];
  float scores[kWarps][kRouteRows * kScoreStride];
  float c[kRouteRows][kMaxSlices], dc[kRouteRows][kMaxSlices];
  int64_t sample[kRouteRows], beside[kRouteRows];  // as RouteSpace's
  static constexpr int64_t kNone = -1, kLost = -2;
};

RP_DEVICE float activate_slope(float z, Activation activation) {
  switch (activation) {
    case Activation::kGelu:
      return 0.5f * (1.f + erff(z * 0.70710678118654752f)) + z * 0.39894228040143268f * expf(-0.5f * z * z);
    case Activation::kGeluTanh: {
      const float inner = tanhf(0.79788456080286536f * (z + 0.044715f * z * z * z));
      const float slope = 0.79788456080286536f * (1.f + 3.f * 0.044715f * z * z);
      return 0.5f * (1.f + inner) + 0.5f * z * (1.f - inner * inner) * slope;
    }
    case Activation::kRelu:
      return z > 0.f ? 1.f : 0.f;
    case Activation::kSilu: {
      const float s = 1.f / (1.f + expf(-z));
      return s * (1.f + z * (1.f - s));
    }
    case Activation::kNone:
      break;
  }
  return 1.f;
}

// Which product a slab is wanted of: Z's, dT's, and cross_gram's V Dᵀ and T D.
enum class GradProduct { kZ, kDt, kVd, kDv };

// space.slab of the warp = the product for columns n0 on, sample by sample and group by group, as route_product; `add`:
// it is added to what is there.
template <class T, class Space>
RP_DEVICE void grad_product(Space& space, int warp, const RouteGradParams& p, int n0, GradProduct what,
                            bool add = false) {
  constexpr bool kTensor = !kIsFloat<T>;
  constexpr int kTiles = Space::kSlab / 8;
  const LanePlace at;
  const RouteParams& route = p.route;
  float* const slab = space.slab[warp];
  float* const scores_at = space.scores[warp];
  const float* const left = what == GradProduct::kDt ? space.g : space.t;
  const bool relu_v = route.routing == Routing::kGramRelu;
  const int w = route.group_width, end = n0 + Space::kSlab < route.width ? n0 + Space::kSlab : route.width;
  RP_NO_UNROLL
  for (int i = 0; i < kRouteRows; ++i) {
    const int64_t sample = space.sample[i];
    if (i > 0 && sample == space.sample[i - 1]) continue;
    const int64_t condition = condition_of(route.index, route.conditions.count, sample);
    if (condition < 0) continue;  // its rows become NaN
    RP_NO_UNROLL
    for (int group = n0 / w; group * w < end; ++group) {
      float sum[kTiles][4] = {};
      if (!route.by_tokens) {
        const bool second = what == GradProduct::kVd || what == GradProduct::kDv;
        const float* m = (second ? p.second_sums : route.state) +
                         (route.routing == Routing::kCrossGram ? sample : condition) * route.state_stride;
        const bool transposed = what == GradProduct::kDt || what == GradProduct::kVd;
        // row k of a matrix of w columns is row k of the whole; transposed, column k of the group's is
        const SmallMatrix<> small =
            transposed ? SmallMatrix<>{m + (group * w) * w - group * w, 1, w, false} : SmallMatrix<>{m, w, 1, false};
        multiply_small<kTensor>(sum, left, Space::kStride, n0, small, Region{group * w, w, group * w, w});
      } else {
        const RowRange tokens = rows_of(route.conditions, condition);
        const bool z = what == GradProduct::kZ;
        const T* v = static_cast<const T*>(p.v) + tokens.begin * p.v_stride;
        RP_NO_UNROLL
        for (int rest = static_cast<int>(tokens.end - tokens.begin); rest > 0; rest -= Space::kTokens) {
          const int here = rest < Space::kTokens ? rest : Space::kTokens;
          float scores[Space::kTokens / 8][4] = {};
          multiply_small<kTensor>(scores, left, Space::kStride, 0, SmallMatrix<T>{v, 1, p.v_stride, relu_v && z},
                                  Region{group * w, w, 0, here});
          __syncwarp();  // the last step's have been read
          store_rows(scores_at, Space::kScoreStride, scores);
          __syncwarp();
          multiply_small<kTensor>(sum, scores_at, Space::kScoreStride, n0,
                                  SmallMatrix<T>{v + group * w, p.v_stride, 1, relu_v && !z},
                                  Region{0, here, group * w, w});
          v += Space::kTokens * p.v_stride;
        }
        if (route.scale_by_tokens) {
          const int64_t valid = count_valid(route.condition_mask, tokens);
          const float factor = 1.f / static_cast<float>(valid > 0 ? valid : 1);
          RP_UNROLL
          for (int j = 0; j < kTiles; ++j) {
            RP_UNROLL
            for (int e = 0; e < 4; ++e) sum[j][e] *= factor;
          }
        }
      }
      RP_UNROLL
      for (int j = 0; j < kTiles; ++j) {
        RP_UNROLL
        for (int e = 0; e < 4; ++e) {
          const int row = at.g + e / 2 * 8, column = 8 * j + 2 * at.q + e % 2;
          const bool mine = n0 + column >= group * w && n0 + column < group * w + w && space.sample[row] == sample;
          float& to = slab[row * Space::kSlabStride + column];
          if (mine) to = add ? to + sum[j][e] : sum[j][e];
        }
      }
    }
  }
  __syncwarp();
}

// What one row reads beside T: v (or V's row), and cross_gram's u. nullptr: nothing.
struct RowVectors {
  const float* v;
  const float* u;
};

template <class Space>
RP_DEVICE RowVectors vectors_of(const Space& space, const RouteParams& p, int row) {
  const int64_t beside = space.beside[row];
  return {beside >= 0 ? p.state + beside * p.state_stride : nullptr,
          p.sums != nullptr ? p.sums + space.sample[row] * p.state_stride : nullptr};
}

// c or dc of every row and group, by the team.
template <class Space, int kWarps>
RP_DEVICE void row_numbers(Space& space, const Team<kWarps>& team, const RouteParams& p, bool of_g) {
  const int lane = static_cast<int>(threadIdx.x) % 32, w = p.group_width;
  const Routing routing = p.routing;
  RP_NO_UNROLL
  for (int row = team.warp; row < kRouteRows; row += kWarps) {
    const RowVectors with = vectors_of(space, p, row);
    const float* from = (of_g ? space.g : space.t) + row * Space::kStride;
    const bool ones = of_g ? routing == Routing::kOnes : routing == Routing::kExpand;
    const float* factor = ones ? nullptr : !of_g && routing == Routing::kCrossGram ? with.u : with.v;
    const bool positive = !of_g && routing == Routing::kGramRelu;
    RP_NO_UNROLL
    for (int group = 0; group * w < p.width; ++group) {
      float sum = 0.f;
      for (int j = group * w + lane; j < group * w + w; j += 32) {
        const float f = ones ? 1.f : factor == nullptr ? nanf("") : factor[j];
        sum += from[j] * (positive ? relu(f) : f);
      }
      RP_UNROLL
      for (int step = 16; step > 0; step /= 2) sum += __shfl_xor_sync(~0u, sum, step);
      if (lane == 0) (of_g ? space.dc : space.c)[row][group] = sum;
    }
  }
  team.sync();
}

RP_DEVICE float vector_z(Routing routing, float t, float c, float v) {
  switch (routing) {
    case Routing::kNone:
      return t;
    case Routing::kAdd:
      return t + v;
    case Routing::kMul:
      return t * v;
    case Routing::kOnes:
      return c;
    default:
      return c * v;
  }
}

RP_DEVICE float vector_dt(Routing routing, float t, float g, float dc, float v, float u, float w) {
  switch (routing) {
    case Routing::kNone:
    case Routing::kAdd:
      return g;
    case Routing::kMul:
      return g * v;
    case Routing::kExpand:
      return dc;
    case Routing::kGramRelu:
      return t > 0.f ? dc * relu(v) : 0.f;
    case Routing::kCrossGram:
      return dc * u + w;
    default:
      return dc * v;
  }
}

RP_DEVICE float vector_dv(Routing routing, float t, float g, float c, float dc, float v) {
  switch (routing) {
    case Routing::kAdd:
      return g;
    case Routing::kMul:
      return g * t;
    case Routing::kOnes:
      return dc * t;
    case Routing::kGram:
      return c * g + dc * t;
    case Routing::kGramRelu:
      return c * g + (v > 0.f ? dc * t : 0.f);
    default:
      return c * g;
  }
}

// Columns of a slab, or of all of the width, two at a time: body(row, column, its place in the slab).
template <class Space, class Body>
RP_DEVICE void each_pair(int first, int step, int columns, int n0, int width, const Body& body) {
  RP_NO_UNROLL
  for (int i = first; i < kRouteRows * columns / 2; i += step) {
    const int row = i / (columns / 2), in_slab = i % (columns / 2) * 2;
    if (n0 + in_slab < width) body(row, n0 + in_slab, row * Space::kSlabStride + in_slab);
  }
}

// The sums over each sample's rows in the tile of value(row, column, v), with v [column] of the sample's condition,
// into the first of the rows.
template <class Space, int kWarps, class Value>
RP_DEVICE void tile_sums(const Space& space, const Team<kWarps>& team, int64_t first_row, const RouteGradParams& p,
                         float* to, const Value& value) {
  const int64_t after = p.route.rows - first_row;
  const int rows = after < kRouteRows ? static_cast<int>(after) : kRouteRows;
  RP_NO_UNROLL
  for (int begin = 0, end = 0; begin < rows; begin = end) {
    const int64_t sample = space.sample[begin], beside = space.beside[begin];
    for (end = begin + 1; end < rows && space.sample[end] == sample; ++end) {
    }
    const float* const v = beside >= 0 ? p.route.state + beside * p.route.state_stride : nullptr;
    RP_NO_UNROLL
    for (int column = team.thread; column < p.route.width; column += 32 * kWarps) {
      const float with = v != nullptr ? v[column] : 0.f;
      float sum = 0.f;
      for (int row = begin; row < end; ++row) sum += value(row, column, with);
      to[(first_row + begin) * p.stride + column] = sum;
    }
  }
}

// T of the tile's rows, zeros where there are none.
template <class T, class Space, int kWarps>
RP_DEVICE void load_t(Space& space, const Team<kWarps>& team, int64_t first_row, const RouteGradParams& p) {
  constexpr int kElements = 16 / sizeof(T), kThreads = 32 * kWarps, kPadded = Space::kStride - 4;
  constexpr int kChunks = kPadded / kElements, kLoads = (kRouteRows * kChunks + kThreads - 1) / kThreads;
  const T* const from = static_cast<const T*>(p.t);
  const int width = p.route.width;
  const bool positive = p.route.routing == Routing::kGramRelu;
  if (reinterpret_cast<uintptr_t>(from) % 16 == 0 && p.t_stride % kElements == 0 && width % kElements == 0) {
    Elements<T, kElements> loaded[kLoads];  // all of them under way at once
    RP_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int chunk = team.thread + i * kThreads, row = chunk / kChunks, column = chunk % kChunks * kElements;
      const bool there = row < kRouteRows && first_row + row < p.route.rows && column < width;
      loaded[i] =
          there ? load_vector<kElements>(from + (first_row + row) * p.t_stride + column) : Elements<T, kElements>{};
    }
    RP_UNROLL
    for (int i = 0; i < kLoads; ++i) {
      const int chunk = team.thread + i * kThreads, row = chunk / kChunks, column = chunk % kChunks * kElements;
      if (row >= kRouteRows) continue;
      RP_UNROLL
      for (int e = 0; e < kElements; e += 4) {
        float four[4];
        RP_UNROLL
        for (int k = 0; k < 4; ++k) {
          const float t = to_float(loaded[i].e[e + k]);
          four[k] = positive ? relu(t) : t;
        }
        *reinterpret_cast<float4*>(space.t + row * Space::kStride + column + e) =
            make_float4(four[0], four[1], four[2], four[3]);
      }
    }
    return;
  }
  each_pair<Space>(team.thread, kThreads, kPadded, 0, kPadded, [&](int row, int column, int) {
    float pair[2];
    RP_UNROLL
    for (int e = 0; e < 2; ++e) {
      const bool there = first_row + row < p.route.rows && column + e < width;
      const float t = there ? to_float(from[(first_row + row) * p.t_stride + column + e]) : 0.f;
      pair[e] = positive ? relu(t) : t;
    }
    *reinterpret_cast<float2*>(space.t + row * Space::kStride + column) = make_float2(pair[0], pair[1]);
  });
}

// From G in space.g on; `finished`: it is G ∘ act' already. All of the team's threads come along.
template <class T, class Space, int kWarps>
RP_DEVICE void route_grad_tile(Space& space, const Team<kWarps>& team, int64_t first_row, const RouteGradParams& p,
                               bool finished) {
  using Z = ZType<T>;
  const RouteParams& route = p.route;
  const Routing routing = route.routing;
  const int width = route.width, w = route.group_width, lane = static_cast<int>(threadIdx.x) % 32;
  constexpr int kThreads = 32 * kWarps, kPadded = Space::kStride - 4;
  const bool cross = routing == Routing::kCrossGram;
  // S, K, C or V by tokens; else two numbers a row
  const bool product = route.kind == StateKind::kMatrix || (cross && route.kind == StateKind::kTokens);
  const bool numbers = !product && routing != Routing::kNone && routing != Routing::kAdd && routing != Routing::kMul;
  const bool need_z = !finished && (p.z != nullptr || route.activation != Activation::kNone);

  load_t<T>(space, team, first_row, p);
  if (routing != Routing::kNone) {
    find_conditions(space, team, first_row, route, true);
  } else {
    if (team.thread < kRouteRows) space.beside[team.thread] = Space::kNone;
    team.sync();
  }
  const auto lost = [&](int row) { return space.beside[row] == Space::kLost; };
  const auto group_of = [&](int column) { return numbers ? column / w : 0; };
  if (numbers) row_numbers(space, team, route, false);

  const auto valid_input = [&](int64_t row) { return p.input_mask == nullptr || p.input_mask[row]; };
  const auto take_dt = [&](int row, int column, float dt0, float dt1) {
    if (first_row + row >= route.rows) return;
    const int64_t to = (first_row + row) * p.stride + column;
    if (lost(row)) dt0 = dt1 = nanf("");
    if (p.dt != nullptr) store_pair(static_cast<Z*>(p.dt) + to, dt0, dt1, width - column);
    if (p.dt_unrounded != nullptr) store_pair(p.dt_unrounded + to, dt0, dt1, width - column);
  };
  // the gradient of v, or of the tokens beside
  const auto dv_of = [&](int row, int column, float v) {
    const int at = row * Space::kStride + column, group = group_of(column);
    return vector_dv(routing, space.t[at], space.g[at], numbers ? space.c[row][group] : 0.f,
                     numbers ? space.dc[row][group] : 0.f, v);
  };
  const bool want_dt = p.dt != nullptr || p.dt_unrounded != nullptr;
  const auto vector_dt_of = [&](int row, int column, const RowVectors& with) {
    const int64_t at = first_row + row;
    const bool own = p.own_mask != nullptr && at < route.rows && p.own_mask[at];
    const float* const second = p.second_sums != nullptr && at < route.rows && valid_input(at)
                                    ? p.second_sums + space.sample[row] * route.state_stride
                                    : nullptr;
    float dt[2];
    RP_UNROLL
    for (int e = 0; e < 2; ++e) {
      const int j = column + e < width ? column + e : column, i = row * Space::kStride + j;
      dt[e] = vector_dt(routing, space.t[i], space.g[i], numbers ? space.dc[row][group_of(j)] : 0.f,
                        with.v != nullptr ? with.v[j] : 0.f, with.u != nullptr ? with.u[j] : 0.f,
                        second != nullptr ? second[j] : 0.f);
      if (own) dt[e] += dv_of(row, j, with.v != nullptr ? with.v[j] : 0.f);
    }
    take_dt(row, column, dt[0], dt[1]);
  };

  // Z, and G ∘ act'
  const auto take_z = [&](int row, int column, float z0, float z1) {
    const float z[2] = {z0, z1};
    float* const g = space.g + row * Space::kStride + column;
    float activated[2];
    RP_UNROLL
    for (int e = 0; e < 2; ++e) {
      const float value = lost(row) ? nanf("") : z[e];
      activated[e] = activate(value, route.activation);
      if (route.activation != Activation::kNone) g[e] *= activate_slope(value, route.activation);
    }
    if (p.z == nullptr || first_row + row >= route.rows) return;
    store_pair(static_cast<Z*>(p.z) + (first_row + row) * p.stride + column, activated[0], activated[1],
               width - column);
  };
  if (need_z && product) {
    RP_NO_UNROLL
    for (int n0 = team.warp * Space::kSlab; n0 < width; n0 += Space::kSlab * kWarps) {
      __syncwarp();  // the last slab has been read
      grad_product<T>(space, team.warp, p, n0, GradProduct::kZ);
      each_pair<Space>(lane, 32, Space::kSlab, n0, width, [&](int row, int column, int slab) {
        take_z(row, column, space.slab[team.warp][slab], space.slab[team.warp][slab + 1]);
      });
    }
  } else if (need_z) {
    each_pair<Space>(team.thread, kThreads, kPadded, 0, width, [&](int row, int column, int) {
      const RowVectors with = vectors_of(space, route, row);
      float z[2];
      RP_UNROLL
      for (int e = 0; e < 2; ++e) {
        const int j = column + e < width ? column + e : column;
        const float v = with.v != nullptr ? with.v[j] : 0.f;
        z[e] = vector_z(routing, space.t[row * Space::kStride + j], numbers ? space.c[row][group_of(j)] : 0.f, v);
      }
      take_z(row, column, z[0], z[1]);
      if (want_dt && !numbers) vector_dt_of(row, column, with);  // G is this thread's own
    });
  }
  if (need_z) team.sync();
  if (p.g != nullptr && !finished) {
    each_pair<Space>(team.thread, kThreads, kPadded, 0, width, [&](int row, int column, int) {
      if (first_row + row >= route.rows) return;
      const float* g = space.g + row * Space::kStride + column;
      store_pair(p.g + (first_row + row) * p.stride + column, g[0], g[1], width - column);
    });
  }
  if (numbers && (want_dt || p.dstate != nullptr || p.second != nullptr)) {
    row_numbers(space, team, route, true);
  }

  const bool vector = route.kind == StateKind::kVector;
  if (p.dstate != nullptr && vector) tile_sums(space, team, first_row, p, p.dstate, dv_of);
  if (p.second != nullptr) {
    tile_sums(space, team, first_row, p, p.second, [&](int row, int column, float) {
      return space.dc[row][group_of(column)] * space.t[row * Space::kStride + column];
    });
  }
  const bool tokens = route.kind == StateKind::kTokens && p.dstate != nullptr;
  if (tokens && !product) {
    each_pair<Space>(team.thread, kThreads, kPadded, 0, width, [&](int row, int column, int) {
      if (first_row + row >= route.rows) return;
      const float* const v = vectors_of(space, route, row).v;
      const auto of = [&](int j) { return j < width ? dv_of(row, j, v != nullptr ? v[j] : 0.f) : 0.f; };
      const float first = of(column), second = of(column + 1);
      store_pair(p.dstate + (first_row + row) * p.stride + column, first, second, width - column);
    });
  }
  if (!want_dt && !(tokens && product)) return;

  if (!product) {
    if (need_z && !numbers) return;  // done with Z
    each_pair<Space>(team.thread, kThreads, kPadded, 0, width,
                     [&](int row, int column, int) { vector_dt_of(row, column, vectors_of(space, route, row)); });
    return;
  }
  // Of cross_gram on tokens there are two more products: V's own gradient T D, while T is here, and then V Dᵀ.
  if (cross && tokens) {
    RP_NO_UNROLL
    for (int n0 = team.warp * Space::kSlab; n0 < width; n0 += Space::kSlab * kWarps) {
      __syncwarp();
      grad_product<T>(space, team.warp, p, n0, GradProduct::kDv);
      each_pair<Space>(lane, 32, Space::kSlab, n0, width, [&](int row, int column, int slab) {
        const int64_t at = first_row + row;
        if (at >= route.rows) return;
        const bool valid = valid_input(at) && (p.own_mask == nullptr || p.own_mask[at]);
        float first = valid ? space.slab[team.warp][slab] : 0.f;
        float second = valid ? space.slab[team.warp][slab + 1] : 0.f;
        if (lost(row)) first = second = nanf("");
        store_pair(p.dstate + at * p.stride + column, first, second, width - column);
      });
    }
    team.sync();
  }
  if (!want_dt) return;
  if (cross) {
    each_pair<Space>(team.thread, kThreads, kPadded, 0, kPadded, [&](int row, int column, int) {
      const int64_t at = first_row + row, beside = space.beside[row];
      const bool valid = at < route.rows && beside >= 0 && valid_input(at);
      RP_UNROLL
      for (int e = 0; e < 2; ++e) {
        space.t[row * Space::kStride + column + e] =
            valid && column + e < width ? p.v_rows[beside * p.v_rows_stride + column + e] : 0.f;
      }
    });
    team.sync();
  }
  RP_NO_UNROLL
  for (int n0 = team.warp * Space::kSlab; n0 < width; n0 += Space::kSlab * kWarps) {
    __syncwarp();
    grad_product<T>(space, team.warp, p, n0, GradProduct::kDt);
    if (cross) {
      __syncwarp();
      grad_product<T>(space, team.warp, p, n0, GradProduct::kVd, true);
    }
    each_pair<Space>(lane, 32, Space::kSlab, n0, width, [&](int row, int column, int slab) {
      if (first_row + row >= route.rows) return;
      float dt[2] = {space.slab[team.warp][slab], space.slab[team.warp][slab + 1]};
      RP_UNROLL
      for (int e = 0; e < 2; ++e) {
        if (routing == Routing::kGramRelu && !(space.t[row * Space::kStride + column + e] > 0.f)) dt[e] = 0.f;
        // this thread has stored it above
        if (p.own_mask != nullptr && column + e < width) dt[e] += p.dstate[(first_row + row) * p.stride + column + e];
      }
      take_dt(row, column, dt[0], dt[1]);
    });
  }
}

}  // namespace routed_peft::cuda
