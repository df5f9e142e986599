// pack, pool and encode_vector against loops in double, in every mode of the emulator.
#include <memory>
#include <optional>
#include <string>

#include "kernels/device/philox.cuh"
#include "kernels/launch.h"
#include "support.h"

namespace routed_peft::test {
namespace {

constexpr Dtype kKernelDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

// run() once in every mode; what it leaves in `outputs` must be the same, bit for bit.
template <class Run>
void in_every_mode(const std::vector<Tensor*>& outputs, const Run& run) {
  std::vector<std::vector<unsigned char>> first;
  for (const emulator::Options& mode : emulator::modes()) {
    emulator::set_options(mode);
    for (Tensor* output : outputs) output->poison();
    run();
    for (size_t i = 0; i < outputs.size(); ++i) {
      CHECK(outputs[i]->gaps_intact(), "%s: output %zu, between the rows", emulator::to_string(mode).c_str(), i);
      if (first.size() <= i) first.push_back(outputs[i]->bytes());
      CHECK(first[i] == outputs[i]->bytes(), "%s: output %zu has other bits", emulator::to_string(mode).c_str(), i);
    }
  }
  emulator::set_options({});
}

void check_close(const char* what, const std::string& name, const Matrix& got, int64_t i, int64_t j, double expected,
                 double magnitude) {
  const double value = get(got, i, j), error = std::abs(value - expected);
  CHECK(error <= 16 * 0x1p-24 * magnitude + 1e-30, "%s: %s[%lld, %lld] is %.9g, not %.9g", name.c_str(), what,
        (long long)i, (long long)j, value, expected);
}

// ---- pack

void packs() {
  Random random(1);
  constexpr Layout kLayouts[] = {Layout::kDense, Layout::kTransposed, Layout::kPadded, Layout::kStrided};
  for (const Dtype to : kKernelDtypes) {
    for (const Dtype from : kDtypes) {
      for (const Layout layout : kLayouts) {
        Tensor a(from, 5, 40, layout), b(from, 37, 3, layout), c(from, 1, 9, layout);
        for (Tensor* t : {&a, &b, &c}) t->fill([&](int64_t, int64_t) { return random.uniform(); });
        Tensor pa(to, 5, 40), pb(to, 37, 8), pc(to, 1, 11);  // b's and c's rows wider than they are
        const cuda::PackParams params{{a, b, c}, {pa.data(), pb.data(), pc.data()}, {40, 8, 11}, 3, to};
        emulator::reset_launches();
        in_every_mode({&pa, &pb, &pc}, [&] { CHECK(cuda::pack(params, nullptr) == cudaSuccess, "pack"); });
        CHECK(emulator::launch_count() == emulator::modes().size(), "pack launched %zu times",
              emulator::launch_count());
        const std::pair<const Tensor*, const Tensor*> pairs[] = {{&a, &pa}, {&b, &pb}, {&c, &pc}};
        for (const auto& [before, after] : pairs) {
          for (int64_t i = 0; i < before->matrix().rows; ++i) {
            for (int64_t j = 0; j < before->matrix().cols; ++j) {
              Tensor one(to, 1, 1);
              set(one, 0, 0, static_cast<float>(get(*before, i, j)));
              CHECK(get(one, 0, 0) == get(*after, i, j), "dtype %d to %d, layout %d, [%lld, %lld]", int(from), int(to),
                    int(layout), (long long)i, (long long)j);
            }
            for (int64_t j = before->matrix().cols; j < after->matrix().cols; ++j) {
              CHECK(get(*after, i, j) == 0, "padding [%lld, %lld]", (long long)i, (long long)j);
            }
          }
        }
      }
    }
  }
  Tensor empty(Dtype::kFloat32, 0, 4), out(Dtype::kBFloat16, 0, 4);
  emulator::reset_launches();
  CHECK(cuda::pack({{empty}, {out.data()}, {4}, 1, Dtype::kBFloat16}, nullptr) == cudaSuccess, "nothing to pack");
  CHECK(cuda::pack({{empty}, {out.data()}, {4}, 1, Dtype::kFloat64}, nullptr) == cudaErrorInvalidValue, "float64");
  CHECK(emulator::launch_count() == 0, "launched for nothing");
}

// ---- rows of conditions

enum class Place { kDense, kOffset, kPadded };  // kOffset: not aligned to anything but an element

struct Case {
  Dtype dtype = Dtype::kFloat32;
  int64_t conditions = 2, tokens = 5, cols = 40, width = 6;
  bool ragged = false, masked = false;
  int64_t late = 0;  // rows that are masked at the beginning of each condition
  Pool pool = Pool::kMean;
  bool scale_by_tokens = true;
  uint32_t threshold = 0;
  bool seed_in_memory = false;
  Place place = Place::kDense;
  Layout c_layout = Layout::kDense;
  std::optional<Dtype> bias = {};
  bool want_pooled = false;

  std::string name() const {
    return "dtype " + std::to_string(int(dtype)) + ", " + std::to_string(conditions) + " x " + std::to_string(tokens) +
           " x " + std::to_string(cols) + " -> " + std::to_string(width) + (ragged ? ", ragged" : "") +
           (masked ? ", masked" : "") + ", pool " + std::to_string(int(pool)) + (scale_by_tokens ? " scaled" : "") +
           ", threshold " + std::to_string(threshold) + ", place " + std::to_string(int(place)) + ", layout " +
           std::to_string(int(c_layout)) + (bias ? ", bias" : "") + (want_pooled ? ", pooled" : "");
  }
};

// y with NaN where the mask is false, and the sums that pooling makes of it.
struct Rows {
  Tensor storage;
  Matrix y;
  std::vector<int64_t> offsets;
  std::unique_ptr<bool[]> mask;
  Sequences sequences;
  std::vector<double> pooled, magnitude;  // [conditions, cols]
  std::vector<double> bias_weight;        // [conditions]

  Rows(const Case& c, Random& random, const Dropout& dropout) {
    int64_t rows = c.conditions * c.tokens;
    if (c.ragged) {
      offsets = {0};
      for (int64_t i = 0; i < c.conditions; ++i) {  // the second one is empty
        offsets.push_back(offsets.back() + (i == 1 ? 0 : 1 + random.below(2 * c.tokens)));
      }
      rows = offsets.back();
    }
    sequences = {c.conditions, rows, c.ragged ? offsets.data() : nullptr};
    storage = Tensor(c.dtype, rows, c.cols + (c.place == Place::kOffset ? 1 : 0),
                     c.place == Place::kDense ? Layout::kDense : Layout::kPadded);
    y = c.place == Place::kOffset ? storage.matrix().block(0, 1, rows, c.cols) : storage.matrix();
    if (c.masked) {
      mask = std::make_unique<bool[]>(static_cast<size_t>(rows));
      for (int64_t row = 0; row < rows; ++row) mask[static_cast<size_t>(row)] = random.below(3) != 0;
      for (int64_t i = 0; i < c.conditions; ++i) {
        for (int64_t k = 0; k < c.late; ++k) mask[static_cast<size_t>(sequences.begin(i) + k)] = false;
      }
      for (int64_t row = sequences.begin(0); row < sequences.end(0); ++row) mask[static_cast<size_t>(row)] = false;
    }
    for (int64_t row = 0; row < rows; ++row) {
      for (int64_t j = 0; j < c.cols; ++j) {
        const bool dropped =
            dropout.threshold != 0 && !dropout_keeps(dropout.seed, dropout.stream, dropout.threshold, row, j);
        set(y, row, j, !valid(row) || dropped ? kNan : random.uniform());
      }
    }
    pooled.assign(static_cast<size_t>(c.conditions * c.cols), 0);
    magnitude = pooled;
    for (int64_t i = 0; i < c.conditions; ++i) {
      double count = 0;
      for (int64_t row = sequences.begin(i); row < sequences.end(i); ++row) count += valid(row);
      const bool mean = c.pool == Pool::kMean || (c.pool == Pool::kNone && c.scale_by_tokens);
      const double weight = count == 0 ? 0 : mean ? 1 / count : 1;
      bias_weight.push_back(c.pool == Pool::kFirst ? count > 0 : weight * count);
      for (int64_t row = sequences.begin(i); row < sequences.end(i); ++row) {
        if (!valid(row)) continue;
        for (int64_t j = 0; j < c.cols; ++j) {
          const double value = get(y, row, j);
          if (std::isnan(value)) continue;  // dropped
          const size_t at = static_cast<size_t>(i * c.cols + j);
          pooled[at] += weight * dropout.scale() * value;
          magnitude[at] += weight * dropout.scale() * std::abs(value);
        }
        if (c.pool == Pool::kFirst) break;
      }
    }
  }
  bool valid(int64_t row) const { return mask == nullptr || mask[static_cast<size_t>(row)]; }
};

// Returns how many launches it took.
size_t encode(const Case& c) {
  Random random(7);
  const int64_t seed = static_cast<int64_t>(random.bits());
  Dropout dropout{static_cast<uint64_t>(seed), c.threshold, 1};
  const Rows rows(c, random, dropout);
  Tensor weight(c.dtype, c.width, c.cols, c.c_layout),
      bias(c.bias.value_or(Dtype::kFloat32), 1, c.width, Layout::kStrided);
  weight.fill([&](int64_t, int64_t) { return random.uniform(); });
  bias.fill([&](int64_t, int64_t) { return random.uniform(); });

  if (c.seed_in_memory) dropout.seed = 0, dropout.seed_at = &seed;
  Problem p;
  p.dtype = c.dtype;
  p.source = Source::kTokens;
  p.kind = StateKind::kVector;
  p.conditions = rows.sequences;
  p.y = rows.y;
  p.c = weight;
  if (c.bias) p.b_c = bias;
  p.condition_mask = rows.mask.get();
  p.pool = c.pool;
  p.scale_by_tokens = c.scale_by_tokens;
  p.width = c.width;
  p.drop_y = dropout;

  Tensor v(Dtype::kFloat32, c.conditions, c.width), pooled(Dtype::kFloat32, c.conditions, c.want_pooled ? c.cols : 0);
  const int64_t bytes = cuda::encode_vector_scratch(p);
  CHECK(bytes >= 0 && bytes % 4 == 0, "%s: %lld bytes of scratch", c.name().c_str(), (long long)bytes);
  Tensor scratch(Dtype::kFloat32, 1, bytes / 4);
  emulator::reset_launches();
  in_every_mode({&v, &pooled}, [&] {
    scratch.poison();
    const cudaError_t error =
        cuda::encode_vector(p, static_cast<float*>(v.data()),
                            c.want_pooled ? static_cast<float*>(pooled.data()) : nullptr, scratch.data(), nullptr);
    CHECK(error == cudaSuccess, "%s: %s", c.name().c_str(), cudaGetErrorString(error));
  });
  for (int64_t i = 0; i < c.conditions; ++i) {
    for (int64_t k = 0; k < c.width; ++k) {
      double sum = c.bias ? rows.bias_weight[size_t(i)] * get(bias, 0, k) : 0, magnitude = std::abs(sum);
      for (int64_t j = 0; j < c.cols; ++j) {
        sum += rows.pooled[size_t(i * c.cols + j)] * get(weight, k, j);
        magnitude += rows.magnitude[size_t(i * c.cols + j)] * std::abs(get(weight, k, j));
      }
      check_close("v", c.name(), v, i, k, sum, magnitude);
    }
    for (int64_t j = 0; c.want_pooled && j < c.cols; ++j) {
      const size_t at = static_cast<size_t>(i * c.cols + j);
      check_close("pooled", c.name(), pooled, i, j, rows.pooled[at], rows.magnitude[at]);
    }
  }
  return emulator::launch_count() / emulator::modes().size();
}

void encodes() {
  for (const Dtype dtype : kKernelDtypes) {
    for (const Pool pool : {Pool::kNone, Pool::kMean, Pool::kFirst}) {
      for (const bool scaled : {false, true}) {
        encode({.dtype = dtype,
                .conditions = 3,
                .tokens = 9,
                .cols = 70,
                .ragged = scaled,
                .masked = true,
                .pool = pool,
                .scale_by_tokens = scaled,
                .bias = Dtype::kFloat64,
                .want_pooled = !scaled});
      }
      encode({.dtype = dtype, .pool = pool, .threshold = 20000, .bias = dtype});
      encode({.dtype = dtype, .masked = true, .pool = pool, .threshold = 20000, .seed_in_memory = true});
    }
    for (const uint32_t threshold : {0u, 6554u}) {
      for (const Place place : {Place::kDense, Place::kOffset, Place::kPadded}) {
        for (const int64_t cols : {1, 8, 31, 64, 130, 600}) {
          encode({.dtype = dtype,
                  .tokens = 3,
                  .cols = cols,
                  .width = 5,
                  .threshold = threshold,
                  .place = place,
                  .want_pooled = cols == 130});
        }
      }
      encode({.dtype = dtype,
              .conditions = 1,
              .tokens = 333,
              .cols = 265,
              .masked = true,
              .threshold = threshold,
              .bias = Dtype::kBFloat16,
              .want_pooled = threshold == 0});  // rows in splits
      encode({.dtype = dtype,
              .conditions = 3,
              .tokens = 150,
              .cols = 24,
              .ragged = true,
              .threshold = threshold,
              .want_pooled = true});
      encode({.dtype = dtype,
              .conditions = 19,
              .tokens = 2,
              .cols = 33,
              .width = 9,
              .ragged = true,
              .threshold = threshold});
    }
    for (const int64_t late : {40, 300}) {
      encode({.dtype = dtype, .tokens = 310, .cols = 12, .masked = true, .late = late, .pool = Pool::kFirst});
    }
    encode({.dtype = dtype, .threshold = 65536, .want_pooled = true});  // p = 1
    for (const int64_t tokens : {5, 1}) {
      const Layout layout = Layout::kPadded;
      encode({.dtype = dtype, .conditions = 9, .tokens = tokens, .cols = 72, .width = 7, .c_layout = layout});
    }
    // one row a condition: nothing to pool
    for (const Place place : {Place::kDense, Place::kOffset, Place::kPadded}) {
      const Case one{
          .dtype = dtype, .conditions = 11, .tokens = 1, .cols = 1100, .masked = true, .place = place, .bias = dtype};
      CHECK(encode(one) == 1, "one row a condition took another launch");
      Case kept = one;
      kept.cols = 90, kept.want_pooled = true;
      CHECK(encode(kept) == 2, "the pooled rows were not made");
    }
  }
  Problem nothing;
  nothing.width = 4;
  emulator::reset_launches();
  CHECK(cuda::encode_vector(nothing, nullptr, nullptr, nullptr, nullptr) == cudaSuccess, "no conditions");
  nothing.conditions.count = 1;
  nothing.y.cols = 8;
  nothing.c.col_stride = 2;
  CHECK(cuda::encode_vector(nothing, nullptr, nullptr, nullptr, nullptr) == cudaErrorInvalidValue, "columns apart");
  CHECK(emulator::launch_count() == 0, "launched for nothing");
}

size_t pool(const Case& c) {
  Random random(11);
  const Rows rows(c, random, Dropout{});
  Tensor out(Dtype::kFloat32, c.conditions, c.cols);
  const cuda::PoolParams params{rows.y, rows.sequences,    rows.mask.get(),
                                c.pool, c.scale_by_tokens, static_cast<float*>(out.data())};
  Tensor scratch(Dtype::kFloat32, 1, cuda::pool_scratch(params) / 4);
  emulator::reset_launches();
  in_every_mode({&out}, [&] {
    scratch.poison();
    CHECK(cuda::pool(params, scratch.data(), nullptr) == cudaSuccess, "%s", c.name().c_str());
  });
  for (int64_t i = 0; i < c.conditions; ++i) {
    for (int64_t j = 0; j < c.cols; ++j) {
      const size_t at = static_cast<size_t>(i * c.cols + j);
      check_close("pool", c.name(), out, i, j, rows.pooled[at], rows.magnitude[at]);
    }
  }
  return emulator::launch_count() / emulator::modes().size();
}

void pools() {
  for (const Dtype dtype : kKernelDtypes) {
    for (const Pool kind : {Pool::kNone, Pool::kMean, Pool::kFirst}) {
      for (const bool ragged : {false, true}) {
        pool({.dtype = dtype,
              .conditions = 4,
              .tokens = 11,
              .cols = 19,
              .ragged = ragged,
              .masked = true,
              .pool = kind,
              .scale_by_tokens = !ragged});
        pool({.dtype = dtype,
              .conditions = 2,
              .tokens = 80,
              .cols = 48,
              .ragged = ragged,
              .pool = kind,
              .scale_by_tokens = ragged,
              .place = Place::kOffset});
      }
    }
    CHECK(pool({.dtype = dtype, .conditions = 30, .tokens = 4, .cols = 16}) == 1, "splits without need");
    CHECK(pool({.dtype = dtype, .conditions = 1, .tokens = 400, .cols = 16}) == 2, "no splits");
  }
  emulator::reset_launches();
  CHECK(cuda::pool({}, nullptr, nullptr) == cudaSuccess, "nothing to pool");
  CHECK(emulator::launch_count() == 0, "launched for nothing");
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft::test;
  packs();
  encodes();
  pools();
}
