// From a tensor and its channels' dimension to what the kernels of per-channel operators take.
#pragma once

#include <optional>

#include "../cpu/layout.h"
#include "common.h"

namespace gankern {

using Optional = std::optional<Tensor>;

// Of a dense tensor (common.h).
inline Layout layout_of(const Tensor& x, int64_t dim) {
  // A number has no dimension, and is one channel.
  const int64_t size = x.numel(), channels = x.dim() ? x.size(dim) : 1;
  if (size == 0) return {0, channels, 1};
  // All dimensions that the channels' one strides over, and no others, lie within it.
  const int64_t inner = channels == 1 ? size : x.stride(dim);
  return {size / (channels * inner), channels, inner};
}

inline Tensor compact(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }
inline const void* data(const Optional& x) { return x ? x->const_data_ptr() : nullptr; }

// What stands for a result that nobody asked for.
inline Tensor missing(const Tensor& x) { return torch::stable::new_empty(x, {0}); }

inline void check_dim(const Tensor& x, int64_t dim, const char* op) {
  STD_TORCH_CHECK(dim >= 0 && dim < std::max<int64_t>(x.dim(), 1), op, ": dim ", dim, " of a tensor of ",
                  x.dim(), " dimensions");
}
// A vector along the channels.
inline Optional along_channels(const Optional& v, const Tensor& x, int64_t dim, const char* op) {
  if (!v) return v;
  STD_TORCH_CHECK(v->dim() == 1 && v->size(0) == x.size(dim) && v->scalar_type() == x.scalar_type(), op,
                  ": what belongs to the channels must be 1-D, of the tensor's channels and dtype");
  return compact(*v);
}
// A gradient, laid out as its tensor is.
inline Tensor like(const Tensor& grad, const Tensor& x, const char* op) {
  STD_TORCH_CHECK(grad.scalar_type() == x.scalar_type() && grad.dim() == x.dim(), op,
                  ": a gradient does not have the dtype or shape of its tensor");
  for (int64_t d = 0; d < x.dim(); ++d)
    STD_TORCH_CHECK(grad.size(d) == x.size(d), op, ": a gradient does not have the shape of its tensor");
  return laid_out_as(grad, x);
}
inline Optional like(const Optional& grad, const Tensor& x, const char* op) {
  return grad ? Optional(like(*grad, x, op)) : grad;
}

}  // namespace gankern
