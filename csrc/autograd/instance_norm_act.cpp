// Instance normalisation with a (leaky) ReLU or PReLU behind it: gankern/ops/instance_norm_act.py with its rule.
#include "norm_act.h"

namespace gankern::nodes {
namespace instance_norm_act {

Primitive self("instance_norm_act");

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Optional&, const Optional&, double, double,
                                           const Optional&);

struct InstanceNormAct final : NormAct<> {
  const char* primitive() const override { return "instance_norm_act"; }
  Options options() const override { return {eps, negative_slope}; }
  std::tuple<> own() const override { return {}; }
  const Operators& operators() const override {
    static const Operators found("instance_norm_act");
    return found;
  }

  std::tuple<Tensor, Tensor> forward(const Tensor& x, const Optional& weight, const Optional& bias,
                                     double each, const Optional& slope) const {
    static const auto op = find<Forward>("gankern::instance_norm_act");
    return op.call(x, weight, bias, eps, each, slope);
  }
  Tensor normalized(const Tensors& saved) const override {
    return std::get<0>(forward(saved[0], optional(saved[1]), optional(saved[2]), 1, std::nullopt));
  }
};

// The arguments of gankern.functional.instance_norm_act. Without x's own statistics it is Python's to do.
PyObject* call(PyObject* const* in) {
  auto rule = std::make_shared<InstanceNormAct>();
  NormArguments given;
  if (!given.read(in, &rule->eps, &rule->negative_slope) || !given.own || !given.fit(3, /*updated=*/true))
    return decline();
  const Tensor& x = *given.x;
  int64_t positions = 1;
  for (int64_t d = 2; d < x.dim(); ++d) positions *= x.size(d);
  if (positions == 1) return decline();
  if (!(rule->implementation = selected(self, in[0], in[10]))) return decline();
  given.widen_affine();
  Tensor y, stats;
  {
    const Running running;
    std::tie(y, stats) = rule->forward(x, given.weight, given.bias, rule->negative_slope, given.slope);
    if (given.mean && x.numel()) update_running(given.mean, given.var, stats.mean(1), given.momentum);
  }
  return given.recorded(rule, std::move(y), stats);
}

const Functions functions = {method("instance_norm_act", entry<call, 12>)};

}  // namespace instance_norm_act

}  // namespace gankern::nodes
