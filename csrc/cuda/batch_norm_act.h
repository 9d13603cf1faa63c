// Batch normalisation in training and a (leaky) ReLU on a CUDA device. See batch_norm_act.cu for how.
#pragma once

#include <cstdint>

namespace gankern::cuda {

enum class NormPass { kForward, kBackward, kDoubleBackward };

struct BatchNorm {
  NormPass pass;
  bool channels_last;
  int64_t samples, channels, plane;
  double eps, negative_slope;
  // Maps, all laid out as x, at multiples of 16 bytes. What lies side by side, a plane or the channels of a pixel,
  // is a multiple of 16 bytes, too.
  const void *x, *grad, *h;
  void *out, *out_x;  // y, or the gradient of x, or those of grad and of x
  // [channels], in the dtype that x is accumulated in; null for 1, for 0, and for what nobody asked for.
  const void *weight, *bias, *h_weight, *h_bias;
  void *grad_weight, *grad_bias;
  void* stats;  // [3, channels]: mean, 1 / sqrt(var + eps), unbiased variance
};

// Bytes of scratch memory that a call needs, at a multiple of 16.
int64_t batch_norm_act_scratch(const BatchNorm& problem, int dtype);

// One launch, of a map that is not empty. dtype: as in csrc/cpu/vec.h.
void batch_norm_act(const BatchNorm& problem, int dtype, void* scratch, void* stream);

}  // namespace gankern::cuda
