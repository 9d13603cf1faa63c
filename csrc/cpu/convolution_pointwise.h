// The 1x1 kernel of stride 1: a product of two matrices for each image. Of few channels and many pixels it takes
// little more than moving the images does, so that each value of theirs is read once, as it lies in memory.
//
//   forward  out[o][p] = sum over i of W[o][i] x[i][p], for a block of pixels p at a time: its pixels in panels
//            [panel][i][kPanel], as the matrix product reads them, the product of a panel [o][kPanel], and that is put
//            to the result
//   weight   W[o][i] = sum over p of x[i][p] g[p][o], for a block of pixels at a time: x as it lies, a row a channel
//            (channels_last: a pixel), and the channels of g in panels [panel][p][kPanel]
//
// Every block has a fixed place in the sums of the weight's gradient, of which there are some, added up in turn.
#pragma once

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kPixelBytes = 64 * 1024;  // of a block of x in the forward, about
constexpr int64_t kPixelsSummed = 256;      // of a block of the weight's gradient

// Images as matrices of channels and pixels.
template <class T>
struct Matrices {
  T* data;
  int64_t channels, pixels;
  bool last;
  explicit Matrices(const ConvolutionImages& images)
      : data(static_cast<T*>(images.data)),
        channels(images.channels),
        pixels(images.height * images.width),
        last(images.channels_last) {}
  T* at(int64_t image, int64_t channel, int64_t pixel) const {
    return data + image * channels * pixels + (last ? pixel * channels + channel : channel * pixels + pixel);
  }
};

// to[r * to_row + ...] = `columns` values of each of some rows, at most a panel of them with zeros behind.
template <class T>
void take_panel(const T* from, int64_t from_row, int64_t rows, int64_t columns, Acc<T>* to) {
  constexpr int L = kLanes<T>;
  constexpr int64_t panel = kPanel<Acc<T>>;
  for (int64_t r = 0; r < rows; ++r, from += from_row, to += panel) {
    if (columns == panel) {
      store(to, load(from));
      store(to + L, load(from + L));
    } else {
      store(to, columns < L ? load_partial(from, columns) : load(from));
      if (columns > L) store(to + L, load_partial(from + L, columns - L));
    }
  }
}

template <class T>
void pointwise_forward(const Convolution& t, const Parallel& parallel) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  constexpr int64_t panel = kPanel<A>;
  const Matrices<T> in(t.in), out(t.out);
  if (t.images * out.pixels * out.channels == 0) return;
  const Scratch<A> w(out.channels * in.channels);
  parallel_for(parallel, out.channels, 64, [&](int64_t o, int64_t end) {
    for (; o < end; ++o)
      for (int64_t i = 0; i < in.channels; ++i)
        w.at[o * in.channels + i] =
            widen(static_cast<const T*>(t.weight)[o * t.stride_out + i * t.stride_in]) * A(t.scale);
  });
  const int64_t panels = ceil_div(out.pixels, panel);
  const int64_t most = max(1, kPixelBytes / max(1, in.channels * panel * int64_t(sizeof(A))));
  // Blocks of even size; of few pixels, parts of the output channels make the rest of the work for several threads.
  const int64_t blocks = ceil_div(panels, most);
  const int64_t parts = min(ceil_div(out.channels, kTileRows), ceil_div(parallel.threads, t.images * blocks));
  parallel_for(parallel, t.images * blocks * parts, 1, [&](int64_t task, int64_t end_task) {
    const Scratch<A> x(ceil_div(panels, blocks) * in.channels * panel), product(out.channels * panel);
    for (; task < end_task; ++task) {
      const int64_t part = task % parts, block = task / parts % blocks, image = task / parts / blocks;
      const int64_t begin = panels * block / blocks, end = panels * (block + 1) / blocks;
      const int64_t first = out.channels * part / parts, channels = out.channels * (part + 1) / parts - first;
      const auto width = [&](int64_t p) { return min(panel, out.pixels - p * panel); };
      const auto place = [&](int64_t p) { return x.at + (p - begin) * in.channels * panel; };
      if (in.last) {
        for (int64_t p = begin; p < end; ++p)
          turn_in(in.at(image, 0, p * panel), in.channels, width(p), in.channels, place(p), panel);
      } else {
        for (int64_t i = 0; i < in.channels; ++i)
          for (int64_t p = begin; p < end; ++p)
            take_panel(in.at(image, i, p * panel), 0, 1, width(p), place(p) + i * panel);
      }
      for (int64_t p = begin; p < end; ++p) {
        panel_product<A>(channels, in.channels, width(p), w.at + first * in.channels, in.channels, 1,
                         place(p), product.at, panel, false);
        for (int64_t c = 0; c < channels; ++c) {
          const A bias = t.bias ? widen(static_cast<const T*>(t.bias)[first + c]) : A(0), slope = A(t.slope);
          A* from = product.at + c * panel;
          for (int64_t v = 0; v < width(p); v += L) {
            if (out.last)
              put<A>(load(from + v), bias, slope, L, from + v, 1);
            else
              put<T>(load(from + v), bias, slope, min(L, width(p) - v),
                     out.at(image, first + c, p * panel + v), 1);
          }
        }
        if (out.last)
          turn_out(product.at, panel, width(p), channels, out.at(image, first, p * panel), out.channels);
      }
    }
  });
}

template <class T>
void pointwise_weight_gradient(const Convolution& t, const Parallel& parallel) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  constexpr int64_t panel = kPanel<A>;
  const Matrices<T> in(t.in), out(t.out);
  const int64_t panels = ceil_div(out.channels, panel), values = panels * in.channels * panel;
  if (values == 0) return;
  const int64_t of_image = ceil_div(out.pixels, kPixelsSummed), blocks = t.images * of_image;
  const int64_t sums = max(1, min(blocks, min(kSums, kSumsBytes / (values * int64_t(sizeof(A))))));
  const int64_t parts = min(panels, ceil_div(parallel.threads, sums));  // of output channels
  const int64_t row = odd_lines<A>(in.last ? in.channels : kPixelsSummed);
  const Scratch<A> total(sums * values);
  if (blocks == 0) std::memset(static_cast<void*>(total.at), 0, size_t(sums * values) * sizeof(A));
  parallel_for(parallel, blocks == 0 ? 0 : sums * parts, 1, [&](int64_t task, int64_t end_task) {
    const Scratch<A> x((in.last ? kPixelsSummed : in.channels) * row), g(kPixelsSummed * panel);
    for (; task < end_task; ++task) {
      const int64_t sum = task / parts, part = task % parts;
      const int64_t begin = blocks * sum / sums, end = blocks * (sum + 1) / sums;
      for (int64_t block = begin; block < end; ++block) {
        const int64_t image = block / of_image, first = block % of_image * kPixelsSummed;
        const int64_t pixels = min(kPixelsSummed, out.pixels - first);
        const int64_t rows = in.last ? pixels : in.channels, columns = in.last ? in.channels : pixels;
        for (int64_t r = 0; r < rows; ++r) {
          const T* from = in.last ? in.at(image, 0, first + r) : in.at(image, r, first);
          A* to = x.at + r * row;
          int64_t c = 0;
          for (; c + L <= columns; c += L) store(to + c, load(from + c));
          if (c < columns) store(to + c, load_partial(from + c, columns - c));
        }
        for (int64_t p = panels * part / parts; p < panels * (part + 1) / parts; ++p) {
          const int64_t width = min(panel, out.channels - p * panel);
          const T* from = out.at(image, p * panel, first);
          if (out.last)
            take_panel(from, out.channels, pixels, width, g.at);
          else
            turn_in(from, out.pixels, width, pixels, g.at, panel);
          panel_product<A>(in.channels, pixels, width, x.at, in.last ? 1 : row, in.last ? row : 1, g.at,
                           total.at + (sum * panels + p) * in.channels * panel, panel, block > begin);
        }
      }
    }
  });
  parallel_for(parallel, panels * in.channels, 64, [&](int64_t at, int64_t end) {
    for (; at < end; ++at) {
      const int64_t first = at / in.channels * panel, i = at % in.channels;
      const int64_t width = min(panel, out.channels - first);
      A value[panel] = {};
      for (int64_t sum = 0; sum < sums; ++sum)
        for (int64_t o = 0; o < width; ++o) value[o] += total.at[sum * values + at * panel + o];
      for (int64_t o = 0; o < width; ++o)
        static_cast<T*>(t.weight)[(first + o) * t.stride_out + i * t.stride_in] =
            narrow<T>(value[o] * A(t.scale));
    }
  });
}

}  // namespace
}  // namespace GANKERN_ISA
}  // namespace gankern
