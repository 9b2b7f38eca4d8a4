// Threads of execution that hand over to each other by name. On x86-64 a hand-over is a few instructions; elsewhere it
// is ucontext's, which also calls the system for the signal mask. AddressSanitizer is told of it: where ucontext's tell
// it, it clears what it knows of a whole stack each time, which took half of the kernels' tests.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__x86_64__) && defined(__linux__)
#define SIMT_SWITCH
#else
#include <ucontext.h>
#endif
#if defined(SIMT_SWITCH) && defined(__SANITIZE_ADDRESS__)
#define SIMT_TELLS_SANITIZER
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif

namespace simt {

#if defined(SIMT_SWITCH)
// Keeps the registers that a call must preserve on the stack, the stack pointer in `*from`, and goes on at `to`.
extern "C" __attribute__((visibility("hidden"))) void simt_switch(void** from, void* to);
asm(R"(
.text
.local simt_switch
.type simt_switch, @function
simt_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size simt_switch, . - simt_switch
)");
#endif

class Fiber {
 public:
  // The next hand-over to it calls `entry`, which calls `arrive` and never returns.
  void begin(void (*entry)()) {
    if (stack_ == nullptr) stack_.reset(new char[kStackBytes]);
#if defined(SIMT_TELLS_SANITIZER)
    ASAN_UNPOISON_MEMORY_REGION(stack_.get(), kStackBytes);  // of the calls that it has not returned from
    bottom_ = stack_.get();
    bytes_ = kStackBytes;
#endif
#if defined(SIMT_SWITCH)
    const uintptr_t top = reinterpret_cast<uintptr_t>(stack_.get() + kStackBytes) / 16 * 16;
    void** at = reinterpret_cast<void**>(top);
    *--at = nullptr;  // no caller
    *--at = reinterpret_cast<void*>(entry);
    for (int r = 0; r < 6; ++r) *--at = nullptr;
    pointer_ = at;
#else
    getcontext(&context_);
    context_.uc_stack.ss_sp = stack_.get();
    context_.uc_stack.ss_size = kStackBytes;
    context_.uc_link = nullptr;
    makecontext(&context_, entry, 0);
#endif
  }

  // From `this`, which runs, to `next`.
  void hand_over(Fiber& next) {
#if defined(SIMT_SWITCH)
#if defined(SIMT_TELLS_SANITIZER)
    from_ = this;
    __sanitizer_start_switch_fiber(&fake_stack_, next.bottom_, next.bytes_);
#endif
    simt_switch(&pointer_, next.pointer_);
    arrive(this);
#else
    swapcontext(&context_, &next.context_);
#endif
  }

  // In whom it has been handed over to: null for one that has just begun.
  static void arrive([[maybe_unused]] Fiber* fiber) {
#if defined(SIMT_TELLS_SANITIZER)
    void* const fake_stack = fiber == nullptr ? nullptr : fiber->fake_stack_;
    __sanitizer_finish_switch_fiber(fake_stack, &from_->bottom_, &from_->bytes_);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 128 * 1024;
  std::unique_ptr<char[]> stack_;  // none for the thread that the process began with
#if defined(SIMT_SWITCH)
  void* pointer_ = nullptr;
#if defined(SIMT_TELLS_SANITIZER)
  static inline Fiber* from_ = nullptr;  // who has handed over last
  const void* bottom_ = nullptr;
  size_t bytes_ = 0;
  void* fake_stack_ = nullptr;
#endif
#else
  ucontext_t context_;
#endif
};

}  // namespace simt
