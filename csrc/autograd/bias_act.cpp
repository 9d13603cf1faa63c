// Bias, activation, gain and clamp: gankern/ops/bias_act.py with its rule.
#include <ATen/ops/leaky_relu.h>
#include <ATen/ops/leaky_relu_backward.h>
#include <ATen/ops/relu.h>
#include <ATen/ops/threshold_backward.h>

#include "call.h"
#include "prelu.h"

namespace gankern::nodes {
namespace bias_act {

Primitive self("bias_act");

using Forward = Tensor(const Tensor&, const std::optional<Tensor>&, int64_t, int64_t, double, double,
                       std::optional<double>);
using Backward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const std::optional<Tensor>&,
                                            int64_t, int64_t, double, double, std::optional<double>, bool);
using DoubleBackward = std::tuple<Tensor, Tensor, Tensor>(const std::optional<Tensor>&,
                                                          const std::optional<Tensor>&, const Tensor&,
                                                          const Tensor&, const std::optional<Tensor>&,
                                                          int64_t, int64_t, double, double,
                                                          std::optional<double>, bool, bool, bool);

struct BiasAct final : Rule {
  int64_t dim, activation;
  double negative_slope, gain;
  std::optional<double> clamp;
  bool keeps_input, curved;  // as in the table of gankern/ops/bias_act.py

  const char* primitive() const override { return "bias_act"; }
  Options options() const override {
    return {double(dim), double(activation), negative_slope, gain, clamp.value_or(-1)};
  }
  bool pieces() const override { return !curved && activation != 0; }  // 0: linear
  bool bends() const override { return curved; }

  Tensor forward(const Tensor& x, const std::optional<Tensor>& bias) const {
    static const auto op = find<Forward>("gankern::bias_act");
    return op.call(x, bias, dim, activation, negative_slope, gain, clamp);
  }

  Tensors backward(const Needed& needed, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<Backward>("gankern::bias_act_backward");
    const auto bias = keeps_input ? optional(saved[1]) : std::nullopt;
    auto [grad_x, grad_bias] =
        op.call(grads[0], saved[0], bias, dim, activation, negative_slope, gain, clamp, needed[1]);
    return {std::move(grad_x), needed[1] ? std::move(grad_bias) : Tensor()};
  }

  Tensors double_backward(const Needed& needed, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    static const auto op = find<DoubleBackward>("gankern::bias_act_double_backward");
    const bool needs_grad = needed[0], needs_saved = needed[1] && curved,
               sums = keeps_input && needed[2] && curved;
    Tensors results(needed.size());
    if (!(needs_grad || needs_saved || sums)) return results;
    const auto bias = keeps_input ? optional(saved[1]) : std::nullopt;
    auto [grad_grad, grad_saved, grad_bias] =
        op.call(optional(grad_grads[0]), optional(grad_grads[1]), grads[0], saved[0], bias, dim, activation,
                negative_slope, gain, clamp, needs_grad, needs_saved, sums);
    if (needs_grad) results[0] = std::move(grad_grad);
    if (needs_saved) results[1] = std::move(grad_saved);
    if (sums) results[2] = std::move(grad_bias);
    return results;
  }
};

PyObject* differentiate(const std::shared_ptr<BiasAct>& rule, const Tensor& x,
                        const std::optional<Tensor>& bias) {
  Tensor y;
  {
    const Running running;
    y = rule->forward(x, bias);
  }
  const Tensor& b = value(bias);
  if (records({&x, &b})) {
    if (rule->keeps_input)
      record(rule, {&x, &b}, {&y}, {{x}, {b}});
    else
      record(rule, {&x, &b}, {&y}, {{y, true}});
  }
  return THPVariable_Wrap(std::move(y));
}

// The table in gankern/ops/bias_act.py: names, and a row of each.
struct Activation {
  int64_t index;
  bool keeps_input, curved;
};
std::vector<Activation> activations;
std::unique_ptr<Words> names;
int linear, leaky_relu, folded;  // folded: leaky_relu with a negative slope

// ([(name, index, keeps_input, curved)])
PyObject* set_activations(PyObject* const* in) {
  names = std::make_unique<Words>(std::initializer_list<const char*>{});
  for (py::handle row : py::reinterpret_borrow<py::list>(in[0])) {
    const auto [name, index, keeps, curved] = row.cast<std::tuple<std::string, int64_t, bool, bool>>();
    if (name == "linear") linear = int(activations.size());
    if (name == "leaky_relu") leaky_relu = int(activations.size());
    if (name == "folded") folded = int(activations.size());
    names->add(name.c_str());
    activations.push_back({index, keeps, curved});
  }
  Py_RETURN_NONE;
}

// The arguments of gankern.functional.bias_act.
PyObject* call(PyObject* const* in) {
  const Tensor* x = tensor(in[0]);
  std::optional<Tensor> bias;
  auto rule = std::make_shared<BiasAct>();
  int activation = !names ? -1 : in[3] == Py_None ? linear : names->find(in[3]);
  if (!x || activation < 0 || activation == folded || !optional_tensor(in[1], &bias) ||
      !integer(in[2], &rule->dim) || !number(in[4], &rule->negative_slope) || !number(in[5], &rule->gain) ||
      !plain())
    return decline();
  if (rule->negative_slope < 0 && activation == leaky_relu) activation = folded;
  rule->activation = activations[activation].index;
  rule->keeps_input = activations[activation].keeps_input;
  rule->curved = activations[activation].curved;
  if (in[6] != Py_None) {
    double clamp;
    if (!number(in[6], &clamp) || !(clamp > 0)) return decline();
    rule->clamp = clamp;
  }
  if (!channels_fit(*x, bias, &rule->dim)) return decline();
  if (!(rule->implementation = selected(self, in[0], in[7]))) return decline();
  return differentiate(rule, *x, bias);
}

// ---- PReLU: a slope of each channel, with a gradient ----------------------------------------------------

using Optional = std::optional<Tensor>;
using PreluForward = Tensor(const Tensor&, const Optional&, const Tensor&, int64_t, double,
                            std::optional<double>);
using PreluBackward = std::tuple<Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&,
                                                         const Tensor&, int64_t, double,
                                                         std::optional<double>, bool, bool);

// Kept: x, bias, slope.
struct BiasPrelu final : Rule {
  int64_t dim;
  double gain;
  std::optional<double> clamp;

  const char* primitive() const override { return "bias_act"; }
  Options options() const override { return {double(dim), gain, clamp.value_or(-1)}; }
  bool pieces() const override { return true; }

  Tensor forward(const Tensor& x, const Optional& bias, const Tensor& slope) const {
    static const auto op = find<PreluForward>("gankern::bias_act_prelu");
    return op.call(x, bias, slope, dim, gain, clamp);
  }

  Tensors backward(const Needed& needed, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<PreluBackward>("gankern::bias_act_prelu_backward");
    auto [grad_x, grad_bias, grad_slope] =
        op.call(grads[0], saved[0], optional(saved[1]), saved[2], dim, gain, clamp, needed[1], needed[2]);
    return {std::move(grad_x), needed[1] ? std::move(grad_bias) : Tensor(),
            needed[2] ? std::move(grad_slope) : Tensor()};
  }

  Tensors double_backward(const Needed& needed, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    const bool of_slope = grad_grads[2].defined();
    const bool needs_x = needed[1] && of_slope, sums = needed[2] && of_slope, slope_sums = needed[3];
    auto [grad_grad, grad_x, grad_bias, grad_slope] = prelu_double_backward(
        optional(grad_grads[0]), optional(grad_grads[1]), optional(grad_grads[2]), grads[0], saved[0],
        optional(saved[1]), saved[2], dim, gain, clamp, needs_x, sums, slope_sums);
    return {std::move(grad_grad), needs_x ? std::move(grad_x) : Tensor(),
            sums ? std::move(grad_bias) : Tensor(), slope_sums ? std::move(grad_slope) : Tensor()};
  }
};

// (x, bias, slope, dim, gain, clamp, implementation), as gankern.functional.bias_act has them
PyObject* prelu(PyObject* const* in) {
  const Tensor *x = tensor(in[0]), *given = tensor(in[2]);
  Optional bias;
  auto rule = std::make_shared<BiasPrelu>();
  if (!x || !given || x->dim() == 0 || !optional_tensor(in[1], &bias) || !integer(in[3], &rule->dim) ||
      !number(in[4], &rule->gain) || !plain())
    return decline();
  if (in[5] != Py_None) {
    double clamp;
    if (!number(in[5], &clamp) || !(clamp > 0)) return decline();
    rule->clamp = clamp;
  }
  if (!channels_fit(*x, bias, &rule->dim) || given->dim() != 1 || !same_kind(*given, *x)) return decline();
  const int64_t channels = x->size(rule->dim);
  if (given->size(0) != channels && given->size(0) != 1) return decline();
  // The channels' sums would be rounded before they are added up: Python's.
  if (given->size(0) != channels && c10::isReducedFloatingType(x->scalar_type())) return decline();
  if (!(rule->implementation = selected(self, in[0], in[6]))) return decline();
  // One slope becomes one of each channel; torch's own node adds their gradients up.
  const Tensor slope = given->size(0) == channels ? *given : given->expand({channels});
  Tensor y;
  {
    const Running running;
    y = rule->forward(*x, bias, slope);
  }
  const Tensor& b = value(bias);
  if (records({x, &b, &slope})) record(rule, {x, &b, &slope}, {&y}, {{*x}, {b}, {slope}});
  return THPVariable_Wrap(std::move(y));
}

// ReLU and leaky ReLU alone: torch's own kernels, with a rule of their own that keeps the result (torch keeps
// the input, which is memory of its own) and has no second derivative instead of zeros.
struct Piecewise final : Rule {
  double negative_slope;
  bool leaky;

  const char* primitive() const override { return "bias_act"; }
  Options options() const override { return {negative_slope, double(leaky)}; }
  bool pieces() const override { return true; }
  bool bends() const override { return false; }

  Tensor slope_times(const Tensor& grad, const Tensor& result) const {
    return leaky ? at::leaky_relu_backward(grad, result, negative_slope, /*self_is_result=*/true)
                 : at::threshold_backward(grad, result, 0);
  }
  Tensors backward(const Needed&, const Tensors& grads, const Tensors& saved) const override {
    return {slope_times(grads[0], saved[0])};
  }
  Tensors double_backward(const Needed& needed, const Tensors& grad_grads, const Tensors&,
                          const Tensors& saved) const override {
    return {needed[0] ? slope_times(grad_grads[0], saved[0]) : Tensor(), Tensor()};
  }
};

// (input, in place, negative_slope or None for ReLU, implementation)
PyObject* activate(PyObject* const* in) {
  const Tensor* x = tensor(in[0]);
  bool in_place;
  double slope = 0;
  const bool leaky = in[2] != Py_None;
  // A result of a negative slope does not tell the sign of the input.
  if (!x || !flag(in[1], &in_place) || (leaky && (!number(in[2], &slope) || slope < 0)) ||
      !left_to_auto(in[3]) || !plain() || at::impl::torch_function_mode_enabled())
    return decline();
  const char* chosen = selected(self, in[0], in[3]);
  if (!chosen) return decline();
  const bool recording = records({x});
  // What becomes of views and leaves is torch's to say, and Python asks it.
  if (in_place && (x->is_inference() || x->is_view() || (x->is_leaf() && x->requires_grad())))
    return decline();
  Tensor y;
  {
    const Running running;
    if (in_place) {
      y = leaky ? at::leaky_relu_(const_cast<Tensor&>(*x), slope) : at::relu_(const_cast<Tensor&>(*x));
      y.unsafeGetTensorImpl()->bump_version();
    } else {
      y = leaky ? at::leaky_relu(*x, slope) : at::relu(*x);
    }
  }
  if (recording) {
    auto rule = std::make_shared<Piecewise>();
    rule->negative_slope = slope;
    rule->leaky = leaky;
    rule->implementation = chosen;
    record(rule, {x}, {&y}, {{y, true}}, in_place);
  }
  return in_place ? Py_NewRef(in[0]) : THPVariable_Wrap(std::move(y));
}

const Functions functions = {
    method("bias_act", entry<call, 8>),
    method("bias_prelu", entry<prelu, 7>),
    method("activate", entry<activate, 4>),
    method("set_activations", entry<set_activations, 1>),
};

}  // namespace bias_act

std::tuple<Tensor, Tensor, Tensor, Tensor> prelu_double_backward(
    const std::optional<Tensor>& h, const std::optional<Tensor>& h_bias, const std::optional<Tensor>& h_slope,
    const Tensor& grad, const Tensor& x, const std::optional<Tensor>& bias, const Tensor& slope, int64_t dim,
    double gain, std::optional<double> clamp, bool needs_x, bool sums, bool slope_sums) {
  using DoubleBackward = std::tuple<Tensor, Tensor, Tensor, Tensor>(
      const std::optional<Tensor>&, const std::optional<Tensor>&, const std::optional<Tensor>&, const Tensor&,
      const Tensor&, const std::optional<Tensor>&, const Tensor&, int64_t, double, std::optional<double>,
      bool, bool, bool);
  static const auto op = find<DoubleBackward>("gankern::bias_act_prelu_double_backward");
  return op.call(h, h_bias, h_slope, grad, x, bias, slope, dim, gain, clamp, needs_x, sums, slope_sums);
}

NormGradients prelu_double_backward(const Needed& needed, const NormWithPrelu& norm, bool moves_x,
                                    const Tensor& h, const Tensor& h_weight, const Tensor& h_bias,
                                    const Tensor& h_slope, const Tensor& grad, const Tensor& slope) {
  static const auto first = find<bias_act::PreluBackward>("gankern::bias_act_prelu_backward");
  const Tensor z = norm.forward();
  const Tensor grad_z =
      std::get<0>(first.call(grad, z, std::nullopt, slope, 1, 1.0, std::nullopt, false, false));
  Tensor of_grad_z;
  NormGradients result;
  const bool needs_weight = needed[2], needs_bias = needed[3], needs_slope = needed[4];
  if (h.defined() || h_weight.defined() || h_bias.defined()) {
    auto [second, grad_x, grad_weight] = norm.double_backward(grad_z);
    of_grad_z = std::move(second);
    if (moves_x) result.x = std::move(grad_x);
    if (needs_weight && h.defined()) result.weight = std::move(grad_weight);
  }
  auto [grad_grad, of_z, none, grad_slope] =
      prelu_double_backward(optional(of_grad_z), std::nullopt, optional(h_slope), grad, z, std::nullopt,
                            slope, 1, 1.0, std::nullopt, h_slope.defined(), false, needs_slope);
  result.grad = std::move(grad_grad);
  if (needs_slope) result.slope = std::move(grad_slope);
  if (h_slope.defined()) {
    auto [grad_x, grad_weight, grad_bias] = norm.backward(of_z);
    result.x = result.x.defined() ? result.x + grad_x : std::move(grad_x);
    if (needs_weight)
      result.weight = result.weight.defined() ? result.weight + grad_weight : std::move(grad_weight);
    if (needs_bias) result.bias = std::move(grad_bias);
  }
  return result;
}

}  // namespace gankern::nodes
