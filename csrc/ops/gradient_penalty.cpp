// torch.ops.gankern.gradient_penalty and its gradients on CPU tensors. Schemas:
// gankern/ops/gradient_penalty.py.
#include "../cpu/gradient_penalty.h"

#include "samples.h"

namespace gankern {
namespace {

constexpr const char* kName = "gradient_penalty";

Operand samples_of(const Tensor& gradient) {
  STD_TORCH_CHECK(gradient.dim() >= 1, kName, ": gradient has no dimensions");
  return sample_major(gradient);
}

// The tensors that own the memory stay alive in here.
struct Penalty {
  const Operand gradient;
  std::vector<double> partial;
  GradientPenalty in{};

  Penalty(const Tensor& given, double target, bool one_sided) : gradient(samples_of(given)) {
    in.samples = gradient->size(0);
    in.size = in.samples ? gradient->numel() / in.samples : 0;
    in.target = target;
    in.one_sided = one_sided;
    in.gradient = gradient.data();
  }
  void make_partial() {
    partial.resize(size_t(gradient_penalty_partials(in.samples, in.size)));
    in.partial = partial.data();
  }
};

std::tuple<Tensor, Tensor> forward(Tensor gradient, double target, bool one_sided) {
  Penalty problem(gradient, target, one_sided);
  problem.make_partial();
  Tensor values = per_sample(gradient), norms = per_sample(gradient);
  problem.in.values = values.mutable_data_ptr();
  problem.in.norms = norms.mutable_data_ptr();
  gradient_penalty().forward[dtype_index(gradient, kName)](problem.in, torch_threads());
  return {values, norms};
}

Tensor backward(Tensor grad_in, Tensor gradient, Tensor norms_in, double target, bool one_sided) {
  Penalty problem(gradient, target, one_sided);
  const Operand grad = taken_per_sample(grad_in, gradient, kName),
                norms = taken_per_sample(norms_in, gradient, kName);
  Tensor out = blank_like(*problem.gradient);
  problem.in.grad = grad.data();
  problem.in.norms = const_cast<void*>(norms.data());
  problem.in.out = out.mutable_data_ptr();
  gradient_penalty().backward[dtype_index(gradient, kName)](problem.in, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> double_backward(Tensor grad_grad_in, Tensor grad_in, Tensor gradient,
                                           Tensor norms_in, double target, bool one_sided) {
  Penalty problem(gradient, target, one_sided);
  problem.make_partial();
  const Operand grad_grad = like(grad_grad_in, *problem.gradient, kName);
  const Operand grad = taken_per_sample(grad_in, gradient, kName),
                norms = taken_per_sample(norms_in, gradient, kName);
  Tensor to_grad = per_sample(gradient), out = blank_like(*problem.gradient);
  problem.in.grad_grad = grad_grad.data();
  problem.in.grad = grad.data();
  problem.in.norms = const_cast<void*>(norms.data());
  problem.in.values = to_grad.mutable_data_ptr();
  problem.in.out = out.mutable_data_ptr();
  gradient_penalty().double_backward[dtype_index(gradient, kName)](problem.in, torch_threads());
  return {to_grad, out};
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) { implement_orders<forward, backward, double_backward>(m, kName); }

}  // namespace
}  // namespace gankern
