#include "check.h"
#include "kernels/plan.h"

namespace routed_peft::test {
namespace {

using plan::GramOrder;

constexpr Routing kRoutings[] = {Routing::kNone, Routing::kAdd,      Routing::kMul,       Routing::kExpand,
                                 Routing::kGram, Routing::kGramRelu, Routing::kCrossGram, Routing::kOnes};

plan::GramShape shape(double n, double m, double w, double samples = 8) {
  return {samples, samples, samples * n, samples * m, w};
}

// Flops alone put the threshold at R = 2NM/(N+M); the bytes may move it by less than a factor of 4.
void thresholds() {
  for (const double n : {16, 50, 197, 1024, 4096}) {
    for (const double m : {16, 50, 197, 576, 4096}) {
      const double threshold = 2 * n * m / (n + m);
      CHECK(plan::gram_order(shape(n, m, threshold / 4)) == GramOrder::kMatrix, "n %g, m %g", n, m);
      CHECK(plan::gram_order(shape(n, m, threshold * 4)) == GramOrder::kTokens, "n %g, m %g", n, m);
    }
  }
}

void examples() {
  CHECK(plan::gram_order(shape(1024, 576, 64, 16)) == GramOrder::kMatrix, "long inputs");
  CHECK(plan::gram_order(shape(32, 197, 64, 40)) == GramOrder::kTokens, "short inputs");
  CHECK(plan::gram_order(shape(25, 197, 256, 512)) == GramOrder::kTokens, "134 MB of S beside 39 MB of X");
  // The cost model counts what it says: 11.5 times fewer flops for the first example.
  const plan::GramShape s = shape(1e6 * 1024, 1e6 * 576, 1e6 * 64);  // so large that bytes do not matter
  const double ratio = plan::gram_cost(s, GramOrder::kTokens) / plan::gram_cost(s, GramOrder::kMatrix);
  CHECK(ratio > 11.45 && ratio < 11.55, "ratio %g", ratio);
  // Both sides of the threshold, and on it, in the whole numbers that are compared.
  CHECK(plan::gram_order(shape(8, 64, 10, 1)) == GramOrder::kMatrix, "1040 and 2048");
  CHECK(plan::gram_order(shape(8, 64, 19, 1)) == GramOrder::kMatrix, "1976 and 2048");
  CHECK(plan::gram_order(shape(8, 64, 20, 1)) == GramOrder::kTokens, "2080 and 2048");
  CHECK(plan::gram_order(shape(32, 64, 40, 1)) == GramOrder::kMatrix, "5120 and 5120");
}

void bytes_and_sharing() {
  // Just below the flop threshold of 100 the traffic of S decides.
  CHECK(plan::gram_order(shape(100, 100, 95)) == GramOrder::kTokens, "S is written and read for nothing");
  // Samples that share a condition share its S, and read V again each.
  const auto share = [](plan::GramShape s) {
    s.tokens /= s.conditions;
    s.conditions = 1;
    return s;
  };
  CHECK(plan::gram_order(share(shape(100, 100, 95))) == GramOrder::kMatrix, "one S for 8 samples");
  for (const double w : {4, 16, 40, 64, 90, 120, 200}) {
    for (const double n : {1, 30, 300}) {
      const plan::GramShape own = shape(n, 64, w);
      if (plan::gram_order(own) == GramOrder::kMatrix)
        CHECK(plan::gram_order(share(own)) == GramOrder::kMatrix, "w %g", w);
    }
  }
  CHECK(plan::gram_order(plan::GramShape{0, 0, 0, 0, 8}) == GramOrder::kMatrix, "nothing to do");
}

void orders_of_problems() {
  Problem p;
  p.inputs = {1, 8, nullptr};
  p.conditions = {1, 64, nullptr};
  p.groups = 3;
  for (const int64_t group_width : {19, 20}) {
    p.width = 3 * group_width;
    for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
      p.dtype = dtype;
      p.source = Source::kTokens;
      const GramOrder wanted = group_width == 19 ? GramOrder::kMatrix : GramOrder::kTokens;
      CHECK(plan::gram_order(p) == wanted, "neither dtype nor groups matter, width %d", int(group_width));
      for (const Source source : {Source::kInSequence, Source::kState}) {
        p.source = source;
        CHECK(plan::gram_order(p) == GramOrder::kMatrix, "source %d", int(source));
      }
    }
  }
}

void state_kinds() {
  using enum StateKind;
  struct Row {
    Routing routing;
    StateKind unpooled;  // with pool none and more than one token
  };
  constexpr Row kRows[] = {{Routing::kNone, kNone},        {Routing::kAdd, kTokens},  {Routing::kMul, kTokens},
                           {Routing::kExpand, kTokens},    {Routing::kGram, kMatrix}, {Routing::kGramRelu, kMatrix},
                           {Routing::kCrossGram, kTokens}, {Routing::kOnes, kVector}};
  for (const Row& row : kRows) {
    const StateKind pooled = row.routing == Routing::kNone ? kNone : kVector;
    CHECK(plan::state_kind(row.routing, Pool::kNone, false) == row.unpooled, "routing %d", int(row.routing));
    CHECK(plan::state_kind(row.routing, Pool::kNone, true) == pooled, "routing %d", int(row.routing));
    for (const bool single : {false, true}) {
      CHECK(plan::state_kind(row.routing, Pool::kMean, single) == pooled, "routing %d", int(row.routing));
      CHECK(plan::state_kind(row.routing, Pool::kFirst, single) == pooled, "routing %d", int(row.routing));
    }
  }
}

void rank_one_table() {
  for (const Routing routing : kRoutings) {
    const bool family = routing == Routing::kExpand || routing == Routing::kGram || routing == Routing::kOnes;
    for (int kind = 0; kind < 4; ++kind) {
      for (int activation = 0; activation < 5; ++activation) {
        for (const bool bias : {false, true}) {
          const bool expected = family && kind == static_cast<int>(StateKind::kVector) && activation == 0 && !bias;
          CHECK(plan::rank_one(routing, static_cast<StateKind>(kind), static_cast<Activation>(activation), bias) ==
                    expected,
                "routing %d, kind %d, activation %d, bias %d", int(routing), kind, activation, bias);
        }
      }
    }
  }
}

void rank_one_of_a_bank() {
  Problem p;
  p.routing = Routing::kGram;
  p.kind = StateKind::kVector;
  for (const int64_t samples : {0, 1, 4}) {
    for (const int64_t rows : {int64_t{0}, samples, 3 * samples}) {
      p.inputs = {samples, rows, nullptr};
      for (const int64_t conditions : {samples, rows, rows + 1}) {
        p.conditions = {conditions, conditions, nullptr};
        CHECK(plan::rank_one(p) == (conditions == samples || conditions <= rows), "%d samples, %d rows, %d conditions",
              int(samples), int(rows), int(conditions));
      }
    }
  }
}

// A constant expression of two numbers: nothing about the machine can get in.
static_assert(plan::reduction_splits(1, 1000) == 16);
static_assert(plan::reduction_splits(1, 7) == 3);
static_assert(plan::reduction_splits(0, 0) == 1);

void splits() {
  for (int64_t conditions = 0; conditions <= 40; ++conditions) {
    int64_t before = 1;
    for (int64_t segments = 0; segments <= 400; ++segments) {
      const int64_t n = plan::reduction_splits(conditions, segments);
      CHECK(n >= 1 && n <= 16, "%d conditions, %d segments: %d", int(conditions), int(segments), int(n));
      CHECK(n == 1 || n * conditions <= 16, "%d conditions, %d segments: %d", int(conditions), int(segments), int(n));
      CHECK(n == 1 || 2 * n * conditions <= segments, "less than two segments a part: %d, %d", int(conditions),
            int(segments));
      CHECK(n >= before, "fewer parts for more segments: %d, %d", int(conditions), int(segments));
      before = n;
    }
  }
}

void library() {
  constexpr plan::Processor kNarrow{}, kWide{true}, kHalf{true, true}, kTiles{true, true, false, true};
  constexpr plan::Processor kIntel{true, true, false, true, true};
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64}) {
    CHECK(!plan::library_gemm(dtype, kWide, 4096, 4096, 4096), "ours with wide vectors");
    CHECK(!plan::library_gemm(dtype, kHalf, 4096, 4096, 4096), "ours with wide vectors");
  }
  CHECK(!plan::library_gemm(Dtype::kBFloat16, kNarrow, 4096, 4096, 4096), "the library would emulate it");
  CHECK(!plan::library_gemm(Dtype::kBFloat16, kWide, 4096, 4096, 4096), "the library would emulate it");
  for (const plan::Processor processor : {kNarrow, kWide, kHalf, kTiles, kIntel}) {
    CHECK(!plan::library_gemm(Dtype::kFloat16, processor, 4096, 4096, 4096), "float16 stays here");
  }
  struct Limit {
    Dtype dtype;
    plan::Processor processor;
    int64_t k;  // of 200 × 200 products, from which on they go
  };
  for (const auto& [dtype, processor, k] : {Limit{Dtype::kFloat32, kNarrow, 200},
                                            {Dtype::kFloat64, kNarrow, 200},
                                            {Dtype::kFloat32, kIntel, 25},
                                            {Dtype::kFloat64, kIntel, 25},
                                            {Dtype::kBFloat16, kHalf, 400},
                                            {Dtype::kBFloat16, kTiles, 8192},
                                            {Dtype::kBFloat16, kIntel, 8192}}) {
    const auto goes = [dtype = dtype, processor = processor](int64_t m, int64_t n, int64_t k) {
      return plan::library_gemm(dtype, processor, m, n, k);
    };
    CHECK(goes(4096, 192, 1024), "a large product");
    CHECK(goes(200, 200, k) && !goes(200, 200, k - 1), "the limit");
    const int64_t thin = processor.library_leads && dtype == Dtype::kFloat32 ? 64 : 7;
    CHECK(!goes(1 << 20, thin, 768) && goes(1 << 20, thin + 1, 768), "thin");
    CHECK(!goes(7, 768, 1 << 20) && !goes(768, 1 << 20, 7), "thin");
    CHECK(!goes(0, 64, 64) && !goes(64, 64, 0), "empty");
    CHECK(goes(1 << 24, 1 << 24, 1 << 24), "more than 2^63 products");
  }
  // T, G and dB have r columns; up and dX are r deep; dA has r rows.
  for (const int64_t r : {16, 32, 33, 64, 65, 128, 129}) {
    const bool goes = plan::library_gemm(Dtype::kFloat32, kIntel, 2048, 768, r);
    CHECK(goes == (r <= 32 || r > 64), "a product %d deep", int(r));
    CHECK(plan::library_gemm(Dtype::kFloat32, kIntel, 255, 4096, r), "few rows, %d deep", int(r));
    CHECK(plan::library_gemm(Dtype::kFloat32, kIntel, 256, 4096, r) == goes, "more rows, %d deep", int(r));
    const bool with_bias = plan::library_gemm(Dtype::kFloat32, kIntel, 2048, 768, r, true);
    CHECK(with_bias == (r <= 32 || r > 128), "%d deep with a bias", int(r));
    CHECK(plan::library_gemm(Dtype::kFloat32, kIntel, 2048, r, 768) == (r > 64), "%d columns", int(r));
    CHECK(plan::library_gemm(Dtype::kFloat32, kIntel, 255, r, 4096), "%d columns of few rows", int(r));
    CHECK(plan::library_gemm(Dtype::kFloat32, kIntel, 256, r, 4096) == (r > 64), "%d columns of more rows", int(r));
    CHECK(plan::library_gemm(Dtype::kFloat32, kIntel, r, 768, 2048), "a gradient of %d rows", int(r));
    CHECK(plan::library_gemm(Dtype::kFloat64, kIntel, 2048, r, 768), "%d columns of float64", int(r));
  }
  CHECK(plan::library_gemm(Dtype::kFloat32, kIntel, 2048, 96, 128, true), "down with a bias");
  for (const plan::Processor processor : {kTiles, kIntel}) {
    const auto goes = [processor = processor](int64_t m, int64_t n, int64_t k) {
      return plan::library_gemm(Dtype::kBFloat16, processor, m, n, k);
    };
    for (const auto& [rows, d] : {std::pair{2048, 4096}, {8191, 1024}, {4096, 2048}}) {
      for (const int64_t r : {8, 64, 128}) {
        CHECK(!goes(rows, r, d) && !goes(rows, d, r) && !goes(r, d, rows), "tiles of a matrix that is near");
      }
      CHECK(goes(rows, 129, d) && goes(rows, d, 129), "a high rank");
    }
    for (const auto& [rows, d] : {std::pair{8192, 768}, {512, 11008}, {2048, 5504}}) {
      CHECK(goes(rows, 16, d) && goes(rows, d, 16) && goes(16, d, rows), "tiles of a matrix that is far");
    }
    CHECK(goes(8192, 916, 8) && !goes(8192, 915, 8), "a small product of long rows");
    CHECK(goes(2500, 4001, 16) && !goes(2500, 4000, 16), "as much as is near");
    CHECK(!plan::library_gemm(Dtype::kBFloat16, processor, 8192, 768, 16, true), "a bias that ours takes along");
  }
}

// float32 by tiles of its parts: products of many rows, and large ones that no library takes.
void split() {
  constexpr plan::Processor kHalf{true, true}, kTiles{true, true, false, true}, kIntel{true, true, false, true, true};
  CHECK(!plan::split(kHalf, 4096, 4096, 4096) && !plan::split(kHalf, 4096, 4096, 4096, true), "no tiles");
  for (const plan::Processor processor : {kTiles, kIntel}) {
    const auto splits = [processor = processor](int64_t m, int64_t n, int64_t k) {
      const bool alone = plan::split(processor, m, n, k, true);
      CHECK(alone || !plan::split(processor, m, n, k), "more where no library is: %d %d %d", int(m), int(n), int(k));
      return std::pair{plan::split(processor, m, n, k), alone};
    };
    constexpr std::pair kBoth{true, true}, kAlone{false, true}, kNeither{false, false};
    for (const int64_t r : {64, 128, 256}) {
      CHECK(splits(1024, r, 768) == kBoth && splits(1024, 768, r) == kBoth, "many rows, rank %d", int(r));
      CHECK(splits(1023, r, 768) == kAlone && splits(1023, 768, r) == kAlone, "fewer rows, rank %d", int(r));
      CHECK(splits(r, 768, 2048) == kAlone, "a gradient of %d rows", int(r));
    }
    CHECK(splits(1024, 64, 64) == kBoth && splits(1024, 96, 96) == kBoth && splits(1023, 96, 96) == kNeither,
          "small ones of many rows");
    CHECK(splits(4096, 63, 4096) == kNeither && splits(63, 4096, 4096) == kNeither, "a low rank");
    CHECK(splits(4096, 4096, 63) == kAlone && splits(4096, 4096, 31) == kNeither, "a shallow product");
    CHECK(splits(250, 1000, 64) == kAlone && splits(249, 1000, 64) == kNeither, "a small product");
    CHECK(splits(1 << 24, 1 << 24, 1 << 24) == kBoth, "more than 2^63 products");
  }
}

void base() {
  constexpr plan::Processor kNarrow{}, kOrdinary{true, true}, kFast{true, true, true}, kTiles{true, true, false, true};
  constexpr plan::Processor kIntel{true, true, false, true, true};
  for (const Dtype dtype : {Dtype::kFloat32, Dtype::kFloat64, Dtype::kBFloat16, Dtype::kFloat16}) {
    const bool half = dtype == Dtype::kBFloat16 || dtype == Dtype::kFloat16;
    for (const bool lines : {false, true}) {
      const auto library = [&](plan::Processor processor, int64_t rows, int64_t n = 4096) {
        return plan::library_base(dtype, processor, rows, n, 4096, lines);
      };
      CHECK(library(kNarrow, 4096) && library(kOrdinary, 4096), "a vendor's product is the fastest");
      CHECK(library(kFast, 4096) == half, "ours is faster but for pairs of bfloat16");
      CHECK(library(kNarrow, 1), "few rows without wide vectors");
      CHECK(library(kOrdinary, 4) == (dtype == Dtype::kFloat16 || (half && !lines)), "few rows");
      CHECK(library(kOrdinary, 5) == half, "more rows");
      CHECK(library(kFast, 32, 512) == (dtype == Dtype::kFloat16), "a weight that stays near");
      CHECK(library(kFast, 8, 1024) == (dtype == Dtype::kFloat16), "a larger one, few rows");
      CHECK(library(kFast, 32, 513) == half && library(kFast, 33, 512) == half, "beyond that");
      if (dtype == Dtype::kBFloat16) {
        CHECK(library(kTiles, 128) == !lines && library(kTiles, 129),
              "few rows of a weight that is multiplied as it lies");
        CHECK(!library(kTiles, 32, 1024) && library(kTiles, 33, 1024) == !lines, "a near weight, few rows");
        CHECK(!library(kTiles, 16) && library(kTiles, 17) == !lines, "a large one, very few");
        CHECK(!library(kTiles, 1024, 256) && library(kTiles, 1025, 256) && library(kTiles, 1024, 257), "more rows");
      } else if (!half) {
        CHECK(!library(kOrdinary, 32, 256) && library(kOrdinary, 33, 256) == lines, "few rows of a near weight");
        CHECK(library(kOrdinary, 49, 256), "more");
        CHECK(!library(kIntel, 1, 128) && library(kIntel, 1, 129) == !lines, "one row");
        CHECK(!library(kIntel, 2) && library(kIntel, 48) == lines && library(kIntel, 49), "a weight read as it lies");
        CHECK(!library(kFast, 1, 1024) && library(kFast, 1, 1025) == !lines, "one row where ours is fast");
      }
      CHECK(library(kFast, 2) == (dtype == Dtype::kFloat16 || (half && !lines)), "a large one, two rows");
    }
  }
  CHECK(plan::by_lines(false, 16, 16, 1024) && !plan::by_lines(false, 17, 16, 2048), "rows");
  CHECK(plan::by_lines(true, 2, 1024, 1024) && !plan::by_lines(true, 3, 1024, 1024), "rows of tiles");
  CHECK(plan::by_lines(true, 4, 256, 128) && !plan::by_lines(true, 4, 257, 128), "of a small factor");
  CHECK(!plan::by_lines(true, 5, 16, 1024), "never more");
  for (const bool tiles : {false, true}) {
    const int64_t least = tiles ? 8 : 16;
    CHECK(plan::by_lines(tiles, 2, 1024, 2 * least) && !plan::by_lines(tiles, 2, 1024, 2 * least - 1), "short lines");
    CHECK(!plan::by_lines(tiles, 1, 1, 16383), "a small factor");
  }
  CHECK(plan::by_lines(false, 5, 64, 320) && !plan::by_lines(false, 5, 64, 319), "short lines of more rows");
}

void kernels() {
  for (int64_t width = 1; width <= 300; ++width) {
    const int64_t padded = plan::padded_width(width);
    CHECK(width > 256 ? padded == 0 : padded >= width && (padded == 16 || padded < 2 * width), "width %d", int(width));
  }
  for (const int64_t d : {1, 63, 64, 65, 128, 768, 1000, 4096}) {
    for (const int64_t rows : {0, 1, 64, 65, 800, 2000, 8192, 100000}) {
      const int64_t depth = plan::down_split_depth(rows, d), blocks = (rows + 63) / 64, parts = (d + depth - 1) / depth;
      // dropout draws 64 columns together; below that, a part of 128 columns and no more blocks than wanted
      CHECK(depth % 64 == 0 && parts >= 1 && (parts == 1 || depth >= 128), "%d rows, d %d", int(rows), int(d));
      CHECK(parts == 1 || parts * blocks <= plan::kWantedBlocks, "%d rows, d %d", int(rows), int(d));
    }
  }
  CHECK(plan::down_split_depth(800, 768) == 128 && plan::down_split_depth(8192, 4096) == 4096, "few and many rows");
  CHECK(plan::down_split_depth(1, 4096) == 512 && plan::down_split_depth(1, 0) == 64, "one token, and no columns");
  for (const int64_t samples : {1, 2, 16, 500}) {
    for (const int64_t length : {0, 1, 63, 197, 576, 5000}) {
      for (const int64_t width : {3, 64, 65, 256}) {
        const int64_t splits = plan::gram_splits(samples, 1, width, samples * length);
        CHECK(splits >= 1 && splits <= 16 && (splits == 1 || length / splits >= 64), "%d samples of %d rows",
              int(samples), int(length));
      }
    }
  }
  CHECK(plan::gram_splits(0, 1, 16, 0) == 1 && plan::gram_splits(1, 1, 64, 576) == 9, "none, and one");
  for (const int64_t stage : {11520, 18432, 27648, 46080}) {
    for (const int64_t shared : {99 << 10, 163 << 10, 227 << 10}) {
      for (const int64_t blocks : {1, 132, 133, 1000}) {
        const int stages = plan::ring_stages(blocks, 132, true, shared, stage);
        CHECK(stages >= 2 && stages <= 8 && stages * stage <= shared, "%d stages of %d bytes", stages, int(stage));
        CHECK(blocks <= 132 || (shared - 1024) / 2 / stage < 3 || 2 * stages * stage <= shared - 1024,
              "two blocks, %d stages", stages);
      }
    }
  }
  CHECK(plan::ring_stages(128, 132, true, 227 << 10, 18432) == 8 &&
            plan::ring_stages(256, 132, true, 227 << 10, 18432) == 6 &&
            plan::ring_stages(256, 132, false, 227 << 10, 27648) == 8,
        "of H200");
}

void parameters() {
  for (const uint32_t k : {0u, 1u, 6554u, 32768u, 65535u}) {
    const Dropout dropout{0, k, 0};
    CHECK(dropout.scale() * (65536 - k) == 65536, "threshold %u", k);
  }
  const int64_t offsets[] = {0, 3, 3, 8};
  const Sequences even{4, 12, nullptr}, varlen{3, 8, offsets}, none{0, 0, nullptr};
  CHECK(even.length() == 3 && even.begin(2) == 6 && even.end(3) == 12, "even lengths");
  CHECK(varlen.begin(1) == 3 && varlen.end(1) == 3 && varlen.end(2) == 8, "offsets");
  CHECK(none.length() == 0, "no samples");
  float numbers[24];
  const Matrix m = dense(numbers, Dtype::kFloat32, 4, 6);
  CHECK(m.at(2, 3) == numbers + 15 && m.transposed().at(3, 2) == numbers + 15, "strides");
  CHECK(m.block(1, 2, 2, 3).at(1, 1) == numbers + 15 && !Matrix{}, "blocks, and no matrix at all");
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  using namespace routed_peft::test;
  thresholds();
  examples();
  bytes_and_sharing();
  orders_of_problems();
  state_kinds();
  rank_one_table();
  rank_one_of_a_bank();
  splits();
  library();
  split();
  base();
  kernels();
  parameters();
}
