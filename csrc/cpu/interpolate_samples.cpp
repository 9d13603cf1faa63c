// Points between samples (Gulrajani 2017, arXiv 1704.00028, algorithm 1).
//
//   x_n = r_n + a_n (f_n - r_n), computed as f_n - (1 - a_n) (f_n - r_n) where a_n >= 1/2: exact at both ends
//
// Gradients for the gradient g of x: dr_n = (1 - a_n) g_n, df_n = a_n g_n.
//
// Forward reads both samples once and writes one; backward reads g once and writes both. Bound by memory.
// Threads take blocks of up to 8192 elements of one sample; elements are independent.
#include "interpolate_samples.h"

#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kBlock = 8192;
constexpr int64_t kGrain = 4 * kBlock;  // elements for which another thread is worth its start

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }

// f(alpha, offset of the first element, count) for all blocks.
template <class T, class F>
void each_block(const InterpolateSamples& in, const Parallel& parallel, const F& f) {
  const int64_t blocks = (in.size + kBlock - 1) / kBlock;
  if (blocks == 0) return;
  const int64_t grain = kGrain / min(in.size, kBlock);
  parallel_for(parallel, in.samples * blocks, grain, [&](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i) {
      const int64_t sample = i / blocks, begin = i % blocks * kBlock;
      f(static_cast<const Acc<T>*>(in.alpha)[sample], sample * in.size + begin, min(kBlock, in.size - begin));
    }
  });
}

template <class T>
void forward(const InterpolateSamples& in, const Parallel& parallel) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  each_block<T>(in, parallel, [&](A alpha, int64_t offset, int64_t count) {
    const T* real = static_cast<const T*>(in.real) + offset;
    const T* fake = static_cast<const T*>(in.fake) + offset;
    T* out = static_cast<T*>(in.out) + offset;
    // from + weight (fake - real)
    const bool near_fake = alpha >= A(0.5);
    const Vec<A> weight = broadcast<A>(near_fake ? alpha - 1 : alpha);
    int64_t i = 0;
    for (; i + L <= count; i += L) {
      const Vec<A> r = load(real + i), f = load(fake + i);
      store(out + i, (near_fake ? f : r) + weight * (f - r));
    }
    if (i == count) return;
    const Vec<A> r = load_partial(real + i, count - i), f = load_partial(fake + i, count - i);
    store_partial(out + i, (near_fake ? f : r) + weight * (f - r), count - i);
  });
}

template <class T>
void backward(const InterpolateSamples& in, const Parallel& parallel) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  each_block<T>(in, parallel, [&](A alpha, int64_t offset, int64_t count) {
    const T* grad = static_cast<const T*>(in.grad) + offset;
    T* grad_real = static_cast<T*>(in.grad_real) + offset;
    T* grad_fake = static_cast<T*>(in.grad_fake) + offset;
    const Vec<A> to_real = broadcast<A>(1 - alpha), to_fake = broadcast<A>(alpha);
    int64_t i = 0;
    for (; i + L <= count; i += L) {
      const Vec<A> g = load(grad + i);
      store(grad_real + i, to_real * g);
      store(grad_fake + i, to_fake * g);
    }
    if (i == count) return;
    const Vec<A> g = load_partial(grad + i, count - i);
    store_partial(grad_real + i, to_real * g, count - i);
    store_partial(grad_fake + i, to_fake * g, count - i);
  });
}

}  // namespace

extern const InterpolateSamplesKernels interpolate_samples;
const InterpolateSamplesKernels interpolate_samples = {
    {forward<double>, forward<float>, forward<BFloat16>, forward<Half>},
    {backward<double>, backward<float>, backward<BFloat16>, backward<Half>},
};

}  // namespace GANKERN_ISA
}  // namespace gankern
