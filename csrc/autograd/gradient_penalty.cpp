// The penalty of each sample's gradient norm: gankern/ops/gradient_penalty.py with its rule.
#include "call.h"

namespace gankern::nodes {
namespace gradient_penalty {

Primitive self("gradient_penalty");

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, double, bool);
using Backward = Tensor(const Tensor&, const Tensor&, const Tensor&, double, bool);
using DoubleBackward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                                  double, bool);

// Kept: the gradient and its norms, which are none of the recorded outputs.
struct GradientPenalty final : Rule {
  double target;
  bool one_sided;

  const char* primitive() const override { return "gradient_penalty"; }
  Options options() const override { return {target, double(one_sided)}; }

  std::tuple<Tensor, Tensor> forward(const Tensor& gradient) const {
    static const auto op = find<Forward>("gankern::gradient_penalty");
    return op.call(gradient, target, one_sided);
  }
  Tensors backward(const Needed&, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<Backward>("gankern::gradient_penalty_backward");
    return {op.call(grads[0], saved[0], saved[1], target, one_sided)};
  }
  Tensors double_backward(const Needed&, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    static const auto op = find<DoubleBackward>("gankern::gradient_penalty_double_backward");
    auto [to_grad, to_gradient] = op.call(grad_grads[0], grads[0], saved[0], saved[1], target, one_sided);
    return {std::move(to_grad), std::move(to_gradient), Tensor()};
  }
};

// (gradient, target, one_sided, implementation)
PyObject* call(PyObject* const* in) {
  const Tensor* gradient = tensor(in[0]);
  auto rule = std::make_shared<GradientPenalty>();
  if (!gradient || gradient->dim() < 1 || !number(in[1], &rule->target) || !(rule->target >= 0) ||
      !flag(in[2], &rule->one_sided) || !plain())
    return decline();
  if (!(rule->implementation = selected(self, in[0], in[3]))) return decline();
  Tensor values, norms;
  {
    const Running running;
    std::tie(values, norms) = rule->forward(*gradient);
  }
  if (records({gradient})) record(rule, {gradient}, {&values}, {{*gradient}, {norms}});
  return THPVariable_Wrap(std::move(values));
}

const Functions functions = {method("gradient_penalty", entry<call, 4>)};

}  // namespace gradient_penalty

}  // namespace gankern::nodes
