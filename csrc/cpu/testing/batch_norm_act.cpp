// The kernels of batch normalisation with an activation against plain loops in double.
#include "../batch_norm_act.h"

#include <tuple>

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

using Doubles = std::vector<double>;

struct Shape {
  int64_t samples, channels, plane;
  bool last, per_sample, training;
  int64_t instances = 1;
  bool grouped = false;
  int64_t size() const { return samples * channels * plane; }
  int64_t affine() const { return channels * (per_sample ? samples : 1); }
  int64_t at(int64_t n, int64_t c, int64_t s) const {
    const int64_t own = channels / instances;  // of more than one instance there is one sample
    if (grouped)
      return last ? (c / own * plane + s) * own * samples + c % own * samples + n
                  : (c * samples + n) * plane + s;
    return last ? ((n + c / own) * plane + s) * own + c % own : (n * channels + c) * plane + s;
  }
  int64_t affine_at(int64_t n, int64_t c) const {
    if (!per_sample) return c;
    return grouped ? c * samples + n : n * channels + c;
  }
};

constexpr double kEpsilon = 0.1, kSlope = 0.25;

template <class T>
struct Inputs {
  using A = Acc<T>;
  Shape shape;
  std::vector<T> x, grad, h;
  std::vector<A> weight, bias, h_weight, h_bias, mean, var;

  explicit Inputs(const Shape& s)
      : shape(s),
        x(random_values<T>(s.size(), 1, -2, 3)),
        grad(random_values<T>(s.size(), 2, -1, 1.5)),
        h(random_values<T>(s.size(), 3, -1, 1.5)),
        weight(random_values<A>(s.affine(), 4, 0.5, 1.5)),
        bias(random_values<A>(s.affine(), 5, -1, 1)),
        h_weight(random_values<A>(s.affine(), 6, -1, 1)),
        h_bias(random_values<A>(s.affine(), 7, -1, 1)),
        mean(random_values<A>(s.channels, 8, 0, 1)),
        var(random_values<A>(s.channels, 9, 1, 2)) {}
};

// Results in the order of the kernels' outputs.
enum Result { kY, kGradX, kGradGrad, kSecondGradX, kTensors };
enum AffineResult { kGradWeight, kGradBias, kSecondGradWeight, kAffines };

template <class T>
struct Call {
  const Inputs<T>& in;
  Placement at;
  Buffer<T> x{in.x, at}, grad{in.grad, at}, h{in.h, at};
  Buffer<Acc<T>> weight{in.weight, at}, bias{in.bias, at}, h_weight{in.h_weight, at}, h_bias{in.h_bias, at},
      mean{in.mean, at}, var{in.var, at}, stats{3 * in.shape.channels, at};
  std::vector<Buffer<T>> tensors = buffers<T>(kTensors, x.size(), at);
  std::vector<Buffer<Acc<T>>> affines = buffers<Acc<T>>(kAffines, in.shape.affine(), at);

  void run(const Orders<BatchNormAct>& kernels, const Parallel& parallel) {
    const Shape& s = in.shape;
    BatchNormAct b{};
    b.samples = s.samples, b.channels = s.channels, b.plane = s.plane;
    b.instances = s.instances, b.grouped = s.grouped, b.channels_last = s.last, b.per_sample = s.per_sample,
    b.training = s.training;
    b.eps = kEpsilon, b.negative_slope = kSlope;
    b.x = x.data(), b.weight = weight.data(), b.bias = bias.data(), b.stats = stats.data();
    b.running_mean = mean.data(), b.running_var = var.data();
    b.y = tensors[kY].data();
    kernels.forward[kDtype<T>](b, parallel);
    b.grad = grad.data(), b.grad_x = tensors[kGradX].data();
    b.grad_weight = affines[kGradWeight].data(), b.grad_bias = affines[kGradBias].data();
    kernels.backward[kDtype<T>](b, parallel);
    b.h = h.data(), b.h_weight = h_weight.data(), b.h_bias = h_bias.data();
    b.grad_grad = tensors[kGradGrad].data(), b.grad_x = tensors[kSecondGradX].data();
    b.grad_weight = affines[kSecondGradWeight].data(), b.grad_bias = nullptr;
    kernels.double_backward[kDtype<T>](b, parallel);
  }
  bool same(const Call& other) const {
    return all_same(tensors, other.tensors) && all_same(affines, other.affines);
  }
  bool inputs_unchanged() const {
    if (in.shape.size() == 0) return true;
    return x.same_bits(in.x) && grad.same_bits(in.grad) && h.same_bits(in.h) && weight.same_bits(in.weight) &&
           bias.same_bits(in.bias) && h_weight.same_bits(in.h_weight) && h_bias.same_bits(in.h_bias);
  }
};

// y, grad_x, grad_weight and grad_bias by the formulas; the second order is held against torch's in Python.
template <class T>
void compare(const Call<T>& call, const char* what) {
  const Inputs<T>& in = call.in;
  const Shape& s = in.shape;
  const Doubles x = to_double(in.x), g = to_double(in.grad), weight(in.weight.begin(), in.weight.end()),
                bias(in.bias.begin(), in.bias.end());
  const double count = double(s.samples * s.plane);
  Doubles y(x.size()), grad_x(x.size()), grad_weight(size_t(s.affine())), grad_bias(size_t(s.affine()));
  for (int64_t c = 0; c < s.channels; ++c) {
    const auto each = [&](auto f) {
      for (int64_t n = 0; n < s.samples; ++n)
        for (int64_t p = 0; p < s.plane; ++p) f(size_t(s.at(n, c, p)), size_t(s.affine_at(n, c)));
    };
    double mean = double(in.mean[size_t(c)]), var = double(in.var[size_t(c)]);
    if (s.training) {
      mean = var = 0;
      each([&](size_t i, size_t) { mean += x[i] / count; });
      each([&](size_t i, size_t) { var += (x[i] - mean) * (x[i] - mean) / count; });
    }
    const double r = 1 / std::sqrt(var + kEpsilon);
    double a = 0, ax = 0;
    const auto normal = [&](size_t i) { return (x[i] - mean) * r; };
    const auto through = [&](size_t i, size_t j, double v) {
      return normal(i) * weight[j] + bias[j] > 0 ? v : kSlope * v;
    };
    each([&](size_t i, size_t j) {
      y[i] = through(i, j, normal(i) * weight[j] + bias[j]);
      const double gated = through(i, j, g[i]);
      grad_weight[j] += gated * normal(i);
      grad_bias[j] += gated;
      a += weight[j] * gated / count;
      ax += weight[j] * gated * normal(i) / count;
    });
    if (!s.training) a = ax = 0;
    each([&](size_t i, size_t j) { grad_x[i] = r * (weight[j] * through(i, j, g[i]) - a - normal(i) * ax); });
  }
  const double inside = (32 + 4 * std::sqrt(count)) * kEps<Acc<T>>;
  // Where rounding moves a value over the kink, its gradient is another: no value of these inputs lies so
  // close.
  const auto near = [&](const auto& ours, const Doubles& exact, double unit, const char* name) {
    const double error = largest_error(ours, exact),
                 allowed = (unit + inside) * std::max(1.0, largest(exact));
    check(error <= allowed, "%s of %s: error %g, allowed %g", name, what, error, allowed);
  };
  near(call.tensors[kY], y, kEps<T>, "y");
  near(call.tensors[kGradX], grad_x, kEps<T>, "grad_x");
  near(call.affines[kGradWeight], grad_weight, 0, "grad_weight");
  near(call.affines[kGradBias], grad_bias, 0, "grad_bias");
}

// Every instruction set, placement and number of threads on one problem.
template <class T>
void test_problem(const Shape& shape, const Placements& placements, const std::vector<int>& counts) {
  const Inputs<T> inputs(shape);
  const std::string what =
      text("%s, [%lld, %lld, %lld], %lld instances%s%s%s%s", dtype_name<T>(), (long long)shape.samples,
           (long long)shape.channels, (long long)shape.plane, (long long)shape.instances,
           shape.last ? ", last" : "", shape.grouped ? ", grouped" : "",
           shape.per_sample ? ", per sample" : "", shape.training ? "" : ", evaluation");
  test_every_way<Call<T>>(GANKERN_TEST_TABLES(batch_norm_act), inputs, what, placements, counts, compare<T>);
}

}  // namespace

GANKERN_TEST(batch_norm_act) {
  // Few channels in parts; columns in blocks; rows in parts.
  const std::vector<Shape> shared = {{3, 2, 5000, false, false, true},
                                     {3, 2, 5000, false, true, true},
                                     {5, 37, 9, false, true, true},
                                     {2, 40, 20000, true, false, true},
                                     {3, 40, 10000, true, true, true},
                                     {1, 80, 20000, true, false, true, 2},
                                     {4, 2, 5000, false, true, true, 1, true},
                                     {9, 6, 3000, true, true, true, 3, true}};
  if (kRacesOnly) {
    for (const Shape& shape : shared) test_problem<float>(shape, {Placement::kHeap}, {2, 5});
    return;
  }
  each_dtype([&](auto type) {
    using T = decltype(type);
    for (const auto& [samples, channels, plane] :
         std::vector<std::tuple<int64_t, int64_t, int64_t>>{{0, 3, 4},
                                                            {1, 1, 3},
                                                            {2, 1, 1},
                                                            {3, 5, 1},
                                                            {2, 3, 7},
                                                            {3, 2, 67},
                                                            {2, 17, 70},
                                                            {1, 70, 16},
                                                            {1, 33, 100}})
      for (bool last : {false, true})
        for (bool per_sample : {false, true})
          for (bool training : {false, true})
            test_problem<T>({samples, channels, plane, last, per_sample, training}, kEveryPlacement, {1, 3});
    for (const auto& [own, plane] :
         std::vector<std::tuple<int64_t, int64_t>>{{1, 5}, {3, 67}, {17, 4}, {700, 3}})
      test_problem<T>({1, 3 * own, plane, true, false, true, 3}, kEveryPlacement, {1, 3});
    for (const auto& [members, groups, plane] :
         std::vector<std::tuple<int64_t, int64_t, int64_t>>{{2, 1, 5}, {3, 2, 67}, {17, 1, 4}, {300, 3, 3}})
      for (bool last : {false, true})
        test_problem<T>({members, 2 * groups, plane, last, true, true, last ? 2 : 1, true}, kEveryPlacement,
                        {1, 3});
  });
  for (const Shape& shape : shared) test_problem<float>(shape, {Placement::kGuarded}, {2, -3});
}

}  // namespace testing
}  // namespace gankern
