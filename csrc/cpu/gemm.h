// out = alpha · op(a) op(b) + …, for every product of the low-rank path: any dtype and strides in, sums in Acc, dropout
// drawn while an operand is read, so that no dropped copy of a tensor ever exists.
#pragma once

#include "cpu/host.h"

namespace routed_peft::cpu {

// A factor as it is read. Dropout and `valid` speak of the logical tensor's rows, which are the factor's rows, or its
// columns where `transposed` says that the factor is that tensor turned over.
struct Operand {
  Matrix matrix;
  Dropout dropout{};            // threshold 0: none
  const bool* valid = nullptr;  // [tensor rows]: rows that are not are read as zeros, whatever they hold
  bool transposed = false;

  Operand(const Matrix& m) : matrix(m) {}
  Operand(const Matrix& m, const Dropout& d, const bool* v = nullptr) : matrix(m), dropout(d), valid(v) {}
  Operand turned() const {
    Operand t = *this;
    t.matrix = matrix.transposed();
    t.transposed = !transposed;
    return t;
  }
};

struct Factors {
  Operand a, b;
};

// What happens to a finished sum before it is stored.
struct Epilogue {
  double alpha = 1;
  bool accumulate = false;        // + out
  Matrix bias;                    // + bias [1, n]
  Matrix residual;                // + residual [m, n]
  Dropout mask{};                 // ∘ dropout mask of out as a tensor, before everything but alpha
  const Factors* plus = nullptr;  // + plus->a plus->b, plain, of any depth: what saves a second pass over out
  bool ours = false;              // not the host's library, whatever plan.h says of a product of this size
  bool in_bfloat16 = false;  // both factors may be rounded to bfloat16, as eager would; the sum still is in float32
};

// out [m, n] = alpha · a [m, k] b [k, n]; parallel over blocks of out, the sum over k in one fixed order.
template <class Acc>
void gemm(const Host& host, const Matrix& out, const Operand& a, const Operand& b, const Epilogue& epilogue = {});

// The same on the calling thread alone, for a block of a larger computation.
template <class Acc>
void gemm_serial(const Matrix& out, const Operand& a, const Operand& b, const Epilogue& epilogue = {});

}  // namespace routed_peft::cpu
