// torch.ops.gankern.batch_norm_act and its gradients on CPU tensors. Schemas: gankern/ops/batch_norm_act.py.
#include "../cpu/batch_norm_act.h"

#include <optional>

#include "common.h"

namespace gankern {
namespace {

constexpr const char* kName = "batch_norm_act";
using Optional = std::optional<Tensor>;

// [N, C, ...] whose memory is that of [N, ..., C], without gaps.
bool channels_last(const Tensor& x) {
  const auto sizes = x.sizes(), strides = x.strides();
  int64_t expected = 1;
  const auto fits = [&](int64_t d) {
    if (sizes[d] != 1 && strides[d] != expected) return false;
    expected *= sizes[d];
    return true;
  };
  if (!fits(1)) return false;
  for (int64_t d = x.dim() - 1; d > 1; --d)
    if (!fits(d)) return false;
  return fits(0);
}

// An operand in the kernels' own layouts. The tensors that own the memory stay alive in here.
struct Problem {
  Tensor x;
  Optional weight, bias, h_weight, h_bias;
  BatchNormAct in{};

  Problem(const Tensor& x_in, const Optional& weight_in, const Optional& bias_in, bool training,
          double negative_slope)
      : x(x_in) {
    STD_TORCH_CHECK(x.dim() >= 2, kName, ": x must have 2 dimensions or more, got ", x.dim());
    if (!x.is_contiguous()) {
      in.channels_last = channels_last(x);
      if (!in.channels_last) x = torch::stable::contiguous(x);
    }
    in.samples = x.size(0);
    in.channels = x.size(1);
    in.plane = 1;
    for (int64_t d = 2; d < x.dim(); ++d) in.plane *= x.size(d);
    in.training = training;
    in.negative_slope = negative_slope;
    in.x = x.const_data_ptr();
    in.weight = take(weight_in, weight, "weight");
    in.bias = take(bias_in, bias, "bias");
  }

  // A tensor of affine values; `own` keeps it.
  const void* take(const Optional& given, Optional& own, const char* name) {
    if (!given) return nullptr;
    const Tensor& t = *given;
    STD_TORCH_CHECK(t.scalar_type() == accumulation_type(x), kName, ": ", name,
                    " must have the dtype that x is accumulated in");
    const bool per_sample = t.dim() == 2;
    STD_TORCH_CHECK(
        (t.dim() == 1 || (per_sample && t.size(0) == in.samples)) && t.size(t.dim() - 1) == in.channels,
        kName, ": ", name, " must be [channels] or [samples, channels]");
    STD_TORCH_CHECK(!affine || affine->dim() == t.dim(), kName, ": affine values must have one shape");
    own = t.is_contiguous() ? t : torch::stable::contiguous(t);
    if (!affine) affine = own;
    in.per_sample = per_sample;
    return own->const_data_ptr();
  }
  Tensor like_x(const Tensor& t, const char* name) const {
    STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), kName, ": ", name, " must have x's dtype");
    STD_TORCH_CHECK(t.dim() == x.dim() && std::equal(t.sizes().begin(), t.sizes().end(), x.sizes().begin()),
                    kName, ": ", name, " must have x's shape");
    return laid_out_as(t, x);
  }
  void* check_stats(const Tensor& stats) {
    STD_TORCH_CHECK(stats.dim() == 2 && stats.size(0) == 3 && stats.size(1) == in.channels &&
                        stats.is_contiguous() && stats.scalar_type() == accumulation_type(x),
                    kName, ": stats are not those of the forward");
    return stats.mutable_data_ptr();
  }
  Tensor missing() const { return torch::stable::new_empty(x, {0}, accumulation_type(x)); }
  Tensor empty_affine(bool wanted) const {
    if (!wanted || !affine) return missing();
    if (in.per_sample) return torch::stable::new_empty(*affine, {in.samples, in.channels});
    return torch::stable::new_empty(*affine, {in.channels});
  }

  Optional affine;  // one of the tensors of affine values
};

void* data(Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor> forward(Tensor x, Optional weight, Optional bias, Optional running_mean,
                                   Optional running_var, bool training, double eps, double negative_slope) {
  Problem problem(x, weight, bias, training, negative_slope);
  BatchNormAct& in = problem.in;
  in.eps = eps;
  Tensor y = torch::stable::empty_like(problem.x);
  Tensor stats = torch::stable::new_empty(problem.x, {3, in.channels}, accumulation_type(x));
  Optional mean, var;
  if (!training) {
    STD_TORCH_CHECK(running_mean && running_var, kName, ": evaluation needs running_mean and running_var");
    for (const Tensor* t : {&*running_mean, &*running_var})
      STD_TORCH_CHECK(
          t->dim() == 1 && t->size(0) == in.channels && t->scalar_type() == accumulation_type(x), kName,
          ": running_mean and running_var must be [channels], of the dtype that x is accumulated in");
    mean = torch::stable::contiguous(*running_mean);
    var = torch::stable::contiguous(*running_var);
    in.running_mean = mean->const_data_ptr();
    in.running_var = var->const_data_ptr();
  }
  in.y = y.mutable_data_ptr();
  in.stats = stats.mutable_data_ptr();
  batch_norm_act().forward[dtype_index(x, kName)](in, torch_threads());
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor> backward(Tensor grad_in, Tensor x, Optional weight, Optional bias,
                                            Tensor stats, bool training, double negative_slope, bool affine) {
  Problem problem(x, weight, bias, training, negative_slope);
  BatchNormAct& in = problem.in;
  const Tensor grad = problem.like_x(grad_in, "grad");
  Tensor grad_x = torch::stable::empty_like(problem.x);
  Tensor grad_weight = problem.empty_affine(affine && weight),
         grad_bias = problem.empty_affine(affine && bias);
  in.stats = problem.check_stats(stats);
  in.grad = grad.const_data_ptr();
  in.grad_x = grad_x.mutable_data_ptr();
  in.grad_weight = data(grad_weight);
  in.grad_bias = data(grad_bias);
  batch_norm_act().backward[dtype_index(x, kName)](in, torch_threads());
  return {grad_x, grad_weight, grad_bias};
}

std::tuple<Tensor, Tensor, Tensor> double_backward(Optional h_in, Optional h_weight, Optional h_bias,
                                                   Tensor grad_in, Tensor x, Optional weight, Optional bias,
                                                   Tensor stats, bool training, double negative_slope,
                                                   bool affine) {
  Problem problem(x, weight, bias, training, negative_slope);
  BatchNormAct& in = problem.in;
  const Tensor grad = problem.like_x(grad_in, "grad");
  Tensor h = problem.x;
  if (h_in) {
    h = problem.like_x(*h_in, "grad_grad_x");
  } else {  // rare: only the affine gradients were differentiated
    h = torch::stable::empty_like(problem.x);
    torch::stable::zero_(h);
  }
  in.h_weight = problem.take(h_weight, problem.h_weight, "grad_grad_weight");
  in.h_bias = problem.take(h_bias, problem.h_bias, "grad_grad_bias");
  const bool moves_x = h_weight || (h_in && training);
  Tensor grad_grad = torch::stable::empty_like(problem.x);
  Tensor grad_x = moves_x ? torch::stable::empty_like(problem.x) : torch::stable::new_empty(problem.x, {0});
  Tensor grad_weight = problem.empty_affine(affine && weight && h_in);
  in.stats = problem.check_stats(stats);
  in.grad = grad.const_data_ptr();
  in.h = h.const_data_ptr();
  in.grad_grad = grad_grad.mutable_data_ptr();
  in.grad_x = data(grad_x);
  in.grad_weight = data(grad_weight);
  batch_norm_act().double_backward[dtype_index(x, kName)](in, torch_threads());
  return {grad_grad, grad_x, grad_weight};
}

}  // namespace
}  // namespace gankern

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("batch_norm_act", TORCH_BOX(&gankern::forward));
  m.impl("batch_norm_act_backward", TORCH_BOX(&gankern::backward));
  m.impl("batch_norm_act_double_backward", TORCH_BOX(&gankern::double_backward));
}
