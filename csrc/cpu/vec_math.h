// Elementary functions of vectors (vec.h), the same algorithm for every instruction set, in registers and
// without branches. NaN stays NaN.
//
//   exp_minus(x)     exp(-x), for x >= 0: an error of at most 1.1 units in the last place, and half a unit in
//                    the last place of x on top, no more than the rounding of a computed x has
//   abs(x), sign(x): sign is -1, 0 or 1; of NaN it is some finite number, so that a product with
//                    it is NaN only where its other factor is
//
// exp_minus, but for AVX-512: with n the integer nearest to -x log2(e) and r = -x - n ln(2) in [-ln(2)/2,
// ln(2)/2], exp(-x) = e^r 2^n. e^r is a polynomial 1 + r q(r), which makes exp_minus(0) exactly 1, of least
// relative error (Remez): 2.5e-9 for float, degree 6, and 7.2e-18 for double, degree 11. ln(2) is taken in
// two parts, the first so short that n ln(2) is exact.
#pragma once

#include <type_traits>

#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {

template <class A>
struct ExpConstants;

template <>
struct ExpConstants<float> {
  typedef int32_t Int;
  static constexpr int kTerms = 6;
  static constexpr float kTerm[kTerms] = {1.00000004f,   0.500000005f,  0.166664155f,
                                          0.0416663529f, 0.0083751264f, 0.00139411084f};
  static constexpr float kLog2e = 1.44269504f, kLn2 = 0.693359375f, kLn2Rest = -2.12194440e-4f;
  static constexpr float kLeast = -104.0f;           // exp of less is 0
  static constexpr float kLeastNormal = -87.33654f;  // exp of less is subnormal
  static constexpr float kRound = 0x1.8p23f;         // x + kRound has x's nearest integer in its last bits
  static constexpr Int kMagnitude = 0x7fffffff, kMantissaBits = 23;
};

template <>
struct ExpConstants<double> {
  typedef int64_t Int;
  static constexpr int kTerms = 11;
  static constexpr double kTerm[kTerms] = {1,
                                           0.500000000000001,
                                           0.16666666666666594,
                                           0.041666666666543117,
                                           0.0083333333333738286,
                                           0.0013888888939857598,
                                           0.00019841269767546612,
                                           2.4801497242331991e-05,
                                           2.7557356368641001e-06,
                                           2.7628715443274632e-07,
                                           2.5071564339868265e-08};
  static constexpr double kLog2e = 1.4426950408889634, kLn2 = 0.693145751953125,
                          kLn2Rest = 1.42860682030941723e-6;
  static constexpr double kLeast = -746.0;
  static constexpr double kLeastNormal = -708.396418532264;
  static constexpr double kRound = 0x1.8p52;
  static constexpr Int kMagnitude = 0x7fffffffffffffff, kMantissaBits = 52;
};

// Integers as wide as A, one a lane.
template <class A>
struct IntVecOf {
  typedef typename ExpConstants<A>::Int type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using IntVec = typename IntVecOf<A>::type;

template <class V>
inline auto abs(V x) {
  using A = std::decay_t<decltype(x[0])>;
  return (V)((IntVec<A>)x & ExpConstants<A>::kMagnitude);
}

#if defined(__AVX512F__)
// x 2^floor(n).
inline Vec<float> scale(Vec<float> x, Vec<float> n) {
  return (Vec<float>)_mm512_scalef_ps((__m512)x, (__m512)n);
}
inline Vec<double> scale(Vec<double> x, Vec<double> n) {
  return (Vec<double>)_mm512_scalef_pd((__m512d)x, (__m512d)n);
}

// One instruction that maps classes of numbers: 4 bits for each of NaN, NaN, 0, 1, -inf, inf, < 0, > 0, where
// 8 stands for 0, 9 for -1 and a for 1.
constexpr int kSignTable = int(0xa9a9a8aau);
inline Vec<float> sign(Vec<float> x) {
  return (Vec<float>)_mm512_fixupimm_ps((__m512)x, (__m512)x, _mm512_set1_epi32(kSignTable), 0);
}
inline Vec<double> sign(Vec<double> x) {
  return (Vec<double>)_mm512_fixupimm_pd((__m512d)x, (__m512d)x, _mm512_set1_epi64(kSignTable), 0);
}
#else
template <class V>
inline V sign(V x) {
  using A = std::decay_t<decltype(x[0])>;
  const IntVec<A> one = (IntVec<A>)broadcast<A>(1);
  const IntVec<A> is_zero = (IntVec<A>)(x == broadcast<A>(0));
  return (V)(~is_zero & (one | ((IntVec<A>)x & ~ExpConstants<A>::kMagnitude)));
}
#endif

#if defined(__AVX512F__)
// Here two instructions take t = -x log2(e) apart, t - floor(t) and the product with 2^floor(t), whatever t
// is; -infinity becomes 0 by itself. 2^f for f in [0, 1) is a polynomial of least relative error: 1.9e-9 for
// float, 3.1e-18 for double.
template <class A>
constexpr A kPower2[] = {1.0f,           0.693146984f,   0.240229836f,   0.0554833420f,
                         0.00967884096f, 0.00124396882f, 0.000217022541f};
template <>
constexpr double kPower2<double>[] = {1.0,
                                      0.6931471805599463,
                                      0.2402265069590547,
                                      0.055504108665711156,
                                      0.009618129098792517,
                                      0.0013333558661580297,
                                      0.0001540351144636591,
                                      1.525319025105116e-05,
                                      1.320819347014727e-06,
                                      1.025445756348392e-07,
                                      6.5544564076409885e-09,
                                      6.272435804780997e-10};

// x - floor(x).
inline Vec<float> fraction(Vec<float> x) { return (Vec<float>)_mm512_reduce_ps((__m512)x, 9); }
inline Vec<double> fraction(Vec<double> x) { return (Vec<double>)_mm512_reduce_pd((__m512d)x, 9); }

template <class V>
inline V exp_minus(V x) {
  using A = std::decay_t<decltype(x[0])>;
  constexpr int kLast = int(sizeof kPower2<A> / sizeof(A)) - 1;
  const V t = x * broadcast<A>(A(-1.4426950408889634)), f = fraction(t);
  V p = broadcast<A>(kPower2<A>[kLast]);
#pragma GCC unroll 16
  for (int k = kLast - 1; k >= 0; --k) p = p * f + broadcast<A>(kPower2<A>[k]);
  return scale(p, t);
}
#else
// The lesser of x and a bound; NaN stays NaN.
template <class V, class A>
inline V at_most(V x, A bound) {
  const V b = broadcast<A>(bound);
  return b < x ? b : x;
}

template <class V>
inline V nearest_integer(V x) {
  using A = std::decay_t<decltype(x[0])>;
  const V shifted = x + broadcast<A>(ExpConstants<A>::kRound);
  return shifted - broadcast<A>(ExpConstants<A>::kRound);
}

// e^r for r in [-ln(2)/2, ln(2)/2].
template <class V>
inline V exp_near_zero(V r) {
  using A = std::decay_t<decltype(r[0])>;
  using C = ExpConstants<A>;
  V p = broadcast<A>(C::kTerm[C::kTerms - 1]);
#pragma GCC unroll 16
  for (int k = C::kTerms - 2; k >= 0; --k) p = p * r + broadcast<A>(C::kTerm[k]);
  return p * r + broadcast<A>(1);
}

template <class V>
inline V exp_minus(V x) {
  using A = std::decay_t<decltype(x[0])>;
  using C = ExpConstants<A>;
  x = at_most(x, -C::kLeast);
  const V n = nearest_integer(x * broadcast<A>(-C::kLog2e));
  const V r = (-(n * broadcast<A>(C::kLn2)) - x) - n * broadcast<A>(C::kLn2Rest);
  // One step of scaling; a subnormal result is 0 instead.
  const IntVec<A> bits = (IntVec<A>)(n + broadcast<A>(C::kRound)) << C::kMantissaBits;
  const V power = (V)(bits + (IntVec<A>)broadcast<A>(1));
  const V y = exp_near_zero(r) * power;
  return x > broadcast<A>(-C::kLeastNormal) ? V{} : y;
}
#endif

}  // namespace GANKERN_ISA
}  // namespace gankern
