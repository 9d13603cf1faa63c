// torch.ops.gankern_cuda.batch_norm_act and its gradients on CUDA tensors, in training. Schemas:
// gankern/ops/_norm_act.py; which inputs they take: gankern/ops/batch_norm_act.py.
#include "../../cuda/batch_norm_act.h"

#include "../batch_norm_act.h"
#include "launching.h"

namespace gankern {
namespace {

// The kernels' accesses are of 16 bytes.
Operand aligned(const Operand& x) {
  if (reinterpret_cast<uintptr_t>(x.data()) % 16 == 0) return x;
  Tensor same = blank_like(*x);
  torch::stable::copy_(same, *x);
  return Operand(same);
}

// The problem in the kernels' own layouts. The tensors that own the memory stay alive in here.
struct Problem {
  const Operand x;
  cuda::BatchNorm in{};
  const Operand weight, bias;

  Problem(cuda::NormPass pass, const Tensor& x_in, const Optional& weight_in, const Optional& bias_in,
          bool training, double negative_slope, const Optional& slope)
      : x(aligned(dense_images(x_in, 2, kName))),
        weight(take(weight_in, "weight")),
        bias(take(bias_in, "bias")) {
    STD_TORCH_CHECK(training && !slope, kName, ": CUDA C++ kernels are for training, and not for PReLU");
    in.pass = pass;
    in.channels_last = !x->is_contiguous();
    in.samples = x->size(0);
    in.channels = x->size(1);
    in.plane = 1;
    for (int64_t d = 2; d < x->dim(); ++d) in.plane *= x->size(d);
    const int64_t together = in.channels_last ? in.channels : in.plane;
    STD_TORCH_CHECK(together * int64_t(x->element_size()) % 16 == 0, kName, ": ", together,
                    in.channels_last ? " channels" : " values of a plane", " are no multiple of 16 bytes");
    in.negative_slope = negative_slope;
    in.x = x.data();
    in.weight = weight.data();
    in.bias = bias.data();
  }

  Operand take(const Optional& given, const char* name) const {
    if (!given) return Operand();
    STD_TORCH_CHECK(
        given->dim() == 1 && given->size(0) == x->size(1) && given->scalar_type() == accumulation_type(*x),
        kName, ": ", name, " must be [channels], of the dtype that x is accumulated in");
    return compact(*given);
  }
  Operand take_map(const Tensor& map) const { return aligned(like(map, *x, kName)); }
  Tensor map(void** place) const { return result_like(*x, place); }
  // A value of each channel, where somebody asked.
  Tensor of_channels(bool asked, void** place) const {
    Tensor made = blank(*x, {asked ? in.channels : 0}, accumulation_type(*x));
    if (asked) *place = made.mutable_data_ptr();
    return made;
  }

  bool empty() const { return x->numel() == 0; }
  void run() const {
    const Launching launching(*x);
    const int dtype = dtype_index(*x, kName);
    const Tensor scratch = scratch_of(cuda::batch_norm_act_scratch(in, dtype), *x);
    cuda::batch_norm_act(in, dtype, scratch.mutable_data_ptr(), launching.stream());
  }
};

std::tuple<Tensor, Tensor> forward(Tensor x, Optional weight, Optional bias, Optional, Optional,
                                   bool training, double eps, double negative_slope, Optional slope) {
  Problem problem(cuda::NormPass::kForward, x, weight, bias, training, negative_slope, slope);
  problem.in.eps = eps;
  Tensor y = problem.map(&problem.in.out);
  Tensor stats = blank(*problem.x, {3, problem.in.channels}, accumulation_type(x));
  problem.in.stats = stats.mutable_data_ptr();
  if (problem.empty())
    torch::stable::zero_(stats);
  else
    problem.run();
  return {y, stats};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad_in, Tensor x, Optional weight, Optional bias,
                                                    Tensor stats_in, bool training, double negative_slope,
                                                    bool affine, Optional slope) {
  Problem problem(cuda::NormPass::kBackward, x, weight, bias, training, negative_slope, slope);
  const Operand grad = problem.take_map(grad_in), stats = take_stats(stats_in, *problem.x);
  problem.in.grad = grad.data();
  problem.in.stats = const_cast<void*>(stats.data());
  Tensor grad_x = problem.map(&problem.in.out);
  Tensor grad_weight = problem.of_channels(affine && weight, &problem.in.grad_weight);
  Tensor grad_bias = problem.of_channels(affine && bias, &problem.in.grad_bias);
  if (problem.empty())
    torch::stable::zero_(grad_weight), torch::stable::zero_(grad_bias);
  else
    problem.run();
  return {grad_x, grad_weight, grad_bias, problem.of_channels(false, nullptr)};
}

std::tuple<Tensor, Tensor, Tensor> double_backward(Optional h_in, Optional h_weight_in, Optional h_bias_in,
                                                   Tensor grad_in, Tensor x, Optional weight, Optional bias,
                                                   Tensor stats_in, bool training, double negative_slope,
                                                   bool affine) {
  Problem problem(cuda::NormPass::kDoubleBackward, x, weight, bias, training, negative_slope, std::nullopt);
  const Operand grad = problem.take_map(grad_in), h = aligned(take_direction(h_in, *problem.x)),
                stats = take_stats(stats_in, *problem.x),
                h_weight = problem.take(h_weight_in, "grad_grad_weight"),
                h_bias = problem.take(h_bias_in, "grad_grad_bias");
  problem.in.grad = grad.data();
  problem.in.h = h.data();
  problem.in.stats = const_cast<void*>(stats.data());
  problem.in.h_weight = h_weight.data();
  problem.in.h_bias = h_bias.data();
  Tensor grad_grad = problem.map(&problem.in.out), grad_x = problem.map(&problem.in.out_x);
  Tensor grad_weight = problem.of_channels(affine && weight && h_in, &problem.in.grad_weight);
  if (problem.empty())
    torch::stable::zero_(grad_weight);
  else
    problem.run();
  return {grad_grad, h_in || h_weight_in ? grad_x : missing(*problem.x), grad_weight};
}

STABLE_TORCH_LIBRARY_IMPL(gankern_cuda, GANKERN_DEVICE, m) {
  implement_orders<forward, backward, double_backward>(m, kName);
}

}  // namespace
}  // namespace gankern
