// bfloat16 and float16 without CUDA's headers: the bits, and conversions that round as the hardware does.
#pragma once

#include <bit>
#include <cstdint>

namespace routed_peft {

struct bfloat16 {
  uint16_t bits;
};
struct half {
  uint16_t bits;
};

inline float to_float(bfloat16 v) { return std::bit_cast<float>(uint32_t{v.bits} << 16); }

// Shifted into float's fields and rescaled by 2^112; infinities and NaNs get the missing exponent bits.
inline float to_float(half v) {
  const uint32_t sign = uint32_t{v.bits & 0x8000u} << 16, magnitude = uint32_t{v.bits & 0x7FFFu} << 13;
  const float scaled = std::bit_cast<float>(magnitude) * 0x1p112f;
  const uint32_t special = (v.bits & 0x7C00u) == 0x7C00u ? 0x7F800000u : 0u;
  return std::bit_cast<float>(std::bit_cast<uint32_t>(scaled) | special | sign);
}

namespace emulator {

inline bfloat16 to_bfloat16(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value);
  if ((bits & 0x7FFFFFFFu) > 0x7F800000u) return {0x7FFF};
  return {static_cast<uint16_t>((bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16)};
}

inline half to_half(float value) {
  const uint32_t bits = std::bit_cast<uint32_t>(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7FFFFFFFu;
  uint32_t result;
  if (magnitude > 0x7F800000u) return {0x7FFF};
  if (magnitude >= 0x47800000u) {  // 65536 and more
    result = 0x7C00u;
  } else if (magnitude < 0x38800000u) {  // below 2^-14: a sum with 1/2 leaves the subnormal's bits at the bottom
    result = std::bit_cast<uint32_t>(std::bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u;
  } else {
    result = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;  // may carry into infinity, rightly
  }
  return {static_cast<uint16_t>(result | sign)};
}

}  // namespace emulator
}  // namespace routed_peft
