// Virtual batch norm and a reference batch's statistics: gankern/ops/virtual_batch_norm.py with its rules.
#include <algorithm>

#include "call.h"

namespace gankern::nodes {
namespace virtual_batch_norm {

Primitive self("virtual_batch_norm");

using Optional = std::optional<Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;
using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Optional&,
                                           const Optional&, double, double, double);
using Backward = Five(const Tensor&, const Tensor&, const Tensor&, const Tensor&, const Optional&,
                      const Optional&, const Tensor&, double, double, double, bool, bool);
using DoubleBackward = Five(const Optional&, const Optional&, const Optional&, const Optional&,
                            const Optional&, const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                            const Optional&, const Optional&, const Tensor&, double, double, double, bool,
                            bool, bool);
using Statistics = Tensor(const Tensor&);
using StatisticsBackward = Tensor(const Tensor&, const Tensor&, const Tensor&);
using StatisticsDoubleBackward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&,
                                                            const Tensor&);

// Kept: x, the two of the reference batch, weight, bias, and what the forward computed of each example.
struct VirtualBatchNorm final : Rule {
  double own_share, eps, negative_slope;

  const char* primitive() const override { return "virtual_batch_norm"; }
  Options options() const override { return {own_share, eps, negative_slope}; }
  bool pieces() const override { return negative_slope != 1; }

  std::tuple<Tensor, Tensor> forward(const Tensor& x, const Tensor& mean, const Tensor& mean_square,
                                     const Optional& weight, const Optional& bias) const {
    static const auto op = find<Forward>("gankern::virtual_batch_norm");
    return op.call(x, mean, mean_square, weight, bias, own_share, eps, negative_slope);
  }

  Tensors backward(const Needed& needed, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<Backward>("gankern::virtual_batch_norm_backward");
    const bool channels = std::any_of(needed.begin() + 1, needed.end(), [](bool need) { return need; });
    auto [x, mean, mean_square, weight, bias] =
        op.call(grads[0], saved[0], saved[1], saved[2], optional(saved[3]), optional(saved[4]), saved[5],
                own_share, eps, negative_slope, needed[0], channels);
    Tensors results{std::move(x), std::move(mean), std::move(mean_square), std::move(weight),
                    std::move(bias)};
    for (size_t i = 0; i < results.size(); ++i)
      if (!needed[i]) results[i] = Tensor();
    return results;
  }

  Tensors double_backward(const Needed& needed, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    static const auto op = find<DoubleBackward>("gankern::virtual_batch_norm_double_backward");
    auto [grad, x, mean, mean_square, weight] =
        op.call(optional(grad_grads[0]), optional(grad_grads[1]), optional(grad_grads[2]),
                optional(grad_grads[3]), optional(grad_grads[4]), grads[0], saved[0], saved[1], saved[2],
                optional(saved[3]), optional(saved[4]), saved[5], own_share, eps, negative_slope, needed[0],
                needed[1], needed[2] || needed[3] || needed[4]);
    // y is linear in the bias, and so is the activation almost everywhere; what was computed of each example
    // is a function of the others.
    Tensors results{std::move(grad),   std::move(x), std::move(mean), std::move(mean_square),
                    std::move(weight), Tensor(),     Tensor()};
    for (size_t i = 0; i < results.size(); ++i)
      if (!needed[i]) results[i] = Tensor();
    return results;
  }
};

bool along_channels(const Tensor& x, const Tensor& v) {
  return v.dim() == 1 && v.size(0) == x.size(1) && v.device() == x.device();
}

// The arguments of gankern.functional.virtual_batch_norm.
PyObject* call(PyObject* const* in) {
  const Tensor *x = tensor(in[0]), *mean = tensor(in[1]), *mean_square = tensor(in[2]);
  Optional weight, bias;
  auto rule = std::make_shared<VirtualBatchNorm>();
  double count = 0;
  if (!x || !mean || !mean_square || !optional_tensor(in[4], &weight) || !optional_tensor(in[5], &bias) ||
      !number(in[6], &rule->eps) || !slope_of(in[7], in[8], &rule->negative_slope) || !plain())
    return decline();
  if (in[3] != Py_None && (!number(in[3], &count) || !(count >= 1))) return decline();
  if (x->dim() < 2 || !(rule->eps >= 0) || !along_channels(*x, *mean) || !along_channels(*x, *mean_square) ||
      (weight && !along_channels(*x, *weight)) || (bias && !along_channels(*x, *bias)))
    return decline();
  rule->own_share = in[3] == Py_None ? 0.0 : 1 / (count + 1);
  if (!(rule->implementation = selected(self, in[0], in[9]))) return decline();
  Tensor y, kept;
  {
    const Running running;
    std::tie(y, kept) = rule->forward(*x, *mean, *mean_square, weight, bias);
  }
  const Tensor &w = value(weight), &b = value(bias);
  if (records({x, mean, mean_square, &w, &b}))
    record(rule, {x, mean, mean_square, &w, &b}, {&y}, {{*x}, {*mean}, {*mean_square}, {w}, {b}, {kept}});
  return THPVariable_Wrap(std::move(y));
}

// Kept: x, and the result.
struct ReferenceStatistics final : Rule {
  const char* primitive() const override { return "virtual_batch_norm_statistics"; }
  Options options() const override { return {}; }

  Tensors backward(const Needed&, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<StatisticsBackward>("gankern::virtual_batch_norm_statistics_backward");
    return {op.call(grads[0], saved[0], saved[1])};
  }
  Tensors double_backward(const Needed&, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    static const auto op =
        find<StatisticsDoubleBackward>("gankern::virtual_batch_norm_statistics_double_backward");
    auto [grad_grad, grad_x] = op.call(grad_grads[0], grads[0], saved[0], saved[1]);
    return {std::move(grad_grad), std::move(grad_x), Tensor()};
  }
};

// (x, implementation)
PyObject* statistics(PyObject* const* in) {
  static const auto op = find<Statistics>("gankern::virtual_batch_norm_statistics");
  const Tensor* x = tensor(in[0]);
  if (!x || x->dim() < 2 || x->numel() == 0 || !plain()) return decline();
  auto rule = std::make_shared<ReferenceStatistics>();
  if (!(rule->implementation = selected(self, in[0], in[1]))) return decline();
  Tensor moments;
  {
    const Running running;
    moments = op.call(*x);
  }
  if (records({x})) record(rule, {x}, {&moments}, {{*x}, {moments, true}});
  const auto both = moments.unbind(0);
  return Py_BuildValue("NN", THPVariable_Wrap(both[0]), THPVariable_Wrap(both[1]));
}

const Functions functions = {
    method("virtual_batch_norm", entry<call, 10>),
    method("virtual_batch_norm_statistics", entry<statistics, 2>),
};

}  // namespace virtual_batch_norm

}  // namespace gankern::nodes
