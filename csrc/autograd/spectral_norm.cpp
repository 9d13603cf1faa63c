// Spectral norm of one weight or of a network's: gankern/ops/spectral_norm.py with its rule.
#include <ATen/ops/cat.h>
#include <ATen/ops/div.h>
#include <ATen/ops/dot.h>
#include <ATen/ops/linalg_vector_norm.h>
#include <ATen/ops/mv.h>
#include <ATen/ops/vdot.h>

#include <algorithm>
#include <cstring>
#include <numeric>

#include "call.h"

namespace gankern::nodes {
namespace spectral_norm {

Primitive self("spectral_norm");

using Optional = std::optional<Tensor>;
using Optionals = c10::List<Optional>;
using Forward = std::tuple<Tensors, Tensor>(at::TensorList, at::TensorList, at::TensorList, at::IntArrayRef,
                                            int64_t, double, bool, bool);
using Backward = Tensors(const Optionals&, at::TensorList, const Tensor&, at::IntArrayRef);
using DoubleBackward = std::tuple<Tensors, Tensors>(const Optionals&, const Optionals&, at::TensorList,
                                                    const Tensor&, at::IntArrayRef);

// Tensors: the weights of L layers. Kept: the weights, and the state that the forward left.
struct SpectralNorm final : Rule {
  std::vector<int64_t> dims, lengths;  // lengths: of u and v together
  int64_t n_power_iterations;
  double eps;
  bool u_first, add_eps;

  const char* primitive() const override { return "spectral_norm"; }
  size_t layers() const override { return dims.size(); }

  // The layers that a gradient reached, as the operators take them. The others are left out: their weights may have
  // been overwritten since.
  struct Reached {
    std::vector<size_t> numbers;
    Tensors weights;
    std::vector<int64_t> dims;
    Tensor state;

    Optionals of(const Tensors& grads) const {
      Optionals picked;
      for (const size_t i : numbers) picked.push_back(Optional(grads[i]));
      return picked;
    }
    // Results of all layers, of the results of these.
    Tensors spread(const Tensors& results, size_t layers) const {
      Tensors all(layers);
      for (size_t k = 0; k < numbers.size(); ++k) all[numbers[k]] = results[k];
      return all;
    }
  };
  template <class Wanted>
  Reached reach(const Tensors& saved, const Wanted& wanted) const {
    Reached reached;
    for (size_t i = 0; i < dims.size(); ++i) {
      if (!wanted(i)) continue;
      reached.numbers.push_back(i);
      reached.weights.push_back(saved[i]);
      reached.dims.push_back(dims[i]);
    }
    const Tensor& state = saved[dims.size()];
    reached.state = state;
    if (reached.numbers.empty() || reached.numbers.size() == dims.size()) return reached;
    Tensors parts;
    for (const size_t i : reached.numbers) parts.push_back(state.narrow(0, int64_t(i), 1));
    int64_t at = int64_t(dims.size());
    for (size_t i = 0; i < dims.size(); at += lengths[i++])
      if (wanted(i)) parts.push_back(state.narrow(0, at, lengths[i]));
    reached.state = at::cat(parts);
    return reached;
  }

  Options options() const override {
    Options all(dims.begin(), dims.end());
    for (double option : {double(n_power_iterations), eps, double(u_first), double(add_eps)})
      all.push_back(option);
    all.insert(all.end(), lengths.begin(), lengths.end());
    return all;
  }

  std::tuple<Tensors, Tensor> forward(at::TensorList weights, at::TensorList us, at::TensorList vs) const {
    static const auto op = find<Forward>("gankern::spectral_norm");
    return op.call(weights, us, vs, dims, n_power_iterations, eps, u_first, add_eps);
  }

  Tensors backward(const Needed& needed, const Tensors& grads, const Tensors& saved) const override {
    static const auto op = find<Backward>("gankern::spectral_norm_backward");
    const Reached reached = reach(saved, [&](size_t i) { return needed[i] && grads[i].defined(); });
    if (reached.numbers.empty()) return Tensors(dims.size());
    const Tensors results = op.call(reached.of(grads), reached.weights, reached.state, reached.dims);
    return reached.spread(results, dims.size());
  }

  Tensors double_backward(const Needed&, const Tensors& grad_grads, const Tensors& grads,
                          const Tensors& saved) const override {
    static const auto op = find<DoubleBackward>("gankern::spectral_norm_double_backward");
    const size_t layers = dims.size();
    const Reached reached =
        reach(saved, [&](size_t i) { return grad_grads[i].defined() && grads[i].defined(); });
    if (reached.numbers.empty()) return Tensors(2 * layers + 2);
    const auto [of_grads, of_weights] =
        op.call(reached.of(grad_grads), reached.of(grads), reached.weights, reached.state, reached.dims);
    Tensors results = reached.spread(of_grads, layers);
    results.emplace_back();  // of the state
    const Tensors others = reached.spread(of_weights, layers);
    results.insert(results.end(), others.begin(), others.end());
    results.emplace_back();
    return results;
  }
};

// One layer, checked.
struct Layer {
  const Tensor *weight, *u, *v, *sigma;
};

bool fits(const Layer& layer, const Tensor& first, int64_t* dim) {
  const Tensor &w = *layer.weight, &u = *layer.u, &v = *layer.v;
  if (!same_kind(w, first) || w.dim() < 2 || *dim < -w.dim() || *dim >= w.dim() || w.numel() == 0)
    return false;
  if (*dim < 0) *dim += w.dim();
  const int64_t height = w.size(*dim);
  return u.dim() == 1 && u.size(0) == height && v.dim() == 1 && v.size(0) == w.numel() / height &&
         u.device() == w.device() && v.device() == w.device() && !u.requires_grad() && !v.requires_grad();
}

// `to` takes what stands in the state at `begin`. A sigma may be on the host where its weight is not.
void keep(const Tensor& to, const Tensor& state, int64_t begin) {
  if (to.is_cpu() && state.is_cpu() && to.scalar_type() == state.scalar_type() && to.is_contiguous()) {
    std::memcpy(to.mutable_data_ptr(),
                static_cast<const char*>(state.const_data_ptr()) + begin * state.itemsize(), to.nbytes());
  } else {
    to.copy_(state.narrow(0, begin, to.numel()).view(to.sizes()));
  }
  to.unsafeGetTensorImpl()->bump_version();
}

// The weights, and the operator's results of them.
struct Computed {
  Tensors weights, normalized;
  Tensor state;
};

// Without autograd. `finish` is given the state while nothing is recorded yet, and other Python threads have their turn.
template <class Finish>
Computed compute(const SpectralNorm& rule, const std::vector<Layer>& layers, Finish finish) {
  Computed computed;
  Tensors us, vs;
  for (const Layer& layer : layers) {
    computed.weights.push_back(*layer.weight);
    us.push_back(*layer.u);
    vs.push_back(*layer.v);
  }
  const Running running;
  std::tie(computed.normalized, computed.state) = rule.forward(computed.weights, us, vs);
  finish(computed.state);
  return computed;
}

void record(const std::shared_ptr<SpectralNorm>& rule, const Computed& computed) {
  const Tensors& weights = computed.weights;
  if (std::none_of(weights.begin(), weights.end(), [](const Tensor& w) { return records({&w}); })) return;
  std::vector<const Tensor*> inputs, outputs;
  std::vector<Kept> kept;
  for (const Tensor& w : weights) {
    inputs.push_back(&w);
    kept.push_back({w});
  }
  for (const Tensor& y : computed.normalized) outputs.push_back(&y);
  kept.push_back({computed.state});
  nodes::record(rule, inputs, outputs, kept);
}

// What a call asks for, checked.
struct Asked {
  std::shared_ptr<SpectralNorm> rule = std::make_shared<SpectralNorm>();
  std::vector<Layer> layers;

  bool stores = false;  // whether u, v and sigma take what the iteration ends with

  // (weights, us, vs, dims, n_power_iterations, eps, training; the dialect's u_first, add_eps, iterates_in_eval,
  // stores_in_eval; sigmas, implementation); lists, or tuples, of one length, or None for dims and sigmas.
  // `ahead`: nothing is written to.
  bool read(PyObject* const* in, bool ahead) {
    bool training, iterates_in_eval, stores_in_eval;
    if (!integer(in[4], &rule->n_power_iterations) || rule->n_power_iterations < 1 ||
        !number(in[5], &rule->eps) || !(rule->eps > 0) || !flag(in[6], &training) ||
        !flag(in[7], &rule->u_first) || !flag(in[8], &rule->add_eps) || !flag(in[9], &iterates_in_eval) ||
        !flag(in[10], &stores_in_eval) || !plain())
      return false;
    if (!training && !iterates_in_eval) rule->n_power_iterations = 0;
    stores = !ahead && (training || stores_in_eval);
    Py_ssize_t count = -1;
    for (const int i : {0, 1, 2, 3, 11}) {
      if ((i == 3 || i == 11) && in[i] == Py_None) continue;
      if (!PyList_CheckExact(in[i]) && !PyTuple_CheckExact(in[i])) return false;
      const Py_ssize_t length = PySequence_Fast_GET_SIZE(in[i]);
      if (length == 0 || (count >= 0 && length != count)) return false;
      count = length;
    }
    layers.reserve(count);
    for (Py_ssize_t i = 0; i < count; ++i)
      if (!read_layer(in, i)) return false;
    rule->implementation = selected(self, PySequence_Fast_GET_ITEM(in[0], 0), in[12]);
    return rule->implementation;
  }

 private:
  bool read_layer(PyObject* const* in, Py_ssize_t i) {
    const auto item = [&](int list) {
      return in[list] == Py_None ? Py_None : PySequence_Fast_GET_ITEM(in[list], i);
    };
    PyObject* const sigma = item(11);
    const Layer layer{tensor(item(0)), tensor(item(1)), tensor(item(2)),
                      sigma == Py_None ? nullptr : tensor(sigma)};
    int64_t dim = 0;
    if (!layer.weight || !layer.u || !layer.v || !(in[3] == Py_None || integer(item(3), &dim))) return false;
    if (sigma != Py_None && (!layer.sigma || layer.sigma->numel() != 1 || layer.sigma->requires_grad()))
      return false;
    if (stores && !(writable(*layer.u) && writable(*layer.v) && (!layer.sigma || writable(*layer.sigma))))
      return false;
    layers.push_back(layer);
    if (!fits(layer, *layers[0].weight, &dim)) return false;
    rule->dims.push_back(dim);
    rule->lengths.push_back(layer.u->numel() + layer.v->numel());
    return true;
  }
};

// As Asked reads them. The normalized weights.
PyObject* call(PyObject* const* in) {
  Asked asked;
  if (!asked.read(in, /*ahead=*/false)) return decline();
  const std::vector<Layer>& layers = asked.layers;
  const Computed computed = compute(*asked.rule, layers, [&](const Tensor& state) {
    int64_t at = int64_t(layers.size());
    for (size_t i = 0; asked.stores && i < layers.size(); ++i) {
      for (const Tensor* to : {layers[i].u, layers[i].v}) {
        keep(*to, state, at);
        at += to->numel();
      }
      if (layers[i].sigma) keep(*layers[i].sigma, state, int64_t(i));
    }
  });
  record(asked.rule, computed);
  return THPVariable_WrapList(computed.normalized);
}

// As Asked reads them; writes to none of them. The normalized weights, u and v of each layer, the sigmas.
PyObject* ahead(PyObject* const* in) {
  Asked asked;
  if (!asked.read(in, /*ahead=*/true)) return decline();
  Tensors vectors;
  Tensor sigmas;
  const Computed computed = compute(*asked.rule, asked.layers, [&](const Tensor& state) {
    int64_t at = 0;
    const auto next = [&](int64_t length) {
      at += length;
      return state.narrow(0, at - length, length);
    };
    sigmas = next(int64_t(asked.layers.size()));
    for (const Layer& layer : asked.layers) {
      vectors.push_back(next(layer.u->numel()));
      vectors.push_back(next(layer.v->numel()));
    }
  });
  record(asked.rule, computed);
  py::object all =
      py::make_tuple(py::reinterpret_steal<py::object>(THPVariable_WrapList(computed.normalized)),
                     py::reinterpret_steal<py::object>(THPVariable_WrapList(vectors)),
                     py::reinterpret_steal<py::object>(THPVariable_Wrap(sigmas)));
  return all.release().ptr();
}

// What autograd knows of a layer's weight, u, v and sigma (each may be None), and of the running thread, as bytes that
// are the same as long as all of it is: gankern/nn/utils/_requests.py has it in words.
PyObject* seen(PyObject* const* in) {
  struct Fact {
    const void* tensor;
    uint32_t version;
    int8_t dtype, device_type, device;
    bool requires_grad;
  };
  static_assert(sizeof(Fact) == sizeof(void*) + 8,
                "no bytes between its members, whose values nobody would know");
  struct {
    Fact of[4];
    uint64_t modes;
  } facts{};
  for (int i = 0; i < 4; ++i) {
    if (in[i] == Py_None) continue;
    if (!THPVariable_CheckExact(in[i])) return decline();
    const Tensor& t = THPVariable_Unpack(in[i]);
    facts.of[i] = {t.unsafeGetTensorImpl(), t.is_inference() ? 0 : uint32_t(t._version()),
                   int8_t(t.scalar_type()), int8_t(t.device().type()),
                   t.device().index(),      t.requires_grad()};
  }
  facts.modes = uint64_t(at::GradMode::is_enabled()) | uint64_t(c10::InferenceMode::is_enabled()) << 1;
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(&facts), sizeof(facts));
}

// torch.nn.functional.normalize(x, dim=0, eps=eps, out=out)
void normalize(const Tensor& x, double eps, Tensor out) {
  const Tensor length = at::linalg_vector_norm(x, 2.0, at::IntArrayRef{0}, /*keepdim=*/true);
  at::div_out(out, x, length.clamp_min_(eps).expand_as(x));
}

// (weight, u, v, dim, n_power_iterations, eps, hook). The operations of torch's own parametrization, or of its hook, in
// their order and recorded by torch: its numbers and its graph, without the Python between them. It writes to u and v;
// nothing iterates where n_power_iterations is 0.
PyObject* by_torch(PyObject* const* in) {
  const Tensor *weight = tensor(in[0]), *u = tensor(in[1]), *v = tensor(in[2]);
  int64_t dim, iterations;
  double eps;
  bool hook;
  if (!weight || !u || !v || !integer(in[3], &dim) || !integer(in[4], &iterations) || !number(in[5], &eps) ||
      !flag(in[6], &hook) || !plain() || !fits({weight, u, v, nullptr}, *weight, &dim) ||
      (iterations > 0 && !(writable(*u) && writable(*v))))
    return decline();
  Tensor result;
  {
    const pybind11::gil_scoped_release released;
    std::vector<int64_t> order(weight->dim());
    std::iota(order.begin(), order.end(), 0);
    std::rotate(order.begin(), order.begin() + dim, order.begin() + dim + 1);
    const Tensor turned = dim == 0 ? *weight : weight->permute(order);
    const Tensor matrix = hook ? turned.reshape({turned.size(0), -1}) : turned.flatten(1);
    if (iterations > 0) {
      const at::NoGradGuard no_grad;
      for (int64_t i = 0; i < iterations; ++i) {
        if (!hook) normalize(at::mv(matrix, *v), eps, *u);
        normalize(at::mv(hook ? matrix.t() : matrix.matrix_H(), *u), eps, *v);
        if (hook) normalize(at::mv(matrix, *v), eps, *u);
      }
    }
    const bool copies = !hook || iterations > 0;
    const Tensor kept_u = copies ? u->clone(at::MemoryFormat::Contiguous) : *u;
    const Tensor kept_v = copies ? v->clone(at::MemoryFormat::Contiguous) : *v;
    const Tensor product = at::mv(matrix, kept_v);
    result = *weight / (hook ? at::dot(kept_u, product) : at::vdot(kept_u, product));
  }
  return THPVariable_Wrap(result);
}

const Functions functions = {
    method("spectral_norm_group", entry<call, 13>), method("spectral_norm_ahead", entry<ahead, 13>),
    method("spectral_norm_seen", entry<seen, 4>), method("spectral_norm_by_torch", entry<by_torch, 7>)};

}  // namespace spectral_norm

}  // namespace gankern::nodes
