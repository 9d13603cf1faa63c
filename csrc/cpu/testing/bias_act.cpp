// The kernels of bias, activation, gain and clamp against the formulas, in double.
#include "../bias_act.h"

#include "testing.h"

namespace gankern {
namespace testing {
namespace {

using Doubles = std::vector<double>;

constexpr double kGain = -1.25, kClamp = 0.75;

struct Problem {
  Layout layout;
  Activation activation;
  bool sparse;  // every argument that may be null is
  bool of_input() const {
    return activation == Activation::kSilu || activation == Activation::kLeakyReluOfInput ||
           activation == Activation::kPrelu;
  }
  bool curved() const {
    return activation != Activation::kLinear && activation != Activation::kRelu &&
           activation != Activation::kLeakyRelu && activation != Activation::kLeakyReluOfInput &&
           activation != Activation::kPrelu;
  }
  // PReLU's is a tensor's, which half precision has exactly.
  double slope() const { return activation == Activation::kPrelu ? -0.25 : of_input() ? -0.3 : 0.2; }
  // Where the pre-activation is kept, rounding decides about values next to the clamp: that is for Python.
  double clamp() const { return sparse || of_input() ? double(NAN) : kClamp; }
  int64_t channel(int64_t e) const { return e / layout.inner % layout.channels; }
};

// ---- the table of activation.h --------------------------------------------------------------------------

constexpr double kSeluScale = 1.0507009873554805, kSeluNegative = kSeluScale * 1.6732632423543773;

double value(const Problem& p, double z) {
  switch (p.activation) {
    case Activation::kLinear: return z;
    case Activation::kRelu: return std::fmax(z, 0);
    case Activation::kLeakyRelu:
    case Activation::kPrelu:
    case Activation::kLeakyReluOfInput: return z > 0 ? z : p.slope() * z;
    case Activation::kTanh: return std::tanh(z);
    case Activation::kSigmoid: return 1 / (1 + std::exp(-z));
    case Activation::kElu: return z > 0 ? z : std::expm1(z);
    case Activation::kSelu: return z > 0 ? kSeluScale * z : kSeluNegative * std::expm1(z);
    case Activation::kSoftplus: return std::log1p(std::exp(z));
    case Activation::kSilu: return z / (1 + std::exp(-z));
  }
  return NAN;
}
double first(const Problem& p, double s) {
  const double t = 1 / (1 + std::exp(-s));
  switch (p.activation) {
    case Activation::kLinear: return 1;
    case Activation::kRelu: return s > 0;
    case Activation::kLeakyRelu:
    case Activation::kPrelu:
    case Activation::kLeakyReluOfInput: return s > 0 ? 1 : p.slope();
    case Activation::kTanh: return 1 - s * s;
    case Activation::kSigmoid: return s * (1 - s);
    case Activation::kElu: return s > 0 ? 1 : s + 1;
    case Activation::kSelu: return s > 0 ? kSeluScale : s + kSeluNegative;
    case Activation::kSoftplus: return -std::expm1(-s);
    case Activation::kSilu: return t * (1 + s * (1 - t));
  }
  return NAN;
}
double second(const Problem& p, double s) {
  const double t = 1 / (1 + std::exp(-s));
  switch (p.activation) {
    case Activation::kTanh: return -2 * s;
    case Activation::kSigmoid: return 1 - 2 * s;
    case Activation::kElu:
    case Activation::kSelu: return s < 0;
    case Activation::kSoftplus: return std::exp(-s);
    case Activation::kSilu: return t * (1 - t) * (2 + s * (1 - 2 * t));
    default: return 0;
  }
}

// ---- one problem ----------------------------------------------------------------------------------------

// Of tensors, and of the channels' vectors.
enum Result { kY, kInPlace, kGradX, kGradGrad, kGradSaved, kTensors };
enum Sum { kGradBias, kSecondGradBias, kSums };

struct Expected {
  Doubles tensors[kTensors], sums[kSums], magnitudes[kSums];
};

template <class T>
struct Inputs {
  Problem problem;
  std::vector<T> x, saved, grad, h, bias, h_bias;
  Expected expected;

  explicit Inputs(const Problem& p)
      : problem(p),
        x(random_values<T>(p.layout.size(), 1, -2, 3)),
        saved(x),
        grad(random_values<T>(p.layout.size(), 2, -1, 1.5)),
        h(random_values<T>(p.layout.size(), 3, -1, 1.5)),
        bias(random_values<T>(p.layout.channels, 4, -1, 1)),
        h_bias(random_values<T>(p.layout.channels, 5, -1, 1)) {
    Expected& r = expected;
    for (Doubles& v : r.tensors) v.resize(x.size());
    for (Doubles& v : r.sums) v.resize(bias.size());
    for (Doubles& v : r.magnitudes) v.resize(bias.size());
    const double clamp = double(baseline::widen(baseline::narrow<T>(Acc<T>(p.clamp()))));
    const auto add = [&](int which, size_t c, double v) {
      r.sums[which][c] += v;
      r.magnitudes[which][c] += std::fabs(v);
    };
    for (size_t e = 0; e < x.size(); ++e) {
      const size_t c = size_t(p.channel(int64_t(e)));
      const auto wide = [](T v) { return double(baseline::widen(v)); };
      const double z = wide(x[e]) + (p.sparse ? 0 : wide(bias[c]));
      double y = value(p, z) * kGain;
      if (std::fabs(y) > clamp) y = std::copysign(clamp, y);
      r.tensors[kY][e] = r.tensors[kInPlace][e] = y;
      if (!p.of_input()) saved[e] = baseline::narrow<T>(Acc<T>(y));
      const double s = p.of_input() ? z : wide(saved[e]) / kGain;
      const double m = !p.of_input() && std::fabs(wide(saved[e])) >= clamp ? 0 : 1;
      const double g = wide(grad[e]), both = m * (p.sparse ? wide(h[e]) : wide(h[e]) + wide(h_bias[c]));
      r.tensors[kGradX][e] = m * g * kGain * first(p, s);
      r.tensors[kGradGrad][e] = both * kGain * first(p, s);
      r.tensors[kGradSaved][e] = both * g * second(p, s) * (p.of_input() ? kGain : 1);
      add(kGradBias, c, r.tensors[kGradX][e]);
      add(kSecondGradBias, c, r.tensors[kGradSaved][e]);
    }
  }
};

template <class T>
struct Call {
  const Inputs<T>& in;
  Placement at;
  Buffer<T> x{in.x, at}, saved{in.saved, at}, grad{in.grad, at}, h{in.h, at}, bias{in.bias, at},
      h_bias{in.h_bias, at},
      slope{std::vector<T>(in.bias.size(), baseline::narrow<T>(Acc<T>(in.problem.slope()))), at};
  std::vector<Buffer<T>> tensors = buffers<T>(kTensors, x.size(), at),
                         sums = buffers<T>(kSums, bias.size(), at);

  bool sums_wanted() const { return !in.problem.sparse; }

  void run(const BiasActKernels& kernels, const Parallel& parallel) {
    const Problem& p = in.problem;
    const int row = int(p.activation), column = kDtype<T>;
    BiasAct b{};
    b.layout = p.layout, b.negative_slope = p.slope(), b.gain = kGain, b.clamp = p.clamp();
    b.x = x.data(), b.bias = p.sparse ? nullptr : bias.data();
    if (p.activation == Activation::kPrelu) b.slope = slope.data();
    b.out = tensors[kY].data();
    kernels.forward[row][column](b, parallel);
    if (x.size())
      std::memcpy(static_cast<void*>(tensors[kInPlace].data()), x.data(), sizeof(T) * in.x.size());
    b.x = b.out = tensors[kInPlace].data();
    kernels.forward[row][column](b, parallel);
    b.x = saved.data(), b.grad = grad.data();
    if (!p.of_input()) b.bias = nullptr;
    b.out = tensors[kGradX].data(), b.out_bias = sums_wanted() ? sums[kGradBias].data() : nullptr;
    kernels.backward[row][column](b, parallel);
    b.h = h.data(), b.h_bias = p.sparse ? nullptr : h_bias.data();
    b.out = tensors[kGradGrad].data(), b.out_x = tensors[kGradSaved].data();
    b.out_bias = sums_wanted() ? sums[kSecondGradBias].data() : nullptr;
    if (!p.curved()) b.out_x = b.out_bias = nullptr;
    kernels.double_backward[row][column](b, parallel);
  }
  bool same(const Call& other) const {
    return all_same(tensors, other.tensors) && all_same(sums, other.sums);
  }
  bool inputs_unchanged() const {
    return in.x.empty() || (x.same_bits(in.x) && saved.same_bits(in.saved) && grad.same_bits(in.grad) &&
                            h.same_bits(in.h) && bias.same_bits(in.bias) && h_bias.same_bits(in.h_bias));
  }
};

template <class T>
void compare(const Call<T>& call, const char* what) {
  const Problem& p = call.in.problem;
  const Expected& exact = call.in.expected;
  const double inside = 64 * kEps<Acc<T>>;
  constexpr const char* names[] = {"y", "y in place", "grad_x", "grad_grad", "grad_saved"};
  for (int k = 0; k < kTensors; ++k) {
    if (k == kGradSaved && !p.curved()) continue;
    const double error = largest_error(call.tensors[size_t(k)], exact.tensors[k]);
    const double allowed = (kEps<T> + inside) * std::max(1.0, largest(exact.tensors[k]));
    check(error <= allowed, "%s of %s: error %g, allowed %g", names[k], what, error, allowed);
  }
  for (int k = 0; call.sums_wanted() && k < (p.curved() ? kSums : kSecondGradBias); ++k) {
    const double error = largest_error(call.sums[size_t(k)], exact.sums[k]);
    const double allowed =
        kEps<T> * std::max(1.0, largest(exact.sums[k])) + inside * largest(exact.magnitudes[k]);
    check(error <= allowed, "sum %d of %s: error %g, allowed %g", k, what, error, allowed);
  }
}

// Every instruction set, placement and number of threads on one problem.
template <class T>
void test_problem(const Problem& problem, const Placements& placements, const std::vector<int>& counts) {
  const Inputs<T> inputs(problem);
  const Layout& l = problem.layout;
  const std::string what =
      text("%s, activation %d, [%lld, %lld, %lld]%s", dtype_name<T>(), int(problem.activation),
           (long long)l.outer, (long long)l.channels, (long long)l.inner, problem.sparse ? ", sparse" : "");
  test_every_way<Call<T>>(GANKERN_TEST_TABLES(bias_act), inputs, what, placements, counts, compare<T>);
}

}  // namespace

GANKERN_TEST(bias_act) {
  // Work for several threads: rows, segments of rows, periods, blocks of a period.
  const std::vector<Layout> shared = {{40, 16, 97}, {2, 2, 40000}, {400, 130, 1}, {64, 700, 9}, {9, 9001, 1}};
  if (kRacesOnly) {
    for (const Layout& layout : shared)
      for (Activation activation : {Activation::kLeakyRelu, Activation::kSilu})
        test_problem<float>({layout, activation, false}, {Placement::kHeap}, {2, 5});
    return;
  }
  each_dtype([&](auto type) {
    using T = decltype(type);
    for (int k = 0; k < kActivations; ++k)
      for (bool sparse : {false, true})
        for (const Layout& layout : std::vector<Layout>{
                 {0, 3, 4}, {1, 1, 1}, {3, 5, 1}, {2, 3, 67}, {5, 3, 7}, {1, 1, 130}, {9, 40, 1}})
          test_problem<T>({layout, Activation(k), sparse}, kEveryPlacement, {3});
  });
  for (const Layout& layout : shared)
    test_problem<float>({layout, Activation::kTanh, false}, {Placement::kShifted, Placement::kGuarded},
                        {2, -3});
  // Results that go past the caches: aligned, and not.
  for (const Layout& layout : std::vector<Layout>{{2, 3, 700032}, {65600, 64, 1}, {65600, 65, 1}})
    test_problem<float>({layout, Activation::kLeakyRelu, false}, {Placement::kGuarded}, {2});
}

}  // namespace testing
}  // namespace gankern
