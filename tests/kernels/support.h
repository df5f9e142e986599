// What the tests of the CPU path share: hosts with threads of their own, slow conversions to check the fast ones
// against, and matrices of any dtype and layout with nothing allocated around them.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <thread>
#include <vector>

#include "check.h"
#include "cpu/host.h"

namespace routed_peft::test {

constexpr double kNan = std::numeric_limits<double>::quiet_NaN();
constexpr Dtype kDtypes[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16};

class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed) {}
  uint64_t bits() {  // splitmix64
    uint64_t z = state_ += 0x9E3779B97F4A7C15u;
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9u;
    z = (z ^ (z >> 27)) * 0x94D049BB133111EBu;
    return z ^ (z >> 31);
  }
  int64_t below(int64_t n) { return static_cast<int64_t>(bits() % static_cast<uint64_t>(n)); }
  bool coin() { return (bits() >> 32) & 1; }
  double uniform() { return static_cast<double>(bits() >> 11) * 0x1p-52 - 1; }  // in [-1, 1)

 private:
  uint64_t state_;
};

// --- half precision, from its definition

struct HalfFormat {
  int mantissa, min_exponent;  // explicit mantissa bits, exponent of the smallest normal number
  uint16_t infinity;
};
inline HalfFormat half_format(Dtype dtype) {
  return dtype == Dtype::kBFloat16 ? HalfFormat{7, -126, 0x7F80} : HalfFormat{10, -14, 0x7C00};
}

inline double half_value(Dtype dtype, uint16_t bits) {
  const HalfFormat f = half_format(dtype);
  const int magnitude = bits & 0x7FFF, field = magnitude >> f.mantissa, fraction = magnitude & ((1 << f.mantissa) - 1);
  double value;
  if (magnitude > f.infinity) {
    value = kNan;
  } else if (magnitude == f.infinity) {
    value = std::numeric_limits<double>::infinity();
  } else if (field == 0) {
    value = std::ldexp(fraction, f.min_exponent - f.mantissa);
  } else {
    value = std::ldexp(fraction + (1 << f.mantissa), f.min_exponent + field - 1 - f.mantissa);
  }
  return bits & 0x8000 ? -value : value;
}

// Nearest, ties to even; NaN becomes some NaN.
inline uint16_t half_bits(Dtype dtype, double value) {
  const HalfFormat f = half_format(dtype);
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  if (std::isnan(value)) return static_cast<uint16_t>(sign | f.infinity | 1);
  if (std::isinf(value)) return static_cast<uint16_t>(sign | f.infinity);
  if (value == 0) return sign;
  const int exponent = std::max(std::ilogb(value), f.min_exponent);
  const double quanta = std::nearbyint(std::ldexp(std::abs(value), f.mantissa - exponent));
  const double bits = quanta + std::ldexp(exponent - f.min_exponent, f.mantissa);
  return static_cast<uint16_t>(sign | static_cast<uint16_t>(std::min<double>(bits, f.infinity)));
}

// half_value by table: the tests read millions of elements
inline double half_value_fast(Dtype dtype, uint16_t bits) {
  static const auto table = [] {
    std::vector<double> values(2 * 65536);
    for (int i = 0; i < 65536; ++i) {
      values[static_cast<size_t>(i)] = half_value(Dtype::kBFloat16, static_cast<uint16_t>(i));
      values[static_cast<size_t>(65536 + i)] = half_value(Dtype::kFloat16, static_cast<uint16_t>(i));
    }
    return values;
  }();
  return table[bits + (dtype == Dtype::kFloat16 ? 65536u : 0u)];
}

// Distance between neighbours, relative to the number: half of it is what storing may be off by.
inline double epsilon(Dtype dtype) {
  return dtype == Dtype::kFloat64   ? 0x1p-52
         : dtype == Dtype::kFloat32 ? 0x1p-23
                                    : std::ldexp(1.0, -half_format(dtype).mantissa);
}

// What storing a number near zero may be off by: subnormal numbers lie evenly.
inline double tiny(Dtype dtype) { return dtype == Dtype::kFloat16 ? 0x1p-24 : 0x1p-126; }

inline double get(const Matrix& m, int64_t row, int64_t col) {
  const void* at = m.at(row, col);
  if (m.dtype == Dtype::kFloat64) return *static_cast<const double*>(at);
  if (m.dtype == Dtype::kFloat32) return static_cast<double>(*static_cast<const float*>(at));
  return half_value_fast(m.dtype, *static_cast<const uint16_t*>(at));
}

inline void set(const Matrix& m, int64_t row, int64_t col, double value) {
  void* at = m.at(row, col);
  if (m.dtype == Dtype::kFloat64) {
    *static_cast<double*>(at) = value;
  } else if (m.dtype == Dtype::kFloat32) {
    *static_cast<float*>(at) = static_cast<float>(value);
  } else {
    *static_cast<uint16_t*>(at) = half_bits(m.dtype, value);
  }
}

// --- matrices

enum class Layout { kDense, kTransposed, kPadded, kStrided };

// Storage that ends where the last element ends, so that AddressSanitizer sees a step too far. Poisoned at birth.
class Tensor {
 public:
  Tensor() = default;
  Tensor(Dtype dtype, int64_t rows, int64_t cols, Layout layout = Layout::kDense) {
    matrix_ = {nullptr, dtype, rows, cols, cols, 1};
    if (layout == Layout::kTransposed) matrix_.row_stride = 1, matrix_.col_stride = rows;
    if (layout == Layout::kPadded) matrix_.row_stride = cols + 3;
    if (layout == Layout::kStrided) matrix_.row_stride = 2 * cols + 1, matrix_.col_stride = 2;
    const int64_t last =
        rows > 0 && cols > 0 ? (rows - 1) * matrix_.row_stride + (cols - 1) * matrix_.col_stride + 1 : 0;
    bytes_.assign(static_cast<size_t>(std::max<int64_t>(1, last * element_size(dtype))), kGap);
    matrix_.data = bytes_.data();
    poison();
  }
  Tensor(const Tensor&) = delete;
  Tensor& operator=(const Tensor&) = delete;
  Tensor(Tensor&&) = default;
  Tensor& operator=(Tensor&&) = default;

  operator const Matrix&() const { return matrix_; }
  const Matrix& matrix() const { return matrix_; }
  void* data() const { return matrix_.data; }
  const std::vector<unsigned char>& bytes() const { return bytes_; }
  void poison() {
    fill([](int64_t, int64_t) { return kNan; });
  }
  template <class F>
  void fill(F&& value) {
    for (int64_t i = 0; i < matrix_.rows; ++i) {
      for (int64_t j = 0; j < matrix_.cols; ++j) set(matrix_, i, j, value(i, j));
    }
  }
  // Nothing between the rows was written.
  bool gaps_intact() const {
    std::vector<unsigned char> rest = bytes_;
    Matrix m = matrix_;
    m.data = rest.data();
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.cols; ++j) std::memset(m.at(i, j), kGap, static_cast<size_t>(element_size(m.dtype)));
    }
    return std::all_of(rest.begin(), rest.end(), [](unsigned char byte) { return byte == kGap; });
  }

 private:
  static constexpr unsigned char kGap = 0xA5;
  std::vector<unsigned char> bytes_;
  Matrix matrix_;
};

// --- hosts

// Splits every range in so many parts and does them one after the other, the last one first.
class SplitHost : public cpu::Host {
 public:
  explicit SplitHost(int64_t parts) : parts_(parts) {}

  void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) const override {
    const int64_t parts = std::min(parts_, count);
    for (int64_t i = parts - 1; i >= 0; --i) start(body, count * i / parts, count * (i + 1) / parts);
    finish();
  }
  int64_t threads() const override { return parts_; }
  bool library_gemm(const Matrix&, const Matrix&, const Matrix&, double, bool) const override { return false; }

 protected:
  virtual void start(const std::function<void(int64_t, int64_t)>& body, int64_t begin, int64_t end) const {
    body(begin, end);
  }
  virtual void finish() const {}

 private:
  int64_t parts_;
};

// Does them at once, each on a thread of its own.
class ThreadHost final : public SplitHost {
 public:
  using SplitHost::SplitHost;

 protected:
  void start(const std::function<void(int64_t, int64_t)>& body, int64_t begin, int64_t end) const override {
    threads_.emplace_back([&body, begin, end] { body(begin, end); });
  }
  void finish() const override {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  mutable std::vector<std::thread> threads_;
};

// Has a library: a plain loop.
class LibraryHost final : public SplitHost {
 public:
  LibraryHost() : SplitHost(2) {}
  bool library_gemm(const Matrix& out, const Matrix& a, const Matrix& b, double alpha, bool accumulate) const override {
    ++calls;
    for (int64_t i = 0; i < out.rows; ++i) {
      for (int64_t j = 0; j < out.cols; ++j) {
        double sum = 0;
        for (int64_t k = 0; k < a.cols; ++k) sum += get(a, i, k) * get(b, k, j);
        set(out, i, j, alpha * sum + (accumulate ? get(out, i, j) : 0));
      }
    }
    return true;
  }
  mutable int64_t calls = 0;
};

}  // namespace routed_peft::test
