// Loops for pairs of bfloat16 and for what is rounded to them, included by isa.cpp inside namespace avx512, for
// processors with AVX512-BF16.

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

// Two vectors of numbers as three of pairs, number i of either in pair i. What is beyond bfloat16, or not finite, makes
// NaNs.
struct Split {
  __m512i parts[kParts];
};
inline Split split(__m512 first, __m512 second, __m512i order) {
  Split s;
  for (int i = 0; i < kParts; ++i) {
    const __m512i pairs = _mm512_maskz_permutexvar_epi16(~0u, order, (__m512i)_mm512_cvtne2ps_pbh(second, first));
    s.parts[i] = pairs;
    if (i + 1 == kParts) break;
    first = _mm512_sub_ps(first, _mm512_castsi512_ps(_mm512_maskz_slli_epi32(0xFFFF, pairs, 16)));
    second = _mm512_sub_ps(second, _mm512_castsi512_ps(_mm512_and_si512(pairs, _mm512_set1_epi32(int(0xFFFF0000u)))));
  }
  return s;
}

void split_lines(const float* from, int64_t stride, int64_t lines, int64_t n, uint32_t* to, int64_t to_stride) {
  const __m512i order = alternating();
  for (int64_t i = 0; i < lines; ++i, from += stride, to += to_stride) {
    uint32_t* target = to;
    for (int64_t j = 0; j < n; j += kSplitStep, target += kParts * 16) {
      const __mmask16 front = first_of(n - j), back = first_of(n - j > 16 ? n - j - 16 : 0);
      const Split s = split(_mm512_maskz_loadu_ps(front, from + j), _mm512_maskz_loadu_ps(back, from + j + 16), order);
      for (int part = 0; part < kParts; ++part) _mm512_storeu_si512(target + 16 * part, s.parts[part]);
    }
  }
}

void lay_split(const float* from, int64_t stride, int64_t depth, int64_t n, int64_t width, int64_t panel,
               uint32_t* to) {
  const __m512i order = alternating();
  for (int64_t k = 0; k < depth; k += kSplitStep, to += kParts * 16 * width) {
    for (int64_t unit = 0; unit < 16; ++unit) {
      const bool has_first = k + unit < depth, has_second = k + unit + 16 < depth;
      const float *even = from + (k + unit) * stride, *odd = even + 16 * stride;
      for (int64_t j = 0; j < n; j += width) {
        uint32_t* target = to + j / width * panel + unit * width;
        for (int64_t i = 0; i < width; i += 16) {  // lanes beyond n are zero
          const int64_t left = n - j - i;
          const __mmask16 lanes = first_of(left > 0 ? left : 0);
          const __m512 first = _mm512_maskz_loadu_ps(has_first ? lanes : __mmask16{0}, even + j + i);
          const __m512 second = _mm512_maskz_loadu_ps(has_second ? lanes : __mmask16{0}, odd + j + i);
          const Split s = split(first, second, order);
          for (int part = 0; part < kParts; ++part) {
            _mm512_mask_storeu_epi32(target + part * 16 * width + i, first_of(width - i), s.parts[part]);
          }
        }
      }
    }
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
