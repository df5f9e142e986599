// q_g = A_gᵀ u and p = s B̂ u in float32, which rank_one.cu makes for both directions: u is a condition's v, or the ones
// vector where a route sums, and then there is one direction for all conditions.
#pragma once

#include "kernels/launch.h"

namespace routed_peft::cuda {

struct Directions {
  bool q_shared, p_shared;
  int64_t q_stride, p_stride;    // q [conditions or 1, groups, q_stride], p [conditions or 1, p_stride]
  int64_t q_numbers, p_numbers;  // of all of them
  explicit Directions(const Problem& p);
};

// The rows of q and p begin at 16 bytes if q and p do, and q's are padded with zeros to 64 columns. q nullptr: only p
// is wanted. a and b may be of any dtype and strides.
cudaError_t make_directions(const Problem& p, const float* v, float* q, float* up, cudaStream_t stream);

}  // namespace routed_peft::cuda
