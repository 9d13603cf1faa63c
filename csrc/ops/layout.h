// Tensors in the order of memory that a kernel goes through.
#pragma once

#include "../cpu/kernels.h"
#include "../layout.h"
#include "common.h"

namespace gankern {

// ---- any dense tensor, and what belongs to its channels -------------------------------------------------

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

// A sum a channel, of whose memory the kernel is told by `place`; what stands for it where nobody asked.
inline Tensor channel_sums(const Tensor& x, int64_t dim, void** place, bool asked) {
  return asked ? result(x, {x.size(dim)}, place) : missing(x);
}

// ---- feature maps ---------------------------------------------------------------------------------------

using torch::headeronly::MemoryFormat;

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

// [N, C, ...] without gaps, in whichever of the two orders it has.
inline Operand dense_images(const Tensor& x, int64_t least_dim, const char* op) {
  STD_TORCH_CHECK(x.dim() >= least_dim, op, ": x must have ", least_dim, " dimensions or more, got ",
                  x.dim());
  return is_dense_channels_last(x) ? Operand(x) : compact(x);
}

}  // namespace gankern
