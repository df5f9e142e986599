// Fibers: functions with stacks of their own, which hand over to each other on one OS thread.
//
// x86-64 switches by hand in a few nanoseconds; setjmp and longjmp would be refused between stacks where
// _FORTIFY_SOURCE is on. Elsewhere swapcontext does it, at the price of a system call. AddressSanitizer is told of
// every switch.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdint>
#include <new>

#if defined(__x86_64__) && !defined(RP_EMULATOR_UCONTEXT)
#define RP_EMULATOR_SWITCH 1
#else
#define RP_EMULATOR_SWITCH 0
#include <ucontext.h>
#endif

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define RP_EMULATOR_ASAN 1
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define RP_EMULATOR_ASAN 1
#endif
#ifdef RP_EMULATOR_ASAN
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#else
#define RP_EMULATOR_ASAN 0
#endif

namespace routed_peft::emulator {

// AddressSanitizer's frames are several times as large.
constexpr size_t kStackBytes = (RP_EMULATOR_ASAN ? 512 : 128) << 10;

// A page below it is unreadable, so that an overflow stops at once.
class Stack {
 public:
  Stack() : page_(static_cast<size_t>(sysconf(_SC_PAGESIZE))) {
    void* const at = mmap(nullptr, page_ + kStackBytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (at == MAP_FAILED) throw std::bad_alloc();
    base_ = static_cast<char*>(at);
    mprotect(base_, page_, PROT_NONE);
  }
  ~Stack() {
    unpoison();
    munmap(base_, page_ + kStackBytes);
  }
  Stack(const Stack&) = delete;
  Stack& operator=(const Stack&) = delete;

  char* bottom() const { return base_ + page_; }
  char* top() const { return bottom() + kStackBytes; }
  // What frames that were never left have marked in AddressSanitizer's shadow.
  void unpoison() const {
#if RP_EMULATOR_ASAN
    ASAN_UNPOISON_MEMORY_REGION(bottom(), kStackBytes);
#endif
  }

 private:
  size_t page_;
  char* base_;
};

#if RP_EMULATOR_SWITCH
// Keeps what the calling convention promises to keep, stores the stack pointer in *from and goes on where `to` left
// off.
[[gnu::naked, gnu::noinline, gnu::no_sanitize_address, gnu::no_profile_instrument_function]] inline void switch_stack(
    [[maybe_unused]] void** from, [[maybe_unused]] void* to) {
  asm volatile(
      "pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "ret\n");
}
#endif

class Fiber {
 public:
  // The first switch to it calls entry(), which must never return. `color` moves the stack's top, so that the hot ends
  // of many stacks do not share a set of the cache.
  void prepare(const Stack& stack, unsigned color, void (*entry)()) {
    char* const top = stack.top() - color % 32 * 192;
#if RP_EMULATOR_SWITCH
    // As switch_stack leaves it: six registers, where to go on, and the return address of a function that has none.
    void** const frame = reinterpret_cast<void**>(top) - 8;
    for (int i = 0; i < 8; ++i) frame[i] = nullptr;
    frame[6] = reinterpret_cast<void*>(entry);
    stack_pointer_ = frame;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack.bottom();
    context_.uc_stack.ss_size = static_cast<size_t>(top - stack.bottom());
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
#if RP_EMULATOR_ASAN
    bottom_ = stack.bottom();
    bytes_ = kStackBytes;
#endif
  }

  // Returns when something switches back to `from`. A fiber that leaves for good says so.
  [[gnu::no_sanitize_address]] static void change(Fiber& from, Fiber& to, [[maybe_unused]] bool for_good = false) {
#if RP_EMULATOR_ASAN
    __sanitizer_start_switch_fiber(for_good ? nullptr : &from.fake_stack_, to.bottom_, to.bytes_);
    last_ = &from;
#endif
#if RP_EMULATOR_SWITCH
    switch_stack(&from.stack_pointer_, to.stack_pointer_);
#else
    swapcontext(&from.context_, &to.context_);
#endif
    arrive(from);
  }

  // Comes first in an entry function, with the fiber it runs on.
  [[gnu::no_sanitize_address]] static void arrive([[maybe_unused]] Fiber& self) {
#if RP_EMULATOR_ASAN
    __sanitizer_finish_switch_fiber(self.fake_stack_, &last_->bottom_, &last_->bytes_);
#endif
  }

 private:
#if RP_EMULATOR_SWITCH
  void* stack_pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
#if RP_EMULATOR_ASAN
  void* fake_stack_ = nullptr;
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  static inline thread_local Fiber* last_ = nullptr;
#endif
};

}  // namespace routed_peft::emulator
