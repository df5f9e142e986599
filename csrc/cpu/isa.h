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

// A sum over many rows in two steps, so that its rounding error grows with the square root of their number at most:
// rows are added to a part, and every kRows of them the part to the total.
template <class Acc>
class RowSums {
 public:
  RowSums(Acc* total, Acc* part, int64_t size) : total_(total), part_(part), size_(size) { clear(); }
  Acc* part() { return part_; }
  void end_row() {
    if (++rows_ == kRows) flush();
  }
  void flush() {
    if (rows_ == 0) return;
    isa<Acc>().axpy(size_, 1, part_, total_);
    clear();
  }

 private:
  static constexpr int64_t kRows = 16;
  void clear() {
    for (int64_t i = 0; i < size_; ++i) part_[i] = 0;
    rows_ = 0;
  }
  Acc *total_, *part_;
  int64_t size_, rows_ = 0;
};

}  // namespace routed_peft::cpu
