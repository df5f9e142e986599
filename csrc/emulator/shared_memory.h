// The shared memory of one block: the dynamic buffer and the static variables, each between guards.
//
// What a block has not written reads as NaN. AddressSanitizer stops any access to a guard at the access; without it, a
// write to one is found at the end of the block.
#pragma once

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <stdexcept>
#include <string>
#include <vector>

#include "emulator/fiber.h"

namespace routed_peft::emulator {

struct Error : std::runtime_error {
  using std::runtime_error::runtime_error;
};

class SharedMemory {
 public:
  ~SharedMemory() { shadow(false, 0, capacity_); }

  void begin_launch(size_t dynamic_bytes, size_t limit) {
    pieces_.clear();
    limit_ = limit;
    if (capacity_ < limit + kSlack) {
      shadow(false, 0, capacity_);
      capacity_ = (limit + kSlack + kAlignment - 1) / kAlignment * kAlignment;
      arena_.reset(static_cast<unsigned char*>(std::aligned_alloc(kAlignment, capacity_)));
      if (!arena_) throw std::bad_alloc();
    }
    shadow(true, 0, capacity_);
    add(nullptr, dynamic_bytes, kAlignment);
  }

  void begin_block() {
    for (const Piece& piece : pieces_) std::memset(arena_.get() + piece.begin, 0xFF, piece.end - piece.begin);
  }

  void end_block() const {
    if (RP_EMULATOR_ASAN) return;
    for (size_t i = 0, begin = 0; i <= pieces_.size(); ++i) {
      const size_t end = i < pieces_.size() ? pieces_[i].begin : begin + kGuard;
      for (size_t at = begin; at < end; ++at) {
        if (arena_.get()[at] == guard_byte(at)) continue;
        // The guard before the dynamic buffer is a piece's only where no piece lies before it.
        throw Error(i == 0 ? "a write before the dynamic shared memory, by " + std::to_string(end - at) + " bytes"
                           : "a write past the end of " + describe(i - 1) + ", by " + std::to_string(at - begin) +
                                 " bytes");
      }
      if (i < pieces_.size()) begin = pieces_[i].end;
    }
  }

  unsigned char* dynamic() const { return arena_.get() + pieces_.front().begin; }

  // The static variable known by `key`, laid out when its first thread comes to it.
  void* variable(const void* key, size_t bytes, size_t alignment) {
    for (const Piece& piece : pieces_) {
      if (piece.key == key) return arena_.get() + piece.begin;
    }
    const Piece& piece = add(key, bytes, std::max<size_t>(alignment, 16));
    return std::memset(arena_.get() + piece.begin, 0xFF, bytes);
  }

  bool contains(const void* at, size_t bytes) const {
    const auto address = reinterpret_cast<uintptr_t>(at), base = reinterpret_cast<uintptr_t>(arena_.get());
    return std::any_of(pieces_.begin(), pieces_.end(), [&](const Piece& piece) {
      return address >= base + piece.begin && address + bytes <= base + piece.end;
    });
  }

 private:
  static constexpr size_t kAlignment = 1024, kGuard = 64, kSlack = 64 << 10;
  struct Piece {
    const void* key;  // nullptr: the dynamic buffer
    size_t begin, end;
  };

  // Each pair of bytes is a NaN as a bfloat16 and as a float16, and two pairs are one as a float.
  static unsigned char guard_byte(size_t at) { return at % 2 == 0 ? 0xA5 : 0xFF; }

  const Piece& add(const void* key, size_t bytes, size_t alignment) {
    const size_t from = pieces_.empty() ? 0 : pieces_.back().end;
    const size_t begin = (from + kGuard + alignment - 1) / alignment * alignment, end = begin + bytes;
    size_t sum = bytes;
    for (const Piece& piece : pieces_) sum += piece.end - piece.begin;
    if (sum > limit_ || end + kGuard > capacity_) {
      throw Error("shared memory of " + std::to_string(sum) + " bytes, of which a block has " + std::to_string(limit_));
    }
    shadow(false, begin, end);
    if (!RP_EMULATOR_ASAN) {
      for (size_t at = from; at < begin; ++at) arena_.get()[at] = guard_byte(at);
      for (size_t at = end; at < end + kGuard; ++at) arena_.get()[at] = guard_byte(at);
    }
    return pieces_.emplace_back(Piece{key, begin, end});
  }

  std::string describe(size_t piece) const {
    const std::string bytes = std::to_string(pieces_[piece].end - pieces_[piece].begin);
    return (pieces_[piece].key == nullptr ? "the dynamic shared memory (" : "a shared variable (") + bytes + " bytes)";
  }

  void shadow([[maybe_unused]] bool poison, [[maybe_unused]] size_t begin, [[maybe_unused]] size_t end) {
#if RP_EMULATOR_ASAN
    if (end == begin) return;
    if (poison) {
      ASAN_POISON_MEMORY_REGION(arena_.get() + begin, end - begin);
    } else {
      ASAN_UNPOISON_MEMORY_REGION(arena_.get() + begin, end - begin);
    }
#endif
  }

  struct Free {
    void operator()(unsigned char* at) const { std::free(at); }
  };
  std::unique_ptr<unsigned char, Free> arena_;
  size_t capacity_ = 0, limit_ = 0;
  std::vector<Piece> pieces_;
};

}  // namespace routed_peft::emulator
