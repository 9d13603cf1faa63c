// Bias, (leaky) ReLU and pixelwise feature normalisation (Karras et al. 2018, arXiv 1710.10196, section 4.2),
// the tail of a layer of ProGAN's generator. For each pixel, with means over its channels:
//
//   a = s(x + b) (x + b),  r = (mean(a^2) + eps)^(-1/2),  y = a r
//
// where s is one of two slopes by the sign of x + b, gain included. That is also the sign of y, so y and r,
// one value a pixel, are all that is kept:
//
//   da = r (dy - y q),  q = mean(dy y),   dx = s da,  db = sum of dx over all pixels
//
// Second order, for the gradients h of dx and k of db. With p = s (h + k) the scalar to differentiate is
// sum of p da = r (sum(p dy) - sum(p y) sum(dy y) / C), a function of dy, y and r:
//
//   d(dy) = r (p - y mean(p y))
//   d(y)  = -r (q p + mean(p y) dy)
//   d(r)  = C (mean(p dy) - mean(p y) q)
//
// y and r are results of the forward: autograd adds d(y) to what else comes back to y and goes through the
// backward once more, which takes a gradient e of r along: dr/da = -r^2 y / C, that is
//
//   q = mean(dy y) + r e / C
//
// Every order goes through memory once: forward reads 1 tensor and writes 1, backward reads 2 and writes 1,
// double backward reads 3 and writes 2. Bound by memory. A pixel needs its channels twice, for the mean and
// for the result:
//
//   lines  channels last: a pixel's channels lie side by side, and are read again from the L1 cache
//   tiles  else: some hundred neighbouring pixels of all channels are copied into a scratch tile that fits
//          the L2 cache, where channels that lie 2^k apart do not share a few sets of it; vectors are of pixels
//
// Large results are written past the caches. db's partial sums are of fixed chunks of pixels, added in order.
#include "pixel_norm.h"

#include <cmath>
#include <cstring>
#include <type_traits>

#include "common.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kGrain = 32768;           // elements that are worth a thread
constexpr int64_t kMostChunks = 64;         // of pixels, each with a sum for db
constexpr int64_t kTileBytes = 256 * 1024;  // of all tensors of a tile
constexpr int64_t kTilePixels = 512;        // at most
constexpr int64_t kRowsAhead = 2;           // channels that are fetched before they are needed

template <class T, int kOrder>
struct Norm {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<T>;
  static constexpr int kStaged = kOrder + 1;                       // tensors that are read
  static constexpr int kSums = kOrder == kDoubleBackward ? 3 : 1;  // of a pixel

  const PixelNorm& in;
  const Layout layout;
  const T *bias, *x, *grad, *h, *h_bias;
  T *out, *out_x;
  A *scale, *out_scale;
  const A* grad_scale;
  const V positive, negative, sign;  // `sign` times the result has the sign of x + b
  const A channels;
  const bool sums, streams;

  explicit Norm(const PixelNorm& problem)
      : in(problem),
        layout(in.layout),
        bias(static_cast<const T*>(in.bias)),
        x(static_cast<const T*>(in.x)),
        grad(static_cast<const T*>(in.grad)),
        h(static_cast<const T*>(in.h)),
        h_bias(static_cast<const T*>(in.h_bias)),
        out(static_cast<T*>(in.out)),
        out_x(static_cast<T*>(in.out_x)),
        scale(static_cast<A*>(in.scale)),
        out_scale(static_cast<A*>(in.out_scale)),
        grad_scale(static_cast<const A*>(in.grad_scale)),
        positive(broadcast<A>(A(in.positive))),
        negative(broadcast<A>(A(in.negative))),
        sign(broadcast<A>(in.positive < 0 ? A(-1) : A(1))),
        channels(A(layout.channels)),
        sums(in.out_bias != nullptr),
        streams(layout.size() * int64_t(sizeof(T)) >= kStreamBytes) {}

  // ---- one vector --------------------------------------------------------------------------------------

  // A slope of 0 makes 0 of infinities too.
  V slope(V v, V at) const {
    const V low = in.negative == 0 ? V{} : v * negative;
    return at <= V{} ? low : v * positive;
  }

  // A vector of values of some pixels or channels: n of them, or all.
  template <bool kWhole>
  static V get(const T* p, int64_t n) {
    return kWhole ? load(p) : load_partial(p, n);
  }
  template <bool kWhole, bool kStream>
  static void put(T* p, V v, int64_t n) {
    if constexpr (!kWhole)
      store_partial(p, v, n);
    else if constexpr (kStream)
      stream(p, v);
    else
      store(p, v);
  }

  // The tensors at element e, with channels' values in place.
  template <bool kWhole>
  void read(int64_t e, int64_t n, V channel, V* staged) const {
    if constexpr (kOrder == kForward) {
      const V z = get<kWhole>(x + e, n) + channel;
      staged[0] = slope(z, z);
    } else {
      const V y = get<kWhole>(x + e, n);
      staged[0] = y;
      staged[1] = get<kWhole>(grad + e, n);
      if constexpr (kOrder == kDoubleBackward)
        staged[2] = slope(h ? get<kWhole>(h + e, n) + channel : channel, y * sign);
    }
  }

  // Added to the pixel's sums.
  static void add(const V* staged, V* total) {
    if constexpr (kOrder == kForward) {
      total[0] += staged[0] * staged[0];
    } else {
      total[0] += staged[0] * staged[1];
      if constexpr (kOrder == kDoubleBackward) {
        total[1] += staged[0] * staged[2];
        total[2] += staged[1] * staged[2];
      }
    }
  }

  // A pixel's sums become the factors of its results: r, q, mean(p y).
  void factors(int64_t pixel, const A* total, A* factor) const {
    if constexpr (kOrder == kForward) {
      scale[pixel] = factor[0] = 1 / std::sqrt(total[0] / channels + A(in.eps));
    } else {
      factor[0] = scale[pixel];
      factor[1] = total[0] / channels;
      if constexpr (kOrder == kBackward) {
        if (grad_scale) factor[1] += factor[0] * grad_scale[pixel] / channels;
      } else {
        factor[2] = total[1] / channels;
        out_scale[pixel] = total[2] - total[1] * factor[1];
      }
    }
  }

  // Returns what db is the sum of.
  template <bool kWhole, bool kStream>
  V write(int64_t e, int64_t n, const V* staged, const V* factor) const {
    if constexpr (kOrder == kForward) {
      put<kWhole, kStream>(out + e, staged[0] * factor[0], n);
    } else if constexpr (kOrder == kBackward) {
      const V y = staged[0];
      const V dx = slope(factor[0] * (staged[1] - y * factor[1]), y * sign);
      put<kWhole, kStream>(out + e, dx, n);
      return dx;
    } else {
      const V y = staged[0], dy = staged[1], p = staged[2], r = factor[0];
      put<kWhole, kStream>(out + e, r * (p - y * factor[2]), n);
      put<kWhole, kStream>(out_x + e, -r * (factor[1] * p + factor[2] * dy), n);
    }
    return V{};
  }

  const T* channel_values() const {
    return kOrder == kForward ? bias : kOrder == kDoubleBackward ? h_bias : nullptr;
  }

  // ---- lines -------------------------------------------------------------------------------------------

  template <bool kStream>
  void line(int64_t pixel, const A* of_channel, A* total_of_channel) const {
    const int64_t at = pixel * layout.channels, whole = layout.channels / L * L,
                  rest = layout.channels - whole;
    V total[kSums] = {}, staged[3], factor[3];
    for (int64_t c = 0; c < whole; c += L) {
      read<true>(at + c, L, load(of_channel + c), staged);
      add(staged, total);
    }
    if (rest) {
      // A bias belongs to no channel beyond the last one: of_channel is zero there.
      read<false>(at + whole, rest, load(of_channel + whole), staged);
      add(staged, total);
    }
    A sum_of[kSums], value[3];
    for (int k = 0; k < kSums; ++k) sum_of[k] = sum<A>(total[k]);
    factors(pixel, sum_of, value);
    for (int k = 0; k < kStaged; ++k) factor[k] = broadcast<A>(value[k]);
    for (int64_t c = 0; c < whole; c += L) {
      read<true>(at + c, L, load(of_channel + c), staged);
      const V v = write<true, kStream>(at + c, L, staged, factor);
      if (sums) store(total_of_channel + c, load(total_of_channel + c) + v);
    }
    if (rest) {
      read<false>(at + whole, rest, load(of_channel + whole), staged);
      const V v = write<false, false>(at + whole, rest, staged, factor);
      if (sums) store(total_of_channel + whole, load(total_of_channel + whole) + v);
    }
  }

  void lines(const Parallel& parallel) const {
    const int64_t pixels = layout.outer, padded = ceil_div(layout.channels, L) * L;
    const bool past = streams && layout.channels % L == 0 && aligned();
    const T* values = channel_values();
    each_chunk(parallel, pixels, layout.channels, 2 * padded,
               [&](int64_t begin, int64_t end, A* partial, A* scratch) {
                 A *const of_channel = scratch, *const total = of_channel + padded;
                 std::memset(scratch, 0, size_t(2 * padded) * sizeof(A));
                 for (int64_t c = 0; values && c < layout.channels; ++c) of_channel[c] = widen(values[c]);
                 for (int64_t pixel = begin; pixel < end; ++pixel) {
                   if (past)
                     line<true>(pixel, of_channel, total);
                   else
                     line<false>(pixel, of_channel, total);
                 }
                 if (sums) std::memcpy(partial, total, size_t(layout.channels) * sizeof(A));
               });
  }

  // ---- tiles -------------------------------------------------------------------------------------------

  // n pixels of all channels from element `at` on, which is of channel 0. `tile` has kStaged rows of `stride`
  // a channel, `total` kSums rows of `stride`, and `total_of_channel` a vector a channel.
  template <bool kStream>
  void tile(int64_t at, int64_t pixel, int64_t n, int64_t stride, A* tile, A* total,
            A* total_of_channel) const {
    const int64_t whole = n / L * L, rest = n - whole;
    const T* values = channel_values();
    V staged[3], factor[3];
    std::memset(total, 0, size_t(kSums * stride) * sizeof(A));
    const auto collect = [&](auto is_whole, int64_t e, int64_t i, int64_t count, V channel, A* to) {
      V at_pixels[kSums];
      read<decltype(is_whole)::value>(e + i, count, channel, staged);
      for (int k = 0; k < kSums; ++k) at_pixels[k] = load(total + k * stride + i);
      add(staged, at_pixels);
      for (int k = 0; k < kSums; ++k) store(total + k * stride + i, at_pixels[k]);
      for (int k = 0; k < kStaged; ++k) store(to + k * stride + i, staged[k]);
    };
    for (int64_t c = 0; c < layout.channels; ++c) {
      const int64_t e = at + c * layout.inner, ahead = e + kRowsAhead * layout.inner;
      const V channel = broadcast<A>(values ? widen(values[c]) : A(0));
      A* const to = tile + c * kStaged * stride;
      for (int64_t i = 0; i < whole; i += L) {
        __builtin_prefetch(x + ahead + i);
        if (kOrder != kForward) __builtin_prefetch(grad + ahead + i);
        if (kOrder == kDoubleBackward && h) __builtin_prefetch(h + ahead + i);
        collect(std::true_type{}, e, i, L, channel, to);
      }
      if (rest) collect(std::false_type{}, e, whole, rest, channel, to);
    }
    for (int64_t i = 0; i < n; ++i) {
      A value[3], sum_of[kSums];
      for (int k = 0; k < kSums; ++k) sum_of[k] = total[k * stride + i];
      factors(pixel + i, sum_of, value);
      for (int k = 0; k < kStaged; ++k) total[k * stride + i] = value[k];
    }
    for (int64_t c = 0; c < layout.channels; ++c) {
      const int64_t e = at + c * layout.inner;
      const A* from = tile + c * kStaged * stride;
      V of_channel = {};
      const auto take = [&](int64_t i) {
        for (int k = 0; k < kStaged; ++k) {
          staged[k] = load(from + k * stride + i);
          factor[k] = load(total + k * stride + i);
        }
      };
      for (int64_t i = 0; i < whole; i += L) {
        take(i);
        of_channel += write<true, kStream>(e + i, L, staged, factor);
      }
      if (rest) {
        take(whole);
        // What is not written must not count.
        const V v = write<false, false>(e + whole, rest, staged, factor);
        for (int64_t l = 0; l < rest; ++l) of_channel[l] += v[l];
      }
      if (sums) store(total_of_channel + c * L, load(total_of_channel + c * L) + of_channel);
    }
  }

  void tiles(const Parallel& parallel) const {
    const int64_t fits = kTileBytes / (layout.channels * kStaged * int64_t(sizeof(A))) / L * L;
    const int64_t count = ceil_div(layout.inner, max(L, min(fits, kTilePixels)));  // tiles of one outer index
    const int64_t length = ceil_div(layout.inner, count * L) * L;
    const int64_t stride = length;
    const bool past = streams && layout.inner % L == 0 && aligned();
    const int64_t tile_size = kStaged * layout.channels * stride, vectors = sums ? layout.channels * L : 0;
    each_chunk(parallel, layout.outer * count, layout.channels * length, tile_size + 3 * stride + vectors,
               [&](int64_t begin, int64_t end, A* partial, A* scratch) {
                 A *const total = scratch + tile_size, *const of_channel = total + 3 * stride;
                 std::memset(of_channel, 0, size_t(vectors) * sizeof(A));
                 for (int64_t unit = begin; unit < end; ++unit) {
                   const int64_t o = unit / count, first = unit % count * length,
                                 n = min(length, layout.inner - first);
                   if (n <= 0) continue;
                   const int64_t at = o * layout.channels * layout.inner + first,
                                 pixel = o * layout.inner + first;
                   if (past)
                     tile<true>(at, pixel, n, stride, scratch, total, of_channel);
                   else
                     tile<false>(at, pixel, n, stride, scratch, total, of_channel);
                 }
                 for (int64_t c = 0; sums && c < layout.channels; ++c)
                   partial[c] = sum<A>(load(of_channel + c * L));
               });
  }

  // ---- the work and its order --------------------------------------------------------------------------

  bool aligned() const {
    return (reinterpret_cast<uintptr_t>(out) | reinterpret_cast<uintptr_t>(out_x)) % kVectorBytes == 0;
  }

  // f(begin, end, sums of the channels, scratch) for chunks of `units`, each of `size` elements; then db.
  template <class F>
  void each_chunk(const Parallel& parallel, int64_t units, int64_t size, int64_t scratch_size,
                  const F& f) const {
    const int64_t step = max(ceil_div(kGrain, size), ceil_div(units, kMostChunks)),
                  chunks = ceil_div(units, step);
    Scratch<A> partial(sums ? chunks * layout.channels : 0);
    parallel_for(parallel, chunks, 1, [&](int64_t first, int64_t last) {
      Scratch<A> scratch(scratch_size);
      for (int64_t k = first; k < last; ++k)
        f(k * step, min(k * step + step, units), partial.at + k * layout.channels, scratch.at);
      if (streams) stream_fence();
    });
    if (!sums) return;
    T* to = static_cast<T*>(in.out_bias);
    for (int64_t c = 0; c < layout.channels; ++c) {
      double total = 0;
      for (int64_t k = 0; k < chunks; ++k) total += partial.at[k * layout.channels + c];
      to[c] = narrow<T>(A(total));
    }
  }

  void all(const Parallel& parallel) const {
    if (layout.size() == 0) {
      for (int64_t c = 0; sums && c < layout.channels; ++c) static_cast<T*>(in.out_bias)[c] = narrow<T>(A(0));
    } else if (layout.inner == 1) {
      lines(parallel);
    } else {
      tiles(parallel);
    }
  }
};

template <class T, int kOrder>
void run(const PixelNorm& in, const Parallel& parallel) {
  Norm<T, kOrder>(in).all(parallel);
}

}  // namespace

extern const Orders<PixelNorm> pixel_norm = GANKERN_EACH_ORDER(run);

}  // namespace GANKERN_ISA
}  // namespace gankern
