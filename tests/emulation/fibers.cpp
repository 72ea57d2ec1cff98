// Threads of a kernel as fibers: each on a stack of its own.
//
// A thread runs until it has to wait; then the scheduler picks another. Switching uses _setjmp and _longjmp, because
// swapcontext asks the operating system to save the signal mask each time.
#include <sys/mman.h>

#include <string>

#include "block.h"
#include "cuda_emulation.h"

uint3 threadIdx, blockIdx;

namespace fm_emulation {

Region thread_stacks;

namespace {

constexpr size_t kStackBytes = 256 * 1024;
constexpr size_t kGuardBytes = 4096;  // below each stack: one too deep ends the process instead of corrupting it

void (*kernel_call)(void*) = nullptr;
void* kernel_object = nullptr;

void thread_main() {
  std::string thrown;
  try {
    kernel_call(kernel_object);
  } catch (const std::exception& error) {
    thrown = std::string("threw: ") + error.what();
  }
  if (!thrown.empty()) fail(thrown, current.running);
  leave_kernel(*current.running);
  _longjmp(current.scheduler, 1);
}

}  // namespace

void prepare_stacks(size_t threads) {
  static size_t ready = 0;
  constexpr size_t bytes = static_cast<size_t>(kMaxCluster) * kMaxThreads * kStackBytes;
  if (thread_stacks.start == 0) {  // addresses only; the guards stay without memory
    void* mapped = mmap(nullptr, bytes, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (mapped == MAP_FAILED) throw Error("no addresses for the stacks of the threads");
    thread_stacks = {reinterpret_cast<uintptr_t>(mapped), reinterpret_cast<uintptr_t>(mapped) + bytes};
  }
  for (; ready < threads; ++ready) {
    void* stack = reinterpret_cast<void*>(thread_stacks.start + ready * kStackBytes + kGuardBytes);
    if (mprotect(stack, kStackBytes - kGuardBytes, PROT_READ | PROT_WRITE) != 0) {
      throw Error("no memory for the stacks of the threads");
    }
  }
}

__attribute__((noinline)) void resume(Lane& lane, void (*kernel)(void*), void* object) {
  static ucontext_t start;
  current.running = &lane;
  threadIdx = lane.index;
  blockIdx = lane.block->index;
  if (_setjmp(current.scheduler) == 0) {
    if (lane.state != State::fresh) _longjmp(lane.context, 1);
    lane.state = State::ready;
    kernel_call = kernel;
    kernel_object = object;
    getcontext(&start);
    start.uc_stack.ss_sp = reinterpret_cast<void*>(thread_stacks.start + lane.stack * kStackBytes + kGuardBytes);
    start.uc_stack.ss_size = kStackBytes - kGuardBytes;
    start.uc_link = nullptr;
    makecontext(&start, thread_main, 0);
    setcontext(&start);
  }
  current.running = nullptr;
}

void switch_to_scheduler(Lane& self) {
  if (_setjmp(self.context) == 0) _longjmp(current.scheduler, 1);
}

}  // namespace fm_emulation
