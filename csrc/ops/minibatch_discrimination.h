// The arguments of the operators of either device.
#pragma once

#include <utility>

#include "common.h"

namespace gankern {
namespace {

constexpr const char* kName = "minibatch_discrimination";

// The problem in the kernels' own layout: a task whose two sets of points are its members `first` and `second`.
// The tensors that own the memory stay alive in here.
template <class Task, auto first, auto second>
struct Pairs {
  const Operand m, other;
  Task in{};

  Pairs(const Tensor& m_in, const Optional& other_in) : m(compact(m_in)), other(compact(other_in)) {
    check(*m, "m");
    in.kernels = m->size(1);
    in.dims = m->size(2);
    (in.*first).count = m->size(0);
    (in.*first).m = m.data();
    in.one_set = !other;
    if (!other) return;
    check(*other, "other");
    STD_TORCH_CHECK(other->size(1) == in.kernels && other->size(2) == in.dims, kName,
                    ": m and other differ in kernels or dims");
    (in.*second).count = other->size(0);
    (in.*second).m = other.data();
  }

  // What these two return must live as long as the call.
  Operand take_grad(const Tensor& grad_in) {
    const Operand grad = compact(grad_in);
    STD_TORCH_CHECK(grad->scalar_type() == m->scalar_type(), kName, ": all tensors must have one dtype");
    STD_TORCH_CHECK(grad->dim() == 2 && grad->size(0) == (in.*first).count && grad->size(1) == in.kernels,
                    kName, ": grad does not have the shape of the result");
    (in.*first).grad = grad.data();
    return grad;
  }
  std::pair<Operand, Operand> take_grad_grads(const Optional& of_m, const Optional& of_other) {
    STD_TORCH_CHECK(other || !of_other, kName, ": grad_grad_other without other");
    const Operand h = like(of_m, *m, kName), h_other = of_other ? like(*of_other, *other, kName) : Operand();
    (in.*first).grad_m = h.data();
    (in.*second).grad_m = h_other.data();
    return {h, h_other};
  }

 private:
  void check(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(x.dim() == 3, kName, ": ", name, " must be 3-D, got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0, kName, ": ", name, " has no kernels or no dims");
    STD_TORCH_CHECK(x.scalar_type() == m->scalar_type(), kName, ": all tensors must have one dtype");
  }
};

}  // namespace
}  // namespace gankern
