// Virtual batch norm (Salimans 2016, arXiv 1606.03498, section 3.6) with a leaky ReLU behind it.
//
// For one example and channel with S pixels, c = own_share, own mean a and variance v, reference mean m and
// mean of squares s_r, whose variance s_r - m^2 is taken as 0 where rounding makes it negative (then t = 0,
// else t = 1):
//   mu = c a + (1 - c) m
//   V = c v + (1 - c) (s_r - m^2) + c (1 - c) (a - m)^2
//   r = 1 / sqrt(V + eps)
//   z = (x - mu) r
//   y = w z + b
//   out = y > 0 ? y : slope y
// V is s - mu^2 of the definition, without its cancellation but for s_r - m^2, which is in double.
//
// First order, with g' = g * (slope of the activation at y), P = sum g', U = sum g' z:
//   dx = w r (g' - c/S (P + z U))
//   dw = sum_n U
//   db = sum_n P
//   dmu = -w r P
//   dV = -w r^2 U / 2
//   ds_r = sum_n (1 - c) t dV
//   dm = sum_n (1 - c) (dmu - 2 (mu - (1 - t) m) dV)
// Second order, for gradients h of dx and hw, hb, hm, hs of the others; km = (1 - c) hm,
// kV = (1 - c) (t hs - 2 (mu - (1 - t) m) hm), over pixels H = sum h, Hz = sum h z, Hg = sum h g':
//   alpha = hb - km w r - w r c/S H
//   delta = hw - kV w r^2 / 2 - w r c/S Hz
//   q = Hg - c/S (P H + U Hz)
//   zeta = delta g' - w r c/S U h             the gradient of z
//   rho = w q - km w P - kV w r U             the gradient of r
//   dmu = -r sum zeta + (1 - c) hm w r^2 U
//   dV = -r^3 / 2 (rho + sum (zeta z) / r)
//   gradient of g: slope * (w r h + alpha + delta z)
//   gradient of w: sum_n r q - km r P - kV r^2 U / 2
//   gradient of x: r zeta + c/S (dmu + 2 dV (x - mu))
//   gradients of m and s_r: as above, with -(1 - c) (1 - t) hm w r^2 U more
//
// Every operation is two sweeps over an example: sums, then values, each value a linear function of what is
// read with coefficients a channel. Between the two, in double and with vectors over the channels, is
// everything that is above. Values are taken relative to K, the nearest float to mu: x - K is exact where x
// is near it, and mu - K is part of the coefficients. An example's mean and variance are taken relative to
// the reference mean m in one sweep: the sums of x - m and of its square. What v loses by that is small
// against c (1 - c) (a - m)^2, which is part of V too. A reference batch's variance has no such companion:
// two sweeps over pieces that lie in the L1 cache, which are joined as Chan, Golub and LeVeque do.
//
// Contiguous examples are cut into blocks of channels that fit into a core's own cache, so that memory is
// read once. channels_last ones are cut into blocks of pixels, gone through backwards in the second sweep:
// what was read last is in the cache still. A large example is shared by all threads, each taking the same
// pixels in both sweeps; what does not fit into their own caches comes from the shared one the second time.
// Bound by memory: forward 1 read and 1 write, backward 2 and 1, double backward 3 and 2.
// Results that are larger than the caches are written past them, which leaves the caches to the second sweep.
//
// Examples are summed in groups, and these in order, in double. All blocks follow from the shape alone, so
// results do not depend on the number of threads, nor an example's on the other examples.
#include "virtual_batch_norm.h"

#include <cmath>
#include <cstring>

#include "common.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kBlockBytes = 128 * 1024;         // of a block of x
constexpr int64_t kPieceValues = 8 * 1024;          // in the L1 cache twice
constexpr int64_t kSumPixels = 4096;                // summed in A before they are in double; of a channel
constexpr int64_t kSumRows = 64;                    // likewise, channels last
constexpr int64_t kLargeExample = 8 * 1024 * 1024;  // bytes: two would not stay in the shared cache
constexpr int64_t kGroups = 32;                     // of examples

// The iterations of the loop that follows do not depend on each other.
#if defined(__clang__)
#define GANKERN_INDEPENDENT _Pragma("clang loop vectorize(assume_safety)")
#else
#define GANKERN_INDEPENDENT _Pragma("GCC ivdep")
#endif

// ---- sweeps: what is done with each vector of values
// -------------------------------------------------------- coef: the channels' coefficients; in: what is
// read; out: what is written; sums: what is added up. Order of inputs: x, grad, grad_x.

enum Activation { kNone, kRelu, kLeaky };

// Of the values `at` what the activation leaves for `value`, which is y itself or a gradient.
template <int kActivation, class V>
inline V activate(V y, V value, V slope) {
  if constexpr (kActivation == kNone) return value;
  if constexpr (kActivation == kRelu) return y <= V{} ? V{} : value;
  return y > V{} ? value : slope * value;  // so NaN, as torch's gradients have it
}

struct Sum {
  static constexpr int kCoefs = 0, kIn = 1, kOut = 0, kSums = 1;
  template <class V>
  static inline void run(const V*, const V* in, V*, V* sums, V) {
    sums[0] += in[0];
  }
};
struct Moments {  // K
  static constexpr int kCoefs = 1, kIn = 1, kOut = 0, kSums = 2;
  template <class V>
  static inline void run(const V* coef, const V* in, V*, V* sums, V) {
    const V d = in[0] - coef[0];
    sums[0] += d;
    sums[1] += d * d;
  }
};
template <int kActivation>
struct Normalize {  // K, scale, shift
  static constexpr int kCoefs = 3, kIn = 1, kOut = 1, kSums = 0;
  template <class V>
  static inline void run(const V* coef, const V* in, V* out, V*, V slope) {
    const V y = (in[0] - coef[0]) * coef[1] + coef[2];
    out[0] = activate<kActivation>(y, y, slope);
  }
};
template <int kActivation>
struct GradSums {  // K, scale, shift; sums P, sum g' d with d = x - K
  static constexpr int kCoefs = 3, kIn = 2, kOut = 0, kSums = 2;
  template <class V>
  static inline void run(const V* coef, const V* in, V*, V* sums, V slope) {
    const V d = in[0] - coef[0];
    const V g = activate<kActivation>(d * coef[1] + coef[2], in[1], slope);
    sums[0] += g;
    sums[1] += g * d;
  }
};
template <int kActivation>
struct Grad {  // K, scale, shift; dx = scale g' + c3 + c4 d
  static constexpr int kCoefs = 5, kIn = 2, kOut = 1, kSums = 0;
  template <class V>
  static inline void run(const V* coef, const V* in, V* out, V*, V slope) {
    const V d = in[0] - coef[0];
    const V g = activate<kActivation>(d * coef[1] + coef[2], in[1], slope);
    out[0] = coef[1] * g + (d * coef[4] + coef[3]);
  }
};
template <int kActivation>
struct SecondSums {  // K, scale, shift; sums P, sum g' d, H, sum h d, Hg
  static constexpr int kCoefs = 3, kIn = 3, kOut = 0, kSums = 5;
  template <class V>
  static inline void run(const V* coef, const V* in, V*, V* sums, V slope) {
    const V d = in[0] - coef[0], h = in[2];
    const V g = activate<kActivation>(d * coef[1] + coef[2], in[1], slope);
    sums[0] += g;
    sums[1] += g * d;
    sums[2] += h;
    sums[3] += h * d;
    sums[4] += h * g;
  }
};
template <int kActivation>
struct Second {  // K, scale, shift; of g: scale h + c3 + c4 d; of x: c5 g' + c6 h + c7 + c8 d
  static constexpr int kCoefs = 9, kIn = 3, kOut = 2, kSums = 0;
  template <class V>
  static inline void run(const V* coef, const V* in, V* out, V*, V slope) {
    const V d = in[0] - coef[0], h = in[2];
    const V y = d * coef[1] + coef[2];
    const V g = activate<kActivation>(y, in[1], slope);
    out[0] = activate<kActivation>(y, coef[1] * h + (d * coef[4] + coef[3]), slope);
    out[1] = coef[5] * g + coef[6] * h + (d * coef[8] + coef[7]);
  }
};
struct StatisticsSecond {  // K, factor; sums of h and h d; factor h
  static constexpr int kCoefs = 2, kIn = 2, kOut = 1, kSums = 2;
  template <class V>
  static inline void run(const V* coef, const V* in, V* out, V* sums, V) {
    const V d = in[0] - coef[0], h = in[1];
    out[0] = coef[1] * h;
    sums[0] += h;
    sums[1] += h * d;
  }
};

// to[i] = sum(v[i]) for i < count, at most as many as lanes.
template <class A>
inline void sum_each(const Vec<A>* v, int count, A* to) {
  for (int i = 0; i < count; ++i) to[i] = sum<A>(v[i]);
}
#if defined(__AVX512F__)
// All 16 at once: neighbouring lanes of two vectors are added until one vector is left.
template <>
inline void sum_each<float>(const Vec<float>* v, int count, float* to) {
  if (count < 16) {
    for (int i = 0; i < count; ++i) to[i] = sum<float>(v[i]);
    return;
  }
  const __m512i even = _mm512_set_epi32(30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2, 0);
  const __m512i odd = _mm512_add_epi32(even, _mm512_set1_epi32(1));
  __m512 x[16];
  for (int i = 0; i < 16; ++i) x[i] = (__m512)v[i];
  for (int n = 8; n > 0; n /= 2)
    for (int i = 0; i < n; ++i)
      x[i] = _mm512_add_ps(_mm512_permutex2var_ps(x[2 * i], even, x[2 * i + 1]),
                           _mm512_permutex2var_ps(x[2 * i], odd, x[2 * i + 1]));
  _mm512_storeu_ps(to, x[0]);
}
#endif

// Some channels of some pixels. A null input is zeros, a null output is not written.
template <class T>
struct Block {
  using A = Acc<T>;
  static constexpr int L = kLanes<T>;
  bool rows;                 // channels last
  int64_t channels, pixels;  // of the block
  int64_t step;              // to the next channel; to the next pixel, channels last
  const T* in[3];
  T* out[2];
  int64_t lines;  // length of a line of coef, sums and memory: channels and padding
  const A* coef;  // [Op::kCoefs][lines]
  double* sums;   // [Op::kSums][lines], overwritten
  A* memory;      // [Op::kSums][lines], for channels last
  A slope;
  bool backwards;
  bool past;  // the caches: what is written, in whole aligned vectors but for partial ones

  // kCount vectors, `stride` values apart; of n values each if kPartial.
  template <class Op, int kCount, bool kPartial>
  inline void vectors(int64_t at, int64_t stride, int64_t n, const Vec<A>* coef_of, Vec<A>* acc) const {
    const Vec<A> slopes = broadcast<A>(slope);
    for (int i = 0; i < kCount; ++i, at += stride) {
      Vec<A> values[3], results[2];
      for (int k = 0; k < Op::kIn; ++k) {
        if (!in[k])
          values[k] = Vec<A>{};
        else
          values[k] = kPartial ? load_partial(in[k] + at, n) : load(in[k] + at);
      }
      Op::run(coef_of, values, results, acc, slopes);
      for (int k = 0; k < Op::kOut; ++k) {
        if (!out[k]) continue;
        if constexpr (kPartial)
          store_partial(out[k] + at, results[k], n);
        else if (past)
          stream(out[k] + at, results[k]);
        else
          store(out[k] + at, results[k]);
      }
    }
  }

  template <class Op>
  void sweep() const {
    if (rows)
      sweep_rows<Op>();
    else
      sweep_planes<Op>();
  }
  // The sweep with the activation that the slope stands for.
  template <template <int> class Op>
  void sweep_activated() const {
    if (slope == A(1))
      sweep<Op<kNone>>();
    else if (slope == A(0))
      sweep<Op<kRelu>>();
    else
      sweep<Op<kLeaky>>();
  }

  template <class Op>
  __attribute__((noinline)) void sweep_planes() const {
    constexpr int S = Op::kSums > 0 ? Op::kSums : 1, C = Op::kCoefs > 0 ? Op::kCoefs : 1;
    Vec<A> waiting[S][L];  // vectors of the last channels, whose lanes are summed together
    int waiting_count = 0;
    for (int64_t i = 0; i < channels; ++i) {
      const int64_t c = backwards ? channels - 1 - i : i;
      Vec<A> coef_of[C];
      for (int k = 0; k < Op::kCoefs; ++k) coef_of[k] = broadcast<A>(coef[k * lines + c]);
      double total[S] = {};
      for (int64_t begin = 0; begin < pixels; begin += kSumPixels) {
        const int64_t end = min(begin + kSumPixels, pixels);
        Vec<A> acc[S] = {}, other[S] = {};
        int64_t p = begin;
        for (; p + 2 * L <= end; p += 2 * L) {
          vectors<Op, 1, false>(c * step + p, 0, 0, coef_of, acc);
          vectors<Op, 1, false>(c * step + p + L, 0, 0, coef_of, other);
        }
        for (; p + L <= end; p += L) vectors<Op, 1, false>(c * step + p, 0, 0, coef_of, acc);
        for (int k = 0; k < Op::kSums; ++k) acc[k] += other[k];
        if (p < end) {
          Vec<A> last[S] = {};
          vectors<Op, 1, true>(c * step + p, 0, end - p, coef_of, last);
          for (int k = 0; k < Op::kSums; ++k)
            for (int l = 0; l < int(end - p); ++l) acc[k][l] += last[k][l];
        }
        if (pixels <= kSumPixels)
          for (int k = 0; k < Op::kSums; ++k) waiting[k][waiting_count] = acc[k];
        else
          for (int k = 0; k < Op::kSums; ++k) total[k] += double(sum<A>(acc[k]));
      }
      if (Op::kSums == 0) continue;
      if (pixels > kSumPixels) {
        for (int k = 0; k < Op::kSums; ++k) sums[k * lines + c] = total[k];
      } else if (++waiting_count == L || i + 1 == channels) {
        for (int k = 0; k < Op::kSums; ++k) {
          A lanes[L];
          sum_each<A>(waiting[k], waiting_count, lanes);
          double* to = sums + k * lines + c;
          for (int j = 0; j < waiting_count; ++j)
            (backwards ? to[waiting_count - 1 - j] : to[j - waiting_count + 1]) = lanes[j];
        }
        waiting_count = 0;
      }
    }
  }

  // Rows p to p + kRows - 1.
  template <class Op, int kRows>
  inline void row_group(int64_t p) const {
    constexpr int S = Op::kSums > 0 ? Op::kSums : 1, C = Op::kCoefs > 0 ? Op::kCoefs : 1;
    for (int64_t c = 0; c < channels; c += L) {
      Vec<A> coef_of[C], acc[S];
      for (int k = 0; k < Op::kCoefs; ++k) coef_of[k] = load(coef + k * lines + c);
      for (int k = 0; k < Op::kSums; ++k) acc[k] = load(memory + k * lines + c);
      if (c + L <= channels)
        vectors<Op, kRows, false>(p * step + c, step, 0, coef_of, acc);
      else
        vectors<Op, kRows, true>(p * step + c, step, channels - c, coef_of, acc);
      for (int k = 0; k < Op::kSums; ++k) store(memory + k * lines + c, acc[k]);
    }
  }

  template <class Op>
  __attribute__((noinline)) void sweep_rows() const {
    constexpr int kRows = Op::kOut > 1 ? 2 : 4;
    for (int64_t i = 0; i < Op::kSums * lines; ++i) sums[i] = 0;
    const int64_t parts = ceil_div(pixels, kSumRows);
    for (int64_t part = 0; part < parts; ++part) {
      const int64_t begin = (backwards ? parts - 1 - part : part) * kSumRows,
                    end = min(begin + kSumRows, pixels);
      for (int64_t i = 0; i < Op::kSums * lines; ++i) memory[i] = 0;
      int64_t p = begin;
      for (; p + kRows <= end; p += kRows) row_group<Op, kRows>(p);
      for (; p < end; ++p) row_group<Op, 1>(p);
      for (int64_t i = 0; i < Op::kSums * lines; ++i) sums[i] += double(memory[i]);
    }
  }
};

// ---- mean and variance ----------------------------------------------------------------------------------

// What a sweep of Moments left in b.sums, for channels whose squares are beyond A's range (in float: of
// values above 1e19 or below 1e-19): once more, in double.
template <class T>
void mend_moments(const Block<T>& b) {
  constexpr double kLeast = 1e-30, kMost = 1e30;
  for (int64_t c = 0; c < b.channels; ++c) {
    double &sum = b.sums[c], &squares = b.sums[b.lines + c];
    if (squares > kLeast && squares < kMost) continue;
    const T* x = b.in[0] + (b.rows ? c : c * b.step);
    const int64_t step = b.rows ? b.step : 1;
    sum = squares = 0;
    for (int64_t p = 0; p < b.pixels; ++p) {
      const double d = double(widen(x[p * step])) - double(b.coef[c]);
      sum += d;
      squares += d * d;
    }
  }
}

// (mean, sum of squared differences from it) of `n` values joined with those of `more` others.
inline void join(double* mean, double* m2, double n, const double* other_mean, const double* other_m2,
                 double more, int64_t channels) {
  const double share = more / (n + more), both = n * share;
  for (int64_t c = 0; c < channels; ++c) {
    const double difference = other_mean[c] - mean[c];
    mean[c] += difference * share;
    m2[c] += other_m2[c] + difference * difference * both;
  }
}

constexpr int64_t kMomentLines = 4;  // of doubles, scratch of moments()

// Mean and sum of squared differences of each channel of a block: to[0], to[1] of [2][lines].
template <class T>
void moments(Block<T> block, double* to, Acc<T>* coef, double* scratch) {
  using A = Acc<T>;
  const int64_t lines = block.lines,
                piece = block.rows ? max(kPieceValues / block.channels, 4) : block.pixels;
  double *piece_sums = scratch, *piece_mean = scratch + 2 * lines, *piece_m2 = scratch + 3 * lines;
  block.coef = coef;
  block.sums = piece_sums;
  for (int64_t c = block.channels; c < lines; ++c) coef[c] = 0;
  const T* x = block.in[0];
  const int64_t pixels = block.pixels;
  for (int64_t p = 0; p < pixels; p += piece) {
    block.in[0] = block.rows ? x + p * block.step : x;
    block.pixels = min(piece, pixels - p);
    const double n = double(block.pixels);
    block.template sweep<Sum>();
    for (int64_t c = 0; c < block.channels; ++c) coef[c] = A(piece_sums[c] / n);
    block.template sweep<Moments>();
    mend_moments(block);
    double *mean = p ? piece_mean : to, *m2 = p ? piece_m2 : to + lines;
    for (int64_t c = 0; c < block.channels; ++c) {
      const double difference = piece_sums[c] / n;
      mean[c] = double(coef[c]) + difference;
      m2[c] = piece_sums[lines + c] - piece_sums[c] * difference;
    }
    if (p) join(to, to + lines, double(p), piece_mean, piece_m2, n, block.channels);
  }
}

// ---- the blocks of a feature map -----------------------------------------------------------------------

template <class T>
struct Map {
  using A = Acc<T>;
  static constexpr int L = kLanes<T>;
  int64_t count, channels, pixels;
  bool rows;

  template <class In>
  explicit Map(const In& in)
      : count(in.count), channels(in.channels), pixels(in.pixels), rows(in.channels_last || in.pixels == 1) {}

  // Whether whole vectors of a result are aligned, and the result does not stay in the caches anyway.
  bool past(const void* out) const {
    return count * example_bytes() >= kStreamBytes && (rows ? channels : pixels) % L == 0 &&
           reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
  }
  int64_t example_bytes() const { return channels * pixels * int64_t(sizeof(T)); }
  int64_t block_channels() const {
    if (rows) return channels;
    const int64_t fit = kBlockBytes / (pixels * int64_t(sizeof(T)));
    return min(channels, fit >= L ? fit / L * L : max(fit, 1));
  }
  int64_t block_pixels() const {
    if (!rows) return pixels;
    return min(pixels, ceil_div(max(kBlockBytes / (channels * int64_t(sizeof(T))), 1), kSumRows) * kSumRows);
  }
  int64_t channel_blocks() const { return ceil_div(channels, block_channels()); }
  int64_t pixel_blocks() const { return ceil_div(pixels, block_pixels()); }
  int64_t lines() const { return ceil_div(block_channels(), L) * L; }
  int64_t groups() const { return min(count, kGroups); }

  Block<T> block(int64_t n, int64_t channel_block, int64_t pixel_block) const {
    const int64_t c = channel_block * block_channels(), p = pixel_block * block_pixels();
    Block<T> b{};
    b.rows = rows;
    b.channels = min(block_channels(), channels - c);
    b.pixels = min(block_pixels(), pixels - p);
    b.step = rows ? channels : pixels;
    b.lines = lines();
    offset_ = n * channels * pixels + (rows ? p * channels : c * pixels);
    return b;
  }
  // Of the block made last.
  const T* at(const void* map) const { return map ? static_cast<const T*>(map) + offset_ : nullptr; }
  T* at(void* map) const { return map ? static_cast<T*>(map) + offset_ : nullptr; }

 private:
  mutable int64_t offset_ = 0;
};

// Memory of one kind of values after another, each line of `lines` of them.
struct Memory {
  Scratch<char> all;
  char* next;
  explicit Memory(int64_t bytes) : all(bytes), next(all.at) {}
  template <class V>
  V* take(int64_t values) {
    V* at = reinterpret_cast<V*>(next);
    next += values * int64_t(sizeof(V));
    for (int64_t i = 0; i < values; ++i) at[i] = 0;
    return at;
  }
};

constexpr int kCoefs[] = {3, 5, 9};
constexpr int kSums[] = {2, 2, 5};
constexpr int64_t kGradients = 4;  // of channels: ref_mean, ref_mean_square, weight, bias

template <class T, int kOrder>
struct Problem {
  using A = Acc<T>;
  const VirtualBatchNorm& in;
  Map<T> map;

  explicit Problem(const VirtualBatchNorm& problem) : in(problem), map(problem) {}

  // What one thread needs for an example's block of channels.
  struct Work {
    Memory memory;
    A* coef;
    double *partial, *total;
    explicit Work(const Map<T>& map)
        : memory(map.lines() * (kCoefs[kOrder] * int64_t(sizeof(A)) +
                                kSums[kOrder] * (map.pixel_blocks() + 1) * int64_t(sizeof(double)))) {
      total = memory.take<double>(kSums[kOrder] * map.lines());
      partial = memory.take<double>(kSums[kOrder] * map.pixel_blocks() * map.lines());
      coef = memory.take<A>(kCoefs[kOrder] * map.lines());
    }
  };

  bool needs_sums() const {
    return in.own_share > 0 || (kOrder != kForward && in.sums) || kOrder == kDoubleBackward;
  }
  Block<T> block(int64_t n, int64_t channel_block, int64_t pixel_block, const Map<T>& at) const {
    Block<T> b = at.block(n, channel_block, pixel_block);
    b.in[0] = at.at(in.x);
    b.in[1] = at.at(in.grad);
    b.in[2] = at.at(in.grad_x);
    b.out[0] = kOrder == kBackward ? at.at(in.out_x) : at.at(in.out);
    b.out[1] = at.at(in.out_x);
    b.slope = A(in.negative_slope);
    return b;
  }

  // ---- first sweep -------------------------------------------------------------------------------------

  void sum_blocks(int64_t n, int64_t channel_block, int64_t begin, int64_t end, const Work& work) const {
    constexpr int64_t values = kSums[kOrder];
    Memory memory(map.lines() * values * int64_t(sizeof(A)));
    A* acc = memory.take<A>(values * map.lines());
    const Map<T> at = map;
    for (int64_t p = begin; p < end; ++p) {
      Block<T> b = block(n, channel_block, p, at);
      b.memory = acc;
      b.coef = work.coef;
      b.sums = work.partial + p * values * map.lines();
      if constexpr (kOrder == kForward) {
        b.template sweep<Moments>();
        mend_moments(b);
      }
      if constexpr (kOrder == kBackward) b.template sweep_activated<GradSums>();
      if constexpr (kOrder == kDoubleBackward) b.template sweep_activated<SecondSums>();
    }
  }
  void add_blocks(const Work& work) const {
    const int64_t size = kSums[kOrder] * map.lines();
    for (int64_t i = 0; i < size; ++i) work.total[i] = work.partial[i];
    for (int64_t p = 1; p < map.pixel_blocks(); ++p)
      for (int64_t i = 0; i < size; ++i) work.total[i] += work.partial[p * size + i];
  }

  // ---- between the sweeps ------------------------------------------------------------------------------

  // K for the own statistics.
  void reference_mean(int64_t first, int64_t channels, const Work& work) const {
    const double* mean = in.ref_mean + first;
    for (int64_t i = 0; i < channels; ++i) work.coef[i] = A(mean[i]);
  }
  // mu and r of some channels, from the totals; kept for the backward.
  void statistics(int64_t n, int64_t first, int64_t channels, const Work& work) const {
    const double c = in.own_share, rest = 1 - c, eps = in.eps, share = 1 / double(in.pixels);
    const double *sum_d = work.total, *sum_squares = work.total + map.lines();
    const A* nearest = work.coef;
    double* mu = in.saved + n * in.channels + first;
    double* r = mu + in.count * in.channels;
    const double *mean = in.ref_mean + first, *mean_square = in.ref_mean_square + first;
    if (c == 0) {
      GANKERN_INDEPENDENT
      for (int64_t i = 0; i < channels; ++i) {
        const double variance = mean_square[i] - mean[i] * mean[i];
        mu[i] = mean[i];
        r[i] = 1 / std::sqrt((variance < 0 ? 0 : variance) + eps);
      }
      return;
    }
    GANKERN_INDEPENDENT
    for (int64_t i = 0; i < channels; ++i) {
      const double m = mean[i], variance = mean_square[i] - m * m;
      const double d = sum_d[i] * share, squares = sum_squares[i] * share;
      const double own_variance = squares - squares == 0 ? squares - d * d : squares;  // infinity stays
      const double difference = d + (double(nearest[i]) - m);                          // a - m
      mu[i] = m + c * difference;
      r[i] = 1 / std::sqrt(rest * (variance < 0 ? 0 : variance) + c * own_variance +
                           c * rest * difference * difference + eps);
    }
  }
  // K, scale and shift.
  void normalizing(int64_t n, int64_t first, int64_t channels, const Work& work) const {
    const double* mu = in.saved + n * in.channels + first;
    const double* r = mu + in.count * in.channels;
    const double *weight = in.weight + first, *bias = in.bias + first;
    A *nearest = work.coef, *scale = nearest + map.lines(), *shift = scale + map.lines();
    GANKERN_INDEPENDENT
    for (int64_t i = 0; i < channels; ++i) {
      const double w = weight[i] * r[i];
      const A K = A(mu[i]);
      nearest[i] = K;
      scale[i] = A(w);
      shift[i] = A(bias[i] - (mu[i] - double(K)) * w);
    }
  }
  // The other coefficients; adds to the sums over examples, [kGradients][channels] from `first` on.
  void gradients(int64_t n, int64_t first, int64_t channels, const Work& work, double* to) const {
    const double c = in.own_share, rest = 1 - c, share = c / double(in.pixels);
    const int64_t lines = map.lines();
    const double* mu_of = in.saved + n * in.channels + first;
    const double* r_of = mu_of + in.count * in.channels;
    const double *weight = in.weight + first, *mean = in.ref_mean + first,
                 *mean_square = in.ref_mean_square + first;
    const double* total = work.total;
    A* coef = work.coef;
    double *d_mean = to + first, *d_square = d_mean + in.channels, *d_weight = d_square + in.channels,
           *d_bias = d_weight + in.channels;
    const auto given = [&](const double* h) { return kOrder == kDoubleBackward ? h + first : nullptr; };
    const double *h_mean_of = given(in.grad_ref_mean), *h_square_of = given(in.grad_ref_mean_square),
                 *h_weight = given(in.grad_weight), *h_bias = given(in.grad_bias);
    GANKERN_INDEPENDENT
    for (int64_t i = 0; i < channels; ++i) {
      const double mu = mu_of[i], r = r_of[i], w = weight[i] * r, m = mean[i];
      const double t = mean_square[i] - m * m < 0 ? 0 : 1;
      const double beside = mu - double(coef[i]);  // mu - K
      const double P = total[i], U = r * (total[lines + i] - beside * P);
      const double slope_m = mu - (1 - t) * m;  // of V for m, over -2 (1 - c)
      if constexpr (kOrder == kBackward) {
        const double d_mu = -w * P, d_V = -0.5 * w * r * U, of_d = -w * r * share * U;
        coef[3 * lines + i] = A(-w * share * P - of_d * beside);
        coef[4 * lines + i] = A(of_d);
        d_mean[i] += rest * (d_mu - 2 * slope_m * d_V);
        d_square[i] += rest * t * d_V;
        d_weight[i] += U;
        d_bias[i] += P;
      }
      if constexpr (kOrder == kDoubleBackward) {
        const double H = total[2 * lines + i], Hz = r * (total[3 * lines + i] - beside * H),
                     Hg = total[4 * lines + i];
        const double h_mean = h_mean_of[i], h_square = h_square_of[i];
        const double km = rest * h_mean, kV = rest * (t * h_square - 2 * slope_m * h_mean);
        const double alpha = h_bias[i] - km * w - w * share * H;
        const double delta = h_weight[i] - 0.5 * kV * w * r - w * share * Hz;
        const double q = Hg - share * (P * H + U * Hz), of_h = -w * share * U;
        const double sum_zeta = delta * P + of_h * H, sum_zeta_z = delta * U + of_h * Hz;
        const double r_rho = w * q - km * w * P - kV * w * r * U, direct = rest * h_mean * w * r * U;
        const double d_mu = -r * sum_zeta + direct, d_V = -0.5 * r * r * (r_rho + sum_zeta_z);
        coef[3 * lines + i] = A(alpha - delta * r * beside);
        coef[4 * lines + i] = A(delta * r);
        coef[5 * lines + i] = A(r * delta);
        coef[6 * lines + i] = A(r * of_h);
        coef[7 * lines + i] = A(share * (d_mu - 2 * d_V * beside));
        coef[8 * lines + i] = A(share * 2 * d_V);
        d_mean[i] += rest * (d_mu - 2 * slope_m * d_V) - (1 - t) * direct;
        d_square[i] += rest * t * d_V;
        d_weight[i] += r * q - km * r * P - 0.5 * kV * r * r * U;
      }
    }
  }

  // ---- second sweep ------------------------------------------------------------------------------------

  void write_blocks(int64_t n, int64_t channel_block, int64_t begin, int64_t end, const Work& work) const {
    const Map<T> at = map;
    const bool past = map.past(in.out) && map.past(in.out_x);  // a null result is as good as aligned
    for (int64_t p = end - 1; p >= begin; --p) {
      Block<T> b = block(n, channel_block, p, at);
      b.coef = work.coef;
      b.backwards = true;
      b.past = past;
      if constexpr (kOrder == kForward) b.template sweep_activated<Normalize>();
      if constexpr (kOrder == kBackward) b.template sweep_activated<Grad>();
      if constexpr (kOrder == kDoubleBackward) b.template sweep_activated<Second>();
    }
    if (past) stream_fence();
  }

  // A block of channels of an example. for_each(count, f(begin, end)) runs a sweep, on one thread or on all.
  template <class F>
  void example(int64_t n, int64_t channel_block, const Work& work, double* group_sums,
               const F& for_each) const {
    const int64_t first = channel_block * map.block_channels();
    const int64_t channels = min(map.block_channels(), map.channels - first);
    if (kOrder == kForward)
      reference_mean(first, channels, work);
    else
      normalizing(n, first, channels, work);
    if (needs_sums()) {
      for_each(map.pixel_blocks(),
               [&](int64_t begin, int64_t end) { sum_blocks(n, channel_block, begin, end, work); });
      add_blocks(work);
    }
    if (kOrder == kForward) {
      statistics(n, first, channels, work);
      normalizing(n, first, channels, work);
    } else {
      gradients(n, first, channels, work, group_sums);
    }
    if (!in.out && !in.out_x) return;
    for_each(map.pixel_blocks(),
             [&](int64_t begin, int64_t end) { write_blocks(n, channel_block, begin, end, work); });
  }

  void run(const Parallel& parallel) const {
    const int64_t groups = map.groups(), blocks = map.channel_blocks();
    const int64_t sums_of_group = kOrder == kForward ? 0 : kGradients * in.channels;
    Memory sums(groups * sums_of_group * int64_t(sizeof(double)) + 1);
    double* group_sums = sums.take<double>(groups * sums_of_group);
    const auto first_of = [&](int64_t group) { return in.count * group / groups; };
    if (map.pixel_blocks() > 1 && (map.example_bytes() >= kLargeExample || in.count < 2 * parallel.threads)) {
      Work work(map);
      for (int64_t group = 0; group < groups; ++group)
        for (int64_t n = first_of(group); n < first_of(group + 1); ++n)
          example(n, 0, work, group_sums + group * sums_of_group,
                  [&](int64_t count, const auto& f) { parallel_for(parallel, count, 1, f); });
    } else {
      parallel_for(parallel, groups * blocks, 1, [&](int64_t begin, int64_t end) {
        Work work(map);
        for (int64_t task = begin; task < end; ++task) {
          const int64_t group = task / blocks;
          for (int64_t n = first_of(group); n < first_of(group + 1); ++n)
            example(n, task % blocks, work, group_sums + group * sums_of_group,
                    [&](int64_t count, const auto& f) { f(int64_t{0}, count); });
        }
      });
    }
    if (kOrder == kForward || !in.sums) return;
    for (int64_t i = 0; i < kGradients * in.channels; ++i) in.sums[i] = 0;
    for (int64_t group = 0; group < groups; ++group)
      for (int64_t i = 0; i < kGradients * in.channels; ++i)
        in.sums[i] += group_sums[group * sums_of_group + i];
  }
};

template <class T, int kOrder>
void run(const VirtualBatchNorm& in, const Parallel& parallel) {
  Problem<T, kOrder>(in).run(parallel);
}

// ---- statistics of a batch -----------------------------------------------------------------------------

// Calls f(block of channels, block, its number) for groups of the blocks of a map, a group of a block of
// channels on one thread and in order.
template <class T>
struct Batch {
  using A = Acc<T>;
  const BatchStatistics& in;
  Map<T> map;

  explicit Batch(const BatchStatistics& batch) : in(batch), map(batch) {}

  int64_t pieces() const { return in.count * map.pixel_blocks(); }
  int64_t groups() const { return min(pieces(), kGroups); }
  int64_t line() const { return map.channel_blocks() * map.lines(); }
  double values() const { return double(in.count) * double(in.pixels); }

  // f(task, group, channel block, work memory's lines of doubles, of A) with each(piece's block).
  template <class F>
  void run(const Parallel& parallel, int64_t doubles, int64_t singles, const F& f) const {
    const int64_t blocks = map.channel_blocks();
    parallel_for(parallel, groups() * blocks, 1, [&](int64_t begin, int64_t end) {
      Memory memory(map.lines() * (doubles * 8 + singles * int64_t(sizeof(A))));
      double* wide = memory.take<double>(doubles * map.lines());
      A* narrow_ = memory.take<A>(singles * map.lines());
      const Map<T> at = map;
      for (int64_t task = begin; task < end; ++task) {
        const int64_t group = task / blocks, channel_block = task % blocks;
        int64_t before = 0;
        for (int64_t i = pieces() * group / groups(); i < pieces() * (group + 1) / groups(); ++i) {
          Block<T> b = at.block(i / map.pixel_blocks(), channel_block, i % map.pixel_blocks());
          b.in[0] = at.at(in.x);
          b.out[0] = at.at(in.out_x);
          b.in[1] = at.at(in.grad_x);
          f(b, group, channel_block, before, wide, narrow_);
          before += b.pixels;
        }
      }
    });
  }
  int64_t pixels_of_group(int64_t group) const {
    int64_t n = 0;
    for (int64_t i = pieces() * group / groups(); i < pieces() * (group + 1) / groups(); ++i)
      n += min(map.block_pixels(), map.pixels - i % map.pixel_blocks() * map.block_pixels());
    return n;
  }
  // [2][lines of a block of channels] of a group.
  double* part(double* all, int64_t group, int64_t channel_block) const {
    return all + (group * map.channel_blocks() + channel_block) * 2 * map.lines();
  }
  int64_t first(int64_t channel_block) const { return channel_block * map.block_channels(); }
  int64_t channels(int64_t channel_block) const {
    return min(map.block_channels(), in.channels - first(channel_block));
  }

  void statistics(const Parallel& parallel) const {
    Memory memory(groups() * 2 * line() * 8);
    double* all = memory.take<double>(groups() * 2 * line());
    const int64_t lines = map.lines();
    run(parallel, kMomentLines + 2, 3,
        [&](Block<T>& b, int64_t group, int64_t channel_block, int64_t before, double* wide, A* memory_of) {
          double* to = part(all, group, channel_block);
          double* now = before ? wide + kMomentLines * lines : to;
          b.memory = memory_of + lines;
          moments(b, now, memory_of, wide);
          if (before) join(to, to + lines, double(before), now, now + lines, double(b.pixels), b.channels);
        });
    for (int64_t channel_block = 0; channel_block < map.channel_blocks(); ++channel_block) {
      double* to = part(all, 0, channel_block);
      int64_t before = pixels_of_group(0);
      for (int64_t group = 1; group < groups(); ++group) {
        const double* more = part(all, group, channel_block);
        join(to, to + lines, double(before), more, more + lines, double(pixels_of_group(group)), lines);
        before += pixels_of_group(group);
      }
      double* mean = in.moments + first(channel_block);
      for (int64_t i = 0; i < channels(channel_block); ++i) {
        mean[i] = to[i];
        mean[in.channels + i] = to[lines + i] / values() + to[i] * to[i];
      }
    }
  }

  // dx = (dm + 2 ds x) / values, by way of x - K.
  void backward(const Parallel& parallel) const {
    const int64_t lines = map.lines();
    run(parallel, 0, 3, [&](Block<T>& b, int64_t, int64_t channel_block, int64_t before, double*, A* coef) {
      for (int64_t i = 0; i < b.channels && before == 0; ++i) {
        const int64_t c = first(channel_block) + i;
        const double mean = in.mean[c], slope = 2 * in.grad_mean_square[c] / values();
        coef[i] = A(mean);
        coef[lines + i] = A(slope);
        coef[2 * lines + i] = A(in.grad_mean[c] / values() + slope * double(coef[i]));
      }
      b.coef = coef;
      b.template sweep<Normalize<kNone>>();
    });
  }

  void double_backward(const Parallel& parallel) const {
    Memory memory(groups() * 2 * line() * 8);
    double* all = memory.take<double>(groups() * 2 * line());
    const int64_t lines = map.lines();
    run(parallel, 2, 4,
        [&](Block<T>& b, int64_t group, int64_t channel_block, int64_t before, double* wide, A* coef) {
          for (int64_t i = 0; i < b.channels && before == 0; ++i) {
            const int64_t c = first(channel_block) + i;
            coef[i] = A(in.mean[c]);
            coef[lines + i] = A(2 * in.grad_mean_square[c] / values());
          }
          b.coef = coef;
          b.memory = coef + 2 * lines;
          b.sums = wide;
          b.template sweep<StatisticsSecond>();
          double* to = part(all, group, channel_block);
          for (int64_t i = 0; i < 2 * lines; ++i) to[i] += wide[i];
        });
    for (int64_t channel_block = 0; channel_block < map.channel_blocks(); ++channel_block) {
      double* to = part(all, 0, channel_block);
      for (int64_t group = 1; group < groups(); ++group)
        for (int64_t i = 0; i < 2 * lines; ++i) to[i] += part(all, group, channel_block)[i];
      double* of_mean = in.moments + first(channel_block);
      for (int64_t i = 0; i < channels(channel_block); ++i) {
        const double K = double(A(in.mean[first(channel_block) + i]));
        of_mean[i] = to[i] / values();
        of_mean[in.channels + i] = 2 * (to[lines + i] + K * to[i]) / values();
      }
    }
  }
};

template <class T>
void statistics(const BatchStatistics& in, const Parallel& parallel) {
  Batch<T>(in).statistics(parallel);
}
template <class T>
void statistics_backward(const BatchStatistics& in, const Parallel& parallel) {
  Batch<T>(in).backward(parallel);
}
template <class T>
void statistics_double_backward(const BatchStatistics& in, const Parallel& parallel) {
  Batch<T>(in).double_backward(parallel);
}

}  // namespace

extern const VirtualBatchNormKernels virtual_batch_norm = {
    GANKERN_EACH_ORDER(run),
    {GANKERN_EACH_DTYPE(statistics), GANKERN_EACH_DTYPE(statistics_backward),
     GANKERN_EACH_DTYPE(statistics_double_backward)},
};

}  // namespace GANKERN_ISA
}  // namespace gankern
