// Minibatch discrimination on a CUDA device. See minibatch_discrimination.cu for how.
#pragma once

#include <cstdint>

namespace gankern::cuda {

// One set of points and its tensors; null where there is none.
struct PointSet {
  int64_t count;
  const void* m;       // [count, kernels, dims]
  const void* grad;    // [count, kernels]: g
  const void* grad_m;  // [count, kernels, dims]: h
  void* sums;          // [count, kernels]: o, or the gradient of g
  void* out_m;         // [count, kernels, dims]
};

enum class PairsPass { kForward, kBackward, kDoubleBackward };

struct Pairs {
  PairsPass pass;
  PointSet points, others;  // the others are the points themselves where one_set
  int64_t kernels, dims;
  bool one_set, include_self;
};

// Bytes of scratch memory that a call needs, at a multiple of 16.
int64_t minibatch_discrimination_scratch(const Pairs& pairs, int dtype);

// One launch where no set has more than 64 points, else two. dtype: as in csrc/cpu/vec.h.
void minibatch_discrimination(const Pairs& pairs, int dtype, void* scratch, void* stream);

}  // namespace gankern::cuda
