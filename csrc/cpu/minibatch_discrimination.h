// Similarities of points by their L1 distance, pair by pair. See minibatch_discrimination.cpp for how.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gankern {

// `count` points: m [count, kernels, dims] and what belongs to them, contiguous, all of the one dtype. What
// the order of gradient does not use is null.
struct PairSet {
  int64_t count;
  const void* m;
  const void* grad;    // [count, kernels], gradient of the sums; of the first set only
  const void* grad_m;  // as m, gradient of the m's gradient; null for zeros
  void* sums;          // [count, kernels]: the sums, or the gradient of `grad`; of the first set only
  void* out_m;         // as m: the gradient of m
};

struct MinibatchDiscrimination {
  int64_t kernels, dims;
  PairSet rows;
  PairSet columns;    // not used where one_set
  bool one_set;       // pairs within `rows`, each point with every other one; else each row with every column
  bool include_self;  // add each point's similarity to itself, where one_set
};

GANKERN_KERNELS(Orders<MinibatchDiscrimination>, minibatch_discrimination)

}  // namespace gankern
