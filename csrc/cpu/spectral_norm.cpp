// Spectral norm (Miyato 2018) of all layers of a network in one parallel region.
//
// One power iteration on M [h, w] is two products with it, r = Mv and t = M^T r, and sigma is the norm of the
// second one. PyTorch reads the weight for r, for t, for sigma and for the division. Here it is read twice:
//
//   sweep   a task takes a range of rows. A few rows at a time are read into the cache, r of those rows is
//           computed, and their share of M^T r is added to the task's own partial t while they are still
//           there (t is linear in r, so 1/|r| can wait).
//   reduce  adds the partial t of all tasks, in their order, for a range of columns.
//   scale   writes W/sigma.
//
// The order v-then-u is the same with rows and columns exchanged. The backward reads g and W for <g, W> and g
// again for the result: in all 5 reads and 2 writes of the weight, a training forward and backward, where
// PyTorch has about 13 reads and 8 writes. Bound by memory bandwidth for weights beyond the cache.
//
// Fixed order: the ranges depend on the weight's shape alone, never on the number of threads.
//
// The sweep multiplies by r before it is normalised, so its t is about |W|^2: beyond float's range for norms
// above 1e19 or below 1e-19, where torch, which divides first, is right. Whatever leaves a range that is safe
// is done once more in `finish`: divided first, sums in double. That costs a pass by one thread, and ordinary
// weights never need it.
#include "spectral_norm.h"

#include <cmath>

#include "common.h"
#include "staged.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kSmallBytes = 1 << 20;        // a layer that one thread takes through all stages
constexpr int64_t kChunkElements = 128 * 1024;  // a sweep task's least work
constexpr int64_t kMaxChunks = 64;              // bounds the scratch: kMaxChunks partial vectors a layer
constexpr int64_t kBlockBytes = 256 * 1024;     // what a sweep keeps in the L2 cache between its two products
constexpr int64_t kWorkerElements = 32 * 1024;  // less than this is not worth waking a thread for
constexpr int64_t kReduceColumns = 1024;
constexpr int64_t kScaleElements = 64 * 1024;
constexpr int64_t kStreamWeightBytes = int64_t{4}
                                       << 20;  // results larger than this are written past the caches

// The k-th of n nearly equal ranges of [0, total).
struct Range {
  int64_t begin, end;
};
inline Range part(int64_t total, int64_t n, int64_t k) { return {total * k / n, total * (k + 1) / n}; }

// [outer, rows, inner] as it lies in memory. Where inner is 1 (a matrix stored transposed) the roles of u and
// v are exchanged, so that the contiguous direction is always the inner one.
template <class T>
struct Matrix {
  using A = Acc<T>;
  int64_t outer, rows, inner;
  bool exchanged;
  const T* data;

  explicit Matrix(const SpectralNormLayer& in) : outer(in.outer), rows(in.rows), inner(in.inner) {
    data = static_cast<const T*>(in.weight);
    exchanged = inner == 1 && outer > 1;
    if (exchanged) {
      inner = rows;
      rows = outer;
      outer = 1;
    }
  }
  int64_t columns() const { return outer * inner; }
  int64_t elements() const { return outer * rows * inner; }
  bool is_small() const { return elements() * int64_t(sizeof(T)) <= kSmallBytes; }
  const A* u(const SpectralNormLayer& in) const { return static_cast<const A*>(exchanged ? in.v : in.u); }
  const A* v(const SpectralNormLayer& in) const { return static_cast<const A*>(exchanged ? in.u : in.v); }
};

// A box of the matrix: outers, rows and inners.
struct Box {
  Range outer, rows, inner;
};

// y[i] = sum over (a, b) of M[a, i, b] x[a, b], for the rows of the box; R rows at a time share the loads of
// x.
template <int R, class T>
inline void dot_rows(const Matrix<T>& m, const Box& box, int64_t row, const Acc<T>* x, Acc<T>* y) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  Vec<A> sums[R][2] = {};
  const int64_t width = box.inner.end - box.inner.begin;
  for (int64_t a = box.outer.begin; a < box.outer.end; ++a) {
    const T* p = m.data + (a * m.rows + row) * m.inner + box.inner.begin;
    const A* q = x + a * m.inner + box.inner.begin;
    int64_t b = 0;
    for (; b + 2 * L <= width; b += 2 * L) {
      const Vec<A> x0 = load(q + b), x1 = load(q + b + L);
      for (int r = 0; r < R; ++r) {
        sums[r][0] += load(p + r * m.inner + b) * x0;
        sums[r][1] += load(p + r * m.inner + b + L) * x1;
      }
    }
    for (; b < width; b += L) {
      const int64_t n = min(L, width - b);
      const Vec<A> x0 = load_partial(q + b, n);
      for (int r = 0; r < R; ++r) sums[r][0] += load_partial(p + r * m.inner + b, n) * x0;
    }
  }
  for (int r = 0; r < R; ++r) y[r] = sum<A>(sums[r][0] + sums[r][1]);
}

template <class T>
void rows_product(const Matrix<T>& m, const Box& box, const Acc<T>* x, Acc<T>* y) {
  int64_t i = box.rows.begin;
  for (; i + 4 <= box.rows.end; i += 4) dot_rows<4>(m, box, i, x, y + i);
  for (; i < box.rows.end; ++i) dot_rows<1>(m, box, i, x, y + i);
}

// y[a, b] += sum over i of M[a, i, b] x[i]; R rows at a time share the loads and stores of y.
template <int R, class T>
inline void add_rows(const T* p, int64_t stride, int64_t width, const Acc<T>* x, Acc<T>* y) {
  using A = Acc<T>;
  constexpr int L = kLanes<T>;
  int64_t b = 0;
  for (; b + L <= width; b += L) {
    Vec<A> total = load(y + b);
    for (int r = 0; r < R; ++r) total += load(p + r * stride + b) * broadcast(x[r]);
    store(y + b, total);
  }
  if (b < width) {
    const int64_t n = width - b;
    Vec<A> total = load_partial(y + b, n);
    for (int r = 0; r < R; ++r) total += load_partial(p + r * stride + b, n) * broadcast(x[r]);
    store_partial(y + b, total, n);
  }
}

template <class T>
void columns_product(const Matrix<T>& m, const Box& box, const Acc<T>* x, Acc<T>* y) {
  const int64_t width = box.inner.end - box.inner.begin;
  for (int64_t a = box.outer.begin; a < box.outer.end; ++a) {
    const T* p = m.data + a * m.rows * m.inner + box.inner.begin;
    Acc<T>* q = y + a * m.inner + box.inner.begin;
    int64_t i = box.rows.begin;
    for (; i + 8 <= box.rows.end; i += 8) add_rows<8>(p + i * m.inner, m.inner, width, x + i, q);
    for (; i < box.rows.end; ++i) add_rows<1>(p + i * m.inner, m.inner, width, x + i, q);
  }
}

// Norms for which squares, and products of two of that size, are safe in A: 2^-50 to 2^50, for double 2^-400
// on.
template <class A>
inline bool is_ordinary(double norm) {
  constexpr double kMost = sizeof(A) == 8 ? 0x1p400 : 0x1p50;
  return norm > 1 / kMost && norm < kMost;
}

// Of values of any size: the largest is taken out.
template <class A>
double exact_norm(const A* x, int64_t n) {
  double most = 0, total = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double size = std::fabs(double(x[i]));
    most = size > most || size != size ? size : most;  // NaN stays
  }
  if (!(most > 0) || std::isinf(most)) return most;
  for (int64_t i = 0; i < n; ++i) total += double(x[i]) / most * (double(x[i]) / most);
  return most * std::sqrt(total);
}

template <class A>
A sum_of_squares(const A* x, int64_t n) {
  constexpr int L = kVectorBytes / int(sizeof(A));
  Vec<A> total{};
  int64_t i = 0;
  for (; i + L <= n; i += L) total += load(x + i) * load(x + i);
  if (i < n) {
    const Vec<A> tail = load_partial(x + i, n - i);
    total += tail * tail;
  }
  return sum<A>(total);
}

template <class A>
void multiply(A* x, int64_t n, A factor) {
  for (int64_t i = 0; i < n; ++i) x[i] *= factor;
}

// f(out pointer, lanes value) is called for each vector of [begin, end): whole vectors are stored past the
// caches where `past` is set and the address allows it.
template <class T, class F>
inline void write_range(T* out, int64_t begin, int64_t end, bool past, const F& value) {
  constexpr int L = kLanes<T>;
  int64_t e = begin;
  if (past && sizeof(T) == sizeof(Acc<T>)) {
    const int64_t misaligned = reinterpret_cast<uintptr_t>(out + e) % kVectorBytes / sizeof(T);
    const int64_t head = min(misaligned ? L - misaligned : 0, end - e);
    if (head) store_partial(out + e, value(e, head), head);
    e += head;
    for (; e + L <= end; e += L) stream(out + e, value(e, L));
    stream_fence();
  } else {
    for (; e + L <= end; e += L) store(out + e, value(e, L));
  }
  if (e < end) store_partial(out + e, value(e, end - e), end - e);
}

// Loads that know at compile time, for whole vectors, that they are whole.
template <class T>
inline Vec<Acc<T>> load_n(const T* p, int64_t n) {
  return n == kLanes<T> ? load(p) : load_partial(p, n);
}

// A layer in work. The "first" vector is the one whose entries a sweep task completes (u where u comes
// first), the "second" the one that is a sum over tasks.
template <class T>
struct ForwardState {
  using A = Acc<T>;
  Matrix<T> m;
  bool rows_first;
  int64_t chunks, segments;
  A* u;  // results, in the order of m's rows and columns
  A* v;
  A* partials;       // [chunks][second_size]
  A* chunk_squares;  // [max(chunks, segments)]
  A first_factor, scale, sigma;
  bool past_caches, exact;

  A* first() const { return rows_first ? u : v; }
  A* second() const { return rows_first ? v : u; }
  int64_t first_size() const { return rows_first ? m.rows : m.columns(); }
  int64_t second_size() const { return rows_first ? m.columns() : m.rows; }

  // How many units a sweep can be cut into: rows, or outers, or (with one outer) vectors of columns.
  int64_t units() const {
    if (rows_first) return m.rows;
    return m.outer > 1 ? m.outer : ceil_div(m.inner, kLanes<T>);
  }
  Box box(Range unit) const {
    Box all{{0, m.outer}, {0, m.rows}, {0, m.inner}};
    if (rows_first) {
      all.rows = unit;
    } else if (m.outer > 1) {
      all.outer = unit;
    } else {
      all.inner = {unit.begin * kLanes<T>, min(unit.end * kLanes<T>, m.inner)};
    }
    return all;
  }
  Range first_range(const Box& b) const {
    if (rows_first) return b.rows;
    return {b.outer.begin * m.inner + b.inner.begin, (b.outer.end - 1) * m.inner + b.inner.end};
  }
};

template <class T>
struct ForwardWork {
  using A = Acc<T>;
  SpectralNormForward* layers;
  ForwardState<T>* states;
  SpectralNormOptions options;

  int64_t stages() const { return 1 + 2 * options.n_power_iterations + (options.n_power_iterations ? 0 : 1); }
  bool is_scale(int64_t stage) const { return stage == stages() - 1; }
  bool is_sweep(int64_t stage) const { return stage % 2 == 0; }

  template <class N>
  N denominator(N norm) const {
    if (options.add_eps) return norm + N(options.eps);
    return norm < N(options.eps) ? N(options.eps) : norm;  // NaN stays NaN
  }

  int64_t elements;  // of all layers
  int64_t workers() const { return 1 + elements / kWorkerElements; }
  int64_t count;
  bool small(int64_t layer) const { return count > 1 && states[layer].m.is_small(); }

  int64_t tasks(int64_t layer, int64_t stage) const {
    const ForwardState<T>& s = states[layer];
    if (is_scale(stage)) return max(1, ceil_div(s.m.elements(), kScaleElements));
    return is_sweep(stage) ? s.chunks : s.segments;
  }

  void task(int64_t layer, int64_t stage, int64_t k) const {
    ForwardState<T>& s = states[layer];
    if (is_scale(stage)) return scale(layer, k);
    if (options.n_power_iterations == 0) return measure(s, k);
    return is_sweep(stage) ? sweep(s, k) : reduce(s, k);
  }

  // sigma's share of a range of rows, from the u and v that were given.
  void measure(ForwardState<T>& s, int64_t k) const {
    const Range rows = part(s.m.rows, s.chunks, k);
    A total = 0;
    for (int64_t i = rows.begin; i < rows.end; ++i) {
      A row;
      dot_rows<1>(s.m, {{0, s.m.outer}, {i, i + 1}, {0, s.m.inner}}, i, s.v, &row);
      total += row * s.u[i];
    }
    s.chunk_squares[k] = total;
  }

  void sweep(ForwardState<T>& s, int64_t k) const {
    const Range units = part(s.units(), s.chunks, k);
    A* partial = s.partials + k * s.second_size();
    for (int64_t j = 0; j < s.second_size(); ++j) partial[j] = 0;
    const int64_t unit_bytes = max(1, s.m.elements() * int64_t(sizeof(T)) / max(1, s.units()));
    const int64_t step = max(8, kBlockBytes / unit_bytes);
    for (int64_t at = units.begin; at < units.end; at += step) {
      const Box box = s.box({at, min(at + step, units.end)});
      if (s.rows_first) {
        rows_product(s.m, box, s.v, s.u);
        columns_product(s.m, box, s.u, partial);
      } else {
        const Range columns = s.first_range(box);
        for (int64_t j = columns.begin; j < columns.end; ++j) s.v[j] = 0;
        columns_product(s.m, box, s.u, s.v);
        add_rows_product(s, box, partial);
      }
    }
    const Range first = s.first_range(s.box(units));
    s.chunk_squares[k] =
        units.begin < units.end ? sum_of_squares(s.first() + first.begin, first.end - first.begin) : 0;
  }

  static void add_rows_product(const ForwardState<T>& s, const Box& box, A* partial) {
    constexpr int64_t kRows = 64;
    A sums[kRows];
    for (int64_t i = 0; i < s.m.rows; i += kRows) {
      Box rows = box;
      rows.rows = {i, min(i + kRows, s.m.rows)};
      rows_product(s.m, rows, s.v, sums - i);
      for (int64_t r = i; r < rows.rows.end; ++r) partial[r] += sums[r - i];
    }
  }

  void reduce(ForwardState<T>& s, int64_t k) const {
    const Range range = part(s.second_size(), s.segments, k);
    A* out = s.second();
    const int64_t stride = s.second_size();
    for (int64_t j = range.begin; j < range.end; ++j) out[j] = s.partials[j];
    for (int64_t c = 1; c < s.chunks; ++c)
      for (int64_t j = range.begin; j < range.end; ++j) out[j] += s.partials[c * stride + j];
    multiply(out + range.begin, range.end - range.begin, s.first_factor);
    s.chunk_squares[k] = sum_of_squares(out + range.begin, range.end - range.begin);
  }

  void scale(int64_t layer, int64_t k) const {
    const ForwardState<T>& s = states[layer];
    const Range range = part(s.m.elements(), tasks(layer, stages() - 1), k);
    const T* in = s.m.data;
    T* out = static_cast<T*>(layers[layer].normalized);
    const Vec<A> factor = broadcast(s.scale);
    if (s.sigma != 0 &&
        !std::isnormal(s.scale)) {  // its reciprocal is out of range, the quotients may not be
      for (int64_t e = range.begin; e < range.end; ++e) out[e] = narrow<T>(widen(in[e]) / s.sigma);
      return;
    }
    write_range(out, range.begin, range.end, s.past_caches,
                [&](int64_t e, int64_t n) { return load_n(in + e, n) * factor; });
  }

  // x / max(norm, eps), or x / (norm + eps).
  void divide(A* x, int64_t n, double norm) const {
    const double by = denominator(norm);
    for (int64_t i = 0; i < n; ++i) x[i] = A(double(x[i]) / by);
  }
  // The second product of an iteration from the first vector, normalised.
  static void multiply_exactly(ForwardState<T>& s) {
    const Box all{{0, s.m.outer}, {0, s.m.rows}, {0, s.m.inner}};
    if (!s.rows_first) return rows_product(s.m, all, s.v, s.u);
    for (int64_t j = 0; j < s.m.columns(); ++j) s.v[j] = 0;
    columns_product(s.m, all, s.u, s.v);
  }

  void finish(int64_t layer, int64_t stage) const {
    ForwardState<T>& s = states[layer];
    if (is_scale(stage)) return;
    const bool iterates = options.n_power_iterations > 0;
    double total = 0;  // norms are of few numbers: double costs nothing
    const int64_t n = is_sweep(stage) ? s.chunks : s.segments;
    for (int64_t k = 0; k < n; ++k) total += double(s.chunk_squares[k]);
    if (!iterates) {
      s.sigma = A(total);
    } else {
      double norm = std::sqrt(total);
      if (is_sweep(stage)) s.exact = !is_ordinary<A>(norm);
      if (s.exact || !is_ordinary<A>(norm)) {
        if (is_sweep(stage)) {
          s.first_factor = 0;
          divide(s.first(), s.first_size(), exact_norm(s.first(), s.first_size()));
          return;
        }
        multiply_exactly(s);
        norm = exact_norm(s.second(), s.second_size());
        divide(s.second(), s.second_size(), norm);
        s.sigma = A(norm * (norm / denominator(norm)));
      } else {
        const A factor = 1 / denominator(A(norm));
        if (is_sweep(stage)) {
          multiply(s.first(), s.first_size(), factor);
          s.first_factor = factor;
          return;
        }
        multiply(s.second(), s.second_size(), factor);
        s.sigma = A(norm) * (A(norm) * factor);  // u^T M v, for the v (or u) that was just normalised
      }
    }
    s.scale = s.sigma == 0 ? A(0) : 1 / s.sigma;
    *static_cast<A*>(layers[layer].sigma) = s.sigma;
  }
};

template <class T>
void forward(SpectralNormForward* layers, int64_t count, const SpectralNormOptions& options,
             const Parallel& parallel) {
  using A = Acc<T>;
  const Scratch<ForwardState<T>> states_of(count);
  ForwardState<T>* states = states_of.at;
  int64_t scratch = 0, elements = 0;
  for (int64_t l = 0; l < count; ++l) {
    SpectralNormForward& f = layers[l];
    ForwardState<T>& s = states[l];
    s.m = Matrix<T>(f.in);
    s.rows_first = options.u_first != s.m.exchanged;
    s.u = static_cast<A*>(s.m.exchanged ? f.v : f.u);
    s.v = static_cast<A*>(s.m.exchanged ? f.u : f.v);
    const A *u = s.m.u(f.in), *v = s.m.v(f.in);
    for (int64_t i = 0; i < s.m.rows; ++i) s.u[i] = u[i];
    for (int64_t j = 0; j < s.m.columns(); ++j) s.v[j] = v[j];
    const int64_t units = options.n_power_iterations ? s.units() : s.m.rows;
    s.chunks = max(1, min(min(units, kMaxChunks), ceil_div(s.m.elements(), kChunkElements)));
    s.segments = max(1, ceil_div(s.second_size(), kReduceColumns));
    s.past_caches = s.m.elements() * int64_t(sizeof(T)) > kStreamWeightBytes;
    elements += s.m.elements();
    scratch += s.chunks * s.second_size() + max(s.chunks, s.segments);
  }
  const Scratch<A> memory(scratch);
  A* at = memory.at;
  for (int64_t l = 0; l < count; ++l) {
    ForwardState<T>& s = states[l];
    s.partials = at;
    at += s.chunks * s.second_size();
    s.chunk_squares = at;
    at += max(s.chunks, s.segments);
  }
  ForwardWork<T> work{layers, states, options, elements, count};
  run_staged(parallel, work, count, work.stages());
}

// ---- gradients ------------------------------------------------------------------------------------------
//
// First order, for the gradient g of W/sigma:   dW = g/sigma - <g,W>/sigma^2 E,  E = u v^T = d sigma / d W.
// Second order, for the gradient h of dW, with p = <h,g>, q = <h,E>, r = <g,W>:
//   grad_g = h/sigma - q/sigma^2 W
//   grad_W = -q/sigma^2 g + (2 q r/sigma^3 - p/sigma^2) E
// Both are: inner products over all elements, then one pass that writes alpha X + beta Y + gamma u v^T. Where
// sigma or a product is out of the range that is safe in A, both are done in double, by one thread.

constexpr int kProducts = 3;  // p, q, r

template <class T, class Layer>
struct GradientState {
  using A = Acc<T>;
  Matrix<T> m;
  const A *u, *v;
  int64_t chunks;
  A* products;  // [chunks][kProducts]
  A total[kProducts];
  double wide[kProducts];  // the same in double, where `exact`
  bool past_caches, exact;
};

// Rows of the matrix in memory order: (outer, row) pairs, each `inner` contiguous elements.
template <class T, class Layer>
struct GradientWork {
  using A = Acc<T>;
  Layer* layers;
  GradientState<T, Layer>* states;

  int64_t elements;  // of all layers
  int64_t workers() const { return 1 + elements / kWorkerElements; }
  int64_t count;
  bool small(int64_t layer) const { return count > 1 && states[layer].m.is_small(); }
  int64_t tasks(int64_t layer, int64_t) const { return states[layer].chunks; }

  void task(int64_t layer, int64_t stage, int64_t k) const {
    GradientState<T, Layer>& s = states[layer];
    const Range lines = part(s.m.outer * s.m.rows, s.chunks, k);
    if (stage == 0) {
      multiply_and_add(layers[layer], s, lines, s.products + k * kProducts);
    } else {
      if (s.exact)
        write_exactly(layers[layer], s, lines);
      else
        write(layers[layer], s, lines);
    }
  }

  void finish(int64_t layer, int64_t stage) const {
    if (stage != 0) return;
    GradientState<T, Layer>& s = states[layer];
    s.exact = !is_ordinary<A>(std::fabs(double(*static_cast<const A*>(layers[layer].sigma))));
    for (int p = 0; p < kProducts; ++p) {
      double total = 0;
      for (int64_t k = 0; k < s.chunks; ++k) total += double(s.products[k * kProducts + p]);
      s.total[p] = A(total);
      s.exact = s.exact || !(total == 0 || is_ordinary_product(std::fabs(total)));
    }
    if (s.exact) multiply_exactly(layers[layer], s);
  }

  static bool is_ordinary_product(double size) {
    constexpr double kMost = sizeof(A) == 8 ? 0x1p800 : 0x1p100;
    return size > 1 / kMost && size < kMost;
  }
  // f(element, row's u, column's v) of some lines, all in double.
  template <class F>
  static void each(const GradientState<T, Layer>& s, Range lines, const F& f) {
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const double u = double(s.u[line % s.m.rows]);
      const A* v = s.v + line / s.m.rows * s.m.inner;
      for (int64_t b = 0; b < s.m.inner; ++b) f(line * s.m.inner + b, u, double(v[b]));
    }
  }
  static double at(const void* x, int64_t e) { return double(widen(static_cast<const T*>(x)[e])); }
  static void put(void* x, int64_t e, double value) { static_cast<T*>(x)[e] = narrow<T>(A(value)); }
  static double exact_reciprocal(const void* sigma) {
    const double value = double(*static_cast<const A*>(sigma));
    return value == 0 ? 0 : 1 / value;
  }

  static void multiply_exactly(const SpectralNormBackward& f, GradientState<T, Layer>& s) {
    double r = 0;
    each(s, {0, s.m.outer * s.m.rows},
         [&](int64_t e, double, double) { r += at(f.grad, e) * at(s.m.data, e); });
    s.wide[2] = r;
  }
  static void multiply_exactly(const SpectralNormDoubleBackward& f, GradientState<T, Layer>& s) {
    double p = 0, q = 0, r = 0;
    each(s, {0, s.m.outer * s.m.rows}, [&](int64_t e, double u, double v) {
      const double g = at(f.grad, e), h = at(f.grad_grad_weight, e);
      p += h * g;
      q += h * u * v;
      r += g * at(s.m.data, e);
    });
    s.wide[0] = p;
    s.wide[1] = q;
    s.wide[2] = r;
  }
  static void write_exactly(const SpectralNormBackward& f, const GradientState<T, Layer>& s, Range lines) {
    const double inverse = exact_reciprocal(f.sigma), coefficient = -(s.wide[2] * inverse) * inverse;
    each(s, lines, [&](int64_t e, double u, double v) {
      put(f.grad_weight, e, at(f.grad, e) * inverse + coefficient * u * v);
    });
  }
  static void write_exactly(const SpectralNormDoubleBackward& f, const GradientState<T, Layer>& s,
                            Range lines) {
    const double inverse = exact_reciprocal(f.sigma), p = s.wide[0], q = s.wide[1], r = s.wide[2];
    const double minus_q = -(q * inverse) * inverse;
    const double outer = 2 * (q * inverse) * (r * inverse) * inverse - (p * inverse) * inverse;
    each(s, lines, [&](int64_t e, double u, double v) {
      put(f.grad_grad, e, at(f.grad_grad_weight, e) * inverse + minus_q * at(s.m.data, e));
      put(f.grad_weight, e, minus_q * at(f.grad, e) + outer * u * v);
    });
  }

  static void multiply_and_add(const SpectralNormBackward& f, const GradientState<T, Layer>& s, Range lines,
                               A* products) {
    const T* g = static_cast<const T*>(f.grad);
    const int64_t begin = lines.begin * s.m.inner, end = lines.end * s.m.inner;
    constexpr int L = kLanes<T>;
    Vec<A> sums[4] = {};
    int64_t e = begin;
    for (; e + 4 * L <= end; e += 4 * L)
      for (int j = 0; j < 4; ++j) sums[j] += load(g + e + j * L) * load(s.m.data + e + j * L);
    for (; e < end; e += L) {
      const int64_t n = min(L, end - e);
      sums[0] += load_partial(g + e, n) * load_partial(s.m.data + e, n);
    }
    products[0] = products[1] = 0;
    products[2] = sum<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
  }

  static void multiply_and_add(const SpectralNormDoubleBackward& f, const GradientState<T, Layer>& s,
                               Range lines, A* products) {
    const T* g = static_cast<const T*>(f.grad);
    const T* h = static_cast<const T*>(f.grad_grad_weight);
    constexpr int L = kLanes<T>;
    Vec<A> hg{}, huv{}, gw{};
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const A* v = s.v + line / s.m.rows * s.m.inner;
      Vec<A> hv{};
      for (int64_t b = 0; b < s.m.inner; b += L) {
        const int64_t n = min(L, s.m.inner - b), e = line * s.m.inner + b;
        const Vec<A> ge = load_n(g + e, n), he = load_n(h + e, n);
        hg += he * ge;
        gw += ge * load_n(s.m.data + e, n);
        hv += he * load_n(v + b, n);
      }
      huv += hv * broadcast(s.u[line % s.m.rows]);
    }
    products[0] = sum<A>(hg);
    products[1] = sum<A>(huv);
    products[2] = sum<A>(gw);
  }

  static A reciprocal(A sigma) { return sigma == 0 ? A(0) : 1 / sigma; }

  static void write(const SpectralNormBackward& f, const GradientState<T, Layer>& s, Range lines) {
    const T* g = static_cast<const T*>(f.grad);
    T* out = static_cast<T*>(f.grad_weight);
    const A inverse = reciprocal(*static_cast<const A*>(f.sigma));
    const A coefficient = -(s.total[2] * inverse) * inverse;
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const int64_t start = line * s.m.inner;
      const A* v = s.v + line / s.m.rows * s.m.inner - start;
      const Vec<A> x = broadcast(inverse), y = broadcast(coefficient * s.u[line % s.m.rows]);
      write_range(out, start, start + s.m.inner, s.past_caches, [&](int64_t e, int64_t n) {
        return multiply_add<A>(load_n(g + e, n), x, load_n(v + e, n) * y);
      });
    }
  }

  static void write(const SpectralNormDoubleBackward& f, const GradientState<T, Layer>& s, Range lines) {
    const T* g = static_cast<const T*>(f.grad);
    const T* h = static_cast<const T*>(f.grad_grad_weight);
    T* grad_grad = static_cast<T*>(f.grad_grad);
    T* grad_weight = static_cast<T*>(f.grad_weight);
    const A inverse = reciprocal(*static_cast<const A*>(f.sigma));
    const A p = s.total[0], q = s.total[1], r = s.total[2];
    const A minus_q = -(q * inverse) * inverse;
    const A outer = 2 * (q * inverse) * (r * inverse) * inverse - (p * inverse) * inverse;
    for (int64_t line = lines.begin; line < lines.end; ++line) {
      const int64_t start = line * s.m.inner, end = start + s.m.inner;
      const A* v = s.v + line / s.m.rows * s.m.inner - start;
      const Vec<A> x = broadcast(inverse), y = broadcast(minus_q),
                   z = broadcast(outer * s.u[line % s.m.rows]);
      write_range(grad_grad, start, end, s.past_caches, [&](int64_t e, int64_t n) {
        return multiply_add<A>(load_n(h + e, n), x, load_n(s.m.data + e, n) * y);
      });
      write_range(grad_weight, start, end, s.past_caches, [&](int64_t e, int64_t n) {
        return multiply_add<A>(load_n(g + e, n), y, load_n(v + e, n) * z);
      });
    }
  }
};

template <class T, class Layer>
void gradient(Layer* layers, int64_t count, const Parallel& parallel) {
  using A = Acc<T>;
  using State = GradientState<T, Layer>;
  const Scratch<State> states_of(count);
  const Scratch<A> products_of(count * kMaxChunks * kProducts);
  State* states = states_of.at;
  A* products = products_of.at;
  int64_t elements = 0;
  for (int64_t l = 0; l < count; ++l) {
    State& s = states[l];
    s.m = Matrix<T>(layers[l].in);
    s.u = s.m.u(layers[l].in);
    s.v = s.m.v(layers[l].in);
    s.chunks = max(1, min(min(s.m.outer * s.m.rows, kMaxChunks), ceil_div(s.m.elements(), kChunkElements)));
    elements += s.m.elements();
    s.products = products + l * kMaxChunks * kProducts;
    s.past_caches = s.m.elements() * int64_t(sizeof(T)) > kStreamWeightBytes;
  }
  GradientWork<T, Layer> work{layers, states, elements, count};
  run_staged(parallel, work, count, 2);
}

}  // namespace

extern const SpectralNormKernels spectral_norm = {
    GANKERN_EACH_DTYPE(forward),
    GANKERN_EACH_DTYPE(gradient, SpectralNormBackward),
    GANKERN_EACH_DTYPE(gradient, SpectralNormDoubleBackward),
};

}  // namespace GANKERN_ISA
}  // namespace gankern
