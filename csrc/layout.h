// How feature maps [N, C, ...] lie in memory: every question about it, once, under the names that
// gankern/core/layout.py has them by. They differ in what they make of gaps.
//
// Templates, because operators know tensors of LibTorch's stable ABI, and autograd's nodes at::Tensor.
#pragma once

#include <cstdint>

namespace gankern {

// Whether kernels go through x pixel by pixel, all channels of a pixel side by side, gaps or not; what is made
// of x is laid out so. An image of one channel, which is both, is contiguous. (memory_format in Python)
template <class Tensor>
bool goes_channels_last(const Tensor& x) {
  return !x.is_contiguous() && (x.dim() == 4 || x.dim() == 5) && x.size(1) > 1 && x.stride(1) == 1;
}

// Whether the memory of x is that of [N, ..., C] without gaps, of any number of dimensions, and not that of
// [N, C, ...] too.
template <class Tensor>
bool is_dense_channels_last(const Tensor& x) {
  if (x.is_contiguous()) return false;
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    if (x.size(d) != 1 && x.stride(d) != expected) return false;
    expected *= x.size(d);
    return true;
  };
  if (!fits(1)) return false;
  for (int64_t d = x.dim() - 1; d > 1; --d)
    if (!fits(d)) return false;
  return fits(0);
}

// Whether the channels of a pixel lie side by side, gaps between pixels or not. One channel of many that x is a
// slice of counts too. (the convolutions)
template <class Tensor>
bool has_channels_together(const Tensor& x) {
  return x.stride(1) == 1 && !x.is_contiguous();
}

// Whether an image's pixels are runs of several channels that do not overlap, contiguous or not. (the filters)
template <class Tensor>
bool has_whole_pixels(const Tensor& x) {
  return x.size(1) > 1 && x.stride(1) == 1 && x.stride(3) >= x.size(1);
}

}  // namespace gankern
