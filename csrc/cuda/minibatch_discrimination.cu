// Minibatch discrimination without a tensor of pairs, each pair computed once. The formulas are those of
// gankern/triton/minibatch_discrimination.py; e, p and w are symmetric in i and j, and s is antisymmetric:
//
//   o_i += e_ij,  o_j += e_ij          dm_i[c] += w_ij s_c,  dm_j[c] -= w_ij s_c
//
// A block takes one kernel b and a tile of 64 points times 64 others, of one set those on and above the
// diagonal. Its 16 x 16 threads have 4 x 4 pairs each, in registers; coordinates come from shared memory, 16 at
// a time, four points with one read. What a tile adds to its 64 rows and to its 64 columns is summed over the
// block and written to a place of its own, [tile of the other side][b][point]; a second kernel adds these up,
// in order. Where there is but one tile, its sums are the result, and there is no second kernel. A tile on the
// diagonal computes both orders of its pairs, and has rows alone.
//
// Bound by arithmetic: N^2 / 2 B (2 C + 8) operations forward. m is read once a tile, from the L2 cache; the
// partial sums are N / 64 times as large as the result.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "common.h"
#include "minibatch_discrimination.h"

namespace gankern::cuda {
namespace {

constexpr int kTile = 64, kSide = 16, kOwn = kTile / kSide;  // 16 x 16 threads of 4 x 4 pairs
constexpr int kThreads = kSide * kSide, kWarps = kThreads / kWarp;
constexpr int kChunk = 16;  // coordinates in shared memory at a time

struct Problem {
  Pairs in;
  // [tiles of others][kernels][1 + dims or 1 or dims][points rounded up], and the same the other way round
  void *row_parts, *column_parts;
  int32_t row_tiles, column_tiles;
  bool direct;  // one tile
};

// Values that a point collects for each kernel: its sum, then its gradient.
__host__ __device__ inline int sums_of(PairsPass pass) { return pass == PairsPass::kBackward ? 0 : 1; }
__host__ __device__ inline int64_t values_of(const Pairs& in) {
  return sums_of(in.pass) + (in.pass == PairsPass::kForward ? 0 : in.dims);
}

// ---- device functions -----------------------------------------------------------------------------------

template <class S>
__device__ S sign_times(S x, S weight) {  // the sign of 0 and of NaN is 0, and 0 times NaN is NaN
  return x > 0 ? weight : x < 0 ? -weight : S(0) * weight;
}

// Coordinates first to first + count of a tile's points, as [coordinate][point]; zeros behind the last point.
template <class T, class S>
__device__ void load_tile(S* to, const void* from, int64_t begin, int64_t points, const Pairs& in, int b,
                          int64_t first, int count) {
  const T* values = static_cast<const T*>(from);
  for (int k = int(threadIdx.x); k < count * kTile; k += kThreads) {
    const int point = k / count, c = k % count;  // neighbours in memory are a point's coordinates
    const int64_t i = begin + point;
    to[c * kTile + point] = i < points ? S(widen(values[(i * in.kernels + b) * in.dims + first + c])) : S(0);
  }
}

template <class S>
__device__ void own_values(const S* from, int side, S (&to)[kOwn]) {
#pragma unroll
  for (int k = 0; k < kOwn; ++k) to[k] = from[side * kOwn + k];
}

// What a tile collected: for each of its 64 rows the sum over the 16 threads of the row, put_row(row, sum); for
// each of its columns, if `both`, likewise.
template <class S, class PutRow, class PutColumn>
__device__ void collect(const S (&by_row)[kOwn], const S (&by_column)[kOwn], bool both, S* shared,
                        const PutRow& put_row, const PutColumn& put_column) {
  const int tx = int(threadIdx.x) % kSide, ty = int(threadIdx.x) / kSide;
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const S total = sum_of_lanes<kSide>(by_row[k]);  // the 16 lanes of half a warp are a row's
    if (tx == 0) put_row(ty * kOwn + k, total);
  }
  if (!both) return;  // of the whole block
#pragma unroll
  for (int k = 0; k < kOwn; ++k) {
    const S total = by_column[k] + __shfl_xor_sync(0xffffffffu, by_column[k], kSide);
    if (int(threadIdx.x) % kWarp < kSide) shared[int(threadIdx.x) / kWarp * kTile + tx * kOwn + k] = total;
  }
  __syncthreads();
  if (int(threadIdx.x) < kTile) {
    S total = 0;
    for (int w = 0; w < kWarps; ++w) total += shared[w * kTile + int(threadIdx.x)];
    put_column(int(threadIdx.x), total);
  }
  __syncthreads();
}

// ---- kernels --------------------------------------------------------------------------------------------

template <class T, PairsPass PASS>
__global__ void __launch_bounds__(kThreads, 2) pairs_kernel(const __grid_constant__ Problem problem) {
  using S = Sum<T>;
  constexpr bool kSecond = PASS == PairsPass::kDoubleBackward, kGradient = PASS != PairsPass::kForward;
  const Pairs& in = problem.in;
  const int b = int(blockIdx.x) % int(in.kernels);
  int tile = int(blockIdx.x) / int(in.kernels), ti = 0, tj = 0;
  if (in.one_set) {  // row ti of the triangle has the tiles ti, ti + 1, ...
    for (int own = problem.column_tiles; tile >= own; --own) tile -= own, ++ti;
    tj = ti + tile;
  } else {
    ti = tile / problem.column_tiles, tj = tile % problem.column_tiles;
  }
  const bool diagonal = in.one_set && ti == tj, both = !diagonal && (in.one_set || kGradient);
  const PointSet &points = in.points, &others = in.one_set ? in.points : in.others;
  const int64_t first_i = int64_t(ti) * kTile, first_j = int64_t(tj) * kTile;
  const int tx = int(threadIdx.x) % kSide, ty = int(threadIdx.x) / kSide;

  S* shared = shared_memory<S>();
  S *xi = shared, *xj = xi + kChunk * kTile, *hi = xj + kChunk * kTile, *hj = hi + kChunk * kTile;
  S* exchange = shared + (kSecond ? 4 : 2) * kChunk * kTile;

  // Distances, and of the second gradient sum_c s_c (h_i[c] - h_j[c]).
  S distance[kOwn][kOwn] = {}, q[kOwn][kOwn] = {};
  for (int64_t first = 0; first < in.dims; first += kChunk) {
    const int count = int(in.dims - first < kChunk ? in.dims - first : kChunk);
    __syncthreads();
    load_tile<T>(xi, points.m, first_i, points.count, in, b, first, count);
    load_tile<T>(xj, others.m, first_j, others.count, in, b, first, count);
    if constexpr (kSecond) {
      if (points.grad_m) load_tile<T>(hi, points.grad_m, first_i, points.count, in, b, first, count);
      if (others.grad_m) load_tile<T>(hj, others.grad_m, first_j, others.count, in, b, first, count);
    }
    __syncthreads();
    for (int c = 0; c < count; ++c) {
      S a[kOwn], d[kOwn], ha[kOwn] = {}, hd[kOwn] = {};
      own_values(xi + c * kTile, ty, a);
      own_values(xj + c * kTile, tx, d);
      if constexpr (kSecond) {
        if (points.grad_m) own_values(hi + c * kTile, ty, ha);
        if (others.grad_m) own_values(hj + c * kTile, tx, hd);
      }
#pragma unroll
      for (int r = 0; r < kOwn; ++r)
#pragma unroll
        for (int s = 0; s < kOwn; ++s) {
          const S difference = d[s] - a[r];
          distance[r][s] += absolute(difference);
          if constexpr (kSecond) q[r][s] += sign_times(difference, ha[r] - hd[s]);
        }
    }
  }

  // e, or p; then w in its place.
  S by_row[kOwn] = {}, by_column[kOwn] = {}, gi[kOwn] = {}, gj[kOwn] = {};
  if constexpr (kGradient) {
#pragma unroll
    for (int k = 0; k < kOwn; ++k) {
      const int64_t i = first_i + ty * kOwn + k, j = first_j + tx * kOwn + k;
      if (i < points.count) gi[k] = widen(static_cast<const T*>(points.grad)[i * in.kernels + b]);
      if (in.one_set && j < points.count)
        gj[k] = widen(static_cast<const T*>(points.grad)[j * in.kernels + b]);
    }
  }
#pragma unroll
  for (int r = 0; r < kOwn; ++r)
#pragma unroll
    for (int s = 0; s < kOwn; ++s) {
      const int64_t i = first_i + ty * kOwn + r, j = first_j + tx * kOwn + s;
      const bool counts = i < points.count && j < others.count && !(diagonal && i == j && !in.include_self);
      S value = exponential(-distance[r][s]);
      if constexpr (kSecond) value *= q[r][s];
      value = counts ? value : S(0);
      by_row[r] += value;
      by_column[s] += value;
      if constexpr (kGradient) distance[r][s] = counts ? value * (gi[r] + gj[s]) : S(0);
    }

  const int64_t values = values_of(in);
  // Value `value` of a row, and of a column.
  const auto put = [&](const PointSet& set, void* parts, int other_tile, int own_tile, int own_tiles,
                       int64_t value, int k, S total) {
    const int64_t point = int64_t(own_tile) * kTile + k, place = point * in.kernels + b;
    if (point >= set.count) return;
    if (!problem.direct)
      static_cast<S*>(
          parts)[((int64_t(other_tile) * in.kernels + b) * values + value) * own_tiles * kTile + point] =
          total;
    else if (value < sums_of(PASS))
      narrow(total, static_cast<T*>(set.sums) + place);
    else
      narrow(total, static_cast<T*>(set.out_m) + place * in.dims + value - sums_of(PASS));
  };
  int64_t value = 0;
  const auto put_row = [&](int k, S total) {
    put(points, problem.row_parts, tj, ti, problem.row_tiles, value, k, total);
  };
  const auto put_column = [&](int k, S total) {
    put(others, problem.column_parts, ti, tj, problem.column_tiles, value, k, total);
  };
  if constexpr (PASS != PairsPass::kBackward) {
    // Of two sets only the points have sums.
    collect(by_row, by_column, both && in.one_set, exchange, put_row, put_column);
    ++value;
  }
  if constexpr (kGradient) {
    for (int64_t first = 0; first < in.dims; first += kChunk) {
      const int count = int(in.dims - first < kChunk ? in.dims - first : kChunk);
      if (in.dims > kChunk) {  // else they are there still
        __syncthreads();
        load_tile<T>(xi, points.m, first_i, points.count, in, b, first, count);
        load_tile<T>(xj, others.m, first_j, others.count, in, b, first, count);
        __syncthreads();
      }
      for (int c = 0; c < count; ++c) {
        S a[kOwn], d[kOwn], of_row[kOwn] = {}, of_column[kOwn] = {};
        own_values(xi + c * kTile, ty, a);
        own_values(xj + c * kTile, tx, d);
#pragma unroll
        for (int r = 0; r < kOwn; ++r)
#pragma unroll
          for (int s = 0; s < kOwn; ++s) {
            const S part = sign_times(d[s] - a[r], distance[r][s]);
            of_row[r] += part;
            of_column[s] -= part;
          }
        collect(of_row, of_column, both, exchange, put_row, put_column);
        ++value;
      }
    }
  }
}

// Adds up what the tiles left: one thread a point, value and kernel. Which tiles wrote for a point follows from
// where its own tile stands.
template <class T>
__global__ void __launch_bounds__(kThreads) finish_kernel(const __grid_constant__ Problem problem) {
  using S = Sum<T>;
  const Pairs& in = problem.in;
  const int64_t values = values_of(in), sums = sums_of(in.pass);
  const int64_t row_points = int64_t(problem.row_tiles) * kTile;
  const int64_t column_points = in.one_set ? 0 : int64_t(problem.column_tiles) * kTile;
  const int64_t rows = in.kernels * values * row_points, all = rows + in.kernels * values * column_points;
  for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < all;
       k += int64_t(gridDim.x) * kThreads) {
    const bool of_points = k < rows;
    const int64_t own = of_points ? k : k - rows, step = of_points ? row_points : column_points;
    const int64_t point = own % step, value = own / step % values, b = own / step / values;
    const PointSet& set = of_points ? in.points : in.others;
    if (point >= set.count || (!of_points && value < sums)) continue;
    const int tile = int(point / kTile);
    const int64_t of_tile = in.kernels * values * step;
    S total = 0;
    if (in.one_set) {
      // As columns of the tiles before the diagonal, as rows of those from it on.
      for (int t = 0; t < tile; ++t) total += static_cast<const S*>(problem.column_parts)[t * of_tile + own];
      for (int t = tile; t < problem.row_tiles; ++t)
        total += static_cast<const S*>(problem.row_parts)[t * of_tile + own];
    } else {
      const S* parts = static_cast<const S*>(of_points ? problem.row_parts : problem.column_parts);
      const int tiles = of_points ? problem.column_tiles : problem.row_tiles;
      for (int t = 0; t < tiles; ++t) total += parts[t * of_tile + own];
    }
    const int64_t place = point * in.kernels + b;
    if (value < sums)
      narrow(total, static_cast<T*>(set.sums) + place);
    else
      narrow(total, static_cast<T*>(set.out_m) + place * in.dims + value - sums);
  }
}

// ---- host -----------------------------------------------------------------------------------------------

Problem problem_of(const Pairs& in) {
  Problem problem{in, nullptr, nullptr, 0, 0, false};
  const int64_t rows = ceil_div(in.points.count, kTile);
  const int64_t columns = in.one_set ? rows : ceil_div(in.others.count, kTile);
  if (rows > 1 << 15 || columns > 1 << 15)
    throw std::runtime_error("minibatch_discrimination: more than 2^21 points");
  problem.row_tiles = int32_t(rows);
  problem.column_tiles = int32_t(columns);
  problem.direct = rows == 1 && columns == 1;
  return problem;
}
// Values of the partial sums of rows, and of columns.
int64_t row_values(const Problem& p) {
  return p.direct ? 0 : int64_t(p.column_tiles) * p.in.kernels * values_of(p.in) * p.row_tiles * kTile;
}
int64_t column_values(const Problem& p) {
  return p.direct ? 0 : int64_t(p.row_tiles) * p.in.kernels * values_of(p.in) * p.column_tiles * kTile;
}

template <class T>
void run(Problem problem, void* scratch, void* stream) {
  using S = Sum<T>;
  const Pairs& in = problem.in;
  problem.row_parts = scratch;
  problem.column_parts = static_cast<S*>(scratch) + row_values(problem);
  const int64_t n = problem.row_tiles;
  const int64_t tiles = in.one_set ? n * (n + 1) / 2 : n * problem.column_tiles;
  const bool second = in.pass == PairsPass::kDoubleBackward;
  const size_t shared = sizeof(S) * size_t((second ? 4 : 2) * kChunk * kTile + kWarps * kTile);
  const int64_t blocks = tiles * in.kernels;
  if (blocks > INT32_MAX) throw std::runtime_error("minibatch_discrimination: too many pairs for one launch");
  switch (in.pass) {
    case PairsPass::kForward:
      launch(pairs_kernel<T, PairsPass::kForward>, blocks, kThreads, shared, stream, problem);
      break;
    case PairsPass::kBackward:
      launch(pairs_kernel<T, PairsPass::kBackward>, blocks, kThreads, shared, stream, problem);
      break;
    case PairsPass::kDoubleBackward:
      launch(pairs_kernel<T, PairsPass::kDoubleBackward>, blocks, kThreads, shared, stream, problem);
      break;
  }
  if (problem.direct) return;
  const int64_t points = n * kTile + (in.one_set ? 0 : int64_t(problem.column_tiles) * kTile);
  const int64_t values = in.kernels * values_of(in) * points;
  launch(finish_kernel<T>, std::min<int64_t>(ceil_div(values, kThreads), 1 << 16), kThreads, 0, stream,
         problem);
}

}  // namespace

int64_t minibatch_discrimination_scratch(const Pairs& pairs, int dtype) {
  const Problem problem = problem_of(pairs);
  return (row_values(problem) + column_values(problem)) * (dtype == 0 ? 8 : 4);
}

void minibatch_discrimination(const Pairs& pairs, int dtype, void* scratch, void* stream) {
  by_dtype(dtype, [&](auto* type) {
    run<std::remove_pointer_t<decltype(type)>>(problem_of(pairs), scratch, stream);
  });
}

}  // namespace gankern::cuda
