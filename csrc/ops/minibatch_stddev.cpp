// torch.ops.gankern.minibatch_stddev and its gradients on CPU tensors. Schemas:
// gankern/ops/minibatch_stddev.py.
#include "../cpu/minibatch_stddev.h"

#include "layout.h"

namespace gankern {
namespace {

constexpr const char* kName = "minibatch_stddev";

// x in the kernels' own layout. The tensors that own the memory stay alive in here.
struct Problem {
  const bool channels_last;
  const Operand x;
  const int64_t features;
  int64_t pixels = 1;
  MinibatchStddev in{};

  Problem(const Tensor& x_in, int64_t group_size, int64_t num_channels, bool strided, bool unbiased,
          double eps)
      : channels_last(goes_channels_last(x_in)), x(in_layout(x_in, channels_last)), features(num_channels) {
    STD_TORCH_CHECK(x->dim() >= 2, kName, ": x must be [N, C, ...], got ", x->dim(), " dimensions");
    STD_TORCH_CHECK(group_size > 0 && x->size(0) % group_size == 0, kName,
                    ": the group does not divide the batch");
    STD_TORCH_CHECK(num_channels > 0 && x->size(1) % num_channels == 0, kName,
                    ": num_channels does not divide the channels");
    for (int64_t d = 2; d < x->dim(); ++d) pixels *= x->size(d);
    const bool rows = channels_last;
    in = {x->size(0) / group_size,
          group_size,
          strided,
          rows ? pixels : 1,
          num_channels,
          x->size(1) / num_channels * (rows ? 1 : pixels),
          rows ? 1 : pixels,
          unbiased,
          eps,
          x.data(),
          nullptr,
          nullptr,
          nullptr,
          nullptr};
  }
  std::vector<int64_t> sizes(int64_t channels) const {
    std::vector<int64_t> s(x->sizes().begin(), x->sizes().end());
    s[1] = channels;
    return s;
  }
  Tensor empty(int64_t channels) const { return empty_in_layout(*x, sizes(channels), channels_last); }
  Tensor empty_x() const { return empty(x->size(1)); }
  Tensor empty_result() const { return empty(x->size(1) + features); }
  Operand same(const Tensor& y, int64_t channels, const char* name) const {
    const auto expected = sizes(channels);
    STD_TORCH_CHECK(y.scalar_type() == x->scalar_type() && y.dim() == x->dim() &&
                        std::equal(expected.begin(), expected.end(), y.sizes().begin()),
                    kName, ": ", name, " does not have the shape and dtype of its tensor");
    return in_layout(y, channels_last);
  }
  void run(void (*const* kernels)(const MinibatchStddev&, const Parallel&)) {
    if (x->numel()) kernels[dtype_index(*x, kName)](in, torch_threads());
  }
};

Tensor forward(Tensor x, int64_t group_size, int64_t num_channels, bool strided, bool unbiased, double eps) {
  Problem p(x, group_size, num_channels, strided, unbiased, eps);
  Tensor out = p.empty_result();
  p.in.out = out.mutable_data_ptr();
  p.run(minibatch_stddev().forward);
  return out;
}

Tensor backward(Tensor grad_in, Tensor x, int64_t group_size, int64_t num_channels, bool strided,
                bool unbiased, double eps) {
  Problem p(x, group_size, num_channels, strided, unbiased, eps);
  const Operand grad = p.same(grad_in, x.size(1) + num_channels, "grad");
  Tensor grad_x = p.empty_x();
  p.in.grad = grad.data();
  p.in.out_x = grad_x.mutable_data_ptr();
  p.run(minibatch_stddev().backward);
  return grad_x;
}

std::tuple<Tensor, Tensor> double_backward(Tensor grad_grad_x, Tensor grad_in, Tensor x, int64_t group_size,
                                           int64_t num_channels, bool strided, bool unbiased, double eps) {
  Problem p(x, group_size, num_channels, strided, unbiased, eps);
  const Operand grad = p.same(grad_in, x.size(1) + num_channels, "grad");
  const Operand h = p.same(grad_grad_x, x.size(1), "grad_grad_x");
  Tensor grad_grad = p.empty_result(), grad_x = p.empty_x();
  p.in.grad = grad.data();
  p.in.grad_x = h.data();
  p.in.out = grad_grad.mutable_data_ptr();
  p.in.out_x = grad_x.mutable_data_ptr();
  p.run(minibatch_stddev().double_backward);
  return {grad_grad, grad_x};
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) { implement_orders<forward, backward, double_backward>(m, kName); }

}  // namespace
}  // namespace gankern
