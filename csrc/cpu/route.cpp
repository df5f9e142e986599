// The routes of routed_peft/reference.py, segment by segment. Each formula stands twice: in route_segment for Z, and in
// backward_segment for the gradients of T and of the state, where gram on V makes Z on the way (spec: the gradient
// table of the paper's routes, README).
#include "cpu/route.h"

#include <algorithm>
#include <cmath>
#include <cstring>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace routed_peft::cpu {
namespace {

constexpr int64_t kTokenChunk = 256;  // condition tokens whose products with a segment are held at a time

template <class Acc>
Matrix acc(const Acc* data, int64_t rows, int64_t cols, int64_t row_stride) {
  return {const_cast<Acc*>(data), accumulated_dtype<Acc>(), rows, cols, row_stride, 1};
}

Epilogue adding(bool accumulate, double alpha = 1) {
  Epilogue e;
  e.accumulate = accumulate;
  e.alpha = alpha;
  return e;
}

template <class Acc>
void positive_part(const Acc* from, int64_t n, Acc* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = std::max(from[i], Acc{0});
}

void clear(const Matrix& m) {
  for (int64_t i = 0; i < m.rows; ++i) std::memset(m.at(i, 0), 0, static_cast<size_t>(m.cols * element_size(m.dtype)));
}

template <class Acc>
Acc total(const Acc* x, int64_t n) {
  Acc sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += x[i];
  return sum;
}

template <class Acc>
Acc dot(const Acc* a, const Acc* b, int64_t n) {
  return isa<Acc>().dot(a, b, n);
}

template <class Acc>
Acc activate(Activation activation, Acc z) {
  constexpr Acc kSqrtHalf = Acc(0.70710678118654752440), kTanhScale = Acc(0.79788456080286535588);
  switch (activation) {
    case Activation::kGelu:
      return z * Acc(0.5) * (1 + std::erf(z * kSqrtHalf));
    case Activation::kGeluTanh:
      return z * Acc(0.5) * (1 + std::tanh(kTanhScale * (z + Acc(0.044715) * z * z * z)));
    case Activation::kRelu:
      return std::max(z, Acc{0});
    case Activation::kSilu:
      return z / (1 + std::exp(-z));
    default:
      return z;
  }
}

template <class Acc>
Acc activate_slope(Activation activation, Acc z) {
  constexpr Acc kSqrtHalf = Acc(0.70710678118654752440), kTanhScale = Acc(0.79788456080286535588);
  constexpr Acc kDensity = Acc(0.39894228040143267794);  // 1 / √(2π)
  switch (activation) {
    case Activation::kGelu:
      return Acc(0.5) * (1 + std::erf(z * kSqrtHalf)) + z * kDensity * std::exp(Acc(-0.5) * z * z);
    case Activation::kGeluTanh: {
      const Acc inner = std::tanh(kTanhScale * (z + Acc(0.044715) * z * z * z));
      const Acc slope = kTanhScale * (1 + Acc(3 * 0.044715) * z * z);
      return Acc(0.5) * (1 + inner) + Acc(0.5) * z * (1 - inner * inner) * slope;
    }
    case Activation::kRelu:
      return z > 0 ? Acc{1} : Acc{0};
    case Activation::kSilu: {
      const Acc s = 1 / (1 + std::exp(-z));
      return s * (1 + z * (1 - s));
    }
    default:
      return Acc{1};
  }
}

// Multiplications of the route over all rows, for deciding whether threads are worth waking.
double route_work(const Problem& p, StateKind kind) {
  const double a_row = kind == StateKind::kMatrix ? double(p.group_width())
                       : kind == StateKind::kTokens && p.conditions.count > 0
                           ? 2.0 * double(p.conditions.rows) / double(p.conditions.count)
                           : 4.0;
  return double(p.inputs.rows * p.width) * a_row;
}

// What cross_gram sums over a sample's input tokens: for a vector state u = Σ T_n and w = Σ ⟨G_n, v⟩ T_n, [samples, R];
// for a state of tokens C = TᵀV and D = TᵀG, [samples, R, w]. u and C are over the valid tokens.
template <class Acc>
struct SampleSums {
  Array<Acc> first, second;
  int64_t size = 0;
};

template <class Acc>
struct Work {
  const Problem& p;
  const State<Acc>& state;
  const Matrix& t;
  const SampleSums<Acc>& sums;

  int64_t w() const { return p.group_width(); }
  bool input_valid(int64_t row) const { return p.input_mask == nullptr || p.input_mask[row]; }
  const Acc* vector(const Segment& s) const { return state.data + s.condition * p.width; }
  const Acc* matrix(const Segment& s, int64_t g) const { return state.data + (s.condition * p.groups + g) * w() * w(); }
  // Row of V that belongs to row n of the segment.
  int64_t token(const Segment& s, int64_t n) const { return p.conditions.begin(s.condition) + s.offset + n; }
  // gram on V itself, which may have no rows
  bool on_v() const {
    return state.kind == StateKind::kTokens && (p.routing == Routing::kGram || p.routing == Routing::kGramRelu);
  }
  // For products with S, which eager has in the input's dtype; ours is rounded as a factor alone, wherever it comes
  // from, so that a cached condition gives what an encoded one does.
  Epilogue on_matrix(bool accumulate) const {
    Epilogue e = adding(accumulate);
    e.in_bfloat16 = p.dtype == Dtype::kBFloat16;
    return e;
  }
  // For gram on V: T, V and what is made of them may be rounded where V's factors were bfloat16.
  Epilogue on_tokens(bool accumulate, double alpha = 1) const {
    Epilogue e = adding(accumulate, alpha);
    e.in_bfloat16 = half_tokens(p);
    return e;
  }
  double factor(const Segment& s) const { return state.factor != nullptr ? double(state.factor[s.condition]) : 1.0; }
};

// gram on V itself, for one segment and group, a chunk of V's rows at a time: P = f T Vᵀ and Z = P V. Products of
// rank-wide factors are turned, so that the shorter one of the two is laid out. relu is on both factors of P.
template <class Acc>
struct TokenChunk {
  int64_t first, count;  // rows of the condition
  Matrix v, first_v;     // V, and what P is made of: the same but for gram_relu

  template <class Body>
  static void each(const Work<Acc>& work, const Segment& s, int64_t group, const Body& body) {
    thread_local Scratch<Acc> v_scratch, positive_scratch;
    const Problem& p = work.p;
    const int64_t w = work.w(), begin = p.conditions.begin(s.condition), end = p.conditions.end(s.condition);
    for (int64_t m = begin; m < end; m += kTokenChunk) {
      TokenChunk chunk{m - begin, std::min(kTokenChunk, end - m), {}, {}};
      chunk.v = chunk.first_v = work.state.tokens.block(m, group * w, chunk.count, w);
      if (p.routing == Routing::kGramRelu) {
        Acc* v = v_scratch.get(chunk.count * w);
        Acc* positive = positive_scratch.get(chunk.count * w);
        for (int64_t i = 0; i < chunk.count; ++i) load_row(chunk.v, i, 0, w, v + i * w);
        positive_part(v, chunk.count * w, positive);
        chunk.v = acc(v, chunk.count, w, w), chunk.first_v = acc(positive, chunk.count, w, w);
      }
      body(chunk);
    }
  }
};

// A product [chunk, rows] that is a factor of further ones, in the dtype that those take.
template <class Acc>
struct TokenProduct {
  Scratch<Acc> scratch;
  Matrix get(const Work<Acc>& work, int64_t count, int64_t rows) {
    const bool half = work.on_tokens(false).in_bfloat16;
    return dense(scratch.get(kTokenChunk * rows), half ? Dtype::kBFloat16 : accumulated_dtype<Acc>(), count, rows);
  }
};

// The rows of a segment in a matrix [rows, R], worked on as Acc: in place, or in scratch that `store` rounds. data is
// nullptr where there is no matrix.
template <class Acc>
struct Rows {
  const Matrix matrix;
  const Segment& segment;
  const bool in_place;
  Acc* const data;

  Rows(const Matrix& m, const Segment& s, Scratch<Acc>& scratch)
      : matrix(m),
        segment(s),
        in_place(m && m.dtype == accumulated_dtype<Acc>()),
        data(in_place ? static_cast<Acc*>(m.at(s.begin, 0))
             : m      ? scratch.get((s.end - s.begin) * m.cols)
                      : nullptr) {}
  void store() const {
    for (int64_t n = 0; matrix && !in_place && n < segment.end - segment.begin; ++n) {
      store_row(data + n * matrix.cols, matrix, segment.begin + n, 0, matrix.cols);
    }
  }
};

// The rows of T as Acc, zero where cross_gram leaves an input token out.
template <class Acc>
void read_rows(const Work<Acc>& work, const Segment& s, bool only_valid, Acc* rows) {
  for (int64_t n = 0; n < s.end - s.begin; ++n) {
    if (only_valid && !work.input_valid(s.begin + n)) {
      std::fill_n(rows + n * work.p.width, work.p.width, Acc{0});
    } else {
      load_row(work.t, s.begin + n, 0, work.p.width, rows + n * work.p.width);
    }
  }
}

// z [n, R] = ρ(t [n, R], state).
template <class Acc>
void route_segment(const Work<Acc>& work, const Segment& s, const Acc* t, Acc* z) {
  const Problem& p = work.p;
  const int64_t rows = s.end - s.begin, width = p.width, w = work.w();
  if (p.routing == Routing::kNone) {
    std::copy_n(t, rows * width, z);
    return;
  }
  for (int64_t g = 0; g < p.groups; ++g) {
    const Matrix tg = acc(t + g * w, rows, w, width), zg = acc(z + g * w, rows, w, width);
    if (work.state.kind == StateKind::kMatrix) {
      thread_local Scratch<Acc> scratch;
      Matrix left = tg;
      if (p.routing == Routing::kGramRelu) {
        Acc* positive = scratch.get(rows * width);
        positive_part(t, rows * width, positive);
        left = acc(positive + g * w, rows, w, width);
      }
      gemm_serial<Acc>(zg, left, acc(work.matrix(s, g), w, w, w), work.on_matrix(false));
      continue;
    }
    if (work.on_v()) {
      thread_local Scratch<Acc> t_scratch;
      thread_local TokenProduct<Acc> product;
      Matrix left = tg;
      if (p.routing == Routing::kGramRelu) {
        Acc* positive = t_scratch.get(rows * width);
        positive_part(t, rows * width, positive);
        left = acc(positive + g * w, rows, w, width);
      }
      bool first = true;
      TokenChunk<Acc>::each(work, s, g, [&](const TokenChunk<Acc>& chunk) {
        const Matrix turned = product.get(work, chunk.count, rows);
        gemm_serial<Acc>(turned, chunk.first_v, left.transposed(), work.on_tokens(false, work.factor(s)));
        gemm_serial<Acc>(zg, turned.transposed(), chunk.v, work.on_tokens(!first));
        first = false;
      });
      if (first) clear(zg);
      continue;
    }
    if (p.routing == Routing::kCrossGram && work.state.kind == StateKind::kTokens) {  // T (TᵀV)
      gemm_serial<Acc>(zg, tg, acc(work.sums.first.get() + (s.sample * p.groups + g) * w * w, w, w, w));
      continue;
    }
    for (int64_t n = 0; n < rows; ++n) {
      const Acc* tn = t + n * width + g * w;
      Acc* zn = z + n * width + g * w;
      const Acc* v =
          g * w + (work.state.kind == StateKind::kVector ? work.vector(s) : work.state.data + work.token(s, n) * width);
      Acc c = 0;
      switch (p.routing) {
        case Routing::kAdd:
          for (int64_t j = 0; j < w; ++j) zn[j] = tn[j] + v[j];
          continue;
        case Routing::kMul:
          for (int64_t j = 0; j < w; ++j) zn[j] = tn[j] * v[j];
          continue;
        case Routing::kOnes:
          std::fill_n(zn, w, dot(tn, v, w));
          continue;
        case Routing::kExpand:
          c = total(tn, w);
          break;
        case Routing::kGram:
          c = dot(tn, v, w);
          break;
        case Routing::kGramRelu:
          for (int64_t j = 0; j < w; ++j) c += std::max(tn[j], Acc{0}) * std::max(v[j], Acc{0});
          break;
        default:  // cross_gram: c = ⟨T_n, u⟩
          c = dot(tn, work.sums.first.get() + s.sample * width + g * w, w);
      }
      for (int64_t j = 0; j < w; ++j) zn[j] = c * v[j];
    }
  }
}

// dt [n, R] and what this segment adds to the condition's part of the gradient of the state, from t and g [n, R]; and
// z [n, R]. `fresh`: nothing was added to it yet, which gram on V need not find zero then.
template <class Acc>
void backward_segment(const Work<Acc>& work, const Segment& s, const Acc* t, const Acc* g_all, Acc* dt,
                      const Matrix& state_gradient, bool fresh, Acc* z) {
  const Problem& p = work.p;
  Acc* dstate = static_cast<Acc*>(state_gradient.data);
  if (z && !work.on_v()) route_segment(work, s, t, z);
  const int64_t rows = s.end - s.begin, width = p.width, w = work.w();
  if (p.routing == Routing::kNone) {
    std::copy_n(g_all, rows * width, dt);
    return;
  }
  thread_local Scratch<Acc> positive_scratch;
  const bool relu = p.routing == Routing::kGramRelu;
  const Acc* positive = t;
  if (relu) {
    Acc* copy = positive_scratch.get(rows * width);
    positive_part(t, rows * width, copy);
    positive = copy;
  }
  const auto only_where_positive = [&](int64_t g) {  // dt ∘ [t > 0]
    for (int64_t n = 0; n < rows; ++n) {
      for (int64_t j = n * width + g * w; j < n * width + (g + 1) * w; ++j) {
        if (!(t[j] > 0)) dt[j] = 0;
      }
    }
  };
  for (int64_t g = 0; g < p.groups; ++g) {
    const Matrix gg = acc(g_all + g * w, rows, w, width), dtg = acc(dt + g * w, rows, w, width);
    const Matrix positive_g = acc(positive + g * w, rows, w, width);
    if (work.state.kind == StateKind::kMatrix) {  // dT = G Sᵀ, dS = T⁽⁺⁾ᵀ G
      gemm_serial<Acc>(dtg, gg, acc(work.matrix(s, g), w, w, w).transposed(), work.on_matrix(false));
      if (relu) only_where_positive(g);
      if (dstate) {
        gemm_serial<Acc>(acc(dstate + g * w * w, w, w, w), positive_g.transposed(), gg, work.on_matrix(true));
      }
      continue;
    }
    if (work.on_v()) {  // P = f T Vᵀ, dP = f G Vᵀ: dT = dP V, dV = dPᵀ T + Pᵀ G
      thread_local Scratch<Acc> through_scratch;
      thread_local TokenProduct<Acc> p_space, dp_space;
      const Matrix zg = acc(z + (z ? g * w : 0), z ? rows : 0, w, width);
      bool first = true;
      TokenChunk<Acc>::each(work, s, g, [&](const TokenChunk<Acc>& chunk) {
        const Matrix product = p_space.get(work, chunk.count, rows), dproduct = dp_space.get(work, chunk.count, rows);
        gemm_serial<Acc>(dproduct, chunk.v, gg.transposed(), work.on_tokens(false, work.factor(s)));
        gemm_serial<Acc>(dtg, dproduct.transposed(), chunk.first_v, work.on_tokens(!first));
        if (dstate || z) {
          gemm_serial<Acc>(product, chunk.first_v, positive_g.transposed(), work.on_tokens(false, work.factor(s)));
        }
        if (z) gemm_serial<Acc>(zg, product.transposed(), chunk.v, work.on_tokens(!first));
        first = false;
        if (!dstate) return;
        const Matrix dv = state_gradient.block(chunk.first, g * w, chunk.count, w);
        Epilogue added = work.on_tokens(!fresh);
        const Factors other{dproduct, positive_g};
        if (!relu) added.plus = &other;
        gemm_serial<Acc>(dv, product, gg, added);
        if (!relu) return;
        Acc* through = through_scratch.get(chunk.count * w);
        gemm_serial<Acc>(acc(through, chunk.count, w, w), dproduct, positive_g, work.on_tokens(false));
        for (int64_t i = 0; i < chunk.count; ++i) {
          const Acc* v = static_cast<const Acc*>(chunk.v.at(i, 0));
          Acc* to = static_cast<Acc*>(dv.at(i, 0));
          for (int64_t j = 0; j < w; ++j) {
            if (v[j] > 0) to[j] += through[i * w + j];
          }
        }
      });
      if (first) clear(dtg), clear(zg);
      if (relu) only_where_positive(g);
      continue;
    }
    if (p.routing == Routing::kCrossGram && work.state.kind == StateKind::kTokens) {
      // dT = G Cᵀ + V Dᵀ, dV = T D; the terms of the inner sum for valid input tokens only
      const Matrix c = acc(work.sums.first.get() + (s.sample * p.groups + g) * w * w, w, w, w);
      const Matrix d = acc(work.sums.second.get() + (s.sample * p.groups + g) * w * w, w, w, w);
      gemm_serial<Acc>(dtg, gg, c.transposed());
      for (int64_t n = 0; n < rows; ++n) {
        if (!work.input_valid(s.begin + n)) continue;
        const Matrix v = acc(work.state.data + work.token(s, n) * width + g * w, 1, w, width);
        gemm_serial<Acc>(dtg.block(n, 0, 1, w), v, d.transposed(), adding(true));
        if (!dstate) continue;
        gemm_serial<Acc>(acc(dstate + (s.offset + n) * width + g * w, 1, w, width),
                         acc(t + n * width + g * w, 1, w, width), d, adding(true));
      }
      continue;
    }
    thread_local Scratch<Acc> part_scratch;
    const bool vector = work.state.kind == StateKind::kVector, sums = vector && dstate != nullptr;
    RowSums<Acc> dv_sums(dstate + (sums ? g * w : 0), part_scratch.get(w), sums ? w : 0);
    for (int64_t n = 0; n < rows; ++n) {
      const Acc* tn = t + n * width + g * w;
      const Acc* gn = g_all + n * width + g * w;
      const Acc* v = g * w + (vector ? work.vector(s) : work.state.data + work.token(s, n) * width);
      Acc* dtn = dt + n * width + g * w;
      Acc* dv = dstate == nullptr ? nullptr : vector ? dv_sums.part() : dstate + g * w + (s.offset + n) * width;
      switch (p.routing) {
        case Routing::kAdd:
          std::copy_n(gn, w, dtn);
          if (dv) isa<Acc>().axpy(w, 1, gn, dv);
          break;
        case Routing::kMul:
          for (int64_t j = 0; j < w; ++j) dtn[j] = gn[j] * v[j];
          if (dv) {
            for (int64_t j = 0; j < w; ++j) dv[j] += gn[j] * tn[j];
          }
          break;
        case Routing::kOnes: {
          const Acc dc = total(gn, w);
          for (int64_t j = 0; j < w; ++j) dtn[j] = dc * v[j];
          if (dv) isa<Acc>().axpy(w, dc, tn, dv);
          break;
        }
        case Routing::kExpand: {
          std::fill_n(dtn, w, dot(gn, v, w));
          if (dv) isa<Acc>().axpy(w, total(tn, w), gn, dv);
          break;
        }
        case Routing::kGram: {
          const Acc dc = dot(gn, v, w);
          for (int64_t j = 0; j < w; ++j) dtn[j] = dc * v[j];
          if (dv) {
            isa<Acc>().axpy(w, dot(tn, v, w), gn, dv);
            isa<Acc>().axpy(w, dc, tn, dv);
          }
          break;
        }
        case Routing::kGramRelu: {
          const Acc dc = dot(gn, v, w);
          Acc c = 0;
          for (int64_t j = 0; j < w; ++j) {
            c += std::max(tn[j], Acc{0}) * std::max(v[j], Acc{0});
            dtn[j] = tn[j] > 0 ? dc * std::max(v[j], Acc{0}) : Acc{0};
          }
          if (!dv) break;
          for (int64_t j = 0; j < w; ++j) dv[j] += c * gn[j] + (v[j] > 0 ? dc * std::max(tn[j], Acc{0}) : Acc{0});
          break;
        }
        default: {  // cross_gram: c_n = ⟨T_n, u⟩, dT_n = dc_n u + w
          const Acc* u = work.sums.first.get() + s.sample * width + g * w;
          const Acc* sum_w = work.sums.second.get() + s.sample * width + g * w;
          const Acc dc = dot(gn, v, w);
          for (int64_t j = 0; j < w; ++j) dtn[j] = dc * u[j];
          if (work.input_valid(s.begin + n)) isa<Acc>().axpy(w, 1, sum_w, dtn);
          if (dv) isa<Acc>().axpy(w, dot(tn, u, w), gn, dv);
        }
      }
      dv_sums.end_row();
    }
    dv_sums.flush();
  }
}

// cross_gram's sums over each sample, in the order of its rows; with g the second ones too.
template <class Acc>
SampleSums<Acc> sum_samples(const Host& host, const Problem& p, const State<Acc>& state, const Matrix& t,
                            const Segments& cuts, const Acc* g) {
  SampleSums<Acc> sums;
  if (p.routing != Routing::kCrossGram) return sums;
  const bool vector = state.kind == StateKind::kVector;
  const int64_t w = p.group_width();
  sums.size = vector ? p.width : p.width * w;
  sums.first = Array<Acc>(p.inputs.count * sums.size);
  if (g) sums.second = Array<Acc>(p.inputs.count * sums.size);
  const Work<Acc> work{p, state, t, sums};
  parallel(host, p.inputs.count, 2 * route_work(p, StateKind::kMatrix), [&](int64_t begin, int64_t end) {
    thread_local Scratch<Acc> scratch, part_scratch;
    for (int64_t sample = begin; sample < end; ++sample) {
      Acc* first = sums.first.get() + sample * sums.size;
      Acc* second = g ? sums.second.get() + sample * sums.size : nullptr;
      std::fill_n(first, sums.size, Acc{0});
      if (second) std::fill_n(second, sums.size, Acc{0});
      const int64_t from = cuts.of_sample[static_cast<size_t>(sample)],
                    count = cuts.sample_counts[static_cast<size_t>(sample)];
      for (int64_t i = from; i < from + count; ++i) {
        const Segment& s = cuts.list[static_cast<size_t>(i)];
        const int64_t rows = s.end - s.begin;
        Acc* tile = scratch.get(rows * p.width);
        read_rows(work, s, true, tile);
        RowSums<Acc> u(first, part_scratch.get(p.width), vector ? p.width : 0);
        for (int64_t n = 0; vector && n < rows; ++n, u.end_row()) {
          isa<Acc>().axpy(p.width, 1, tile + n * p.width, u.part());
        }
        u.flush();
        for (int64_t group = 0; !vector && group < p.groups; ++group) {
          const Matrix v = acc(state.data + work.token(s, 0) * p.width + group * w, rows, w, p.width);
          gemm_serial<Acc>(acc(first + group * w * w, w, w, w), acc(tile + group * w, rows, w, p.width).transposed(), v,
                           adding(true));
        }
        if (!second) continue;
        const Acc* gs = g + s.begin * p.width;
        read_rows(work, s, false, tile);  // every row has an output, so every row has a gradient
        RowSums<Acc> sum_w(second, part_scratch.get(p.width), vector ? p.width : 0);
        for (int64_t n = 0; vector && n < rows; ++n, sum_w.end_row()) {
          for (int64_t group = 0; group < p.groups; ++group) {
            const int64_t at = n * p.width + group * w;
            isa<Acc>().axpy(w, dot(gs + at, work.vector(s) + group * w, w), tile + at, sum_w.part() + group * w);
          }
        }
        sum_w.flush();
        for (int64_t group = 0; !vector && group < p.groups; ++group) {
          gemm_serial<Acc>(acc(second + group * w * w, w, w, w), acc(tile + group * w, rows, w, p.width).transposed(),
                           acc(gs + group * w, rows, w, p.width), adding(true));
        }
      }
    }
  });
  return sums;
}

}  // namespace

template <class Acc>
void route_forward(const Host& host, const Problem& p, const State<Acc>& state, const Matrix& t, const Segments& cuts,
                   const Matrix& z, Acc* g) {
  const SampleSums<Acc> sums = sum_samples<Acc>(host, p, state, t, cuts, nullptr);
  const Work<Acc> work{p, state, t, sums};
  parallel(host, static_cast<int64_t>(cuts.list.size()), route_work(p, state.kind), [&](int64_t begin, int64_t end) {
    thread_local Scratch<Acc> scratch, z_scratch;
    for (int64_t i = begin; i < end; ++i) {
      const Segment& s = cuts.list[static_cast<size_t>(i)];
      const int64_t size = (s.end - s.begin) * p.width;
      Acc* tile = scratch.get(size);
      Rows<Acc> rows(z, s, z_scratch);
      read_rows(work, s, false, tile);
      route_segment(work, s, tile, rows.data);
      Acc* gradient = g ? g + s.begin * p.width : nullptr;
      for (int64_t j = 0; p.activation != Activation::kNone && j < size; ++j) {
        if (gradient) gradient[j] *= activate_slope(p.activation, rows.data[j]);
        rows.data[j] = activate(p.activation, rows.data[j]);
      }
      rows.store();
    }
  });
}

template <class Acc>
void route_backward(const Host& host, const Problem& p, const State<Acc>& state, const Matrix& t, const Segments& cuts,
                    const Acc* g, const Matrix& dt, const Matrix& dstate, const Matrix& z) {
  const SampleSums<Acc> sums = sum_samples(host, p, state, t, cuts, g);
  const Work<Acc> work{p, state, t, sums};
  const int64_t conditions = static_cast<int64_t>(cuts.of_condition.size()) - 1;
  const bool tokens = state.kind == StateKind::kTokens, reduces = dstate && !tokens;
  const int64_t size = p.state_size();
  Acc* const reduced = static_cast<Acc*>(dstate.data);
  // Without a reduction the segments are independent, but for a token of V that several samples share.
  const int64_t splits = reduces ? plan::splits(conditions, static_cast<int64_t>(cuts.list.size())) : 1;
  Array<Acc> partial(reduces && splits > 1 ? conditions * splits * size : 0);
  const auto run = [&](int64_t first, int64_t last, const Matrix& target) {
    thread_local Scratch<Acc> scratch, dt_scratch, z_scratch;
    for (int64_t i = first; i < last; ++i) {
      const Segment& s = cuts.list[static_cast<size_t>(i)];
      Acc* tile = scratch.get((s.end - s.begin) * p.width);
      read_rows(work, s, false, tile);
      Rows<Acc> dt_rows(dt, s, dt_scratch), z_rows(z, s, z_scratch);
      Acc* to = dt ? dt_rows.data : dt_scratch.get((s.end - s.begin) * p.width);
      backward_segment(work, s, tile, g + s.begin * p.width, to, target, i == first, z_rows.data);
      dt_rows.store();
      z_rows.store();
    }
  };
  if (!dstate) {
    parallel(host, static_cast<int64_t>(cuts.list.size()), 2 * route_work(p, state.kind),
             [&](int64_t begin, int64_t end) { run(begin, end, {}); });
    return;
  }
  parallel(host, conditions * splits, 2 * route_work(p, state.kind), [&](int64_t begin, int64_t end) {
    for (int64_t item = begin; item < end; ++item) {
      const int64_t c = item / splits;
      const auto [first, last] = part(cuts, c, item % splits, splits);
      if (tokens) {
        const int64_t row = p.conditions.begin(c), rows = p.conditions.end(c) - row;
        const Matrix target = dstate.block(row, 0, rows, p.width);
        if (!work.on_v() || first == last) clear(target);
        run(first, last, target);
        continue;
      }
      Acc* target = splits > 1 ? partial.get() + item * size : reduced + c * size;
      std::fill_n(target, size, Acc{0});
      run(first, last, acc(target, 1, size, size));
    }
  });
  if (splits == 1) return;
  parallel(host, conditions, double(conditions * splits * size), [&](int64_t begin, int64_t end) {
    for (int64_t c = begin; c < end; ++c) {
      std::copy_n(partial.get() + c * splits * size, size, reduced + c * size);
      for (int64_t split = 1; split < splits; ++split) {
        isa<Acc>().axpy(size, 1, partial.get() + (c * splits + split) * size, reduced + c * size);
      }
    }
  });
}

#define RP_INSTANTIATE(Acc)                                                                                         \
  template void route_forward<Acc>(const Host&, const Problem&, const State<Acc>&, const Matrix&, const Segments&,  \
                                   const Matrix&, Acc*);                                                            \
  template void route_backward<Acc>(const Host&, const Problem&, const State<Acc>&, const Matrix&, const Segments&, \
                                    const Acc*, const Matrix&, const Matrix&, const Matrix&);
RP_INSTANTIATE(float)
RP_INSTANTIATE(double)

}  // namespace routed_peft::cpu
