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

template <class T>
struct Expected {
  Doubles value;
  double largest_sum = 0;  // of the magnitudes of the terms

  Expected(const Shape& s, const std::vector<T>& x, const Doubles& row_weights,
           const Doubles& column_weights) {
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
            value.push_back(total);
            largest_sum = std::max(largest_sum, size);
          }
  }
};

template <class T>
void test_problem(const Shape& s, const std::vector<Placement>& placements,
                  const std::vector<int>& thread_counts) {
  const int64_t group = s.grouped ? s.channels : 1;
  const std::vector<T> x = random_values<T>(s.batches * s.channels * s.rows.in * s.columns.in, 1, -1, 1.5);
  const Doubles row_weights = to_double(random_values<double>(s.row_taps, 2, -1, 1));
  const Doubles column_weights =
      to_double(random_values<double>(s.separable ? s.column_taps : s.row_taps * s.column_taps, 3, -1, 1));
  const Expected<T> expected(s, x, row_weights, column_weights);
  const int64_t size = int64_t(expected.value.size());

  const auto run = [&](const Upfirdn2dKernels& kernels, const Buffer<T>& in, Buffer<T>& out,
                       const Parallel& parallel) {
    Upfirdn2d problem{};
    problem.rows = s.rows;
    problem.columns = s.columns;
    problem.row_taps = s.row_taps;
    problem.column_taps = s.column_taps;
    problem.row_weights = s.separable ? row_weights.data() : nullptr;
    problem.column_weights = column_weights.data();
    problem.batches = s.batches;
    problem.channels = s.channels;
    problem.group = group;
    problem.row_stride = s.columns.in * group;
    problem.channel_stride = s.grouped ? 1 : s.rows.in * s.columns.in;
    problem.batch_stride = s.channels * s.rows.in * s.columns.in;
    problem.x = in.data();
    problem.out = out.data();
    kernels.run[kDtype<T>](problem, parallel);
  };

  for (const auto& [isa, kernels] : GANKERN_TEST_TABLES(Upfirdn2dKernels, upfirdn2d)) {
    char what[160];
    std::snprintf(what, sizeof what,
                  "%s, %s, %lldx%lld, %lldx%lld to %lldx%lld, up %lld %lld, down %lld %lld%s%s", isa,
                  dtype_name<T>(), (long long)s.batches, (long long)s.channels, (long long)s.rows.in,
                  (long long)s.columns.in, (long long)s.rows.out, (long long)s.columns.out,
                  (long long)s.rows.up, (long long)s.columns.up, (long long)s.rows.down,
                  (long long)s.columns.down, s.separable ? "" : ", 2-D", s.grouped ? ", grouped" : "");
    const Buffer<T> in(x, Placement::kHeap);
    Buffer<T> first(size, Placement::kHeap);
    run(kernels, in, first, threads(1));
    const double error = largest_error(first, expected.value);
    const double terms = double(s.row_taps * s.column_taps);
    const double allowed =
        kEps<T> * largest(expected.value) + (4 + std::sqrt(terms)) * kEps<Acc<T>> * expected.largest_sum;
    check(error <= allowed, "%s: error %g, allowed %g", what, error, allowed);
    for (Placement placement : placements) {
      for (int count : thread_counts) {
        const Buffer<T> again(x, placement);
        Buffer<T> out(size, placement);
        // Negative: so many threads promised, and one given.
        run(kernels, again, out, count < 0 ? one_after_the_other(-count) : threads(count));
        check(size == 0 || out.same_bits(first), "%s: differs with %d threads, %s memory", what, count,
              placement_name(placement));
        check(x.empty() || again.same_bits(x), "%s: the input was written to", what);
      }
    }
  }
}

}  // namespace

void test_upfirdn2d() {
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
  const std::vector<Placement> all_placements(std::begin(kPlacements), std::end(kPlacements));
  each_dtype([&](auto type) {
    using T = decltype(type);
    for (const Shape& shape : shapes) test_problem<T>(shape, all_placements, {1, 2, 5, -3});
  });
  // Large enough for several threads, and to go past the caches.
  test_problem<float>({1, 64, {64, 128, 2, 1, 2}, {256, 512, 2, 1, 2}, 4, 4, true, false},
                      {Placement::kShifted}, {2});
  test_problem<float>({1, 64, {64, 128, 2, 1, 2}, {256, 512, 2, 1, 2}, 4, 4, true, true}, {Placement::kHeap},
                      {3});
}

}  // namespace testing
}  // namespace gankern
