// The kernels of points between samples against the formulas in double.
#include "../interpolate_samples.h"

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

template <class T>
void test_problem(int64_t samples, int64_t size, const std::vector<int>& thread_counts) {
  const std::vector<T> real = random_values<T>(samples * size, 1, -1, 1.5),
                       fake = random_values<T>(samples * size, 2, -1, 1.5),
                       grad = random_values<T>(samples * size, 3, -1, 1.5);
  std::vector<Acc<T>> alpha = random_values<Acc<T>>(samples, 4, 0, 1);
  if (samples > 1) alpha[0] = 0, alpha[1] = 1;
  const std::vector<double> r = to_double(real), f = to_double(fake), g = to_double(grad);
  std::vector<double> points, to_real, to_fake;
  for (int64_t n = 0; n < samples; ++n) {
    const double a = double(alpha[size_t(n)]);
    for (int64_t i = n * size; i < (n + 1) * size; ++i) {
      points.push_back(r[size_t(i)] + a * (f[size_t(i)] - r[size_t(i)]));
      to_real.push_back((1 - a) * g[size_t(i)]);
      to_fake.push_back(a * g[size_t(i)]);
    }
  }
  for (const auto& [isa, kernels] : GANKERN_TEST_TABLES(InterpolateSamplesKernels, interpolate_samples)) {
    for (Placement at : kPlacements) {
      for (int count : thread_counts) {
        Buffer<T> real_(real, at), fake_(fake, at), grad_(grad, at);
        Buffer<Acc<T>> alpha_(alpha, at);
        Buffer<T> out(samples * size, at), grad_real(samples * size, at), grad_fake(samples * size, at);
        const InterpolateSamples in{samples,    size,         alpha_.data(),    real_.data(),    fake_.data(),
                                    out.data(), grad_.data(), grad_real.data(), grad_fake.data()};
        const Parallel parallel = count < 0 ? one_after_the_other(-count) : threads(count);
        kernels.forward[kDtype<T>](in, parallel);
        kernels.backward[kDtype<T>](in, parallel);
        const double allowed = 4 * kEps<T>;
        const double errors[] = {largest_error(out, points), largest_error(grad_real, to_real),
                                 largest_error(grad_fake, to_fake)};
        for (double error : errors)
          check(error <= allowed, "%s, %s, [%lld, %lld], %s memory, %d threads: error %g, allowed %g", isa,
                dtype_name<T>(), (long long)samples, (long long)size, placement_name(at), count, error,
                allowed);
        if (samples > 1) {
          const bool exact =
              size == 0 ||
              (std::memcmp(out.data(), real.data(), sizeof(T) * size_t(size)) == 0 &&
               std::memcmp(out.data() + size, fake.data() + size, sizeof(T) * size_t(size)) == 0);
          check(exact, "%s, %s: not exact at the ends", isa, dtype_name<T>());
        }
        check(
            samples * size == 0 || (real_.same_bits(real) && fake_.same_bits(fake) && grad_.same_bits(grad)),
            "inputs were written to");
      }
    }
  }
}

}  // namespace

void test_interpolate_samples() {
  if (kRacesOnly) {
    test_problem<float>(2, 30000, {2, 5});
    return;
  }
  each_dtype([&](auto type) {
    using T = decltype(type);
    for (int64_t samples : {0, 1, 3})
      for (int64_t size : {0, 1, 7, 16, 17, 133, 8193}) test_problem<T>(samples, size, {1, 2});
    test_problem<T>(2, 50001, {2, 5, -3});
    test_problem<T>(700, 101, {3, -4});
  });
}

}  // namespace testing
}  // namespace gankern
