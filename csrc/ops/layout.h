// From a tensor and its channels' dimension to what the kernels of per-channel operators take.
#pragma once

#include "../cpu/layout.h"
#include "common.h"

namespace gankern {

// Of a dense tensor (common.h).
inline Layout layout_of(const Tensor& x, int64_t dim) {
  // A number has no dimension, and is one channel.
  const int64_t size = x.numel(), channels = x.dim() ? x.size(dim) : 1;
  if (size == 0) return {0, channels, 1};
  // All dimensions that the channels' one strides over, and no others, lie within it.
  const int64_t inner = channels == 1 ? size : x.stride(dim);
  return {size / (channels * inner), channels, inner};
}

inline void check_dim(const Tensor& x, int64_t dim, const char* op) {
  STD_TORCH_CHECK(dim >= 0 && dim < std::max<int64_t>(x.dim(), 1), op, ": dim ", dim, " of a tensor of ",
                  x.dim(), " dimensions");
}
// A vector along the channels.
inline Operand along_channels(const Optional& v, const Tensor& x, int64_t dim, const char* op) {
  if (!v) return Operand();
  STD_TORCH_CHECK(v->dim() == 1 && v->size(0) == x.size(dim) && v->scalar_type() == x.scalar_type(), op,
                  ": what belongs to the channels must be 1-D, of the tensor's channels and dtype");
  return compact(*v);
}

}  // namespace gankern
