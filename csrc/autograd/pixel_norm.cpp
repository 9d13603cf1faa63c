// Pixelwise normalisation, after a bias and a (leaky) ReLU or on its own: gankern/ops/pixel_norm.py with its
// rule.
#include "call.h"

namespace gankern::nodes {
namespace pixel_norm {

Primitive self("pixel_norm");

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const std::optional<Tensor>&, int64_t, double,
                                           double, double);
using Backward = std::tuple<Tensor, Tensor>(const Tensor&, const std::optional<Tensor>&, const Tensor&,
                                            const Tensor&, int64_t, double, double, bool);
using DoubleBackward = std::tuple<Tensor, Tensor, Tensor>(const std::optional<Tensor>&,
                                                          const std::optional<Tensor>&, const Tensor&,
                                                          const Tensor&, const Tensor&, int64_t, double,
                                                          double);

struct PixelNorm final : Rule, std::enable_shared_from_this<PixelNorm> {
  int64_t dim;
  double positive, negative, eps;  // the activation's two slopes
  bool alone;                      // without bias and activation

  const char* primitive() const override { return "pixel_norm"; }
  Options options() const override { return {double(dim), positive, negative, eps, double(alone)}; }

  std::tuple<Tensor, Tensor> forward(const Tensor& x, const std::optional<Tensor>& bias) const {
    static const auto op = find<Forward>("gankern::pixel_norm");
    return op.call(x, bias, dim, positive, negative, eps);
  }

  Tensors backward(const Needed& needed, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<Backward>("gankern::pixel_norm_backward");
    const Tensor grad = grads[0].defined() ? grads[0] : at::zeros_like(saved[0]);
    auto [grad_x, grad_bias] =
        op.call(grad, optional(grads[1]), saved[0], saved[1], dim, positive, negative, needed[1]);
    return {std::move(grad_x), needed[1] ? std::move(grad_bias) : Tensor()};
  }

  // Alone, its input is a result that whoever made it keeps anyway, as torch's formulation does; that does not
  // keep y, which may then be overwritten.
  size_t spares() const override { return alone; }
  Tensors again(const Tensors& spares) const override { return recorded(spares[0], std::nullopt); }

  // y and the scales.
  Tensors recorded(const Tensor& x, const std::optional<Tensor>& bias) const {
    Tensor y, scale;
    {
      const BelowAutograd below;
      std::tie(y, scale) = forward(x, bias);
    }
    const Tensor& b = value(bias);
    if (records({&x, &b})) {
      if (alone)
        record(shared_from_this(), {&x, &b}, {&y, &scale}, {{y, true}, {scale, true}, {x}});
      else
        record(shared_from_this(), {&x, &b}, {&y, &scale}, {{y, true}, {scale, true}});
    }
    return {y, scale};
  }

  Tensors double_backward(const Needed&, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    static const auto op = find<DoubleBackward>("gankern::pixel_norm_double_backward");
    if (grads[1].defined()) refuse_third_order();  // what comes back to the scale is of second order already
    auto [grad_grad, grad_y, grad_scale] = op.call(optional(grad_grads[0]), optional(grad_grads[1]), grads[0],
                                                   saved[0], saved[1], dim, positive, negative);
    return {std::move(grad_grad), Tensor(), std::move(grad_y), std::move(grad_scale)};
  }
};

// (x, bias, dim, activation, negative_slope, gain, eps, implementation)
PyObject* call(PyObject* const* in) {
  const Tensor* x = tensor(in[0]);
  std::optional<Tensor> bias;
  auto rule = std::make_shared<PixelNorm>();
  double slope, gain;
  if (!x || !optional_tensor(in[1], &bias) || !integer(in[2], &rule->dim) ||
      !slope_of(in[3], in[4], &slope) || !number(in[5], &gain) || !number(in[6], &rule->eps) ||
      !(rule->eps >= 0) || !plain())
    return decline();
  if (!channels_fit(*x, bias, &rule->dim) || slope < 0) return decline();
  rule->positive = gain;
  rule->negative = gain * slope;
  if (!(rule->implementation = selected(self, in[0], in[7]))) return decline();
  rule->alone = !bias && rule->positive == 1 && rule->negative == 1;
  Tensor y;
  {
    const pybind11::gil_scoped_release released;
    y = rule->recorded(*x, bias)[0];
  }
  return THPVariable_Wrap(std::move(y));
}

const Functions functions = {method("pixel_norm", entry<call, 8>)};

}  // namespace pixel_norm

}  // namespace gankern::nodes
