// grad_input and reduce against their definitions in double, in every mode of the emulator.
#include <memory>
#include <string>

#include "kernels/device/philox.cuh"
#include "kernels/launch.h"
#include "kernels/plan.h"
#include "support.h"

namespace routed_peft::test {
namespace {

constexpr Dtype kKernelDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
constexpr bool kAligned = false, kOdd = true;

using cuda::Segment;

enum class Residual { kNone, kOther, kInPlace };

struct Job {
  int64_t rows = 150, cols = 136;
  int width = 16, splits = 1;
  bool product = true, dx = true, l_sums = false, column_sums = false;
  Residual residual = Residual::kNone;
  bool odd = false;   // rows that are not at multiples of 16 bytes
  bool gaps = false;  // three numbers between rows
  bool masked = false, transposed = false, seed_in_memory = false;
  uint32_t threshold = 0, stream = 0;
  Dtype a_dtype = Dtype::kFloat32;
  Layout a_layout = Layout::kDense;
  std::vector<Segment> segments = {};  // empty: one of all columns
  bool nan_in_l = false;               // in its first row
};

std::string name_of(Dtype dtype, int padded_width, size_t i, const Job& c) {
  std::string text = "dtype " + std::to_string(int(dtype)) + ", padded to " + std::to_string(padded_width) + ", job " +
                     std::to_string(i) + ": " + std::to_string(c.rows) + " x " + std::to_string(c.cols) + ", width " +
                     std::to_string(c.width) + ", splits " + std::to_string(c.splits) + ", a " +
                     std::to_string(int(c.a_dtype)) + " as " + std::to_string(int(c.a_layout)) + ", residual " +
                     std::to_string(int(c.residual)) + ", threshold " + std::to_string(c.threshold) + ", " +
                     std::to_string(c.segments.size()) + " segments";
  const std::pair<bool, const char*> flags[] = {
      {c.product, ", product"}, {c.dx, ", dx"},         {c.l_sums, ", sums of l"},     {c.column_sums, ", column sums"},
      {c.odd, ", odd"},         {c.masked, ", masked"}, {c.transposed, ", transposed"}};
  for (const auto& [flag, word] : flags) text += flag ? word : "";
  return text;
}

double rounded(Dtype dtype, double value) {
  value = static_cast<double>(static_cast<float>(value));
  return element_size(dtype) >= 4 ? value : half_value(dtype, half_bits(dtype, value));  // sums are float32
}

// What the tensor cores see of L.
double factor_of(Dtype dtype, double l) {
  if (dtype != Dtype::kFloat16 || std::isnan(l)) return l;
  return static_cast<double>(__uint_as_float(to_tf32(static_cast<float>(l))));
}

void check_close(const char* what, const std::string& name, Dtype dtype, int64_t i, int64_t j, double value,
                 double expected, double magnitude) {
  if (std::isnan(expected)) {
    CHECK(std::isnan(value), "%s: %s[%lld, %lld] is %g, not NaN", name.c_str(), what, (long long)i, (long long)j,
          value);
    return;
  }
  const double rounding = dtype == Dtype::kFloat32 ? 0 : epsilon(dtype) / 2 * std::abs(expected) * (1 + 0x1p-10);
  const double bound = 8 * 0x1p-24 * magnitude + rounding + tiny(dtype);
  CHECK(std::abs(value - expected) <= bound, "%s: %s[%lld, %lld] is %.9g, not %.9g", name.c_str(), what, (long long)i,
        (long long)j, value, expected);
}

// A matrix of rows: dense, beginning at an odd place, or with more between its rows than behind the last one.
struct Rows {
  Tensor storage;
  Matrix matrix;
  Rows(Dtype dtype, int64_t rows, int64_t cols, bool odd, bool gaps)
      : storage(dtype, rows, cols + odd, odd || gaps ? Layout::kPadded : Layout::kDense),
        matrix(odd ? storage.matrix().block(0, 1, rows, cols) : storage.matrix()) {}
};

// A job, its matrices and what is expected of it.
class Checked {
 public:
  Checked(Dtype dtype, int padded_width, size_t index, const Job& job, Random& random)
      : c_(job),
        name_(name_of(dtype, padded_width, index, job)),
        dtype_(dtype),
        segments_(job.segments.empty() ? std::vector<Segment>{{0, job.cols, 0, 0}} : job.segments),
        seed_(static_cast<int64_t>(random.bits())),
        drop_{static_cast<uint64_t>(seed_), job.threshold, job.stream},
        x_(dtype, job.rows, job.cols, job.odd, job.gaps),
        dx_(dtype, job.dx ? job.rows : 0, job.cols, job.odd, job.gaps),
        residual_(dtype, job.dx ? job.rows : 0, job.cols, job.odd, job.gaps),
        a_(job.a_dtype, job.width, job.cols, job.a_layout),
        l_(dtype == Dtype::kBFloat16 ? dtype : Dtype::kFloat32, job.rows, l_columns(), job.odd, false),
        mask_(new bool[static_cast<size_t>(job.rows)]) {
    for (const Segment& s : segments_) {
      if (s.b_row >= 0) selected_ = std::max(selected_, s.b_row + s.length);
    }
    product_ = Tensor(Dtype::kFloat32, job.splits, selected_ * job.width + 3);
    x_sums_ = Tensor(Dtype::kFloat32, job.splits, job.cols);
    l_sums_ = Tensor(Dtype::kFloat32, job.splits, job.width);
    const auto fill = [&](const Matrix& m) {
      for (int64_t i = 0; i < m.rows; ++i) {
        for (int64_t j = 0; j < m.cols; ++j) set(m, i, j, random.uniform());
      }
    };
    for (const Matrix& m : {x_.matrix, residual_.matrix, a_.matrix()}) fill(m);
    for (int64_t i = 0; i < job.rows; ++i) {
      mask_[size_t(i)] = !job.masked || (random.coin() && i != 1);
      for (int64_t j = 0; j < job.cols; ++j) {
        if (!mask_[size_t(i)] || !keeps(i, j)) set(x_.matrix, i, j, kNan);
      }
      // outside of the segments' columns stays what a Tensor is born with, NaN
      for (const Segment& s : segments_) {
        for (int64_t j = 0; j < job.width && s.b_row >= 0; ++j) {
          set(l_.matrix, i, s.z_column + j, mask_[size_t(i)] ? random.uniform() : kNan);
        }
      }
    }
    if (job.nan_in_l && job.rows > 0) set(l_.matrix, 0, segments_[0].z_column, kNan);
  }

  void describe(cuda::GradInputParams& p, int& segment) const {
    cuda::GradInputJob& job = p.jobs[p.job_count++];
    job.x = x_.matrix;
    if (!c_.product && !c_.column_sums) job.x.data = nullptr;
    if (c_.masked) job.row_mask = mask_.get();
    job.drop = drop_;
    if (c_.seed_in_memory) job.drop.seed = 0, job.drop.seed_at = &seed_;
    job.l = l_.matrix.data;
    job.l_stride = l_.matrix.row_stride;
    job.width = c_.width;
    job.rows = c_.rows;
    job.first_segment = segment;
    job.segment_count = static_cast<int>(segments_.size());
    for (const Segment& s : segments_) p.segments[segment++] = s;
    job.a = a_;
    if (c_.dx) job.dx = dx_.matrix;
    if (c_.dx && c_.residual == Residual::kOther) job.residual = residual_.matrix;
    if (c_.dx && c_.residual == Residual::kInPlace) job.residual = dx_.matrix;
    job.splits = c_.splits;
    if (c_.product) job.product = static_cast<float*>(product_.data());
    job.product_size = selected_ * c_.width + 3;
    job.product_col_stride = c_.transposed ? c_.width : 1;
    job.product_l_stride = c_.transposed ? 1 : selected_;
    if (c_.column_sums) job.column_sums = static_cast<float*>(x_sums_.data());
    if (c_.l_sums) job.l_sums = static_cast<float*>(l_sums_.data());
  }

  void poison() {
    for (Tensor* t : {&product_, &x_sums_, &l_sums_, &dx_.storage}) t->poison();
    for (int64_t i = 0; c_.dx && c_.residual == Residual::kInPlace && i < c_.rows; ++i) {
      for (int64_t j = 0; j < c_.cols; ++j) set(dx_.matrix, i, j, get(residual_.matrix, i, j));
    }
  }

  std::vector<unsigned char> bytes() const {
    std::vector<unsigned char> all;
    for (const Tensor* t : {&product_, &x_sums_, &l_sums_, &dx_.storage}) {
      all.insert(all.end(), t->bytes().begin(), t->bytes().end());
    }
    return all;
  }

  void check() const {
    CHECK(dx_.storage.gaps_intact(), "%s: written between the rows", name_.c_str());
    const double scale = drop_.scale();
    for (const Segment& s : segments_) {
      for (int64_t j = 0; j < s.length; ++j) {
        const int64_t column = s.start + j;
        if (c_.column_sums) {
          double sum = 0, magnitude = 0;
          for (int64_t i = 0; i < c_.rows; ++i) {
            if (!mask_[size_t(i)]) continue;
            sum += get(x_.matrix, i, column);
            magnitude += std::abs(get(x_.matrix, i, column));
          }
          check_close("column_sums", name_, Dtype::kFloat32, 0, column, total(x_sums_, column), sum, magnitude);
        }
        for (int64_t k = 0; c_.product && s.b_row >= 0 && k < c_.width; ++k) {
          double sum = 0, magnitude = 0;
          for (int64_t i = 0; i < c_.rows; ++i) {
            if (!mask_[size_t(i)]) continue;
            const double l = factor_of(dtype_, get(l_.matrix, i, s.z_column + k));
            const double term = keeps(i, column) ? scale * l * get(x_.matrix, i, column) : std::isnan(l) ? l : 0.;
            sum += term;
            magnitude += std::abs(term);
          }
          const int64_t row = s.b_row + j, at = c_.transposed ? row * c_.width + k : row + k * selected_;
          check_close("product", name_, Dtype::kFloat32, row, k, total(product_, at), sum, magnitude);
        }
      }
    }
    for (int64_t i = 0; i < c_.splits; ++i) {
      for (int64_t j = c_.product ? selected_ * c_.width : 0; j < product_.matrix().cols; ++j) {
        CHECK(std::isnan(get(product_, i, j)), "%s: written behind part %lld", name_.c_str(), (long long)i);
      }
    }
    for (int64_t k = 0; c_.l_sums && k < c_.width; ++k) {
      double sum = 0, magnitude = 0;
      for (int64_t i = 0; i < c_.rows; ++i) {
        if (!mask_[size_t(i)]) continue;
        sum += get(l_.matrix, i, segments_[0].z_column + k);
        magnitude += std::abs(get(l_.matrix, i, segments_[0].z_column + k));
      }
      check_close("l_sums", name_, Dtype::kFloat32, 0, k, total(l_sums_, k), sum, magnitude);
    }
    std::vector<double> a(size_t(c_.width * c_.cols)), l(size_t(c_.width));
    for (int64_t k = 0; k < c_.width; ++k) {
      for (int64_t j = 0; j < c_.cols; ++j) a[size_t(k * c_.cols + j)] = rounded(dtype_, get(a_, k, j));
    }
    for (int64_t i = 0; c_.dx && i < c_.rows; ++i) {
      for (int64_t k = 0; k < c_.width; ++k) {
        l[size_t(k)] = factor_of(dtype_, get(l_.matrix, i, segments_[0].z_column + k));
      }
      for (int64_t j = 0; j < c_.cols; ++j) {
        double sum = 0, magnitude = 0;
        for (int64_t k = 0; mask_[size_t(i)] && keeps(i, j) && k < c_.width; ++k) {
          const double term = scale * l[size_t(k)] * a[size_t(k * c_.cols + j)];
          sum += term;
          magnitude += std::abs(term);
        }
        if (c_.residual != Residual::kNone) {
          sum += get(residual_.matrix, i, j);
          magnitude += std::abs(sum);
        }
        const double value = get(dx_.matrix, i, j);
        if (magnitude == 0 && !std::isnan(sum)) {
          CHECK(value == 0, "%s: dx[%lld, %lld] is %g where nothing is kept", name_.c_str(), (long long)i, (long long)j,
                value);
        }
        check_close("dx", name_, dtype_, i, j, value, sum, magnitude);
      }
    }
  }

  const std::string& name() const { return name_; }

 private:
  bool keeps(int64_t row, int64_t column) const {
    return drop_.threshold == 0 || dropout_keeps(drop_.seed, drop_.stream, drop_.threshold, row, column);
  }
  int64_t l_columns() const {
    int64_t columns = 0;
    for (const Segment& s : segments_) columns = std::max<int64_t>(columns, s.z_column + c_.width);
    return plan::round_up(columns, 8);
  }
  double total(const Tensor& parts, int64_t column) const {
    double sum = 0;
    for (int64_t i = 0; i < parts.matrix().rows; ++i) sum += get(parts, i, column);
    return sum;
  }

  Job c_;
  std::string name_;
  Dtype dtype_;
  std::vector<Segment> segments_;
  int64_t seed_, selected_ = 0;
  Dropout drop_;
  Rows x_, dx_, residual_;
  Tensor a_, product_, x_sums_, l_sums_;
  Rows l_;
  std::unique_ptr<bool[]> mask_;
};

void run(Dtype dtype, int padded_width, const std::vector<Job>& jobs) {
  Random random(7 + static_cast<uint64_t>(padded_width));
  std::vector<std::unique_ptr<Checked>> checked;
  cuda::GradInputParams p;
  p.dtype = dtype;
  p.padded_width = padded_width;
  int segments = 0;
  for (const Job& job : jobs) {
    checked.push_back(std::make_unique<Checked>(dtype, padded_width, checked.size(), job, random));
    checked.back()->describe(p, segments);
  }
  std::vector<std::vector<unsigned char>> first(checked.size());
  std::vector<emulator::Options> modes = emulator::modes();
  modes.push_back(modes.back());
  modes.back().shared_bytes = 227 << 10;  // a longer ring
  for (const emulator::Options& mode : modes) {
    emulator::set_options(mode);
    p.shared_bytes = static_cast<int64_t>(mode.shared_bytes);
    for (const auto& each : checked) each->poison();
    emulator::reset_launches();
    const cudaError_t error = cuda::grad_input(p, nullptr);
    CHECK(error == cudaSuccess, "%s: %s", checked[0]->name().c_str(), cudaGetErrorString(error));
    CHECK(emulator::launch_count() == 1, "%s: %zu launches", checked[0]->name().c_str(), emulator::launch_count());
    for (size_t i = 0; i < checked.size(); ++i) {
      if (first[i].empty()) first[i] = checked[i]->bytes();
      CHECK(first[i] == checked[i]->bytes(), "%s: other bits with %s", checked[i]->name().c_str(),
            emulator::to_string(mode).c_str());
    }
  }
  emulator::set_options({});
  for (const auto& each : checked) each->check();
}

// x, y and dOut as a layer has them: dropout of either, two slices of the output with columns that are in none.
std::vector<Job> layer(Dtype dtype, int rank, bool odd, int splits) {
  const int width = 2 * rank;
  const Job x{.rows = 150,
              .cols = 200,
              .width = width,
              .splits = splits,
              .l_sums = true,
              .residual = Residual::kInPlace,
              .odd = odd,
              .threshold = 20000,
              .a_dtype = dtype};
  const Job y{.rows = 70,
              .cols = 136,
              .width = width,
              .splits = splits,
              .l_sums = true,
              .odd = odd,
              .masked = true,
              .seed_in_memory = true,
              .threshold = 6554,
              .stream = 1,
              .a_dtype = odd ? Dtype::kFloat64 : Dtype::kFloat32,
              .a_layout = odd ? Layout::kStrided : Layout::kTransposed};
  const Job dout{.rows = 150,
                 .cols = 176,
                 .width = rank,
                 .splits = splits,
                 .dx = false,
                 .column_sums = true,
                 .odd = odd,
                 .transposed = true,
                 .segments = {{0, 8, -1, 0}, {8, 40, 0, 0}, {48, 24, -1, 0}, {72, 104, 40, rank}}};
  return {x, y, dout};
}

void layers(Dtype dtype) {
  for (const int rank : {8, 16, 32, 64, 128}) run(dtype, 2 * rank, layer(dtype, rank, kAligned, 2));
  for (const int rank : {3, 11, 29, 50, 127}) {  // z_column is odd as well
    run(dtype, plan::padded_width(2 * rank), layer(dtype, rank, kOdd, rank == 3 ? 16 : 1));
  }
  for (const int rank : {5, 12, 27, 53, 101}) run(dtype, plan::padded_width(2 * rank), layer(dtype, rank, kAligned, 3));
}

void widths(Dtype dtype) {
  // in kernels that are wider than they need to be, for another job's sake
  for (const int width : {1, 15, 16, 31, 64, 65, 90, 128, 131, 255, 256}) {
    const int needed = plan::padded_width(width);
    for (const int padded : {needed, 256}) {
      if (padded == needed || width == 1 || width == 65 || width == 128) {
        run(dtype, padded, {{.rows = 33, .cols = 40, .width = width, .l_sums = true, .threshold = 30000}});
      }
    }
  }
}

void wanted(Dtype dtype) {
  for (const bool odd : {kAligned, kOdd}) {
    for (const uint32_t threshold : {0u, 9000u, 65536u}) {
      const Job c{.rows = 70, .cols = 144, .width = 20, .splits = 2, .odd = odd, .threshold = threshold};
      Job product = c, gradient = c, sums = c, masked = c;
      product.dx = false, product.transposed = true;
      gradient.product = false, gradient.residual = Residual::kOther;
      sums.product = sums.dx = false, sums.l_sums = true;
      masked.masked = masked.l_sums = true, masked.residual = Residual::kOther;
      run(dtype, 32, {product, gradient, sums});
      run(dtype, 32, {masked});
      if (threshold != 0) continue;
      Job bias = c, both = c;
      bias.product = bias.dx = false, bias.column_sums = true, bias.masked = true;
      bias.segments = {{0, 144, -1, 0}};
      both.column_sums = both.l_sums = both.masked = true;
      run(dtype, 32, {bias, both});
      bias.width = 0;
      run(dtype, 16, {bias});
      Job lost = c;
      lost.nan_in_l = true;
      run(dtype, 32, {lost});
    }
  }
}

void shapes(Dtype dtype) {
  for (const int64_t rows : {0, 1, 63, 64, 65, 300}) {
    const Job c{.rows = rows, .cols = 24, .width = 8, .splits = rows == 300 ? 2 : 3, .l_sums = true, .threshold = 500};
    Job bias = c;
    bias.column_sums = true, bias.dx = false, bias.threshold = 0;
    run(dtype, 16, {c, bias});
  }
  for (const int64_t cols : {1, 13, 31, 129, 260}) {
    for (const bool odd : {kAligned, kOdd}) {
      Job c{.rows = 20, .cols = cols, .width = 8, .residual = Residual::kInPlace, .odd = odd, .threshold = 25000};
      run(dtype, 16, {c});
      c.gaps = true;
      run(dtype, 16, {c});
      if (cols == 129) c.width = 130, run(dtype, 256, {c});
    }
  }
  for (const Dtype a_dtype : kDtypes) {
    for (const Layout layout : {Layout::kDense, Layout::kTransposed, Layout::kPadded, Layout::kStrided}) {
      run(dtype, 16, {{.rows = 10, .cols = 40, .width = 9, .product = false, .a_dtype = a_dtype, .a_layout = layout}});
    }
  }
}

// As many slices as there can be, some of them a single column.
void many_segments(Dtype dtype) {
  Job c{.rows = 40, .cols = 0, .width = 4, .splits = 1, .dx = false, .transposed = true};
  int64_t at = 0, b_row = 0;
  for (int i = 0; i < cuda::kMaxSlices; ++i) {
    c.segments.push_back({at, 1 + i % 2, -1, 0});
    at += c.segments.back().length;
    c.segments.push_back({at, 1 + 9 * (i % 4), b_row, 4 * i});
    at += c.segments.back().length;
    b_row += c.segments.back().length;
  }
  c.segments.push_back({at, 5, -1, 0});
  c.cols = at + 5;
  run(dtype, 64, {{.rows = 40, .cols = 64, .width = 64}, {.rows = 9, .cols = 64, .width = 64}, c});
  c.column_sums = true;
  run(dtype, 64, {c});
}

void splits() {
  for (const Dtype dtype : kKernelDtypes) {
    for (const int width : {16, 32, 64, 128, 256}) {
      for (const int64_t rows : {0, 1, 100, 800, 8192, 1000000}) {
        for (const int64_t cols : {0, 1, 768, 4096, 100000}) {
          const int64_t n = cuda::grad_input_splits(dtype, width, rows, cols);
          CHECK(n >= 1 && n <= 16 && (n == 1 || rows >= n * 32), "%lld splits of %lld rows", (long long)n,
                (long long)rows);
        }
      }
    }
  }
  CHECK(cuda::grad_input_splits(Dtype::kBFloat16, 64, 8192, 4096) == 4, "128 blocks");
  CHECK(cuda::grad_input_splits(Dtype::kBFloat16, 64, 8192, 768) == 16, "as many as there may be");
  CHECK(cuda::grad_input_splits(Dtype::kBFloat16, 64, 300, 768) == 2, "two tiles each");
}

void nothing_and_refusals() {
  emulator::reset_launches();
  cuda::GradInputParams p;
  p.padded_width = 16;
  CHECK(cuda::grad_input(p, nullptr) == cudaSuccess, "no jobs");
  float number = 0;
  cuda::GradInputJob& job = p.jobs[0];
  p.job_count = job.segment_count = 1;
  p.segments[0] = {0, 8, 0, 0};
  job.dx = dense(&number, Dtype::kFloat32, 0, 8);
  CHECK(cuda::grad_input(p, nullptr) == cudaSuccess, "no rows");
  job.rows = 1;
  job.width = 17;
  CHECK(cuda::grad_input(p, nullptr) == cudaErrorInvalidValue, "too wide");
  job.width = 4;
  job.drop.threshold = 1;
  p.segments[0].start = 4;
  CHECK(cuda::grad_input(p, nullptr) == cudaErrorInvalidValue, "dropout that does not begin with the first column");
  p.segments[0].start = 0;
  p.dtype = Dtype::kFloat64;
  CHECK(cuda::grad_input(p, nullptr) == cudaErrorInvalidValue, "float64");
  p.dtype = Dtype::kFloat32;
  p.padded_width = 48;
  CHECK(cuda::grad_input(p, nullptr) == cudaErrorInvalidValue, "no such width");

  cuda::ReduceParams r;
  CHECK(cuda::reduce(r, nullptr) == cudaSuccess, "no items");
  r.count = 1;
  r.items[0].out = dense(&number, Dtype::kFloat32, 0, 7);
  CHECK(cuda::reduce(r, nullptr) == cudaSuccess, "no numbers");
  CHECK(emulator::launch_count() == 0, "launched for nothing");
}

struct Sum {
  int64_t rows, cols, splits[2];
  Dtype dtype;
  float scale;
  int64_t offset;  // of the first part from a multiple of 16 bytes
};

void reduced(const std::vector<Sum>& sums) {
  Random random(3);
  std::vector<Tensor> parts, out;
  cuda::ReduceParams p;
  for (const Sum& sum : sums) {
    cuda::ReduceItem& item = p.items[p.count++];
    const int64_t size = sum.rows * sum.cols;
    for (int which = 0; which < 2; ++which) {
      parts.emplace_back(Dtype::kFloat32, 1, sum.splits[which] * size + sum.offset);
      parts.back().fill([&](int64_t, int64_t j) { return j < sum.offset ? kNan : random.uniform(); });
      item.splits[which] = sum.splits[which];
      if (sum.splits[which] > 0) item.parts[which] = static_cast<const float*>(parts.back().data()) + sum.offset;
    }
    out.emplace_back(sum.dtype, sum.rows, sum.cols);
    item.out = out.back();
    item.scale = sum.scale;
  }
  for (const emulator::Options& mode : emulator::modes()) {
    emulator::set_options(mode);
    for (Tensor& each : out) each.poison();
    emulator::reset_launches();
    CHECK(cuda::reduce(p, nullptr) == cudaSuccess && emulator::launch_count() == 1, "reduce");
    for (size_t n = 0; n < sums.size(); ++n) {
      const int64_t size = sums[n].rows * sums[n].cols;
      for (int64_t i = 0; i < size; ++i) {
        float sum = 0;  // exactly this, in this order
        for (int which = 0; which < 2; ++which) {
          for (int64_t s = 0; s < sums[n].splits[which]; ++s) {
            sum += static_cast<float>(get(parts[2 * n + size_t(which)], 0, sums[n].offset + s * size + i));
          }
        }
        const double value = get(out[n], i / sums[n].cols, i % sums[n].cols);
        CHECK(value == rounded(sums[n].dtype, static_cast<double>(sums[n].scale * sum)), "sum %zu [%lld] is %g, not %g",
              n, (long long)i, value, static_cast<double>(sums[n].scale * sum));
      }
    }
  }
  emulator::set_options({});
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft::test;
  using routed_peft::Dtype;
  for (const Dtype dtype : kKernelDtypes) {
    layers(dtype);
    widths(dtype);
    wanted(dtype);
    shapes(dtype);
    many_segments(dtype);
  }
  splits();
  nothing_and_refusals();
  reduced({{8, 16, {4, 0}, Dtype::kFloat32, 1, 0},
           {33, 7, {2, 1}, Dtype::kFloat64, 1.5f, 0},
           {8, 16, {3, 0}, Dtype::kFloat64, 1, 0}});
  reduced({{5, 300, {3, 2}, Dtype::kBFloat16, 0.5f, 0},
           {1, 7, {16, 1}, Dtype::kFloat16, 3, 1},
           {33, 64, {5, 9}, Dtype::kFloat16, 1.5f, 0},
           {0, 64, {5, 9}, Dtype::kFloat32, 1, 0},
           {3, 41, {0, 0}, Dtype::kFloat32, 1, 0},
           {64, 64, {0, 4}, Dtype::kFloat32, -2, 1}});
}
