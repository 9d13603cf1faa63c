// The kernels of spectral norm against the definition, in double.
#include "../spectral_norm.h"

#include <deque>

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

using Doubles = std::vector<double>;

struct Shape {
  int64_t outer, rows, inner;
  int64_t columns() const { return outer * inner; }
  int64_t elements() const { return columns() * rows; }
};

// The definition: M[row, (outer, inner)], a weight that lies in memory as [outer, rows, inner].
struct Exact {
  Shape shape;
  Doubles u, v, normalized;
  double sigma;

  double product(const Doubles& m, const Doubles& x, const Doubles& y) const {
    double total = 0;
    each(shape,
         [&](int64_t e, int64_t i, int64_t j) { total += m[size_t(e)] * x[size_t(i)] * y[size_t(j)]; });
    return total;
  }
  double inverse() const {
    return sigma == 0 ? 0 : 1 / sigma;
  }  // negative where u and v point away from each other

  // f(element, row, column), in the order of memory.
  template <class F>
  static void each(const Shape& shape, const F& f) {
    int64_t e = 0;
    for (int64_t a = 0; a < shape.outer; ++a)
      for (int64_t i = 0; i < shape.rows; ++i)
        for (int64_t b = 0; b < shape.inner; ++b) f(e++, i, a * shape.inner + b);
  }
};

Exact exact_forward(const Shape& shape, const Doubles& m, Doubles u, Doubles v,
                    const SpectralNormOptions& options) {
  const auto normalize = [&](Doubles& x) {
    double squares = 0;
    for (double y : x) squares += y * y;
    const double norm = std::sqrt(squares);
    const double denominator = options.add_eps ? norm + options.eps : std::max(norm, options.eps);
    for (double& y : x) y /= denominator;
  };
  const auto update_u = [&] {
    std::fill(u.begin(), u.end(), 0.0);
    Exact::each(shape, [&](int64_t e, int64_t i, int64_t j) { u[size_t(i)] += m[size_t(e)] * v[size_t(j)]; });
    normalize(u);
  };
  const auto update_v = [&] {
    std::fill(v.begin(), v.end(), 0.0);
    Exact::each(shape, [&](int64_t e, int64_t i, int64_t j) { v[size_t(j)] += m[size_t(e)] * u[size_t(i)]; });
    normalize(v);
  };
  for (int64_t n = 0; n < options.n_power_iterations; ++n) {
    if (options.u_first) {
      update_u();
      update_v();
    } else {
      update_v();
      update_u();
    }
  }
  Exact exact{shape, u, v, m, 0};
  exact.sigma = exact.product(m, u, v);
  for (double& x : exact.normalized) x *= exact.inverse();
  return exact;
}

// ---- one layer of a group -------------------------------------------------------------------------------

template <class T>
struct Inputs {
  using A = Acc<T>;
  Shape shape;
  std::vector<T> weight, grad, grad_grad_weight;
  std::vector<A> u, v;

  Inputs(const Shape& s, uint64_t seed, bool zeros) : shape(s) {
    // Of one sign mostly: sigma is then well away from zero, and errors can be told from cancellation.
    weight = random_values<T>(s.elements(), seed, zeros ? 0 : -0.25, zeros ? 0 : 0.75);
    grad = random_values<T>(s.elements(), seed + 1, -1, 1.5);
    grad_grad_weight = random_values<T>(s.elements(), seed + 2, -1, 1.5);
    u = random_values<A>(s.rows, seed + 3, 0.5, 1);
    v = random_values<A>(s.columns(), seed + 4, 0.5, 1);
    for (A& x : u) x /= A(std::sqrt(double(s.rows)));
    for (A& x : v) x /= A(std::sqrt(double(s.columns())));
  }
};

// The memory that one call on a layer gets.
template <class T>
struct Layer {
  using A = Acc<T>;
  const Inputs<T>& inputs;
  Placement at;
  Buffer<T> weight{inputs.weight, at}, grad{inputs.grad, at}, grad_grad_weight{inputs.grad_grad_weight, at};
  Buffer<A> u{inputs.u, at}, v{inputs.v, at};
  Buffer<T> normalized{inputs.shape.elements(), at}, grad_weight{inputs.shape.elements(), at},
      grad_grad{inputs.shape.elements(), at}, second_grad_weight{inputs.shape.elements(), at};
  Buffer<A> new_u{inputs.shape.rows, at}, new_v{inputs.shape.columns(), at}, sigma{1, at};

  SpectralNormLayer pointers(const Buffer<A>& left, const Buffer<A>& right) const {
    return {inputs.shape.outer, inputs.shape.rows, inputs.shape.inner,
            weight.data(),      left.data(),       right.data()};
  }
  bool inputs_unchanged() const {
    return weight.same_bits(inputs.weight) && grad.same_bits(inputs.grad) &&
           grad_grad_weight.same_bits(inputs.grad_grad_weight) && u.same_bits(inputs.u) &&
           v.same_bits(inputs.v);
  }
  bool same_results(const Layer& other) const {
    return normalized.same_bits(other.normalized) && new_u.same_bits(other.new_u) &&
           new_v.same_bits(other.new_v) && sigma.same_bits(other.sigma) &&
           grad_weight.same_bits(other.grad_weight) && grad_grad.same_bits(other.grad_grad) &&
           second_grad_weight.same_bits(other.second_grad_weight);
  }
};

// A deque, since layers hold references and do not move.
template <class T>
using Layers = std::deque<Layer<T>>;

// Forward, backward and double backward of a group.
template <class T>
void run(const SpectralNormKernels& kernels, Layers<T>& layers, const SpectralNormOptions& options,
         const Parallel& parallel) {
  std::vector<SpectralNormForward> forward;
  std::vector<SpectralNormBackward> backward;
  std::vector<SpectralNormDoubleBackward> second;
  for (Layer<T>& l : layers) {
    const SpectralNormLayer after = l.pointers(l.new_u, l.new_v);
    forward.push_back(
        {l.pointers(l.u, l.v), l.normalized.data(), l.new_u.data(), l.new_v.data(), l.sigma.data()});
    backward.push_back({after, l.sigma.data(), l.grad.data(), l.grad_weight.data()});
    second.push_back({after, l.sigma.data(), l.grad.data(), l.grad_grad_weight.data(), l.grad_grad.data(),
                      l.second_grad_weight.data()});
  }
  const int64_t count = int64_t(layers.size());
  kernels.forward[kDtype<T>](forward.data(), count, options, parallel);
  kernels.backward[kDtype<T>](backward.data(), count, parallel);
  kernels.double_backward[kDtype<T>](second.data(), count, parallel);
}

// ---- comparison with the definition ---------------------------------------------------------------------

struct Expected {
  Exact forward;
  Doubles grad_weight, grad_grad, second_grad_weight;
  // What the results are sums of: errors are relative to these, since the sum itself may cancel.
  double grad_weight_scale, grad_grad_scale, second_scale;
};

template <class T>
Expected expect(const Inputs<T>& in, const SpectralNormOptions& options) {
  const Doubles w = to_double(in.weight), g = to_double(in.grad), h = to_double(in.grad_grad_weight);
  Expected x{exact_forward(in.shape, w, to_double(in.u), to_double(in.v), options), g, g, g, 0, 0, 0};
  const Exact& f = x.forward;
  const double inverse = f.inverse(), q = f.product(h, f.u, f.v);
  double gw = 0, hg = 0;
  for (size_t e = 0; e < w.size(); ++e) {
    gw += g[e] * w[e];
    hg += h[e] * g[e];
  }
  const double first = gw * inverse * inverse, minus_q = -q * inverse * inverse;
  const double outer = 2 * q * gw * inverse * inverse * inverse - hg * inverse * inverse;
  const double uv = largest(f.u) * largest(f.v);
  Exact::each(in.shape, [&](int64_t at, int64_t i, int64_t j) {
    const size_t e = size_t(at);
    const double uv_e = f.u[size_t(i)] * f.v[size_t(j)];
    x.grad_weight[e] = g[e] * inverse - first * uv_e;
    x.grad_grad[e] = h[e] * inverse + minus_q * w[e];
    x.second_grad_weight[e] = minus_q * g[e] + outer * uv_e;
  });
  x.grad_weight_scale = largest(g) * std::fabs(inverse) + std::fabs(first) * uv;
  x.grad_grad_scale = largest(h) * std::fabs(inverse) + std::fabs(minus_q) * largest(w);
  x.second_scale =
      std::fabs(minus_q) * largest(g) +
      (std::fabs(2 * q * gw * inverse * inverse * inverse) + std::fabs(hg * inverse * inverse)) * uv;
  return x;
}

template <class T>
void compare(const Layer<T>& layer, const Expected& expected, const char* what) {
  const Shape& s = layer.inputs.shape;
  // Half a unit for the rounding of the result, and the sums' own rounding, which grows slower than the
  // square root of their length.
  const double sums = 4 * kEps<Acc<T>> * std::sqrt(double(s.elements()));
  const auto near = [&](const auto& ours, const Doubles& exact, double scale, double rounding,
                        const char* name) {
    const double error = largest_error(ours, exact), allowed = scale * (rounding + sums);
    check(error <= allowed, "%s of %s [%lld, %lld, %lld]: error %g, allowed %g", name, what,
          (long long)s.outer, (long long)s.rows, (long long)s.inner, error, allowed);
  };
  const Exact& f = expected.forward;
  const double own = kEps<T>, acc = kEps<Acc<T>>;
  near(layer.sigma, {f.sigma}, std::fabs(f.sigma), acc, "sigma");
  near(layer.new_u, f.u, largest(f.u), acc, "u");
  near(layer.new_v, f.v, largest(f.v), acc, "v");
  near(layer.normalized, f.normalized, largest(f.normalized), own, "normalized");
  near(layer.grad_weight, expected.grad_weight, expected.grad_weight_scale, own, "grad_weight");
  near(layer.grad_grad, expected.grad_grad, expected.grad_grad_scale, own, "grad_grad");
  near(layer.second_grad_weight, expected.second_grad_weight, expected.second_scale, own,
       "second grad_weight");
}

// ---- the groups -----------------------------------------------------------------------------------------

// Every instruction set, placement and number of threads on one group; all must agree bit by bit.
template <class T>
void test_group(const std::vector<Shape>& shapes, const std::vector<SpectralNormOptions>& all_options,
                const Placements& placements, const std::vector<int>& thread_counts, bool with_zeros) {
  std::deque<Inputs<T>> inputs;
  for (size_t i = 0; i < shapes.size(); ++i)
    inputs.emplace_back(shapes[i], 10 * i, with_zeros && i + 1 == shapes.size());
  const auto allocate = [&](Placement placement) {
    Layers<T> layers;
    for (const Inputs<T>& in : inputs) layers.push_back({in, placement});
    return layers;
  };

  for (const SpectralNormOptions& options : all_options) {
    std::vector<Expected> expected;
    for (const Inputs<T>& in : inputs) expected.push_back(expect(in, options));
    for (const auto& [isa, kernels] : GANKERN_TEST_TABLES(spectral_norm)) {
      Layers<T> first = allocate(Placement::kHeap);
      run(kernels, first, options, threads(1));
      char what[128];
      std::snprintf(what, sizeof what, "%s, %s, %lld iterations, %s first", isa, dtype_name<T>(),
                    (long long)options.n_power_iterations, options.u_first ? "u" : "v");
      for (size_t i = 0; i < first.size(); ++i) compare(first[i], expected[i], what);

      for (Placement placement : placements) {
        for (int count : thread_counts) {
          // Negative: so many threads promised, and one given.
          Layers<T> layers = allocate(placement);
          run(kernels, layers, options, count < 0 ? one_after_the_other(-count) : threads(count));
          for (size_t i = 0; i < layers.size(); ++i) {
            check(layers[i].same_results(first[i]), "%s: layer %zu differs with %d threads, %s memory", what,
                  i, count, placement_name(placement));
            check(layers[i].inputs_unchanged(), "%s: inputs of layer %zu were written to", what, i);
          }
        }
      }
    }
  }
}

}  // namespace

GANKERN_TEST(spectral_norm) {
  const double eps = 1e-12;
  // 1 x 1, rows and columns alone, odd sizes, an inner dimension shorter than a vector, inner 1 (transposed).
  const std::vector<Shape> small = {{1, 1, 1},  {1, 1, 37}, {1, 23, 1}, {37, 1, 1}, {1, 7, 13},   {5, 3, 1},
                                    {1, 8, 64}, {9, 4, 2},  {17, 9, 3}, {3, 5, 67}, {1, 33, 259}, {4, 6, 16}};
  const std::vector<SpectralNormOptions> all_options = {
      {0, eps, true, false}, {1, eps, true, false},  {1, eps, false, true},
      {3, eps, true, true},  {3, eps, false, false},
  };
  // Beyond a megabyte in every dtype, so that threads share a layer: rows, outers and vectors of columns to
  // cut, and none to cut at all. Small ones among them, which one thread takes through all stages.
  const std::vector<Shape> large = {{1, 521, 1031}, {4, 5, 3},      {601, 9, 101},
                                    {1031, 521, 1}, {1, 1, 540001}, {1, 7, 13}};
  const std::vector<SpectralNormOptions> both_orders = {{1, eps, true, false}, {1, eps, false, false}};
  if (kRacesOnly) {
    test_group<float>(large, both_orders, {Placement::kHeap}, {2, 5}, false);
    test_group<float>({large[0]}, {{0, eps, true, false}, {3, eps, true, false}}, {Placement::kHeap}, {3},
                      false);
    return;
  }
  each_dtype([&](auto type) {
    using T = decltype(type);
    test_group<T>(small, all_options, kEveryPlacement, {3}, true);
    test_group<T>(large, {both_orders[kDtype<T> % 2]}, {Placement::kShifted}, {5}, false);
  });
  test_group<float>(large, {{0, eps, true, false}, {3, eps, false, false}}, {Placement::kGuarded}, {2, -3},
                    false);
  // No layers at all, and results so large that they are written past the caches.
  test_group<float>({}, all_options, {Placement::kHeap}, {2}, false);
  test_group<float>({{1, 1021, 6301}}, {{1, eps, true, false}}, {Placement::kShifted}, {3}, false);
  test_group<double>({{1, 509, 6301}}, {{1, eps, true, false}}, {Placement::kShifted}, {3}, false);
}

}  // namespace testing
}  // namespace gankern
