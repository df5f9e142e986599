// Elements of a row as one thread takes them, and warp-wide sums.
#pragma once

#include <cstdint>

#include "kernels/device/arch.cuh"
#include "kernels/device/numeric.cuh"
#include "kernels/device/philox.cuh"

namespace routed_peft::cuda {

template <class T, int kCount>
struct alignas(sizeof(T) * kCount) Elements {
  T e[kCount];
};

// One load or store of kCount elements; `at` is aligned to all of them.
template <int kCount, class T>
RP_DEVICE Elements<T, kCount> load_vector(const T* at) {
  return *reinterpret_cast<const Elements<T, kCount>*>(at);
}
template <int kCount, class T>
RP_DEVICE void store_vector(T* at, const Elements<T, kCount>& v) {
  *reinterpret_cast<Elements<T, kCount>*>(at) = v;
}

template <class T>
constexpr int kVector = 16 / static_cast<int>(sizeof(T));  // elements in 16 bytes

// Whether every row of a row-major matrix begins at a multiple of `bytes`.
inline bool aligned_rows(const Matrix& m, int64_t bytes) {
  return m.col_stride == 1 && reinterpret_cast<uintptr_t>(m.data) % static_cast<uintptr_t>(bytes) == 0 &&
         m.row_stride * element_size(m.dtype) % bytes == 0;
}

// The columns of a row that belong to one unit of work. Without dropout: 16 bytes in a row. With dropout: the 16
// columns 64 b + 8 w + 2 q + {0, 1}, w < 8, of unit 4 b + q, which two Philox calls decide. Either way `kCount` columns
// a unit, and 32 neighbouring units (a warp) cover 32 kCount neighbouring columns.
template <class T, bool kDropout>
struct Columns {
  static constexpr int kCount = kDropout ? 16 : kVector<T>;
  static constexpr int kRun = kDropout ? 2 : kCount;  // neighbours, loaded together
  static constexpr int kPerWord = 4 / static_cast<int>(sizeof(T));
  // As loaded: in whole registers, whichever way they came.
  struct Raw {
    uint32_t word[kCount / kPerWord];
  };

  // Units of a row; those behind the last column load zeros.
  RP_HOST_DEVICE static int64_t units(int64_t cols) {
    return kDropout ? (cols + 63) / 64 * 4 : (cols + kCount - 1) / kCount;
  }
  RP_DEVICE static int64_t first(int64_t unit) { return kDropout ? unit / 4 * 64 + unit % 4 * 2 : unit * kCount; }
  RP_DEVICE static int offset(int i) { return i / kRun * 8 + i % kRun; }

  // How many columns a row of `cols` has from the unit's first one on; what lies behind the unit does not matter.
  RP_DEVICE static int left(int64_t unit, int64_t cols) {
    const int64_t left = cols - first(unit);
    return left < 0 ? 0 : left > 64 ? 64 : static_cast<int>(left);
  }

  // From the unit's first column; zeros behind the `left` that are there, without reading them.
  RP_DEVICE static Raw load(const T* at, int left, bool aligned) {
    Raw raw;
    RP_UNROLL
    for (int i = 0; i < kCount; i += kRun) {
      if (aligned && offset(i) + kRun <= left) {
        if constexpr (kRun / kPerWord == 4) {
          const uint4 run = load_16(at + offset(i));
          raw.word[0] = run.x, raw.word[1] = run.y, raw.word[2] = run.z, raw.word[3] = run.w;
        } else {
          using Words = Elements<uint32_t, kRun / kPerWord>;
          const Words run = *reinterpret_cast<const Words*>(at + offset(i));
          RP_UNROLL
          for (int k = 0; k < kRun / kPerWord; ++k) raw.word[i / kPerWord + k] = run.e[k];
        }
      } else {
        RP_UNROLL
        for (int k = i; k < i + kRun; k += kPerWord) {
          Elements<T, kPerWord> part;
          RP_UNROLL
          for (int e = 0; e < kPerWord; ++e) {
            part.e[e] = offset(k) + e < left ? at[offset(k) + e] : from_float<T>(0.0f);
          }
          raw.word[k / kPerWord] = __builtin_bit_cast(uint32_t, part);
        }
      }
    }
    return raw;
  }

  // From a float32 row that is padded with zeros to 64 columns.
  RP_DEVICE static void load_padded(const float* row, int64_t unit, float (&out)[kCount]) {
    constexpr int kStep = kRun < 4 ? kRun : 4;
    RP_UNROLL
    for (int i = 0; i < kCount; i += kStep) {
      const Elements<float, kStep> run = load_vector<kStep>(row + first(unit) + offset(i));
      RP_UNROLL
      for (int k = 0; k < kStep; ++k) out[i + k] = run.e[k];
    }
  }

  RP_DEVICE static void to_floats(const Raw& raw, float (&out)[kCount]) {
    RP_UNROLL
    for (int i = 0; i < kCount; i += kPerWord) {
      if constexpr (kPerWord == 1) {
        out[i] = __uint_as_float(raw.word[i]);
      } else {
        const float2 pair = unpack2<T>(raw.word[i / 2]);
        out[i] = pair.x;
        out[i + 1] = pair.y;
      }
    }
  }
};

// kCount neighbours, zeros behind the `left` that are there; aligned: to 16 bytes.
template <int kCount>
RP_DEVICE void load_floats(const float* at, int left, bool aligned, float (&out)[kCount]) {
  RP_UNROLL
  for (int i = 0; i < kCount; i += 4) {
    if (aligned && i + 4 <= left) {
      const Elements<float, 4> run = load_vector<4>(at + i);
      RP_UNROLL
      for (int k = 0; k < 4; ++k) out[i + k] = run.e[k];
    } else {
      RP_UNROLL
      for (int k = 0; k < 4; ++k) out[i + k] = i + k < left ? at[i + k] : 0.0f;
    }
  }
}

// Sets to zero what dropout takes from the unit's columns of a row; kept ones are not scaled.
RP_DEVICE void drop(uint64_t seed, const Dropout& dropout, int64_t row, int64_t unit, float (&v)[16]) {
  RP_UNROLL
  for (int half = 0; half < 2; ++half) {
    const PhiloxWords words =
        philox(seed, static_cast<uint32_t>(row), static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32),
               static_cast<uint32_t>(unit), 2 * dropout.stream + static_cast<uint32_t>(half));
    RP_UNROLL
    for (int w = 0; w < 4; ++w) {
      float& low = v[8 * half + 2 * w];
      float& high = v[8 * half + 2 * w + 1];
      if ((words.word[w] & 0xFFFFu) < dropout.threshold) low = 0;
      if (words.word[w] >> 16 < dropout.threshold) high = 0;
    }
  }
}

template <int kLeft, int kCount>
RP_DEVICE void halve_sums(float (&sum)[kCount], int lane) {
  const bool upper = lane & kLeft;
  RP_UNROLL
  for (int i = 0; i < kLeft; ++i) {
    const float give = upper ? sum[i] : sum[i + kLeft], keep = upper ? sum[i + kLeft] : sum[i];
    sum[i] = keep + __shfl_xor_sync(~0u, give, kLeft);
  }
  if constexpr (kLeft > 1) halve_sums<kLeft / 2>(sum, lane);
}

// With at most 32 sums in each lane, a power of two: lane i returns sum i % kCount over the warp, in an order that
// depends on nothing. Halving the number of sums at every step costs kCount shuffles instead of 5 kCount.
template <int kCount>
RP_DEVICE float warp_sums(float (&sum)[kCount]) {
  halve_sums<kCount / 2>(sum, static_cast<int>(threadIdx.x) % 32);
  float result = sum[0];
  RP_UNROLL
  for (int o = kCount; o < 32; o *= 2) result += __shfl_xor_sync(~0u, result, o);
  return result;
}

}  // namespace routed_peft::cuda
