// The kernels of minibatch standard deviation against a loop over all positions, in double.
#include "../minibatch_stddev.h"

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

using Doubles = std::vector<double>;

struct Shape {
  int64_t groups, group_size, rows, features, width, extent;
  bool strided;
  int64_t samples() const { return groups * group_size; }
  int64_t x_row() const { return features * width; }
  int64_t out_row() const { return features * (width + extent); }
  int64_t x_size() const { return samples() * rows * x_row(); }
  int64_t out_size() const { return samples() * rows * out_row(); }
  int64_t sample(int64_t m, int64_t i) const { return strided ? i * groups + m : m * group_size + i; }
};

constexpr double kEpsilon = 0.01;

struct Expected {
  Doubles forward, backward, grad_grad, second;
};

Expected expect(const Shape& s, const Doubles& x, const Doubles& g, const Doubles& h) {
  Expected r{Doubles(size_t(s.out_size())), Doubles(x.size()), Doubles(size_t(s.out_size())),
             Doubles(x.size())};
  const double G = double(s.group_size), positions = double(s.rows * s.width);
  for (int64_t m = 0; m < s.groups; ++m) {
    for (int64_t f = 0; f < s.features; ++f) {
      double k = 0, mean_sigma = 0, mean_q = 0;
      const auto result = [&](int64_t i, int64_t row, int64_t e) {
        return size_t((s.sample(m, i) * s.rows + row) * s.out_row() + s.x_row() + f * s.extent + e);
      };
      const auto each_result = [&](const auto& body) {
        for (int64_t i = 0; i < s.group_size; ++i)
          for (int64_t row = 0; row < s.rows; ++row)
            for (int64_t e = 0; e < s.extent; ++e) body(result(i, row, e));
      };
      each_result([&](size_t at) { k += g[at] / positions; });
      for (int64_t row = 0; row < s.rows; ++row) {
        for (int64_t w = 0; w < s.width; ++w) {
          const auto x_at = [&](int64_t i) {
            return size_t((s.sample(m, i) * s.rows + row) * s.x_row() + f * s.width + w);
          };
          const auto out_at = [&](int64_t i) {
            return size_t((s.sample(m, i) * s.rows + row) * s.out_row() + f * s.width + w);
          };
          double mean = 0, mean_h = 0, variance = 0, q = 0;
          for (int64_t i = 0; i < s.group_size; ++i) {
            mean += x[x_at(i)] / G;
            mean_h += h[x_at(i)] / G;
          }
          for (int64_t i = 0; i < s.group_size; ++i) {
            const double d = x[x_at(i)] - mean;
            variance += d * d / G;
            q += h[x_at(i)] * d;
          }
          const double sigma = std::sqrt(variance + kEpsilon);
          mean_sigma += sigma / positions;
          mean_q += q / (G * sigma) / positions;
          for (int64_t i = 0; i < s.group_size; ++i) {
            const double d = x[x_at(i)] - mean;
            r.forward[out_at(i)] = x[x_at(i)];
            r.grad_grad[out_at(i)] = h[x_at(i)];
            r.backward[x_at(i)] = g[out_at(i)] + k * d / (G * sigma);
            r.second[x_at(i)] = k / (G * sigma) * (h[x_at(i)] - mean_h - d * q / (G * sigma * sigma));
          }
        }
      }
      each_result([&](size_t at) {
        r.forward[at] = mean_sigma;
        r.grad_grad[at] = mean_q;
      });
    }
  }
  return r;
}

template <class T>
struct Inputs {
  Shape shape;
  std::vector<T> x, g, h;
  explicit Inputs(const Shape& s)
      : shape(s),
        x(random_values<T>(s.x_size(), 1, -2, 2)),
        g(random_values<T>(s.out_size(), 3, -1, 1)),
        h(random_values<T>(s.x_size(), 2, -1, 1)) {}
};

template <class T>
struct Call {
  const Inputs<T>& given;
  Placement at;
  Buffer<T> x{given.x, at}, g{given.g, at}, h{given.h, at}, forward{given.shape.out_size(), at},
      backward{given.shape.x_size(), at}, grad_grad{given.shape.out_size(), at},
      second{given.shape.x_size(), at};
  void run(const Orders<MinibatchStddev>& kernels, const Parallel& parallel) {
    const Shape& s = given.shape;
    MinibatchStddev in{s.groups, s.group_size, s.strided, s.rows,  s.features, s.width, s.extent,
                       false,    kEpsilon,     x.data(),  nullptr, nullptr,    nullptr, nullptr};
    in.out = forward.data();
    kernels.forward[kDtype<T>](in, parallel);
    in.out = nullptr, in.grad = g.data(), in.out_x = backward.data();
    kernels.backward[kDtype<T>](in, parallel);
    in.grad_x = h.data(), in.out = grad_grad.data(), in.out_x = second.data();
    kernels.double_backward[kDtype<T>](in, parallel);
  }
  bool same(const Call& o) const {
    return forward.same_bits(o.forward) && backward.same_bits(o.backward) &&
           grad_grad.same_bits(o.grad_grad) && second.same_bits(o.second);
  }
  bool inputs_unchanged() const {
    return x.same_bits(given.x) && g.same_bits(given.g) && h.same_bits(given.h);
  }
};

template <class T>
void test_shape(const Shape& s, const Placements& placements, const std::vector<int>& counts) {
  const Inputs<T> inputs(s);
  const Expected expected = expect(s, to_double(inputs.x), to_double(inputs.g), to_double(inputs.h));
  const auto compare = [&](const Call<T>& call, const char* what) {
    const auto near = [&](const Buffer<T>& ours, const Doubles& exact, const char* name) {
      const double allowed = (kEps<T> + 256 * kEps<Acc<T>>)*(largest(exact) + 1);
      const double error = largest_error(ours, exact);
      check(error <= allowed, "%s of %s: error %g, allowed %g", name, what, error, allowed);
    };
    near(call.forward, expected.forward, "result");
    near(call.backward, expected.backward, "grad_x");
    near(call.grad_grad, expected.grad_grad, "grad_grad");
    near(call.second, expected.second, "second grad_x");
  };
  const std::string what = text("%s, %lld groups of %lld, [%lld, %lld, %lld + %lld]", dtype_name<T>(),
                                (long long)s.groups, (long long)s.group_size, (long long)s.rows,
                                (long long)s.features, (long long)s.width, (long long)s.extent);
  test_every_way<Call<T>>(GANKERN_TEST_TABLES(minibatch_stddev), inputs, what, placements, counts, compare);
}

}  // namespace

GANKERN_TEST(minibatch_stddev) {
  // The last ones have groups of several chunks, of positions and of rows.
  const Shape large = {2, 3, 1, 2, 12001, 5, true}, tall = {1, 4, 301, 1, 65, 1, false};
  if (kRacesOnly) {
    test_shape<float>(large, {Placement::kHeap}, {2, 5});
    test_shape<float>(tall, {Placement::kHeap}, {2, 5});
    return;
  }
  each_dtype([&](auto type) {
    using T = decltype(type);
    for (bool strided : {true, false}) {
      test_shape<T>({1, 1, 1, 1, 1, 1, strided}, kEveryPlacement, {1, 2});
      test_shape<T>({3, 2, 1, 3, 7, 7, strided}, kEveryPlacement, {2, -3});
      test_shape<T>({2, 4, 1, 1, 133, 19, strided}, kEveryPlacement, {2, 3});
      test_shape<T>({2, 5, 13, 2, 35, 1, strided}, kEveryPlacement, {2, -3});
      test_shape<T>({1, 33, 5, 3, 1, 1, strided}, kEveryPlacement, {2});
    }
    test_shape<T>(large, {Placement::kShifted}, {2, 5, -3});
    test_shape<T>(tall, {Placement::kGuarded}, {2, 5, -3});
  });
}

}  // namespace testing
}  // namespace gankern
