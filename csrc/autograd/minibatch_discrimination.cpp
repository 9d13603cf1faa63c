// Minibatch discrimination: gankern/ops/minibatch_discrimination.py with its rule.
#include <algorithm>

#include "call.h"

namespace gankern::nodes {
namespace minibatch_discrimination {

Primitive self("minibatch_discrimination");

using Optional = std::optional<Tensor>;
using Forward = Tensor(const Tensor&, const Optional&, bool);
using Backward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Optional&);
using DoubleBackward = std::tuple<Tensor, Tensor, Tensor>(const Optional&, const Optional&, const Tensor&,
                                                          const Tensor&, const Optional&);

struct Similarity final : Rule {
  bool include_self;

  const char* primitive() const override { return "minibatch_discrimination"; }
  Options options() const override { return {double(include_self)}; }

  Tensor forward(const Tensor& m, const Optional& other) const {
    static const auto op = find<Forward>("gankern::minibatch_discrimination");
    return op.call(m, other, include_self);
  }

  Tensors backward(const Needed&, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<Backward>("gankern::minibatch_discrimination_backward");
    auto [grad_m, grad_other] = op.call(grads[0], saved[0], optional(saved[1]));
    return {std::move(grad_m), saved[1].defined() ? std::move(grad_other) : Tensor()};
  }

  Tensors double_backward(const Needed&, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    static const auto op = find<DoubleBackward>("gankern::minibatch_discrimination_double_backward");
    auto [grad_grad, grad_m, grad_other] =
        op.call(optional(grad_grads[0]), optional(grad_grads[1]), grads[0], saved[0], optional(saved[1]));
    return {std::move(grad_grad), std::move(grad_m), saved[1].defined() ? std::move(grad_other) : Tensor()};
  }
};

Tensor differentiate(const std::shared_ptr<Similarity>& rule, const Tensor& m, const Optional& other) {
  Tensor y;
  {
    const Running running;
    y = rule->forward(m, other);
  }
  const Tensor& o = value(other);
  if (records({&m, &o})) record(rule, {&m, &o}, {&y}, {{m}, {o}});
  return y;
}

bool points(const Tensor& m) { return m.dim() == 3 && m.size(1) > 0 && m.size(2) > 0; }

// (m, other, include_self, implementation)
PyObject* similarity(PyObject* const* in) {
  const Tensor* m = tensor(in[0]);
  Optional other;
  auto rule = std::make_shared<Similarity>();
  if (!m || !points(*m) || !optional_tensor(in[1], &other) || !flag(in[2], &rule->include_self) || !plain())
    return decline();
  if (other && (rule->include_self || !points(*other) || other->size(1) != m->size(1) ||
                other->size(2) != m->size(2) || !same_kind(*other, *m)))
    return decline();
  if (!(rule->implementation = selected(self, in[0], in[3]))) return decline();
  return THPVariable_Wrap(differentiate(rule, *m, other));
}

// (x, kernel, include_self, reduction, implementation)
PyObject* call(PyObject* const* in) {
  static const Words reductions({"sum", "mean"});
  const Tensor *x = tensor(in[0]), *kernel = tensor(in[1]);
  auto rule = std::make_shared<Similarity>();
  const int reduction = reductions.find(in[3]);
  if (!x || !kernel || reduction < 0 || !flag(in[2], &rule->include_self) || !plain()) return decline();
  if (x->dim() != 2 || !points(*kernel) || x->size(1) != kernel->size(0) || !same_kind(*x, *kernel))
    return decline();
  // Under autocast the points may be of another dtype than x, and Python chooses by theirs.
  if (!(x->is_cpu() || x->is_cuda()) || at::autocast::is_autocast_enabled(x->device().type()))
    return decline();
  if (!(rule->implementation = selected(self, in[0], in[4]))) return decline();
  const Tensor m = [&] {
    const pybind11::gil_scoped_release released;
    return x->matmul(kernel->flatten(1)).unflatten(1, kernel->sizes().slice(1));
  }();
  Tensor y = differentiate(rule, m, std::nullopt);
  if (reduction == 1) y = y.div(std::max<int64_t>(rule->include_self ? x->size(0) : x->size(0) - 1, 1));
  return THPVariable_Wrap(std::move(y));
}

const Functions functions = {
    method("l1_similarity", entry<similarity, 4>),
    method("minibatch_discrimination", entry<call, 5>),
};

}  // namespace minibatch_discrimination

}  // namespace gankern::nodes
