// The memory formats of feature maps [N, C, ...], as gankern/core/layout.py has them for the fake
// kernels.
#pragma once

#include "common.h"

namespace gankern {

using torch::headeronly::MemoryFormat;

// Whether kernels go through a feature map pixel by pixel, all channels of a pixel side by side.
inline bool lies_channels_last(const Tensor& x) {
  if (x.is_contiguous() || (x.dim() != 4 && x.dim() != 5)) return false;
  return x.size(1) > 1 && x.stride(1) == 1;
}

// [N, C, ...] whose memory is that of [N, ..., C], without gaps.
inline bool channels_lie_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
    return true;
  };
  if (!fits(1)) return false;
  for (int64_t d = x.dim() - 1; d > 1; --d)
    if (!fits(d)) return false;
  return fits(0);
}

inline MemoryFormat memory_format(int64_t dim, bool channels_last) {
  if (!channels_last) return MemoryFormat::Contiguous;
  return dim == 5 ? MemoryFormat::ChannelsLast3d : MemoryFormat::ChannelsLast;
}

// The tensor itself where it lies densely in that order, else a copy that does.
inline Operand in_layout(const Tensor& x, bool channels_last) {
  if (!channels_last && x.is_contiguous()) return Operand(x);
  return Operand(torch::stable::contiguous(x, memory_format(x.dim(), channels_last)));
}

// An uninitialised tensor of x's dtype.
inline Tensor empty_in_layout(const Tensor& x, const std::vector<int64_t>& sizes, bool channels_last) {
  return torch::stable::empty(sizes, x.scalar_type(), std::nullopt, x.device(), std::nullopt,
                              memory_format(x.dim(), channels_last));
}

}  // namespace gankern
