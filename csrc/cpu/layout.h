// A dense tensor as the kernels of per-channel operators see it, in the order of its memory.
#pragma once

#include <cstdint>

namespace gankern {

// Element (o, c, i) lies at (o * channels + c) * inner + i. Contiguous [N, C, H, W]: outer N, inner H W.
// Channels last: outer N H W, inner 1. Every other dense order of the dimensions is one of these too.
struct Layout {
  int64_t outer, channels, inner;
  int64_t size() const { return outer * channels * inner; }
};

// Results of this size and more go past the caches: what follows could not read them from there.
constexpr int64_t kStreamBytes = int64_t{16} << 20;

}  // namespace gankern
