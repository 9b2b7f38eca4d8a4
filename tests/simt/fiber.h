// Threads of execution that hand over to each other by name. On x86-64 a hand-over is a few instructions; elsewhere,
// and where a sanitizer watches the stacks, it is ucontext's, which also calls the system for the signal mask.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>

#if defined(__x86_64__) && defined(__linux__) && !defined(__SANITIZE_ADDRESS__)
#define SIMT_SWITCH
#else
#include <ucontext.h>
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
  // The next hand-over to it calls `entry`, which never returns.
  void begin(void (*entry)()) {
    if (stack_ == nullptr) stack_.reset(new char[kStackBytes]);
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
    simt_switch(&pointer_, next.pointer_);
#else
    swapcontext(&context_, &next.context_);
#endif
  }

 private:
  static constexpr size_t kStackBytes = 128 * 1024;
  std::unique_ptr<char[]> stack_;  // none for the thread that the process began with
#if defined(SIMT_SWITCH)
  void* pointer_ = nullptr;
#else
  ucontext_t context_;
#endif
};

}  // namespace simt
