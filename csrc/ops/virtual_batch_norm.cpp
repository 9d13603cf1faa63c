// torch.ops.gankern.virtual_batch_norm, its statistics and their gradients on CPU tensors. Schemas:
// gankern/ops/virtual_batch_norm.py.
#include "../cpu/virtual_batch_norm.h"

#include "../cpu/vec.h"
#include "layout.h"

namespace gankern {
namespace {

constexpr const char* kName = "virtual_batch_norm";

// A vector of one value a channel, of any dtype, as doubles; `missing` where it is missing.
struct Channels {
  std::vector<double> values;

  Channels() = default;
  Channels(const Optional& vector, int64_t channels, const char* name, double missing = 0) {
    values.assign(size_t(channels), missing);
    if (!vector) return;
    STD_TORCH_CHECK(vector->dim() == 1 && vector->size(0) == channels, kName, ": ", name, " must have ",
                    channels, " values");
    switch (dtype_index(*vector, kName)) {
      case 0: read<double>(*vector); break;
      case 1: read<float>(*vector); break;
      case 2: read<BFloat16>(*vector); break;
      default: read<Half>(*vector);
    }
  }
  template <class T>
  void read(const Tensor& vector) {
    const T* from = static_cast<const T*>(vector.const_data_ptr());
    const int64_t stride = vector.stride(0);
    for (size_t c = 0; c < values.size(); ++c) values[c] = double(baseline::widen(from[int64_t(c) * stride]));
  }
  const double* data() const { return values.data(); }
};

template <class T>
void narrow_to(const double* from, int64_t count, void* to) {
  using A = baseline::Acc<T>;
  for (int64_t c = 0; c < count; ++c) static_cast<T*>(to)[c] = baseline::narrow<T>(A(from[c]));
}

// Values of doubles in the dtype of `model`, empty where that is missing.
Tensor in_dtype_of(const Optional& model, const Tensor& x, const double* values, int64_t channels) {
  Tensor out = blank(model ? *model : x, {model ? channels : 0});
  if (!model) return out;
  switch (dtype_index(*model, kName)) {
    case 0: narrow_to<double>(values, channels, out.mutable_data_ptr()); break;
    case 1: narrow_to<float>(values, channels, out.mutable_data_ptr()); break;
    case 2: narrow_to<BFloat16>(values, channels, out.mutable_data_ptr()); break;
    default: narrow_to<Half>(values, channels, out.mutable_data_ptr());
  }
  return out;
}

// x in the kernels' own layout. The tensors that own the memory stay alive in here.
struct Map {
  const bool channels_last;
  const Operand x;
  int64_t count, channels, pixels = 1;

  explicit Map(const Tensor& x_in)
      : channels_last(goes_channels_last(x_in)), x(in_layout(x_in, channels_last)) {
    STD_TORCH_CHECK(x->dim() >= 2, kName, ": x must be [N, C, ...], got ", x->dim(), " dimensions");
    count = x->size(0);
    channels = x->size(1);
    for (int64_t d = 2; d < x->dim(); ++d) pixels *= x->size(d);
  }
  Tensor empty() const {
    return empty_in_layout(*x, std::vector<int64_t>(x->sizes().begin(), x->sizes().end()), channels_last);
  }
  Tensor doubles(const std::vector<int64_t>& sizes) const {
    return torch::stable::empty(sizes, ScalarType::Double, std::nullopt, x->device());
  }
  Tensor missing() const { return gankern::missing(*x); }
  Operand like(const Tensor& y, const char* name) const {
    STD_TORCH_CHECK(y.scalar_type() == x->scalar_type() && same_sizes(y, *x), kName, ": ", name,
                    " does not have the shape and dtype of x");
    return in_layout(y, channels_last);
  }
  Operand like(const Optional& y, const char* name) const { return y ? like(*y, name) : Operand(); }
};

struct Problem : Map {
  Channels ref_mean, ref_mean_square, weight, bias;
  std::vector<double> sums;
  VirtualBatchNorm in{};

  Problem(const Tensor& x_in, const Tensor& mean, const Tensor& mean_square, double own_share,
          const Optional& w, const Optional& b, double eps, double negative_slope)
      : Map(x_in),
        ref_mean(mean, channels, "ref_mean"),
        ref_mean_square(mean_square, channels, "ref_mean_square"),
        weight(w, channels, "weight", 1),
        bias(b, channels, "bias") {
    in.count = count;
    in.channels = channels;
    in.pixels = pixels;
    in.channels_last = channels_last;
    in.own_share = own_share;
    in.eps = eps;
    in.negative_slope = negative_slope;
    in.ref_mean = ref_mean.data();
    in.ref_mean_square = ref_mean_square.data();
    in.weight = weight.data();
    in.bias = bias.data();
    in.x = x.data();
  }
  Operand take_saved(const Tensor& saved) const {
    STD_TORCH_CHECK(saved.scalar_type() == ScalarType::Double && saved.dim() == 3 && saved.size(0) == 2 &&
                        saved.size(1) == count && saved.size(2) == channels,
                    kName, ": saved is not what the forward returned");
    return compact(saved);
  }
  void want_sums() {
    sums.assign(size_t(4 * channels), 0.0);
    in.sums = sums.data();
  }
  const double* sum(int64_t k) const { return sums.data() + k * channels; }
  void run(void (*const* kernels)(const VirtualBatchNorm&, const Parallel&)) {
    if (x->numel()) kernels[dtype_index(*x, kName)](in, torch_threads());
  }
};

std::tuple<Tensor, Tensor> forward(Tensor x, Tensor ref_mean, Tensor ref_mean_square, Optional weight,
                                   Optional bias, double own_share, double eps, double negative_slope) {
  Problem p(x, ref_mean, ref_mean_square, own_share, weight, bias, eps, negative_slope);
  Tensor out = p.empty(), saved = p.doubles({2, p.count, p.channels});
  p.in.out = out.mutable_data_ptr();
  p.in.saved = static_cast<double*>(saved.mutable_data_ptr());
  p.run(virtual_batch_norm().norm.forward);
  return {out, saved};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_in, Tensor x, Tensor ref_mean,
                                                            Tensor ref_mean_square, Optional weight,
                                                            Optional bias, Tensor saved, double own_share,
                                                            double eps, double negative_slope, bool need_x,
                                                            bool need_channels) {
  Problem p(x, ref_mean, ref_mean_square, own_share, weight, bias, eps, negative_slope);
  const Operand grad = p.like(grad_in, "grad");
  const Operand of_forward = p.take_saved(saved);
  p.in.saved = static_cast<double*>(const_cast<void*>(of_forward.data()));
  p.in.grad = grad.data();
  if (need_channels) p.want_sums();
  Tensor grad_x = need_x ? p.empty() : p.missing();
  if (need_x) p.in.out_x = grad_x.mutable_data_ptr();
  p.run(virtual_batch_norm().norm.backward);
  if (!need_channels) return {grad_x, p.missing(), p.missing(), p.missing(), p.missing()};
  return {grad_x, in_dtype_of(ref_mean, *p.x, p.sum(0), p.channels),
          in_dtype_of(ref_mean_square, *p.x, p.sum(1), p.channels),
          in_dtype_of(weight, *p.x, p.sum(2), p.channels), in_dtype_of(bias, *p.x, p.sum(3), p.channels)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> double_backward(
    Optional h_x, Optional h_mean, Optional h_mean_square, Optional h_weight, Optional h_bias, Tensor grad_in,
    Tensor x, Tensor ref_mean, Tensor ref_mean_square, Optional weight, Optional bias, Tensor saved,
    double own_share, double eps, double negative_slope, bool need_grad, bool need_x, bool need_channels) {
  Problem p(x, ref_mean, ref_mean_square, own_share, weight, bias, eps, negative_slope);
  const Operand grad = p.like(grad_in, "grad");
  const Operand h = p.like(h_x, "grad_grad_x");
  const Channels mean(h_mean, p.channels, "grad_grad_ref_mean"),
      mean_square(h_mean_square, p.channels, "grad_grad_ref_mean_square"),
      of_weight(h_weight, p.channels, "grad_grad_weight"), of_bias(h_bias, p.channels, "grad_grad_bias");
  const Operand of_forward = p.take_saved(saved);
  p.in.saved = static_cast<double*>(const_cast<void*>(of_forward.data()));
  p.in.grad = grad.data();
  p.in.grad_x = h.data();
  p.in.grad_ref_mean = mean.data();
  p.in.grad_ref_mean_square = mean_square.data();
  p.in.grad_weight = of_weight.data();
  p.in.grad_bias = of_bias.data();
  if (need_channels) p.want_sums();
  Tensor grad_grad = need_grad ? p.empty() : p.missing(), grad_x = need_x ? p.empty() : p.missing();
  if (need_grad) p.in.out = grad_grad.mutable_data_ptr();
  if (need_x) p.in.out_x = grad_x.mutable_data_ptr();
  p.run(virtual_batch_norm().norm.double_backward);
  if (!need_channels) return {grad_grad, grad_x, p.missing(), p.missing(), p.missing()};
  return {grad_grad, grad_x, in_dtype_of(ref_mean, *p.x, p.sum(0), p.channels),
          in_dtype_of(ref_mean_square, *p.x, p.sum(1), p.channels),
          in_dtype_of(weight, *p.x, p.sum(2), p.channels)};
}

// ---- statistics of a batch ------------------------------------------------------------------------------

struct Statistics : Map {
  BatchStatistics in{};

  explicit Statistics(const Tensor& x_in) : Map(x_in) {
    in.count = count;
    in.channels = channels;
    in.pixels = pixels;
    in.channels_last = channels_last;
    in.x = x.data();
  }
  void run(void (*const* kernels)(const BatchStatistics&, const Parallel&)) {
    STD_TORCH_CHECK(x->numel() > 0, kName, ": an empty batch has no statistics");
    kernels[dtype_index(*x, kName)](in, torch_threads());
  }
};

// [2, C]
Tensor statistics(Tensor x) {
  Statistics s(x);
  Tensor moments = s.doubles({2, s.channels});
  s.in.moments = static_cast<double*>(moments.mutable_data_ptr());
  s.run(virtual_batch_norm().statistics.forward);
  return moments;
}

struct Moments {
  Channels mean, grad_mean, grad_mean_square;
  Moments(Statistics& s, const Tensor& grad, const Tensor& moments) {
    STD_TORCH_CHECK(grad.dim() == 2 && moments.dim() == 2 && grad.size(0) == 2 && moments.size(0) == 2, kName,
                    ": statistics and their gradients must be [2, C]");
    mean = Channels(torch::stable::select(moments, 0, 0), s.channels, "mean");
    grad_mean = Channels(torch::stable::select(grad, 0, 0), s.channels, "grad_mean");
    grad_mean_square = Channels(torch::stable::select(grad, 0, 1), s.channels, "grad_mean_square");
    s.in.mean = mean.data();
    s.in.grad_mean = grad_mean.data();
    s.in.grad_mean_square = grad_mean_square.data();
  }
};

Tensor statistics_backward(Tensor grad, Tensor x, Tensor moments) {
  Statistics s(x);
  const Moments m(s, grad, moments);
  Tensor grad_x = s.empty();
  s.in.out_x = grad_x.mutable_data_ptr();
  s.run(virtual_batch_norm().statistics.backward);
  return grad_x;
}

std::tuple<Tensor, Tensor> statistics_double_backward(Tensor grad_grad_x, Tensor grad, Tensor x,
                                                      Tensor moments) {
  Statistics s(x);
  const Moments m(s, grad, moments);
  const Operand h = s.like(grad_grad_x, "grad_grad_x");
  Tensor grad_grad = s.doubles({2, s.channels}), grad_x = s.empty();
  s.in.grad_x = h.data();
  s.in.moments = static_cast<double*>(grad_grad.mutable_data_ptr());
  s.in.out_x = grad_x.mutable_data_ptr();
  s.run(virtual_batch_norm().statistics.double_backward);
  return {grad_grad, grad_x};
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  implement_orders<forward, backward, double_backward>(m, kName);
  implement_orders<statistics, statistics_backward, statistics_double_backward>(
      m, "virtual_batch_norm_statistics");
}

}  // namespace
}  // namespace gankern
