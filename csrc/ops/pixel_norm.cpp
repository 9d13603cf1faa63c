// torch.ops.gankern.pixel_norm and its gradients on CPU tensors. Schemas: gankern/ops/pixel_norm.py.
#include "../cpu/pixel_norm.h"

#include "layout.h"

namespace gankern {
namespace {

constexpr const char* kName = "pixel_norm";

PixelNorm problem(const Tensor& x, int64_t dim, double positive, double negative) {
  check_dim(x, dim, kName);
  PixelNorm in{};
  in.layout = layout_of(x, dim);
  in.x = x.const_data_ptr();
  in.positive = positive;
  in.negative = negative;
  return in;
}

// Of y as the forward returned it: scale's order is that of y's memory.
PixelNorm problem_of_result(const Tensor& y, int64_t dim, double positive, double negative) {
  const Operand without_gaps = dense(y);
  STD_TORCH_CHECK(same_strides(*without_gaps, y), kName, ": y must be what the forward returned");
  return problem(y, dim, positive, negative);
}

int64_t pixels(const PixelNorm& in) { return in.layout.outer * in.layout.inner; }

// One value a pixel.
Tensor new_scale(const Tensor& x, const PixelNorm& in) {
  return blank(x, {pixels(in)}, accumulation_type(x));
}
// What the forward returned.
void take_scale(PixelNorm* in, const Tensor& y, const Operand& scale) {
  STD_TORCH_CHECK(
      scale->scalar_type() == accumulation_type(y) && scale->dim() == 1 && scale->size(0) == pixels(*in),
      kName, ": scale must be what the forward returned");
  in->scale = const_cast<void*>(scale.data());
}

std::tuple<Tensor, Tensor> forward(Tensor x_in, Optional bias_in, int64_t dim, double positive,
                                   double negative, double eps) {
  const Operand owner = dense(x_in);
  const Tensor& x = *owner;
  PixelNorm in = problem(x, dim, positive, negative);
  const Operand bias = along_channels(bias_in, x, dim, kName);
  in.bias = bias.data();
  Tensor y = result_like(x, &in.out), scale = new_scale(x, in);
  in.scale = scale.mutable_data_ptr();
  in.eps = eps;
  pixel_norm().forward[dtype_index(x, kName)](in, torch_threads());
  return {y, scale};
}

std::tuple<Tensor, Tensor> backward(Tensor grad_in, Optional grad_scale_in, Tensor y, Tensor scale_in,
                                    int64_t dim, double positive, double negative, bool sums) {
  PixelNorm in = problem_of_result(y, dim, positive, negative);
  const Operand grad = like(grad_in, y, kName), scale = compact(scale_in);
  take_scale(&in, y, scale);
  const Operand grad_scale = like(grad_scale_in, *scale, kName);
  in.grad = grad.data();
  in.grad_scale = grad_scale.data();
  Tensor grad_x = result_like(y, &in.out), grad_bias = channel_sums(y, dim, &in.out_bias, sums);
  pixel_norm().backward[dtype_index(y, kName)](in, torch_threads());
  return {grad_x, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> double_backward(Optional h_in, Optional h_bias_in, Tensor grad_in,
                                                   Tensor y, Tensor scale_in, int64_t dim, double positive,
                                                   double negative) {
  PixelNorm in = problem_of_result(y, dim, positive, negative);
  const Operand grad = like(grad_in, y, kName), scale = compact(scale_in);
  const Operand h = like(h_in, y, kName), h_bias = along_channels(h_bias_in, y, dim, kName);
  take_scale(&in, y, scale);
  in.grad = grad.data();
  in.h = h.data();
  in.h_bias = h_bias.data();
  Tensor grad_grad = result_like(y, &in.out), grad_y = result_like(y, &in.out_x);
  Tensor grad_scale = new_scale(y, in);
  in.out_scale = grad_scale.mutable_data_ptr();
  pixel_norm().double_backward[dtype_index(y, kName)](in, torch_threads());
  return {grad_grad, grad_y, grad_scale};
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) { implement_orders<forward, backward, double_backward>(m, kName); }

}  // namespace
}  // namespace gankern
