// Convolutions by bilinear algorithms: y = A [(G w) * (B x)], the same three small matrices on both sides of
// an image tile. The table of them is convolution_rows.h; what stands here knows no row by name. Six are
// none of these: convolution_direct.h, convolution_phases.h, convolution_streamed.h and convolution_pointwise.h.
//
// Channels lie side by side in all scratch memory, so that transforms are vectorised over channels for every
// row and every image size; contiguous (NCHW) images are turned on the way in and out, in registers, a block
// at a time.
//
//   kernel   U[product][panel of 32 output channels][in channel][32] = G w G^T, once a call
//   forward  for a block of whole rows of tiles:
//              V[v][tile][in channel] = B x B^T           zeros outside of the image
//              for some output channels at a time:
//                M[m][tile][out channel] += V U           the matrix product below, a product j at a time
//                out = A M A^T, plus bias, leaky ReLU
//   weight   for a chunk of rows of tiles: V[v][panel of 32 in channels][tile][32] = B x B^T and
//            W[m][panel][tile][32] = A^T g A, then
//              dU[product][panel][in channel][32] += V^T W;  at the end dw = G^T dU G
//            (panels on both sides: what a product reads follows each other in memory)
//
// The data gradient of a row is another row's forward (gankern/ops/convolution.py knows which), so these two
// kernels give derivatives of any order.
//
// Bound by the matrix products: in channels * out channels * products multiply-adds a tile, at the rate of a
// register tile of kTileRows broadcasts by two vectors. V and M of a block stay in the L2 cache; U is
// streamed through it once a block. x is read once (rows between blocks twice), out written once.
//
// Blocks are cut by the shape alone (those of a forward by the threads too, which no sum notices) and every
// sum has a fixed order: results do not depend on the number of threads. Scratch is U, and for each thread V
// and M of a block; for the weight gradient dU and V and W of one chunk: none of it grows with the batch.
#include "convolution.h"

#include <cstring>
#include <tuple>
#include <type_traits>
#include <utility>

#include "common.h"
#include "convolution_rows.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

#if defined(__AVX512F__)
constexpr int kTileRows = 12;  // of the register tile, by two vectors: 24 of 32 registers
#else
constexpr int kTileRows = 6;
#endif
constexpr int64_t kBlockBytes = 640 * 1024;    // of V of a block, and M of one panel
constexpr int64_t kProductBytes = 256 * 1024;  // of M of a block
constexpr int64_t kTiles = 48;                 // of a block, at least
constexpr int64_t kSumTiles = 128;             // of one sum of dU, at least
constexpr int64_t kDepth = 256;                // tiles that a product of the weight gradient sums at a time
constexpr int64_t kChunkBytes = 12 << 20;      // of V and W of a chunk of the weight gradient
constexpr int64_t kSums = 16;                  // of dU at most
constexpr int64_t kSumsBytes = 16 << 20;       // of them all
constexpr int64_t kSumBytes = 1 << 20;         // of V and W of a chunk of each
constexpr int64_t kLine = 64;
// Terms that are added one after the other: longer sums are sums of such sums, which keeps their rounding
// errors small (an error grows as the square root of the number of terms added to it). Also what stays in the
// L1 cache.
constexpr int64_t kChain = 64;
constexpr int kAhead = 16;                 // steps that the matrix product asks for its vectors ahead
constexpr int kKernelsAhead = 4;           // likewise the kernel's transform for its taps
constexpr int64_t kDepthOfKernel = 128;    // in channels of U that a sum takes at a time
constexpr int64_t kLargeKernel = 2 << 20;  // of U, from which on a thread makes a panel of it at a time ...
constexpr int64_t kKernelOverImages = 4;   // ... where it is so many times as large as V of all tiles

template <class A>
constexpr int kLanesOf = kVectorBytes / int(sizeof(A));
template <class A>
constexpr int kPanel = 2 * kLanesOf<A>;

// A stride of at least `values` values that is an odd number of cache lines: planes do not fall on one
// another.
template <class A>
inline int64_t odd_lines(int64_t values) {
  const int64_t lines = ceil_div(values * int64_t(sizeof(A)), kLine);
  return (lines | 1) * kLine / int64_t(sizeof(A));
}

// ---- small matrices -------------------------------------------------------------------------------------

template <class K>
struct Shape;
template <int n, int m>
struct Shape<const double[n][m]> {
  static constexpr int kRows = n, kColumns = m;
};

// A constant matrix of the table, or its transpose.
template <const auto& K, bool kTransposed>
struct Matrix {
  using S = Shape<std::remove_reference_t<decltype(K)>>;
  static constexpr int kOut = kTransposed ? S::kColumns : S::kRows,
                       kIn = kTransposed ? S::kRows : S::kColumns;
  static constexpr double at(int i, int j) { return kTransposed ? K[j][i] : K[i][j]; }
};

// y = M x for one row or column of vectors.
template <class A, class M, int x_stride, int y_stride>
inline __attribute__((always_inline)) void apply(const Vec<A>* x, Vec<A>* y) {
#pragma GCC unroll 16
  for (int i = 0; i < M::kOut; ++i) {
    Vec<A> sum = {};
    bool first = true;
#pragma GCC unroll 16
    for (int j = 0; j < M::kIn; ++j) {
      const double k = M::at(i, j);
      if (k == 0) continue;
      const Vec<A> term = k == 1 ? x[j * x_stride] : k == -1 ? -x[j * x_stride] : x[j * x_stride] * A(k);
      sum = first ? term : sum + term;
      first = false;
    }
    y[i * y_stride] = sum;
  }
}

// y = M x M^T.
template <class A, class M>
inline __attribute__((always_inline)) void apply_twice(const Vec<A>* x, Vec<A>* y) {
  Vec<A> t[M::kOut * M::kIn];
#pragma GCC unroll 16
  for (int j = 0; j < M::kIn; ++j) apply<A, M, M::kIn, M::kIn>(x + j, t + j);
#pragma GCC unroll 16
  for (int i = 0; i < M::kOut; ++i) apply<A, M, 1, 1>(t + i * M::kIn, y + i * M::kOut);
}

// ---- turning NCHW ---------------------------------------------------------------------------------------

template <class A, int block, class Lanes>
struct Swap;
template <class A, int block, int... l>
struct Swap<A, block, std::integer_sequence<int, l...>> {
  static constexpr int n = kLanesOf<A>;
  static inline __attribute__((always_inline)) void run(Vec<A>& x, Vec<A>& y) {
    const Vec<A> a = x, b = y;
    x = __builtin_shufflevector(a, b, ((l & block) ? n + l - block : l)...);
    y = __builtin_shufflevector(a, b, ((l & block) ? n + l : l + block)...);
  }
};

// The square of one vector a row, its rows exchanged with its columns.
template <class A, int block = kLanesOf<A> / 2>
inline __attribute__((always_inline)) void transpose(Vec<A>* x) {
  constexpr int n = kLanesOf<A>;
#pragma GCC unroll 16
  for (int i = 0; i < n; ++i)
    if (!(i & block)) Swap<A, block, std::make_integer_sequence<int, n>>::run(x[i], x[i + block]);
  if constexpr (block > 1) transpose<A, block / 2>(x);
}

// to[j * to_stride + i] = from[i * from_stride + j] for i < rows, j < columns. Rows of `to` are written in
// whole vectors, with zeros after the last one.
template <class T>
void turn_in(const T* from, int64_t from_stride, int64_t rows, int64_t columns, Acc<T>* to,
             int64_t to_stride) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  for (int64_t j = 0; j < columns; j += L) {
    const int64_t width = min(L, columns - j);
    for (int64_t i = 0; i < rows; i += L) {
      Vec<A> x[L];
      const int64_t height = min(L, rows - i);
      for (int r = 0; r < L; ++r) {
        const T* p = from + (i + r) * from_stride + j;
        x[r] = r >= height ? Vec<A>{} : width == L ? load(p) : load_partial(p, width);
      }
      transpose<A>(x);
      A* q = to + j * to_stride + i;
      if (width == L) {
        for (int r = 0; r < L; ++r) store(q + r * to_stride, x[r]);
      } else {
        for (int r = 0; r < width; ++r) store(q + r * to_stride, x[r]);
      }
    }
  }
}

// to[i * to_stride + j] = from[j * from_stride + i] for i < rows, j < columns.
template <class T>
void turn_out(const Acc<T>* from, int64_t from_stride, int64_t rows, int64_t columns, T* to,
              int64_t to_stride) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  for (int64_t i = 0; i < rows; i += L) {
    const int64_t height = min(L, rows - i);
    for (int64_t j = 0; j < columns; j += L) {
      const int64_t width = min(L, columns - j);
      Vec<A> x[L];
      for (int r = 0; r < L; ++r) x[r] = r < width ? load(from + (j + r) * from_stride + i) : Vec<A>{};
      transpose<A>(x);
      T* p = to + i * to_stride + j;
      if (width == L) {
        for (int r = 0; r < height; ++r) store(p + r * to_stride, x[r]);
      } else {
        for (int r = 0; r < height; ++r) store_partial(p + r * to_stride, x[r], width);
      }
    }
  }
}

// ---- the matrix product ---------------------------------------------------------------------------------

// c[r][0 .. vectors) (+)= sum over d of a[r * row + d * step] * b[d * kPanel + ...].
template <class A, int rows, int vectors>
void tile_product(int64_t depth, const A* a, int64_t row, int64_t step, const A* b, A* c, int64_t c_row,
                  bool add) {
  constexpr int L = kLanesOf<A>;
  Vec<A> sum[rows][vectors];
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) sum[r][v] = Vec<A>{};
  for (int64_t d = 0; d < depth; ++d) {
    Vec<A> y[vectors];
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) {
      y[v] = load(b + v * L);
      __builtin_prefetch(b + v * L + kAhead * kPanel<A>);
    }
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[r][v] += broadcast<A>(a[r * row]) * y[v];
    a += step;
    b += kPanel<A>;
  }
  if (add) {
#pragma GCC unroll 16
    for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
      for (int v = 0; v < vectors; ++v) sum[r][v] += load(c + r * c_row + v * L);
  }
#pragma GCC unroll 16
  for (int r = 0; r < rows; ++r)
#pragma GCC unroll 2
    for (int v = 0; v < vectors; ++v) store(c + r * c_row + v * L, sum[r][v]);
}

template <class A>
using TileProduct = void (*)(int64_t, const A*, int64_t, int64_t, const A*, A*, int64_t, bool);

template <class A>
inline TileProduct<A> tile_product_of(int64_t rows, bool two) {
  static constexpr TileProduct<A> one_vector[] = {
      tile_product<A, 1, 1>,  tile_product<A, 2, 1>,  tile_product<A, 3, 1>,
      tile_product<A, 4, 1>,  tile_product<A, 5, 1>,  tile_product<A, 6, 1>,
#if defined(__AVX512F__)
      tile_product<A, 7, 1>,  tile_product<A, 8, 1>,  tile_product<A, 9, 1>,
      tile_product<A, 10, 1>, tile_product<A, 11, 1>, tile_product<A, 12, 1>,
#endif
  };
  static constexpr TileProduct<A> two_vectors[] = {
      tile_product<A, 1, 2>,  tile_product<A, 2, 2>,  tile_product<A, 3, 2>,
      tile_product<A, 4, 2>,  tile_product<A, 5, 2>,  tile_product<A, 6, 2>,
#if defined(__AVX512F__)
      tile_product<A, 7, 2>,  tile_product<A, 8, 2>,  tile_product<A, 9, 2>,
      tile_product<A, 10, 2>, tile_product<A, 11, 2>, tile_product<A, 12, 2>,
#endif
  };
  return (two ? two_vectors : one_vector)[rows - 1];
}

// c[rows][kPanel] (+)= a [rows][depth] b [depth][kPanel], where a's element (r, d) is at a[r * row + d *
// step] and only `columns` columns are wanted.
template <class A>
void panel_product(int64_t rows, int64_t depth, int64_t columns, const A* a, int64_t row, int64_t step,
                   const A* b, A* c, int64_t c_row, bool add) {
  const bool two = columns > kLanesOf<A>;
  const int64_t parts = ceil_div(rows, kTileRows);
  for (int64_t d = 0; d < depth; d += kChain) {
    for (int64_t p = 0; p < parts; ++p) {
      const int64_t begin = rows * p / parts, end = rows * (p + 1) / parts;
      tile_product_of<A>(end - begin, two)(min(kChain, depth - d), a + begin * row + d * step, row, step,
                                           b + d * kPanel<A>, c + begin * c_row, c_row, add || d > 0);
    }
  }
}

// ---- the problem ----------------------------------------------------------------------------------------

template <class R, class A>
struct Plan {
  int64_t tiles_y, tiles_x, rows;  // of tiles, of one image; rows of tiles of all images
  int64_t before;                  // inputs above and left of the image that the first tile reads
  int64_t panels;                  // of output channels
  int64_t depth;                   // stride of V from tile to tile

  explicit Plan(const Convolution& t)
      : tiles_y(ceil_div(t.out.height, R::kOut)),
        tiles_x(ceil_div(t.out.width, R::kOut)),
        rows(t.images * tiles_y),
        before(R::kBefore < 0 ? t.padding : R::kBefore),
        panels(ceil_div(t.out.channels, kPanel<A>)),
        depth(odd_lines<A>(t.in.channels)) {}
  int64_t panel_values(const Convolution& t) const { return t.in.channels * kPanel<A>; }
  // From a product's part of U to the next one's: not a power of two, where the stores of a kernel's products
  // would meet in few lines of the cache.
  int64_t product_values(const Convolution& t) const { return odd_lines<A>(panels * panel_values(t)); }
};

// A rectangle of pixels of one image whose channels lie side by side.
template <class S>
struct Pixels {
  const S* data;  // of pixel 0, channel 0 of the image, whether that one exists or not
  int64_t width, height, channel_stride;
  const S* zeros;
  int border;           // as ConvolutionImages has it
  int64_t top, bottom;  // of the rows that are there
  const S* at(int64_t y, int64_t x) const {
    const bool inside = y >= 0 && y < height && x >= 0 && x < width;
    if (!inside && border == 0) return zeros;
    if (!inside) {
      // What lies further out than one pixel meets results that do not exist: any pixel does.
      y = min(max(folded(y, height), top), bottom - 1);
      x = min(max(folded(x, width), 0), width - 1);
    }
    return data + (y * width + x) * channel_stride;
  }
  int64_t folded(int64_t i, int64_t n) const {
    if (border != 1) return i;
    return i < 0 ? -i : i < n ? i : 2 * n - 2 - i;
  }
};

// The transforms of a row of tiles: to[k * plane + tile * tile_stride + place of channel].
// kPanelled: 2 vectors of channels side by side, then the next tile, then the next 2 vectors.
template <class A>
struct Target {
  A* data;
  int64_t plane, tile_stride, panel_stride;
};

template <class S, class A, class M, bool kPanelled>
void transform_row(const Pixels<S>& image, int64_t top, int64_t left, int64_t step, int64_t tiles,
                   int64_t channels, const Target<A>& to) {
  constexpr int L = kLanesOf<A>, n = M::kIn, k = M::kOut;
  const int64_t vectors = ceil_div(channels, L);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const S* from[n * n];
    S tail[n * n][L];
    for (int y = 0; y < n; ++y)
      for (int x = 0; x < n; ++x) from[y * n + x] = image.at(top + y, left + tile * step + x);
    A* out = to.data + tile * to.tile_stride;
    for (int64_t v = 0; v < vectors; ++v) {
      int64_t offset = v * L;
      if (offset + L > channels) {  // the last vector: its channels, then zeros
        std::memset(tail, 0, sizeof tail);
        for (int i = 0; i < n * n; ++i) {
          std::memcpy(tail[i], from[i] + offset, size_t(channels - offset) * sizeof(S));
          from[i] = tail[i];
        }
        offset = 0;
      }
      Vec<A> x[n * n], y[k * k];
#pragma GCC unroll 128
      for (int i = 0; i < n * n; ++i) x[i] = load(from[i] + offset);
      apply_twice<A, M>(x, y);
      A* q = kPanelled ? out + (v / 2) * to.panel_stride + (v % 2) * L : out + v * L;
#pragma GCC unroll 128
      for (int i = 0; i < k * k; ++i) store(q + i * to.plane, y[i]);
    }
  }
}

// What a thread needs to read images: a row of zeros, and room for the pixels of a contiguous image's part.
template <class A>
struct Reader {
  A* zeros;   // channels, at least
  A* turned;  // see turned_values
};

template <class A>
inline int64_t padded_channels(int64_t channels) {
  return round_up(channels, kLanesOf<A>);
}

// Values that a block of `rows` rows of tiles of a contiguous image takes, where a tile has `size` rows of
// pixels and the next one is `step` further.
template <class A>
inline int64_t turned_values(const ConvolutionImages& images, int64_t rows, int64_t step, int64_t size) {
  if (images.channels_last) return 0;
  return min(images.height, (rows - 1) * step + size) * images.width * padded_channels<A>(images.channels);
}

// The transform M of rows [begin, end) of tiles, which may belong to several images.
template <class T, class M, bool kPanelled>
void transform_rows(const ConvolutionImages& images, int64_t begin, int64_t end, int64_t tiles_y,
                    int64_t tiles_x, int64_t before, int64_t step, const Reader<Acc<T>>& reader,
                    Target<Acc<T>> to) {
  using A = Acc<T>;
  const int64_t image_values = images.channels * images.height * images.width;
  for (int64_t row = begin; row < end;) {
    const int64_t image = row / tiles_y, first = row % tiles_y;
    const int64_t last = min(tiles_y, first + end - row);  // of this image
    const T* data = static_cast<const T*>(images.data) + image * image_values;
    Pixels<A> turned{};
    if (!images.channels_last) {
      const int64_t top = max(0, first * step - before);
      const int64_t bottom = min(images.height, (last - 1) * step - before + M::kIn);
      const int64_t stride = padded_channels<A>(images.channels);
      if (bottom > top)
        turn_in(data + top * images.width, images.height * images.width, images.channels,
                (bottom - top) * images.width, reader.turned, stride);
      turned = {reader.turned - top * images.width * stride,
                images.width,
                images.height,
                stride,
                reader.zeros,
                images.border,
                top,
                bottom};
    }
    const Pixels<T> direct{data,
                           images.width,
                           images.height,
                           images.channels,
                           reinterpret_cast<const T*>(reader.zeros),
                           images.border,
                           0,
                           images.height};
    for (int64_t tile_y = first; tile_y < last; ++tile_y, ++row) {
      const int64_t top = tile_y * step - before;
      if (images.channels_last)
        transform_row<T, A, M, kPanelled>(direct, top, -before, step, tiles_x, images.channels, to);
      else
        transform_row<A, A, M, kPanelled>(turned, top, -before, step, tiles_x,
                                          padded_channels<A>(images.channels), to);
      to.data += tiles_x * to.tile_stride;
    }
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------

// Whether the taps of a kernel lie side by side, as in torch's weights.
template <int taps>
bool taps_together(const Convolution& t) {
  return t.stride_x == 1 && t.stride_y == taps;
}

// Where tap k of the kernel as the row wants it lies.
template <int taps>
inline int64_t tap_offset(const Convolution& t, int k) {
  if (t.flip) k = taps * taps - 1 - k;
  return k / taps * t.stride_y + k % taps * t.stride_x;
}

// The taps of L output channels from `channel` on and one input channel, as vectors, and back. A kernel's taps
// that lie side by side are read as they lie, and turned in registers; output channels that do are not turned.
template <class T, int taps>
void load_taps(const Convolution& t, int64_t channel, int64_t in, Vec<Acc<T>>* w) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>, n = taps * taps;
  const T* from = static_cast<const T*>(t.weight) + channel * t.stride_out + in * t.stride_in;
  const int lanes = int(min(L, t.out.channels - channel));
  Vec<A> x[(n + L - 1) / L * L];
  if (taps_together<taps>(t)) {
    for (int block = 0; block < n; block += L) {
      const int width = min(L, n - block);
      for (int l = 0; l < L; ++l) {
        const T* p = from + l * t.stride_out + block;
        x[block + l] = l >= lanes ? Vec<A>{} : width == L ? load(p) : load_partial(p, width);
      }
      transpose<A>(x + block);
    }
    for (int k = 0; k < n; ++k) w[k] = x[t.flip ? n - 1 - k : k] * A(t.scale);
  } else if (t.stride_out == 1) {
    for (int k = 0; k < n; ++k) w[k] = load_partial(from + tap_offset<taps>(t, k), lanes) * A(t.scale);
  } else {
    for (int k = 0; k < n; ++k) {
      A buffer[L] = {};
      for (int l = 0; l < lanes; ++l) buffer[l] = widen(from[l * t.stride_out + tap_offset<taps>(t, k)]);
      w[k] = load(buffer) * A(t.scale);
    }
  }
}
template <class T, int taps>
void store_taps(const Convolution& t, int64_t channel, int64_t in, const Vec<Acc<T>>* w) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>, n = taps * taps;
  T* to = static_cast<T*>(t.weight) + channel * t.stride_out + in * t.stride_in;
  const int lanes = int(min(L, t.out.channels - channel));
  Vec<A> x[(n + L - 1) / L * L] = {};
  if (taps_together<taps>(t)) {
    for (int k = 0; k < n; ++k) x[t.flip ? n - 1 - k : k] = w[k] * A(t.scale);
    for (int block = 0; block < n; block += L) {
      const int width = min(L, n - block);
      transpose<A>(x + block);
      for (int l = 0; l < lanes; ++l) {
        T* p = to + l * t.stride_out + block;
        width == L ? store(p, x[block + l]) : store_partial(p, x[block + l], width);
      }
    }
  } else if (t.stride_out == 1) {
    for (int k = 0; k < n; ++k) store_partial(to + tap_offset<taps>(t, k), w[k] * A(t.scale), lanes);
  } else {
    for (int k = 0; k < n; ++k) {
      A buffer[L];
      store(buffer, w[k] * A(t.scale));
      for (int l = 0; l < lanes; ++l) to[l * t.stride_out + tap_offset<taps>(t, k)] = narrow<T>(buffer[l]);
    }
  }
}

// U of some panels of output channels and of `depth` input channels, whose products' parts lie `plane` apart.
template <class T, class R>
void transform_kernel(const Convolution& t, int64_t first_panel, int64_t panels, int64_t first_in,
                      int64_t depth, int64_t plane, Acc<T>* u, const Parallel& parallel) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>, k = R::kProducts;
  parallel_for(parallel, panels * depth, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      const int64_t panel = first_panel + i / depth, in = first_in + i % depth;
      for (int half = 0; half < 2; ++half) {
        const int64_t channel = panel * kPanel<A> + half * L;
        if (channel >= t.out.channels) continue;
        Vec<A> w[R::kTaps * R::kTaps], y[k * k];
        if (in + kKernelsAhead < t.in.channels) {
          const T* ahead =
              static_cast<const T*>(t.weight) + channel * t.stride_out + (in + kKernelsAhead) * t.stride_in;
          for (int64_t l = 0; l < min(L, t.out.channels - channel); ++l)
            __builtin_prefetch(ahead + l * t.stride_out);
        }
        load_taps<T, R::kTaps>(t, channel, in, w);
        apply_twice<A, Matrix<R::kG, false>>(w, y);
        A* to = u + i * kPanel<A> + half * L;
        for (int j = 0; j < k * k; ++j) store(to + j * plane, y[j]);
      }
    }
  });
}

// The gradient of the kernels of one panel and one input channel from their dU, of which there are `sums`.
template <class T, class R>
void kernel_gradient(const Convolution& t, int64_t panel, int64_t in, const Acc<T>* du, int64_t plane,
                     int64_t sums) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>, k = R::kProducts;
  for (int half = 0; half < 2; ++half) {
    const int64_t channel = panel * kPanel<A> + half * L;
    if (channel >= t.out.channels) continue;
    Vec<A> w[R::kTaps * R::kTaps], y[k * k];
    const A* from = du + half * L;
    for (int j = 0; j < k * k; ++j) y[j] = load(from + j * plane);
    for (int64_t sum = 1; sum < sums; ++sum)
      for (int j = 0; j < k * k; ++j) y[j] += load(from + (sum * k * k + j) * plane);
    apply_twice<A, Matrix<R::kG, true>>(y, w);
    store_taps<T, R::kTaps>(t, channel, in, w);
  }
}

}  // namespace
}  // namespace GANKERN_ISA
}  // namespace gankern

#include "convolution_direct.h"
#include "convolution_phases.h"
#include "convolution_pointwise.h"
#include "convolution_streamed.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

// ---- forward --------------------------------------------------------------------------------------------

// The results of one row of tiles for `channels` output channels from `first` on, from M. Each pixel's
// channels go to out + (y * width + x) * stride.
template <class S, class A, class R>
void untransform_row(const Convolution& t, const A* m, int64_t plane, int64_t m_stride, int64_t tiles,
                     int64_t first, int64_t channels, const A* bias, S* out, int64_t stride, int64_t tile_y) {
  constexpr int L = kLanesOf<A>, n = R::kM, k = R::kOut;
  const A slope = A(t.slope);
  const int64_t height = min(k, t.out.height - tile_y * k);
  for (int64_t tile = 0; tile < tiles; ++tile) {
    const int64_t width = min(k, t.out.width - tile * k);
    S* to = out + (tile_y * k * t.out.width + tile * k) * stride;
    for (int64_t c = 0; c < channels; c += L) {
      Vec<A> x[n * n], y[k * k];
      const A* from = m + tile * m_stride + c;
#pragma GCC unroll 128
      for (int i = 0; i < n * n; ++i) x[i] = load(from + i * plane);
      apply_twice<A, Matrix<R::kA, false>>(x, y);
      const Vec<A> b = load(bias + first + c);
#pragma GCC unroll 128
      for (int i = 0; i < k * k; ++i) y[i] += b;
      if (slope != 1) {
#pragma GCC unroll 128
        for (int i = 0; i < k * k; ++i) y[i] = y[i] < Vec<A>{} ? y[i] * slope : y[i];
      }
      const int64_t wanted = min(L, channels - c);
      if (height == k && width == k && wanted == L) {
#pragma GCC unroll 16
        for (int i = 0; i < k; ++i)
#pragma GCC unroll 16
          for (int j = 0; j < k; ++j) store(to + (i * t.out.width + j) * stride + c, y[i * k + j]);
      } else {
        Vec<A> edge[k * k];  // y stays in registers
#pragma GCC unroll 128
        for (int i = 0; i < k * k; ++i) edge[i] = y[i];
        for (int i = 0; i < height; ++i)
          for (int j = 0; j < width; ++j)
            store_partial(to + (i * t.out.width + j) * stride + c, edge[i * k + j], wanted);
      }
    }
  }
}

// How many rows of tiles make a block of about `bytes`, for work that is to be cut into even parts. At least
// kTiles tiles: with fewer, U would come from memory too often.
inline int64_t rows_of_block(int64_t rows, int64_t tiles_x, int64_t tile_bytes, int64_t bytes) {
  const int64_t tiles = max(kTiles, bytes / tile_bytes);
  int64_t blocks = ceil_div(rows, max(1, tiles / tiles_x));
  if (blocks > 2 && blocks < 32) blocks = (blocks + 2) / 4 * 4;
  return max(1, ceil_div(rows, blocks));
}

// What a part of a forward works with: V and M of `tiles` tiles, a room for turning.
template <class A>
struct Room {
  A *v, *m, *turned;
  int64_t v_plane, m_plane, m_stride;
};

// M of some rows of tiles and `panels` panels from V and U, whose rows begin with panel `first` of them all.
// A sum takes kDepthOfKernel input channels of all products at a time, whoever makes U: one order.
template <class R, class A, class Kernels>
void multiply_tiles(const Convolution& t, const Plan<R, A>& plan, int64_t count, int64_t first,
                    int64_t panels, const Room<A>& room, const Kernels& kernels) {
  const int64_t channels = t.out.channels - first * kPanel<A>;
  bool started[R::kM * R::kM] = {};
  for (int64_t in = 0; in < t.in.channels; in += kDepthOfKernel) {
    const int64_t depth = min(kDepthOfKernel, t.in.channels - in);
    const auto [u, u_plane, u_panel] = kernels(in, depth);
    for (int i = 0; i < R::kProducts; ++i)
      for (int j = 0; j < R::kProducts; ++j) {
        const A* a = room.v + (R::kVOf[i] * R::kV + R::kVOf[j]) * room.v_plane + in;
        const int to = R::kMOf[i] * R::kM + R::kMOf[j];
        const A* b = u + (i * R::kProducts + j) * u_plane;
        for (int64_t p = 0; p < panels; ++p)
          panel_product<A>(count, depth, min(kPanel<A>, channels - p * kPanel<A>), a, plan.depth, 1,
                           b + p * u_panel, room.m + to * room.m_plane + p * kPanel<A>, room.m_stride,
                           started[to]);
        started[to] = true;
      }
  }
}

// out = A M A^T of rows [begin, end) of tiles and some panels of output channels, plus bias, leaky ReLU.
template <class T, class R>
void untransform_rows(const Convolution& t, const Plan<R, Acc<T>>& plan, int64_t begin, int64_t end,
                      int64_t first_panel, int64_t panels, const Acc<T>* bias, const Room<Acc<T>>& room) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  const int64_t first = first_panel * kPanel<A>, channels = min(panels * kPanel<A>, t.out.channels - first);
  const int64_t out_image = t.out.channels * t.out.height * t.out.width;
  for (int64_t row = begin; row < end;) {
    const int64_t image = row / plan.tiles_y, top = row % plan.tiles_y;
    const int64_t bottom = min(plan.tiles_y, top + end - row);
    T* out = static_cast<T*>(t.out.data) + image * out_image;
    const int64_t pixel = top * R::kOut * t.out.width;  // the first of this part
    const int64_t stride = panels * kPanel<A>;
    for (int64_t tile_y = top; tile_y < bottom; ++tile_y, ++row) {
      const A* from = room.m + (row - begin) * plan.tiles_x * room.m_stride;
      if (t.out.channels_last)
        untransform_row<T, A, R>(t, from, room.m_plane, room.m_stride, plan.tiles_x, first, channels, bias,
                                 out + first, t.out.channels, tile_y);
      else
        untransform_row<A, A, R>(t, from, room.m_plane, room.m_stride, plan.tiles_x, first,
                                 round_up(channels, L), bias, room.turned - pixel * stride, stride, tile_y);
    }
    if (!t.out.channels_last) {
      const int64_t end_pixel = min(t.out.height, bottom * R::kOut) * t.out.width;
      turn_out(room.turned, stride, channels, end_pixel - pixel,
               out + first * t.out.height * t.out.width + pixel, t.out.height * t.out.width);
    }
  }
}

// Many channels and few tiles: U is larger than all images. V of all tiles is made once, and a thread takes one
// panel of output channels after the other, whose U it makes itself, a part that stays in its cache at a time.
template <class T, class R>
void forward_by_panels(const Convolution& t, const Plan<R, Acc<T>>& plan, const Acc<T>* bias,
                       const Parallel& parallel) {
  using A = Acc<T>;
  using B = Matrix<R::kB, false>;
  constexpr int64_t products = R::kProducts * R::kProducts;
  const int64_t tiles = plan.rows * plan.tiles_x, v_plane = odd_lines<A>(tiles * plan.depth);
  const int64_t m_stride = kPanel<A>, m_plane = odd_lines<A>(tiles * m_stride);
  const int64_t u_plane = odd_lines<A>(min(kDepthOfKernel, t.in.channels) * kPanel<A>);
  Scratch<A> v(R::kV * R::kV * v_plane);
  parallel_for(parallel, plan.rows, 1, [&](int64_t begin, int64_t end) {
    Scratch<A> zeros(padded_channels<A>(t.in.channels));
    Scratch<A> turned(turned_values<A>(t.in, end - begin, R::kStep, R::kIn));
    std::memset(zeros.at, 0, size_t(padded_channels<A>(t.in.channels)) * sizeof(A));
    transform_rows<T, B, false>(t.in, begin, end, plan.tiles_y, plan.tiles_x, plan.before, R::kStep,
                                Reader<A>{zeros.at, turned.at},
                                {v.at + begin * plan.tiles_x * plan.depth, v_plane, plan.depth, 0});
  });
  parallel_for(parallel, plan.panels, 1, [&](int64_t panel, int64_t end) {
    Scratch<A> m(R::kM * R::kM * m_plane), u(products * u_plane);
    Scratch<A> turned(t.out.channels_last ? 0 : plan.tiles_y * R::kOut * t.out.width * kPanel<A>);
    const Room<A> room{v.at, m.at, turned.at, v_plane, m_plane, m_stride};
    for (; panel < end; ++panel) {
      multiply_tiles<R, A>(t, plan, tiles, panel, 1, room, [&](int64_t in, int64_t depth) {
        transform_kernel<T, R>(t, panel, 1, in, depth, u_plane, u.at, Parallel{1, nullptr});
        return std::tuple<const A*, int64_t, int64_t>(u.at, u_plane, 0);
      });
      untransform_rows<T, R>(t, plan, 0, plan.rows, panel, 1, bias, room);
    }
  });
}

template <class T, class R>
void forward(const Convolution& t, const Parallel& parallel) {
  using A = Acc<T>;
  using B = Matrix<R::kB, false>;
  const Plan<R, A> plan(t);
  if (plan.rows * plan.tiles_x * t.out.channels == 0) return;
  Scratch<A> bias(plan.panels * kPanel<A>);
  for (int64_t c = 0; c < plan.panels * kPanel<A>; ++c)
    bias.at[c] = t.bias && c < t.out.channels ? widen(static_cast<const T*>(t.bias)[c]) : A(0);

  constexpr int64_t products = R::kProducts * R::kProducts, bytes = int64_t(sizeof(A));
  const int64_t threads = max(1, parallel.threads);
  const int64_t m_tile = R::kM * R::kM * kPanel<A>, v_tile = R::kV * R::kV * plan.depth;
  const bool even = plan.panels % threads == 0 || plan.panels >= 4 * threads;
  const int64_t u_bytes = products * plan.product_values(t) * bytes;
  if (even && u_bytes >= max(kLargeKernel, kKernelOverImages * v_tile * plan.rows * plan.tiles_x * bytes))
    return forward_by_panels<T, R>(t, plan, bias.at, parallel);

  int64_t rows = rows_of_block(plan.rows, plan.tiles_x, (v_tile + m_tile) * bytes, kBlockBytes);
  // Few blocks: parts of the output channels make the rest of the work for several threads, each with a V of
  // its own; and where these are few too, smaller blocks. No sum depends on either.
  const int64_t parts = min(plan.panels, ceil_div(threads, ceil_div(plan.rows, rows)));
  rows = min(rows, max(1, ceil_div(plan.rows, ceil_div(threads, parts))));
  const int64_t tiles = rows * plan.tiles_x;
  const int64_t v_plane = odd_lines<A>(tiles * plan.depth);
  const int64_t blocks = ceil_div(plan.rows, rows);
  const int64_t m_bytes = m_tile * bytes * tiles;
  int64_t group = min(ceil_div(plan.panels, parts), max(1, kProductBytes / m_bytes));  // panels at a time
  // A thread that reads U once makes what it reads itself: through its own cache, and for no other thread to wait.
  const bool own = blocks <= threads;
  if (own) group = min(group, max(1, kBlockBytes / (products * plan.panel_values(t) * bytes)));
  const int64_t u_plane = own ? odd_lines<A>(group * plan.panel_values(t)) : plan.product_values(t);
  Scratch<A> u(own ? 0 : products * u_plane);
  if (!own) transform_kernel<T, R>(t, 0, plan.panels, 0, t.in.channels, u_plane, u.at, parallel);
  const int64_t m_stride = odd_lines<A>(group * kPanel<A>), m_plane = odd_lines<A>(tiles * m_stride);
  const int64_t turned = turned_values<A>(t.in, rows, R::kStep, R::kIn);
  const int64_t turned_out = t.out.channels_last ? 0 : rows * R::kOut * t.out.width * group * kPanel<A>;

  parallel_for(parallel, blocks * parts, 1, [&](int64_t begin_task, int64_t end_task) {
    Scratch<A> v(R::kV * R::kV * v_plane), m(R::kM * R::kM * m_plane), own_u(own ? products * u_plane : 0);
    Scratch<A> zeros(padded_channels<A>(t.in.channels)), in_room(turned), out_room(turned_out);
    std::memset(zeros.at, 0, size_t(padded_channels<A>(t.in.channels)) * sizeof(A));
    const Reader<A> reader{zeros.at, in_room.at};
    const Room<A> room{v.at, m.at, out_room.at, v_plane, m_plane, m_stride};
    for (int64_t task = begin_task; task < end_task; ++task) {
      const int64_t begin = task / parts * rows, end = min(plan.rows, begin + rows), part = task % parts;
      const int64_t first_panel = plan.panels * part / parts, last_panel = plan.panels * (part + 1) / parts;
      transform_rows<T, B, false>(t.in, begin, end, plan.tiles_y, plan.tiles_x, plan.before, R::kStep, reader,
                                  {v.at, v_plane, plan.depth, 0});
      for (int64_t panel = first_panel; panel < last_panel; panel += group) {
        const int64_t panels = min(group, last_panel - panel);
        const A* kernels = own ? own_u.at : u.at + panel * plan.panel_values(t);
        if (own)
          transform_kernel<T, R>(t, panel, panels, 0, t.in.channels, u_plane, own_u.at, Parallel{1, nullptr});
        multiply_tiles<R, A>(t, plan, (end - begin) * plan.tiles_x, panel, panels, room,
                             [&](int64_t in, int64_t) {
                               return std::tuple<const A*, int64_t, int64_t>(kernels + in * kPanel<A>,
                                                                             u_plane, plan.panel_values(t));
                             });
        untransform_rows<T, R>(t, plan, begin, end, panel, panels, bias.at, room);
      }
    }
  });
}

// ---- gradient of the weight -----------------------------------------------------------------------------

// Rows of tiles of a chunk, of `rows` that are summed.
template <class T, class R>
int64_t rows_of_chunk(const Convolution& t, const Plan<R, Acc<T>>& plan, int64_t rows, int64_t chunk_bytes) {
  using A = Acc<T>;
  const int64_t in_panels = ceil_div(t.in.channels, kPanel<A>);
  const int64_t tile_bytes =
      (R::kV * R::kV * in_panels + R::kM * R::kM * plan.panels) * kPanel<A> * int64_t(sizeof(A));
  return rows_of_block(rows, plan.tiles_x, tile_bytes, chunk_bytes);
}

// du = the sum over rows [first, last) of tiles; or, without a du, the gradient of the weight at once: of one
// square of channels after the other, whose dU stays in this thread's cache. That wants one chunk.
template <class T, class R>
void accumulate_products(const Convolution& t, const Plan<R, Acc<T>>& plan, int64_t first, int64_t last,
                         int64_t chunk_bytes, Acc<T>* du, const Parallel& parallel) {
  using A = Acc<T>;
  using B = Matrix<R::kB, false>;
  using At = Matrix<R::kA, true>;
  constexpr int64_t products = R::kProducts * R::kProducts;
  const int64_t in_panels = ceil_div(t.in.channels, kPanel<A>);
  const int64_t rows = rows_of_chunk<T, R>(t, plan, last - first, chunk_bytes);
  const int64_t tiles = rows * plan.tiles_x;
  const int64_t panel = odd_lines<A>(tiles * kPanel<A>);
  const int64_t v_plane = in_panels * panel, w_plane = plan.panels * panel;
  Scratch<A> v(R::kV * R::kV * v_plane), w(R::kM * R::kM * w_plane);
  // A task of the transforms: some rows of tiles. One of the products: one product, one panel of output
  // channels and some panels of the input channels.
  const int64_t step = ceil_div(rows, 16), parts = min(in_panels, ceil_div(32, products * plan.panels));
  const int64_t zero_values = padded_channels<A>(max(t.in.channels, t.out.channels));
  const int64_t room =
      max(turned_values<A>(t.in, step, R::kStep, R::kIn), turned_values<A>(t.out, step, R::kOut, R::kOut));
  for (int64_t begin = first; begin < last; begin += rows) {
    const int64_t end = min(last, begin + rows), count = (end - begin) * plan.tiles_x;
    parallel_for(parallel, ceil_div(end - begin, step), 1, [&](int64_t task, int64_t end_task) {
      Scratch<A> zeros(zero_values), turned(room);
      std::memset(zeros.at, 0, size_t(zero_values) * sizeof(A));
      const Reader<A> reader{zeros.at, turned.at};
      for (; task < end_task; ++task) {
        const int64_t from = begin + task * step, to = min(end, from + step),
                      tile = task * step * plan.tiles_x;
        transform_rows<T, B, true>(t.in, from, to, plan.tiles_y, plan.tiles_x, plan.before, R::kStep, reader,
                                   {v.at + tile * kPanel<A>, v_plane, kPanel<A>, panel});
        transform_rows<T, At, true>(t.out, from, to, plan.tiles_y, plan.tiles_x, 0, R::kOut, reader,
                                    {w.at + tile * kPanel<A>, w_plane, kPanel<A>, panel});
      }
    });
    // c (+)= one product's sum for a panel of output channels and one of input channels.
    const auto multiply = [&](int64_t product, int64_t out, int64_t in, A* c, bool add) {
      const int i = int(product / R::kProducts), j = int(product % R::kProducts);
      const A* a = v.at + (R::kVOf[i] * R::kV + R::kVOf[j]) * v_plane + in * panel;
      const A* b = w.at + (R::kMOf[i] * R::kM + R::kMOf[j]) * w_plane + out * panel;
      for (int64_t tile = 0; tile < count; tile += kDepth)
        panel_product<A>(min(kPanel<A>, t.in.channels - in * kPanel<A>), min(kDepth, count - tile),
                         t.out.channels - out * kPanel<A>, a + tile * kPanel<A>, 1, kPanel<A>,
                         b + tile * kPanel<A>, c, kPanel<A>, add || tile > 0);
    };
    if (!du) {
      const int64_t plane = odd_lines<A>(kPanel<A> * kPanel<A>);
      parallel_for(parallel, plan.panels * in_panels, 1, [&](int64_t task, int64_t end_task) {
        Scratch<A> square(products * plane);
        for (; task < end_task; ++task) {
          const int64_t out = task / in_panels, in = task % in_panels;
          for (int64_t product = 0; product < products; ++product)
            multiply(product, out, in, square.at + product * plane, false);
          for (int64_t i = 0; i < min(kPanel<A>, t.in.channels - in * kPanel<A>); ++i)
            kernel_gradient<T, R>(t, out, in * kPanel<A> + i, square.at + i * kPanel<A>, plane, 1);
        }
      });
      continue;
    }
    parallel_for(parallel, products * plan.panels * parts, 1, [&](int64_t task, int64_t end_task) {
      for (; task < end_task; ++task) {
        const int64_t product = task / (plan.panels * parts), out = task / parts % plan.panels;
        A* c = du + product * plan.product_values(t) + out * plan.panel_values(t);
        for (int64_t in = in_panels * (task % parts) / parts; in < in_panels * (task % parts + 1) / parts;
             ++in)
          multiply(product, out, in, c + in * kPanel<A> * kPanel<A>, begin > first);
      }
    });
  }
}

template <class T, class R>
void weight_gradient(const Convolution& t, const Parallel& parallel) {
  using A = Acc<T>;
  const Plan<R, A> plan(t);
  if (plan.panels * t.in.channels == 0) return;
  const int64_t values = R::kProducts * R::kProducts * plan.product_values(t);
  // Where dU is small, some sums of it at a time, each of them by one thread and through its own cache; where
  // it is large, one, by all threads.
  const int64_t sums = max(1, min(min(kSums, kSumsBytes / (values * int64_t(sizeof(A)))),
                                  min(plan.rows, plan.rows * plan.tiles_x / kSumTiles)));
  const bool one_chunk = sums == 1 && plan.rows * plan.tiles_x > 0 &&
                         rows_of_chunk<T, R>(t, plan, plan.rows, kChunkBytes) >= plan.rows;
  const int64_t squares = plan.panels * ceil_div(t.in.channels, kPanel<A>);
  if (one_chunk && (squares >= 2 * parallel.threads || squares % max(1, parallel.threads) == 0))
    return accumulate_products<T, R>(t, plan, 0, plan.rows, kChunkBytes, nullptr, parallel);
  Scratch<A> du(values * sums);
  if (plan.rows * plan.tiles_x == 0) {
    std::memset(du.at, 0, size_t(values) * sizeof(A));
  } else if (sums == 1) {
    accumulate_products<T, R>(t, plan, 0, plan.rows, kChunkBytes, du.at, parallel);
  } else {
    parallel_for(parallel, sums, 1, [&](int64_t begin, int64_t end) {
      for (int64_t i = begin; i < end; ++i)
        accumulate_products<T, R>(t, plan, plan.rows * i / sums, plan.rows * (i + 1) / sums, kSumBytes,
                                  du.at + i * values, Parallel{1, nullptr});
    });
  }
  parallel_for(parallel, plan.panels * t.in.channels, 64, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i)
      kernel_gradient<T, R>(t, i / t.in.channels, i % t.in.channels, du.at + i * kPanel<A>,
                            plan.product_values(t), sums);
  });
}

}  // namespace

#define GANKERN_ROWS(function, T)     \
  {function<T, Up9>,                  \
   function<T, Down9>,                \
   function<T, Same2>,                \
   function<T, Same4>,                \
   function<T, Strided2>,             \
   function<T, Strided4>,             \
   function<T, Transposed2>,          \
   function<T, Transposed4>,          \
   function<T, StridedOfThree>,       \
   function<T, TransposedOfThree>,    \
   function<T, SameOfFour2>,          \
   function<T, SameOfFour3>,          \
   direct_##function##_of_any<T>,     \
   strided_##function##_of_any<T>,    \
   transposed_##function##_of_any<T>, \
   strided_streamed_##function<T>,    \
   transposed_streamed_##function<T>, \
   pointwise_##function<T>,           \
   function<T, SameOfFour4>}
#define GANKERN_TABLE(function)                                                                     \
  {GANKERN_ROWS(function, double), GANKERN_ROWS(function, float), GANKERN_ROWS(function, BFloat16), \
   GANKERN_ROWS(function, Half)}

extern const ConvolutionKernels convolution;
const ConvolutionKernels convolution = {GANKERN_TABLE(forward), GANKERN_TABLE(weight_gradient)};

}  // namespace GANKERN_ISA
}  // namespace gankern
