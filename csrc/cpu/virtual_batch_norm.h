// Virtual batch norm, and the statistics of a reference batch. See virtual_batch_norm.cpp for how.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gankern {

// Feature maps are [count][channels][pixels], or [count][pixels][channels] where channels_last. What belongs
// to channels is in double; what an operation does not use is null.
struct VirtualBatchNorm {
  int64_t count, channels, pixels;
  bool channels_last;
  double own_share;  // c, of an example in its own statistics
  double eps;
  double negative_slope;                     // of the activation: 1 for none, 0 for ReLU
  const double *ref_mean, *ref_mean_square;  // [channels]
  const double *weight, *bias;               // [channels]
  const void* x;
  const void* grad;    // gradient of the result
  const void* grad_x;  // gradient of x's gradient
  // Gradients of the gradients of what they are named for: [channels].
  const double *grad_ref_mean, *grad_ref_mean_square, *grad_weight, *grad_bias;
  double* saved;  // [2][count][channels]: mu and 1 / sqrt(V + eps)
  void* out;      // the result, or the gradient of `grad`; null where not needed
  void* out_x;    // gradient of x; null where not needed
  double* sums;   // [4][channels]: gradients of ref_mean, ref_mean_square, weight, bias
};

// The statistics of a batch: moments is [2][channels], the mean and the mean of squares.
struct BatchStatistics {
  int64_t count, channels, pixels;
  bool channels_last;
  const void* x;
  const double* mean;                          // [channels]
  const double *grad_mean, *grad_mean_square;  // [channels]
  const void* grad_x;                          // gradient of x's gradient
  double* moments;                             // the statistics, or the gradients of their gradients
  void* out_x;                                 // gradient of x
};

struct VirtualBatchNormKernels {
  Orders<VirtualBatchNorm> norm;
  Orders<BatchStatistics> statistics;
};

GANKERN_KERNELS(VirtualBatchNormKernels, virtual_batch_norm)

}  // namespace gankern
