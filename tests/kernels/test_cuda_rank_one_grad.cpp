// rank_one_grad against the gradients of the definition in double, T, G, dT, dv and all, in every mode of the emulator.
#include <memory>
#include <optional>
#include <string>

#include "kernels/device/philox.cuh"
#include "kernels/launch.h"
#include "support.h"

namespace routed_peft::test {
namespace {

constexpr Dtype kKernelDtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};

enum class Slices { kWhole, kPartial, kSwapped, kMany };  // kMany: 16, of which some are a single column
enum Want : unsigned { kDx = 1, kDa = 2, kDb = 4, kDy = 8, kDc = 16, kDbC = 32, kDstate = 64, kAll = 127 };

struct Case {
  Dtype dtype = Dtype::kFloat32;
  Routing routing = Routing::kExpand;
  Source source = Source::kTokens;
  int64_t samples = 3, tokens = 5, d = 40, o = 24, rank = 4, d_c = 9, y_tokens = 3;
  Slices slices = Slices::kWhole;
  bool grouped = false, ragged = false, indexed = false, bad_index = false, residual = false, offset = false;
  Pool pool = Pool::kMean;
  bool shared = false, masked = false, ragged_y = false, scaled = true, b_c = false;
  std::optional<Dtype> parameters = {};
  Layout weights = Layout::kDense;
  uint32_t drop_x = 0, drop_y = 0;
  bool seed_in_memory = false;
  bool nan_in_dout = false;  // in the last slice of the first row
  unsigned want = kAll;

  std::string name() const {
    char text[400];
    std::snprintf(
        text, sizeof text,
        "dtype %d/%d routing %d source %d, %d x %d x %d -> %d, rank %d, slices %d, pool %d, y %d x %d, layout "
        "%d, dropout %u %u, want %u%s%s%s%s%s%s%s%s%s%s%s%s",
        int(dtype), int(parameters.value_or(dtype)), int(routing), int(source), int(samples), int(tokens), int(d),
        int(o), int(rank), int(slices), int(pool), int(y_tokens), int(d_c), int(weights), drop_x, drop_y, want,
        grouped ? ", grouped" : "", ragged ? ", ragged" : "", indexed ? ", indexed" : "",
        bad_index ? ", bad index" : "", nan_in_dout ? ", NaN" : "", residual ? ", residual" : "",
        offset ? ", offset" : "", shared ? ", shared" : "", masked ? ", masked" : "", ragged_y ? ", ragged y" : "",
        scaled ? "" : ", unscaled", b_c ? ", bias" : "");
    return text;
  }
};

std::vector<Slice> slices_of(Slices mode, int64_t o) {
  if (mode == Slices::kWhole) return {{0, o, 0}};
  if (mode == Slices::kPartial) return {{1, o / 3, 0}, {o / 2, o - o / 2, o / 3}};
  if (mode == Slices::kSwapped) return {{o - 3, 3, 0}, {1, 2, 3}};
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

// A number and the size of what was added up for it.
struct Number {
  double value = 0, size = 0;
};
Number of(double value) { return {value, std::abs(value)}; }
Number operator*(Number a, Number b) { return {a.value * b.value, a.size * b.size}; }
Number& operator+=(Number& a, Number b) {
  a.value += b.value, a.size += b.size;
  return a;
}

struct Numbers {
  int64_t cols;
  std::vector<Number> v;
  Numbers(int64_t rows, int64_t columns) : cols(columns), v(size_t(rows * columns)) {}
  Number& operator()(int64_t i, int64_t j) { return v[size_t(i * cols + j)]; }
};

// A matrix of rows, dense or at an odd place.
struct Rows {
  Tensor storage;
  Matrix matrix;
  Rows(Dtype dtype, int64_t rows, int64_t cols, bool offset)
      : storage(dtype, rows, cols + offset, offset ? Layout::kPadded : Layout::kDense),
        matrix(offset ? storage.matrix().block(0, 1, rows, cols) : storage.matrix()) {}
};

// `rounded`: what was rounded on the way, beside the result.
void compare(const char* what, const Case& c, const Matrix& got, Numbers& expected, Numbers* rounded = nullptr) {
  for (int64_t i = 0; i < got.rows; ++i) {
    for (int64_t j = 0; j < got.cols; ++j) {
      const double value = get(got, i, j);
      const Number wanted = expected(i, j);
      if (std::isnan(wanted.value)) {
        CHECK(std::isnan(value), "%s: %s[%d, %d] is %g, not NaN", c.name().c_str(), what, int(i), int(j), value);
        continue;
      }
      const double stored = std::abs(wanted.value) + (rounded != nullptr ? std::abs((*rounded)(i, j).value) : 0);
      const double bound = 24 * 0x1p-24 * wanted.size + epsilon(got.dtype) * stored + tiny(got.dtype);
      CHECK(std::abs(value - wanted.value) <= bound, "%s: %s[%d, %d] is %.9g, not %.9g", c.name().c_str(), what, int(i),
            int(j), value, wanted.value);
    }
  }
}

void backward(const Case& c) {
  Random random(7);
  const auto fill = [&](const Matrix& m) {
    for (int64_t i = 0; i < m.rows; ++i) {
      for (int64_t j = 0; j < m.cols; ++j) set(m, i, j, random.uniform());
    }
  };
  std::vector<Slice> slices = slices_of(c.slices, c.o);
  const int64_t count = int64_t(slices.size()), width = c.rank * count, groups = c.grouped ? count : 1;
  const int64_t w = width / groups;
  int64_t selected = 0;
  for (const Slice& slice : slices) selected += slice.length;
  const bool in_sequence = c.source == Source::kInSequence, from_tokens = c.source == Source::kTokens;
  const bool shared = c.shared || in_sequence;
  const int64_t conditions = c.indexed ? 3 : c.samples, d_c = shared ? c.d : c.d_c;

  std::vector<int64_t> offsets = {0}, y_offsets = {0}, index;
  for (int64_t s = 0; s < c.samples; ++s) {  // the first and another one are empty
    offsets.push_back(offsets.back() + (s == 0 || s == 2 ? 0 : 1 + random.below(2 * c.tokens + 1)));
    index.push_back(c.bad_index && s % 2 == 0 ? (s % 4 == 0 ? -1 : conditions) : 2 * random.below(2));
  }
  for (int64_t i = 0; i < conditions; ++i) y_offsets.push_back(y_offsets.back() + random.below(2 * c.y_tokens));
  const int64_t rows = c.ragged ? offsets.back() : c.samples * c.tokens;

  Problem p;
  p.dtype = c.dtype;
  p.inputs = {c.samples, rows, c.ragged ? offsets.data() : nullptr};
  p.conditions = {conditions, c.ragged_y ? y_offsets.back() : conditions * c.y_tokens,
                  c.ragged_y ? y_offsets.data() : nullptr};
  if (c.source == Source::kState) p.conditions = {conditions, conditions, nullptr};
  if (in_sequence) p.conditions = p.inputs;
  const int64_t y_rows = p.conditions.rows;

  const int64_t seed = int64_t(random.bits());
  const auto dropout = [&](uint32_t threshold, uint32_t stream) {
    return c.seed_in_memory ? Dropout{0, threshold, stream, &seed} : Dropout{uint64_t(seed), threshold, stream};
  };
  p.drop_x = dropout(c.drop_x, 0);
  p.drop_y = in_sequence ? p.drop_x : dropout(c.drop_y, 1);
  const auto kept = [&](const Dropout& drop, int64_t row, int64_t j) {
    if (drop.threshold == 0) return 1.0;
    return dropout_keeps(uint64_t(seed), drop.stream, drop.threshold, row, j) ? drop.scale() : 0.0;
  };

  const Dtype parameters = c.parameters.value_or(c.dtype);
  Rows x(c.dtype, rows, c.d, c.offset), dout(c.dtype, rows, c.o, c.offset);
  Tensor a(parameters, width, c.d, c.weights), b(parameters, selected, c.rank, c.weights);
  Tensor c_matrix(parameters, width, d_c, c.weights), v(Dtype::kFloat32, conditions, width);
  Tensor pooled(Dtype::kFloat32, conditions, d_c), coefficient(Dtype::kFloat32, rows, groups);
  for (const Matrix& m :
       {x.matrix, dout.matrix, a.matrix(), b.matrix(), c_matrix.matrix(), v.matrix(), pooled.matrix()})
    fill(m);
  for (int64_t i = 0; i < rows; ++i) {  // what is dropped or lies in no slice must not leak
    for (int64_t j = 0; j < c.d; ++j) {
      if (kept(p.drop_x, i, j) == 0) set(x.matrix, i, j, kNan);
    }
    for (int64_t j = 0; !c.residual && j < c.o; ++j) {
      bool used = false;
      for (const Slice& s : slices) used = used || (j >= s.start && j < s.start + s.length);
      if (!used) set(dout.matrix, i, j, kNan);
    }
  }
  if (c.nan_in_dout) set(dout.matrix, 0, slices.back().start, kNan);
  auto mask = std::make_unique<bool[]>(size_t(y_rows) + 1);
  for (int64_t i = 0; i < y_rows; ++i) mask[size_t(i)] = random.below(3) != 0;
  for (int64_t i = p.conditions.begin(0); i < p.conditions.end(0); ++i) mask[size_t(i)] = false;
  if (c.masked || in_sequence) p.condition_mask = mask.get();

  p.x = x.matrix;
  p.a = a;
  p.b = b;
  p.c = shared ? p.a : c_matrix.matrix();
  p.y = {x.matrix.data, c.dtype, y_rows, d_c, d_c, 1};  // not read
  if (in_sequence) p.y = p.x;
  p.shared = shared;
  if (c.indexed) p.index = index.data();
  p.state = v.data();
  p.routing = c.routing;
  p.source = c.source;
  p.pool = c.pool;
  p.kind = StateKind::kVector;
  p.scale_by_tokens = c.scaled;
  p.residual = c.residual;
  p.width = width;
  p.groups = groups;
  p.scaling = 1.5;
  p.slices = slices.data();
  p.slice_count = count;
  p.out_features = c.o;

  // the definition
  Numbers dx(rows, c.d), dx_first(rows, c.d), da(width, c.d), db(selected, c.rank), dv(conditions, width);
  Numbers dy(y_rows, d_c), dc(width, d_c), db_c(1, width);
  for (int64_t s = 0; s < c.samples; ++s) {
    const int64_t condition = c.indexed ? index[size_t(s)] : s;
    const bool known = condition >= 0 && condition < conditions;
    for (int64_t row = p.inputs.begin(s); row < p.inputs.end(s); ++row) {
      if (!known) {
        for (int64_t g = 0; g < groups; ++g) set(coefficient, row, g, kNan);
        for (int64_t j = 0; j < c.d; ++j) dx(row, j).value = kNan;
        continue;
      }
      std::vector<Number> t(size_t(width), Number{}), g(size_t(width), Number{}), dt(size_t(width), Number{});
      const auto state = [&](int64_t k) { return of(get(v, condition, k)); };
      const auto x_at = [&](int64_t j) {
        const double keep = kept(p.drop_x, row, j);
        return keep == 0 ? Number{} : of(keep * get(x.matrix, row, j));
      };
      for (int64_t k = 0; k < width; ++k) {
        for (int64_t j = 0; j < c.d; ++j) t[size_t(k)] += of(get(a, k, j)) * x_at(j);
        const Slice& slice = slices[size_t(k / c.rank)];
        for (int64_t n = 0; n < slice.length; ++n) {
          g[size_t(k)] +=
              of(p.scaling * get(b, slice.row + n, k % c.rank)) * of(get(dout.matrix, row, slice.start + n));
        }
      }
      for (int64_t first = 0; first < width; first += w) {
        Number t_u, g_u;  // ⟨T, u⟩ and ⟨G, u'⟩
        const auto u = [&](int64_t k) { return c.routing == Routing::kExpand ? of(1) : state(k); };
        const auto u_out = [&](int64_t k) { return c.routing == Routing::kOnes ? of(1) : state(k); };
        for (int64_t k = first; k < first + w; ++k) t_u += t[size_t(k)] * u(k), g_u += g[size_t(k)] * u_out(k);
        set(coefficient, row, first / w, t_u.value);
        for (int64_t k = first; k < first + w; ++k) {
          dt[size_t(k)] = g_u * u(k);
          if (c.routing != Routing::kOnes) dv(condition, k) += t_u * g[size_t(k)];
          if (c.routing != Routing::kExpand) dv(condition, k) += g_u * t[size_t(k)];
          const Number z = t_u * u_out(k);
          const Slice& slice = slices[size_t(k / c.rank)];
          for (int64_t n = 0; n < slice.length; ++n) {
            db(slice.row + n, k % c.rank) += of(p.scaling) * z * of(get(dout.matrix, row, slice.start + n));
          }
        }
      }
      for (int64_t k = 0; k < width; ++k) {
        for (int64_t j = 0; j < c.d; ++j) {
          da(k, j) += dt[size_t(k)] * x_at(j);
          const double keep = kept(p.drop_x, row, j);
          if (keep != 0) dx(row, j) += dt[size_t(k)] * of(keep * get(a, k, j));
        }
      }
      for (int64_t j = 0; c.residual && j < c.d; ++j) dx(row, j) += of(get(dout.matrix, row, j));
    }
  }
  dx_first = dx;
  for (int64_t i = 0; (from_tokens || in_sequence) && i < conditions; ++i) {
    int64_t valid = 0, first = -1;
    const auto counts = [&](int64_t row) { return p.condition_mask == nullptr || p.condition_mask[row]; };
    for (int64_t row = p.conditions.begin(i); row < p.conditions.end(i); ++row) {
      if (counts(row) && valid++ == 0) first = row;
    }
    const bool mean = c.pool == Pool::kMean || (c.pool == Pool::kNone && c.scaled);
    const double weight = valid == 0 ? 0 : mean ? 1.0 / double(valid) : 1;
    for (int64_t k = 0; k < width; ++k) {
      db_c(0, k) += dv(i, k) * of(c.pool == Pool::kFirst ? weight : weight * double(valid));
      for (int64_t j = 0; j < d_c; ++j) (shared ? da : dc)(k, j) += dv(i, k) * of(get(pooled, i, j));
      for (int64_t row = p.conditions.begin(i); row < p.conditions.end(i); ++row) {
        if (!counts(row) || (c.pool == Pool::kFirst && row != first)) continue;
        for (int64_t j = 0; j < d_c; ++j) {
          (in_sequence ? dx : dy)(row, j) += dv(i, k) * of(weight * get(p.c, k, j) * kept(p.drop_y, row, j));
        }
      }
    }
  }

  // the kernels
  Rows got_dx(c.dtype, rows, c.d, c.offset), got_dy(c.dtype, y_rows, d_c, c.offset);
  Tensor got_da(parameters, width, c.d, c.weights), got_db(parameters, selected, c.rank, c.weights);
  Tensor got_dc(parameters, width, d_c, c.weights), got_db_c(parameters, 1, width, Layout::kStrided);
  Tensor dstate(Dtype::kFloat32, conditions, width);
  Backward io;
  io.dout = dout.matrix;
  io.t = coefficient;
  if (from_tokens || in_sequence) io.kept = pooled;
  if (c.want & kDx) io.dx = got_dx.matrix;
  if (c.want & kDa) io.da = got_da;
  if (c.want & kDb) io.db = got_db;
  if (from_tokens && c.want & kDy) io.dy = got_dy.matrix;
  if (from_tokens && !shared && c.want & kDc) io.dc = got_dc;
  if (from_tokens && !shared && c.b_c && c.want & kDbC) io.db_c = got_db_c;
  if (c.source == Source::kState && c.want & kDstate) io.dstate = dstate.data();
  Tensor* const outputs[] = {&got_dx.storage, &got_dy.storage, &got_da, &got_db, &got_dc, &got_db_c, &dstate};

  Tensor scratch(Dtype::kFloat32, 1, cuda::rank_one_grad_scratch(p, io) / 4);
  std::vector<unsigned char> first_bytes;
  for (const emulator::Options& mode : emulator::modes()) {
    emulator::set_options(mode);
    scratch.poison();
    for (Tensor* t : outputs) t->poison();
    emulator::reset_launches();
    const cudaError_t error = cuda::rank_one_grad(p, io, scratch.data(), nullptr);
    CHECK(error == cudaSuccess, "%s: %s", c.name().c_str(), cudaGetErrorString(error));
    CHECK(emulator::launch_count() <= 4, "%s: %zu launches", c.name().c_str(), emulator::launch_count());
    std::vector<unsigned char> bytes;
    for (Tensor* t : outputs) {
      CHECK(t->gaps_intact(), "%s: written between the rows", c.name().c_str());
      bytes.insert(bytes.end(), t->bytes().begin(), t->bytes().end());
    }
    if (first_bytes.empty()) first_bytes = bytes;
    CHECK(first_bytes == bytes, "%s: other bits with %s", c.name().c_str(), emulator::to_string(mode).c_str());
  }
  emulator::set_options({});

  if (io.dx) compare("dx", c, io.dx, dx, in_sequence ? &dx_first : nullptr);
  if (c.bad_index) {  // the weights' gradients are NaN, since a sample's part of them is missing
    if (io.da) CHECK(std::isnan(get(io.da, 0, 0)), "%s: dA misses a sample", c.name().c_str());
    if (io.db) CHECK(std::isnan(get(io.db, 0, 0)), "%s: dB misses a sample", c.name().c_str());
    return;
  }
  if (io.da) compare("dA", c, io.da, da);
  if (io.db) compare("dB", c, io.db, db);
  if (io.dy) compare("dY", c, io.dy, dy);
  if (io.dc) compare("dC", c, io.dc, dc);
  if (io.db_c) compare("db_c", c, io.db_c, db_c);
  if (io.dstate != nullptr) compare("dstate", c, dstate, dv);
}

void routes(Dtype dtype) {
  for (const Routing routing : {Routing::kExpand, Routing::kGram, Routing::kOnes}) {
    for (const Slices slices : {Slices::kWhole, Slices::kPartial, Slices::kSwapped, Slices::kMany}) {
      for (const bool grouped : {false, true}) {
        if (grouped && slices == Slices::kWhole) continue;
        const Case c{.dtype = dtype, .routing = routing, .o = 53, .slices = slices, .grouped = grouped, .b_c = true};
        backward(c);
        Case state = c;
        state.source = Source::kState, state.drop_x = 9000, state.rank = 3;
        backward(state);
        Case nan = state;
        nan.nan_in_dout = true, nan.drop_x = 0;
        if (grouped) backward(nan);
        Case shared = c;
        shared.shared = true, shared.rank = 2;
        backward(shared);
      }
    }
    for (const Source source : {Source::kTokens, Source::kState, Source::kInSequence}) {
      for (const uint32_t threshold : {0u, 20000u}) {
        const Case c{.dtype = dtype, .routing = routing, .source = source, .drop_x = threshold, .drop_y = threshold};
        Case ragged = c, indexed = c, bad = c, long_rank = c, residual = c;
        ragged.ragged = true, ragged.samples = 5, ragged.seed_in_memory = true, ragged.masked = true;
        indexed.indexed = true, indexed.samples = 6, indexed.tokens = 2, indexed.ragged_y = true;
        bad.indexed = bad.bad_index = true, bad.samples = 7, bad.slices = Slices::kPartial;
        long_rank.samples = 4, long_rank.tokens = 1, long_rank.rank = 70, long_rank.d = 70, long_rank.o = 140;
        residual.residual = true, residual.o = residual.d = 43, residual.offset = true;
        for (const Case& each : {ragged, long_rank, residual}) backward(each);
        if (source == Source::kInSequence) continue;
        for (const Case& each : {indexed, bad}) backward(each);
      }
    }
  }
}

void conditions(Dtype dtype) {
  for (const Pool pool : {Pool::kMean, Pool::kFirst, Pool::kNone}) {
    for (const bool scaled : {true, false}) {
      if (!scaled && pool != Pool::kNone) continue;
      for (const bool shared : {true, false}) {
        for (const bool masked : {true, false}) {
          const Case c{.dtype = dtype,
                       .routing = Routing::kOnes,
                       .d = 37,
                       .y_tokens = 11,
                       .pool = pool,
                       .shared = shared,
                       .masked = masked,
                       .ragged_y = masked == shared,
                       .scaled = scaled,
                       .b_c = !shared,
                       .drop_y = masked ? 6554u : 0u};
          backward(c);
          Case in_sequence = c;
          in_sequence.source = Source::kInSequence, in_sequence.tokens = 19, in_sequence.ragged = masked;
          in_sequence.routing = Routing::kGram, in_sequence.drop_x = shared ? 6554u : 0u;
          if (masked) backward(in_sequence);
        }
      }
    }
  }
}

void subsets(Dtype dtype) {
  for (const Routing routing : {Routing::kExpand, Routing::kGram, Routing::kOnes}) {
    for (const unsigned want : {0u, +kDx, +kDa, +kDb, +kDy, +kDc, +kDbC, +kDstate, kDx | kDb, kDa | kDb, kDx | kDa}) {
      const Case c{.dtype = dtype, .routing = routing, .slices = Slices::kPartial, .b_c = true, .want = want};
      Case shared = c, state = c, in_sequence = c;
      shared.shared = true;
      state.source = Source::kState, state.indexed = true;
      in_sequence.source = Source::kInSequence;
      for (const Case& each : {c, shared, state, in_sequence}) backward(each);
    }
  }
}

void shapes(Dtype dtype) {
  for (const Layout layout : {Layout::kDense, Layout::kTransposed, Layout::kPadded, Layout::kStrided}) {
    for (const Dtype parameters : {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat64}) {
      backward({.dtype = dtype,
                .routing = Routing::kGram,
                .d = 33,
                .rank = 16,
                .slices = Slices::kPartial,
                .shared = layout == Layout::kPadded,
                .b_c = true,
                .parameters = parameters,
                .weights = layout});
    }
  }
  for (const uint32_t threshold : {0u, 6554u, 65536u}) {
    for (const bool offset : {false, true}) {
      for (const int64_t d : {1, 8, 130, 300, 800}) {
        backward({.dtype = dtype,
                  .routing = Routing::kGram,
                  .samples = 2,
                  .tokens = d == 300 ? 11 : 2,
                  .d = d,
                  .o = d == 130 ? 1 : d + 3,
                  .rank = 3,
                  .d_c = d,
                  .offset = offset,
                  .drop_x = threshold,
                  .drop_y = threshold});
      }
    }
  }
}

// Many samples, many conditions, chunks of all lengths.
void sizes(Dtype dtype) {
  const Case c{.dtype = dtype, .routing = Routing::kGram, .d = 12, .o = 20, .rank = 2, .d_c = 5, .b_c = true};
  Case conditions = c, one = c, ragged = c, shared_by_many = c, expand = c, full = c;
  conditions.samples = 70, conditions.tokens = 2;
  one.samples = 1, one.tokens = 1200, one.want = kAll & ~kDy, one.drop_x = 6554;
  ragged.samples = 45, ragged.tokens = 9, ragged.ragged = true, ragged.indexed = true;
  shared_by_many.samples = 150, shared_by_many.tokens = 1, shared_by_many.indexed = true;
  expand.routing = Routing::kExpand, expand.samples = 40, expand.tokens = 3, expand.ragged = true;
  full.samples = 6, full.tokens = 9, full.y_tokens = 90, full.masked = true;
  Case in_sequence = full;
  in_sequence.source = Source::kInSequence, in_sequence.samples = 2, in_sequence.tokens = 90;
  for (const Case& each : {conditions, one, ragged, shared_by_many, expand, full, in_sequence}) backward(each);
  if (dtype == Dtype::kFloat32) {
    Case many_conditions = c;  // so that a block has several tiles of the sums
    many_conditions.samples = 600, many_conditions.tokens = 1, many_conditions.rank = 65;
    many_conditions.d = 300, many_conditions.want = kDa | kDc;
    backward(many_conditions);
  }
  if (dtype != Dtype::kBFloat16) return;
  Case long_chunks = c;  // of 64 rows
  long_chunks.samples = 3, long_chunks.tokens = 11000, long_chunks.slices = Slices::kPartial,
  long_chunks.grouped = true;
  long_chunks.d = long_chunks.o = 9, long_chunks.rank = 1, long_chunks.want = kDx | kDa | kDb;
  long_chunks.residual = true;
  backward(long_chunks);
}

// No rows at all: gradients are zero.
void nothing(Dtype dtype) {
  for (const Source source : {Source::kTokens, Source::kState}) {
    backward({.dtype = dtype, .routing = Routing::kGram, .source = source, .tokens = 0, .indexed = true, .b_c = true});
  }
}

void refusals() {
  Problem p;
  Backward io;
  Slice slices[17];
  float number = 0;
  p.slices = slices;
  p.slice_count = p.width = 17;
  io.da = dense(&number, Dtype::kFloat32, 1, 1);
  emulator::reset_launches();
  CHECK(cuda::rank_one_grad(p, io, nullptr, nullptr) == cudaErrorInvalidValue, "too many slices");
  p.slice_count = 1;
  p.dtype = Dtype::kFloat64;
  CHECK(cuda::rank_one_grad(p, io, nullptr, nullptr) == cudaErrorInvalidValue, "float64");
  CHECK(emulator::launch_count() == 0, "launched for nothing");
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft::test;
  for (const routed_peft::Dtype dtype : kKernelDtypes) {
    routes(dtype);
    if (dtype != routed_peft::Dtype::kFloat16) conditions(dtype);
    if (dtype == routed_peft::Dtype::kFloat32) subsets(dtype);  // nothing in them depends on it
    shapes(dtype);
    sizes(dtype);
    nothing(dtype);
  }
  refusals();
}
