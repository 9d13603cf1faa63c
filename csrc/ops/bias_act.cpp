// torch.ops.gankern.bias_act and its gradients on CPU tensors. Schemas: gankern/ops/bias_act.py.
#include "../cpu/bias_act.h"

#include <cmath>

#include "layout.h"

namespace gankern {
namespace {

constexpr const char* kName = "bias_act";

BiasAct problem(const Tensor& x, int64_t dim, int64_t activation, double negative_slope, double gain,
                const std::optional<double>& clamp) {
  check_dim(x, dim, kName);
  STD_TORCH_CHECK(activation >= 0 && activation < kActivations, kName, ": there is no activation ",
                  activation);
  BiasAct in{};
  in.layout = layout_of(x, dim);
  in.x = x.const_data_ptr();
  in.negative_slope = negative_slope;
  in.gain = gain;
  in.clamp = clamp ? *clamp : NAN;
  return in;
}

Tensor forward(Tensor x_in, Optional bias_in, int64_t dim, int64_t activation, double negative_slope,
               double gain, std::optional<double> clamp) {
  const Operand x = dense(x_in);
  BiasAct in = problem(*x, dim, activation, negative_slope, gain, clamp);
  const Operand bias = along_channels(bias_in, *x, dim, kName);
  in.bias = bias.data();
  Tensor y = result_like(*x, &in.out);
  bias_act().forward[activation][dtype_index(y, kName)](in, torch_threads());
  return y;
}

void forward_(Tensor x, Optional bias_in, int64_t dim, int64_t activation, double negative_slope, double gain,
              std::optional<double> clamp) {
  const Operand values = dense(x);
  BiasAct in = problem(*values, dim, activation, negative_slope, gain, clamp);
  const Operand bias = along_channels(bias_in, x, dim, kName);
  in.bias = bias.data();
  in.out = values->mutable_data_ptr();
  bias_act().forward[activation][dtype_index(x, kName)](in, torch_threads());
  if (values.data() != x.const_data_ptr()) torch::stable::copy_(x, *values);
}

std::tuple<Tensor, Tensor> backward(Tensor grad_in, Tensor saved_in, Optional bias_in, int64_t dim,
                                    int64_t activation, double negative_slope, double gain,
                                    std::optional<double> clamp, bool sums) {
  const Operand owner = dense(saved_in);
  const Tensor& saved = *owner;
  BiasAct in = problem(saved, dim, activation, negative_slope, gain, clamp);
  const Operand grad = like(grad_in, saved, kName);
  const Operand bias = along_channels(bias_in, saved, dim, kName);
  in.bias = bias.data();
  in.grad = grad.data();
  Tensor grad_x = result_like(saved, &in.out), grad_bias = channel_sums(saved, dim, &in.out_bias, sums);
  bias_act().backward[activation][dtype_index(saved, kName)](in, torch_threads());
  return {grad_x, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> double_backward(Optional h_in, Optional h_bias_in, Tensor grad_in,
                                                   Tensor saved_in, Optional bias_in, int64_t dim,
                                                   int64_t activation, double negative_slope, double gain,
                                                   std::optional<double> clamp, bool needs_grad,
                                                   bool needs_saved, bool sums) {
  const Operand owner = dense(saved_in);
  const Tensor& saved = *owner;
  BiasAct in = problem(saved, dim, activation, negative_slope, gain, clamp);
  const Operand grad = like(grad_in, saved, kName);
  const Operand h = like(h_in, saved, kName), h_bias = along_channels(h_bias_in, saved, dim, kName),
                bias = along_channels(bias_in, saved, dim, kName);
  in.bias = bias.data();
  in.grad = grad.data();
  in.h = h.data();
  in.h_bias = h_bias.data();
  Tensor grad_grad = result_like(saved, &in.out, needs_grad);
  Tensor grad_saved = result_like(saved, &in.out_x, needs_saved || sums);
  Tensor grad_bias = channel_sums(saved, dim, &in.out_bias, sums);
  bias_act().double_backward[activation][dtype_index(saved, kName)](in, torch_threads());
  return {grad_grad, grad_saved, grad_bias};
}

// ---- PReLU: a slope of each channel, with a gradient ----------------------------------------------------

constexpr int kPrelu = static_cast<int>(Activation::kPrelu);

Tensor prelu(Tensor x_in, Optional bias_in, Tensor slope_in, int64_t dim, double gain,
             std::optional<double> clamp) {
  const Operand x = dense(x_in);
  BiasAct in = problem(*x, dim, kPrelu, 0, gain, clamp);
  const Operand bias = along_channels(bias_in, *x, dim, kName),
                slope = along_channels(slope_in, *x, dim, kName);
  in.bias = bias.data();
  in.slope = slope.data();
  Tensor y = result_like(*x, &in.out);
  bias_act().forward[kPrelu][dtype_index(y, kName)](in, torch_threads());
  return y;
}

std::tuple<Tensor, Tensor, Tensor> prelu_backward(Tensor grad_in, Tensor x_in, Optional bias_in,
                                                  Tensor slope_in, int64_t dim, double gain,
                                                  std::optional<double> clamp, bool sums, bool slope_sums) {
  const Operand x = dense(x_in);
  BiasAct in = problem(*x, dim, kPrelu, 0, gain, clamp);
  const Operand grad = like(grad_in, *x, kName), bias = along_channels(bias_in, *x, dim, kName),
                slope = along_channels(slope_in, *x, dim, kName);
  in.bias = bias.data();
  in.slope = slope.data();
  in.grad = grad.data();
  Tensor grad_x = result_like(*x, &in.out), grad_bias = channel_sums(*x, dim, &in.out_bias, sums),
         grad_slope = channel_sums(*x, dim, &in.out_slope, slope_sums);
  bias_act().backward[kPrelu][dtype_index(*x, kName)](in, torch_threads());
  return {grad_x, grad_bias, grad_slope};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> prelu_double_backward(Optional h_in, Optional h_bias_in,
                                                                 Optional h_slope_in, Tensor grad_in,
                                                                 Tensor x_in, Optional bias_in,
                                                                 Tensor slope_in, int64_t dim, double gain,
                                                                 std::optional<double> clamp, bool needs_x,
                                                                 bool sums, bool slope_sums) {
  const Operand x = dense(x_in);
  BiasAct in = problem(*x, dim, kPrelu, 0, gain, clamp);
  const Operand grad = like(grad_in, *x, kName), h = like(h_in, *x, kName),
                h_bias = along_channels(h_bias_in, *x, dim, kName),
                h_slope = along_channels(h_slope_in, *x, dim, kName),
                bias = along_channels(bias_in, *x, dim, kName),
                slope = along_channels(slope_in, *x, dim, kName);
  in.bias = bias.data();
  in.slope = slope.data();
  in.grad = grad.data();
  in.h = h.data();
  in.h_bias = h_bias.data();
  in.h_slope = h_slope.data();
  Tensor grad_grad = result_like(*x, &in.out), grad_x = result_like(*x, &in.out_x, needs_x),
         grad_bias = channel_sums(*x, dim, &in.out_bias, sums),
         grad_slope = channel_sums(*x, dim, &in.out_slope, slope_sums);
  bias_act().double_backward[kPrelu][dtype_index(*x, kName)](in, torch_threads());
  return {grad_grad, grad_x, grad_bias, grad_slope};
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  implement_orders<forward, backward, double_backward>(m, kName);
  m.impl("bias_act_forward_", TORCH_BOX(&forward_));
  m.impl("bias_act_prelu", TORCH_BOX(&prelu));
  m.impl("bias_act_prelu_backward", TORCH_BOX(&prelu_backward));
  m.impl("bias_act_prelu_double_backward", TORCH_BOX(&prelu_double_backward));
}

}  // namespace
}  // namespace gankern
