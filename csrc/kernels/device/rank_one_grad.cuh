// What the kernels of rank_one_grad.cu have in common: chunks of rows, the parts of a row of sums, and runs of columns.
#pragma once

#include "kernels/device/philox.cuh"
#include "kernels/device/rows.cuh"
#include "kernels/device/vector.cuh"
#include "kernels/launch.h"

namespace routed_peft::cuda::rank_one_backward {

constexpr int kLane = 8;    // neighbouring columns of a lane
constexpr int kChain = 64;  // numbers added one after the other: short chains round less

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

RP_DEVICE void store_sums(float* to, const float (&sum)[kLane]) {
  RP_UNROLL
  for (int i = 0; i < kLane; i += 4) {
    store_vector<4>(to + i, Elements<float, 4>{{sum[i], sum[i + 1], sum[i + 2], sum[i + 3]}});
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

}  // namespace routed_peft::cuda::rank_one_backward
