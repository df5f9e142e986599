#include "cpu/isa.h"

#include <bit>
#include <cstdlib>
#include <cstring>

#include "kernels/device/philox.cuh"

namespace routed_peft::cpu {
namespace {

inline float from_bfloat16(uint16_t bits) { return std::bit_cast<float>(uint32_t{bits} << 16); }

inline uint16_t to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  return static_cast<uint16_t>((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);  // NaN stays NaN
}

// Shifted into float's fields and rescaled by 2^112; infinities and NaNs get the missing exponent bits.
inline float from_float16(uint16_t bits) {
  const uint32_t sign = uint32_t{bits & 0x8000u} << 16, magnitude = uint32_t{bits & 0x7FFFu} << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = (bits & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

inline uint16_t to_float16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t half;
  if (magnitude >= 0x47800000u) {  // 65536 and more, infinity, NaN
    half = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a sum with 1/2 leaves the subnormal's bits at the bottom
    half = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    half = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;  // may carry into infinity, rightly
  }
  return static_cast<uint16_t>(half | sign);
}

#define RP_VECTOR_BYTES 16
#define RP_MICRO_ROWS 4
namespace baseline {
#include "cpu/isa_kernels.inl"
}
#undef RP_VECTOR_BYTES
#undef RP_MICRO_ROWS

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define RP_VECTOR_BYTES 32
#define RP_MICRO_ROWS 6
namespace avx2 {
#include "cpu/isa_kernels.inl"
}
#undef RP_VECTOR_BYTES
#undef RP_MICRO_ROWS
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define RP_VECTOR_BYTES 64
#define RP_MICRO_ROWS 8
namespace avx512 {
#include "cpu/isa_kernels.inl"
}
#undef RP_VECTOR_BYTES
#undef RP_MICRO_ROWS
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

template <class Acc>
Isa<Acc> choose() {
#if defined(__x86_64__)
  const char* wanted = std::getenv("ROUTED_PEFT_ISA");
  const auto allowed = [&](const char* name) { return wanted == nullptr || std::strcmp(wanted, name) == 0; };
  const bool any = wanted == nullptr || (std::strcmp(wanted, "baseline") != 0 && std::strcmp(wanted, "avx2") != 0 &&
                                         std::strcmp(wanted, "avx512") != 0);
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && (any || allowed("avx512"))) {
    return avx512::Loops<Acc>::table("avx512", {true, bool(__builtin_cpu_supports("avx512bf16"))});
  }
  if (has_avx2 && (any || allowed("avx2") || allowed("avx512"))) return avx2::Loops<Acc>::table("avx2", {true, false});
#endif
  return baseline::Loops<Acc>::table("baseline", {});
}

}  // namespace

template <class Acc>
const Isa<Acc>& isa() {
  static const Isa<Acc> chosen = choose<Acc>();
  return chosen;
}

template const Isa<float>& isa<float>();
template const Isa<double>& isa<double>();

}  // namespace routed_peft::cpu
