// The kernels of bias, leaky ReLU and pixel norm against the formulas, in double.
#include "../pixel_norm.h"

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

using Doubles = std::vector<double>;

constexpr double kEpsilon = 0.01, kPositive = -1.5;

struct Problem {
  Layout layout;
  double negative;  // the other slope
  bool sparse;      // every argument that may be null is
  int64_t pixels() const { return layout.outer * layout.inner; }
  int64_t channel(int64_t e) const { return e / layout.inner % layout.channels; }
  int64_t pixel(int64_t e) const {
    return e / (layout.inner * layout.channels) * layout.inner + e % layout.inner;
  }
};

// Of tensors, and of pixels.
enum Result { kY, kGradX, kGradGrad, kGradY, kTensors };
enum OfPixels { kScale, kGradScale, kPixels };

template <class T>
struct Inputs {
  using A = Acc<T>;
  Problem problem;
  std::vector<T> x = random_values<T>(problem.layout.size(), 1, -2, 3), y = x,
                 grad = random_values<T>(problem.layout.size(), 2, -1, 1.5),
                 h = random_values<T>(problem.layout.size(), 3, -1, 1.5),
                 bias = random_values<T>(problem.layout.channels, 4, -1, 1),
                 h_bias = random_values<T>(problem.layout.channels, 5, -1, 1);
  std::vector<A> scale = std::vector<A>(size_t(problem.pixels())),
                 grad_scale = random_values<A>(problem.pixels(), 6, -1, 1);
  Doubles tensors[kTensors], pixels[kPixels], grad_bias = Doubles(bias.size()), magnitude = grad_bias;

  explicit Inputs(const Problem& p) : problem(p) {
    for (Doubles& v : tensors) v.resize(x.size());
    for (Doubles& v : pixels) v.resize(scale.size());
    const double channels = double(p.layout.channels);
    const auto wide = [](auto v) { return double(baseline::widen(v)); };
    const auto each = [&](auto f) {
      for (size_t e = 0; e < x.size(); ++e) f(e, size_t(p.channel(int64_t(e))), size_t(p.pixel(int64_t(e))));
    };
    Doubles square(scale.size()), gy(scale.size()), py(scale.size()), pg(scale.size()), a(x.size());
    each([&](size_t e, size_t c, size_t i) {
      const double z = wide(x[e]) + (p.sparse ? 0 : wide(bias[c]));
      a[e] = z > 0 ? kPositive * z : p.negative * z;
      square[i] += a[e] * a[e] / channels;
    });
    for (size_t i = 0; i < scale.size(); ++i) {
      pixels[kScale][i] = 1 / std::sqrt(square[i] + kEpsilon);
      scale[i] = A(pixels[kScale][i]);
    }
    // From the results on, these are inputs: as rounded.
    const auto slope = [&](size_t e, double v) {
      return wide(y[e]) * kPositive > 0 ? kPositive * v : p.negative * v;
    };
    const auto through = [&](size_t e, size_t c) {
      return slope(e, wide(h[e]) + (p.sparse ? 0 : wide(h_bias[c])));
    };
    each([&](size_t e, size_t c, size_t i) {
      tensors[kY][e] = a[e] * pixels[kScale][i];
      y[e] = baseline::narrow<T>(A(tensors[kY][e]));
      gy[i] += wide(grad[e]) * wide(y[e]) / channels;
      py[i] += through(e, c) * wide(y[e]) / channels;
      pg[i] += through(e, c) * wide(grad[e]) / channels;
    });
    each([&](size_t e, size_t c, size_t i) {
      const double r = double(scale[i]), q = gy[i] + (p.sparse ? 0 : r * double(grad_scale[i]) / channels);
      tensors[kGradX][e] = slope(e, r * (wide(grad[e]) - wide(y[e]) * q));
      tensors[kGradGrad][e] = r * (through(e, c) - wide(y[e]) * py[i]);
      tensors[kGradY][e] = -r * (gy[i] * through(e, c) + py[i] * wide(grad[e]));
      pixels[kGradScale][i] = channels * (pg[i] - py[i] * gy[i]);
      grad_bias[c] += tensors[kGradX][e];
      magnitude[c] += std::fabs(tensors[kGradX][e]);
    });
  }
};

template <class T>
struct Call {
  using A = Acc<T>;
  const Inputs<T>& in;
  Placement at;
  Buffer<T> x{in.x, at}, y{in.y, at}, grad{in.grad, at}, h{in.h, at}, bias{in.bias, at},
      h_bias{in.h_bias, at}, grad_bias{bias.size(), at};
  Buffer<A> scale{in.scale, at}, grad_scale{in.grad_scale, at};
  std::vector<Buffer<T>> tensors = buffers<T>(kTensors, x.size(), at);
  std::vector<Buffer<A>> pixels = buffers<A>(kPixels, scale.size(), at);

  void run(const Orders<PixelNorm>& kernels, const Parallel& parallel) {
    const Problem& p = in.problem;
    PixelNorm n{};
    n.layout = p.layout, n.positive = kPositive, n.negative = p.negative, n.eps = kEpsilon;
    n.x = x.data(), n.bias = p.sparse ? nullptr : bias.data();
    n.out = tensors[kY].data(), n.scale = pixels[kScale].data();
    kernels.forward[kDtype<T>](n, parallel);
    n.x = y.data(), n.scale = scale.data(), n.grad = grad.data();
    n.grad_scale = p.sparse ? nullptr : grad_scale.data();
    n.out = tensors[kGradX].data(), n.out_bias = p.sparse ? nullptr : grad_bias.data();
    kernels.backward[kDtype<T>](n, parallel);
    n.h = h.data(), n.h_bias = p.sparse ? nullptr : h_bias.data(), n.out_bias = nullptr;
    n.out = tensors[kGradGrad].data(), n.out_x = tensors[kGradY].data(),
    n.out_scale = pixels[kGradScale].data();
    kernels.double_backward[kDtype<T>](n, parallel);
  }
  bool same(const Call& other) const {
    return all_same(tensors, other.tensors) && all_same(pixels, other.pixels) &&
           grad_bias.same_bits(other.grad_bias);
  }
  bool inputs_unchanged() const {
    return in.x.empty() || (x.same_bits(in.x) && y.same_bits(in.y) && grad.same_bits(in.grad) &&
                            h.same_bits(in.h) && bias.same_bits(in.bias) && h_bias.same_bits(in.h_bias) &&
                            scale.same_bits(in.scale) && grad_scale.same_bits(in.grad_scale));
  }
};

template <class T>
void compare(const Call<T>& call, const char* what) {
  const Inputs<T>& in = call.in;
  const double channels = double(in.problem.layout.channels);
  const double inside = (64 + 4 * std::sqrt(channels)) * kEps<Acc<T>>;
  const auto near = [&](const auto& ours, const Doubles& exact, double allowed, const char* name) {
    const double error = largest_error(ours, exact);
    check(error <= allowed, "%s of %s: error %g, allowed %g", name, what, error, allowed);
  };
  constexpr const char* names[] = {"y", "grad_x", "grad_grad", "grad_y"};
  // Where a pixel is all but zero its gradients are large, and differences of what is larger.
  const double scale = std::max(1.0, largest(in.pixels[kScale]));
  for (int k = 0; k < kTensors; ++k)
    near(call.tensors[size_t(k)], in.tensors[k],
         kEps<T> * std::max(1.0, largest(in.tensors[k])) + inside * 8 * scale * scale, names[k]);
  near(call.pixels[kScale], in.pixels[kScale], inside * scale, "scale");
  near(call.pixels[kGradScale], in.pixels[kGradScale], inside * 8 * channels * scale, "grad_scale");
  if (!in.problem.sparse)
    near(call.grad_bias, in.grad_bias,
         kEps<T> * std::max(1.0, largest(in.grad_bias)) +
             inside * (8 * scale * scale + 4 * largest(in.magnitude)),
         "grad_bias");
}

// Every instruction set, placement and number of threads on one problem.
template <class T>
void test_problem(const Problem& problem, const Placements& placements, const std::vector<int>& counts) {
  const Inputs<T> inputs(problem);
  const Layout& l = problem.layout;
  const std::string what =
      text("%s, slope %g, [%lld, %lld, %lld]%s", dtype_name<T>(), problem.negative, (long long)l.outer,
           (long long)l.channels, (long long)l.inner, problem.sparse ? ", sparse" : "");
  test_every_way<Call<T>>(GANKERN_TEST_TABLES(pixel_norm), inputs, what, placements, counts, compare<T>);
}

}  // namespace

GANKERN_TEST(pixel_norm) {
  // Work for several threads: lines, tiles of several outer indices, tiles of one.
  const std::vector<Layout> shared = {{700, 130, 1}, {64, 70, 17}, {1, 33, 5001}, {2, 9001, 20}};
  if (kRacesOnly) {
    for (const Layout& layout : shared)
      test_problem<float>({layout, -0.3, false}, {Placement::kHeap}, {2, 5});
    return;
  }
  each_dtype([&](auto type) {
    using T = decltype(type);
    for (double negative : {-0.3, 0.0})
      for (bool sparse : {false, true})
        for (const Layout& layout : std::vector<Layout>{{0, 3, 4},
                                                        {1, 1, 1},
                                                        {3, 5, 1},
                                                        {2, 40, 1},
                                                        {2, 3, 7},
                                                        {3, 17, 16},
                                                        {2, 5, 67},
                                                        {1, 130, 530}})
          test_problem<T>({layout, negative, sparse}, kEveryPlacement, {3});
  });
  for (const Layout& layout : shared)
    test_problem<float>({layout, -0.3, false}, {Placement::kShifted, Placement::kGuarded}, {2, -3});
  // Results that go past the caches: aligned, and not.
  for (const Layout& layout : std::vector<Layout>{{65600, 64, 1}, {2, 48, 44800}, {65600, 65, 1}})
    test_problem<float>({layout, -0.3, false}, {Placement::kGuarded}, {2});
}

}  // namespace testing
}  // namespace gankern
