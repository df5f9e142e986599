// out = base + bias + residual + s · Z B̂ᵀ: every element of the output is written once, and what it is added to is read
// once. The base layer's own product then accumulates into it, or has been made before and is `base`.
//
// A block has 64 rows and 128 columns of one segment of the output; each of its four warps has 16 rows.
//
//        rank          128
//   64 [ Z ] · 128 [ B ]ᵀ  ->  shared memory, float32  ->  rows of 16 bytes
//
// The products pass through shared memory once more because accumulators hold two columns a lane, and writing those as
// they lie would touch every 32-byte sector twice. Z is bfloat16 for bfloat16 and goes to the tensor cores as it is;
// for float16 it is float32, since Z may exceed float16, and goes there as TF32.
#include <algorithm>

#include "kernels/device/route.cuh"
#include "kernels/device/strided.cuh"
#include "kernels/dispatch.h"
#include "kernels/launch.h"

namespace routed_peft::cuda {
namespace {

constexpr int kBlockColumns = 128, kWarpRows = 16;
constexpr int kDepth = 64;                     // of a step over the rank
constexpr int kOutStride = kBlockColumns + 8;  // of a row of products, in floats: banks

constexpr int kBlockRows = 64, kThreads = 128;

template <class T>
constexpr int kPad = 16 / sizeof(ZType<T>);
template <class T>
constexpr int kBStride = kDepth + kPad<T>;
template <class T>
constexpr int kBBytes = kBlockColumns * kBStride<T> * static_cast<int>(sizeof(ZType<T>));

// Which segment and which of its column tiles blockIdx.y is.
struct Place {
  Segment segment;
  int64_t column;  // of the output
  int columns;     // of this block
};

RP_DEVICE Place place_of(const UpProjectParams& p) {
  int64_t block = blockIdx.y;
  int i = 0;
  while (i + 1 < p.segment_count) {
    const int64_t blocks = (p.segments[i].length + kBlockColumns - 1) / kBlockColumns;
    if (block < blocks) break;
    block -= blocks;
    ++i;
  }
  Place place{p.segments[i], p.segments[i].start + block * kBlockColumns, kBlockColumns};
  const int64_t left = place.segment.start + place.segment.length - place.column;
  if (left < kBlockColumns) place.columns = static_cast<int>(left);
  return place;
}

// Rows of B for the block's columns, columns [k, k + depth) of the rank, zeros where there are none.
template <class T>
RP_DEVICE void load_b(ZType<T>* to, const UpProjectParams& p, const Place& place, int k, int depth, bool by_16) {
  constexpr int kElements = 16 / sizeof(T);
  const T* data = static_cast<const T*>(p.b.data);
  const int64_t first = place.segment.b_row + place.column - place.segment.start;
  const int step = by_16 ? kElements : 1, steps = depth / step;
  for (int i = threadIdx.x; i < kBlockColumns * steps; i += kThreads) {
    const int row = i / steps, column = i % steps * step;
    const bool inside = row < place.columns && k + column < p.rank;
    ZType<T>* const at = to + row * kBStride<T> + column;
    const T* from = inside ? data + (first + row) * p.b.row_stride + (k + column) * p.b.col_stride : data;
    if (!by_16) {
      *at = inside ? from_float<ZType<T>>(to_float(*from)) : from_float<ZType<T>>(0.f);
    } else if constexpr (std::is_same_v<T, ZType<T>>) {
      cp_async_16(at, from, inside);
    } else {
      const uint4 bits = inside ? *reinterpret_cast<const uint4*>(from) : make_uint4(0, 0, 0, 0);
      T values[kElements];
      memcpy(values, &bits, sizeof values);
      RP_UNROLL
      for (int e = 0; e < kElements; e += 4) {
        *reinterpret_cast<float4*>(at + e) =
            make_float4(to_float(values[e]), to_float(values[e + 1]), to_float(values[e + 2]), to_float(values[e + 3]));
      }
    }
  }
  cp_async_commit();
  cp_async_wait<0>();
}

// acc [16, 128] += Z [16, depth] B [128, depth]ᵀ, by the warp.
template <class T>
RP_DEVICE void multiply(float (&acc)[kBlockColumns / 8][4], const ZType<T>* z, int z_stride, const ZType<T>* b,
                        int depth) {
  constexpr int kTiles = kBlockColumns / 8;
  if constexpr (std::is_same_v<T, bfloat16>) {
    RP_UNROLL
    for (int k = 0; k < kDepth; k += 16) {
      if (k < depth) multiply_tensor<T, kTiles, 16>(acc, z + k, z_stride, b + k, kBStride<T>, [](int, auto&) {});
    }
  } else if constexpr (kIsFloat<T>) {
    multiply_float(acc, z, z_stride, b, kBStride<T>, depth);
  } else {
    multiply_tf32(acc, z, z_stride, b, kBStride<T>, depth);
  }
}

// 16 bytes of rows `step` apart of what the output is added to, the residual or the base, all on their way at once.
// Behind the last row it is loaded again.
template <class T, int kRows>
RP_DEVICE void load_rows(uint4 (&to)[kRows], const Matrix& m, int64_t row, int step, int64_t rows, int64_t column) {
  if (m.data == nullptr) return;
  RP_UNROLL
  for (int i = 0; i < kRows; ++i) {
    const int64_t at = row + i * step < rows ? row + i * step : rows - 1;
    to[i] = *reinterpret_cast<const uint4*>(static_cast<const T*>(m.data) + at * m.row_stride + column);
  }
}

template <class T, int kCount>
RP_DEVICE void add_bits(float (&sum)[kCount], const Matrix& m, const uint4& bits) {
  if (m.data == nullptr) return;
  T values[kCount];
  memcpy(values, &bits, sizeof values);
  RP_UNROLL
  for (int i = 0; i < kCount; ++i) sum[i] += to_float(values[i]);
}

template <class T, int kCount>
RP_DEVICE void add_elements(float (&sum)[kCount], const Matrix& m, int64_t row, int64_t column, int count) {
  if (m.data == nullptr) return;
  const T* from = static_cast<const T*>(m.data) + row * m.row_stride + column * m.col_stride;
  RP_UNROLL
  for (int i = 0; i < kCount; ++i) {
    if (i < count) sum[i] += to_float(from[i * m.col_stride]);
  }
}

// kCount neighbours from shared memory, four by four. Of eight, every other four lanes take the last four first: all
// would meet in half of the banks.
template <int kCount>
RP_DEVICE void load_products(const float* from, float (&sum)[kCount]) {
  if constexpr (kCount == 4) {
    const float4 run = *reinterpret_cast<const float4*>(from);
    sum[0] = run.x, sum[1] = run.y, sum[2] = run.z, sum[3] = run.w;
  } else {
    static_assert(kCount == 8);
    const bool turned = threadIdx.x / 4 % 2 != 0;
    const float4 one = *reinterpret_cast<const float4*>(from + (turned ? 4 : 0));
    const float4 other = *reinterpret_cast<const float4*>(from + (turned ? 0 : 4));
    const float4 low = turned ? other : one, high = turned ? one : other;
    sum[0] = low.x, sum[1] = low.y, sum[2] = low.z, sum[3] = low.w;
    sum[4] = high.x, sum[5] = high.y, sum[6] = high.z, sum[7] = high.w;
  }
}

template <class T>
RP_DEVICE bool aligned(const Matrix& m, int64_t column) {
  constexpr int64_t kElements = 16 / sizeof(T);
  return m.data == nullptr || (m.col_stride == 1 && m.row_stride % kElements == 0 &&
                               reinterpret_cast<uintptr_t>(static_cast<const T*>(m.data) + column) % 16 == 0);
}

// From Z's rows in shared memory to the block's part of the output. `shared` holds B, and then the products; Z may be
// overwritten by these.
template <class T>
RP_DEVICE void up_tile(const UpProjectParams& p, const Place& place, const ZType<T>* z, int z_stride, ZType<T>* b,
                       float* products, bool b_by_16) {
  const LanePlace at;
  const int warp = static_cast<int>(threadIdx.x) / 32;
  const int64_t first_row = int64_t{blockIdx.x} * kBlockRows;
  float acc[kBlockColumns / 8][4] = {};
  if (place.segment.b_row >= 0) {
    for (int k = 0; k < p.padded_rank; k += kDepth) {
      if (k > 0) __syncthreads();  // the last step's readers are done
      const int depth = p.padded_rank - k < kDepth ? p.padded_rank - k : kDepth;
      load_b<T>(b, p, place, k, depth, b_by_16);
      __syncthreads();
      multiply<T>(acc, z + warp * kWarpRows * z_stride + k, z_stride, b, depth);
    }
  }
  __syncthreads();
  RP_UNROLL
  for (int j = 0; j < kBlockColumns / 8; ++j) {
    RP_UNROLL
    for (int h = 0; h < 2; ++h) {
      float* to = products + (warp * kWarpRows + at.g + 8 * h) * kOutStride + 8 * j + 2 * at.q;
      *reinterpret_cast<float2*>(to) = make_float2(p.scaling * acc[j][2 * h], p.scaling * acc[j][2 * h + 1]);
    }
  }
  __syncthreads();

  constexpr int kElements = 16 / sizeof(T), kChunks = kBlockColumns / kElements;
  const bool whole =
      aligned<T>(p.out, place.column) && aligned<T>(p.base, place.column) && aligned<T>(p.residual, place.column);
  static_assert(kThreads % kChunks == 0);  // a thread has the same columns of every row
  const int column = static_cast<int>(threadIdx.x) % kChunks * kElements;
  const int count = place.columns - column < kElements ? place.columns - column : kElements;
  if (count <= 0) return;
  const bool by_16 = whole && count == kElements;
  const int64_t out_column = place.column + column;
  float bias[8] = {};  // kElements of them
  if (p.bias.data != nullptr) {
    const int64_t stride = p.bias.col_stride;
    load_strided(p.bias.data, p.bias.dtype, out_column * stride, stride, 0, count, false, bias);
  }
  constexpr int kStep = kThreads / kChunks, kAhead = 4;  // rows that are worked on together
  static_assert(kBlockRows % (kStep * kAhead) == 0);
  for (int first = static_cast<int>(threadIdx.x) / kChunks; first < kBlockRows; first += kStep * kAhead) {
    if (first_row + first >= p.rows) break;
    uint4 residual[kAhead], base[kAhead];
    if (by_16) {
      load_rows<T>(residual, p.residual, first_row + first, kStep, p.rows, out_column);
      load_rows<T>(base, p.base, first_row + first, kStep, p.rows, out_column);
    }
    RP_UNROLL
    for (int i = 0; i < kAhead; ++i) {
      const int in_block = first + i * kStep;
      const int64_t row = first_row + in_block;
      if (row >= p.rows) break;
      float sum[kElements];
      load_products(products + in_block * kOutStride + column, sum);
      RP_UNROLL
      for (int e = 0; e < kElements; ++e) sum[e] += bias[e];
      T* to = static_cast<T*>(p.out.data) + row * p.out.row_stride + out_column;
      if (by_16) {
        add_bits<T>(sum, p.residual, residual[i]);
        add_bits<T>(sum, p.base, base[i]);
        T values[kElements];
        RP_UNROLL
        for (int e = 0; e < kElements; ++e) values[e] = from_float<T>(sum[e]);
        uint4 bits;
        memcpy(&bits, values, sizeof bits);
        store_16(to, bits);
      } else {
        add_elements<T>(sum, p.residual, row, out_column, count);
        add_elements<T>(sum, p.base, row, out_column, count);
        RP_UNROLL
        for (int e = 0; e < kElements; ++e) {
          if (e < count) to[e] = from_float<T>(sum[e]);
        }
      }
    }
  }
}

struct KernelParams : UpProjectParams {
  bool b_by_16;
};

// Shared memory: Z, then B; the products lie over both.
template <class T>
RP_DEVICE int z_stride_of(int padded_rank) {
  return padded_rank + kPad<T>;
}

template <class T>
__global__ __launch_bounds__(kThreads, kIsFloat<T> ? 2 : 3) void up_project_kernel(const KernelParams p) {
  RP_DYNAMIC_SMEM(shared);
  const Place place = place_of(p);
  const int stride = z_stride_of<T>(p.padded_rank);
  ZType<T>* const z = reinterpret_cast<ZType<T>*>(shared);
  const int64_t first_row = int64_t{blockIdx.x} * kBlockRows;
  constexpr int kElements = 16 / sizeof(ZType<T>);
  if (place.segment.b_row >= 0) {
    const int chunks = p.padded_rank / kElements;
    const ZType<T>* from = static_cast<const ZType<T>*>(p.z) + place.segment.z_column;
    for (int i = threadIdx.x; i < kBlockRows * chunks; i += kThreads) {
      const int row = i / chunks, column = i % chunks * kElements;
      const bool inside = first_row + row < p.rows;
      cp_async_16(z + row * stride + column,
                  inside ? from + (first_row + row) * p.z_stride + column : static_cast<const ZType<T>*>(p.z), inside);
    }
    cp_async_commit();  // waited for with B
  }
  up_tile<T>(p, place, z, stride, z + kBlockRows * stride, reinterpret_cast<float*>(shared), p.b_by_16);
}

template <class T>
size_t shared_bytes(int padded_rank) {
  const size_t z = kBlockRows * static_cast<size_t>(padded_rank + kPad<T>) * sizeof(ZType<T>);
  return std::max<size_t>(z + kBBytes<T>, kBlockRows * kOutStride * sizeof(float));
}

}  // namespace

cudaError_t up_project(const UpProjectParams& params, cudaStream_t stream) {
  int64_t blocks = 0;
  for (int i = 0; i < params.segment_count; ++i) {
    blocks += (params.segments[i].length + kBlockColumns - 1) / kBlockColumns;
  }
  if (params.rows == 0 || blocks == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>((params.rows + kBlockRows - 1) / kBlockRows), static_cast<unsigned>(blocks));
  return dispatch_float(params.dtype, [&]<class T>() {
    constexpr int64_t kElements = 16 / sizeof(T);
    const Matrix& b = params.b;
    const KernelParams p{params, b.col_stride == 1 && b.cols % kElements == 0 && b.row_stride % kElements == 0 &&
                                     reinterpret_cast<uintptr_t>(b.data) % 16 == 0};
    return launch<up_project_kernel<T>>(grid, dim3(kThreads), shared_bytes<T>(p.padded_rank), stream, p);
  });
}

}  // namespace routed_peft::cuda
