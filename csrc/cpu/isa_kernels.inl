// The loops of isa.h, included by isa.cpp once for each instruction set inside a namespace of its own, with
// RP_VECTOR_BYTES, RP_ROW_STEP, RP_MULTIPLY_LOW and RP_UPPER set and at_least defined. Vectors are the compiler's own
// extension, so that one text serves them all.

// The words of eight Philox calls, of which a vector holds kPhiloxLanes, in the lower halves of 64-bit lanes. Lanes are
// (half, q), and word w of lane (half, q) holds the halfwords of the column pair 16·half + 4·w + q
// (device/philox.cuh, turned around).
typedef uint64_t Wide __attribute__((vector_size(RP_VECTOR_BYTES), may_alias));
constexpr int kPhiloxLanes = RP_VECTOR_BYTES / 8;
struct Words {
  Wide word[4];
};

// The keys of all rounds, once for a run of calls: to make them costs as much as the rounds.
struct Keys {
  uint64_t of_c0[kPhiloxRounds], of_c2[kPhiloxRounds];

  explicit Keys(const Dropout& dropout) {
    uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      of_c0[round] = k0;
      of_c2[round] = k1;
    }
  }
};

inline Words philox(const Dropout& dropout, const Keys& keys, int64_t row, int64_t block, int first) {
  alignas(64) static constexpr uint64_t kQ[] = {0, 1, 2, 3, 0, 1, 2, 3}, kHalf[] = {0, 0, 0, 0, 1, 1, 1, 1};
  const Wide c2_lanes = *reinterpret_cast<const Wide*>(kQ + first);
  const Wide c3_lanes = *reinterpret_cast<const Wide*>(kHalf + first);
  Wide c2 = c2_lanes + 4 * static_cast<uint64_t>(block), c3 = c3_lanes + 2 * uint64_t{dropout.stream};
  // A product reads the lower halves alone, so that what is in the upper ones may stay.
  Wide c0 = Wide{} + static_cast<uint64_t>(row), c1 = Wide{} + (static_cast<uint64_t>(row) >> 32);
  for (int round = 0; round < kPhiloxRounds; ++round) {
    const Wide p0 = RP_MULTIPLY_LOW(c0, (Wide{} + uint64_t{0xD2511F53u}));
    const Wide p1 = RP_MULTIPLY_LOW(c2, (Wide{} + uint64_t{0xCD9E8D57u}));
    c0 = RP_UPPER(p1) ^ c1 ^ (Wide{} + keys.of_c0[round]);
    c2 = RP_UPPER(p0) ^ c3 ^ (Wide{} + keys.of_c2[round]);
    c1 = p1;
    c3 = p0;
  }
  return {{c0, c1, c2, c3}};
}

// Bit j: column 64 block + j is kept.
inline uint64_t kept(const Dropout& dropout, const Keys& keys, int64_t row, int64_t block) {
  if (dropout.threshold >= 65536) return 0;
  const uint16_t limit = static_cast<uint16_t>(dropout.threshold);
#if RP_VECTOR_BYTES == 64
  const Words words = philox(dropout, keys, row, block, 0);
  return at_least(reinterpret_cast<const __m512i*>(words.word), limit);
#else
  typedef uint32_t Narrow __attribute__((vector_size(RP_VECTOR_BYTES / 2)));
  constexpr int kRun = kPhiloxLanes < 4 ? kPhiloxLanes : 4;
  alignas(64) uint16_t random[64];
  for (int first = 0; first < 8; first += kPhiloxLanes) {
    const Words words = philox(dropout, keys, row, block, first);
    for (int word = 0; word < 4; ++word) {
      const Narrow low = __builtin_convertvector(words.word[word], Narrow);
      for (int run = 0; run < kPhiloxLanes; run += kRun) {
        const int half = (first + run) / 4, q = (first + run) % 4;
        std::memcpy(random + 2 * (16 * half + 4 * word + q), reinterpret_cast<const char*>(&low) + 4 * run, 4 * kRun);
      }
    }
  }
  return at_least(random, limit);
#endif
}

template <class Acc>
struct Loops {
  static constexpr int64_t kLanes = RP_VECTOR_BYTES / sizeof(Acc), kChunk = 64;
  static constexpr Dtype kOwn = sizeof(Acc) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
  typedef Acc Vector __attribute__((vector_size(RP_VECTOR_BYTES)));
  typedef Acc Loose __attribute__((vector_size(RP_VECTOR_BYTES), aligned(alignof(Acc)), may_alias));
  using Whole = std::conditional_t<sizeof(Acc) == 4, int32_t, int64_t>;
  typedef Whole Bits __attribute__((vector_size(RP_VECTOR_BYTES)));

  static Vector at(const Acc* p) { return *reinterpret_cast<const Loose*>(p); }

  template <int kRows, int kVectors>
  static void micro(int64_t depth, const Acc* a, int64_t a_row, int64_t a_col, const Acc* panel, int64_t panel_row,
                    bool add, Acc* c, int64_t ldc, Wanted& wanted) {
    // In chains of kChain additions, each from zero: short chains round less than one long one, at some cost in speed
    // (tests/test_accuracy.py is what longer ones fail).
    constexpr int64_t kChain = 64;
    const int64_t steps = wanted.rows > 0 ? Wanted::kSteps : kChain;
    for (int64_t first = 0; first < depth; first += kChain) {
      const int64_t last = first + kChain < depth ? first + kChain : depth;
      Vector sum[kRows][kVectors] = {};
      // A pointer for every kGroup rows, from which an instruction reaches the others: one for every row would not stay
      // in registers, and to fetch it takes a multiplication's place.
      constexpr int kGroup = kRows > 8 ? 4 : kRows;
      const Acc* group[(kRows + kGroup - 1) / kGroup];
      for (int i = 0; i < kRows; i += kGroup) group[i / kGroup] = a + first * a_col + i * a_row;
      for (int64_t k = first; k < last;) {
        wanted.ask();
        for (const int64_t stop = k + steps < last ? k + steps : last; k < stop; ++k) {
          Vector b[kVectors];
          for (int v = 0; v < kVectors; ++v) b[v] = at(panel + k * panel_row + v * kLanes);
          for (int i = 0; i < kRows; ++i) {
            const Acc value = group[i / kGroup][i % kGroup * a_row];
            for (int v = 0; v < kVectors; ++v) sum[i][v] += value * b[v];
          }
          for (const Acc*& rows : group) rows += a_col;
        }
      }
      for (int i = 0; i < kRows; ++i) {
        for (int v = 0; v < kVectors; ++v) {
          Acc* to = c + i * ldc + v * kLanes;
          *reinterpret_cast<Loose*>(to) = add ? at(to) + sum[i][v] : sum[i][v];
        }
      }
      add = true;
    }
  }

  static void load(const void* from, Dtype dtype, int64_t n, Acc* to) {
    if (dtype == Dtype::kFloat32) {
      const float* source = static_cast<const float*>(from);
      for (int64_t i = 0; i < n; ++i) to[i] = source[i];
    } else if (dtype == Dtype::kFloat64) {
      const double* source = static_cast<const double*>(from);
      for (int64_t i = 0; i < n; ++i) to[i] = static_cast<Acc>(source[i]);
    } else if (dtype == Dtype::kBFloat16) {
      const uint16_t* source = static_cast<const uint16_t*>(from);
      for (int64_t i = 0; i < n; ++i) to[i] = from_bfloat16(source[i]);
    } else {
      const uint16_t* source = static_cast<const uint16_t*>(from);
      for (int64_t i = 0; i < n; ++i) to[i] = from_float16(source[i]);
    }
  }

  static void store(const Acc* from, int64_t n, Dtype dtype, void* to) {
    if (dtype == Dtype::kFloat32) {
      float* target = static_cast<float*>(to);
      for (int64_t i = 0; i < n; ++i) target[i] = static_cast<float>(from[i]);
    } else if (dtype == Dtype::kFloat64) {
      double* target = static_cast<double*>(to);
      for (int64_t i = 0; i < n; ++i) target[i] = from[i];
    } else if (dtype == Dtype::kBFloat16) {
      uint16_t* target = static_cast<uint16_t*>(to);
      for (int64_t i = 0; i < n; ++i) target[i] = to_bfloat16(static_cast<float>(from[i]));
    } else {
      uint16_t* target = static_cast<uint16_t*>(to);
      for (int64_t i = 0; i < n; ++i) target[i] = to_float16(static_cast<float>(from[i]));
    }
  }

  static void load_lines(const void* from, Dtype dtype, int64_t stride, int64_t lines, int64_t n, Acc* to,
                         int64_t to_stride) {
    const char* source = static_cast<const char*>(from);
    const int64_t bytes = stride * element_size(dtype);
    for (int64_t i = 0; i < lines; ++i) load(source + i * bytes, dtype, n, to + i * to_stride);
  }

  static void lay_lines(const void* from, Dtype dtype, int64_t stride, int64_t depth, int64_t n, int64_t width,
                        int64_t panel, Acc* to) {
    const char* source = static_cast<const char*>(from);
    const int64_t size = element_size(dtype);
    for (int64_t k = 0; k < depth; ++k) {
      Acc* target = to + k * width;
      for (int64_t j = 0; j < n; j += width, target += panel) {
        const int64_t count = n - j < width ? n - j : width;
        const char* line = source + (k * stride + j) * size;
        if (dtype == kOwn && count == 2 * kLanes) {  // a panel's, without a loop
          const Vector first = at(reinterpret_cast<const Acc*>(line));
          const Vector second = at(reinterpret_cast<const Acc*>(line) + kLanes);
          *reinterpret_cast<Loose*>(target) = first;
          *reinterpret_cast<Loose*>(target + kLanes) = second;
        } else {
          load(line, dtype, count, target);
        }
        for (int64_t i = count; i < width; ++i) target[i] = 0;
      }
    }
  }

  // The first or the second halves of two vectors, taking turns.
  template <int kFirst, int... kLane>
  static Vector zip(Vector a, Vector b, std::integer_sequence<int, kLane...>) {
#if defined(__clang__)
    return __builtin_shufflevector(a, b, (kFirst + kLane / 2 + kLane % 2 * int(kLanes))...);
#else
    return __builtin_shuffle(a, b, Bits{(kFirst + kLane / 2 + kLane % 2 * int(kLanes))...});
#endif
  }

  static void turn(const void* from, int64_t ld, int64_t n, void* to, int64_t to_ld) {
    const Acc* lines = static_cast<const Acc*>(from);
    Acc* target = static_cast<Acc*>(to);
    constexpr std::make_integer_sequence<int, int(kLanes)> kSequence{};
    int64_t k = 0;
    for (; k + kLanes <= n; k += kLanes) {
      Vector row[kLanes], next[kLanes];
      for (int64_t i = 0; i < kLanes; ++i) row[i] = at(lines + i * ld + k);
      // A line's number moves into a column's bit by bit: log2 of kLanes rounds.
      for (int64_t round = 1; round < kLanes; round *= 2) {
        for (int64_t i = 0; i < kLanes / 2; ++i) {
          next[2 * i] = zip<0>(row[i], row[i + kLanes / 2], kSequence);
          next[2 * i + 1] = zip<int(kLanes) / 2>(row[i], row[i + kLanes / 2], kSequence);
        }
        for (int64_t i = 0; i < kLanes; ++i) row[i] = next[i];
      }
      for (int64_t i = 0; i < kLanes; ++i) *reinterpret_cast<Loose*>(target + (k + i) * to_ld) = row[i];
    }
    for (; k < n; ++k) {
      for (int64_t i = 0; i < kLanes; ++i) target[k * to_ld + i] = lines[i * ld + k];
    }
  }

  // to[i] = scale · run[i] where bit i is set, else zero.
  static void select(const Acc* run, int64_t n, uint64_t bits, Acc scale, Acc* to) {
    Bits lanes;
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = Whole{1} << i;
    int64_t i = 0;
    for (; i + kLanes <= n; i += kLanes, bits >>= kLanes) {
      const Bits chosen = ((Bits{} + static_cast<Whole>(bits)) & lanes) != 0;
      *reinterpret_cast<Loose*>(to + i) = (Vector)((Bits)(at(run + i) * scale) & chosen);
    }
    for (; i < n; ++i, bits >>= 1) to[i] = bits & 1 ? run[i] * scale : Acc{0};
  }

  static void drop(const Acc* run, int64_t row, int64_t column, int64_t n, const Dropout& dropout, Acc* to) {
    drop_by(Keys(dropout), run, row, column, n, dropout, to);
  }

  static void drop_by(const Keys& keys, const Acc* run, int64_t row, int64_t column, int64_t n, const Dropout& dropout,
                      Acc* to) {
    const Acc scale = static_cast<Acc>(dropout.scale());
    for (int64_t done = 0; done < n;) {
      const int64_t first = (column + done) % 64;
      const int64_t count = n - done < 64 - first ? n - done : 64 - first;
      select(run + done, count, kept(dropout, keys, row, (column + done) / 64) >> first, scale, to + done);
      done += count;
    }
  }

  static void finish(const Acc* sum, int64_t n, Acc alpha, const Dropout* dropout, int64_t row, int64_t column,
                     const Acc* bias, const void* residual, bool accumulate, Dtype dtype, void* out) {
    if (residual == nullptr && !accumulate && element_size(dtype) == sizeof(Acc) &&
        (dropout == nullptr || (alpha == 1 && bias == nullptr))) {
      Acc* target = static_cast<Acc*>(out);  // the most frequent cases, without a line in between
      if (dropout != nullptr) {
        drop(sum, row, column, n, *dropout, target);
      } else if (bias != nullptr) {
        for (int64_t j = 0; j < n; ++j) target[j] = alpha * sum[j] + bias[j];
      } else {
        for (int64_t j = 0; j < n; ++j) target[j] = alpha * sum[j];
      }
      return;
    }
    alignas(64) Acc line[kChunk], other[kChunk];
    const int64_t size = element_size(dtype);
    std::optional<Keys> keys;
    if (dropout != nullptr) keys.emplace(*dropout);
    for (int64_t j = 0; j < n; j += kChunk) {
      const int64_t count = n - j < kChunk ? n - j : kChunk;
      const auto each = [&](const auto& body) {  // with a fixed count, unrolled, where it is one
        if (count == kChunk) {
          for (int64_t i = 0; i < kChunk; ++i) body(i);
        } else {
          for (int64_t i = 0; i < count; ++i) body(i);
        }
      };
      void* target = static_cast<char*>(out) + j * size;
      if (bias != nullptr && dropout == nullptr) {
        each([&](int64_t i) { line[i] = alpha * sum[j + i] + bias[j + i]; });
      } else {
        each([&](int64_t i) { line[i] = alpha * sum[j + i]; });
        if (dropout != nullptr) drop_by(*keys, line, row, column + j, count, *dropout, line);
        if (bias != nullptr) each([&](int64_t i) { line[i] += bias[j + i]; });
      }
      if (residual != nullptr) {
        load(static_cast<const char*>(residual) + j * size, dtype, count, other);
        each([&](int64_t i) { line[i] += other[i]; });
      }
      if (accumulate) {
        load(target, dtype, count, other);
        each([&](int64_t i) { line[i] += other[i]; });
      }
      store(line, count, dtype, target);
    }
  }

  static Acc sum_of(Vector v) {
    Acc total[kLanes];
    *reinterpret_cast<Loose*>(total) = v;
    for (int64_t half = kLanes / 2; half > 0; half /= 2) {
      for (int64_t i = 0; i < half; ++i) total[i] += total[i + half];
    }
    return total[0];
  }

  // sum_of for each of kCount vectors, added in the same order.
  template <int kCount>
  static void sums_of(const Vector* vectors, Acc* to) {
    if constexpr (kCount > kLanes) {
      sums_of<kCount / 2>(vectors, to);
      sums_of<kCount / 2>(vectors + kCount / 2, to + kCount / 2);
    } else {
      constexpr std::make_integer_sequence<int, int(kLanes)> kSequence{};
      Vector v[kCount];
      for (int i = 0; i < kCount; ++i) v[i] = vectors[i];
      // Each round adds halves of two vectors and leaves both in one: a vector's number moves into a lane's.
      for (int half = kCount / 2; half > 0; half /= 2) {
        for (int i = 0; i < half; ++i) {
          v[i] = zip<0>(v[i], v[i + half], kSequence) + zip<int(kLanes) / 2>(v[i], v[i + half], kSequence);
        }
      }
      Acc line[kLanes];
      *reinterpret_cast<Loose*>(line) = v[0];
      for (int64_t half = kLanes / 2; half >= kCount; half /= 2) {
        for (int64_t i = 0; i < half; ++i) line[i] += line[i + half];
      }
      for (int i = 0; i < kCount; ++i) to[i] = line[i];
    }
  }

  // The sums are told one by one: loops over all of them leave them in memory.
  template <bool kBFloat16, int... kSum>
  static void dots_of(std::integer_sequence<int, kSum...>, const Acc* a, int64_t lda, const void* const* b, int64_t k,
                      Acc* c, int64_t ldc) {
    using Number = std::conditional_t<kBFloat16, uint16_t, Acc>;
    constexpr int kRows = sizeof...(kSum) / 4;
    Vector sum[] = {(static_cast<void>(kSum), Vector{})...};  // number 4 row + column
    int64_t j = 0;
    for (; j + kLanes <= k; j += kLanes) {
      Vector row[kRows], other[4];
      for (int i = 0; i < kRows; ++i) row[i] = at(a + i * lda + j);
      for (int i = 0; i < 4; ++i) {
        const Number* line = static_cast<const Number*>(b[i]) + j;
        if constexpr (kBFloat16) {
          alignas(64) Acc wide[kLanes];
          load(line, Dtype::kBFloat16, kLanes, wide);
          other[i] = at(wide);
        } else {
          other[i] = at(line);
        }
      }
      ((sum[kSum] += row[kSum / 4] * other[kSum % 4]), ...);
    }
    Acc totals[sizeof...(kSum)];
    sums_of<sizeof...(kSum)>(sum, totals);
    ((c[kSum / 4 * ldc + kSum % 4] = totals[kSum]), ...);
    for (; j < k; ++j) {
      for (int i = 0; i < 4; ++i) {
        Acc other;
        load(static_cast<const Number*>(b[i]) + j, kBFloat16 ? Dtype::kBFloat16 : kOwn, 1, &other);
        for (int row = 0; row < kRows; ++row) c[row * ldc + i] += a[row * lda + j] * other;
      }
    }
  }

  static void dots(int64_t rows, const Acc* a, int64_t lda, const void* const* b, Dtype dtype, int64_t k, Acc* c,
                   int64_t ldc) {
    const auto run = [&](auto sums) {
      if (dtype == Dtype::kBFloat16) return dots_of<true>(sums, a, lda, b, k, c, ldc);
      dots_of<false>(sums, a, lda, b, k, c, ldc);
    };
    if (rows == 1) return run(std::make_integer_sequence<int, 4>());
    if (rows == 2) return run(std::make_integer_sequence<int, 8>());
    run(std::make_integer_sequence<int, 16>());
  }

  static Acc dot(const Acc* a, const Acc* b, int64_t n) {
    Vector sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) sum[j] += at(a + i + j * kLanes) * at(b + i + j * kLanes);
    }
    for (int j = 0; i + kLanes <= n; i += kLanes, ++j) sum[j] += at(a + i) * at(b + i);
    Acc total = sum_of((sum[0] + sum[1]) + (sum[2] + sum[3]));
    for (; i < n; ++i) total += a[i] * b[i];
    return total;
  }

  static void axpy(int64_t n, Acc alpha, const Acc* x, Acc* y) {
    for (int64_t i = 0; i < n; ++i) y[i] += alpha * x[i];
  }

  static constexpr Isa<Acc> table(const char* name, plan::Processor processor) {
    constexpr int kStep = RP_ROW_STEP;
    return {name,
            processor,
            kStep,
            kLanes,
            {{micro<kStep, 1>, micro<kStep, 2>},
             {micro<2 * kStep, 1>, micro<2 * kStep, 2>},
             {micro<3 * kStep, 1>, micro<3 * kStep, 2>}},
            load,
            store,
            load_lines,
            lay_lines,
            turn,
            drop,
            finish,
            dots,
            dot,
            axpy,
            {}};
  }
};
