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
// Loops::micro for pairs of bfloat16.
template <int kRows, int kVectors>
void pairs(int64_t depth, const uint32_t* a, int64_t a_row, int64_t a_col, const uint32_t* panel, int64_t panel_row,
           bool add, float* c, int64_t ldc, Wanted& wanted) {
  __m512 sum[kRows][kVectors];
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_setzero_ps();
  }
  constexpr int kGroup = 4;
  const uint32_t* group[(kRows + kGroup - 1) / kGroup];
  for (int i = 0; i < kRows; i += kGroup) group[i / kGroup] = a + i * a_row;
  const int64_t steps = wanted.rows > 0 ? Wanted::kSteps : depth;
  for (int64_t k = 0; k < depth;) {
    wanted.ask();
    for (const int64_t stop = k + steps < depth ? k + steps : depth; k < stop; ++k) {
      __m512i b[kVectors];
      for (int v = 0; v < kVectors; ++v) b[v] = _mm512_loadu_si512(panel + k * panel_row + v * 16);
      for (int i = 0; i < kRows; ++i) {
        const __m512i value = _mm512_set1_epi32(static_cast<int>(group[i / kGroup][i % kGroup * a_row]));
        for (int v = 0; v < kVectors; ++v) sum[i][v] = _mm512_dpbf16_ps(sum[i][v], (__m512bh)value, (__m512bh)b[v]);
      }
      for (const uint32_t*& rows : group) rows += a_col;
    }
  }
  for (int i = 0; i < kRows; ++i) {
    for (int v = 0; v < kVectors; ++v) {
      float* at = c + i * ldc + v * 16;
      _mm512_storeu_ps(at, add ? _mm512_add_ps(_mm512_loadu_ps(at), sum[i][v]) : sum[i][v]);
    }
  }
}

// Of 32 pairs [first | second] in two halves, the pairs behind one another.
inline __m512i alternating() {
  alignas(64) uint16_t index[32];
  for (int i = 0; i < 32; ++i) index[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
  return _mm512_load_si512(index);
}

inline __mmask16 first_of(int64_t n) { return static_cast<__mmask16>(n >= 16 ? 0xFFFF : (1u << n) - 1); }

void round_lines(const void* from, Dtype dtype, int64_t stride, int64_t lines, int64_t n, uint16_t* to,
                 int64_t to_stride) {
  constexpr int64_t kChunk = 64;
  const char* source = static_cast<const char*>(from);
  for (int64_t i = 0; i < lines; ++i, source += stride * element_size(dtype), to += to_stride) {
    if (dtype == Dtype::kBFloat16) {
      std::memcpy(to, source, size_t(n) * sizeof(uint16_t));
      continue;
    }
    float converted[kChunk];
    for (int64_t done = 0; done < n; done += kChunk) {
      const int64_t count = n - done < kChunk ? n - done : kChunk;
      const float* line = reinterpret_cast<const float*>(source) + done;
      if (dtype != Dtype::kFloat32) {
        Loops<float>::load(source + done * element_size(dtype), dtype, count, converted);
        line = converted;
      }
      for (int64_t j = 0; j < count; j += 16) {
        const __mmask16 lanes = first_of(count - j);
        const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps(lanes, line + j));
        _mm256_mask_storeu_epi16(to + done + j, lanes, (__m256i)rounded);
      }
    }
  }
}

void lay_pairs(const void* from, Dtype dtype, int64_t stride, int64_t depth, int64_t n, int64_t width, int64_t panel,
               uint32_t* to) {
  const __m512i order = alternating();
  const __m512i front = _mm512_setr_epi64(0, 1, 8, 9, 2, 3, 10, 11),
                back = _mm512_setr_epi64(4, 5, 12, 13, 6, 7, 14, 15);
  const char* source = static_cast<const char*>(from);
  const int64_t size = element_size(dtype), units = (depth + 1) / 2;
  for (int64_t k = 0; k < units; ++k) {
    const char *even = source + 2 * k * stride * size, *odd = even + stride * size;
    const bool both = 2 * k + 1 < depth;
    for (int64_t j = 0; j < n; j += width) {
      uint32_t* target = to + j / width * panel + k * width;
      if (dtype == Dtype::kBFloat16 && both && width == 32 && j + 32 <= n) {  // unpacked by quarters, which are sorted
        const __m512i first = _mm512_loadu_si512(even + j * size), second = _mm512_loadu_si512(odd + j * size);
        const __m512i low = _mm512_unpacklo_epi16(first, second), high = _mm512_unpackhi_epi16(first, second);
        _mm512_storeu_si512(target, _mm512_permutex2var_epi64(low, front, high));
        _mm512_storeu_si512(target + 16, _mm512_permutex2var_epi64(low, back, high));
        continue;
      }
      for (int64_t i = 0; i < width; i += 16) {  // lanes beyond n are zero
        const int64_t left = n - j - i, at = (j + i) * size;
        const __mmask16 lanes = first_of(left > 0 ? left : 0), second = both ? lanes : __mmask16{0};
        __m512i pairs;
        if (dtype == Dtype::kFloat32) {
          const __m512 low = _mm512_maskz_loadu_ps(lanes, even + at), high = _mm512_maskz_loadu_ps(second, odd + at);
          pairs = _mm512_maskz_permutexvar_epi16(~0u, order, (__m512i)_mm512_cvtne2ps_pbh(high, low));
        } else {
          const __m512i low = _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_maskz_loadu_epi16(lanes, even + at));
          const __m512i high = _mm512_maskz_cvtepu16_epi32(0xFFFF, _mm256_maskz_loadu_epi16(second, odd + at));
          pairs = _mm512_or_si512(low, _mm512_maskz_slli_epi32(0xFFFF, high, 16));
        }
        _mm512_mask_storeu_epi32(target + i, first_of(width - i), pairs);
      }
    }
  }
}

template <int... kSum>
void dots_of(std::integer_sequence<int, kSum...>, const uint16_t* a, int64_t lda, const void* const* b, int64_t k,
             float* c, int64_t ldc) {
  constexpr int kRows = sizeof...(kSum) / 4;
  __m512 sum[] = {(static_cast<void>(kSum), _mm512_setzero_ps())...};  // number 4 row + column
  for (int64_t j = 0; j < k; j += 32) {
    const __mmask32 lanes = k - j >= 32 ? ~0u : (1u << (k - j)) - 1;
    __m512bh row[kRows], other[4];
    for (int i = 0; i < kRows; ++i) row[i] = (__m512bh)_mm512_maskz_loadu_epi16(lanes, a + i * lda + j);
    for (int i = 0; i < 4; ++i) {
      other[i] = (__m512bh)_mm512_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(b[i]) + j);
    }
    ((sum[kSum] = _mm512_dpbf16_ps(sum[kSum], row[kSum / 4], other[kSum % 4])), ...);
  }
  float totals[sizeof...(kSum)];
  Loops<float>::sums_of<sizeof...(kSum)>(reinterpret_cast<const Loops<float>::Vector*>(sum), totals);
  ((c[kSum / 4 * ldc + kSum % 4] = totals[kSum]), ...);
}

void dots(int64_t rows, const uint16_t* a, int64_t lda, const void* const* b, int64_t k, float* c, int64_t ldc) {
  if (rows == 1) return dots_of(std::make_integer_sequence<int, 4>(), a, lda, b, k, c, ldc);
  if (rows == 2) return dots_of(std::make_integer_sequence<int, 8>(), a, lda, b, k, c, ldc);
  dots_of(std::make_integer_sequence<int, 16>(), a, lda, b, k, c, ldc);
}

void mask_run(const uint16_t* run, int64_t row, int64_t column, int64_t n, const Dropout& dropout, uint16_t* to) {
  const Keys keys(dropout);
  for (int64_t done = 0; done < n;) {
    const int64_t first = (column + done) % 64;
    const int64_t count = n - done < 64 - first ? n - done : 64 - first;
    const uint64_t bits = kept(dropout, keys, row, (column + done) / 64) >> first;
    for (int64_t i = 0; i < count; i += 32) {
      const __mmask32 lanes = count - i >= 32 ? ~0u : (1u << (count - i)) - 1;
      const __m512i kept_numbers = _mm512_maskz_loadu_epi16(lanes & static_cast<__mmask32>(bits >> i), run + done + i);
      _mm512_mask_storeu_epi16(to + done + i, lanes, kept_numbers);
    }
    done += count;
  }
}

inline __m512 from_half(__m256i numbers) {
  return _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, _mm512_maskz_cvtepu16_epi32(0xFFFF, numbers), 16));
}

// Loops<float>::finish with the processor's own rounding to bfloat16, which makes zeros of what is below 2^-126, as its
// products do.
void finish(const float* sum, int64_t n, float alpha, const Dropout* dropout, int64_t row, int64_t column,
            const float* bias, const void* residual, bool accumulate, Dtype dtype, void* out) {
  if (dtype != Dtype::kBFloat16) {
    return Loops<float>::finish(sum, n, alpha, dropout, row, column, bias, residual, accumulate, dtype, out);
  }
  uint16_t* const target = static_cast<uint16_t*>(out);
  const uint16_t* const added = static_cast<const uint16_t*>(residual);
  std::optional<Keys> keys;
  if (dropout) keys.emplace(*dropout);
  const __m512 factor = _mm512_set1_ps(alpha), scale = _mm512_set1_ps(dropout ? float(dropout->scale()) : 1);
  for (int64_t done = 0; done < n;) {
    const int64_t first = dropout ? (column + done) % 64 : 0, count = n - done < 64 - first ? n - done : 64 - first;
    const uint64_t bits = dropout ? kept(*dropout, *keys, row, (column + done) / 64) >> first : ~uint64_t{0};
    for (int64_t i = 0; i < count; i += 16) {
      const __mmask16 lanes = first_of(count - i);
      const int64_t j = done + i;
      __m512 value = _mm512_mul_ps(factor, _mm512_maskz_loadu_ps(lanes, sum + j));
      if (dropout) value = _mm512_maskz_mul_ps(static_cast<__mmask16>(bits >> i), value, scale);
      if (bias) value = _mm512_add_ps(value, _mm512_maskz_loadu_ps(lanes, bias + j));
      if (added) value = _mm512_add_ps(value, from_half(_mm256_maskz_loadu_epi16(lanes, added + j)));
      if (accumulate) value = _mm512_add_ps(value, from_half(_mm256_maskz_loadu_epi16(lanes, target + j)));
      _mm256_mask_storeu_epi16(target + j, lanes, (__m256i)_mm512_cvtneps_pbh(value));
    }
    done += count;
  }
}

// Loops<float>::store. The processor's own rounding to bfloat16 makes zeros of what is below 2^-126, and this does not.
void store(const float* from, int64_t n, Dtype dtype, void* to) {
  constexpr int kSubnormal = 0x20;
  constexpr int64_t kChunk = 64;
  int64_t i = 0;
  for (; dtype == Dtype::kBFloat16 && i + kChunk <= n; i += kChunk) {
    uint16_t* const target = static_cast<uint16_t*>(to) + i;
    const __m512 a = _mm512_loadu_ps(from + i), b = _mm512_loadu_ps(from + i + 16);
    const __m512 c = _mm512_loadu_ps(from + i + 32), d = _mm512_loadu_ps(from + i + 48);
    const __mmask16 first = _mm512_fpclass_ps_mask(a, kSubnormal) | _mm512_fpclass_ps_mask(b, kSubnormal);
    const __mmask16 second = _mm512_fpclass_ps_mask(c, kSubnormal) | _mm512_fpclass_ps_mask(d, kSubnormal);
    if ((first | second) != 0) {
      Loops<float>::store(from + i, kChunk, dtype, target);
      continue;
    }
    _mm512_storeu_si512(target, (__m512i)_mm512_cvtne2ps_pbh(b, a));
    _mm512_storeu_si512(target + 32, (__m512i)_mm512_cvtne2ps_pbh(d, c));
  }
  Loops<float>::store(from + i, n - i, dtype, static_cast<char*>(to) + i * element_size(dtype));
}
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
// Eight tiles of 16 rows of 64 bytes: sums 0 to 3, a in 4 and 5, b in 6 and 7.
void open() {
  struct alignas(64) Config {
    uint8_t palette = 1, start_row = 0, reserved[14] = {};
    uint16_t row_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
    uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
  };
  static constexpr Config kConfig;
  _tile_loadconfig(&kConfig);
}

void close() { _tile_release(); }

// Loops::micro for pairs of bfloat16, by tiles of 16 × 16 sums and 16 units of depth. A unit of a row of a and a row of
// a panel are as TDPBF16PS takes them.
template <int kTiles, int kVectors>
void tiles(int64_t depth, const uint32_t* a, int64_t a_row, int64_t a_col, const uint32_t* panel, int64_t panel_row,
           bool add, float* c, int64_t ldc, Wanted& wanted) {
  if constexpr (kTiles == 3) {
    tiles<2, kVectors>(depth, a, a_row, a_col, panel, panel_row, add, c, ldc, wanted);
    tiles<1, kVectors>(depth, a + 32 * a_row, a_row, a_col, panel, panel_row, add, c + 32 * ldc, ldc, wanted);
  } else {
    const int64_t row = a_row * 4, right_row = panel_row * 4, line = ldc * 4;
    for (int64_t k = 0; wanted.rows > 0 && k < depth; k += Wanted::kSteps) wanted.ask();  // the loop below is short
    const uint32_t* lower = a + 16 * a_row;
    float* under = c + 16 * ldc;
    if (add) {
      _tile_loadd(0, c, line);
      if constexpr (kVectors == 2) _tile_loadd(1, c + 16, line);
      if constexpr (kTiles == 2) _tile_loadd(2, under, line);
      if constexpr (kTiles == 2 && kVectors == 2) _tile_loadd(3, under + 16, line);
    } else {
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
    }
    for (int64_t k = 0; k < depth; k += 16) {
      const uint32_t* right = panel + k * panel_row;
      _tile_loadd(4, a + k, row);
      _tile_loadd(6, right, right_row);
      _tile_dpbf16ps(0, 4, 6);
      if constexpr (kVectors == 2) _tile_loadd(7, right + 16, right_row);
      if constexpr (kVectors == 2) _tile_dpbf16ps(1, 4, 7);
      if constexpr (kTiles == 2) _tile_loadd(5, lower + k, row);
      if constexpr (kTiles == 2) _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTiles == 2 && kVectors == 2) _tile_dpbf16ps(3, 5, 7);
    }
    _tile_stored(0, c, line);
    if constexpr (kVectors == 2) _tile_stored(1, c + 16, line);
    if constexpr (kTiles == 2) _tile_stored(2, under, line);
    if constexpr (kTiles == 2 && kVectors == 2) _tile_stored(3, under + 16, line);
  }
}
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
        set.half = {
            4,         1,       {{pairs<4, 1>, pairs<4, 2>}, {pairs<8, 1>, pairs<8, 2>}, {pairs<12, 1>, pairs<12, 2>}},
            nullptr,   nullptr, round_lines,
            lay_pairs, dots,    mask_run};
      }
      if (tiles_too) {
        using amx::tiles;
        set.half.row_step = set.half.unit_step = 16;
        constexpr Isa<float>::Micro<uint32_t> kTiles[3][2] = {
            {tiles<1, 1>, tiles<1, 2>}, {tiles<2, 1>, tiles<2, 2>}, {tiles<3, 1>, tiles<3, 2>}};
        for (int i = 0; i < 3; ++i) std::copy_n(kTiles[i], 2, set.half.micro[i]);
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
