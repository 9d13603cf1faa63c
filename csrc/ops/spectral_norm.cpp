// torch.ops.gankern.spectral_norm and its gradients on CPU tensors. Schemas: gankern/ops/spectral_norm.py.
#include "../cpu/spectral_norm.h"

#include <array>
#include <cstring>

#include "spectral_norm.h"

namespace gankern {
namespace {

// How a dense weight's columns lie in memory. Column j of the matrix counts the other dimensions in their
// logical order; memory may hold them in another one (channels_last).
struct Layout {
  int64_t outer = 1, rows = 1, inner = 1;
  std::vector<int64_t> sizes, steps;  // of the other dimensions, logical order; steps in memory order
  bool permuted = false;

  Layout(const Tensor& weight, int64_t dim) {
    const int64_t n = weight.dim();
    STD_TORCH_CHECK(dim >= 0 && dim < n, kName, ": dim ", dim, " of a ", n, "-D weight");
    // From outermost to innermost. A dimension of size 1 may have any stride: it counts as outermost.
    std::vector<int64_t> order(n);
    for (int64_t d = 0; d < n; ++d) order[d] = d;
    const auto strides = weight.strides();
    const auto sorted =
        std::stable_partition(order.begin(), order.end(), [&](int64_t d) { return weight.size(d) == 1; });
    std::stable_sort(sorted, order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
    std::vector<int64_t> step(n, 1);
    int64_t columns = 1;
    bool inside = true;
    for (int64_t k = n - 1; k >= 0; --k) {
      const int64_t d = order[k];
      if (d == dim) {
        inside = false;
        continue;
      }
      step[d] = columns;
      columns *= weight.size(d);
      (inside ? inner : outer) *= weight.size(d);
    }
    rows = weight.size(dim);
    int64_t expected = columns;
    for (int64_t d = 0; d < n; ++d) {
      if (d == dim) continue;
      sizes.push_back(weight.size(d));
      steps.push_back(step[d]);
      if (weight.size(d) > 1) {
        expected /= weight.size(d);
        permuted = permuted || step[d] != expected;
      }
    }
  }

  // f(logical column, memory column) for all columns.
  template <class F>
  void each_column(const F& f) const {
    const int64_t columns = outer * inner;
    std::vector<int64_t> index(sizes.size(), 0);
    int64_t at = 0;
    for (int64_t j = 0; j < columns; ++j) {
      f(j, at);
      for (int64_t d = int64_t(sizes.size()) - 1; d >= 0; --d) {
        at += steps[d];
        if (++index[d] < sizes[d]) break;
        at -= steps[d] * sizes[d];
        index[d] = 0;
      }
    }
  }
};

// v between its logical order and the order in memory; not in place.
template <class A>
void reorder(const Layout& layout, const A* in, A* out, bool into_memory) {
  layout.each_column([&](int64_t logical, int64_t memory) {
    if (into_memory)
      out[memory] = in[logical];
    else
      out[logical] = in[memory];
  });
}
void reorder(const Layout& layout, ScalarType dtype, const void* in, void* out, bool into_memory) {
  if (dtype == ScalarType::Double)
    reorder(layout, static_cast<const double*>(in), static_cast<double*>(out), into_memory);
  else
    reorder(layout, static_cast<const float*>(in), static_cast<float*>(out), into_memory);
}

// What a forward leaves behind for its backward: one vector in the accumulation dtype that holds sigma of all
// layers, then u and v (in logical order) of each layer.
struct State {
  const Operand tensor;
  const ScalarType dtype;

  State(const Tensor& state, const Tensor& weight)
      : tensor(compact(state)), dtype(accumulation_type(weight)) {
    STD_TORCH_CHECK(state.scalar_type() == dtype && state.dim() == 1, kName,
                    ": the state is not what the forward returned");
  }
  int64_t width() const { return dtype == ScalarType::Double ? 8 : 4; }  // bytes a value
  void* at(int64_t index) const {
    return static_cast<char*>(const_cast<void*>(tensor.data())) + width() * index;
  }
};

// A layer's weight, dense, and how it lies.
struct Weight {
  const Operand tensor;
  const Layout layout;
  Weight(const Tensor& weight, int64_t dim) : tensor(dense(weight)), layout(*tensor, dim) {}
  int64_t rows() const { return layout.rows; }
  int64_t columns() const { return layout.outer * layout.inner; }
};

// A layer's v in memory order. Where that is the logical order, this is what was given.
struct InMemoryOrder {
  Optional copy;
  const void* data;

  InMemoryOrder(const void* logical, const Weight& weight) : data(logical) {
    if (!weight.layout.permuted) return;
    const ScalarType dtype = accumulation_type(*weight.tensor);
    copy = blank(*weight.tensor, {weight.columns()}, dtype);
    reorder(weight.layout, dtype, logical, copy->mutable_data_ptr(), true);
    data = copy->const_data_ptr();
  }
};

// u or v from a buffer of any floating dtype, in logical order.
Operand vector_in(const Tensor& vector, const char* name, int64_t size, const Tensor& weight) {
  STD_TORCH_CHECK(vector.dim() == 1 && vector.size(0) == size, kName, ": ", name, " must have ", size,
                  " values, got ", vector.numel());
  return converted(vector, accumulation_type(weight));
}

// A layer as the kernels take it, with all memory that they are given.
struct Layer {
  const Weight weight;
  const Operand u, v;  // as given; nothing where they stand in a state
  const InMemoryOrder v_in_memory;
  const SpectralNormLayer in;

  // From buffers.
  Layer(const Tensor& weight_in, int64_t dim, const Tensor& u_in, const Tensor& v_in)
      : weight(weight_in, dim),
        u(vector_in(u_in, "u", weight.rows(), weight_in)),
        v(vector_in(v_in, "v", weight.columns(), weight_in)),
        v_in_memory(v.data(), weight),
        in(layer(u.data())) {}
  // From a state, where this layer's u begins at `begin`.
  Layer(const Tensor& weight_in, int64_t dim, const State& state, int64_t begin)
      : weight(weight_in, dim),
        v_in_memory(state.at(begin + weight.rows()), weight),
        in(layer(state.at(begin))) {}

  int64_t size() const { return weight.rows() + weight.columns(); }  // of u and v

 private:
  SpectralNormLayer layer(const void* first) const {
    return {weight.layout.outer, weight.layout.rows, weight.layout.inner, weight.tensor.data(), first,
            v_in_memory.data};
  }
};

std::tuple<Tensors, Tensor> forward(Tensors weights, Tensors us, Tensors vs, std::vector<int64_t> dims,
                                    int64_t n_power_iterations, double eps, bool u_first, bool add_eps) {
  check(weights, dims);
  const size_t n = weights.size();
  STD_TORCH_CHECK(us.size() == n && vs.size() == n, kName, ": needs a u and a v for each weight");
  std::vector<Layer> in;
  in.reserve(n);
  int64_t size = int64_t(n);
  for (size_t i = 0; i < n; ++i) {
    in.emplace_back(weights[i], dims[i], us[i], vs[i]);
    size += in[i].size();
  }
  Tensor state_tensor = blank(weights[0], {size}, accumulation_type(weights[0]));
  const State state(state_tensor, weights[0]);
  Tensors normalized;
  std::vector<SpectralNormForward> layers(n);
  int64_t at = int64_t(n);
  for (size_t i = 0; i < n; ++i) {
    normalized.push_back(blank_like(*in[i].weight.tensor));
    layers[i] = {in[i].in, normalized[i].mutable_data_ptr(), state.at(at), state.at(at + in[i].weight.rows()),
                 state.at(int64_t(i))};
    at += in[i].size();
  }
  spectral_norm().forward[dtype_index(weights[0], kName)](
      layers.data(), int64_t(n), {n_power_iterations, eps, u_first, add_eps}, torch_threads());
  for (size_t i = 0; i < n; ++i) {
    const Layout& layout = in[i].weight.layout;
    if (!layout.permuted) continue;
    std::vector<char> memory(size_t(in[i].weight.columns() * state.width()));
    std::memcpy(memory.data(), layers[i].v, memory.size());
    reorder(layout, state.dtype, memory.data(), layers[i].v, false);
  }
  return {normalized, state_tensor};
}

// The layers of a backward, with u, v and sigma from the state that its forward left.
std::vector<Layer> layers_of(const Tensors& weights, const State& state, const std::vector<int64_t>& dims) {
  std::vector<Layer> in;
  in.reserve(weights.size());
  int64_t at = int64_t(weights.size());
  const int64_t size = state.tensor->numel();
  for (size_t i = 0; i < weights.size(); ++i) {
    STD_TORCH_CHECK(dims[i] >= 0 && dims[i] < weights[i].dim(), kName, ": dim ", dims[i], " of a ",
                    weights[i].dim(), "-D weight");
    const int64_t rows = weights[i].size(dims[i]);
    at += rows + weights[i].numel() / rows;
    STD_TORCH_CHECK(at <= size, kName, ": the state has ", size, " values, these weights need more");
    in.emplace_back(weights[i], dims[i], state, at - rows - weights[i].numel() / rows);
  }
  STD_TORCH_CHECK(at == size, kName, ": the state has ", size, " values, these weights need ", at);
  return in;
}

using Gradients = std::vector<Optional>;

// The dispatcher resolves a view that negates (Tensor._neg_view, parts of conjugates) in every argument but
// those of an optional list.
Operand gradient_in(const Tensor& gradient, const Tensor& weight) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(gradient)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::resolve_neg", "", stack.data(), TORCH_ABI_VERSION));
  return like(torch::stable::detail::to<Tensor>(stack[0]), weight, kName);
}

// Gradients may be missing (a layer that the loss does not reach): those layers are left out of the work, and
// their results are zero-sized.
Tensors backward(Gradients grads, Tensors weights, Tensor state_tensor, std::vector<int64_t> dims) {
  check(weights, dims);
  STD_TORCH_CHECK(grads.size() == weights.size(), kName, ": needs a gradient or None for each weight");
  const State state(state_tensor, weights[0]);
  const std::vector<Layer> in = layers_of(weights, state, dims);
  std::vector<Operand> keep;
  Tensors grad_weights;
  std::vector<SpectralNormBackward> layers;
  for (size_t i = 0; i < in.size(); ++i) {
    if (!grads[i]) {
      grad_weights.push_back(missing(weights[0]));
      continue;
    }
    const Tensor& weight = *in[i].weight.tensor;
    keep.push_back(gradient_in(*grads[i], weight));
    grad_weights.push_back(blank_like(weight));
    layers.push_back(
        {in[i].in, state.at(int64_t(i)), keep.back().data(), grad_weights.back().mutable_data_ptr()});
  }
  spectral_norm().backward[dtype_index(weights[0], kName)](layers.data(), int64_t(layers.size()),
                                                           torch_threads());
  return grad_weights;
}

std::tuple<Tensors, Tensors> double_backward(Gradients grad_grad_weights, Gradients grads, Tensors weights,
                                             Tensor state_tensor, std::vector<int64_t> dims) {
  check(weights, dims);
  STD_TORCH_CHECK(grads.size() == weights.size() && grad_grad_weights.size() == weights.size(), kName,
                  ": needs a gradient or None for each weight");
  const State state(state_tensor, weights[0]);
  const std::vector<Layer> in = layers_of(weights, state, dims);
  std::vector<Operand> keep;
  Tensors grad_grads, grad_weights;
  std::vector<SpectralNormDoubleBackward> layers;
  for (size_t i = 0; i < in.size(); ++i) {
    if (!grads[i] || !grad_grad_weights[i]) {
      grad_grads.push_back(missing(weights[0]));
      grad_weights.push_back(missing(weights[0]));
      continue;
    }
    const Tensor& weight = *in[i].weight.tensor;
    const Operand g = gradient_in(*grads[i], weight), h = gradient_in(*grad_grad_weights[i], weight);
    keep.push_back(g);
    keep.push_back(h);
    grad_grads.push_back(blank_like(weight));
    grad_weights.push_back(blank_like(weight));
    layers.push_back({in[i].in, state.at(int64_t(i)), g.data(), h.data(), grad_grads[i].mutable_data_ptr(),
                      grad_weights[i].mutable_data_ptr()});
  }
  spectral_norm().double_backward[dtype_index(weights[0], kName)](layers.data(), int64_t(layers.size()),
                                                                  torch_threads());
  return {grad_grads, grad_weights};
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) { implement_orders<forward, backward, double_backward>(m, kName); }

}  // namespace
}  // namespace gankern
