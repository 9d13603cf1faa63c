// Batch normalisation with a (leaky) ReLU behind it: gankern/ops/batch_norm_act.py with its rule.
#include "call.h"

namespace gankern::nodes {
namespace batch_norm_act {

Primitive self("batch_norm_act");

using Optional = std::optional<Tensor>;
using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Optional&, const Optional&, const Optional&,
                                           const Optional&, bool, double, double);
using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&,
                                                    const Optional&, const Tensor&, bool, double, bool);
using DoubleBackward = std::tuple<Tensor, Tensor, Tensor>(const Optional&, const Optional&, const Optional&,
                                                          const Tensor&, const Tensor&, const Optional&,
                                                          const Optional&, const Tensor&, bool, double, bool);

// Kept: x, weight, bias, statistics. The statistics have no gradient, and are none of the recorded outputs.
struct BatchNormAct final : Rule {
  bool training;  // with x's own statistics
  double eps, negative_slope;

  const char* primitive() const override { return "batch_norm_act"; }
  bool pieces() const override { return negative_slope != 1; }

  std::tuple<Tensor, Tensor> forward(const Tensor& x, const Optional& weight, const Optional& bias,
                                     const Optional& mean, const Optional& var) const {
    static const auto op = find<Forward>("gankern::batch_norm_act");
    return op.call(x, weight, bias, mean, var, training, eps, negative_slope);
  }

  Tensors backward(const Needed& needed, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<Backward>("gankern::batch_norm_act_backward");
    auto [grad_x, grad_weight, grad_bias] =
        op.call(grads[0], saved[0], optional(saved[1]), optional(saved[2]), saved[3], training,
                negative_slope, needed[1] || needed[2]);
    return {std::move(grad_x), needed[1] ? std::move(grad_weight) : Tensor(),
            needed[2] ? std::move(grad_bias) : Tensor()};
  }

  Tensors double_backward(const Needed& needed, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    static const auto op = find<DoubleBackward>("gankern::batch_norm_act_double_backward");
    const Tensor &h = grad_grads[0], &h_weight = grad_grads[1];
    const bool needs_weight = needed[2];
    auto [grad_grad, grad_x, grad_weight] =
        op.call(optional(h), optional(h_weight), optional(grad_grads[2]), grads[0], saved[0],
                optional(saved[1]), optional(saved[2]), saved[3], training, negative_slope, needs_weight);
    const bool moves_x = h_weight.defined() || (h.defined() && training);
    return {std::move(grad_grad), moves_x ? std::move(grad_x) : Tensor(),
            needs_weight && h.defined() ? std::move(grad_weight) : Tensor(), Tensor(), Tensor()};
  }
};

bool affine_fits(const Tensor& x, const Optional& t) {
  if (!t) return true;
  const bool each = t->dim() == 2 && t->size(0) == x.size(0) && t->size(1) == x.size(1);
  return (each || (t->dim() == 1 && t->size(0) == x.size(1))) && t->device() == x.device() &&
         t->scalar_type() == accumulation_type(x);
}
bool running_fits(const Tensor& x, const Optional& t) {
  return !t || (t->dim() == 1 && t->size(0) == x.size(1) && t->device() == x.device() &&
                t->scalar_type() == accumulation_type(x) && !t->requires_grad());
}

// The arguments of gankern.functional.batch_norm_act.
PyObject* call(PyObject* const* in) {
  static const Words activations({"relu", "leaky_relu"});
  const Tensor* x = tensor(in[0]);
  Optional mean, var, weight, bias;
  auto rule = std::make_shared<BatchNormAct>();
  bool training;
  double momentum, slope;
  const int activation = activations.find(in[8]);
  if (!x || !optional_tensor(in[1], &mean) || !optional_tensor(in[2], &var) ||
      !optional_tensor(in[3], &weight) || !optional_tensor(in[4], &bias) || !flag(in[5], &training) ||
      !number(in[6], &momentum) || !number(in[7], &rule->eps) || (activation < 0 && in[8] != Py_None) ||
      !number(in[9], &slope) || !plain())
    return decline();
  if (x->dim() < 2 || x->size(1) == 0 || !(rule->eps >= 0) || mean.has_value() != var.has_value() ||
      !affine_fits(*x, weight) || !affine_fits(*x, bias) ||
      (weight && bias && weight->dim() != bias->dim()) || !running_fits(*x, mean) || !running_fits(*x, var) ||
      (training && mean && !(writable(*mean) && writable(*var))))
    return decline();
  rule->training = training || !mean;
  if (rule->training && x->numel() == x->size(1)) return decline();
  rule->negative_slope = activation < 0 ? 1.0 : activation == 0 ? 0.0 : slope;
  if (!(rule->implementation = selected(self, in[0], in[10]))) return decline();
  Tensor y, stats;
  {
    const Running running;
    std::tie(y, stats) = rule->training ? rule->forward(*x, weight, bias, std::nullopt, std::nullopt)
                                        : rule->forward(*x, weight, bias, mean, var);
    if (training && mean && x->numel()) {
      mean->lerp_(stats.select(0, 0), momentum);
      var->lerp_(stats.select(0, 2), momentum);
      mean->unsafeGetTensorImpl()->bump_version();
      var->unsafeGetTensorImpl()->bump_version();
    }
  }
  const Tensor &w = value(weight), &b = value(bias);
  if (records({x, &w, &b})) record(rule, {x, &w, &b}, {&y}, {{*x}, {w}, {b}, {stats}});
  return THPVariable_Wrap(std::move(y));
}

const Functions functions = {method("batch_norm_act", entry<call, 11>)};

}  // namespace batch_norm_act

}  // namespace gankern::nodes
