#include <atomic>
#include <chrono>
#include <cstring>
#include <set>
#include <thread>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/rows.h"
#include "kernels/device/philox.cuh"
#include "kernels/plan.h"
#include "support.h"
#include "tiles.h"

namespace routed_peft::test {
namespace {

using cpu::Epilogue;
using cpu::Factors;
using cpu::Operand;

constexpr int64_t kSizes[] = {0, 1, 7, 8, 9, 16, 31, 33, 64, 65, 96, 127, 129, 255, 257, 300, 320};
constexpr int64_t kSizeCount = std::size(kSizes);
constexpr uint32_t kThresholds[] = {6554, 32768, 65536};

const cpu::Host& host(int64_t i) {
  static const SplitHost one(1), two(2);
  static const ThreadHost three(3), seven(7);
  static const cpu::Host* const hosts[] = {&one, &two, &three, &seven};
  return *hosts[i];
}

double kept(const Dropout& d, int64_t row, int64_t col) {
  if (d.threshold == 0) return 1;
  return dropout_keeps(d.seed, d.stream, d.threshold, row, col) ? d.scale() : 0;
}

double rounded(double value) {  // by way of float32, as a float64 is read
  static Tensor one(Dtype::kBFloat16, 1, 1);
  one.fill([&](int64_t, int64_t) { return static_cast<float>(value); });
  return get(one, 0, 0);
}

// Row by row or column by column; `half`: rounded to bfloat16.
std::vector<double> numbers(const Matrix& m, bool by_rows, bool half) {
  std::vector<double> all(static_cast<size_t>(m.rows * m.cols));
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.cols; ++j) {
      const double value = get(m, i, j);
      all[size_t(by_rows ? i * m.cols + j : j * m.rows + i)] = half ? rounded(value) : value;
    }
  }
  return all;
}

struct Factor {
  Tensor tensor;
  std::vector<char> valid;  // empty: all
  Dropout dropout{};
  bool transposed = false;

  Operand operand() const {
    Operand o(transposed ? tensor.matrix().transposed() : tensor.matrix(), dropout,
              valid.empty() ? nullptr : reinterpret_cast<const bool*>(valid.data()));
    o.transposed = transposed;
    return o;
  }
  // As the product sees it.
  std::vector<double> values(bool by_rows, bool half) const {
    const Matrix m = operand().matrix;
    std::vector<double> all = numbers(m, by_rows, half);
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.cols; ++j) {
        const int64_t row = transposed ? j : i, col = transposed ? i : j;
        const double scale = valid.empty() || valid[size_t(row)] ? kept(dropout, row, col) : 0;
        double& value = all[size_t(by_rows ? i * m.cols + j : j * m.rows + i)];
        value = scale == 0 ? 0 : scale * value;
      }
    }
    return all;
  }
};

Factor factor(Random& random, Dtype dtype, int64_t rows, int64_t cols) {
  Factor f;
  f.transposed = random.coin();
  f.tensor =
      Tensor(dtype, f.transposed ? cols : rows, f.transposed ? rows : cols, static_cast<Layout>(random.below(4)));
  if (random.below(3) == 0)
    f.dropout = {random.bits(), kThresholds[random.below(3)], static_cast<uint32_t>(random.below(2))};
  if (random.below(3) == 0) {
    f.valid.resize(static_cast<size_t>(f.tensor.matrix().rows) + 1);
    for (char& v : f.valid) v = random.coin();
  }
  f.tensor.fill(
      [&](int64_t row, int64_t) { return f.valid.empty() || f.valid[size_t(row)] ? random.uniform() : kNan; });
  return f;
}

// One random product: every kind of operand and epilogue, against plain sums in double, on all hosts bit for bit.
// `base`: with a base layer's product of that depth in bfloat16, whose weight lies along k.
template <class Acc>
void product(Random& random, int64_t m, int64_t n, int64_t k, int64_t base = 0) {
  const auto any = [&] { return kDtypes[random.below(4)]; };
  const Factor a = factor(random, any(), m, k), b = factor(random, any(), k, n);
  Epilogue e;
  e.alpha = random.coin() ? 1 : random.uniform();
  e.accumulate = random.coin();
  e.in_bfloat16 = sizeof(Acc) == 4 && (random.coin() || base > 0);
  Tensor bias, residual;
  if (random.coin()) {
    bias = Tensor(any(), 1, n, static_cast<Layout>(random.below(4)));
    bias.fill([&](int64_t, int64_t) { return random.uniform(); });
    e.bias = bias;
  }
  if (random.coin()) {
    residual = Tensor(any(), m, n, static_cast<Layout>(random.below(4)));
    residual.fill([&](int64_t, int64_t) { return random.uniform(); });
    e.residual = residual;
  }
  if (random.below(3) == 0 && base == 0) e.mask = {random.bits(), kThresholds[random.below(3)], 0};
  const int64_t more = base > 0 ? base : kSizes[random.below(kSizeCount)];
  const auto factor_of_second = [&](int64_t rows, int64_t cols, Layout layout) {
    return base > 0 ? Tensor(Dtype::kBFloat16, rows, cols, layout)
                    : Tensor(any(), rows, cols, static_cast<Layout>(random.below(4)));
  };
  Tensor left = factor_of_second(m, more, Layout::kDense), right = factor_of_second(more, n, Layout::kTransposed);
  for (Tensor* t : {&left, &right}) t->fill([&](int64_t, int64_t) { return random.uniform(); });
  const Factors second{left.matrix(), right.matrix()};
  if (random.coin() || base > 0) e.plus = &second;
  const Dtype out_dtype = any();
  const Layout out_layout = static_cast<Layout>(random.below(4));
  Tensor before(out_dtype, m, n, out_layout);  // NaN where nothing is added to it
  if (e.accumulate) before.fill([&](int64_t, int64_t) { return random.uniform(); });
  const auto run = [&](auto&& call) {
    Tensor out(out_dtype, m, n, out_layout);
    out.fill([&](int64_t i, int64_t j) { return get(before, i, j); });
    call(out);
    return out;
  };
  const Tensor out = run([&](const Matrix& to) { cpu::gemm<Acc>(host(0), to, a.operand(), b.operand(), e); });
  CHECK(out.gaps_intact(), "wrote beside the matrix, %d %d %d", int(m), int(n), int(k));
  const double unit = epsilon(sizeof(Acc) == 8 ? Dtype::kFloat64 : Dtype::kFloat32);
  // The first element that is further from the sums in double than rounding explains, or -1; `half`: of rounded
  // factors.
  const auto wrong = [&](const Tensor& got, bool half) -> int64_t {
    const std::vector<double> rows = a.values(true, half), columns = b.values(false, half);
    std::vector<double> more_rows, more_columns;
    if (e.plus) more_rows = numbers(left, true, half), more_columns = numbers(right, false, half);
    for (int64_t i = 0; i < m; ++i) {
      for (int64_t j = 0; j < n; ++j) {
        const double* x = rows.data() + i * k;
        const double* y = columns.data() + j * k;
        double sum = 0, size = 0;
        for (int64_t l = 0; l < k; ++l) {
          sum += x[l] * y[l];
          size += std::abs(x[l] * y[l]);
        }
        const double scale = e.alpha * kept(e.mask, i, j);
        sum *= scale, size *= std::abs(scale);
        for (int64_t l = 0; e.plus && l < more; ++l) {
          const double term = more_rows[size_t(i * more + l)] * more_columns[size_t(j * more + l)];
          sum += term, size += std::abs(term);
        }
        for (const double term : {e.bias ? get(e.bias, 0, j) : 0, e.residual ? get(e.residual, i, j) : 0,
                                  e.accumulate ? get(before, i, j) : 0}) {
          sum += term, size += std::abs(term);
        }
        const double allowed =
            double(k + more + 8) * unit * size + epsilon(out_dtype) * std::abs(sum) + tiny(out_dtype);
        if (!(std::abs(get(got, i, j) - sum) <= allowed)) return i * n + j;
      }
    }
    return -1;
  };
  const int64_t at = wrong(out, false);
  const bool holds = at < 0 || (e.in_bfloat16 && wrong(out, true) < 0);
  CHECK(holds, "(%d, %d) of %d %d %d is %g", int(at / n), int(at % n), int(m), int(n), int(k),
        get(out, at / n, at % n));
  for (const int64_t h : {int64_t{1}, 2 + random.below(2)}) {
    const Tensor split = run([&](const Matrix& to) { cpu::gemm<Acc>(host(h), to, a.operand(), b.operand(), e); });
    CHECK(split.bytes() == out.bytes(), "threads changed a bit, %d %d %d", int(m), int(n), int(k));
  }
  const Tensor serial = run([&](const Matrix& to) { cpu::gemm_serial<Acc>(to, a.operand(), b.operand(), e); });
  CHECK(serial.bytes() == out.bytes(), "gemm_serial differs, %d %d %d", int(m), int(n), int(k));
  // (a b)ᵀ = bᵀ aᵀ, with what `turned` keeps of dropout and `valid`
  if (e.mask.threshold == 0 && !e.bias && !e.residual && !e.plus) {
    const Tensor turned = run([&](const Matrix& to) {
      cpu::gemm<Acc>(host(0), to.transposed(), b.operand().turned(), a.operand().turned(), e);
    });
    // Summed in other steps, as the lines lie, or the parts of numbers in another order.
    const bool parts = sizeof(Acc) == 4 && !e.in_bfloat16 && cpu::isa<float>().processor.tiles;
    const bool other = parts || std::min(m, n) <= plan::kRowsInPlace;
    const bool same =
        other ? wrong(turned, false) < 0 || (e.in_bfloat16 && wrong(turned, true) < 0) : turned.bytes() == out.bytes();
    CHECK(same, "turned over, %d %d %d", int(m), int(n), int(k));
  }
}

// Two Latin squares: every pair of sizes meets in every pair of places.
void products() {
  Random random(3);
  for (int64_t i = 0; i < kSizeCount; ++i) {
    for (int64_t j = 0; j < kSizeCount; ++j) {
      product<float>(random, kSizes[i], kSizes[j], kSizes[(i + j) % kSizeCount]);
      product<double>(random, kSizes[i], kSizes[j], kSizes[(i + 3 * j + 5) % kSizeCount]);
    }
  }
  for (int repeat = 0; repeat < 300; ++repeat) {  // the rest of the options at small sizes
    product<float>(random, random.below(20), random.below(40), random.below(20));
    product<double>(random, random.below(20), random.below(40), random.below(20));
  }
  product<float>(random, 300, 300, 600);  // several blocks each way, several depths
  product<double>(random, 5, 300, 1025);
  product<float>(random, 1025, 5, 300);
  for (int i = 0; i < 2; ++i) product<float>(random, 290, 4000, 257);  // several tiles of a to a panel of b
  for (int i = 0; i < 12; ++i) {  // a weight's gradient, of many rows or many columns, whichever way its factors lie
    product<float>(random, 300, 40, 290);
    product<float>(random, 20, 1100, 270);
  }
  for (int i = 0; i < 4; ++i) product<float>(random, 60, 1300, 530);  // steps of k over several parts of a block
  for (int i = 0; i < 200; ++i) product<float>(random, 40, 24, 260);  // and with every kind of operand
  for (const int64_t rows : {1, 3, 16, 40, 200, 300}) product<float>(random, rows, 400, 24, 352);
  product<float>(random, 20, 300, 0, 288);
  // few rows and a large b that lies either way, of whole panels or not
  for (const int64_t rows : {1, 2, 4, 7, 16, 17, 33, 48, 49}) {
    product<float>(random, rows, 420, 150);
    product<double>(random, rows, 416, 97);
  }
}

// Numbers in parts, by tiles: float32's digits are all there, of every kind of product.
void in_parts() {
  if (!cpu::isa<float>().processor.tiles) return;
  plan::forced.split = 1;
  products();
  Random random(11);
  const auto filled = [&](int64_t rows, int64_t cols, double size) {
    Tensor t(Dtype::kFloat32, rows, cols);
    t.fill([&](int64_t, int64_t) { return size * random.uniform(); });
    return t;
  };
  for (const auto& [m, n, k] : {std::tuple{96, 64, 1024}, {64, 300, 64}, {40, 24, 5000}}) {
    for (const double size : {1.0, 1e20, 1e-30}) {
      const Tensor a = filled(m, k, size), b = filled(k, n, 1), out(Dtype::kFloat32, m, n);
      cpu::gemm<float>(host(0), out, a.matrix(), b.matrix());
      double error = 0, norm = 0;
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          double sum = 0;
          for (int64_t l = 0; l < k; ++l) sum += get(a, i, l) * get(b, l, j);
          error += std::pow(get(out, i, j) - sum, 2), norm += sum * sum;
        }
      }
      const double relative = std::sqrt(error / norm) / epsilon(Dtype::kFloat32);
      std::printf("%d %d %d of %g in parts: %.2f epsilon off\n", m, n, k, size, relative);
      CHECK(relative < 2.5, "%d %d %d of %g is %g epsilon off", m, n, k, size, relative);
    }
  }
  // What has no parts makes NaNs of its own row, and of nothing else; what is too small for them is lost as a zero is.
  constexpr int64_t kRows = 70, kColumns = 40, kDepth = 300;
  Tensor a = filled(kRows, kDepth, 1);
  const Tensor b = filled(kDepth, kColumns, 1), before(Dtype::kFloat32, kRows, kColumns);
  cpu::gemm<float>(host(0), before, a.matrix(), b.matrix());
  set(a, 5, 17, INFINITY), set(a, 33, 299, -INFINITY), set(a, 47, 0, kNan), set(a, 48, 0, 3.4e38);
  for (int64_t l = 0; l < kDepth; ++l) set(a, 69, l, 1e-40);
  const Tensor after(Dtype::kFloat32, kRows, kColumns);
  cpu::gemm<float>(host(0), after, a.matrix(), b.matrix());
  for (int64_t i = 0; i < kRows; ++i) {
    for (int64_t j = 0; j < kColumns; ++j) {
      const bool odd = i == 5 || i == 33 || i == 47 || i == 48;
      const double got = get(after, i, j);
      CHECK(odd ? std::isnan(got) : got == (i == 69 ? 0 : get(before, i, j)), "(%d, %d) is %g", int(i), int(j), got);
    }
  }
  plan::forced.split = -1;
}

// Few rows times a b whose rows run along n, which is read as it lies: alone, and with a second product.
template <class Acc>
void in_place() {
  Random random(9);
  constexpr Dtype kDtype = sizeof(Acc) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  const auto filled = [&](int64_t rows, int64_t cols) {
    Tensor t(kDtype, rows, cols, random.coin() ? Layout::kDense : Layout::kPadded);
    t.fill([&](int64_t, int64_t) { return random.uniform(); });
    return t;
  };
  const auto check = [&](int64_t m, int64_t n, int64_t k) {
    const Tensor a = filled(m, k), b = filled(k, n), left = filled(m, 40), right = filled(40, n);
    const Factors second{left.matrix(), right.matrix()};
    Epilogue e;
    if (random.coin()) e.plus = &second;
    const auto run = [&](auto&& call) {
      Tensor out(kDtype, m, n);
      call(out.matrix());
      return out;
    };
    const Tensor out = run([&](const Matrix& to) { cpu::gemm<Acc>(host(0), to, a.matrix(), b.matrix(), e); });
    std::vector<double> sums(size_t(m * n)), sizes(size_t(m * n));
    const auto add = [&](const Tensor& rows, const Tensor& columns, int64_t depth) {
      for (int64_t l = 0; l < depth; ++l) {
        std::vector<double> line;
        for (int64_t j = 0; j < n; ++j) line.push_back(get(columns, l, j));
        for (int64_t i = 0; i < m; ++i) {
          const double x = get(rows, i, l);
          for (int64_t j = 0; j < n; ++j) {
            sums[size_t(i * n + j)] += x * line[size_t(j)];
            sizes[size_t(i * n + j)] += std::abs(x * line[size_t(j)]);
          }
        }
      }
    };
    add(a, b, k);
    if (e.plus) add(left, right, 40);
    for (int64_t at = 0; at < m * n; ++at) {
      const double error = std::abs(get(out, at / n, at % n) - sums[size_t(at)]);
      CHECK(error <= double(k + 48) * epsilon(kDtype) * sizes[size_t(at)], "(%d, %d) of %d %d %d is off by %g",
            int(at / n), int(at % n), int(m), int(n), int(k), error);
    }
    for (const int64_t h : {1, 2, 3}) {
      const Tensor split = run([&](const Matrix& to) { cpu::gemm<Acc>(host(h), to, a.matrix(), b.matrix(), e); });
      CHECK(split.bytes() == out.bytes(), "threads changed a bit, %d %d %d", int(m), int(n), int(k));
    }
    const Tensor serial = run([&](const Matrix& to) { cpu::gemm_serial<Acc>(to, a.matrix(), b.matrix(), e); });
    CHECK(serial.bytes() == out.bytes(), "gemm_serial differs, %d %d %d", int(m), int(n), int(k));
  };
  for (const int64_t m : {1, 13, int(plan::kRowsInPlace)}) {
    for (const int64_t n : {33, 420, 1100}) {
      for (const int64_t k : {31, 75, 300}) check(m, n, k);
    }
  }
  for (int i = 0; i < 3; ++i) {  // rows that are shared out among the threads
    check(40, 64, 1700);
    check(33, 250, 700);
    check(20, 256, 1000);
  }
}

// A large plain product goes to the host's library where plan.h says so, in one dtype: with bfloat16 anywhere, the
// other factor and the result are converted. Bias and residual are laid down before, or added to the converted result;
// a bias alone is one more line of b where out is large. `forced`: wherever it may go.
void library(int forced) {
  plan::forced.library_gemm = forced;
  Random random(4);
  const Dtype kOut[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat16};
  const Dtype kFactor[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat32, Dtype::kFloat16};
  const Dtype kOther[] = {Dtype::kFloat32, Dtype::kFloat64, Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
  for (int options = 0; options < 16; ++options) {
    for (int types = 0; types < 5; ++types) {
      const int64_t m = options & 8 ? 2100 : 260, n = options & 8 ? 72 : 520, k = 120;
      const Dtype dtype = kOut[types];
      Tensor a(kFactor[types], m, k, Layout::kPadded), b(kOther[types], k, n, Layout::kTransposed), bias(dtype, 1, n),
          residual(dtype, m, n);
      for (Tensor* t : {&a, &b, &bias, &residual}) t->fill([&](int64_t, int64_t) { return random.uniform(); });
      Epilogue e;
      e.alpha = 0.5;
      if (options & 1) e.bias = bias;
      if (options & 2) e.residual = residual;
      e.accumulate = options & 4;
      const bool half = kFactor[types] == Dtype::kBFloat16 || kOther[types] == Dtype::kBFloat16;
      e.in_bfloat16 = half;
      Tensor ours(dtype, m, n), theirs(dtype, m, n, Layout::kPadded);
      if (e.accumulate) ours.fill([&](int64_t i, int64_t j) { return double(i - j) / 64; });
      theirs.fill([&](int64_t i, int64_t j) { return get(ours, i, j); });
      const LibraryHost with;
      const bool wide = dtype == Dtype::kFloat64;
      wide ? cpu::gemm<double>(host(0), ours, a.matrix(), b.matrix(), e)
           : cpu::gemm<float>(host(0), ours, a.matrix(), b.matrix(), e);
      wide ? cpu::gemm<double>(with, theirs, a.matrix(), b.matrix(), e)
           : cpu::gemm<float>(with, theirs, a.matrix(), b.matrix(), e);
      const Dtype product = half ? Dtype::kBFloat16 : dtype;
      CHECK(plan::library_gemm(product, {false, true}, m, n, k) || product == Dtype::kFloat16,
            "too small for a library");
      const plan::Processor& processor = cpu::isa<float>().processor;
      const bool planned = plan::library_gemm(product, processor, m, n, k, bool(e.bias)) &&
                           (wide || half || !plan::split(processor, m, n, k));
      const bool expected = plan::chosen(forced, planned) &&
                            !(half && (e.residual || (dtype != product && cpu::isa<float>().half.micro[0][0]))) &&
                            !(e.accumulate && (e.bias || e.residual));
      CHECK(with.calls == (expected ? 1 : 0), "types %d, options %d: %d calls", types, options, int(with.calls));
      CHECK(theirs.gaps_intact(), "options %d", options);
      const double tolerance = (expected && half ? 8 * epsilon(Dtype::kBFloat16) : 0) + 64 * epsilon(dtype);
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const double difference = std::abs(get(ours, i, j) - get(theirs, i, j));
          CHECK(difference <= tolerance, "types %d, options %d: (%d, %d) differs by %g", types, options, int(i), int(j),
                difference);
        }
      }
    }
  }
  plan::forced.library_gemm = -1;
}

template <class Acc>
void rows_and_columns() {
  Random random(5);
  for (const int64_t m : kSizes) {
    for (const int64_t n : kSizes) {
      const auto layout = [&] { return static_cast<Layout>(random.below(4)); };
      const Dtype out_dtype = kDtypes[random.below(4)], in_dtype = kDtypes[random.below(4)];
      const double unit = epsilon(out_dtype) + 4 * epsilon(sizeof(Acc) == 8 ? Dtype::kFloat64 : Dtype::kFloat32);
      Tensor in(in_dtype, m, n, layout()), bias(in_dtype, 1, n, layout()), out(out_dtype, m, n, layout());
      for (Tensor* t : {&in, &bias}) t->fill([&](int64_t, int64_t) { return random.uniform(); });
      const bool has_bias = random.coin(), has_residual = random.coin();
      cpu::fill_rows<Acc>(host(random.below(4)), out, has_bias ? bias.matrix() : Matrix{},
                          has_residual ? in.matrix() : Matrix{});
      CHECK(out.gaps_intact(), "fill_rows %d %d", int(m), int(n));
      for (int64_t i = 0; i < m; ++i) {
        for (int64_t j = 0; j < n; ++j) {
          const double expected = (has_bias ? get(bias, 0, j) : 0) + (has_residual ? get(in, i, j) : 0);
          CHECK(std::abs(get(out, i, j) - expected) <= 2 * unit, "fill_rows (%d, %d)", int(i), int(j));
        }
      }

      std::vector<char> valid(static_cast<size_t>(m) + 1);
      const bool masked = random.coin(), accumulate = random.coin();
      for (int64_t i = 0; i < m; ++i) {
        valid[size_t(i)] = !masked || random.coin();
        for (int64_t j = 0; !valid[size_t(i)] && j < n; ++j) set(in, i, j, kNan);
      }
      const Layout sum_layout = layout();
      std::vector<unsigned char> first;
      for (int64_t h = 0; h < 4; ++h) {
        Tensor sums(out_dtype, 1, n, sum_layout);
        if (accumulate) sums.fill([](int64_t, int64_t j) { return double(j % 3); });
        cpu::column_sums<Acc>(host(h), sums, in, accumulate,
                              masked ? reinterpret_cast<const bool*>(valid.data()) : nullptr);
        CHECK(sums.gaps_intact(), "column_sums %d %d", int(m), int(n));
        if (h == 0) first = sums.bytes();
        CHECK(sums.bytes() == first, "threads changed a bit of column_sums, %d %d", int(m), int(n));
        for (int64_t j = 0; j < n; ++j) {
          double expected = accumulate ? double(j % 3) : 0, size = expected;
          for (int64_t i = 0; i < m; ++i) {
            if (valid[size_t(i)]) expected += get(in, i, j), size += std::abs(get(in, i, j));
          }
          const double allowed =
              epsilon(out_dtype) * std::abs(expected) + 80 * size * (unit - epsilon(out_dtype)) + tiny(out_dtype);
          CHECK(std::abs(get(sums, 0, j) - expected) <= allowed, "column_sums %d of %d %d", int(j), int(m), int(n));
        }
      }
    }
  }
}

template <class Unit>
cpu::Isa<float>::Micro<Unit> micro_of_set[3][2];
std::multiset<const char*> asked;

// A kernel of the set, and what it asked for: not all at once.
template <class Unit, int kIndex, int kVectors>
void noting(int64_t depth, const Unit* a, int64_t a_row, int64_t a_col, const Unit* panel, int64_t panel_row, bool add,
            float* c, int64_t ldc, cpu::Wanted& wanted) {
  cpu::Wanted before = wanted;
  micro_of_set<Unit>[kIndex][kVectors](depth, a, a_row, a_col, panel, panel_row, add, c, ldc, wanted);
  const int64_t most = 2 * before.each * (depth / cpu::Wanted::kSteps + 1);
  before.each = 1;
  for (int64_t lines = 1; before.rows > wanted.rows || before.byte != wanted.byte; ++lines) {
    CHECK(lines <= most, "%d lines asked for in %d units", int(lines), int(depth));
    asked.insert(before.at + before.byte);
    if (before.other) asked.insert(before.other + before.byte);
    before.ask();
  }
}

// The micro kernels ask for what is written next, what is added to it, and what is read next: all of it, nothing else,
// and once; not where it is small, nor where a mask is drawn. And they compute the same as without. `alone`,
// `added_to`, `read`: what they ask for at all.
template <class Unit>
void asks(cpu::Isa<float>::Micro<Unit> (&micro)[3][2], Dtype dtype, bool alone, bool added_to, bool read) {
  using cpu::Isa;
  std::memcpy(micro_of_set<Unit>, micro, sizeof(micro));
  const Isa<float>::Micro<Unit> kNoting[3][2] = {{noting<Unit, 0, 0>, noting<Unit, 0, 1>},
                                                 {noting<Unit, 1, 0>, noting<Unit, 1, 1>},
                                                 {noting<Unit, 2, 0>, noting<Unit, 2, 1>}};
  std::memcpy(micro, kNoting, sizeof(micro));
  const int64_t size = element_size(dtype), columns = 2080 / size;
  constexpr int64_t kRows = 1100, kFew = 300, kRank = 40, kStep = 256;  // few rows are too few to ask for
  const auto filled = [&](int64_t rows, int64_t cols, int64_t period) {
    Tensor t(dtype, rows, cols);
    t.fill([&](int64_t i, int64_t j) { return float((3 * i + j) % period) / 16 - 0.5f; });
    return t;
  };
  const Tensor x = filled(kRows, columns, 17), t = filled(kRows, kRank, 13), weight = filled(kRank, columns, 11);
  const auto run = [&](const char* what, const Tensor& out, const Matrix& a, const Matrix& b, Epilogue e,
                       int64_t first_column, const std::vector<const Matrix*>& expected) {
    const Tensor before = filled(kRows, out.matrix().cols, 7);
    const auto product = [&](int64_t row, int64_t rows) {
      const auto part = [&](const Matrix& m) { return m ? m.block(row, 0, rows, m.cols) : m; };
      Epilogue mine = e;
      mine.residual = part(e.residual);
      std::memcpy(out.matrix().at(row, 0), before.matrix().at(row, 0), size_t(rows * out.matrix().cols * size));
      cpu::gemm<float>(host(0), part(out), part(a), b, mine);
    };
    e.ours = true;
    e.in_bfloat16 = dtype == Dtype::kBFloat16;
    product(0, kRows);
    const std::vector<unsigned char> together = out.bytes();
    std::multiset<const char*> lines;
    for (const Matrix* m : expected) {
      for (int64_t i = 0; i < kRows; ++i) {
        const char* line = static_cast<const char*>(m->at(i, 0));
        for (int64_t at = first_column * size; at < m->cols * size; at += cpu::kCacheLine) lines.insert(line + at);
      }
    }
    CHECK(asked == lines, "%s: %zu lines asked for, not %zu", what, asked.size(), lines.size());
    asked.clear();
    if (e.mask.threshold != 0) return;  // drawn by the row's number
    for (int64_t row = 0; row < kRows; row += kFew) product(row, std::min(kFew, kRows - row));
    CHECK(asked.empty(), "%s: %zu lines of few rows asked for", what, asked.size());
    CHECK(out.bytes() == together, "%s: other numbers", what);
  };
  const Tensor out = filled(kRows, columns, 7), narrow = filled(kRows, kRank, 7);
  using Matrices = std::vector<const Matrix*>;
  const Matrices written = {&out.matrix()}, none;
  run("out", out, t, weight, {}, 0, alone ? written : none);
  Epilogue e;
  e.accumulate = true;
  run("out, added to", out, t, weight, e, 0, added_to ? written : none);
  e = {};
  e.residual = x;
  run("out and a residual", out, t, weight, e, 0, added_to ? Matrices{&out.matrix(), &x.matrix()} : none);
  e = {};
  e.mask.threshold = 6554;
  run("a masked out", out, t, weight, e, 0, none);
  run("what is read", narrow, x, weight.matrix().transposed(), {}, kStep, read ? Matrices{&x.matrix()} : none);
  std::memcpy(micro, micro_of_set<Unit>, sizeof(micro));
}

void all_asks() {
  auto& set = const_cast<cpu::Isa<float>&>(cpu::isa<float>());
  plan::forced.split = 0;
  asks(set.micro, Dtype::kFloat32, true, true, true);
  const bool tiles = set.processor.tiles;
  if (set.half.micro[0][0] != nullptr) asks(set.half.micro, Dtype::kBFloat16, !tiles, true, !tiles);
  plan::forced.split = 1;
  if (tiles) asks(set.half.split_micro, Dtype::kFloat32, true, false, true);
  plan::forced.split = -1;
}

// Every piece is done once, whoever does it; and nobody waits for a thread that is slow.
void shared_pieces() {
  const double enough = cpu::kSharedWork;
  for (int64_t h = 0; h < 5; ++h) {
    for (const int64_t count : {0, 1, 2, 3, 7, 8, 100}) {
      for (const double work : {0.0, enough}) {
        std::vector<std::atomic<int>> done(static_cast<size_t>(count));
        cpu::parallel_pieces(h < 4 ? &host(h) : nullptr, count, work, [&](int64_t piece) { ++done[size_t(piece)]; });
        for (int64_t i = 0; i < count; ++i) {
          CHECK(done[size_t(i)] == 1, "piece %d of %d done %d times", int(i), int(count), int(done[size_t(i)]));
        }
      }
    }
  }
  constexpr int kPieces = 24;
  std::atomic<int> others{0};
  const ThreadHost three(3);
  cpu::parallel_pieces(&three, kPieces, enough, [&](int64_t piece) {
    if (piece != 0) {
      ++others;
      return;
    }
    const auto begin = std::chrono::steady_clock::now();
    while (others < kPieces - 1 && std::chrono::steady_clock::now() - begin < std::chrono::seconds(60)) {
      std::this_thread::yield();
    }
    CHECK(others == kPieces - 1, "the first piece waited for others that were its thread's own");
  });
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft::test;
  use_tiles();
  all_asks();
  shared_pieces();
  rows_and_columns<float>();
  rows_and_columns<double>();
  products();
  in_parts();
  in_place<float>();
  in_place<double>();
  library(-1);
  library(1);
}
