// The kernels of self-attention against the formulas with whole tables, in double.
#include "../self_attention2d.h"

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

using Doubles = std::vector<double>;

struct Shape {
  int64_t samples, dims, values, queries, keys;
};

enum Nulls { kNone, kQueriesNull, kKeysNull };  // whose gradient of the gradient is zero, and not given

template <class T>
struct Inputs {
  Shape shape;
  Nulls nulls;
  std::vector<T> q, kv, grad, h_q, h_kv;

  Inputs(const Shape& s, Nulls n) : shape(s), nulls(n) {
    const int64_t of_q = s.samples * s.dims * s.queries, of_kv = s.samples * (s.dims + s.values) * s.keys;
    const double reach = 3 / std::sqrt(double(s.dims));
    q = random_values<T>(of_q, 100, -reach, reach);
    kv = random_values<T>(of_kv, 101, -1, 1.5);
    grad = random_values<T>(s.samples * s.values * s.queries, 102, -1, 1.5);
    h_q = random_values<T>(of_q, 103, -1, 1.5);
    h_kv = random_values<T>(of_kv, 104, -1, 1.5);
  }
};

// The memory that one call of each order gets.
template <class T>
struct Call {
  const Inputs<T>& inputs;
  Placement at;
  Buffer<T> q{inputs.q, at}, kv{inputs.kv, at}, grad{inputs.grad, at}, h_q{inputs.h_q, at},
      h_kv{inputs.h_kv, at};
  Buffer<T> o{grad.size(), at}, grad_q{q.size(), at}, grad_kv{kv.size(), at}, grad_grad{grad.size(), at},
      second_q{q.size(), at}, second_kv{kv.size(), at};
  Buffer<Acc<T>> stats{inputs.shape.samples * 2 * inputs.shape.queries, at};

  void run(const Orders<SelfAttention>& kernels, const Parallel& parallel) {
    const Shape& s = inputs.shape;
    SelfAttention in{};
    in.samples = s.samples, in.dims = s.dims, in.values = s.values, in.queries = s.queries, in.keys = s.keys;
    in.q = q.data(), in.kv = kv.data();
    in.out = o.data(), in.out_stats = stats.data();
    kernels.forward[kDtype<T>](in, parallel);
    in.o = o.data(), in.stats = stats.data(), in.grad = grad.data();
    in.out = nullptr, in.out_stats = nullptr, in.out_q = grad_q.data(), in.out_kv = grad_kv.data();
    kernels.backward[kDtype<T>](in, parallel);
    in.h_q = inputs.nulls == kQueriesNull ? nullptr : h_q.data();
    in.h_kv = inputs.nulls == kKeysNull ? nullptr : h_kv.data();
    in.out = grad_grad.data(), in.out_q = second_q.data(), in.out_kv = second_kv.data();
    kernels.double_backward[kDtype<T>](in, parallel);
  }
  bool inputs_unchanged() const {
    return inputs.shape.samples == 0 ||
           (q.same_bits(inputs.q) && kv.same_bits(inputs.kv) && grad.same_bits(inputs.grad) &&
            h_q.same_bits(inputs.h_q) && h_kv.same_bits(inputs.h_kv));
  }
  bool same(const Call& other) const {
    return o.same_bits(other.o) && stats.same_bits(other.stats) && grad_q.same_bits(other.grad_q) &&
           grad_kv.same_bits(other.grad_kv) && grad_grad.same_bits(other.grad_grad) &&
           second_q.same_bits(other.second_q) && second_kv.same_bits(other.second_kv);
  }
};

struct Expected {
  Doubles o, grad_q, grad_kv, grad_grad, second_q, second_kv;
};

template <class T>
Expected expect(const Inputs<T>& in) {
  const Shape& s = in.shape;
  const int64_t d = s.dims, e = s.values, n = s.queries, m = s.keys;
  const Doubles all_q = to_double(in.q), all_kv = to_double(in.kv), all_g = to_double(in.grad);
  Doubles all_h_q = to_double(in.h_q), all_h_kv = to_double(in.h_kv);
  if (in.nulls == kQueriesNull) std::fill(all_h_q.begin(), all_h_q.end(), 0.0);
  if (in.nulls == kKeysNull) std::fill(all_h_kv.begin(), all_h_kv.end(), 0.0);
  Expected r{Doubles(all_g.size()), Doubles(all_q.size()), Doubles(all_kv.size()),
             Doubles(all_g.size()), Doubles(all_q.size()), Doubles(all_kv.size())};
  const size_t row = size_t(m);
  Doubles p(row), b(row), x(row), y(row), w(row);
  for (int64_t sample = 0; sample < s.samples; ++sample) {
    const double *q = all_q.data() + sample * d * n, *h_q = all_h_q.data() + sample * d * n;
    const double *k = all_kv.data() + sample * (d + e) * m, *h_k = all_h_kv.data() + sample * (d + e) * m;
    const double *v = k + d * m, *h_v = h_k + d * m, *g = all_g.data() + sample * e * n;
    const auto at = [&](Doubles& to, int64_t channels) { return to.data() + sample * channels; };
    double *o = at(r.o, e * n), *gq = at(r.grad_q, d * n), *gk = at(r.grad_kv, (d + e) * m);
    double *gg = at(r.grad_grad, e * n), *sq = at(r.second_q, d * n), *sk = at(r.second_kv, (d + e) * m);
    for (int64_t i = 0; i < n; ++i) {
      const auto dot = [&](int64_t channels, const double* a, const double* c, int64_t j) {
        double sum = 0;
        for (int64_t l = 0; l < channels; ++l) sum += a[l * n + i] * c[l * m + j];
        return sum;
      };
      double most = -1e300, total = 0, mean = 0, a = 0, rest = 0;
      for (int64_t j = 0; j < m; ++j) most = std::max(most, p[size_t(j)] = dot(d, q, k, j));
      for (double& value : p) total += value = std::exp(value - most);
      for (int64_t j = 0; j < m; ++j) {
        const size_t t = size_t(j);
        p[t] /= total;
        b[t] = dot(e, g, v, j);
        mean += p[t] * b[t];
        x[t] = dot(d, h_q, k, j) + dot(d, q, h_k, j);
        a += p[t] * x[t];
        w[t] = dot(e, g, h_v, j);
      }
      for (size_t t = 0; t < row; ++t) {
        y[t] = x[t] * (b[t] - mean) - b[t] * a + w[t];
        rest += p[t] * y[t];
      }
      for (int64_t j = 0; j < m; ++j) {
        const size_t t = size_t(j);
        const double first = p[t] * (b[t] - mean), second = p[t] * (y[t] - rest), third = p[t] * (x[t] - a);
        for (int64_t l = 0; l < d; ++l) {
          gq[l * n + i] += first * k[l * m + j];
          gk[l * m + j] += first * q[l * n + i];
          sq[l * n + i] += second * k[l * m + j] + first * h_k[l * m + j];
          sk[l * m + j] += second * q[l * n + i] + first * h_q[l * n + i];
        }
        for (int64_t l = 0; l < e; ++l) {
          o[l * n + i] += p[t] * v[l * m + j];
          gk[(d + l) * m + j] += p[t] * g[l * n + i];
          gg[l * n + i] += third * v[l * m + j] + p[t] * h_v[l * m + j];
          sk[(d + l) * m + j] += third * g[l * n + i];
        }
      }
    }
  }
  return r;
}

template <class T>
void compare(const Call<T>& call, const Expected& expected, const char* what) {
  const Shape& s = call.inputs.shape;
  // The rounding of the result, and what sums and scores lose: scores are of up to 3 sqrt(dims) or so, and the second
  // order has products of three of its sums.
  const double length = std::sqrt(double(std::max(s.queries, s.keys) + s.dims + s.values));
  const auto near = [&](const Buffer<T>& ours, const Doubles& exact, double factor, const char* name) {
    const double allowed =
        kEps<T> * largest(exact) + factor * length * kEps<Acc<T>> * std::max(1.0, largest(exact));
    const double error = largest_error(ours, exact);
    check(error <= allowed, "%s of %s: error %g, allowed %g", name, what, error, allowed);
  };
  // The gradients read o, which is a result of dtype T, but where b is computed anew.
  near(call.o, expected.o, 8, "o");
  near(call.grad_q, expected.grad_q, 16, "grad_q");
  near(call.grad_kv, expected.grad_kv, 16, "grad_kv");
  near(call.grad_grad, expected.grad_grad, 16, "grad_grad");
  near(call.second_q, expected.second_q, 32, "second grad_q");
  near(call.second_kv, expected.second_kv, 32, "second grad_kv");
}

// Every instruction set, placement and number of threads on one problem.
template <class T>
void test_problem(const Shape& shape, Nulls nulls, const Placements& placements,
                  const std::vector<int>& counts) {
  const Inputs<T> inputs(shape, nulls);
  const Expected expected = expect(inputs);
  const std::string what =
      text("%s, %lld samples, %lld + %lld channels, %lld queries, %lld keys, nulls %d", dtype_name<T>(),
           (long long)shape.samples, (long long)shape.dims, (long long)shape.values, (long long)shape.queries,
           (long long)shape.keys, int(nulls));
  test_every_way<Call<T>>(GANKERN_TEST_TABLES(self_attention2d), inputs, what, placements, counts,
                          [&](const Call<T>& call, const char* of) { compare(call, expected, of); });
}

}  // namespace

GANKERN_TEST(self_attention2d) {
  // Several parts of a sample, and more samples than parts.
  const std::vector<Shape> shared = {{1, 3, 5, 1100, 70}, {18, 8, 32, 130, 33}};
  if (kRacesOnly) {
    for (const Shape& shape : shared) test_problem<float>(shape, kNone, {Placement::kHeap}, {2, 5});
    return;
  }
  each_dtype([&](auto type) {
    using T = decltype(type);
    for (Nulls nulls : {kNone, kQueriesNull, kKeysNull})
      for (const Shape& shape : std::vector<Shape>{
               {0, 2, 3, 8, 2}, {1, 1, 1, 1, 1}, {2, 2, 8, 35, 12}, {1, 9, 17, 65, 37}, {3, 16, 70, 24, 64}})
        test_problem<T>(shape, nulls, kEveryPlacement, {3});
  });
  for (const Shape& shape : shared) test_problem<float>(shape, kNone, {Placement::kGuarded}, {2, -3});
}

}  // namespace testing
}  // namespace gankern
