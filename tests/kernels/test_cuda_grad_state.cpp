// state_grad, gram_grad and pooled_grad against loops in double, in every mode of the emulator.
#include <functional>
#include <memory>
#include <optional>
#include <string>

#include "kernels/device/philox.cuh"
#include "kernels/launch.h"
#include "support.h"

namespace routed_peft::test {
namespace {

constexpr Dtype kKernelDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
constexpr double kFloat = 16 * 0x1p-24;
// Each of a product's factors may be rounded to TF32 twice: as what it is, and as the product that it is made of.
constexpr double kTensor = 2.2 * 0x1p-11;

Dtype z_type(Dtype dtype) { return dtype == Dtype::kBFloat16 ? dtype : Dtype::kFloat32; }

// run() once in every mode; what it leaves in `outputs` must be the same, bit for bit. Returns the launches of one.
size_t in_every_mode(const std::string& name, const std::vector<Tensor*>& outputs,
                     const std::function<cudaError_t()>& run) {
  std::vector<std::vector<unsigned char>> first;
  emulator::reset_launches();
  for (const emulator::Options& mode : emulator::modes()) {
    emulator::set_options(mode);
    for (Tensor* output : outputs) output->poison();
    const cudaError_t error = run();
    CHECK(error == cudaSuccess, "%s: %s", name.c_str(), cudaGetErrorString(error));
    for (size_t i = 0; i < outputs.size(); ++i) {
      const char* const text = name.c_str();
      CHECK(outputs[i]->gaps_intact(), "%s, %s: output %zu, between the rows", text, to_string(mode).c_str(), i);
      if (first.size() <= i) first.push_back(outputs[i]->bytes());
      CHECK(first[i] == outputs[i]->bytes(), "%s, %s: output %zu has other bits", text, to_string(mode).c_str(), i);
    }
  }
  emulator::set_options({});
  return emulator::launch_count() / emulator::modes().size();
}

// A number and the sum of the absolute values that it is the sum of.
struct Sum {
  double value = 0, magnitude = 0;
  void add(double number) { value += number, magnitude += std::abs(number); }
  void add(double factor, const Sum& s) { value += factor * s.value, magnitude += std::abs(factor) * s.magnitude; }
};
using Sums = std::vector<Sum>;

void check_close(const std::string& name, const char* what, const Matrix& got, int64_t i, int64_t j,
                 const Sum& expected, double tolerance = kFloat) {
  const double value = get(got, i, j), rounding = got.dtype == Dtype::kFloat32 ? 0 : 0.51 * epsilon(got.dtype);
  const double bound =
      tolerance * expected.magnitude + rounding * (std::abs(expected.value) + tolerance * expected.magnitude);
  CHECK(std::abs(value - expected.value) <= bound + tiny(got.dtype), "%s: %s[%lld, %lld] is %.9g, not %.9g",
        name.c_str(), what, (long long)i, (long long)j, value, expected.value);
}

enum class Index { kNone, kShared, kOne, kBad };  // kBad: some samples have no condition
enum class Mask { kNone, kSome, kAll };           // kAll: all of the first condition's are false

// Samples, the conditions they use, and a mask of the conditions' rows.
struct Shape {
  int64_t samples = 3, conditions = 3, rows = 20, tokens = 20;  // of a sample, of a condition
  bool ragged = false, aligned = false;  // aligned: row n of a sample is token n of its condition
  Index index = Index::kNone;
  Mask mask = Mask::kNone;

  std::string name() const {
    return std::to_string(samples) + " x " + std::to_string(rows) + " with " + std::to_string(conditions) + " x " +
           std::to_string(tokens) + (ragged ? ", ragged" : "") + ", index " + std::to_string(int(index)) + ", mask " +
           std::to_string(int(mask));
  }
};

struct Batch {
  std::vector<int64_t> input_offsets, condition_offsets;
  std::unique_ptr<int64_t[]> index;
  std::unique_ptr<bool[]> mask;
  Sequences inputs, conditions;

  Batch(const Shape& s, Random& random) {
    conditions = split(s.conditions, s.tokens, s.ragged, condition_offsets, random, {});
    if (s.index != Index::kNone) {
      index = std::make_unique<int64_t[]>(size_t(s.samples));
      for (int64_t i = 0; i < s.samples; ++i) {  // the last one is nobody's
        index[size_t(i)] = s.index == Index::kOne ? 0 : random.below(std::max<int64_t>(s.conditions - 1, 1));
        if (s.index == Index::kBad && i % 3 == 1) index[size_t(i)] = i % 2 ? -1 : s.conditions;
      }
    }
    std::vector<int64_t> lengths;
    for (int64_t i = 0; s.aligned && i < s.samples; ++i) {
      const int64_t c = condition_of(i);
      lengths.push_back(c < 0 ? 3 : conditions.end(c) - conditions.begin(c));
    }
    inputs = split(s.samples, s.rows, s.ragged, input_offsets, random, lengths);
    if (s.mask == Mask::kNone) return;
    mask = std::make_unique<bool[]>(size_t(conditions.rows));
    for (int64_t row = 0; row < conditions.rows; ++row) mask[size_t(row)] = random.below(3) != 0;
    if (s.mask == Mask::kAll) std::fill_n(mask.get(), conditions.end(0), false);
  }
  int64_t condition_of(int64_t sample) const {
    const int64_t c = index ? index[size_t(sample)] : sample;
    return c < conditions.count ? c : -1;
  }
  bool valid(int64_t row) const { return mask == nullptr || mask[size_t(row)]; }
  int64_t count(int64_t c) const {
    int64_t valid_rows = 0;
    for (int64_t row = conditions.begin(c); row < conditions.end(c); ++row) valid_rows += valid(row);
    return valid_rows;
  }
  double factor(int64_t c) const { return 1.0 / double(std::max<int64_t>(count(c), 1)); }
  // What pooling gives a row, as csrc/cpu/condition.cpp has it.
  double weight(int64_t c, int64_t row, Pool pool, bool scale_by_tokens) const {
    if (!valid(row)) return 0;
    if (pool == Pool::kMean || (pool == Pool::kNone && scale_by_tokens)) return 1.0 / double(count(c));
    for (int64_t before = conditions.begin(c); pool == Pool::kFirst && before < row; ++before) {
      if (valid(before)) return 0;
    }
    return 1;
  }

 private:
  static Sequences split(int64_t count, int64_t length, bool ragged, std::vector<int64_t>& offsets, Random& random,
                         const std::vector<int64_t>& lengths) {
    if (!ragged) return {count, count * length, nullptr};
    offsets = {0};
    for (int64_t i = 0; i < count; ++i) {  // the second one is empty
      const int64_t own = i == 1 ? 0 : 1 + random.below(2 * length);
      offsets.push_back(offsets.back() + (lengths.empty() ? own : lengths[size_t(i)]));
    }
    return {count, offsets.back(), offsets.data()};
  }
};

// ---- state_grad

struct StateCase {
  Dtype dtype = Dtype::kFloat32;
  Shape shape = {};
  int64_t width = 40;
  bool padded = false;  // rows lie apart
  bool in_sequence = false, second = false, state = true;
  Pool pool = Pool::kMean;
  bool scale_by_tokens = true;
  std::string name() const {
    return "state of dtype " + std::to_string(int(dtype)) + ", " + shape.name() + ", width " + std::to_string(width) +
           (padded ? ", padded" : "") + (in_sequence ? ", in sequence" : "") + (second ? ", second" : "") +
           (state ? "" : " only") + ", pool " + std::to_string(int(pool)) + (scale_by_tokens ? " scaled" : "");
  }
};

void state_vectors(const StateCase& c) {
  Random random(3);
  const Batch batch(c.shape, random);
  const int64_t rows = batch.inputs.rows, conditions = c.shape.conditions, samples = c.shape.samples;
  const Layout layout = c.padded ? Layout::kPadded : Layout::kDense;
  Tensor from(Dtype::kFloat32, rows, c.width, layout), second(Dtype::kFloat32, rows, c.width, layout),
      dt(Dtype::kFloat32, rows, c.width, layout);
  Sums sums(size_t(conditions * c.width)), second_sums(size_t(samples * c.width));
  for (int64_t s = 0; s < samples; ++s) {
    for (int64_t row = batch.inputs.begin(s); row < batch.inputs.end(s); ++row) {
      if (row != batch.inputs.begin(s) && row % 16 != 0) continue;  // NaN
      for (int64_t j = 0; j < c.width; ++j) {
        set(from, row, j, random.uniform());
        set(second, row, j, random.uniform());
        if (batch.condition_of(s) >= 0) sums[size_t(batch.condition_of(s) * c.width + j)].add(get(from, row, j));
        second_sums[size_t(s * c.width + j)].add(get(second, row, j));
      }
    }
  }
  dt.fill([&](int64_t, int64_t) { return random.uniform(); });
  Tensor out(Dtype::kFloat32, c.state ? conditions : 0, c.width), second_out(Dtype::kFloat32, samples, c.width);
  Tensor gradient(z_type(c.dtype), rows, c.width, c.padded ? Layout::kPadded : Layout::kDense);

  cuda::StateGradParams p;
  p.dtype = c.dtype;
  if (c.state) {
    p.from = static_cast<const float*>(from.data());
    p.out = static_cast<float*>(out.data());
  }
  p.from_stride = from.matrix().row_stride;
  p.width = int(c.width);
  p.inputs = batch.inputs, p.conditions = batch.conditions;
  p.index = batch.index.get();
  p.mask = batch.mask.get();
  p.pool = c.pool;
  p.scale_by_tokens = c.scale_by_tokens;
  std::vector<Tensor*> outputs;
  if (c.state) outputs.push_back(&out);
  if (c.in_sequence) {
    p.inputs = p.conditions;
    p.dt = static_cast<const float*>(dt.data());
    p.rows = gradient.data();
    p.rows_stride = gradient.matrix().row_stride;
    outputs.push_back(&gradient);
  }
  if (c.second) {
    p.second_from = static_cast<const float*>(second.data());
    p.second_out = static_cast<float*>(second_out.data());
    outputs.push_back(&second_out);
  }
  const std::string name = c.name();
  CHECK(in_every_mode(name, outputs, [&] { return cuda::state_grad(p, nullptr); }) == 1, "%s: launches", name.c_str());
  for (int64_t j = 0; j < c.width; ++j) {
    for (int64_t i = 0; c.state && i < conditions; ++i) {
      check_close(name, "out", out, i, j, sums[size_t(i * c.width + j)]);
    }
    for (int64_t i = 0; c.second && i < samples; ++i) {
      check_close(name, "second", second_out, i, j, second_sums[size_t(i * c.width + j)]);
    }
    for (int64_t i = 0; c.in_sequence && i < conditions; ++i) {
      for (int64_t row = batch.conditions.begin(i); row < batch.conditions.end(i); ++row) {
        Sum expected;
        expected.add(get(dt, row, j));
        const double weight = batch.weight(i, row, c.pool, c.scale_by_tokens);
        if (weight != 0) expected.add(weight, sums[size_t(i * c.width + j)]);
        check_close(name, "rows", gradient, row, j, expected);
      }
    }
  }
}

void state_tokens(const StateCase& c) {
  Random random(5);
  const Batch batch(c.shape, random);
  const int64_t rows = batch.inputs.rows, tokens = batch.conditions.rows;
  Tensor from(Dtype::kFloat32, rows, c.width, c.padded ? Layout::kPadded : Layout::kDense);
  Sums sums(size_t(tokens * c.width));
  for (int64_t s = 0; s < c.shape.samples; ++s) {
    const int64_t condition = batch.condition_of(s), begin = batch.inputs.begin(s);
    for (int64_t row = begin; condition >= 0 && row < batch.inputs.end(s); ++row) {
      const int64_t token = batch.conditions.begin(condition) + row - begin;
      if (!batch.valid(token)) continue;  // NaN
      for (int64_t j = 0; j < c.width; ++j) {
        set(from, row, j, random.uniform());
        sums[size_t(token * c.width + j)].add(get(from, row, j));
      }
    }
  }
  Tensor out(Dtype::kFloat32, tokens, c.width), gradient(z_type(c.dtype), tokens, c.width, Layout::kPadded);
  cuda::StateGradParams p;
  p.dtype = c.dtype;
  p.tokens = true;
  p.from = static_cast<const float*>(from.data());
  p.from_stride = from.matrix().row_stride;
  p.width = int(c.width);
  p.inputs = batch.inputs, p.conditions = batch.conditions;
  p.index = batch.index.get();
  p.mask = batch.mask.get();
  p.out = static_cast<float*>(out.data());
  p.rows = gradient.data();
  p.rows_stride = gradient.matrix().row_stride;
  const std::string name = "tokens, " + c.name();
  for (const int wanted : {3, 1, 2}) {  // out and rows, one of them
    p.out = wanted & 1 ? static_cast<float*>(out.data()) : nullptr;
    p.rows = wanted & 2 ? gradient.data() : nullptr;
    std::vector<Tensor*> outputs;
    if (wanted & 1) outputs.push_back(&out);
    if (wanted & 2) outputs.push_back(&gradient);
    const size_t launches = in_every_mode(name, outputs, [&] { return cuda::state_grad(p, nullptr); });
    CHECK(launches == 1, "%s: launches", name.c_str());
    for (int64_t row = 0; row < tokens; ++row) {
      for (int64_t j = 0; j < c.width; ++j) {
        const Sum& sum = sums[size_t(row * c.width + j)];
        if (wanted & 1) check_close(name, "out", out, row, j, sum);
        if (wanted & 2) check_close(name, "rows", gradient, row, j, sum);
      }
    }
  }
}

void states() {
  const Shape shapes[] = {
      {},
      {.samples = 4, .conditions = 4, .rows = 37, .tokens = 37, .ragged = true, .mask = Mask::kAll},
      {.samples = 9,
       .conditions = 4,
       .rows = 18,
       .tokens = 18,
       .ragged = true,
       .index = Index::kShared,
       .mask = Mask::kSome},
      {.samples = 7, .conditions = 3, .rows = 18, .tokens = 18, .ragged = true, .index = Index::kBad},
      {.samples = 300, .conditions = 3, .rows = 1, .tokens = 1, .index = Index::kShared, .mask = Mask::kSome},
      {.samples = 700, .conditions = 2, .rows = 3, .tokens = 3, .index = Index::kOne},
  };
  for (Shape shape : shapes) {
    shape.aligned = true;
    for (const bool padded : {false, true}) {
      state_vectors({.shape = shape, .width = padded ? 33 : 16, .padded = padded, .second = padded});
      const Dtype dtype = kKernelDtypes[padded ? 1 : 0];
      state_tokens({.dtype = dtype, .shape = shape, .width = padded ? 7 : 12, .padded = padded});
    }
  }
  state_vectors({.width = 1, .second = true, .state = false});
  state_vectors({.shape = {.samples = 1, .conditions = 1, .rows = 9000, .tokens = 9000}, .width = 2});
  state_tokens(
      {.dtype = Dtype::kFloat16, .shape = {.samples = 2, .conditions = 2, .rows = 70, .tokens = 70}, .width = 65});
  state_tokens({.width = 1});
  for (const Dtype dtype : kKernelDtypes) {
    for (const Pool pool : {Pool::kNone, Pool::kMean, Pool::kFirst}) {
      for (const bool scaled : {false, true}) {
        for (const Mask mask : {Mask::kNone, Mask::kSome, Mask::kAll}) {
          const Shape shape{.rows = 24, .tokens = 24, .ragged = mask != Mask::kNone, .aligned = true, .mask = mask};
          state_vectors({.dtype = dtype,
                         .shape = shape,
                         .width = scaled ? 35 : 8,
                         .padded = scaled,
                         .in_sequence = true,
                         .pool = pool,
                         .scale_by_tokens = scaled});
        }
      }
    }
  }
  // rows in several blocks, and a late first one
  const Shape longer{.samples = 2, .conditions = 2, .rows = 650, .tokens = 650, .mask = Mask::kSome};
  state_vectors({.dtype = Dtype::kBFloat16, .shape = longer, .width = 5, .in_sequence = true, .second = true});
  state_vectors({.shape = longer, .width = 5, .in_sequence = true, .pool = Pool::kFirst});
  const Shape nothing{.samples = 0, .conditions = 2, .rows = 0, .tokens = 3, .index = Index::kShared};
  state_vectors({.shape = nothing, .width = 3});  // conditions that nobody uses
  state_tokens({.shape = nothing, .width = 3});
  emulator::reset_launches();
  CHECK(cuda::state_grad({}, nullptr) == cudaSuccess, "no width");
  cuda::StateGradParams none;
  none.width = 4;
  CHECK(cuda::state_grad(none, nullptr) == cudaSuccess, "no conditions");
  none.tokens = true;
  CHECK(cuda::state_grad(none, nullptr) == cudaSuccess, "no tokens");
  CHECK(emulator::launch_count() == 0, "launched for nothing");
}

// ---- gram_grad

enum class Order { kMatrix, kTokens, kState };

struct GramCase {
  Dtype dtype = Dtype::kFloat32;
  Order order = Order::kMatrix;
  Shape shape = {};
  int64_t width = 16, groups = 1, splits = 1;
  bool relu = false, scale_by_tokens = true, padded = false, in_sequence = false;
  std::string name() const {
    return "gram of dtype " + std::to_string(int(dtype)) + ", order " + std::to_string(int(order)) + ", " +
           shape.name() + ", width " + std::to_string(width) + " / " + std::to_string(groups) + ", splits " +
           std::to_string(splits) + (relu ? ", relu" : "") + (scale_by_tokens ? ", scaled" : "") +
           (padded ? ", padded" : "") + (in_sequence ? ", in sequence" : "");
  }
};

void gram(const GramCase& c) {
  Random random(9);
  const Batch batch(c.shape, random);
  const int64_t rows = batch.inputs.rows, tokens = batch.conditions.rows, w = c.width / c.groups;
  const int64_t samples = c.shape.samples, conditions = c.shape.conditions;
  const Layout layout = c.padded ? Layout::kPadded : Layout::kDense;
  const auto uniform = [&](int64_t, int64_t) { return random.uniform(); };
  Tensor v(c.dtype, tokens, c.width, layout), t(c.dtype, rows, c.width, layout),
      g(Dtype::kFloat32, rows, c.width, layout), dt(Dtype::kFloat32, tokens, c.width, layout);
  Tensor d(Dtype::kFloat32, c.splits * samples * c.width, w);
  v.fill([&](int64_t row, int64_t) { return batch.valid(row) ? random.uniform() : kNan; });
  for (Tensor* each : {&t, &g, &dt, &d}) each->fill(uniform);
  for (int64_t s = 0; s < samples; ++s) {  // what nobody uses
    if (batch.condition_of(s) >= 0) continue;
    for (int64_t i = 0; i < c.splits * c.width * w; ++i) {
      set(d, (i / (c.width * w) * samples + s) * c.width + i / w % c.width, i % w, kNan);
    }
    for (int64_t row = batch.inputs.begin(s); row < batch.inputs.end(s); ++row) {
      for (int64_t j = 0; j < c.width; ++j) set(g, row, j, kNan);
    }
  }

  Tensor gradient(z_type(c.dtype), tokens, c.width, layout), state(Dtype::kFloat32, conditions * c.width, w);
  cuda::GramGradParams p;
  p.dtype = c.dtype;
  p.relu = c.relu;
  p.scale_by_tokens = c.scale_by_tokens;
  p.width = int(c.width), p.group_width = int(w);
  p.inputs = batch.inputs, p.conditions = batch.conditions;
  p.index = batch.index.get();
  p.mask = batch.mask.get();
  if (c.order == Order::kTokens) {
    p.t = t.data(), p.g = static_cast<const float*>(g.data());
    p.t_stride = t.matrix().row_stride, p.g_stride = g.matrix().row_stride;
  } else {
    p.d = static_cast<const float*>(d.data());
    p.splits = int(c.splits);
  }
  p.v = v.data(), p.v_stride = v.matrix().row_stride;
  if (c.order == Order::kState) {
    p.dstate = static_cast<float*>(state.data());
  } else {
    p.rows = gradient.data();
    p.rows_stride = gradient.matrix().row_stride;
    if (c.in_sequence) p.dt = static_cast<const float*>(dt.data());
  }
  const std::string name = c.name();
  Tensor& output = c.order == Order::kState ? state : gradient;
  CHECK(in_every_mode(name, {&output}, [&] { return cuda::gram_grad(p, nullptr); }) == 1, "%s: launches", name.c_str());

  const double tolerance = c.dtype == Dtype::kFloat32 ? kFloat : kTensor;
  const auto positive = [&](double value) { return c.relu && value < 0 ? 0 : value; };
  for (int64_t condition = 0; condition < conditions; ++condition) {
    std::vector<int64_t> users;
    for (int64_t s = 0; s < samples; ++s) {
      if (batch.condition_of(s) == condition) users.push_back(s);
    }
    Sums sums(size_t(c.width * w));
    for (const int64_t s : users) {
      for (int64_t i = 0; i < c.splits * c.width * w; ++i) {
        const int64_t part = i / (c.width * w), row = i / w % c.width;
        sums[size_t(row * w + i % w)].add(get(d, (part * samples + s) * c.width + row, i % w));
      }
    }
    for (int64_t i = 0; c.order == Order::kState && i < c.width * w; ++i) {
      check_close(name, "dstate", state, condition * c.width + i / w, i % w, sums[size_t(i)]);
    }
    const double factor = c.scale_by_tokens ? batch.factor(condition) : 1;
    for (int64_t m = batch.conditions.begin(condition); c.order != Order::kState && m < batch.conditions.end(condition);
         ++m) {
      Sums dv(static_cast<size_t>(c.width));
      for (int64_t j = 0; batch.valid(m) && c.order == Order::kMatrix && j < c.width; ++j) {
        const int64_t group = j / w;
        for (int64_t i = 0; i < w; ++i) {
          const double here = get(v, m, group * w + i);
          dv[size_t(j)].add(factor * positive(here), sums[size_t((group * w + i) * w + j % w)]);
          if (!c.relu || get(v, m, j) > 0) dv[size_t(j)].add(factor * here, sums[size_t(j * w + i)]);
        }
      }
      for (const int64_t s : users) {
        for (int64_t n = batch.inputs.begin(s); n < batch.inputs.end(s) && c.order == Order::kTokens && batch.valid(m);
             ++n) {
          for (int64_t group = 0; group < c.groups; ++group) {
            Sum score, dscore;
            for (int64_t j = group * w; j < (group + 1) * w; ++j) {
              score.add(positive(get(t, n, j)) * positive(get(v, m, j)));
              dscore.add(get(g, n, j) * get(v, m, j));
            }
            for (int64_t j = group * w; j < (group + 1) * w; ++j) {
              dv[size_t(j)].add(factor * get(g, n, j), score);
              if (!c.relu || get(v, m, j) > 0) dv[size_t(j)].add(factor * positive(get(t, n, j)), dscore);
            }
          }
        }
      }
      for (int64_t j = 0; j < c.width; ++j) {
        if (c.in_sequence) dv[size_t(j)].add(get(dt, m, j));
        check_close(name, "rows", gradient, m, j, dv[size_t(j)], tolerance);
        CHECK(batch.valid(m) || c.in_sequence || get(gradient, m, j) == 0, "%s: masked", name.c_str());
      }
    }
  }
}

void grams() {
  for (const Dtype dtype : kKernelDtypes) {
    for (const bool relu : {false, true}) {
      for (const Order order : {Order::kMatrix, Order::kTokens}) {
        const bool float32 = dtype == Dtype::kFloat32;
        for (const int64_t width : {1, 5, 24, 64}) {
          const Shape shape{.samples = 2, .conditions = 2, .rows = width == 24 ? 40 : 7, .tokens = 9};
          gram({.dtype = dtype, .order = order, .shape = shape, .width = width, .relu = relu, .padded = width == 5});
        }
        // more than one slab of the columns, more than one tile of rows
        gram({.dtype = dtype,
              .order = order,
              .shape = {.samples = 1, .conditions = 1, .rows = 37, .tokens = 70},
              .width = relu ? 130 : 72,
              .relu = relu,
              .padded = relu});
        // groups, and whether they begin at 16 bytes
        for (const int64_t w : {3, 16}) {
          gram({.dtype = dtype,
                .order = order,
                .shape = {.rows = 5, .tokens = 4, .mask = Mask::kSome},
                .width = 3 * w,
                .groups = 3,
                .splits = 2,
                .relu = relu,
                .scale_by_tokens = w == 3,
                .padded = w == 3});
        }
        gram({.dtype = dtype,
              .order = order,
              .shape = {.samples = 7,
                        .conditions = 4,
                        .rows = 12,
                        .tokens = 20,
                        .ragged = true,
                        .index = relu ? Index::kShared : Index::kBad,
                        .mask = Mask::kAll},
              .width = 20,
              .splits = 3,
              .relu = relu});
        gram({.dtype = dtype,
              .order = order,
              .shape = {.samples = 3, .conditions = 3, .rows = 20, .tokens = 20, .ragged = true, .mask = Mask::kSome},
              .width = 12,
              .relu = relu,
              .scale_by_tokens = float32,
              .in_sequence = true});
      }
    }
  }
  gram({.dtype = Dtype::kBFloat16,
        .shape = {.samples = 1, .conditions = 1, .rows = 33, .tokens = 40},
        .width = 256,
        .relu = true});
  gram({.dtype = Dtype::kFloat16,
        .order = Order::kTokens,
        .shape = {.samples = 1, .conditions = 1, .rows = 33, .tokens = 40},
        .width = 256,
        .relu = true});
  gram({.order = Order::kTokens, .shape = {.samples = 1, .conditions = 1, .rows = 9, .tokens = 9}, .width = 200});
  gram({.order = Order::kTokens,
        .shape = {.samples = 2, .conditions = 2, .rows = 6, .tokens = 5},
        .width = 132,
        .groups = 2,
        .relu = true});
  // one condition for very many samples, and a sample of many rows
  for (const Order order : {Order::kMatrix, Order::kTokens, Order::kState}) {
    gram({.order = order,
          .shape = {.samples = 300, .conditions = 2, .rows = 1, .tokens = 3, .index = Index::kOne},
          .width = 6});
  }
  // conditions much longer than the average
  const Shape uneven{.samples = 9, .conditions = 9, .rows = 3, .tokens = 50, .ragged = true, .mask = Mask::kSome};
  gram({.shape = uneven, .width = 4});
  gram({.dtype = Dtype::kBFloat16, .order = Order::kTokens, .shape = uneven, .width = 4, .relu = true});
  for (const int64_t groups : {1, 3}) {
    gram({.order = Order::kState,
          .shape = {.samples = 5, .conditions = 3, .rows = 2, .tokens = 2, .index = Index::kShared},
          .width = 69,
          .groups = groups,
          .splits = 4});
  }
  gram({.order = Order::kState, .shape = {.samples = 1, .conditions = 1, .rows = 2, .tokens = 2}, .width = 5});
  const Shape nothing{.samples = 0, .conditions = 2, .rows = 0, .tokens = 3, .index = Index::kShared};
  for (const Order order : {Order::kMatrix, Order::kTokens, Order::kState}) {
    gram({.order = order, .shape = nothing, .width = 4, .in_sequence = true});
  }
  emulator::reset_launches();
  CHECK(cuda::gram_grad({}, nullptr) == cudaSuccess, "nothing to do");
  CHECK(emulator::launch_count() == 0, "launched for nothing");
}

// ---- pooled_grad

struct PooledCase {
  Dtype dtype = Dtype::kFloat32;
  int64_t conditions = 3, tokens = 12, cols = 40, width = 6;
  bool ragged = false;
  Mask mask = Mask::kNone;
  Pool pool = Pool::kMean;
  bool scale_by_tokens = true;
  uint32_t threshold = 0;
  bool seed_in_memory = false;
  Layout dy = Layout::kDense;
  Dtype c_dtype = Dtype::kFloat32;
  Layout c_layout = Layout::kDense;
  bool want_dc = true, want_db = true, want_dy = true;

  std::string name() const {
    return "pooled of dtype " + std::to_string(int(dtype)) + ", " + std::to_string(conditions) + " x " +
           std::to_string(tokens) + " x " + std::to_string(cols) + " -> " + std::to_string(width) +
           (ragged ? ", ragged" : "") + ", mask " + std::to_string(int(mask)) + ", pool " + std::to_string(int(pool)) +
           (scale_by_tokens ? " scaled" : "") + ", threshold " + std::to_string(threshold) + ", layouts " +
           std::to_string(int(dy)) + " " + std::to_string(int(c_layout)) + ", C " + std::to_string(int(c_dtype));
  }
};

void pooled(const PooledCase& c) {
  Random random(13);
  const Batch batch(
      {.samples = 1, .conditions = c.conditions, .rows = 1, .tokens = c.tokens, .ragged = c.ragged, .mask = c.mask},
      random);
  const int64_t rows = batch.conditions.rows, seed = static_cast<int64_t>(random.bits());
  const auto uniform = [&](int64_t, int64_t) { return random.uniform(); };
  Tensor dv(Dtype::kFloat32, c.conditions, c.width), mean(Dtype::kFloat32, c.conditions, c.cols),
      weight(c.c_dtype, c.width, c.cols, c.c_layout);
  for (Tensor* each : {&dv, &mean, &weight}) each->fill(uniform);
  Problem p;
  p.dtype = c.dtype;
  p.conditions = batch.conditions;
  p.y.rows = rows, p.y.cols = c.cols;  // not read
  p.c = weight;
  p.condition_mask = batch.mask.get();
  p.pool = c.pool;
  p.scale_by_tokens = c.scale_by_tokens;
  p.width = c.width;
  p.drop_y = {c.seed_in_memory ? 0 : uint64_t(seed), c.threshold, 1, c.seed_in_memory ? &seed : nullptr};
  Tensor dc(Dtype::kFloat32, c.width, c.cols), db(Dtype::kFloat32, 1, c.width), dy(c.dtype, rows, c.cols, c.dy);
  cuda::PooledGradParams io;
  io.dv = static_cast<const float*>(dv.data());
  std::vector<Tensor*> outputs;
  if (c.want_dc) {
    io.pooled_y = static_cast<const float*>(mean.data());
    io.dc = static_cast<float*>(dc.data());
    outputs.push_back(&dc);
  }
  if (c.want_db) {
    io.db_c = static_cast<float*>(db.data());
    outputs.push_back(&db);
  }
  if (c.want_dy) {
    io.dy = dy;
    outputs.push_back(&dy);
  }
  const std::string name = c.name();
  CHECK(in_every_mode(name, outputs, [&] { return cuda::pooled_grad(p, io, nullptr); }) == 1, "%s: launches",
        name.c_str());
  for (int64_t k = 0; c.want_dc && k < c.width; ++k) {
    for (int64_t j = 0; j < c.cols; ++j) {
      Sum expected;
      for (int64_t i = 0; i < c.conditions; ++i) expected.add(get(dv, i, k) * get(mean, i, j));
      check_close(name, "dc", dc, k, j, expected);
    }
  }
  for (int64_t k = 0; c.want_db && k < c.width; ++k) {
    Sum expected;
    for (int64_t i = 0; i < c.conditions; ++i) {
      double bias = 0;
      for (int64_t row = batch.conditions.begin(i); row < batch.conditions.end(i); ++row) {
        bias += batch.weight(i, row, c.pool, c.scale_by_tokens);
      }
      expected.add(bias * get(dv, i, k));
    }
    check_close(name, "db", db, 0, k, expected);
  }
  for (int64_t i = 0; c.want_dy && i < c.conditions; ++i) {
    Sums line(static_cast<size_t>(c.cols));
    for (int64_t j = 0; j < c.cols; ++j) {
      for (int64_t k = 0; k < c.width; ++k) line[size_t(j)].add(get(dv, i, k) * get(weight, k, j));
    }
    for (int64_t row = batch.conditions.begin(i); row < batch.conditions.end(i); ++row) {
      const double share = batch.weight(i, row, c.pool, c.scale_by_tokens);
      for (int64_t j = 0; j < c.cols; ++j) {
        const bool kept = share != 0 && (c.threshold == 0 || dropout_keeps(uint64_t(seed), 1, c.threshold, row, j));
        Sum expected;
        if (kept) expected.add(share * p.drop_y.scale(), line[size_t(j)]);
        check_close(name, "dy", dy, row, j, expected);
        CHECK(kept || get(dy, row, j) == 0, "%s: dy[%lld, %lld] is not 0", name.c_str(), (long long)row, (long long)j);
      }
    }
  }
}

void pooleds() {
  constexpr Layout kLayouts[] = {Layout::kDense, Layout::kTransposed, Layout::kPadded, Layout::kStrided};
  for (const Dtype dtype : kKernelDtypes) {
    for (const Pool pool : {Pool::kNone, Pool::kMean, Pool::kFirst}) {
      for (const Mask mask : {Mask::kNone, Mask::kSome, Mask::kAll}) {
        pooled({.dtype = dtype,
                .ragged = mask == Mask::kAll,
                .mask = mask,
                .pool = pool,
                .scale_by_tokens = mask != Mask::kSome,
                .dy = mask == Mask::kSome ? Layout::kPadded : Layout::kDense});
        pooled({.dtype = dtype,
                .conditions = 2,
                .cols = 70,
                .width = 9,
                .mask = mask,
                .pool = pool,
                .threshold = 20000,
                .seed_in_memory = mask == Mask::kSome});
      }
    }
    for (const int64_t cols : {1, 8, 31, 130, 300}) {
      for (const uint32_t threshold : {0u, 6554u, 65536u}) {
        pooled({.dtype = dtype,
                .conditions = 2,
                .tokens = 3,
                .cols = cols,
                .width = 5,
                .threshold = threshold,
                .dy = cols == 130 ? Layout::kPadded : Layout::kDense,
                .c_dtype = dtype});
      }
    }
    for (const Layout layout : kLayouts) {
      pooled({.dtype = dtype,
              .conditions = 9,
              .tokens = 2,
              .cols = 24,
              .width = 70,
              .c_dtype = kDtypes[static_cast<size_t>(layout)],
              .c_layout = layout});
    }
    for (const int wanted : {1, 2, 4}) {
      pooled({.dtype = dtype,
              .mask = Mask::kSome,
              .want_dc = wanted == 1,
              .want_db = wanted == 2,
              .want_dy = wanted == 4});
    }
    // rows of one condition in several blocks; several conditions in one block
    pooled({.dtype = dtype,
            .conditions = 1,
            .tokens = 400,
            .cols = 20,
            .width = 3,
            .mask = Mask::kSome,
            .threshold = 30000,
            .want_dc = false});
    pooled({.dtype = dtype,
            .conditions = 1,
            .tokens = 400,
            .cols = 20,
            .width = 3,
            .mask = Mask::kSome,
            .pool = Pool::kFirst,
            .want_dc = false});
    pooled({.dtype = dtype,
            .conditions = 803,
            .tokens = 2,
            .cols = 20,
            .width = 3,
            .ragged = true,
            .mask = Mask::kSome,
            .threshold = 9000});
  }
  pooled({.conditions = 1100, .tokens = 1, .cols = 33, .width = 34, .want_dy = false});  // long sums
  pooled({.conditions = 0, .cols = 5});                                                  // sums of nothing
  Problem nothing;
  emulator::reset_launches();
  CHECK(cuda::pooled_grad(nothing, {}, nullptr) == cudaSuccess, "nothing is wanted");
  CHECK(emulator::launch_count() == 0, "launched for nothing");
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft::test;
  states();
  grams();
  pooleds();
}
