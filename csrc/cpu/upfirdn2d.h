// Zero-insertion, FIR filter and decimation of every plane of a batch of images. See upfirdn2d.cpp for how.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gankern {

// One axis: out[o] = sum_j taps[j] z[o * down + j - start], where z[i * up] = x[i] and z is 0 elsewhere.
struct FirAxis {
  int64_t in, out, up, down, start;
};

struct Upfirdn2d {
  FirAxis rows, columns;
  // The filter, which may have been correlated with as it stands: [row_taps] and [column_taps] where it is
  // separable, else row_weights is null and column_weights is [row_taps][column_taps].
  int64_t row_taps, column_taps;
  const double* row_weights;
  const double* column_weights;
  // x[n, c, y, x] is at n * batch_stride + c * channel_stride + y * row_stride + x * group; a row holds
  // `group` neighbouring channels for each of its samples, and so does one of `out`.
  int64_t batches, channels, group;
  int64_t batch_stride, channel_stride, row_stride;
  const void* x;
  void* out;  // dense: [batches][channels / group][rows.out][columns.out][group]
};

struct Upfirdn2dKernels {
  void (*run[kDtypes])(const Upfirdn2d&, const Parallel&);
};

GANKERN_KERNELS(Upfirdn2dKernels, upfirdn2d)

}  // namespace gankern
