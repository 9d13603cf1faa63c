// Minibatch standard deviation. See minibatch_stddev.cpp for how.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gankern {

// A sample of x is [rows][features][width] values, one of the result [rows][features * width + features *
// extent]: contiguous tensors have one row, whose width is all pixels of some channels and whose extent is
// all pixels; channels_last ones a row a pixel, with some channels and an extent of 1.
struct MinibatchStddev {
  int64_t groups, group_size;
  bool strided;  // sample i is in group i % groups, else in i / group_size
  int64_t rows, features, width, extent;
  bool unbiased;
  double eps;
  const void* x;
  const void* grad;    // like the result
  const void* grad_x;  // like x: the gradient of the gradient of x
  void* out;           // like the result: the result, or the gradient of `grad`
  void* out_x;         // like x: the gradient of x
};

GANKERN_KERNELS(Orders<MinibatchStddev>, minibatch_stddev)

}  // namespace gankern
