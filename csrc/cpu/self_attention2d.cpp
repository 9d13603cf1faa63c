// Attention between the positions of a map (Zhang et al. 2018, arXiv 1805.08318; Wang et al. 2017, arXiv 1711.07971)
// without a table of queries by keys. Of one sample, with queries Q [n, d], keys K [m, d] and values V [m, e]:
//
//   S = Q K^T,  P = softmax(S) over the keys,  O = P V
//
// First order, for the gradient G of O (products without a name are of elements):
//
//   B = G V^T,  b = rowsum(P B) = rowsum(G O),  D = P (B - b)
//   dQ = D K,  dK = D^T Q,  dV = P^T G
//
// Second order, for the gradients Hq, Hk, Hv of dQ, dK, dV:
//
//   E = Hq K^T + Q Hk^T,  a = rowsum(P E),  X = P (E - a),  W = G Hv^T,  U = P Hv
//   Y = E (B - b) - B a + W,  y = rowsum(P Y) = rowsum(P E (B - b)) - a b + rowsum(G U),  Z = P (Y - y)
//   dG = X V + U,  dQ = Z K + D Hk,  dK = Z^T Q + D^T Hq,  dV = X^T G
//
// The forward keeps of each query its largest score and 1 over its sum of exponentials, so that any part of P is had
// again from Q and K alone, and b, y come from sums over channels. One tile, kKeys keys of kVectors vectors of queries,
// goes through all steps while it is in the L1 cache:
//
//   forward          one pass over the keys, the sum and the result so far scaled where a larger score comes
//   backward         one pass over the keys (in half precision one more, since the O that is kept has not the places
//                    that b needs)
//   double backward  two: a, b, U and the first part of y; then all else, from P, E and B computed again
//
// Lanes of vectors are queries: what belongs to a query needs no sum across lanes. Sums over queries (dK, dV) are
// products with a transposed copy of the tile's Q and G, whose lanes are channels. All products are one micro-kernel,
// rows of single numbers times vectors, with the sums in registers.
//
// Work is split into samples and, where these are few, chunks of a sample's queries, each with its own sums for dK and
// dV, added in order, and one copy of the keys for all of them. Bound by arithmetic: multiply-adds for a query and a key,
// beside exponentials (one each pass):
//
//   forward d + e,   backward 3 d + 2 e,   double backward 11 d + 6 e
#include "self_attention2d.h"

#include <cstring>
#include <type_traits>

#include "common.h"
#include "vec_math.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int64_t kVectors = 4;        // of queries in a tile
constexpr int64_t kKeys = 32;          // in a tile
constexpr int64_t kTasks = 16;         // where there are fewer samples, samples are split
constexpr int64_t kTurned = 16;        // keys that are turned at a time: a cache line of each channel
constexpr int64_t kTurnCost = 32;      // of a value, in multiply-adds
constexpr int64_t kGrain = 64 * 1024;  // multiply-adds that are worth a thread
#if defined(__AVX512F__)
constexpr int kWide = 4;  // vectors of a row of sums in registers
#else
constexpr int kWide = 2;
#endif

// c[r][*] (+)= sum over k of a[r * a_row + k * a_col] b[k][*], of R rows and W vectors; depth >= 1.
template <int R, int W, class A>
inline void block(int64_t depth, const A* a, int64_t a_row, int64_t a_col, const A* b, int64_t b_row, A* c,
                  int64_t c_row, bool add) {
  constexpr int L = kVectorBytes / int(sizeof(A));
  Vec<A> sums[R][W];
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) sums[r][w] = add ? load(c + r * c_row + w * L) : Vec<A>{};
  int64_t k = 0;
  do {  // a loop that may run no times makes GCC keep the sums on the stack as well
    Vec<A> row[W];
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) row[w] = load(b + k * b_row + w * L);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const Vec<A> x = broadcast(a[r * a_row + k * a_col]);
#pragma GCC unroll 16
      for (int w = 0; w < W; ++w) sums[r][w] += x * row[w];
    }
  } while (++k < depth);
#pragma GCC unroll 16
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 16
    for (int w = 0; w < W; ++w) store(c + r * c_row + w * L, sums[r][w]);
}

template <int W, class A>
inline void rows_of(int64_t rows, int64_t depth, const A* a, int64_t a_row, int64_t a_col, const A* b,
                    int64_t b_row, A* c, int64_t c_row, bool add) {
  constexpr int R = W == 1 ? 8 : 6;
  const auto some = [&](auto few) {
    constexpr int n = decltype(few)::value;
    block<n, W>(depth, a, a_row, a_col, b, b_row, c, c_row, add);
    a += n * a_row;
    c += n * c_row;
    rows -= n;
  };
  // The last 8 as 4 and 4: after 6, two rows have too few sums to fill the multiply-adders' latency.
  while (rows >= R && (W == 1 || rows != 8)) some(std::integral_constant<int, R>());
  while (rows >= 4) some(std::integral_constant<int, 4>());
  if (rows >= 2) some(std::integral_constant<int, 2>());
  if (rows >= 1) some(std::integral_constant<int, 1>());
}

// The product of a [rows, depth], read by its strides, and b [depth, width], of whole vectors.
template <class A>
void product(int64_t rows, int64_t width, int64_t depth, const A* a, int64_t a_row, int64_t a_col, const A* b,
             int64_t b_row, A* c, int64_t c_row, bool add) {
  constexpr int L = kVectorBytes / int(sizeof(A));
  int64_t at = 0;
  const auto some = [&](auto wide) {
    constexpr int n = decltype(wide)::value;
    rows_of<n>(rows, depth, a, a_row, a_col, b + at, b_row, c + at, c_row, add);
    at += n * L;
  };
  while (width - at >= kWide * L) some(std::integral_constant<int, kWide>());
  if (kWide > 2 && width - at >= 2 * L) some(std::integral_constant<int, 2>());
  if (width - at >= L) some(std::integral_constant<int, 1>());
}

template <class T, int kOrder>
struct Attention {
  using A = Acc<T>;
  using V = Vec<A>;
  static constexpr int L = kLanes<T>;
  static constexpr int64_t kTile = kVectors * L;  // queries
  // The least finite number: a score of -infinity is less, and adds nothing.
  static constexpr A kLeast =
      std::is_same<A, double>::value ? A(-0x1.fffffffffffffp1023) : A(-0x1.fffffep127);

  const SelfAttention& in;
  const int64_t d = in.dims, e = in.values, both = d + e, n = in.queries, m = in.keys;
  const int64_t tiles = ceil_div(n, kTile);
  const int64_t parts = max(1, min(ceil_div(kTasks, max(in.samples, 1)), tiles));  // of a sample
  const int64_t own_keys = parts > 1 ? 0 : m * both;                               // room for them in a task
  // Sums for dK and dV: a row for a key, of whole vectors, the keys' channels first.
  const int64_t d_width = round_up(d, L), e_width = round_up(e, L), width = d_width + e_width;

  // The queries of a tile as columns: `rows` rows of it, zeros after the last query.
  void take(const T* from, int64_t rows, int64_t first, A* to) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t at = first + v * L, left = n - at;
        const T* p = from + r * n + at;
        store(to + r * kTile + v * L, left >= L ? load(p) : left > 0 ? load_partial(p, left) : V{});
      }
    }
  }
  void give(const A* from, int64_t rows, int64_t first, T* to) const {
    for (int64_t r = 0; r < rows; ++r) {
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t at = first + v * L, left = n - at;
        const V x = load(from + r * kTile + v * L);
        if (left >= L)
          store(to + r * n + at, x);
        else if (left > 0)
          store_partial(to + r * n + at, x, left);
      }
    }
  }
  // [rows, kTile] as [kTile, row].
  static void turn(const A* from, int64_t rows, A* to, int64_t row) {
    for (int64_t i = 0; i < kTile; ++i) {
      for (int64_t r = 0; r < rows; ++r) to[i * row + r] = from[r * kTile + i];
      for (int64_t r = rows; r < row; ++r) to[i * row + r] = 0;
    }
  }
  // Keys [first, last) of a sample and their values, a key's channels side by side, to [m, both]; zeros from null.
  void take_keys(const void* from, int64_t sample, int64_t first, int64_t last, A* to) const {
    if (!from) {
      std::memset(to + first * both, 0, size_t((last - first) * both) * sizeof(A));
      return;
    }
    const T* kv = static_cast<const T*>(from) + sample * both * m;
    for (int64_t j = first; j < last; j += kTurned)
      for (int64_t c = 0; c < both; ++c)
        for (int64_t k = j; k < min(j + kTurned, last); ++k) to[k * both + c] = widen(kv[c * m + k]);
  }
  // All keys of a sample: of those that its tasks share (see run), or taken into the task's own memory.
  const A* keys_of(const void* from, int64_t sample, const A* shared, A* own) const {
    if (shared) return shared + sample * m * both;
    take_keys(from, sample, 0, m, own);
    return own;
  }

  // f(offset, vector) for the vectors of a tile of `keys` keys.
  template <class F>
  static void each(int64_t keys, const F& f) {
    for (int64_t j = 0; j < keys; ++j)
#pragma GCC unroll 4
      for (int64_t v = 0; v < kVectors; ++v) f(j * kTile + v * L, v);
  }

  void forward(int64_t sample, int64_t first_tile, int64_t last_tile, const A* shared) const {
    const Scratch<A> memory((both + kKeys) * kTile + own_keys);
    A *q = memory.at, *o = q + d * kTile, *p = o + e * kTile;
    const A* kv = keys_of(in.kv, sample, shared, p + kKeys * kTile);
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t first = tile * kTile;
      take(static_cast<const T*>(in.q) + sample * d * n, d, first, q);
      V most[kVectors], sum[kVectors];
      for (int64_t v = 0; v < kVectors; ++v) most[v] = broadcast(kLeast), sum[v] = V{};
      for (int64_t j = 0; j < m; j += kKeys) {
        const int64_t keys = min(kKeys, m - j);
        product(keys, kTile, d, kv + j * both, both, 1, q, kTile, p, kTile, false);
        V now[kVectors];
        for (int64_t v = 0; v < kVectors; ++v) now[v] = most[v];
        each(keys, [&](int64_t at, int64_t v) {
          const V s = load(p + at);
          now[v] = s > now[v] ? s : now[v];
        });
        if (j > 0) {
          V factor[kVectors];
          for (int64_t v = 0; v < kVectors; ++v) {
            factor[v] = exp_minus(now[v] - most[v]);
            sum[v] *= factor[v];
          }
          each(e, [&](int64_t at, int64_t v) { store(o + at, load(o + at) * factor[v]); });
        }
        for (int64_t v = 0; v < kVectors; ++v) most[v] = now[v];
        each(keys, [&](int64_t at, int64_t v) {
          const V x = exp_minus(now[v] - load(p + at));
          sum[v] += x;
          store(p + at, x);
        });
        product(e, kTile, keys, kv + j * both + d, 1, both, p, kTile, o, kTile, j > 0);
      }
      for (int64_t v = 0; v < kVectors; ++v) sum[v] = broadcast<A>(1) / sum[v];
      each(e, [&](int64_t at, int64_t v) { store(o + at, load(o + at) * sum[v]); });
      give(o, e, first, static_cast<T*>(in.out) + sample * e * n);
      A* stats = static_cast<A*>(in.out_stats) + sample * 2 * n + first;
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t left = min(L, n - first - v * L);
        if (left <= 0) break;
        store_partial(stats + v * L, most[v], left);
        store_partial(stats + n + v * L, sum[v], left);
      }
    }
  }

  // The probabilities of a tile.
  void probabilities(int64_t keys, const A* key, const A* q, const V* most, const V* scale, A* p) const {
    product(keys, kTile, d, key, both, 1, q, kTile, p, kTile, false);
    each(keys, [&](int64_t at, int64_t v) { store(p + at, exp_minus(most[v] - load(p + at)) * scale[v]); });
  }

  // Gradients of a part of a sample's queries; `sums` [m, width] for keys and values. `shared_h` as `shared`.
  void backward(int64_t sample, int64_t first_tile, int64_t last_tile, const A* shared, const A* shared_h,
                A* sums) const {
    constexpr bool second = kOrder == kDoubleBackward;
    const int64_t orders = second ? 2 : 1;
    const int64_t a_tile = orders * (own_keys + (2 * d + e) * kTile + d_width * kTile) + e_width * kTile +
                           2 * orders * kKeys * kTile;
    const Scratch<A> memory(a_tile);
    A* next = memory.at;
    const auto room = [&](int64_t count) {
      A* here = next;
      next += count;
      return here;
    };
    const A* kv = keys_of(in.kv, sample, shared, room(own_keys));
    A *q = room(d * kTile), *g = room(e * kTile), *dq = room(d * kTile);
    A *turned_q = room(d_width * kTile), *turned_g = room(e_width * kTile);
    A *p = room(kKeys * kTile), *b = room(kKeys * kTile);
    const A* h_kv = kv;
    A *h_q = q, *turned_h_q = q, *u = dq, *x = p, *y = p;
    if constexpr (second) {
      h_kv = keys_of(in.h_kv, sample, shared_h, room(own_keys));
      h_q = room(d * kTile), turned_h_q = room(d_width * kTile), u = room(e * kTile);
      x = room(kKeys * kTile), y = room(kKeys * kTile);
    }
    for (int64_t tile = first_tile; tile < last_tile; ++tile) {
      const int64_t first = tile * kTile;
      take(static_cast<const T*>(in.q) + sample * d * n, d, first, q);
      take(static_cast<const T*>(in.grad) + sample * e * n, e, first, g);
      turn(q, d, turned_q, d_width);
      turn(g, e, turned_g, e_width);
      V most[kVectors], scale[kVectors], mean[kVectors];
      const A* stats = static_cast<const A*>(in.stats) + sample * 2 * n + first;
      const T* o = static_cast<const T*>(in.o) + sample * e * n + first;
      for (int64_t v = 0; v < kVectors; ++v) {
        const int64_t left = max(0, min(L, n - first - v * L));
        most[v] = load_partial(stats + v * L, left);
        scale[v] = load_partial(stats + n + v * L, left);
        mean[v] = V{};
        for (int64_t c = 0; c < e; ++c)
          mean[v] += load(g + c * kTile + v * L) * load_partial(o + c * n + v * L, left);
      }
      V a[kVectors] = {}, rest[kVectors] = {}, exact[kVectors] = {};
      if constexpr (!second && sizeof(T) < sizeof(A)) {  // the result was rounded, and b needs all its places
        for (int64_t j = 0; j < m; j += kKeys) {
          const int64_t keys = min(kKeys, m - j);
          const A* key = kv + j * both;
          probabilities(keys, key, q, most, scale, p);
          product(keys, kTile, e, key + d, both, 1, g, kTile, b, kTile, false);
          each(keys, [&](int64_t at, int64_t v) { exact[v] += load(p + at) * load(b + at); });
        }
        for (int64_t v = 0; v < kVectors; ++v) mean[v] = exact[v];
      }
      if constexpr (second) {
        if (in.h_q)
          take(static_cast<const T*>(in.h_q) + sample * d * n, d, first, h_q);
        else
          std::memset(h_q, 0, size_t(d * kTile) * sizeof(A));
        turn(h_q, d, turned_h_q, d_width);
        for (int64_t j = 0; j < m; j += kKeys) {
          const int64_t keys = min(kKeys, m - j);
          const A *key = kv + j * both, *h = h_kv + j * both;
          probabilities(keys, key, q, most, scale, p);
          product(keys, kTile, d, key, both, 1, h_q, kTile, x, kTile, false);
          product(keys, kTile, d, h, both, 1, q, kTile, x, kTile, true);
          product(keys, kTile, e, key + d, both, 1, g, kTile, b, kTile, false);
          each(keys, [&](int64_t at, int64_t v) {
            const V pe = load(p + at) * load(x + at);
            a[v] += pe;
            rest[v] += pe * (load(b + at) - mean[v]);
            exact[v] += load(p + at) * load(b + at);
          });
          product(e, kTile, keys, h + d, 1, both, p, kTile, u, kTile, j > 0);
        }
        for (int64_t v = 0; v < kVectors; ++v) {
          rest[v] += a[v] * (mean[v] - 2 * exact[v]);
          mean[v] = exact[v];
          for (int64_t c = 0; c < e; ++c)
            rest[v] += load(g + c * kTile + v * L) * load(u + c * kTile + v * L);
        }
      }
      for (int64_t j = 0; j < m; j += kKeys) {
        const int64_t keys = min(kKeys, m - j);
        const A *key = kv + j * both, *h = h_kv + j * both;
        A* sum = sums + j * width;
        probabilities(keys, key, q, most, scale, p);
        product(keys, kTile, e, key + d, both, 1, g, kTile, b, kTile, false);
        if constexpr (!second) {
          product(keys, e_width, kTile, p, kTile, 1, turned_g, e_width, sum + d_width, width, true);
          each(keys, [&](int64_t at, int64_t v) { store(b + at, load(p + at) * (load(b + at) - mean[v])); });
          product(d, kTile, keys, key, 1, both, b, kTile, dq, kTile, j > 0);
          product(keys, d_width, kTile, b, kTile, 1, turned_q, d_width, sum, width, true);
        } else {
          product(keys, kTile, d, key, both, 1, h_q, kTile, x, kTile, false);
          product(keys, kTile, d, h, both, 1, q, kTile, x, kTile, true);
          each(keys, [&](int64_t at, int64_t v) {
            const V bs = load(b + at);
            store(y + at, load(x + at) * (bs - mean[v]) - bs * a[v]);
          });
          product(keys, kTile, e, h + d, both, 1, g, kTile, y, kTile, true);
          each(keys, [&](int64_t at, int64_t v) {
            const V ps = load(p + at);
            store(x + at, ps * (load(x + at) - a[v]));
            store(b + at, ps * (load(b + at) - mean[v]));
            store(y + at, ps * (load(y + at) - rest[v]));
          });
          product(e, kTile, keys, key + d, 1, both, x, kTile, u, kTile, true);
          product(d, kTile, keys, key, 1, both, y, kTile, dq, kTile, j > 0);
          product(d, kTile, keys, h, 1, both, b, kTile, dq, kTile, true);
          product(keys, d_width, kTile, y, kTile, 1, turned_q, d_width, sum, width, true);
          product(keys, d_width, kTile, b, kTile, 1, turned_h_q, d_width, sum, width, true);
          product(keys, e_width, kTile, x, kTile, 1, turned_g, e_width, sum + d_width, width, true);
        }
      }
      give(dq, d, first, static_cast<T*>(in.out_q) + sample * d * n);
      if constexpr (second) give(u, e, first, static_cast<T*>(in.out) + sample * e * n);
    }
  }

  // Gradients of keys [begin, end) of a sample, from the sums of its parts.
  void finish(int64_t sample, const A* sums, int64_t begin, int64_t end) const {
    T* to = static_cast<T*>(in.out_kv) + sample * both * m;
    const Scratch<A> memory(width);
    for (int64_t j = begin; j < end; ++j) {
      for (int64_t c = 0; c < width; c += L) {
        V sum = load(sums + j * width + c);
        for (int64_t part = 1; part < parts; ++part) sum += load(sums + (part * m + j) * width + c);
        store(memory.at + c, sum);
      }
      for (int64_t c = 0; c < d; ++c) to[c * m + j] = narrow<T>(memory.at[c]);
      for (int64_t c = 0; c < e; ++c) to[(d + c) * m + j] = narrow<T>(memory.at[d_width + c]);
    }
  }

  void run(const Parallel& parallel) const {
    const int64_t cost = max(1, ceil_div(tiles, parts) * kTile * m * (both << kOrder));
    // Where tasks share a sample, its keys are turned once for all of them: [samples, m, both].
    const int64_t turned = parts > 1 ? in.samples * m * both : 0;
    const Scratch<A> keys(turned), keys_h(kOrder == kDoubleBackward ? turned : 0);
    const A *shared = turned ? keys.at : nullptr, *shared_h = turned ? keys_h.at : nullptr;
    const int64_t slices = ceil_div(m, kTurned);
    parallel_for(parallel, turned ? in.samples * slices : 0, ceil_div(kGrain, kTurnCost * kTurned * both),
                 [&](int64_t begin, int64_t end) {
                   for (int64_t at = begin; at < end; ++at) {
                     const int64_t sample = at / slices, first = at % slices * kTurned,
                                   last = min(first + kTurned, m);
                     take_keys(in.kv, sample, first, last, keys.at + sample * m * both);
                     if (kOrder == kDoubleBackward)
                       take_keys(in.h_kv, sample, first, last, keys_h.at + sample * m * both);
                   }
                 });
    const bool kept = kOrder != kForward && parts > 1;  // sums that are added when all are there
    const Scratch<A> partial(kept ? in.samples * parts * m * width : 0);
    parallel_for(parallel, in.samples * parts, ceil_div(kGrain, cost), [&](int64_t begin, int64_t end) {
      const Scratch<A> own(kOrder != kForward && !kept ? m * width : 0);
      for (int64_t task = begin; task < end; ++task) {
        const int64_t sample = task / parts, part = task % parts;
        const int64_t first = tiles * part / parts, last = tiles * (part + 1) / parts;
        if constexpr (kOrder == kForward) {
          forward(sample, first, last, shared);
        } else {
          A* sums = kept ? partial.at + task * m * width : own.at;
          std::memset(sums, 0, size_t(m * width) * sizeof(A));
          backward(sample, first, last, shared, shared_h, sums);
          if (!kept) finish(sample, sums, 0, m);
        }
      }
    });
    if (!kept) return;
    parallel_for(parallel, in.samples * m, ceil_div(kGrain, parts * width), [&](int64_t begin, int64_t end) {
      for (int64_t at = begin; at < end;) {
        const int64_t sample = at / m, first = at % m, last = min(m, first + end - at);
        finish(sample, partial.at + sample * parts * m * width, first, last);
        at += last - first;
      }
    });
  }
};

template <class T, int kOrder>
void run(const SelfAttention& in, const Parallel& parallel) {
  Attention<T, kOrder>{in}.run(parallel);
}

}  // namespace

extern const Orders<SelfAttention> self_attention2d = GANKERN_EACH_ORDER(run);

}  // namespace GANKERN_ISA
}  // namespace gankern
