// The inner loops that depend on the instruction set, chosen once at run time: a wheel is built without -march, which
// on x86-64 means SSE2. Everything above them is ordinary code.
#pragma once

#include <cstdint>

#include "kernels/plan.h"

namespace routed_peft::cpu {

// Acc is float, or double where the tensors are.
template <class Acc>
struct Isa {
  const char* name;
  plan::Processor processor;
  int64_t mr, nr;  // the block that `micro` computes

  // c [mr, nr] (leading dimension ldc) += Σ_k a(i, k) panel[k, :]; a by strides, panel [depth, nr] contiguous, aligned.
  void (*micro)(int64_t depth, const Acc* a, int64_t a_row, int64_t a_col, const Acc* panel, Acc* c, int64_t ldc);
  // Contiguous conversions; storing rounds to nearest even.
  void (*load)(const void* from, Dtype dtype, int64_t n, Acc* to);
  void (*store)(const Acc* from, int64_t n, Dtype dtype, void* to);
  // run = columns [column, column + n) of a row, dropped and scaled in place.
  void (*drop)(Acc* run, int64_t row, int64_t column, int64_t n, const Dropout& dropout);
  Acc (*dot)(const Acc* a, const Acc* b, int64_t n);
  void (*axpy)(int64_t n, Acc alpha, const Acc* x, Acc* y);  // y += alpha x
};

// The best set this processor has, or the one that ROUTED_PEFT_ISA=baseline|avx2|avx512 names (for tests; a name it
// lacks is ignored).
template <class Acc>
const Isa<Acc>& isa();

}  // namespace routed_peft::cpu
