// Vectors of the width of the instruction set a file is compiled for, on GCC's and Clang's vector
// extensions: `Vec<float> a = load(p); a = a * b + c; store(p, a);`. Arithmetic and comparisons are the
// language's own operators, so the compiler keeps them in registers and fuses multiply-adds.
//
// Storage types are double, float, BFloat16 and Half; arithmetic is in double for double and in float for
// all others (Acc<T>), which is the accumulation rule of the whole library.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "isa.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace gankern {

// Storage only: 16 bits, as torch lays them out.
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};

namespace GANKERN_ISA {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <class T>
struct AccOf {
  using type = float;
};
template <>
struct AccOf<double> {
  using type = double;
};
template <class T>
using Acc = typename AccOf<T>::type;

template <class A>
struct VecOf {
  typedef A type __attribute__((vector_size(kVectorBytes)));
};
template <class A>
using Vec = typename VecOf<A>::type;
// Lanes of the vectors in which values of storage type T are computed with.
template <class T>
constexpr int kLanes = kVectorBytes / int(sizeof(Acc<T>));

// ---- single values --------------------------------------------------------------------------------------

inline double widen(double x) { return x; }
inline float widen(float x) { return x; }
inline float widen(BFloat16 x) {
  uint32_t bits = uint32_t(x.bits) << 16;
  float y;
  std::memcpy(&y, &bits, 4);
  return y;
}
inline float widen(Half x) {
#if defined(__F16C__)
  return _cvtsh_ss(x.bits);
#else
  // Shift exponent and mantissa into place, then multiply by 2^112 to rebias: exact for subnormals too.
  uint32_t bits = uint32_t(x.bits & 0x7fff) << 13;
  float y;
  std::memcpy(&y, &bits, 4);
  y *= 0x1p112f;
  std::memcpy(&bits, &y, 4);
  if ((x.bits & 0x7c00) == 0x7c00) bits |= 0x7f800000u;  // infinity and NaN
  bits |= uint32_t(x.bits & 0x8000) << 16;
  std::memcpy(&y, &bits, 4);
  return y;
#endif
}

template <class T>
inline T narrow(Acc<T> x);
template <>
inline double narrow<double>(double x) {
  return x;
}
template <>
inline float narrow<float>(float x) {
  return x;
}
template <>
inline BFloat16 narrow<BFloat16>(float x) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  if (x != x) return {uint16_t(0x7fc0)};
  return {uint16_t((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16)};  // nearest, ties to even
}
template <>
inline Half narrow<Half>(float x) {
#if defined(__F16C__)
  return {uint16_t(_cvtss_sh(x, _MM_FROUND_TO_NEAREST_INT))};
#else
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  bits &= 0x7fffffffu;
  if (bits > 0x7f800000u) return {uint16_t(sign | 0x7e00u)};
  if (bits >= 0x477ff000u) return {uint16_t(sign | 0x7c00u)};  // rounds to infinity
  if (bits < 0x38800000u) {
    // Subnormal: let the adder round at the right bit.
    float magnitude;
    std::memcpy(&magnitude, &bits, 4);
    magnitude += 0.5f;
    std::memcpy(&bits, &magnitude, 4);
    return {uint16_t(sign | (bits - 0x3f000000u))};
  }
  bits += 0xfffu + ((bits >> 13) & 1u);
  return {uint16_t(sign | ((bits - 0x38000000u) >> 13))};
#endif
}

// ---- vectors --------------------------------------------------------------------------------------------

template <class A>
inline Vec<A> broadcast(A x) {
  return x - Vec<A>{};
}

// a b + c. Of a sum of two products a compiler may fuse either, and does so differently in the copies of a loop
// (head, body, tail); where the address decides which copy an element meets, this keeps its bits the same.
template <class A>
inline Vec<A> multiply_add(Vec<A> a, Vec<A> b, Vec<A> c) {
#if defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
  return (Vec<A>)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#elif defined(__AVX2__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
  return (Vec<A>)_mm256_fmadd_pd((__m256d)a, (__m256d)b, (__m256d)c);
#else
  return a * b + c;
#endif
}

inline Vec<double> load(const double* p) {
  Vec<double> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Vec<float> load(const float* p) {
  Vec<float> x;
  std::memcpy(&x, p, sizeof x);
  return x;
}
inline Vec<float> load(const BFloat16* p) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  Narrow bits;
  std::memcpy(&bits, p, sizeof bits);
  Wide wide = __builtin_convertvector(bits, Wide) << 16;
  Vec<float> x;
  std::memcpy(&x, &wide, sizeof x);
  return x;
}
inline Vec<float> load(const Half* p) {
  Vec<float> x;
#if defined(__AVX512F__)
  __m512 y = _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  std::memcpy(&x, &y, sizeof x);
#elif defined(__AVX2__)
  __m256 y = _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  std::memcpy(&x, &y, sizeof x);
#else
  for (int i = 0; i < kLanes<Half>; ++i) x[i] = widen(p[i]);
#endif
  return x;
}

inline void store(double* p, Vec<double> x) { std::memcpy(p, &x, sizeof x); }
inline void store(float* p, Vec<float> x) { std::memcpy(p, &x, sizeof x); }
inline void store(BFloat16* p, Vec<float> x) {
  typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));
  typedef uint32_t Wide __attribute__((vector_size(kVectorBytes)));
  Wide bits;
  std::memcpy(&bits, &x, sizeof bits);
  Wide rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  Wide nan = (Wide)(x != x);
  rounded = (nan & 0x7fc0u) | (~nan & rounded);
  Narrow narrowed = __builtin_convertvector(rounded, Narrow);
  std::memcpy(p, &narrowed, sizeof narrowed);
}
inline void store(Half* p, Vec<float> x) {
#if defined(__AVX512F__)
  __m512 y;
  std::memcpy(&y, &x, sizeof y);
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__AVX2__)
  __m256 y;
  std::memcpy(&y, &x, sizeof y);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(y, _MM_FROUND_TO_NEAREST_INT));
#else
  for (int i = 0; i < kLanes<Half>; ++i) p[i] = narrow<Half>(x[i]);
#endif
}

// The first n < kLanes<T> values; the other lanes are zero.
template <class T>
inline Vec<Acc<T>> load_partial(const T* p, int64_t n) {
  T buffer[kLanes<T>] = {};
  for (int64_t i = 0; i < n; ++i) buffer[i] = p[i];
  return load(buffer);
}
template <class T>
inline void store_partial(T* p, Vec<Acc<T>> x, int64_t n) {
  T buffer[kLanes<T>];
  store(buffer, x);
  for (int64_t i = 0; i < n; ++i) p[i] = buffer[i];
}
#if defined(__AVX512F__)
inline Vec<float> load_partial(const float* p, int64_t n) {
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16((1u << n) - 1u), p);
}
inline void store_partial(float* p, Vec<float> x, int64_t n) {
  _mm512_mask_storeu_ps(p, __mmask16((1u << n) - 1u), (__m512)x);
}
#endif

// Past the caches: for results that are larger than the last level and are not read soon. `p` must be
// aligned to kVectorBytes for float and double; the half types have no such store and go the usual way.
template <class T>
inline void stream(T* p, Vec<Acc<T>> x) {
  store(p, x);
}
#if defined(__AVX512F__)
inline void stream(float* p, Vec<float> x) { _mm512_stream_ps(p, (__m512)x); }
inline void stream(double* p, Vec<double> x) { _mm512_stream_pd(p, (__m512d)x); }
#elif defined(__AVX2__)
inline void stream(float* p, Vec<float> x) { _mm256_stream_ps(p, (__m256)x); }
inline void stream(double* p, Vec<double> x) { _mm256_stream_pd(p, (__m256d)x); }
#elif defined(__SSE2__)
inline void stream(float* p, Vec<float> x) { _mm_stream_ps(p, (__m128)x); }
inline void stream(double* p, Vec<double> x) { _mm_stream_pd(p, (__m128d)x); }
#endif
// After the last stream() of a thread, before another thread may read.
inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

// The sum of all lanes, of one half and the other: the same order for every compiler.
template <class A, int kBytes = kVectorBytes, class V>
[[gnu::always_inline]] inline A sum(V x) {
  if constexpr (kBytes == int(sizeof(A))) {
    A total;
    std::memcpy(&total, &x, sizeof total);
    return total;
  } else {
    typedef A Half __attribute__((vector_size(kBytes / 2)));
    Half low, high;
    std::memcpy(&low, &x, sizeof low);
    std::memcpy(&high, reinterpret_cast<const char*>(&x) + sizeof low, sizeof high);
    return sum<A, kBytes / 2>(low + high);
  }
}

}  // namespace GANKERN_ISA
}  // namespace gankern
