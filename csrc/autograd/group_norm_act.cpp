// Group normalisation with a (leaky) ReLU or PReLU behind it: gankern/ops/group_norm_act.py with its rule.
#include "norm_act.h"

namespace gankern::nodes {
namespace group_norm_act {

Primitive self("group_norm_act");

using Forward = std::tuple<Tensor, Tensor>(const Tensor&, const Optional&, const Optional&, int64_t, double,
                                           double, const Optional&);

struct GroupNormAct final : NormAct<int64_t> {
  int64_t groups;

  const char* primitive() const override { return "group_norm_act"; }
  Options options() const override { return {double(groups), eps, negative_slope}; }
  std::tuple<int64_t> own() const override { return {groups}; }
  const Operators& operators() const override {
    static const Operators found("group_norm_act");
    return found;
  }

  std::tuple<Tensor, Tensor> forward(const Tensor& x, const Optional& weight, const Optional& bias,
                                     double each, const Optional& slope) const {
    static const auto op = find<Forward>("gankern::group_norm_act");
    return op.call(x, weight, bias, groups, eps, each, slope);
  }
  Tensor normalized(const Tensors& saved) const override {
    return std::get<0>(forward(saved[0], optional(saved[1]), optional(saved[2]), 1, std::nullopt));
  }
};

// The arguments of gankern.functional.group_norm_act: x, num_groups, weight, bias, eps, activation, negative_slope,
// implementation, slope.
PyObject* call(PyObject* const* in) {
  auto rule = std::make_shared<GroupNormAct>();
  NormArguments given{};
  given.x = tensor(in[0]);
  if (!given.x || !integer(in[1], &rule->groups) || !optional_tensor(in[2], &given.weight) ||
      !optional_tensor(in[3], &given.bias) || !number(in[4], &rule->eps) || rule->eps < 0 ||
      !optional_tensor(in[8], &given.slope) || !slope_of(in[5], in[6], given.slope, &rule->negative_slope) ||
      !plain() || !given.fit(2, /*updated=*/false))
    return decline();
  const Tensor& x = *given.x;
  if (rule->groups < 1 || x.size(1) % rule->groups || x.numel() == x.size(0) * rule->groups) return decline();
  if (!(rule->implementation = selected(self, in[0], in[7]))) return decline();
  given.widen_affine();
  Tensor y, stats;
  {
    const Running running;
    std::tie(y, stats) = rule->forward(x, given.weight, given.bias, rule->negative_slope, given.slope);
  }
  return given.recorded(rule, std::move(y), stats);
}

const Functions functions = {method("group_norm_act", entry<call, 9>)};

}  // namespace group_norm_act

}  // namespace gankern::nodes
