// torch.ops.gankern.minibatch_discrimination and its gradients on CPU tensors. Schemas:
// gankern/ops/minibatch_discrimination.py.
#include "../cpu/minibatch_discrimination.h"

#include "common.h"

namespace gankern {
namespace {

constexpr const char* kName = "minibatch_discrimination";

// The problem in the kernels' own layout. The tensors that own the memory stay alive in here.
struct Problem {
  const Operand m, other;
  MinibatchDiscrimination in{};

  Problem(const Tensor& m_in, const Optional& other_in) : m(compact(m_in)), other(compact(other_in)) {
    check(*m, "m");
    in.kernels = m->size(1);
    in.dims = m->size(2);
    in.rows.count = m->size(0);
    in.rows.m = m.data();
    in.one_set = !other;
    if (!other) return;
    check(*other, "other");
    STD_TORCH_CHECK(other->size(1) == in.kernels && other->size(2) == in.dims, kName,
                    ": m and other differ in kernels or dims");
    in.columns.count = other->size(0);
    in.columns.m = other.data();
  }

  void check(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(x.dim() == 3, kName, ": ", name, " must be 3-D, got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0, kName, ": ", name, " has no kernels or no dims");
    STD_TORCH_CHECK(x.scalar_type() == m->scalar_type(), kName, ": all tensors must have one dtype");
  }
  void take_grad(const Operand& grad) {
    STD_TORCH_CHECK(grad->scalar_type() == m->scalar_type(), kName, ": all tensors must have one dtype");
    STD_TORCH_CHECK(grad->dim() == 2 && grad->size(0) == in.rows.count && grad->size(1) == in.kernels, kName,
                    ": grad does not have the shape of the result");
    in.rows.grad = grad.data();
  }
  Tensor empty_sums() const { return blank(*m, {in.rows.count, in.kernels}); }
};

Tensor empty(const Tensor& like) { return blank(like, {like.size(0), like.size(1), like.size(2)}); }

Tensor forward(Tensor m, Optional other, bool include_self) {
  Problem problem(m, other);
  Tensor sums = problem.empty_sums();
  problem.in.rows.sums = sums.mutable_data_ptr();
  problem.in.include_self = include_self;
  minibatch_discrimination().forward[dtype_index(m, kName)](problem.in, torch_threads());
  return sums;
}

std::tuple<Tensor, Tensor> backward(Tensor grad_in, Tensor m, Optional other) {
  Problem problem(m, other);
  const Operand grad = compact(grad_in);
  problem.take_grad(grad);
  Tensor grad_m = empty(m), grad_other = other ? empty(*other) : missing(m);
  problem.in.rows.out_m = grad_m.mutable_data_ptr();
  if (other) problem.in.columns.out_m = grad_other.mutable_data_ptr();
  minibatch_discrimination().backward[dtype_index(m, kName)](problem.in, torch_threads());
  return {grad_m, grad_other};
}

std::tuple<Tensor, Tensor, Tensor> double_backward(Optional grad_grad_m, Optional grad_grad_other,
                                                   Tensor grad_in, Tensor m, Optional other) {
  Problem problem(m, other);
  const Operand grad = compact(grad_in);
  problem.take_grad(grad);
  STD_TORCH_CHECK(other || !grad_grad_other, kName, ": grad_grad_other without other");
  const Operand h = like(grad_grad_m, *problem.m, kName),
                h_other = grad_grad_other ? like(*grad_grad_other, *problem.other, kName) : Operand();
  problem.in.rows.grad_m = h.data();
  problem.in.columns.grad_m = h_other.data();
  Tensor grad_grad = problem.empty_sums(), grad_m = empty(m), grad_other = other ? empty(*other) : missing(m);
  problem.in.rows.sums = grad_grad.mutable_data_ptr();
  problem.in.rows.out_m = grad_m.mutable_data_ptr();
  if (other) problem.in.columns.out_m = grad_other.mutable_data_ptr();
  minibatch_discrimination().double_backward[dtype_index(m, kName)](problem.in, torch_threads());
  return {grad_grad, grad_m, grad_other};
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) { implement_orders<forward, backward, double_backward>(m, kName); }

}  // namespace
}  // namespace gankern
