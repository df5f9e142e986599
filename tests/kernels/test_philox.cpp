#include <array>
#include <set>
#include <tuple>

#include "cpu/isa.h"
#include "kernels/device/philox.cuh"
#include "support.h"

namespace routed_peft::test {
namespace {

// The three vectors "philox4x32 7" of Random123, tests/kat_vectors (https://github.com/DEShawResearch/random123).
void known_answers() {
  struct Vector {
    std::array<uint32_t, 4> counter;
    std::array<uint32_t, 2> key;
    std::array<uint32_t, 4> expected;
  };
  constexpr uint32_t kOnes = 0xFFFFFFFFu;
  constexpr Vector kVectors[] = {
      {{0, 0, 0, 0}, {0, 0}, {0x5F6FB709u, 0x0D893F64u, 0x4F121F81u, 0x4F730A48u}},
      {{kOnes, kOnes, kOnes, kOnes}, {kOnes, kOnes}, {0x5207DDC2u, 0x45165E59u, 0x4D8EE751u, 0x8C52F662u}},
      {{0x243F6A88u, 0x85A308D3u, 0x13198A2Eu, 0x03707344u},
       {0xA4093822u, 0x299F31D0u},
       {0x4DFCCABAu, 0x190A87F0u, 0xC47362BAu, 0xB6B5242Au}},
  };
  for (const Vector& v : kVectors) {
    const uint64_t seed = uint64_t{v.key[1]} << 32 | v.key[0];
    const PhiloxWords words = philox(seed, v.counter[0], v.counter[1], v.counter[2], v.counter[3]);
    for (size_t i = 0; i < 4; ++i) CHECK(words.word[i] == v.expected[i], "word %zu is %08x", i, words.word[i]);
  }
}

void slot_map() {
  for (const int64_t block : {int64_t{0}, int64_t{1}, int64_t{5}, int64_t{1} << 26}) {
    std::set<std::tuple<uint32_t, uint32_t, uint32_t>> owners;
    for (int64_t in_block = 0; in_block < 64; ++in_block) {
      const DropoutSlot s = dropout_slot(64 * block + in_block);
      CHECK(s.counter2 / 4 == block && s.half < 2 && s.halfword < 8, "column %d of block %lld", int(in_block),
            (long long)block);
      owners.insert({s.counter2, s.half, s.halfword});
    }
    CHECK(owners.size() == 64, "block %lld has %zu owners", (long long)block, owners.size());
  }
  // Thread q of a quad holds these columns of a row, register by register; the PTX manual's layouts of mma.m16n8k16.
  for (int q = 0; q < 4; ++q) {
    for (int slot = 0; slot < 16; ++slot) {
      const int a_columns[] = {2 * q, 2 * q + 1, 2 * q + 8, 2 * q + 9};
      const int a_column = 16 * (slot / 4) + a_columns[slot % 4];  // A: four k16 blocks of four elements
      const int c_column = 8 * (slot / 2) + 2 * q + slot % 2;      // C: eight n8 tiles of two elements
      for (const int column : {a_column, c_column}) {
        const DropoutSlot s = dropout_slot(column);
        CHECK(s.counter2 == uint32_t(q) && 8 * s.half + s.halfword == uint32_t(slot), "column %d, thread %d", column,
              q);
      }
    }
  }
}

template <class Acc>
void drop_is_the_map() {
  constexpr int64_t kRows[] = {0, 1, 77, (int64_t{1} << 32) - 1, int64_t{1} << 32, (int64_t{5} << 32) + 3};
  constexpr int64_t kColumns[] = {0, 1, 7, 8, 31, 63, 64, 65, 200, 1023};
  constexpr int64_t kLengths[] = {0, 1, 2, 7, 15, 16, 17, 63, 64, 65, 129, 300};
  constexpr uint32_t kThresholds[] = {1, 6554, 32768, 65535, 65536};
  Random random(1);
  for (const int64_t row : kRows) {
    for (const int64_t column : kColumns) {
      for (const int64_t length : kLengths) {
        const Dropout dropout{random.bits(), kThresholds[random.below(5)], static_cast<uint32_t>(random.below(2))};
        std::vector<Acc> run(static_cast<size_t>(length));
        for (Acc& value : run) value = static_cast<Acc>(random.uniform());
        const std::vector<Acc> before = run;
        std::vector<Acc> other(run.size());  // apart, and in place
        cpu::isa<Acc>().drop(run.data(), row, column, length, dropout, other.data());
        cpu::isa<Acc>().drop(run.data(), row, column, length, dropout, run.data());
        CHECK(run == other, "apart and in place differ");
        for (int64_t i = 0; i < length; ++i) {
          const bool keeps = dropout_keeps(dropout.seed, dropout.stream, dropout.threshold, row, column + i);
          const Acc expected = keeps ? before[size_t(i)] * static_cast<Acc>(dropout.scale()) : Acc{0};
          CHECK(run[size_t(i)] == expected, "row %lld, column %lld + %lld", (long long)row, (long long)column,
                (long long)i);
        }
      }
    }
  }
}

template <class Acc>
void extremes() {
  std::vector<Acc> run(131, static_cast<Acc>(kNan));
  Dropout all{42, 65536, 0}, none{42, 0, 0};
  CHECK(all.scale() == 0 && none.scale() == 1, "scales of p = 1 and p = 0");
  cpu::isa<Acc>().drop(run.data(), 3, 5, 131, all, run.data());
  for (const Acc value : run) CHECK(value == 0, "p = 1 left %g", double(value));  // a product would have left NaN
  for (size_t i = 0; i < run.size(); ++i) run[i] = static_cast<Acc>(i) / 7;
  const std::vector<Acc> before = run;
  cpu::isa<Acc>().drop(run.data(), 3, 5, 131, none, run.data());
  CHECK(run == before, "p = 0 changed something");
}

std::vector<bool> mask(uint64_t seed, uint32_t stream, uint32_t threshold, int64_t first_row, int64_t rows,
                       int64_t cols) {
  std::vector<bool> keeps;
  std::vector<float> run(static_cast<size_t>(cols));
  for (int64_t row = first_row; row < first_row + rows; ++row) {
    std::fill(run.begin(), run.end(), 1.0f);
    cpu::isa<float>().drop(run.data(), row, 0, cols, {seed, threshold, stream}, run.data());
    for (const float value : run) keeps.push_back(value != 0);
  }
  return keeps;
}

void keep_rate() {
  constexpr int64_t kRows = 2048, kCols = 192;
  for (const double p : {0.05, 0.1, 0.5, 0.9}) {
    const uint32_t threshold = static_cast<uint32_t>(std::nearbyint(65536 * p));
    const double keep = 1 - threshold / 65536.0;
    const std::vector<bool> keeps = mask(7, 0, threshold, 0, kRows, kCols);
    std::vector<double> of_column(kCols), of_row(kRows);
    double total = 0;
    for (size_t i = 0; i < keeps.size(); ++i) {
      of_column[i % kCols] += keeps[i];
      of_row[i / kCols] += keeps[i];
      total += keeps[i];
    }
    const auto sigmas = [keep](double count, double n) {
      return std::abs(count - n * keep) / std::sqrt(n * keep * (1 - keep));
    };
    CHECK(sigmas(total, kRows * kCols) < 4, "p = %g: kept %g", p, total / (kRows * kCols));
    for (const double count : of_column) CHECK(sigmas(count, kRows) < 5, "p = %g: a column kept %g", p, count / kRows);
    for (const double count : of_row) CHECK(sigmas(count, kCols) < 6, "p = %g: a row kept %g", p, count / kCols);
  }
}

void uncorrelated() {
  constexpr int64_t kRows = 512, kCols = 256;
  constexpr uint32_t kHalf = 32768;
  const std::vector<bool> base = mask(11, 0, kHalf, 0, kRows, kCols);
  const auto correlation = [&](const std::vector<bool>& other, size_t shift) {
    double agree = 0;
    const size_t n = base.size() - shift;
    for (size_t i = 0; i < n; ++i) agree += base[i] == other[i + shift] ? 1 : -1;
    return std::abs(agree) / std::sqrt(double(n));  // in standard deviations
  };
  CHECK(correlation(mask(11, 1, kHalf, 0, kRows, kCols), 0) < 4.5, "streams");
  CHECK(correlation(mask(12, 0, kHalf, 0, kRows, kCols), 0) < 4.5, "seeds that differ in a low bit");
  CHECK(correlation(mask(11 + (uint64_t{1} << 32), 0, kHalf, 0, kRows, kCols), 0) < 4.5,
        "seeds that differ in a high bit");
  CHECK(correlation(mask(11, 0, kHalf, kRows, kRows, kCols), 0) < 4.5, "far rows");
  CHECK(correlation(mask(11, 0, kHalf, int64_t{1} << 32, kRows, kCols), 0) < 4.5, "rows that differ in the high word");
  for (const size_t shift : {1, 2, 8, 16, 32, 64, 128})
    CHECK(correlation(base, shift) < 4.5, "columns %zu apart", shift);
  for (const size_t rows : {1, 2, 16}) CHECK(correlation(base, rows * kCols) < 4.5, "rows %zu apart", rows);
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft::test;
  known_answers();
  slot_map();
  drop_is_the_map<float>();
  drop_is_the_map<double>();
  extremes<float>();
  extremes<double>();
  keep_rate();
  uncorrelated();
}
