// Activations as functions of vectors, with their first and second derivatives.
//
// A derivative is a function of what the backward has at hand, `s`: the activation's value a = f(z) where
// that determines it, so that nothing but the layer's own output must be kept, and the pre-activation z
// otherwise.
//
//   activation   f(z)                              s   f'                         df'/ds
//   linear       z                                     1                          none
//   relu         max(z, 0)                         a   a > 0                      none
//   leaky_relu   z > 0 ? z : slope z               a   a > 0 ? 1 : slope          none
//   tanh         tanh z                            a   1 - a^2                    -2a
//   sigmoid      1 / (1 + e^-z)                    a   a (1 - a)                  1 - 2a
//   elu          z > 0 ? z : e^z - 1               a   a > 0 ? 1 : a + 1          a < 0 ? 1 : 0
//   selu         l (z > 0 ? z : b (e^z - 1))       a   a > 0 ? l : a + l b        a < 0 ? 1 : 0
//   softplus     log(1 + e^z)                      a   1 - e^-a                   e^-a
//   silu         z / (1 + e^-z) = z t              z   t (1 + z (1 - t))          t (1 - t) (2 + z (1 - 2t))
//   prelu        z > 0 ? z : slope z               z   z > 0 ? 1 : slope          none
//
// The second derivative with respect to a is what autograd asks for where a is a saved result: the engine
// takes it back through the activation itself. A leaky ReLU of negative slope does not determine the sign of
// z by that of a: kLeakyReluOfInput is the same function with s = z. So is kPrelu, whose slope is a tensor and
// has a gradient of its own: bias_act.cpp.
#pragma once

#include "vec_math.h"

namespace gankern {

// The order of activations in every kernel table, and in gankern/core/activations.py.
enum class Activation {
  kLinear,
  kRelu,
  kLeakyRelu,
  kTanh,
  kSigmoid,
  kElu,
  kSelu,
  kSoftplus,
  kSilu,
  kLeakyReluOfInput,
  kPrelu,
};
constexpr int kActivations = 11;

namespace GANKERN_ISA {

// ---- elementary functions ---------------------------------------------------------------------------------

// 1/k! up to the number of terms that leave less than half a unit in the last place at 0.35.
template <class A>
constexpr int kExpm1Terms = sizeof(A) == 4 ? 8 : 14;
// 1/(2k+1) of the series of atanh, at 1/3.
template <class A>
constexpr int kAtanhTerms = sizeof(A) == 4 ? 8 : 17;

// exp(-x) - 1 for x >= 0, to a few units in the last place also where x is small.
template <class V>
inline V expm1_minus(V x) {
  using A = std::decay_t<decltype(x[0])>;
  V p = broadcast<A>(1);
#pragma GCC unroll 16
  for (int k = kExpm1Terms<A>; k >= 2; --k) p = broadcast<A>(1) - p * x * broadcast<A>(A(1) / A(k));
  // Two values that are both computed: there is no branch.
  return x < broadcast<A>(A(0.35)) ? -x * p : exp_minus(x) - broadcast<A>(1);
}

// log(1 + e) for e in [0, 1], as 2 atanh(e / (2 + e)).
template <class V>
inline V log1p_unit(V e) {
  using A = std::decay_t<decltype(e[0])>;
  const V s = e / (broadcast<A>(2) + e), square = s * s;
  V p = V{};
#pragma GCC unroll 32
  for (int k = kAtanhTerms<A>; k >= 0; --k) p = p * square + broadcast<A>(A(1) / A(2 * k + 1));
  return broadcast<A>(2) * s * p;
}

template <class V>
inline V sigmoid(V z) {
  using A = std::decay_t<decltype(z[0])>;
  const V e = exp_minus(abs(z)), one = broadcast<A>(1);
  return (z < V{} ? e : one) / (one + e);
}

// ---- the table -----------------------------------------------------------------------------------------

// value(z) is f; first(g, s) is g f', and second(p, s) is p df'/ds. A factor of 0 makes 0 of infinities too.
template <Activation kActivation, class A>
struct Act;

template <class A>
struct Act<Activation::kLinear, A> {
  using V = Vec<A>;
  static constexpr bool kOfInput = false, kSecond = false;
  explicit Act(A) {}
  V value(V z) const { return z; }
  V first(V g, V) const { return g; }
  V second(V, V) const { return V{}; }
};

template <class A>
struct Act<Activation::kRelu, A> {
  using V = Vec<A>;
  static constexpr bool kOfInput = false, kSecond = false;
  explicit Act(A) {}
  V value(V z) const { return z <= V{} ? V{} : z; }
  V first(V g, V s) const { return s <= V{} ? V{} : g; }
  V second(V, V) const { return V{}; }
};

template <class A>
struct Act<Activation::kLeakyRelu, A> {
  using V = Vec<A>;
  static constexpr bool kOfInput = false, kSecond = false;
  V slope;
  explicit Act(A negative_slope) : slope(broadcast<A>(negative_slope)) {}
  V value(V z) const { return z > V{} ? z : z * slope; }
  V first(V g, V s) const { return s > V{} ? g : g * slope; }
  V second(V, V) const { return V{}; }
};

template <class A>
struct Act<Activation::kLeakyReluOfInput, A> : Act<Activation::kLeakyRelu, A> {
  static constexpr bool kOfInput = true;
  using Act<Activation::kLeakyRelu, A>::Act;
};

// Its slope is set for each vector of channels.
template <class A>
struct Act<Activation::kPrelu, A> : Act<Activation::kLeakyReluOfInput, A> {
  using Act<Activation::kLeakyReluOfInput, A>::Act;
};

template <class A>
struct Act<Activation::kTanh, A> {
  using V = Vec<A>;
  static constexpr bool kOfInput = false, kSecond = true;
  explicit Act(A) {}
  V value(V z) const {
    const V m = expm1_minus(abs(z) * broadcast<A>(2));
    const V a = -m / (broadcast<A>(2) + m);
    return z < V{} ? -a : a;
  }
  V first(V g, V a) const { return g * ((broadcast<A>(1) - a) * (broadcast<A>(1) + a)); }
  V second(V p, V a) const { return p * (broadcast<A>(-2) * a); }
};

template <class A>
struct Act<Activation::kSigmoid, A> {
  using V = Vec<A>;
  static constexpr bool kOfInput = false, kSecond = true;
  explicit Act(A) {}
  V value(V z) const { return sigmoid(z); }
  V first(V g, V a) const { return g * (a * (broadcast<A>(1) - a)); }
  V second(V p, V a) const { return p * (broadcast<A>(1) - broadcast<A>(2) * a); }
};

template <class A>
struct Act<Activation::kElu, A> {
  using V = Vec<A>;
  static constexpr bool kOfInput = false, kSecond = true;
  explicit Act(A) {}
  V value(V z) const { return z <= V{} ? expm1_minus(-z) : z; }
  V first(V g, V a) const { return a > V{} ? g : g * (a + broadcast<A>(1)); }
  V second(V p, V a) const { return a >= V{} ? V{} : p; }
};

template <class A>
struct Act<Activation::kSelu, A> {
  using V = Vec<A>;
  static constexpr bool kOfInput = false, kSecond = true;
  static constexpr A kScale = A(1.0507009873554804934193349852946);
  static constexpr A kNegative = A(1.0507009873554804934193349852946 * 1.6732632423543772848170429916717);
  explicit Act(A) {}
  V value(V z) const {
    return z <= V{} ? expm1_minus(-z) * broadcast<A>(kNegative) : z * broadcast<A>(kScale);
  }
  V first(V g, V a) const { return g * (a > V{} ? broadcast<A>(kScale) : a + broadcast<A>(kNegative)); }
  V second(V p, V a) const { return a >= V{} ? V{} : p; }
};

template <class A>
struct Act<Activation::kSoftplus, A> {
  using V = Vec<A>;
  static constexpr bool kOfInput = false, kSecond = true;
  explicit Act(A) {}
  V value(V z) const { return (z < V{} ? V{} : z) + log1p_unit(exp_minus(abs(z))); }
  V first(V g, V a) const { return g * -expm1_minus(a); }
  V second(V p, V a) const { return p * exp_minus(a); }
};

template <class A>
struct Act<Activation::kSilu, A> {
  using V = Vec<A>;
  static constexpr bool kOfInput = true, kSecond = true;
  explicit Act(A) {}
  V value(V z) const { return z * sigmoid(z); }
  V first(V g, V z) const {
    const V t = sigmoid(z), one = broadcast<A>(1);
    return g * (t * (one + z * (one - t)));
  }
  V second(V p, V z) const {
    const V t = sigmoid(z), one = broadcast<A>(1), two = broadcast<A>(2);
    return p * (t * (one - t) * (two + z * (one - two * t)));
  }
};

}  // namespace GANKERN_ISA
}  // namespace gankern
