// One CUDA block on one OS thread: every CUDA thread is a fiber, and they hand over only where they wait for each
// other.
//
// A warp runs until none of its threads can go on, then the next one: running ahead is what exposes a barrier that is
// missing. The order is the schedule's, so that a run can be repeated and another order can disagree with it.
#pragma once

#include <array>
#include <bit>
#include <cstdint>
#include <cstring>
#include <exception>
#include <map>
#include <memory>
#include <source_location>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

#include "emulator/fiber.h"
#include "emulator/shared_memory.h"

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};
inline thread_local constinit dim3 threadIdx, blockIdx, blockDim, gridDim;

namespace routed_peft::emulator {

enum class Schedule { kForward, kReverse, kShuffled };  // of blocks, warps and lanes
// The two extremes between which the hardware may choose. Until the wait, a copy's target holds NaN.
enum class Copy { kAtWait, kAtIssue };

struct Options {
  Schedule schedule = Schedule::kForward;
  Copy copy = Copy::kAtWait;
  unsigned seed = 0;               // of Schedule::kShuffled
  int threads = 1;                 // of the operating system, that blocks of one launch are shared among
  size_t shared_bytes = 99 << 10;  // that a block may have: the least among the architectures served
};

// Where threads wait for each other. Threads that meet must have come to the same place.
struct Place {
  const char* what;
  std::source_location at;
  bool operator==(const Place& other) const {
    return at.line() == other.at.line() && at.column() == other.at.column() &&
           (what == other.what || std::strcmp(what, other.what) == 0) &&
           (at.file_name() == other.at.file_name() || std::strcmp(at.file_name(), other.at.file_name()) == 0);
  }
  std::string text() const { return what + std::string(" at ") + at.file_name() + ":" + std::to_string(at.line()); }
};

// What a launch runs.
struct Task {
  std::string_view name;
  dim3 grid, block;
  size_t dynamic_bytes;
  void (*call)(const void*);
  const void* params;
};

// What a lane brings to the others of its warp and takes from them.
struct alignas(16) Lane {
  uint32_t in[10], out[4];
  const void* row;
};

class Block {
 public:
  static constexpr unsigned kMaxThreads = 1024, kBarriers = 16;

  static Block& current() { return *current_; }
  const Options& options() const { return options_; }
  SharedMemory& shared() { return shared_; }

  void begin_launch(const Task& task, const Options& options) {
    task_ = &task;
    options_ = options;
    count_ = task.block.x * task.block.y * task.block.z;
    random_ = (options.seed * 2654435761u) | 1u;
    while (stacks_.size() < count_) stacks_.push_back(std::make_unique<Stack>());
    if (threads_.size() < count_) threads_.resize(count_);
    warps_.resize((count_ + 31) / 32);
    order_.resize(warps_.size());
    for (unsigned i = 0; i < order_.size(); ++i) {
      order_[i] = options.schedule == Schedule::kReverse ? static_cast<unsigned>(order_.size()) - 1 - i : i;
    }
    shared_.begin_launch(task.dynamic_bytes, options.shared_bytes);
  }

  void run(dim3 index) {
    shared_.begin_block();
    barriers_.fill({});
    live_ = count_;
    for (unsigned w = 0; w < warps_.size(); ++w) {
      const unsigned lanes = std::min(32u, count_ - 32 * w);
      const uint32_t present = lanes == 32 ? ~0u : (1u << lanes) - 1;
      warps_[w].ready = present;
      warps_[w].gone = ~present;
      warps_[w].meetings = 0;
      warps_[w].at_barrier.fill(0);
    }
    const dim3 shape = task_->block;
    for (unsigned i = 0; i < count_; ++i) {
      threads_[i].index = dim3(i % shape.x, i / shape.x % shape.y, i / (shape.x * shape.y));
      threads_[i].waits = nullptr;
      threads_[i].copies.clear();
      threads_[i].group = 0;
      threads_[i].fiber.prepare(*stacks_[i], i, &Block::enter);
    }
    begin_round();
    idle_ = false;
    current_ = this;
    blockIdx = index;
    blockDim = shape;
    gridDim = task_->grid;
    thread_ = kNobody;
    if (next()) Fiber::change(main_, threads_[thread_].fiber);
    current_ = nullptr;
    try {
      if (error_ || live_ > 0) {
        for (unsigned i = 0; i < count_; ++i) stacks_[i]->unpoison();
      }
      if (error_) std::rethrow_exception(std::exchange(error_, nullptr));
      if (live_ > 0) throw Error("deadlock: " + who_waits());
      shared_.end_block();
    } catch (const Error& error) {
      throw Error("emulator: " + std::string(task_->name) + ", block " + text(index) + ": " + error.what());
    }
  }

  // Barrier 0 is __syncthreads and waits for every thread that has not exited; the others for `expected` threads.
  void barrier(unsigned id, unsigned expected, const Place& place) {
    if (id >= kBarriers || (id > 0 && (expected == 0 || expected % 32 != 0 || expected > count_))) {
      throw Error("barrier " + std::to_string(id) + " for " + std::to_string(expected) + " threads of " +
                  std::to_string(count_) + ": there are 16, for whole warps");
    }
    Barrier& b = barriers_[id];
    if (b.arrived == 0) {
      b.place = place;
      b.expected = expected;
    } else if (id == 0 ? !(b.place == place) : b.expected != expected) {
      throw Error("threads come to different barriers: " + b.place.text() + " and " + place.text());
    }
    ++b.arrived;
    warp().at_barrier[id] |= bit();
    if (b.arrived == (id == 0 ? live_ : expected)) {
      release(id);
      warp().ready &= ~bit();
    } else {
      wait(place);
    }
  }

  // Waits for the lanes of `mask`; the last to come calls resolve(lanes) for all of them.
  template <class Resolve>
  Lane& meet(uint32_t mask, const Place& place, const Resolve& resolve) {
    Warp& w = warp();
    if (!(mask & bit())) throw Error(place.text() + ": a lane calls it with a mask that leaves it out");
    if (mask & w.gone) throw Error(place.text() + ": its mask names a lane that has exited");
    unsigned i = 0;
    while (i < w.meetings && w.meeting[i].mask != mask) ++i;
    Meeting& meeting = w.meeting[i];
    if (i == w.meetings) {
      ++w.meetings;
      meeting = {mask, 0, place};
    } else if (!(meeting.place == place)) {
      throw Error("lanes of one warp come to " + meeting.place.text() + " and to " + place.text());
    }
    meeting.arrived |= bit();
    if (meeting.arrived == mask) {
      meeting = w.meeting[--w.meetings];
      resolve(w.lane);
      w.ready |= mask & ~bit();
    } else {
      wait(place);
    }
    return lane();
  }

  Lane& lane() { return warp().lane[thread_ % 32]; }
  unsigned lane_index() const { return thread_ % 32; }

  // cp.async of 16 bytes; global memory is read at once.
  void copy(void* to, const std::array<uint32_t, 4>& data) {
    if (options_.copy == Copy::kAtIssue) {
      std::memcpy(to, data.data(), 16);
    } else {
      std::memset(to, 0xFF, 16);
      threads_[thread_].copies.push_back({to, data, threads_[thread_].group});
    }
  }
  void commit() { ++threads_[thread_].group; }
  void wait_for_copies(unsigned groups_left) {
    Thread& t = threads_[thread_];
    size_t done = 0;
    for (; done < t.copies.size() && t.copies[done].group + groups_left < t.group; ++done) {
      std::memcpy(t.copies[done].to, t.copies[done].data.data(), 16);
    }
    t.copies.erase(t.copies.begin(), t.copies.begin() + static_cast<std::ptrdiff_t>(done));
  }

 private:
  static constexpr unsigned kNobody = ~0u;

  struct PendingCopy {
    void* to;
    std::array<uint32_t, 4> data;
    unsigned group;
  };
  struct Thread {
    Fiber fiber;
    dim3 index;
    const Place* waits;  // on the waiting thread's stack
    unsigned group;      // that the next copy belongs to
    std::vector<PendingCopy> copies;
  };
  struct Meeting {
    uint32_t mask, arrived;
    Place place;
  };
  struct Warp {
    uint32_t ready, gone;
    unsigned meetings;
    std::array<uint32_t, kBarriers> at_barrier;
    Lane lane[32];
    Meeting meeting[32];
  };
  struct Barrier {
    unsigned arrived = 0, expected = 0;
    Place place;
  };

  Warp& warp() { return warps_[thread_ / 32]; }
  uint32_t bit() const { return 1u << thread_ % 32; }

  static void enter() {
    Block& block = current();
    Fiber& self = block.threads_[block.thread_].fiber;
    Fiber::arrive(self);
    block.body();
    Fiber::change(self, block.next() ? block.threads_[block.thread_].fiber : block.main_, true);
  }

  void body() noexcept {
    try {
      task_->call(task_->params);
      exit();
    } catch (const Error& error) {
      error_ = std::make_exception_ptr(Error("thread " + text(threadIdx) + ": " + error.what()));
    } catch (...) {
      error_ = std::current_exception();
    }
  }

  void exit() {
    Warp& w = warp();
    w.gone |= bit();
    for (unsigned i = 0; i < w.meetings; ++i) {
      if (w.meeting[i].mask & bit()) throw Error("exits while others wait for it in " + w.meeting[i].place.text());
    }
    --live_;
    if (barriers_[0].arrived > 0 && barriers_[0].arrived == live_) release(0);
  }

  void release(unsigned id) {
    for (Warp& w : warps_) {
      const uint32_t here = std::exchange(w.at_barrier[id], 0);
      if (id > 0 && here != 0 && here != ~0u) {
        throw Error(barriers_[id].place.text() + ": only a part of a warp has come to it");
      }
      w.ready |= here;
    }
    barriers_[id].arrived = 0;
  }

  void wait(const Place& place) {
    Fiber& self = threads_[thread_].fiber;
    threads_[thread_].waits = &place;
    Fiber::change(self, next() ? threads_[thread_].fiber : main_);
  }

  // Makes the thread that is to run the current one; false where none can.
  bool next() {
    if (error_) return false;
    for (;;) {
      Warp& w = warps_[order_[turn_]];
      if (w.ready != 0) {
        const unsigned lane = choose(w.ready);
        w.ready &= ~(1u << lane);
        idle_ = false;
        thread_ = order_[turn_] * 32 + lane;
        threadIdx = threads_[thread_].index;
        return true;
      }
      if (++turn_ < order_.size()) continue;
      if (std::exchange(idle_, true)) return false;
      begin_round();
    }
  }

  void begin_round() {
    turn_ = 0;
    if (options_.schedule != Schedule::kShuffled) return;
    for (size_t i = order_.size(); i > 1; --i) std::swap(order_[i - 1], order_[random() % i]);
  }

  unsigned choose(uint32_t ready) {
    if (options_.schedule == Schedule::kForward) return static_cast<unsigned>(std::countr_zero(ready));
    if (options_.schedule == Schedule::kReverse) return 31u - static_cast<unsigned>(std::countl_zero(ready));
    const unsigned turn = random() % 32;
    return (static_cast<unsigned>(std::countr_zero(std::rotr(ready, static_cast<int>(turn)))) + turn) % 32;
  }

  uint32_t random() {  // xorshift
    random_ ^= random_ << 13;
    random_ ^= random_ >> 17;
    random_ ^= random_ << 5;
    return random_ >> 3;
  }

  static std::string text(dim3 d) {
    return std::string("(") + std::to_string(d.x) + ", " + std::to_string(d.y) + ", " + std::to_string(d.z) + ")";
  }

  std::string who_waits() const {
    std::map<std::string, std::pair<unsigned, std::string>> places;  // how many are there, and the first of them
    for (unsigned i = 0; i < count_; ++i) {
      const bool gone = (warps_[i / 32].gone >> i % 32) & 1;
      auto& [waiting, first] = places[gone ? "have exited" : "wait in " + threads_[i].waits->text()];
      if (waiting++ == 0) first = text(threads_[i].index);
    }
    std::string all;
    for (const auto& [place, who] : places) {
      all += (all.empty() ? "" : "; ") + std::to_string(who.first) + " threads from " + who.second + " on " + place;
    }
    for (unsigned id = 1; id < kBarriers; ++id) {
      if (barriers_[id].arrived == 0) continue;
      all += "; named barrier " + std::to_string(id) + " has " + std::to_string(barriers_[id].arrived) + " of " +
             std::to_string(barriers_[id].expected) + " threads";
    }
    return all;
  }

  static inline thread_local constinit Block* current_ = nullptr;

  const Task* task_ = nullptr;
  Options options_;
  SharedMemory shared_;
  std::vector<std::unique_ptr<Stack>> stacks_;
  std::vector<Thread> threads_;
  std::vector<Warp> warps_;
  std::vector<unsigned> order_;  // of the warps
  std::array<Barrier, kBarriers> barriers_;
  Fiber main_;
  std::exception_ptr error_;
  unsigned count_ = 0, live_ = 0, thread_ = kNobody, turn_ = 0;
  bool idle_ = false;  // no thread has run since the round began
  uint32_t random_ = 1;
};

}  // namespace routed_peft::emulator
