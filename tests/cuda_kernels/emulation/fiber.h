// Stacks and the switch between them.
#pragma once
#include <sys/mman.h>
#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if !defined(__x86_64__)
#include <ucontext.h>
#endif

#include <cstddef>
#include <cstdint>
#include <new>
#include <utility>

namespace emulation {

#if defined(__SANITIZE_ADDRESS__)
constexpr size_t kStack = 256 << 10;  // its red zones
#else
constexpr size_t kStack = 64 << 10;
#endif
constexpr size_t kGuard = 4096;

struct Context {
  Context() = default;
  Context(Context&& other) noexcept { *this = std::move(other); }
  Context& operator=(Context&& other) noexcept {
    std::swap(stack, other.stack);
    std::swap(pointer, other.pointer);
    return *this;
  }
  ~Context() {
    if (stack == nullptr) return;
#if defined(__SANITIZE_ADDRESS__)
    __asan_unpoison_memory_region(stack, kStack);  // for whoever gets the memory next
#endif
    munmap(stack, kStack);
  }

  char* stack = nullptr;  // null: the thread's own
  void* pointer = nullptr;
#if defined(__SANITIZE_ADDRESS__)
  void* fake_stack = nullptr;
  const void* bottom = nullptr;
  size_t size = 0;
#endif
#if !defined(__x86_64__)
  ucontext_t context;
#endif
};

#if defined(__x86_64__)
// Saves what a function must preserve, and returns into the other stack.
extern "C" void fastkd_switch_stack(void** save, void* load);
asm(R"(
.text
.local fastkd_switch_stack
.type fastkd_switch_stack, @function
fastkd_switch_stack:
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
.size fastkd_switch_stack, .-fastkd_switch_stack
)");
#endif

inline Context* came_from = nullptr;
inline void (*entry)() = nullptr;

inline void arrived([[maybe_unused]] Context* at) {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(at == nullptr ? nullptr : at->fake_stack, &came_from->bottom,
                                  &came_from->size);
#endif
}

inline void switch_context(Context& from, Context& to) {
  came_from = &from;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.stack != nullptr ? to.stack : to.bottom,
                                 to.stack != nullptr ? kStack : to.size);
#endif
#if defined(__x86_64__)
  fastkd_switch_stack(&from.pointer, to.pointer);
#else
  swapcontext(&from.context, &to.context);
#endif
  arrived(&from);
}

inline void enter() {
  arrived(nullptr);
  entry();
}

// Makes a context that will run `function`, which does not return; the context's last function has
// yielded for the last time, or there was none.
inline void prepare(Context& context, void (*function)()) {
  entry = function;
  if (context.stack == nullptr) {
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE,
                        MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    mprotect(memory, kGuard, PROT_NONE);
    context.stack = static_cast<char*>(memory);
  }
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(context.stack + kGuard, kStack - kGuard);
  context.fake_stack = nullptr;
#endif
#if defined(__x86_64__)
  auto** top = reinterpret_cast<void**>(context.stack + kStack);
  *--top = nullptr;  // the stack is 8 off a multiple of 16 where a function begins
  *--top = reinterpret_cast<void*>(&enter);
  context.pointer = top - 6;  // the registers, whatever they are
#else
  getcontext(&context.context);
  context.context.uc_stack.ss_sp = context.stack;
  context.context.uc_stack.ss_size = kStack;
  context.context.uc_link = nullptr;
  makecontext(&context.context, enter, 0);
#endif
}

}  // namespace emulation
