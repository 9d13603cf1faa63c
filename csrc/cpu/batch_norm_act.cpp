// Batch normalisation (Ioffe 2015, arXiv 1502.03167) and a (leaky) ReLU, each order in one pass over memory.
//
// With w = x - mean, r = 1 / sqrt(var + eps), k = gamma r, all of x's channel (gamma and beta of its sample
// too, where they are conditional), m() the mean over a channel's samples and positions:
//
//   y  = act(z),  z = k w + beta
//   g' = g act'(z),  a = gamma g',  dgamma = r sum g' w,  dbeta = sum g'
//   dx = k g' - r^2 m(a r w) w - r m(a)
//
// Second order, for the gradients h, hgamma, hbeta of dx, dgamma, dbeta:
//
//   dg     = act'(z) (k h + e w + hbeta - k m(h)),  e = r (hgamma - k m(h r w))
//   dgamma = r sum g' (h - m(h) - m(h r w) r w)
//   dx     = e g' - r^2 m(a r w) h - r^2 (m(u r w) + r K) w - r m(u),  with
//       u = hgamma g' - r (m(h r w) a + m(a r w) h)
//       K = m(h a) - m(h) m(a) - m(h r w) m(a r w)
//
// PReLU has a slope a of each channel, and da = sum over z <= 0 of g z; its second order is made of that without
// an activation and of bias_act's (gankern/ops/_norm_act.py).
//
// So every order is two sweeps: sums over each channel (of x and its square; of g', g' w; of these, h, h w
// and g' h), then results that are sums of products of what was read with a few coefficients, which follow
// from the sums. act' is taken from z, computed again: nothing is kept but x and the statistics. In
// evaluation mean and r are constants, and what stands for their gradients is zero: forward is the second
// sweep alone.
//
// Layouts:
//   Planes  a channel of a sample is a line of neighbouring values. A channel's two sweeps follow each other,
//           so the second one finds it in the L2 cache (1 MB holds 16 x 64 x 64 of forward): x is read from
//           memory once. Few channels are cut in parts, for the threads.
//   Rows    channels lie side by side, in columns: channels_last; and also short planes, as `width` columns a
//           channel. A block of columns that fits into the cache goes as above; otherwise it is cut in parts,
//           all of which are swept before the second sweep begins, which goes backwards: what was read last
//           may still be in the last level of cache. Of several instances whole rows are swept, and each instance
//           twice, one after the other, where that cache may have it.
//   Lines   channels of one line each, of one sample or of a group, whose planes are short: what is done once a channel,
//           or once a plane, decides there.
// Of groups (of channels, of a sample), a channel's samples are the group's, and lie beside each other: lines one
// behind the other, or, channels_last, the columns of a channel. No layout, and no kernel, of its own.
// Bound by memory: forward reads x and writes y, backward reads x and g and writes dx, double backward reads
// x, g and h and writes two; in Rows beyond the cache the reads are twice. Results larger than the caches are
// written past them. Scratch: sums and coefficients of channels.
//
// Sums: of at most a few thousand values in vectors of the accumulation dtype, these in double, in an order
// that the shape decides. Sums of squares are taken about the mean of what a part summed before (its first
// values are summed twice): what cancels is no more than what the whole has. Where they overflow all the
// same, or there is an infinity, the channel is done again in double.
#include "batch_norm_act.h"

#include <cmath>
#include <cstring>
#include <utility>

#include "common.h"
#include "vec_math.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kSegment = 4096;                // values of a line that are summed in one go
constexpr int64_t kFlushRows = 128;               // rows of a column, likewise
constexpr int64_t kShortPlane = 64;               // planes of fewer values are columns
constexpr int64_t kLineValues = 1024;             // a channel of one sample of no more values is a line
constexpr int64_t kBlockLines = 64;               // of a block, at most
constexpr int64_t kColumns = 512;                 // of a block, about
constexpr int64_t kFewVectors = 4;                // of columns: a narrow block
constexpr int64_t kCacheBytes = 512 * 1024;       // of a block that is swept twice by one thread
constexpr int64_t kPartBytes = 1024 * 1024;       // of a part, at least
constexpr int64_t kSampleBytes = 2 * kPartBytes;  // of a sample that one thread sweeps twice
constexpr int64_t kPartRows = 256;                // likewise
constexpr int64_t kMaxParts = 256;
constexpr int64_t kManyChannels = 16;         // enough for the threads without parts
constexpr int64_t kSerialValues = 16 * 1024;  // fewer are not worth waking a thread for

template <class A>
constexpr int kLanesOf = kVectorBytes / int(sizeof(A));

// ---- the arithmetic ------------------------------------------------------------------------------------

// a where the mask, of all bits or none, has them, else b. (Of a mask that is not itself a comparison GCC makes one
// before it chooses.)
template <class A>
[[gnu::always_inline]] inline Vec<A> select(IntVec<A> mask, Vec<A> a, Vec<A> b) {
#if defined(__AVX2__) && !defined(__AVX512F__)
  if constexpr (sizeof(A) == 4) return (Vec<A>)_mm256_blendv_ps((__m256)b, (__m256)a, (__m256)mask);
  return (Vec<A>)_mm256_blendv_pd((__m256d)b, (__m256d)a, (__m256d)mask);
#else
  return mask ? a : b;
#endif
}

// The sums of the lanes of two vectors, each as `sum` has it, in fewer steps than one after the other.
template <class A, size_t... I>
[[gnu::always_inline]] inline void sum_both(Vec<A> a, Vec<A> b, A& of_a, A& of_b, std::index_sequence<I...>) {
  constexpr int L = sizeof...(I), kHalf = L / 2;
  Vec<A> t = __builtin_shuffle(a, b, IntVec<A>{(int(I) < kHalf ? int(I) : int(I) + kHalf)...}) +
             __builtin_shuffle(a, b, IntVec<A>{(int(I) < kHalf ? int(I) + kHalf : int(I) + L)...});
  if constexpr (kHalf > 4) t += __builtin_shuffle(t, IntVec<A>{(int(I) ^ 4)...});
  if constexpr (kHalf > 2) t += __builtin_shuffle(t, IntVec<A>{(int(I) ^ 2)...});
  if constexpr (kHalf > 1) t += __builtin_shuffle(t, IntVec<A>{(int(I) ^ 1)...});
  of_a = t[0], of_b = t[kHalf];
}
template <class A>
[[gnu::always_inline]] inline void sum_both(Vec<A> a, Vec<A> b, A& of_a, A& of_b) {
  sum_both<A>(a, b, of_a, of_b, std::make_index_sequence<size_t(kLanesOf<A>)>());
}

// v where z > 0, slope * v elsewhere; with slope 0, v where z is NaN too, and plain 0 elsewhere: as torch's gradients
// of LeakyReLU and ReLU have it.
template <class A>
struct Gate {
  Vec<A> slope;
  IntVec<A> keep;
  explicit Gate(double s) : slope(broadcast<A>(A(s))), keep(IntVec<A>{} - (s != 0)) {}
  explicit Gate(Vec<A> s) : slope(s), keep(IntVec<A>{} - 1) {}
  [[gnu::always_inline]] Vec<A> operator()(Vec<A> z, Vec<A> v) const {
    const IntVec<A> below = (IntVec<A>)(z <= Vec<A>{}) | ((IntVec<A>)(z != z) & keep);
    return select<A>(below, (Vec<A>)((IntVec<A>)(v * slope) & keep), v);
  }
};

// k w, and 0 where k is, also where w is not finite: what stands for a constant's gradient adds nothing.
template <class A>
[[gnu::always_inline]] inline Vec<A> times(Vec<A> k, Vec<A> w) {
  return (Vec<A>)((IntVec<A>)(k * w) & (IntVec<A>)(k != Vec<A>{}));
}

// What the second sweep needs of a channel beside mean and r: m() terms, see each order's `coefs`. Of X, a value or a
// vector of them.
template <class X>
struct Channel {
  X mean, r, term[5];
};

template <class X>
struct Affine {
  X gamma, beta, h_gamma, h_beta, slope;
};

template <class A>
[[gnu::always_inline]] inline Channel<Vec<A>> vectors(const Channel<A>& c) {
  Channel<Vec<A>> all{broadcast<A>(c.mean), broadcast<A>(c.r), {}};
  for (int i = 0; i < 5; ++i) all.term[i] = broadcast<A>(c.term[i]);
  return all;
}

template <class T>
struct Moments {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int kIn = 1, kSums = 2;
  // k: what the values are taken about
  [[gnu::always_inline]] static void reduce(const V* k, const V* in, const Gate<A>&, V* sums) {
    const V d = in[0] - k[0];
    sums[0] += d;
    sums[1] += d * d;
  }
};

// The orders: what each reads and writes, its coefficients of a channel (kRead of which its first sweep reads, too), its
// sums, and the arithmetic of both sweeps, of a vector. That is inlined whatever the compiler thinks of it: a call would
// take the sums out of their registers.
//
// With kPrelu the slope is a coefficient more, in place of the gate's, and its gradient a sum more.
template <bool kPrelu, class A>
[[gnu::always_inline]] inline Gate<A> gate_of(const Vec<A>* k, const Gate<A>& gate) {
  if constexpr (kPrelu)
    return Gate<A>(k[3]);
  else
    return gate;
}

template <class T, bool kPrelu = false>
struct Forward {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int kIn = 1, kSums = 0, kCoefs = kPrelu ? 4 : 3, kRead = kCoefs, kOut = 1;
  template <class X>
  [[gnu::always_inline]] static void coefs(const Channel<X>& c, const Affine<X>& a, X* k, int64_t stride) {
    k[0] = c.mean;
    k[stride] = a.gamma * c.r;
    k[2 * stride] = a.beta;
    if constexpr (kPrelu) k[3 * stride] = a.slope;
  }
  [[gnu::always_inline]] static void apply(const V* k, const V* in, const Gate<A>& gate, V* out) {
    const V z = (in[0] - k[0]) * k[1] + k[2];
    out[0] = gate_of<kPrelu>(k, gate)(z, z);
  }
};

template <class T, bool kPrelu = false>
struct Backward {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int kIn = 2, kSums = kPrelu ? 3 : 2, kRead = kPrelu ? 4 : 3, kCoefs = kRead + 2, kOut = 1;
  // term: of w and of 1 in dx
  template <class X>
  [[gnu::always_inline]] static void coefs(const Channel<X>& c, const Affine<X>& a, X* k, int64_t stride) {
    Forward<T, kPrelu>::coefs(c, a, k, stride);
    k[kRead * stride] = c.term[0];
    k[(kRead + 1) * stride] = c.term[1];
  }
  [[gnu::always_inline]] static void reduce(const V* k, const V* in, const Gate<A>& gate, V* sums) {
    const V w = in[0] - k[0], z = w * k[1] + k[2];
    const V g = gate_of<kPrelu>(k, gate)(z, in[1]);
    sums[0] += g;
    sums[1] += g * w;
    if constexpr (kPrelu) sums[2] += z > V{} ? V{} : in[1] * z;
  }
  [[gnu::always_inline]] static void apply(const V* k, const V* in, const Gate<A>& gate, V* out) {
    const V w = in[0] - k[0];
    const V g = gate_of<kPrelu>(k, gate)(w * k[1] + k[2], in[1]);
    out[0] = k[1] * g + (times<A>(k[kRead], w) + k[kRead + 1]);
  }
};

template <class T>
struct DoubleBackward {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int kIn = 3, kSums = 5, kCoefs = 8, kRead = 3, kOut = 2;
  // term: -r m(h r w), -m(h); of h, w and 1 in dx
  template <class X>
  [[gnu::always_inline]] static void coefs(const Channel<X>& c, const Affine<X>& a, X* k, int64_t stride) {
    Forward<T>::coefs(c, a, k, stride);
    k[3 * stride] = c.r * a.h_gamma + k[stride] * c.term[0];
    k[4 * stride] = a.h_beta + k[stride] * c.term[1];
    k[5 * stride] = c.term[2];
    k[6 * stride] = c.term[3];
    k[7 * stride] = c.term[4];
  }
  [[gnu::always_inline]] static void reduce(const V* k, const V* in, const Gate<A>& gate, V* sums) {
    const V w = in[0] - k[0], h = in[2];
    const V g = gate(w * k[1] + k[2], in[1]);
    sums[0] += g;
    sums[1] += g * w;
    sums[2] += h;
    sums[3] += h * w;
    sums[4] += g * h;
  }
  [[gnu::always_inline]] static void apply(const V* k, const V* in, const Gate<A>& gate, V* out) {
    const V w = in[0] - k[0], h = in[2];
    const V z = w * k[1] + k[2];
    out[0] = gate(z, k[1] * h + (times<A>(k[3], w) + k[4]));
    out[1] = k[3] * gate(z, in[1]) + (k[5] * h + (times<A>(k[6], w) + k[7]));
  }
};

// Mean and sum of squares about it of `count` values.
struct Moment {
  double count, mean, squares;

  // `sum` and `square_sum` of `n` values minus `about`.
  static Moment of(double n, double about, double sum, double square_sum) {
    const double rest = square_sum - sum * (sum / n);
    return {n, about + sum / n, rest < 0 ? 0 : rest};
  }
  void add(const Moment& other) {
    if (other.count == 0) return;
    const double all = count + other.count, apart = other.mean - mean;
    squares += other.squares + apart * apart * (count * other.count / all);
    mean += apart * (other.count / all);
    count = all;
  }
};

// ---- what both layouts share ---------------------------------------------------------------------------

template <class T>
struct Problem {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<T>;

  const BatchNormAct& in;
  const Gate<A> gate;
  const bool per_sample;  // one sample's affine values are everyone's
  const T* inputs[3];
  T* outputs[2];
  const bool streams;
  Channel<A>* channels;

  Problem(const BatchNormAct& b, Channel<A>* c, const void* out, const void* out1)
      : in(b),
        gate(b.negative_slope),
        per_sample(b.per_sample && b.samples > 1),
        inputs{static_cast<const T*>(b.x), static_cast<const T*>(b.grad), static_cast<const T*>(b.h)},
        outputs{static_cast<T*>(const_cast<void*>(out)), static_cast<T*>(const_cast<void*>(out1))},
        streams(values() * int64_t(sizeof(T)) > kStreamBytes),
        channels(c) {}

  int64_t values() const { return in.samples * in.channels * in.plane; }
  int64_t count() const { return in.samples * in.plane; }  // of a channel
  int64_t affines() const { return per_sample ? in.samples : 1; }

  // Where the affine values of a channel of a sample are.
  int64_t place(int64_t n, int64_t c) const {
    if (!per_sample) return c;
    return in.grouped ? c * in.samples + n : n * in.channels + c;
  }
  static A value(const void* of, int64_t at, A otherwise) {
    return of ? static_cast<const A*>(of)[at] : otherwise;
  }
  // Where a channel's affine values, and its slope, begin, and how far those of its samples are apart. (What they
  // repeat after is a multiple of the samples of a group.)
  struct Places {
    int64_t first, step, slope, slope_step;
  };
  Places places(int64_t c) const {
    const int64_t first = place(0, c), at = in.period ? first % in.period : first;
    if (!per_sample) return {at, 0, at, 0};
    return in.grouped ? Places{at, 1, at, 1} : Places{at, in.channels, c, 0};
  }
  [[gnu::always_inline]] Affine<A> affine(const Places& p, int64_t n) const {
    const int64_t at = p.first + n * p.step;
    return {value(in.weight, at, 1), value(in.bias, at, 0), value(in.h_weight, at, 0),
            value(in.h_bias, at, 0), value(in.slope, p.slope + n * p.slope_step, 1)};
  }
  // Of neighbouring ones, n of a vector.
  [[gnu::always_inline]] Affine<V> affine_vector(int64_t at, int64_t n) const {
    const auto values = [&](const void* of, A otherwise) {
      if (!of) return V{} + otherwise;
      const A* from = static_cast<const A*>(of) + at;
      return n < kLanesOf<A> ? load_partial(from, n) : load(from);
    };
    return {values(in.weight, 1), values(in.bias, 0), values(in.h_weight, 0), values(in.h_bias, 0),
            values(in.slope, 1)};
  }
  // Coefficients [Op::kCoefs][stride] of a channel's samples, where their affine values are neighbours (grouped).
  template <class Op, int kCount>
  void table(int64_t c, A* k, int64_t stride) const {
    const Channel<V> channel = vectors(channels[c]);
    const int64_t first = places(c).first;
    for (int64_t n = 0; n < in.samples; n += kLanesOf<A>) {
      const int64_t count = min(kLanesOf<A>, in.samples - n);
      V values[Op::kCoefs];
      Op::coefs(channel, affine_vector(first + n, count), values, 1);
      for (int j = 0; j < kCount; ++j) {
        if (count < kLanesOf<A>)
          store_partial(k + j * stride + n, values[j], count);
        else
          store(k + j * stride + n, values[j]);
      }
    }
  }
  void put(void* to, int64_t at, double value) const {
    if (to) static_cast<A*>(to)[at] = A(value);
  }
  // The first value of a channel of a sample, where such a line is.
  int64_t line(int64_t n, int64_t c) const {
    return (in.grouped ? c * in.samples + n : n * in.channels + c) * in.plane;
  }

  static bool aligned(const T* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }
  template <bool kStream>
  static void write(T* p, V v) {
    if constexpr (kStream)
      stream(p, v);
    else
      store(p, v);
  }

  // A channel in double, value by value.
  Moment moment_again(int64_t c) const {
    const int64_t own = in.channels / in.instances, wide = in.grouped ? in.samples : 1;
    const int64_t step = in.channels_last ? own * wide : 1;
    const auto each = [&](auto f) {
      for (int64_t n = 0; n < in.samples; ++n) {
        int64_t first = line(n, c);
        if (in.channels_last && in.grouped) first = (c / own * own * in.plane + c % own) * wide + n;
        if (in.channels_last && !in.grouped)
          first = n * in.channels * in.plane + c / own * own * in.plane + c % own;
        for (int64_t s = 0; s < in.plane; ++s) f(double(widen(inputs[0][first + s * step])));
      }
    };
    double total = 0, sum = 0, squares = 0;
    each([&](double x) { total += x; });
    const double mean = total / double(count());
    each([&](double x) {
      sum += x - mean;
      squares += (x - mean) * (x - mean);
    });
    Moment m = Moment::of(double(count()), mean, sum, squares);
    if (mean - mean != 0) m.mean = mean;  // infinite, as a mean
    return m;
  }

  void settle_forward(int64_t c, Moment m) const {
    if (!(m.squares - m.squares == 0) || !(A(m.squares) - A(m.squares) == 0)) m = moment_again(c);
    A* stats = static_cast<A*>(in.stats);
    const double var = m.squares / m.count;
    stats[c] = A(m.mean);
    stats[in.channels + c] = A(1 / std::sqrt(var + in.eps));
    stats[2 * in.channels + c] = A(m.squares / (m.count - 1));
    take_stats(c);
  }
  void take_stats(int64_t c) const {
    const A* stats = static_cast<const A*>(in.stats);
    channels[c] = {stats[c], stats[in.channels + c], {}};
  }

  // The order's sums of each of the affine values, `step` apart, and a value's own `apart`. What is a factor of w, in
  // place of r w, is scaled here.
  template <bool kPrelu>
  void settle(int64_t c, const double* sums, int64_t step, int64_t apart, Backward<T, kPrelu>*) const {
    Channel<A>& channel = channels[c];
    const Places own = places(c);
    const int64_t first = place(0, c);
    const double r = channel.r, M = double(count());
    double a = 0, aw = 0, slope = 0;
    for (int64_t n = 0; n < affines(); ++n, sums += step) {
      const int64_t at = first + n * own.step;
      const double gamma = affine(own, n).gamma;
      a += gamma * sums[0];
      aw += gamma * sums[apart];
      put(in.grad_weight, at, r * sums[apart]);
      put(in.grad_bias, at, sums[0]);
      if constexpr (kPrelu) {
        slope = in.grouped ? sums[2 * apart] : slope + sums[2 * apart];
        put(in.grad_slope, in.grouped ? at : c, slope);
      }
    }
    if (!in.training) return;
    channel.term[0] = A(-r * r * r * (aw / M));
    channel.term[1] = A(-r * (a / M));
  }
  void settle(int64_t c, const double* sums, int64_t step, int64_t apart, DoubleBackward<T>*) const {
    Channel<A>& channel = channels[c];
    const Places own = places(c);
    const double r = channel.r, M = double(count());
    double a = 0, aw = 0, h = 0, hw = 0, ha = 0, u = 0, uw = 0;
    for (int64_t n = 0; n < affines(); ++n) {
      const double* s = sums + n * step;
      const Affine<A> f = affine(own, n);
      a += f.gamma * s[0];
      aw += f.gamma * s[apart];
      h += s[2 * apart];
      hw += s[3 * apart];
      ha += f.gamma * s[4 * apart];
      u += f.h_gamma * s[0];
      uw += f.h_gamma * s[apart];
    }
    // Means, and those of r w; in evaluation, where these are of constants, nothing, also where a sum is infinite.
    const auto means = [&](double scale, auto&... sums) { ((sums = in.training ? sums * scale : 0), ...); };
    means(1 / M, a, h, ha, u);
    means(r / M, aw, hw, uw);
    const double K = ha - h * a - hw * aw;
    u -= r * (hw * a + aw * h);
    uw -= 2 * r * hw * aw;
    channel.term[0] = A(-r * hw);
    channel.term[1] = A(-h);
    channel.term[2] = A(-r * r * aw);
    channel.term[3] = A(-r * r * (uw + r * K));
    channel.term[4] = A(-r * u);
    for (int64_t n = 0; n < affines(); ++n) {
      const double* s = sums + n * step;
      const double of_constants = in.training ? h * s[0] + hw * r * s[apart] : 0;
      put(in.grad_weight, place(n, c), r * (s[4 * apart] - of_constants));
    }
  }
};

// ---- planes --------------------------------------------------------------------------------------------

// A block is a channel. It is cut in units: segments of the lines of its samples; a part is a range of units,
// of whole samples where these have affine values of their own.
template <class T>
struct Planes : Problem<T> {
  using P = Problem<T>;
  using P::L, P::in, P::inputs, P::outputs, P::per_sample;
  using typename P::A;
  using typename P::Places;
  using typename P::V;
  static constexpr int kUnroll = 2;

  int64_t segments, parts;

  Planes(const BatchNormAct& b, Channel<A>* c, const void* out, const void* out1) : P(b, c, out, out1) {
    segments = ceil_div(in.plane, kSegment);
    parts = 1;
    if (in.channels < kManyChannels && P::values() > kSerialValues)
      parts = min(ceil_div(kManyChannels, in.channels), per_sample ? in.samples : in.samples * segments);
  }
  int64_t blocks() const { return in.channels; }
  static bool one_by_one(int64_t) { return false; }  // parts are for the threads
  int64_t slots() const { return per_sample ? in.samples : parts; }
  int64_t partial_size(int sums) const { return slots() * sums; }

  struct Unit {
    int64_t n, segment, offset, length;
  };
  [[gnu::always_inline]] Unit unit(int64_t c, int64_t u) const {
    if (segments == 1) return {u, 0, P::line(u, c), in.plane};
    const int64_t n = u / segments, segment = u % segments, begin = segment * kSegment;
    return {n, segment, P::line(n, c) + begin, min(kSegment, in.plane - begin)};
  }
  int64_t first_unit(int64_t part) const {
    return per_sample ? in.samples * part / parts * segments : in.samples * segments * part / parts;
  }
  template <class Op, int kCount>
  [[gnu::always_inline]] void coefs(int64_t c, const Places& own, int64_t n, V* k) const {
    A values[Op::kCoefs];
    Op::coefs(P::channels[c], P::affine(own, n), values, 1);
    for (int i = 0; i < kCount; ++i) k[i] = broadcast<A>(values[i]);
  }

  // `fill` stands behind the end of the first input, zeros behind the others'.
  template <class Op>
  [[gnu::always_inline]] void reduce_line(int64_t offset, int64_t length, const V* k, V fill,
                                          V (*sums)[Op::kSums]) const {
    const Gate<A> gate = P::gate;
    const int64_t end = offset + length;
    int64_t i = offset;
    for (; i + kUnroll * L <= end; i += kUnroll * L)
#pragma GCC unroll 4
      for (int u = 0; u < kUnroll; ++u) {
        V v[Op::kIn];
        for (int j = 0; j < Op::kIn; ++j) v[j] = load(inputs[j] + i + u * L);
        Op::reduce(k, v, gate, sums[u]);
      }
    for (; i < end; i += L) {
      const int64_t n = end - i;
      V v[Op::kIn];
      for (int j = 0; j < Op::kIn; ++j) v[j] = n < L ? load_partial(inputs[j] + i, n) : load(inputs[j] + i);
      if (n < L)
        for (int l = int(n); l < L; ++l) v[0][l] = fill[l];
      Op::reduce(k, v, gate, sums[0]);
    }
  }

  // Adds vectors of sums to `to` in double, and makes them zero.
  template <int kSums>
  static void flush(V (*sums)[kSums], double* to) {
    for (int i = 0; i < kSums; ++i) {
      V total = sums[0][i];
      for (int u = 1; u < kUnroll; ++u) total += sums[u][i];
      to[i] += double(sum<A>(total));
      for (int u = 0; u < kUnroll; ++u) sums[u][i] = V{};
    }
  }

  void moments(int64_t c, int64_t part, double* partial) const {
    Moment total{};
    V sums[kUnroll][2] = {};
    A about = 0;
    int64_t count = 0;
    // A group's lines are one line.
    const int64_t first = first_unit(part), last = first_unit(part + 1);
    const int64_t values = (last - first) / segments * in.plane, origin = P::line(first / segments, c);
    const int64_t begin = in.grouped ? 0 : first, end = in.grouped ? ceil_div(values, kSegment) : last;
    for (int64_t u = begin; u < end; ++u) {
      const Unit at =
          in.grouped ? Unit{0, 0, origin + u * kSegment, min(kSegment, values - u * kSegment)} : unit(c, u);
      if (u == begin) {
        about = widen(inputs[0][at.offset]);
        const V k = broadcast<A>(about);
        double s[2] = {};
        reduce_line<Moments<T>>(at.offset, at.length, &k, k, sums);
        flush<2>(sums, s);
        about = A(about + s[0] / double(at.length));
      }
      const V k = broadcast<A>(about);
      reduce_line<Moments<T>>(at.offset, at.length, &k, k, sums);
      count += at.length;
      if (count >= kSegment || u == begin || u == end - 1) {
        double s[2] = {};
        flush<2>(sums, s);
        total.add(Moment::of(double(count), about, s[0], s[1]));
        about = A(total.mean);
        count = 0;
      }
    }
    std::memcpy(partial + 3 * part, &total, sizeof total);
  }
  void settle_moments(int64_t c, const double* partial) const {
    Moment total{};
    for (int64_t p = 0; p < parts; ++p) {
      Moment m;
      std::memcpy(&m, partial + 3 * p, sizeof m);
      total.add(m);
    }
    P::settle_forward(c, total);
  }

  template <class Op>
  void reduce(int64_t c, int64_t part, double* partial) const {
    V k[Op::kRead], sums[kUnroll][Op::kSums] = {};
    const Places own = P::places(c);
    int64_t count = 0;
    const int64_t begin = first_unit(part), end = first_unit(part + 1);
    for (int64_t u = begin; u < end; ++u) {
      const Unit at = unit(c, u);
      if (u == begin || (per_sample && at.segment == 0)) coefs<Op, Op::kRead>(c, own, at.n, k);
      reduce_line<Op>(at.offset, at.length, k, V{}, sums);
      count += at.length;
      const bool complete = u == end - 1 || (per_sample && at.segment == segments - 1);
      if (count >= kSegment || complete) {
        flush<Op::kSums>(sums, partial + (per_sample ? at.n : part) * Op::kSums);
        count = 0;
      }
    }
  }
  template <class Op>
  void settle(int64_t c, double* partial) const {
    if (!per_sample)
      for (int64_t p = 1; p < parts; ++p)
        for (int i = 0; i < Op::kSums; ++i) partial[i] += partial[p * Op::kSums + i];
    P::settle(c, partial, Op::kSums, 1, static_cast<Op*>(nullptr));
  }

  template <class Op, bool kStream>
  [[gnu::always_inline]] void apply_line(int64_t offset, int64_t length, const V* k) const {
    // Copies: the compiler would read members again after every store.
    const Gate<A> gate = P::gate;
    const T* from[Op::kIn];
    T* to[Op::kOut];
    for (int j = 0; j < Op::kIn; ++j) from[j] = inputs[j];
    for (int j = 0; j < Op::kOut; ++j) to[j] = outputs[j];
    const int64_t end = offset + length;
    int64_t i = offset;
    for (; i + L <= end; i += L) {
      V v[Op::kIn], out[Op::kOut];
      for (int j = 0; j < Op::kIn; ++j) v[j] = load(from[j] + i);
      Op::apply(k, v, gate, out);
      for (int j = 0; j < Op::kOut; ++j)
        if (to[j]) P::template write<kStream>(to[j] + i, out[j]);
    }
    if (i < end) {
      V v[Op::kIn], out[Op::kOut];
      for (int j = 0; j < Op::kIn; ++j) v[j] = load_partial(from[j] + i, end - i);
      Op::apply(k, v, gate, out);
      for (int j = 0; j < Op::kOut; ++j)
        if (to[j]) store_partial(to[j] + i, out[j], end - i);
    }
  }
  // Whether results go past the caches, where all lines begin at a vector.
  template <class Op>
  bool past() const {
    return P::streams && in.plane * int64_t(sizeof(T)) % kVectorBytes == 0 && P::aligned(outputs[0]) &&
           (Op::kOut < 2 || P::aligned(outputs[Op::kOut - 1]));
  }
  template <class Op, bool kStream>
  void apply_units(int64_t c, int64_t begin, int64_t end) const {
    V k[Op::kCoefs];
    const Places own = P::places(c);
    for (int64_t u = begin; u < end; ++u) {
      const Unit at = unit(c, u);
      if (u == begin || (per_sample && at.segment == 0)) coefs<Op, Op::kCoefs>(c, own, at.n, k);
      apply_line<Op, kStream>(at.offset, at.length, k);
    }
    if (kStream) stream_fence();
  }
  template <class Op>
  void apply(int64_t c, int64_t part) const {
    if (past<Op>())
      apply_units<Op, true>(c, first_unit(part), first_unit(part + 1));
    else
      apply_units<Op, false>(c, first_unit(part), first_unit(part + 1));
  }
};

// ---- lines ---------------------------------------------------------------------------------------------

// Channels of which each is one line of neighbouring values: of one sample, or of a group, whose planes are short. A
// block is a range of channels.
template <class T>
struct Lines : Planes<T> {
  using P = Problem<T>;
  using Base = Planes<T>;
  using P::in, P::inputs, P::outputs;
  using typename P::A;
  using typename P::V;

  int64_t count, pieces,
      length;  // a channel's values; its pieces with affine values of their own, and theirs
  int64_t lines;

  Lines(const BatchNormAct& b, Channel<A>* c, const void* out, const void* out1, int tensors)
      : Base(b, c, out, out1), count(P::count()), pieces(P::affines()), length(count / pieces) {
    Base::parts = 1;
    const int64_t fits = kCacheBytes / (count * tensors * int64_t(sizeof(T)));
    lines = max(1, min(kBlockLines, min(fits, in.channels / kManyChannels)));
  }
  static bool fit(const BatchNormAct& b) {
    return !b.channels_last && (b.samples == 1 || b.grouped) && b.plane <= kLineValues &&
           (b.channels >= kManyChannels || b.channels * b.samples * b.plane <= kSerialValues);
  }
  int64_t blocks() const { return ceil_div(in.channels, lines); }
  int64_t partial_size(int sums) const { return sums * lines * pieces; }
  template <class F>
  void each(int64_t b, const F& f) const {
    const int64_t first = b * lines, number = min(lines, in.channels - first);
    for (int64_t l = 0; l < number; ++l) f(l, first + l);
  }
  // f(line, piece, where it begins, its coefficients)
  template <class Op, int kCount, class F>
  void each_piece(int64_t b, const F& f) const {
    if (pieces == 1) {
      each(b, [&](int64_t l, int64_t c) {
        V k[Op::kCoefs];
        Base::template coefs<Op, kCount>(c, P::places(c), 0, k);
        f(l, 0, c * count, k);
      });
      return;
    }
    Zeros<A> table(kCount * pieces);
    each(b, [&](int64_t l, int64_t c) {
      P::template table<Op, kCount>(c, table.at, pieces);
      for (int64_t i = 0, offset = c * count; i < pieces; ++i, offset += length) {
        V k[Op::kCoefs];
        for (int j = 0; j < kCount; ++j) k[j] = broadcast<A>(table.at[j * pieces + i]);
        f(l, i, offset, k);
      }
    });
  }

  template <class Op>
  [[gnu::always_inline]] void sums_of(int64_t offset, int64_t values, const V* k, V fill, A* to) const {
    V sums[Base::kUnroll][Op::kSums] = {};
    Base::template reduce_line<Op>(offset, values, k, fill, sums);
    for (int i = 0; i < Op::kSums; i += 2) {
      const int other = min(i + 1, Op::kSums - 1);
      sum_both<A>(sums[0][i] + sums[1][i], sums[0][other] + sums[1][other], to[i], to[other]);
    }
  }

  // Partial: what the values are taken about, their sum, the sum of their squares.
  void moments(int64_t b, int64_t, double* partial) const {
    const double inverse = 1 / double(count);
    each(b, [&](int64_t l, int64_t c) {
      double* to = partial + l;
      if (count > kSegment) {
        double m[3];
        Base::moments(c, 0, m);
        to[0] = m[1], to[lines] = 0, to[2 * lines] = m[2];
        return;
      }
      A s[2], about = widen(inputs[0][c * count]);
      V k = broadcast<A>(about);
      sums_of<Moments<T>>(c * count, count, &k, k, s);
      about = A(about + s[0] * inverse);
      k = broadcast<A>(about);
      sums_of<Moments<T>>(c * count, count, &k, k, s);
      to[0] = about, to[lines] = s[0], to[2 * lines] = s[1];
    });
  }
  void settle_moments(int64_t b, const double* partial) const {
    const double all = double(count), inverse = 1 / all, eps = in.eps;
    const int64_t first = b * lines, n = min(lines, in.channels - first);
    const double *about = partial, *sum = partial + lines, *square_sum = partial + 2 * lines;
    A* mean = static_cast<A*>(in.stats) + first;
    A *r = mean + in.channels, *unbiased = r + in.channels;
    int64_t bad = 0;
    for (int64_t l = 0; l < n; ++l) {
      const double more = sum[l] * inverse, rest = square_sum[l] - sum[l] * more,
                   squares = rest < 0 ? 0 : rest;
      mean[l] = A(about[l] + more);
      r[l] = A(1 / std::sqrt(squares * inverse + eps));
      unbiased[l] = A(squares / (all - 1));
      bad += !(A(squares) - A(squares) == 0);
    }
    each(b, [&](int64_t l, int64_t c) {
      if (bad)
        P::settle_forward(c, Moment::of(all, about[l], sum[l], square_sum[l]));
      else
        P::take_stats(c);
    });
  }

  // Partial: of each line, [kSums][pieces].
  template <class Op>
  void reduce(int64_t b, int64_t, double* partial) const {
    each_piece<Op, Op::kRead>(b, [&](int64_t l, int64_t i, int64_t offset, const V* k) {
      A s[Op::kSums];
      sums_of<Op>(offset, length, k, V{}, s);
      for (int j = 0; j < Op::kSums; ++j) partial[(l * Op::kSums + j) * pieces + i] = s[j];
    });
  }
  template <class Op>
  void settle(int64_t b, double* partial) const {
    each(b, [&](int64_t l, int64_t c) {
      P::settle(c, partial + l * Op::kSums * pieces, 1, pieces, static_cast<Op*>(nullptr));
    });
  }

  template <class Op, bool kStream>
  void apply_block(int64_t b) const {
    each_piece<Op, Op::kCoefs>(b, [&](int64_t, int64_t, int64_t offset, const V* k) {
      Base::template apply_line<Op, kStream>(offset, length, k);
    });
    if (kStream) stream_fence();
  }
  template <class Op>
  void apply(int64_t b, int64_t) const {
    if (Base::template past<Op>())
      apply_block<Op, true>(b);
    else
      apply_block<Op, false>(b);
  }
};

// ---- rows ----------------------------------------------------------------------------------------------

// x as [rows, columns], `width` neighbouring columns a channel; of several instances, one such matrix behind
// the other. A block is a range of an instance's channels, a part a range of rows, of whole samples where these
// have affine values of their own. Grouped, a channel's columns are its samples.
template <class T>
struct Rows : Problem<T> {
  using P = Problem<T>;
  using P::L, P::in, P::inputs, P::outputs;
  using typename P::A;
  using typename P::Places;
  using typename P::V;

  const bool per_sample, per_column;  // affine values are of a sample's rows, or of a column
  int64_t rows, columns, width, sample_rows, own_channels, block_channels, parts;

  Rows(const BatchNormAct& b, Channel<A>* c, const void* out, const void* out1, int tensors)
      : P(b, c, out, out1), per_sample(P::per_sample && !b.grouped), per_column(P::per_sample && b.grouped) {
    sample_rows = in.channels_last ? in.plane : 1;
    width = in.grouped ? in.samples : in.channels_last ? 1 : in.plane;
    rows = in.grouped ? sample_rows : in.samples * sample_rows;
    own_channels = in.channels / in.instances;
    columns = own_channels * width;
    const int64_t bytes = tensors * int64_t(sizeof(T));
    // Blocks of whole cache lines, at least two of them, where that makes them fit into the cache.
    const int64_t least = max(1, 128 / (int64_t(sizeof(T)) * width));
    const int64_t fits = kCacheBytes / (rows * width * bytes);
    const int64_t most = max(1, min(kColumns / width, own_channels));
    parts = 1;
    block_channels = most;
    if (fits >= least && in.instances == 1) {
      block_channels = min(most, fits / least * least);
      // Enough blocks for the threads.
      while (block_channels >= 2 * least && in.channels < block_channels * kManyChannels) block_channels /= 2;
      // Or parts, of a few wide ones.
      if (in.grouped && P::values() > kSerialValues)
        parts = min(ceil_div(kManyChannels, blocks()), ceil_div(rows, kFlushRows / 8));
    } else {
      const int64_t block_bytes = rows * block_channels * width * bytes;
      parts = min(min(block_bytes / kPartBytes, rows / kPartRows), kMaxParts);
      if (per_sample) parts = min(parts, in.samples);
      parts = max(parts, 1);
      if (in.instances > 1 && P::values() > kSerialValues) {
        parts = max(parts, min(ceil_div(kManyChannels, blocks()), rows / kPartRows));
        while (block_channels >= 2 * least && parts * blocks() < kManyChannels) block_channels /= 2;
      }
    }
  }
  int64_t blocks() const { return in.instances * ceil_div(own_channels, block_channels); }
  // A sample is swept twice while the last level of cache may have it, where there are samples for all threads.
  bool one_by_one(int64_t threads) const {
    return in.instances > 1 && parts * kPartBytes <= kSampleBytes &&
           (blocks() % threads == 0 || blocks() >= 4 * threads);
  }
  int64_t slots() const { return per_sample ? in.samples : parts; }
  int64_t padded() const { return ceil_div(block_channels * width, L) * L; }
  int64_t partial_size(int sums) const { return max(slots(), parts) * sums * padded(); }

  struct Block {
    int64_t channel, channels, column, columns;  // the column as its distance from the first value of all
  };
  Block block(int64_t b) const {
    const int64_t each = ceil_div(own_channels, block_channels), instance = b / each;
    const int64_t first = b % each * block_channels, count = min(block_channels, own_channels - first);
    return {instance * own_channels + first, count, instance * rows * columns + first * width, count * width};
  }
  int64_t first_row(int64_t part) const {
    return per_sample ? in.samples * part / parts * sample_rows : rows * part / parts;
  }
  template <class Op>
  void coefs(const Block& at, int64_t n, A* k) const {
    const int64_t stride = padded();
    for (int64_t c = 0; c < at.channels; ++c) {
      if (per_column) {
        P::template table<Op, Op::kCoefs>(at.channel + c, k + c * width, stride);
        continue;
      }
      A values[Op::kCoefs];
      Op::coefs(P::channels[at.channel + c], P::affine(P::places(at.channel + c), n), values, 1);
      for (int j = 0; j < Op::kCoefs; ++j)
        for (int64_t l = 0; l < width; ++l) k[j * stride + c * width + l] = values[j];
    }
  }

  // Adds rows to the sums [kSums][padded()], in the order in which they lie in memory: that is what the
  // processor prefetches. (Several rows at a time, with the sums in registers, are slower beyond the caches.)
  // In a block of few columns each row would wait for the one before to be stored: there, and where there are few
  // rows, the rows are the inner loop, and the sums stay in registers.
  template <class Op, int kCoefs>
  void reduce_range(const Block& at, int64_t row, int64_t end, const A* k, A* sums) const {
    // Copies: the compiler would read members again after every store.
    const int64_t stride = padded(), count = at.columns;
    const Gate<A> gate = P::gate;
    // As many columns at a time as hide that an addition waits for the one before, and have registers.
    constexpr int kWide = kCoefs + Op::kSums <= 3 ? 4 : 2;
    if (count <= (kWide == 4 ? 4 : 1) * kFewVectors * L || few()) {
      int64_t i = 0;
      for (; i + kWide * L <= count; i += kWide * L)
        reduce_column<Op, kCoefs, kWide>(at, row, end, k, sums, i);
      for (; i < count; i += L) reduce_column<Op, kCoefs, 1>(at, row, end, k, sums, i);
      return;
    }
    for (; row < end; ++row) {
      const T* from[Op::kIn];
      for (int j = 0; j < Op::kIn; ++j) from[j] = inputs[j] + row * columns + at.column;
      for (int64_t i = 0; i < count; i += L) {
        const int64_t n = count - i;
        V c[kCoefs], s[Op::kSums], v[Op::kIn];
        for (int j = 0; j < kCoefs; ++j) c[j] = load(k + j * stride + i);
        for (int j = 0; j < Op::kSums; ++j) s[j] = load(sums + j * stride + i);
        for (int j = 0; j < Op::kIn; ++j) v[j] = n < L ? load_partial(from[j] + i, n) : load(from[j] + i);
        Op::reduce(c, v, gate, s);
        for (int j = 0; j < Op::kSums; ++j) store(sums + j * stride + i, s[j]);
      }
    }
  }

  // The same for kWide vectors of columns from i on, the last of which may be partly outside.
  template <class Op, int kCoefs, int kWide>
  void reduce_column(const Block& at, int64_t row, int64_t end, const A* k, A* sums, int64_t i) const {
    const int64_t stride = padded(), step = columns, n = at.columns - i;
    const Gate<A> gate = P::gate;
    V c[kWide][kCoefs], s[kWide][Op::kSums];
    for (int u = 0; u < kWide; ++u) {
      for (int j = 0; j < kCoefs; ++j) c[u][j] = load(k + j * stride + i + u * L);
      for (int j = 0; j < Op::kSums; ++j) s[u][j] = load(sums + j * stride + i + u * L);
    }
    const T* from[Op::kIn];
    for (int j = 0; j < Op::kIn; ++j) from[j] = inputs[j] + row * step + at.column + i;
    for (; row < end; ++row) {
      for (int u = 0; u < kWide; ++u) {
        V v[Op::kIn];
        for (int j = 0; j < Op::kIn; ++j) v[j] = n < L ? load_partial(from[j], n) : load(from[j] + u * L);
        Op::reduce(c[u], v, gate, s[u]);
      }
      for (int j = 0; j < Op::kIn; ++j) from[j] += step;
    }
    for (int u = 0; u < kWide; ++u)
      for (int j = 0; j < Op::kSums; ++j) store(sums + j * stride + i + u * L, s[u][j]);
  }

  // f(p[0]) + ... + f(p[width - 1]); as many sums at a time as a vector has lanes, since each addition waits
  // for the one before it.
  template <class F>
  double over_width(const double* p, const F& f) const {
    constexpr int64_t kLanes = 8;
    double lanes[kLanes] = {};
    int64_t i = 0;
    for (; i + kLanes <= width; i += kLanes)
      for (int64_t l = 0; l < kLanes; ++l) lanes[l] += f(p + i + l);
    double total = 0;
    if (i > 0)
      total =
          ((lanes[0] + lanes[4]) + (lanes[1] + lanes[5])) + ((lanes[2] + lanes[6]) + (lanes[3] + lanes[7]));
    for (; i < width; ++i) total += f(p + i);
    return total;
  }

  // Few values of each channel, in the cache: their sums are not taken apart by columns.
  bool few() const { return parts == 1 && rows <= kFlushRows && rows * width <= kSegment; }
  A sum_width(const A* p) const {
    V all{};
    int64_t i = 0;
    for (; i + L <= width; i += L) all += load(p + i);
    A total = width < L ? 0 : sum<A>(all);
    for (; i < width; ++i) total += p[i];
    return total;
  }
  // Partial: of each channel what the values are taken about, their sum, the sum of their squares.
  void few_moments(const Block& at, double* partial) const {
    const int64_t stride = padded();
    Zeros<A> memory(3 * stride);
    A *about = memory.at, *sums = about + stride;
    const auto about_channel = [&](int64_t c, A value) {
      for (int64_t i = 0; i < width; ++i) about[c * width + i] = value;
    };
    for (int64_t c = 0; c < at.channels; ++c) about_channel(c, widen(inputs[0][at.column + c * width]));
    reduce_range<Moments<T>, 1>(at, 0, rows, about, sums);
    const double inverse = 1 / double(P::count());
    for (int64_t c = 0; c < at.channels; ++c)
      about_channel(c, A(about[c * width] + sum_width(sums + c * width) * inverse));
    std::memset(sums, 0, size_t(2 * stride) * sizeof(A));
    reduce_range<Moments<T>, 1>(at, 0, rows, about, sums);
    for (int64_t c = 0; c < at.channels; ++c) {
      partial[c] = about[c * width];
      partial[stride + c] = sum_width(sums + c * width);
      partial[2 * stride + c] = sum_width(sums + stride + c * width);
    }
  }

  // Partial: count, mean and squares, of each column.
  void moments(int64_t b, int64_t part, double* partial) const {
    const Block at = block(b);
    if (few()) return few_moments(at, partial);
    const int64_t stride = padded(), begin = first_row(part), end = first_row(part + 1);
    Zeros<A> memory(3 * stride);
    A *about = memory.at, *sums = about + stride;
    double* total = partial + part * 3 * stride;
    for (int64_t i = 0; i < at.columns; ++i) about[i] = widen(inputs[0][begin * columns + at.column + i]);
    for (int64_t i = 0; i < 3 * stride; ++i) total[i] = 0;
    const int64_t first = min(end, begin + kFlushRows);
    reduce_range<Moments<T>, 1>(at, begin, first, about, sums);
    for (int64_t i = 0; i < at.columns; ++i) about[i] = A(about[i] + sums[i] / double(first - begin));
    double *mean = total + stride, *squares = mean + stride;
    for (int64_t row = begin; row < end; row += kFlushRows) {
      const int64_t last = min(end, row + kFlushRows);
      std::memset(sums, 0, size_t(2 * stride) * sizeof(A));
      reduce_range<Moments<T>, 1>(at, row, last, about, sums);
      // Moment::of and Moment::add; the numbers of values are the same for all columns.
      const double n = double(last - row), all = double(last - begin), share = n / all;
      const double inverse = 1 / n, weight = double(row - begin) * share;
      for (int64_t i = 0; i < at.columns; ++i) {
        const double more = sums[i] * inverse, rest = sums[stride + i] - sums[i] * more;
        const double apart = about[i] + more - mean[i];
        squares[i] += (rest < 0 ? 0 : rest) + apart * apart * weight;
        mean[i] += apart * share;
        about[i] = A(mean[i]);
      }
    }
    for (int64_t i = 0; i < at.columns; ++i) total[i] = double(end - begin);
  }
  void settle_moments(int64_t b, const double* partial) const {
    const Block at = block(b);
    const int64_t stride = padded();
    const double count = double(P::count());
    for (int64_t c = 0; c < at.channels; ++c) {
      if (few()) {
        P::settle_forward(at.channel + c,
                          Moment::of(count, partial[c], partial[stride + c], partial[2 * stride + c]));
        continue;
      }
      double mean = 0, squares = 0;
      const double *first = partial + c * width, *end = first + parts * 3 * stride;
      for (const double* m = first; m < end; m += 3 * stride)
        mean += over_width(m, [=](const double* v) { return v[0] * v[stride]; });
      mean /= count;
      for (const double* m = first; m < end; m += 3 * stride)
        squares += over_width(m, [=](const double* v) {
          const double apart = v[stride] - mean;
          return v[2 * stride] + v[0] * (apart * apart);
        });
      P::settle_forward(at.channel + c, {count, mean, squares});
    }
  }

  template <class Op>
  void reduce(int64_t b, int64_t part, double* partial) const {
    const Block at = block(b);
    const int64_t stride = padded(), begin = first_row(part), end = first_row(part + 1);
    Zeros<A> memory((Op::kCoefs + Op::kSums) * stride);
    A *k = memory.at, *sums = k + Op::kCoefs * stride;
    for (int64_t row = begin; row < end;) {
      const int64_t n = row / sample_rows;
      int64_t last = min(end, row + kFlushRows);
      if (per_sample) last = min(last, (n + 1) * sample_rows);
      if (row == begin || (per_sample && row == n * sample_rows)) coefs<Op>(at, n, k);
      std::memset(sums, 0, size_t(Op::kSums * stride) * sizeof(A));
      reduce_range<Op, Op::kRead>(at, row, last, k, sums);
      double* to = partial + (per_sample ? n : part) * Op::kSums * stride;
      for (int64_t i = 0; i < Op::kSums * stride; ++i) to[i] += double(sums[i]);
      row = last;
    }
  }
  template <class Op>
  void settle(int64_t b, double* partial) const {
    const Block at = block(b);
    const int64_t stride = padded();
    if (!per_sample)
      for (int64_t slot = 1; slot < parts; ++slot)
        for (int64_t i = 0; i < Op::kSums * stride; ++i) partial[i] += partial[slot * Op::kSums * stride + i];
    const int64_t own = per_sample ? in.samples : 1;
    Zeros<double> sums(own * Op::kSums);
    for (int64_t c = 0; c < at.channels; ++c) {
      const double* from = partial + c * width;
      if (per_column) {
        P::settle(at.channel + c, from, 1, stride, static_cast<Op*>(nullptr));
        continue;
      }
      for (int64_t i = 0; i < own * Op::kSums; ++i)
        sums.at[i] = over_width(from + i * stride, [](const double* v) { return *v; });
      P::settle(at.channel + c, sums.at, Op::kSums, 1, static_cast<Op*>(nullptr));
    }
  }

  template <class Op, bool kStream>
  void apply_range(const Block& at, int64_t begin, int64_t end) const {
    Zeros<A> k(Op::kCoefs * padded());
    const int64_t stride = padded(), count = at.columns;
    const Gate<A> gate = P::gate;
    for (int64_t row = begin; row < end; ++row) {
      if (row == begin || (per_sample && row % sample_rows == 0)) coefs<Op>(at, row / sample_rows, k.at);
      const int64_t offset = row * columns + at.column;
      const T* from[Op::kIn];
      T* to[Op::kOut];
      for (int j = 0; j < Op::kIn; ++j) from[j] = inputs[j] + offset;
      for (int j = 0; j < Op::kOut; ++j) to[j] = outputs[j] ? outputs[j] + offset : nullptr;
      for (int64_t i = 0; i < count; i += L) {
        const int64_t n = count - i;
        V c[Op::kCoefs], v[Op::kIn], out[Op::kOut];
        for (int j = 0; j < Op::kCoefs; ++j) c[j] = load(k.at + j * stride + i);
        for (int j = 0; j < Op::kIn; ++j) v[j] = n < L ? load_partial(from[j] + i, n) : load(from[j] + i);
        Op::apply(c, v, gate, out);
        for (int j = 0; j < Op::kOut; ++j) {
          if (!to[j]) continue;
          if (n < L)
            store_partial(to[j] + i, out[j], n);
          else
            P::template write<kStream>(to[j] + i, out[j]);
        }
      }
    }
  }
  template <class Op>
  void apply(int64_t b, int64_t part) const {
    const Block at = block(b);
    bool past = P::streams && columns * int64_t(sizeof(T)) % kVectorBytes == 0 &&
                at.column * int64_t(sizeof(T)) % kVectorBytes == 0;
    for (int j = 0; j < Op::kOut; ++j) past = past && P::aligned(outputs[j]);
    if (past)
      apply_range<Op, true>(at, first_row(part), first_row(part + 1));
    else
      apply_range<Op, false>(at, first_row(part), first_row(part + 1));
    if (past) stream_fence();
  }
};

// ---- the orders ----------------------------------------------------------------------------------------

// reduce(block, part, partial), settle(block, partial) and apply(block, part) of all blocks: one after the
// other for a block of one part, or where the layout has blocks for the threads, else each for all blocks before the
// next begins.
template <class Layout, class Reduce, class Settle, class Apply>
void sweep(const Layout& layout, const Parallel& parallel, int sums, const Reduce& reduce,
           const Settle& settle, const Apply& apply) {
  const int64_t blocks = layout.blocks(), parts = layout.parts, size = layout.partial_size(sums);
  const int64_t grain = layout.values() < kSerialValues ? blocks * parts : 1;
  if (parts == 1 || layout.one_by_one(parallel.threads)) {
    parallel_for(parallel, blocks, grain, [&](int64_t begin, int64_t end) {
      Zeros<double> partial(size);
      for (int64_t b = begin; b < end; ++b) {
        if (b > begin) std::memset(partial.at, 0, size_t(size) * sizeof(double));
        for (int64_t part = 0; part < parts; ++part) reduce(b, part, partial.at);
        settle(b, partial.at);
        for (int64_t part = parts - 1; part >= 0; --part) apply(b, part);
      }
    });
    return;
  }
  Zeros<double> partial(blocks * size);
  parallel_for(parallel, blocks * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) reduce(i / parts, i % parts, partial.at + i / parts * size);
  });
  parallel_for(parallel, blocks, 1, [&](int64_t begin, int64_t end) {
    for (int64_t b = begin; b < end; ++b) settle(b, partial.at + b * size);
  });
  parallel_for(parallel, blocks * parts, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = end - 1; i >= begin; --i) apply(i / parts, i % parts);
  });
}

// f(layout) for the one that x has.
template <class T, class F>
void with_layout(const BatchNormAct& in, int tensors, void* out, void* out1, const F& f) {
  if (in.samples * in.channels * in.plane == 0) return;
  Zeros<Channel<Acc<T>>> channels(in.channels);
  if (Lines<T>::fit(in))
    f(Lines<T>(in, channels.at, out, out1, tensors));
  else if (in.channels_last || (in.plane < kShortPlane && !in.grouped))
    f(Rows<T>(in, channels.at, out, out1, tensors));
  else
    f(Planes<T>(in, channels.at, out, out1));
}

template <class T>
void forward(const BatchNormAct& in, const Parallel& parallel) {
  using A = Acc<T>;
  if (!in.training) {
    A* stats = static_cast<A*>(in.stats);
    for (int64_t c = 0; c < in.channels; ++c) {
      stats[c] = static_cast<const A*>(in.running_mean)[c];
      const A var = static_cast<const A*>(in.running_var)[c];
      stats[in.channels + c] = A(1 / std::sqrt(double(var) + in.eps));
      stats[2 * in.channels + c] = var;
    }
  }
  with_layout<T>(in, 1, in.y, nullptr, [&](const auto& layout) {
    const auto apply = [&](int64_t b, int64_t part) {
      if (in.slope)
        layout.template apply<Forward<T, true>>(b, part);
      else
        layout.template apply<Forward<T>>(b, part);
    };
    if (in.training) {
      sweep(
          layout, parallel, 3,
          [&](int64_t b, int64_t part, double* partial) { layout.moments(b, part, partial); },
          [&](int64_t b, double* partial) { layout.settle_moments(b, partial); }, apply);
    } else {
      for (int64_t c = 0; c < in.channels; ++c) layout.take_stats(c);
      sweep(layout, parallel, 0, [](int64_t, int64_t, double*) {}, [](int64_t, double*) {}, apply);
    }
  });
}

template <class T, class Op>
void differentiate(const BatchNormAct& in, const Parallel& parallel, void* out, void* out1) {
  const int64_t affines = in.channels * (in.per_sample ? in.samples : 1);
  const int64_t slopes = in.grouped ? affines : in.channels;
  if (in.samples * in.plane == 0)
    for (int64_t i = 0; i < 3; ++i)
      if (void* sums = i == 2 ? in.grad_slope : i ? in.grad_bias : in.grad_weight)
        std::memset(sums, 0, size_t(i == 2 ? slopes : affines) * sizeof(Acc<T>));
  with_layout<T>(in, Op::kIn, out, out1, [&](const auto& layout) {
    for (int64_t c = 0; c < in.channels; ++c) layout.take_stats(c);
    const bool sums = in.training || in.grad_weight || in.grad_bias || in.grad_slope;
    sweep(
        layout, parallel, sums ? Op::kSums : 0,
        [&](int64_t b, int64_t part, double* partial) {
          if (sums) layout.template reduce<Op>(b, part, partial);
        },
        [&](int64_t b, double* partial) {
          if (sums) layout.template settle<Op>(b, partial);
        },
        [&](int64_t b, int64_t part) { layout.template apply<Op>(b, part); });
  });
}

template <class T>
void backward(const BatchNormAct& in, const Parallel& parallel) {
  if (in.slope)
    differentiate<T, Backward<T, true>>(in, parallel, in.grad_x, nullptr);
  else
    differentiate<T, Backward<T>>(in, parallel, in.grad_x, nullptr);
}
template <class T>
void double_backward(const BatchNormAct& in, const Parallel& parallel) {
  differentiate<T, DoubleBackward<T>>(in, parallel, in.grad_grad, in.grad_x);
}

}  // namespace

extern const Orders<BatchNormAct> batch_norm_act = {
    GANKERN_EACH_DTYPE(forward),
    GANKERN_EACH_DTYPE(backward),
    GANKERN_EACH_DTYPE(double_backward),
};

}  // namespace GANKERN_ISA
}  // namespace gankern
