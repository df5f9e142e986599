// With u = v, or the ones vector where a route sums: q = Aᵀ u_q (expand: ones; gram, ones: v) and p = s B̂ u_p (ones:
// ones; expand, gram: v), group by group. Backward, one sweep over dout and x: dc_n = ⟨dout_n, p⟩, dp = Σ c_n dout_n,
// dq = Σ dc_n x̃_n, dx_n = mask ∘ dc_n q; the weights' gradients are products with one row a condition.
// Conditions are taken kConditionBlock at a time, so that q and p never grow to the size of x.
#include "cpu/rank_one.h"

#include <algorithm>
#include <utility>
#include <vector>

#include "cpu/gemm.h"
#include "cpu/isa.h"
#include "cpu/rows.h"

namespace routed_peft::cpu {
namespace {

template <class Acc>
Matrix acc(const Acc* data, int64_t rows, int64_t cols, int64_t row_stride) {
  return {const_cast<Acc*>(data), accumulated_dtype<Acc>(), rows, cols, row_stride, 1};
}

// q [conditions, groups, d] and p [conditions, selected o] of one block of conditions.
template <class Acc>
struct Directions {
  const Problem& p;
  Array<Acc> q, up, ones;
  bool q_shared;  // expand: q does not depend on the condition

  Directions(const Problem& problem, int64_t block)
      : p(problem), ones(block * problem.width), q_shared(problem.routing == Routing::kExpand) {
    q = Array<Acc>((q_shared ? 1 : block) * p.groups * p.a.cols);
    up = Array<Acc>(block * p.b.rows);
    std::fill_n(ones.get(), block * p.width, Acc{1});
  }
  const Acc* q_of(int64_t i) const { return q.get() + (q_shared ? 0 : i) * p.groups * p.a.cols; }
  const Acc* up_of(int64_t i) const { return up.get() + i * p.b.rows; }
  const Acc* up_source(const Acc* v) const { return p.routing == Routing::kOnes ? ones.get() : v; }

  void make(const Host& host, const Acc* v, int64_t count) {
    const int64_t w = p.group_width(), rank = p.rank(), d = p.a.cols, rows = q_shared ? 1 : count;
    for (int64_t g = 0; g < p.groups; ++g) {
      const Matrix q_g = acc(q.get() + g * d, rows, d, p.groups * d), a_g = p.a.block(g * w, 0, w, d);
      if (q_shared) {
        column_sums<Acc>(host, q_g, a_g, false);
      } else {
        gemm<Acc>(host, q_g, acc(v + g * w, rows, w, p.width), a_g);
      }
    }
    Epilogue scaled;
    scaled.alpha = p.scaling;
    for (int64_t i = 0; i < p.slice_count; ++i) {
      const Slice& slice = p.slices[i];
      gemm<Acc>(host, acc(up.get() + slice.row, count, slice.length, p.b.rows),
                acc(up_source(v) + i * rank, count, rank, p.width),
                p.b.block(slice.row, 0, slice.length, rank).transposed(), scaled);
    }
  }
};

int64_t group_of(const Problem& p, int64_t slice) { return p.groups == 1 ? 0 : slice; }

}  // namespace

template <class Acc>
void rank_one_forward(const Host& host, const Problem& p, const Acc* v, const Segments& cuts, const Matrix& out,
                      Acc* c) {
  const int64_t conditions = static_cast<int64_t>(cuts.of_condition.size()) - 1, d = p.a.cols, o = p.out_features;
  const Isa<Acc>& set = isa<Acc>();
  Array<Acc> bias(o);
  if (p.bias) {
    load_row(p.bias, 0, 0, o, bias.get());
  } else {
    std::fill_n(bias.get(), o, Acc{0});
  }
  Directions<Acc> directions(p, std::min(conditions, plan::kConditionBlock));
  // Rows worth asking for: where numbers are converted, that takes longer than to wait for them.
  const bool far = out.dtype == accumulated_dtype<Acc>() && out.col_stride == 1 &&
                   out.rows * out.cols * int64_t{sizeof(Acc)} >= kFar;
  // Rows that the set's `finish` writes in one pass.
  const bool straight =
      !p.residual && out.col_stride == 1 && (!p.base || (p.base.dtype == out.dtype && p.base.col_stride == 1));
  const std::vector<std::pair<int64_t, int64_t>> untouched = untouched_columns(p);
  for (int64_t c0 = 0; c0 < conditions; c0 += plan::kConditionBlock) {
    const int64_t c1 = std::min(c0 + plan::kConditionBlock, conditions);
    directions.make(host, v + c0 * p.width, c1 - c0);
    const int64_t first = cuts.of_condition[static_cast<size_t>(c0)], last = cuts.of_condition[static_cast<size_t>(c1)];
    parallel(host, last - first, double(p.inputs.rows * (d + o)), [&](int64_t begin, int64_t end) {
      thread_local Scratch<Acc> x_scratch, out_scratch, residual_scratch;
      Acc* x = x_scratch.get(d);
      Acc* line = out_scratch.get(o);
      for (int64_t i = first + begin; i < first + end; ++i) {
        const Segment& s = cuts.list[static_cast<size_t>(i)];
        const Acc* q = directions.q_of(s.condition - c0);
        const Acc* up = directions.up_of(s.condition - c0);
        for (int64_t row = s.begin; row < s.end; ++row) {
          if (far && row + 1 < s.end) expect(out, row + 1, 0, 1, o);
          load_row(p.x, row, 0, d, x, p.residual ? Dropout{} : p.drop_x);
          Acc* cn = c + row * p.groups;
          if (straight) {
            for (int64_t g = 0; g < p.groups; ++g) cn[g] = set.dot(x, q + g * d, d);
            const auto rest = [&](int64_t start) { return p.base ? p.base.at(row, start) : nullptr; };
            for (int64_t j = 0; j < p.slice_count; ++j) {
              const Slice& slice = p.slices[j];
              set.finish(up + slice.row, slice.length, cn[group_of(p, j)], nullptr, 0, 0, bias.get() + slice.start,
                         rest(slice.start), false, out.dtype, out.at(row, slice.start));
            }
            for (const auto& [start, stop] : untouched) {
              set.finish(bias.get() + start, stop - start, 1, nullptr, 0, 0, nullptr, rest(start), false, out.dtype,
                         out.at(row, start));
            }
            continue;
          }
          if (p.base) {
            load_row(p.base, row, 0, o, line);
            set.axpy(o, 1, bias.get(), line);
          } else {
            std::copy_n(bias.get(), o, line);
          }
          if (p.residual) {
            set.axpy(o, 1, x, line);
            if (p.drop_x.threshold != 0) set.drop(x, row, 0, d, p.drop_x, x);
          }
          for (int64_t g = 0; g < p.groups; ++g) cn[g] = set.dot(x, q + g * d, d);
          for (int64_t j = 0; j < p.slice_count; ++j) {
            const Slice& slice = p.slices[j];
            set.axpy(slice.length, cn[group_of(p, j)], up + slice.row, line + slice.start);
          }
          store_row(line, out, row, 0, o);
        }
      }
    });
  }
}

template <class Acc>
void rank_one_backward(const Host& host, const Problem& p, const Acc* v, const Segments& cuts, const Backward& io,
                       Acc* dv) {
  const int64_t conditions = static_cast<int64_t>(cuts.of_condition.size()) - 1, d = p.a.cols, o = p.out_features;
  const int64_t w = p.group_width(), rank = p.rank(), q_size = p.groups * d, up_size = p.b.rows;
  const bool want_dq = bool(io.da) || (dv && p.routing != Routing::kExpand);
  const bool want_dp = bool(io.db) || (dv && p.routing != Routing::kOnes);
  const Isa<Acc>& set = isa<Acc>();
  const Acc* c = static_cast<const Acc*>(io.t.data);
  const int64_t block = std::min(conditions, plan::kConditionBlock);
  const int64_t splits = plan::splits(conditions, static_cast<int64_t>(cuts.list.size()));
  Directions<Acc> directions(p, block);
  Array<Acc> dq(want_dq ? block * splits * q_size : 0), dp(want_dp ? block * splits * up_size : 0);
  // Sums over the blocks of conditions; of a single one the weights' gradients are written at once.
  const bool several = conditions > block, sums_a = several && io.da, sums_b = several && io.db;
  Array<Acc> da_sums(sums_a ? p.width * d : 0), db_sums(sums_b ? up_size * rank : 0);
  const Matrix da = sums_a ? acc(da_sums.get(), p.width, d, d) : io.da;
  const Matrix db = sums_b ? acc(db_sums.get(), up_size, rank, rank) : io.db;
  if (dv) std::fill_n(dv, p.conditions.count * p.width, Acc{0});
  for (const Matrix& weight : {io.da, io.db}) {
    if (conditions == 0 && weight) fill_rows<Acc>(host, weight, {}, {});
  }

  for (int64_t c0 = 0; c0 < conditions; c0 += plan::kConditionBlock) {
    const int64_t count = std::min(plan::kConditionBlock, conditions - c0);
    directions.make(host, v + c0 * p.width, count);
    parallel(host, count * splits, 2.0 * double(p.inputs.rows * (d + o)), [&](int64_t begin, int64_t end) {
      thread_local Scratch<Acc> x_scratch, dout_scratch, dx_scratch, dc_scratch, dq_part, dp_part;
      Acc* x = x_scratch.get(d);
      Acc* dout = dout_scratch.get(o);
      Acc* dx = dx_scratch.get(d);
      Acc* dc = dc_scratch.get(p.groups);
      for (int64_t item = begin; item < end; ++item) {
        const int64_t i = item / splits;
        const Acc* q = directions.q_of(i);
        const Acc* up = directions.up_of(i);
        Acc* dq_item = dq.get() + item * q_size;
        Acc* dp_item = dp.get() + item * up_size;
        if (want_dq) std::fill_n(dq_item, q_size, Acc{0});
        if (want_dp) std::fill_n(dp_item, up_size, Acc{0});
        const auto [first, last] = part(cuts, c0 + i, item % splits, splits);
        for (int64_t k = first; k < last; ++k) {
          const Segment& s = cuts.list[static_cast<size_t>(k)];
          RowSums<Acc> dq_sums(dq_item, dq_part.get(q_size), want_dq ? q_size : 0);
          RowSums<Acc> dp_sums(dp_item, dp_part.get(up_size), want_dp ? up_size : 0);
          for (int64_t row = s.begin; row < s.end; ++row, dq_sums.end_row(), dp_sums.end_row()) {
            load_row(io.dout, row, 0, o, dout);
            std::fill_n(dc, p.groups, Acc{0});
            for (int64_t j = 0; j < p.slice_count; ++j) {
              const Slice& slice = p.slices[j];
              const int64_t g = group_of(p, j);
              dc[g] += set.dot(dout + slice.start, up + slice.row, slice.length);
              if (want_dp)
                set.axpy(slice.length, c[row * p.groups + g], dout + slice.start, dp_sums.part() + slice.row);
            }
            if (want_dq) {
              load_row(p.x, row, 0, d, x, p.drop_x);
              for (int64_t g = 0; g < p.groups; ++g) set.axpy(d, dc[g], x, dq_sums.part() + g * d);
            }
            if (!io.dx) continue;
            std::fill_n(dx, d, Acc{0});
            for (int64_t g = 0; g < p.groups; ++g) set.axpy(d, dc[g], q + g * d, dx);
            if (p.drop_x.threshold != 0) set.drop(dx, row, 0, d, p.drop_x, dx);
            if (p.residual) set.axpy(d, 1, dout, dx);
            store_row(dx, io.dx, row, 0, d);
          }
          dq_sums.flush();
          dp_sums.flush();
        }
      }
    });
    // the splits of a condition, summed in order into its first one
    for (int64_t i = 0; splits > 1 && i < count; ++i) {
      for (int64_t split = 1; split < splits; ++split) {
        if (want_dq) set.axpy(q_size, 1, dq.get() + (i * splits + split) * q_size, dq.get() + i * splits * q_size);
        if (want_dp) set.axpy(up_size, 1, dp.get() + (i * splits + split) * up_size, dp.get() + i * splits * up_size);
      }
    }
    const Acc* v_block = v + c0 * p.width;
    Epilogue add, add_scaled, weight, weight_scaled;
    add.accumulate = add_scaled.accumulate = true;
    weight.accumulate = weight_scaled.accumulate = c0 > 0;
    add_scaled.alpha = weight_scaled.alpha = p.scaling;
    for (int64_t g = 0; g < p.groups; ++g) {
      const Matrix dq_g = acc(dq.get() + g * d, count, d, splits * q_size);
      const Matrix u(acc((directions.q_shared ? directions.ones.get() : v_block) + g * w, count, w, p.width));
      if (io.da) gemm<Acc>(host, da.block(g * w, 0, w, d), u.transposed(), dq_g, weight);
      if (dv && p.routing != Routing::kExpand) {
        gemm<Acc>(host, acc(dv + c0 * p.width + g * w, count, w, p.width), dq_g, p.a.block(g * w, 0, w, d).transposed(),
                  add);
      }
    }
    for (int64_t j = 0; j < p.slice_count; ++j) {
      const Slice& slice = p.slices[j];
      const Matrix dp_j = acc(dp.get() + slice.row, count, slice.length, splits * up_size);
      const Matrix u = acc(directions.up_source(v_block) + j * rank, count, rank, p.width);
      if (io.db) gemm<Acc>(host, db.block(slice.row, 0, slice.length, rank), dp_j.transposed(), u, weight_scaled);
      if (dv && p.routing != Routing::kOnes) {
        gemm<Acc>(host, acc(dv + c0 * p.width + j * rank, count, rank, p.width), dp_j,
                  p.b.block(slice.row, 0, slice.length, rank), add_scaled);
      }
    }
  }
  for (int64_t row = 0; sums_a && row < p.width; ++row) store_row(da_sums.get() + row * d, io.da, row, 0, d);
  for (int64_t row = 0; sums_b && row < up_size; ++row) store_row(db_sums.get() + row * rank, io.db, row, 0, rank);
}

#define RP_INSTANTIATE(Acc)                                                                                           \
  template void rank_one_forward<Acc>(const Host&, const Problem&, const Acc*, const Segments&, const Matrix&, Acc*); \
  template void rank_one_backward<Acc>(const Host&, const Problem&, const Acc*, const Segments&, const Backward&, Acc*);
RP_INSTANTIATE(float)
RP_INSTANTIATE(double)

}  // namespace routed_peft::cpu
