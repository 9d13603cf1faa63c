// The 4x4 kernel of stride 2 and padding 1, and its transpose, as products of matrices for few pixels: on such a
// map reading the weight is all there is, so that the weight goes by once and everything else stays in a cache.
//
// The smaller image has s channels and p pixels (of all images), and the weight is a matrix W [s][k] with k = channels of
// the larger image times taps, in the order of its memory. C [p][k] are the pixels of the larger image that the taps of
// each pixel of the smaller one read, zeros outside:
//
//   strided     out[s][p] = sum over k of W[s][k] C[p][k]
//   transposed  C[p][k] = sum over s of W[s][k] in[s][p], and each pixel of the result is the sum of its places in C
//   weight      W[s][k] = sum over p of small[s][p] C[p][k], written past the caches where it is large
//
// Bound by the memory's rate for W: a register tile of four rows (or vectors) by kPixels pixels does one multiply-add for
// each pixel and value of W. Every sum has a fixed order that no number of threads changes.
#pragma once

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int kPixels = kVectorBytes == 64 ? 4 : 2;  // of a register tile, by kFew rows or vectors
constexpr int64_t kSixteen = 16;                     // taps
constexpr int64_t kStep = 64;                 // vectors of a row of W that the strided sum takes at a time
constexpr int64_t kRowsAtOnce = 8;            // rows of W that the transposed sum takes at a time ...
constexpr int64_t kWidth = 512;               // ... and values of each
constexpr int64_t kColumnValues = 32 * 1024;  // of C that the weight's sum keeps in a cache
constexpr int64_t kRowsOfTask = 64;           // of the weight's sum

// Which of the two images is the smaller one, and how the weight lies in memory.
template <class T>
struct Streamed {
  using A = Acc<T>;
  const Convolution& t;
  const ConvolutionImages &small, &large;
  int64_t width, area, pixels;  // of the smaller image: its width, its pixels, and those of all images
  int64_t k;                    // length of a row of W
  int64_t row;                  // from one row of W to the next ...
  int64_t channel, y, x;        // ... and from one channel of the larger image or one tap to the next
  bool dense;                   // a row of W is k values side by side

  Streamed(const Convolution& t_, bool swap)
      : t(t_),
        small(swap ? t.in : t.out),
        large(swap ? t.out : t.in),
        width(small.width),
        area(small.height * small.width),
        pixels(t.images * area),
        k(large.channels * kSixteen),
        row(swap ? t.stride_in : t.stride_out),
        channel(swap ? t.stride_out : t.stride_in),
        y(t.stride_y),
        x(t.stride_x),
        dense((x == 1 && y == 4 && channel == kSixteen) ||
              (channel == 1 && x == large.channels && y == 4 * large.channels)) {
    if (dense) return;
    row = k;
    channel = kSixteen;
    y = 4;
    x = 1;
  }

  int64_t values() const { return dense ? 0 : small.channels * k; }  // of a dense copy

  // Where in a row of W a tap lies.
  int64_t place(int64_t c, int64_t tap_y, int64_t tap_x) const {
    return c * channel + (t.flip ? 3 - tap_y : tap_y) * y + (t.flip ? 3 - tap_x : tap_x) * x;
  }

  // Calls f(a tap as it lies, its place in the dense copy) for all of the weight.
  template <class F>
  void each_tap(bool swap, const Parallel& parallel, const F& f) const {
    parallel_for(parallel, small.channels, 1, [&](int64_t s, int64_t end) {
      for (; s < end; ++s)
        for (int64_t c = 0; c < large.channels; ++c)
          for (int64_t tap = 0; tap < kSixteen; ++tap) {
            T* from = static_cast<T*>(t.weight) + (swap ? c : s) * t.stride_out +
                      (swap ? s : c) * t.stride_in + tap / 4 * t.stride_y + tap % 4 * t.stride_x;
            f(from, s * k + c * kSixteen + tap);
          }
    });
  }

  // The weight's rows: as they lie, or copied to `room` of values().
  const T* rows(bool swap, T* room, const Parallel& parallel) const {
    if (dense) return static_cast<const T*>(t.weight);
    each_tap(swap, parallel, [&](const T* from, int64_t to) { room[to] = *from; });
    return room;
  }

  // One pixel of an image.
  static T* at(const ConvolutionImages& images, int64_t n, int64_t c, int64_t iy, int64_t ix) {
    return static_cast<T*>(images.data) +
           (images.channels_last ? ((n * images.height + iy) * images.width + ix) * images.channels + c
                                 : ((n * images.channels + c) * images.height + iy) * images.width + ix);
  }

  // to[s][p] of the smaller image.
  void take_small(A* to, const Parallel& parallel) const {
    parallel_for(parallel, small.channels, 16, [&](int64_t s, int64_t end) {
      for (; s < end; ++s)
        for (int64_t p = 0; p < pixels; ++p)
          to[s * pixels + p] = widen(*at(small, p / area, s, p % area / width, p % width));
    });
  }

  // C of the larger image.
  void take_columns(A* to, const Parallel& parallel) const {
    parallel_for(parallel, large.channels, 16, [&](int64_t begin, int64_t end) {
      for (int64_t p = 0; p < pixels; ++p) {
        const int64_t top = 2 * (p % area / width) - 1, left = 2 * (p % width) - 1;
        for (int64_t c = begin; c < end; ++c)
          for (int64_t tap = 0; tap < kSixteen; ++tap) {
            const int64_t iy = top + tap / 4, ix = left + tap % 4;
            const bool there = iy >= 0 && iy < large.height && ix >= 0 && ix < large.width;
            to[p * k + place(c, tap / 4, tap % 4)] = there ? widen(*at(large, p / area, c, iy, ix)) : A(0);
          }
      }
    });
  }

  // A value of the result with bias and leaky ReLU.
  T finished(A value, int64_t channel_of_result) const {
    value *= A(t.scale);
    if (t.bias) value += widen(static_cast<const T*>(t.bias)[channel_of_result]);
    return narrow<T>(value < 0 ? value * A(t.slope) : value);
  }
};

// to[r * to_row + p] += the products of `rows` rows of W with `pixels` columns, a vector for each pair.
template <class T, int rows, int pixels>
void multiply_rows(int64_t vectors, const T* w, int64_t w_row, int64_t ahead, const Acc<T>* columns,
                   int64_t columns_row, Vec<Acc<T>>* to, int64_t to_row) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  Vec<A> sum[rows][pixels];
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < pixels; ++p) sum[r][p] = Vec<A>{};
  for (int64_t d = 0; d < vectors * L; d += L) {
    Vec<A> c[pixels];
#pragma GCC unroll 4
    for (int p = 0; p < pixels; ++p) c[p] = load(columns + p * columns_row + d);
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r) {
      const Vec<A> v = load(w + r * w_row + d);
      __builtin_prefetch(w + r * w_row + d + ahead);
#pragma GCC unroll 4
      for (int p = 0; p < pixels; ++p) sum[r][p] += v * c[p];
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
    for (int p = 0; p < pixels; ++p) to[r * to_row + p] += sum[r][p];
}

// The function for so many pixels of a tile, at most kPixels.
template <class Of>
auto of_pixels(int64_t count, const Of& of) {
  if constexpr (kPixels == 2)
    return count == 1 ? of(std::integral_constant<int, 1>()) : of(std::integral_constant<int, 2>());
  else
    return of_few(count, of);
}

template <class T>
void strided_streamed_forward(const Convolution& t, const Parallel& parallel) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  const Streamed<T> s(t, false);
  const int64_t channels = t.out.channels, vectors = s.k / L;
  if (channels * s.pixels == 0) return;
  const Scratch<T> room(s.values());
  const T* w = s.rows(false, room.at, parallel);
  const Scratch<A> columns(s.pixels * s.k);
  s.take_columns(columns.at, parallel);
  parallel_for(parallel, ceil_div(channels, kFew), 1, [&](int64_t block, int64_t end) {
    const Scratch<Vec<A>> sums(kFew * s.pixels);
    for (; block < end; ++block) {
      const int64_t first = block * kFew, rows = min(kFew, channels - first);
      std::memset(static_cast<void*>(sums.at), 0, size_t(kFew * s.pixels) * sizeof(Vec<A>));
      for (int64_t v = 0; v < vectors; v += kStep)
        for (int64_t p = 0; p < s.pixels; p += kPixels) {
          const auto multiply = of_few(rows, [&](auto r) {
            return of_pixels(min(kPixels, s.pixels - p),
                             [](auto c) { return multiply_rows<T, decltype(r)::value, decltype(c)::value>; });
          });
          // What the next step reads, asked for once.
          multiply(min(kStep, vectors - v), w + first * s.row + v * L, s.row, p == 0 ? kStep * L : 0,
                   columns.at + p * s.k + v * L, s.k, sums.at + p, s.pixels);
        }
      for (int64_t r = 0; r < rows; ++r)
        for (int64_t p = 0; p < s.pixels; ++p)
          *s.at(t.out, p / s.area, first + r, p % s.area / s.width, p % s.width) =
              s.finished(sum<A>(sums.at[r * s.pixels + p]), first + r);
    }
  });
}

// to[p][...] += sum over `depth` rows of W of each value times its row's pixel, for some vectors of a row.
template <class T, int pixels, int vectors>
void multiply_values(int64_t depth, const T* w, int64_t w_row, const Acc<T>* small, int64_t small_row,
                     Acc<T>* to, int64_t to_row) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  Vec<A> sum[pixels][vectors];
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) sum[p][v] = Vec<A>{};
  for (int64_t d = 0; d < depth; ++d) {
    Vec<A> y[vectors];
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      y[v] = load(w + d * w_row + v * L);
      __builtin_prefetch(w + (d + kRowsAtOnce) * w_row + v * L);
    }
#pragma GCC unroll 4
    for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[p][v] += broadcast<A>(small[d * small_row + p]) * y[v];
  }
#pragma GCC unroll 4
  for (int p = 0; p < pixels; ++p)
#pragma GCC unroll 4
    for (int v = 0; v < vectors; ++v) {
      A* q = to + p * to_row + v * L;
      store(q, load(q) + sum[p][v]);
    }
}

// The result's channels from C.
template <class T>
void sum_columns(const Streamed<T>& s, const Acc<T>* columns, int64_t n, int64_t begin, int64_t end) {
  using A = Acc<T>;
  const ConvolutionImages& out = s.large;
  for (int64_t y = 0; y < out.height; ++y)
    for (int64_t x = 0; x < out.width; ++x)
      for (int64_t c = begin; c < end; ++c) {
        A total = 0;
        // 2 i + tap - 1 = y: two taps for each direction, of which one may lie outside.
        for (int64_t tap_y = (y + 1) % 2; tap_y < 4; tap_y += 2) {
          const int64_t i = (y + 1 - tap_y) / 2;
          if (y + 1 < tap_y || i >= s.small.height) continue;
          for (int64_t tap_x = (x + 1) % 2; tap_x < 4; tap_x += 2) {
            const int64_t j = (x + 1 - tap_x) / 2;
            if (x + 1 < tap_x || j >= s.width) continue;
            total += columns[(n * s.area + i * s.width + j) * s.k + s.place(c, tap_y, tap_x)];
          }
        }
        *s.at(out, n, c, y, x) = s.finished(total, c);
      }
}

template <class T>
void transposed_streamed_forward(const Convolution& t, const Parallel& parallel) {
  using A = Acc<T>;
  constexpr int64_t wide = kFew * kLanes<T>;
  const Streamed<T> s(t, true);
  if (t.images * t.out.channels * t.out.height * t.out.width == 0) return;
  const Scratch<T> room(s.values());
  const T* w = s.rows(true, room.at, parallel);
  const Scratch<A> small(s.small.channels * s.pixels), columns(s.pixels * s.k);
  s.take_small(small.at, parallel);
  parallel_for(parallel, ceil_div(s.k, kWidth), 1, [&](int64_t block, int64_t end_block) {
    for (; block < end_block; ++block) {
      const int64_t begin = block * kWidth, end = min(s.k, begin + kWidth);
      for (int64_t p = 0; p < s.pixels; ++p)
        std::memset(static_cast<void*>(columns.at + p * s.k + begin), 0, size_t(end - begin) * sizeof(A));
      for (int64_t row = 0; row < s.small.channels; row += kRowsAtOnce)
        for (int64_t p = 0; p < s.pixels; p += kPixels) {
          const int64_t count = min(kPixels, s.pixels - p);
          const auto four = of_pixels(count, [](auto c) { return multiply_values<T, c, kFew>; });
          const auto one = of_pixels(count, [](auto c) { return multiply_values<T, c, 1>; });
          for (int64_t at = begin, step; at < end; at += step) {
            const bool whole = at + wide <= end;
            step = whole ? wide : kLanes<T>;
            (whole ? four : one)(min(kRowsAtOnce, s.small.channels - row), w + row * s.row + at, s.row,
                                 small.at + row * s.pixels + p, s.pixels, columns.at + p * s.k + at, s.k);
          }
        }
    }
  });
  const int64_t parts = ceil_div(t.out.channels, kSixteen);
  parallel_for(parallel, t.images * parts, 1, [&](int64_t task, int64_t end) {
    for (; task < end; ++task) {
      const int64_t begin = task % parts * kSixteen;
      sum_columns(s, columns.at, task / parts, begin, min(t.out.channels, begin + kSixteen));
    }
  });
}

// to[r][some vectors] = scale times the sum over all pixels of small[r][p] C[p][...].
template <class T, int rows, int vectors>
void multiply_pixels(int64_t pixels, const Acc<T>* small, const Acc<T>* columns, int64_t columns_row,
                     Acc<T> scale, bool past_caches, T* to, int64_t to_row) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  Vec<A> total[rows][vectors] = {};
  for (int64_t begin = 0; begin < pixels; begin += kChain) {
    Vec<A> sum[rows][vectors];
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) sum[r][v] = Vec<A>{};
    for (int64_t p = begin; p < min(pixels, begin + kChain); ++p)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) {
        const Vec<A> c = load(columns + p * columns_row + v * L);
#pragma GCC unroll 4
        for (int r = 0; r < rows; ++r) sum[r][v] += broadcast<A>(small[r * pixels + p]) * c;
      }
#pragma GCC unroll 4
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 4
      for (int v = 0; v < vectors; ++v) total[r][v] += sum[r][v];
  }
  for (int r = 0; r < rows; ++r)
    for (int v = 0; v < vectors; ++v) {
      if (past_caches)
        stream(to + r * to_row + v * L, total[r][v] * scale);
      else
        store(to + r * to_row + v * L, total[r][v] * scale);
    }
}

template <class T>
void streamed_weight_gradient(const Convolution& t, bool swap, const Parallel& parallel) {
  using A = Acc<T>;
  constexpr int64_t wide = kPixels * kLanes<T>;
  const Streamed<T> s(t, swap);
  const int64_t rows = s.small.channels;
  if (rows * s.k == 0) return;
  const Scratch<T> room(s.values());
  T* w = s.dense ? static_cast<T*>(t.weight) : room.at;
  const Scratch<A> small(rows * s.pixels), columns(s.pixels * s.k);
  s.take_small(small.at, parallel);
  s.take_columns(columns.at, parallel);
  const bool past_caches = rows * s.k * int64_t(sizeof(T)) >= kStreamBytes &&
                           reinterpret_cast<uintptr_t>(w) % kVectorBytes == 0 && s.row % kLanes<T> == 0;
  const int64_t width = min(s.k, max(wide, kColumnValues / max(1, s.pixels) / wide * wide));
  const int64_t parts = ceil_div(rows, kRowsOfTask);
  parallel_for(parallel, ceil_div(s.k, width) * parts, 1, [&](int64_t task, int64_t end_task) {
    for (; task < end_task; ++task) {
      const int64_t begin = task / parts * width, end = min(s.k, begin + width);
      const int64_t first = task % parts * kRowsOfTask, last = min(rows, first + kRowsOfTask);
      for (int64_t row = first; row < last; row += kFew) {
        const auto some = of_few(last - row, [](auto r) { return multiply_pixels<T, r, kPixels>; });
        const auto one = of_few(last - row, [](auto r) { return multiply_pixels<T, r, 1>; });
        for (int64_t at = begin, step; at < end; at += step) {
          const bool whole = at + wide <= end;
          step = whole ? wide : kLanes<T>;
          (whole ? some : one)(s.pixels, small.at + row * s.pixels, columns.at + at, s.k, A(t.scale),
                               past_caches, w + row * s.row + at, s.row);
        }
      }
    }
    stream_fence();
  });
  if (!s.dense) s.each_tap(swap, parallel, [&](T* to, int64_t from) { *to = room.at[from]; });
}

template <class T>
void strided_streamed_weight_gradient(const Convolution& t, const Parallel& parallel) {
  streamed_weight_gradient<T>(t, false, parallel);
}
template <class T>
void transposed_streamed_weight_gradient(const Convolution& t, const Parallel& parallel) {
  streamed_weight_gradient<T>(t, true, parallel);
}

}  // namespace
}  // namespace GANKERN_ISA
}  // namespace gankern
