// Up, FIR filter, down on a CUDA device. See upfirdn2d.cu for how.
#pragma once

#include <cstdint>

namespace gankern::cuda {

// One axis: out[o] = sum_j taps[j] z[o * down + j - start], where z[i * up] = x[i] and z is 0 elsewhere.
struct ResampledAxis {
  int32_t in, out, up, down, start, taps;
};

struct Upfirdn2d {
  ResampledAxis rows, columns;
  // x[plane, y, x, e] is at plane * ... + y * row_stride + x * group + e: `group` channels lie side by side
  // (channels_last), or one. Planes are counted batch by batch: plane = batch * planes_a_batch + channel.
  int64_t planes, planes_a_batch, batch_stride, channel_stride, row_stride;
  int32_t group;
  bool separable, flip;  // flip: correlate
  double gain;
  const void* filter;  // in the dtype that filter_dtype says: [rows.taps][columns.taps], or [taps]
  int filter_dtype;
  const void* x;
  void* out;  // dense: [planes][rows.out][columns.out][group]
};

// One launch. dtypes: as in csrc/cpu/vec.h.
void upfirdn2d(const Upfirdn2d& problem, int dtype, void* stream);

}  // namespace gankern::cuda
