// The loops of isa.h, included by isa.cpp once for each instruction set inside a namespace of its own, with
// RP_VECTOR_BYTES and RP_MICRO_ROWS set. Vectors are the compiler's own extension, so that one text serves them all.

template <class Acc>
struct Loops {
  static constexpr int64_t kLanes = RP_VECTOR_BYTES / sizeof(Acc);
  static constexpr int64_t kRows = RP_MICRO_ROWS, kColumns = 2 * kLanes;
  typedef Acc Vector __attribute__((vector_size(RP_VECTOR_BYTES)));
  typedef Acc Loose __attribute__((vector_size(RP_VECTOR_BYTES), aligned(alignof(Acc)), may_alias));

  static void micro(int64_t depth, const Acc* a, int64_t a_row, int64_t a_col, const Acc* panel, Acc* c, int64_t ldc) {
    Vector sum[kRows][2] = {};  // from zero, not from c: short chains of additions round less than one long one
    for (int64_t k = 0; k < depth; ++k) {
      const Vector b0 = *reinterpret_cast<const Vector*>(panel + k * kColumns);
      const Vector b1 = *reinterpret_cast<const Vector*>(panel + k * kColumns + kLanes);
      for (int i = 0; i < kRows; ++i) {
        const Acc value = a[i * a_row + k * a_col];
        sum[i][0] += value * b0;
        sum[i][1] += value * b1;
      }
    }
    for (int i = 0; i < kRows; ++i) {
      *reinterpret_cast<Loose*>(c + i * ldc) += sum[i][0];
      *reinterpret_cast<Loose*>(c + i * ldc + kLanes) += sum[i][1];
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

  // The 64 halfwords of one block of columns: lanes are (half, q), and word w of lane (half, q) holds the halfwords of
  // the column pair 16·half + 4·w + q of the block (device/philox.cuh, turned around).
  static void halfwords(const Dropout& dropout, int64_t row, int64_t block, uint16_t* out) {
    constexpr int kCalls = 8;
    uint32_t c0[kCalls], c1[kCalls], c2[kCalls], c3[kCalls];
    for (int lane = 0; lane < kCalls; ++lane) {
      c0[lane] = static_cast<uint32_t>(row);
      c1[lane] = static_cast<uint32_t>(static_cast<uint64_t>(row) >> 32);
      c2[lane] = static_cast<uint32_t>(4 * block) + lane % 4;
      c3[lane] = 2 * dropout.stream + lane / 4;
    }
    uint32_t k0 = static_cast<uint32_t>(dropout.seed), k1 = static_cast<uint32_t>(dropout.seed >> 32);
    for (int round = 0; round < kPhiloxRounds; ++round) {
      for (int lane = 0; lane < kCalls; ++lane) {
        const uint64_t p0 = uint64_t{0xD2511F53u} * c0[lane], p1 = uint64_t{0xCD9E8D57u} * c2[lane];
        c0[lane] = static_cast<uint32_t>(p1 >> 32) ^ c1[lane] ^ k0;
        c2[lane] = static_cast<uint32_t>(p0 >> 32) ^ c3[lane] ^ k1;
        c1[lane] = static_cast<uint32_t>(p1);
        c3[lane] = static_cast<uint32_t>(p0);
      }
      k0 += 0x9E3779B9u;
      k1 += 0xBB67AE85u;
    }
    const uint32_t* words[4] = {c0, c1, c2, c3};
    for (int half = 0; half < 2; ++half) {
      for (int word = 0; word < 4; ++word) {
        for (int q = 0; q < 4; ++q) {
          const uint32_t pair = words[word][4 * half + q];
          const int column = 2 * (16 * half + 4 * word + q);
          out[column] = static_cast<uint16_t>(pair);
          out[column + 1] = static_cast<uint16_t>(pair >> 16);
        }
      }
    }
  }

  static void drop(Acc* run, int64_t row, int64_t column, int64_t n, const Dropout& dropout) {
    const Acc scale = static_cast<Acc>(dropout.scale());
    uint16_t random[64];
    for (int64_t done = 0; done < n;) {
      const int64_t first = (column + done) % 64;
      const int64_t count = n - done < 64 - first ? n - done : 64 - first;
      halfwords(dropout, row, (column + done) / 64, random);
      for (int64_t i = 0; i < count; ++i) {
        run[done + i] = random[first + i] >= dropout.threshold ? run[done + i] * scale : Acc{0};
      }
      done += count;
    }
  }

  static Acc dot(const Acc* a, const Acc* b, int64_t n) {
    Vector sum[4] = {};
    int64_t i = 0;
    for (; i + 4 * kLanes <= n; i += 4 * kLanes) {
      for (int j = 0; j < 4; ++j) {
        sum[j] +=
            *reinterpret_cast<const Loose*>(a + i + j * kLanes) * *reinterpret_cast<const Loose*>(b + i + j * kLanes);
      }
    }
    for (int j = 0; i + kLanes <= n; i += kLanes, ++j) {
      sum[j] += *reinterpret_cast<const Loose*>(a + i) * *reinterpret_cast<const Loose*>(b + i);
    }
    const Vector all = (sum[0] + sum[1]) + (sum[2] + sum[3]);
    Acc total = 0;
    for (int64_t lane = 0; lane < kLanes; ++lane) total += all[lane];
    for (; i < n; ++i) total += a[i] * b[i];
    return total;
  }

  static void axpy(int64_t n, Acc alpha, const Acc* x, Acc* y) {
    for (int64_t i = 0; i < n; ++i) y[i] += alpha * x[i];
  }

  static constexpr Isa<Acc> table(const char* name, plan::Processor processor) {
    return {name, processor, kRows, kColumns, micro, load, store, drop, dot, axpy};
  }
};
