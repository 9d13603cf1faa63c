// What the normalisations of feature maps share: affine values and running statistics, as
// gankern/functional/_norm_act.py has them.
#pragma once

#include <ATen/ops/_foreach_lerp.h>

#include "call.h"

namespace gankern::nodes {

// Of [C], or [N, C] for each sample's own, and of x's dtype or the one that it is accumulated in.
inline bool affine_fits(const Tensor& x, const std::optional<Tensor>& t) {
  if (!t) return true;
  const bool each = t->dim() == 2 && t->size(0) == x.size(0) && t->size(1) == x.size(1);
  return (each || (t->dim() == 1 && t->size(0) == x.size(1))) && t->device() == x.device() &&
         (t->scalar_type() == accumulation_type(x) || t->scalar_type() == x.scalar_type());
}
inline bool affine_fits(const Tensor& x, const std::optional<Tensor>& weight,
                        const std::optional<Tensor>& bias) {
  return affine_fits(x, weight) && affine_fits(x, bias) && !(weight && bias && weight->dim() != bias->dim());
}

// [C]; both or neither.
inline bool running_fits(const Tensor& x, const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                         bool updated) {
  if (mean.has_value() != var.has_value()) return false;
  for (const auto* t : {&mean, &var})
    if (*t && !((*t)->dim() == 1 && (*t)->size(0) == x.size(1) && (*t)->device() == x.device() &&
                !(*t)->requires_grad() && (!updated || writable(**t))))
      return false;
  return true;
}

// What the activation behind a normalisation multiplies negative values with. `slope` is PReLU's, which no other has.
inline bool slope_of(PyObject* activation, PyObject* negative_slope, const std::optional<Tensor>& slope,
                     double* value) {
  static const Words names({"prelu"});
  if ((names.find(activation) == 0) != slope.has_value()) return false;
  if (!slope) return slope_of(activation, negative_slope, value);
  const bool is_number = number(negative_slope, value);
  *value = 0;
  return is_number;
}

// One slope becomes one of each channel; torch's own node adds their gradients up. Half precision is Python's, whose
// second order is in a wider dtype.
inline bool slope_fits(const Tensor& x, std::optional<Tensor>* slope) {
  const Tensor& a = **slope;
  if (c10::isReducedFloatingType(x.scalar_type()) || a.dim() != 1 ||
      (a.size(0) != x.size(1) && a.size(0) != 1) || a.device() != x.device() ||
      a.scalar_type() != accumulation_type(x))
    return false;
  if (a.size(0) != x.size(1)) *slope = a.expand({x.size(1)});
  return true;
}

// In the dtype that x is accumulated in; the conversion is recorded.
inline void widen(const Tensor& x, std::optional<Tensor>* t) {
  if (*t && (*t)->scalar_type() != accumulation_type(x)) *t = (*t)->to(accumulation_type(x));
}

// Takes the mean and the unbiased variance of `stats`, [3, C], up into running statistics: both by one call, as a GPU's
// launch takes longer than the work.
inline void update_running(const std::optional<Tensor>& mean, const std::optional<Tensor>& var,
                           const Tensor& stats, double momentum) {
  const Tensor kept[] = {*mean, *var};
  Tensor now[] = {stats.select(0, 0), stats.select(0, 2)};
  for (int i : {0, 1})
    if (now[i].scalar_type() != kept[i].scalar_type()) now[i] = now[i].to(kept[i].scalar_type());
  at::_foreach_lerp_(kept, now, momentum);
  for (const Tensor& t : kept) t.unsafeGetTensorImpl()->bump_version();
}

}  // namespace gankern::nodes
