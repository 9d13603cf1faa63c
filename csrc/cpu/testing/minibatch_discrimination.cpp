// The kernels of minibatch discrimination against a loop over all ordered pairs, in double.
#include "../minibatch_discrimination.h"

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

using Doubles = std::vector<double>;

struct Shape {
  int64_t rows, columns, kernels, dims;
  bool one_set() const { return columns < 0; }
};
constexpr int64_t kOneSet = -1;  // as Shape::columns

enum Nulls { kNone, kRowsNull, kColumnsNull };  // whose gradient of the gradient is zero, and not given

// ---- one problem ----------------------------------------------------------------------------------------

template <class T>
struct Points {
  int64_t count;
  std::vector<T> m, grad, grad_m;

  Points(int64_t n, const Shape& s, uint64_t seed) : count(n) {
    const int64_t width = s.kernels * s.dims;
    const double reach = 1.5 / double(s.dims);  // distances of at most 3
    m = random_values<T>(n * width, seed, -reach, reach);
    for (int64_t i = 0; i < n; ++i) {
      for (int64_t e = i * width; e < (i + 1) * width; ++e) {
        if (i % 5 == 1) m[size_t(e)] = m[size_t(e - width)];                       // distance 0, sign 0
        if (i % 11 == 8) m[size_t(e)] = baseline::narrow<T>(Acc<T>(i * 100 - e));  // exp gives 0
      }
    }
    grad = random_values<T>(n * s.kernels, seed + 1, -1, 1.5);
    grad_m = random_values<T>(n * width, seed + 2, -1, 1.5);
  }
};

template <class T>
struct Inputs {
  Shape shape;
  Nulls nulls;
  Points<T> rows, columns;

  Inputs(const Shape& s, Nulls n, uint64_t seed)
      : shape(s), nulls(n), rows(s.rows, s, seed), columns(s.one_set() ? 0 : s.columns, s, seed + 10) {
    // A pair of equal points between the sets too.
    if (rows.count && columns.count)
      std::copy_n(rows.m.begin(), size_t(s.kernels * s.dims), columns.m.begin());
  }
};

// The memory that one call gets for one set of points.
template <class T>
struct Memory {
  const Points<T>& points;
  bool first, null_grad_m;
  Placement at;
  Buffer<T> m{points.m, at}, grad{points.grad, at}, grad_m{points.grad_m, at};
  Buffer<T> sums{grad.size(), at}, sums_with_self{grad.size(), at}, out_m{m.size(), at},
      second_sums{grad.size(), at}, second_out_m{m.size(), at};

  PairSet forward(Buffer<T>& to) const {
    return {points.count, m.data(), nullptr, nullptr, first ? to.data() : nullptr, nullptr};
  }
  PairSet backward() {
    return {points.count, m.data(), first ? grad.data() : nullptr, nullptr, nullptr, out_m.data()};
  }
  PairSet double_backward() {
    return {points.count,
            m.data(),
            first ? grad.data() : nullptr,
            null_grad_m ? nullptr : grad_m.data(),
            first ? second_sums.data() : nullptr,
            second_out_m.data()};
  }
  bool inputs_unchanged() const {
    return points.count == 0 ||
           (m.same_bits(points.m) && grad.same_bits(points.grad) && grad_m.same_bits(points.grad_m));
  }
  bool same_results(const Memory& other) const {
    return sums.same_bits(other.sums) && sums_with_self.same_bits(other.sums_with_self) &&
           out_m.same_bits(other.out_m) && second_sums.same_bits(other.second_sums) &&
           second_out_m.same_bits(other.second_out_m);
  }
};

template <class T>
struct Call {
  const Inputs<T>& inputs;
  Placement at;
  Memory<T> rows{inputs.rows, true, inputs.nulls == kRowsNull, at},
      columns{inputs.columns, false, inputs.nulls == kColumnsNull, at};

  void run(const Orders<MinibatchDiscrimination>& kernels, const Parallel& parallel) {
    const Shape& s = inputs.shape;
    const auto problem = [&](const PairSet& x, const PairSet& y, bool include_self) {
      return MinibatchDiscrimination{s.kernels,   s.dims,      x, s.one_set() ? PairSet{} : y,
                                     s.one_set(), include_self};
    };
    kernels.forward[kDtype<T>](problem(rows.forward(rows.sums), columns.forward(columns.sums), false),
                               parallel);
    kernels.forward[kDtype<T>](
        problem(rows.forward(rows.sums_with_self), columns.forward(columns.sums_with_self), true), parallel);
    kernels.backward[kDtype<T>](problem(rows.backward(), columns.backward(), false), parallel);
    kernels.double_backward[kDtype<T>](problem(rows.double_backward(), columns.double_backward(), false),
                                       parallel);
  }
  bool same(const Call& other) const {
    return rows.same_results(other.rows) && columns.same_results(other.columns);
  }
  bool inputs_unchanged() const { return rows.inputs_unchanged() && columns.inputs_unchanged(); }
};

// ---- comparison with the definition ---------------------------------------------------------------------

// A result, and the sums of the magnitudes of what it is a sum of: errors are relative to these.
struct Sums {
  Doubles value, magnitude;
  explicit Sums(int64_t size) : value(size_t(size)), magnitude(size_t(size)) {}
  void add(int64_t at, double x, double size) {
    value[size_t(at)] += x;
    magnitude[size_t(at)] += std::fabs(size);
  }
};

struct Expected {
  Sums sums, sums_with_self, second_sums;
  Sums rows_out, columns_out, second_rows_out, second_columns_out;
};

template <class T>
Expected expect(const Inputs<T>& in) {
  const Shape& s = in.shape;
  const int64_t B = s.kernels, C = s.dims;
  const Points<T>& others = s.one_set() ? in.rows : in.columns;
  const Doubles x = to_double(in.rows.m), y = to_double(others.m), g = to_double(in.rows.grad);
  Doubles hx = to_double(in.rows.grad_m), hy = to_double(others.grad_m);
  if (in.nulls == kRowsNull) std::fill(hx.begin(), hx.end(), 0.0);
  if (in.nulls == kColumnsNull) std::fill(hy.begin(), hy.end(), 0.0);

  const int64_t first = in.rows.count, second = in.columns.count;
  Expected r{Sums(first * B),      Sums(first * B),     Sums(first * B),     Sums(first * B * C),
             Sums(second * B * C), Sums(first * B * C), Sums(second * B * C)};
  for (int64_t i = 0; i < first; ++i) {
    for (int64_t j = 0; j < others.count; ++j) {
      for (int64_t b = 0; b < B; ++b) {
        const int64_t ib = i * B + b, jb = j * B + b;
        if (s.one_set() && i == j) {
          r.sums_with_self.add(ib, 1, 1);
          continue;
        }
        const auto sign = [&](int64_t c) {
          const double d = y[size_t(jb * C + c)] - x[size_t(ib * C + c)];
          return double((d > 0) - (d < 0));
        };
        double distance = 0, q = 0, q_size = 0;
        for (int64_t c = 0; c < C; ++c) {
          const size_t ic = size_t(ib * C + c), jc = size_t(jb * C + c);
          distance += std::fabs(x[ic] - y[jc]);
          q += sign(c) * (hx[ic] - hy[jc]);
          q_size += std::fabs(hx[ic]) + std::fabs(hy[jc]);
        }
        const double e = std::exp(-distance), p = e * q, p_size = e * q_size;
        double both = g[size_t(ib)], both_size = std::fabs(both);
        if (s.one_set()) {
          both += g[size_t(jb)];
          both_size += std::fabs(g[size_t(jb)]);
        }
        r.sums.add(ib, e, e);
        r.sums_with_self.add(ib, e, e);
        r.second_sums.add(ib, p, p_size);
        for (int64_t c = 0; c < C; ++c) {
          r.rows_out.add(ib * C + c, both * e * sign(c), both_size * e);
          r.second_rows_out.add(ib * C + c, both * p * sign(c), both_size * p_size);
          if (s.one_set()) continue;
          r.columns_out.add(jb * C + c, -both * e * sign(c), both_size * e);
          r.second_columns_out.add(jb * C + c, -both * p * sign(c), both_size * p_size);
        }
      }
    }
  }
  return r;
}

template <class T>
void compare(const Call<T>& call, const Expected& expected, const char* what) {
  const Shape& s = call.inputs.shape;
  // The rounding of the result; and that of distance, exp and sums, which grows like the square root of their
  // length. What is subnormal may become 0.
  const double length = double(std::max(s.rows, s.columns) + s.dims);
  const double inside = (16 + 4 * std::sqrt(length)) * kEps<Acc<T>>;
  const double least = std::is_same<T, Half>::value ? 0x1p-24 : double(std::numeric_limits<Acc<T>>::min());
  const auto near = [&](const Buffer<T>& ours, const Sums& exact, const char* name) {
    const double error = largest_error(ours, exact.value);
    const double allowed = kEps<T> * largest(exact.value) + inside * largest(exact.magnitude) + least;
    check(error <= allowed, "%s of %s: error %g, allowed %g", name, what, error, allowed);
  };
  near(call.rows.sums, expected.sums, "sums");
  near(call.rows.sums_with_self, expected.sums_with_self, "sums with self");
  near(call.rows.out_m, expected.rows_out, "grad_m");
  near(call.rows.second_sums, expected.second_sums, "grad_grad");
  near(call.rows.second_out_m, expected.second_rows_out, "second grad_m");
  near(call.columns.out_m, expected.columns_out, "grad_other");
  near(call.columns.second_out_m, expected.second_columns_out, "second grad_other");
}

// Every instruction set, placement and number of threads on one problem.
template <class T>
void test_problem(const Shape& shape, Nulls nulls, const Placements& placements,
                  const std::vector<int>& counts) {
  const Inputs<T> inputs(shape, nulls, 100);
  const Expected expected = expect(inputs);
  const std::string what =
      text("%s, %lld (%lld) points, [%lld, %lld], nulls %d", dtype_name<T>(), (long long)shape.rows,
           (long long)shape.columns, (long long)shape.kernels, (long long)shape.dims, int(nulls));
  test_every_way<Call<T>>(GANKERN_TEST_TABLES(minibatch_discrimination), inputs, what, placements, counts,
                          [&](const Call<T>& call, const char* of) { compare(call, expected, of); });
}

}  // namespace

GANKERN_TEST(minibatch_discrimination) {
  // Tournaments within a set and between two, also with fewer points than tiles on one side.
  const std::vector<Shape> tournaments = {{523, kOneSet, 2, 3}, {515, 521, 1, 2}, {3, 90001, 1, 1}};
  if (kRacesOnly) {
    for (const Shape& shape : tournaments) test_problem<float>(shape, kNone, {Placement::kHeap}, {2, 5});
    test_problem<float>({33, kOneSet, 17, 5}, kNone, {Placement::kHeap}, {2, 5});
    test_problem<float>({33, 19, 17, 5}, kNone, {Placement::kHeap}, {3});
    return;
  }
  each_dtype([&](auto type) {
    using T = decltype(type);
    for (int64_t kernels : {1, 17}) {
      for (int64_t dims : {1, 5}) {
        for (int64_t count : {0, 1, 2, 3, 7, 33, 67})
          test_problem<T>({count, kOneSet, kernels, dims}, kNone, kEveryPlacement, {1, 2, 5});
        for (const auto& [rows, columns] : std::vector<std::pair<int64_t, int64_t>>{
                 {0, 0}, {0, 5}, {5, 0}, {1, 1}, {1, 2}, {2, 1}, {3, 70}, {33, 19}})
          for (Nulls nulls : {kNone, kRowsNull, kColumnsNull})
            test_problem<T>({rows, columns, kernels, dims}, nulls, kEveryPlacement, {3});
      }
    }
    // Several tiles of columns, and several blocks in a tile.
    test_problem<T>({131, kOneSet, 3, 67}, kNone, {Placement::kGuarded}, {2, -3});
    test_problem<T>({61, 131, 3, 67}, kNone, {Placement::kGuarded}, {2, -3});
    test_problem<T>({301, kOneSet, 1, 5}, kNone, {Placement::kShifted}, {2});
    test_problem<T>({5, 701, 33, 1}, kNone, {Placement::kShifted}, {5});
    for (const Shape& shape : tournaments) test_problem<T>(shape, kNone, {Placement::kShifted}, {2, 5, -3});
  });
  // Many slices are never a tournament.
  test_problem<float>({523, kOneSet, 33, 1}, kNone, {Placement::kGuarded}, {3, -7});
}

}  // namespace testing
}  // namespace gankern
