// What the header of every primitive's kernels declares them with.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace gankern {

// The order of dtypes in every table of kernels.
enum class Dtype { kFloat64 = 0, kFloat32 = 1, kBFloat16 = 2, kFloat16 = 3 };
constexpr int kDtypes = 4;

// The kernels of an operator and of its gradients: what they work on, and what they write, is in the Task.
template <class Task>
struct Orders {
  void (*forward[kDtypes])(const Task&, const Parallel&);
  void (*backward[kDtypes])(const Task&, const Parallel&);
  void (*double_backward[kDtypes])(const Task&, const Parallel&);
};

// A dense tensor as the kernels of per-channel operators see it, in the order of its memory: element (o, c, i)
// lies at (o * channels + c) * inner + i. Contiguous [N, C, H, W]: outer N, inner H W. Channels last: outer
// N H W, inner 1. Every other dense order of the dimensions is one of these too.
struct Layout {
  int64_t outer, channels, inner;
  int64_t size() const { return outer * channels * inner; }
};

// Results of this size and more go past the caches: what follows could not read them from there.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

}  // namespace gankern
