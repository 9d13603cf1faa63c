// What the kernel files share: whole numbers, memory for what they keep while they run, and their tables.
#pragma once

#include <cstdint>
#include <cstring>

#include "kernels.h"
#include "vec.h"

namespace gankern {

constexpr int64_t kScratchAlignment = 64;  // a cache line, and the longest vector

// Room for `count` values of `size` bytes, uninitialised and aligned. Never null: where there is none, an
// exception derived from std::bad_alloc says how much was asked for (MemoryError in Python). Only the thread that
// calls the operator and the body of parallel_for may ask: see run_staged for where others would wait forever.
void* take_scratch(int64_t count, int64_t size);
void give_scratch(void* memory);

namespace GANKERN_ISA {

// What a kernel computes of its Task.
enum Order { kForward, kBackward, kDoubleBackward };

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }  // of a >= 0
inline int64_t round_up(int64_t a, int64_t b) { return ceil_div(a, b) * b; }
inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }

// Values of a type without constructors, for as long as this lives.
template <class V>
struct Scratch {
  V* at;
  explicit Scratch(int64_t values) : at(static_cast<V*>(take_scratch(values, int64_t(sizeof(V))))) {}
  ~Scratch() { give_scratch(at); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
};

// The same, all bytes zero.
template <class V>
struct Zeros : Scratch<V> {
  explicit Zeros(int64_t values) : Scratch<V>(values) {
    std::memset(static_cast<void*>(this->at), 0, size_t(values) * sizeof(V));
  }
};

}  // namespace GANKERN_ISA
}  // namespace gankern

// A row of a table: kernel<T> for each dtype, in the order of Dtype. Further template arguments stand behind it.
#define GANKERN_EACH_DTYPE(kernel, ...)                                                 \
  {kernel<double __VA_OPT__(, ) __VA_ARGS__>, kernel<float __VA_OPT__(, ) __VA_ARGS__>, \
   kernel<BFloat16 __VA_OPT__(, ) __VA_ARGS__>, kernel<Half __VA_OPT__(, ) __VA_ARGS__>}
// The table of an operator (Orders) whose kernels are run<T, kOrder>.
#define GANKERN_EACH_ORDER(run)                                           \
  {GANKERN_EACH_DTYPE(run, kForward), GANKERN_EACH_DTYPE(run, kBackward), \
   GANKERN_EACH_DTYPE(run, kDoubleBackward)}
