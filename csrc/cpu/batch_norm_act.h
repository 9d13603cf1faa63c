// Batch normalisation and a (leaky) ReLU in one pass each way. See batch_norm_act.cpp for how.
//
// Instance normalisation is that of one sample that has N C channels: each sample's channels are channels of
// their own. Group normalisation is that of N G channels, whose samples are the C / G that a group has of x's channels:
// each with affine values (and a slope) of its own, and beside each other in memory.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gankern {

// Tensors like x have x's dtype; all others the one that it is accumulated in (float, or double for double).
struct BatchNormAct {
  int64_t samples, channels, plane;  // x is [samples, channels, plane], or
  bool channels_last;                // [samples, plane, channels]
  int64_t instances = 1;             // channels_last, one sample: [instances, plane, channels / instances]
  // x is [channels, samples, plane], or channels_last [instances, plane, channels / instances, samples], and affine
  // values and slope are [channels, samples].
  bool grouped = false;
  int64_t period =
      0;            // after how many affine values and slopes they repeat; 0: never. Gradients of them do not
  bool per_sample;  // affine values are [samples, channels] instead of [channels]
  bool training;    // statistics are x's own, and so part of the gradient
  double eps;
  double negative_slope;  // 1: no activation, 0: ReLU
  const void*
      slope;  // [channels] where not grouped, of PReLU, in place of negative_slope, but in double backward; else null
  const void* x;
  const void *weight, *bias;  // affine; null: ones, zeros
  // [3, channels]: mean, 1 / sqrt(var + eps), unbiased var. Forward writes them, in evaluation the first two
  // of running_mean and running_var; the other orders read the first two.
  void* stats;
  const void *running_mean, *running_var;  // [channels], evaluation's

  void* y;  // forward: like x

  const void* grad;               // backward, double backward: gradient of y, like x
  void* grad_x;                   // like x; of double backward it may be null, where it would be zeros
  void *grad_weight, *grad_bias;  // affine; may be null. Double backward has no grad_bias
  void* grad_slope;               // like slope; may be null
  const void* h;                  // double backward: gradient of backward's grad_x, like x
  const void *h_weight, *h_bias;  // and of its grad_weight, grad_bias; affine; null: zeros
  void* grad_grad;                // like x
};

GANKERN_KERNELS(Orders<BatchNormAct>, batch_norm_act)

}  // namespace gankern
