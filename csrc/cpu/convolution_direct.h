// The row that is no bilinear algorithm: the convolution itself, of stride 1 and any square kernel, for few
// channels on one side, as the layers beside an image have. The other rows, and vendors' kernels, fill a
// vector with channels, of which there are not enough there; here it is filled with the pixels of a row.
//
//   forward  for a band of rows, up to four output channels and one input channel at a time: the band's
//            inputs as a plane with what stands around it, then register tiles of rows by one vector, a tap
//            at a time: sum[channel][row] += w[channel] x[row + tap y][tap x ...]
//   weight   for an input channel, up to four output channels and up to four taps at a time:
//            sum[channel][tap] += g[channel] x[tap ...], over the vectors of a band of rows
//
// Both add up a band or an input channel in registers, and these sums in memory, in a fixed order.
#pragma once

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int kFew = 4;   // channels, and taps, of a register tile
constexpr int kBand = 8;  // rows that the weight gradient sums at a time

// Rows of a register tile: 24 of 32 registers are sums, or 12 of 16.
template <int channels>
constexpr int kDirectRows = (kVectorBytes == 64 && channels > 1 ? 24 : 12) / channels;

// The function for so many channels or taps, of those that `of` makes for 1 to kFew; for more, kFew's.
template <class Of>
auto of_few(int64_t count, const Of& of) {
  static_assert(kFew == 4);
  return count == 1   ? of(std::integral_constant<int, 1>())
         : count == 2 ? of(std::integral_constant<int, 2>())
         : count == 3 ? of(std::integral_constant<int, 3>())
                      : of(std::integral_constant<int, 4>());
}

// The rows [top, top + rows) of some channels, columns [left, left + width) of each, as planes of their own.
// What stands outside of the image is as its border says.
template <class T>
void fill_planes(const ConvolutionImages& images, int64_t image, int64_t channel, int64_t channels,
                 int64_t top, int64_t rows, int64_t left, int64_t width, const Acc<T>* zeros, Acc<T>* to,
                 int64_t to_row, int64_t to_channel) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  const T* data = static_cast<const T*>(images.data) + image * images.channels * images.height * images.width;
  if (images.channels_last) {
    const Pixels<T> pixels{
        data, images.width, images.height, images.channels, reinterpret_cast<const T*>(zeros), images.border,
        0,    images.height};
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t x = 0; x < width; x += L) {
        const T* from[L];
        for (int l = 0; l < L; ++l) from[l] = pixels.at(top + r, left + x + l);
        for (int64_t c = 0; c < channels; c += L) {
          const int64_t wanted = min(L, channels - c), there = min(L, images.channels - channel - c);
          Vec<A> v[L];
          for (int l = 0; l < L; ++l) {
            const T* p = from[l] == pixels.zeros ? from[l] : from[l] + channel + c;
            v[l] = there >= L ? load(p) : there > 0 ? load_partial(p, there) : Vec<A>{};
          }
          transpose<A>(v);
          for (int l = 0; l < wanted; ++l) store(to + (c + l) * to_channel + r * to_row + x, v[l]);
        }
      }
    return;
  }
  const Pixels<T> pixels{nullptr, images.width, images.height, 1, nullptr, images.border, 0, images.height};
  for (int64_t c = 0; c < channels; ++c)
    for (int64_t r = 0; r < rows; ++r) {
      A* out = to + c * to_channel + r * to_row;
      int64_t y = top + r;
      const bool there = y >= 0 && y < images.height;
      if (channel + c >= images.channels || (!there && images.border == 0)) {
        std::memset(static_cast<void*>(out), 0, size_t(width) * sizeof(A));
        continue;
      }
      y = min(max(pixels.folded(y, images.height), 0), images.height - 1);
      const T* row = data + ((channel + c) * images.height + y) * images.width;
      const auto outside = [&](int64_t x) {
        if (images.border == 0) return A(0);
        return A(widen(row[min(max(pixels.folded(x, images.width), 0), images.width - 1)]));
      };
      const int64_t begin = min(width, max(0, -left)), end = min(width, max(begin, images.width - left));
      for (int64_t x = 0; x < begin; ++x) out[x] = outside(left + x);
      int64_t x = begin;
      for (; x + L <= end; x += L) store(out + x, load(row + left + x));
      for (; x < end; ++x) out[x] = widen(row[left + x]);
      for (; x < width; ++x) out[x] = outside(left + x);
    }
}

// to[channel][row] += the products of some planes with `taps` taps each, which read their pixels at `at`, for a
// vector of pixels of each row. `Taps`: a number, or an integral_constant.
template <class A, int channels, class Taps>
void direct_tile(int64_t planes, Taps taps, const int64_t* at, const A* from, int64_t row, int64_t plane,
                 const A* w, A* to, int64_t to_row, int64_t to_channel) {
  constexpr int R = kDirectRows<channels>;
  Vec<A> sum[channels][R];
#pragma GCC unroll 4
  for (int c = 0; c < channels; ++c)
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) sum[c][r] = Vec<A>{};
  for (int64_t i = 0; i < planes; ++i)
    for (int64_t k = 0; k < taps; ++k) {
      const A* p = from + i * plane + at[k];
      Vec<A> tap[channels];
#pragma GCC unroll 4
      for (int c = 0; c < channels; ++c) tap[c] = broadcast<A>(w[c]);
#pragma GCC unroll 12
      for (int r = 0; r < R; ++r) {
        const Vec<A> v = load(p + r * row);
#pragma GCC unroll 4
        for (int c = 0; c < channels; ++c) sum[c][r] += tap[c] * v;
      }
      w += kFew;
    }
#pragma GCC unroll 4
  for (int c = 0; c < channels; ++c)
#pragma GCC unroll 12
    for (int r = 0; r < R; ++r) {
      A* p = to + c * to_channel + r * to_row;
      store(p, load(p) + sum[c][r]);
    }
}

// y, with bias and leaky ReLU, of some pixels of a row: to[x * step].
template <class T>
inline void put(Vec<Acc<T>> y, Acc<T> bias, Acc<T> slope, int64_t wanted, T* to, int64_t step) {
  y = y + bias;
  if (slope != 1) y = y < Vec<Acc<T>>{} ? y * slope : y;
  if (step != 1)
    for (int l = 0; l < wanted; ++l) to[l * step] = narrow<T>(y[l]);
  else if (wanted == kLanes<T>)
    store(to, y);
  else
    store_partial(to, y, wanted);
}

// A row of a result, and what lies between its pixels.
template <class T>
struct ResultRow {
  T* data;
  int64_t step;
  ResultRow(const ConvolutionImages& out, int64_t image, int64_t channel, int64_t y)
      : data(static_cast<T*>(out.data) +
             (out.channels_last ? (image * out.height + y) * out.width * out.channels + channel
                                : ((image * out.channels + channel) * out.height + y) * out.width)),
        step(out.channels_last ? out.channels : 1) {}
};

template <class T>
inline int64_t direct_stride(int64_t width) {
  return round_up(width, kLanes<T>);
}

template <class T, int channels>
void direct_forward(const Convolution& t, const Parallel& parallel) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  constexpr int64_t R = kDirectRows<channels>;
  const int64_t taps = t.taps, square = taps * taps, height = t.out.height, width = t.out.width;
  const int64_t bands = ceil_div(height, R), blocks = ceil_div(t.out.channels, channels);
  if (t.images * bands * blocks * width == 0) return;
  // Weights as the tiles read them: [block][input channel][tap][output channel of the block].
  Zeros<A> w(blocks * t.in.channels * square * kFew);
  for (int64_t o = 0; o < t.out.channels; ++o)
    for (int64_t i = 0; i < t.in.channels; ++i)
      for (int64_t k = 0; k < square; ++k) {
        const int64_t tap = t.flip ? square - 1 - k : k;
        const T* from = static_cast<const T*>(t.weight) + o * t.stride_out + i * t.stride_in +
                        tap / taps * t.stride_y + tap % taps * t.stride_x;
        w.at[((o / channels * t.in.channels + i) * square + k) * kFew + o % channels] =
            widen(*from) * A(t.scale);
      }
  const int64_t out_row = direct_stride<T>(width), row = odd_lines<A>(direct_stride<T>(out_row + taps - 1));
  const int64_t plane = (R + taps - 1) * row, step = t.in.channels_last ? L : 1;  // channels turned at a time
  const Scratch<int64_t> places(square);                                          // of the taps' pixels
  for (int64_t k = 0; k < square; ++k) places.at[k] = k / taps * row + k % taps;
  parallel_for(parallel, t.images * bands, 1, [&](int64_t task, int64_t end_task) {
    Scratch<A> planes(step * plane), sums(channels * R * out_row);
    Zeros<A> zeros(padded_channels<A>(t.in.channels));
    for (; task < end_task; ++task) {
      const int64_t image = task / bands, top = task % bands * R;
      for (int64_t block = 0; block < blocks; ++block) {
        std::memset(static_cast<void*>(sums.at), 0, size_t(channels * R * out_row) * sizeof(A));
        for (int64_t i = 0; i < t.in.channels; ++i) {
          if (i % step == 0)
            fill_planes<T>(t.in, image, i, min(step, t.in.channels - i), top - t.padding, R + taps - 1,
                           -t.padding, direct_stride<T>(out_row + taps - 1), zeros.at, planes.at, row, plane);
          for (int64_t x = 0; x < width; x += L)
            direct_tile<A, channels>(1, square, places.at, planes.at + i % step * plane + x, row, plane,
                                     w.at + (block * t.in.channels + i) * square * kFew, sums.at + x, out_row,
                                     R * out_row);
        }
        const int64_t first = block * channels;
        for (int64_t c = 0; c < min(channels, t.out.channels - first); ++c) {
          const A bias = t.bias ? widen(static_cast<const T*>(t.bias)[first + c]) : A(0), slope = A(t.slope);
          for (int64_t r = 0; r < min(R, height - top); ++r) {
            const ResultRow<T> out(t.out, image, first + c, top + r);
            for (int64_t x = 0; x < width; x += L)
              put<T>(load(sums.at + (c * R + r) * out_row + x), bias, slope, min(L, width - x),
                     out.data + x * out.step, out.step);
          }
        }
      }
    }
  });
}

// to[channel][tap] += sums of g[channel] times x[tap ...] over rows of `width` pixels, for `taps` taps in lines of `line`.
template <class A, int channels, int taps, int line = taps>
void direct_sums(int64_t rows, int64_t width, const A* g, int64_t g_row, int64_t g_channel, const A* x,
                 int64_t x_row, A* to, int64_t to_channel) {
  constexpr int L = kLanesOf<A>;
  Vec<A> sum[channels][taps];
#pragma GCC unroll 4
  for (int c = 0; c < channels; ++c)
#pragma GCC unroll 4
    for (int k = 0; k < taps; ++k) sum[c][k] = Vec<A>{};
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t i = 0; i < width; i += L) {
      Vec<A> v[taps];
#pragma GCC unroll 4
      for (int k = 0; k < taps; ++k) v[k] = load(x + (r + k / line) * x_row + i + k % line);
#pragma GCC unroll 4
      for (int c = 0; c < channels; ++c) {
        const Vec<A> y = load(g + c * g_channel + r * g_row + i);
#pragma GCC unroll 4
        for (int k = 0; k < taps; ++k) sum[c][k] += y * v[k];
      }
    }
  for (int c = 0; c < channels; ++c)
    for (int k = 0; k < taps; ++k) {
      A total = 0;
      for (int l = 0; l < L; ++l) total += sum[c][k][l];
      to[c * to_channel + k] += total;
    }
}

template <class T, int channels>
void direct_weight_gradient(const Convolution& t, const Parallel& parallel) {
  using A = Acc<T>;
  const int64_t taps = t.taps, square = taps * taps, height = t.out.height;
  const int64_t bands = ceil_div(height, kBand), blocks = ceil_div(t.out.channels, channels);
  const int64_t step = t.in.channels_last ? kLanes<T> : 1, steps = ceil_div(t.in.channels, step);
  const int64_t g_row = direct_stride<T>(t.out.width), row = odd_lines<A>(direct_stride<T>(g_row + taps - 1));
  const int64_t g_plane = kBand * g_row, plane = (kBand + taps - 1) * row;
  static constexpr auto sums_of = [](int64_t count) {
    return of_few(count, [](auto some) { return direct_sums<A, channels, some>; });
  };
  parallel_for(parallel, blocks * steps, 1, [&](int64_t task, int64_t end_task) {
    Scratch<A> planes(step * plane), g(channels * g_plane), dw(step * channels * square);
    Zeros<A> zeros(padded_channels<A>(max(t.in.channels, t.out.channels)));
    for (; task < end_task; ++task) {
      const int64_t first = task / steps * channels, begin = task % steps * step;
      const int64_t count = min(step, t.in.channels - begin);
      std::memset(static_cast<void*>(dw.at), 0, size_t(step * channels * square) * sizeof(A));
      for (int64_t band = 0; band < t.images * bands; ++band) {
        const int64_t image = band / bands, top = band % bands * kBand, rows = min(kBand, height - top);
        fill_planes<T>(t.out, image, first, channels, top, rows, 0, g_row, zeros.at, g.at, g_row, g_plane);
        fill_planes<T>(t.in, image, begin, count, top - t.padding, rows + taps - 1, -t.padding,
                       direct_stride<T>(g_row + taps - 1), zeros.at, planes.at, row, plane);
        for (int64_t i = 0; i < count; ++i)
          for (int64_t y = 0; y < taps; ++y)
            for (int64_t x = 0; x < taps; x += kFew)
              sums_of(min(kFew, taps - x))(rows, g_row, g.at, g_row, g_plane,
                                           planes.at + i * plane + y * row + x, row,
                                           dw.at + i * channels * square + y * taps + x, square);
      }
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < min(channels, t.out.channels - first); ++c)
          for (int64_t k = 0; k < square; ++k) {
            const int64_t tap = t.flip ? square - 1 - k : k;
            static_cast<T*>(t.weight)[(first + c) * t.stride_out + (begin + i) * t.stride_in +
                                      tap / taps * t.stride_y + tap % taps * t.stride_x] =
                narrow<T>(dw.at[(i * channels + c) * square + k] * A(t.scale));
          }
    }
  });
}

// By the number of output channels.
template <class T>
void direct_forward_of_any(const Convolution& t, const Parallel& parallel) {
  of_few(t.out.channels, [](auto channels) { return direct_forward<T, channels>; })(t, parallel);
}
template <class T>
void direct_weight_gradient_of_any(const Convolution& t, const Parallel& parallel) {
  of_few(t.out.channels, [](auto channels) { return direct_weight_gradient<T, channels>; })(t, parallel);
}

}  // namespace
}  // namespace GANKERN_ISA
}  // namespace gankern
