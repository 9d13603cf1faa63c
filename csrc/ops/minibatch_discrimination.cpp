// torch.ops.gankern.minibatch_discrimination and its gradients on CPU tensors. Schemas:
// gankern/ops/minibatch_discrimination.py.
#include "../cpu/minibatch_discrimination.h"

#include "minibatch_discrimination.h"

namespace gankern {
namespace {

using Task = MinibatchDiscrimination;
struct Problem : Pairs<Task, &Task::rows, &Task::columns> {
  using Pairs::Pairs;

  Tensor sums(void** place) const { return result(*m, {in.rows.count, in.kernels}, place); }
  Tensor gradient(const Tensor& of, void** place) const {
    return result(of, {of.size(0), of.size(1), of.size(2)}, place);
  }
};

Tensor forward(Tensor m, Optional other, bool include_self) {
  Problem problem(m, other);
  Tensor sums = problem.sums(&problem.in.rows.sums);
  problem.in.include_self = include_self;
  minibatch_discrimination().forward[dtype_index(m, kName)](problem.in, torch_threads());
  return sums;
}

std::tuple<Tensor, Tensor> backward(Tensor grad_in, Tensor m, Optional other) {
  Problem problem(m, other);
  const Operand grad = problem.take_grad(grad_in);
  Tensor grad_m = problem.gradient(m, &problem.in.rows.out_m);
  Tensor grad_other = other ? problem.gradient(*other, &problem.in.columns.out_m) : missing(m);
  minibatch_discrimination().backward[dtype_index(m, kName)](problem.in, torch_threads());
  return {grad_m, grad_other};
}

std::tuple<Tensor, Tensor, Tensor> double_backward(Optional grad_grad_m, Optional grad_grad_other,
                                                   Tensor grad_in, Tensor m, Optional other) {
  Problem problem(m, other);
  const Operand grad = problem.take_grad(grad_in);
  const auto grad_grads = problem.take_grad_grads(grad_grad_m, grad_grad_other);
  Tensor grad_grad = problem.sums(&problem.in.rows.sums);
  Tensor grad_m = problem.gradient(m, &problem.in.rows.out_m);
  Tensor grad_other = other ? problem.gradient(*other, &problem.in.columns.out_m) : missing(m);
  minibatch_discrimination().double_backward[dtype_index(m, kName)](problem.in, torch_threads());
  return {grad_grad, grad_m, grad_other};
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) { implement_orders<forward, backward, double_backward>(m, kName); }

}  // namespace
}  // namespace gankern
