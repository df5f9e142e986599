// The steps of rank_one_grad.cu, each a launch of its own, and what they hand to each other.
#pragma once

#include "kernels/device/rank_one_grad.cuh"
#include "kernels/directions.h"
#include "kernels/plan.h"

namespace routed_peft::cuda::rank_one_backward {

constexpr int64_t kWantedBlocks = 264;  // of a launch: two for each processor of a large GPU
constexpr int kSumColumns = 128;        // of a tile of the sums

inline int64_t ceil_div(int64_t size, int64_t step) { return (size + step - 1) / step; }

struct Wants {
  bool dv, dq, dp, dx, pooled_rows;
  Matrix dy;  // of the pooled rows
};

// What pooling makes of a condition's tokens.
struct Counted {
  float weight, bias_weight;
  int first;  // the first valid row, counted from the condition's first, or -1
};

struct Splits {
  unsigned condition_tiles, depth_tiles;
  int tiles, tiles_per_split, splits;
};

// Everything in the scratch space; with base nullptr only its size counts.
struct Space {
  float *q, *p, *partial, *sums, *dv;
  Counted* counted;
  int *order, *starts;
  int64_t bytes = 0;

  Space(const Problem& problem, const Wants& wants, const Chunks& chunks, const Parts& parts, int splits, void* base);
};

// rank_one_sweep.cu
Chunks chunks_of_problem(const Problem& p);
cudaError_t sweep(const Problem& p, const Backward& io, const Wants& wants, const Chunks& chunks, const Parts& parts,
                  const Space& space, cudaStream_t stream);

// rank_one_sum.cu
Splits splits_of(const Problem& p, const Wants& wants, const Parts& parts);
cudaError_t sum(const Problem& p, const Wants& wants, const Chunks& chunks, const Parts& parts, const Splits& splits,
                const Space& space, cudaStream_t stream);

// rank_one_weights.cu
cudaError_t weights(const Problem& p, const Backward& io, const Wants& wants, const Parts& parts, const Splits& splits,
                    const Space& space, cudaStream_t stream);

}  // namespace routed_peft::cuda::rank_one_backward
