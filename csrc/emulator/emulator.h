// CUDA kernels on the CPU, to test their logic where there is no GPU: the names that a .cu file uses, made of fibers.
//
// Kernel files include it through kernels/device/arch.cuh and are compiled by g++ as they stand. Run a launch in every
// mode of modes(): a kernel whose result depends on the mode has a race. What goes wrong comes out of launch() as an
// Error: a deadlock, a barrier or collective that only some threads come to, an access outside of shared memory.
//
// What it cannot show: the memory model (a missing __threadfence, caches), anything that waits for another block or
// spins on memory (it hangs), rounding of the tensor cores' sums (they add in another order), the limits on registers,
// occupancy, bank conflicts, speed. It proves logic, not hardware.
#pragma once

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <mutex>
#include <random>
#include <string>
#include <string_view>
#include <thread>
#include <type_traits>
#include <vector>

#include "emulator/block.h"
#include "emulator/half.h"

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) __attribute__((aligned(n)))

// Kernels read and write arrays of any type through them.
struct [[gnu::may_alias]] alignas(8) float2 {
  float x, y;
};
struct [[gnu::may_alias]] alignas(16) float4 {
  float x, y, z, w;
};
struct [[gnu::may_alias]] alignas(8) uint2 {
  unsigned x, y;
};
struct [[gnu::may_alias]] alignas(16) uint4 {
  unsigned x, y, z, w;
};
inline float2 make_float2(float x, float y) { return {x, y}; }
inline float4 make_float4(float x, float y, float z, float w) { return {x, y, z, w}; }
inline uint2 make_uint2(unsigned x, unsigned y) { return {x, y}; }
inline uint4 make_uint4(unsigned x, unsigned y, unsigned z, unsigned w) { return {x, y, z, w}; }

// The numbers are CUDA's.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1, cudaErrorInvalidConfiguration = 9 };
using cudaStream_t = struct CUstream_st*;

inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess             ? "no error"
         : error == cudaErrorInvalidValue ? "invalid argument"
                                          : "invalid configuration argument";
}
inline cudaError_t cudaMemsetAsync(void* to, int value, size_t bytes, cudaStream_t) {
  if (bytes > 0) std::memset(to, value, bytes);
  return cudaSuccess;
}

namespace routed_peft::emulator {

// ---- options

// "schedule=forward|reverse|shuffled,copy=wait|issue,threads=N,seed=N", of which any part may be missing.
inline Options parse_options(std::string_view text) {
  Options options;
  while (!text.empty()) {
    const std::string_view item = text.substr(0, text.find(','));
    text.remove_prefix(std::min(text.size(), item.size() + 1));
    const size_t equals = item.find('=');
    const std::string_view key = item.substr(0, equals);
    const std::string value(equals == item.npos ? "" : item.substr(equals + 1));
    char* end = nullptr;
    const unsigned long number = std::strtoul(value.c_str(), &end, 10);
    const bool is_number = !value.empty() && *end == '\0' && number <= 1u << 30;
    if (key == "schedule" && value == "forward") {
      options.schedule = Schedule::kForward;
    } else if (key == "schedule" && value == "reverse") {
      options.schedule = Schedule::kReverse;
    } else if (key == "schedule" && value == "shuffled") {
      options.schedule = Schedule::kShuffled;
    } else if (key == "copy" && value == "wait") {
      options.copy = Copy::kAtWait;
    } else if (key == "copy" && value == "issue") {
      options.copy = Copy::kAtIssue;
    } else if (key == "threads" && is_number && number >= 1 && number <= 1024) {
      options.threads = static_cast<int>(number);
    } else if (key == "seed" && is_number) {
      options.seed = static_cast<unsigned>(number);
    } else {
      throw Error("emulator: unknown option '" + std::string(item) + "'");
    }
  }
  return options;
}

inline std::string to_string(const Options& o) {
  const char* const schedules[] = {"forward", "reverse", "shuffled"};
  return std::string("schedule=") + schedules[static_cast<int>(o.schedule)] +
         ",copy=" + (o.copy == Copy::kAtWait ? "wait" : "issue") + ",threads=" + std::to_string(o.threads) +
         ",seed=" + std::to_string(o.seed);
}

// What all OS threads of the process share: the options, what was launched, and blocks to be used again.
struct Shared {
  std::mutex mutex;
  Options options = parse_options(std::getenv("RP_EMULATOR") ? std::getenv("RP_EMULATOR") : "");
  std::vector<std::string_view> launched;
  std::vector<std::unique_ptr<Block>> idle;

  static Shared& get() {
    static Shared shared;
    return shared;
  }
};

// As the environment's RP_EMULATOR says until someone sets them.
inline Options options() {
  Shared& shared = Shared::get();
  const std::lock_guard lock(shared.mutex);
  return shared.options;
}
inline void set_options(const Options& options) {
  Shared& shared = Shared::get();
  const std::lock_guard lock(shared.mutex);
  shared.options = options;
}

// Every schedule with either time of copying, and otherwise the options in force.
inline std::vector<Options> modes() {
  std::vector<Options> all;
  for (Schedule schedule : {Schedule::kForward, Schedule::kReverse, Schedule::kShuffled}) {
    for (Copy copy : {Copy::kAtWait, Copy::kAtIssue}) {
      all.push_back(options());
      all.back().schedule = schedule;
      all.back().copy = copy;
    }
  }
  return all;
}

// ---- launches

// Kernels launched since the last reset, by name.
inline std::vector<std::string> launches() {
  Shared& shared = Shared::get();
  const std::lock_guard lock(shared.mutex);
  return {shared.launched.begin(), shared.launched.end()};
}
inline size_t launch_count() {
  Shared& shared = Shared::get();
  const std::lock_guard lock(shared.mutex);
  return shared.launched.size();
}
inline void reset_launches() {
  Shared& shared = Shared::get();
  const std::lock_guard lock(shared.mutex);
  shared.launched.clear();
}

// Takes blocks one after another until none is left.
class Worker {
 public:
  Worker() {
    Shared& shared = Shared::get();
    const std::lock_guard lock(shared.mutex);
    if (shared.idle.empty()) {
      block_ = std::make_unique<Block>();
    } else {
      block_ = std::move(shared.idle.back());
      shared.idle.pop_back();
    }
  }
  ~Worker() {
    Shared& shared = Shared::get();
    const std::lock_guard lock(shared.mutex);
    shared.idle.push_back(std::move(block_));
  }
  Block& block() { return *block_; }

 private:
  std::unique_ptr<Block> block_;
};

inline cudaError_t run(const Task& task) {
  const dim3 grid = task.grid, block = task.block;
  const uint64_t threads = uint64_t{block.x} * block.y * block.z, blocks = uint64_t{grid.x} * grid.y * grid.z;
  if (threads == 0 || threads > Block::kMaxThreads || block.z > 64 || blocks == 0 || grid.x > 0x7FFFFFFFu ||
      grid.y > 65535 || grid.z > 65535) {
    return cudaErrorInvalidConfiguration;
  }
  const Options o = options();
  if (task.dynamic_bytes > o.shared_bytes) return cudaErrorInvalidValue;
  {
    Shared& shared = Shared::get();
    const std::lock_guard lock(shared.mutex);
    shared.launched.push_back(task.name);
  }
  std::vector<uint64_t> shuffled;
  if (o.schedule == Schedule::kShuffled) {
    for (uint64_t i = 0; i < blocks; ++i) shuffled.push_back(i);
    std::shuffle(shuffled.begin(), shuffled.end(), std::minstd_rand(o.seed + 1));
  }
  std::atomic<uint64_t> next{0};
  std::mutex mutex;
  std::exception_ptr error;
  const auto work = [&] {
    try {
      Worker worker;
      worker.block().begin_launch(task, o);
      for (uint64_t k; (k = next++) < blocks;) {
        const uint64_t i = o.schedule == Schedule::kForward   ? k
                           : o.schedule == Schedule::kReverse ? blocks - 1 - k
                                                              : shuffled[k];
        worker.block().run(dim3(static_cast<unsigned>(i % grid.x), static_cast<unsigned>(i / grid.x % grid.y),
                                static_cast<unsigned>(i / grid.x / grid.y)));
      }
    } catch (...) {
      const std::lock_guard lock(mutex);
      if (!error) error = std::current_exception();
      next = blocks;
    }
  };
  std::vector<std::thread> others;
  for (uint64_t t = 1; t < std::min<uint64_t>(static_cast<uint64_t>(o.threads), blocks); ++t) others.emplace_back(work);
  work();
  for (std::thread& other : others) other.join();
  if (error) std::rethrow_exception(error);
  return cudaSuccess;
}

template <auto Kernel>
constexpr std::string_view kernel_name() {
  const std::string_view all = __PRETTY_FUNCTION__;  // "... [with auto Kernel = NAME; ...]" or "... [Kernel = &NAME]"
  const size_t begin = all.find_first_not_of('&', all.find("Kernel = ") + 9);
  return all.substr(begin, std::min(all.find(';', begin), all.rfind(']')) - begin);
}

template <auto Kernel, class Params>
cudaError_t launch(dim3 grid, dim3 block, size_t dynamic_bytes, const Params& params) {
  return run({kernel_name<Kernel>(), grid, block, dynamic_bytes,
              [](const void* p) { Kernel(*static_cast<const Params*>(p)); }, &params});
}

// ---- shared memory, by way of arch.cuh's macros

inline unsigned char* dynamic_shared() { return Block::current().shared().dynamic(); }
template <class T>
T& shared_variable(const void* key) {
  static_assert(std::is_trivially_default_constructible_v<std::remove_all_extents_t<T>>);
  return *static_cast<T*>(Block::current().shared().variable(key, sizeof(T), std::max(alignof(T), size_t{16})));
}

// ---- collectives of a warp

template <class T>
T shuffle(uint32_t mask, T value, unsigned source, const Place& place) {
  static_assert(std::is_trivially_copyable_v<T> && sizeof(T) <= 8);
  Block& block = Block::current();
  Lane& me = block.lane();
  std::memcpy(me.in, &value, sizeof(T));
  me.in[2] = source;
  block.meet(mask, place, [mask](Lane(&lanes)[32]) {
    for (uint32_t left = mask; left != 0; left &= left - 1) {
      Lane& to = lanes[std::countr_zero(left)];
      if ((mask >> to.in[2]) & 1) {
        std::memcpy(to.out, lanes[to.in[2]].in, 8);
      } else {
        std::memset(to.out, 0xFF, 8);  // undefined: a NaN
      }
    }
  });
  std::memcpy(&value, me.out, sizeof(T));
  return value;
}

inline uint32_t vote(uint32_t mask, bool mine, const Place& place) {
  Block& block = Block::current();
  Lane& me = block.lane();
  me.in[0] = mine;
  block.meet(mask, place, [mask](Lane(&lanes)[32]) {
    uint32_t all = 0;
    for (unsigned i = 0; i < 32; ++i) all |= ((mask >> i) & lanes[i].in[0] & 1u) << i;
    for (uint32_t left = mask; left != 0; left &= left - 1) lanes[std::countr_zero(left)].out[0] = all;
  });
  return me.out[0];
}

}  // namespace routed_peft::emulator

// ---- CUDA's functions. Each knows where it is called, so that threads that meet in two places are told apart.

#define RP_HERE std::source_location at = std::source_location::current()

inline void __syncthreads(RP_HERE) { routed_peft::emulator::Block::current().barrier(0, 0, {"__syncthreads", at}); }
inline void __syncwarp(uint32_t mask = ~0u, RP_HERE) {
  routed_peft::emulator::Block::current().meet(mask, {"__syncwarp", at}, [](auto&) {});
}

// `width` cuts the warp into equal parts, each for itself; what would leave its part reads the lane itself.
template <class T>
T __shfl_sync(uint32_t mask, T value, int source, int width = 32, RP_HERE) {
  const unsigned lane = routed_peft::emulator::Block::current().lane_index(), w = static_cast<unsigned>(width);
  return routed_peft::emulator::shuffle(mask, value, (lane & ~(w - 1)) | (static_cast<unsigned>(source) & (w - 1)),
                                        {"__shfl_sync", at});
}
template <class T>
T __shfl_xor_sync(uint32_t mask, T value, int bits, int width = 32, RP_HERE) {
  const unsigned lane = routed_peft::emulator::Block::current().lane_index(), w = static_cast<unsigned>(width);
  const unsigned source = lane ^ static_cast<unsigned>(bits);
  return routed_peft::emulator::shuffle(mask, value, source > (lane | (w - 1)) ? lane : source,
                                        {"__shfl_xor_sync", at});
}
template <class T>
T __shfl_down_sync(uint32_t mask, T value, unsigned by, int width = 32, RP_HERE) {
  const unsigned lane = routed_peft::emulator::Block::current().lane_index(), w = static_cast<unsigned>(width);
  return routed_peft::emulator::shuffle(mask, value, (lane & (w - 1)) + by < w ? lane + by : lane,
                                        {"__shfl_down_sync", at});
}
template <class T>
T __shfl_up_sync(uint32_t mask, T value, unsigned by, int width = 32, RP_HERE) {
  const unsigned lane = routed_peft::emulator::Block::current().lane_index(), w = static_cast<unsigned>(width);
  return routed_peft::emulator::shuffle(mask, value, (lane & (w - 1)) >= by ? lane - by : lane, {"__shfl_up_sync", at});
}
inline uint32_t __ballot_sync(uint32_t mask, bool mine, RP_HERE) {
  return routed_peft::emulator::vote(mask, mine, {"__ballot_sync", at});
}
inline bool __any_sync(uint32_t mask, bool mine, RP_HERE) {
  return routed_peft::emulator::vote(mask, mine, {"__any_sync", at}) != 0;
}
inline bool __all_sync(uint32_t mask, bool mine, RP_HERE) {
  return routed_peft::emulator::vote(mask, mine, {"__all_sync", at}) == mask;
}
#undef RP_HERE

// Integers only: a sum of floats in the order of arrival would not be repeatable.
inline unsigned atomicAdd(unsigned* to, unsigned value) { return std::atomic_ref<unsigned>(*to).fetch_add(value); }
inline int atomicAdd(int* to, int value) { return std::atomic_ref<int>(*to).fetch_add(value); }
inline unsigned atomicInc(unsigned* to, unsigned last) {
  const std::atomic_ref<unsigned> cell(*to);
  unsigned old = cell.load();
  while (!cell.compare_exchange_weak(old, old >= last ? 0 : old + 1)) {
  }
  return old;
}
inline void __threadfence() {}
inline void __threadfence_block() {}
[[noreturn]] inline void __trap() { throw routed_peft::emulator::Error("__trap"); }

template <class T>
T __ldg(const T* from) {
  return *from;
}
inline uint32_t __float_as_uint(float value) { return std::bit_cast<uint32_t>(value); }
inline float __uint_as_float(uint32_t bits) { return std::bit_cast<float>(bits); }
inline int __popc(uint32_t bits) { return std::popcount(bits); }
inline int __ffs(int bits) { return bits == 0 ? 0 : std::countr_zero(static_cast<unsigned>(bits)) + 1; }
inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.f / std::sqrt(x); }
template <class T>
constexpr T min(T a, T b) {
  return b < a ? b : a;
}
template <class T>
constexpr T max(T a, T b) {
  return a < b ? b : a;
}
