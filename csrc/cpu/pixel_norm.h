// Bias, leaky ReLU and pixelwise normalisation in one pass. See pixel_norm.cpp for how.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gankern {

// All tensors are of one dtype and lie as `layout` says; vectors along the channels are contiguous. A pixel
// is what the norm goes over: there are outer * inner, in the order of memory. Values of pixels are of the
// accumulation type.
struct PixelNorm {
  Layout layout;
  const void* bias;        // forward: [channels]; null for zeros
  const void* x;           // forward: the input. Else the result
  const void* grad;        // backward, double backward: gradient of the result
  const void* grad_scale;  // backward: gradient of `scale`; null for zeros
  const void* h;           // double backward: gradient of the input's gradient; null for zeros
  const void* h_bias;      // double backward: gradient of the bias's gradient, [channels]; null for zeros
  void* scale;             // [pixels]: 1 / sqrt(mean + eps). The forward writes it, the others read it
  void* out;               // the result; the gradient of the input; double backward: the gradient of `grad`
  void* out_x;             // double backward: the gradient of the result, other than by `grad`
  void* out_scale;         // double backward: the gradient of `scale`
  void* out_bias;          // backward: [channels], the gradient of the bias; null where nobody asks
  double positive, negative;  // slopes of the activation, gain included
  double eps;
};

GANKERN_KERNELS(Orders<PixelNorm>, pixel_norm)

}  // namespace gankern
