// Σ_n L_nᵀ X̃_n, column sums and dX = mask ∘ (L A) + residual, in one sweep over each tall matrix X: x beside dT gives
// dA and dX, y beside dV gives dC and dY, dOut beside Z gives dB and the bias's gradient. X is read once and dX written
// once; all the matrices share one launch, so that small ones fill the machine together.
//
// A block has a slice of the columns and a part of the rows, which it walks tile by tile through a ring of cp.async
// stages. The product stays in registers until the end, A's columns in shared memory; dX takes the place of the tile of
// X.
//
//               columns of the slice
//   rows  [ L tile ]ᵀ · [ X tile ]  ->  [width x columns], in registers over all of the block's rows
//         [ L tile ] · [ A ]        ->  [rows x columns], dX of these rows, in whole rows of 16 bytes
//
// L is read again by every slice of columns, but X, the large operand, is not: L is some per cent of it and comes from
// L2. The parts of the sums go to memory in float32 and are added in order by reduce.cu: atomics would be neither
// repeatable nor cheaper. L is float32 for float16 (a gradient may exceed it), and goes to the tensor cores as TF32.
//
// Dropout is drawn once for a tile: 32 neighbouring columns of a row are four calls of the random numbers and one word
// of a bitmap, with which a thread blanks X in place and which is kept for dX. What is kept is scaled in the sums.
#include <algorithm>

#include "kernels/device/philox.cuh"
#include "kernels/device/route.cuh"
#include "kernels/device/vector.cuh"
#include "kernels/dispatch.h"
#include "kernels/launch.h"
#include "kernels/plan.h"

namespace routed_peft::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / 32;

// Rows and columns of a tile. Rows of L of `bytes`; what limits both is shared memory, which A and two stages share.
constexpr int tile_rows(int64_t bytes) { return bytes <= 128 ? 64 : bytes <= 512 ? 32 : 16; }
constexpr int tile_columns(bool float32, int padded_width) {
  return float32 ? (padded_width == 256 ? 32 : 64) : padded_width == 256 ? 64 : 128;
}

// Whether two blocks are to fit into a processor's registers and 164 KiB of shared memory; the wider ones, whose sums
// take more registers, have what a block may have.
constexpr bool in_pairs(int padded_width) { return padded_width <= 64; }

// Which part of which job a block has.
struct Place {
  int job, split;
  bool first;      // slice of columns
  int columns;     // of the slice
  int64_t column;  // its first one, of X
  Segment segment;
};

// What a block does. It lies in shared memory: in registers it would take the room of the sums.
struct alignas(16) Work {
  GradInputJob job;
  Place place;
  float scale;
  bool product, x_sums, l_sums, dx;  // what is wanted of them
  bool x, l, dropout;                // what it takes
  bool x_by_16, l_by_16, dx_by_16, residual_by_16;
  int steps;
  int64_t begin, end;  // rows
};

template <class T, int kPaddedWidth>
struct Tile {
  using Z = ZType<T>;
  static constexpr int kWidth = kPaddedWidth;
  static constexpr int kRows = tile_rows(kWidth * static_cast<int>(sizeof(Z)));
  static constexpr int kCols = tile_columns(kIsFloat<T>, kWidth);
  static constexpr int kElements = 16 / sizeof(T);
  // 16 bytes behind each row: neither ldmatrix nor the plain loads below then meet in a bank.
  static constexpr int kXStride = kCols + kElements, kLStride = kWidth + 16 / static_cast<int>(sizeof(Z));
  static constexpr int kXBytes = kRows * kXStride * static_cast<int>(sizeof(T));
  static constexpr int kStageBytes = kXBytes + kRows * kLStride * static_cast<int>(sizeof(Z));
  static constexpr int kABytes = kWidth * kXStride * static_cast<int>(sizeof(T));  // A's rows are like X's
  static constexpr int kWords = kCols / 32;                                        // of a row of the bitmap
  static constexpr int kBitBytes = kRows * kWords * 4;
  static constexpr int kProductStride = kCols + 1;  // of the product on its way out: banks, whichever way it is read
  static constexpr int kProductBytes = kWidth * kProductStride * 4;                 // it lies over the stages and A
  static constexpr int kLeast = kProductBytes > 2 * kStageBytes + kABytes ? 3 : 2;  // stages
  static_assert(kProductBytes <= kLeast * kStageBytes + kABytes);
  static constexpr int kBesideStages = kABytes + kBitBytes + static_cast<int>(sizeof(Work));
  static_assert(kLeast * kStageBytes + kBesideStages <= 99 << 10, "shared memory of the smaller devices");

  // float32: a thread has 4 x 4 of dX, and kSplit neighbouring lanes share the sum over the width; a warp's threads lie
  // kRowGroups by kColumnGroups.
  static constexpr int kSplit = kIsFloat<T> ? kThreads * 16 / (kRows * kCols) : 1;
  static constexpr int kColumnGroups = kSplit == 8 ? 4 : 8, kRowGroups = 32 / kSplit / kColumnGroups;
  // A warp's part of dX, which no other one touches.
  static constexpr int kPartRows = kIsFloat<T> ? 4 * kRowGroups : 16;
  static constexpr int kPartCols = kRows * kCols / kWarps / kPartRows;
  static constexpr int kPartChunks = kPartRows * kPartCols / kElements;  // of 16 bytes
};

struct KernelParams : GradInputParams {
  int stages;            // of the ring, Tile::kLeast to 8
  int slices[kMaxJobs];  // of the columns, those with nothing to do not counted
  float keep_scale[kMaxJobs];
};

RP_HOST_DEVICE bool has_work(const GradInputJob& job, const Segment& segment) {
  return job.dx.data != nullptr || job.column_sums != nullptr || (job.product != nullptr && segment.b_row >= 0);
}

template <int kCols>
RP_DEVICE Place place_of(const KernelParams& p) {
  Place place{0, 0, false, 0, 0, {0, 0, -1, 0}};
  int block = static_cast<int>(blockIdx.x);
  while (block >= p.slices[place.job] * p.jobs[place.job].splits) {
    block -= p.slices[place.job] * p.jobs[place.job].splits;
    ++place.job;
  }
  const GradInputJob& job = p.jobs[place.job];
  // Neighbouring blocks have the same rows, so that they find L in L2.
  place.split = block / p.slices[place.job];
  int64_t slice = block % p.slices[place.job];
  place.first = slice == 0;
  for (int i = job.first_segment; i < job.first_segment + job.segment_count; ++i) {
    const Segment& segment = p.segments[i];
    if (!has_work(job, segment)) continue;
    const int64_t slices = (segment.length + kCols - 1) / kCols;
    if (slice < slices) {
      place.segment = segment;
      place.column = segment.start + slice * kCols;
      const int64_t left = segment.start + segment.length - place.column;
      place.columns = left < kCols ? static_cast<int>(left) : kCols;
      break;
    }
    slice -= slices;
  }
  return place;
}

// Rows [0, kRows) of a matrix to shared memory, `columns` columns of them and no more than `rows`; zeros where there is
// no row or the mask is false. by_16: rows begin at multiples of 16 bytes, and are whole to the next one.
template <int kRows, int kCols, int kStride, class E>
RP_DEVICE void load_rows(E* to, const E* from, int64_t stride, int64_t rows, int columns, const bool* mask,
                         bool by_16) {
  const auto there = [&](int row) { return row < rows && (mask == nullptr || mask[row]); };
  if (by_16) {
    constexpr int kElements = 16 / sizeof(E), kChunks = kCols / kElements, kRowsAtOnce = kThreads / kChunks;
    const int first = static_cast<int>(threadIdx.x) / kChunks;
    const int column = static_cast<int>(threadIdx.x) % kChunks * kElements;
    if (column >= columns) return;
    const E* next = from + first * stride + column;
    to += first * kStride + column;
    bool valid[(kRows + kRowsAtOnce - 1) / kRowsAtOnce];  // of the mask, whose bytes are on their way together
    RP_UNROLL
    for (int i = 0; i < kRows; i += kRowsAtOnce) valid[i / kRowsAtOnce] = there(first + i);
    RP_UNROLL
    for (int i = 0; i < kRows; i += kRowsAtOnce) {
      if (kRows % kRowsAtOnce != 0 && first + i >= kRows) break;
      cp_async_16(to + i * kStride, valid[i / kRowsAtOnce] ? next : from, valid[i / kRowsAtOnce]);
      next += kRowsAtOnce * stride;
    }
  } else {
    constexpr int kAtOnce = 4;
    RP_NO_UNROLL
    for (int i = threadIdx.x; i < kRows * kCols; i += kAtOnce * kThreads) {
      E value[kAtOnce];
      RP_UNROLL
      for (int e = 0; e < kAtOnce; ++e) {
        const int row = (i + e * kThreads) / kCols, column = (i + e * kThreads) % kCols;
        const bool valid = row < kRows && column < columns && there(row);
        value[e] = valid ? from[row * stride + column] : from_float<E>(0.f);
      }
      RP_UNROLL
      for (int e = 0; e < kAtOnce; ++e) {
        const int row = (i + e * kThreads) / kCols, column = (i + e * kThreads) % kCols;
        if (row < kRows) to[row * kStride + column] = value[e];
      }
    }
  }
}

// Whether every row has column `column`, of a matrix of T, at a multiple of 16 bytes.
template <class T>
RP_DEVICE bool rows_by_16(const Matrix& m, int64_t column) {
  return m.col_stride == 1 && m.row_stride % (16 / static_cast<int64_t>(sizeof(T))) == 0 &&
         reinterpret_cast<uintptr_t>(static_cast<const T*>(m.data) + column) % 16 == 0;
}

// The slice of A, rows up to the next multiple of 16 of them: what lies behind the width is zero.
template <class T, class Shape>
RP_DEVICE void load_a(T* to, const Matrix& a, int64_t first_column, int width, int columns) {
  const int rows = (width + 15) / 16 * 16;
  constexpr Dtype kOwn = kIsFloat<T>                   ? Dtype::kFloat32
                         : std::is_same_v<T, bfloat16> ? Dtype::kBFloat16
                                                       : Dtype::kFloat16;
  const bool by_16 = a.dtype == kOwn && columns % Shape::kElements == 0 && rows_by_16<T>(a, first_column);
  if (by_16) {
    constexpr int kChunks = Shape::kCols / Shape::kElements;
    const T* from = static_cast<const T*>(a.data) + first_column;
    RP_NO_UNROLL
    for (int i = threadIdx.x; i < rows * kChunks; i += kThreads) {
      const int row = i / kChunks, column = i % kChunks * Shape::kElements;
      const bool valid = row < width && column < columns;
      cp_async_16(to + row * Shape::kXStride + column, valid ? from + row * a.row_stride + column : from, valid);
    }
  } else {
    // kCols divides kAtOnce kThreads or is divided by it, and so does neither leave the rows that are there.
    constexpr int kAtOnce = 4;
    RP_NO_UNROLL
    for (int i = threadIdx.x; i < rows * Shape::kCols; i += kAtOnce * kThreads) {
      float value[kAtOnce];
      RP_UNROLL
      for (int e = 0; e < kAtOnce; ++e) {
        const int row = (i + e * kThreads) / Shape::kCols, column = (i + e * kThreads) % Shape::kCols;
        value[e] = row < width && column < columns
                       ? load_as_float(a.data, a.dtype, row * a.row_stride + (first_column + column) * a.col_stride)
                       : 0.f;
      }
      RP_UNROLL
      for (int e = 0; e < kAtOnce; ++e) {
        const int row = (i + e * kThreads) / Shape::kCols, column = (i + e * kThreads) % Shape::kCols;
        if (row < rows) to[row * Shape::kXStride + column] = from_float<T>(value[e]);
      }
    }
  }
}

// Draws the bits of a tile: bit c % 32 of word c / 32 of a row is whether column c is kept. In X, where `blank`, those
// that are not become zero.
template <class T, class Shape>
RP_DEVICE void draw(uint32_t* bits, T* x, bool blank, const Dropout& drop, int64_t first_row, int64_t first_column) {
  constexpr int kUnits = Shape::kRows * Shape::kWords;
  constexpr int kSharing = kUnits >= kThreads ? 1 : kUnits >= kThreads / 2 ? 2 : 4;  // threads that share one word
  static_assert(kUnits <= kThreads && kUnits * kSharing % 32 == 0);
  const int unit = static_cast<int>(threadIdx.x) / kSharing, sub = static_cast<int>(threadIdx.x) % kSharing;
  if (unit >= kUnits) return;  // whole warps
  const int row = unit / Shape::kWords, word = unit % Shape::kWords;
  const uint64_t at = static_cast<uint64_t>(first_row + row);
  const int64_t column = first_column + 32 * word;
  uint32_t keep = 0;
  RP_NO_UNROLL
  for (int q = 0; q < 4; q += kSharing) {
    const PhiloxWords random = philox(drop.seed, static_cast<uint32_t>(at), static_cast<uint32_t>(at >> 32),
                                      static_cast<uint32_t>(column / 64 * 4 + q + sub),
                                      2 * drop.stream + static_cast<uint32_t>(column / 32 % 2));
    RP_UNROLL
    for (int w = 0; w < 4; ++w) {
      const uint32_t pair =
          ((random.word[w] & 0xFFFFu) >= drop.threshold ? 1u : 0u) | (random.word[w] >> 16 >= drop.threshold ? 2u : 0u);
      keep |= pair << (8 * w + 2 * (q + sub));
    }
  }
  RP_UNROLL
  for (int step = 1; step < kSharing; step *= 2) keep |= __shfl_xor_sync(~0u, keep, step);
  if (sub == 0) bits[unit] = keep;
  if (!blank) return;
  T* const from = x + row * Shape::kXStride + 32 * word;
  RP_UNROLL
  for (int i = 0; i < 32 / Shape::kElements; i += kSharing) {
    const int chunk = (i + sub + word / 2 * 2) % (32 / Shape::kElements);  // neighbours' in other banks
    uint4* const place = reinterpret_cast<uint4*>(from + chunk * Shape::kElements);
    const uint32_t mine = keep >> (chunk * Shape::kElements);
    const auto mask = [&](int i) {
      if constexpr (kIsFloat<T>) {
        return mine >> i & 1u ? ~0u : 0u;
      } else {
        return (mine >> 2 * i & 1u ? 0xFFFFu : 0u) | (mine >> 2 * i & 2u ? 0xFFFF0000u : 0u);
      }
    };
    uint4 values = *place;
    values.x &= mask(0);
    values.y &= mask(1);
    values.z &= mask(2);
    values.w &= mask(3);
    *place = values;
  }
}

// The sum of one column of a tile over this thread's share of the rows, columns threadIdx.x % kCols.
template <int kRows, int kCols, int kStride, class E>
RP_DEVICE float sum_column(const E* tile) {
  constexpr int kShare = kRows * kCols / kThreads, kAtOnce = kShare < 8 ? kShare : 8;
  const E* from = tile + static_cast<int>(threadIdx.x) / kCols * kShare * kStride + threadIdx.x % kCols;
  float sum = 0.f;
  RP_NO_UNROLL
  for (int i = 0; i < kShare; i += kAtOnce) {
    RP_UNROLL
    for (int k = 0; k < kAtOnce; ++k) sum += to_float(from[(i + k) * kStride]);
  }
  return sum;
}

// Adds up the shares in order; `space` has room for one number a thread.
template <int kCols>
RP_DEVICE void store_sums(float* to, float* space, float share, int columns) {
  __syncthreads();
  space[threadIdx.x] = share;
  __syncthreads();
  const int column = static_cast<int>(threadIdx.x);
  if (column >= kCols || column >= columns) return;
  float sum = space[column];
  RP_UNROLL
  for (int i = 1; i < kThreads / kCols; ++i) sum += space[i * kCols + column];
  to[column] = sum;
}

// ---- Lᵀ X. Every thread has some elements of the product: add() adds a tile's, store() gives them away as
// to(column of L, column of X, value).

// bfloat16 and float16: a warp has tiles of 16 columns of L, kAcross apart, by a run of X's columns.
template <class T, class Shape>
struct TensorProduct {
  static constexpr int kAcross = Shape::kWidth == 256 ? 4 : Shape::kWidth >= 64 ? 2 : 1;  // warps
  static constexpr int kTall = Shape::kWidth / 16 / kAcross;                              // tiles of a warp
  static constexpr int kRun = Shape::kCols / (kWarps / kAcross);                          // columns of X
  float acc[kTall][kRun / 8][4] = {};

  RP_DEVICE static int first_tile() { return static_cast<int>(threadIdx.x) / 32 % kAcross; }
  RP_DEVICE static int first_column() { return static_cast<int>(threadIdx.x) / 32 / kAcross * kRun; }

  RP_DEVICE void add(const typename Shape::Z* l, const T* x, int width) {
    const LanePlace at;
    x += at.lane % 16 * Shape::kXStride + first_column() + at.lane / 16 * 8;
    RP_NO_UNROLL
    for (int k = 0; k < Shape::kRows; k += 16) {
      uint32_t b[kRun / 16][4];
      RP_UNROLL
      for (int j = 0; j < kRun / 16; ++j) ldmatrix_x4_trans(b[j], x + k * Shape::kXStride + 16 * j);
      RP_UNROLL
      for (int i = 0; i < kTall; ++i) {
        const int column = (first_tile() + i * kAcross) * 16;
        if (column >= width) break;
        if constexpr (std::is_same_v<T, bfloat16>) {
          uint32_t a[4];
          ldmatrix_x4_trans(a,
                            l + (k + at.lane / 16 * 8 + at.lane % 8) * Shape::kLStride + column + at.lane / 8 % 2 * 8);
          RP_UNROLL
          for (int j = 0; j < kRun / 8; ++j) {
            mma_16x8x16<T>(acc[i][j], a, b[j / 2][j % 2 * 2], b[j / 2][j % 2 * 2 + 1]);
          }
        } else {
          // The order of the rows is free as long as both factors agree: ldmatrix brings rows 2q and 2q + 1 together,
          // and they stand for k = q and q + 4.
          RP_UNROLL
          for (int h = 0; h < 2; ++h) {
            const float* row = l + (k + 8 * h + 2 * at.q) * Shape::kLStride + column + at.g;
            const uint32_t a[4] = {to_tf32(row[0]), to_tf32(row[8]), to_tf32(row[Shape::kLStride]),
                                   to_tf32(row[Shape::kLStride + 8])};
            RP_UNROLL
            for (int j = 0; j < kRun / 8; ++j) {
              const float2 pair = unpack2<T>(b[j / 2][j % 2 * 2 + h]);
              mma_tf32_16x8x8(acc[i][j], a, __float_as_uint(pair.x), __float_as_uint(pair.y));
            }
          }
        }
      }
    }
  }

  template <class Store>
  RP_DEVICE void store(const Store& to) const {
    const LanePlace at;
    RP_UNROLL
    for (int i = 0; i < kTall; ++i) {
      RP_UNROLL
      for (int j = 0; j < kRun / 8; ++j) {
        RP_UNROLL
        for (int e = 0; e < 4; ++e) {
          to((first_tile() + i * kAcross) * 16 + at.g + e / 2 * 8, first_column() + 8 * j + 2 * at.q + e % 2,
             acc[i][j][e]);
        }
      }
    }
  }
};

// float32: a thread has one or two runs of up to four columns of L by four of X. Runs half the width apart, so that all
// the warps have something to do where half of the width is all there is.
template <class Shape>
struct FloatProduct {
  static constexpr int kColumnWarps = Shape::kCols / 32, kGroups = kWarps / kColumnWarps * 4;  // groups of columns of L
  static constexpr int kRuns = Shape::kWidth / kGroups > 4 ? 2 : 1, kRun = Shape::kWidth / kGroups / kRuns;
  static_assert(kRun <= 4);
  float acc[kRuns][kRun][4] = {};

  RP_DEVICE static int first_column() {
    return static_cast<int>(threadIdx.x) / 32 % kColumnWarps * 32 + static_cast<int>(threadIdx.x) % 8 * 4;
  }
  RP_DEVICE static int first_row() {
    return (static_cast<int>(threadIdx.x) / 32 / kColumnWarps * 4 + static_cast<int>(threadIdx.x) % 32 / 8) * kRun;
  }

  template <int kHere>
  RP_DEVICE void add_runs(const float* l, const float* x) {
    float sum[kHere][kRun][4] = {};  // a chain of at most 64
    RP_NO_UNROLL
    for (int k0 = 0; k0 < Shape::kRows; k0 += 4) {
      RP_UNROLL
      for (int k = k0; k < k0 + 4; ++k) {
        const float4 b = *reinterpret_cast<const float4*>(x + k * Shape::kXStride);
        RP_UNROLL
        for (int h = 0; h < kHere; ++h) {
          const Elements<float, kRun> a = load_vector<kRun>(l + k * Shape::kLStride + h * Shape::kWidth / 2);
          RP_UNROLL
          for (int i = 0; i < kRun; ++i) {
            sum[h][i][0] += a.e[i] * b.x;
            sum[h][i][1] += a.e[i] * b.y;
            sum[h][i][2] += a.e[i] * b.z;
            sum[h][i][3] += a.e[i] * b.w;
          }
        }
      }
    }
    RP_UNROLL
    for (int h = 0; h < kHere; ++h) {
      RP_UNROLL
      for (int i = 0; i < kRun; ++i) {
        RP_UNROLL
        for (int e = 0; e < 4; ++e) acc[h][i][e] += sum[h][i][e];
      }
    }
  }

  RP_DEVICE void add(const float* l, const float* x, int width) {
    if (first_row() / (4 * kRun) * (4 * kRun) >= width) return;  // the warp has no columns of L
    if (kRuns == 2 && width > Shape::kWidth / 2) {
      add_runs<kRuns>(l + first_row(), x + first_column());
    } else {
      add_runs<1>(l + first_row(), x + first_column());
    }
  }

  template <class Store>
  RP_DEVICE void store(const Store& to) const {
    RP_UNROLL
    for (int h = 0; h < kRuns; ++h) {
      RP_UNROLL
      for (int i = 0; i < kRun; ++i) {
        RP_UNROLL
        for (int e = 0; e < 4; ++e) to(h * Shape::kWidth / 2 + first_row() + i, first_column() + e, acc[h][i][e]);
      }
    }
  }
};

// ---- L A: a warp's part of it, from row `row` and column `column` of the tile on. put<kCount>(row, column, values)
// gets neighbouring columns.

template <class T, class Shape, int kTiles, class Put>
RP_DEVICE void multiply_a_tensor(const typename Shape::Z* l, const T* a, int row, int column, int width,
                                 const Put& put) {
  const LanePlace at;
  float acc[kTiles][4] = {};
  RP_NO_UNROLL
  for (int k = 0; k < width; k += 16) {
    const int left = width - k;  // what lies behind it in L may be anything
    if constexpr (std::is_same_v<T, bfloat16>) {
      uint32_t rows[4];
      ldmatrix_x4(rows, l + (row + at.lane % 16) * Shape::kLStride + k + at.lane / 16 * 8);
      if (left < 16) {
        RP_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int first = i / 2 * 8 + 2 * at.q;
          rows[i] &= (first < left ? 0xFFFFu : 0u) | (first + 1 < left ? 0xFFFF0000u : 0u);
        }
      }
      RP_UNROLL
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t b[4];
        ldmatrix_x4_trans(b, a + (k + at.lane % 16) * Shape::kXStride + column + 8 * j + at.lane / 16 * 8);
        mma_16x8x16<T>(acc[j], rows, b[0], b[1]);
        mma_16x8x16<T>(acc[j + 1], rows, b[2], b[3]);
      }
    } else {
      uint32_t rows[2][4];
      RP_UNROLL
      for (int h = 0; h < 2; ++h) {
        RP_UNROLL
        for (int i = 0; i < 4; ++i) {
          const int in_step = 8 * h + i / 2 * 4 + at.q;
          const float value = l[(row + at.g + i % 2 * 8) * Shape::kLStride + k + in_step];
          rows[h][i] = in_step < left ? to_tf32(value) : 0u;
        }
      }
      // ldmatrix gives a lane its rows 2q and 2q + 1: told in this order, they are rows q and q + 4 of A.
      const int from = k + at.lane / 8 % 2 * 8 + at.lane % 2 * 4 + at.lane % 8 / 2;
      RP_UNROLL
      for (int j = 0; j < kTiles; j += 2) {
        uint32_t b[4];  // with one tile, the other two are the next warp's columns or the padding
        ldmatrix_x4_trans(b, a + from * Shape::kXStride + column + 8 * j + at.lane / 16 * 8);
        RP_UNROLL
        for (int i = 0; i < 4; ++i) {
          if (j + i / 2 >= kTiles) continue;
          const float2 pair = unpack2<T>(b[i]);
          mma_tf32_16x8x8(acc[j + i / 2], rows[i % 2], __float_as_uint(pair.x), __float_as_uint(pair.y));
        }
      }
    }
  }
  RP_UNROLL
  for (int h = 0; h < 2; ++h) {
    RP_UNROLL
    for (int j = 0; j < kTiles; ++j) {
      put(row + at.g + 8 * h, column + 8 * j + 2 * at.q, Elements<float, 2>{{acc[j][2 * h], acc[j][2 * h + 1]}});
    }
  }
}

// Sums over kSplit neighbouring lanes. Each step adds two lanes' and leaves half of them to either: the first of the
// 16 / kSplit that this lane has at the end is returned.
template <int kSplit, int kStep>
RP_DEVICE int share_sums(float (&sum)[16]) {
  if constexpr (kStep < kSplit) {
    constexpr int kCount = 8 / kStep;
    const bool upper = threadIdx.x & kStep;
    RP_UNROLL
    for (int i = 0; i < kCount; ++i) {
      const float give = upper ? sum[i] : sum[i + kCount], keep = upper ? sum[i + kCount] : sum[i];
      sum[i] = keep + __shfl_xor_sync(~0u, give, kStep);
    }
    return (upper ? kCount : 0) + share_sums<kSplit, 2 * kStep>(sum);
  } else {
    return 0;
  }
}

template <class Shape, class Put>
RP_DEVICE void multiply_a_float(const float* l, const float* a, int row, int column, int width, const Put& put) {
  constexpr int kSplit = Shape::kSplit, kColumnGroups = Shape::kColumnGroups, kRowGroups = Shape::kRowGroups;
  const int lane = static_cast<int>(threadIdx.x) % 32, split = lane % kSplit;
  row += lane / kSplit / kColumnGroups;  // and every kRowGroups-th one behind it: banks
  column += lane / kSplit % kColumnGroups * 4;
  float sum[16] = {};  // chains of at most 64
  RP_NO_UNROLL
  for (int k = 4 * split; k < width; k += 4 * kSplit) {
    float factor[4][4];
    RP_UNROLL
    for (int i = 0; i < 4; ++i) {
      const Elements<float, 4> run = load_vector<4>(l + (row + kRowGroups * i) * Shape::kLStride + k);
      RP_UNROLL
      for (int e = 0; e < 4; ++e) factor[i][e] = k + e < width ? run.e[e] : 0.f;
    }
    RP_UNROLL
    for (int e = 0; e < 4; ++e) {
      const float4 b = *reinterpret_cast<const float4*>(a + (k + e) * Shape::kXStride + column);
      RP_UNROLL
      for (int i = 0; i < 4; ++i) {
        sum[4 * i] += factor[i][e] * b.x;
        sum[4 * i + 1] += factor[i][e] * b.y;
        sum[4 * i + 2] += factor[i][e] * b.z;
        sum[4 * i + 3] += factor[i][e] * b.w;
      }
    }
  }
  const int first = share_sums<kSplit, 1>(sum);
  constexpr int kLeft = 16 / kSplit, kRun = kLeft < 4 ? kLeft : 4;
  RP_UNROLL
  for (int i = 0; i < kLeft; i += kRun) {
    Elements<float, kRun> run;
    RP_UNROLL
    for (int e = 0; e < kRun; ++e) run.e[e] = sum[i + e];
    put(row + kRowGroups * ((first + i) / 4), column + (first + i) % 4, run);
  }
}

// The warps' parts of dX of a tile of rows: begin() before the products reads the residual, which arrives meanwhile,
// and finish() puts it all together in shared memory, where the tile of X was.
template <class T, class Shape>
struct InputGradient {
  static constexpr int kChunks = (Shape::kPartChunks + 31) / 32, kInRow = Shape::kPartCols / Shape::kElements;
  static constexpr int kAcross = Shape::kCols / Shape::kPartCols;

  RP_DEVICE static int part_row() { return static_cast<int>(threadIdx.x) / 32 / kAcross * Shape::kPartRows; }
  RP_DEVICE static int part_column() { return static_cast<int>(threadIdx.x) / 32 % kAcross * Shape::kPartCols; }
  RP_DEVICE static T* first_of(const Work& work, const Matrix& m, int64_t row) {
    return static_cast<T*>(m.data) + row * m.row_stride + work.place.column * m.col_stride;
  }

  // each(i, row, column) for this lane's i-th 16 bytes.
  template <class Each>
  RP_DEVICE static void chunks(const Work& work, int rows, const Each& each) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    const int first = part_row() + lane / kInRow, column = part_column() + lane % kInRow * Shape::kElements;
    if (lane >= Shape::kPartChunks || column >= work.place.columns) return;
    RP_UNROLL
    for (int i = 0; i < kChunks; ++i) {
      if (first + i * (32 / kInRow) < rows) each(i, first + i * (32 / kInRow), column);
    }
  }
  // each(row, column) for this lane's elements one by one.
  template <class Each>
  RP_DEVICE static void elements(const Work& work, int rows, const Each& each) {
    RP_NO_UNROLL
    for (int i = static_cast<int>(threadIdx.x) % 32; i < Shape::kPartRows * Shape::kPartCols; i += 32) {
      const int row = part_row() + i / Shape::kPartCols, column = part_column() + i % Shape::kPartCols;
      if (row < rows && column < work.place.columns) each(row, column);
    }
  }

  RP_DEVICE static void begin(const Work& work, uint4 (&ahead)[kChunks], int64_t first_row, int rows) {
    if (!work.residual_by_16) return;
    const T* from = first_of(work, work.job.residual, first_row);
    chunks(work, rows, [&](int i, int row, int column) {
      ahead[i] = *reinterpret_cast<const uint4*>(from + row * work.job.residual.row_stride + column);
    });
  }

  // `space` has nothing in it that anyone still reads.
  RP_DEVICE static void finish(const Work& work, T* space, const uint4 (&ahead)[kChunks], const typename Shape::Z* l,
                               const T* a, const uint32_t* bits, int64_t first_row, int rows) {
    const bool residual = work.job.residual.data != nullptr, dropout = work.dropout;
    const float scale = work.scale;
    if (work.residual_by_16) {
      chunks(work, rows, [&](int i, int row, int column) {
        *reinterpret_cast<uint4*>(space + row * Shape::kXStride + column) = ahead[i];
      });
    } else if (residual) {
      const Matrix& m = work.job.residual;
      const T* from = first_of(work, m, first_row);
      elements(work, rows, [&](int row, int column) {
        space[row * Shape::kXStride + column] = from[row * m.row_stride + column * m.col_stride];
      });
    }
    __syncwarp();
    const auto put = [&]<int kCount>(int row, int column, Elements<float, kCount> values) {
      Elements<T, kCount>* const to = reinterpret_cast<Elements<T, kCount>*>(space + row * Shape::kXStride + column);
      const uint32_t keep = dropout ? bits[row * Shape::kWords + column / 32] >> (column % 32) : ~0u;
      RP_UNROLL
      for (int e = 0; e < kCount; ++e) values.e[e] = keep >> e & 1u ? scale * values.e[e] : 0.f;
      if (residual) {
        const Elements<T, kCount> other = *to;
        RP_UNROLL
        for (int e = 0; e < kCount; ++e) values.e[e] += to_float(other.e[e]);
      }
      Elements<T, kCount> result;
      RP_UNROLL
      for (int e = 0; e < kCount; ++e) result.e[e] = from_float<T>(values.e[e]);
      *to = result;
    };
    if constexpr (kIsFloat<T>) {
      multiply_a_float<Shape>(l, a, part_row(), part_column(), work.job.width, put);
    } else {
      constexpr int kTiles = Shape::kPartCols < 32 ? Shape::kPartCols / 8 : 4;  // at once: more would spill
      RP_NO_UNROLL
      for (int j = 0; j < Shape::kPartCols; j += 8 * kTiles) {
        multiply_a_tensor<T, Shape, kTiles>(l, a, part_row(), part_column() + j, work.job.width, put);
      }
    }
    __syncwarp();
    const Matrix& dx = work.job.dx;
    T* const to = first_of(work, dx, first_row);
    if (work.dx_by_16) {
      chunks(work, rows, [&](int, int row, int column) {
        store_16(to + row * dx.row_stride + column,
                 *reinterpret_cast<const uint4*>(space + row * Shape::kXStride + column));
      });
    } else {
      elements(work, rows, [&](int row, int column) {
        to[row * dx.row_stride + column * dx.col_stride] = space[row * Shape::kXStride + column];
      });
    }
  }
};

// The product from shared memory to its part, in the order in which that lies in memory.
template <class Shape>
RP_DEVICE void store_product(const Work& work, const float* space) {
  const GradInputJob& job = work.job;
  const Place& place = work.place;
  const int64_t first = place.segment.b_row + place.column - place.segment.start;
  const int64_t col_stride = job.product_col_stride, l_stride = job.product_l_stride;
  float* const to = job.product + place.split * job.product_size + first * col_stride;
  const bool by_columns = l_stride == 1;
  const int width = job.width, columns = place.columns;
  const float scale = work.scale;
  RP_NO_UNROLL
  for (int i = threadIdx.x; i < Shape::kWidth * Shape::kCols; i += kThreads) {
    const int in_l = by_columns ? i % Shape::kWidth : i / Shape::kCols;
    const int in_x = by_columns ? i / Shape::kWidth : i % Shape::kCols;
    if (in_l < width && in_x < columns) {
      to[in_x * col_stride + in_l * l_stride] = scale * space[in_l * Shape::kProductStride + in_x];
    }
  }
}

template <class T, class Shape>
RP_DEVICE Work work_of(const KernelParams& p) {
  Work work;
  const Place place = place_of<Shape::kCols>(p);
  const GradInputJob& job = p.jobs[place.job];
  work.job = job;
  work.place = place;
  work.scale = p.keep_scale[place.job];
  work.product = job.product != nullptr && place.segment.b_row >= 0;
  work.x_sums = job.column_sums != nullptr && place.columns > 0;
  work.l_sums = job.l_sums != nullptr && place.first;
  work.dx = job.dx.data != nullptr && place.columns > 0;
  work.x = work.product || work.x_sums;
  work.l = work.product || work.dx || work.l_sums;
  work.dropout = job.drop.threshold != 0 && (work.product || work.dx);
  if (work.dropout && job.drop.seed_at != nullptr) work.job.drop.seed = static_cast<uint64_t>(*job.drop.seed_at);

  const int64_t whole = (place.columns + Shape::kElements - 1) / Shape::kElements * Shape::kElements;
  const int64_t l_elements = 16 / sizeof(typename Shape::Z);
  const auto* const l = static_cast<const typename Shape::Z*>(job.l) + place.segment.z_column;
  work.x_by_16 = rows_by_16<T>(job.x, place.column) && place.column + whole <= job.x.cols;
  work.l_by_16 = job.l_stride % l_elements == 0 && reinterpret_cast<uintptr_t>(l) % 16 == 0;
  work.dx_by_16 = whole == place.columns && rows_by_16<T>(job.dx, place.column);
  work.residual_by_16 =
      job.residual.data != nullptr && whole == place.columns && rows_by_16<T>(job.residual, place.column);

  // The block's part of the rows: whole tiles, so that none depends on how many parts there are.
  const int64_t tiles = (job.rows + Shape::kRows - 1) / Shape::kRows, each = (tiles + job.splits - 1) / job.splits;
  work.begin = place.split * each * Shape::kRows;
  work.end = work.begin + each * Shape::kRows < job.rows ? work.begin + each * Shape::kRows : job.rows;
  work.steps = work.end > work.begin ? static_cast<int>((work.end - work.begin + Shape::kRows - 1) / Shape::kRows) : 0;
  return work;
}

template <class T, int kWidth>
__global__ __launch_bounds__(kThreads, in_pairs(kWidth) ? 2 : 1) void grad_input_kernel(const KernelParams p) {
  using Shape = Tile<T, kWidth>;
  using Z = typename Shape::Z;
  RP_DYNAMIC_SMEM(shared);
  T* const a = reinterpret_cast<T*>(shared + p.stages * Shape::kStageBytes);
  uint32_t* const bits = reinterpret_cast<uint32_t*>(shared + p.stages * Shape::kStageBytes + Shape::kABytes);
  Work& work = *reinterpret_cast<Work*>(bits + Shape::kBitBytes / 4);
  if (threadIdx.x == 0) work = work_of<T, Shape>(p);
  __syncthreads();
  const GradInputJob& job = work.job;
  const Place& place = work.place;
  const int steps = work.steps;

  unsigned char* const last_stage = shared + (p.stages - 1) * Shape::kStageBytes;
  const auto behind = [&](unsigned char* stage) { return stage == last_stage ? shared : stage + Shape::kStageBytes; };
  unsigned char *filling = shared, *stage = shared;
  const auto load = [&](int step) {
    const int64_t row = work.begin + int64_t{step} * Shape::kRows;
    const bool* mask = job.row_mask != nullptr ? job.row_mask + row : nullptr;
    unsigned char* const to = filling;
    filling = behind(filling);
    if (work.x) {
      load_rows<Shape::kRows, Shape::kCols, Shape::kXStride>(
          reinterpret_cast<T*>(to), static_cast<const T*>(job.x.data) + row * job.x.row_stride + place.column,
          job.x.row_stride, work.end - row, place.columns, mask, work.x_by_16);
    }
    if (work.l) {
      load_rows<Shape::kRows, Shape::kWidth, Shape::kLStride>(
          reinterpret_cast<Z*>(to + Shape::kXBytes),
          static_cast<const Z*>(job.l) + row * job.l_stride + place.segment.z_column, job.l_stride, work.end - row,
          job.width, mask, work.l_by_16);
    }
  };

  std::conditional_t<kIsFloat<T>, FloatProduct<Shape>, TensorProduct<T, Shape>> product;
  using Gradient = InputGradient<T, Shape>;
  float x_sum = 0.f, l_sum = 0.f;
  if (work.dx && steps > 0) load_a<T, Shape>(a, job.a, place.column, job.width, place.columns);
  RP_NO_UNROLL
  for (int step = 0; step < p.stages - 1; ++step) {
    if (step < steps) load(step);
    cp_async_commit();
  }
  RP_NO_UNROLL
  for (int step = 0; step < steps; ++step) {
    cp_async_wait_for(p.stages - 2);
    __syncthreads();  // this stage is there for everyone, and everyone is done with the one before, refilled next
    if (step + p.stages - 1 < steps) load(step + p.stages - 1);
    cp_async_commit();
    T* const x = reinterpret_cast<T*>(stage);
    const Z* const l = reinterpret_cast<const Z*>(stage + Shape::kXBytes);
    stage = behind(stage);
    const int64_t row = work.begin + int64_t{step} * Shape::kRows, left = work.end - row;
    const int rows = left < Shape::kRows ? static_cast<int>(left) : Shape::kRows;
    uint4 ahead[Gradient::kChunks];
    if (work.dx) Gradient::begin(work, ahead, row, rows);
    if (work.dropout) {
      draw<T, Shape>(bits, x, work.product, job.drop, row, place.column);
      __syncthreads();
    }
    if (work.x_sums) x_sum += sum_column<Shape::kRows, Shape::kCols, Shape::kXStride>(x);
    if (work.l_sums) l_sum += sum_column<Shape::kRows, Shape::kWidth, Shape::kLStride>(l);
    if (work.product) product.add(l, x, job.width);
    if (work.dx) {
      if (work.x) __syncthreads();  // everyone is done with the tile of X
      Gradient::finish(work, x, ahead, l, a, bits, row, rows);
    }
  }

  float* const space = reinterpret_cast<float*>(shared);
  if (work.product) {
    __syncthreads();
    product.store([&](int in_l, int in_x, float value) { space[in_l * Shape::kProductStride + in_x] = value; });
    __syncthreads();
    store_product<Shape>(work, space);
  }
  if (work.x_sums) {
    store_sums<Shape::kCols>(job.column_sums + place.split * job.x.cols + place.column, space, x_sum, place.columns);
  }
  if (work.l_sums) store_sums<Shape::kWidth>(job.l_sums + int64_t{place.split} * job.width, space, l_sum, job.width);
}

// Columns of X in a slice, and rows in a tile, for any of the kernels.
struct TileSize {
  int64_t rows, cols;
};
TileSize tile_size(Dtype dtype, int padded_width) {
  const int64_t z_bytes = dtype == Dtype::kBFloat16 ? 2 : 4;
  return {tile_rows(padded_width * z_bytes), tile_columns(dtype == Dtype::kFloat32, padded_width)};
}

int64_t slices_of(const GradInputParams& p, const GradInputJob& job) {
  const bool sums = job.product != nullptr || job.column_sums != nullptr || job.l_sums != nullptr;
  if (job.rows == 0 && !sums) return 0;
  const int64_t cols = tile_size(p.dtype, p.padded_width).cols;
  int64_t slices = 0;
  for (int i = job.first_segment; i < job.first_segment + job.segment_count; ++i) {
    if (has_work(job, p.segments[i])) slices += plan::round_up(p.segments[i].length, cols) / cols;
  }
  return slices == 0 && job.l_sums != nullptr ? 1 : slices;
}

}  // namespace

int64_t grad_input_splits(Dtype dtype, int padded_width, int64_t rows, int64_t cols) {
  const TileSize tile = tile_size(dtype, padded_width);
  const int64_t slices = std::max<int64_t>(plan::round_up(cols, tile.cols) / tile.cols, 1);
  const int64_t wanted = std::min<int64_t>((plan::kWantedBlocks + slices - 1) / slices, rows / (2 * tile.rows));
  return std::clamp<int64_t>(wanted, 1, 16);
}

cudaError_t grad_input(const GradInputParams& params, cudaStream_t stream) {
  KernelParams p{params, 0, {}, {}};
  int64_t blocks = 0;
  for (int i = 0; i < p.job_count; ++i) {
    GradInputJob& job = p.jobs[i];
    if (job.x.data == nullptr) job.product = job.column_sums = nullptr;
    // Dropout goes by the columns of the matrix in words of 32, and sums of columns are those before dropout.
    if (job.drop.threshold != 0 && (job.column_sums != nullptr || job.segment_count > 1 ||
                                    (job.segment_count == 1 && p.segments[job.first_segment].start != 0))) {
      return cudaErrorInvalidValue;
    }
    if (job.width > p.padded_width) return cudaErrorInvalidValue;
    p.slices[i] = static_cast<int>(slices_of(params, job));
    p.keep_scale[i] = static_cast<float>(job.drop.scale());
    blocks += int64_t{p.slices[i]} * job.splits;
  }
  if (blocks == 0) return cudaSuccess;
  return dispatch_float(p.dtype, [&]<class T>() {
    return dispatch_width(p.padded_width, [&]<int kWidth>() {
      using Shape = Tile<T, kWidth>;
      p.stages = std::max(Shape::kLeast, plan::ring_stages(blocks, p.processors, in_pairs(kWidth), p.shared_bytes,
                                                           Shape::kStageBytes, Shape::kBesideStages, Shape::kLeast));
      const size_t shared = static_cast<size_t>(p.stages) * Shape::kStageBytes + Shape::kBesideStages;
      return launch<grad_input_kernel<T, kWidth>>(dim3(static_cast<unsigned>(blocks)), dim3(kThreads), shared, stream,
                                                  p);
    });
  });
}

}  // namespace routed_peft::cuda
