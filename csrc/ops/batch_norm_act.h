// What the operators of either device ask of their arguments.
#pragma once

#include "layout.h"

namespace gankern {
namespace {

constexpr const char* kName = "batch_norm_act";

// The forward's, of a map: [3, channels], in the dtype that it is accumulated in.
Operand take_stats(const Tensor& stats, const Tensor& x) {
  STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == 3 && stats.size(1) == x.size(1) &&
                      stats.scalar_type() == accumulation_type(x),
                  kName, ": stats are not those of the forward");
  return compact(stats);
}

// The direction of a second derivative; zeros are rare: only the affine gradients were differentiated.
Operand take_direction(const Optional& h, const Tensor& x) {
  if (h) return like(*h, x, kName);
  Tensor zeros = blank_like(x);
  torch::stable::zero_(zeros);
  return Operand(zeros);
}

}  // namespace
}  // namespace gankern
