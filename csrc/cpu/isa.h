// The inner loops that depend on the instruction set, chosen once at run time: a wheel is built without -march, which
// on x86-64 means SSE2. Everything above them is ordinary code.
#pragma once

#include <cstdint>

#include "kernels/plan.h"

namespace routed_peft::cpu {

constexpr int64_t kCacheLine = 64;
constexpr int64_t kParts = 3, kSplitStep = 32;  // of Isa::Half's float32 numbers

// Rows of bytes that are wanted soon. The micro kernels ask for a few lines of them every kSteps units, so that they
// come while something is computed; many at once would be waited for.
struct Wanted {
  static constexpr int64_t kSteps = 16;

  const char *at = nullptr, *other = nullptr;  // `other`: as many bytes of another matrix, or nullptr
  int64_t stride = 0, other_stride = 0, bytes = 0, rows = 0;
  int64_t each = 1;  // lines at a time
  int64_t byte = 0;

  // For the second cache: the nearest one has what is multiplied. Inlined, as a part of their inner loops.
  [[gnu::always_inline]] inline void ask() {
    for (int64_t i = 0; i < each && rows > 0; ++i) {
      __builtin_prefetch(at + byte, 0, 2);
      if (other != nullptr) __builtin_prefetch(other + byte, 0, 2);
      byte += kCacheLine;
      if (byte < bytes) continue;
      byte = 0;
      if (--rows == 0) return;
      at += stride;
      other += other_stride;
    }
  }
};

// Acc is float, or double where the tensors are.
template <class Acc>
struct Isa {
  // c (leading dimension ldc) = Σ_k a(i, k) panel[k, :] over `depth` > 0 units, + c if `add`; a by strides, rows of the
  // panel `panel_row` after one another. A unit is a number, or two neighbours in k as bfloat16 (the first in the lower
  // half).
  template <class Unit>
  using Micro = void (*)(int64_t depth, const Unit* a, int64_t a_row, int64_t a_col, const Unit* panel,
                         int64_t panel_row, bool add, Acc* c, int64_t ldc, Wanted& wanted);

  const char* name;
  plan::Processor processor;
  int64_t row_step, lanes;
  Micro<Acc> micro[3][2];  // of row_step, twice and three times as many rows; by one and two vectors of `lanes`
  // Contiguous conversions; storing rounds to nearest even.
  void (*load)(const void* from, Dtype dtype, int64_t n, Acc* to);
  void (*store)(const Acc* from, int64_t n, Dtype dtype, void* to);
  void (*load_lines)(const void* from, Dtype dtype, int64_t stride, int64_t lines, int64_t n, Acc* to,
                     int64_t to_stride);  // load, `lines` times; strides in elements
  // depth lines of n numbers, `width` columns of them [depth, width] together, `panel` numbers after one another; what
  // the last lacks is zero.
  void (*lay_lines)(const void* from, Dtype dtype, int64_t stride, int64_t depth, int64_t n, int64_t width,
                    int64_t panel, Acc* to);
  // to [n, lanes] (leading dimension to_ld) = from [lanes, n] (leading dimension ld) turned over; numbers as large as
  // Acc.
  void (*turn)(const void* from, int64_t ld, int64_t n, void* to, int64_t to_ld);
  // to = columns [column, column + n) of a row, which may be `to`, dropped and scaled.
  void (*drop)(const Acc* run, int64_t row, int64_t column, int64_t n, const Dropout& dropout, Acc* to);
  // out = alpha · sum, dropped, + bias + residual (+ out), each of which may be absent; n contiguous columns.
  void (*finish)(const Acc* sum, int64_t n, Acc alpha, const Dropout* dropout, int64_t row, int64_t column,
                 const Acc* bias, const void* residual, bool accumulate, Dtype dtype, void* out);
  // c [rows, 4] (leading dimension ldc) = a [rows, k] bᵀ for four rows of b, of Acc or bfloat16; rows is 1, 2 or 4.
  void (*dots)(int64_t rows, const Acc* a, int64_t lda, const void* const* b, Dtype dtype, int64_t k, Acc* c,
               int64_t ldc);
  Acc (*dot)(const Acc* a, const Acc* b, int64_t n);
  void (*axpy)(int64_t n, Acc alpha, const Acc* x, Acc* y);  // y += alpha x

  // What a processor adds that multiplies pairs of bfloat16; all nullptr on others, and where Acc is not float.
  struct Half {
    // Rows and units that the micro kernels take at a time. Where unit_step is more than one they are AMX's tiles:
    // then a lies along k (a_col is 1), and a thread's calls stand between open and close.
    int64_t row_step, unit_step;
    Micro<uint32_t> micro[3][2];  // the last two are nullptr where they are tiles
    void (*open)();
    void (*close)();
    // load_lines and lay_lines, rounded to bfloat16; the latter takes float32 and bfloat16 and makes units, of which
    // the last holds a zero where depth is odd.
    void (*round_lines)(const void* from, Dtype dtype, int64_t stride, int64_t lines, int64_t n, uint16_t* to,
                        int64_t to_stride);
    void (*lay_lines)(const void* from, Dtype dtype, int64_t stride, int64_t depth, int64_t n, int64_t width,
                      int64_t panel, uint32_t* to);
    // dots of bfloat16 alone.
    void (*dots)(int64_t rows, const uint16_t* a, int64_t lda, const void* const* b, int64_t k, Acc* c, int64_t ldc);
    // to = a run of bfloat16, which may be `to`, dropped and not scaled.
    void (*mask)(const uint16_t* run, int64_t row, int64_t column, int64_t n, const Dropout& dropout, uint16_t* to);

    // With tiles, products of float32 numbers, each as the sum of kParts of bfloat16: the nearest to it, the nearest to
    // what that leaves, and the rest. A step of kSplitStep numbers is half as many units of first parts, then of second
    // ones, then of third ones; a unit has the numbers i and i + kSplitStep / 2 of its step.
    Micro<uint32_t> split_micro[3][2];
    // Lines of n numbers along k: [lines][steps of n][parts][units], a line `to_stride` units after the last.
    void (*split_lines)(const float* from, int64_t stride, int64_t lines, int64_t n, uint32_t* to, int64_t to_stride);
    // `depth` lines of n numbers: [steps of depth][parts][units][width], `panel` units after one another.
    void (*lay_split)(const float* from, int64_t stride, int64_t depth, int64_t n, int64_t width, int64_t panel,
                      uint32_t* to);
  } half;
};

// The best set this processor has, or the one that ROUTED_PEFT_ISA=baseline|avx2|avx512|amx names (for tests; a name it
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
