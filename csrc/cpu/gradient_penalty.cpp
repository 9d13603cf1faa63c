// The penalty of each sample's gradient norm (Gulrajani 2017, arXiv 1704.00028; one-sided: 1709.08894).
//
//   r_n = |g_n|,  p_n = e^2 with e = r_n - t, or 0 where e < 0 and one-sided
//
// Gradient of g for the gradient G of p, with c = 2 (1 - t/r):
//   dg_n = G_n c_n g_n
// Second order, for the gradient H of dg, with d = c'(r)/r = 2 t/r^3:
//   dG_n = c_n <H_n, g_n>
//   dg_n = G_n c_n H_n + G_n d_n <H_n, g_n> g_n
// c = d = 0 where e < 0 and one-sided. At r = 0 the norm's subgradient is 0, so c = d = 0 there; with t = 0
// the penalty is r^2, c = 2 everywhere.
//
// Forward reads g once and adds up its squares; backward reads g once and writes as much; double backward
// reads g and H twice (for the inner products, and for the result) and writes as much as g. All of it is
// bound by memory.
//
// A block is up to 8192 elements of one sample: small enough that one large image is shared out among
// threads. Each block's sum is kept, and the sums of a sample are added in their order, in double: the split
// follows from the shape, and the result does not depend on the number of threads. Blocks are summed in four
// vectors of the accumulation dtype.
#include "gradient_penalty.h"

#include <cmath>

#include "common.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kBlock = kGradientPenaltyBlock;
constexpr int64_t kGrain = 4 * kBlock;  // elements for which another thread is worth its start

inline int64_t blocks_of(int64_t size) { return ceil_div(size, kBlock); }

// f(sample, block, begin, end) for all blocks; begin and end count the sample's elements.
template <class F>
void each_block(const GradientPenalty& in, const Parallel& parallel, const F& f) {
  const int64_t blocks = blocks_of(in.size);
  if (blocks == 0) return;
  const int64_t grain = kGrain / min(in.size, kBlock);
  parallel_for(parallel, in.samples * blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t begin = i % blocks * kBlock;
      f(i / blocks, i, begin, min(begin + kBlock, in.size));
    }
  });
}

template <class T>
double dot_in_acc(const T* a, const T* b, int64_t count) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  Vec<A> total[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= count; i += 4 * L)
    for (int k = 0; k < 4; ++k) total[k] += load(a + i + k * L) * load(b + i + k * L);
  for (; i + L <= count; i += L) total[0] += load(a + i) * load(b + i);
  if (i < count) total[1] += load_partial(a + i, count - i) * load_partial(b + i, count - i);
  return double(sum<A>((total[0] + total[1]) + (total[2] + total[3])));
}

// Where the products are beyond float's range (of values above 1e19 or below 1e-19), they are taken in
// double.
template <class T>
double dot(const T* a, const T* b, int64_t count) {
  const double total = dot_in_acc(a, b, count), size = std::fabs(total);
  if ((size > 1e-30 && size < 1e30) || sizeof(T) == sizeof(double)) return total;
  double wide = 0;
  for (int64_t i = 0; i < count; ++i) wide += double(widen(a[i])) * double(widen(b[i]));
  return wide;
}

template <class T>
void all_dots(const GradientPenalty& in, const T* a, const T* b, const Parallel& parallel) {
  each_block(in, parallel, [&](int64_t n, int64_t i, int64_t begin, int64_t end) {
    in.partial[i] = dot(a + n * in.size + begin, b + n * in.size + begin, end - begin);
  });
}

double total_of(const GradientPenalty& in, int64_t sample) {
  const int64_t blocks = blocks_of(in.size);
  double total = 0;
  for (int64_t b = 0; b < blocks; ++b) total += in.partial[sample * blocks + b];
  return total;
}

// c(r) and d(r).
struct Derivatives {
  double first, second;
};
Derivatives derivatives(double r, double target, bool one_sided) {
  if (target == 0) return {2, 0};
  if (r == 0 || (one_sided && r < target)) return {0, 0};
  return {2 * (1 - target / r), 2 * target / (r * r * r)};
}

template <class T>
void forward(const GradientPenalty& in, const Parallel& parallel) {
  using A = Acc<T>;
  const T* g = static_cast<const T*>(in.gradient);
  all_dots(in, g, g, parallel);
  for (int64_t n = 0; n < in.samples; ++n) {
    const double squares = total_of(in, n), r = std::sqrt(squares), e = r - in.target;
    static_cast<A*>(in.norms)[n] = A(r);
    static_cast<A*>(in.values)[n] = A(in.target == 0 ? squares : in.one_sided && e < 0 ? 0 : e * e);
  }
}

// to = a x, or a x + b y.
template <class T, bool kTwo>
void combine(T* to, Acc<T> a, const T* x, Acc<T> b, const T* y, int64_t count) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  const Vec<A> va = broadcast<A>(a), vb = broadcast<A>(b);
  int64_t i = 0;
  for (; i + L <= count; i += L) {
    Vec<A> value = va * load(x + i);
    if (kTwo) value += vb * load(y + i);
    store(to + i, value);
  }
  if (i == count) return;
  Vec<A> value = va * load_partial(x + i, count - i);
  if (kTwo) value += vb * load_partial(y + i, count - i);
  store_partial(to + i, value, count - i);
}

template <class T>
void backward(const GradientPenalty& in, const Parallel& parallel) {
  using A = Acc<T>;
  const T* g = static_cast<const T*>(in.gradient);
  T* out = static_cast<T*>(in.out);
  each_block(in, parallel, [&](int64_t n, int64_t, int64_t begin, int64_t end) {
    const Derivatives at = derivatives(static_cast<A*>(in.norms)[n], in.target, in.one_sided);
    const A scale = A(static_cast<const A*>(in.grad)[n] * at.first);
    const int64_t offset = n * in.size + begin;
    combine<T, false>(out + offset, scale, g + offset, A(0), nullptr, end - begin);
  });
}

template <class T>
void double_backward(const GradientPenalty& in, const Parallel& parallel) {
  using A = Acc<T>;
  const T* g = static_cast<const T*>(in.gradient);
  const T* h = static_cast<const T*>(in.grad_grad);
  T* out = static_cast<T*>(in.out);
  all_dots(in, h, g, parallel);
  for (int64_t n = 0; n < in.samples; ++n) {
    const Derivatives at = derivatives(static_cast<A*>(in.norms)[n], in.target, in.one_sided);
    static_cast<A*>(in.values)[n] = A(at.first * total_of(in, n));
  }
  each_block(in, parallel, [&](int64_t n, int64_t, int64_t begin, int64_t end) {
    const Derivatives at = derivatives(static_cast<A*>(in.norms)[n], in.target, in.one_sided);
    const double grad = static_cast<const A*>(in.grad)[n];
    const A a = A(grad * at.first), b = A(grad * at.second * total_of(in, n));
    const int64_t offset = n * in.size + begin;
    combine<T, true>(out + offset, a, h + offset, b, g + offset, end - begin);
  });
}

}  // namespace

extern const Orders<GradientPenalty> gradient_penalty = {
    GANKERN_EACH_DTYPE(forward),
    GANKERN_EACH_DTYPE(backward),
    GANKERN_EACH_DTYPE(double_backward),
};

}  // namespace GANKERN_ISA
}  // namespace gankern
