// Y -> the state of the condition, and back: pooling, projection, S = VᵀV and K = relu(V)ᵀV.
#pragma once

#include "cpu/host.h"

namespace routed_peft::cpu {

// A condition as the route reads it.
template <class Acc>
struct State {
  StateKind kind = StateKind::kNone;
  const Acc* data = nullptr;    // v [conditions, R], S or K [conditions, R, w], or V [y_rows, R]
  Matrix tokens;                // V instead of data, where gram routes work on V itself
  const Acc* factor = nullptr;  // and then [conditions], scale by tokens
};

// Whether V, and what is made of it, may be rounded to bfloat16 as a factor: where its own factors were of it.
inline bool half_tokens(const Problem& p) { return p.dtype == Dtype::kBFloat16 && p.c.dtype == Dtype::kBFloat16; }

// What pooling makes of the rows of one condition: `weight` times the sum of its valid rows, or of the first one only.
struct Pooled {
  int64_t valid = 0;       // valid rows
  double weight = 0;       // of each row that counts
  double bias_weight = 0;  // of the projection's bias: the sum of the weights
};
Pooled pooled(const Problem& p, int64_t condition);

// 1 / max(1, valid tokens) for each condition, or 1: what S, K and u are multiplied by.
template <class Acc>
void scale_factors(const Problem& p, Acc* factor);

// v [conditions, R] from y, pooled before it is projected (the projection is linear); the pooled y [conditions, d_c]
// is left in `pooled_y`.
template <class Acc>
void encode_vector(const Host& host, const Problem& p, Acc* v, Acc* pooled_y);

// V [y_rows, R], zero in masked rows; in-sequence from T [rows, R].
template <class Acc>
void project_tokens(const Host& host, const Problem& p, const Matrix& t, const Matrix& v);

// S or K [conditions, R, w] from V [y_rows, R].
template <class Acc>
void encode_matrix(const Host& host, const Problem& p, const Acc* v, Acc* s);

// dV [y_rows, R] from the gradient of S or K.
template <class Acc>
void matrix_backward(const Host& host, const Problem& p, const Matrix& v, const Acc* ds, const Matrix& dv);

// Gradients of y, C and its bias from dv [conditions, R]; dy and, where C is shared, dc and db_c are added to.
template <class Acc>
void vector_gradients(const Host& host, const Problem& p, const Acc* dv, const Acc* pooled_y, const Matrix& dy,
                      bool add_dy, const Matrix& dc, const Matrix& db_c, bool add_dc);

// The same from dV [y_rows, R], dense; masked rows of dV are made zero.
template <class Acc>
void token_gradients(const Host& host, const Problem& p, const Matrix& dv, const Matrix& dy, const Matrix& dc,
                     const Matrix& db_c, bool add_dc);

}  // namespace routed_peft::cpu
