// torch.ops.gankern.group_norm_act and its gradients on CPU tensors: group_norm.h's, of as many groups as it is told. Schemas: gankern/ops/group_norm_act.py.
#include "group_norm.h"

namespace gankern {
namespace {

constexpr const char* kName = "group_norm_act";

std::tuple<Tensor, Tensor> forward(Tensor x, Optional weight, Optional bias, int64_t groups, double eps,
                                   double negative_slope, Optional slope) {
  return group_norm::forward(kName, x, weight, bias, groups, eps, negative_slope, slope);
}
std::tuple<Tensor, Tensor, Tensor, Tensor> backward(Tensor grad, Tensor x, Optional weight, Optional bias,
                                                    Tensor stats, int64_t groups, double negative_slope,
                                                    bool affine, Optional slope) {
  return group_norm::backward(kName, grad, x, weight, bias, stats, groups, negative_slope, affine, slope);
}
std::tuple<Tensor, Tensor, Tensor> double_backward(Optional h, Optional h_weight, Optional h_bias,
                                                   Tensor grad, Tensor x, Optional weight, Optional bias,
                                                   Tensor stats, int64_t groups, double negative_slope,
                                                   bool affine) {
  return group_norm::double_backward(kName, h, h_weight, h_bias, grad, x, weight, bias, stats, groups,
                                     negative_slope, affine);
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) { implement_orders<forward, backward, double_backward>(m, kName); }

}  // namespace
}  // namespace gankern
