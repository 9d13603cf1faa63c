// The penalty of each sample's gradient norm: gankern/ops/gradient_penalty.py with its rule; and how a penalty hands out
// gradients that are there already.
#include <ATen/ops/_foreach_mul.h>
#include <ATen/ops/full_like.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/functions/utils.h>

#include <map>

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

// (gradient, weight, target, one_sided) -> each sample's penalty, and the derivative of weight times their sum: not
// recorded
PyObject* penalty_and_direction(PyObject* const* in) {
  const Tensor* gradient = tensor(in[0]);
  GradientPenalty rule;
  double weight;
  if (!gradient || gradient->dim() < 1 || !number(in[1], &weight) || !number(in[2], &rule.target) ||
      !(rule.target >= 0) || !flag(in[3], &rule.one_sided) || !plain())
    return decline();
  if (!(rule.implementation = selected(self, in[0], Py_None))) return decline();
  Tensor values, norms, direction;
  {
    const Running running;
    std::tie(values, norms) = rule.forward(*gradient);
    direction = rule.backward({true}, {at::full_like(norms, weight)}, {*gradient, norms})[0];
  }
  return pybind11::cast(std::pair(std::move(values), std::move(direction))).release().ptr();
}

// _HandOut of gankern/penalties/_common.py. Kept: the targets' gradients.
struct HandOut final : Recorded {
  std::string name() const override { return "GankernBackward_hand_out"; }
  std::string key() const override { return std::to_string(saved.size()); }
  Work work() const override { return scaled; }

  // Together where they are alike: a critic has dozens of parameters.
  static Tensors scaled(const Needed& needed, const Tensors& grads, const Tensors& kept) {
    const at::NoGradGuard guard;
    Tensors results(kept.size());
    std::map<std::pair<at::ScalarType, c10::Device>, std::vector<size_t>, Before> places;
    for (size_t i = 0; i < kept.size(); ++i)
      if (kept[i].defined() && needed[i] && grads[0].defined())
        places[{kept[i].scalar_type(), kept[i].device()}].push_back(i);
    for (const auto& [kind, alike] : places) {
      const bool narrow = kind.first == at::kHalf;  // a factor of a loss's scale is outside of its range
      Tensors these;
      for (const size_t i : alike) these.push_back(narrow ? kept[i].to(at::kFloat) : kept[i]);
      const Tensors products =
          at::_foreach_mul(these, grads[0].to(kind.second, narrow ? at::kFloat : kind.first));
      for (size_t k = 0; k < alike.size(); ++k) results[alike[k]] = products[k].to(kind.first);
    }
    return results;
  }

  torch::autograd::variable_list apply_once(torch::autograd::variable_list&& grads) override {
    Tensors results = scaled(asked(), grads, unpack(0, saved.size()));
    // With create_graph, whatever comes: in a sum of losses the other parts can be differentiated again, and this one
    // would be left out without a word. The error is on the way to the targets, and to what came in (a weight that is
    // learned), since torch.autograd.grad goes no other.
    if (!at::GradMode::is_enabled()) return results;
    torch::autograd::edge_list sources(next_edges());
    if (grads[0].defined() && grads[0].requires_grad())
      sources.push_back(torch::autograd::impl::gradient_edge(grads[0]));
    const auto error = owned(new torch::autograd::Error(
        "trying to differentiate twice a penalty, whose gradients are computed where it is called",
        std::move(sources)));
    for (Tensor& result : results)
      if (result.defined()) torch::autograd::set_history(result, error);
    return results;
  }

 private:
  struct Before {
    template <class Kind>
    bool operator()(const Kind& a, const Kind& b) const {
      const auto key = [](const Kind& k) { return std::tuple(k.first, k.second.type(), k.second.index()); };
      return key(a) < key(b);
    }
  };
};

// (value, targets, their gradients or None) -> the value
PyObject* hand_out(PyObject* const* in) {
  const Tensor* value = tensor(in[0]);
  if (!value || !PyTuple_CheckExact(in[1]) || !PyTuple_CheckExact(in[2]) || !plain()) return decline();
  const Py_ssize_t count = PyTuple_GET_SIZE(in[1]);
  if (PyTuple_GET_SIZE(in[2]) != count) return decline();
  Tensors targets, gradients;
  bool recorded = false;
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject *target = PyTuple_GET_ITEM(in[1], i), *gradient = PyTuple_GET_ITEM(in[2], i);
    if (!THPVariable_CheckExact(target) || !(gradient == Py_None || THPVariable_CheckExact(gradient)))
      return decline();
    targets.push_back(THPVariable_Unpack(target));
    gradients.push_back(gradient == Py_None ? Tensor() : THPVariable_Unpack(gradient));
    recorded = recorded || records({&targets.back()});
  }
  Tensor result;
  {
    const Running running;
    result = value->clone();
  }
  if (recorded) {
    auto* node = new HandOut;
    const NodePtr owner = owned(node);
    for (const Tensor& target : targets) node->depends_on(target);
    torch::autograd::set_history(result, owner);
    for (const Tensor& gradient : gradients) node->saved.emplace_back(gradient, false);
  }
  return THPVariable_Wrap(std::move(result));
}

const Functions functions = {method("gradient_penalty", entry<call, 4>),
                             method("penalty_and_direction", entry<penalty_and_direction, 4>),
                             method("hand_out", entry<hand_out, 3>)};

}  // namespace gradient_penalty

}  // namespace gankern::nodes
