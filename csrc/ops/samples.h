// What operators share that work on each sample of a batch by itself.
#pragma once

#include "common.h"

namespace gankern {

// Dense, and each sample's elements together.
inline Operand sample_major(const Tensor& x) {
  const Operand y = dense(x);
  const bool together = y->size(0) <= 1 || y->stride(0) * y->size(0) == y->numel();
  return together ? y : compact(x);
}

// [samples] values in the accumulation dtype of x.
inline Tensor per_sample(const Tensor& x) { return blank(x, {x.size(0)}, accumulation_type(x)); }

inline Operand taken_per_sample(const Tensor& values, const Tensor& x, const char* op) {
  STD_TORCH_CHECK(values.dim() == 1 && values.size(0) == x.size(0), op, ": needs one value a sample, got ",
                  values.numel(), " for ", x.size(0));
  STD_TORCH_CHECK(values.scalar_type() == accumulation_type(x), op,
                  ": values of samples must be float64 for float64, float32 for all others");
  return compact(values);
}

}  // namespace gankern
