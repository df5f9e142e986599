// What a gradient of a condition is gathered from: the samples that use it, and those of its rows that pooling counts.
#pragma once

#include <algorithm>

#include "kernels/device/rows.cuh"

namespace routed_peft::cuda {

inline int64_t pieces(int64_t size, int64_t piece) { return (size + piece - 1) / piece; }

// Pieces of an average sequence; a block whose sequence is longer takes several.
inline unsigned pieces_of(const Sequences& rows, int64_t each, int64_t piece) {
  return static_cast<unsigned>(std::max<int64_t>(pieces(pieces(rows.rows, rows.count) * each, piece), 1));
}

// body(sample) for the samples that use the condition, in their order, by the whole block: body may hold barriers.
template <int kThreads, class Body>
RP_DEVICE void for_samples(const Sequences& samples, const int64_t* index, int64_t condition, const Body& body) {
  RP_SHARED(uint32_t[kThreads / 32], found);
  const int tid = static_cast<int>(threadIdx.x);
  const int64_t begin = index == nullptr ? condition / kThreads * kThreads : 0;
  const int64_t end = index == nullptr ? begin + 1 : samples.count;
  RP_NO_UNROLL
  for (int64_t first = begin; first < end; first += kThreads) {
    const int64_t sample = first + tid;
    const bool mine = sample < samples.count && (index == nullptr ? sample : index[sample]) == condition;
    const uint32_t ballot = __ballot_sync(~0u, mine);
    __syncthreads();  // the last step's have been read
    if (tid % 32 == 0) found[tid / 32] = ballot;
    __syncthreads();
    RP_NO_UNROLL
    for (int warp = 0; warp < kThreads / 32; ++warp) {
      RP_NO_UNROLL
      for (uint32_t left = found[warp]; left != 0; left &= left - 1) {
        body(first + 32 * warp + __ffs(static_cast<int>(left)) - 1);
      }
    }
  }
}

// Which of a condition's rows count, and with what weight: csrc/cpu/condition.h's Pooled.
struct PooledRows {
  int64_t first;  // the first row that is not masked; the range's end if there is none
  float weight, bias_weight;
};

// By a whole warp.
RP_DEVICE PooledRows pooled_rows(Pool pool, bool scale_by_tokens, const bool* mask, const RowRange& rows) {
  constexpr int kAtOnce = 8;
  int64_t valid = rows.end - rows.begin, first = rows.begin;
  if (mask != nullptr) {
    const int lane = static_cast<int>(threadIdx.x) % 32;
    valid = 0, first = rows.end;
    for (int64_t begin = rows.begin; begin < rows.end; begin += 32 * kAtOnce) {
      uint32_t counted[kAtOnce];
      RP_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        const int64_t row = begin + 32 * i + lane;
        counted[i] = row < rows.end && mask[row];
      }
      RP_UNROLL
      for (int i = 0; i < kAtOnce; ++i) {
        counted[i] = __ballot_sync(~0u, counted[i] != 0);
        if (valid == 0 && counted[i] != 0) first = begin + 32 * i + __ffs(static_cast<int>(counted[i])) - 1;
        valid += __popc(counted[i]);
      }
      if (pool == Pool::kFirst && valid > 0) break;
    }
  }
  if (valid == 0) return {first, 0.f, 0.f};
  if (pool == Pool::kFirst) return {first, 1.f, 1.f};
  const float count = static_cast<float>(valid);
  const bool mean = pool == Pool::kMean || scale_by_tokens;
  return {first, mean ? 1.f / count : 1.f, mean ? 1.f : count};
}

RP_DEVICE bool counts(Pool pool, const PooledRows& pooled, const bool* mask, int64_t row) {
  return pool == Pool::kFirst ? row == pooled.first : mask == nullptr || mask[row];
}

}  // namespace routed_peft::cuda
