// Up, FIR filter, down: gankern/ops/upfirdn2d.py. Its gradient is itself with up and down exchanged: any
// order.
#include <array>

#include "call.h"

namespace gankern::nodes {
namespace upfirdn2d {

Primitive self("upfirdn2d");

using Forward = Tensor(const Tensor&, const Tensor&, c10::SymIntArrayRef, c10::SymIntArrayRef,
                       c10::SymIntArrayRef, c10::SymIntArrayRef, bool, double);
using Pair = std::array<int64_t, 2>;  // vertical, horizontal

struct Geometry {
  Pair up, down, start, size;  // size: of the output
  bool flip_filter;
  double gain;

  Geometry transposed(const Tensor& filter, const Tensor& x) const {
    const int64_t taps[] = {filter.size(0), filter.size(-1)};
    return {down,         up,  {taps[0] - 1 - start[0], taps[1] - 1 - start[1]}, {x.size(2), x.size(3)},
            !flip_filter, gain};
  }
};

Tensor run(const Tensor& x, const Tensor& filter, const Geometry& g);

struct Transposed final : Recorded {
  Geometry geometry;

  std::string name() const override { return "GankernBackward_upfirdn2d"; }
  torch::autograd::variable_list apply_once(torch::autograd::variable_list&& grads) override {
    if (!grads[0].defined() || !task_should_compute_output(0)) return {Tensor()};
    refuse_tangents("upfirdn2d", grads);
    return {run(grads[0], unpack(0, 1)[0], geometry)};
  }

  std::string key() const override {
    const Geometry& g = geometry;
    return bytes(Options{double(g.up[0]), double(g.up[1]), double(g.down[0]), double(g.down[1]),
                         double(g.start[0]), double(g.start[1]), double(g.size[0]), double(g.size[1]),
                         double(g.flip_filter), g.gain});
  }
  Work work() const override {
    return [g = geometry](const Needed&, const Tensors& grads, const Tensors& kept) {
      return Tensors{run(grads[0], kept[0], g)};
    };
  }
};

// The filtered images, recorded where that is to be.
Tensor run(const Tensor& x, const Tensor& filter, const Geometry& g) {
  static const auto op = find<Forward>("gankern::upfirdn2d");
  const auto pair = [](const Pair& p) { return std::array<c10::SymInt, 2>{p[0], p[1]}; };
  Tensor y;
  {
    const BelowAutograd guard;
    y = op.call(x, filter, pair(g.up), pair(g.down), pair(g.start), pair(g.size), g.flip_filter, g.gain);
  }
  if (records({&x})) {
    auto* transposed = new Transposed;
    const NodePtr node = owned(transposed);
    transposed->geometry = g.transposed(filter, x);
    transposed->depends_on(x);
    torch::autograd::set_history(y, node);
    transposed->saved.emplace_back(filter, false);
  }
  return y;
}

// An integer, or one or several in a tuple or list; the number of them, 0 for anything else.
int integers(PyObject* object, std::array<int64_t, 4>* values) {
  if (integer(object, &(*values)[0])) return 1;
  if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) return 0;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
  if (count > 4) return 0;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (!integer(PySequence_Fast_GET_ITEM(object, i), &(*values)[i])) return 0;
  return int(count);
}
bool factors(PyObject* object, Pair* pair) {
  std::array<int64_t, 4> values;
  const int count = integers(object, &values);
  if (count != 1 && count != 2) return false;
  *pair = {values[0], values[count - 1]};
  return values[0] >= 1 && values[count - 1] >= 1;
}

// (x, filter, up, down, padding, flip_filter, gain, kind, implementation); kind: which of the functions.
PyObject* call(PyObject* const* in) {
  static const Words kinds({"upfirdn2d", "upsample2d", "downsample2d", "filter2d"});
  const Tensor *x = tensor(in[0]), *filter = tensor(in[1]);
  Geometry g;
  std::array<int64_t, 4> edges;  // left, right, top, bottom
  const int padding = integers(in[4], &edges), kind = kinds.find(in[7]);
  if (!x || !filter || kind < 0 || !factors(in[2], &g.up) || !factors(in[3], &g.down) ||
      !flag(in[5], &g.flip_filter) || !number(in[6], &g.gain) || !plain())
    return decline();
  if (x->dim() != 4 || x->size(2) == 0 || x->size(3) == 0 || filter->dim() < 1 || filter->dim() > 2 ||
      filter->numel() == 0 || filter->device() != x->device() ||
      (filter->requires_grad() && at::GradMode::is_enabled()))
    return decline();
  switch (padding) {
    case 1: edges = {edges[0], edges[0], edges[0], edges[0]}; break;
    case 2: edges = {edges[1], edges[1], edges[0], edges[0]}; break;
    case 4: break;
    default: return decline();
  }
  const Pair taps{filter->size(0), filter->size(-1)};
  for (int axis : {0, 1}) {  // rows, columns
    int64_t &before = edges[axis ? 0 : 2], &after = edges[axis ? 1 : 3];
    const int64_t k = taps[axis], u = g.up[axis], d = g.down[axis], n = x->size(2 + axis) * u;
    // Pictures stay in place: as gankern.functional says of each. (k - u may be negative, and // rounds
    // down.)
    const auto half = [](int64_t a) { return a >= 0 ? a / 2 : -((1 - a) / 2); };
    if (kind == 1) before += half(k + u - 1), after += half(k - u), g.gain *= double(u);
    if (kind == 2) before += half(k - d + 1), after += half(k - d);
    if (kind == 3) before += half(k), after += half(k - 1);
    const int64_t removed = std::max<int64_t>(-before, 0) + std::max<int64_t>(-after, 0);
    if (removed >= n || n + before + after < k) return decline();
    g.start[axis] = before;
    g.size[axis] = (n + before + after - k) / d + 1;
  }
  if (!selected(self, in[0], in[8])) return decline();
  const Tensor y = [&] {
    const pybind11::gil_scoped_release released;
    return run(*x, *filter, g);
  }();
  return THPVariable_Wrap(y);
}

const Functions functions = {method("upfirdn2d", entry<call, 9>)};

}  // namespace upfirdn2d

}  // namespace gankern::nodes
