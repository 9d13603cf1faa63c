// torch.ops.gankern_cuda.spectral_norm and its gradients on CUDA tensors. Schemas: gankern/ops/spectral_norm.py.
#include "../../cuda/spectral_norm.h"

#include <array>

#include "../spectral_norm.h"
#include "launching.h"

namespace gankern {
namespace {

using Gradients = std::vector<Optional>;
using cuda::SpectralNormPass;

// A dense weight in memory as [outer, rows, inner], and how its columns' order there differs from their logical
// one; false where that takes more groups of dimensions than the kernels know.
bool describe(const Tensor& weight, int64_t dim, cuda::SpectralNormLayer* layer) {
  const int64_t n = weight.dim();
  std::vector<int64_t> order;  // dimensions of more than one element, from outermost to innermost
  for (int64_t d = 0; d < n; ++d)
    if (weight.size(d) > 1) order.push_back(d);
  const auto strides = weight.strides();
  std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return strides[a] > strides[b]; });
  std::vector<int64_t> step(size_t(n), 1);  // in the logical order of columns
  for (int64_t d = n - 1, columns = 1; d >= 0; --d)
    if (d != dim) step[size_t(d)] = columns, columns *= weight.size(d);

  layer->rows = weight.size(dim);
  layer->outer = layer->inner = 1;
  layer->groups = 0;
  bool inside = weight.size(dim) > 1;  // of a single row, everything lies within
  if (!inside) layer->inner = weight.numel();
  for (size_t k = order.size(); k-- > 0;) {
    const int64_t d = order[k], size = weight.size(d);
    if (d == dim) {
      inside = false;
      continue;
    }
    if (weight.size(dim) > 1) (inside ? layer->inner : layer->outer) *= size;
    const int g = layer->groups - 1;
    if (g >= 0 && step[size_t(d)] == int64_t(layer->group_size[g]) * layer->group_step[g]) {
      layer->group_size[g] *= int32_t(size);
    } else {
      if (layer->groups == cuda::kGroups) return false;
      layer->group_size[layer->groups] = int32_t(size);
      layer->group_step[layer->groups++] = int32_t(step[size_t(d)]);
    }
  }
  if (layer->groups == 0) layer->group_size[0] = layer->group_step[0] = 1, layer->groups = 1;
  return true;
}

// A weight as the kernels take it, with the memory that it is in.
struct Weight {
  const Operand tensor;
  cuda::SpectralNormLayer in{};

  Weight(const Tensor& weight, int64_t dim) : tensor(describable(weight, dim)) {
    describe(*tensor, dim, &in);
    in.weight = tensor.data();
  }
  static Operand describable(const Tensor& weight, int64_t dim) {
    STD_TORCH_CHECK(dim >= 0 && dim < weight.dim(), kName, ": dim ", dim, " of a ", weight.dim(),
                    "-D weight");
    cuda::SpectralNormLayer unused{};
    const Operand without_gaps = dense(weight);
    return describe(*without_gaps, dim, &unused) ? without_gaps : compact(weight);
  }
};

void run(SpectralNormPass pass, const std::vector<cuda::SpectralNormLayer>& layers,
         const cuda::SpectralNormRules& rules, const Tensor& weight) {
  if (layers.empty()) return;
  const Launching launching(weight);
  const int dtype = dtype_index(weight, kName);
  const Tensor scratch = scratch_of(cuda::spectral_norm_scratch(layers, dtype), weight);
  cuda::spectral_norm(pass, layers, rules, dtype, scratch.mutable_data_ptr(), launching.stream());
}

// Places in a state: sigma of all layers, then u and v of each.
struct Places {
  char* const begin;
  const int64_t width;  // bytes of a value
  int64_t at;

  Places(void* state, const Tensors& weights)
      : begin(static_cast<char*>(state)),
        width(accumulation_type(weights[0]) == ScalarType::Double ? 8 : 4),
        at(int64_t(weights.size())) {}
  void* sigma(size_t layer) const { return begin + width * int64_t(layer); }
  void* take(int64_t values) {
    at += values;
    return begin + width * (at - values);
  }
};

std::tuple<Tensors, Tensor> forward(Tensors weights, Tensors us, Tensors vs, std::vector<int64_t> dims,
                                    int64_t n_power_iterations, double eps, bool u_first, bool add_eps) {
  check(weights, dims);
  const size_t n = weights.size();
  STD_TORCH_CHECK(us.size() == n && vs.size() == n, kName, ": needs a u and a v for each weight");
  const ScalarType sums = accumulation_type(weights[0]);
  std::vector<Weight> in;
  std::vector<Operand> vectors;
  in.reserve(n);
  vectors.reserve(2 * n);
  int64_t size = int64_t(n);
  for (size_t i = 0; i < n; ++i) {
    in.emplace_back(weights[i], dims[i]);
    const int64_t rows = in[i].in.rows, columns = in[i].in.outer * in[i].in.inner;
    STD_TORCH_CHECK(us[i].numel() == rows && vs[i].numel() == columns, kName, ": u and v must have ", rows,
                    " and ", columns, " values, got ", us[i].numel(), " and ", vs[i].numel());
    vectors.push_back(converted(us[i], sums));
    vectors.push_back(converted(vs[i], sums));
    size += rows + columns;
  }
  Tensor state = blank(weights[0], {size}, sums);
  Places places(state.mutable_data_ptr(), weights);
  Tensors normalized;
  std::vector<cuda::SpectralNormLayer> layers;
  for (size_t i = 0; i < n; ++i) {
    normalized.push_back(blank_like(*in[i].tensor));
    layers.push_back(in[i].in);
    cuda::SpectralNormLayer& layer = layers.back();
    layer.u = vectors[2 * i].data();
    layer.v = vectors[2 * i + 1].data();
    layer.sigma = places.sigma(i);
    layer.new_u = places.take(layer.rows);
    layer.new_v = places.take(layer.outer * layer.inner);
    layer.result = normalized.back().mutable_data_ptr();
  }
  run(SpectralNormPass::kForward, layers, {n_power_iterations, eps, u_first, add_eps}, weights[0]);
  return {normalized, state};
}

// The dispatcher resolves a view that negates in every argument but those of an optional list.
Operand gradient_in(const Tensor& gradient, const Tensor& weight) {
  std::array<StableIValue, 1> stack{torch::stable::detail::from(gradient)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::resolve_neg", "", stack.data(), TORCH_ABI_VERSION));
  return like(torch::stable::detail::to<Tensor>(stack[0]), weight, kName);
}

// Both gradients: of the weights; and of the weights' gradients, where `second` is given. A layer without one of
// its gradients (the loss does not reach it) is left out, and its results are zero-sized.
std::tuple<Tensors, Tensors> gradients(const Gradients* second, const Gradients& first,
                                       const Tensors& weights, const Tensor& state_in,
                                       const std::vector<int64_t>& dims) {
  check(weights, dims);
  STD_TORCH_CHECK(first.size() == weights.size() && (!second || second->size() == weights.size()), kName,
                  ": needs a gradient or None for each weight");
  STD_TORCH_CHECK(state_in.scalar_type() == accumulation_type(weights[0]) && state_in.dim() == 1, kName,
                  ": the state is not what the forward returned");
  const Operand state = compact(state_in);
  Places places(const_cast<void*>(state.data()), weights);
  std::vector<Weight> in;
  std::vector<Operand> keep;
  Tensors grad_weights, grad_grads;
  std::vector<cuda::SpectralNormLayer> layers;
  in.reserve(weights.size());
  for (size_t i = 0; i < weights.size(); ++i) {
    in.emplace_back(weights[i], dims[i]);
    cuda::SpectralNormLayer layer = in[i].in;
    layer.sigma = places.sigma(i);
    layer.u = places.take(layer.rows);
    layer.v = places.take(layer.outer * layer.inner);
    if (!first[i] || (second && !(*second)[i])) {
      grad_weights.push_back(missing(weights[0]));
      grad_grads.push_back(missing(weights[0]));
      continue;
    }
    const Tensor& weight = *in[i].tensor;
    keep.push_back(gradient_in(*first[i], weight));
    layer.grad = keep.back().data();
    grad_weights.push_back(blank_like(weight));
    layer.result = grad_weights.back().mutable_data_ptr();
    if (second) {
      keep.push_back(gradient_in(*(*second)[i], weight));
      layer.grad_grad = keep.back().data();
      grad_grads.push_back(blank_like(weight));
      layer.second_result = grad_grads.back().mutable_data_ptr();
    }
    layers.push_back(layer);
  }
  STD_TORCH_CHECK(places.at == state->numel(), kName, ": the state has ", state->numel(),
                  " values, these weights need ", places.at);
  run(second ? SpectralNormPass::kDoubleBackward : SpectralNormPass::kBackward, layers, {}, weights[0]);
  return {grad_grads, grad_weights};
}

Tensors backward(Gradients grads, Tensors weights, Tensor state, std::vector<int64_t> dims) {
  return std::get<1>(gradients(nullptr, grads, weights, state, dims));
}

std::tuple<Tensors, Tensors> double_backward(Gradients grad_grad_weights, Gradients grads, Tensors weights,
                                             Tensor state, std::vector<int64_t> dims) {
  return gradients(&grad_grad_weights, grads, weights, state, dims);
}

STABLE_TORCH_LIBRARY_IMPL(gankern_cuda, GANKERN_DEVICE, m) {
  implement_orders<forward, backward, double_backward>(m, kName);
}

}  // namespace
}  // namespace gankern
