// The kernels' launchers, in the order a forward takes them. Pointers are device memory; each returns before it
// launches where there is nothing to do, and allocates nothing: scratch comes from the caller, who asks first how much.
#pragma once

#if defined(USE_CUDA) && !defined(__CUDACC__)  // csrc/torch: the host's compiler, and CUDA's own types
#include <cuda_runtime_api.h>
#else
#include "kernels/device/arch.cuh"
#endif
#include "kernels/params.h"

namespace routed_peft::cuda {

constexpr int64_t kMaxWidth = 256;  // of one group
constexpr int kMaxSlices = 16;

// ---- pack.cu: parameters of another dtype, in one launch
constexpr int kMaxPacked = 3;
struct PackParams {
  Matrix from[kMaxPacked];  // any dtype and strides
  void* to[kMaxPacked];     // row-major [rows, cols] of `dtype`
  int count;
  Dtype dtype;
};
cudaError_t pack(const PackParams& params, cudaStream_t stream);

// ---- condition.cu: rows of y -> one row a condition
// v [conditions, R], float32: the projection of the pooled y, which goes to pooled_y [conditions, d_c], float32, unless
// nullptr. c is of dtype p.dtype; biases may be of any.
int64_t encode_vector_scratch(const Problem& p);  // bytes
cudaError_t encode_vector(const Problem& p, float* v, float* pooled_y, void* scratch, cudaStream_t stream);

// out [rows.count, cols] float32: for each sequence, `pool` of its rows where `mask` (nullptr: all) is true, as
// csrc/cpu/condition.h's Pooled says (kNone: the sum, over the count where scale_by_tokens). No dropout.
struct PoolParams {
  Matrix from;  // [rows, cols], row-major
  Sequences rows;
  const bool* mask;  // [rows]
  Pool pool;
  bool scale_by_tokens;
  float* out;
};
int64_t pool_scratch(const PoolParams& params);  // bytes
cudaError_t pool(const PoolParams& params, void* scratch, cudaStream_t stream);

// ---- rank_one.cu: out = base + bias + residual + Σ c p, all of it, for plan::rank_one problems
// v [conditions, R] float32; c [rows, groups] float32 is left for the backward unless nullptr. a and b are of p.dtype.
int64_t rank_one_scratch(const Problem& p);  // bytes
cudaError_t rank_one(const Problem& p, const float* v, const Matrix& out, float* c, void* scratch, cudaStream_t stream);

// ---- down_route.cu: x -> T -> Z
// What becomes of T. Pointers begin at the first column that this launch has of the bottleneck.
struct RouteParams {
  int64_t rows = 0;  // of x
  int width = 0, group_width = 0;
  Routing routing = Routing::kNone;
  StateKind kind = StateKind::kNone;
  Activation activation = Activation::kNone;
  bool by_tokens = false;        // gram, gram_relu: state is V [y_rows, ...] though S is the state
  bool scale_by_tokens = false;  // with by_tokens: Z is divided by the valid tokens
  Sequences inputs, conditions;
  const int64_t* index = nullptr;        // [samples]
  const bool* condition_mask = nullptr;  // [y_rows]; with by_tokens, to count
  // v [conditions, ...], S [conditions, ..., w], V [y_rows, ...] or, for cross_gram, K [samples, ..., w]
  const float* state = nullptr;
  int64_t state_stride = 0;     // numbers from one condition (V: from one row) to the next
  const float* sums = nullptr;  // cross_gram with one row a condition: u [samples, ...], rows state_stride apart

  float keep_scale = 1;            // of dropout
  Matrix bias;                     // [1, width], any dtype
  const bool* row_mask = nullptr;  // [rows]: T is zero where false
  void* t = nullptr;               // T [rows, width] in the kernel's type, rows t_stride apart
  int64_t t_stride = 0;
  // T in float32, zero where the mask beside it is false (nullptr: nowhere); rows tokens_stride apart
  float* tokens[2] = {nullptr, nullptr};
  const bool* token_mask[2] = {nullptr, nullptr};
  int64_t tokens_stride = 0;
  bool tokens_unrounded = false;  // they are V, not rows of T, which is rounded to the input's dtype
};

// Whether two blocks fit into a processor's registers.
constexpr bool down_in_pairs(bool float32, int padded_width) { return !float32 && padded_width <= 64; }
constexpr int64_t down_stage_bytes(int padded_width) { return (64 + padded_width) * (128 + 16); }

struct DownRouteParams {
  Dtype dtype = Dtype::kFloat32;
  int padded_width = 0;  // plan::padded_width
  Matrix x;              // [rows, d], col_stride 1
  Matrix a;              // [width, d], any strides
  Dropout drop;
  int splits = 1;           // of d; more than one only for `partial`
  int64_t split_depth = 0;  // columns of x in each, a multiple of 64
  int stages = 2;           // of the ring, 2 to 8
  // The raw products [splits, rows, padded_width] in float32, for `route`; or nullptr.
  float* partial = nullptr;
  // Z [rows, slices · padded_rank], bfloat16 for bfloat16 and float32 otherwise (Z may exceed float16), each slice's
  // rank columns followed by zeros; or nullptr: T is all that is wanted.
  void* z = nullptr;
  int64_t z_stride = 0;
  int rank = 0, padded_rank = 0;
  RouteParams route;
};
cudaError_t down_route(const DownRouteParams& params, cudaStream_t stream);

// ---- route.cu: the same from `partial`; reads neither x nor a
cudaError_t route(const DownRouteParams& params, cudaStream_t stream);

// ---- gram.cu: K [samples, R, w] = factor · Σ_n f(L_n)ᵀ V_m(n), group by group
struct GramParams {
  bool tensor = true;            // three TF32 products instead of float32 on the ordinary units
  const float* left = nullptr;   // [left_rows.rows, R]
  const float* right = nullptr;  // [right_rows.rows, R]
  Sequences left_rows, right_rows;
  const int64_t* index = nullptr;  // [samples]: which of right_rows a sample has; nullptr: its own
  const bool* mask = nullptr;      // [left_rows.rows]: counted for the factor 1 / max(1, true ones)
  bool scale_by_tokens = false;
  bool positive = false;  // f is relu
  int width = 0, group_width = 0;
  int splits = 1;  // of the rows
  float* out = nullptr;
  float* partial = nullptr;  // [splits, samples, R, w] if splits > 1
};
cudaError_t gram(const GramParams& params, cudaStream_t stream);

// ---- up_project.cu: out = base + bias + residual + s · Z B̂ᵀ, written once
struct Segment {
  int64_t start, length;  // columns of the output
  int64_t b_row;          // first row of b; -1: no slice covers these columns
  int z_column;           // of the slice in Z
};
constexpr int kMaxSegments = 2 * kMaxSlices + 1;

struct UpProjectParams {
  Dtype dtype = Dtype::kFloat32;
  const void* z = nullptr;  // as DownRouteParams::z
  int64_t z_stride = 0;
  int rank = 0, padded_rank = 0;
  Matrix b;               // [selected o, rank], any strides
  Matrix out;             // [rows, o]
  Matrix base, residual;  // [rows, o] or absent; base may be out itself
  Matrix bias;            // [1, o], any dtype, or absent
  float scaling = 1;
  int64_t rows = 0;
  int segment_count = 0;
  Segment segments[kMaxSegments];
};
cudaError_t up_project(const UpProjectParams& params, cudaStream_t stream);

}  // namespace routed_peft::cuda
