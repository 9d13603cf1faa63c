// torch.ops.gankern.spectral_norm and its gradients on CPU tensors. Schemas: gankern/ops/spectral_norm.py.
#include "../cpu/spectral_norm.h"

#include <cstring>
#include <optional>

#include "common.h"

namespace gankern {
namespace {

using Tensors = std::vector<Tensor>;

// How a dense weight's columns lie in memory. Column j of the matrix counts the other dimensions in their
// logical order; memory may hold them in another one (channels_last).
struct Layout {
  int64_t outer = 1, rows = 1, inner = 1;
  std::vector<int64_t> sizes, steps;  // of the other dimensions, logical order; steps in memory order
  bool permuted = false;

  Layout(const Tensor& weight, int64_t dim) {
    const int64_t n = weight.dim();
    STD_TORCH_CHECK(dim >= 0 && dim < n, "spectral_norm: dim ", dim, " of a ", n, "-D weight");
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

// u and v as the kernels take them: in the accumulation dtype, v in memory order.
Tensor vector_in(const Tensor& x, ScalarType dtype) {
  Tensor y = x.scalar_type() == dtype ? x : torch::stable::to(x, dtype);
  return y.is_contiguous() ? y : torch::stable::contiguous(y);
}

// v between its logical order and the order in memory.
template <class A>
void reorder(const Layout& layout, const A* in, A* out, bool into_memory) {
  layout.each_column([&](int64_t logical, int64_t memory) {
    if (into_memory)
      out[memory] = in[logical];
    else
      out[logical] = in[memory];
  });
}

// What a forward leaves behind for its backward: one vector in the accumulation dtype that holds sigma of all
// layers, then u and v (in logical order) of each layer.
struct State {
  Tensor tensor;
  int64_t width;  // bytes a value

  void* at(int64_t index) const { return static_cast<char*>(tensor.mutable_data_ptr()) + width * index; }
};

// One layer's inputs, with the tensors that own the memory the kernel is given.
struct Prepared {
  Tensor weight, u, v;
  Layout layout;
  SpectralNormLayer layer;

  Prepared(const Tensor& w, int64_t dim) : weight(dense(w)), layout(weight, dim) {
    layer = {layout.outer, layout.rows, layout.inner, weight.const_data_ptr(), nullptr, nullptr};
  }
  int64_t columns() const { return layout.outer * layout.inner; }

  // u and v from buffers of any floating dtype, in logical order.
  void take(const Tensor& u_in, const Tensor& v_in) {
    STD_TORCH_CHECK(u_in.numel() == layout.rows && v_in.numel() == columns(), "spectral_norm: u has ",
                    u_in.numel(), " and v ", v_in.numel(), " entries for a matrix of ", layout.rows, " x ",
                    columns());
    const ScalarType dtype = accumulation_type(weight);
    u = vector_in(u_in, dtype);
    v = vector_in(v_in, dtype);
    layer.u = u.const_data_ptr();
    take_v(v.const_data_ptr());
  }
  // u and v from a state that starts at `begin`.
  void take(const State& state, int64_t begin) {
    layer.u = state.at(begin);
    take_v(state.at(begin + layout.rows));
  }

 private:
  void take_v(const void* logical) {
    layer.v = logical;
    if (!layout.permuted) return;
    v = torch::stable::new_empty(weight, {columns()}, accumulation_type(weight));
    void* memory = v.mutable_data_ptr();
    if (accumulation_type(weight) == ScalarType::Double)
      reorder(layout, static_cast<const double*>(logical), static_cast<double*>(memory), true);
    else
      reorder(layout, static_cast<const float*>(logical), static_cast<float*>(memory), true);
    layer.v = memory;
  }
};

std::vector<Prepared> prepare(const Tensors& weights, const std::vector<int64_t>& dims) {
  const size_t n = weights.size();
  STD_TORCH_CHECK(n > 0 && dims.size() == n, "spectral_norm: needs at least one weight, and a dim for each");
  std::vector<Prepared> prepared;
  prepared.reserve(n);
  for (size_t i = 0; i < n; ++i) {
    STD_TORCH_CHECK(weights[i].scalar_type() == weights[0].scalar_type(),
                    "spectral_norm: all weights of a group must have one dtype");
    prepared.emplace_back(weights[i], dims[i]);
  }
  return prepared;
}

int64_t width_of(const Tensor& weight) { return accumulation_type(weight) == ScalarType::Double ? 8 : 4; }

std::tuple<Tensors, Tensor> forward(Tensors weights, Tensors us, Tensors vs, std::vector<int64_t> dims,
                                    int64_t n_power_iterations, double eps, bool u_first, bool add_eps) {
  std::vector<Prepared> in = prepare(weights, dims);
  const size_t n = in.size();
  STD_TORCH_CHECK(us.size() == n && vs.size() == n, "spectral_norm: needs a u and a v for each weight");
  int64_t size = int64_t(n);
  for (const Prepared& p : in) size += p.layout.rows + p.columns();
  const State state{torch::stable::new_empty(weights[0], {size}, accumulation_type(weights[0])),
                    width_of(weights[0])};
  Tensors normalized;
  normalized.reserve(n);
  std::vector<SpectralNormForward> layers(n);
  int64_t at = int64_t(n);
  for (size_t i = 0; i < n; ++i) {
    in[i].take(us[i], vs[i]);
    normalized.push_back(torch::stable::empty_like(in[i].weight));
    layers[i] = {in[i].layer, normalized[i].mutable_data_ptr(), state.at(at),
                 state.at(at + in[i].layout.rows), state.at(int64_t(i))};
    at += in[i].layout.rows + in[i].columns();
  }
  spectral_norm().forward[dtype_index(weights[0], "spectral_norm")](
      layers.data(), int64_t(n), {n_power_iterations, eps, u_first, add_eps}, torch_threads());
  for (size_t i = 0; i < n; ++i) {
    const Layout& layout = in[i].layout;
    if (!layout.permuted) continue;
    std::vector<char> memory(size_t(in[i].columns() * state.width));
    std::memcpy(memory.data(), layers[i].v, memory.size());
    if (state.width == 8)
      reorder(layout, reinterpret_cast<double*>(memory.data()), static_cast<double*>(layers[i].v), false);
    else
      reorder(layout, reinterpret_cast<float*>(memory.data()), static_cast<float*>(layers[i].v), false);
  }
  return {normalized, state.tensor};
}

// The layers of a backward, with u, v and sigma from the state that its forward left.
std::vector<Prepared> prepare(const Tensors& weights, const State& state, const std::vector<int64_t>& dims) {
  std::vector<Prepared> in = prepare(weights, dims);
  int64_t at = int64_t(in.size());
  for (Prepared& p : in) {
    p.take(state, at);
    at += p.layout.rows + p.columns();
  }
  STD_TORCH_CHECK(at == state.tensor.numel(), "spectral_norm: the state has ", state.tensor.numel(),
                  " values, these weights need ", at);
  return in;
}

// Gradients may be missing (a layer that the loss does not reach): those layers are left out of the work, and
// their results are zero-sized.
Tensor missing(const Tensor& model) { return torch::stable::new_empty(model, {0}); }

Tensors backward(std::vector<std::optional<Tensor>> grads, Tensors weights, Tensor state_tensor,
                 std::vector<int64_t> dims) {
  const State state{state_tensor, width_of(weights[0])};
  const std::vector<Prepared> in = prepare(weights, state, dims);
  Tensors keep, grad_weights;
  std::vector<SpectralNormBackward> layers;
  for (size_t i = 0; i < in.size(); ++i) {
    if (!grads[i]) {
      grad_weights.push_back(missing(weights[0]));
      continue;
    }
    keep.push_back(laid_out_as(*grads[i], in[i].weight));
    grad_weights.push_back(torch::stable::empty_like(in[i].weight));
    layers.push_back({in[i].layer, state.at(int64_t(i)), keep.back().const_data_ptr(),
                      grad_weights[i].mutable_data_ptr()});
  }
  spectral_norm().backward[dtype_index(weights[0], "spectral_norm")](layers.data(), int64_t(layers.size()),
                                                                     torch_threads());
  return grad_weights;
}

std::tuple<Tensors, Tensors> double_backward(std::vector<std::optional<Tensor>> grad_grad_weights,
                                             std::vector<std::optional<Tensor>> grads, Tensors weights,
                                             Tensor state_tensor, std::vector<int64_t> dims) {
  const State state{state_tensor, width_of(weights[0])};
  const std::vector<Prepared> in = prepare(weights, state, dims);
  Tensors keep, grad_grads, grad_weights;
  std::vector<SpectralNormDoubleBackward> layers;
  for (size_t i = 0; i < in.size(); ++i) {
    if (!grads[i] || !grad_grad_weights[i]) {
      grad_grads.push_back(missing(weights[0]));
      grad_weights.push_back(missing(weights[0]));
      continue;
    }
    const Tensor g = laid_out_as(*grads[i], in[i].weight);
    const Tensor h = laid_out_as(*grad_grad_weights[i], in[i].weight);
    keep.push_back(g);
    keep.push_back(h);
    grad_grads.push_back(torch::stable::empty_like(in[i].weight));
    grad_weights.push_back(torch::stable::empty_like(in[i].weight));
    layers.push_back({in[i].layer, state.at(int64_t(i)), g.const_data_ptr(), h.const_data_ptr(),
                      grad_grads[i].mutable_data_ptr(), grad_weights[i].mutable_data_ptr()});
  }
  spectral_norm().double_backward[dtype_index(weights[0], "spectral_norm")](
      layers.data(), int64_t(layers.size()), torch_threads());
  return {grad_grads, grad_weights};
}

}  // namespace
}  // namespace gankern

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("spectral_norm", TORCH_BOX(&gankern::forward));
  m.impl("spectral_norm_backward", TORCH_BOX(&gankern::backward));
  m.impl("spectral_norm_double_backward", TORCH_BOX(&gankern::double_backward));
}
