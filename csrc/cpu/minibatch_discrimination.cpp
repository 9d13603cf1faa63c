// Minibatch discrimination (Salimans 2016, arXiv 1606.03498, section 3.2) without a tensor of pairs.
//
//   e_ij[b] = exp(-sum_c |m_i[b,c] - m_j[b,c]|),  o_i[b] = sum over j != i of e_ij[b]
//
// Gradient of m for the gradient g of o, with s_c = sign(m_j[c] - m_i[c]), sign(0) = 0:
//   w_ij = (g_i + g_j) e_ij
//   dm_i[c] = sum_j w_ij s_c
//   dm_j[c] = -sum_i w_ij s_c
// Second order, for the gradient h of dm, with p_ij = -e_ij sum_c s_c (h_j[c] - h_i[c]):
//   dg_i = sum_j p_ij
//   and the gradient of m as above, with w_ij = (g_i + g_j) p_ij
// Between two sets i is of the one and j of the other, and g_j is absent. So all three orders are one sweep
// over pairs.
//
// Each kernel b is a problem of its own. Its slice of m is copied to [dims][points], where the points of one
// coordinate lie side by side: a vector holds neighbouring j, i is broadcast, nothing is gathered. Within a
// set only pairs j > i are visited, which add to i and to j at once. A block is 4 rows i by some vectors of j:
//
//   first    distances, exp and w of all its pairs; w stays in the L1 cache
//   second   (gradients) for each coordinate, w s to the 4 rows (in registers) and to the columns (in the cache)
//
// Per pair and b, in AVX-512 instructions of one lane each: forward 3 dims + 10; backward 7 dims + 10; double
// backward 10 dims + 13. Memory traffic is m once in and its gradient once out; the work is N^2/2 times that:
// bound by arithmetic. (Keeping differences and signs in registers between the two saves instructions, not
// time: half as many rows fit.) Scratch: a slice a thread.
//
// Threads take slices. Where there are few slices, the points are cut into tiles, and pairs of tiles that
// share no point run at the same time, in rounds, as in a tournament: each tile's sums are added to by one
// thread at a time and in the order of the rounds, without partial copies. Which of the two follows from the
// shape alone, so the result does not depend on the number of threads.
#include "minibatch_discrimination.h"

#include <cstring>

#include "common.h"
#include "vec_math.h"

namespace gankern {
namespace GANKERN_ISA {
namespace {

constexpr int kRows = 4;                   // of a block: they share each load of the columns
constexpr int kVectors = 16;               // of columns of a block at most
constexpr int64_t kTileBytes = 32 * 1024;  // of a tile of columns, which many rows visit
constexpr int64_t kPrefetchBytes = 256 * 1024;
constexpr int64_t kManySlices = 32;  // slices enough for the threads: no tournament
constexpr int64_t kTournamentPairs =
    1 << 18;  // pairs of points a slice from which a tournament is worth its rounds
constexpr int64_t kTournamentTiles = 16;

template <class A>
constexpr int kLanesOf = kVectorBytes / int(sizeof(A));
template <class A>
constexpr int64_t kStep = kLanesOf<A> > kRows ? kLanesOf<A> : kRows;  // tiles and padding are multiples of it

struct Range {
  int64_t begin, end;
};

// ---- one slice ------------------------------------------------------------------------------------------

// The points of a set for one kernel. Coordinate c of point i is x[c * stride + i]; padding is zero.
template <class A>
struct Side {
  int64_t count, stride;
  A *x, *h, *out;  // [dims][stride]; h and out where the order has them
  A *g, *sums;     // [stride]
};

// {sum(v[0]), sum(v[1]), ...} added to kRows neighbouring values, four at a time.
template <class A>
inline void add_four_sums(const Vec<A>* v, A* to) {
  for (int r = 0; r < 4; ++r) to[r] += sum<A>(v[r]);
}
#if defined(__AVX512F__)
inline void add_four_sums(const Vec<float>* v, float* to) {
  // Masked forms with full masks: GCC's others warn of their own undefined operand.
  const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
  const __m512 ab = _mm512_add_ps(_mm512_maskz_unpacklo_ps(0xffff, a, b),
                                  _mm512_maskz_unpackhi_ps(0xffff, a, b));  // a b a b in each quarter
  const __m512 cd =
      _mm512_add_ps(_mm512_maskz_unpacklo_ps(0xffff, c, d), _mm512_maskz_unpackhi_ps(0xffff, c, d));
  const __m512 abcd = _mm512_add_ps(_mm512_shuffle_ps(ab, cd, 0x44), _mm512_shuffle_ps(ab, cd, 0xee));
  const __m256 half =
      _mm256_add_ps(_mm512_castps512_ps256(abcd), _mm512_maskz_extractf32x8_ps(0xff, abcd, 1));
  const __m128 quarter = _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1));
  _mm_storeu_ps(to, _mm_add_ps(_mm_loadu_ps(to), quarter));
}
#endif

template <class A>
inline void add_sums(const Vec<A>* v, A* to) {
  for (int r = 0; r < kRows; r += 4) add_four_sums(v + r, to + r);
}

template <class A>
inline Vec<A> lane_numbers() {
  Vec<A> x;
  for (int l = 0; l < kLanesOf<A>; ++l) x[l] = A(l);
  return x;
}

// x where the pair (row, column + lane) is one to count, and 0 elsewhere.
template <bool kOneSet, class A>
inline Vec<A> keep_pairs(Vec<A> x, const Side<A>& rows, int64_t row, const Side<A>& columns, int64_t column) {
  const int64_t last = row < rows.count ? columns.count - column : 0;
  const Vec<A> lane = lane_numbers<A>();
  const auto after = lane > broadcast<A>(kOneSet ? A(row - column) : A(-1));
  const auto before = lane < broadcast<A>(A(last));
  return (after & before) ? x : Vec<A>{};
}

// Rows i to i + kRows - 1 with the columns of a range that begins and ends at whole vectors.
template <class A, int kOrder, bool kOneSet>
void block(const Side<A>& rows, int64_t i, const Side<A>& columns, Range range, int64_t dims) {
  constexpr int L = kLanesOf<A>;
  Vec<A> row_sums[kRows] = {};
  Vec<A> w[kVectors][kRows];
  Vec<A> row_grad[kRows];
  if constexpr (kOrder != kForward)
    for (int r = 0; r < kRows; ++r) row_grad[r] = broadcast<A>(rows.g[i + r]);

  for (int64_t begin = range.begin; begin < range.end; begin += kVectors * L) {
    const int vectors = int(min(kVectors, (range.end - begin) / L));
    for (int v = 0; v < vectors; ++v) {
      const int64_t j = begin + v * L;
      const bool partial = (kOneSet && j < i + kRows) || j + L > columns.count || i + kRows > rows.count;
      Vec<A> distance[kRows], q[kRows];
      for (int64_t c = 0; c < dims; ++c) {
        const Vec<A> y = load(columns.x + c * columns.stride + j);
        const A* x = rows.x + c * rows.stride + i;
        Vec<A> d[kRows];
        for (int r = 0; r < kRows; ++r) d[r] = y - broadcast<A>(x[r]);
        for (int r = 0; r < kRows; ++r) distance[r] = c == 0 ? abs(d[r]) : distance[r] + abs(d[r]);
        if constexpr (kOrder == kDoubleBackward) {
          const Vec<A> hy = load(columns.h + c * columns.stride + j);
          const A* hx = rows.h + c * rows.stride + i;
          for (int r = 0; r < kRows; ++r) {
            const Vec<A> dh = broadcast<A>(hx[r]) - hy;
            q[r] = c == 0 ? sign(d[r]) * dh : q[r] + sign(d[r]) * dh;
          }
        }
      }
      Vec<A> e[kRows];
      for (int r = 0; r < kRows; ++r) e[r] = exp_minus(distance[r]);
      if constexpr (kOrder == kDoubleBackward)
        for (int r = 0; r < kRows; ++r) e[r] = e[r] * q[r];
      if constexpr (kOrder != kForward) {
        Vec<A> column_grad{};
        if constexpr (kOneSet) column_grad = load(columns.g + j);
        for (int r = 0; r < kRows; ++r) w[v][r] = e[r] * (kOneSet ? row_grad[r] + column_grad : row_grad[r]);
        if (partial)
          for (int r = 0; r < kRows; ++r) w[v][r] = keep_pairs<kOneSet>(w[v][r], rows, i + r, columns, j);
      }
      if constexpr (kOrder != kBackward) {
        if (partial)
          for (int r = 0; r < kRows; ++r) e[r] = keep_pairs<kOneSet>(e[r], rows, i + r, columns, j);
        Vec<A> column_sums{};
        for (int r = 0; r < kRows; ++r) {
          row_sums[r] += e[r];
          column_sums = r == 0 ? e[r] : column_sums + e[r];
        }
        if constexpr (kOneSet) store(columns.sums + j, load(columns.sums + j) + column_sums);
      }
    }
    if constexpr (kOrder != kForward) {
      for (int64_t c = 0; c < dims; ++c) {
        const A* x = rows.x + c * rows.stride + i;
        const A* y = columns.x + c * columns.stride + begin;
        A* out = columns.out + c * columns.stride + begin;
        Vec<A> row_x[kRows], row_out[kRows] = {};
        for (int r = 0; r < kRows; ++r) row_x[r] = broadcast<A>(x[r]);
        for (int v = 0; v < vectors; ++v) {
          Vec<A> column_out = load(out + v * L);
          for (int r = 0; r < kRows; ++r) {
            const Vec<A> s = sign(load(y + v * L) - row_x[r]);
            row_out[r] += w[v][r] * s;
            column_out -= w[v][r] * s;
          }
          store(out + v * L, column_out);
        }
        add_sums(row_out, rows.out + c * rows.stride + i);
      }
    }
  }
  if constexpr (kOrder != kBackward) add_sums(row_sums, rows.sums + i);
}

// All pairs of a tile of rows with a tile of columns.
template <class A, int kOrder, bool kOneSet>
void tile(const Side<A>& rows, Range i, const Side<A>& columns, Range j, int64_t dims) {
  for (int64_t row = i.begin; row < min(i.end, rows.count); row += kRows) {
    Range range = j;
    if (kOneSet) range.begin = max(range.begin, row / kLanesOf<A> * kLanesOf<A>);
    if (range.begin < range.end) block<A, kOrder, kOneSet>(rows, row, columns, range, dims);
  }
}

// ---- slices between [points, kernels, dims] and [dims][points] -------------------------------------------

template <class T>
struct Problem {
  using A = Acc<T>;
  const MinibatchDiscrimination& in;
  int order;

  static int64_t padded(int64_t count) { return ceil_div(count, kStep<A>) * kStep<A>; }
  // An odd number of steps: rows of a power of two would all fall into the same few places of the cache.
  static int64_t stride(int64_t count) { return (ceil_div(count, kStep<A>) | 1) * kStep<A>; }
  // Rows of scratch for a set: x, out, h, g, sums.
  int64_t lines() const { return in.dims * (order == kForward ? 1 : order == kBackward ? 2 : 3) + 2; }
  int64_t scratch_of(const PairSet& set) const { return lines() * stride(set.count); }
  int64_t scratch() const { return scratch_of(in.rows) + (in.one_set ? 0 : scratch_of(in.columns)); }

  Side<A> side(const PairSet& set, A* at) const {
    Side<A> s{set.count, stride(set.count), at, nullptr, nullptr, nullptr, nullptr};
    const int64_t plane = in.dims * s.stride;
    at += plane;
    if (order != kForward) {
      s.out = at;
      at += plane;
    }
    if (order == kDoubleBackward) {
      s.h = at;
      at += plane;
    }
    s.g = at;
    s.sums = at + s.stride;
    return s;
  }

  // [count, kernels, width] of kernel b to [width][stride], zeros behind.
  void gather(const void* from, int64_t b, int64_t width, const Side<A>& side, A* to) const {
    if (!from) {
      std::memset(to, 0, size_t(width * side.stride) * sizeof(A));
      return;
    }
    const T* p = static_cast<const T*>(from) + b * width;
    for (int64_t c = 0; c < width; ++c) {
      A* line = to + c * side.stride;
      for (int64_t i = 0; i < side.count; ++i) line[i] = widen(p[i * in.kernels * width + c]);
      for (int64_t i = side.count; i < side.stride; ++i) line[i] = 0;
    }
  }
  void scatter(const A* from, int64_t b, int64_t width, const Side<A>& side, void* to) const {
    if (!to) return;
    T* p = static_cast<T*>(to) + b * width;
    for (int64_t i = 0; i < side.count; ++i, p += in.kernels * width)
      for (int64_t c = 0; c < width; ++c) p[c] = narrow<T>(from[c * side.stride + i]);
  }

  // Asks for a tensor's part of some slices, [count, first to last, width], where it fits into a core's own
  // cache: each slice alone takes a few bytes here and there, for which it would wait one by one.
  void prefetch(const void* tensor, int64_t count, int64_t first, int64_t last, int64_t width) const {
    const int64_t bytes = (last - first) * width * int64_t(sizeof(T));
    if (!tensor || count * bytes > kPrefetchBytes) return;
    const char* p = static_cast<const char*>(tensor) + first * width * int64_t(sizeof(T));
    for (int64_t i = 0; i < count; ++i, p += in.kernels * width * int64_t(sizeof(T)))
      for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(p + at);
  }
  void prefetch(const PairSet& set, int64_t first, int64_t last) const {
    prefetch(set.m, set.count, first, last, in.dims);
    prefetch(set.grad, set.count, first, last, 1);
    prefetch(set.grad_m, set.count, first, last, in.dims);
    prefetch(set.sums, set.count, first, last, 1);
    prefetch(set.out_m, set.count, first, last, in.dims);
  }

  void unpack(const PairSet& set, int64_t b, const Side<A>& s) const {
    gather(set.m, b, in.dims, s, s.x);
    if (order != kForward) {
      gather(set.grad, b, 1, s, s.g);
      std::memset(s.out, 0, size_t(in.dims * s.stride) * sizeof(A));
    }
    if (order == kDoubleBackward) gather(set.grad_m, b, in.dims, s, s.h);
    std::memset(s.sums, 0, size_t(s.stride) * sizeof(A));
  }
  void pack(const PairSet& set, int64_t b, const Side<A>& s) const {
    if (order == kForward && in.one_set && in.include_self) add_self(s);
    scatter(s.sums, b, 1, s, set.sums);
    if (order != kForward) scatter(s.out, b, in.dims, s, set.out_m);
  }
  // A point's similarity to itself: 1, and NaN where it has an infinity or NaN.
  void add_self(const Side<A>& s) const {
    for (int64_t c = 0; c < in.dims; ++c)
      for (int64_t i = 0; i < s.count; ++i) s.sums[i] += s.x[c * s.stride + i] - s.x[c * s.stride + i];
    for (int64_t i = 0; i < s.count; ++i) s.sums[i] += 1;
  }

  void tiles(const Side<A>& rows, Range i, const Side<A>& columns, Range j) const {
    const auto run = [&](auto one_set) {
      constexpr bool kOneSet = decltype(one_set)::value;
      if (order == kForward) tile<A, kForward, kOneSet>(rows, i, columns, j, in.dims);
      if (order == kBackward) tile<A, kBackward, kOneSet>(rows, i, columns, j, in.dims);
      if (order == kDoubleBackward) tile<A, kDoubleBackward, kOneSet>(rows, i, columns, j, in.dims);
    };
    if (in.one_set)
      run(std::true_type{});
    else
      run(std::false_type{});
  }

  // ---- the work and its order -----------------------------------------------------------------------------

  const PairSet& second() const { return in.one_set ? in.rows : in.columns; }

  void run(const Parallel& parallel) const {
    const int64_t pairs = in.rows.count * second().count;
    if (in.kernels >= kManySlices || pairs < kTournamentPairs)
      each_slice(parallel);
    else
      tournament(parallel);
  }

  void each_slice(const Parallel& parallel) const {
    const int64_t bytes = lines() * int64_t(sizeof(A));
    const int64_t step = kStep<A> * max(1, kTileBytes / (bytes * kStep<A>));
    parallel_for(parallel, in.kernels, 1, [&](int64_t first, int64_t last) {
      Scratch<A> memory(scratch());
      prefetch(in.rows, first, last);
      if (!in.one_set) prefetch(in.columns, first, last);
      const Side<A> rows = side(in.rows, memory.at);
      const Side<A> columns = in.one_set ? rows : side(in.columns, memory.at + scratch_of(in.rows));
      for (int64_t b = first; b < last; ++b) {
        unpack(in.rows, b, rows);
        if (!in.one_set) unpack(in.columns, b, columns);
        const int64_t end = padded(columns.count);
        for (int64_t j = 0; j < end; j += step) {
          const Range range{j, min(j + step, end)};
          tiles(rows, {0, in.one_set ? min(range.end, padded(rows.count)) : padded(rows.count)}, columns,
                range);
        }
        pack(in.rows, b, rows);
        if (!in.one_set) pack(in.columns, b, columns);
      }
    });
  }

  void tournament(const Parallel& parallel) const {
    Scratch<A> memory(scratch() * in.kernels);
    const auto rows = [&](int64_t b) { return side(in.rows, memory.at + b * scratch()); };
    const auto columns = [&](int64_t b) {
      return in.one_set ? rows(b) : side(in.columns, memory.at + b * scratch() + scratch_of(in.rows));
    };
    const auto each = [&](const auto& f) {
      parallel_for(parallel, in.kernels, 1, [&](int64_t first, int64_t last) {
        for (int64_t b = first; b < last; ++b) f(b);
      });
    };
    each([&](int64_t b) {
      unpack(in.rows, b, rows(b));
      if (!in.one_set) unpack(in.columns, b, columns(b));
    });
    // n tiles a set; an even number. Round by round every tile of rows meets another tile of columns.
    constexpr int64_t n = kTournamentTiles;
    const auto part = [](int64_t count, int64_t k) {
      const int64_t steps = ceil_div(count, kStep<A>);
      return Range{steps * k / n * kStep<A>, steps * (k + 1) / n * kStep<A>};
    };
    const int64_t meetings = in.one_set ? n / 2 : n;
    for (int64_t round = 0; round < n; ++round) {
      // Within one set, round n - 1 is each tile with itself; before that, the circle method of tournaments.
      const int64_t tasks = in.one_set && round == n - 1 ? n : meetings;
      parallel_for(parallel, in.kernels * tasks, 1, [&](int64_t first, int64_t last) {
        for (int64_t task = first; task < last; ++task) {
          const int64_t b = task / tasks, k = task % tasks;
          int64_t i = k, j = (k + round) % n;
          if (in.one_set) {
            i = round == n - 1 ? k : k == 0 ? n - 1 : (round + k) % (n - 1);
            j = round == n - 1 ? k : (round - k + n - 1) % (n - 1);
          }
          if (in.one_set && i > j) {
            const int64_t swap = i;
            i = j;
            j = swap;
          }
          const Side<A> x = rows(b), y = columns(b);
          tiles(x, part(x.count, i), y, part(y.count, j));
        }
      });
    }
    each([&](int64_t b) {
      pack(in.rows, b, rows(b));
      if (!in.one_set) pack(in.columns, b, columns(b));
    });
  }
};

template <class T, int kOrder>
void run(const MinibatchDiscrimination& in, const Parallel& parallel) {
  Problem<T>{in, kOrder}.run(parallel);
}

}  // namespace

extern const Orders<MinibatchDiscrimination> minibatch_discrimination = GANKERN_EACH_ORDER(run);

}  // namespace GANKERN_ISA
}  // namespace gankern
