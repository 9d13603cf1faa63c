// How a kernel asks for threads, without knowing whose threads they are.
//
// The library passes LibTorch's own pool (csrc/ops/common.h); the sanitizer harness passes std::thread
// (csrc/cpu/testing/). A kernel must give the same result for every number of threads: split the work by
// the shape of the problem alone, and add partial results up in a fixed order.
#pragma once

#include <cstdint>

namespace gankern {

struct Parallel {
  int threads;  // how many may run at once
  // Calls body(context, begin, end) on disjoint ranges that cover [0, count), each at least `grain` long
  // but for the last, possibly at the same time, and returns when all are done.
  void (*run)(int64_t count, int64_t grain, void (*body)(void* context, int64_t begin, int64_t end),
              void* context);
};

// f(begin, end) over [0, count).
template <class F>
inline void parallel_for(const Parallel& parallel, int64_t count, int64_t grain, const F& f) {
  if (count <= 0) return;
  if (parallel.threads == 1 || count <= grain) {
    f(int64_t{0}, count);
    return;
  }
  parallel.run(
      count, grain,
      [](void* context, int64_t begin, int64_t end) { (*static_cast<const F*>(context))(begin, end); },
      const_cast<void*>(static_cast<const void*>(&f)));
}

}  // namespace gankern
