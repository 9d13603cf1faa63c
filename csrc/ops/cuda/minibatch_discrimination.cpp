// torch.ops.gankern_cuda.minibatch_discrimination and its gradients on CUDA tensors. Schemas:
// gankern/ops/minibatch_discrimination.py.
#include "../../cuda/minibatch_discrimination.h"

#include "../minibatch_discrimination.h"
#include "launching.h"

namespace gankern {
namespace {

using cuda::PairsPass;

struct Problem : Pairs<cuda::Pairs, &cuda::Pairs::points, &cuda::Pairs::others> {
  Problem(PairsPass pass, const Tensor& m, const Optional& other) : Pairs(m, other) { in.pass = pass; }

  // The results: of no points on the other side, zeros.
  Tensor filled(Tensor x) const { return pairless() ? torch::stable::fill_(x, 0.0) : x; }
  Tensor sums(void** place) const { return filled(result(*m, {in.points.count, in.kernels}, place)); }
  Tensor gradient(const Tensor& of, void** place) const {
    return filled(result(of, {of.size(0), of.size(1), of.size(2)}, place));
  }
  bool pairless() const { return in.points.count == 0 || (!in.one_set && in.others.count == 0); }

  void run() const {
    if (pairless()) return;
    const Launching launching(*m);
    const int dtype = dtype_index(*m, kName);
    const Tensor scratch = scratch_of(cuda::minibatch_discrimination_scratch(in, dtype), *m);
    cuda::minibatch_discrimination(in, dtype, scratch.mutable_data_ptr(), launching.stream());
  }
};

Tensor forward(Tensor m, Optional other, bool include_self) {
  Problem problem(PairsPass::kForward, m, other);
  problem.in.include_self = include_self;
  Tensor sums = problem.sums(&problem.in.points.sums);
  problem.run();
  return sums;
}

std::tuple<Tensor, Tensor> backward(Tensor grad_in, Tensor m, Optional other) {
  Problem problem(PairsPass::kBackward, m, other);
  const Operand grad = problem.take_grad(grad_in);
  Tensor grad_m = problem.gradient(m, &problem.in.points.out_m);
  Tensor grad_other = other ? problem.gradient(*other, &problem.in.others.out_m) : missing(m);
  problem.run();
  return {grad_m, grad_other};
}

std::tuple<Tensor, Tensor, Tensor> double_backward(Optional grad_grad_m, Optional grad_grad_other,
                                                   Tensor grad_in, Tensor m, Optional other) {
  Problem problem(PairsPass::kDoubleBackward, m, other);
  const Operand grad = problem.take_grad(grad_in);
  const auto grad_grads = problem.take_grad_grads(grad_grad_m, grad_grad_other);
  Tensor grad_grad = problem.sums(&problem.in.points.sums);
  Tensor grad_m = problem.gradient(m, &problem.in.points.out_m);
  Tensor grad_other = other ? problem.gradient(*other, &problem.in.others.out_m) : missing(m);
  problem.run();
  return {grad_grad, grad_m, grad_other};
}

STABLE_TORCH_LIBRARY_IMPL(gankern_cuda, GANKERN_DEVICE, m) {
  implement_orders<forward, backward, double_backward>(m, kName);
}

}  // namespace
}  // namespace gankern
