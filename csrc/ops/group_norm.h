// Group normalisation of CPU tensors by batch_norm_act's kernels; of groups of one channel, instance normalisation.
#pragma once

#include <cstring>
#include <vector>

#include "../cpu/batch_norm_act.h"
#include "layout.h"

namespace gankern::group_norm {

// Calls f with a pointer of the dtype that x is accumulated in.
template <class F>
void with_values(const Tensor& values, const F& f) {
  if (values.scalar_type() == ScalarType::Double)
    f(static_cast<double*>(values.mutable_data_ptr()));
  else
    f(static_cast<float*>(values.mutable_data_ptr()));
}

// The problem in the kernels' own layouts. The tensors that own the memory stay alive in here.
struct Problem {
  const char* name;
  const Operand x;
  int64_t samples, own, groups;  // own: channels of a sample
  BatchNormAct in;
  const Operand weight, bias;

  Problem(const char* op, const Tensor& x_in, const Optional& weight_in, const Optional& bias_in, int64_t g,
          double negative_slope)
      : name(op),
        x(dense_images(x_in, 2, op)),
        samples(x->size(0)),
        own(x->size(1)),
        groups(g),
        in(task(*x, g, of_each(weight_in) || of_each(bias_in), op, negative_slope)),
        weight(take(weight_in, "weight")),
        bias(take(bias_in, "bias")) {
    in.x = x.data();
    in.weight = weight.data();
    in.bias = bias.data();
  }

  static bool of_each(const Optional& values) { return values && values->dim() == 2; }

  static BatchNormAct task(const Tensor& x, int64_t groups, bool each, const char* op,
                           double negative_slope) {
    const int64_t own = x.size(1);
    STD_TORCH_CHECK(groups == own || (groups > 0 && own % groups == 0), op, ": ", groups, " groups of ", own,
                    " channels");
    BatchNormAct in{};
    in.samples = groups ? own / groups : 1;
    in.grouped = in.per_sample = in.samples > 1;
    in.channels = x.size(0) * groups;
    in.period = each ? 0 : own;
    in.plane = 1;
    for (int64_t d = 2; d < x.dim(); ++d) in.plane *= x.size(d);
    // Of one position the two orders are one, and columns are faster than lines of one value.
    in.channels_last = !x.is_contiguous() || (in.grouped && in.plane == 1);
    in.instances = in.channels_last && in.channels ? x.size(0) : 1;
    in.training = true;
    in.negative_slope = negative_slope;
    return in;
  }
  // Affine values, or a slope: of every sample's channels where they are of these, else of those that repeat.
  Operand take(const Optional& given, const char* argument) const {
    if (!given) return Operand();
    const Tensor& t = *given;
    STD_TORCH_CHECK(t.scalar_type() == accumulation_type(*x), name, ": ", argument,
                    " must have the dtype that x is accumulated in");
    const bool each = t.dim() == 2 && t.size(0) == samples && !in.period;
    STD_TORCH_CHECK((t.dim() == 1 || each) && t.size(t.dim() - 1) == own, name, ": ", argument,
                    " must be [channels], or [samples, channels] where weight or bias is");
    const Operand values = compact(t);
    if (each || in.period || samples == 1) return values;
    Tensor repeated = empty();
    with_values(repeated, [&](auto* to) {
      for (int64_t n = 0; n < samples; ++n)
        std::memcpy(to + n * own, values.data(), size_t(own) * sizeof *to);
    });
    return Operand(repeated);
  }
  // Of every sample's channels.
  Tensor empty() const { return blank(*x, {samples, own}, accumulation_type(*x)); }
  // The gradient of values of this shape: over the samples where they have them in common.
  Tensor gradient_of(const Optional& values, const Tensor& every) const {
    if (values->dim() == 2) return every;
    Tensor total = blank(*x, {own}, accumulation_type(*x));
    with_values(total, [&](auto* to) {
      with_values(every, [&](const auto* from) {
        std::vector<double> sums(size_t(own), 0.0);  // in the order in which they lie in memory
        for (int64_t n = 0; n < samples; ++n)
          for (int64_t c = 0; c < own; ++c) sums[size_t(c)] += double(from[n * own + c]);
        for (int64_t c = 0; c < own; ++c) to[c] = std::remove_reference_t<decltype(*to)>(sums[size_t(c)]);
      });
    });
    return total;
  }
  Operand take_stats(const Tensor& stats) const {
    STD_TORCH_CHECK(stats.dim() == 3 && stats.size(0) == 3 && stats.size(1) == samples &&
                        stats.size(2) == groups && stats.scalar_type() == accumulation_type(*x),
                    name, ": stats are not those of the forward");
    return compact(stats);
  }
};

inline std::tuple<Tensor, Tensor> forward(const char* op, const Tensor& x, const Optional& weight,
                                          const Optional& bias, int64_t groups, double eps,
                                          double negative_slope, const Optional& slope_in) {
  Problem problem(op, x, weight, bias, groups, negative_slope);
  BatchNormAct& in = problem.in;
  const Operand slope = problem.take(slope_in, "slope");
  in.slope = slope.data();
  in.eps = eps;
  Tensor y = blank_like(*problem.x);
  Tensor stats = blank(*problem.x, {3, problem.samples, groups}, accumulation_type(x));
  if (x.numel() == 0) torch::stable::zero_(stats);
  in.stats = stats.mutable_data_ptr();
  in.y = y.mutable_data_ptr();
  batch_norm_act().forward[dtype_index(x, op)](in, torch_threads());
  return {y, stats};
}

inline std::tuple<Tensor, Tensor, Tensor, Tensor> backward(const char* op, const Tensor& grad_in,
                                                           const Tensor& x, const Optional& weight,
                                                           const Optional& bias, const Tensor& stats,
                                                           int64_t groups, double negative_slope, bool affine,
                                                           const Optional& slope_in) {
  Problem problem(op, x, weight, bias, groups, negative_slope);
  BatchNormAct& in = problem.in;
  const Operand grad = like(grad_in, *problem.x, op), of_forward = problem.take_stats(stats);
  Tensor grad_x = blank_like(*problem.x);
  const bool to_weight = affine && weight, to_bias = affine && bias;
  Tensor every_weight = to_weight ? problem.empty() : missing(x),
         every_bias = to_bias ? problem.empty() : missing(x);
  in.stats = const_cast<void*>(of_forward.data());
  in.grad = grad.data();
  in.grad_x = grad_x.mutable_data_ptr();
  in.grad_weight = to_weight ? every_weight.mutable_data_ptr() : nullptr;
  in.grad_bias = to_bias ? every_bias.mutable_data_ptr() : nullptr;
  const Operand slope = problem.take(slope_in, "slope");
  Tensor every_slope = slope ? problem.empty() : missing(x);
  in.slope = slope.data();
  if (slope) in.grad_slope = every_slope.mutable_data_ptr();
  batch_norm_act().backward[dtype_index(x, op)](in, torch_threads());
  return {grad_x, to_weight ? problem.gradient_of(weight, every_weight) : every_weight,
          to_bias ? problem.gradient_of(bias, every_bias) : every_bias,
          slope ? problem.gradient_of(slope_in, every_slope) : every_slope};
}

inline std::tuple<Tensor, Tensor, Tensor> double_backward(const char* op, const Optional& h_in,
                                                          const Optional& h_weight, const Optional& h_bias,
                                                          const Tensor& grad_in, const Tensor& x,
                                                          const Optional& weight, const Optional& bias,
                                                          const Tensor& stats, int64_t groups,
                                                          double negative_slope, bool affine) {
  Problem problem(op, x, weight, bias, groups, negative_slope);
  BatchNormAct& in = problem.in;
  const Operand grad = like(grad_in, *problem.x, op), of_forward = problem.take_stats(stats);
  // Zeros are rare: only the affine gradients were differentiated.
  Tensor zeros = h_in ? missing(x) : blank_like(*problem.x);
  if (!h_in) torch::stable::zero_(zeros);
  const Operand h = h_in ? like(*h_in, *problem.x, op) : Operand(zeros),
                of_weight = problem.take(h_weight, "grad_grad_weight"),
                of_bias = problem.take(h_bias, "grad_grad_bias");
  const bool moves_x = h_weight || h_in, to_weight = affine && weight && h_in;
  Tensor grad_grad = blank_like(*problem.x), grad_x = moves_x ? blank_like(*problem.x) : missing(x);
  Tensor every_weight = to_weight ? problem.empty() : missing(x);
  in.h_weight = of_weight.data();
  in.h_bias = of_bias.data();
  in.stats = const_cast<void*>(of_forward.data());
  in.grad = grad.data();
  in.h = h.data();
  in.grad_grad = grad_grad.mutable_data_ptr();
  in.grad_x = moves_x ? grad_x.mutable_data_ptr() : nullptr;
  in.grad_weight = to_weight ? every_weight.mutable_data_ptr() : nullptr;
  batch_norm_act().double_backward[dtype_index(x, op)](in, torch_threads());
  return {grad_grad, grad_x, to_weight ? problem.gradient_of(weight, every_weight) : every_weight};
}

}  // namespace gankern::group_norm
