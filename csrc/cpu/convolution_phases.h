// The 4x4 kernel of stride 2 and padding 1, and its transpose, themselves, for few channels on the image's side: what
// convolution_direct.h is for stride 1. Both are convolutions of two by two taps of stride 1 on the smaller image's
// grid, between one side's image and the four phases of the other's (the pixels of even and of odd rows and columns):
//
//   strided     out[i] = sum over b, a of w[2a + b] phase_b[i + a],  phase_b[r] = in[2r + b - 1]
//   transposed  out[2i + p] = sum over a of w[3 - p - 2a] in[i + p + a - 1]
//
// so that vectors are filled with neighbouring pixels of the smaller grid, and no product is with a zero.
//
//   forward  for a band of rows: all input channels as planes with what stands around them; then up to four output
//            channels (and one phase) at a time in registers, over the planes of up to kChain products
//   weight   for up to four channels of the smaller image and one channel of the larger: the sums of a band of rows,
//            for the four taps of each phase
//
// These sums are added up in memory in a fixed order.
#pragma once

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int kHalfTaps = 2,
              kPhases = 4;  // taps of a phase in each direction; phases: of rows times of columns
constexpr int kSquare = kHalfTaps * kHalfTaps;  // taps of a phase
constexpr int64_t kPlanes = kChain / kSquare;   // that a register tile sums over

// Even and odd places of two vectors that follow each other, and back.
template <class A, class Lanes = std::make_integer_sequence<int, kLanesOf<A>>>
struct Halves;
template <class A, int... l>
struct Halves<A, std::integer_sequence<int, l...>> {
  static constexpr int n = kLanesOf<A>;
  static inline __attribute__((always_inline)) Vec<A> even(Vec<A> a, Vec<A> b) {
    return __builtin_shufflevector(a, b, (2 * l)...);
  }
  static inline __attribute__((always_inline)) Vec<A> odd(Vec<A> a, Vec<A> b) {
    return __builtin_shufflevector(a, b, (2 * l + 1)...);
  }
  static inline __attribute__((always_inline)) Vec<A> first(Vec<A> even, Vec<A> odd) {
    return __builtin_shufflevector(even, odd, (l % 2 * n + l / 2)...);
  }
  static inline __attribute__((always_inline)) Vec<A> second(Vec<A> even, Vec<A> odd) {
    return __builtin_shufflevector(even, odd, (l % 2 * n + n / 2 + l / 2)...);
  }
};

// Rows [top, top + rows) of the four phases of `channels` channels: to[channel][phase][row][column], from -1 on in the
// image. `room` holds the rows as they are.
template <class T>
struct Phases {
  using A = Acc<T>;
  static constexpr int L = kLanes<T>;
  int64_t rows, row, plane;        // of a phase: rows, and from one row and one phase to the next
  int64_t image_row, image_plane;  // of the room

  Phases(int64_t rows_, int64_t columns)
      : rows(rows_),
        row(odd_lines<A>(round_up(columns, L))),
        plane(rows * row),
        image_row(odd_lines<A>(2 * round_up(columns, L))),
        image_plane(2 * rows * image_row) {}

  void fill(const ConvolutionImages& images, int64_t image, int64_t channel, int64_t channels,
            int64_t columns, int64_t top, const A* zeros, A* room, A* to) const {
    const int64_t width = round_up(columns, L);
    fill_planes<T>(images, image, channel, channels, 2 * top - 1, 2 * rows, -1, 2 * width, zeros, room,
                   image_row, image_plane);
    for (int64_t c = 0; c < channels; ++c)
      for (int64_t r = 0; r < 2 * rows; ++r) {
        const A* from = room + c * image_plane + r * image_row;
        A* even = to + (c * kPhases + r % 2 * 2) * plane + r / 2 * row;
        for (int64_t x = 0; x < width; x += L) {
          const Vec<A> a = load(from + 2 * x), b = load(from + 2 * x + L);
          store(even + x, Halves<A>::even(a, b));
          store(even + plane + x, Halves<A>::odd(a, b));
        }
      }
  }
};

// All products of a band: sums[channel][row] of `planes` planes.
template <class A, int channels>
void sum_phases(int64_t planes, int64_t width, const A* from, int64_t row, int64_t plane, const A* w, A* sums,
                int64_t sums_row) {
  constexpr int R = kDirectRows<channels>;
  const int64_t at[kSquare] = {0, 1, row, row + 1};
  std::memset(static_cast<void*>(sums), 0, size_t(channels * R * sums_row) * sizeof(A));
  for (int64_t i = 0; i < planes; i += kPlanes)
    for (int64_t x = 0; x < width; x += kLanesOf<A>)
      direct_tile<A, channels>(min(kPlanes, planes - i), std::integral_constant<int, kSquare>(), at,
                               from + i * plane + x, row, plane, w + i * kSquare * kFew, sums + x, sums_row,
                               R * sums_row);
}

// One tap of the weight, where it lies.
template <class T>
inline T* tap_at(const Convolution& t, int64_t out, int64_t in, int64_t y, int64_t x) {
  return static_cast<T*>(t.weight) + out * t.stride_out + in * t.stride_in + tap_offset<4>(t, int(y * 4 + x));
}

template <class T, int channels>
void strided_forward(const Convolution& t, const Parallel& parallel) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  constexpr int64_t R = kDirectRows<channels>;
  const int64_t height = t.out.height, width = t.out.width, in = t.in.channels;
  const int64_t bands = ceil_div(height, R), blocks = ceil_div(t.out.channels, channels);
  if (t.images * bands * blocks * width == 0) return;
  // [block][input channel][phase][tap][output channel of the block]
  Zeros<A> w(blocks * in * kPhases * kSquare * kFew);
  for (int64_t o = 0; o < t.out.channels; ++o)
    for (int64_t i = 0; i < in; ++i)
      for (int64_t k = 0; k < kPhases * kSquare; ++k) {
        const int64_t phase = k / kSquare, tap = k % kSquare;
        const int64_t y = tap / 2 * 2 + phase / 2, x = tap % 2 * 2 + phase % 2;
        w.at[((o / channels * in + i) * kPhases * kSquare + k) * kFew + o % channels] =
            widen(*tap_at<T>(t, o, i, y, x)) * A(t.scale);
      }
  const int64_t sums_row = direct_stride<T>(width), columns = sums_row + 1;
  const Phases<T> phases(R + 1, columns);
  const int64_t step = t.in.channels_last ? L : 1;  // channels that are turned at a time
  parallel_for(parallel, t.images * bands, 1, [&](int64_t task, int64_t end_task) {
    Scratch<A> room(step * phases.image_plane), planes(in * kPhases * phases.plane),
        sums(channels * R * sums_row);
    Zeros<A> zeros(padded_channels<A>(in));
    for (; task < end_task; ++task) {
      const int64_t image = task / bands, top = task % bands * R;
      for (int64_t i = 0; i < in; i += step)
        phases.fill(t.in, image, i, min(step, in - i), columns, top, zeros.at, room.at,
                    planes.at + i * kPhases * phases.plane);
      for (int64_t block = 0; block < blocks; ++block) {
        sum_phases<A, channels>(in * kPhases, width, planes.at, phases.row, phases.plane,
                                w.at + block * in * kPhases * kSquare * kFew, sums.at, sums_row);
        const int64_t first = block * channels;
        for (int64_t c = 0; c < min(channels, t.out.channels - first); ++c) {
          const A bias = t.bias ? widen(static_cast<const T*>(t.bias)[first + c]) : A(0);
          for (int64_t r = 0; r < min(R, height - top); ++r) {
            const ResultRow<T> out(t.out, image, first + c, top + r);
            for (int64_t x = 0; x < width; x += L)
              put<T>(load(sums.at + (c * R + r) * sums_row + x), bias, A(t.slope), min(L, width - x),
                     out.data + x * out.step, out.step);
          }
        }
      }
    }
  });
}

template <class T, int channels>
void transposed_forward(const Convolution& t, const Parallel& parallel) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  constexpr int64_t R = kDirectRows<channels>;
  const int64_t height = ceil_div(t.out.height, 2), width = ceil_div(t.out.width, 2);  // of a phase
  const int64_t in = t.in.channels, bands = ceil_div(height, R), blocks = ceil_div(t.out.channels, channels);
  if (t.images * bands * blocks * width == 0) return;
  // [block][phase][input channel][tap][output channel of the block]
  Zeros<A> w(blocks * in * kPhases * kSquare * kFew);
  for (int64_t o = 0; o < t.out.channels; ++o)
    for (int64_t i = 0; i < in; ++i)
      for (int64_t k = 0; k < kPhases * kSquare; ++k) {
        const int64_t phase = k / kSquare, tap = k % kSquare;
        const int64_t y = 3 - phase / 2 - tap / 2 * 2, x = 3 - phase % 2 - tap % 2 * 2;
        w.at[(((o / channels * kPhases + phase) * in + i) * kSquare + tap) * kFew + o % channels] =
            widen(*tap_at<T>(t, o, i, y, x)) * A(t.scale);
      }
  const int64_t sums_row = direct_stride<T>(width), columns = direct_stride<T>(sums_row + 2);
  const int64_t row = odd_lines<A>(columns), plane = (R + 2) * row;
  const int64_t step = t.in.channels_last ? L : 1;
  parallel_for(parallel, t.images * bands, 1, [&](int64_t task, int64_t end_task) {
    const int64_t half = channels * R * sums_row;
    Scratch<A> planes(round_up(in, step) * plane), sums(2 * half);
    Zeros<A> zeros(padded_channels<A>(in));
    for (; task < end_task; ++task) {
      const int64_t image = task / bands, top = task % bands * R;
      for (int64_t i = 0; i < in; i += step)
        fill_planes<T>(t.in, image, i, min(step, in - i), top - 1, R + 2, -1, columns, zeros.at,
                       planes.at + i * plane, row, plane);
      for (int64_t block = 0; block < blocks; ++block)
        for (int64_t odd = 0; odd < 2; ++odd) {  // rows of the result
          for (int64_t side = 0; side < 2; ++side)
            sum_phases<A, channels>(in, width, planes.at + odd * row + side, row, plane,
                                    w.at + (block * kPhases + odd * 2 + side) * in * kSquare * kFew,
                                    sums.at + side * half, sums_row);
          const int64_t first = block * channels;
          for (int64_t c = 0; c < min(channels, t.out.channels - first); ++c) {
            const A bias = t.bias ? widen(static_cast<const T*>(t.bias)[first + c]) : A(0);
            for (int64_t r = 0; r < R; ++r) {
              const int64_t y = 2 * (top + r) + odd;
              if (y >= t.out.height) break;
              const ResultRow<T> out(t.out, image, first + c, y);
              const A* from = sums.at + (c * R + r) * sums_row;
              for (int64_t x = 0; x < width; x += L) {
                const Vec<A> a = load(from + x), b = load(from + half + x);
                const int64_t left = t.out.width - 2 * x;
                put<T>(Halves<A>::first(a, b), bias, A(t.slope), min(L, left), out.data + 2 * x * out.step,
                       out.step);
                if (left > L)
                  put<T>(Halves<A>::second(a, b), bias, A(t.slope), min(L, left - L),
                         out.data + (2 * x + L) * out.step, out.step);
              }
            }
          }
        }
    }
  });
}

// `small` is the image with a quarter of the pixels, `large` the other one; `swap`: the small one is the input.
template <class T, int channels>
void phase_weight_gradient(const Convolution& t, bool swap, const Parallel& parallel) {
  using A = Acc<T>;
  const ConvolutionImages &small = swap ? t.in : t.out, &large = swap ? t.out : t.in;
  const int64_t height = small.height, width = small.width;
  const int64_t bands = ceil_div(height, kBand), blocks = ceil_div(small.channels, channels);
  const int64_t step = large.channels_last ? kLanes<T> : 1, steps = ceil_div(large.channels, step);
  const int64_t g_row = direct_stride<T>(width), g_plane = kBand * g_row, columns = g_row + 1;
  const Phases<T> phases(kBand + 1, columns);
  constexpr int64_t values = channels * kSquare;  // of a phase
  parallel_for(parallel, blocks * steps, 1, [&](int64_t task, int64_t end_task) {
    Scratch<A> room(step * phases.image_plane), planes(step * kPhases * phases.plane), g(channels * g_plane);
    Scratch<A> dw(step * kPhases * values);
    Zeros<A> zeros(padded_channels<A>(max(small.channels, large.channels)));
    for (; task < end_task; ++task) {
      const int64_t first = task / steps * channels, begin = task % steps * step;
      const int64_t count = min(step, large.channels - begin);
      std::memset(static_cast<void*>(dw.at), 0, size_t(step * kPhases * values) * sizeof(A));
      for (int64_t band = 0; band < t.images * bands; ++band) {
        const int64_t image = band / bands, top = band % bands * kBand, rows = min(kBand, height - top);
        fill_planes<T>(small, image, first, channels, top, rows, 0, g_row, zeros.at, g.at, g_row, g_plane);
        phases.fill(large, image, begin, count, columns, top, zeros.at, room.at, planes.at);
        for (int64_t i = 0; i < count * kPhases; ++i)
          direct_sums<A, channels, kSquare, kHalfTaps>(rows, g_row, g.at, g_row, g_plane,
                                                       planes.at + i * phases.plane, phases.row,
                                                       dw.at + i * values, kSquare);
      }
      for (int64_t i = 0; i < count; ++i)
        for (int64_t c = 0; c < min(channels, small.channels - first); ++c)
          for (int64_t k = 0; k < kPhases * kSquare; ++k) {
            const int64_t phase = k / kSquare, tap = k % kSquare, few = first + c, other = begin + i;
            const int64_t y = tap / 2 * 2 + phase / 2, x = tap % 2 * 2 + phase % 2;
            *tap_at<T>(t, swap ? other : few, swap ? few : other, y, x) =
                narrow<T>(dw.at[(i * kPhases + phase) * values + c * kSquare + tap] * A(t.scale));
          }
    }
  });
}

// By the number of output channels.
template <class T>
void strided_forward_of_any(const Convolution& t, const Parallel& parallel) {
  of_few(t.out.channels, [](auto channels) { return strided_forward<T, channels>; })(t, parallel);
}
template <class T>
void transposed_forward_of_any(const Convolution& t, const Parallel& parallel) {
  of_few(t.out.channels, [](auto channels) { return transposed_forward<T, channels>; })(t, parallel);
}
template <class T>
void strided_weight_gradient_of_any(const Convolution& t, const Parallel& parallel) {
  phase_weight_gradient<T, kFew>(t, false, parallel);
}
template <class T>
void transposed_weight_gradient_of_any(const Convolution& t, const Parallel& parallel) {
  phase_weight_gradient<T, kFew>(t, true, parallel);
}

}  // namespace
}  // namespace GANKERN_ISA
}  // namespace gankern
