// How a call is cut: its rows in pieces that each belong to one sample, ordered by the condition they read; the columns
// of out by whether a slice updates them.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "kernels/plan.h"

namespace routed_peft::cpu {

struct Segment {
  int64_t begin = 0, end = 0;  // rows of x
  int64_t sample = 0, condition = 0;
  int64_t offset = 0;  // of `begin` in its sample
};

struct Segments {
  std::vector<Segment> list;           // by condition, then by sample, then by row
  std::vector<int64_t> of_condition;   // [conditions + 1], where each condition's segments start
  std::vector<int64_t> of_sample;      // [samples], where each sample's segments start
  std::vector<int64_t> sample_counts;  // [samples], how many it has

  bool once() const {  // no condition has more than one
    for (size_t c = 1; c < of_condition.size(); ++c) {
      if (of_condition[c] - of_condition[c - 1] > 1) return false;
    }
    return true;
  }
};

// Segments of at most `rows` rows; conditions without a sample have none.
inline Segments cut(const Problem& p, int64_t rows = plan::kSegmentRows) {
  const int64_t samples = p.inputs.count;
  const bool own = p.index == nullptr;
  const int64_t conditions = own ? samples : p.conditions.count;
  std::vector<std::vector<int64_t>> users(static_cast<size_t>(own ? 0 : conditions));
  if (!own) {
    for (int64_t s = 0; s < samples; ++s) users[static_cast<size_t>(p.index[s])].push_back(s);
  }
  Segments cuts;
  cuts.of_sample.resize(static_cast<size_t>(samples));
  cuts.sample_counts.resize(static_cast<size_t>(samples));
  const auto add = [&](int64_t sample, int64_t condition) {
    const int64_t begin = p.inputs.begin(sample), end = p.inputs.end(sample);
    cuts.of_sample[static_cast<size_t>(sample)] = static_cast<int64_t>(cuts.list.size());
    for (int64_t row = begin; row < end; row += rows) {
      cuts.list.push_back({row, std::min(row + rows, end), sample, condition, row - begin});
    }
    cuts.sample_counts[static_cast<size_t>(sample)] =
        static_cast<int64_t>(cuts.list.size()) - cuts.of_sample[static_cast<size_t>(sample)];
  };
  for (int64_t c = 0; c < conditions; ++c) {
    cuts.of_condition.push_back(static_cast<int64_t>(cuts.list.size()));
    if (own) {
      add(c, c);
    } else {
      for (int64_t sample : users[static_cast<size_t>(c)]) add(sample, c);
    }
  }
  cuts.of_condition.push_back(static_cast<int64_t>(cuts.list.size()));
  return cuts;
}

// Part `split` of `splits` of the segments of one condition: [first, second).
inline std::pair<int64_t, int64_t> part(const Segments& cuts, int64_t condition, int64_t split, int64_t splits) {
  const int64_t first = cuts.of_condition[static_cast<size_t>(condition)];
  const int64_t count = cuts.of_condition[static_cast<size_t>(condition) + 1] - first;
  return {first + count * split / splits, first + count * (split + 1) / splits};
}

// Columns of out that no slice updates, as [start, stop).
inline std::vector<std::pair<int64_t, int64_t>> untouched_columns(const Problem& p) {
  std::vector<std::pair<int64_t, int64_t>> taken, left;
  for (int64_t i = 0; i < p.slice_count; ++i) {
    taken.emplace_back(p.slices[i].start, p.slices[i].start + p.slices[i].length);
  }
  std::sort(taken.begin(), taken.end());
  int64_t from = 0;
  for (const auto& [start, stop] : taken) {
    if (start > from) left.emplace_back(from, start);
    from = stop;
  }
  if (from < p.out_features) left.emplace_back(from, p.out_features);
  return left;
}

}  // namespace routed_peft::cpu
