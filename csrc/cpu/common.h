// What the kernel files share: whole numbers, and memory for what they keep while they run.
#pragma once

#include <cstdint>
#include <cstring>

#include "vec.h"

namespace gankern {

constexpr int64_t kScratchAlignment = 64;  // a cache line, and the longest vector

// Room for `count` values of `size` bytes, uninitialised and aligned. Never null: where there is none, an
// exception derived from std::bad_alloc says how much was asked for (MemoryError in Python). Only the thread that
// calls the operator and the body of parallel_for may ask: see run_staged for where others would wait forever.
void* take_scratch(int64_t count, int64_t size);
void give_scratch(void* memory);

namespace GANKERN_ISA {

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
