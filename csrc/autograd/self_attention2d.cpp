// Self-attention over a map: gankern/ops/self_attention2d.py with its rule, and the block around it.
#include <algorithm>

#include "call.h"

namespace gankern::nodes {
namespace self_attention2d {

Primitive self("self_attention2d");

using Optional = std::optional<Tensor>;
using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&);
using Backward = std::tuple<Tensor, Tensor>(const Tensor&, const Tensor&, const Tensor&, const Tensor&,
                                            const Tensor&);
using DoubleBackward = std::tuple<Tensor, Tensor, Tensor>(const Optional&, const Optional&, const Tensor&,
                                                          const Tensor&, const Tensor&, const Tensor&,
                                                          const Tensor&);

struct Attention final : Rule {
  const char* primitive() const override { return "self_attention2d"; }
  Options options() const override { return {}; }

  Tensors backward(const Needed&, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<Backward>("gankern::self_attention2d_backward");
    auto [grad_q, grad_kv] = op.call(grads[0], saved[0], saved[1], saved[2], saved[3]);
    return {std::move(grad_q), std::move(grad_kv)};
  }

  Tensors double_backward(const Needed&, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    static const auto op = find<DoubleBackward>("gankern::self_attention2d_double_backward");
    auto [grad_grad, grad_q, grad_kv] = op.call(optional(grad_grads[0]), optional(grad_grads[1]), grads[0],
                                                saved[0], saved[1], saved[2], saved[3]);
    return {std::move(grad_grad), std::move(grad_q), std::move(grad_kv), Tensor(), Tensor()};
  }
};

Tensor attention(const char* implementation, const Tensor& q, const Tensor& kv) {
  static const auto op = find<Forward>("gankern::self_attention2d");
  auto rule = std::make_shared<Attention>();
  rule->implementation = implementation;
  const BelowAutograd below;
  auto [o, stats] = op.call(q, kv);
  if (records({&q, &kv})) record(rule, {&q, &kv}, {&o}, {{q}, {kv}, {o, true}, {stats}});
  return o;
}

// (x, theta, phi, g, out, gamma, implementation)
PyObject* call(PyObject* const* in) {
  const Tensor* t[6];
  for (int i = 0; i < 6; ++i)
    if (!(t[i] = tensor(in[i])) || (i > 0 && !same_kind(*t[i], *t[0]))) return decline();
  const auto& [x, theta, phi, g, out, gamma] = t;
  if (x->dim() != 4 || x->size(1) == 0 || x->size(2) < 2 || x->size(3) < 2 || !plain()) return decline();
  const auto fits = [](const Tensor& w, int64_t rows, int64_t columns) {
    return (w.dim() == 2 || (w.dim() == 4 && w.size(2) == 1 && w.size(3) == 1)) && w.size(0) == rows &&
           w.size(1) == columns && rows > 0;
  };
  const int64_t channels = x->size(1), dims = theta->dim() ? theta->size(0) : 0,
                values = g->dim() ? g->size(0) : 0;
  if (!fits(*theta, dims, channels) || !fits(*phi, dims, channels) || !fits(*g, values, channels) ||
      !fits(*out, channels, values) || gamma->numel() != 1 || gamma->dim() > 1)
    return decline();
  if (!(x->is_cpu() || x->is_cuda()) || at::autocast::is_autocast_enabled(x->device().type()))
    return decline();
  if (x->is_cuda() && std::max(dims, values) > 256) return decline();  // see gankern/ops/self_attention2d.py
  const char* implementation = selected(self, in[0], in[6]);
  if (!implementation) return decline();
  const pybind11::gil_scoped_release released;
  const auto kernel = [](const Tensor& w) { return w.reshape({w.size(0), w.size(1), 1, 1}); };
  const Tensor q = at::conv2d(*x, kernel(*theta)).flatten(2);
  const Tensor kv = at::max_pool2d(at::conv2d(*x, at::cat({kernel(*phi), kernel(*g)})), 2).flatten(2);
  const Tensor o = attention(implementation, q, kv).unflatten(2, {x->size(2), x->size(3)});
  Tensor y = at::conv2d(o.contiguous(x->suggest_memory_format()), kernel(*out) * *gamma).add_(*x);
  const pybind11::gil_scoped_acquire acquired;
  return THPVariable_Wrap(std::move(y));
}

const Functions functions = {method("self_attention2d", entry<call, 7>)};

}  // namespace self_attention2d

}  // namespace gankern::nodes
