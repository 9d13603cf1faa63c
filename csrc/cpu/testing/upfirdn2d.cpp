// The kernels of up, FIR filter, down against the definition, tap by tap, in double.
#include "../upfirdn2d.h"

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

using Doubles = std::vector<double>;

struct Shape {
  int64_t batches, channels;
  FirAxis rows, columns;
  int64_t row_taps, column_taps;
  bool separable, grouped;
};

// z of the definition: sample p - start of the zero-inserted axis; -1 where there is none.
int64_t sample(const FirAxis& axis, int64_t o, int64_t tap) {
  const int64_t p = o * axis.down + tap - axis.start;
  return p >= 0 && p % axis.up == 0 && p / axis.up < axis.in ? p / axis.up : -1;
}

// The problem's values, and what comes of them.
template <class T>
struct Inputs {
  Shape s;
  std::vector<T> x;
  Doubles row_weights, column_weights, expected;
  double largest_sum = 0;  // of the magnitudes of an expected value's terms

  explicit Inputs(const Shape& shape)
      : s(shape),
        x(random_values<T>(s.batches * s.channels * s.rows.in * s.columns.in, 1, -1, 1.5)),
        row_weights(to_double(random_values<double>(s.row_taps, 2, -1, 1))),
        column_weights(to_double(
            random_values<double>(s.separable ? s.column_taps : s.row_taps * s.column_taps, 3, -1, 1))) {
    const Doubles wide = to_double(x);
    const int64_t group = s.grouped ? s.channels : 1, planes = s.batches * s.channels / group;
    for (int64_t plane = 0; plane < planes; ++plane)
      for (int64_t oy = 0; oy < s.rows.out; ++oy)
        for (int64_t ox = 0; ox < s.columns.out; ++ox)
          for (int64_t c = 0; c < group; ++c) {
            double total = 0, size = 0;
            for (int64_t jy = 0; jy < s.row_taps; ++jy)
              for (int64_t jx = 0; jx < s.column_taps; ++jx) {
                const int64_t iy = sample(s.rows, oy, jy), ix = sample(s.columns, ox, jx);
                if (iy < 0 || ix < 0) continue;
                const double weight = s.separable ? row_weights[size_t(jy)] * column_weights[size_t(jx)]
                                                  : column_weights[size_t(jy * s.column_taps + jx)];
                const double term =
                    weight * wide[size_t(((plane * s.rows.in + iy) * s.columns.in + ix) * group + c)];
                total += term;
                size += std::fabs(term);
              }
            expected.push_back(total);
            largest_sum = std::max(largest_sum, size);
          }
  }
};

template <class T>
struct Call {
  const Inputs<T>& in;
  Placement at;
  Buffer<T> x{in.x, at}, out{int64_t(in.expected.size()), at};

  void run(const Upfirdn2dKernels& kernels, const Parallel& parallel) {
    const Shape& s = in.s;
    Upfirdn2d problem{};
    problem.rows = s.rows, problem.columns = s.columns, problem.row_taps = s.row_taps,
    problem.column_taps = s.column_taps;
    problem.row_weights = s.separable ? in.row_weights.data() : nullptr,
    problem.column_weights = in.column_weights.data();
    problem.batches = s.batches, problem.channels = s.channels, problem.group = s.grouped ? s.channels : 1;
    problem.row_stride = s.columns.in * problem.group;
    problem.channel_stride = s.grouped ? 1 : s.rows.in * s.columns.in;
    problem.batch_stride = s.channels * s.rows.in * s.columns.in;
    problem.x = x.data();
    problem.out = out.data();
    kernels.run[kDtype<T>](problem, parallel);
  }
  bool same(const Call& other) const { return out.size() == 0 || out.same_bits(other.out); }
  bool inputs_unchanged() const { return in.x.empty() || x.same_bits(in.x); }
};

template <class T>
void compare(const Call<T>& call, const char* what) {
  const Inputs<T>& in = call.in;
  const double error = largest_error(call.out, in.expected);
  const double terms = double(in.s.row_taps * in.s.column_taps);
  const double allowed =
      kEps<T> * largest(in.expected) + (4 + std::sqrt(terms)) * kEps<Acc<T>> * in.largest_sum;
  check(error <= allowed, "%s: error %g, allowed %g", what, error, allowed);
}

template <class T>
void test_problem(const Shape& s, const Placements& placements, const std::vector<int>& counts) {
  const Inputs<T> inputs(s);
  const std::string what =
      text("%s, %lldx%lld, %lldx%lld to %lldx%lld, up %lld %lld, down %lld %lld%s%s", dtype_name<T>(),
           (long long)s.batches, (long long)s.channels, (long long)s.rows.in, (long long)s.columns.in,
           (long long)s.rows.out, (long long)s.columns.out, (long long)s.rows.up, (long long)s.columns.up,
           (long long)s.rows.down, (long long)s.columns.down, s.separable ? "" : ", 2-D",
           s.grouped ? ", grouped" : "");
  test_every_way<Call<T>>(GANKERN_TEST_TABLES(upfirdn2d), inputs, what, placements, counts, compare<T>);
}

}  // namespace

GANKERN_TEST(upfirdn2d) {
  std::vector<Shape> shapes;
  for (bool separable : {true, false})
    for (bool grouped : {false, true}) {
      const auto add = [&](int64_t batches, int64_t channels, FirAxis rows, FirAxis columns, int64_t row_taps,
                           int64_t column_taps) {
        shapes.push_back({batches, channels, rows, columns, row_taps, column_taps, separable, grouped});
      };
      add(2, 3, {7, 7, 1, 1, 2}, {37, 37, 1, 1, 2}, 4, 4);
      add(2, 3, {7, 14, 2, 1, 2}, {37, 74, 2, 1, 2}, 4, 4);
      add(2, 3, {8, 4, 1, 2, 1}, {70, 35, 1, 2, 1}, 4, 4);
      add(1, 17, {9, 13, 3, 2, 4}, {11, 5, 2, 5, 3}, 5, 6);
      add(1, 2, {5, 9, 2, 1, -1}, {9, 24, 4, 1, 3}, 1, 3);  // crops; more phases than taps
      add(1, 2, {9, 3, 1, 3, 0}, {41, 14, 1, 3, 5}, 3, 2);
      add(1, 1, {1, 1, 1, 1, 0}, {1, 1, 1, 1, 0}, 1, 1);
      add(0, 3, {4, 4, 1, 1, 1}, {4, 4, 1, 1, 1}, 3, 3);
      add(1, 1, {3, 6, 2, 1, 2}, {2100, 4200, 2, 1, 2}, 4, 4);  // several strips
      if (!separable) continue;
      // Rows long enough for sums in registers, with two to four taps in each phase, and channels in whole
      // vectors.
      for (int64_t taps : {2, 3, 4}) {
        const int64_t wide = grouped ? 19 : 150, channels = grouped ? 32 : 2;
        for (int64_t start : {-3, 0, 1, 2}) {
          add(1, channels, {5, 5, 1, 1, 1}, {wide, wide - 1, 1, 1, start}, 3, taps);
          add(1, channels, {6, 3, 1, 2, 1}, {wide, wide / 2, 1, 2, start}, 4, taps);
          add(1, channels, {4, 8, 2, 1, 2}, {wide, 2 * wide + 1, 2, 1, start}, 4, 2 * taps);
        }
      }
      if (grouped) add(1, 64, {3, 3, 1, 1, 1}, {300, 300, 1, 1, 2}, 3, 4);  // in several strips
    }
  if (kRacesOnly) {
    for (const Shape& shape : shapes) test_problem<float>(shape, {Placement::kHeap}, {2, 5});
    return;
  }
  each_dtype([&](auto type) {
    using T = decltype(type);
    for (const Shape& shape : shapes) test_problem<T>(shape, kEveryPlacement, {1, 2, 5, -3});
  });
  // Large enough for several threads, and to go past the caches.
  test_problem<float>({1, 64, {64, 128, 2, 1, 2}, {256, 512, 2, 1, 2}, 4, 4, true, false},
                      {Placement::kShifted}, {2});
  test_problem<float>({1, 64, {64, 128, 2, 1, 2}, {256, 512, 2, 1, 2}, 4, 4, true, true}, {Placement::kHeap},
                      {3});
}

}  // namespace testing
}  // namespace gankern
