// The routed layer on the CPU against its definition (layer.h), and against central differences of that definition.
#include <string>

#include "cpu/routed.h"
#include "layer.h"
#include "tiles.h"

namespace routed_peft::test {
namespace {

using plan::GramOrder;

constexpr unsigned bit(Input input) { return 1u << input; }

// The inputs whose gradient goes through the condition.
unsigned through_condition(const Problem& p) {
  unsigned bits = bit(kY) | bit(kC) | bit(kBC);
  if (encodes(p) && p.shared) bits |= bit(kA) | bit(kBDown);
  if (p.source == Source::kInSequence) bits |= bit(kX);
  return bits;
}

struct Outcome {
  Tensor out, t, state, kept;
  std::array<Tensor, kInputs> gradients;
};

// A forward that saves nothing (0), for a condition that needs no gradient (1) or one that does (2); then the backward.
Outcome run(const Bound& bound, const cpu::Host& host, int save, unsigned wanted, Layout layout) {
  const Problem& p = bound.p;
  Outcome r;
  r.out = Tensor(p.dtype, p.inputs.rows, p.out_features, layout);
  if (save != 0) {
    const bool one = plan::rank_one(p);
    r.t = Tensor(one ? accumulated(p.dtype) : p.dtype, p.inputs.rows, one ? p.groups : p.width);
    if (encodes(p) && (p.kind != StateKind::kMatrix || save == 1 || plan::gram_order(p) == plan::GramOrder::kMatrix)) {
      r.state = Tensor(accumulated(p.dtype), state_rows(p), p.state_size());
    }
    if (encodes(p) && save == 2 && p.kind == StateKind::kVector) {
      r.kept = Tensor(accumulated(p.dtype), p.conditions.count, p.y.cols);
    } else if (p.source == Source::kTokens && save == 2 && p.kind == StateKind::kMatrix) {
      r.kept = Tensor(p.dtype, p.conditions.rows, p.width);
    }
  }
  cpu::forward(host, p, {r.out, r.t, r.state.data(), r.kept});
  if (save == 0) return r;
  Problem q = p;
  if (encodes(p)) q.state = r.state.data();
  for (int i = 0; i < kInputs; ++i) {
    const Matrix like = bound.tensors[size_t(i)];
    if (like && (wanted >> i & 1))
      r.gradients[size_t(i)] = Tensor(like.dtype, like.rows, like.cols, i == kState ? Layout::kDense : layout);
  }
  const auto& g = r.gradients;
  Backward io;
  io.dout = bound.dout, io.t = r.t, io.kept = r.kept;
  io.dx = g[kX], io.da = g[kA], io.db = g[kB], io.dy = g[kY], io.dc = g[kC], io.dweight = g[kWeight],
  io.dbias = g[kBias];
  io.db_down = g[kBDown], io.db_c = g[kBC], io.dstate = g[kState].data();
  cpu::backward(host, q, io);
  CHECK(r.out.gaps_intact(), "out");
  for (int i = 0; i < kInputs; ++i) CHECK(!g[size_t(i)].matrix() || g[size_t(i)].gaps_intact(), "d%s", kNames[i]);
  return r;
}

// --- comparisons

// The same bits. Distance 0 in a tolerance would let -0 pass, and NaN fail.
void equal(const Outcome& a, const Outcome& b, const char* what, const std::string& where) {
  CHECK(a.out.bytes() == b.out.bytes(), "%s: out: %s", what, where.c_str());
  if (a.t.matrix() && b.t.matrix()) CHECK(a.t.bytes() == b.t.bytes(), "%s: T: %s", what, where.c_str());
  if (a.state.matrix() && b.state.matrix())
    CHECK(a.state.bytes() == b.state.bytes(), "%s: state: %s", what, where.c_str());
  if (a.kept.matrix() && b.kept.matrix()) CHECK(a.kept.bytes() == b.kept.bytes(), "%s: kept: %s", what, where.c_str());
  for (size_t i = 0; i < kInputs; ++i) {
    if (!a.gradients[i].matrix() || !b.gradients[i].matrix()) continue;
    CHECK(a.gradients[i].bytes() == b.gradients[i].bytes(), "%s: d%s: %s", what, kNames[i], where.c_str());
  }
}

double inner(const Numbers& a, const Numbers& b) {
  double sum = 0;
  for (size_t i = 0; i < a.size(); ++i) sum += a[i] * b[i];
  return sum;
}

// gradient = d loss / d input, by central differences of `loss`: for every number, or along a few directions.
template <class Loss>
void differences(Values& values, Input input, const Matrix& gradient, bool by_element, Random& random,
                 const std::string& where, const Loss& loss) {
  constexpr double kStep = 1e-5;
  Numbers& v = values[input].v;
  if (by_element) {
    Numbers expected(v.size());
    for (size_t i = 0; i < v.size(); ++i) {
      const double at = v[i];
      v[i] = at + kStep;
      const double above = loss();
      v[i] = at - kStep;
      expected[i] = (above - loss()) / (2 * kStep);
      v[i] = at;
    }
    near(gradient, expected, 2e-7, kNames[input], where + " (differences)");
    return;
  }
  const Numbers at = v, got = numbers(gradient);
  for (int repeat = 0; repeat < 2; ++repeat) {
    Numbers direction(v.size());
    for (double& value : direction) value = random.uniform();
    const auto moved = [&](double by) {
      for (size_t i = 0; i < v.size(); ++i) v[i] = at[i] + by * direction[i];
      return loss();
    };
    const double expected = (moved(kStep) - moved(-kStep)) / (2 * kStep), value = inner(direction, got);
    v = at;
    const double size = 1 + std::sqrt(inner(got, got));
    CHECK(std::abs(value - expected) <= 1e-6 * size, "d%s along a direction is %.12g, not %.12g: %s", kNames[input],
          value, expected, where.c_str());
  }
}

void check_encode(const Layer& layer, Bound& bound, bool by_element, const Reference& reference, Random& random,
                  const std::string& where) {
  const Problem& p = bound.p;
  const Dtype dtype = Dtype::kFloat64;
  const auto encode = [&](const cpu::Host& host) {
    Outcome r;
    r.state = Tensor(dtype, state_rows(p), p.state_size());
    if (p.kind == StateKind::kVector) r.kept = Tensor(dtype, p.conditions.count, p.y.cols);
    if (p.kind == StateKind::kMatrix) r.kept = Tensor(dtype, p.conditions.rows, p.width);
    cpu::encode(host, p, r.state.data(), r.kept);
    return r;
  };
  const SplitHost one(1), three(3);
  Outcome serial = encode(one), split = encode(three);
  near(serial.state, reference.state, 1e-12, "encoded state", where);
  Tensor dstate(dtype, state_rows(p), p.state_size());
  dstate.fill([&](int64_t, int64_t) { return number(random); });
  const Numbers weights = numbers(dstate);
  for (const auto& [host, r] : {std::pair{&one, &serial}, std::pair{&three, &split}}) {
    for (const Input i : {kY, kC, kBC}) {
      const Matrix like = bound.tensors[i];
      if (like) r->gradients[i] = Tensor(dtype, like.rows, like.cols, Layout::kPadded);
    }
    cpu::encode_backward(*host, p, dstate.data(), r->kept, r->gradients[kY], r->gradients[kC], r->gradients[kBC]);
    r->out = Tensor(dtype, 0, 0);
  }
  equal(serial, split, "encode in 3 parts", where);
  Values values = layer.values;
  for (const Input i : {kY, kC, kBC}) {
    if (!serial.gradients[i].matrix()) continue;
    differences(values, i, serial.gradients[i], by_element, random, where + " (encode)", [&] {
      Reference r;
      make_state(layer, values, r);
      return inner(r.state, weights);
    });
  }
}

// What a case is expected to run, and how often each was.
struct Counts {
  int64_t cases = 0, rank_one = 0, gram[2] = {};
} counts;

// Every choice of plan.h the other way round, or as it is.
struct Otherwise {
  int plan::Forced::* choice;
  int value;
  const char* name;
};
constexpr Otherwise kOtherwise[] = {
    {&plan::Forced::rank_one, 0, "no rank-one"},
    {&plan::Forced::gram_order, 0, "gram through S"},
    {&plan::Forced::gram_order, 1, "gram through V"},
    {&plan::Forced::library_gemm, 1, "low-rank products by the library"},
    {&plan::Forced::library_base, 0, "base and update together"},
    {&plan::Forced::library_base, 1, "base by the library"},
    {&plan::Forced::by_lines, 0, "panels for few rows"},
    {&plan::Forced::by_lines, 1, "few rows by lines"},
    {&plan::Forced::reduction_splits, 1, "one sum"},
    {&plan::Forced::reduction_splits, 3, "three sums"},
};

void check(const Case& c, Random& random) {
  const std::string where = describe(c);
  const Layer layer = make(c, random);
  const Problem& p = layer.p;
  const Reference reference = evaluate(layer, layer.values);
  Bound bound = bind(layer, Dtype::kFloat64, Dtype::kFloat64, random);
  const Layout layout = static_cast<Layout>(random.below(4));
  const bool one = plan::rank_one(bound.p);
  ++counts.cases;
  counts.rank_one += one;
  if (p.kind == StateKind::kMatrix && encodes(p)) {
    ++counts.gram[plan::gram_order(p) == GramOrder::kTokens];
  }

  const bool by_element = !c.large && counts.cases % 5 == 0;
  constexpr unsigned kAll = ~0u;
  const Outcome serial = run(bound, SplitHost(1), 2, kAll, layout);
  near(serial.out, reference.out, 1e-12, "out", where);
  if (!one) near(serial.t, reference.t, 1e-12, "T", where);
  if (serial.state.matrix()) near(serial.state, reference.state, 1e-12, "state", where);
  if (serial.kept.matrix()) {
    near(serial.kept, p.kind == StateKind::kVector ? reference.pooled_y : reference.v, 1e-12, "kept", where);
  }
  Values values = layer.values;
  for (int i = 0; i < kInputs; ++i) {
    if (!layer.values[size_t(i)].present()) continue;
    differences(values, static_cast<Input>(i), serial.gradients[size_t(i)], by_element, random, where,
                [&] { return inner(evaluate(layer, values).out, layer.dout); });
  }
  if (p.condition_mask && p.source == Source::kTokens) {
    const Matrix dy = serial.gradients[kY];
    for (int64_t row = 0; row < dy.rows; ++row) {
      for (int64_t j = 0; !p.condition_mask[row] && j < dy.cols; ++j)
        CHECK(get(dy, row, j) == 0, "masked dy: %s", where.c_str());
    }
  }

  // one thread or many, all gradients or some, saving or not
  constexpr int64_t kParts[] = {2, 3, 7};
  const SplitHost in_turn(kParts[counts.cases % 3]);
  const ThreadHost at_once(kParts[counts.cases % 3]);
  const cpu::Host& split = c.large || counts.cases % 16 == 0 ? static_cast<const cpu::Host&>(at_once) : in_turn;
  equal(serial, run(bound, split, 2, kAll, layout), "threads", where);
  equal(serial, run(bound, SplitHost(1), 0, 0, layout), "nothing saved", where);
  equal(serial, run(bound, SplitHost(1), 2, static_cast<unsigned>(random.bits()), layout), "some gradients", where);
  const Outcome frozen = run(bound, split, 1, ~through_condition(p), layout);
  equal(frozen, run(bound, SplitHost(1), 1, ~through_condition(p), layout), "frozen, threads", where);
  const auto close = [&](const Outcome& got, double tolerance, const char* what) {
    near(got.out, numbers(serial.out), tolerance, what, where);
    for (size_t i = 0; i < kInputs; ++i) {
      if (!got.gradients[i].matrix()) continue;
      near(got.gradients[i], numbers(serial.gradients[i]), tolerance, (std::string(what) + ", d" + kNames[i]).c_str(),
           where);
    }
  };
  close(frozen, 1e-11, "frozen");
  if (frozen.state.matrix()) near(frozen.state, reference.state, 1e-12, "state", where);
  if (counts.cases % 4 == 0 || c.large) close(run(bound, LibraryHost(), 2, kAll, layout), 1e-11, "with a library");
  {
    const Otherwise& other = kOtherwise[counts.cases % std::ssize(kOtherwise)];
    plan::forced.*other.choice = other.value;
    close(run(bound, LibraryHost(), 2, kAll, layout), 1e-11, other.name);
    plan::forced = {};
  }
  if (p.source == Source::kTokens && !p.shared) check_encode(layer, bound, by_element, reference, random, where);

  // the other dtypes on the same numbers; parameters may be wider than the input
  const bool bfloat16 = counts.cases % 2 == 0;
  const Dtype half = bfloat16 ? Dtype::kBFloat16 : Dtype::kFloat16;
  plan::forced.split = counts.cases % 3 == 0 ? 1 : -1;  // where there are tiles
  const Bound single = bind(layer, Dtype::kFloat32, Dtype::kFloat32, random);
  const Outcome in_single = run(single, SplitHost(1), 2, kAll, layout);
  close(in_single, c.large ? 1e-4 : 1e-5, "float32");
  equal(in_single, run(single, split, 2, kAll, layout), "float32, threads", where);
  const Bound narrow = bind(layer, half, random.coin() ? Dtype::kFloat32 : half, random);
  close(run(narrow, SplitHost(1), 2, kAll, layout), bfloat16 ? 4e-2 : 6e-3, bfloat16 ? "bfloat16" : "float16");
  plan::forced.split = -1;
}

// cross_gram leaves masked input tokens out, whatever they hold; only their own rows of the output suffer.
void padded_inputs() {
  Random random(11);
  for (const StateKind kind : {StateKind::kVector, StateKind::kTokens}) {
    Case c;
    c.routing = Routing::kCrossGram, c.source = Source::kTokens, c.input_mask = true, c.kind = kind;
    c.pool = kind == StateKind::kVector ? Pool::kMean : Pool::kNone;
    const Layer layer = make(c, random);
    const Reference reference = evaluate(layer, layer.values);
    const Bound bound = bind(layer, Dtype::kFloat64, Dtype::kFloat64, random);
    for (int64_t row = 0; row < bound.p.inputs.rows; ++row) {
      for (int64_t j = 0; !layer.input_mask[size_t(row)] && j < c.d; ++j) set(bound.p.x, row, j, kNan);
    }
    const Outcome r = run(bound, SplitHost(1), 0, 0, Layout::kDense);
    for (int64_t row = 0; row < bound.p.inputs.rows; ++row) {
      for (int64_t j = 0; layer.input_mask[size_t(row)] && j < c.o; ++j) {
        CHECK(std::abs(get(r.out, row, j) - reference.out[size_t(row * c.o + j)]) < 1e-12, "row %d, kind %d", int(row),
              int(kind));
      }
    }
  }
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft::test;
  use_tiles();
  small_cases(check);
  large_cases(check);
  empty_cases(check);
  padded_inputs();
  const auto& [cases, rank_one, gram] = counts;
  std::printf("%d cases, %d rank-one; gram through S %d, through V %d\n", int(cases), int(rank_one), int(gram[0]),
              int(gram[1]));
  CHECK(rank_one > 50 && gram[0] > 10 && gram[1] > 10, "a path was not taken");
}
