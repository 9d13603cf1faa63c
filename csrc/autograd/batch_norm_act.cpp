// Batch normalisation with a (leaky) ReLU or PReLU behind it: gankern/ops/batch_norm_act.py with its rule.
#include "norm_act.h"

namespace gankern::nodes {
namespace batch_norm_act {

Primitive self("batch_norm_act");

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Optional&, const Optional&, const Optional&,
                                           const Optional&, bool, double, double, const Optional&);

struct BatchNormAct final : NormAct<bool> {
  bool training;  // with x's own statistics

  const char* primitive() const override { return "batch_norm_act"; }
  Options options() const override { return {double(training), eps, negative_slope}; }
  std::tuple<bool> own() const override { return {training}; }
  bool own_statistics() const override { return training; }
  const Operators& operators() const override {
    static const Operators found("batch_norm_act");
    return found;
  }

  std::tuple<Tensor, Tensor> forward(const Tensor& x, const Optional& weight, const Optional& bias,
                                     const Optional& mean, const Optional& var, double each,
                                     const Optional& slope) const {
    static const auto op = find<Forward>("gankern::batch_norm_act");
    return op.call(x, weight, bias, mean, var, training, eps, each, slope);
  }
  Tensor normalized(const Tensors& saved) const override {
    return std::get<0>(forward(saved[0], optional(saved[1]), optional(saved[2]), saved[4].select(0, 0),
                               saved[4].select(0, 2), 1, std::nullopt));
  }
};

// The arguments of gankern.functional.batch_norm_act.
PyObject* call(PyObject* const* in) {
  auto rule = std::make_shared<BatchNormAct>();
  NormArguments given;
  if (!given.read(in, &rule->eps, &rule->negative_slope) || !given.fit(2, /*updated=*/given.own))
    return decline();
  const Tensor& x = *given.x;
  rule->training = given.own || !given.mean;
  if (rule->training && x.numel() == x.size(1)) return decline();
  if (!(rule->implementation = selected(self, in[0], in[10]))) return decline();
  given.widen_affine();
  Tensor y, stats;
  {
    const Running running;
    Optional mean, var;
    if (!rule->training) {
      mean = given.mean, var = given.var;
      widen(x, &mean);
      widen(x, &var);
    }
    std::tie(y, stats) =
        rule->forward(x, given.weight, given.bias, mean, var, rule->negative_slope, given.slope);
    if (given.own && given.mean && x.numel()) update_running(given.mean, given.var, stats, given.momentum);
  }
  return given.recorded(rule, std::move(y), stats);
}

const Functions functions = {method("batch_norm_act", entry<call, 12>)};

}  // namespace batch_norm_act

}  // namespace gankern::nodes
