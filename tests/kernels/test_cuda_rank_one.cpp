// rank_one against its definition in double, Z and all, in every mode of the emulator.
#include <memory>
#include <optional>
#include <string>

#include "kernels/device/philox.cuh"
#include "kernels/launch.h"
#include "support.h"

namespace routed_peft::test {
namespace {

constexpr Dtype kKernelDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

enum class Slices { kWhole, kPartial, kMany };  // kMany: 16, of which some are a single column

struct Case {
  Dtype dtype = Dtype::kFloat32;
  Routing routing = Routing::kExpand;
  int64_t samples = 3, tokens = 5, d = 40, o = 24, rank = 4;
  Slices slices = Slices::kWhole;
  bool grouped = false, ragged = false, indexed = false, bad_index = false;
  bool residual = false, base = false, in_place = false, offset = false;
  bool nan_in_x = false;  // of the first row
  Layout weights = Layout::kDense;
  std::optional<Dtype> bias = {};
  uint32_t threshold = 0;
  bool seed_in_memory = false, save = true;

  std::string name() const {
    std::string text = "dtype " + std::to_string(int(dtype)) + ", routing " + std::to_string(int(routing)) + ", " +
                       std::to_string(samples) + " x " + std::to_string(tokens) + " x " + std::to_string(d) + " -> " +
                       std::to_string(o) + ", slices " + std::to_string(int(slices)) + ", layout " +
                       std::to_string(int(weights)) + ", threshold " + std::to_string(threshold);
    const std::pair<bool, const char*> flags[] = {{grouped, ", grouped"},   {ragged, ", ragged"},
                                                  {indexed, ", indexed"},   {bad_index, ", bad index"},
                                                  {residual, ", residual"}, {base, ", base"},
                                                  {in_place, ", in place"}, {offset, ", offset"},
                                                  {nan_in_x, ", NaN in x"}, {bias.has_value(), ", bias"}};
    for (const auto& [flag, word] : flags) text += flag ? word : "";
    return text;
  }
};

std::vector<Slice> slices_of(Slices mode, int64_t o) {
  if (mode == Slices::kWhole) return {{0, o, 0}};
  if (mode == Slices::kPartial) return {{1, o / 3, 0}, {o / 2, o - o / 2, o / 3}};
  std::vector<Slice> slices;
  int64_t row = 0, at = 0;
  for (int64_t i = 0; i < 16; ++i) {
    const int64_t length = 1 + i % 3;
    slices.push_back({at, length, row});
    row += length;
    at += length + i % 2;
  }
  return slices;
}

// A matrix of rows, dense or at an odd place.
struct Rows {
  Tensor storage;
  Matrix matrix;
  Rows(Dtype dtype, int64_t rows, int64_t cols, bool offset)
      : storage(dtype, rows, cols + offset, offset ? Layout::kPadded : Layout::kDense),
        matrix(offset ? storage.matrix().block(0, 1, rows, cols) : storage.matrix()) {}
};

void check_close(const char* what, const std::string& name, const Matrix& got, int64_t i, int64_t j, double expected,
                 double magnitude) {
  const double value = get(got, i, j);
  if (std::isnan(expected)) {
    CHECK(std::isnan(value), "%s: %s[%lld, %lld] is %g, not NaN", name.c_str(), what, (long long)i, (long long)j,
          value);
    return;
  }
  const double bound = 16 * 0x1p-24 * magnitude + epsilon(got.dtype) * std::abs(expected) + tiny(got.dtype);
  CHECK(std::abs(value - expected) <= bound, "%s: %s[%lld, %lld] is %.9g, not %.9g", name.c_str(), what, (long long)i,
        (long long)j, value, expected);
}

void forward(const Case& c) {
  Random random(5);
  const auto fill = [&](const Matrix& m) {
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.cols; ++j) set(m, i, j, random.uniform());
    }
  };
  std::vector<Slice> slices = slices_of(c.slices, c.o);
  const int64_t count = static_cast<int64_t>(slices.size()), width = c.rank * count, groups = c.grouped ? count : 1;
  const int64_t w = width / groups, selected = slices.back().row + slices.back().length;
  const int64_t conditions = c.indexed ? 2 : c.samples;

  std::vector<int64_t> offsets = {0}, index;
  for (int64_t s = 0; s < c.samples; ++s) {  // the first and another one are empty
    offsets.push_back(offsets.back() + (s == 0 || s == 2 ? 0 : 1 + random.below(2 * c.tokens)));
    index.push_back(c.bad_index && s % 2 == 0 ? (s % 4 == 0 ? -1 : conditions) : random.below(conditions));
  }
  const int64_t rows = c.ragged ? offsets.back() : c.samples * c.tokens;

  const int64_t seed = static_cast<int64_t>(random.bits());
  Dropout dropout{static_cast<uint64_t>(seed), c.threshold, 0};
  Rows x(c.dtype, rows, c.d, c.offset), out(c.dtype, rows, c.o, c.offset), base(c.dtype, rows, c.o, c.offset);
  Tensor a(c.dtype, width, c.d, c.weights), b(c.dtype, selected, c.rank, c.weights);
  Tensor bias(c.bias.value_or(Dtype::kFloat32), 1, c.o, Layout::kStrided);
  Tensor v(Dtype::kFloat32, conditions, width), coefficient(Dtype::kFloat32, rows, c.save ? groups : 0);
  for (const Matrix& m : {x.matrix, base.matrix, a.matrix(), b.matrix(), bias.matrix(), v.matrix()}) fill(m);
  const auto keeps = [&](int64_t row, int64_t j) {
    return c.threshold == 0 || dropout_keeps(dropout.seed, dropout.stream, dropout.threshold, row, j);
  };
  for (int64_t i = 0; i < rows; ++i) {  // what is dropped must not leak, except through the residual
    for (int64_t j = 0; !c.residual && j < c.d; ++j) {
      if (!keeps(i, j)) set(x.matrix, i, j, kNan);
    }
  }

  if (c.nan_in_x) set(x.matrix, 0, 1, kNan);

  Problem p;
  p.dtype = c.dtype;
  p.inputs = {c.samples, rows, c.ragged ? offsets.data() : nullptr};
  p.conditions = {conditions, conditions, nullptr};
  p.x = x.matrix;
  p.a = a;
  p.b = b;
  if (c.bias) p.bias = bias;
  if (c.in_place) {
    p.base = out.matrix;
  } else if (c.base) {
    p.base = base.matrix;
  }
  if (c.indexed) p.index = index.data();
  p.routing = c.routing;
  p.kind = StateKind::kVector;
  p.residual = c.residual;
  p.width = width;
  p.groups = groups;
  p.scaling = 1.5;
  p.drop_x = dropout;
  if (c.seed_in_memory) p.drop_x.seed = 0, p.drop_x.seed_at = &seed;
  p.slices = slices.data();
  p.slice_count = count;
  p.out_features = c.o;

  Tensor scratch(Dtype::kFloat32, 1, cuda::rank_one_scratch(p) / 4);
  std::vector<unsigned char> first_out, first_c;
  for (const emulator::Options& mode : emulator::modes()) {
    emulator::set_options(mode);
    scratch.poison(), coefficient.poison(), out.storage.poison();
    for (int64_t i = 0; c.in_place && i < rows; ++i) {
      for (int64_t j = 0; j < c.o; ++j) set(out.matrix, i, j, get(base.matrix, i, j));
    }
    emulator::reset_launches();
    const cudaError_t error =
        cuda::rank_one(p, static_cast<const float*>(v.data()), out.matrix,
                       c.save ? static_cast<float*>(coefficient.data()) : nullptr, scratch.data(), nullptr);
    CHECK(error == cudaSuccess, "%s: %s", c.name().c_str(), cudaGetErrorString(error));
    CHECK(emulator::launch_count() == 2, "%s: %zu launches", c.name().c_str(), emulator::launch_count());
    CHECK(out.storage.gaps_intact(), "%s: written between the rows", c.name().c_str());
    if (first_out.empty()) first_out = out.storage.bytes(), first_c = coefficient.bytes();
    CHECK(first_out == out.storage.bytes() && first_c == coefficient.bytes(), "%s: other bits with %s",
          c.name().c_str(), emulator::to_string(mode).c_str());
  }
  emulator::set_options({});

  for (int64_t s = 0; s < c.samples; ++s) {
    const int64_t condition = c.indexed ? index[size_t(s)] : s;
    const bool known = condition >= 0 && condition < conditions;
    for (int64_t row = p.inputs.begin(s); row < p.inputs.end(s); ++row) {
      // T, the group's number c = ⟨T, u_q⟩, and Z = c u_p
      std::vector<double> number(size_t(groups), known ? 0 : kNan), size(size_t(groups), 0);
      for (int64_t k = 0; known && k < width; ++k) {
        const double u = c.routing == Routing::kExpand ? 1 : get(v, condition, k);
        for (int64_t j = 0; j < c.d; ++j) {
          if (!keeps(row, j)) continue;
          const double term = u * get(a, k, j) * get(x.matrix, row, j) * dropout.scale();
          number[size_t(k / w)] += term;
          size[size_t(k / w)] += std::abs(term);
        }
      }
      for (int64_t g = 0; c.save && g < groups; ++g)
        check_close("c", c.name(), coefficient, row, g, number[size_t(g)], size[size_t(g)]);
      for (int64_t j = 0; j < c.o; ++j) {
        double sum = known ? 0 : kNan, magnitude = 0;
        const auto add = [&](double term) { sum += term, magnitude += std::abs(term); };
        if (c.bias) add(get(bias, 0, j));
        if (c.base || c.in_place) add(get(base.matrix, row, j));
        if (c.residual) add(get(x.matrix, row, j));
        for (int64_t i = 0; known && i < count; ++i) {
          const Slice& slice = slices[size_t(i)];
          if (j < slice.start || j >= slice.start + slice.length) continue;
          const size_t g = size_t(c.grouped ? i : 0);
          for (int64_t k = 0; k < c.rank; ++k) {
            const double u = c.routing == Routing::kOnes ? 1 : get(v, condition, i * c.rank + k);
            const double up = p.scaling * u * get(b, slice.row + j - slice.start, k);
            sum += number[g] * up;
            magnitude += size[g] * std::abs(up);
          }
        }
        check_close("out", c.name(), out.matrix, row, j, sum, magnitude);
      }
    }
  }
}

void options(Dtype dtype) {
  for (const Routing routing : {Routing::kExpand, Routing::kGram, Routing::kOnes}) {
    for (const Slices slices : {Slices::kWhole, Slices::kPartial, Slices::kMany}) {
      for (const bool grouped : {false, true}) {
        forward({.dtype = dtype, .routing = routing, .o = 53, .slices = slices, .grouped = grouped, .bias = dtype});
        forward({.dtype = dtype, .routing = routing, .o = 53, .slices = slices, .grouped = grouped, .nan_in_x = true});
        forward({.dtype = dtype, .routing = routing, .o = 64, .slices = slices, .grouped = grouped, .threshold = 9000});
      }
    }
    for (const uint32_t threshold : {0u, 20000u}) {
      const Case c{.dtype = dtype, .routing = routing, .threshold = threshold};
      Case ragged = c, indexed = c, bad = c, long_samples = c;
      ragged.ragged = true, ragged.samples = 5, ragged.seed_in_memory = true;
      indexed.indexed = true, indexed.samples = 6, indexed.tokens = 2, indexed.save = false;
      bad.indexed = bad.bad_index = true, bad.samples = 7, bad.bias = Dtype::kFloat32, bad.slices = Slices::kPartial;
      long_samples.samples = 12, long_samples.tokens = 1, long_samples.rank = 70;
      for (const Case& each : {ragged, indexed, bad, long_samples}) forward(each);
    }
  }
}

void sums(Dtype dtype) {
  for (const uint32_t threshold : {0u, 6554u, 65536u}) {
    for (const bool residual : {false, true}) {
      for (const bool offset : {false, true}) {
        const Case c{.dtype = dtype, .o = 40, .residual = residual, .offset = offset, .threshold = threshold};
        Case bias = c, base = c, in_place = c;
        bias.bias = Dtype::kFloat64;
        base.base = true, base.bias = dtype;
        in_place.in_place = true;
        for (const Case& each : {c, bias, base, in_place}) forward(each);
      }
    }
  }
}

void shapes(Dtype dtype) {
  for (const uint32_t threshold : {0u, 6554u}) {
    for (const bool offset : {false, true}) {
      for (const int64_t d : {1, 8, 63, 130, 2100}) {
        const Case c{.dtype = dtype,
                     .samples = 2,
                     .tokens = 1,
                     .d = d,
                     .o = d == 130 ? 1 : d + 3,
                     .offset = offset,
                     .threshold = threshold};
        forward(c);
      }
    }
    for (const Layout layout : {Layout::kTransposed, Layout::kPadded, Layout::kStrided}) {
      forward({.dtype = dtype, .routing = Routing::kGram, .rank = 16, .weights = layout, .threshold = threshold});
      forward({.dtype = dtype,
               .routing = Routing::kGram,
               .rank = 9,
               .slices = Slices::kPartial,
               .weights = layout,
               .threshold = threshold});
    }
    // several rows a block: of one sample, of many, and with the last block not full
    forward({.dtype = dtype,
             .routing = Routing::kGram,
             .samples = 3,
             .tokens = 267,
             .d = 20,
             .o = 20,
             .residual = true,
             .base = true,
             .threshold = threshold});
    forward({.dtype = dtype,
             .routing = Routing::kGram,
             .samples = 600,
             .tokens = 3,
             .d = 17,
             .o = 9,
             .ragged = true,
             .indexed = true,
             .bad_index = true,
             .threshold = threshold});
    forward({.dtype = dtype,
             .routing = Routing::kOnes,
             .samples = 25,
             .tokens = 87,
             .d = 12,
             .o = 70,
             .slices = Slices::kMany,
             .grouped = true,
             .threshold = threshold});
  }
}

void nothing_and_refusals() {
  Problem p;
  Slice slices[17];
  p.slices = slices;
  p.slice_count = 1;
  p.width = 4;
  p.x = {nullptr, Dtype::kFloat32, 0, 8, 8, 1};
  emulator::reset_launches();
  CHECK(cuda::rank_one(p, nullptr, {}, nullptr, nullptr, nullptr) == cudaSuccess, "no rows");
  p.x.rows = 1;
  p.slice_count = 17;
  p.width = 17;
  CHECK(cuda::rank_one(p, nullptr, {}, nullptr, nullptr, nullptr) == cudaErrorInvalidValue, "too many slices");
  p.slice_count = 1;
  p.dtype = Dtype::kFloat64;
  p.conditions = {1, 1, nullptr};
  CHECK(cuda::rank_one(p, nullptr, {}, nullptr, nullptr, nullptr) == cudaErrorInvalidValue, "float64");
  CHECK(emulator::launch_count() == 0, "launched for nothing");
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft::test;
  for (const routed_peft::Dtype dtype : kKernelDtypes) {
    options(dtype);
    sums(dtype);
    shapes(dtype);
  }
  nothing_and_refusals();
}
