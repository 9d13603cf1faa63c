// Batch normalisation with a (leaky) ReLU behind it: gankern/ops/batch_norm_act.py with its rule.
#include "norm.h"
#include "prelu.h"

namespace gankern::nodes {
namespace batch_norm_act {

Primitive self("batch_norm_act");

using Optional = std::optional<Tensor>;
using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Optional&, const Optional&, const Optional&,
                                           const Optional&, bool, double, double, const Optional&);
using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&,
                                                            const Optional&, const Tensor&, bool, double,
                                                            bool, const Optional&);
using DoubleBackward = std::tuple<Tensor, Tensor, Tensor>(const Optional&, const Optional&, const Optional&,
                                                          const Tensor&, const Tensor&, const Optional&,
                                                          const Optional&, const Tensor&, bool, double, bool);

// Kept: x, weight, bias, slope, statistics. The statistics have no gradient, and are none of the recorded outputs.
struct BatchNormAct final : Rule {
  bool training;  // with x's own statistics
  double eps, negative_slope;

  const char* primitive() const override { return "batch_norm_act"; }
  Options options() const override { return {double(training), eps, negative_slope}; }
  bool pieces() const override { return negative_slope != 1; }

  std::tuple<Tensor, Tensor> forward(const Tensor& x, const Optional& weight, const Optional& bias,
                                     const Optional& mean, const Optional& var, const Optional& slope) const {
    static const auto op = find<Forward>("gankern::batch_norm_act");
    return op.call(x, weight, bias, mean, var, training, eps, negative_slope, slope);
  }

  std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const Tensor& grad, const Tensors& saved, bool affine,
                                                      double each, const Optional& slope) const {
    static const auto op = find<Backward>("gankern::batch_norm_act_backward");
    return op.call(grad, saved[0], optional(saved[1]), optional(saved[2]), saved[4], training, each, affine,
                   slope);
  }

  std::tuple<Tensor, Tensor, Tensor> double_backward(const Tensors& h, const Tensor& grad,
                                                     const Tensors& saved, double each,
                                                     bool needs_weight) const {
    static const auto op = find<DoubleBackward>("gankern::batch_norm_act_double_backward");
    return op.call(optional(h[0]), optional(h[1]), optional(h[2]), grad, saved[0], optional(saved[1]),
                   optional(saved[2]), saved[4], training, each, needs_weight);
  }

  Tensors backward(const Needed& needed, const Tensors& grads, const Tensors& saved) const override {
    auto [grad_x, grad_weight, grad_bias, grad_slope] =
        backward(grads[0], saved, needed[1] || needed[2], negative_slope, optional(saved[3]));
    return {std::move(grad_x), needed[1] ? std::move(grad_weight) : Tensor(),
            needed[2] ? std::move(grad_bias) : Tensor(), needed[3] ? std::move(grad_slope) : Tensor()};
  }

  Tensors double_backward(const Needed& needed, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    const Tensor &h = grad_grads[0], &h_weight = grad_grads[1];
    const bool needs_weight = needed[2], moves_x = h_weight.defined() || (h.defined() && training);
    if (saved[3].defined()) {
      NormWithPrelu norm;
      norm.forward = [&] { return std::get<0>(forward_alone(saved)); };
      norm.backward = [&](const Tensor& grad) {
        auto [x, weight, bias, none] =
            backward(grad, saved, saved[1].defined() || saved[2].defined(), 1, std::nullopt);
        return std::make_tuple(x, weight, bias);
      };
      norm.double_backward = [&](const Tensor& grad) {
        return double_backward(grad_grads, grad, saved, 1, needs_weight);
      };
      NormGradients found = prelu_double_backward(needed, norm, moves_x, h, h_weight, grad_grads[2],
                                                  grad_grads[3], grads[0], saved[3]);
      return {found.grad, found.x, found.weight, found.bias, found.slope, Tensor()};
    }
    auto [grad_grad, grad_x, grad_weight] =
        double_backward(grad_grads, grads[0], saved, negative_slope, needs_weight);
    return {std::move(grad_grad),
            moves_x ? std::move(grad_x) : Tensor(),
            needs_weight && h.defined() ? std::move(grad_weight) : Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }

  std::tuple<Tensor, Tensor> forward_alone(const Tensors& saved) const {
    static const auto op = find<Forward>("gankern::batch_norm_act");
    return op.call(saved[0], optional(saved[1]), optional(saved[2]), saved[4].select(0, 0),
                   saved[4].select(0, 2), training, eps, 1, std::nullopt);
  }
};

// The arguments of gankern.functional.batch_norm_act.
PyObject* call(PyObject* const* in) {
  const Tensor* x = tensor(in[0]);
  Optional mean, var, weight, bias, slope;
  auto rule = std::make_shared<BatchNormAct>();
  bool training;
  double momentum;
  if (!x || !optional_tensor(in[1], &mean) || !optional_tensor(in[2], &var) ||
      !optional_tensor(in[3], &weight) || !optional_tensor(in[4], &bias) || !flag(in[5], &training) ||
      !number(in[6], &momentum) || !number(in[7], &rule->eps) || !optional_tensor(in[11], &slope) ||
      !slope_of(in[8], in[9], slope, &rule->negative_slope) || !plain())
    return decline();
  if (x->dim() < 2 || x->size(1) == 0 || !(rule->eps >= 0) || !affine_fits(*x, weight, bias) ||
      !running_fits(*x, mean, var, training))
    return decline();
  rule->training = training || !mean;
  if (rule->training && x->numel() == x->size(1)) return decline();
  if (slope && !slope_fits(*x, &slope)) return decline();
  if (!(rule->implementation = selected(self, in[0], in[10]))) return decline();
  widen(*x, &weight);
  widen(*x, &bias);
  Tensor y, stats;
  {
    const Running running;
    if (!rule->training) {
      widen(*x, &mean);
      widen(*x, &var);
    }
    std::tie(y, stats) = rule->training ? rule->forward(*x, weight, bias, std::nullopt, std::nullopt, slope)
                                        : rule->forward(*x, weight, bias, mean, var, slope);
    if (training && mean && x->numel()) update_running(mean, var, stats, momentum);
  }
  const Tensor &w = value(weight), &b = value(bias), &a = value(slope);
  if (records({x, &w, &b, &a})) record(rule, {x, &w, &b, &a}, {&y}, {{*x}, {w}, {b}, {a}, {stats}});
  return THPVariable_Wrap(std::move(y));
}

const Functions functions = {method("batch_norm_act", entry<call, 12>)};

}  // namespace batch_norm_act

}  // namespace gankern::nodes
