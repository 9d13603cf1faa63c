// The convolution engine against loops over pixels, channels and taps, in double.
#include "../convolution.h"

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

using Doubles = std::vector<double>;

struct Size {
  int64_t images, in_channels, out_channels, height, width;  // of the input
};

struct Problem {
  ConvolutionRow row;
  Size size;
  int64_t padding = 1;
  bool flip = false, swap = false, in_last = false, out_last = false, bias = false;
  double slope = 1;

  int64_t taps() const {
    switch (row) {
      case ConvolutionRow::kStrided2:
      case ConvolutionRow::kStrided4:
      case ConvolutionRow::kTransposed2:
      case ConvolutionRow::kTransposed4:
      case ConvolutionRow::kStridedDirect:
      case ConvolutionRow::kTransposedDirect:
      case ConvolutionRow::kStridedStreamed:
      case ConvolutionRow::kTransposedStreamed:
      case ConvolutionRow::kSameOfFour2:
      case ConvolutionRow::kSameOfFour3:
      case ConvolutionRow::kSameOfFour4: return 4;
      case ConvolutionRow::kDirect: return 2 * padding + 1;
      case ConvolutionRow::kPointwise: return 1;
      default: return 3;
    }
  }
  int64_t out(int64_t n) const {
    switch (row) {
      case ConvolutionRow::kDown9:
      case ConvolutionRow::kStrided2:
      case ConvolutionRow::kStrided4:
      case ConvolutionRow::kStridedDirect:
      case ConvolutionRow::kStridedStreamed: return n / 2;
      case ConvolutionRow::kStridedOfThree: return (n + 1) / 2;
      case ConvolutionRow::kSame2:
      case ConvolutionRow::kSame4:
      case ConvolutionRow::kSameOfFour2:
      case ConvolutionRow::kSameOfFour3:
      case ConvolutionRow::kSameOfFour4:
      case ConvolutionRow::kDirect: return n + 2 * padding - taps() + 1;
      case ConvolutionRow::kPointwise: return n;
      default: return 2 * n;
    }
  }
  // The inputs that tap t of one dimension reads for an output: at most two, -1 for none.
  std::pair<int64_t, int64_t> reads(int64_t output, int64_t t, int64_t n) const {
    const auto inside = [n](int64_t i) { return i >= 0 && i < n ? i : int64_t(-1); };
    switch (row) {
      case ConvolutionRow::kUp9: return {output + t - 1 >= 0 ? inside((output + t - 1) / 2) : -1, -1};
      case ConvolutionRow::kDown9: return {inside(2 * output + t - 1), inside(2 * output + t)};
      case ConvolutionRow::kSame2:
      case ConvolutionRow::kSame4:
      case ConvolutionRow::kSameOfFour2:
      case ConvolutionRow::kSameOfFour3:
      case ConvolutionRow::kSameOfFour4:
      case ConvolutionRow::kDirect: return {inside(output + t - padding), -1};
      case ConvolutionRow::kPointwise: return {output, -1};
      case ConvolutionRow::kStrided2:
      case ConvolutionRow::kStrided4:
      case ConvolutionRow::kStridedDirect:
      case ConvolutionRow::kStridedStreamed:
      case ConvolutionRow::kStridedOfThree: return {inside(2 * output + t - 1), -1};
      default: {
        const int64_t twice = output + 1 - t;
        return {twice >= 0 && twice % 2 == 0 ? inside(twice / 2) : -1, -1};
      }
    }
  }
};

int64_t place(const Size& s, int64_t channels, int64_t height, int64_t width, bool last, int64_t n, int64_t c,
              int64_t y, int64_t x) {
  (void)s;
  return last ? ((n * height + y) * width + x) * channels + c : ((n * channels + c) * height + y) * width + x;
}

// f(place in x, place in out, place in weight) for each product.
template <class F>
void each_product(const Problem& p, const F& f) {
  const Size& s = p.size;
  const int64_t height = p.out(s.height), width = p.out(s.width), taps = p.taps();
  for (int64_t n = 0; n < s.images; ++n)
    for (int64_t o = 0; o < s.out_channels; ++o)
      for (int64_t y = 0; y < height; ++y)
        for (int64_t x = 0; x < width; ++x)
          for (int64_t ty = 0; ty < taps; ++ty)
            for (int64_t tx = 0; tx < taps; ++tx) {
              const auto [y0, y1] = p.reads(y, ty, s.height);
              const auto [x0, x1] = p.reads(x, tx, s.width);
              const int64_t to = place(s, s.out_channels, height, width, p.out_last, n, o, y, x);
              const int64_t wy = p.flip ? taps - 1 - ty : ty, wx = p.flip ? taps - 1 - tx : tx;
              for (int64_t iy : {y0, y1})
                for (int64_t ix : {x0, x1}) {
                  if (iy < 0 || ix < 0) continue;
                  for (int64_t i = 0; i < s.in_channels; ++i) {
                    const int64_t pair = p.swap ? i * s.out_channels + o : o * s.in_channels + i;
                    f(place(s, s.in_channels, s.height, s.width, p.in_last, n, i, iy, ix), to,
                      (pair * taps + wy) * taps + wx, o);
                  }
                }
            }
}

template <class T>
void compare(const Buffer<T>& got, const Doubles& expected, double tolerance, const char* what) {
  double scale = 1;
  for (double e : expected) scale = std::max(scale, std::fabs(e));
  for (size_t i = 0; i < expected.size(); ++i) {
    const double value = double(baseline::widen(got.data()[i]));
    if (std::fabs(value - expected[i]) <= tolerance * scale) continue;
    check(false, "%s: element %zu is %g, not %g", what, i, value, expected[i]);
    return;
  }
  check(true, "%s", what);
}

template <class T>
void test_problem(const Problem& p, const std::vector<int>& thread_counts, Placement placement) {
  const Size& s = p.size;
  const int64_t height = p.out(s.height), width = p.out(s.width), taps = p.taps();
  const int64_t x_size = s.images * s.in_channels * s.height * s.width;
  const int64_t y_size = s.images * s.out_channels * height * width;
  const int64_t w_size = s.in_channels * s.out_channels * taps * taps;
  const std::vector<T> x = random_values<T>(x_size, 1, -1, 1), w = random_values<T>(w_size, 2, -1, 1),
                       g = random_values<T>(y_size, 3, -1, 1), b = random_values<T>(s.out_channels, 4, -1, 1);
  const auto value = [](T v) { return double(baseline::widen(v)); };
  Doubles y(size_t(y_size), 0.0), dw(size_t(w_size), 0.0);
  each_product(p, [&](int64_t i, int64_t o, int64_t k, int64_t channel) {
    (void)channel;
    y[size_t(o)] += 0.5 * value(w[size_t(k)]) * value(x[size_t(i)]);
    dw[size_t(k)] += 0.5 * value(g[size_t(o)]) * value(x[size_t(i)]);
  });
  for (int64_t i = 0; i < y_size; ++i) {
    const int64_t channel = p.out_last ? i % s.out_channels : i / (height * width) % s.out_channels;
    double& v = y[size_t(i)];
    if (p.bias) v += value(b[size_t(channel)]);
    if (v < 0) v *= p.slope;
  }
  const double tolerance = kEps<T> + 300 * (sizeof(T) == 8 ? 0x1p-52 : 0x1p-23);

  for (const auto& [isa, kernels] : GANKERN_TEST_TABLES(convolution)) {
    for (int count : thread_counts) {
      char what[160];
      std::snprintf(what, sizeof what, "%s, %s, row %d, [%lld, %lld -> %lld, %lld, %lld], %d threads", isa,
                    dtype_name<T>(), int(p.row), (long long)s.images, (long long)s.in_channels,
                    (long long)s.out_channels, (long long)s.height, (long long)s.width, count);
      Buffer<T> in(x_size, placement, x), out(y_size, placement), weight(w_size, placement, w),
          bias(s.out_channels, placement, b), grad(y_size, placement, g), grad_weight(w_size, placement);
      Convolution task{};
      task.images = s.images;
      task.in = {s.in_channels, s.height, s.width, p.in_last, in.data()};
      task.out = {s.out_channels, height, width, p.out_last, out.data()};
      task.padding = p.padding;
      task.taps = taps;
      task.weight = weight.data();
      const int64_t square = taps * taps;
      task.stride_out = p.swap ? square : s.in_channels * square;
      task.stride_in = p.swap ? s.out_channels * square : square;
      task.stride_y = taps;
      task.stride_x = 1;
      task.flip = p.flip;
      task.scale = 0.5;
      task.slope = p.slope;
      if (p.bias) task.bias = bias.data();
      const Parallel parallel = count < 0 ? one_after_the_other(-count) : threads(count);
      kernels.forward[kDtype<T>][int(p.row)](task, parallel);
      compare(out, y, tolerance, what);
      task.out.data = grad.data();
      task.weight = grad_weight.data();
      kernels.weight_gradient[kDtype<T>][int(p.row)](task, parallel);
      compare(grad_weight, dw, tolerance * std::sqrt(double(y_size + 1)), what);
    }
  }
}

}  // namespace

GANKERN_TEST(convolution) {
  for (int row = 0; row < kConvolutionRows; ++row) {
    Problem p{ConvolutionRow(row), {2, 3, 5, 6, 4}};
    // More tiles than a sum of the weight gradient has, and several blocks.
    Problem many = p;
    many.size = {9, 2, 33, 16, 20};
    if (kRacesOnly) {
      test_problem<float>(many, {2, 5}, Placement::kHeap);
      continue;
    }
    each_dtype([&](auto type) {
      using T = decltype(type);
      for (const Size& size : std::vector<Size>{{1, 1, 1, 2, 2}, {2, 17, 5, 7, 5}, {1, 2, 34, 3, 9}}) {
        Problem q = p;
        q.size = size;
        q.bias = true;
        q.slope = 0.25;
        test_problem<T>(q, {1, 3}, Placement::kHeap);
        q.in_last = q.out_last = q.swap = true;
        test_problem<T>(q, {2}, Placement::kGuarded);
        q.out_last = false;
        q.flip = true;
        test_problem<T>(q, {-3}, Placement::kShifted);
      }
    });
    test_problem<float>(many, {3}, Placement::kGuarded);
    if (row == int(ConvolutionRow::kSame2) || row == int(ConvolutionRow::kSame4) ||
        row == int(ConvolutionRow::kSameOfFour4) ||
        (row >= int(ConvolutionRow::kSameOfFour2) && row <= int(ConvolutionRow::kDirect))) {
      for (int64_t padding : {0, 2, 3}) {
        if (padding == 3 && p.taps() == 3) continue;
        p.padding = padding;
        test_problem<float>(p, {2}, Placement::kGuarded);
      }
    }
    // A kernel that is much larger than the images, for one, two and more threads than it has panels.
    Problem deep = p;
    deep.size = {1, 130, 256, 4, 4};
    deep.padding = 1;
    if (row != int(ConvolutionRow::kDirect)) test_problem<float>(deep, {1, 2, 9}, Placement::kGuarded);
    p.size = {0, 3, 5, 6, 4};
    test_problem<float>(p, {1}, Placement::kHeap);
  }
}

}  // namespace testing
}  // namespace gankern
