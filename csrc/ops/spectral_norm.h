// What the operators of either device ask of their arguments.
#pragma once

#include "common.h"

namespace gankern {
namespace {

constexpr const char* kName = "spectral_norm";
using Tensors = std::vector<Tensor>;

void check(const Tensors& weights, const std::vector<int64_t>& dims) {
  STD_TORCH_CHECK(!weights.empty() && dims.size() == weights.size(), kName,
                  ": needs at least one weight, and a dim for each");
  for (const Tensor& weight : weights)
    STD_TORCH_CHECK(weight.scalar_type() == weights[0].scalar_type() && weight.numel() > 0, kName,
                    ": all weights of a group must have one dtype, and values");
}

}  // namespace
}  // namespace gankern
