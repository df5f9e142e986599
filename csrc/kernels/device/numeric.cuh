// Numbers of any stored type as float and back; both directions round to nearest even.
#pragma once

#include <cstdint>
#include <type_traits>

#include "kernels/device/arch.cuh"
#include "kernels/params.h"

namespace routed_peft {

RP_DEVICE float to_float(float value) { return value; }
#ifdef __CUDACC__
RP_DEVICE float to_float(bfloat16 value) { return __bfloat162float(value); }
RP_DEVICE float to_float(half value) { return __half2float(value); }
#endif

template <class T>
RP_DEVICE T from_float(float value) {
  if constexpr (std::is_same_v<T, float>) {
    return value;
  } else if constexpr (std::is_same_v<T, bfloat16>) {
#ifdef __CUDACC__
    return __float2bfloat16_rn(value);
#else
    return emulator::to_bfloat16(value);
#endif
  } else {
    static_assert(std::is_same_v<T, half>);
#ifdef __CUDACC__
    return __float2half_rn(value);
#else
    return emulator::to_half(value);
#endif
  }
}

// Two 16-bit numbers as one register of an mma fragment: `lo` is the one of the lower address.
template <class T>
RP_DEVICE uint32_t pack2(float lo, float hi) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bfloat16>) {
    const __nv_bfloat162 pair = __floats2bfloat162_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  } else {
    static_assert(std::is_same_v<T, half>);
    const __half2 pair = __floats2half2_rn(lo, hi);
    return *reinterpret_cast<const uint32_t*>(&pair);
  }
#else
  return uint32_t{from_float<T>(lo).bits} | uint32_t{from_float<T>(hi).bits} << 16;
#endif
}

template <class T>
RP_DEVICE float2 unpack2(uint32_t pair) {
#ifdef __CUDACC__
  if constexpr (std::is_same_v<T, bfloat16>) {
    return make_float2(__uint_as_float(pair << 16), __uint_as_float(pair & 0xFFFF0000u));
  } else {
    static_assert(std::is_same_v<T, half>);
    return __half22float2(*reinterpret_cast<const __half2*>(&pair));
  }
#else
  return make_float2(to_float(T{static_cast<uint16_t>(pair)}), to_float(T{static_cast<uint16_t>(pair >> 16)}));
#endif
}

// Element i of an array whose type is known only at run time.
RP_DEVICE float load_as_float(const void* data, Dtype dtype, int64_t i) {
  switch (dtype) {
    case Dtype::kFloat64:
      return static_cast<float>(static_cast<const double*>(data)[i]);
    case Dtype::kBFloat16:
      return to_float(static_cast<const bfloat16*>(data)[i]);
    case Dtype::kFloat16:
      return to_float(static_cast<const half*>(data)[i]);
    case Dtype::kFloat32:
      break;
  }
  return static_cast<const float*>(data)[i];
}

}  // namespace routed_peft
