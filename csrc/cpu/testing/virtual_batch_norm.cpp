// The kernels of virtual batch norm: forward and backward against a loop in double; all orders, and the
// statistics of a batch, for every instruction set, number of threads and placement in memory. (tests/ops has
// the second order's values.)
#include "../virtual_batch_norm.h"

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

using Doubles = std::vector<double>;

struct Shape {
  int64_t count, channels, pixels;
  bool channels_last;
  double own_share, slope;
  int64_t size() const { return count * channels * pixels; }
  size_t at(int64_t n, int64_t c, int64_t p) const {
    return size_t(n * channels * pixels + (channels_last ? p * channels + c : c * pixels + p));
  }
};

constexpr double kEpsilon = 1e-3;

template <class T>
struct Inputs {
  Shape shape;
  std::vector<T> x, g, h;
  Doubles mean, mean_square, weight, bias, second[4];
  explicit Inputs(const Shape& s)
      : shape(s),
        x(random_values<T>(s.size(), 1, -2, 2.5)),
        g(random_values<T>(s.size(), 2, -1, 1.5)),
        h(random_values<T>(s.size(), 3, -1, 1)),
        mean(random_values<double>(s.channels, 4, -0.5, 0.5)),
        mean_square(random_values<double>(s.channels, 5, 1, 2)),
        weight(random_values<double>(s.channels, 6, 0.5, 1.5)),
        bias(random_values<double>(s.channels, 7, -1, 1)) {
    for (int k = 0; k < 4; ++k) second[k] = random_values<double>(s.channels, 8 + uint64_t(k), -1, 1);
  }
};

template <class T>
struct Call {
  const Inputs<T>& given;
  Placement at;
  Buffer<T> x{given.x, at}, g{given.g, at}, h{given.h, at}, out{given.shape.size(), at},
      grad_x{given.shape.size(), at}, grad_grad{given.shape.size(), at}, second_x{given.shape.size(), at},
      statistics_x{given.shape.size(), at}, statistics_second{given.shape.size(), at};
  Buffer<double> saved{2 * given.shape.count * given.shape.channels, at}, sums{4 * given.shape.channels, at},
      second_sums{4 * given.shape.channels, at}, moments{2 * given.shape.channels, at},
      second_moments{2 * given.shape.channels, at};

  void run(const VirtualBatchNormKernels& kernels, const Parallel& parallel) {
    const Shape& s = given.shape;
    VirtualBatchNorm in{};
    in.count = s.count, in.channels = s.channels, in.pixels = s.pixels, in.channels_last = s.channels_last;
    in.own_share = s.own_share, in.eps = kEpsilon, in.negative_slope = s.slope;
    in.ref_mean = given.mean.data(), in.ref_mean_square = given.mean_square.data();
    in.weight = given.weight.data(), in.bias = given.bias.data();
    in.x = x.data(), in.saved = saved.data(), in.out = out.data();
    kernels.norm.forward[kDtype<T>](in, parallel);
    in.out = nullptr;
    in.grad = g.data();
    in.out_x = grad_x.data();
    in.sums = sums.data();
    kernels.norm.backward[kDtype<T>](in, parallel);
    in.grad_x = h.data();
    in.grad_ref_mean = given.second[0].data(), in.grad_ref_mean_square = given.second[1].data();
    in.grad_weight = given.second[2].data(), in.grad_bias = given.second[3].data();
    in.out = grad_grad.data(), in.out_x = second_x.data(), in.sums = second_sums.data();
    kernels.norm.double_backward[kDtype<T>](in, parallel);

    BatchStatistics batch{};
    batch.count = s.count, batch.channels = s.channels, batch.pixels = s.pixels,
    batch.channels_last = s.channels_last;
    batch.x = x.data(), batch.moments = moments.data();
    kernels.statistics.forward[kDtype<T>](batch, parallel);
    batch.mean = moments.data();
    batch.grad_mean = given.second[0].data(), batch.grad_mean_square = given.second[1].data();
    batch.out_x = statistics_x.data();
    kernels.statistics.backward[kDtype<T>](batch, parallel);
    batch.grad_x = h.data(), batch.moments = second_moments.data(), batch.out_x = statistics_second.data();
    kernels.statistics.double_backward[kDtype<T>](batch, parallel);
  }
  bool same(const Call& o) const {
    return out.same_bits(o.out) && grad_x.same_bits(o.grad_x) && grad_grad.same_bits(o.grad_grad) &&
           second_x.same_bits(o.second_x) && statistics_x.same_bits(o.statistics_x) &&
           statistics_second.same_bits(o.statistics_second) && saved.same_bits(o.saved) &&
           sums.same_bits(o.sums) && second_sums.same_bits(o.second_sums) && moments.same_bits(o.moments) &&
           second_moments.same_bits(o.second_moments);
  }
  bool inputs_unchanged() const {
    return x.same_bits(given.x) && g.same_bits(given.g) && h.same_bits(given.h);
  }
};

template <class T>
void compare(const Call<T>& call, const char* what) {
  const Inputs<T>& in = call.given;
  const Shape& s = in.shape;
  const Doubles x = to_double(in.x), g = to_double(in.g);
  Doubles out(x.size()), grad_x(x.size()), moments(size_t(2 * s.channels)), statistics_x(x.size());
  const double S = double(s.pixels), c = s.own_share, values = double(s.count) * S;
  bool near_kink = false;  // an activation that rounding may decide
  for (int64_t i = 0; i < s.channels; ++i) {
    const size_t k = size_t(i);
    for (int64_t n = 0; n < s.count; ++n) {
      double a = 0, squares = 0, P = 0, U = 0;
      for (int64_t p = 0; p < s.pixels; ++p) {
        const double value = x[s.at(n, i, p)];
        a += value / S;
        squares += value * value / S;
        moments[k] += value / values;
        moments[size_t(s.channels) + k] += value * value / values;
      }
      const double mu = c * a + (1 - c) * in.mean[k], mean_square = c * squares + (1 - c) * in.mean_square[k];
      const double r = 1 / std::sqrt(mean_square - mu * mu + kEpsilon);
      const auto slope_at = [&](size_t at) {
        const double y = (x[at] - mu) * r * in.weight[k] + in.bias[k];
        near_kink = near_kink || (s.slope != 1 && std::fabs(y) < 1e-4);
        return y > 0 ? 1.0 : s.slope;
      };
      for (int64_t p = 0; p < s.pixels; ++p) {
        const size_t at = s.at(n, i, p);
        const double z = (x[at] - mu) * r, slope = slope_at(at);
        out[at] = slope * (z * in.weight[k] + in.bias[k]);
        P += g[at] * slope;
        U += g[at] * slope * z;
      }
      for (int64_t p = 0; p < s.pixels; ++p) {
        const size_t at = s.at(n, i, p);
        const double z = (x[at] - mu) * r;
        grad_x[at] = in.weight[k] * r * (g[at] * slope_at(at) - c / S * (P + z * U));
        statistics_x[at] = (in.second[0][k] + 2 * in.second[1][k] * x[at]) / values;
      }
    }
  }
  const auto near = [&](const auto& ours, const Doubles& exact, double eps, const char* name) {
    const double allowed = (eps + 256 * kEps<Acc<T>>)*(largest(exact) + 1e-6);
    const double error = largest_error(ours, exact);
    check(error <= allowed, "%s of %s: error %g, allowed %g", name, what, error, allowed);
  };
  near(call.out, out, kEps<T>, "result");
  if (!near_kink) near(call.grad_x, grad_x, kEps<T>, "grad_x");
  near(call.moments, moments, 0, "statistics");
  near(call.statistics_x, statistics_x, kEps<T>, "grad_x of the statistics");
}

template <class T>
void test_shape(const Shape& s, const Placements& placements, const std::vector<int>& counts) {
  const Inputs<T> inputs(s);
  const std::string what = text("%s, [%lld, %lld, %lld]%s, c %g, slope %g", dtype_name<T>(),
                                (long long)s.count, (long long)s.channels, (long long)s.pixels,
                                s.channels_last ? " channels last" : "", s.own_share, s.slope);
  test_every_way<Call<T>>(GANKERN_TEST_TABLES(virtual_batch_norm), inputs, what, placements, counts,
                          compare<T>);
}

}  // namespace

GANKERN_TEST(virtual_batch_norm) {
  // Several blocks of pixels, shared by the threads; several blocks of channels; a plane longer than what is
  // summed at once; more examples than groups.
  const std::vector<Shape> large = {{2, 67, 1205, true, 0.25, 0.2},
                                    {2, 37, 1205, false, 0.25, 0.2},
                                    {1, 2, 9001, false, 0.5, 1},
                                    {35, 5, 3, true, 0.1, 1}};
  if (kRacesOnly) {
    for (const Shape& s : large) test_shape<float>(s, {Placement::kHeap}, {2, 5});
    return;
  }
  each_dtype([&](auto type) {
    using T = decltype(type);
    for (bool last : {false, true}) {
      for (double share : {0.0, 0.2}) {
        test_shape<T>({1, 1, 1, last, share, 1}, kEveryPlacement, {1, 2});
        test_shape<T>({3, 5, 7, last, share, 0.2}, kEveryPlacement, {2, -3});
        test_shape<T>({2, 33, 16, last, share, 0}, kEveryPlacement, {2});
        test_shape<T>({2, 17, 69, last, share, 1}, kEveryPlacement, {3});
      }
    }
    for (const Shape& s : large) test_shape<T>(s, {Placement::kGuarded}, {2, 5, -3});
  });
}

}  // namespace testing
}  // namespace gankern
