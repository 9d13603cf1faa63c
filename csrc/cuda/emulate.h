// CUDA's threads on one thread of the CPU, for tests: what a .cu file of this folder uses of CUDA, so that any
// C++ compiler takes it. No kernel is fast here, and none is hidden from the sanitizers.
//
// Every thread of a block is a fiber with a stack of its own. A fiber runs until it waits for others, in
// __syncthreads, in a shuffle, at the grid's barrier or for a counter; then the next one runs, forwards and
// backwards in turn, so that what depends on the order of threads comes out. Blocks run one after the other, but for a
// cooperative launch, whose blocks are all there at once. Shared memory is the launch's own, ends where it was
// asked to end, and starts as NaN. Where all wait and none can go on, the program ends with a message.
//
// Under ThreadSanitizer each fiber counts as a thread, and a switch between two of them orders nothing: only
// barriers, shuffles and atomics do, as on the device. Two threads that touch one place without a barrier
// between them are a race, also of different blocks.
#pragma once

#include <sys/mman.h>
#include <ucontext.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <stdexcept>
#include <utility>
#include <vector>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#include <sanitizer/common_interface_defs.h>
#endif
#if defined(__SANITIZE_THREAD__)
#include <sanitizer/tsan_interface.h>
#endif

#define __global__
#define __device__
#define __host__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

struct dim3 {
  unsigned x = 1, y = 1, z = 1;
};
struct alignas(16) uint4 {
  unsigned x, y, z, w;
};

#if defined(__x86_64__)
// What swapcontext does but for the signal mask, whose two calls of the system are much of a test's time: the registers
// that a call keeps go to the stack, its top to *from, and those that lie at `to` come back.
extern "C" __attribute__((visibility("hidden"))) void gankern_swap_stacks(void** from, void* to);
asm(R"(
.pushsection .text
.weak gankern_swap_stacks
.hidden gankern_swap_stacks
.type gankern_swap_stacks, @function
gankern_swap_stacks:
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
.popsection
)");
#endif

namespace gankern::emulate {

inline void happens_before(void* place) {
#if defined(__SANITIZE_THREAD__)
  __tsan_release(place);
#else
  (void)place;
#endif
}
inline void happens_after(void* place) {
#if defined(__SANITIZE_THREAD__)
  __tsan_acquire(place);
#else
  (void)place;
#endif
}

constexpr int kWarp = 32;
constexpr size_t kStack = 256 << 10;
constexpr size_t kShared = 48 << 10;  // a block's

// A place where a number of fibers wait for each other. The counters are atomics without an order, so that it
// is the annotations alone that order anything.
struct Barrier {
  std::atomic<int> arrived{0}, round{0};
  int count = 0;
};

// Where the execution of a fiber, or of who launches them, stopped.
struct Context {
#if defined(__x86_64__)
  void* top = nullptr;  // of the stack

  void begin(char* stack, size_t size, void (*run)()) {
    void** end = reinterpret_cast<void**>(stack + size);
    end[-1] = nullptr;  // run is entered as by a call from nowhere
    end[-2] = reinterpret_cast<void*>(run);
    top = end - 8;  // six registers
    std::memset(top, 0, 6 * sizeof(void*));
  }
  static void swap(Context& from, Context& to) { gankern_swap_stacks(&from.top, to.top); }
#else
  ucontext_t context;

  void begin(char* stack, size_t size, void (*run)()) {
    getcontext(&context);
    context.uc_stack.ss_sp = stack;
    context.uc_stack.ss_size = size;
    context.uc_link = nullptr;
    makecontext(&context, run, 0);
  }
  static void swap(Context& from, Context& to) { swapcontext(&from.context, &to.context); }
#endif
};

struct Fiber {
  Context context;
  char* stack = nullptr;
  void* sanitizer = nullptr;   // ThreadSanitizer's fiber
  void* fake_stack = nullptr;  // AddressSanitizer's
  std::atomic<bool> done{true};
  std::atomic<unsigned> thread{0}, block{0};
  std::atomic<int> slot{0};  // of its block among those that run at once
};

struct Warp {
  Barrier barrier;
  uint64_t values[kWarp];
};
struct Block {
  Barrier barrier;
  std::vector<Warp> warps;
};

class Machine {
 public:
  static Machine& get() {
    static Machine& machine = *new Machine;  // fibers end with the program
    return machine;
  }

  void launch(dim3 grid, unsigned threads, size_t shared, bool cooperative,
              const std::function<void()>& body) {
    if (shared > kShared) throw std::runtime_error("a kernel wants more shared memory than a block has");
    const unsigned blocks = grid.x, at_once = cooperative ? blocks : 1;
    grid_ = grid;
    threads_ = threads;
    body_ = &body;
    shared_.clear();
    for (unsigned i = 0; i < blocks; ++i) {  // all of them before any thread runs
      shared_.emplace_back(static_cast<char*>(std::aligned_alloc(16, (shared + 15) / 16 * 16 + 16)),
                           std::free);
      std::memset(shared_.back().get(), 0xff, shared);
#if defined(__SANITIZE_ADDRESS__)
      __asan_poison_memory_region(shared_.back().get() + shared, (shared + 15) / 16 * 16 + 16 - shared);
#endif
    }
    while (fibers_.size() < size_t(at_once) * threads) fibers_.push_back(new_fiber());
    blocks_ = std::vector<Block>(at_once);
    for (Block& block : blocks_) {
      block.barrier.count = int(threads);
      block.warps = std::vector<Warp>((threads + kWarp - 1) / kWarp);
      for (size_t w = 0; w < block.warps.size(); ++w)
        block.warps[w].barrier.count = int(std::min<size_t>(kWarp, threads - w * kWarp));
    }
    whole_.count = int(at_once * threads);
#if defined(__SANITIZE_THREAD__)
    if (!scheduler_fiber_) scheduler_fiber_ = __tsan_get_current_fiber();
#endif
    happens_before(&start_);
    for (unsigned first = 0; first < blocks; first += at_once) {
      for (unsigned f = 0; f < at_once * threads; ++f) {
        Fiber& fiber = *fibers_[f];
        fiber.thread.store(f % threads, std::memory_order_relaxed);
        fiber.slot.store(int(f / threads), std::memory_order_relaxed);
        fiber.block.store(first + f / threads, std::memory_order_relaxed);
        fiber.done.store(false, std::memory_order_relaxed);
      }
      run(at_once * threads);
    }
    happens_after(&end_);
#if defined(__SANITIZE_ADDRESS__)
    for (auto& bytes : shared_) __asan_unpoison_memory_region(bytes.get(), (shared + 15) / 16 * 16 + 16);
#endif
  }

  Fiber& fiber() { return *current_.load(std::memory_order_relaxed); }
  dim3 grid() const { return grid_; }
  unsigned threads() const { return threads_; }
  Block& block() { return blocks_[size_t(fiber().slot.load(std::memory_order_relaxed))]; }
  char* shared() { return shared_[fiber().block.load(std::memory_order_relaxed)].get(); }
  Barrier& whole() { return whole_; }

  void wait(Barrier& barrier) {
    happens_before(&barrier);
    const int round = barrier.round.load(std::memory_order_relaxed);
    if (barrier.arrived.fetch_add(1, std::memory_order_relaxed) + 1 == barrier.count) {
      barrier.arrived.store(0, std::memory_order_relaxed);
      barrier.round.store(round + 1, std::memory_order_relaxed);
      progress_.store(true, std::memory_order_relaxed);
    } else {
      while (barrier.round.load(std::memory_order_relaxed) == round) to_scheduler();
    }
    happens_after(&barrier);
  }

  void signal(unsigned* counter) {
    happens_before(counter);
    __atomic_fetch_add(counter, 1, __ATOMIC_RELAXED);
    progress_.store(true, std::memory_order_relaxed);
  }
  void wait_for(unsigned* counter, unsigned count) {
    while (__atomic_load_n(counter, __ATOMIC_RELAXED) < count) to_scheduler();
    happens_after(counter);
  }

 private:
  void run(unsigned count) {
    bool forwards = true;
    for (unsigned left = count; left > 0; forwards = !forwards) {
      progress_.store(false, std::memory_order_relaxed);
      for (unsigned k = 0; k < count; ++k) {
        Fiber& fiber = *fibers_[forwards ? k : count - 1 - k];
        if (fiber.done.load(std::memory_order_relaxed)) continue;
        to_fiber(fiber);
        if (fiber.done.load(std::memory_order_relaxed)) {
          --left;
          progress_.store(true, std::memory_order_relaxed);
        }
      }
      if (left > 0 && !progress_.load(std::memory_order_relaxed)) {
        std::fprintf(stderr, "emulated kernel: %u threads wait for others that never come\n", left);
        std::abort();
      }
    }
  }

  std::unique_ptr<Fiber> new_fiber() {
    auto fiber = std::make_unique<Fiber>();
    void* memory = mmap(nullptr, kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) std::abort();
    fiber->stack = static_cast<char*>(memory);
    fiber->context.begin(fiber->stack, kStack, &Machine::main_of_fiber);
#if defined(__SANITIZE_THREAD__)
    fiber->sanitizer = __tsan_create_fiber(0);
#endif
    return fiber;
  }

  // A fiber outlives the block that it ran: the next block's thread goes on in it.
  static void main_of_fiber() {
    Machine& machine = get();
    machine.arrived_in_fiber();
    for (;;) {
      happens_after(&machine.start_);
      (*machine.body_)();
      happens_before(&machine.end_);
      machine.fiber().done.store(true, std::memory_order_relaxed);
      machine.to_scheduler();
    }
  }

  void to_fiber(Fiber& fiber) {
    current_.store(&fiber, std::memory_order_relaxed);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&scheduler_fake_stack_, fiber.stack, kStack);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(fiber.sanitizer, __tsan_switch_to_fiber_no_sync);
#endif
    Context::swap(scheduler_, fiber.context);
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(scheduler_fake_stack_, nullptr, nullptr);
#endif
  }
  void arrived_in_fiber() {
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_finish_switch_fiber(fiber().fake_stack, &scheduler_stack_, &scheduler_size_);
#endif
  }
  void to_scheduler() {
    Fiber& own = fiber();
#if defined(__SANITIZE_ADDRESS__)
    __sanitizer_start_switch_fiber(&own.fake_stack, scheduler_stack_, scheduler_size_);
#endif
#if defined(__SANITIZE_THREAD__)
    __tsan_switch_to_fiber(scheduler_fiber_, __tsan_switch_to_fiber_no_sync);
#endif
    Context::swap(own.context, scheduler_);
    arrived_in_fiber();
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  std::vector<Block> blocks_;
  std::vector<std::unique_ptr<char, void (*)(void*)>> shared_;
  std::atomic<Fiber*> current_{nullptr};
  std::atomic<bool> progress_{false};
  Barrier whole_;
  dim3 grid_;
  unsigned threads_ = 0;
  const std::function<void()>* body_ = nullptr;
  Context scheduler_;
  char start_ = 0, end_ = 0;
#if defined(__SANITIZE_ADDRESS__)
  void* scheduler_fake_stack_ = nullptr;
  const void* scheduler_stack_ = nullptr;
  size_t scheduler_size_ = 0;
#endif
#if defined(__SANITIZE_THREAD__)
  void* scheduler_fiber_ = nullptr;
#endif
};

inline dim3 thread_index() { return {Machine::get().fiber().thread.load(std::memory_order_relaxed), 0, 0}; }
inline dim3 block_index() { return {Machine::get().fiber().block.load(std::memory_order_relaxed), 0, 0}; }

// One value of each lane, to be seen by the others.
template <class V>
V exchange(V value, int source) {
  static_assert(sizeof(V) <= 8, "a shuffle moves 8 bytes at most");
  Machine& machine = Machine::get();
  const unsigned thread = thread_index().x;
  Warp& warp = machine.block().warps[thread / kWarp];
  std::memcpy(&warp.values[thread % kWarp], &value, sizeof value);
  machine.wait(warp.barrier);
  V other;
  std::memcpy(&other, &warp.values[source], sizeof other);
  machine.wait(warp.barrier);
  return other;
}

}  // namespace gankern::emulate

#define threadIdx (::gankern::emulate::thread_index())
#define blockIdx (::gankern::emulate::block_index())
#define gridDim (::gankern::emulate::Machine::get().grid())

inline void __syncthreads() {
  auto& machine = gankern::emulate::Machine::get();
  machine.wait(machine.block().barrier);
}
template <class V>
V __shfl_xor_sync(unsigned, V value, int mask) {
  return gankern::emulate::exchange(value, int(threadIdx.x % 32) ^ mask);
}
template <class V>
V __shfl_sync(unsigned, V value, int source) {
  return gankern::emulate::exchange(value, source);
}
inline unsigned __umulhi(unsigned a, unsigned b) { return unsigned(uint64_t(a) * b >> 32); }
template <class V>
V __ldg(const V* place) {
  return *place;
}
