// What a routed call is, without torch: plain structs that the CPU path and the kernels share.
//
// Names are those of routed_peft/reference.py: x [rows, d], A [R, d], B [selected o, r], y [y_rows, d_c], C [R, d_c],
// T [rows, R], state v [conditions, R] or S [conditions, R, w] or V [y_rows, R], with w = R / groups.
#pragma once

#include <cstdint>

#include "kernels/device/host_device.h"

namespace routed_peft {

enum class Dtype : int { kFloat32, kFloat64, kBFloat16, kFloat16 };

// The codes are those of routed_peft/routes.py and ops.py.
enum class Routing : int { kNone, kAdd, kMul, kExpand, kGram, kGramRelu, kCrossGram, kOnes };
enum class Source : int { kNone, kTokens, kState, kInSequence };
enum class Pool : int { kNone, kMean, kFirst };
enum class Activation : int { kNone, kGelu, kGeluTanh, kRelu, kSilu };

// The form a condition has once it is encoded: one row, one matrix a group, or one row a token.
enum class StateKind : int { kNone, kVector, kMatrix, kTokens };

inline int64_t element_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2; }

// Counter-based dropout of a [rows, cols] matrix; the map is in device/philox.cuh.
struct Dropout {
  uint64_t seed = 0;
  uint32_t threshold = 0;            // round(65536 p); 0 is no dropout
  uint32_t stream = 0;               // 0 = X, 1 = Y
  const int64_t* seed_at = nullptr;  // where a kernel finds the seed; nullptr: it is `seed`
  RP_HOST_DEVICE double scale() const { return threshold < 65536 ? 65536.0 / (65536.0 - threshold) : 0.0; }
};

// A strided matrix of any dtype in memory; data == nullptr means absent.
struct Matrix {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  int64_t rows = 0, cols = 0;
  int64_t row_stride = 0, col_stride = 1;  // in elements

  explicit operator bool() const { return data != nullptr; }
  void* at(int64_t row, int64_t col) const {
    return static_cast<char*>(data) + (row * row_stride + col * col_stride) * element_size(dtype);
  }
  Matrix transposed() const { return {data, dtype, cols, rows, col_stride, row_stride}; }
  Matrix block(int64_t row, int64_t col, int64_t row_count, int64_t col_count) const {
    return {at(row, col), dtype, row_count, col_count, row_stride, col_stride};
  }
};

inline Matrix dense(void* data, Dtype dtype, int64_t rows, int64_t cols) { return {data, dtype, rows, cols, cols, 1}; }

// How flat rows split into samples: evenly, or at the given offsets. In a kernel's problem the offsets are device
// memory, so that only the kernel may ask for begin and end.
struct Sequences {
  int64_t count = 0, rows = 0;
  const int64_t* offsets = nullptr;  // [count + 1], or nullptr for equal lengths
  RP_HOST_DEVICE int64_t length() const { return count > 0 ? rows / count : 0; }
  RP_HOST_DEVICE int64_t begin(int64_t i) const { return offsets ? offsets[i] : i * length(); }
  RP_HOST_DEVICE int64_t end(int64_t i) const { return offsets ? offsets[i + 1] : (i + 1) * length(); }
};

struct Slice {
  int64_t start = 0, length = 0;  // columns of the output
  int64_t row = 0;                // first row of B
};

// Everything that forward and backward have in common.
struct Problem {
  Dtype dtype = Dtype::kFloat32;  // of x, y, weight and the output
  Sequences inputs, conditions;
  Matrix x;                              // [rows, d]
  Matrix a;                              // [R, d]
  Matrix b;                              // [selected o, r]
  Matrix y;                              // [y_rows, d_c]; x itself for an in-sequence condition
  Matrix c;                              // [R, d_c]; A where it is shared
  Matrix weight;                         // [o, d]
  Matrix bias;                           // [1, o]
  Matrix b_down;                         // [1, R]
  Matrix b_c;                            // [1, R]; b_down where C is shared
  Matrix base;                           // [rows, o], of dtype: what a foreign base layer gave, to be added to
  const bool* condition_mask = nullptr;  // [y_rows]
  const bool* input_mask = nullptr;      // [rows]
  const int64_t* index = nullptr;        // [samples]
  const void* state = nullptr;           // accumulated dtype: the one given, in the backward also the one saved
  bool shared = false;                   // C is A

  Routing routing = Routing::kNone;
  Source source = Source::kNone;
  Pool pool = Pool::kNone;
  StateKind kind = StateKind::kNone;
  Activation activation = Activation::kNone;
  bool scale_by_tokens = true;
  bool residual = false;
  int64_t width = 0;   // R
  int64_t groups = 1;  // independent bottlenecks
  double scaling = 1;
  Dropout drop_x, drop_y;
  const Slice* slices = nullptr;  // one that covers the output where the caller gave none
  int64_t slice_count = 0;
  int64_t out_features = 0;

  // Whether the condition is projected here, and not given as a state.
  bool encodes() const { return source == Source::kTokens || source == Source::kInSequence; }
  int64_t group_width() const { return width / groups; }
  int64_t rank() const { return width / slice_count; }
  int64_t condition_of(int64_t sample) const { return index ? index[sample] : sample; }
  // Numbers in the state of one condition (a token's, for StateKind::kTokens).
  int64_t state_size() const { return kind == StateKind::kMatrix ? width * group_width() : width; }
};

struct ForwardResult {
  Matrix out;             // [rows, o]
  Matrix t;               // [rows, R] in x's dtype; rank-one: c [rows, groups], accumulated dtype; absent: not saved
  void* state = nullptr;  // accumulated dtype; nullptr: not saved
  Matrix kept;            // V [y_rows, R] in y's dtype, or the pooled y [conditions, d_c], accumulated dtype; or absent
};

// What the forward saved comes in, gradients go out; an absent one is not wanted.
struct Backward {
  Matrix dout;     // [rows, o]
  Matrix t, kept;  // as ForwardResult; Problem::state is nullptr where the forward went through V (plan::gram_order)

  Matrix dx, da, db, dy, dc, dweight, dbias, db_down, db_c;
  void* dstate = nullptr;  // Source::kState: gradient of the given state
};

}  // namespace routed_peft
