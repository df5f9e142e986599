// The CUDA kernels, launchers and all, in the emulator against the layer's definition (layer.h): forward and encode.
#include <string>

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
};

void expect(cudaError_t error, const std::string& where) { CHECK(error == cudaSuccess, "%s", where.c_str()); }

// A forward that saves nothing (0), for a condition that needs no gradient (1) or one that does (2).
Outcome run(const Problem& p, const cuda::Device& device, int save, const std::string& where) {
  Outcome r;
  r.out = Tensor(p.dtype, p.inputs.rows, p.out_features);
  if (save != 0) {
    const bool one = is_rank_one(p);
    r.t = Tensor(one ? Dtype::kFloat32 : p.dtype, p.inputs.rows, one ? p.groups : p.width);
    if (encodes(p) && (p.kind != StateKind::kMatrix || save == 1)) {
      r.state = Tensor(Dtype::kFloat32, state_rows(p), p.state_size());
    }
    if (encodes(p) && save == 2 && p.kind == StateKind::kVector) {
      r.kept = Tensor(Dtype::kFloat32, p.conditions.count, p.y.cols);
    } else if (p.source == Source::kTokens && save == 2 && p.kind == StateKind::kMatrix) {
      r.kept = Tensor(p.dtype, p.conditions.rows, p.width);
    }
  }
  const EmulatedHost host(device);
  expect(cuda::forward(host, p, {r.out, r.t, r.state.data(), r.kept}), where);
  return r;
}

struct Counts {
  int64_t cases = 0, rank_one = 0, by_tokens = 0, by_matrix = 0;
} counts;

void check(const Case& c, Random& random) {
  const std::string where = describe(c);
  const Layer layer = make(c, random);
  const Reference reference = evaluate(layer, layer.values);
  ++counts.cases;
  // Every case in float32 on one mode, every few in half precision and on all of the modes.
  const bool all_modes = c.large || counts.cases % 16 == 0;
  const Dtype half = counts.cases % 2 == 0 ? Dtype::kBFloat16 : Dtype::kFloat16;
  for (const Dtype dtype : {Dtype::kFloat32, half}) {
    if (dtype != Dtype::kFloat32 && !c.large && counts.cases % 3 != 0) continue;
    const Dtype parameters = dtype == Dtype::kFloat32 || random.coin() ? dtype : Dtype::kFloat32;
    const Bound bound = bind(layer, dtype, parameters, random, true);
    const Problem& p = bound.p;
    const double tolerance = dtype == Dtype::kFloat32 ? c.large ? 1e-4 : 1e-5 : dtype == Dtype::kBFloat16 ? 4e-2 : 6e-3;
    const cuda::Device device{counts.cases % 2 == 0 ? 1 : 132, counts.cases % 5 == 0 ? 227 << 10 : 99 << 10};
    const int save = static_cast<int>(counts.cases % 3);
    std::vector<emulator::Options> modes = emulator::modes();
    for (emulator::Options& mode : modes) mode.shared_bytes = static_cast<size_t>(device.shared_bytes);
    emulator::set_options(modes[size_t(counts.cases) % modes.size()]);
    const Outcome r = run(p, device, save, where);
    near(r.out, reference.out, tolerance, "out", where);
    counts.rank_one += is_rank_one(p);
    if (save != 0 && !is_rank_one(p)) near(r.t, reference.t, tolerance, "T", where);
    if (r.state.matrix()) near(r.state, reference.state, tolerance, "state", where);
    if (r.kept.matrix()) {
      near(r.kept, p.kind == StateKind::kVector ? reference.pooled_y : reference.v, tolerance, "kept", where);
    }
    if (p.kind == StateKind::kMatrix && p.source == Source::kTokens)
      ++(save == 1 ? counts.by_matrix : counts.by_tokens);
    for (const emulator::Options& mode : modes) {
      if (!all_modes) break;
      emulator::set_options(mode);
      CHECK(run(p, device, save, where).out.bytes() == r.out.bytes(), "other bits on another schedule: %s",
            where.c_str());
    }
    if (p.source == Source::kTokens && !p.shared && p.drop_y.threshold == 0) {
      Tensor state(Dtype::kFloat32, state_rows(p), p.state_size());
      expect(cuda::encode(EmulatedHost(device), p, state.data(), {}), where);
      near(state, reference.state, tolerance, "encoded state", where);
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
        const Bound bound = bind(layer, Dtype::kFloat32, Dtype::kFloat32, random, true);
        const Reference reference = evaluate(layer, layer.values);
        std::vector<int64_t> index = layer.index;
        index[1] = wrong;
        Problem p = bound.p;
        p.index = index.data();
        const Outcome r = run(p, {}, 0, "a wrong index");
        for (int64_t row = 0; row < p.inputs.rows; ++row) {
          const double got = get(r.out, row, 0), wanted = reference.out[size_t(row * c.o)];
          const bool lost = row / c.n == 1;
          CHECK(lost ? std::isnan(got) : std::abs(got - wanted) < 1e-4, "row %d is %g, index %d", int(row), got,
                int(wrong));
        }
      }
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
  widths();
  std::printf("%d cases, %d rank-one, %d through a state, %d that may take tokens\n", int(counts.cases),
              int(counts.rank_one), int(counts.by_matrix), int(counts.by_tokens));
  CHECK(counts.rank_one > 50 && counts.by_matrix > 10 && counts.by_tokens > 10, "a path was not taken");
}
