// torch.ops.gankern.interpolate_samples and its gradients on CPU tensors. Schemas:
// gankern/ops/interpolate_samples.py.
#include "../cpu/interpolate_samples.h"

#include "samples.h"

namespace gankern {
namespace {

constexpr const char* kName = "interpolate_samples";

InterpolateSamples problem_like(const Tensor& x, const Tensor& alpha) {
  InterpolateSamples in{};
  in.samples = x.size(0);
  in.size = in.samples ? x.numel() / in.samples : 0;
  in.alpha = alpha.const_data_ptr();
  return in;
}

Tensor forward(Tensor real_in, Tensor fake_in, Tensor alpha_in) {
  STD_TORCH_CHECK(real_in.dim() >= 1, kName, ": real has no dimensions");
  check_like(fake_in, real_in, kName);
  const Tensor real = sample_major(real_in), fake = laid_out_as(fake_in, real);
  const Tensor alpha = taken_per_sample(alpha_in, real, kName);
  Tensor out = torch::stable::empty_like(real);
  InterpolateSamples in = problem_like(real, alpha);
  in.real = real.const_data_ptr();
  in.fake = fake.const_data_ptr();
  in.out = out.mutable_data_ptr();
  interpolate_samples().forward[dtype_index(real, kName)](in, torch_threads());
  return out;
}

std::tuple<Tensor, Tensor> backward(Tensor grad_in, Tensor alpha_in) {
  STD_TORCH_CHECK(grad_in.dim() >= 1, kName, ": grad has no dimensions");
  const Tensor grad = sample_major(grad_in);
  const Tensor alpha = taken_per_sample(alpha_in, grad, kName);
  Tensor grad_real = torch::stable::empty_like(grad), grad_fake = torch::stable::empty_like(grad);
  InterpolateSamples in = problem_like(grad, alpha);
  in.grad = grad.const_data_ptr();
  in.grad_real = grad_real.mutable_data_ptr();
  in.grad_fake = grad_fake.mutable_data_ptr();
  interpolate_samples().backward[dtype_index(grad, kName)](in, torch_threads());
  return {grad_real, grad_fake};
}

}  // namespace
}  // namespace gankern

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("interpolate_samples", TORCH_BOX(&gankern::forward));
  m.impl("interpolate_samples_backward", TORCH_BOX(&gankern::backward));
}
