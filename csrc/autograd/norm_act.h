// Normalisations with a (leaky) ReLU or PReLU behind them: gankern/ops/_norm_act.py with its rule.
#pragma once

#include <string>

#include "norm.h"
#include "prelu.h"

namespace gankern::nodes {

using Optional = std::optional<Tensor>;

// Of one whose operators take `Own` before the activation's slope. Kept: x, weight, bias, slope, statistics. The
// statistics have no gradient, and are none of the recorded outputs.
template <class... Own>
struct NormAct : Rule {
  using Backward = std::tuple<Tensor, Tensor, Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&,
                                                              const Optional&, const Tensor&, Own..., double,
                                                              bool, const Optional&);
  using DoubleBackward = std::tuple<Tensor, Tensor, Tensor>(const Optional&, const Optional&, const Optional&,
                                                            const Tensor&, const Tensor&, const Optional&,
                                                            const Optional&, const Tensor&, Own..., double,
                                                            bool);
  struct Operators {
    explicit Operators(const std::string& name)
        : backward(find<Backward>(("gankern::" + name + "_backward").c_str())),
          double_backward(find<DoubleBackward>(("gankern::" + name + "_double_backward").c_str())) {}
    const c10::TypedOperatorHandle<Backward> backward;
    const c10::TypedOperatorHandle<DoubleBackward> double_backward;
  };

  double eps, negative_slope;

  virtual const Operators& operators() const = 0;  // looked up once
  virtual std::tuple<Own...> own() const = 0;
  virtual bool own_statistics() const { return true; }  // x's, which have a gradient
  // The normalisation without an activation, of what was kept.
  virtual Tensor normalized(const Tensors& saved) const = 0;

  bool pieces() const override { return negative_slope != 1; }

  Tensors backward(const Needed& needed, const Tensors& grads, const Tensors& saved) const override {
    auto [grad_x, grad_weight, grad_bias, grad_slope] =
        call_backward(grads[0], saved, needed[1] || needed[2], negative_slope, optional(saved[3]));
    return {std::move(grad_x), needed[1] ? std::move(grad_weight) : Tensor(),
            needed[2] ? std::move(grad_bias) : Tensor(), needed[3] ? std::move(grad_slope) : Tensor()};
  }

  Tensors double_backward(const Needed& needed, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    const Tensor &h = grad_grads[0], &h_weight = grad_grads[1];
    const bool needs_weight = needed[2];
    const bool moves_x = h_weight.defined() || (h.defined() && own_statistics());
    if (saved[3].defined()) {
      NormWithPrelu norm;
      norm.forward = [&] { return normalized(saved); };
      norm.backward = [&](const Tensor& grad) {
        const bool affine = saved[1].defined() || saved[2].defined();
        auto [x, weight, bias, none] = call_backward(grad, saved, affine, 1, std::nullopt);
        return std::make_tuple(x, weight, bias);
      };
      norm.double_backward = [&](const Tensor& grad) {
        return call_double_backward(grad_grads, grad, saved, 1, needs_weight);
      };
      NormGradients found = prelu_double_backward(needed, norm, moves_x, h, h_weight, grad_grads[2],
                                                  grad_grads[3], grads[0], saved[3]);
      return {found.grad, found.x, found.weight, found.bias, found.slope, Tensor()};
    }
    auto [grad_grad, grad_x, grad_weight] =
        call_double_backward(grad_grads, grads[0], saved, negative_slope, needs_weight);
    return {std::move(grad_grad),
            moves_x ? std::move(grad_x) : Tensor(),
            needs_weight && h.defined() ? std::move(grad_weight) : Tensor(),
            Tensor(),
            Tensor(),
            Tensor()};
  }

 private:
  std::tuple<Tensor, Tensor, Tensor, Tensor> call_backward(const Tensor& grad, const Tensors& saved,
                                                           bool affine, double each,
                                                           const Optional& slope) const {
    const auto call = [&](Own... values) {
      return operators().backward.call(grad, saved[0], optional(saved[1]), optional(saved[2]), saved[4],
                                       values..., each, affine, slope);
    };
    return std::apply(call, own());
  }

  std::tuple<Tensor, Tensor, Tensor> call_double_backward(const Tensors& h, const Tensor& grad,
                                                          const Tensors& saved, double each,
                                                          bool needs_weight) const {
    const auto call = [&](Own... values) {
      return operators().double_backward.call(optional(h[0]), optional(h[1]), optional(h[2]), grad, saved[0],
                                              optional(saved[1]), optional(saved[2]), saved[4], values...,
                                              each, needs_weight);
    };
    return std::apply(call, own());
  }
};

// Of the function of a norm with running statistics: x, running_mean, running_var, weight, bias, whether to use x's own
// statistics, momentum, eps, activation, negative_slope, implementation, slope.
struct NormArguments {
  const Tensor* x;
  Optional mean, var, weight, bias, slope;
  bool own;
  double momentum;

  // Whether each of them is what it may be, beside x. The two of a rule go there.
  bool read(PyObject* const* in, double* eps, double* negative_slope) {
    x = tensor(in[0]);
    return x && optional_tensor(in[1], &mean) && optional_tensor(in[2], &var) &&
           optional_tensor(in[3], &weight) && optional_tensor(in[4], &bias) && flag(in[5], &own) &&
           number(in[6], &momentum) && number(in[7], eps) && optional_tensor(in[11], &slope) &&
           slope_of(in[8], in[9], slope, negative_slope) && plain() && *eps >= 0;
  }
  // Whether they fit an x of so many dimensions at least, with channels; one slope becomes one of each. `updated`:
  // whether running statistics are.
  bool fit(int64_t dims, bool updated) {
    return x->dim() >= dims && x->size(1) > 0 && affine_fits(*x, weight, bias) &&
           running_fits(*x, mean, var, updated) && (!slope || slope_fits(*x, &slope));
  }
  void widen_affine() {
    widen(*x, &weight);
    widen(*x, &bias);
  }
  PyObject* recorded(const RulePtr& rule, Tensor y, const Tensor& stats) const {
    const Tensor &w = value(weight), &b = value(bias), &a = value(slope);
    if (records({x, &w, &b, &a})) record(rule, {x, &w, &b, &a}, {&y}, {{*x}, {w}, {b}, {a}, {stats}});
    return THPVariable_Wrap(std::move(y));
  }
};

}  // namespace gankern::nodes
