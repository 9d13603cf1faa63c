// Runs the CUDA C++ kernels in emulate.h, without torch and without Python, so that the sanitizers see nothing
// else: every buffer ends where its data ends, and results are compared with plain loops in double.
#include <cmath>
#include <cstdio>
#include <random>
#include <string>
#include <vector>

#include "../../testing.h"
#include "../batch_norm_act.h"
#include "../common.h"
#include "../minibatch_discrimination.h"
#include "../spectral_norm.h"
#include "../upfirdn2d.h"

namespace gankern::cuda {
namespace {

using testing::check;

template <class T>
constexpr int kDtype = std::is_same_v<T, double>  ? 0
                       : std::is_same_v<T, float> ? 1
                                                  : 2;
template <class T>
constexpr double kUnit = 0x1p-23;
template <>
constexpr double kUnit<double> = 0x1p-52;
template <>
constexpr double kUnit<BFloat16> = 0x1p-7;

std::mt19937 generator;

template <class T>
std::vector<T> random(size_t count) {
  std::normal_distribution<double> normal;
  std::vector<T> x(count);
  for (T& value : x) narrow(Sum<T>(normal(generator)), &value);
  return x;
}

// Of sums of `length` terms of about `size`.
template <class T>
void compare(const char* what, const std::vector<T>& got, const std::vector<double>& right, double length) {
  double largest = 1e-30;
  for (double x : right) largest = std::max(largest, std::abs(x));
  for (size_t i = 0; i < right.size(); ++i)
    check(std::abs(double(widen(got[i])) - right[i]) <= 8 * kUnit<T> * largest * std::sqrt(length + 1),
          "%s [%zu of %zu]: %g, right is %g", what, i, right.size(), double(widen(got[i])), right[i]);
}

// ---- upfirdn2d ------------------------------------------------------------------------------------------

template <class T>
void resample(int up, int down, int taps, int height, int width, int group, int planes, bool separable) {
  const auto axis = [&](int in) {
    const int start = taps / 2;
    return ResampledAxis{in, (in * up + taps - 1 - taps) / down + 1, up, down, start, taps};
  };
  Upfirdn2d p{};
  p.rows = axis(height), p.columns = axis(width);
  p.planes = planes, p.planes_a_batch = 1;
  p.row_stride = int64_t(width) * group;
  p.batch_stride = p.row_stride * height;
  p.group = group;
  p.separable = separable;
  p.gain = 1.5;
  p.filter_dtype = 0;
  const auto x = random<T>(size_t(planes * height * width * group));
  const auto filter = random<double>(size_t(separable ? taps : taps * taps));
  std::vector<T> out(size_t(planes) * size_t(p.rows.out * p.columns.out * group));
  p.x = x.data(), p.filter = filter.data(), p.out = out.data();
  upfirdn2d(p, kDtype<T>, nullptr);
  std::vector<double> right(out.size());
  size_t at = 0;
  for (int n = 0; n < planes; ++n)
    for (int oy = 0; oy < p.rows.out; ++oy)
      for (int ox = 0; ox < p.columns.out; ++ox)
        for (int c = 0; c < group; ++c, ++at)
          for (int jy = 0; jy < taps; ++jy)
            for (int jx = 0; jx < taps; ++jx) {
              const int zy = oy * down + jy - p.rows.start, zx = ox * down + jx - p.columns.start;
              if (zy < 0 || zx < 0 || zy % up || zx % up || zy / up >= height || zx / up >= width) continue;
              const int ky = taps - 1 - jy, kx = taps - 1 - jx;
              const double weight =
                  separable ? filter[size_t(ky)] * filter[size_t(kx)] : filter[size_t(ky * taps + kx)];
              right[at] += p.gain * weight *
                           double(widen(x[size_t(((n * height + zy / up) * width + zx / up) * group + c)]));
            }
  compare("upfirdn2d", out, right, taps * taps);
}

// ---- batch normalisation --------------------------------------------------------------------------------

// All orders, with a leaky ReLU; the second one by differences of the first along h and the affine directions.
template <class T>
void normalize_batch(int samples, int channels, int plane, bool last) {
  using S = Sum<T>;
  const size_t size = size_t(samples * channels * plane), count = size_t(samples * plane);
  const auto x = random<T>(size), g = random<T>(size), h = random<T>(size);
  const auto weight = random<S>(size_t(channels)), bias = random<S>(weight.size());
  const auto h_weight = random<S>(weight.size()), h_bias = random<S>(weight.size());
  std::vector<T> y(size), grad_x(size), grad_grad(size), grad_of_x(size);
  std::vector<S> stats(3 * weight.size()), grad_weight(weight.size()), grad_bias(weight.size()),
      second_weight(weight.size());
  const double eps = 1e-5, slope = 0.2;
  BatchNorm in{};
  in.channels_last = last, in.samples = samples, in.channels = channels, in.plane = plane;
  in.eps = eps, in.negative_slope = slope;
  in.x = x.data(), in.grad = g.data(), in.h = h.data();
  in.weight = weight.data(), in.bias = bias.data();
  in.h_weight = h_weight.data(), in.h_bias = h_bias.data(), in.stats = stats.data();
  const auto run = [&](NormPass pass, void* out, void* out_x, void* of_weight, void* of_bias) {
    in.pass = pass, in.out = out, in.out_x = out_x, in.grad_weight = of_weight, in.grad_bias = of_bias;
    std::vector<double> scratch(size_t(batch_norm_act_scratch(in, kDtype<T>) + 7) / 8);
    batch_norm_act(in, kDtype<T>, scratch.data(), nullptr);
  };
  run(NormPass::kForward, y.data(), nullptr, nullptr, nullptr);
  run(NormPass::kBackward, grad_x.data(), nullptr, grad_weight.data(), grad_bias.data());
  run(NormPass::kDoubleBackward, grad_grad.data(), grad_of_x.data(), second_weight.data(), nullptr);

  std::vector<double> right_y(size), right_x(size), right_grad(size), right_of_x(size);
  std::vector<double> right_weight(weight.size()), right_bias(weight.size()), right_second(weight.size());
  for (int c = 0; c < channels; ++c) {
    std::vector<size_t> at;
    for (int n = 0; n < samples; ++n)
      for (int p = 0; p < plane; ++p)
        at.push_back(last ? size_t((n * plane + p) * channels + c) : size_t((n * channels + c) * plane + p));
    // Of values a, along their channel: gradients are linear in g, so that step * h in the place of x, weight and bias
    // tells all of the second order.
    const auto channel = [&](const auto& values) {
      std::vector<double> own;
      for (size_t k : at) own.push_back(double(widen(values[k])));
      return own;
    };
    const std::vector<double> own = channel(x), own_g = channel(g), own_h = channel(h);
    const auto normalized = [&](const std::vector<double>& a, double gamma, double beta,
                                double* r_of = nullptr) {
      double mean = 0, var = 0;
      for (double value : a) mean += value / double(count);
      for (double value : a) var += (value - mean) * (value - mean) / double(count);
      const double r = 1 / std::sqrt(var + eps);
      if (r_of) *r_of = r;
      std::vector<double> z;
      for (double value : a) z.push_back((value - mean) * r * gamma + beta);
      return z;
    };
    const double gamma = double(weight[size_t(c)]), beta = double(bias[size_t(c)]);
    const std::vector<double> z = normalized(own, gamma, beta);
    std::vector<double> gate;
    for (double value : z) gate.push_back(value > 0 ? 1 : slope);
    // The gradients of sum(g * gate * z) by a and gamma, with the gate as it is.
    const auto gradients = [&](const std::vector<double>& a, double scale, double* of_scale) {
      double r, mean_g = 0, mean_gx = 0;
      const std::vector<double> unit = normalized(a, 1, 0, &r);
      for (size_t k = 0; k < count; ++k) {
        mean_g += own_g[k] * gate[k] / double(count);
        mean_gx += own_g[k] * gate[k] * unit[k] / double(count);
      }
      *of_scale = mean_gx * double(count);
      std::vector<double> made;
      for (size_t k = 0; k < count; ++k)
        made.push_back(scale * r * (own_g[k] * gate[k] - mean_g - unit[k] * mean_gx));
      return made;
    };
    double of_scale;
    const std::vector<double> first = gradients(own, gamma, &of_scale);
    // Along h, h_weight and h_bias: of z, which grad is multiplied by, and of the first gradients.
    const double step = 1e-5;
    const auto moved = [&](double by) {
      std::vector<double> a = own;
      for (size_t k = 0; k < count; ++k) a[k] += by * own_h[k];
      return a;
    };
    const double direction = double(h_weight[size_t(c)]);
    const auto z_up =
        normalized(moved(step), gamma + step * direction, beta + step * double(h_bias[size_t(c)]));
    const auto z_down =
        normalized(moved(-step), gamma - step * direction, beta - step * double(h_bias[size_t(c)]));
    double up_scale, down_scale;
    const auto up = gradients(moved(step), gamma + step * direction, &up_scale);
    const auto down = gradients(moved(-step), gamma - step * direction, &down_scale);
    right_second[size_t(c)] = (up_scale - down_scale) / (2 * step);
    right_weight[size_t(c)] = of_scale;
    for (size_t k = 0; k < count; ++k) {
      right_bias[size_t(c)] += own_g[k] * gate[k];
      right_y[at[k]] = z[k] * gate[k];
      right_x[at[k]] = first[k];
      right_grad[at[k]] = gate[k] * (z_up[k] - z_down[k]) / (2 * step);
      right_of_x[at[k]] = (up[k] - down[k]) / (2 * step);
    }
  }
  // Differences are exact to some 1e-9.
  const double length = double(count), differences = std::is_same_v<T, double> ? 1e14 : length;
  compare("batch norm", y, right_y, length);
  compare("batch norm's gradient", grad_x, right_x, length);
  compare("batch norm's weight", grad_weight, right_weight, length);
  compare("batch norm's bias", grad_bias, right_bias, length);
  compare("batch norm's gradient of grad", grad_grad, right_grad, differences);
  compare("batch norm's gradient of x", grad_of_x, right_of_x, differences);
  compare("batch norm's gradient of weight", second_weight, right_second, differences);
}

// ---- minibatch discrimination ---------------------------------------------------------------------------

template <class T>
void discriminate(int points, int others, int kernels, int dims) {
  const bool one_set = others == 0;
  const int against = one_set ? points : others;
  const auto at = [&](int i, int b, int c) { return size_t((i * kernels + b) * dims + c); };
  const auto m = random<T>(size_t(points * kernels * dims)), h = random<T>(m.size());
  const auto other = random<T>(size_t(others * kernels * dims)), h_other = random<T>(other.size());
  const auto g = random<T>(size_t(points * kernels));
  const auto &y = one_set ? m : other, &hy = one_set ? h : h_other;
  std::vector<T> sums(g.size()), out(m.size()), out_other(other.size());
  for (PairsPass pass : {PairsPass::kForward, PairsPass::kBackward, PairsPass::kDoubleBackward}) {
    Pairs in{};
    in.pass = pass, in.kernels = kernels, in.dims = dims, in.one_set = one_set;
    in.points = {points, m.data(), g.data(), h.data(), sums.data(), out.data()};
    if (!one_set) in.others = {others, other.data(), nullptr, h_other.data(), nullptr, out_other.data()};
    std::vector<double> scratch(size_t(minibatch_discrimination_scratch(in, kDtype<T>) / 8));
    minibatch_discrimination(in, kDtype<T>, scratch.data(), nullptr);

    std::vector<double> o(sums.size()), dm(m.size()), d_other(other.size());
    for (int b = 0; b < kernels; ++b)
      for (int i = 0; i < points; ++i)
        for (int j = 0; j < against; ++j) {
          if (one_set && i == j) continue;
          double distance = 0, q = 0;
          const auto sign = [&](int c) {
            const double d = double(widen(y[at(j, b, c)])) - double(widen(m[at(i, b, c)]));
            return d > 0 ? 1.0 : d < 0 ? -1.0 : 0.0;
          };
          for (int c = 0; c < dims; ++c) {
            distance += std::abs(double(widen(y[at(j, b, c)])) - double(widen(m[at(i, b, c)])));
            q += sign(c) * (double(widen(h[at(i, b, c)])) - double(widen(hy[at(j, b, c)])));
          }
          const double e = std::exp(-distance) * (pass == PairsPass::kDoubleBackward ? q : 1.0);
          o[size_t(i * kernels + b)] += e;
          const double gi = widen(g[size_t(i * kernels + b)]);
          const double w = e * (gi + (one_set ? double(widen(g[size_t(j * kernels + b)])) : 0.0));
          for (int c = 0; c < dims; ++c) {
            dm[at(i, b, c)] += w * sign(c);
            if (!one_set) d_other[at(j, b, c)] -= w * sign(c);
          }
        }
    if (pass != PairsPass::kBackward) compare("similarities", sums, o, against * dims);
    if (pass == PairsPass::kForward) continue;
    compare("gradient of points", out, dm, against * dims);
    if (!one_set) compare("gradient of others", out_other, d_other, points * dims);
  }
}

// ---- spectral norm --------------------------------------------------------------------------------------

struct Shape {
  int64_t outer, rows, inner;
};

// All layers in one call, with one iteration; each is checked against loops.
template <class T>
void normalize(const std::vector<Shape>& shapes, bool u_first) {
  using S = Sum<T>;
  const size_t n = shapes.size();
  std::vector<std::vector<T>> weights(n), grads(n), results(n), grad_weights(n);
  std::vector<std::vector<S>> us(n), vs(n), new_us(n), new_vs(n);
  std::vector<S> sigmas(n);
  std::vector<SpectralNormLayer> layers(n);
  for (size_t l = 0; l < n; ++l) {
    const Shape& s = shapes[l];
    const size_t columns = size_t(s.outer * s.inner), size = columns * size_t(s.rows);
    weights[l] = random<T>(size), grads[l] = random<T>(size);
    for (T& w : weights[l]) narrow(S(widen(w)) + S(1), &w);  // sigma stands out
    results[l].resize(size), grad_weights[l].resize(size);
    us[l] = random<S>(size_t(s.rows)), vs[l] = random<S>(columns);
    for (S& x : us[l]) x = std::abs(x);
    for (S& x : vs[l]) x = std::abs(x);
    new_us[l].resize(size_t(s.rows)), new_vs[l].resize(columns);
    SpectralNormLayer& layer = layers[l];
    layer.outer = s.outer, layer.rows = s.rows, layer.inner = s.inner;
    // Where columns come in two runs, their logical order has the runs exchanged.
    const bool permuted = s.outer > 1 && s.inner > 1;
    layer.groups = permuted ? 2 : 1;
    layer.group_size[0] = int32_t(permuted ? s.inner : int64_t(columns)),
    layer.group_step[0] = permuted ? int32_t(s.outer) : 1;
    layer.group_size[1] = int32_t(s.outer), layer.group_step[1] = 1;
    layer.weight = weights[l].data(), layer.u = us[l].data(), layer.v = vs[l].data();
    layer.new_u = new_us[l].data(), layer.new_v = new_vs[l].data(), layer.sigma = &sigmas[l];
    layer.result = results[l].data();
  }
  const auto run = [&](SpectralNormPass pass) {
    std::vector<double> scratch(size_t(spectral_norm_scratch(layers, kDtype<T>) + 7) / 8);
    spectral_norm(pass, layers, {1, 1e-12, u_first, false}, kDtype<T>, scratch.data(), nullptr);
  };
  run(SpectralNormPass::kForward);
  for (size_t l = 0; l < n; ++l) {
    layers[l].u = new_us[l].data(), layers[l].v = new_vs[l].data();
    layers[l].grad = grads[l].data(), layers[l].result = grad_weights[l].data();
  }
  run(SpectralNormPass::kBackward);

  for (size_t l = 0; l < n; ++l) {
    const Shape& s = shapes[l];
    const int64_t columns = s.outer * s.inner;
    const auto place = [&](int64_t i, int64_t c) {  // of a column in memory order
      return size_t((c / s.inner * s.rows + i) * s.inner + c % s.inner);
    };
    const auto logical = [&](int64_t c) {
      return size_t(layers[l].groups == 1 ? c : c % s.inner * s.outer + c / s.inner);
    };
    std::vector<double> r(size_t(s.rows), 0.0), t(size_t(columns), 0.0);
    const auto rows_from = [&](const auto& v) {
      for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t c = 0; c < columns; ++c)
          r[size_t(i)] += double(widen(weights[l][place(i, c)])) * double(v(c));
    };
    const auto columns_from = [&](const auto& u) {
      for (int64_t i = 0; i < s.rows; ++i)
        for (int64_t c = 0; c < columns; ++c)
          t[size_t(c)] += double(widen(weights[l][place(i, c)])) * double(u(i));
    };
    const auto unit = [](std::vector<double>& x) {
      double squares = 0;
      for (double value : x) squares += value * value;
      for (double& value : x) value /= std::sqrt(squares);
      return std::sqrt(squares);
    };
    double sigma;
    if (u_first) {
      rows_from([&](int64_t c) { return vs[l][logical(c)]; });
      unit(r);
      columns_from([&](int64_t i) { return r[size_t(i)]; });
      sigma = unit(t);
    } else {
      columns_from([&](int64_t i) { return us[l][size_t(i)]; });
      unit(t);
      rows_from([&](int64_t c) { return t[size_t(c)]; });
      sigma = unit(r);
    }
    std::vector<double> v(t.size()), y(weights[l].size()), dw(y.size());
    double product = 0;
    for (int64_t c = 0; c < columns; ++c) v[logical(c)] = t[size_t(c)];
    for (size_t k = 0; k < y.size(); ++k) {
      y[k] = double(widen(weights[l][k])) / sigma;
      product += double(widen(weights[l][k])) * double(widen(grads[l][k]));
    }
    for (int64_t i = 0; i < s.rows; ++i)
      for (int64_t c = 0; c < columns; ++c)
        dw[place(i, c)] = double(widen(grads[l][place(i, c)])) / sigma -
                          product / sigma / sigma * r[size_t(i)] * t[size_t(c)];
    const double length = double(s.rows + columns);
    compare("sigma", std::vector<S>{sigmas[l]}, {sigma}, length);
    compare("u", new_us[l], r, length);
    compare("v", new_vs[l], v, length);
    compare("normalized", results[l], y, length);
    compare("gradient of the weight", grad_weights[l], dw, length);
  }
}

template <class T>
void run_all() {
  for (int group : {1, 9}) {
    resample<T>(1, 1, 4, 9, 37, group, 1, true);
    resample<T>(2, 1, 4, 7, 10, group, 2, true);
    resample<T>(1, 2, 3, 9, 21, group, 1, true);
    resample<T>(2, 1, 7, 5, 6, group, 1, true);
    resample<T>(2, 3, 3, 5, 6, group, 1, false);
  }
  normalize_batch<T>(2, 3, 8, false);
  normalize_batch<T>(1, 2, 20008, false);  // more than three blocks keep
  normalize_batch<T>(3, 8, 5, true);
  normalize_batch<T>(2, 24, 700, true);
  discriminate<T>(3, 0, 2, 3);
  discriminate<T>(70, 0, 1, 2);
  discriminate<T>(5, 66, 1, 3);
  const std::vector<Shape> shapes = {{1, 9, 40}, {1, 1, 1}, {20, 12, 1}, {6, 5, 8}, {1, 600, 3}, {4, 3, 7}};
  for (bool u_first : {true, false}) normalize<T>(shapes, u_first);
}

// Kernels with a fault, by which the tests know that the sanitizers see such faults.
struct Nothing {
  int blocks;
};
void without_barrier(Nothing) {
  int* shared = shared_memory<int>();
  shared[threadIdx.x] = int(threadIdx.x);
  volatile int other = shared[threadIdx.x ^ 1];
  (void)other;
}
void beyond_shared_memory(Nothing) {
  volatile int* shared = shared_memory<int>();
  shared[threadIdx.x + 1] = 1;
}

}  // namespace
}  // namespace gankern::cuda

int main(int count, char** arguments) {
  if (count > 1) {
    using namespace gankern::cuda;
    const bool race = std::string(arguments[1]) == "--race";
    launch(race ? without_barrier : beyond_shared_memory, 1, 64, 64 * sizeof(int), nullptr, Nothing{1});
    return 0;
  }
  gankern::cuda::run_all<float>();
#if !defined(__SANITIZE_THREAD__)  // races do not depend on the type
  gankern::cuda::run_all<double>();
  gankern::cuda::run_all<gankern::cuda::BFloat16>();
#endif
  const auto counts = gankern::testing::counts();
  std::printf("%lld checks, %lld failures\n", static_cast<long long>(counts.checks),
              static_cast<long long>(counts.failures));
  return counts.failures ? 1 : 0;
}
