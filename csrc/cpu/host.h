// What the CPU path asks of the program around it: threads and a library for large products. Under torch both are
// torch's (csrc/torch/ops.cpp); the C++ tests bring their own.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <new>

#include "kernels/params.h"

namespace routed_peft::cpu {

class Host {
 public:
  virtual ~Host() = default;
  // Runs body(begin, end) over parts of [0, count), perhaps on several threads. A part never depends on another one,
  // and a thread finishes the one it has before it takes the next: bodies keep scratch that is the thread's.
  virtual void parallel_for(int64_t count, const std::function<void(int64_t, int64_t)>& body) const = 0;
  // How many parts it makes at most, one or more: what a computation is cut by, but never the order of a sum.
  virtual int64_t threads() const = 0;
  // out = alpha · a b (+ out if accumulate) by a vendor library; false where there is none.
  virtual bool library_gemm(const Matrix& out, const Matrix& a, const Matrix& b, double alpha,
                            bool accumulate) const = 0;
};

// host.parallel_for where there is enough to share: `work` counts multiplications, or what takes as long, in all.
// Waking a thread costs as much as this many of them.
constexpr double kSharedWork = 50000;

inline void parallel(const Host& host, int64_t count, double work, const std::function<void(int64_t, int64_t)>& body) {
  if (count <= 0) return;
  if (count == 1 || work < kSharedWork) {
    body(0, count);
  } else {
    host.parallel_for(count, body);
  }
}

// As `parallel`, for parts that are worth a thread's while one by one: body(i) for each. A thread has its share of
// them, neighbours, which may have data in common; whoever is done first takes what is left of another's. Without a
// host on this thread alone.
inline void parallel_pieces(const Host* host, int64_t count, double work, const std::function<void(int64_t)>& body) {
  const bool shared = host != nullptr && count > 1 && work >= kSharedWork;
  const int64_t workers = shared ? std::min(host->threads(), count) : 1;
  if (workers <= 1) {
    for (int64_t i = 0; i < count; ++i) body(i);
    return;
  }
  struct alignas(64) Next {
    std::atomic<int64_t> value;
  };
  const auto share = [&](int64_t worker) { return count * worker / workers; };
  const std::unique_ptr<Next[]> next(new Next[static_cast<size_t>(workers)]);
  for (int64_t i = 0; i < workers; ++i) next[i].value = share(i);
  host->parallel_for(workers, [&](int64_t begin, int64_t end) {
    for (int64_t mine = begin; mine < end; ++mine) {
      for (int64_t i = 0; i < workers; ++i) {
        const int64_t from = (mine + i) % workers, stop = share(from + 1);
        std::atomic<int64_t>& left = next[from].value;
        while (left.load(std::memory_order_relaxed) < stop) {  // only looked at where nothing is left
          const int64_t piece = left.fetch_add(1, std::memory_order_relaxed);
          if (piece < stop) body(piece);
        }
      }
    }
  });
}

// An aligned array that is not cleared.
template <class T>
class Array {
 public:
  Array() = default;
  explicit Array(int64_t size)
      : data_(static_cast<T*>(::operator new(sizeof(T) * static_cast<size_t>(size > 0 ? size : 1), kAlign))) {}
  T* get() const { return data_.get(); }
  T& operator[](int64_t i) const { return data_.get()[i]; }

 private:
  static constexpr std::align_val_t kAlign{64};
  struct Free {
    void operator()(T* p) const { ::operator delete(p, kAlign); }
  };
  std::unique_ptr<T, Free> data_;
};

// A thread's scratch: grows to the largest size ever asked for and stays. One object a purpose, declared thread_local.
template <class T>
class Scratch {
 public:
  T* get(int64_t size) {
    if (size > size_) {
      array_ = Array<T>(size);
      size_ = size;
    }
    return array_.get();
  }

 private:
  Array<T> array_;
  int64_t size_ = 0;
};

template <class Acc>
constexpr Dtype accumulated_dtype() {
  return sizeof(Acc) == 8 ? Dtype::kFloat64 : Dtype::kFloat32;
}

}  // namespace routed_peft::cpu
