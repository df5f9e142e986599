// Products of a warp's 16 rows, all with the fragment layout of mma.m16n8k16's accumulator: with g = lane / 4 and
// q = lane % 4, tile j holds columns 8j + 2q and 8j + 2q + 1 of row g in [0], [1] and of row g + 8 in [2], [3].
//
// bfloat16 and float16 go to the tensor cores. float32 stays in full precision on the ordinary units with that same
// layout, so that everything behind a product is written once; its sums run in chains of at most 64, as on the CPU,
// because one chain over all of d rounds more than a library's product does.
#pragma once

#include "kernels/device/arch.cuh"
#include "kernels/device/numeric.cuh"

namespace routed_peft::cuda {

template <class T>
constexpr bool kIsFloat = false;
template <>
constexpr bool kIsFloat<float> = true;

struct LanePlace {
  int lane, g, q;
  RP_DEVICE LanePlace() : lane(static_cast<int>(threadIdx.x) % 32), g(lane / 4), q(lane % 4) {}
};

// acc [16, 8 kTiles] += X [16, depth] Wᵀ with W [8 kTiles, depth], of a 16-bit T, from shared memory, rows x_stride and
// w_stride elements apart; keep(k16, a) may blank dropped elements of a fragment.
template <class T, int kTiles, int kDepth, class Keep>
RP_DEVICE void multiply_tensor(float (&acc)[kTiles][4], const T* x, int x_stride, const T* w, int w_stride,
                               const Keep& keep) {
  const LanePlace at;
  RP_UNROLL
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[4];
    ldmatrix_x4(a, x + (at.lane % 16) * x_stride + k + at.lane / 16 * 8);
    keep(k / 16, a);
    RP_UNROLL
    for (int j = 0; j < kTiles; j += 2) {
      uint32_t b[4];
      ldmatrix_x4(b, w + (8 * j + at.lane / 16 * 8 + at.lane % 8) * w_stride + k + at.lane / 8 % 2 * 8);
      mma_16x8x16<T>(acc[j], a, b[0], b[1]);
      mma_16x8x16<T>(acc[j + 1], a, b[2], b[3]);
    }
  }
}

RP_DEVICE float dot4(float4 a, float4 b, float sum) {
  return a.w * b.w + (a.z * b.z + (a.y * b.y + (a.x * b.x + sum)));
}

// The same for float32; depth at most 64, strides multiples of 4.
template <int kTiles>
RP_DEVICE void multiply_float(float (&acc)[kTiles][4], const float* x, int x_stride, const float* w, int w_stride,
                              int depth) {
  constexpr int kStep = kTiles < 4 ? kTiles : kTiles < 32 ? 4 : 2;  // tiles that share what is read of x
  const LanePlace at;
  RP_UNROLL
  for (int j = 0; j < kTiles; j += kStep) {
    float sum[kStep][4] = {};
    RP_NO_UNROLL
    for (int k = 0; k < depth; k += 4) {
      const float4 x0 = *reinterpret_cast<const float4*>(x + at.g * x_stride + k);
      const float4 x1 = *reinterpret_cast<const float4*>(x + (at.g + 8) * x_stride + k);
      RP_UNROLL
      for (int i = 0; i < kStep; ++i) {
        const float* row = w + (8 * (j + i) + 2 * at.q) * w_stride + k;
        const float4 w0 = *reinterpret_cast<const float4*>(row);
        const float4 w1 = *reinterpret_cast<const float4*>(row + w_stride);
        sum[i][0] = dot4(x0, w0, sum[i][0]);
        sum[i][1] = dot4(x0, w1, sum[i][1]);
        sum[i][2] = dot4(x1, w0, sum[i][2]);
        sum[i][3] = dot4(x1, w1, sum[i][3]);
      }
    }
    RP_UNROLL
    for (int i = 0; i < kStep; ++i) {
      RP_UNROLL
      for (int e = 0; e < 4; ++e) acc[j + i][e] += sum[i][e];
    }
  }
}

// acc [16, 8 kTiles] += X [16, kDepth] W with W [kDepth, 8 kTiles], its rows w_stride apart, for the tiles of columns
// from `first` to `last`, which the columns of W that are not zero lie in.
template <class T, int kTiles, int kDepth>
RP_DEVICE void multiply_tensor_by_rows(float (&acc)[kTiles][4], const T* x, int x_stride, const T* w, int w_stride,
                                       int first, int last) {
  const LanePlace at;
  RP_UNROLL
  for (int k = 0; k < kDepth; k += 16) {
    uint32_t a[4];
    ldmatrix_x4(a, x + (at.lane % 16) * x_stride + k + at.lane / 16 * 8);
    RP_UNROLL
    for (int j = 0; j < kTiles; j += 2) {
      if (j + 1 < first || j > last) continue;  // the same for the whole warp
      uint32_t b[4];
      ldmatrix_x4_trans(b, w + (k + at.lane % 16) * w_stride + 8 * j + at.lane / 16 * 8);
      if (j >= first) mma_16x8x16<T>(acc[j], a, b[0], b[1]);
      if (j + 1 <= last) mma_16x8x16<T>(acc[j + 1], a, b[2], b[3]);
    }
  }
}

// The same for float32, at most 64 deep.
template <int kTiles>
RP_DEVICE void multiply_float_by_rows(float (&acc)[kTiles][4], const float* x, int x_stride, const float* w,
                                      int w_stride, int depth, int first, int last) {
  constexpr int kStep = kTiles < 4 ? kTiles : 4;
  const LanePlace at;
  RP_UNROLL
  for (int j = 0; j < kTiles; j += kStep) {
    if (j + kStep - 1 < first || j > last) continue;
    float sum[kStep][4] = {};
    RP_NO_UNROLL
    for (int k = 0; k < depth; k += 4) {
      const float4 x0 = *reinterpret_cast<const float4*>(x + at.g * x_stride + k);
      const float4 x1 = *reinterpret_cast<const float4*>(x + (at.g + 8) * x_stride + k);
      const float low[4] = {x0.x, x0.y, x0.z, x0.w}, high[4] = {x1.x, x1.y, x1.z, x1.w};
      RP_UNROLL
      for (int e = 0; e < 4; ++e) {
        RP_UNROLL
        for (int i = 0; i < kStep; ++i) {
          const float2 pair = *reinterpret_cast<const float2*>(w + (k + e) * w_stride + 8 * (j + i) + 2 * at.q);
          sum[i][0] += low[e] * pair.x;
          sum[i][1] += low[e] * pair.y;
          sum[i][2] += high[e] * pair.x;
          sum[i][3] += high[e] * pair.y;
        }
      }
    }
    RP_UNROLL
    for (int i = 0; i < kStep; ++i) {
      if (j + i < first || j + i > last) continue;
      RP_UNROLL
      for (int e = 0; e < 4; ++e) acc[j + i][e] += sum[i][e];
    }
  }
}

// acc += X Wᵀ by TF32, from float32 in shared memory.
template <int kTiles>
RP_DEVICE void multiply_tf32(float (&acc)[kTiles][4], const float* x, int x_stride, const float* w, int w_stride,
                             int depth) {
  const LanePlace at;
  for (int k = 0; k < depth; k += 8) {
    const float* row = x + at.g * x_stride + k + at.q;
    const uint32_t a[4] = {to_tf32(row[0]), to_tf32(row[8 * x_stride]), to_tf32(row[4]),
                           to_tf32(row[8 * x_stride + 4])};
    RP_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      const float* column = w + (8 * j + at.g) * w_stride + k + at.q;
      mma_tf32_16x8x8(acc[j], a, to_tf32(column[0]), to_tf32(column[4]));
    }
  }
}

RP_DEVICE float relu(float value) { return value < 0.f ? 0.f : value; }  // NaN stays

// A small matrix M in device memory that fragments are multiplied with: element (k, n) is data[k stride_k + n
// stride_n], and data[0] some number that is there. It is a state of one condition, or 32 rows of V: its numbers can be
// counted by ints, of which a warp needs half as many registers.
template <class T = float>
struct SmallMatrix {
  const T* data;
  int stride_k, stride_n;
  bool positive;  // relu of its elements

  RP_DEVICE SmallMatrix(const T* at, int64_t k, int64_t n, bool relu)
      : data(at), stride_k(static_cast<int>(k)), stride_n(static_cast<int>(n)), positive(relu) {}

  // Zero where not `inside`. Always a load, for in a branch each would be waited for by itself.
  RP_DEVICE float at(int k, int n, bool inside) const {
    const float value = to_float(data[inside ? k * stride_k + n * stride_n : 0]);
    return inside ? positive ? relu(value) : value : 0.f;
  }
};

// The rows and columns of the whole product that M stands for: [row, row + rows) and [column, column + columns). Row k
// of M's data is row k of the whole; its columns are counted from `column`.
struct Region {
  int row, rows, column, columns;
};

// z [16, 8 kOut] += t M for the whole's columns n0 on; t [16, ...] lies in shared memory, float32, rows `stride` apart,
// with a multiple of 8 columns. Columns outside of the region get nothing of use.
//
// k is a loop that is not unrolled over all of the width, because the code of one step is all there is to M's edges. On
// the tensor cores (TF32) or, for full precision, on the ordinary units.
template <bool kTensor, int kOut, class Small>
RP_DEVICE void multiply_small(float (&z)[kOut][4], const float* t, int stride, int n0, const Small& m,
                              const Region& region) {
  const LanePlace at;
  constexpr int kColumns = kTensor ? 1 : 2;  // of M that a lane needs of every tile
  const auto element = [&](int k, int j, int e) {
    const int n = n0 + 8 * j + (kTensor ? at.g : 2 * at.q + e) - region.column;
    const bool inside = static_cast<unsigned>(k - region.row) < static_cast<unsigned>(region.rows) &&
                        static_cast<unsigned>(n) < static_cast<unsigned>(region.columns);
    return m.at(k, n, inside);
  };
  RP_NO_UNROLL
  for (int k0 = region.row / 8 * 8; k0 < region.row + region.rows; k0 += 8) {
    if constexpr (kTensor) {
      const float* row = t + at.g * stride + k0 + at.q;
      // rows of M outside of the region are zero, but t may hold anything there
      const bool here[2] = {static_cast<unsigned>(k0 + at.q - region.row) < static_cast<unsigned>(region.rows),
                            static_cast<unsigned>(k0 + at.q + 4 - region.row) < static_cast<unsigned>(region.rows)};
      const uint32_t a[4] = {here[0] ? to_tf32(row[0]) : 0u, here[0] ? to_tf32(row[8 * stride]) : 0u,
                             here[1] ? to_tf32(row[4]) : 0u, here[1] ? to_tf32(row[8 * stride + 4]) : 0u};
      constexpr int kStep = kOut < 4 ? kOut : 4;  // tiles whose loads are in flight together
      RP_UNROLL
      for (int j0 = 0; j0 < kOut; j0 += kStep) {
        float column[kStep][2];
        RP_UNROLL
        for (int j = 0; j < kStep; ++j) {
          column[j][0] = element(k0 + at.q, j0 + j, 0);
          column[j][1] = element(k0 + at.q + 4, j0 + j, 0);
        }
        RP_UNROLL
        for (int j = 0; j < kStep; ++j) {
          mma_tf32_16x8x8(z[j0 + j], a, to_tf32(column[j][0]), to_tf32(column[j][1]));
        }
      }
    } else {
      float sum[kOut][4] = {};  // chains of 8
      RP_NO_UNROLL
      for (int k = k0 > region.row ? k0 : region.row; k < k0 + 8 && k < region.row + region.rows; ++k) {
        const float t0 = t[at.g * stride + k], t1 = t[(at.g + 8) * stride + k];
        float value[kOut][kColumns];
        RP_UNROLL
        for (int j = 0; j < kOut; ++j) {
          RP_UNROLL
          for (int e = 0; e < kColumns; ++e) value[j][e] = element(k, j, e);
        }
        RP_UNROLL
        for (int j = 0; j < kOut; ++j) {
          RP_UNROLL
          for (int e = 0; e < kColumns; ++e) {
            sum[j][e] += t0 * value[j][e];
            sum[j][2 + e] += t1 * value[j][e];
          }
        }
      }
      RP_UNROLL
      for (int j = 0; j < kOut; ++j) {
        RP_UNROLL
        for (int e = 0; e < 4; ++e) z[j][e] += sum[j][e];
      }
    }
  }
}

// A warp's 16 rows of accumulators to shared memory, as multiply_small reads them; the warp must synchronise.
template <int kTiles>
RP_DEVICE void store_rows(float* to, int stride, const float (&acc)[kTiles][4]) {
  const LanePlace at;
  RP_UNROLL
  for (int j = 0; j < kTiles; ++j) {
    RP_UNROLL
    for (int h = 0; h < 2; ++h) {
      *reinterpret_cast<float2*>(to + (at.g + 8 * h) * stride + 8 * j + 2 * at.q) =
          make_float2(acc[j][2 * h], acc[j][2 * h + 1]);
    }
  }
}

}  // namespace routed_peft::cuda
