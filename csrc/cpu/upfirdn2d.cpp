// Up, FIR filter, down on every plane of a batch: zero-insertion, a filter, decimation, in one pass.
//
//   out[o] = sum_j taps[j] z[o down + j - start],  z[i up] = x[i], 0 elsewhere           (on each of the two axes)
//
// Only every up-th tap meets a sample, so an axis falls into phases. With g = gcd(up, down), P = up / g and D = down / g,
// the outputs o = q P + r of phase r read neighbouring samples, with weights that depend on r alone:
//
//   out[q P + r] = sum_m weights_r[m] x[q D + first_r + m]
//
// Inserted zeros cost nothing. A separable filter goes down first, then across, a row of the output at a time:
//
//   down    one line of sums in float (double for double): sum over the row's few input rows, which lie in the L1 cache.
//           Zeros stand on either side of it for the padding; for D > 1 it is taken apart into D lines, of the samples
//           0, D, 2 D, ..., of 1, D + 1, ..., so that neighbouring q lie side by side
//   across  each phase is a sum of shifted copies of these lines; for P > 1 the phases are then woven together
//
// So all is one operation, a weighted sum of shifted rows, on whole vectors. For another filter there is a line for each
// of the input rows that an output row reads, kept from one output row to the next, and "across" sums over all of them.
// Rows of channels_last images are the same with `group` channels for each sample.
//
// Memory traffic is x once in and the result once out, past the caches where it is larger than they are. Arithmetic is
// (taps / up) multiply-adds an output across and, down, the same for each sample of the line: bound by memory. Wide rows
// are cut into strips whose line fits the L1 cache. Threads take ranges of output rows; each output is computed in one
// way, whoever does it.
#include "upfirdn2d.h"

#include <cstdlib>
#include <cstring>

#include "vec.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kStripBytes = 16 * 1024;  // of a line
constexpr int64_t kStripSamples = 16;       // of a strip at least, and a multiple of all vectors' lanes
constexpr int64_t kPastBytes = int64_t{1} << 24;  // results from this size on are written past the caches
constexpr int64_t kGrainValues = 1 << 14;         // of the result for a thread at least

template <class A>
constexpr int64_t kLanesOf = kVectorBytes / int64_t(sizeof(A));

inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
inline int64_t max(int64_t a, int64_t b) { return a > b ? a : b; }
inline int64_t floor_div(int64_t a, int64_t b) { return a / b - (a % b < 0); }
inline int64_t ceil_div(int64_t a, int64_t b) { return -floor_div(-a, b); }
inline int64_t gcd(int64_t a, int64_t b) { return b == 0 ? a : gcd(b, a % b); }

// ---- an axis in phases ----------------------------------------------------------------------------------

struct Phases {
  int64_t up, down, start, taps;
  int64_t count, step;  // P and D

  Phases(const FirAxis& axis, int64_t n) : up(axis.up), down(axis.down), start(axis.start), taps(n) {
    const int64_t g = gcd(up, down);
    count = up / g;
    step = down / g;
  }
  // The first sample that phase r reads at q = 0, and the tap that it meets; the following ones meet every up-th.
  int64_t first(int64_t r) const { return ceil_div(r * down - start, up); }
  int64_t first_tap(int64_t r) const { return first(r) * up - (r * down - start); }
  int64_t length(int64_t r) const { return max(0, ceil_div(taps - first_tap(r), up)); }
  int64_t longest() const { return ceil_div(taps, up); }
  int64_t least() const {
    int64_t result = first(0);
    for (int64_t r = 1; r < count; ++r) result = min(result, first(r));
    return result;
  }
  // One past the last sample read at q = 0.
  int64_t end() const {
    int64_t result = first(0) + length(0);
    for (int64_t r = 1; r < count; ++r) result = max(result, first(r) + length(r));
    return result;
  }
};

// ---- weighted sums of rows ------------------------------------------------------------------------------

template <class S>
struct Tap {
  const S* at;
  Acc<S> weight;
};

// to[v] = sum of weight * at[e + v * lanes + lane] over the taps.
template <int V, class S>
inline void sums(const Tap<S>* taps, int64_t n, int64_t e, Vec<Acc<S>>* to) {
  using A = Acc<S>;
  for (int v = 0; v < V; ++v) to[v] = Vec<A>{};
  for (int64_t k = 0; k < n; ++k) {
    const Vec<A> weight = broadcast<A>(taps[k].weight);
    const S* p = taps[k].at + e;
    for (int v = 0; v < V; ++v) to[v] += weight * load(p + v * kLanesOf<A>);
  }
}

// The same for one vector of which only the first `valid` values may be read; the others are zero.
template <class S>
inline Vec<Acc<S>> partial_sums(const Tap<S>* taps, int64_t n, int64_t e, int64_t valid) {
  using A = Acc<S>;
  Vec<A> to{};
  if (valid <= 0) return to;
  for (int64_t k = 0; k < n; ++k) to += broadcast<A>(taps[k].weight) * load_partial(taps[k].at + e, valid);
  return to;
}

template <bool kPast, class T>
inline void put(T* to, Vec<Acc<T>> x, int64_t n) {
  if (n < kLanes<T>) {
    if (n > 0) store_partial(to, x, n);
  } else if (kPast) {
    stream(to, x);
  } else {
    store(to, x);
  }
}

// {a0, b0, a1, b1, ...} of two vectors, in two vectors; and back.
template <class V>
inline void weave(V& a, V& b) {
  constexpr int L = sizeof(V) / sizeof(a[0]);
  const V x = a, y = b;
  if constexpr (L == 2) {
    a = __builtin_shufflevector(x, y, 0, 2);
    b = __builtin_shufflevector(x, y, 1, 3);
  } else if constexpr (L == 4) {
    a = __builtin_shufflevector(x, y, 0, 4, 1, 5);
    b = __builtin_shufflevector(x, y, 2, 6, 3, 7);
  } else if constexpr (L == 8) {
    a = __builtin_shufflevector(x, y, 0, 8, 1, 9, 2, 10, 3, 11);
    b = __builtin_shufflevector(x, y, 4, 12, 5, 13, 6, 14, 7, 15);
  } else {
    a = __builtin_shufflevector(x, y, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    b = __builtin_shufflevector(x, y, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
  }
}
template <class V>
inline void unweave(V& a, V& b) {
  constexpr int L = sizeof(V) / sizeof(a[0]);
  const V x = a, y = b;
  if constexpr (L == 2) {
    a = __builtin_shufflevector(x, y, 0, 2);
    b = __builtin_shufflevector(x, y, 1, 3);
  } else if constexpr (L == 4) {
    a = __builtin_shufflevector(x, y, 0, 2, 4, 6);
    b = __builtin_shufflevector(x, y, 1, 3, 5, 7);
  } else if constexpr (L == 8) {
    a = __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14);
    b = __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15);
  } else {
    a = __builtin_shufflevector(x, y, 0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    b = __builtin_shufflevector(x, y, 1, 3, 5, 7, 9, 11, 13, 15, 17, 19, 21, 23, 25, 27, 29, 31);
  }
}

// ---- the rows of one strip ------------------------------------------------------------------------------

template <class T>
struct Problem {
  using A = Acc<T>;
  static constexpr int64_t L = kLanesOf<A>;
  static constexpr int kBlock = 4;  // vectors at a time: they share each tap's weight

  const Upfirdn2d& in;
  Phases rows, columns;
  int64_t group;
  bool separable, past;
  int64_t lines;       // kept at a time
  int64_t reach;       // samples before the first one of a strip that belong to its line; a multiple of D
  int64_t strip;       // q of a strip
  int64_t strips;
  int64_t part;        // values of one of a line's D parts
  int64_t line;        // values of a line
  int64_t buffer;      // values of what takes lines apart or weaves phases, where D or P is above 2

  explicit Problem(const Upfirdn2d& problem)
      : in(problem), rows(problem.rows, problem.row_taps), columns(problem.columns, problem.column_taps) {
    group = in.group;
    separable = in.row_weights != nullptr;
    past = in.batches * in.channels * in.rows.out * in.columns.out * int64_t(sizeof(T)) >= kPastBytes;
    lines = separable ? 1 : max(1, rows.longest());
    reach = -floor_div(columns.least(), columns.step) * columns.step;
    const int64_t all = ceil_div(in.columns.out, columns.count);
    const int64_t fits = kStripBytes / int64_t(sizeof(A)) / group / columns.step;
    strips = ceil_div(all, max(kStripSamples, fits));
    strip = ceil_div(ceil_div(all, strips), kStripSamples) * kStripSamples;
    strips = ceil_div(all, strip);
    // Whole blocks are read and written beyond the last sample.
    const int64_t slack = 2 * kBlock * L;
    part = strip * (parts() == 1 ? columns.step * group : 1) +
           ceil_div(reach + columns.end(), parts()) * group + slack;
    line = part * parts();
    buffer = max(parts() > 2 ? line + slack : 0, woven() && columns.count > 2 ? columns.count * (strip + slack) : 0);
  }

  // Single samples are taken apart and woven; groups of channels are reached as they lie.
  int64_t parts() const { return group == 1 ? columns.step : 1; }
  bool woven() const { return group == 1 && columns.count > 1; }
  int64_t place(int64_t sample) const {
    return group == 1 ? sample % columns.step * part + sample / columns.step : sample * group;
  }

  // What one thread works with.
  struct Scratch {
    void* memory;
    A* line;              // [lines]
    A* buffer;
    int64_t* held;        // which input row a line holds; none: -1
    Tap<T>* down;
    Tap<A>* across;       // [phases][most]
    int64_t* lengths;     // [phases]
    int64_t most;
    int64_t strip = -1;

    explicit Scratch(const Problem& p) {
      most = p.columns.longest() * p.lines;
      const size_t line_bytes = size_t(p.lines * p.line + p.buffer) * sizeof(A);
      const size_t down_bytes = size_t(p.rows.longest()) * sizeof(Tap<T>);
      const size_t across_bytes = size_t(p.columns.count * most) * sizeof(Tap<A>);
      memory = std::malloc(kVectorBytes + line_bytes + down_bytes + across_bytes +
                           size_t(p.lines + p.columns.count) * sizeof(int64_t) + 64);
      char* at = static_cast<char*>(memory);
      at += (kVectorBytes - reinterpret_cast<uintptr_t>(at) % kVectorBytes) % kVectorBytes;
      const auto take = [&](size_t bytes) {
        char* const begin = at;
        at += (bytes + 7) / 8 * 8;
        return begin;
      };
      line = reinterpret_cast<A*>(take(line_bytes));
      buffer = line + p.lines * p.line;
      across = reinterpret_cast<Tap<A>*>(take(across_bytes));
      down = reinterpret_cast<Tap<T>*>(take(down_bytes));
      held = reinterpret_cast<int64_t*>(take(size_t(p.lines) * sizeof(int64_t)));
      lengths = reinterpret_cast<int64_t*>(take(size_t(p.columns.count) * sizeof(int64_t)));
    }
    ~Scratch() { std::free(memory); }
    Scratch(const Scratch&) = delete;
  };

  // The line of strip s from rows of the input: sample `reach` of it is sample s * strip * D of the rows.
  void fill(const Tap<T>* taps, int64_t n, int64_t s, A* to, A* apart) const {
    const int64_t origin = s * strip * columns.step - reach;
    const int64_t begin = max(origin, 0);
    const int64_t end = min(in.columns.in, (s * strip + strip - 1) * columns.step + columns.end());
    const int64_t count = (end - begin) * group, from = begin * group;
    if (count <= 0) return;
    if (parts() == 2) {
      A *even = to + (begin - origin) / 2, *odd = even + part;
      int64_t e = 0;
      for (; e + kBlock * L <= count; e += kBlock * L) {
        Vec<A> x[kBlock];
        sums<kBlock>(taps, n, from + e, x);
        for (int v = 0; v < kBlock; v += 2) {
          unweave(x[v], x[v + 1]);
          store(even + (e + v * L) / 2, x[v]);
          store(odd + (e + v * L) / 2, x[v + 1]);
        }
      }
      for (; e < count; e += 2 * L) {
        Vec<A> a = partial_sums(taps, n, from + e, min(L, count - e));
        Vec<A> b = partial_sums(taps, n, from + e + L, min(L, count - e - L));
        unweave(a, b);
        store(even + e / 2, a);
        store(odd + e / 2, b);
      }
      return;
    }
    A* const out = parts() == 1 ? to + (begin - origin) * group : apart;
    int64_t e = 0;
    for (; e + kBlock * L <= count; e += kBlock * L) {
      Vec<A> x[kBlock];
      sums<kBlock>(taps, n, from + e, x);
      for (int v = 0; v < kBlock; ++v) store(out + e + v * L, x[v]);
    }
    for (; e < count; e += L) store(out + e, partial_sums(taps, n, from + e, min(L, count - e)));
    if (parts() > 2)
      for (int64_t i = 0; i < count; ++i) to[place(begin - origin + i)] = apart[i];
  }

  // Lists what phase r reads of a line for the row weights' row `tap`.
  void list(Scratch& my, const A* of, int64_t tap) const {
    for (int64_t r = 0; r < columns.count; ++r) {
      const double* weights = in.column_weights + tap * in.column_taps + columns.first_tap(r);
      for (int64_t m = 0; m < columns.length(r); ++m)
        my.across[r * my.most + my.lengths[r]++] = {of + place(reach + columns.first(r) + m),
                                                   A(weights[m * columns.up])};
    }
  }
  void clear_lists(Scratch& my) const {
    for (int64_t r = 0; r < columns.count; ++r) my.lengths[r] = 0;
  }

  // `count` values from the lists to a row of the result.
  template <bool kPast>
  void write(Scratch& my, int64_t count, T* out) const {
    const auto lists = [&](int64_t r) { return my.across + r * my.most; };
    if (!woven() && (columns.step == 1 || group == 1) && columns.count == 1) {
      for (int64_t e = 0; e < count; e += kBlock * L) {
        Vec<A> x[kBlock];
        sums<kBlock>(lists(0), my.lengths[0], e, x);
        for (int v = 0; v < kBlock; ++v) put<kPast>(out + e + v * L, x[v], count - e - v * L);
      }
    } else if (!woven()) {
      for (int64_t o = 0, q = 0; o < count; ++q)
        for (int64_t r = 0; r < columns.count && o < count; ++r, o += group)
          write_group<kPast>(lists(r), my.lengths[r], q * columns.step * group, out + o);
    } else if (columns.count == 2) {
      constexpr int half = kBlock / 2;
      for (int64_t o = 0; o < count; o += 2 * half * L) {
        Vec<A> a[half], b[half];
        sums<half>(lists(0), my.lengths[0], o / 2, a);
        sums<half>(lists(1), my.lengths[1], o / 2, b);
        for (int v = 0; v < half; ++v) {
          weave(a[v], b[v]);
          put<kPast>(out + o + 2 * v * L, a[v], count - o - 2 * v * L);
          put<kPast>(out + o + (2 * v + 1) * L, b[v], count - o - (2 * v + 1) * L);
        }
      }
    } else {
      const int64_t stride = strip + 2 * kBlock * L;
      for (int64_t r = 0; r < columns.count; ++r)
        for (int64_t e = 0; e < ceil_div(count, columns.count); e += L) {
          Vec<A> x;
          sums<1>(lists(r), my.lengths[r], e, &x);
          store(my.buffer + r * stride + e, x);
        }
      for (int64_t o = 0; o < count; ++o)
        out[o] = narrow<T>(my.buffer[o % columns.count * stride + o / columns.count]);
    }
  }

  // The channels of one output sample.
  template <bool kPast>
  void write_group(const Tap<A>* taps, int64_t n, int64_t from, T* out) const {
    int64_t c = 0;
    for (; c + 2 * L < group; c += kBlock * L) {
      Vec<A> x[kBlock];
      sums<kBlock>(taps, n, from + c, x);
      for (int v = 0; v < kBlock; ++v) put<kPast>(out + c + v * L, x[v], group - c - v * L);
    }
    for (; c < group; c += L) {
      Vec<A> x;
      sums<1>(taps, n, from + c, &x);
      put<kPast>(out + c, x, group - c);
    }
  }

  void row(Scratch& my, int64_t s, int64_t plane, int64_t o) const {
    const int64_t planes_a_batch = in.channels / group;
    const T* const x = static_cast<const T*>(in.x) + plane / planes_a_batch * in.batch_stride +
                       plane % planes_a_batch * in.channel_stride;
    const int64_t r = o % rows.count, first = o / rows.count * rows.step + rows.first(r);
    const int64_t begin = max(0, -first), end = min(rows.length(r), in.rows.in - first);
    if (separable) {
      int64_t n = 0;
      for (int64_t m = begin; m < end; ++m)
        my.down[n++] = {x + (first + m) * in.row_stride, A(in.row_weights[rows.first_tap(r) + m * rows.up])};
      fill(my.down, n, s, my.line, my.buffer);
    } else {
      clear_lists(my);
      for (int64_t m = begin; m < end; ++m) {
        const int64_t slot = (first + m) % lines;
        A* const to = my.line + slot * line;
        if (my.held[slot] != first + m) {
          const Tap<T> whole{x + (first + m) * in.row_stride, A(1)};
          fill(&whole, 1, s, to, my.buffer);
          my.held[slot] = first + m;
        }
        list(my, to, rows.first_tap(r) + m * rows.up);
      }
    }
    const int64_t from = s * strip * columns.count;
    const int64_t count = min(strip * columns.count, in.columns.out - from) * group;
    T* const out = static_cast<T*>(in.out) + ((plane * in.rows.out + o) * in.columns.out + from) * group;
    const bool aligned = reinterpret_cast<uintptr_t>(out) % kVectorBytes == 0;
    if (past && aligned && (group == 1 || group % L == 0))
      write<true>(my, count, out);
    else
      write<false>(my, count, out);
  }

  void run(const Parallel& parallel) const {
    const int64_t planes = in.batches * (in.channels / group);
    const int64_t values = min(strip * columns.count, in.columns.out) * group;
    const int64_t grain = max(1, kGrainValues / values);
    parallel_for(parallel, strips * planes * in.rows.out, grain, [&](int64_t begin, int64_t end) {
      Scratch my(*this);
      int64_t o = begin % in.rows.out, plane = begin / in.rows.out % planes, s = begin / in.rows.out / planes;
      bool fresh = true;
      for (int64_t i = begin; i < end; ++i) {
        if (my.strip != s) {
          std::memset(my.line, 0, size_t(lines * line) * sizeof(A));
          clear_lists(my);
          if (separable) list(my, my.line, 0);
          my.strip = s;
        }
        if (fresh)
          for (int64_t slot = 0; slot < lines; ++slot) my.held[slot] = -1;
        row(my, s, plane, o);
        fresh = ++o == in.rows.out;
        if (fresh) {
          o = 0;
          if (++plane == planes) {
            plane = 0;
            ++s;
          }
        }
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

extern const Upfirdn2dKernels upfirdn2d = {{run<double>, run<float>, run<BFloat16>, run<Half>}};

}  // namespace GANKERN_ISA
}  // namespace gankern
