// A random routed layer, its definition written once more in double without any of the library's shortcuts, and the
// cases that the CPU path and the kernels are both held against it with.
#pragma once

#include <array>
#include <memory>
#include <string>

#include "kernels/device/philox.cuh"
#include "kernels/plan.h"
#include "support.h"

namespace routed_peft::test {

using plan::GramOrder;
using Numbers = std::vector<double>;

// The differentiable inputs of a layer.
enum Input { kX, kA, kB, kY, kC, kWeight, kBias, kBDown, kBC, kState, kInputs };
constexpr const char* kNames[] = {"x", "A", "B", "y", "C", "weight", "bias", "b_down", "b_C", "state"};

struct Block {
  int64_t rows = 0, cols = 0;
  Numbers v;  // empty: absent
  bool present() const { return cols > 0; }
};
using Values = std::array<Block, kInputs>;

enum class SliceMode { kWhole, kPartial, kMixed, kUnmixed };

struct Case {
  Routing routing = Routing::kNone;
  Source source = Source::kNone;
  StateKind kind = StateKind::kNone;
  Pool pool = Pool::kNone;
  bool varlen_x = false, varlen_y = false, mask = false, index = false;
  SliceMode slices = SliceMode::kWhole;
  int64_t samples = 3, n = 4, m = 3, conditions = 0;  // 0: one a sample
  int64_t d = 5, d_c = 3, rank = 2, o = 7;
  bool shared = false, b_down = false, b_c = false, bias = false, weight = false, residual = false;
  bool input_mask = false, scale_by_tokens = true;
  Activation activation = Activation::kNone;
  uint32_t drop_x = 0, drop_y = 0;
  bool large = false;
};

// A case with its numbers. All are odd multiples of 1/128: exact in every dtype, and their sums rarely zero, where relu
// has no derivative.
struct Layer {
  Problem p;  // without its matrices
  Values values;
  Numbers dout, multiply_x, multiply_y;
  std::vector<int64_t> x_offsets, y_offsets, index;
  std::unique_ptr<bool[]> condition_mask, input_mask;
  std::vector<Slice> slices;
};

inline double number(Random& random) { return double(2 * random.below(128) - 127) / 128; }

inline Block block(Random& random, int64_t rows, int64_t cols) {
  Block b{rows, cols, Numbers(static_cast<size_t>(rows * cols))};
  for (double& value : b.v) value = number(random);
  return b;
}

inline std::unique_ptr<bool[]> some(Random& random, int64_t rows) {
  auto mask = std::make_unique<bool[]>(static_cast<size_t>(rows) + 1);
  for (int64_t i = 0; i < rows; ++i) mask[size_t(i)] = random.below(3) != 0;
  return mask;
}

inline std::vector<int64_t> offsets_of(const std::vector<int64_t>& lengths) {
  std::vector<int64_t> offsets{0};
  for (const int64_t length : lengths) offsets.push_back(offsets.back() + length);
  return offsets;
}

inline Numbers multiplier(const Dropout& drop, int64_t rows, int64_t cols) {
  Numbers m(static_cast<size_t>(rows * cols), 1.0);
  for (int64_t i = 0; drop.threshold != 0 && i < rows * cols; ++i) {
    m[size_t(i)] = dropout_keeps(drop.seed, drop.stream, drop.threshold, i / cols, i % cols) ? drop.scale() : 0;
  }
  return m;
}

inline Layer make(const Case& c, Random& random) {
  Layer layer;
  Problem& p = layer.p;
  p.routing = c.routing, p.source = c.source, p.pool = c.pool, p.kind = c.kind, p.activation = c.activation;
  p.scale_by_tokens = c.scale_by_tokens, p.residual = c.residual, p.out_features = c.o, p.scaling = 0.75;
  if (c.slices == SliceMode::kWhole) {
    layer.slices = {{0, c.o, 0}};
  } else if (c.slices == SliceMode::kPartial) {
    layer.slices = {{2, c.o - 3, 0}};
  } else {
    layer.slices = {{c.o - 3, 3, 0}, {1, 2, 3}};  // not in the order of the columns
  }
  p.slices = layer.slices.data();
  p.slice_count = static_cast<int64_t>(layer.slices.size());
  p.width = c.rank * p.slice_count;
  p.groups = c.slices == SliceMode::kUnmixed ? 2 : 1;
  int64_t selected = 0;
  for (const Slice& slice : layer.slices) selected += slice.length;

  // rows of the inputs and of the conditions
  const bool elementwise = c.kind == StateKind::kTokens, in_sequence = c.source == Source::kInSequence;
  const int64_t conditions = c.conditions > 0 ? c.conditions : c.index ? 3 : c.samples;
  if (c.index) {
    for (int64_t s = 0; s < c.samples; ++s)
      layer.index.push_back(random.coin() ? 0 : conditions - 1);  // some are not used
    p.index = layer.index.data();
  }
  std::vector<int64_t> x_lengths(size_t(c.samples), c.n), y_lengths(size_t(conditions), elementwise ? c.n : c.m);
  if (c.varlen_x) {  // ragged, an empty one among them
    for (int64_t& length : x_lengths) length = random.below(2 * c.n);
    x_lengths[size_t(random.below(c.samples))] = 0;
  }
  if (c.varlen_y) {
    for (int64_t& length : y_lengths) length = random.below(2 * c.m);
    y_lengths[size_t(random.below(conditions))] = 0;
  }
  if (elementwise && c.varlen_y) {
    for (int64_t s = 0; s < c.samples; ++s) x_lengths[size_t(s)] = y_lengths[size_t(p.condition_of(s))];
  }
  layer.x_offsets = offsets_of(x_lengths);
  layer.y_offsets = offsets_of(y_lengths);
  p.inputs = {c.samples, layer.x_offsets.back(), c.varlen_x ? layer.x_offsets.data() : nullptr};
  p.conditions = {conditions, layer.y_offsets.back(), c.varlen_y ? layer.y_offsets.data() : nullptr};
  if (in_sequence) p.conditions = p.inputs;
  const int64_t rows = p.inputs.rows, y_rows = p.conditions.rows;

  Values& v = layer.values;
  v[kX] = block(random, rows, c.d);
  v[kA] = block(random, p.width, c.d);
  v[kB] = block(random, selected, c.rank);
  if (c.weight) v[kWeight] = block(random, c.o, c.d);
  if (c.bias) v[kBias] = block(random, 1, c.o);
  if (c.b_down) v[kBDown] = block(random, 1, p.width);
  p.shared = c.shared || in_sequence;
  if (c.source == Source::kTokens) {
    v[kY] = block(random, y_rows, p.shared ? c.d : c.d_c);
    if (!p.shared) v[kC] = block(random, p.width, c.d_c);
    if (!p.shared && c.b_c) v[kBC] = block(random, 1, p.width);
  } else if (c.source == Source::kState) {
    v[kState] = block(random, c.kind == StateKind::kTokens ? y_rows : conditions, p.state_size());
  }
  if (c.mask || in_sequence) {
    layer.condition_mask = some(random, y_rows);
    if (random.coin()) {  // a condition without any valid token
      for (int64_t row = p.conditions.begin(0); row < p.conditions.end(0); ++row)
        layer.condition_mask[size_t(row)] = false;
    }
    p.condition_mask = layer.condition_mask.get();
  }
  if (c.input_mask) {
    layer.input_mask = some(random, rows);
    p.input_mask = layer.input_mask.get();
  }
  const uint64_t seed = random.bits();
  p.drop_x = {seed, c.drop_x, 0};
  p.drop_y = in_sequence ? p.drop_x : Dropout{seed, c.drop_y, 1};
  layer.multiply_x = multiplier(p.drop_x, rows, c.d);
  if (v[kY].present()) layer.multiply_y = multiplier(p.drop_y, y_rows, v[kY].cols);
  layer.dout = block(random, rows, c.o).v;
  return layer;
}

// --- the definition

struct Reference {
  Numbers out, t, z, v, state, pooled_y;
};

inline double activate(Activation activation, double z) {
  switch (activation) {
    case Activation::kGelu:
      return z * 0.5 * std::erfc(-z / std::sqrt(2.0));
    case Activation::kGeluTanh:
      return 0.5 * z * (1 + std::tanh(std::sqrt(2 / std::acos(-1.0)) * (z + 0.044715 * z * z * z)));
    case Activation::kRelu:
      return z > 0 ? z : 0;
    case Activation::kSilu:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}

// rows [n, k] · matrix [m, k]ᵀ + bias, with a multiplier of the rows' numbers
inline Numbers project(const Block& x, const Numbers& multiply, const Block& a, const Block& bias) {
  Numbers out(static_cast<size_t>(x.rows * a.rows));
  for (int64_t i = 0; i < x.rows; ++i) {
    for (int64_t j = 0; j < a.rows; ++j) {
      double sum = bias.present() ? bias.v[size_t(j)] : 0;
      for (int64_t k = 0; k < x.cols; ++k) {
        sum += multiply[size_t(i * x.cols + k)] * x.v[size_t(i * x.cols + k)] * a.v[size_t(j * x.cols + k)];
      }
      out[size_t(i * a.rows + j)] = sum;
    }
  }
  return out;
}

inline void make_state(const Layer& layer, const Values& in, Reference& r) {
  const Problem& p = layer.p;
  const int64_t width = p.width, w = p.group_width(), y_rows = p.conditions.rows;
  if (p.source == Source::kInSequence) {
    r.v = r.t;
  } else {
    r.v = p.shared ? project(in[kY], layer.multiply_y, in[kA], in[kBDown])
                   : project(in[kY], layer.multiply_y, in[kC], in[kBC]);
  }
  const auto valid = [&](int64_t row) { return p.condition_mask == nullptr || p.condition_mask[row]; };
  for (int64_t row = 0; row < y_rows; ++row) {
    for (int64_t j = 0; !valid(row) && j < width; ++j) r.v[size_t(row * width + j)] = 0;
  }
  if (p.kind == StateKind::kTokens) {
    r.state = r.v;
    return;
  }
  const Block& y = p.source == Source::kInSequence ? in[kX] : in[kY];
  const Numbers& multiply = p.source == Source::kInSequence ? layer.multiply_x : layer.multiply_y;
  r.state.assign(static_cast<size_t>(p.conditions.count * p.state_size()), 0);
  r.pooled_y.assign(static_cast<size_t>(p.conditions.count * y.cols), 0);
  for (int64_t c = 0; c < p.conditions.count; ++c) {
    double count = 0;
    for (int64_t row = p.conditions.begin(c); row < p.conditions.end(c); ++row) count += valid(row);
    count = std::max(count, 1.0);
    const double tokens = p.scale_by_tokens ? count : 1;
    double* state = r.state.data() + c * p.state_size();
    bool first = true;
    for (int64_t row = p.conditions.begin(c); row < p.conditions.end(c); ++row) {
      const double* v = r.v.data() + row * width;
      if (p.kind == StateKind::kVector) {
        const double share = !valid(row)              ? 0
                             : p.pool == Pool::kMean  ? 1 / count
                             : p.pool == Pool::kFirst ? first
                                                      : 1 / tokens;
        for (int64_t j = 0; j < width; ++j) state[j] += share * v[j];
        for (int64_t j = 0; share != 0 && j < y.cols; ++j) {
          r.pooled_y[size_t(c * y.cols + j)] +=
              share * multiply[size_t(row * y.cols + j)] * y.v[size_t(row * y.cols + j)];
        }
        first = first && !valid(row);
        continue;
      }
      for (int64_t i = 0; i < width; ++i) {  // row i of the groups' matrices, one below another
        const double left = p.routing == Routing::kGramRelu ? std::max(v[i], 0.0) : v[i];
        for (int64_t j = 0; j < w; ++j) state[i * w + j] += left * v[i / w * w + j] / tokens;
      }
    }
  }
}

// z [w]: row n of a sample in one group.
inline void route_row(const Layer& layer, int64_t sample, int64_t n, int64_t g, const Reference& r,
                      const Numbers& state, double* z) {
  const Problem& p = layer.p;
  const int64_t width = p.width, w = p.group_width(), condition = p.condition_of(sample);
  const int64_t begin = p.inputs.begin(sample), end = p.inputs.end(sample);
  const auto t = [&](int64_t row, int64_t j) { return r.t[size_t((begin + row) * width + g * w + j)]; };
  const auto v = [&](int64_t row, int64_t j) {  // what row `row` of the sample reads
    const int64_t at = p.kind == StateKind::kVector ? condition : p.conditions.begin(condition) + row;
    return state[size_t(at * width + g * w + j)];
  };
  const auto plus = [](double value) { return std::max(value, 0.0); };
  const auto present = [&](int64_t row) { return p.input_mask == nullptr || p.input_mask[begin + row]; };
  for (int64_t j = 0; j < w; ++j) {
    double sum = 0;
    switch (p.routing) {
      case Routing::kNone:
        sum = t(n, j);
        break;
      case Routing::kAdd:
        sum = t(n, j) + v(n, j);
        break;
      case Routing::kMul:
        sum = t(n, j) * v(n, j);
        break;
      case Routing::kExpand:
        for (int64_t i = 0; i < w; ++i) sum += t(n, i) * v(n, j);
        break;
      case Routing::kOnes:
        for (int64_t i = 0; i < w; ++i) sum += t(n, i) * v(n, i);
        break;
      case Routing::kGram:
      case Routing::kGramRelu:
        for (int64_t i = 0; i < w; ++i) {
          const bool relu = p.routing == Routing::kGramRelu;
          const double left = relu ? plus(t(n, i)) : t(n, i);
          if (p.kind == StateKind::kMatrix) {
            sum += left * state[size_t(condition * p.state_size() + (g * w + i) * w + j)];
          } else {
            sum += left * (relu ? plus(v(n, i)) : v(n, i)) * v(n, j);
          }
        }
        break;
      case Routing::kCrossGram:
        for (int64_t row = 0; row < end - begin; ++row) {
          for (int64_t i = 0; present(row) && i < w; ++i) sum += t(n, i) * t(row, i) * v(row, j);
        }
        break;
    }
    z[j] = sum;
  }
}

inline Reference evaluate(const Layer& layer, const Values& in) {
  const Problem& p = layer.p;
  Reference r;
  r.t = project(in[kX], layer.multiply_x, in[kA], in[kBDown]);
  if (p.source == Source::kTokens || p.source == Source::kInSequence) make_state(layer, in, r);
  const Numbers& state = p.source == Source::kState ? in[kState].v : r.state;
  const int64_t w = p.group_width(), rank = p.rank(), o = p.out_features, d = in[kX].cols;
  r.z.resize(r.t.size());
  for (int64_t sample = 0; sample < p.inputs.count; ++sample) {
    const int64_t begin = p.inputs.begin(sample);
    for (int64_t row = begin; row < p.inputs.end(sample); ++row) {
      for (int64_t g = 0; g < p.groups; ++g)
        route_row(layer, sample, row - begin, g, r, state, r.z.data() + row * p.width + g * w);
    }
  }
  r.out.assign(static_cast<size_t>(p.inputs.rows * o), 0);
  for (int64_t row = 0; row < p.inputs.rows; ++row) {
    double* out = r.out.data() + row * o;
    for (int64_t i = 0; i < p.slice_count; ++i) {
      const Slice& slice = p.slices[i];
      for (int64_t j = 0; j < rank; ++j) {
        const double z = p.scaling * activate(p.activation, r.z[size_t(row * p.width + i * rank + j)]);
        for (int64_t k = 0; k < slice.length; ++k)
          out[slice.start + k] += z * in[kB].v[size_t((slice.row + k) * rank + j)];
      }
    }
    for (int64_t k = 0; k < o; ++k) {
      if (in[kBias].present()) out[k] += in[kBias].v[size_t(k)];
      if (p.residual) out[k] += in[kX].v[size_t(row * d + k)];
      for (int64_t l = 0; in[kWeight].present() && l < d; ++l) {
        out[k] += in[kX].v[size_t(row * d + l)] * in[kWeight].v[size_t(k * d + l)];
      }
    }
  }
  return r;
}

// --- the library on the same numbers

inline Dtype accumulated(Dtype dtype) { return dtype == Dtype::kFloat64 ? dtype : Dtype::kFloat32; }

struct Bound {
  Problem p;
  std::array<Tensor, kInputs> tensors;
  Tensor dout;
};

// `dense`: rows of the large tensors lie one behind the other, as the kernels are given them.
inline Bound bind(const Layer& layer, Dtype dtype, Dtype parameters, Random& random, bool dense = false) {
  Bound b;
  b.p = layer.p;
  b.p.dtype = dtype;
  const auto tensor = [&](const Block& from, Dtype as, Layout layout) {
    Tensor t(as, from.rows, from.cols, layout);
    t.fill([&](int64_t i, int64_t j) { return from.v[size_t(i * from.cols + j)]; });
    return t;
  };
  for (int i = 0; i < kInputs; ++i) {
    if (!layer.values[size_t(i)].present()) continue;
    const bool wide = i == kX || i == kY || i == kWeight;
    const Dtype as = i == kState ? accumulated(dtype) : wide ? dtype : parameters;
    const Layout layout = i == kState || (dense && wide) ? Layout::kDense : static_cast<Layout>(random.below(4));
    b.tensors[size_t(i)] = tensor(layer.values[size_t(i)], as, layout);
  }
  if (layer.values[kY].present() && layer.p.condition_mask) {
    const Matrix y = b.tensors[kY];
    for (int64_t row = 0; row < y.rows; ++row) {  // padding may hold anything
      for (int64_t j = 0; !layer.p.condition_mask[row] && j < y.cols; ++j) set(y, row, j, kNan);
    }
  }
  const int64_t rows = layer.p.inputs.rows, o = layer.p.out_features;
  b.dout = tensor({rows, o, layer.dout}, dtype, dense ? Layout::kDense : static_cast<Layout>(random.below(4)));
  const auto& t = b.tensors;
  Problem& p = b.p;
  p.x = t[kX], p.a = t[kA], p.b = t[kB], p.y = t[kY], p.c = t[kC], p.weight = t[kWeight], p.bias = t[kBias];
  p.b_down = t[kBDown], p.b_c = t[kBC], p.state = t[kState].data();
  if (p.source == Source::kInSequence) p.y = p.x;
  if (p.shared) p.c = p.a, p.b_c = p.b_down;
  return b;
}

inline bool encodes(const Problem& p) { return p.source == Source::kTokens || p.source == Source::kInSequence; }
inline int64_t state_rows(const Problem& p) {
  return p.kind == StateKind::kTokens ? p.conditions.rows : p.conditions.count;
}

// --- comparisons

inline std::string describe(const Case& c) {
  char text[300];
  std::snprintf(
      text, sizeof text,
      "routing %d source %d kind %d pool %d varlen %d%d mask %d index %d slices %d rank %d n %d m %d shared %d biases "
      "%d%d%d weight %d residual %d input_mask %d scaled %d activation %d dropout %u %u",
      int(c.routing), int(c.source), int(c.kind), int(c.pool), c.varlen_x, c.varlen_y, c.mask, c.index, int(c.slices),
      int(c.rank), int(c.n), int(c.m), c.shared, c.b_down, c.b_c, c.bias, c.weight, c.residual, c.input_mask,
      c.scale_by_tokens, int(c.activation), c.drop_x, c.drop_y);
  return text;
}

// Every number, against the size of the largest.
inline void near(const Matrix& got, const Numbers& expected, double tolerance, const char* what,
                 const std::string& where) {
  double largest = 1;
  for (const double value : expected) largest = std::max(largest, std::abs(value));
  CHECK(got.rows * got.cols == static_cast<int64_t>(expected.size()), "%s: %s", what, where.c_str());
  for (int64_t i = 0; i < got.rows; ++i) {
    for (int64_t j = 0; j < got.cols; ++j) {
      const double value = get(got, i, j), wanted = expected[size_t(i * got.cols + j)];
      CHECK(std::abs(value - wanted) <= tolerance * largest, "%s (%d, %d) is %.12g, not %.12g: %s", what, int(i),
            int(j), value, wanted, where.c_str());
    }
  }
}

inline Numbers numbers(const Matrix& m) {
  Numbers all;
  for (int64_t i = 0; i < m.rows; ++i) {
    for (int64_t j = 0; j < m.cols; ++j) all.push_back(get(m, i, j));
  }
  return all;
}

// --- the cases

struct Form {
  StateKind kind;
  Pool pool;
  int64_t tokens;  // 1: a single one; 0: any
};

inline std::vector<Form> forms(Routing routing, Source source) {
  using enum StateKind;
  const bool gram = routing == Routing::kGram || routing == Routing::kGramRelu;
  const Form unpooled{routing == Routing::kOnes ? kVector : gram ? kMatrix : kTokens, Pool::kNone, 0};
  if (routing == Routing::kNone) return {{kNone, Pool::kNone, 0}};
  if (source == Source::kState && routing == Routing::kOnes) return {unpooled};
  if (source == Source::kState) return {{kVector, Pool::kNone, 0}, unpooled};
  return {{kVector, Pool::kMean, 0}, {kVector, Pool::kFirst, 0}, {kVector, Pool::kNone, 1}, unpooled};
}

// check(case, random) for every combination of options that can be.
template <class Check>
void small_cases(const Check& check) {
  Random random(8);
  const auto rarely = [&] { return random.below(3) == 0; };
  for (int routing = 0; routing < 8; ++routing) {
    for (int source = routing == 0 ? 0 : 1; source < (routing == 0 ? 1 : 4); ++source) {
      for (const Form& form : forms(static_cast<Routing>(routing), static_cast<Source>(source))) {
        for (int options = 0; options < 64; ++options) {
          Case c;
          c.routing = static_cast<Routing>(routing);
          c.source = static_cast<Source>(source);
          c.kind = form.kind, c.pool = form.pool;
          const bool in_sequence = c.source == Source::kInSequence, projected = c.source == Source::kTokens;
          const bool elementwise = c.kind == StateKind::kTokens, has_condition = c.source != Source::kNone;
          c.slices = static_cast<SliceMode>(options & 3);
          c.varlen_x = options & 4, c.varlen_y = options & 8, c.mask = options & 16, c.index = options & 32;
          if (form.tokens == 1) {  // offsets would not say that there is one
            if (c.varlen_y || (in_sequence && c.varlen_x)) continue;
            (in_sequence ? c.n : c.m) = 1;
          }
          if ((c.varlen_y && (!projected || (elementwise && !c.varlen_x))) || (c.mask && !projected)) continue;
          if (elementwise && c.varlen_x && !in_sequence && !c.varlen_y) continue;
          if (c.index && (in_sequence || !has_condition)) continue;
          c.samples = 2 + random.below(3);
          c.rank = 1 + random.below(4) + (rarely() ? 4 : 0);
          if (form.tokens != 1) c.n = 1 + random.below(5), c.m = 2 + random.below(4);
          if (elementwise && c.n == 1) c.n = 2;  // one token is a vector
          if (in_sequence && form.tokens != 1 && c.n == 1) c.n = 3;
          c.shared = projected && random.coin();
          c.residual = rarely();
          c.d = c.residual ? c.o : 5;
          c.weight = random.coin(), c.bias = random.coin(), c.b_c = random.coin();
          c.b_down = rarely();
          c.activation = rarely() ? static_cast<Activation>(1 + random.below(4)) : Activation::kNone;
          c.input_mask = random.coin();
          c.scale_by_tokens = random.coin();
          constexpr uint32_t kThresholds[] = {0, 0, 6554, 32768, 32768, 65536};
          c.drop_x = kThresholds[random.below(6)];
          c.drop_y = has_condition ? kThresholds[random.below(6)] : 0;
          check(c, random);
        }
      }
    }
  }
}

// Sizes beyond one segment of rows, one chunk of tokens, one block of conditions, one block of a product.
template <class Check>
void large_cases(const Check& check) {
  Random random(9);
  Case base;
  base.large = true;
  base.source = Source::kTokens;
  base.weight = base.bias = true;
  base.drop_x = base.drop_y = 6554;
  const auto large = [&](Routing routing, StateKind kind, Pool pool, auto&& change) {
    Case c = base;
    c.routing = routing, c.kind = kind, c.pool = pool;
    // Without dropout a sum of an odd number of odd numbers is never zero: so many of them would meet relu's corner.
    if (routing == Routing::kGramRelu) c.drop_x = c.drop_y = 0;
    change(c);
    check(c, random);
  };
  const auto expect = [&](const Case& c, GramOrder order) {
    const plan::GramShape shape{double(c.samples), double(c.samples), double(c.samples * c.n), double(c.samples * c.m),
                                double(c.rank)};
    CHECK(plan::gram_order(shape) == order, "%s", describe(c).c_str());
  };
  using enum StateKind;
  for (const Routing routing : {Routing::kGram, Routing::kGramRelu}) {
    large(routing, kMatrix, Pool::kNone, [&](Case& c) {  // tokens in chunks
      c.samples = 2, c.n = 3, c.m = 300, c.rank = 40;
      expect(c, GramOrder::kTokens);
    });
    large(routing, kMatrix, Pool::kNone, [&](Case& c) {
      c.samples = 2, c.n = 20, c.m = 9, c.rank = 11;
      expect(c, GramOrder::kTokens);
    });
    large(routing, kMatrix, Pool::kNone, [&](Case& c) {  // the sum over one condition's rows in parts
      c.samples = 1, c.n = 700, c.m = 9, c.rank = 3;
      expect(c, GramOrder::kMatrix);
    });
    large(routing, kMatrix, Pool::kNone, [&](Case& c) {  // samples of several segments that share a few conditions
      c.samples = 5, c.n = 150, c.m = 5, c.rank = 6, c.index = true, c.mask = true, c.varlen_x = true;
    });
    large(routing, kMatrix, Pool::kNone,
          [&](Case& c) { c.source = Source::kInSequence, c.samples = 2, c.n = 200, c.rank = 5; });
  }
  for (const Routing routing : {Routing::kAdd, Routing::kMul, Routing::kExpand, Routing::kGram, Routing::kGramRelu,
                                Routing::kCrossGram, Routing::kOnes}) {
    const Pool pool = routing == Routing::kOnes ? Pool::kNone : Pool::kMean;
    large(routing, kVector, pool, [](Case& c) { c.samples = 1, c.n = 520, c.d_c = 301; });
    large(routing, kVector, pool, [](Case& c) { c.samples = 300, c.n = 2, c.m = 2, c.slices = SliceMode::kUnmixed; });
    large(routing, kVector, pool,
          [](Case& c) { c.samples = 4, c.n = 140, c.conditions = 2, c.index = true, c.shared = true; });
  }
  large(Routing::kMul, kTokens, Pool::kNone, [](Case& c) { c.samples = 2, c.n = 300; });
  large(Routing::kCrossGram, kTokens, Pool::kNone,
        [](Case& c) { c.samples = 2, c.n = 140, c.input_mask = true, c.index = true; });
  large(Routing::kNone, kNone, Pool::kNone, [](Case& c) {  // products of many blocks, or for the library
    c.source = Source::kNone, c.samples = 1, c.n = 270, c.d = 260, c.o = 270, c.rank = 20;
  });
}

// Sizes of which one is nothing.
template <class Check>
void empty_cases(const Check& check) {
  Random random(10);
  for (const Routing routing : {Routing::kMul, Routing::kExpand, Routing::kGram, Routing::kCrossGram}) {
    for (const int what : {0, 1, 2, 3}) {
      Case c;
      c.routing = routing, c.source = Source::kTokens, c.pool = Pool::kMean, c.kind = StateKind::kVector;
      c.weight = c.bias = true;
      if (what == 0) c.n = 0;
      if (what == 1) c.m = 0;
      if (what == 3) c.samples = 0;
      if (what == 2 && routing == Routing::kGram) c.m = 0, c.pool = Pool::kNone, c.kind = StateKind::kMatrix;
      check(c, random);
    }
  }
}

}  // namespace routed_peft::test
