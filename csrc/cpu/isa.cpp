#include "cpu/isa.h"

#include <algorithm>
#include <array>
#include <bit>
#include <cstdlib>
#include <cstring>
#include <optional>
#include <type_traits>
#include <utility>

#include "kernels/device/philox.cuh"

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

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

// RP_MULTIPLY_LOW: the products of the lower halves of 64-bit lanes. RP_UPPER: the upper halves as lower ones, with
// anything above. at_least: of 64 aligned halfwords, bit j is whether number j is at least the limit.
#define RP_VECTOR_BYTES 16
#define RP_ROW_STEP 2
#define RP_UPPER(v) ((v) >> 32)
namespace baseline {
#if defined(__x86_64__)
#define RP_MULTIPLY_LOW(a, b) ((Wide)_mm_mul_epu32((__m128i)(a), (__m128i)(b)))
inline uint64_t at_least(const uint16_t* random, uint16_t limit) {
  uint64_t bits = 0;
  const __m128i limits = _mm_set1_epi16(static_cast<short>(limit)), zero = _mm_setzero_si128();
  for (int i = 0; i < 4; ++i) {
    const __m128i* at = reinterpret_cast<const __m128i*>(random) + 2 * i;
    const __m128i low = _mm_cmpeq_epi16(_mm_subs_epu16(limits, at[0]), zero);
    const __m128i high = _mm_cmpeq_epi16(_mm_subs_epu16(limits, at[1]), zero);
    bits |= uint64_t{static_cast<uint32_t>(_mm_movemask_epi8(_mm_packs_epi16(low, high)))} << (16 * i);
  }
  return bits;
}
#else
#define RP_MULTIPLY_LOW(a, b) (((a) & 0xFFFFFFFFu) * ((b) & 0xFFFFFFFFu))
inline uint64_t at_least(const uint16_t* random, uint16_t limit) {
  uint64_t bits = 0;
  for (int i = 0; i < 64; ++i) bits |= uint64_t{random[i] >= limit} << i;
  return bits;
}
#endif
#include "cpu/isa_kernels.inl"
}  // namespace baseline
#undef RP_VECTOR_BYTES
#undef RP_ROW_STEP
#undef RP_MULTIPLY_LOW
#undef RP_UPPER

#if defined(__x86_64__)
#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx2,fma"))), apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx2,fma")
#endif
#define RP_VECTOR_BYTES 32
#define RP_ROW_STEP 2
#define RP_UPPER(v) ((v) >> 32)
#define RP_MULTIPLY_LOW(a, b) ((Wide)_mm256_mul_epu32((__m256i)(a), (__m256i)(b)))
namespace avx2 {
inline uint64_t at_least(const uint16_t* random, uint16_t limit) {
  uint64_t bits = 0;
  const __m256i limits = _mm256_set1_epi16(static_cast<short>(limit)), zero = _mm256_setzero_si256();
  for (int i = 0; i < 2; ++i) {
    const __m256i* at = reinterpret_cast<const __m256i*>(random) + 2 * i;
    const __m256i low = _mm256_cmpeq_epi16(_mm256_subs_epu16(limits, at[0]), zero);
    const __m256i high = _mm256_cmpeq_epi16(_mm256_subs_epu16(limits, at[1]), zero);
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packs_epi16(low, high), 0xD8);  // packs stays in its half
    bits |= uint64_t{static_cast<uint32_t>(_mm256_movemask_epi8(packed))} << (32 * i);
  }
  return bits;
}
#include "cpu/isa_kernels.inl"
}  // namespace avx2
#undef RP_VECTOR_BYTES
#undef RP_ROW_STEP
#undef RP_MULTIPLY_LOW
#undef RP_UPPER
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,fma"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,fma,prefer-vector-width=512")
#endif
#define RP_VECTOR_BYTES 64
#define RP_ROW_STEP 4
// By a shuffle, which has another port than products and shifts.
#define RP_UPPER(v) ((Wide)_mm512_maskz_shuffle_epi32(0xFFFF, (__m512i)(v), _MM_PERM_DDBB))
#define RP_MULTIPLY_LOW(a, b) ((Wide)_mm512_maskz_mul_epu32(0xFF, (__m512i)(a), (__m512i)(b)))
namespace avx512 {
// The halfwords are the four words of isa_kernels.inl's `Words`, in the lower halves of their lanes.
inline uint64_t at_least(const __m512i* words, uint16_t limit) {
  alignas(64) static constexpr int32_t kLow[] = {0, 2, 4, 6, 1, 3, 5, 7, 16, 18, 20, 22, 17, 19, 21, 23};
  const __m512i limits = _mm512_set1_epi16(static_cast<short>(limit)), order = _mm512_load_si512(kLow);
  const __m512i first = _mm512_mask_shuffle_epi32(words[0], 0xAAAA, words[1], _MM_PERM_CCAA);
  const __m512i second = _mm512_mask_shuffle_epi32(words[2], 0xAAAA, words[3], _MM_PERM_CCAA);
  const __m512i low = _mm512_permutex2var_epi32(first, order, second);
  const __m512i high = _mm512_permutex2var_epi32(first, _mm512_add_epi32(order, _mm512_set1_epi32(8)), second);
  return _mm512_cmpge_epu16_mask(low, limits) | uint64_t{_mm512_cmpge_epu16_mask(high, limits)} << 32;
}
#include "cpu/isa_kernels.inl"
}  // namespace avx512
#undef RP_VECTOR_BYTES
#undef RP_ROW_STEP
#undef RP_MULTIPLY_LOW
#undef RP_UPPER
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16"))), \
                             apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx512bf16,prefer-vector-width=512")
#endif
namespace avx512 {
#include "cpu/isa_pairs.inl"
}  // namespace avx512
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("amx-tile,amx-bf16"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("amx-tile,amx-bf16")
#endif
namespace amx {
#include "cpu/isa_tiles.inl"
}  // namespace amx
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif
#endif

#if defined(__x86_64__)
// Tiles are there if the processor has them and the kernel grants their registers to this process.
bool has_tiles() {
#if defined(__linux__) && defined(SYS_arch_prctl)
  constexpr unsigned kBFloat16 = 1u << 22, kTile = 1u << 24;  // of EDX
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  unsigned a = 0, b = 0, c = 0, d = 0;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) != 0 && (d & kBFloat16) != 0 && (d & kTile) != 0 &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}

// AMD from Zen 5 on computes with 512 bits at a time where Zen 4 takes two turns; MKL keeps to AVX2 on either.
bool outruns_mkl() {
  unsigned version = 0, unused[3];
  if (!__builtin_cpu_is("amd") || __get_cpuid(1, &version, &unused[0], &unused[1], &unused[2]) == 0) return false;
  return (version >> 8 & 0xF) + (version >> 20 & 0xFF) >= 0x1A;
}
#endif

template <class Acc>
Isa<Acc> choose() {
#if defined(__x86_64__)
  // Sets are tried from the best one on; one that is named stands for itself and what it builds on.
  const char* wanted = std::getenv("ROUTED_PEFT_ISA");
  int best = 3;
  for (int i = 0; wanted != nullptr && i < 4; ++i) {
    if (std::strcmp(wanted, std::array{"baseline", "avx2", "avx512", "amx"}[i]) == 0) best = i;
  }
  const bool intel = __builtin_cpu_is("intel");
  const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                          __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl");
  if (has_avx512 && best >= 2) {
    const bool pairs_too = __builtin_cpu_supports("avx512bf16"), tiles_too = pairs_too && best >= 3 && has_tiles();
    Isa<Acc> set =
        avx512::Loops<Acc>::table(tiles_too ? "amx" : "avx512", {true, pairs_too, outruns_mkl(), tiles_too, intel});
    if constexpr (std::is_same_v<Acc, float>) {
      using namespace avx512;
      if (pairs_too) {
        set.store = avx512::store;
        set.finish = avx512::finish;
        set.half = {4,
                    1,
                    {{pairs<4, 1>, pairs<4, 2>}, {pairs<8, 1>, pairs<8, 2>}, {pairs<12, 1>, pairs<12, 2>}},
                    nullptr,
                    nullptr,
                    round_lines,
                    lay_pairs,
                    dots,
                    mask_run,
                    {},
                    split_lines,
                    lay_split};
      }
      if (tiles_too) {
        using amx::split_tiles, amx::tiles;
        set.half.row_step = set.half.unit_step = 16;
        constexpr Isa<float>::Micro<uint32_t> kTiles[2][2] = {{tiles<1, 1>, tiles<1, 2>}, {tiles<2, 1>, tiles<2, 2>}};
        constexpr Isa<float>::Micro<uint32_t> kSplitTiles[2][2] = {{split_tiles<1, 1>, split_tiles<1, 2>},
                                                                   {split_tiles<2, 1>, split_tiles<2, 2>}};
        for (int i = 0; i < 2; ++i) {
          std::copy_n(kTiles[i], 2, set.half.micro[i]);
          std::copy_n(kSplitTiles[i], 2, set.half.split_micro[i]);
          set.half.micro[2][i] = nullptr;
        }
        set.half.open = amx::open;
        set.half.close = amx::close;
      }
    }
    return set;
  }
  if (has_avx2 && best >= 1) return avx2::Loops<Acc>::table("avx2", {true, false, false, false, intel});
#endif
  return baseline::Loops<Acc>::table("baseline", {});
}

}  // namespace

template <class Acc>
const Isa<Acc>& isa() {
  static Isa<Acc> chosen = choose<Acc>();  // not const: tests put kernels of their own in
  return chosen;
}

template const Isa<float>& isa<float>();
template const Isa<double>& isa<double>();

}  // namespace routed_peft::cpu
