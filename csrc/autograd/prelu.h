// PReLU behind a normalisation: its second order is made of that of the normalisation alone and of bias_act's, as in
// gankern/ops/_norm_act.py.
#pragma once

#include <functional>
#include <optional>
#include <tuple>

#include "node.h"

namespace gankern::nodes {

// torch.ops.gankern.bias_act_prelu_double_backward.
std::tuple<Tensor, Tensor, Tensor, Tensor> prelu_double_backward(
    const std::optional<Tensor>& h, const std::optional<Tensor>& h_bias, const std::optional<Tensor>& h_slope,
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias, const Tensor& slope, int64_t dim,
    double gain, std::optional<double> clamp, bool needs_x, bool sums, bool slope_sums);

// The normalisation without an activation, of the tensors that were kept: its result, the gradients of x, weight and
// bias for one of the result, and those of that gradient, of x and of weight.
struct NormWithPrelu {
  std::function<Tensor()> forward;
  std::function<std::tuple<Tensor, Tensor, Tensor>(const Tensor&)> backward, double_backward;
};
struct NormGradients {
  Tensor grad, x, weight, bias, slope;  // undefined where there is none, or nobody asks
};
// `needed`: of the result's gradient, x, weight, bias, slope. `moves_x`: whether double_backward has a gradient of x.
NormGradients prelu_double_backward(const Needed& needed, const NormWithPrelu& norm, bool moves_x,
                                    const Tensor& h, const Tensor& h_weight, const Tensor& h_bias,
                                    const Tensor& h_slope, const Tensor& grad, const Tensor& slope);

}  // namespace gankern::nodes
