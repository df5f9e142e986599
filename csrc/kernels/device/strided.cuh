// Runs of a parameter whose dtype and strides are known only at run time.
#pragma once

#include "kernels/device/vector.cuh"

namespace routed_peft::cuda {

template <class T, int kCount>
RP_DEVICE void load_run(const T* at, int64_t stride, int begin, int end, bool vectors, float (&out)[kCount]) {
  static_assert(kCount % kVector<T> == 0);
  if (vectors && begin <= 0 && kCount <= end) {
    RP_UNROLL
    for (int i = 0; i < kCount; i += kVector<T>) {
      const Elements<T, kVector<T>> run = load_vector<kVector<T>>(at + i);
      RP_UNROLL
      for (int k = 0; k < kVector<T>; ++k) out[i + k] = to_float(run.e[k]);
    }
    return;
  }
  RP_UNROLL
  for (int i = 0; i < kCount; ++i) out[i] = i >= begin && i < end ? to_float(at[i * stride]) : 0.0f;
}

// Elements first + i stride, i < kCount, of which those in [begin, end) are there; the others are zeros and not read.
// vectors: the stride is 1 and `first` is at a multiple of 16 bytes. The dtype is asked once for all of them, so that
// their loads are in flight together.
template <int kCount>
RP_DEVICE void load_strided(const void* data, Dtype dtype, int64_t first, int64_t stride, int begin, int end,
                            bool vectors, float (&out)[kCount]) {
  switch (dtype) {
    case Dtype::kFloat64:
      RP_UNROLL
      for (int i = 0; i < kCount; ++i) {
        const bool here = i >= begin && i < end;
        out[i] = here ? static_cast<float>(static_cast<const double*>(data)[first + i * stride]) : 0.0f;
      }
      return;
    case Dtype::kBFloat16:
      return load_run(static_cast<const bfloat16*>(data) + first, stride, begin, end, vectors, out);
    case Dtype::kFloat16:
      return load_run(static_cast<const half*>(data) + first, stride, begin, end, vectors, out);
    case Dtype::kFloat32:
      return load_run(static_cast<const float*>(data) + first, stride, begin, end, vectors, out);
  }
}

RP_DEVICE void store_as(void* data, Dtype dtype, int64_t i, float value) {
  switch (dtype) {
    case Dtype::kFloat64:
      static_cast<double*>(data)[i] = value;
      return;
    case Dtype::kBFloat16:
      static_cast<bfloat16*>(data)[i] = from_float<bfloat16>(value);
      return;
    case Dtype::kFloat16:
      static_cast<half*>(data)[i] = from_float<half>(value);
      return;
    case Dtype::kFloat32:
      static_cast<float*>(data)[i] = value;
      return;
  }
}

}  // namespace routed_peft::cuda
