// Up, FIR filter, down on every plane of a batch: zero-insertion, a filter, decimation, in one pass.
//
//   out[o] = sum_j taps[j] z[o down + j - start],  z[i up] = x[i], 0 elsewhere     (on each of the two axes)
//
// Only every up-th tap meets a sample, so an axis falls into phases. With g = gcd(up, down), P = up / g and
// D = down / g, the outputs o = q P + r of phase r read neighbouring samples, with weights that depend on r
// alone:
//
//   out[q P + r] = sum_m weights_r[m] x[q D + first_r + m]
//
// Inserted zeros cost nothing. A separable filter goes down first, then across, a row of the output at a
// time, in one of two ways:
//
//   registers  A few vectors of sums down are held, and outputs are sums of them, shifted by lanes (or, in
//              channels_last images, by whole vectors). For two to four taps in each phase, P and D up to 2,
//              and rows long enough that their two ends, where vectors are not whole, count for little
//   lines      One line of sums down in float (double for double), which lies in the L1 cache. Zeros stand
//              on either side of it for the padding; for D > 1 it is taken apart into D lines, of the samples
//              0, D, 2 D, ..., of 1, D + 1, ..., so that neighbouring q lie side by side. Each phase is a sum
//              of shifted copies of these lines; for P > 1 the phases are then woven together
//
// So all is one operation, a weighted sum of shifted rows, on whole vectors. For a filter that is not
// separable there is a line for each of the input rows that an output row reads, kept from one output row to
// the next, and "across" sums over all of them. Rows of channels_last images are the same with `group`
// channels for each sample.
//
// Memory traffic is x once in and the result once out, past the caches where it is larger than they are.
// Arithmetic is (taps / up) multiply-adds an output across and, down, the same for each sample of the line:
// bound by memory, as long as rows are asked for before they are needed. Wide rows are cut into strips, so
// that a line fits the L1 cache, or the input rows of one output row the L2 cache. Threads take ranges of
// output rows; each output is computed in one way, whoever does it.
#include "upfirdn2d.h"

#include <cstring>
#include <utility>

#include "common.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kStripBytes = 8 * 1024;   // of a line
constexpr int64_t kSweptBytes = 32 * 1024;  // of a strip's input rows, where there is no line
constexpr int64_t kSweptVectors = 8;        // of a row at least; the first and the last one are slow
constexpr int64_t kLinesBytes = 2 * 1024;   // of the lines of several output rows, which are made together:
constexpr int64_t kRows = 8;  // a vector that was just stored is slow to read from where two of them meet
constexpr int64_t kStripSamples = 16;  // of a strip at least, and a multiple of all vectors' lanes
constexpr int64_t kAheadBytes = 8 * 1024;
constexpr int64_t kPastBytes = int64_t{1} << 24;  // results from this size on are written past the caches
constexpr int64_t kGrainValues = 1 << 14;         // of the result for a thread at least

template <class A>
constexpr int64_t kLanesOf = kVectorBytes / int64_t(sizeof(A));

inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
inline int64_t ceiling(int64_t a, int64_t b) { return -floor_div(-a, b); }
inline int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// ---- an axis in phases ----------------------------------------------------------------------------------

// Output q P + r of phase r reads the samples q D + first, ..., `length` of them; the first one meets the tap
// first_tap, each following one the tap `up` after.
struct Phase {
  int64_t first, first_tap, length;
};

struct Phases {
  int64_t count, step;  // P and D
  int64_t least, end;   // of all phases: the first sample read at q = 0, and one past the last
  int64_t longest;      // an upper bound of their lengths
  Scratch<Phase> all;
  Phase* of;  // [count]

  Phases(const FirAxis& axis, int64_t taps)
      : count(axis.up / gcd(axis.up, axis.down)),
        step(axis.down / gcd(axis.up, axis.down)),
        all(count),
        of(all.at) {
    longest = ceiling(taps, axis.up);
    for (int64_t r = 0; r < count; ++r) {
      const int64_t begin = r * axis.down - axis.start, first = ceiling(begin, axis.up);
      const int64_t first_tap = first * axis.up - begin;
      const int64_t length = max(0, ceiling(taps - first_tap, axis.up));
      of[r] = {first, first_tap, length};
      least = r == 0 ? first : min(least, first);
      end = r == 0 ? first + length : max(end, first + length);
    }
  }
};

// ---- weighted sums of rows ------------------------------------------------------------------------------

template <class A>
struct Tap {
  int64_t at;
  A weight;
};

// to[v] = sum of weight * x[at + e + v * lanes + lane] over n taps.
template <int V, class S>
inline void sums(const S* x, const Tap<Acc<S>>* taps, int64_t n, int64_t e, Vec<Acc<S>>* to) {
  using A = Acc<S>;
  for (int v = 0; v < V; ++v) to[v] = Vec<A>{};
  for (int64_t k = 0; k < n; ++k) {
    const Vec<A> weight = broadcast<A>(taps[k].weight);
    const S* p = x + (taps[k].at + e);
    for (int v = 0; v < V; ++v) to[v] += weight * load(p + v * kLanesOf<A>);
  }
}

// The same for one vector of which only the first `valid` values may be read; the others are zero.
template <class S>
inline Vec<Acc<S>> partial_sums(const S* x, const Tap<Acc<S>>* taps, int64_t n, int64_t e, int64_t valid) {
  using A = Acc<S>;
  Vec<A> to{};
  if (valid <= 0) return to;
  if (valid >= kLanesOf<A>) {
    sums<1>(x, taps, n, e, &to);
    return to;
  }
  for (int64_t k = 0; k < n; ++k)
    to += broadcast<A>(taps[k].weight) * load_partial(x + (taps[k].at + e), valid);
  return to;
}

// The lanes from `from` on and before `end`, which may lie anywhere; the other ones are zero, and are not
// read.
template <class S>
inline Vec<Acc<S>> load_between(const S* p, int64_t from, int64_t end) {
  if (from <= 0 && end >= kLanes<S>) return load(p);
  S buffer[kLanes<S>] = {};
  for (int64_t i = 0; i < kLanes<S>; ++i)
    if (i >= from && i < end) buffer[i] = p[i];
  return load(buffer);
}
#if defined(__AVX512F__)
inline Vec<float> load_between(const float* p, int64_t from, int64_t end) {
  const auto below = [](int64_t n) { return n <= 0 ? 0u : n >= 16 ? 0xffffu : (1u << n) - 1u; };
  return (Vec<float>)_mm512_maskz_loadu_ps(__mmask16(below(end) & ~below(from)), p);
}
#endif

template <int n>
struct Index {
  constexpr int operator()() const { return n; }
};
// f(Index<0>{}), ..., f(Index<n - 1>{}): a loop over a constant.
template <int n, int i = 0, class F>
[[gnu::always_inline]] inline void unroll(const F& f) {
  if constexpr (i < n) {
    f(Index<i>{});
    unroll<n, i + 1>(f);
  }
}

template <class T>
inline void put(T* to, Vec<Acc<T>> x, int64_t n, bool past) {
  if (n < kLanes<T>) {
    if (n > 0) store_partial(to, x, n);
  } else if (past) {
    stream(to, x);
  } else {
    store(to, x);
  }
}

// Of the values of two vectors, x[0], ..., y[0], ...: for each lane i the one of number first + step * i.
template <int first, int step, class V, int... i>
inline V picked(V x, V y, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(x, y, (first + step * i)...);
}
// x[first], y[first], x[first + 1], ...
template <int first, class V, int... i>
inline V woven(V x, V y, std::integer_sequence<int, i...>) {
  return __builtin_shufflevector(x, y, (first + i / 2 + i % 2 * int(sizeof...(i)))...);
}
template <class V>
using Lanes = std::make_integer_sequence<int, int(sizeof(V) / sizeof(V{}[0]))>;

// {a0, b0, a1, b1, ...} of two vectors, in two vectors; and back.
template <class V>
inline void weave(V& a, V& b) {
  const V x = a, y = b;
  a = woven<0>(x, y, Lanes<V>());
  b = woven<int(Lanes<V>::size()) / 2>(x, y, Lanes<V>());
}
template <class V>
inline void unweave(V& a, V& b) {
  const V x = a, y = b;
  a = picked<0, 2>(x, y, Lanes<V>());
  b = picked<1, 2>(x, y, Lanes<V>());
}

// x[m], x[m + 1], ..., y[0], ..., y[m - 1].
template <int m, class V>
inline V shift(V x, V y) {
  return picked<m, 1>(x, y, Lanes<V>());
}

// ---- the rows of one strip ------------------------------------------------------------------------------

template <class T>
struct Problem {
  using A = Acc<T>;
  static constexpr int64_t L = kLanesOf<A>;
  static constexpr int kBlock = 4;                     // vectors at a time: they share each tap's weight
  static constexpr int64_t kSlack = (kBlock + 1) * L;  // values behind a line that whole blocks may touch

  struct Row;
  using Sweep = void (*)(Row, const Tap<A>*, int64_t);

  const Upfirdn2d& in;
  Phases rows, columns;
  int64_t group;
  bool separable, past;
  int64_t strip, strips;  // q of a strip, and how many there are
  int64_t reach;          // samples before the first one of a strip that belong to its line; a multiple of D
  int64_t part, line;     // values of one of a line's D parts, and of a line
  int64_t lines;          // at a time: of output rows, or of the input rows that one output row reads
  int64_t ahead;          // rows from the last one that an output reads to those that are asked for meanwhile
  Sweep in_registers;     // null where rows are made in lines
  int64_t buffer;         // values of what takes lines apart or weaves phases, where D or P is above 2

  explicit Problem(const Upfirdn2d& problem)
      : in(problem), rows(problem.rows, problem.row_taps), columns(problem.columns, problem.column_taps) {
    group = in.group;
    separable = in.row_weights != nullptr;
    past = in.batches * in.channels * in.rows.out * in.columns.out * int64_t(sizeof(T)) >= kPastBytes;
    reach = -floor_div(columns.least, columns.step) * columns.step;
    const int64_t all = ceiling(in.columns.out, columns.count);
    in_registers = find_sweep();
    const int64_t fits =
        (in_registers ? kSweptBytes : kStripBytes) / int64_t(sizeof(A)) / group / columns.step;
    strips = ceiling(all, max(kStripSamples, fits));
    strip = ceiling(ceiling(all, strips), kStripSamples) * kStripSamples;
    strips = ceiling(all, strip);
    part = (strip * columns.step + reach + columns.end) * group;
    if (parts() > 1) part = ceiling(part, columns.step);
    part += kSlack;
    line = part * parts();
    lines = in_registers ? 0
            : separable  ? max(1, min(kRows, kLinesBytes / (line * int64_t(sizeof(A)))))
                         : rows.longest;
    ahead = kAheadBytes / max(1, in.row_stride * int64_t(sizeof(T)));
    buffer = max(parts() > 2 ? line : 0, woven() && columns.count > 2 ? columns.count * (strip + kSlack) : 0);
  }

  // Single samples are taken apart and woven; groups of channels are reached as they lie.
  int64_t parts() const { return group == 1 ? columns.step : 1; }
  bool woven() const { return group == 1 && columns.count > 1; }
  int64_t place(int64_t sample) const {
    return group == 1 ? sample % columns.step * part + sample / columns.step : sample * group;
  }

  // What one thread works with.
  struct OfThread {
    int64_t most;
    Scratch<A> lines_and_buffer;
    Scratch<Tap<A>> down_of, across_of;
    Scratch<int64_t> lengths_of, held_of;
    A* line;  // [lines]
    A* buffer;
    Tap<A>* down;      // [phases of the rows][longest]
    Tap<A>* across;    // [phases of the columns][most]
    int64_t* lengths;  // [phases of the columns]
    int64_t* held;     // [lines]: which input row a line holds; none: -1

    explicit OfThread(const Problem& p)
        : most(p.columns.longest * (p.separable ? 1 : p.lines)),
          lines_and_buffer(p.lines * p.line + p.buffer),
          down_of(p.rows.count * p.rows.longest),
          across_of(p.columns.count * most),
          lengths_of(p.columns.count),
          held_of(p.lines),
          line(lines_and_buffer.at),
          buffer(line + p.lines * p.line),
          down(down_of.at),
          across(across_of.at),
          lengths(lengths_of.at),
          held(held_of.at) {
      if (!p.separable) return;
      for (int64_t r = 0; r < p.rows.count; ++r)
        for (int64_t m = 0; m < p.rows.of[r].length; ++m)
          down[r * p.rows.longest + m] = {m * p.in.row_stride,
                                          A(p.in.row_weights[p.rows.of[r].first_tap + m * p.in.rows.up])};
    }
  };

  // ---- down ----

  // Which part of a strip's line comes from the input: `count` values from `from` of a row on, to `to` of the
  // line.
  struct Span {
    int64_t from, to, count;
  };
  Span span(int64_t s) const {
    const int64_t origin = s * strip * columns.step - reach;  // the line's first sample
    const int64_t begin = max(origin, 0);
    const int64_t end = min(in.columns.in, (s * strip + strip - 1) * columns.step + columns.end);
    return {begin * group, (begin - origin) * group, (end - begin) * group};
  }

  // A line: sums of rows of x, the first of which begins at `at`.
  void fill(const Tap<A>* taps, int64_t n, const T* x, int64_t at, Span span, A* to, A* apart) const {
    const int64_t from = at + span.from, count = span.count;
    int64_t e = 0;
    if (parts() == 2) {
      A *even = to + span.to / 2, *odd = even + part;
      for (; e + kBlock * L <= count; e += kBlock * L) {
        Vec<A> v[kBlock];
        sums<kBlock>(x, taps, n, from + e, v);
        for (int i = 0; i < kBlock; i += 2) {
          unweave(v[i], v[i + 1]);
          store(even + (e + i * L) / 2, v[i]);
          store(odd + (e + i * L) / 2, v[i + 1]);
        }
      }
      for (; e < count; e += 2 * L) {
        Vec<A> a = partial_sums(x, taps, n, from + e, count - e);
        Vec<A> b = partial_sums(x, taps, n, from + e + L, count - e - L);
        unweave(a, b);
        store(even + e / 2, a);
        store(odd + e / 2, b);
      }
      return;
    }
    A* const out = parts() == 1 ? to + span.to : apart;
    for (; e + kBlock * L <= count; e += kBlock * L) {
      Vec<A> v[kBlock];
      sums<kBlock>(x, taps, n, from + e, v);
      for (int i = 0; i < kBlock; ++i) store(out + e + i * L, v[i]);
    }
    for (; e < count; e += L) store(out + e, partial_sums(x, taps, n, from + e, count - e));
    if (parts() > 2)
      for (int64_t i = 0; i < count; ++i) to[place(span.to + i)] = apart[i];
  }

  // Asks for the rows that the next q will be the first to read. Past a plane's end is the next one's
  // beginning.
  void prefetch(const T* x, int64_t count) const {
    for (int64_t i = 0; i < rows.step; ++i, x += in.row_stride)
      for (int64_t e = 0; e < count; e += 64 / int64_t(sizeof(T))) __builtin_prefetch(x + e);
  }

  // The lines of output rows [begin, end) of a separable filter.
  void fill_rows(OfThread& my, Span span, const T* x, int64_t begin, int64_t end) const {
    int64_t q = begin / rows.count, r = begin % rows.count;
    A* to = my.line;
    for (int64_t o = begin; o < end; ++o, to += line) {
      const Phase phase = rows.of[r];
      const int64_t first = q * rows.step + phase.first;
      if (r == 0) prefetch(x + (first + rows.longest + ahead) * in.row_stride + span.from, span.count);
      const int64_t skipped = max(0, -first), n = min(phase.length, in.rows.in - first) - skipped;
      const Tap<A>* const taps = my.down + r * rows.longest + skipped;
      fill(taps, n, x, first * in.row_stride, span, to, my.buffer);
      if (++r == rows.count) {
        r = 0;
        ++q;
      }
    }
  }

  // ---- across ----

  // Adds to the lists what each phase reads of the line at `from`, for the filter's row `tap`.
  void list(OfThread& my, int64_t from, int64_t tap) const {
    for (int64_t r = 0; r < columns.count; ++r) {
      const Phase phase = columns.of[r];
      const double* weights = in.column_weights + tap * in.column_taps + phase.first_tap;
      for (int64_t m = 0; m < phase.length; ++m)
        my.across[r * my.most + my.lengths[r]++] = {from + place(reach + phase.first + m),
                                                    A(weights[m * in.columns.up])};
    }
  }
  void clear_lists(OfThread& my) const {
    for (int64_t r = 0; r < columns.count; ++r) my.lengths[r] = 0;
  }

  // `count` values of each of some rows of the result, from the lists; the lines of row i lie i * line after
  // them.
  void write_rows(OfThread& my, int64_t count, T* out, int64_t n) const {
    for (int64_t i = 0; i < n; ++i, out += in.columns.out * group)
      write(my, my.line + i * line, count, out, goes_past(out));
  }
  bool goes_past(const T* out) const {
    return past && reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0 && (group == 1 || group % L == 0);
  }

  void write(OfThread& my, const A* x, int64_t count, T* out, bool past) const {
    const Tap<A>* const taps = my.across;
    if (columns.count == 1 && (group == 1 || columns.step == 1)) {
      write_run(x, taps, my.lengths[0], 0, count, out, past);
    } else if (group > 1) {
      for (int64_t o = 0, at = 0; o < count; at += columns.step * group)
        for (int64_t r = 0; r < columns.count && o < count; ++r, o += group)
          write_run(x, taps + r * my.most, my.lengths[r], at, group, out + o, past);
    } else if (columns.count == 2) {
      constexpr int kHalf = kBlock / 2;
      for (int64_t o = 0; o < count; o += kBlock * L) {
        Vec<A> a[kHalf], b[kHalf];
        sums<kHalf>(x, taps, my.lengths[0], o / 2, a);
        sums<kHalf>(x, taps + my.most, my.lengths[1], o / 2, b);
        for (int i = 0; i < kHalf; ++i) {
          weave(a[i], b[i]);
          put(out + o + 2 * i * L, a[i], count - o - 2 * i * L, past);
          put(out + o + (2 * i + 1) * L, b[i], count - o - (2 * i + 1) * L, past);
        }
      }
    } else {
      const int64_t stride = strip + kSlack;
      for (int64_t r = 0; r < columns.count; ++r)
        for (int64_t e = 0; e * columns.count < count; e += L) {
          Vec<A> v;
          sums<1>(x, taps + r * my.most, my.lengths[r], e, &v);
          store(my.buffer + r * stride + e, v);
        }
      for (int64_t o = 0; o < count; ++o)
        out[o] = narrow<T>(my.buffer[o % columns.count * stride + o / columns.count]);
    }
  }

  void write_run(const A* x, const Tap<A>* taps, int64_t n, int64_t at, int64_t count, T* out,
                 bool past) const {
    int64_t e = 0;
    for (; e + 2 * L < count; e += kBlock * L) {
      Vec<A> v[kBlock];
      sums<kBlock>(x, taps, n, at + e, v);
      for (int i = 0; i < kBlock; ++i) put(out + e + i * L, v[i], count - e - i * L, past);
    }
    for (; e < count; e += L) {
      Vec<A> v;
      sums<1>(x, taps, n, at + e, &v);
      put(out + e, v, count - e, past);
    }
  }

  // ---- both in registers ----

  // A row of a strip of the result, and what makes it.
  struct Row {
    const T* x;  // the first input row that it reads, of `samples` of `width` values
    int64_t samples, width;
    const Tap<A>* down;
    int64_t taps;
    int64_t sample;    // the first one that it reads
    const T* next[2];  // rows to be asked for meanwhile, of which there are `coming`
    int64_t coming;
    T* out;
    int64_t count;  // of its samples
    bool past;
  };

  // Vectors of sums down, from a sample on. A vector holds `extent` samples: L of them, or one of L channels.
  // Beyond the edges they are zero.
  template <int kVectors, int64_t extent>
  [[gnu::always_inline]] static inline void sums_down(const Row& row, int64_t sample, Vec<A>* to) {
    if (sample < 0 || sample + kVectors * extent > row.samples) {
      unroll<kVectors>([&](auto v) { to[v()] = sum_at_edge<extent>(row, sample + v() * extent); });
      return;
    }
    unroll<kVectors>([&](auto v) { to[v()] = Vec<A>{}; });
    for (int64_t k = 0; k < row.taps; ++k) {
      const Vec<A> weight = broadcast<A>(row.down[k].weight);
      const T* const p = row.x + sample * row.width + row.down[k].at;
      unroll<kVectors>([&](auto v) { to[v()] += weight * load(p + v() * extent * row.width); });
    }
  }
  template <int64_t extent>
  [[gnu::noinline]] static Vec<A> sum_at_edge(const Row& row, int64_t sample) {
    const int64_t from = -sample * (L / extent), end = (row.samples - sample) * (L / extent);
    const int64_t taps = from < L && end > 0 ? row.taps : 0;
    Vec<A> total{};
    for (int64_t k = 0; k < taps; ++k)
      total += broadcast<A>(row.down[k].weight) *
               load_between(row.x + sample * row.width + row.down[k].at, from, end);
    return total;
  }

  // The row, where each phase has kTaps taps, and the second one begins kLater samples after the first. Of
  // the sums down, the last kKept serve the next outputs too.
  template <bool kGrouped, int P, int D, int kTaps, int kLater>
  static void sweep(Row row, const Tap<A>* across, int64_t most) {
    constexpr int V = kBlock / (P * D), kKept = kGrouped ? kTaps + kLater - D : D;
    constexpr int64_t extent = kGrouped ? 1 : L;
    if constexpr (!kGrouped) row.width = 1;
    Vec<A> weights[P * kTaps], sums[kKept + V * D + 1];
    unroll<P * kTaps>(
        [&](auto i) { weights[i()] = broadcast<A>(across[i() / kTaps * most + i() % kTaps].weight); });

    int64_t sample = row.sample;
    sums_down<kKept, extent>(row, sample, sums);
    if constexpr (!kGrouped && D == 2) unweave(sums[0], sums[1]);
    sample += kKept * extent;
    for (int64_t o = 0; o < row.count; o += V * P * extent, sample += V * D * extent) {
      for (int64_t i = 0; i < row.coming; ++i)
        unroll<V * D>([&](auto v) { __builtin_prefetch(row.next[i] + (sample + v() * extent) * row.width); });
      sums_down<V * D, extent>(row, sample, sums + kKept);
      if constexpr (!kGrouped && D == 2)
        unroll<V>([&](auto v) { unweave(sums[kKept + 2 * v()], sums[kKept + 2 * v() + 1]); });
      T* const out = row.out + o * row.width;
      const int64_t valid = (row.count - o) * (L / extent);
      unroll<V>([&](auto k) {
        Vec<A> y[P] = {};
        unroll<P * kTaps>([&](auto i) {
          constexpr int r = i() / kTaps, tap = r * kLater + i() % kTaps, at = k() * D + tap % D;
          if constexpr (kGrouped)
            y[r] += weights[i()] * sums[k() * D + tap];
          else
            y[r] += weights[i()] * shift<tap / D>(sums[at], sums[at + D]);
        });
        if constexpr (!kGrouped && P == 2) weave(y[0], y[1]);
        unroll<P>([&](auto r) {
          constexpr int v = k() * P + r();
          put(out + v * extent * row.width, y[r()], valid - v * L, row.past);
        });
      });
      unroll<kKept>([&](auto i) { sums[i()] = sums[i() + V * D]; });
    }
  }

  // The sweep for this problem; null where there is none.
  Sweep find_sweep() const {
    if (!separable || (group > 1 && group % L != 0)) return nullptr;
    if (in.columns.in < kSweptVectors * (group > 1 ? 1 : L)) return nullptr;
    switch (columns.of[0].length) {
      case 2: return find_sweep<2>();
      case 3: return find_sweep<3>();
      case 4: return find_sweep<4>();
      default: return nullptr;
    }
  }
  template <int kTaps>
  Sweep find_sweep() const {
    return group > 1 ? find_sweep<kTaps, true>() : find_sweep<kTaps, false>();
  }
  template <int kTaps, bool kGrouped>
  Sweep find_sweep() const {
    if constexpr (kGrouped || L >= 4) {
      if (columns.count == 1 && columns.step == 1) return sweep<kGrouped, 1, 1, kTaps, 0>;
      if (columns.count == 1 && columns.step == 2) return sweep<kGrouped, 1, 2, kTaps, 0>;
      if (columns.count == 2 && columns.step == 1 && columns.of[1].length == kTaps)
        return columns.of[1].first == columns.of[0].first ? sweep<kGrouped, 2, 1, kTaps, 0>
                                                          : sweep<kGrouped, 2, 1, kTaps, 1>;
    }
    return nullptr;
  }

  // Output rows [begin, end) of a strip that begins at column `from`, of `count` values.
  void sweep_rows(OfThread& my, int64_t from, int64_t count, const T* x, T* out, int64_t begin,
                  int64_t end) const {
    for (int64_t o = begin; o < end; ++o, out += in.columns.out * group) {
      const int64_t r = o % rows.count;
      const Phase phase = rows.of[r];
      const int64_t first = o / rows.count * rows.step + phase.first, skipped = max(0, -first);
      Row row;
      row.down = my.down + r * rows.longest + skipped;
      row.taps = min(phase.length, in.rows.in - first) - skipped;
      row.sample = from / columns.count * columns.step + columns.least;
      row.samples = in.columns.in;
      row.width = group;
      row.coming = r == 0 ? min(rows.step, 2) : 0;
      row.count = count / group;
      row.past = goes_past(out);
      for (int64_t c = 0; c < group; c += L) {
        row.x = x + first * in.row_stride + c;
        for (int64_t i = 0; i < 2; ++i) row.next[i] = row.x + (rows.longest + ahead + i) * in.row_stride;
        row.out = out + c;
        in_registers(row, my.across, my.most);
      }
    }
  }

  // ---- both ----

  // Output rows [begin, end) of a strip of a plane.
  void make_rows(OfThread& my, int64_t s, int64_t plane, int64_t begin, int64_t end) const {
    const int64_t planes_a_batch = in.channels / group;
    const T* const x = static_cast<const T*>(in.x) + plane / planes_a_batch * in.batch_stride +
                       plane % planes_a_batch * in.channel_stride;
    const int64_t from = s * strip * columns.count;
    const int64_t count = min(strip * columns.count, in.columns.out - from) * group;
    T* out = static_cast<T*>(in.out) + ((plane * in.rows.out + begin) * in.columns.out + from) * group;
    const int64_t stride = in.columns.out * group;
    const Span inside = span(s);
    if (in_registers) {
      sweep_rows(my, from, count, x, out, begin, end);
      return;
    }
    if (separable) {
      for (int64_t o = begin; o < end; o += lines, out += lines * stride) {
        const int64_t n = min(lines, end - o);
        if (inside.count > 0) fill_rows(my, inside, x, o, o + n);
        write_rows(my, count, out, n);
      }
      return;
    }
    const Tap<A> whole{0, A(1)};
    for (int64_t slot = 0; slot < lines; ++slot) my.held[slot] = -1;
    for (int64_t o = begin; o < end; ++o, out += stride) {
      const Phase phase = rows.of[o % rows.count];
      const int64_t first = o / rows.count * rows.step + phase.first;
      clear_lists(my);
      for (int64_t m = max(0, -first); m < min(phase.length, in.rows.in - first); ++m) {
        const int64_t row = first + m, slot = row % lines;
        if (my.held[slot] != row && inside.count > 0)
          fill(&whole, 1, x, row * in.row_stride, inside, my.line + slot * line, my.buffer);
        my.held[slot] = row;
        list(my, slot * line, phase.first_tap + m * in.rows.up);
      }
      write_rows(my, count, out, 1);
    }
  }

  void run(const Parallel& parallel) const {
    const int64_t planes = in.batches * (in.channels / group);
    const int64_t values = min(strip * columns.count, in.columns.out) * group;
    const int64_t grain = max(1, kGrainValues / values);
    parallel_for(parallel, strips * planes * in.rows.out, grain, [&](int64_t begin, int64_t end) {
      OfThread my(*this);
      int64_t strip_before = -1;
      while (begin < end) {
        const int64_t o = begin % in.rows.out, plane = begin / in.rows.out % planes;
        const int64_t s = begin / in.rows.out / planes, last = min(in.rows.out, o + end - begin);
        if (s != strip_before) {
          std::memset(my.line, 0, size_t(lines * line) * sizeof(A));
          clear_lists(my);
          if (separable) list(my, 0, 0);
          strip_before = s;
        }
        make_rows(my, s, plane, o, last);
        begin += last - o;
      }
      if (past) stream_fence();
    });
  }
};

template <class T>
void run(const Upfirdn2d& in, const Parallel& parallel) {
  if (in.batches * in.channels * in.rows.out * in.columns.out == 0) return;
  Problem<T>(in).run(parallel);
}

}  // namespace

extern const Upfirdn2dKernels upfirdn2d = {GANKERN_EACH_DTYPE(run)};

}  // namespace GANKERN_ISA
}  // namespace gankern
