// The penalty of each sample's gradient norm. See gradient_penalty.cpp for how.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gankern {

// `samples` blocks of `size` elements each, one after the other. What is of the accumulation dtype is double
// for double and float for all others. What a function does not use is null.
struct GradientPenalty {
  int64_t samples, size;
  double target;
  bool one_sided;
  const void* gradient;   // [samples, size]
  const void* grad_grad;  // [samples, size]: gradient of the gradient's gradient
  const void* grad;       // [samples], accumulation dtype: gradient of the values
  void* norms;            // [samples], accumulation dtype: written by forward, read by the others
  void* values;           // [samples], accumulation dtype: the penalties, or the gradient of `grad`
  void* out;              // [samples, size]: the gradient of `gradient`
  double* partial;        // gradient_penalty_partials(samples, size) values of scratch
};

// Elements of a sample that are summed up as one; partial sums are added in their order.
constexpr int64_t kGradientPenaltyBlock = 8192;
// How many partial sums forward and double_backward need room for.
inline int64_t gradient_penalty_partials(int64_t samples, int64_t size) {
  return samples * ((size + kGradientPenaltyBlock - 1) / kGradientPenaltyBlock);
}

GANKERN_KERNELS(Orders<GradientPenalty>, gradient_penalty)

}  // namespace gankern
