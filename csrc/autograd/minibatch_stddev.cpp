// Minibatch standard deviation: gankern/ops/minibatch_stddev.py with its rule.
#include <algorithm>

#include "call.h"

namespace gankern::nodes {
namespace minibatch_stddev {

Primitive self("minibatch_stddev");

using Forward = Tensor(const Tensor&, int64_t, int64_t, bool, bool, double);
using Backward = Tensor(const Tensor&, const Tensor&, int64_t, int64_t, bool, bool, double);
using DoubleBackward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, int64_t,
                                                  int64_t, bool, bool, double);

struct MinibatchStddev final : Rule {
  int64_t group_size, num_channels;
  bool strided, unbiased;
  double eps;

  const char* primitive() const override { return "minibatch_stddev"; }
  Options options() const override {
    return {double(group_size), double(num_channels), double(strided), double(unbiased), eps};
  }

  Tensor forward(const Tensor& x) const {
    static const auto op = find<Forward>("gankern::minibatch_stddev");
    return op.call(x, group_size, num_channels, strided, unbiased, eps);
  }

  Tensors backward(const Needed&, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<Backward>("gankern::minibatch_stddev_backward");
    return {op.call(grads[0], saved[0], group_size, num_channels, strided, unbiased, eps)};
  }

  Tensors double_backward(const Needed&, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    static const auto op = find<DoubleBackward>("gankern::minibatch_stddev_double_backward");
    auto [grad_grad, grad_x] =
        op.call(grad_grads[0], grads[0], saved[0], group_size, num_channels, strided, unbiased, eps);
    return {std::move(grad_grad), std::move(grad_x)};
  }
};

// (x, group_size, num_channels, layout, unbiased, on_indivisible, eps, implementation)
PyObject* call(PyObject* const* in) {
  static const Words layouts({"strided", "contiguous"}),
      indivisible({"raise", "largest_divisor", "whole_batch"});
  const Tensor* x = tensor(in[0]);
  const int layout = layouts.find(in[3]);
  auto rule = std::make_shared<MinibatchStddev>();
  if (!x || layout < 0 || indivisible.find(in[5]) < 0 || !integer(in[1], &rule->group_size) ||
      !integer(in[2], &rule->num_channels) || !flag(in[4], &rule->unbiased) || !number(in[6], &rule->eps) ||
      !plain())
    return decline();
  if (x->dim() < 2 || x->size(1) == 0 || rule->group_size < 1 || rule->num_channels < 1 ||
      x->size(1) % rule->num_channels || !(rule->eps >= 0))
    return decline();
  const int64_t samples = x->size(0);
  rule->group_size = std::min(rule->group_size, std::max<int64_t>(samples, 1));
  // What to do where it does not divide the samples is Python's to say.
  if (samples % rule->group_size || (rule->unbiased && rule->group_size == 1)) return decline();
  rule->strided = layout == 0;
  if (!(rule->implementation = selected(self, in[0], in[7]))) return decline();
  Tensor y;
  {
    const Running running;
    y = rule->forward(*x);
  }
  if (records({x})) record(rule, {x}, {&y}, {{*x}});
  return THPVariable_Wrap(std::move(y));
}

const Functions functions = {method("minibatch_stddev", entry<call, 8>)};

}  // namespace minibatch_stddev

}  // namespace gankern::nodes
