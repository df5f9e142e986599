// The CUDA kernels, launchers and all, in the emulator: forward and encode against the layer's definition (layer.h),
// their backward against the CPU path in double, which is held against differences of the definition (test_routed.cpp).
#include <string>

#include "cpu/routed.h"
#include "kernels/routed.h"
#include "layer.h"

namespace routed_peft::test {
namespace {

using plan::GramOrder;

// Memory as a GPU gives it: not cleared, here full of NaN; and a library that multiplies.
class EmulatedHost final : public cuda::Host {
 public:
  explicit EmulatedHost(cuda::Device device) : device_(device) {}
  cuda::Device device() const override { return device_; }
  cudaStream_t stream() const override { return nullptr; }
  void* scratch(int64_t bytes) const override {
    scratch_.emplace_back(static_cast<size_t>(bytes > 0 ? bytes : 1) + 256, static_cast<unsigned char>(0xFF));
    const auto address = reinterpret_cast<uintptr_t>(scratch_.back().data());
    return scratch_.back().data() + (256 - address % 256) % 256;
  }
  void base_gemm(const Matrix& out, const Matrix& a, const Matrix& b, bool accumulate) const override {
    library_.library_gemm(out, a, b, 1, accumulate);
  }

 private:
  cuda::Device device_;
  LibraryHost library_;
  mutable std::vector<std::vector<unsigned char>> scratch_;
};

struct Outcome {
  Tensor out, t, state, kept;
  std::array<Tensor, kInputs> gradients;
};

void expect(cudaError_t error, const std::string& where) { CHECK(error == cudaSuccess, "%s", where.c_str()); }

constexpr unsigned bit(Input input) { return 1u << input; }
constexpr unsigned kAll = ~0u;

// The inputs whose gradient goes through the condition.
unsigned through_condition(const Problem& p) {
  unsigned bits = bit(kY) | bit(kC) | bit(kBC);
  if (encodes(p) && p.shared) bits |= bit(kA) | bit(kBDown);
  if (p.source == Source::kInSequence) bits |= bit(kX);
  return bits;
}

// A forward that saves nothing (0), for a condition that needs no gradient (1) or one that does (2); and then, for
// those of the inputs that are wanted, the backward.
template <class Forward, class Gradients>
Outcome run_layer(const Bound& bound, int save, unsigned wanted, const Forward& forward, const Gradients& backward) {
  const Problem& p = bound.p;
  Outcome r;
  r.out = Tensor(p.dtype, p.inputs.rows, p.out_features);
  if (save != 0) {
    const bool one = plan::rank_one(p);
    r.t = Tensor(one ? accumulated(p.dtype) : p.dtype, p.inputs.rows, one ? p.groups : p.width);
    if (encodes(p) && (p.kind != StateKind::kMatrix || save == 1 || plan::gram_order(p) == GramOrder::kMatrix)) {
      r.state = Tensor(accumulated(p.dtype), state_rows(p), p.state_size());
    }
    if (encodes(p) && save == 2 && p.kind == StateKind::kVector) {
      r.kept = Tensor(accumulated(p.dtype), p.conditions.count, p.y.cols);
    } else if (p.source == Source::kTokens && save == 2 && p.kind == StateKind::kMatrix) {
      r.kept = Tensor(p.dtype, p.conditions.rows, p.width);
    }
  }
  forward(p, ForwardResult{r.out, r.t, r.state.data(), r.kept});
  if (save == 0) return r;
  Problem q = p;
  if (encodes(p)) q.state = r.state.data();
  auto& g = r.gradients;
  for (size_t i = 0; i < kInputs; ++i) {
    const Matrix like = bound.tensors[i];
    if (like && (wanted >> i & 1)) g[i] = Tensor(like.dtype, like.rows, like.cols);
  }
  Backward io;
  io.dout = bound.dout, io.t = r.t, io.kept = r.kept;
  io.dx = g[kX], io.da = g[kA], io.db = g[kB], io.dy = g[kY], io.dc = g[kC], io.dweight = g[kWeight];
  io.dbias = g[kBias], io.db_down = g[kBDown], io.db_c = g[kBC], io.dstate = g[kState].data();
  backward(q, io);
  return r;
}

Outcome run(const Bound& bound, const cuda::Device& device, int save, unsigned wanted, const std::string& where) {
  const EmulatedHost host(device);
  return run_layer(
      bound, save, wanted,
      [&](const Problem& p, const ForwardResult& result) { expect(cuda::forward(host, p, result), where); },
      [&](const Problem& p, const Backward& io) { expect(cuda::backward(host, p, io), where); });
}

Outcome run_in_double(const Layer& layer, int save, Random& random) {
  const Bound bound = bind(layer, Dtype::kFloat64, Dtype::kFloat64, random);
  const SplitHost host(1);
  return run_layer(
      bound, save, save == 1 ? ~through_condition(bound.p) : kAll,
      [&](const Problem& p, const ForwardResult& result) { cpu::forward(host, p, result); },
      [&](const Problem& p, const Backward& io) { cpu::backward(host, p, io); });
}

struct Counts {
  int64_t cases = 0, rank_one = 0, by_tokens = 0, by_matrix = 0;
} counts;

bool same(const Tensor& a, const Tensor& b) { return a.matrix() && b.matrix() ? a.bytes() == b.bytes() : true; }

bool same(const Outcome& a, const Outcome& b) {
  for (size_t i = 0; i < kInputs; ++i) {
    if (!same(a.gradients[i], b.gradients[i])) return false;
  }
  return same(a.out, b.out) && same(a.t, b.t) && same(a.state, b.state) && same(a.kept, b.kept);
}

// A condition alone, and the gradients of what it is made of from random ones of the state.
void check_encode(const Layer& layer, const Bound& bound, const cuda::Device& device, double tolerance,
                  const Reference& reference, Random& random, const std::string& where) {
  const EmulatedHost host(device);
  const Bound exact = bind(layer, Dtype::kFloat64, Dtype::kFloat64, random);
  const SplitHost exact_host(1);
  struct Side {
    Tensor state, kept, dstate, dy, dc, db_c;
    explicit Side(const Bound& b, const Numbers& weights) {
      const Problem& p = b.p;
      state = Tensor(accumulated(p.dtype), state_rows(p), p.state_size());
      dstate = Tensor(accumulated(p.dtype), state_rows(p), p.state_size());
      dstate.fill([&](int64_t i, int64_t j) { return weights[size_t(i * p.state_size() + j)]; });
      if (p.kind == StateKind::kVector) kept = Tensor(accumulated(p.dtype), p.conditions.count, p.y.cols);
      if (p.kind == StateKind::kMatrix) kept = Tensor(p.dtype, p.conditions.rows, p.width);
      dy = Tensor(p.dtype, p.y.rows, p.y.cols);
      dc = Tensor(p.c.dtype, p.c.rows, p.c.cols);
      if (p.b_c) db_c = Tensor(p.b_c.dtype, 1, p.width);
    }
  };
  const Numbers weights = block(random, state_rows(bound.p), bound.p.state_size()).v;
  Side got(bound, weights), want(exact, weights);
  expect(cuda::encode(host, bound.p, got.state.data(), got.kept), where);
  near(got.state, reference.state, tolerance, "encoded state", where);
  expect(cuda::encode_backward(host, bound.p, got.dstate.data(), got.kept, got.dy, got.dc, got.db_c), where);
  cpu::encode(exact_host, exact.p, want.state.data(), want.kept);
  cpu::encode_backward(exact_host, exact.p, want.dstate.data(), want.kept, want.dy, want.dc, want.db_c);
  near(got.dy, numbers(want.dy), tolerance, "encoded dy", where);
  const double limit = bound.p.c.dtype == Dtype::kBFloat16 ? 4e-2 : tolerance;
  near(got.dc, numbers(want.dc), limit, "encoded dC", where);
  if (bound.p.b_c) near(got.db_c, numbers(want.db_c), limit, "encoded db_C", where);
}

void check(const Case& c, Random& random) {
  const std::string where = describe(c);
  const Layer layer = make(c, random);
  const Reference reference = evaluate(layer, layer.values);
  ++counts.cases;
  // Every case in float32 on one mode, every few in half precision and on all of the modes.
  const bool all_modes = c.large || counts.cases % 16 == 0;
  const bool wide = c.rank > 128 && c.routing == Routing::kCrossGram;  // and leaves float16's range
  const Dtype half = wide || counts.cases % 2 == 0 ? Dtype::kBFloat16 : Dtype::kFloat16;
  for (const Dtype dtype : {Dtype::kFloat32, half}) {
    if (dtype != Dtype::kFloat32 && !c.large && counts.cases % 3 != 0) continue;
    const Dtype parameters = random.coin() ? dtype : dtype == Dtype::kFloat32 ? Dtype::kBFloat16 : Dtype::kFloat32;
    const Bound bound = bind(layer, dtype, parameters, random, true);
    const Problem& p = bound.p;
    const double tolerance = dtype == Dtype::kFloat32 ? c.large ? 1e-4 : 1e-5 : dtype == Dtype::kBFloat16 ? 4e-2 : 6e-3;
    const cuda::Device device{counts.cases % 2 == 0 ? 1 : 132, counts.cases % 5 == 0 ? 227 << 10 : 99 << 10};
    const int save = c.large ? 2 : static_cast<int>(counts.cases % 4);  // 3: as 2, for some of the gradients
    std::vector<emulator::Options> modes = emulator::modes();
    for (emulator::Options& mode : modes) mode.shared_bytes = static_cast<size_t>(device.shared_bytes);
    emulator::set_options(modes[size_t(counts.cases) % modes.size()]);
    const unsigned wanted = save == 1 ? ~through_condition(p) : kAll;
    const Outcome r = run(bound, device, std::min(save, 2), wanted, where);
    near(r.out, reference.out, tolerance, "out", where);
    counts.rank_one += plan::rank_one(p);
    if (save != 0 && !plan::rank_one(p)) near(r.t, reference.t, tolerance, "T", where);
    if (r.state.matrix()) near(r.state, reference.state, tolerance, "state", where);
    if (r.kept.matrix()) {
      near(r.kept, p.kind == StateKind::kVector ? reference.pooled_y : reference.v, tolerance, "kept", where);
    }
    if (save != 0) {
      const Outcome exact = run_in_double(layer, std::min(save, 2), random);
      for (size_t i = 0; i < kInputs; ++i) {
        if (!r.gradients[i].matrix()) continue;
        const double limit = r.gradients[i].matrix().dtype == Dtype::kBFloat16 ? 4e-2 : tolerance;
        near(r.gradients[i], numbers(exact.gradients[i]), limit, (std::string("d") + kNames[i]).c_str(), where);
      }
    }
    if (save == 3 || c.large) {
      const unsigned some = random.coin() ? bit(kB) : static_cast<unsigned>(random.bits());
      CHECK(same(r, run(bound, device, 2, some, where)), "other bits of some gradients: %s", where.c_str());
    }
    if (p.kind == StateKind::kMatrix && p.source == Source::kTokens) {
      ++(plan::gram_order(p) == GramOrder::kMatrix ? counts.by_matrix : counts.by_tokens);
    }
    for (const emulator::Options& mode : modes) {
      if (!all_modes) break;
      emulator::set_options(mode);
      CHECK(same(run(bound, device, std::min(save, 2), wanted, where), r), "other bits on another schedule: %s",
            where.c_str());
    }
    if (p.source == Source::kTokens && !p.shared && p.drop_y.threshold == 0) {
      check_encode(layer, bound, device, tolerance, reference, random, where);
    }
  }
}

// An index or offsets that the caller got wrong cannot be seen before the launch: such rows become NaN, and no others.
void wrong_index() {
  Random random(12);
  for (const StateKind kind : {StateKind::kVector, StateKind::kMatrix, StateKind::kTokens}) {
    for (const Activation activation : {Activation::kNone, Activation::kGelu}) {
      Case c;
      c.routing = kind == StateKind::kTokens ? Routing::kMul : Routing::kGram;
      c.pool = kind == StateKind::kVector ? Pool::kMean : Pool::kNone;
      c.source = Source::kTokens, c.kind = kind, c.index = true, c.activation = activation;
      Layer layer = make(c, random);
      for (const int64_t wrong : {int64_t{-1}, layer.p.conditions.count, int64_t{1} << 40}) {
        Bound bound = bind(layer, Dtype::kFloat32, Dtype::kFloat32, random, true);
        const Reference reference = evaluate(layer, layer.values);
        const Outcome exact = run_in_double(layer, 2, random);
        std::vector<int64_t> index = layer.index;
        index[1] = wrong;
        bound.p.index = index.data();
        const Outcome r = run(bound, {}, 2, kAll, "a wrong index");
        for (int64_t row = 0; row < bound.p.inputs.rows; ++row) {
          const double got = get(r.out, row, 0), wanted = reference.out[size_t(row * c.o)];
          const double dx = get(r.gradients[kX], row, 0), wanted_dx = get(exact.gradients[kX], row, 0);
          const bool lost = row / c.n == 1;
          CHECK(lost ? std::isnan(got) : std::abs(got - wanted) < 1e-4, "row %d is %g, index %d", int(row), got,
                int(wrong));
          CHECK(lost ? std::isnan(dx) : std::abs(dx - wanted_dx) < 1e-4, "row %d of dx is %g, index %d", int(row), dx,
                int(wrong));
        }
      }
    }
  }
}

// What the gradient holds in columns of the output that no slice has is nobody's business: here NaN.
void other_columns() {
  Random random(14);
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    Case c;
    c.routing = Routing::kMul, c.kind = StateKind::kVector, c.source = Source::kTokens, c.pool = Pool::kMean;
    c.slices = SliceMode::kPartial, c.o = 70, c.rank = 8, c.n = 9;
    const Layer layer = make(c, random);
    const Bound bound = bind(layer, dtype, dtype, random, true);
    for (int64_t row = 0; row < bound.p.inputs.rows; ++row) {
      for (const int64_t column : {int64_t{0}, int64_t{1}, c.o - 1}) set(bound.dout, row, column, kNan);
    }
    const Outcome r = run(bound, {}, 2, kAll, "other columns"), exact = run_in_double(layer, 2, random);
    for (size_t i = 0; i < kInputs; ++i) {
      if (!r.gradients[i].matrix()) continue;
      near(r.gradients[i], numbers(exact.gradients[i]), dtype == Dtype::kFloat32 ? 1e-5 : 4e-2, kNames[i], "gaps");
    }
  }
}

// Bottlenecks as wide as the kernels take, and unmixed slices that are wider together.
void widths() {
  Random random(13);
  for (const Routing routing : {Routing::kNone, Routing::kMul, Routing::kGram, Routing::kCrossGram}) {
    for (const int64_t rank : {16, 17, 64, 100, 128, 200, 256}) {
      Case c;
      c.large = true;
      c.routing = routing, c.rank = rank, c.d = 72, c.d_c = 70, c.n = 21, c.m = 19, c.o = 20, c.bias = true;
      c.source = routing == Routing::kNone ? Source::kNone : Source::kTokens;
      c.kind = routing == Routing::kNone   ? StateKind::kNone
               : routing == Routing::kGram ? StateKind::kMatrix
                                           : StateKind::kVector;
      c.pool = c.kind == StateKind::kVector ? Pool::kMean : Pool::kNone;
      c.drop_x = rank % 2 == 0 ? 6554 : 0;
      check(c, random);
      c.slices = SliceMode::kUnmixed;
      check(c, random);
    }
  }
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft::test;
  small_cases(check);
  large_cases(check);
  empty_cases(check);
  wrong_index();
  other_columns();
  widths();
  std::printf("%d cases, %d rank-one, %d through a state, %d that may take tokens\n", int(counts.cases),
              int(counts.rank_one), int(counts.by_matrix), int(counts.by_tokens));
  CHECK(counts.rank_one > 50 && counts.by_matrix > 10 && counts.by_tokens > 10, "a path was not taken");
}
