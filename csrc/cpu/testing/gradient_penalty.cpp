// The kernels of the penalty of each sample's gradient norm against the formulas in double.
#include "../gradient_penalty.h"

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

using Doubles = std::vector<double>;

struct Problem {
  int64_t samples, size;
  double target;
  bool one_sided;
};

template <class T>
struct Inputs {
  Problem problem;
  std::vector<T> gradient, grad_grad;
  std::vector<Acc<T>> grad;

  explicit Inputs(const Problem& p)
      : problem(p),
        gradient(random_values<T>(p.samples * p.size, 1, -1, 1.5)),
        grad_grad(random_values<T>(p.samples * p.size, 2, -1, 1.5)),
        grad(random_values<Acc<T>>(p.samples, 3, -1, 1.5)) {
    // A sample whose gradient is zero.
    if (p.samples > 1) std::fill_n(gradient.begin() + p.size, p.size, T{});
  }
};

template <class T>
struct Call {
  const Inputs<T>& inputs;
  Placement at;
  Buffer<T> gradient{inputs.gradient, at}, grad_grad{inputs.grad_grad, at};
  Buffer<Acc<T>> grad{inputs.grad, at};
  Buffer<double> partial{gradient_penalty_partials(inputs.problem.samples, inputs.problem.size), at};
  Buffer<Acc<T>> values{inputs.problem.samples, at}, norms{inputs.problem.samples, at},
      to_grad{inputs.problem.samples, at};
  Buffer<T> first{gradient.size(), at}, second{gradient.size(), at};

  void run(const Orders<GradientPenalty>& kernels, const Parallel& parallel) {
    const Problem& p = inputs.problem;
    GradientPenalty in{p.samples, p.size, p.target, p.one_sided};
    in.gradient = gradient.data(), in.partial = partial.data(), in.norms = norms.data(),
    in.values = values.data();
    kernels.forward[kDtype<T>](in, parallel);
    in.grad = grad.data(), in.values = nullptr, in.out = first.data(), in.partial = nullptr;
    kernels.backward[kDtype<T>](in, parallel);
    in.grad_grad = grad_grad.data(), in.values = to_grad.data(), in.out = second.data(),
    in.partial = partial.data();
    kernels.double_backward[kDtype<T>](in, parallel);
  }
  bool same(const Call& other) const {
    return values.same_bits(other.values) && norms.same_bits(other.norms) &&
           to_grad.same_bits(other.to_grad) && first.same_bits(other.first) && second.same_bits(other.second);
  }
  bool inputs_unchanged() const {
    return gradient.size() == 0 || (gradient.same_bits(inputs.gradient) &&
                                    grad_grad.same_bits(inputs.grad_grad) && grad.same_bits(inputs.grad));
  }
};

template <class T>
void compare(const Call<T>& ours, const char* what) {
  const Inputs<T>& inputs = ours.inputs;
  const Problem& p = inputs.problem;
  const Doubles g = to_double(inputs.gradient), h = to_double(inputs.grad_grad);
  Doubles values, norms, to_grad, first, second;
  for (int64_t n = 0; n < p.samples; ++n) {
    double squares = 0, dot = 0;
    for (int64_t i = n * p.size; i < (n + 1) * p.size; ++i) {
      squares += g[size_t(i)] * g[size_t(i)];
      dot += g[size_t(i)] * h[size_t(i)];
    }
    const double r = std::sqrt(squares), e = r - p.target;
    const bool active = !(p.one_sided && e < 0) && (r != 0 || p.target == 0);
    const double c = active ? 2 * (r == 0 ? 1 : 1 - p.target / r) : 0;
    const double d = active && r != 0 ? 2 * p.target / (r * r * r) : 0;
    values.push_back(p.one_sided && e < 0 ? 0 : e * e);
    norms.push_back(r);
    to_grad.push_back(c * dot);
    const double weight = double(inputs.grad[size_t(n)]);
    for (int64_t i = n * p.size; i < (n + 1) * p.size; ++i) {
      first.push_back(weight * c * g[size_t(i)]);
      second.push_back(weight * (c * h[size_t(i)] + d * dot * g[size_t(i)]));
    }
  }
  const double inside = (8 + 4 * std::sqrt(double(p.size))) * kEps<Acc<T>>;
  const auto near = [&](const auto& buffer, const Doubles& exact, double eps, double scale,
                        const char* name) {
    const double error = largest_error(buffer, exact);
    const double allowed = (eps + inside) * (largest(exact) + scale);
    check(error <= allowed, "%s of %s: error %g, allowed %g", name, what, error, allowed);
  };
  near(ours.norms, norms, kEps<Acc<T>>, 0, "norms");
  near(ours.values, values, kEps<Acc<T>>, p.target * p.target, "values");
  near(ours.to_grad, to_grad, kEps<Acc<T>>, std::sqrt(double(p.size)), "to_grad");
  near(ours.first, first, kEps<T>, p.target, "first order");
  near(ours.second, second, kEps<T>, p.target, "second order");
}

template <class T>
void test_problem(const Problem& p, const std::vector<int>& counts) {
  const Inputs<T> inputs(p);
  const std::string what = text("%s, [%lld, %lld], target %g, one-sided %d", dtype_name<T>(),
                                (long long)p.samples, (long long)p.size, p.target, p.one_sided);
  test_every_way<Call<T>>(GANKERN_TEST_TABLES(gradient_penalty), inputs, what, kEveryPlacement, counts,
                          compare<T>);
}

}  // namespace

GANKERN_TEST(gradient_penalty) {
  if (kRacesOnly) {
    test_problem<float>({2, 3 * kGradientPenaltyBlock + 5, 1, false}, {2, 5});
    test_problem<float>({700, 300, 1, false}, {3});
    return;
  }
  each_dtype([&](auto type) {
    using T = decltype(type);
    for (double target : {0.0, 1.0, 30.0})
      for (bool one_sided : {false, true})
        for (int64_t samples : {0, 1, 3})
          for (int64_t size : {0, 1, 7, 16, 17, 64, 133, 8192, 8193})
            test_problem<T>({samples, size, target, one_sided}, {1, 2});
    test_problem<T>({2, 50001, 1, false}, {2, 5, -3});
    test_problem<T>({700, 101, 1, false}, {3, -4});
  });
}

}  // namespace testing
}  // namespace gankern
