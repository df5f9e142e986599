// The kernels' launchers, in the order a forward and then a backward takes them. Pointers are device memory; each
// returns before it launches where there is nothing to do, and allocates nothing: scratch comes from the caller, who
// asks first how much.
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
  void* to[kMaxPacked];     // row-major [rows, to_cols] of `dtype`, zeros behind the last column
  int64_t to_cols[kMaxPacked];
  int count;
  Dtype dtype;
};
cudaError_t pack(const PackParams& params, cudaStream_t stream);

// ---- condition.cu: rows of y -> one row a condition
// v [conditions, R], float32: the projection of the pooled y, which goes to pooled_y [conditions, d_c], float32, unless
// nullptr. c is of dtype p.dtype, with neighbouring columns; biases may be of any dtype and stride.
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
  bool whole = false;  // no part of the rows is summed apart: one launch
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
  bool tensor = true;          // three TF32 products instead of float32 on the ordinary units
  const void* left = nullptr;  // [left_rows.rows, R]
  Dtype left_dtype = Dtype::kFloat32;
  const bool* left_mask = nullptr;  // [left_rows.rows]: a row is zero where false
  const float* right = nullptr;     // [right_rows.rows, R]
  Sequences left_rows, right_rows;
  const int64_t* index = nullptr;  // [samples]: which of right_rows a sample has; nullptr: its own
  const bool* mask = nullptr;      // [left_rows.rows]: counted for the factor 1 / max(1, true ones)
  bool scale_by_tokens = false;
  bool positive = false;  // f is relu
  int width = 0, group_width = 0;
  int splits = 1;            // of the rows
  float* out = nullptr;      // nullptr: `partial`, not multiplied by the factor, is all that is wanted
  float* partial = nullptr;  // [splits, samples, R, w] if splits > 1 or there is no out
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

// ---- the backward. Rows as wide as the bottleneck that one kernel leaves for another (Z, dT, dV) are "rows of Z's
// type": bfloat16 for bfloat16, float32 otherwise, since a gradient may leave float16's range.

// ---- grad_output.cu: dOut -> G = s dOut B̂ -> through the route: dT, and what dB and the condition's gradient need
// What becomes of G. Pointers begin at the first column that this launch has of the bottleneck.
struct RouteGradParams {
  RouteParams route;        // rows, width, routing, state, sums (u), ..., as in the forward; not what becomes of T
  const void* t = nullptr;  // T [rows, ...] in the kernel's type
  int64_t t_stride = 0;
  // gram and gram_relu by tokens: V [y_rows, ...] in the kernel's type, instead of route.state
  const void* v = nullptr;
  int64_t v_stride = 0;
  const bool* input_mask = nullptr;  // cross_gram: [rows]
  // cross_gram's second sums: w = Σ dc_n T_n [samples, ...], rows route.state_stride apart, or D = TᵀG [samples, ...,
  // w]; and then V [y_rows, ...] beside C in route.state
  const float* second_sums = nullptr;
  const float* v_rows = nullptr;
  int64_t v_rows_stride = 0;
  // In sequence, each token with its own row: V's gradient goes into dT where this is true. (cross_gram then needs
  // dstate too, for its own use.)
  const bool* own_mask = nullptr;

  // What is wanted; rows of all of them `stride` apart.
  int64_t stride = 0;
  void* z = nullptr;              // Z, of Z's type
  void* dt = nullptr;             // dT, of Z's type
  float* dt_unrounded = nullptr;  // dT
  float* g = nullptr;             // gradient of ρ: G ∘ act'
  // Gradient of the state. Rows of tokens: of the token beside each row. Vectors: the sum over the rows of one sample
  // in one tile of kRouteRows = 16 rows of x (counted from row 0), in the first of those rows; the others are not
  // written.
  float* dstate = nullptr;
  float* second = nullptr;  // cross_gram with a vector: the same sums of dc_n T_n
};

struct GradOutputParams {
  Dtype dtype = Dtype::kFloat32;
  int padded_width = 0;
  Matrix dout;  // [rows, o], col_stride 1
  Matrix b;     // [selected o, rank], col_stride 1, of dtype
  float scaling = 1;
  int rank = 0;
  int slice_count = 0;
  Slice slices[kMaxSlices];  // slice i has columns [i rank, (i + 1) rank) of the bottleneck
  int splits = 1;            // of the slices' columns
  int64_t split_depth = 0;   // in steps of 64 columns, counted slice by slice
  int stages = 2;
  float* partial = nullptr;  // raw dOut B̂ [splits, rows, padded_width], for route_grad; or nullptr
  RouteGradParams route;
};
constexpr int kMaxFusedWidth = 128;  // wider ones go through `partial`
constexpr int64_t grad_output_stage_bytes(int64_t element_bytes, int padded_width) {
  return 64 * (128 + 16) + 128 / element_bytes * (padded_width * element_bytes + 16);
}
cudaError_t grad_output(const GradOutputParams& params, cudaStream_t stream);

// ---- route_grad.cu: the same from `partial`; or, without one, from G' [rows, stride] that an earlier one left in
// route.g (cross_gram, which needs sums over all of it first); or, with neither, Z alone
cudaError_t route_grad(const GradOutputParams& params, cudaStream_t stream);

// ---- grad_state.cu: the routes' sums -> gradients of the condition's vectors or tokens
// Sums over the samples that share a condition, in their order.
struct StateGradParams {
  Dtype dtype = Dtype::kFloat32;  // says what Z's type is
  bool tokens = false;          // `from` has a row for each token (row n of a sample is token n of its condition); else
                                // RouteGradParams::dstate's sums
  const float* from = nullptr;  // [inputs.rows, width]
  int64_t from_stride = 0;
  int width = 0;
  Sequences inputs, conditions;
  const int64_t* index = nullptr;  // [samples]
  const bool* mask = nullptr;      // [y_rows]: tokens where it is false have gradient zero; what pooling counts
  float* out = nullptr;            // vectors [conditions, width], tokens [y_rows, width], dense; or nullptr
  void* rows = nullptr;            // tokens: the same of Z's type, rows_stride apart; or nullptr
  int64_t rows_stride = 0;
  // In sequence, vectors (inputs = conditions): rows = dt + weight · the condition's sum, where mask counts the row.
  const float* dt = nullptr;  // [inputs.rows, width], rows from_stride apart
  Pool pool = Pool::kNone;    // with scale_by_tokens: the weight, as csrc/cpu/condition.h's Pooled has it
  bool scale_by_tokens = true;
  // A second sum of vectors, by sample and without index: cross_gram's w.
  const float* second_from = nullptr;
  float* second_out = nullptr;  // [samples, width]
};
cudaError_t state_grad(const StateGradParams& params, cudaStream_t stream);

// ---- gram_grad.cu: and of its matrices
// gram and gram_relu: dV = f (V (D + Dᵀ)), or f (V⁺ D + (V Dᵀ) ∘ [V > 0]), with f = 1 / max(1, valid tokens) where
// scale_by_tokens; from D = Σ T⁽⁺⁾ᵀ G, or in the order of tokens, dV = f (dPᵀ T⁽⁺⁾ ∘ [V > 0] + Pᵀ G) with P = T⁽⁺⁾
// V⁽⁺⁾ᵀ and dP = G Vᵀ, where D is nullptr.
struct GramGradParams {
  Dtype dtype = Dtype::kFloat32;  // of t and v
  bool relu = false, scale_by_tokens = true;
  int width = 0, group_width = 0;
  Sequences inputs, conditions;
  const int64_t* index = nullptr;
  const bool* mask = nullptr;  // [y_rows]: counted for f; V is zero and gets no gradient where false
  const float* d = nullptr;    // [splits, samples, width, group_width]
  int splits = 1;
  const void* t = nullptr;   // [inputs.rows, width]: the order of tokens
  const float* g = nullptr;  // [inputs.rows, width]
  const void* v = nullptr;   // [y_rows, width]; rows where the mask is false may hold anything
  int64_t t_stride = 0, g_stride = 0, v_stride = 0;
  void* rows = nullptr;  // dV of Z's type [y_rows, width], rows_stride apart
  int64_t rows_stride = 0;
  const float* dt = nullptr;  // in sequence: added to dV; [y_rows, width], rows rows_stride apart
  float* dstate = nullptr;    // instead of rows: Σ D [conditions, width, group_width], without f
};
cudaError_t gram_grad(const GramGradParams& params, cudaStream_t stream);

// ---- pooled_grad.cu
// Pooled conditions, in products with one row a condition: dC = dvᵀ ȳ, db_c = Σ bias_weight dv,
// dY_m = mask ∘ weight (dv C) in the rows that pooling counts and zero in the others. p: a Problem of a vector state.
struct PooledGradParams {
  const float* dv = nullptr;        // [conditions, R]
  const float* pooled_y = nullptr;  // [conditions, d_c]; only for dc
  float* dc = nullptr;              // [R, d_c] or nullptr
  float* db_c = nullptr;            // [R] or nullptr
  Matrix dy;                        // [y_rows, d_c] of p.dtype, or absent
};
cudaError_t pooled_grad(const Problem& p, const PooledGradParams& params, cudaStream_t stream);

// ---- grad_input.cu: sweeps over tall matrices X [rows, cols] (x, y or dOut) beside rows L of Z's type, all in one
// launch: Σ_n L_nᵀ X̃_n, column sums, and dX = mask ∘ (L A) + residual
struct GradInputJob {
  Matrix x;                        // [rows, cols] of dtype, col_stride 1; data nullptr: nothing of it is wanted
  const bool* row_mask = nullptr;  // [rows]: rows of X and of L are zero where false
  // Of X and dX: then there is one segment, from column 0 on, and no column sums.
  Dropout drop;
  // [rows, ...] of Z's type, rows l_stride apart; what lies between the columns and the next 16 bytes may be read.
  const void* l = nullptr;
  int64_t l_stride = 0;
  int width = 0;  // columns of l that a segment has
  int64_t rows = 0;
  int first_segment = 0, segment_count = 0;  // of the columns, in their order and without gaps
  Matrix a;         // [width, cols], any dtype and strides, taken as dtype; for dx, and then there is one segment
  Matrix dx;        // [rows, cols] of dtype, or absent
  Matrix residual;  // [rows, cols] of dtype, or absent; may be dx itself
  int splits = 1;   // of the rows
  // Parts, float32, one behind another: [splits, product_size], the product of column c of a segment and column j of l
  // at (b_row + c - start) product_col_stride + j product_l_stride; or nullptr
  float* product = nullptr;
  int64_t product_size = 0, product_col_stride = 0, product_l_stride = 0;
  float* column_sums = nullptr;  // [splits, cols]: of X; or nullptr
  float* l_sums = nullptr;       // [splits, width]: of L, for a job of one segment; or nullptr
};
constexpr int kMaxJobs = 3;
struct GradInputParams {
  Dtype dtype = Dtype::kFloat32;
  int padded_width = 0;  // of the widest job
  // Of the device, for how far the loads run ahead: its processors, and what a block may have of shared memory.
  int64_t processors = 1, shared_bytes = 99 << 10;
  int job_count = 0;
  GradInputJob jobs[kMaxJobs];
  // Of all jobs. z_column is the first column of l; where b_row < 0 only column sums are wanted.
  Segment segments[kMaxSegments + kMaxJobs - 1];
};
int64_t grad_input_splits(Dtype dtype, int padded_width, int64_t rows, int64_t cols);  // by shape alone
cudaError_t grad_input(const GradInputParams& params, cudaStream_t stream);

// ---- reduce.cu: out = scale · (Σ parts, in order), into any dtype
struct ReduceItem {
  const float* parts[2] = {nullptr, nullptr};  // two sums of parts, the first one's first
  int64_t splits[2] = {0, 0};                  // each part is as large as out
  Matrix out;                                  // [rows, cols], row-major and dense
  float scale = 1;
};
constexpr int kMaxReduced = 6;
struct ReduceParams {
  int count = 0;
  ReduceItem items[kMaxReduced];
};
cudaError_t reduce(const ReduceParams& params, cudaStream_t stream);

// ---- rank_one_grad.cu: the backward of rank_one. a, b and c of p may be of any dtype and strides. io.t is c [rows,
// groups]; p.state is v [conditions, R]; io.dweight, io.dbias and the base layer's part of io.dx are not its business.
int64_t rank_one_grad_scratch(const Problem& p, const Backward& io);  // bytes
cudaError_t rank_one_grad(const Problem& p, const Backward& io, void* scratch, cudaStream_t stream);

}  // namespace routed_peft::cuda
