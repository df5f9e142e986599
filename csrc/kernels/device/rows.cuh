// Which sample a row lies in, and which condition a sample uses.
#pragma once

#include "kernels/device/arch.cuh"
#include "kernels/params.h"

namespace routed_peft::cuda {

// Of the samples that begin at or before `row` the last one: empty samples are passed over. `row` must be below s.rows;
// whatever the offsets hold, the answer is a sample.
RP_DEVICE int64_t sample_of(const Sequences& s, int64_t row) {
  if (s.offsets == nullptr) return row / s.length();
  int64_t low = 0, high = s.count - 1;
  while (low < high) {
    const int64_t middle = (low + high + 1) / 2;
    if (s.offsets[middle] <= row) {
      low = middle;
    } else {
      high = middle - 1;
    }
  }
  return low;
}

// -1 where the index points at no condition; the rows of such a sample become NaN.
RP_DEVICE int64_t condition_of(const int64_t* index, int64_t conditions, int64_t sample) {
  const int64_t c = index == nullptr ? sample : index[sample];
  return c >= 0 && c < conditions ? c : -1;
}

// The rows of sequence i, kept inside the tensor whatever the offsets hold.
struct RowRange {
  int64_t begin, end;
};

RP_DEVICE RowRange rows_of(const Sequences& s, int64_t i) {
  int64_t begin = s.begin(i), end = s.end(i);
  begin = begin < 0 ? 0 : begin > s.rows ? s.rows : begin;
  end = end < begin ? begin : end > s.rows ? s.rows : end;
  return {begin, end};
}

}  // namespace routed_peft::cuda
