// Minibatch standard deviation (Karras 2018, arXiv 1710.10196, section 3) in one read and one write of the
// batch.
//
// For the G samples i of a group, at each of the P positions p of a feature (a part of the channels, all
// pixels):
//   d_i = x_i - mean_i x_i
//   sigma = sqrt(sum_i d_i^2 / D + eps), D = G or G - 1
//   result = mean_p sigma
// and the result is written behind the group's copied samples. With k = (sum of the result's gradients) / P
//   first order    dx_i = g_i + k d_i / (D sigma)
//   second order,  for the gradient h of dx:  q = sum_i h_i d_i
//                  gradient of g_i: h_i, of each of the result's gradients: mean_p q / (D sigma)
//                  gradient of x_i: k / (D sigma) (h_i - mean h - d_i q / (D sigma^2))
//
// All three are one sweep over the positions of a group: a few vectors of each of its samples are read into
// the L1 cache together, where mean and variance take two passes, and the mean of the differences a third. Samples that are a power of two apart fall
// into one place of the cache, therefore the copy.
//
// Traffic: forward reads x and writes the result; backward reads x and g and writes dx; double backward reads
// x and h and writes two gradients. The result itself, or the sum of its gradients, is a pass of its own over
// one value a row: in channels_last tensors it touches the lines in which these lie once more, while the
// group is still in the shared cache. Bound by memory.
//
// A group is cut into chunks by its shape alone; their sums are added in order, in double. Threads take whole
// groups, or the chunks of one group after the other where groups are large or few.
#include "minibatch_stddev.h"

#include <cmath>
#include <cstring>

#include "common.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int kVectors = 4;                   // of each sample at a time
constexpr int64_t kChunkValues = 32 * 1024;   // of all samples of a group together
constexpr int64_t kLargeGroup = 1024 * 1024;  // bytes; too large for a core's own cache

template <class A>
inline Vec<A> square_root(Vec<A> x) {
  constexpr int n = kVectorBytes / int(sizeof(A));
  for (int i = 0; i < n; ++i) x[i] = std::sqrt(x[i]);
  return x;
}
#if defined(__AVX512F__)
template <>
inline Vec<float> square_root<float>(Vec<float> x) {
  return (Vec<float>)_mm512_maskz_sqrt_ps(0xffff, (__m512)x);
}
template <>
inline Vec<double> square_root<double>(Vec<double> x) {
  return (Vec<double>)_mm512_maskz_sqrt_pd(0xff, (__m512d)x);
}
#elif defined(__AVX2__)
template <>
inline Vec<float> square_root<float>(Vec<float> x) {
  return (Vec<float>)_mm256_sqrt_ps((__m256)x);
}
template <>
inline Vec<double> square_root<double>(Vec<double> x) {
  return (Vec<double>)_mm256_sqrt_pd((__m256d)x);
}
#endif

template <class T, int kOrder>
struct Problem {
  using A = Acc<T>;
  static constexpr int L = kLanes<T>;
  const MinibatchStddev& in;

  int64_t x_row() const { return in.features * in.width; }
  int64_t out_row() const { return in.features * (in.width + in.extent); }
  int64_t sample(int64_t group, int64_t i) const {
    return in.strided ? i * in.groups + group : group * in.group_size + i;
  }
  // A sample of a tensor; of a missing one, null.
  const T* x_of(const void* x, int64_t n) const {
    return x ? static_cast<const T*>(x) + n * in.rows * x_row() : nullptr;
  }
  const T* out_of(const void* out, int64_t n) const {
    return out ? static_cast<const T*>(out) + n * in.rows * out_row() : nullptr;
  }
  T* x_of(void* x, int64_t n) const { return const_cast<T*>(x_of(static_cast<const void*>(x), n)); }
  T* out_of(void* out, int64_t n) const { return const_cast<T*>(out_of(static_cast<const void*>(out), n)); }
  A divisor() const { return A(in.unbiased ? in.group_size - 1 : in.group_size); }

  // ---- chunks: a part of one feature's width, or some rows with all features ---------------------------

  int64_t chunk_values() const { return max(kChunkValues / in.group_size, 16 * kVectors); }
  bool one_row() const { return in.rows == 1; }
  int64_t chunk_rows() const { return max(chunk_values() / x_row(), 1); }
  int64_t chunks_of_feature() const {
    return one_row() ? ceil_div(in.width, chunk_values()) : ceil_div(in.rows, chunk_rows());
  }
  int64_t chunks() const { return one_row() ? in.features * chunks_of_feature() : chunks_of_feature(); }
  int64_t partial_sums() const { return in.features * chunks_of_feature(); }

  // One call's place in the samples of a group, for `values` values from position `at` on.
  struct Pointers {
    const T **x, **g, **h;  // [group_size]
    T **out, **out_x;
  };

  // One step over kCount vectors, or over the first n < L values of one; their sum is added to `total`.
  template <int kCount, bool kPartial>
  inline void step(const Pointers& p, int64_t x_at, int64_t out_at, int64_t n, A k, Vec<A>* scratch,
                   Vec<A>& total) const {
    const int64_t G = in.group_size;
    const auto read = [&](const T* from) { return kPartial ? load_partial(from, n) : load(from); };
    const auto write = [&](T* to, Vec<A> value) {
      if constexpr (kPartial)
        store_partial(to, value, n);
      else
        store(to, value);
    };
    Vec<A>* x = scratch;
    Vec<A>* h = scratch + G * kCount;
    Vec<A> mean[kCount] = {}, mean_h[kCount] = {};
    for (int64_t i = 0; i < G; ++i) {
      for (int v = 0; v < kCount; ++v) {
        const Vec<A> value = read(p.x[i] + x_at + v * L);
        x[i * kCount + v] = value;
        mean[v] += value;
        if constexpr (kOrder == kForward) write(p.out[i] + out_at + v * L, value);
        if constexpr (kOrder == kDoubleBackward) {
          const Vec<A> value_h = read(p.h[i] + x_at + v * L);
          h[i * kCount + v] = value_h;
          mean_h[v] += value_h;
          write(p.out[i] + out_at + v * L, value_h);
        }
      }
    }
    const A share = A(1) / A(G), D = divisor();
    Vec<A> variance[kCount] = {}, q[kCount] = {}, rest[kCount] = {};
    for (int v = 0; v < kCount; ++v) {
      mean[v] *= share;
      mean_h[v] *= share;
    }
    for (int64_t i = 0; i < G; ++i)
      for (int v = 0; v < kCount; ++v) rest[v] += x[i * kCount + v] -= mean[v];
    for (int64_t i = 0; i < G; ++i) {
      for (int v = 0; v < kCount; ++v) {
        const Vec<A> d = x[i * kCount + v] - rest[v] * share;  // what the mean lost in x's precision
        x[i * kCount + v] = d;
        variance[v] += d * d;
        if constexpr (kOrder == kDoubleBackward) q[v] += h[i * kCount + v] * d;
      }
    }
    for (int v = 0; v < kCount; ++v) {
      const Vec<A> sigma = square_root<A>(variance[v] / D + A(in.eps));
      Vec<A> term = sigma;
      if constexpr (kOrder != kForward) {
        const Vec<A> factor = A(1) / (D * sigma);
        if constexpr (kOrder == kBackward) {
          for (int64_t i = 0; i < G; ++i)
            write(p.out_x[i] + x_at + v * L, read(p.g[i] + out_at + v * L) + k * factor * x[i * kCount + v]);
        } else {
          term = q[v] * factor;
          const Vec<A> slope = term / sigma;
          for (int64_t i = 0; i < G; ++i) {
            const Vec<A> tangent = h[i * kCount + v] - mean_h[v] - x[i * kCount + v] * slope;
            write(p.out_x[i] + x_at + v * L, k * factor * tangent);
          }
        }
      }
      if constexpr (kOrder != kBackward) {
        if constexpr (kPartial)
          for (int l = int(n); l < L; ++l) term[l] = 0;
        total += term;
      }
    }
  }

  // `values` neighbouring positions of one feature. The sum is that of sigma, or of q / (D sigma).
  double segment(const Pointers& p, int64_t x_at, int64_t out_at, int64_t values, A k,
                 Vec<A>* scratch) const {
    Vec<A> total{};
    int64_t done = 0;
    for (; done + kVectors * L <= values; done += kVectors * L)
      step<kVectors, false>(p, x_at + done, out_at + done, 0, k, scratch, total);
    for (; done + L <= values; done += L) step<1, false>(p, x_at + done, out_at + done, 0, k, scratch, total);
    if (done < values) step<1, true>(p, x_at + done, out_at + done, values - done, k, scratch, total);
    return sum<A>(total);
  }

  // Scratch of one thread: the samples' pointers and their vectors.
  struct OfThread {
    Scratch<Vec<A>> own;
    Scratch<char> addresses;
    Pointers pointers;
    Vec<A>* vectors;
    explicit OfThread(int64_t group_size)
        : own(group_size * 2 * kVectors),
          addresses(group_size * 5 * int64_t(sizeof(void*))),
          vectors(own.at) {
      char* at = addresses.at;
      const size_t step = size_t(group_size) * sizeof(void*);
      pointers.x = reinterpret_cast<const T**>(at);
      pointers.g = reinterpret_cast<const T**>(at + step);
      pointers.h = reinterpret_cast<const T**>(at + 2 * step);
      pointers.out = reinterpret_cast<T**>(at + 3 * step);
      pointers.out_x = reinterpret_cast<T**>(at + 4 * step);
    }
  };

  void point(int64_t group, const Pointers& p) const {
    for (int64_t i = 0; i < in.group_size; ++i) {
      const int64_t n = sample(group, i);
      p.x[i] = x_of(in.x, n);
      p.g[i] = out_of(in.grad, n);
      p.h[i] = x_of(in.grad_x, n);
      p.out[i] = out_of(in.out, n);
      p.out_x[i] = x_of(in.out_x, n);
    }
  }

  // ---- a group's three passes --------------------------------------------------------------------------

  // The sum of one sample's gradients of the result, for each feature.
  void read_result(int64_t n, double* sums) const {
    const T* g = out_of(in.grad, n);
    for (int64_t f = 0; f < in.features; ++f) {
      double total = 0;
      for (int64_t r = 0; r < in.rows; ++r) {
        const T* at = g + r * out_row() + x_row() + f * in.extent;
        for (int64_t e = 0; e < in.extent; ++e) total += double(widen(at[e]));
      }
      sums[f] = total;
    }
  }
  void write_result(int64_t n, const double* means) const {
    T* out = out_of(in.out, n);
    for (int64_t r = 0; r < in.rows; ++r) {
      for (int64_t f = 0; f < in.features; ++f) {
        const T value = narrow<T>(A(means[f]));
        T* at = out + r * out_row() + x_row() + f * in.extent;
        for (int64_t e = 0; e < in.extent; ++e) at[e] = value;
      }
    }
  }
  void chunk(int64_t c, const OfThread& scratch, const double* k, double* partial) const {
    if (one_row()) {
      const int64_t f = c / chunks_of_feature(), begin = c % chunks_of_feature() * chunk_values();
      const int64_t at = f * in.width + begin;
      partial[c] =
          segment(scratch.pointers, at, at, min(chunk_values(), in.width - begin), A(k[f]), scratch.vectors);
      return;
    }
    const int64_t begin = c * chunk_rows(), end = min(begin + chunk_rows(), in.rows);
    for (int64_t f = 0; f < in.features; ++f) partial[f * chunks_of_feature() + c] = 0;
    for (int64_t r = begin; r < end; ++r)
      for (int64_t f = 0; f < in.features; ++f)
        partial[f * chunks_of_feature() + c] +=
            segment(scratch.pointers, r * x_row() + f * in.width, r * out_row() + f * in.width, in.width,
                    A(k[f]), scratch.vectors);
  }

  // for_each(count, f(begin, end)) runs a pass, on one thread or on all.
  template <class F>
  void group(int64_t m, double* memory, const F& for_each) const {
    double* k = memory;                                       // [features]
    double* means = k + in.features;                          // [features]
    double* samples = means + in.features;                    // [group_size][features]
    double* partial = samples + in.group_size * in.features;  // [features][chunks_of_feature]
    const double share = 1.0 / (double(in.rows) * double(in.width));
    for (int64_t f = 0; f < in.features; ++f) k[f] = 0;
    if (kOrder != kForward && in.grad) {
      for_each(in.group_size, [&](int64_t begin, int64_t end) {
        for (int64_t i = begin; i < end; ++i) read_result(sample(m, i), samples + i * in.features);
      });
      for (int64_t i = 0; i < in.group_size; ++i)
        for (int64_t f = 0; f < in.features; ++f) k[f] += samples[i * in.features + f];
      for (int64_t f = 0; f < in.features; ++f) k[f] *= share;
    }
    for_each(chunks(), [&](int64_t begin, int64_t end) {
      OfThread scratch(in.group_size);
      point(m, scratch.pointers);
      for (int64_t c = begin; c < end; ++c) chunk(c, scratch, k, partial);
    });
    if (kOrder == kBackward) return;
    for (int64_t f = 0; f < in.features; ++f) {
      means[f] = 0;
      for (int64_t c = 0; c < chunks_of_feature(); ++c) means[f] += partial[f * chunks_of_feature() + c];
      means[f] *= share;
    }
    for_each(in.group_size, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i) write_result(sample(m, i), means);
    });
  }

  void run(const Parallel& parallel) const {
    const int64_t values = partial_sums() + (in.group_size + 2) * in.features;
    const int64_t group_bytes = in.group_size * in.rows * x_row() * int64_t(sizeof(T));
    if (chunks() > 1 && (group_bytes > kLargeGroup || in.groups < 2 * parallel.threads)) {
      const Scratch<double> memory(values);
      for (int64_t m = 0; m < in.groups; ++m)
        group(m, memory.at, [&](int64_t count, const auto& f) { parallel_for(parallel, count, 1, f); });
      return;
    }
    parallel_for(parallel, in.groups, max(1, kLargeGroup / 16 / group_bytes),
                 [&](int64_t begin, int64_t end) {
                   const Scratch<double> memory(values);
                   for (int64_t m = begin; m < end; ++m)
                     group(m, memory.at, [&](int64_t count, const auto& f) { f(int64_t{0}, count); });
                 });
  }
};

template <class T, int kOrder>
void run(const MinibatchStddev& in, const Parallel& parallel) {
  Problem<T, kOrder>{in}.run(parallel);
}

}  // namespace

extern const Orders<MinibatchStddev> minibatch_stddev = GANKERN_EACH_ORDER(run);

}  // namespace GANKERN_ISA
}  // namespace gankern
