// Spectral norm of all layers of a network in one launch. The formulas are those of
// gankern/triton/spectral_norm.py; this is how they are computed here.
//
// One cooperative launch: as many blocks as the device holds at once go through the phases below together, with
// a barrier of the whole grid behind each. So W, read from memory in the first phase, is read from the L2 cache
// by the others: layers are taken in waves that fit there, and only a layer that is larger by itself is read
// again from memory. Blocks take units of work in turn; a unit knows its layer from a table among the kernel's
// parameters, so nothing is uploaded and any call can be captured in a CUDA graph.
//
//   forward            unit                                     reads             writes
//   gather             1024 columns, where memory has another   v                 v in memory order
//                      order of columns than the shape
//   along              8, 4, 2 or 1 rows of the view            W, a vector       a vector, its squares
//   across             128 bytes of columns of the view         W, a vector       a vector, its squares
//   finish             1024 columns, where a unit of `across` was divided among blocks
//   scale              4096 elements, or 1024 of u and v        W, both vectors   W / sigma, u, v, sigma
//
// The view is W as memory has it: `along` is the product that goes through memory in its order, `across` the
// other one. Of a weight with rows outermost these are M v and M^T u; with rows innermost, M^T u and M v.
//
// backward           products: <g,W> of 512 units a layer; then: the gradient, 4096 elements a unit
// double backward    products: <g,W>, u^T h v, <h,g>; then both gradients
//
// Every sum has a fixed order: partial results of units stand in memory, and whoever needs the sum adds them up.
// Bound by memory: W is read once (gradients: each tensor once) and the result written once.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "common.h"
#include "spectral_norm.h"

namespace gankern::cuda {
namespace {

constexpr int kThreads = 256, kWarps = kThreads / kWarp;
constexpr int kElements = 4096;  // of a unit of what goes element by element
constexpr int kEntries = 1024;   // of vectors
constexpr int kProducts = 512;   // units of sums of a layer, at most
constexpr int kLayers = 24;      // of one launch: what fits into 4096 bytes of parameters
constexpr int kBlocksEach = 4;   // of a multiprocessor, at most: more make the barriers longer
constexpr int kLanesAcross = 8;  // times 16 bytes: what a row gives to a unit of `across`

// What the kernels know of a layer. Places on the scratch memory are in values of the type of sums.
struct Layer {
  const void *weight, *u, *v, *grad, *grad_grad;
  void *new_u, *new_v, *sigma, *result, *second_result;
  int32_t rows, columns, inner;
  int32_t group_size[kGroups], group_step[kGroups];
  int32_t row_vector, column_vector, gathered, row_sums, column_sums, partial;
  int16_t split;  // blocks that share a unit of `across`
  int8_t groups;
  bool rows_are_inner;
  bool dense;    // tensors begin at multiples of 16 bytes
  bool aligned;  // and so does every run of W
};

struct Network {
  Layer layers[kLayers];
  void* scratch;
  double eps;
  int32_t iterations;
  int8_t count, waves, ends[kLayers];
  bool u_first, add_eps, gathers, splits;
};
static_assert(sizeof(Network) <= 4096, "parameters of a kernel take 4096 bytes");

// W as memory has it: `count` elements along, in runs of `run`, for each of `others`.
struct View {
  int32_t count, run, others;
  int64_t run_step, step;
};
__host__ __device__ inline View view_of(const Layer& layer) {
  if (layer.rows_are_inner) return {layer.rows, layer.rows, layer.columns, 0, layer.rows};
  return {layer.columns, layer.inner, layer.rows, int64_t(layer.rows) * layer.inner, layer.inner};
}
// Warps that share a row of `along`.
__host__ __device__ inline int team_of(int count) {
  return count <= 1024 ? 1 : count <= 2048 ? 2 : count <= 4096 ? 4 : kWarps;
}
__host__ __device__ inline int blocks_of(int64_t count, int size) { return int((count + size - 1) / size); }
__host__ __device__ inline int along_units(const View& view) {
  return blocks_of(view.others, kWarps / team_of(view.count));
}
template <class T>
__host__ __device__ inline int across_units(const View& view) {
  return blocks_of(view.count, kLanesAcross * kVector<T>);
}
__host__ __device__ inline int64_t elements_of(const Layer& layer) {
  return int64_t(layer.rows) * layer.columns;
}
__host__ __device__ inline int product_units(const Layer& layer) {
  const int64_t units = (elements_of(layer) + kElements - 1) / kElements;
  return int(units < kProducts ? units : kProducts);
}

__host__ __device__ inline bool is_aligned(const void* place) {
  return reinterpret_cast<uintptr_t>(place) % kVectorBytes == 0;
}
template <class V>
__host__ __device__ inline V least(V a, V b) {
  return a < b ? a : b;
}

// ---- device functions -----------------------------------------------------------------------------------

// f(layer, its unit) for each of this block's units of layers first to last.
template <class Count, class F>
__device__ void for_units(const Network& net, int first, int last, const Count& count, const F& f) {
  int number = first;
  int64_t unit = blockIdx.x;
  for (;;) {
    while (number < last) {
      const int64_t own = count(net.layers[number]);
      if (unit < own) break;
      unit -= own;
      ++number;
    }
    if (number >= last) return;
    f(net.layers[number], unit);
    unit += gridDim.x;
  }
}

// The sum of `count` values that lie `step` apart, in every thread.
template <class S>
__device__ S sum_of(const S* values, int count, int step, S* shared) {
  S total = 0;
  for (int k = int(threadIdx.x); k < count; k += kThreads) total += values[int64_t(k) * step];
  return sum_of_block<kThreads>(total, shared);
}

template <class S>
__device__ S denominator(S squares, double eps, bool add_eps) {
  const S norm = root(squares);
  if (add_eps) return norm + S(eps);
  return norm < S(eps) ? S(eps) : norm;  // keeps NaN
}

template <class S>
__device__ S divided(S x, S sigma) {
  return sigma == 0 ? S(0) : x / sigma;
}

__device__ inline int logical_column(const Layer& layer, int c) {
  if (layer.groups == 1) return c;
  int at = 0;
  for (int g = 0; g < layer.groups; ++g) {
    at += c % layer.group_size[g] * layer.group_step[g];
    c /= layer.group_size[g];
  }
  return at;
}

// Which of a layer's vectors `along` makes, and `across`.
template <class S>
struct Vectors {
  S *along, *along_sums, *across, *across_sums;
};
template <class S>
__device__ Vectors<S> vectors_of(const Layer& layer, S* scratch) {
  S *rows = scratch + layer.row_vector, *columns = scratch + layer.column_vector;
  S *row_sums = scratch + layer.row_sums, *column_sums = scratch + layer.column_sums;
  if (layer.rows_are_inner) return {columns, column_sums, rows, row_sums};
  return {rows, row_sums, columns, column_sums};
}
template <class T>
__device__ int sums_of_rows(const Layer& layer) {
  const View view = view_of(layer);
  return layer.rows_are_inner ? across_units<T>(view) : along_units(view);
}
template <class T>
__device__ int sums_of_columns(const Layer& layer) {
  const View view = view_of(layer);
  return layer.rows_are_inner ? along_units(view) : across_units<T>(view);
}
// Where a unit of `across` was divided, the vector is finished in pieces.
template <class T>
__device__ int across_sums(const Layer& layer) {
  const View view = view_of(layer);
  return layer.split > 1 ? blocks_of(view.count, kEntries) : across_units<T>(view);
}
// v of the caller, or of the state, in memory order.
template <class S>
__device__ const S* columns_given(const Layer& layer, S* scratch) {
  return layer.groups == 1 ? static_cast<const S*>(layer.v) : scratch + layer.gathered;
}

// ---- phases ---------------------------------------------------------------------------------------------

template <class S>
__device__ void gather(const Network& net, int first, int last, S* scratch) {
  for_units(
      net, first, last,
      [](const Layer& layer) { return layer.groups == 1 ? 0 : blocks_of(layer.columns, kEntries); },
      [&](const Layer& layer, int64_t unit) {
        const int end = least(layer.columns, int(unit + 1) * kEntries);
        for (int c = int(unit) * kEntries + int(threadIdx.x); c < end; c += kThreads)
          scratch[layer.gathered + c] = static_cast<const S*>(layer.v)[logical_column(layer, c)];
      });
}

template <int N, class S>
__device__ void read_vector(const S* from, bool aligned, S (&to)[N]) {
  constexpr int kWide = kVector<S>;
  if constexpr (N % kWide == 0) {
    if (aligned) {
#pragma unroll
      for (int j = 0; j < N; j += kWide) {
        S part[kWide];
        load16(from + j, part);
#pragma unroll
        for (int k = 0; k < kWide; ++k) to[j + k] = part[k];
      }
      return;
    }
  }
#pragma unroll
  for (int j = 0; j < N; ++j) to[j] = from[j];
}

// A thread's part of the dot product of x with what lies along memory behind `from`.
template <class T, class S>
__device__ S dot(const T* from, const View& view, const S* x, bool aligned, int thread, int threads) {
  constexpr int kLanes = kVector<T>;
  S total = 0;
  if (aligned) {  // runs are whole vectors
    const bool x_aligned = is_aligned(x);
#pragma unroll 4
    for (int k = thread * kLanes; k < view.count; k += threads * kLanes) {
      const int64_t run = k / view.run;
      S w[kLanes], by[kLanes];
      load16(from + run * view.run_step + (k - run * view.run), w);
      read_vector(x + k, x_aligned, by);
#pragma unroll
      for (int j = 0; j < kLanes; ++j) total += w[j] * by[j];
    }
  } else {
    for (int k = thread; k < view.count; k += threads) {
      const int64_t run = k / view.run;
      total += widen(from[run * view.run_step + (k - run * view.run)]) * x[k];
    }
  }
  return total;
}

// For each layer that `wanted` names, the products along memory with x, divided by what `divisor` says, into the
// layer's vector; and for each unit the sum of their squares, or with `weigh` of the products times that vector.
template <class T, class S, class Wanted, class Given, class Divisor, class Weigh>
__device__ void along(const Network& net, int first, int last, S* scratch, S* shared, const Wanted& wanted,
                      const Given& given, const Divisor& divisor, const Weigh& weigh) {
  const Layer* known = nullptr;
  S by = 1;
  for_units(
      net, first, last, [&](const Layer& layer) { return wanted(layer) ? along_units(view_of(layer)) : 0; },
      [&](const Layer& layer, int64_t unit) {
        const View view = view_of(layer);
        const int team = team_of(view.count), warp = int(threadIdx.x) / kWarp,
                  lane = int(threadIdx.x) % kWarp;
        const int64_t other = unit * (kWarps / team) + warp / team;
        if (known != &layer) by = divisor(layer), known = &layer;
        S total = 0;
        if (other < view.others)
          total = dot(static_cast<const T*>(layer.weight) + other * view.step, view, given(layer),
                      layer.aligned, warp % team * kWarp + lane, team * kWarp);
        total = sum_of_lanes<kWarp>(total);
        if (lane == 0) shared[warp] = total;
        __syncthreads();
        S product = 0, square = 0;
        if (int(threadIdx.x) < kWarps / team) {
          for (int w = 0; w < team; ++w) product += shared[int(threadIdx.x) * team + w];
          product /= by;
          const int64_t place = unit * (kWarps / team) + threadIdx.x;
          if (place < view.others) {
            const S* weights = weigh(layer);
            square = product * (weights ? weights[place] : product);
            vectors_of(layer, scratch).along[place] = product;
          }
        }
        __syncthreads();
        if (warp == 0) {
          square = sum_of_lanes<kWarps>(square);
          if (lane == 0) vectors_of(layer, scratch).along_sums[unit] = square;
        }
      });
}

template <class T, class S, class Wanted, class Given, class Divisor>
__device__ void across(const Network& net, int first, int last, S* scratch, S* shared, const Wanted& wanted,
                       const Given& given, const Divisor& divisor) {
  constexpr int kLanes = kVector<T>, kWide = kLanesAcross * kLanes, kStride = kThreads / kLanesAcross;
  const Layer* known = nullptr;
  S by = 1;
  for_units(
      net, first, last,
      [&](const Layer& layer) {
        return wanted(layer) ? int64_t(across_units<T>(view_of(layer))) * layer.split : 0;
      },
      [&](const Layer& layer, int64_t number) {
        const View view = view_of(layer);
        const int unit = int(number / layer.split), part = int(number % layer.split);
        if (known != &layer) by = divisor(layer), known = &layer;
        const int lane = int(threadIdx.x) % kLanesAcross, k = unit * kWide + lane * kLanes;
        const int each = blocks_of(view.others, layer.split), begin = part * each;
        const int end = least(view.others, begin + each);
        const T* weight = static_cast<const T*>(layer.weight);
        const S* x = given(layer);
        S sums[kLanes] = {};
        if (layer.aligned && k < view.count) {
          const int64_t run = k / view.run;
          const T* from = weight + run * view.run_step + (k - run * view.run);
#pragma unroll 4
          for (int i = begin + int(threadIdx.x) / kLanesAcross; i < end; i += kStride) {
            S w[kLanes];
            load16(from + i * view.step, w);
#pragma unroll
            for (int j = 0; j < kLanes; ++j) sums[j] += w[j] * x[i];
          }
        } else if (!layer.aligned) {
#pragma unroll
          for (int j = 0; j < kLanes; ++j) {
            if (k + j >= view.count) continue;
            const int64_t run = (k + j) / view.run;
            const T* from = weight + run * view.run_step + (k + j - run * view.run);
            for (int i = begin + int(threadIdx.x) / kLanesAcross; i < end; i += kStride)
              sums[j] += widen(from[i * view.step]) * x[i];
          }
        }
    // The lanes of a warp that have the same columns; then the warps.
#pragma unroll
        for (int j = 0; j < kLanes; ++j) {
          for (int mask = kLanesAcross; mask < kWarp; mask *= 2)
            sums[j] += __shfl_xor_sync(0xffffffffu, sums[j], mask);
          if (int(threadIdx.x) % kWarp < kLanesAcross)
            shared[int(threadIdx.x) / kWarp * kWide + lane * kLanes + j] = sums[j];
        }
        __syncthreads();
        S square = 0;
        const int place = unit * kWide + int(threadIdx.x);
        if (int(threadIdx.x) < kWide && place < view.count) {
          S product = 0;
          for (int w = 0; w < kWarps; ++w) product += shared[w * kWide + int(threadIdx.x)];
          if (layer.split > 1) {
            scratch[layer.partial + int64_t(part) * view.count + place] = product;
          } else {
            product /= by;
            square = product * product;
            vectors_of(layer, scratch).across[place] = product;
          }
        }
        __syncthreads();
        square = sum_of_block<kThreads>(square, shared);
        if (layer.split == 1 && threadIdx.x == 0) vectors_of(layer, scratch).across_sums[unit] = square;
      });
}

// The parts of divided units of `across`, added up.
template <class T, class S, class Wanted, class Divisor>
__device__ void finish(const Network& net, int first, int last, S* scratch, S* shared, const Wanted& wanted,
                       const Divisor& divisor) {
  for_units(
      net, first, last,
      [&](const Layer& layer) {
        return wanted(layer) && layer.split > 1 ? blocks_of(view_of(layer).count, kEntries) : 0;
      },
      [&](const Layer& layer, int64_t unit) {
        const int count = view_of(layer).count, end = least(count, int(unit + 1) * kEntries);
        const S by = divisor(layer);
        S square = 0;
        for (int k = int(unit) * kEntries + int(threadIdx.x); k < end; k += kThreads) {
          S product = 0;
          for (int part = 0; part < layer.split; ++part)
            product += scratch[layer.partial + int64_t(part) * count + k];
          product /= by;
          square += product * product;
          vectors_of(layer, scratch).across[k] = product;
        }
        square = sum_of_block<kThreads>(square, shared);
        if (threadIdx.x == 0) vectors_of(layer, scratch).across_sums[unit] = square;
      });
}

// f(the number of the first of up to kVector elements, where they begin, how many) of a unit's elements: vectors
// of 16 bytes where `aligned` allows it.
template <class T, class F>
__device__ void for_elements(const Layer& layer, int64_t unit, const F& f) {
  const int64_t begin = unit * kElements, all = elements_of(layer);
  const int64_t end = begin + kElements < all ? begin + kElements : all;
  for (int64_t e = begin + int64_t(threadIdx.x) * kVector<T>; e < end; e += kThreads * kVector<T>)
    f(e, int(end - e < kVector<T> ? end - e : kVector<T>));
}
template <class T>
__device__ void read(const void* from, int64_t e, int count, bool aligned, Sum<T> (&to)[kVector<T>]) {
  const T* place = static_cast<const T*>(from) + e;
  if (aligned && count == kVector<T>) return load16(place, to);
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) to[j] = j < count ? widen(place[j]) : Sum<T>(0);
}
template <class T>
__device__ void write(void* to, int64_t e, int count, bool aligned, const Sum<T> (&from)[kVector<T>]) {
  T* place = static_cast<T*>(to) + e;
  if (aligned && count == kVector<T>) return store16_global(place, from);
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j)
    if (j < count) narrow(from[j], &place[j]);
}

// u_i v_c of neighbours in memory.
template <int N, class S>
__device__ void outer_product(const Layer& layer, const S* u, const S* v, int64_t e, int count, S (&to)[N]) {
  int64_t line;
  if (elements_of(layer) <= 0x7fffffff)
    line = int(e) / layer.inner;  // a division of 32 bits takes a fifth of the time
  else
    line = e / layer.inner;
  int k = int(e - line * layer.inner), outer = int(line / layer.rows),
      i = int(line - int64_t(outer) * layer.rows);
#pragma unroll
  for (int j = 0; j < N; ++j) {
    to[j] = j < count ? u[i] * v[int64_t(outer) * layer.inner + k] : S(0);
    if (++k == layer.inner) {
      k = 0;
      if (++i == layer.rows) i = 0, ++outer;
    }
  }
}

// ---- kernels --------------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads, 2) forward_kernel(const __grid_constant__ Network net) {
  using S = Sum<T>;
  S *scratch = static_cast<S*>(net.scratch), *shared = shared_memory<S>();
  const bool iterated = net.iterations > 0;
  int first = 0;
  for (int wave = 0; wave < net.waves; ++wave) {
    const int last = net.ends[wave];
    if (net.gathers) {
      gather(net, first, last, scratch);
      grid_barrier();
    }
    // A product of the iteration makes the vector of rows (M v) or of columns (M^T u), along memory or across it.
    const auto squares = [&](const Layer& layer, bool of_rows) {
      const bool is_across = of_rows == layer.rows_are_inner;
      const S* sums = scratch + (of_rows ? layer.row_sums : layer.column_sums);
      return sum_of(sums, is_across ? across_sums<T>(layer) : along_units(view_of(layer)), 1, shared);
    };
    const auto none = [](const Layer&) { return static_cast<const S*>(nullptr); };
    if (!iterated) {
      // M v weighed with u, or M^T u weighed with v: either way u^T M v.
      along<T>(
          net, first, last, scratch, shared, [](const Layer&) { return true; },
          [&](const Layer& layer) {
            return layer.rows_are_inner ? static_cast<const S*>(layer.u) : columns_given(layer, scratch);
          },
          [](const Layer&) { return S(1); },
          [&](const Layer& layer) {
            return layer.rows_are_inner ? columns_given(layer, scratch) : static_cast<const S*>(layer.u);
          });
      grid_barrier();
    }
    for (int half = 0; half < 2 * net.iterations; ++half) {
      const bool rows = (half % 2 == 0) == net.u_first;  // makes the vector of rows
      const auto given = [&](const Layer& layer) -> const S* {
        if (half > 0) return scratch + (rows ? layer.column_vector : layer.row_vector);
        return rows ? columns_given(layer, scratch) : static_cast<const S*>(layer.u);
      };
      const auto divisor = [&](const Layer& layer) {
        return half == 0 ? S(1) : denominator(squares(layer, !rows), net.eps, net.add_eps);
      };
      const auto is_along = [&](const Layer& layer) { return rows != layer.rows_are_inner; };
      const auto is_across = [&](const Layer& layer) { return rows == layer.rows_are_inner; };
      along<T>(net, first, last, scratch, shared, is_along, given, divisor, none);
      across<T>(net, first, last, scratch, shared, is_across, given, divisor);
      grid_barrier();
      if (net.splits) {
        finish<T>(net, first, last, scratch, shared, is_across, divisor);
        grid_barrier();
      }
    }

    const Layer* known = nullptr;
    S sigma = 0, over_rows = 1, over_columns = 1;
    for_units(
        net, first, last,
        [](const Layer& layer) {
          return (elements_of(layer) + kElements - 1) / kElements +
                 blocks_of(int64_t(layer.rows) + layer.columns, kEntries);
        },
        [&](const Layer& layer, int64_t unit) {
          if (known != &layer) {
            known = &layer;
            if (iterated) {
              const S of_rows = squares(layer, true), of_columns = squares(layer, false);
              over_rows = denominator(of_rows, net.eps, net.add_eps);
              over_columns = denominator(of_columns, net.eps, net.add_eps);
              sigma = net.u_first ? of_columns / over_columns : of_rows / over_rows;
            } else {
              const Vectors<S> vectors = vectors_of(layer, scratch);
              sigma = sum_of(vectors.along_sums, along_units(view_of(layer)), 1, shared);
            }
          }
          if (unit == 0 && threadIdx.x == 0) *static_cast<S*>(layer.sigma) = sigma;
          const int64_t vector_units = blocks_of(int64_t(layer.rows) + layer.columns, kEntries);
          if (unit < vector_units) {
            const int64_t all = int64_t(layer.rows) + layer.columns;
            const int64_t end = least(all, int64_t(unit + 1) * kEntries);
            for (int64_t at = unit * kEntries + threadIdx.x; at < end; at += kThreads) {
              if (at < layer.rows) {
                static_cast<S*>(layer.new_u)[at] = iterated ? scratch[layer.row_vector + at] / over_rows
                                                            : static_cast<const S*>(layer.u)[at];
              } else {
                const int c = int(at - layer.rows), to = logical_column(layer, c);
                static_cast<S*>(layer.new_v)[to] = iterated ? scratch[layer.column_vector + c] / over_columns
                                                            : static_cast<const S*>(layer.v)[to];
              }
            }
            return;
          }
          for_elements<T>(layer, unit - vector_units, [&](int64_t e, int count) {
            S w[kVector<T>];
            read<T>(layer.weight, e, count, layer.dense, w);
#pragma unroll
            for (int j = 0; j < kVector<T>; ++j) w[j] = divided(w[j], sigma);
            write<T>(layer.result, e, count, layer.dense, w);
          });
        });
    first = last;
  }
}

template <class T, bool SECOND>
__global__ void __launch_bounds__(kThreads, 2) gradient_kernel(const __grid_constant__ Network net) {
  using S = Sum<T>;
  constexpr int kSums = SECOND ? 3 : 1;
  S *scratch = static_cast<S*>(net.scratch), *shared = shared_memory<S>();
  if (net.gathers) {
    gather(net, 0, net.count, scratch);
    grid_barrier();
  }
  int first = 0;
  for (int wave = 0; wave < net.waves; ++wave) {
    const int last = net.ends[wave];
    for_units(
        net, first, last, [](const Layer& layer) { return product_units(layer); },
        [&](const Layer& layer, int64_t unit) {
          const int units = product_units(layer), all = blocks_of(elements_of(layer), kElements);
          const S *u = static_cast<const S*>(layer.u), *v = columns_given(layer, scratch);
          S sums[kSums] = {};
          for (int64_t part = unit; part < all; part += units)
            for_elements<T>(layer, part, [&](int64_t e, int count) {
              S w[kVector<T>], g[kVector<T>];
              read<T>(layer.weight, e, count, layer.dense, w);
              read<T>(layer.grad, e, count, layer.dense, g);
#pragma unroll
              for (int j = 0; j < kVector<T>; ++j) sums[0] += g[j] * w[j];
              if constexpr (SECOND) {
                S h[kVector<T>], uv[kVector<T>];
                read<T>(layer.grad_grad, e, count, layer.dense, h);
                outer_product(layer, u, v, e, count, uv);
#pragma unroll
                for (int j = 0; j < kVector<T>; ++j) sums[1] += h[j] * uv[j], sums[2] += h[j] * g[j];
              }
            });
#pragma unroll
          for (int s = 0; s < kSums; ++s) {
            const S total = sum_of_block<kThreads>(sums[s], shared);
            if (threadIdx.x == 0) scratch[layer.partial + unit * kSums + s] = total;
          }
        });
    grid_barrier();

    const Layer* known = nullptr;
    S sigma = 1, products[kSums] = {};
    for_units(
        net, first, last, [](const Layer& layer) { return (elements_of(layer) + kElements - 1) / kElements; },
        [&](const Layer& layer, int64_t unit) {
          if (known != &layer) {
            known = &layer;
            sigma = *static_cast<const S*>(layer.sigma);
#pragma unroll
            for (int s = 0; s < kSums; ++s) {
              products[s] =
                  divided(sum_of(scratch + layer.partial + s, product_units(layer), kSums, shared), sigma);
              if (s > 0 || !SECOND) products[s] = divided(products[s], sigma);
            }
          }
          const S *u = static_cast<const S*>(layer.u), *v = columns_given(layer, scratch);
          for_elements<T>(layer, unit, [&](int64_t e, int count) {
            S g[kVector<T>], uv[kVector<T>];
            read<T>(layer.grad, e, count, layer.dense, g);
            outer_product(layer, u, v, e, count, uv);
            if constexpr (!SECOND) {
#pragma unroll
              for (int j = 0; j < kVector<T>; ++j) g[j] = divided(g[j], sigma) - products[0] * uv[j];
              write<T>(layer.result, e, count, layer.dense, g);
            } else {
              S w[kVector<T>], h[kVector<T>];
              read<T>(layer.weight, e, count, layer.dense, w);
              read<T>(layer.grad_grad, e, count, layer.dense, h);
              const S of_uv = 2 * products[0] * products[1] - products[2];
#pragma unroll
              for (int j = 0; j < kVector<T>; ++j) {
                g[j] = uv[j] * of_uv - products[1] * g[j];
                h[j] = divided(h[j], sigma) - products[1] * w[j];
              }
              write<T>(layer.result, e, count, layer.dense, g);
              write<T>(layer.second_result, e, count, layer.dense, h);
            }
          });
        });
    first = last;
  }
}

// ---- host -----------------------------------------------------------------------------------------------

// A layer for the kernels, but for its pointers; its scratch memory begins at *at, which moves behind it.
template <class T>
Layer planned(const SpectralNormLayer& in, int64_t* at) {
  Layer layer{};
  const int64_t columns = in.outer * in.inner;
  if (in.rows > (1 << 30) || columns > (1 << 30))
    throw std::runtime_error("spectral_norm: a weight has more than 2^30 rows or columns");
  layer.rows = int32_t(in.rows);
  layer.columns = int32_t(columns);
  layer.inner = int32_t(in.inner);
  layer.rows_are_inner = in.inner == 1 && in.outer > 1;
  layer.groups = int8_t(in.groups);
  for (int g = 0; g < kGroups; ++g)
    layer.group_size[g] = in.group_size[g], layer.group_step[g] = in.group_step[g];
  const View view = view_of(layer);
  // Enough units of `across` to keep a device busy, each of 256 lines at least.
  const int64_t units = across_units<T>(view), most = ceil_div(view.others, 256);
  layer.split = int16_t(std::max<int64_t>(1, std::min<int64_t>({ceil_div(256, units), most, 64})));
  const auto take = [&](int64_t count) {
    const int64_t place = *at;
    *at += ceil_div(count, 4) * 4;
    if (*at > INT32_MAX) throw std::runtime_error("spectral_norm: too many large weights for one launch");
    return int32_t(place);
  };
  const int64_t sums =
      std::max<int64_t>(along_units(view), std::max<int64_t>(units, ceil_div(view.count, kEntries)));
  layer.row_vector = take(in.rows);
  layer.column_vector = take(columns);
  layer.gathered = take(in.groups == 1 ? 0 : columns);
  layer.row_sums = take(sums);
  layer.column_sums = take(sums);
  layer.partial = take(std::max<int64_t>(3 * kProducts, layer.split > 1 ? layer.split * view.count : 0));
  return layer;
}

// The layers of one launch.
template <class T>
Network network_of(SpectralNormPass pass, const SpectralNormLayer* layers, int count,
                   const SpectralNormRules& rules, int64_t* scratch_values, int64_t* units) {
  Network net{};
  net.count = int8_t(count);
  net.eps = rules.eps;
  net.iterations = int32_t(rules.iterations);
  net.u_first = rules.u_first;
  net.add_eps = rules.add_eps;
  const int tensors = pass == SpectralNormPass::kForward ? 1 : pass == SpectralNormPass::kBackward ? 2 : 3;
  const int64_t fits = l2_bytes() / 2;  // beside what is written
  int64_t at = 0, bytes = 0;
  *units = 1;
  for (int i = 0; i < count; ++i) {
    const SpectralNormLayer& in = layers[i];
    Layer& layer = net.layers[i] = planned<T>(in, &at);
    layer.weight = in.weight, layer.u = in.u, layer.v = in.v, layer.grad = in.grad;
    layer.grad_grad = in.grad_grad, layer.new_u = in.new_u, layer.new_v = in.new_v, layer.sigma = in.sigma;
    layer.result = in.result, layer.second_result = in.second_result;
    layer.dense = is_aligned(in.weight) && is_aligned(in.grad) && is_aligned(in.grad_grad) &&
                  is_aligned(in.result) && is_aligned(in.second_result);
    const View view = view_of(layer);
    layer.aligned = layer.dense && view.run % kVector<T> == 0;
    net.gathers = net.gathers || in.groups > 1;
    net.splits = net.splits || layer.split > 1;
    *units += std::max<int64_t>({ceil_div(elements_of(layer), kElements) + 1, int64_t(along_units(view)),
                                 int64_t(across_units<T>(view)) * layer.split});
    const int64_t own = elements_of(layer) * int64_t(sizeof(T)) * tensors;
    if (net.waves == 0 || bytes + own > fits) ++net.waves, bytes = 0;
    bytes += own;
    net.ends[net.waves - 1] = int8_t(i + 1);
  }
  *scratch_values = at;
  return net;
}

template <class T>
void run(SpectralNormPass pass, const std::vector<SpectralNormLayer>& layers, const SpectralNormRules& rules,
         void* scratch, void* stream) {
  const size_t shared = sizeof(Sum<T>) * size_t(kWarps * kLanesAcross * kVector<T>);
  for (size_t begin = 0; begin < layers.size(); begin += kLayers) {
    int64_t values, units;
    const int count = int(std::min<size_t>(kLayers, layers.size() - begin));
    Network net = network_of<T>(pass, &layers[begin], count, rules, &values, &units);
    net.scratch = scratch;
    const auto go = [&](auto* kernel, int64_t most) {
      launch_cooperative(kernel, std::min(units, most), kThreads, shared, stream, net);
    };
    switch (pass) {
      case SpectralNormPass::kForward:
        go(forward_kernel<T>, resident_blocks<forward_kernel<T>>(kThreads, shared, kBlocksEach));
        break;
      case SpectralNormPass::kBackward:
        go(gradient_kernel<T, false>,
           resident_blocks<gradient_kernel<T, false>>(kThreads, shared, kBlocksEach));
        break;
      case SpectralNormPass::kDoubleBackward:
        go(gradient_kernel<T, true>,
           resident_blocks<gradient_kernel<T, true>>(kThreads, shared, kBlocksEach));
        break;
    }
  }
}

}  // namespace

int64_t spectral_norm_scratch(const std::vector<SpectralNormLayer>& layers, int dtype) {
  int64_t most = 0;
  by_dtype(dtype, [&](auto* type) {
    using T = std::remove_pointer_t<decltype(type)>;
    for (size_t begin = 0; begin < layers.size(); begin += kLayers) {
      int64_t at = 0;
      for (size_t i = begin; i < std::min(layers.size(), begin + kLayers); ++i) planned<T>(layers[i], &at);
      most = std::max<int64_t>(most, at * int64_t(sizeof(Sum<T>)));
    }
  });
  return most;
}

void spectral_norm(SpectralNormPass pass, const std::vector<SpectralNormLayer>& layers,
                   const SpectralNormRules& rules, int dtype, void* scratch, void* stream) {
  by_dtype(dtype, [&](auto* type) {
    run<std::remove_pointer_t<decltype(type)>>(pass, layers, rules, scratch, stream);
  });
}

}  // namespace gankern::cuda
