// Bias, activation, gain and clamp (activation.h has the table of activations):
//
//   y = clamp(f(x + b) gain, -clamp, clamp)
//   dx = m g gain f',  db = sum of dx over all but the channels,  m = 0 where |y| reaches the clamp, else 1
//
// Second order, for the gradients h of dx and k of db, with p = m (h + k): dg = p gain f', and
//   where f' is a function of z = x + b:    dx = p g gain df'/dz, db its sum as above
//   where it is one of a = y / gain:        dy = p g df'/da, which autograd takes back through the activation
// where f' is piecewise constant there is neither.
//
// PReLU has a slope a of each channel, and with q = m [z <= 0] gain: da = sum of q g z. For the gradient l of
// da, beside what stands above: dg += l q z, dx = l q g, db its sum, and da = sum of q g (h + k).
//
// Every order is one pass over memory: forward reads 1 tensor and writes 1, backward reads 2 and writes 1,
// double backward reads 3 and writes 1 or 2. Bound by memory: at 14 GB/s a core there are about 15 cycles a
// vector of 64 bytes, and the longest activation takes about as many instructions. Large results are written
// past the caches, which spares reading the lines that are overwritten.
//
// Two ways to go through memory, chosen by the layout:
//   rows      inner >= 64: a run of `inner` elements has one channel; runs are cut into segments, and each
//             segment's sum for db goes into a place of its own
//   patterns  else (channels last, small images): channels repeat with a short period. The period, made a
//             multiple of the vectors' length, is laid out as a pattern of biases, and of sums for db, one an
//             element; a task takes some periods
// Either way partial sums are added in an order that the shape alone decides.
#include "bias_act.h"

#include <cstring>

#include "common.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kLeastRow = 64;
constexpr int64_t kSegment = 16384;  // elements of a row at a time
constexpr int64_t kGrain = 32768;    // elements that are worth a thread
constexpr int64_t kPattern = 8192;   // elements of a pattern at most, where a short period is repeated
constexpr int64_t kBlock = 2048;     // and of a block of a longer one: its sums stay in the L1 cache
constexpr int64_t kMostChunks = 64;  // of periods

// The least value of the accumulation type that is stored as `clamp` or more.
inline double reaches(double, double clamp) { return clamp; }
inline float reaches(float, float clamp) { return clamp; }
template <class T>
inline float reaches(T, float clamp) {
  const T stored = narrow<T>(clamp);
  if (!(clamp > 0) || widen(stored) - widen(stored) != 0) return clamp;
  const float middle = (widen(T{uint16_t(stored.bits - 1)}) + widen(stored)) / 2;  // exact
  return narrow<T>(middle).bits == stored.bits ? middle : std::nextafter(middle, clamp);
}

// ---- vectors ----------------------------------------------------------------------------------------------

// A run of elements. What belongs to a channel, and the sums, stand one an element in patterns, `advance`
// being 1; or they are one vector for all, `advance` being 0.
template <class T>
struct Run {
  const T *x, *grad, *h;
  T *out, *out_x;
  const Acc<T>*bias, *h_bias, *slope, *h_slope;
  Acc<T>*total, *slope_total;
  int64_t advance;
};

template <class A>
struct Numbers {
  A negative_slope, gain, inverse_gain, clamp, reach;
};

// `count` elements, a multiple of the vectors' length.
template <class T, Activation kActivation, int kOrder, bool kStream>
void vectors(const Run<T>& run, const Numbers<Acc<T>>& numbers, int64_t count) {
  using A = Acc<T>;
  using V = Vec<A>;
  using F = Act<kActivation, A>;
  const auto put = [](T* to, V v) {
    if constexpr (kStream)
      stream(to, v);
    else
      store(to, v);
  };
  constexpr bool kSloped = kActivation == Activation::kPrelu;
  F f(numbers.negative_slope);
  const V gain = broadcast<A>(numbers.gain), inverse_gain = broadcast<A>(numbers.inverse_gain);
  const V clamp = broadcast<A>(numbers.clamp), reach = broadcast<A>(numbers.reach);
  for (int64_t e = 0, p = 0; e < count; e += kLanes<T>, p += kLanes<T> * run.advance) {
    const V s = load(run.x + e);
    if constexpr (kSloped) f.slope = load(run.slope + p);
    if constexpr (kOrder == kForward) {
      V y = f.value(s + load(run.bias + p)) * gain;
      y = y > clamp ? clamp : y;
      y = y < -clamp ? -clamp : y;
      put(run.out + e, y);
      continue;
    }
    const V z = F::kOfInput ? s + load(run.bias + p) : s * inverse_gain;
    const auto at_clamp = F::kOfInput ? abs(f.value(z) * gain) >= reach : abs(s) >= clamp;
    if constexpr (kOrder == kBackward) {
      const V g = load(run.grad + e) * gain;
      const V dx = at_clamp ? V{} : f.first(g, z);
      put(run.out + e, dx);
      if (run.total) store(run.total + p, load(run.total + p) + dx);
      if constexpr (kSloped)
        if (run.slope_total)
          store(run.slope_total + p, load(run.slope_total + p) + (at_clamp | (z > V{}) ? V{} : g * z));
    }
    if constexpr (kOrder == kDoubleBackward) {
      V h = load(run.h_bias + p);
      if (run.h) h += load(run.h + e);
      h = at_clamp ? V{} : h;
      if constexpr (kSloped) {
        const V l = at_clamp | (z > V{}) ? V{} : load(run.h_slope + p) * gain, g = load(run.grad + e);
        if (run.out) put(run.out + e, f.first(h * gain, z) + l * z);
        const V dx = l * g;
        if (run.out_x) put(run.out_x + e, dx);
        if (run.total) store(run.total + p, load(run.total + p) + dx);
        if (run.slope_total)
          store(run.slope_total + p, load(run.slope_total + p) + (z > V{} ? V{} : h * g * gain));
        continue;
      }
      if (run.out) put(run.out + e, f.first(h * gain, z));
      if (run.out_x) {
        const V q = h * load(run.grad + e);
        const V dx = f.second(F::kOfInput ? q * gain : q, z);
        put(run.out_x + e, dx);
        if (run.total) store(run.total + p, load(run.total + p) + dx);
      }
    }
  }
}

// ---- the way through memory -------------------------------------------------------------------------------

template <class T>
struct Sweep {
  using A = Acc<T>;
  using Vectors = void (*)(const Run<T>&, const Numbers<A>&, int64_t);
  static constexpr int L = kLanes<T>;

  const BiasAct& in;
  const Vectors to_cache, past_cache;
  const Layout layout;
  const T *bias, *h_bias, *slope, *h_slope;
  const bool sums, slope_sums, streams;
  Numbers<A> numbers;

  Sweep(const BiasAct& problem, Vectors usual, Vectors streaming)
      : in(problem),
        to_cache(usual),
        past_cache(streaming),
        layout(flat(problem)),
        bias(static_cast<const T*>(in.bias)),
        h_bias(static_cast<const T*>(in.h_bias)),
        slope(static_cast<const T*>(in.slope)),
        h_slope(static_cast<const T*>(in.h_slope)),
        sums(in.out_bias != nullptr),
        slope_sums(in.out_slope != nullptr),
        // In place, the lines are in the cache already.
        streams(layout.size() * int64_t(sizeof(T)) >= kStreamBytes && in.out != in.x) {
    numbers.negative_slope = A(in.negative_slope);
    numbers.gain = A(in.gain);
    // A gain of 0 makes results and gradients 0, whatever a is taken for.
    numbers.inverse_gain = in.gain == 0 ? A(0) : A(1) / A(in.gain);
    // NaN for none: no comparison with it holds.
    const A clamp = widen(narrow<T>(A(in.clamp)));
    numbers.clamp = clamp - clamp == 0 ? clamp : A(NAN);
    numbers.reach = reaches(T{}, numbers.clamp);
  }

  // Without anything that belongs to a channel, all elements are one row.
  static Layout flat(const BiasAct& p) {
    const bool per_channel = p.bias || p.h_bias || p.out_bias || p.slope;
    return per_channel && p.layout.channels > 1 ? p.layout : Layout{1, 1, p.layout.size()};
  }

  struct Pattern {
    A *bias, *h, *slope, *h_slope, *total, *slope_total;
    int64_t advance;
  };

  static bool aligned(const T* p) { return reinterpret_cast<uintptr_t>(p) % kVectorBytes == 0; }

  // Elements [at, end).
  void sweep(int64_t at, int64_t end, const Pattern& pattern) const {
    const auto offset = [](const void* p, int64_t e) { return p ? static_cast<const T*>(p) + e : nullptr; };
    const auto target = [](void* p, int64_t e) { return p ? static_cast<T*>(p) + e : nullptr; };
    Run<T> run{offset(in.x, at),
               offset(in.grad, at),
               offset(in.h, at),
               target(in.out, at),
               target(in.out_x, at),
               pattern.bias,
               pattern.h,
               pattern.slope,
               pattern.h_slope,
               sums ? pattern.total : nullptr,
               slope_sums ? pattern.slope_total : nullptr,
               pattern.advance};
    const int64_t rest = (end - at) % L, whole = end - at - rest;
    const bool past = streams && aligned(run.out) && aligned(run.out_x);
    (past ? past_cache : to_cache)(run, numbers, whole);
    if (rest == 0) return;
    // The last ones, in a vector of their own.
    T x[L] = {}, grad[L] = {}, h[L] = {}, out[L], out_x[L];
    A bias_of[L] = {}, h_of[L] = {}, slope_of[L] = {}, h_slope_of[L] = {}, total[L] = {}, slope_total[L] = {};
    const int64_t p = whole * pattern.advance;
    for (int64_t l = 0; l < rest; ++l) {
      x[l] = run.x[whole + l];
      if (run.grad) grad[l] = run.grad[whole + l];
      if (run.h) h[l] = run.h[whole + l];
      bias_of[l] = run.bias[p + l];
      h_of[l] = run.h_bias[p + l];
      if (slope) slope_of[l] = run.slope[p + l], h_slope_of[l] = run.h_slope[p + l];
    }
    to_cache(
        {x, grad, run.h ? h : nullptr, run.out ? out : nullptr, run.out_x ? out_x : nullptr, bias_of, h_of,
         slope_of, h_slope_of, run.total ? total : nullptr, run.slope_total ? slope_total : nullptr, 0},
        numbers, L);
    for (int64_t l = 0; l < rest; ++l) {
      if (run.out) run.out[whole + l] = out[l];
      if (run.out_x) run.out_x[whole + l] = out_x[l];
      if (run.total) run.total[p + l] += total[l];
      if (run.slope_total) run.slope_total[p + l] += slope_total[l];
    }
  }

  // ---- rows --------------------------------------------------------------------------------------------

  void rows(const Parallel& parallel) const {
    const int64_t segments = ceil_div(layout.inner, kSegment),
                  length = ceil_div(layout.inner, segments * L) * L;
    const int64_t units = layout.outer * layout.channels * segments;
    Scratch<A> partial(sums ? units : 0), slope_partial(slope_sums ? units : 0);
    parallel_for(parallel, units, ceil_div(kGrain, length), [&](int64_t first, int64_t last) {
      for (int64_t unit = first; unit < last; ++unit) {
        const int64_t row = unit / segments, c = row % layout.channels;
        const int64_t begin = min(unit % segments * length, layout.inner);
        const int64_t end = min(begin + length, layout.inner);
        alignas(kVectorBytes) A bias_of[L], h_of[L], slope_of[L], h_slope_of[L], total[L] = {},
                                                                                 slope_total[L] = {};
        store(bias_of, broadcast<A>(bias ? widen(bias[c]) : A(0)));
        store(h_of, broadcast<A>(h_bias ? widen(h_bias[c]) : A(0)));
        store(slope_of, broadcast<A>(slope ? widen(slope[c]) : A(0)));
        store(h_slope_of, broadcast<A>(h_slope ? widen(h_slope[c]) : A(0)));
        sweep(row * layout.inner + begin, row * layout.inner + end,
              {bias_of, h_of, slope_of, h_slope_of, total, slope_total, 0});
        if (sums) partial.at[unit] = sum<A>(load(total));
        if (slope_sums) slope_partial.at[unit] = sum<A>(load(slope_total));
      }
      if (streams) stream_fence();
    });
    const auto add_up = [&](void* out, const A* parts) {
      for (int64_t c = 0; out && c < layout.channels; ++c) {
        double total = 0;
        for (int64_t o = 0; o < layout.outer; ++o)
          for (int64_t s = 0; s < segments; ++s) total += parts[(o * layout.channels + c) * segments + s];
        static_cast<T*>(out)[c] = narrow<T>(A(total));
      }
    };
    add_up(in.out_bias, partial.at);
    add_up(in.out_slope, slope_partial.at);
  }

  // ---- patterns ----------------------------------------------------------------------------------------

  // Memory is rows of `period` elements, each of which is whole outer indices, and perhaps a last shorter
  // row. A pattern is `width` elements of each row.
  void patterns(const Parallel& parallel) const {
    const int64_t own = layout.channels * layout.inner;
    int64_t repeat = 1;  // outer indices a row
    while (own * repeat % L != 0) repeat *= 2;
    if (own * repeat > kPattern) repeat = 1;
    const int64_t period = own * repeat, unit = layout.inner * L;
    const int64_t width = own <= kBlock ? period : kBlock / unit * unit;
    const int64_t blocks = ceil_div(period, width), size = layout.size(), all_rows = ceil_div(size, period);
    // Rows of a task.
    const int64_t chunk = max(ceil_div(kGrain, width), ceil_div(all_rows, kMostChunks));
    const int64_t chunks = ceil_div(all_rows, chunk);
    Zeros<A> partial(sums ? chunks * layout.channels : 0),
        slope_partial(slope_sums ? chunks * layout.channels : 0);
    parallel_for(parallel, chunks * blocks, ceil_div(kGrain, chunk * width),
                 [&](int64_t first, int64_t last) {
                   const int64_t room = ceil_div(width, L) * L;
                   Zeros<A> scratch((slope ? 6 : 3) * room);
                   A *const bias_of = scratch.at, *const h_of = bias_of + room, *const total = h_of + room;
                   // Never read without a slope.
                   A *const slope_of = slope ? total + room : bias_of,
                            *const h_slope_of = slope ? slope_of + room : bias_of,
                            *const slope_total = slope ? h_slope_of + room : bias_of;
                   int64_t laid_out = -1;
                   for (int64_t task = first; task < last; ++task) {
                     const int64_t block = task % blocks, k = task / blocks;
                     const int64_t from = block * width, to = min(from + width, period);
                     if (!bias && !h_bias && !slope) laid_out = block;  // zeros
                     if (block != laid_out) {
                       each_channel(from, to, [&](int64_t c, int64_t p, int64_t end) {
                         const A b = bias ? widen(bias[c]) : A(0), h_b = h_bias ? widen(h_bias[c]) : A(0);
                         const A a = slope ? widen(slope[c]) : A(0), h_a = h_slope ? widen(h_slope[c]) : A(0);
                         for (; p < end; ++p) {
                           bias_of[p] = b;
                           h_of[p] = h_b;
                           if (slope) slope_of[p] = a, h_slope_of[p] = h_a;
                         }
                       });
                       laid_out = block;
                     }
                     if (sums) std::memset(total, 0, size_t(width) * sizeof(A));
                     if (slope_sums) std::memset(slope_total, 0, size_t(width) * sizeof(A));
                     for (int64_t row = k * chunk; row < min(k * chunk + chunk, all_rows); ++row) {
                       const int64_t at = row * period + from, end = min(row * period + to, size);
                       sweep(at, end, {bias_of, h_of, slope_of, h_slope_of, total, slope_total, 1});
                     }
                     if (!sums && !slope_sums) continue;
                     each_channel(from, to, [&](int64_t c, int64_t p, int64_t end) {
                       if (sums) partial.at[k * layout.channels + c] += sum_of(total + p, end - p);
                       if (slope_sums)
                         slope_partial.at[k * layout.channels + c] += sum_of(slope_total + p, end - p);
                     });
                   }
                   if (streams) stream_fence();
                 });
    const auto add_up = [&](void* out, const A* parts) {
      for (int64_t c = 0; out && c < layout.channels; ++c) {
        double total = 0;
        for (int64_t k = 0; k < chunks; ++k) total += parts[k * layout.channels + c];
        static_cast<T*>(out)[c] = narrow<T>(A(total));
      }
    };
    add_up(in.out_bias, partial.at);
    add_up(in.out_slope, slope_partial.at);
  }

  static A sum_of(const A* values, int64_t count) {
    const int64_t whole = count / L * L;
    Vec<A> vectors = {};
    for (int64_t i = 0; i < whole; i += L) vectors += load(values + i);
    A total = whole ? sum<A>(vectors) : A(0);
    for (int64_t i = whole; i < count; ++i) total += values[i];
    return total;
  }

  // f(channel, begin, end) for the elements of a period that belong to one channel; begin and end count from
  // `from`.
  template <class F>
  void each_channel(int64_t from, int64_t to, const F& f) const {
    int64_t c = from / layout.inner % layout.channels, begin = from;
    while (begin < to) {
      const int64_t end = min(begin / layout.inner * layout.inner + layout.inner, to);
      f(c, begin - from, end - from);
      c = c + 1 == layout.channels ? 0 : c + 1;
      begin = end;
    }
  }

  void all(const Parallel& parallel) const {
    if (layout.size() == 0) {
      void* const vectors[] = {in.out_bias, in.out_slope};
      for (void* out : vectors)
        for (int64_t c = 0; out && c < in.layout.channels; ++c) static_cast<T*>(out)[c] = narrow<T>(A(0));
    } else if (layout.inner >= kLeastRow || layout.channels == 1) {
      rows(parallel);
    } else {
      patterns(parallel);
    }
  }
};

template <class T, Activation kActivation, int kOrder>
void run(const BiasAct& in, const Parallel& parallel) {
  Sweep<T>(in, vectors<T, kActivation, kOrder, false>, vectors<T, kActivation, kOrder, true>).all(parallel);
}

}  // namespace

#define GANKERN_ROW(activation, order) GANKERN_EACH_DTYPE(run, Activation::activation, order)
// In the order of Activation.
#define GANKERN_ACTIVATIONS(order)                                           \
  {                                                                          \
      GANKERN_ROW(kLinear, order),    GANKERN_ROW(kRelu, order),             \
      GANKERN_ROW(kLeakyRelu, order), GANKERN_ROW(kTanh, order),             \
      GANKERN_ROW(kSigmoid, order),   GANKERN_ROW(kElu, order),              \
      GANKERN_ROW(kSelu, order),      GANKERN_ROW(kSoftplus, order),         \
      GANKERN_ROW(kSilu, order),      GANKERN_ROW(kLeakyReluOfInput, order), \
      GANKERN_ROW(kPrelu, order),                                            \
  }

extern const BiasActKernels bias_act = {
    GANKERN_ACTIVATIONS(kForward),
    GANKERN_ACTIVATIONS(kBackward),
    GANKERN_ACTIVATIONS(kDoubleBackward),
};

}  // namespace GANKERN_ISA
}  // namespace gankern
