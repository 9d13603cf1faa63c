// Points between samples. See interpolate_samples.cpp for how.
#pragma once

#include <cstdint>

#include "isa.h"
#include "parallel.h"

namespace gankern {

// `samples` blocks of `size` elements each, one after the other. What a function does not use is null.
struct InterpolateSamples {
  int64_t samples, size;
  const void* alpha;            // [samples], double for double and float for all others
  const void *real, *fake;      // [samples, size]
  void* out;                    // [samples, size]
  const void* grad;             // [samples, size]
  void *grad_real, *grad_fake;  // [samples, size]
};

struct InterpolateSamplesKernels {
  void (*forward[4])(const InterpolateSamples&, const Parallel&);
  void (*backward[4])(const InterpolateSamples&, const Parallel&);
};

GANKERN_KERNELS(InterpolateSamplesKernels, interpolate_samples)

}  // namespace gankern
