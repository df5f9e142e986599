// The emulator: correct kernels agree in every mode, and every planted bug is caught in at least one.
#include <algorithm>
#include <cmath>
#include <string>
#include <thread>
#include <vector>

#include "check.h"
#include "kernels/device/numeric.cuh"
#include "modes.h"

namespace routed_peft::test {
namespace {

constexpr int kThreads = 128;

std::vector<float> numbers(size_t n) {
  std::vector<float> x(n);
  for (size_t i = 0; i < n; ++i) x[i] = static_cast<float>(i * 37 % 101) - 50;
  return x;
}

// ---- block barriers and dynamic shared memory: each thread adds up what its mirror image wrote, four times

enum class Bug {
  kNone,
  kNoBarrier,
  kNoTrailingBarrier,
  kDivergent,
  kTwoPlaces,
  kPastEnd,
  kBeforeBegin,
  kReadPastEnd,
  kGlobal,
  kTrap
};

struct MirrorParams {
  const float* x;  // [4, kThreads]
  float* out;      // [blocks, kThreads]
  Bug bug;
};

__global__ void mirror_kernel(const MirrorParams p) {
  RP_DYNAMIC_SMEM(smem);
  float* const s = reinterpret_cast<float*>(smem);
  const int i = static_cast<int>(threadIdx.x);
  float sum = 0;
  for (int step = 0; step < 4; ++step) {
    s[i] = p.x[step * kThreads + i];
    if (p.bug == Bug::kDivergent ? i != 5 : p.bug == Bug::kTwoPlaces ? i < 32 : p.bug != Bug::kNoBarrier) {
      __syncthreads();
    } else if (p.bug == Bug::kTwoPlaces) {
      __syncthreads();
    }
    sum += s[kThreads - 1 - i];
    if (p.bug != Bug::kNoTrailingBarrier) __syncthreads();
  }
  if (p.bug == Bug::kPastEnd && i == 7) s[kThreads] = 1;
  if (p.bug == Bug::kBeforeBegin && i == 7) s[-1] = 1;
  if (p.bug == Bug::kReadPastEnd) sum = s[kThreads + i % 8];
  if (p.bug == Bug::kGlobal && i == 7) sum += p.x[4 * kThreads];
  if (p.bug == Bug::kTrap && i == 7) __trap();
  p.out[blockIdx.x * kThreads + threadIdx.x] = sum;
}

void test_block() {
  const std::vector<float> x = numbers(4 * kThreads);
  std::vector<float> expected(3 * kThreads);
  for (size_t i = 0; i < expected.size(); ++i) {
    for (size_t step = 0; step < 4; ++step) expected[i] += x[step * kThreads + kThreads - 1 - i % kThreads];
  }
  const auto run = [&](Bug bug) {
    return [&x, bug](float* out) {
      return launch<mirror_kernel>(dim3(3), dim3(kThreads), kThreads * sizeof(float), nullptr,
                                   MirrorParams{x.data(), out, bug});
    };
  };
  expect_right(expected, run(Bug::kNone));
  expect_wrong(expected, run(Bug::kNoBarrier));
  expect_wrong(expected, run(Bug::kNoTrailingBarrier), kAll);
  expect_error("different barriers: __syncthreads at", run(Bug::kDivergent));
  expect_error("different barriers: __syncthreads at", run(Bug::kTwoPlaces));
  expect_out_of_bounds("past the end of the dynamic shared memory (512 bytes)", run(Bug::kPastEnd));
  expect_out_of_bounds("before the dynamic shared memory", run(Bug::kBeforeBegin));
  if (RP_EMULATOR_ASAN) {
    expect_out_of_bounds("shared", run(Bug::kReadPastEnd));
    expect_out_of_bounds("global", run(Bug::kGlobal));
  } else {
    for (const Outcome& o : in_every_mode(expected.size(), run(Bug::kReadPastEnd))) {
      CHECK(std::isnan(o.out[0]) && std::isnan(o.out[7]), "%s: read %g past the end", o.mode.c_str(), o.out[0]);
    }
  }
  expect_error("block (0, 0, 0): thread (7, 0, 0): __trap", [&](float* out) {
    return launch<mirror_kernel>(dim3(1), dim3(kThreads), kThreads * sizeof(float), nullptr,
                                 MirrorParams{x.data(), out, Bug::kTrap});
  });
  expect_right(expected, run(Bug::kNone));  // errors leave nothing behind
}

// ---- schedules: in which order threads get to run

struct OrderParams {
  int* next;   // [1]
  float* out;  // [blocks, threads]
};

__global__ void order_kernel(const OrderParams p) {
  p.out[blockIdx.x * blockDim.x + threadIdx.x] = static_cast<float>(atomicAdd(p.next, 1));
}

void test_schedules() {
  constexpr size_t kBoth = 2 * kThreads;
  std::vector<float> forward(kBoth), reverse(kBoth);
  for (size_t i = 0; i < kBoth; ++i) forward[i] = static_cast<float>(i), reverse[i] = static_cast<float>(kBoth - 1 - i);
  std::vector<std::vector<float>> orders;
  for (const char* mode :
       {"", "schedule=reverse", "schedule=shuffled", "schedule=shuffled,seed=1", "schedule=shuffled"}) {
    emulator::set_options(emulator::parse_options(mode));
    int next = 0;
    orders.emplace_back(kBoth);
    launch<order_kernel>(dim3(2), dim3(kThreads), 0, nullptr, OrderParams{&next, orders.back().data()});
  }
  emulator::set_options({});
  CHECK(orders[0] == forward && orders[1] == reverse, "forward or reverse");
  CHECK(orders[2] != forward && orders[2] != reverse && orders[2] != orders[3], "shuffled");
  CHECK(orders[4] == orders[2], "the same seed, another order");
  std::sort(orders[2].begin(), orders[2].end());
  CHECK(orders[2] == forward, "not every thread ran once");
}

// ---- what a block finds in shared memory, and a barrier that only half of its threads live to see

struct FreshParams {
  float* out;  // [blocks, 3, 64]
};

__global__ void fresh_kernel(const FreshParams p) {
  RP_DYNAMIC_SMEM(smem);
  RP_SHARED(float[64], variable);
  float* const s = reinterpret_cast<float*>(smem);
  const unsigned i = threadIdx.x;
  if (i >= 64) return;
  float* const out = p.out + blockIdx.x * 192 + i;
  out[0] = std::isnan(s[i]);
  out[64] = std::isnan(variable[i]);
  s[i] = variable[i] = static_cast<float>(i);
  __syncthreads();
  out[128] = s[63 - i] + variable[63 - i];
}

void test_fresh() {
  std::vector<float> expected(3 * 192, 1.f);
  for (size_t i = 0; i < expected.size(); ++i) {
    if (i % 192 >= 128) expected[i] = 2 * static_cast<float>(63 - i % 64);
  }
  expect_right(expected, [](float* out) {
    return launch<fresh_kernel>(dim3(3), dim3(kThreads), 64 * sizeof(float), nullptr, FreshParams{out});
  });
}

// ---- a warp: sums by shuffles, static shared memory

enum class WarpBug { kNone, kNoBarrier, kExit, kNotInMask, kGoneInMask, kDivergentBarrier, kTwoShuffles, kPastEnd };

struct RowSumParams {
  const float* x;  // [rows, kThreads]
  float* out;      // [rows]
  WarpBug bug;
};

template <int kWarps>
__global__ void row_sum_kernel(const RowSumParams p) {
  RP_SHARED(float[kWarps], sums);
  RP_SHARED(int, last);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  float sum = p.x[blockIdx.x * kThreads + threadIdx.x];
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(~0u, sum, bits);
  float* const mine = sums + warp;
  if (lane == 0) mine[p.bug == WarpBug::kPastEnd && warp == kWarps - 1] = sum;
  if (threadIdx.x == kThreads - 1) last = warp;
  if (p.bug != WarpBug::kNoBarrier) __syncthreads();
  if (warp > 0) return;
  if (p.bug == WarpBug::kExit && lane == 31) return;
  if (p.bug == WarpBug::kDivergentBarrier && lane == 3) __syncthreads();
  if (p.bug == WarpBug::kGoneInMask && lane < 16) return;
  if (p.bug == WarpBug::kTwoShuffles) sum = lane < 16 ? __shfl_sync(~0u, sum, 0) : __shfl_down_sync(~0u, sum, 1);
  const unsigned mask = p.bug == WarpBug::kNotInMask ? ~1u : ~0u;
  sum = lane <= last ? sums[lane] : 0.f;
  for (int bits = 16; bits > 0; bits /= 2) sum += __shfl_xor_sync(mask, sum, bits);
  if (lane == 0) p.out[blockIdx.x] = sum;
}

struct NeighbourParams {
  float* out;  // [32]
  bool bug;
};

__global__ void neighbour_kernel(const NeighbourParams p) {
  RP_SHARED(float[32], s);
  s[threadIdx.x] = static_cast<float>(threadIdx.x);
  if (!p.bug) __syncwarp();
  p.out[threadIdx.x] = s[(threadIdx.x + 1) % 32];
}

void test_warp() {
  const std::vector<float> x = numbers(5 * kThreads);
  std::vector<float> expected(5);
  for (size_t i = 0; i < x.size(); ++i) expected[i / kThreads] += x[i];
  const auto run = [&](WarpBug bug) {
    return [&x, bug](float* out) {
      return launch<row_sum_kernel<kThreads / 32>>(dim3(5), dim3(kThreads), 0, nullptr,
                                                   RowSumParams{x.data(), out, bug});
    };
  };
  expect_right(expected, run(WarpBug::kNone));
  expect_wrong(expected, run(WarpBug::kNoBarrier));
  expect_error("exit", run(WarpBug::kExit));
  expect_error("exit", run(WarpBug::kGoneInMask));
  expect_error("a mask that leaves it out", run(WarpBug::kNotInMask));
  expect_error("wait in __syncthreads at", run(WarpBug::kDivergentBarrier), true);
  expect_error("lanes of one warp come to", run(WarpBug::kTwoShuffles));
  expect_out_of_bounds("past the end of a shared variable (16 bytes)", run(WarpBug::kPastEnd));

  std::vector<float> next(32);
  for (size_t i = 0; i < 32; ++i) next[i] = static_cast<float>((i + 1) % 32);
  const auto neighbour = [](bool bug) {
    return [bug](float* out) {
      return launch<neighbour_kernel>(dim3(1), dim3(32), 0, nullptr, NeighbourParams{out, bug});
    };
  };
  expect_right(next, neighbour(false));
  expect_wrong(next, neighbour(true), kAll);
}

// ---- named barriers: two pairs of warps, each exchanging through shared memory

struct PairsParams {
  float* out;   // [kThreads]
  int threads;  // of each barrier
  bool divergent;
};

__global__ void pairs_kernel(const PairsParams p) {
  RP_SHARED(float[kThreads], s);
  const int i = static_cast<int>(threadIdx.x), pair = i / 64;
  s[i] = static_cast<float>(i);
  if (!p.divergent || i % 2 == 0) named_barrier(1 + pair, p.threads);
  p.out[i] = s[i ^ 63];
}

void test_named_barrier() {
  std::vector<float> expected(kThreads);
  for (size_t i = 0; i < kThreads; ++i) expected[i] = static_cast<float>(i ^ 63);
  const auto run = [](int threads, bool divergent = false) {
    return [=](float* out) {
      return launch<pairs_kernel>(dim3(1), dim3(kThreads), 0, nullptr, PairsParams{out, threads, divergent});
    };
  };
  expect_right(expected, run(64));
  expect_wrong(expected, run(32), kAll);
  expect_error("named barrier 1 has 64 of 96 threads", run(96), true);
  expect_error("for whole warps", run(48));
  expect_error("only a part of a warp", run(32, true));
}

// ---- cp.async, ldmatrix and mma: out [16, 8] = X [16, d] W [8, d]ᵀ through two stages

enum class CopyBug {
  kNone,
  kNotAwaited,
  kLastNotAwaited,
  kNoTrailingBarrier,
  kStore,
  kTarget,
  kSource,
  kRow,
  kOutside
};

struct ProductParams {
  const bfloat16 *x, *w;  // [rows, d], [8, d]
  float* out;             // [16, 8]
  int rows, d;
  CopyBug bug;
};

__global__ void product_kernel(const ProductParams p) {
  constexpr int kStage = 24 * 16;  // 16 rows of X, then 8 of W, of 16 elements
  RP_DYNAMIC_SMEM(smem);
  bfloat16* const s = reinterpret_cast<bfloat16*>(smem);
  const int lane = static_cast<int>(threadIdx.x) % 32, warp = static_cast<int>(threadIdx.x) / 32;
  const auto load = [&](int step) {
    bfloat16* const to = s + step % 2 * kStage;
    for (int i = static_cast<int>(threadIdx.x); i < 48; i += 64) {
      const int row = i / 2, col = i % 2 * 8;
      const bool of_x = row < 16, valid = !of_x || row < p.rows;
      const bfloat16* from = of_x ? p.x + (valid ? row : 0) * p.d : p.w + (row - 16) * p.d;
      cp_async_16(to + row * 16 + col + (p.bug == CopyBug::kTarget),
                  from + 16 * step + col + (p.bug == CopyBug::kSource), valid);
      if (p.bug == CopyBug::kStore) to[row * 16 + col] = from_float<bfloat16>(100.f);
    }
    cp_async_commit();
  };
  float acc[4] = {};
  const int steps = p.d / 16;
  load(0);
  for (int step = 0; step < steps; ++step) {
    if (step + 1 < steps) load(step + 1);
    if (p.bug != CopyBug::kNotAwaited) {
      if (step + 1 < steps || p.bug == CopyBug::kLastNotAwaited) {
        cp_async_wait<1>();
      } else {
        cp_async_wait<0>();
      }
    }
    __syncthreads();
    if (warp == step % 2) {  // the other warp may run ahead
      const bfloat16* const x = s + step % 2 * kStage;
      uint32_t a[4], b[4];
      ldmatrix_x4(a, x + lane % 16 * 16 + lane / 16 * 8 + (p.bug == CopyBug::kRow));
      ldmatrix_x4(b, p.bug == CopyBug::kOutside ? x + 2 * kStage : x + (16 + lane % 8) * 16 + lane / 8 % 2 * 8);
      mma_16x8x16<bfloat16>(acc, a, b[0], b[1]);
    }
    if (p.bug != CopyBug::kNoTrailingBarrier) __syncthreads();
  }
  float* const sums = reinterpret_cast<float*>(smem);  // of warp 1
  __syncthreads();
  for (int e = 0; e < 4; ++e) {
    if (warp == 1) sums[4 * lane + e] = acc[e];
  }
  __syncthreads();
  for (int e = 0; e < 4 && warp == 0; ++e) {
    p.out[(lane / 4 + e / 2 * 8) * 8 + lane % 4 * 2 + e % 2] = acc[e] + sums[4 * lane + e];
  }
}

void test_copies() {
  constexpr int kRows = 13, kDepth = 96;
  std::vector<bfloat16> x(kRows * kDepth), w(8 * kDepth);
  for (size_t i = 0; i < x.size(); ++i) x[i] = from_float<bfloat16>(static_cast<float>(i * 7 % 17) - 8);
  for (size_t i = 0; i < w.size(); ++i) w[i] = from_float<bfloat16>(static_cast<float>(i * 5 % 13) - 6);
  std::vector<float> expected(16 * 8);
  for (int i = 0; i < kRows; ++i) {
    for (int j = 0; j < 8; ++j) {
      for (int k = 0; k < kDepth; ++k) expected[i * 8 + j] += to_float(x[i * kDepth + k]) * to_float(w[j * kDepth + k]);
    }
  }
  const auto run = [&](CopyBug bug) {
    return [&x, &w, bug](float* out) {
      return launch<product_kernel>(dim3(1), dim3(64), 2 * 24 * 16 * sizeof(bfloat16), nullptr,
                                    ProductParams{x.data(), w.data(), out, kRows, kDepth, bug});
    };
  };
  expect_right(expected, run(CopyBug::kNone));
  expect_wrong(expected, run(CopyBug::kNotAwaited));
  expect_wrong(expected, run(CopyBug::kLastNotAwaited));
  for (const Outcome& o : in_every_mode(expected.size(), run(CopyBug::kNoTrailingBarrier))) {
    const bool forward = o.mode.find("schedule=forward") != std::string::npos;
    CHECK(!forward || o.out != expected, "%s: refilled too early, and right", o.mode.c_str());
  }
  for (const Outcome& o : in_every_mode(expected.size(), run(CopyBug::kStore))) {
    const bool copied_first = o.mode.find("copy=issue") != std::string::npos;
    CHECK((o.out != expected) == copied_first, "%s: a store after the issue %s", o.mode.c_str(),
          copied_first ? "is lost" : "remains");
  }
  expect_error("cp.async to: not 16-byte aligned", run(CopyBug::kTarget));
  expect_error("cp.async from: not 16-byte aligned", run(CopyBug::kSource));
  expect_error("ldmatrix: not 16-byte aligned", run(CopyBug::kRow));
  expect_error("ldmatrix: outside of shared memory", run(CopyBug::kOutside));
}

// ---- launches: tickets between blocks, threads of the operating system, the log, options, refused shapes

struct TicketParams {
  const float* x;  // [blocks, kThreads]
  float* parts;    // [blocks]
  unsigned* ticket;
  float* out;  // [2]
};

__global__ void ticket_kernel(const TicketParams p) {
  RP_SHARED(bool, is_last);
  float sum = p.x[blockIdx.x * kThreads + threadIdx.x];
  for (unsigned by = 16; by > 0; by /= 2) sum += __shfl_down_sync(~0u, sum, by);
  RP_SHARED(float[kThreads / 32], sums);
  if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32] = sum;
  __syncthreads();
  if (threadIdx.x == 0) {
    p.parts[blockIdx.x] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
    __threadfence();
    is_last = atomicInc(p.ticket, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (is_last && threadIdx.x == 0) {
    float all = 0;
    for (unsigned b = 0; b < gridDim.x; ++b) all += p.parts[b];
    p.out[0] = all;
  }
}

void test_launches() {
  const std::vector<float> x = numbers(7 * kThreads);
  float expected = 0;
  for (float value : x) expected += value;
  const auto run = [&](float* out) {
    std::vector<float> parts(7);
    unsigned ticket = 0;
    const cudaError_t error =
        launch<ticket_kernel>(dim3(7), dim3(kThreads), 0, nullptr, TicketParams{x.data(), parts.data(), &ticket, out});
    CHECK(ticket == 0, "the ticket is %u", ticket);
    return error;
  };
  expect_right({expected}, run);

  emulator::reset_launches();
  std::vector<std::thread> threads;
  for (int t = 0; t < 4; ++t) {
    threads.emplace_back([&] {
      for (int i = 0; i < 25; ++i) {
        float out = 0;
        CHECK(run(&out) == cudaSuccess && out == expected, "%g, not %g", out, expected);
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  CHECK(emulator::launch_count() == 100, "%zu launches", emulator::launch_count());
  emulator::reset_launches();
  float out[5];
  launch<row_sum_kernel<4>>(dim3(5), dim3(kThreads), 0, nullptr, RowSumParams{x.data(), out, WarpBug::kNone});
  const std::vector<std::string> log = emulator::launches();
  CHECK(log.size() == 1 && log[0].find("row_sum_kernel<4>") != std::string::npos, "%s", log[0].c_str());

  const RowSumParams none{nullptr, nullptr, WarpBug::kNone};
  for (const auto& [grid, block] : {std::pair{dim3(0), dim3(kThreads)},
                                    {dim3(1, 65536), dim3(kThreads)},
                                    {dim3(1), dim3(0)},
                                    {dim3(1), dim3(1056)}}) {
    const cudaError_t error = launch<row_sum_kernel<4>>(grid, block, 0, nullptr, none);
    CHECK(error == cudaErrorInvalidConfiguration, "%u x %u: %d", grid.x, block.x, error);
  }
  const cudaError_t error = launch<row_sum_kernel<4>>(dim3(1), dim3(32), (99 << 10) + 1, nullptr, none);
  CHECK(error == cudaErrorInvalidValue, "%d", error);
  CHECK(emulator::launch_count() == 1, "a refused launch counts");
}

void test_options() {  // before anything asked for the options
  setenv("RP_EMULATOR", "schedule=reverse,copy=issue,threads=2,seed=7", 1);
  CHECK(to_string(emulator::options()) == "schedule=reverse,copy=issue,threads=2,seed=7", "%s",
        to_string(emulator::options()).c_str());
  emulator::set_options(emulator::parse_options(""));
  CHECK(to_string(emulator::options()) == "schedule=forward,copy=wait,threads=1,seed=0", "%s",
        to_string(emulator::options()).c_str());
  for (const char* wrong : {"schedule=backward", "threads=0", "threads=two", "copy", "color=red"}) {
    bool refused = false;
    try {
      emulator::parse_options(wrong);
    } catch (const emulator::Error& error) {
      refused = std::string(error.what()).find(wrong) != std::string::npos;
    }
    CHECK(refused, "%s", wrong);
  }
}

}  // namespace
}  // namespace routed_peft::test

int main() {
  routed_peft::test::test_options();
  routed_peft::test::test_schedules();
  routed_peft::test::test_fresh();
  routed_peft::test::test_block();
  routed_peft::test::test_warp();
  routed_peft::test::test_named_barrier();
  routed_peft::test::test_copies();
  routed_peft::test::test_launches();
}
