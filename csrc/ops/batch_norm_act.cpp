// torch.ops.gankern.batch_norm_act and its gradients on CPU tensors. Schemas: gankern/ops/batch_norm_act.py.
#include "batch_norm_act.h"

#include "../cpu/batch_norm_act.h"

namespace gankern {
namespace {

// The problem in the kernels' own layouts. The tensors that own the memory stay alive in here.
struct Problem {
  const Operand x;
  BatchNormAct in;
  int64_t affine_dims = 0;  // 1: [channels], 2: [samples, channels]; 0 without affine values
  const Operand weight, bias;

  Problem(const Tensor& x_in, const Optional& weight_in, const Optional& bias_in, bool training,
          double negative_slope)
      : x(dense_images(x_in, 2, kName)),
        in(task(*x, training, negative_slope)),
        weight(take(weight_in, "weight")),
        bias(take(bias_in, "bias")) {
    in.x = x.data();
    in.weight = weight.data();
    in.bias = bias.data();
  }

  static BatchNormAct task(const Tensor& x, bool training, double negative_slope) {
    BatchNormAct in{};
    in.channels_last = !x.is_contiguous();
    in.samples = x.size(0);
    in.channels = x.size(1);
    in.plane = 1;
    for (int64_t d = 2; d < x.dim(); ++d) in.plane *= x.size(d);
    in.training = training;
    in.negative_slope = negative_slope;
    return in;
  }
  // Affine values, or their gradients.
  Operand take(const Optional& given, const char* name) {
    if (!given) return Operand();
    const Tensor& t = *given;
    STD_TORCH_CHECK(t.scalar_type() == accumulation_type(*x), kName, ": ", name,
                    " must have the dtype that x is accumulated in");
    in.per_sample = t.dim() == 2;
    STD_TORCH_CHECK(
        (t.dim() == 1 || (in.per_sample && t.size(0) == in.samples)) && t.size(t.dim() - 1) == in.channels,
        kName, ": ", name, " must be [channels] or [samples, channels]");
    STD_TORCH_CHECK(!affine_dims || affine_dims == t.dim(), kName, ": affine values must have one shape");
    affine_dims = t.dim();
    return compact(t);
  }
  // PReLU's.
  Operand take_slope(const Optional& slope) const {
    if (!slope) return Operand();
    STD_TORCH_CHECK(
        slope->dim() == 1 && slope->size(0) == in.channels && slope->scalar_type() == accumulation_type(*x),
        kName, ": slope must be [channels], of the dtype that x is accumulated in");
    return compact(*slope);
  }
  Tensor empty_affine(bool wanted) const {
    if (!wanted || !affine_dims) return blank(*x, {0}, accumulation_type(*x));
    if (in.per_sample) return blank(*x, {in.samples, in.channels}, accumulation_type(*x));
    return blank(*x, {in.channels}, accumulation_type(*x));
  }
};

void* data(Tensor& t) { return t.numel() ? t.mutable_data_ptr() : nullptr; }

std::tuple<Tensor, Tensor> forward(Tensor x, Optional weight, Optional bias, Optional running_mean,
                                   Optional running_var, bool training, double eps, double negative_slope,
                                   Optional slope_in) {
  Problem problem(x, weight, bias, training, negative_slope);
  BatchNormAct& in = problem.in;
  const Operand slope = problem.take_slope(slope_in);
  in.slope = slope.data();
  in.eps = eps;
  Tensor y = blank_like(*problem.x);
  Tensor stats = blank(*problem.x, {3, in.channels}, accumulation_type(x));
  const Operand mean = training ? Operand() : compact(running_mean),
                var = training ? Operand() : compact(running_var);
  if (!training) {
    STD_TORCH_CHECK(mean && var, kName, ": evaluation needs running_mean and running_var");
    for (const Operand* t : {&mean, &var})
      STD_TORCH_CHECK(
          (*t)->dim() == 1 && (*t)->size(0) == in.channels && (*t)->scalar_type() == accumulation_type(x),
          kName, ": running_mean and running_var must be [channels], of the dtype that x is accumulated in");
  }
  in.running_mean = mean.data();
  in.running_var = var.data();
  in.y = y.mutable_data_ptr();
  in.stats = stats.mutable_data_ptr();
  batch_norm_act().forward[dtype_index(x, kName)](in, torch_threads());
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_in, Tensor x, Optional weight, Optional bias,
                                                    Tensor stats, bool training, double negative_slope,
                                                    bool affine, Optional slope_in) {
  Problem problem(x, weight, bias, training, negative_slope);
  BatchNormAct& in = problem.in;
  const Operand grad = like(grad_in, *problem.x, kName);
  Tensor grad_x = blank_like(*problem.x);
  Tensor grad_weight = problem.empty_affine(affine && weight),
         grad_bias = problem.empty_affine(affine && bias);
  const Operand of_forward = take_stats(stats, *problem.x);
  in.stats = const_cast<void*>(of_forward.data());
  in.grad = grad.data();
  in.grad_x = grad_x.mutable_data_ptr();
  in.grad_weight = data(grad_weight);
  in.grad_bias = data(grad_bias);
  const Operand slope = problem.take_slope(slope_in);
  Tensor grad_slope = slope ? blank_like(*slope) : blank(*problem.x, {0}, accumulation_type(*problem.x));
  in.slope = slope.data();
  if (slope) in.grad_slope = data(grad_slope);
  batch_norm_act().backward[dtype_index(x, kName)](in, torch_threads());
  return {grad_x, grad_weight, grad_bias, grad_slope};
}

std::tuple<Tensor, Tensor, Tensor> double_backward(Optional h_in, Optional h_weight, Optional h_bias,
                                                   Tensor grad_in, Tensor x, Optional weight, Optional bias,
                                                   Tensor stats, bool training, double negative_slope,
                                                   bool affine) {
  Problem problem(x, weight, bias, training, negative_slope);
  BatchNormAct& in = problem.in;
  const Operand grad = like(grad_in, *problem.x, kName);
  const Operand h = take_direction(h_in, *problem.x), of_weight = problem.take(h_weight, "grad_grad_weight"),
                of_bias = problem.take(h_bias, "grad_grad_bias");
  in.h_weight = of_weight.data();
  in.h_bias = of_bias.data();
  const bool moves_x = h_weight || (h_in && training);
  Tensor grad_grad = blank_like(*problem.x);
  Tensor grad_x = moves_x ? blank_like(*problem.x) : blank(*problem.x, {0});
  Tensor grad_weight = problem.empty_affine(affine && weight && h_in);
  const Operand of_forward = take_stats(stats, *problem.x);
  in.stats = const_cast<void*>(of_forward.data());
  in.grad = grad.data();
  in.h = h.data();
  in.grad_grad = grad_grad.mutable_data_ptr();
  in.grad_x = data(grad_x);
  in.grad_weight = data(grad_weight);
  batch_norm_act().double_backward[dtype_index(x, kName)](in, torch_threads());
  return {grad_grad, grad_x, grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) { implement_orders<forward, backward, double_backward>(m, kName); }

}  // namespace
}  // namespace gankern
