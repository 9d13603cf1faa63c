// Convolutions by bilinear algorithms: gankern/ops/convolution.py, its ways and its gradients of any order.
#include <ATen/ops/col2im.h>
#include <ATen/ops/constant_pad_nd.h>
#include <ATen/ops/conv2d.h>
#include <ATen/ops/conv_transpose2d.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/im2col.h>
#include <ATen/ops/linear.h>
#include <ATen/ops/mm.h>
#include <ATen/ops/reflection_pad2d.h>
#include <ATen/ops/replication_pad2d.h>
#include <pybind11/stl.h>
#include <torch/csrc/DynamicTypes.h>

#include <array>
#include <map>

#include "../layout.h"
#include "call.h"
#include "zeros.h"

namespace gankern::nodes {
namespace convolution {

Primitive self("convolution");

using RowForward = Tensor(const Tensor&, const Tensor&, const std::optional<Tensor>&, int64_t, c10::SymInt,
                          c10::SymInt, int64_t, bool, bool, double, double, int64_t);
using RowWeightGradient = Tensor(const Tensor&, const Tensor&, int64_t, int64_t, bool, bool, double, int64_t);
using WindowSums = Tensor(const Tensor&, bool, bool);

// A kind of the table in gankern/ops/convolution.py.
struct Kind {
  std::string name;
  int64_t taps;
  bool swap, flip;
  double scale;
  bool collapsed;
  int64_t stride;   // of torch's own convolution
  bool transposed;  // whether that is a transposed one
  bool zeros;       // torch's form has a pooling

  // Of an image of so many pixels.
  int64_t result(int64_t n, int64_t padding) const {
    if (transposed) return 2 * n;
    if (stride == 1) return n + 2 * padding - taps + 1;
    return taps == 3 && !collapsed ? (n + 1) / 2 : n / 2;
  }
};
std::vector<Kind> kinds;
bool has_triton = false;
// Ways that are no rows, as OTHERS in gankern/ops/convolution_choice.py has them.
enum : int64_t { kTorch = -1, kReference = -2, kExchanged = -3, kProduct = -4, kPhases = -5 };
enum Pass { kForward, kTranspose, kWeight };

// For each pass, and for contiguous and channels_last images: the row, or one of the ways above.
using Ways = std::array<std::array<int64_t, 2>, 3>;

// What is computed of an image and a weight, in any order of gradient.
struct Plan {
  const Kind* kind;
  int64_t padding;
  double scale;
  Ways ways;
  int64_t border;  // what stands outside of the image: 0 zeros, 1 mirrored pixels, 2 the outermost ones

  int64_t way(Pass pass, const Tensor& x) const {
    const int64_t found = ways[pass][has_channels_together(x)];
    // Products of half precision would be rounded before their sum.
    const bool half = x.scalar_type() != at::kFloat && x.scalar_type() != at::kDouble;
    return found == kProduct && half ? int64_t(kTorch) : found;
  }
  std::string key() const {
    Options all{double(padding), scale, double(border)};
    for (const auto& pass : ways) all.insert(all.end(), pass.begin(), pass.end());
    return kind->name + bytes(all);
  }
};
using PlanPtr = std::shared_ptr<const Plan>;

// ---- the 4x4 kernel of stride 2 that both steps of a kind that resamples collapse into
// ------------------------------

Tensor window_sums(const Tensor& x) {
  const Tensor rows = x.narrow(-2, 1, x.size(-2) - 1).add(x.narrow(-2, 0, x.size(-2) - 1));
  return rows.narrow(-1, 1, x.size(-1) - 1).add(rows.narrow(-1, 0, x.size(-1) - 1));
}
// By one launch where gankern/triton/convolution.py is there, since each costs a GPU more than its work.
std::optional<Tensor> by_one_launch(const Kind& kind, const Tensor& x, bool grow) {
  static const auto op = find<WindowSums>("gankern::convolution_window_sums");
  if (!has_triton || !x.is_cuda()) return std::nullopt;
  return op.call(x, kind.transposed, grow);
}
Tensor collapse(const Kind& kind, const Tensor& weight) {
  if (const auto kernel = by_one_launch(kind, weight, true)) return *kernel;
  const Tensor sums = window_sums(at::constant_pad_nd(weight, {1, 1, 1, 1}));
  return kind.transposed ? sums.flip({2, 3}).transpose(0, 1) : sums.div(4);
}
Tensor uncollapse(const Kind& kind, const Tensor& grad) {
  if (const auto of_weight = by_one_launch(kind, grad, false)) return *of_weight;
  return window_sums(kind.transposed ? grad.transpose(0, 1).flip({2, 3}) : grad.div(4));
}

// ---- passes, not recorded
// -------------------------------------------------------------------------------------------

// The image with a border of one pixel.
Tensor bordered(const Plan& plan, const Tensor& x) {
  return plan.border == 1 ? at::reflection_pad2d(x, {1, 1, 1, 1}) : at::replication_pad2d(x, {1, 1, 1, 1});
}
// Its transpose: the border's values go to the pixels that it was made of. Overwrites y.
Tensor folded(const Plan& plan, const Tensor& y) {
  for (int64_t d : {2, 3}) {
    const int64_t n = y.size(d) - 2, first = plan.border == 1 ? 2 : 1, last = plan.border == 1 ? n - 1 : n;
    y.select(d, first).add_(y.select(d, 0));
    y.select(d, last).add_(y.select(d, n + 1));
  }
  const auto format = y.is_contiguous() ? at::MemoryFormat::Contiguous : y.suggest_memory_format();
  return y.narrow(2, 1, y.size(2) - 2).narrow(3, 1, y.size(3) - 2).clone(format);
}

// Of a transposed convolution by torch that gives height times width: rows and columns of that than the least
// that there can be.
std::array<int64_t, 2> more_than_least(const Kind& kind, int64_t taps, int64_t padding, const Tensor& x,
                                       int64_t height, int64_t width) {
  const auto more = [&](int64_t n, int64_t before) {
    return n - ((before - 1) * kind.stride - 2 * padding + taps);
  };
  return {more(height, x.size(2)), more(width, x.size(3))};
}

// The weight of the convolution that is the transpose of one of stride 1, whose padding is taps - 1 - padding.
Tensor exchanged(const Tensor& weight) { return weight.flip({2, 3}).transpose(0, 1); }

// ---- as products of matrices: see gankern/ops/convolution.py
// ---------------------------------------------------------------------------------------

Tensor side_by_side(const Tensor& x) {
  return x.size(0) == 1 ? x.select(0, 0).flatten(1) : x.transpose(0, 1).flatten(1);
}
Tensor columns(const Kind& kind, int64_t padding, const Tensor& x) {
  if (kind.taps == 1) return side_by_side(x);
  return side_by_side(
      at::im2col(x, {kind.taps, kind.taps}, {1, 1}, {padding, padding}, {kind.stride, kind.stride}));
}
Tensor matrix_product(const Tensor& a, const Tensor& b) {
  return b.size(1) >= 16 ? a.matmul(b) : b.t().matmul(a.t()).t();
}
Tensor convolve_by_product(const Plan& plan, bool transpose, int64_t height, int64_t width, const Tensor& x,
                           const Tensor& weight, const std::optional<Tensor>& bias) {
  const Kind& kind = *plan.kind;
  const int64_t n = x.size(0), pad = plan.padding;
  const Tensor matrix = weight.flatten(1);
  Tensor y;
  if (kind.transposed == transpose) {
    y = matrix_product(matrix, columns(kind, pad, x)).unflatten(1, {n, height, width}).transpose(0, 1);
  } else {
    y = matrix_product(matrix.t(), side_by_side(x)).unflatten(1, {n, -1}).transpose(0, 1);
    if (kind.taps > 1)
      y = at::col2im(y, {height, width}, {kind.taps, kind.taps}, {1, 1}, {pad, pad},
                     {kind.stride, kind.stride});
    y = y.reshape({n, -1, height, width});
  }
  // As torch's: channels last where either of the two has them so.
  const bool last =
      has_channels_together(x) || weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  y = y.contiguous(last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous);
  if (plan.scale != 1) y = y.mul(plan.scale);
  return bias ? y.add(bias->view({-1, 1, 1})) : y;
}
Tensor weight_gradient_by_product(const Plan& plan, const Tensor& x, const Tensor& grad) {
  const Kind& kind = *plan.kind;
  const Tensor &small = kind.transposed ? x : grad, &large = kind.transposed ? grad : x;
  const Tensor y = side_by_side(small).matmul(columns(kind, plan.padding, large).t());
  return y.view({small.size(1), large.size(1), kind.taps, kind.taps});
}

// The transposed convolution of a 4x4 kernel, stride 2 and padding 1, by phases: see gankern/ops/convolution.py.
Tensor enlarged_by_phases(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                          int64_t height, int64_t width) {
  const int64_t inner = weight.size(0), outer = weight.size(1);
  const bool last =
      has_channels_together(x) || weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
  const auto format = last ? at::MemoryFormat::ChannelsLast : at::MemoryFormat::Contiguous;
  const Tensor kernel = weight.flip({2, 3})
                            .reshape({inner, outer, 2, 2, 2, 2})
                            .permute({3, 5, 1, 0, 2, 4})
                            .reshape({4 * outer, inner, 2, 2})
                            .contiguous(format);
  std::optional<Tensor> biases;
  if (bias) biases = bias->repeat({4});
  const Tensor phases = at::convolution(x, kernel, biases, {1, 1}, {1, 1}, {1, 1}, false, {0, 0}, 1);
  const Tensor y = at::empty({x.size(0), outer, height, width}, x.options(), format);
  for (int64_t a : {0, 1})
    for (int64_t b : {0, 1}) {
      const Tensor part = y.slice(2, a, height, 2).slice(3, b, width, 2);
      part.copy_(
          phases.narrow(1, (2 * a + b) * outer, outer).narrow(2, a, part.size(2)).narrow(3, b, part.size(3)));
    }
  return y;
}

Tensor convolve(const Plan& plan, bool transpose, int64_t height, int64_t width, const Tensor& x,
                Tensor weight, const std::optional<Tensor>& bias) {
  static const auto op = find<RowForward>("gankern::convolution_row");
  const Kind& kind = *plan.kind;
  const int64_t row = plan.way(transpose ? kTranspose : kForward, x);
  if (plan.border && (transpose || row < 0)) {
    Plan inner = plan;  // of the image with its border
    inner.border = inner.padding = 0;
    if (transpose) return folded(plan, convolve(inner, true, height + 2, width + 2, x, weight, bias));
    return convolve(inner, false, height, width, bordered(plan, x), weight, bias);
  }
  if (row >= 0) {
    const Tensor y =
        op.call(x, weight, bias, row, height, width, transpose ? kind.taps - 1 - plan.padding : plan.padding,
                transpose && kind.flip, kind.swap != transpose, plan.scale * kind.scale, 1.0, plan.border);
    // The engine takes a 1x1 kernel for contiguous; torch goes by its strides.
    const bool last = kind.taps == 1 && weight.suggest_memory_format() == at::MemoryFormat::ChannelsLast;
    return last ? y.contiguous(at::MemoryFormat::ChannelsLast) : y;
  }
  if (row == kProduct) return convolve_by_product(plan, transpose, height, width, x, weight, bias);
  if (plan.scale != 1) weight = weight.mul(plan.scale);
  if (row == kExchanged) {  // the gradient by torch's forward, and the other way round
    const int64_t pad = kind.taps - 1 - plan.padding;
    return at::convolution(x, exchanged(weight), bias, {1, 1}, {pad, pad}, {1, 1}, !transpose, {0, 0}, 1);
  }
  int64_t padding = plan.padding;
  if (kind.collapsed) {
    weight = collapse(kind, weight);
    padding = 1;
    if (row == kPhases && kind.transposed != transpose)
      return enlarged_by_phases(x, weight, bias, height, width);
  }
  const bool transposed = kind.transposed != transpose;
  std::array<int64_t, 2> more{0, 0};
  if (transposed) more = more_than_least(kind, weight.size(2), padding, x, height, width);
  return at::convolution(x, weight, bias, {kind.stride, kind.stride}, {padding, padding}, {1, 1}, transposed,
                         more, 1);
}

Tensor weight_gradient(const Plan& plan, const Tensor& x, const Tensor& grad) {
  static const auto op = find<RowWeightGradient>("gankern::convolution_row_weight_gradient");
  const Kind& kind = *plan.kind;
  const int64_t row = plan.way(kWeight, x);
  if (row >= 0)
    return op.call(x, grad, row, plan.padding, false, kind.swap, plan.scale * kind.scale, plan.border);
  if (plan.border) {
    Plan inner = plan;
    inner.border = inner.padding = 0;
    return weight_gradient(inner, bordered(plan, x), grad);
  }
  if (row == kProduct) {
    const Tensor y = weight_gradient_by_product(plan, x, grad);
    return plan.scale == 1 ? y : y.mul(plan.scale);
  }
  const int64_t taps = kind.collapsed ? 4 : kind.taps;
  // Exchanged, as that of a convolution from the gradient to the image.
  const bool exchange = row == kExchanged;
  const int64_t padding = kind.collapsed ? 1 : exchange ? taps - 1 - plan.padding : plan.padding;
  const Tensor &from = exchange ? grad : x, &to = exchange ? x : grad;
  const int64_t outer = kind.transposed ? from.size(1) : to.size(1),
                inner = kind.transposed ? to.size(1) : from.size(1);
  std::array<int64_t, 2> more{0, 0};
  if (kind.transposed) more = more_than_least(kind, taps, padding, from, to.size(2), to.size(3));
  Tensor result = std::get<1>(at::convolution_backward(
      to, from, from.new_empty({outer, inner, taps, taps}), std::nullopt, {kind.stride, kind.stride},
      {padding, padding}, {1, 1}, kind.transposed, more, 1, {false, true, false}));
  if (exchange) result = exchanged(result).contiguous();
  if (kind.collapsed) result = uncollapse(kind, result);
  return plan.scale == 1 ? result : result.mul(plan.scale);
}

// ---- recorded
// -------------------------------------------------------------------------------------------------------

Tensor convolved(const PlanPtr& plan, bool transpose, int64_t height, int64_t width, const Tensor& x,
                 const Tensor& weight, const std::optional<Tensor>& bias);
Tensor weight_gradient_of(const PlanPtr& plan, const Tensor& x, const Tensor& grad);

// Of convolved: keeps x and the weight.
struct ConvolveBackward final : Recorded {
  PlanPtr plan;
  bool transpose;

  std::string name() const override { return "GankernBackward_convolution"; }
  torch::autograd::variable_list apply_once(torch::autograd::variable_list&& grads) override {
    Tensor grad = grads[0];
    if (!grad.defined()) return torch::autograd::variable_list(3);
    refuse_tangents("convolution", grads);
    const Needed needed = asked();
    const Tensors kept = unpack(0, 2);
    if (!transpose && at::GradMode::is_enabled()) grad = carried(grad, kept[0]);
    return work()(needed, {std::move(grad)}, kept);
  }

  // With what torch's steps give to those below in the second order: a pooling behind the convolution zeros to all of
  // its inputs, a padding before it to x.
  Tensor carried(const Tensor& grad, const Tensor& x) {
    if (plan->kind->zeros) return carry(grad, Witness(getptr()));
    if (!x.requires_grad()) return grad;
    const auto derivative = plan->border ? Witness::kZeros : Witness::kNone;
    return carry(grad, Witness(torch::autograd::impl::gradient_edge(x).function, derivative, x));
  }

  std::string key() const override { return plan->key() + (transpose ? "transpose" : ""); }
  Work work() const override {
    return [plan = plan, transpose = transpose](const Needed& needed, const Tensors& grads,
                                                const Tensors& kept) {
      const Tensor &grad = grads[0], &x = kept[0], &weight = kept[1];
      Tensors results(3);
      if (needed[0])
        results[0] = convolved(plan, !transpose, x.size(2), x.size(3), grad, weight, std::nullopt);
      if (needed[1])
        results[1] = transpose ? weight_gradient_of(plan, grad, x) : weight_gradient_of(plan, x, grad);
      if (needed[2]) results[2] = grad.sum({0, 2, 3});
      return results;
    };
  }
};

// Of weight_gradient_of: keeps x and the gradient.
struct WeightGradientBackward final : Recorded {
  PlanPtr plan;

  std::string name() const override { return "GankernBackward_convolution_weight"; }
  torch::autograd::variable_list apply_once(torch::autograd::variable_list&& grads) override {
    const Tensor& direction = grads[0];
    if (!direction.defined()) return torch::autograd::variable_list(2);
    refuse_tangents("convolution", grads);
    return work()(asked(), {direction}, unpack(0, 2));
  }

  std::string key() const override { return plan->key(); }
  Work work() const override {
    return [plan = plan](const Needed& needed, const Tensors& grads, const Tensors& kept) {
      const Tensor &direction = grads[0], &x = kept[0], &grad = kept[1];
      Tensors results(2);
      if (needed[0]) results[0] = convolved(plan, true, x.size(2), x.size(3), grad, direction, std::nullopt);
      if (needed[1])
        results[1] = convolved(plan, false, grad.size(2), grad.size(3), x, direction, std::nullopt);
      return results;
    };
  }
};

template <class N>
void keep(const Tensor& y, N* node, const PlanPtr& plan, std::initializer_list<const Tensor*> inputs) {
  const NodePtr owner = owned(node);
  node->plan = plan;
  for (const Tensor* t : inputs) node->depends_on(*t);
  torch::autograd::set_history(y, owner);
  for (const Tensor* t : {inputs.begin()[0], inputs.begin()[1]}) node->saved.emplace_back(*t, false);
}

Tensor convolved(const PlanPtr& plan, bool transpose, int64_t height, int64_t width, const Tensor& x,
                 const Tensor& weight, const std::optional<Tensor>& bias) {
  Tensor y;
  {
    const BelowAutograd guard;
    y = or_memory_error([&] { return convolve(*plan, transpose, height, width, x, weight, bias); });
  }
  const Tensor& b = value(bias);
  if (records({&x, &weight, &b})) {
    auto* node = new ConvolveBackward;
    node->transpose = transpose;
    keep(y, node, plan, {&x, &weight, &b});
  }
  return y;
}

Tensor weight_gradient_of(const PlanPtr& plan, const Tensor& x, const Tensor& grad) {
  Tensor y;
  {
    const BelowAutograd guard;
    y = or_memory_error([&] { return weight_gradient(*plan, x, grad); });
  }
  if (records({&x, &grad})) keep(y, new WeightGradientBackward, plan, {&x, &grad});
  return y;
}

// ---- from Python
// ----------------------------------------------------------------------------------------------------

// (kind, level, channels in, channels out, pixels) -> its Ways
PyObject* ways_function;
// (kind, dtype, number of a GPU, channels in, channels out, pixels) -> its Ways there
PyObject* device_function;

// ([(name, taps, swap, flip, scale, collapsed, stride, transposed, zeros)], these two functions, whether there is Triton)
PyObject* set_kinds(PyObject* const* in) {
  for (py::handle row : py::reinterpret_borrow<py::list>(in[0])) {
    const auto [name, taps, swap, flip, scale, collapsed, stride, transposed, zeros] =
        row.cast<std::tuple<std::string, int64_t, bool, bool, double, bool, int64_t, bool, bool>>();
    kinds.push_back({name, taps, swap, flip, scale, collapsed, stride, transposed, zeros});
  }
  ways_function = Py_NewRef(in[1]);
  device_function = Py_NewRef(in[2]);
  has_triton = in[3] == Py_True;
  Py_RETURN_NONE;
}

// The answer is kept by numbers alone: a call of a layer that is as the last one compares five of them.
const Ways& ways_for(const Kind& kind, PyObject* level, int64_t in, int64_t out, int64_t pixels) {
  using Key = std::tuple<const Kind*, int, int64_t, int64_t, int64_t>;
  static const Words levels({"highest", "high", "medium"});
  static std::map<Key, Ways> known;  // under the interpreter's lock
  static const std::pair<const Key, Ways>* last = nullptr;
  const Key key{&kind, levels.find(level), in, out, pixels};
  if (last && last->first == key) return last->second;
  auto found = known.find(key);
  if (found == known.end()) {
    const auto ways = py::handle(ways_function)(kind.name, py::handle(level), in, out, pixels).cast<Ways>();
    if (known.size() >= 4096) known.clear();
    found = known.emplace(key, ways).first;
  }
  last = &*found;
  return last->second;
}

// The same of a kind that resamples, on a GPU.
const Ways& ways_on_device(const Kind& kind, const Tensor& x, int64_t in, int64_t out, int64_t pixels) {
  using Key = std::tuple<const Kind*, at::ScalarType, int64_t, int64_t, int64_t, int64_t>;
  static std::map<Key, Ways> known;  // under the interpreter's lock
  const Key key{&kind, x.scalar_type(), x.get_device(), in, out, pixels};
  auto found = known.find(key);
  if (found == known.end()) {
    const py::handle dtype(reinterpret_cast<PyObject*>(torch::getTHPDtype(x.scalar_type())));
    const auto ways =
        py::handle(device_function)(kind.name, dtype, x.get_device(), in, out, pixels).cast<Ways>();
    if (known.size() >= 4096) known.clear();
    found = known.emplace(key, ways).first;
  }
  return found->second;
}

struct Operands {
  const Tensor *x, *weight;
  std::optional<Tensor> bias;
  Tensor cast[2];  // what the first two are under autocast
};

bool operands(PyObject* const* in, Operands* o) {
  o->x = tensor(in[0]);
  o->weight = tensor(in[1]);
  if (!o->x || !o->weight || !(o->x->is_cpu() || o->x->is_cuda()) || !optional_tensor(in[2], &o->bias))
    return false;
  const auto device = o->x->device().type();
  if (at::autocast::is_autocast_enabled(device)) {
    if (!plain()) return false;
    // As torch's convolutions, which keep what they cast of weights.
    const auto dtype = at::autocast::get_autocast_dtype(device);
    o->cast[0] = at::autocast::cached_cast(dtype, *o->x, device);
    o->cast[1] = at::autocast::cached_cast(dtype, *o->weight, device);
    o->x = &o->cast[0], o->weight = &o->cast[1];
    if (o->bias) o->bias = at::autocast::cached_cast(dtype, *o->bias, device);
  }
  return same_kind(*o->x, *o->weight) && (!o->bias || same_kind(*o->bias, *o->x));
}

// The kind's result, or an undefined tensor where plain PyTorch is to run.
Tensor by_kind(const Kind& kind, const Operands& o, int64_t padding, double scale, int64_t border = 0) {
  const Tensor &x = *o.x, &weight = *o.weight;
  const int64_t height = kind.result(x.size(2), padding), width = kind.result(x.size(3), padding);
  const int64_t in = weight.size(kind.swap ? 0 : 1), out = weight.size(kind.swap ? 1 : 0);
  const int64_t pixels = x.size(0) * std::min(x.size(2) * x.size(3), height * width);
  static PyObject* const highest = PyUnicode_InternFromString("highest");
  if (!x.is_cpu() && !kind.collapsed) return Tensor();
  Ways ways = !x.is_cpu() ? ways_on_device(kind, x, in, out, pixels)
                          : ways_for(kind, x.scalar_type() == at::kDouble ? highest : convolution_precision(),
                                     in, out, pixels);
  // A kernel as large as the image: tiles compute, and round, pixels that nobody asked for.
  if (pixels > 0 && kind.stride == 1 && kind.taps > 1 && height * width == 1 &&
      x.size(2) * x.size(3) == kind.taps * kind.taps)
    for (auto& pass : ways) pass = {kProduct, kProduct};
  const Plan plan{&kind, padding, scale, ways, border};
  const int64_t forward = plan.way(kForward, x);
  if (forward == kReference || (x.is_cpu() && forward == kTorch && plan.way(kTranspose, x) == kTorch &&
                                plan.way(kWeight, x) == kTorch))
    return Tensor();
  put_on_record(self, x.is_cpu());
  const pybind11::gil_scoped_release released;
  return convolved(std::make_shared<Plan>(plan), false, height, width, x, weight, o.bias);
}

// Whether the kind takes these tensors, of which it is one; what is not is for Python, or torch, to refuse.
bool takes(const Kind& kind, const Operands& o, int64_t padding) {
  const Tensor &x = *o.x, &w = *o.weight;
  if (x.dim() != 4 || w.dim() != 4 || w.size(kind.swap ? 0 : 1) != x.size(1) || w.numel() == 0 ||
      x.size(1) == 0)
    return false;
  for (int64_t n : {x.size(2), x.size(3)})
    if (n < 1 || kind.result(n, padding) < 1) return false;
  return !o.bias || (o.bias->dim() == 1 && o.bias->size(0) == w.size(kind.swap ? 1 : 0));
}

const Kind& kind_named(const char* name) {
  for (const Kind& kind : kinds)
    if (kind.name == name) return kind;
  TORCH_CHECK(false, "convolution: there is no kind ", name);
}

// The kind of stride 1 with so many taps, if there is one.
const Kind* of_stride_one(int64_t taps) {
  for (const Kind& kind : kinds)
    if (kind.stride == 1 && kind.taps == taps) return &kind;
  return nullptr;
}

// An integer, or one or two of them.
bool pair(PyObject* object, std::array<int64_t, 2>* values) {
  if (integer(object, &(*values)[0])) {
    (*values)[1] = (*values)[0];
    return true;
  }
  if (!PyTuple_CheckExact(object) && !PyList_CheckExact(object)) return false;
  const Py_ssize_t count = PySequence_Fast_GET_SIZE(object);
  return (count == 1 || count == 2) && integer(PySequence_Fast_GET_ITEM(object, 0), &(*values)[0]) &&
         integer(PySequence_Fast_GET_ITEM(object, count - 1), &(*values)[1]);
}
using Two = std::array<int64_t, 2>;

// As above, or one of torch's words; "same" only where it is the same on both sides.
bool pads(PyObject* object, const Tensor& weight, const Two& stride, const Two& dilation, Two* padding) {
  static const Words words({"valid", "same"});
  if (!PyUnicode_CheckExact(object)) return pair(object, padding);
  const int word = words.find(object);
  if (word < 0 || weight.dim() != 4) return false;
  *padding = {0, 0};
  if (word == 0) return true;
  for (int axis : {0, 1}) {
    const int64_t taps = weight.size(2 + axis);
    if (stride[axis] != 1 || dilation[axis] != 1 || taps % 2 == 0) return false;
    (*padding)[axis] = taps / 2;
  }
  return true;
}

// A convolution that is one matrix product, if it is one: see as_product of gankern/ops/convolution.py.
Tensor as_product(const Operands& o, const Two& padding, const Two& more, const Two& dilation, int64_t groups,
                  bool transposed, double scale) {
  const Tensor &x = *o.x, &w = *o.weight;
  if (x.dim() != 4 || w.dim() != 4 || groups != 1 || padding != Two{0, 0} || more != Two{0, 0} ||
      dilation != Two{1, 1} || !x.is_cpu() ||
      (x.scalar_type() != at::kFloat && x.scalar_type() != at::kDouble))
    return Tensor();
  const int64_t height = transposed ? 1 : w.size(2), width = transposed ? 1 : w.size(3);
  if (x.size(2) != height || x.size(3) != width || x.size(1) != w.size(transposed ? 0 : 1) ||
      x.numel() == 0 || w.numel() == 0 || !x.is_contiguous() || !w.is_contiguous())
    return Tensor();
  const int64_t out = w.size(transposed ? 1 : 0);
  if (o.bias && (o.bias->dim() != 1 || o.bias->size(0) != out)) return Tensor();
  if (!transposed && scale == 1)
    return at::linear(x.flatten(1), w.flatten(1), o.bias).view({x.size(0), out, 1, 1});
  Tensor y = at::mm(x.flatten(1), transposed ? w.flatten(1) : w.flatten(1).t());
  if (scale != 1) y = y.mul(scale);
  y = y.view({x.size(0), out, transposed ? w.size(2) : 1, transposed ? w.size(3) : 1});
  return o.bias ? y.add(o.bias->view({-1, 1, 1})) : y;
}

// (input, weight, bias, stride, padding, dilation, groups, weight_scale, implementation, padding_mode)
PyObject* conv2d(PyObject* const* in) {
  static const Words borders({"zeros", "reflect", "replicate"});
  static const Kind &strided = kind_named("strided"), &strided_of_three = kind_named("strided_of_three");
  const int border = borders.find(in[9]);
  Operands o;
  Two stride, padding, dilation;
  int64_t groups;
  double scale;
  if (!operands(in, &o) || !pair(in[3], &stride) || !pair(in[5], &dilation) ||
      !pads(in[4], *o.weight, stride, dilation, &padding) || !integer(in[6], &groups) ||
      !number(in[7], &scale) || !plain() || at::impl::torch_function_mode_enabled() || !left_to_auto(in[8]) ||
      border < 0)
    return decline();
  const Tensor &x = *o.x, &w = *o.weight;
  const Kind* kind = nullptr;
  if (w.dim() == 4 && groups == 1 && dilation == Two{1, 1}) {
    const Two taps{w.size(2), w.size(3)};
    if (taps[0] == taps[1] && stride == Two{1, 1} && padding[0] == padding[1] && padding[0] >= 0 &&
        padding[0] < taps[0])
      kind = of_stride_one(taps[0]);
    if (taps == Two{4, 4} && stride == Two{2, 2} && padding == Two{1, 1}) kind = &strided;
    if (taps == Two{3, 3} && stride == Two{2, 2} && padding == Two{1, 1}) kind = &strided_of_three;
  }
  Tensor y;
  if (border && !(kind && kind->stride == 1 && kind->taps == 3 && padding[0] == 1 && x.dim() == 4 &&
                  x.size(2) > 1 && x.size(3) > 1))
    return decline();
  if (!border && x.dim() == 4 && w.dim() == 4 && x.size(2) == w.size(2) && x.size(3) == w.size(3)) {
    const pybind11::gil_scoped_release released;
    y = as_product(o, padding, {0, 0}, dilation, groups, false, scale);
  }
  if (kind && !y.defined()) {
    if (!takes(*kind, o, padding[0])) return decline();
    y = by_kind(*kind, o, padding[0], scale, border);
    if (y.defined()) return THPVariable_Wrap(std::move(y));
  }
  if (!y.defined()) {
    // Behind a scaled result comes the bias, of which there is to be one value a channel; else Python raises.
    const bool scaled = scale != 1;
    const bool fits = !o.bias || (o.bias->dim() == 1 && w.dim() == 4 && o.bias->size(0) == w.size(0));
    if (border || (scaled && !fits)) return decline();
    const std::optional<Tensor> bias = scaled ? std::nullopt : o.bias;
    const pybind11::gil_scoped_release released;
    // What conv2d comes to, without its turn of the dispatcher.
    if (x.dim() == 4 && w.dim() == 4 && !x.is_complex())
      y = at::convolution(x, w, bias, stride, padding, dilation, false, {0, 0}, groups);
    else
      y = at::conv2d(x, w, bias, stride, padding, dilation, groups);
    if (scaled) {
      y = y.mul(scale);
      if (o.bias) y = y.add(o.bias->view({-1, 1, 1}));
    }
  }
  put_on_record(self, false);
  return THPVariable_Wrap(std::move(y));
}

// (input, weight, bias, stride, padding, output_padding, groups, dilation, weight_scale,
// implementation)
PyObject* conv_transpose2d(PyObject* const* in) {
  static const Kind &transposed = kind_named("transposed"),
                    &transposed_of_three = kind_named("transposed_of_three");
  Operands o;
  Two stride, padding, more, dilation;
  int64_t groups;
  double scale;
  if (!operands(in, &o) || !pair(in[3], &stride) || !pair(in[4], &padding) || !pair(in[5], &more) ||
      !integer(in[6], &groups) || !pair(in[7], &dilation) || !number(in[8], &scale) || !plain() ||
      at::impl::torch_function_mode_enabled() || !left_to_auto(in[9]))
    return decline();
  const Tensor &x = *o.x, &w = *o.weight;
  Tensor y;
  const int64_t taps = w.dim() == 4 && w.size(2) == w.size(3) ? w.size(2) : 0;
  if ((taps == 4 || taps == 3) && stride == Two{2, 2} && padding == Two{1, 1} &&
      more == Two{4 - taps, 4 - taps} && dilation == Two{1, 1} && groups == 1) {
    const Kind& kind = taps == 4 ? transposed : transposed_of_three;
    if (!takes(kind, o, 1)) return decline();
    y = by_kind(kind, o, 1, scale);
  }
  if (!y.defined()) {
    {
      const pybind11::gil_scoped_release released;
      y = as_product(o, padding, more, dilation, groups, true, scale);
      if (!y.defined() && scale == 1)
        y = at::conv_transpose2d(x, w, o.bias, stride, padding, more, groups, dilation);
    }
    if (!y.defined()) return decline();
    put_on_record(self, false);
  }
  return THPVariable_Wrap(std::move(y));
}

// (kind, x, weight, bias, weight_scale, implementation): of a kind that resamples, with a 3x3
// kernel.
PyObject* resample(PyObject* const* in) {
  static const Words names({"upsample", "downsample"});
  Operands o;
  double scale;
  const int name = names.find(in[0]);
  if (name < 0 || !operands(in + 1, &o) || !number(in[4], &scale) || !plain() || !left_to_auto(in[5]))
    return decline();
  const Kind& kind = kind_named(name ? "downsample" : "upsample");
  if (o.weight->dim() != 4 || o.weight->size(2) != 3 || o.weight->size(3) != 3 || !takes(kind, o, 1))
    return decline();
  Tensor y = by_kind(kind, o, 1, scale);
  return y.defined() ? THPVariable_Wrap(std::move(y)) : decline();
}

const Functions functions = {
    method("set_convolution_kinds", entry<set_kinds, 4>),
    method("conv2d", entry<conv2d, 10>),
    method("conv_transpose2d", entry<conv_transpose2d, 10>),
    method("resample_conv2d", entry<resample, 6>),
};

}  // namespace convolution

}  // namespace gankern::nodes
