// Bias, activation, gain and clamp in one pass. See bias_act.cpp for how.
#pragma once

#include <cstdint>

#include "activation.h"
#include "kernels.h"

namespace gankern {

// All tensors are of one dtype and lie as `layout` says; vectors along the channels are contiguous.
struct BiasAct {
  Layout layout;
  const void* bias;     // [channels]; null for zeros, and where the pre-activation is not needed
  const void* x;        // forward: the input. Else what was saved: the result, or the input (activation.h, s)
  const void* grad;     // backward, double backward: gradient of the result
  const void* h;        // double backward: gradient of the input's gradient; null for zeros
  const void* h_bias;   // double backward: gradient of the bias's gradient, [channels]; null for zeros
  const void* slope;    // of PReLU, [channels]
  const void* h_slope;  // double backward: gradient of the slope's gradient, [channels]; null for zeros
  void* out;            // the result; the gradient of the input; double backward: the gradient of `grad`
  void* out_x;          // double backward: the gradient of x; null where nobody asks
  void* out_bias;       // [channels]: the gradient of the bias; null where nobody asks
  void* out_slope;      // [channels]: the gradient of the slope; null where nobody asks
  double negative_slope, gain;
  double clamp;  // infinite or NaN for none
};

struct BiasActKernels {
  void (*forward[kActivations][kDtypes])(const BiasAct&, const Parallel&);
  void (*backward[kActivations][kDtypes])(const BiasAct&, const Parallel&);
  void (*double_backward[kActivations][kDtypes])(const BiasAct&, const Parallel&);
};

GANKERN_KERNELS(BiasActKernels, bias_act)

}  // namespace gankern
