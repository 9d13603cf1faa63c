// Instance normalisation with a (leaky) ReLU behind it: gankern/ops/instance_norm_act.py with its rule.
#include "call.h"

namespace gankern::nodes {
namespace instance_norm_act {

Primitive self("instance_norm_act");

using Optional = std::optional<Tensor>;
using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Optional&, const Optional&, double, double);
using Backward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&,
                                                    const Optional&, const Tensor&, double, bool);
using DoubleBackward = std::tuple<Tensor, Tensor, Tensor>(const Optional&, const Optional&, const Optional&,
                                                          const Tensor&, const Tensor&, const Optional&,
                                                          const Optional&, const Tensor&, double, bool);

// Kept: x, weight, bias, statistics. The statistics have no gradient, and are none of the recorded outputs.
struct InstanceNormAct final : Rule {
  double eps, negative_slope;

  const char* primitive() const override { return "instance_norm_act"; }
  bool pieces() const override { return negative_slope != 1; }

  std::tuple<Tensor, Tensor> forward(const Tensor& x, const Optional& weight, const Optional& bias) const {
    static const auto op = find<Forward>("gankern::instance_norm_act");
    return op.call(x, weight, bias, eps, negative_slope);
  }

  Tensors backward(const Needed& needed, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<Backward>("gankern::instance_norm_act_backward");
    auto [grad_x, grad_weight, grad_bias] =
        op.call(grads[0], saved[0], optional(saved[1]), optional(saved[2]), saved[3], negative_slope,
                needed[1] || needed[2]);
    return {std::move(grad_x), needed[1] ? std::move(grad_weight) : Tensor(),
            needed[2] ? std::move(grad_bias) : Tensor()};
  }

  Tensors double_backward(const Needed& needed, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    static const auto op = find<DoubleBackward>("gankern::instance_norm_act_double_backward");
    const Tensor &h = grad_grads[0], &h_weight = grad_grads[1];
    const bool needs_weight = needed[2];
    auto [grad_grad, grad_x, grad_weight] =
        op.call(optional(h), optional(h_weight), optional(grad_grads[2]), grads[0], saved[0],
                optional(saved[1]), optional(saved[2]), saved[3], negative_slope, needs_weight);
    const bool moves_x = h_weight.defined() || h.defined();
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

// The arguments of gankern.functional.instance_norm_act. Running statistics are Python's to keep.
PyObject* call(PyObject* const* in) {
  static const Words activations({"relu", "leaky_relu"});
  const Tensor* x = tensor(in[0]);
  Optional weight, bias;
  auto rule = std::make_shared<InstanceNormAct>();
  bool use_input_stats;
  double momentum, slope;
  const int activation = activations.find(in[8]);
  if (!x || in[1] != Py_None || in[2] != Py_None || !optional_tensor(in[3], &weight) ||
      !optional_tensor(in[4], &bias) || !flag(in[5], &use_input_stats) || !number(in[6], &momentum) ||
      !number(in[7], &rule->eps) || (activation < 0 && in[8] != Py_None) || !number(in[9], &slope) ||
      !plain())
    return decline();
  if (!use_input_stats || x->dim() < 3 || x->size(1) == 0 || !(rule->eps >= 0) || !affine_fits(*x, weight) ||
      !affine_fits(*x, bias) || (weight && bias && weight->dim() != bias->dim()))
    return decline();
  int64_t positions = 1;
  for (int64_t d = 2; d < x->dim(); ++d) positions *= x->size(d);
  if (positions == 1) return decline();
  rule->negative_slope = activation < 0 ? 1.0 : activation == 0 ? 0.0 : slope;
  if (!(rule->implementation = selected(self, in[0], in[10]))) return decline();
  Tensor y, stats;
  {
    const Running running;
    std::tie(y, stats) = rule->forward(*x, weight, bias);
  }
  const Tensor &w = value(weight), &b = value(bias);
  if (records({x, &w, &b})) record(rule, {x, &w, &b}, {&y}, {{*x}, {w}, {b}, {stats}});
  return THPVariable_Wrap(std::move(y));
}

const Functions functions = {method("instance_norm_act", entry<call, 11>)};

}  // namespace instance_norm_act

}  // namespace gankern::nodes
