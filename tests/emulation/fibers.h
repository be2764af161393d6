// Fibers: stacks that one operating-system thread switches between, in tens of nanoseconds. Knows nothing of CUDA.
//
// AddressSanitizer and ThreadSanitizer are told of every switch. To the latter a fiber is a thread, and only what
// release() and acquire() say orders the memory accesses of two: so it finds races although one fiber runs at a time.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
extern "C" void AnnotateIgnoreReadsBegin(const char*, int);
extern "C" void AnnotateIgnoreReadsEnd(const char*, int);
extern "C" void AnnotateIgnoreWritesBegin(const char*, int);
extern "C" void AnnotateIgnoreWritesEnd(const char*, int);
#endif
#if !defined(__x86_64__)
#define EMULATOR_UCONTEXT  // slow: each switch is a system call
#endif
#if defined(EMULATOR_UCONTEXT)
#include <ucontext.h>
#endif

namespace imbalance::cuda::emulation {

inline constexpr std::size_t kStackBytes = 64 << 10;
inline constexpr std::size_t kGuardBytes = 4096;  // below the stack: an overflow faults

// While one lives, ThreadSanitizer does not see accesses: the emulator's own are no business of its.
class Unseen {
 public:
  Unseen(const Unseen&) = delete;
  Unseen& operator=(const Unseen&) = delete;
#if defined(__SANITIZE_THREAD__)
  Unseen() {
    AnnotateIgnoreReadsBegin(__FILE__, __LINE__);
    AnnotateIgnoreWritesBegin(__FILE__, __LINE__);
  }
  ~Unseen() {
    AnnotateIgnoreReadsEnd(__FILE__, __LINE__);
    AnnotateIgnoreWritesEnd(__FILE__, __LINE__);
  }
#else
  Unseen() {}
#endif
};

// What a fiber did before release(at) happened before what another does after acquire(at).
inline void release([[maybe_unused]] void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(at);
#endif
}
inline void acquire([[maybe_unused]] void* at) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(at);
#endif
}

struct Stack {
  void* pointer = nullptr;     // the stack pointer, while another stack is in use
  const void* low = nullptr;   // the stack's lowest address; that of the thread's own comes from AddressSanitizer
  std::size_t bytes = 0;       // from there
  void* fake_stack = nullptr;  // AddressSanitizer's, for detect_stack_use_after_return
  void* watched = nullptr;     // ThreadSanitizer's fiber
#if defined(EMULATOR_UCONTEXT)
  ucontext_t context;
#endif
};

inline Stack* current_stack = nullptr;
inline Stack* previous_stack = nullptr;

#if !defined(EMULATOR_UCONTEXT)
// Keeps the registers that a call must keep on the old stack and its pointer in *save, and takes up those of the new.
// The last instruction is a jump, because the processor would predict a return to where this stack called from. noipa:
// the compiler must not look inside and conclude that other registers survive.
[[gnu::naked, gnu::noipa]] inline void swap_stacks(void** /*save*/, void* /*load*/) {
  asm("pushq %rbp\n pushq %rbx\n pushq %r12\n pushq %r13\n pushq %r14\n pushq %r15\n"
      "movq %rsp, (%rdi)\n"
      "movq %rsi, %rsp\n"
      "popq %r15\n popq %r14\n popq %r13\n popq %r12\n popq %rbx\n popq %rbp\n"
      "popq %rcx\n"
      "jmp *%rcx");
}
#endif

// Called first by whatever goes on after a switch.
inline void arrived() {
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_finish_switch_fiber(current_stack->fake_stack, &previous_stack->low, &previous_stack->bytes);
#endif
}

inline void switch_to(Stack& to) {
  Stack& from = *current_stack;
  previous_stack = &from;
  current_stack = &to;
#if defined(__SANITIZE_ADDRESS__)
  __sanitizer_start_switch_fiber(&from.fake_stack, to.low, to.bytes);
#endif
  [[maybe_unused]] void* const pointer = to.pointer;  // read before ThreadSanitizer takes us for `to`
#if defined(__SANITIZE_THREAD__)
  __tsan_switch_to_fiber(to.watched, __tsan_switch_to_fiber_no_sync);
#endif
#if defined(EMULATOR_UCONTEXT)
  swapcontext(&from.context, &to.context);
#else
  swap_stacks(&from.pointer, pointer);
#endif
  arrived();
}

// The stack that this thread of the operating system runs on becomes the current one.
inline void adopt_own_stack(Stack& stack) {
  current_stack = &stack;
#if defined(__SANITIZE_THREAD__)
  stack.watched = __tsan_get_current_fiber();
#endif
}

// Makes a fiber that starts in `entry`, which must call arrived() and never return. A fiber that will not go on may be
// made again: what was on its stack is forgotten, without destructors.
inline void make_fiber(Stack& stack, void (*entry)()) {
  if (!stack.low) {
    constexpr int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE;
    void* const memory = mmap(nullptr, kStackBytes + kGuardBytes, PROT_READ | PROT_WRITE, flags, -1, 0);
    if (memory == MAP_FAILED || mprotect(memory, kGuardBytes, PROT_NONE) != 0) {
      std::perror("CUDA emulator: no memory for the stack of a thread");
      std::abort();
    }
    stack.low = static_cast<char*>(memory) + kGuardBytes;
    stack.bytes = kStackBytes;
  }
  stack.fake_stack = nullptr;
  char* const low = static_cast<char*>(const_cast<void*>(stack.low));
#if defined(__SANITIZE_ADDRESS__)
  __asan_unpoison_memory_region(low, kStackBytes);
#endif
#if defined(__SANITIZE_THREAD__)
  stack.watched = __tsan_create_fiber(0);
#endif
#if defined(EMULATOR_UCONTEXT)
  getcontext(&stack.context);
  stack.context.uc_stack.ss_sp = low;
  stack.context.uc_stack.ss_size = kStackBytes;
  stack.context.uc_link = nullptr;
  makecontext(&stack.context, entry, 0);
#else
  // What swap_stacks() takes up: six registers, the address to go on at; above it the null return address of `entry`,
  // where backtraces end.
  void** const top = reinterpret_cast<void**>(low + kStackBytes);
  std::memset(top - 8, 0, 8 * sizeof(void*));
  top[-2] = reinterpret_cast<void*>(entry);
  stack.pointer = top - 8;
#endif
}

}  // namespace imbalance::cuda::emulation
