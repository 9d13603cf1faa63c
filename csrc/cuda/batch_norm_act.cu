// Batch normalisation and a (leaky) ReLU, each map read from memory once. The formulas are those of
// csrc/cpu/batch_norm_act.cpp; with w = x - mean, every order is sums over a channel, terms that follow from the sums,
// and results that are sums of products of what was read with coefficients made of the terms.
//
// A slab is what the sums of its channels are over: all values of a channel, or of 32 bytes of neighbouring channels
// in channels_last. It belongs to a team of blocks, each of which has a range of it. A block adds its range up as it
// comes from memory, and keeps it in shared memory, as it came, until it knows the team's sums; then it makes its
// results of what it kept. The blocks of a team write what they added up, count themselves, and wait until all are
// counted; meanwhile each loads what it has room for of the team's next slab. All blocks run at once (a cooperative
// launch), one a multiprocessor, as many in a team as keep two thirds of their shared memory full. What does not fit
// is read again.
//
// A thread has 16 bytes of a row, a block's threads side by side; it reads back only what it kept itself. Sums are in
// the order of ranges, warps and lanes, and depend on the number of multiprocessors alone. They are in fp32 (fp64 for
// fp64), those of warps in fp64; squares are about each thread's first value, then about its warp's mean.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "batch_norm_act.h"
#include "common.h"

namespace gankern::cuda {
namespace {

template <NormPass PASS>  // the second order wants twice the registers
constexpr int kThreadsOf = PASS == NormPass::kDoubleBackward ? 256 : 512;
constexpr int kAskedFor =
    2048;                       // vectors that a block's threads ask for at once: 32 KB, where 25 fill memory
constexpr int kSlabBytes = 32;  // of neighbouring channels: what memory gives at once

struct Problem {
  BatchNorm in;
  int64_t slabs, vectors;  // vectors: 16 bytes each, of a slab
  int64_t range;           // of them, a block's
  int team, teams, rows;   // rows: vectors that a thread can keep, of each map
  uint32_t multiplier;     // by which, and by shifts, is divided by a plane: see Range::at
  int shift;
  double* partial;    // [slabs][team][sums][channels of a slab]
  unsigned* arrived;  // [slabs]
};

template <NormPass PASS>
constexpr int kMapsOf = 1 + int(PASS);
template <NormPass PASS>  // forward: number, mean, squares about it
constexpr int kSumsOf = PASS == NormPass::kForward    ? 3
                        : PASS == NormPass::kBackward ? 2
                                                      : 5;
template <NormPass PASS>
constexpr int kCoefficientsOf = 3 + (PASS == NormPass::kForward ? 0 : kSumsOf<PASS>);

template <class T, bool LAST>
struct Slab {
  static constexpr int kChannels = LAST ? kSlabBytes / int(sizeof(T)) : 1;
  static constexpr int kParts = LAST ? kChannels / kVector<T> : 1;  // vectors of a position
  static constexpr int kOwn = LAST ? kVector<T> : 1;                // channels of a thread
  static constexpr int kValues = LAST ? 1 : kVector<T>;             // a vector's, of a channel
};

// ---- device functions -----------------------------------------------------------------------------------

// v where z > 0, slope * v elsewhere; of a ReLU v where z is NaN too, and plain 0 elsewhere.
template <bool RELU, class S>
__device__ inline S gate(S z, S v, S slope) {
  if constexpr (RELU) return z <= 0 ? S(0) : v;
  return z > 0 ? v : v * slope;
}
// f of whether the slope is a ReLU's: asked once for what is computed of a vector.
template <class S, class F>
__device__ inline void by_slope(S slope, const F& f) {
  if (slope == 0)
    f(std::true_type());
  else
    f(std::false_type());
}

template <class S>
__device__ inline S value_of(const void* vector, int64_t at, S otherwise) {
  return vector ? static_cast<const S*>(vector)[at] : otherwise;
}

// The sum over the lanes that have the same part of a position, in each of them.
template <int PARTS, class S>
__device__ inline S sum_of_part(S value) {
#pragma unroll
  for (int mask = kWarp / 2; mask >= PARTS; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// Where the vectors of a block's range of a slab lie, in elements.
template <class T, NormPass PASS, bool LAST>
struct Range {
  int64_t first = 0, step = 0;
  uint32_t before = 0, plane = 1, multiplier = 0;  // before: values of the first plane that are others'
  int shift = 0;
  int count = 0;  // vectors of it, for this thread: 0 where its channels are none

  __device__ Range(const Problem& p, int64_t slab, int rank) {
    const BatchNorm& in = p.in;
    const int64_t begin = rank * p.range, left = p.vectors - begin;
    count = int(left < 0 ? 0 : left < p.range ? left : p.range);
    if constexpr (LAST) {
      constexpr int kParts = Slab<T, LAST>::kParts;
      const int64_t channel = slab * Slab<T, LAST>::kChannels + int(threadIdx.x) % kParts * kVector<T>;
      if (channel >= in.channels) count = 0;
      first = begin / kParts * in.channels + channel;
      step = in.channels;
    } else {
      const int64_t value = begin * kVector<T>, sample = value / in.plane;
      first = (sample * in.channels + slab) * in.plane;
      before = uint32_t(value - sample * in.plane);
      plane = uint32_t(in.plane), multiplier = p.multiplier, shift = p.shift;
      step = in.channels * in.plane;
    }
  }
  __device__ int64_t at(int i) const {
    if constexpr (LAST) return first + i / Slab<T, LAST>::kParts * step;
    const uint32_t value = before + uint32_t(i) * uint32_t(kVector<T>);
    const uint32_t planes = (__umulhi(value, multiplier) + value) >> shift;  // value / plane
    return first + planes * step + (value - planes * plane);
  }
  // Rows of vectors in which this thread has one.
  __device__ int rows() const {
    const int behind = count - int(threadIdx.x);
    return behind <= 0 ? 0 : (behind - 1) / kThreadsOf<PASS> + 1;
  }
};

// What a thread adds up of its range.
template <class T, NormPass PASS, bool LAST>
struct Sums {
  using S = Sum<T>;
  static constexpr int kOwn = Slab<T, LAST>::kOwn, kCount = PASS == NormPass::kForward ? 2 : kSumsOf<PASS>;
  S value[kCount][kOwn];
  S mean[kOwn], k[kOwn], beta[kOwn];  // forward: the mean is the thread's first value

  __device__ void start(const BatchNorm& in, int64_t slab) {
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
#pragma unroll
      for (int s = 0; s < kCount; ++s) value[s][j] = 0;
      if constexpr (PASS != NormPass::kForward) {
        const int64_t c = slab * Slab<T, LAST>::kChannels +
                          (LAST ? int(threadIdx.x) % Slab<T, LAST>::kParts * kOwn : 0) + j;
        const bool there = c < in.channels;
        mean[j] = there ? value_of<S>(in.stats, c, 0) : S(0);
        k[j] = there ? value_of<S>(in.stats, in.channels + c, 0) * value_of<S>(in.weight, c, 1) : S(0);
        beta[j] = there ? value_of<S>(in.bias, c, 0) : S(0);
      }
    }
  }

  __device__ void add(const uint4 (&raw)[kMapsOf<PASS>], bool first, S slope) {
    S x[kVector<T>], g[kVector<T>], h[kVector<T>];
    widened(raw[0], x);
    if constexpr (PASS != NormPass::kForward) widened(raw[1], g);
    if constexpr (PASS == NormPass::kDoubleBackward) widened(raw[2], h);
    if constexpr (PASS == NormPass::kForward) {
      if (first)
#pragma unroll
        for (int j = 0; j < kOwn; ++j) mean[j] = x[j];
#pragma unroll
      for (int v = 0; v < kVector<T>; ++v) {
        const int j = LAST ? v : 0;
        const S d = x[v] - mean[j];
        value[0][j] += d;
        value[1][j] += d * d;
      }
    } else {
      by_slope(slope, [&](auto of_relu) {
        constexpr bool kRelu = decltype(of_relu)::value;
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) {
          const int j = LAST ? v : 0;
          const S w = x[v] - mean[j], own = gate<kRelu>(w * k[j] + beta[j], g[v], slope);
          value[0][j] += own;
          value[1][j] += own * w;
          if constexpr (PASS == NormPass::kDoubleBackward) {
            value[2][j] += h[v];
            value[3][j] += h[v] * w;
            value[4][j] += own * h[v];
          }
        }
      });
    }
  }

  __device__ static void widened(const uint4& raw, S (&to)[kVector<T>]) {
    alignas(16) T values[kVector<T>];
    memcpy(values, &raw, sizeof raw);
#pragma unroll
    for (int v = 0; v < kVector<T>; ++v) to[v] = widen(values[v]);
  }

  // Of each warp and channel its sums, [sums][channels of a slab][warps].
  __device__ void of_warps(double* to, int rows) const {
    constexpr int kWarps = kThreadsOf<PASS> / kWarp;
    constexpr int kParts = Slab<T, LAST>::kParts, kChannels = Slab<T, LAST>::kChannels;
    const int lane = int(threadIdx.x) % kWarp, warp = int(threadIdx.x) / kWarp, part = lane % kParts;
    const S n = S(rows * Slab<T, LAST>::kValues), all = sum_of_part<kParts>(n);
#pragma unroll
    for (int j = 0; j < kOwn; ++j) {
      double* own = to + (part * kOwn + j) * kWarps + warp;
      if constexpr (PASS == NormPass::kForward) {
        // The first lane has values where any has.
        const S about = __shfl_sync(0xffffffffu, rows ? mean[j] : S(0), part);
        const S apart = rows ? mean[j] - about : S(0), within = rows ? value[0][j] / n : S(0);
        const S sum = sum_of_part<kParts>(n * apart + value[0][j]), middle = all > 0 ? sum / all : S(0);
        const S squares = value[1][j] - value[0][j] * within, off = apart + within - middle;
        const S total = sum_of_part<kParts>((squares < 0 ? S(0) : squares) + n * (off * off));
        if (lane < kParts) {
          own[0] = double(all);
          own[kChannels * kWarps] = double(about) + double(middle);
          own[2 * kChannels * kWarps] = double(total);
        }
      } else {
#pragma unroll
        for (int s = 0; s < kCount; ++s) {
          const S total = sum_of_part<kParts>(value[s][j]);
          if (lane < kParts) own[s * kChannels * kWarps] = double(total);
        }
      }
    }
  }
};

// The sums of `count` parts, of which sum s of part i is at from[s * step_s + i * step_i]; by 16 lanes, in each of them.
template <NormPass PASS>
__device__ inline void sum_of_parts(const double* from, int count, int64_t step_s, int64_t step_i,
                                    double (&to)[kSumsOf<PASS>]) {
  const int lane = int(threadIdx.x) % 16;
  const auto sum = [&](const auto& part) {
    double total = 0;
    for (int i = lane; i < count; i += 16) total += part(from + i * step_i);
    return sum_of_lanes<16>(total);
  };
  if constexpr (PASS == NormPass::kForward) {
    to[0] = sum([&](const double* p) { return p[0]; });
    const double values = sum([&](const double* p) { return p[0] * p[step_s]; });
    const double mean = to[1] = to[0] > 0 ? values / to[0] : 0;  // a block's range may be empty
    to[2] = sum([&](const double* p) {
      const double apart = p[step_s] - mean;
      return p[2 * step_s] + p[0] * apart * apart;
    });
  } else {
#pragma unroll
    for (int s = 0; s < kSumsOf<PASS>; ++s) to[s] = sum([&](const double* p) { return p[s * step_s]; });
  }
}

// What results are made of, [3 + terms][channels of a slab], from a channel's sums; where `first`, statistics and
// gradients of affine values are written.
template <class T, NormPass PASS, int CHANNELS>
__device__ void settle(const BatchNorm& in, int64_t c, bool first, const double (&sum)[kSumsOf<PASS>],
                       Sum<T>* to) {
  using S = Sum<T>;
  S* stats = static_cast<S*>(in.stats);
  const double count = double(in.samples * in.plane);
  if constexpr (PASS == NormPass::kForward) {
    const S mean = S(sum[1]), r = S(1 / sqrt(sum[2] / count + in.eps));
    if (first) {
      stats[c] = mean;
      stats[in.channels + c] = r;
      stats[2 * in.channels + c] = S(sum[2] / (count - 1));
    }
    to[0] = mean;
    to[CHANNELS] = r * value_of<S>(in.weight, c, 1);
    to[2 * CHANNELS] = value_of<S>(in.bias, c, 0);
  } else {
    const S mean = stats[c], r_own = stats[in.channels + c], k = r_own * value_of<S>(in.weight, c, 1);
    to[0] = mean;
    to[CHANNELS] = k;
    to[2 * CHANNELS] = value_of<S>(in.bias, c, 0);
    const double r = double(r_own), gamma = double(value_of<S>(in.weight, c, 1));
    S* term = to + 3 * CHANNELS;
    // Means; of r w in place of w.
    const double a = gamma * sum[0] / count, aw = gamma * sum[1] * r / count;
    if constexpr (PASS == NormPass::kBackward) {
      if (first && in.grad_weight) static_cast<S*>(in.grad_weight)[c] = S(r * sum[1]);
      if (first && in.grad_bias) static_cast<S*>(in.grad_bias)[c] = S(sum[0]);
      term[0] = S(-r * r * aw);
      term[CHANNELS] = S(-r * a);
    } else {
      const double h_gamma = double(value_of<S>(in.h_weight, c, 0));
      const double h = sum[2] / count, hw = sum[3] * r / count;
      const double difference = gamma * sum[4] / count - h * a - hw * aw;
      const double u = h_gamma * sum[0] / count - r * (hw * a + aw * h);
      const double uw = h_gamma * sum[1] * r / count - 2 * r * hw * aw;
      if (first && in.grad_weight)
        static_cast<S*>(in.grad_weight)[c] = S(r * (sum[4] - h * sum[0] - hw * r * sum[1]));
      // Of grad: what w and 1 are multiplied by; of x: what h, w and 1 are.
      term[0] = S(double(value_of<S>(in.h_weight, c, 0)) * r - double(k) * r * hw);
      term[CHANNELS] = S(double(value_of<S>(in.h_bias, c, 0)) - double(k) * h);
      term[2 * CHANNELS] = S(-r * r * aw);
      term[3 * CHANNELS] = S(-r * r * (uw + r * difference));
      term[4 * CHANNELS] = S(-r * u);
    }
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------

template <class T, NormPass PASS, bool LAST>
__global__ void __launch_bounds__(kThreadsOf<PASS>, 1) held_kernel(const __grid_constant__ Problem problem) {
  using S = Sum<T>;
  using Own = Slab<T, LAST>;
  constexpr int kThreads = kThreadsOf<PASS>, kWarps = kThreads / kWarp;
  constexpr int kMaps = kMapsOf<PASS>, kSums = kSumsOf<PASS>, kCoefficients = kCoefficientsOf<PASS>;
  constexpr int kPadded = (kCoefficients * Own::kChannels + 3) / 4 * 4;
  constexpr int kDeep = kAskedFor / kThreads / kMaps;
  const BatchNorm& in = problem.in;
  const int rank = int(blockIdx.x) % problem.team, thread = int(threadIdx.x);
  const S slope = S(in.negative_slope);
  double* of_warps = shared_memory<double>();  // [sums][channels][warps]
  S* coefficients = reinterpret_cast<S*>(of_warps + kSums * Own::kChannels * kWarps);
  uint4* kept = reinterpret_cast<uint4*>(coefficients + kPadded);
  const T* const from[3] = {static_cast<const T*>(in.x), static_cast<const T*>(in.grad),
                            static_cast<const T*>(in.h)};

  const auto place_of = [&](int row, int start) {  // of a row that is kept: rows follow each other in a ring
    const int place = start + row;
    return kept + int64_t(place < problem.rows ? place : place - problem.rows) * kMaps * kThreads + thread;
  };
  const auto load = [&](const Range<T, PASS, LAST>& range, int row, uint4(&raw)[kMaps]) {
    const int64_t at = range.at(row * kThreads + thread);
#pragma unroll
    for (int m = 0; m < kMaps; ++m) raw[m] = *reinterpret_cast<const uint4*>(from[m] + at);
  };
  // Adds up rows begin to end of a range, and keeps them.
  const auto take = [&](const Range<T, PASS, LAST>& range, int begin, int end, int start,
                        Sums<T, PASS, LAST>& sums) {
    const int own = range.rows() < end ? range.rows() : end;
    int row = begin;
    const auto finish = [&](int at, const uint4(&raw)[kMaps]) {
      sums.add(raw, at == 0, slope);
      if (at >= problem.rows) return;
      uint4* place = place_of(at, start);
#pragma unroll
      for (int m = 0; m < kMaps; ++m) place[m * kThreads] = raw[m];
    };
    for (; row + kDeep <= own; row += kDeep) {
      uint4 raw[kDeep][kMaps];
#pragma unroll
      for (int d = 0; d < kDeep; ++d) load(range, row + d, raw[d]);
#pragma unroll
      for (int d = 0; d < kDeep; ++d) finish(row + d, raw[d]);
    }
    for (; row < own; ++row) {
      uint4 raw[kMaps];
      load(range, row, raw);
      finish(row, raw);
    }
  };

  if (thread < kPadded) coefficients[thread] = 0;  // 16 bytes are read at once
  if (blockIdx.x == 0)
    for (int64_t s = thread; s < problem.slabs; s += kThreads) problem.arrived[s] = 0;

  int64_t slab = int64_t(blockIdx.x) / problem.team;
  Range<T, PASS, LAST> range(problem, slab, rank);
  Sums<T, PASS, LAST> sums;
  sums.start(in, slab);
  const int rows = int((problem.range + kThreads - 1) / kThreads);  // of a range
  const int held = rows < problem.rows ? rows : problem.rows;
  int taken = 0, start = 0;
  for (bool first = true; slab < problem.slabs; first = false) {
    take(range, taken, rows, start, sums);
    sums.of_warps(of_warps, range.rows());
    const int64_t next = slab + problem.teams;
    const Range<T, PASS, LAST> present = range;
    const int begin = start;
    if (next < problem.slabs) {
      range = Range<T, PASS, LAST>(problem, next, rank);
      sums.start(in, next);
    }
    if (first && problem.team > 1) grid_barrier();  // no counter is used before it is 0
    __syncthreads();

    const int channel = thread / 16;
    const bool settles = thread < (Own::kChannels > 2 ? Own::kChannels * 16 : kWarp);  // whole warps
    const int64_t c = slab * Own::kChannels + channel;
    const int sure = channel < Own::kChannels ? channel : 0;
    double sum[kSums];
    if (settles) sum_of_parts<PASS>(of_warps + sure * kWarps, kWarps, Own::kChannels * kWarps, 1, sum);
    taken = 0;  // of the next slab
    start = start + held < problem.rows ? start + held : start + held - problem.rows;
    if (problem.team > 1) {
      double* parts = problem.partial + slab * problem.team * kSums * Own::kChannels + sure;
      if (settles && channel < Own::kChannels && thread % 16 == 0)
#pragma unroll
        for (int s = 0; s < kSums; ++s) parts[(rank * kSums + s) * Own::kChannels] = sum[s];
      __syncthreads();
      if (thread == 0) signal(problem.arrived + slab);
      if (next < problem.slabs) {
        taken = problem.rows - held < rows ? problem.rows - held : rows;
        take(range, 0, taken, start, sums);
      }
      if (thread == 0) wait_for(problem.arrived + slab, unsigned(problem.team));
      __syncthreads();
      if (settles) sum_of_parts<PASS>(parts, problem.team, Own::kChannels, kSums * Own::kChannels, sum);
    }
    if (settles && channel < Own::kChannels && thread % 16 == 0 && c < in.channels)
      settle<T, PASS, Own::kChannels>(in, c, rank == 0, sum, coefficients + channel);
    __syncthreads();

    S value[kCoefficients][Own::kOwn];
#pragma unroll
    for (int k = 0; k < kCoefficients; ++k)
#pragma unroll
      for (int j = 0; j < Own::kOwn; ++j)
        value[k][j] = coefficients[k * Own::kChannels + (LAST ? thread % Own::kParts * Own::kOwn : 0) + j];
    // Backwards: of what is read again, the last is in the caches still.
    for (int row = present.rows() - 1; row >= 0; --row) {
      uint4 raw[kMaps];
      if (row < held) {
        const uint4* place = place_of(row, begin);
#pragma unroll
        for (int m = 0; m < kMaps; ++m) raw[m] = place[m * kThreads];
      } else {
        load(present, row, raw);
      }
      S x[kVector<T>], g[kVector<T>], h[kVector<T>], y[kVector<T>], y_x[kVector<T>];
      sums.widened(raw[0], x);
      if constexpr (kMaps > 1) sums.widened(raw[1], g);
      if constexpr (kMaps > 2) sums.widened(raw[2], h);
      by_slope(slope, [&](auto of_relu) {
        constexpr bool kRelu = decltype(of_relu)::value;
#pragma unroll
        for (int v = 0; v < kVector<T>; ++v) {
          const int j = LAST ? v : 0;
          const S w = x[v] - value[0][j], k = value[1][j], z = w * k + value[2][j];
          if constexpr (PASS == NormPass::kForward) {
            y[v] = gate<kRelu>(z, z, slope);
          } else {
            const S own = gate<kRelu>(z, g[v], slope);
            if constexpr (PASS == NormPass::kBackward) {
              y[v] = k * own + (value[3][j] * w + value[4][j]);
            } else {
              y[v] = gate<kRelu>(z, k * h[v] + (value[3][j] * w + value[4][j]), slope);
              y_x[v] = value[3][j] * own + value[5][j] * h[v] + (value[6][j] * w + value[7][j]);
            }
          }
        }
      });
      const int64_t at = present.at(row * kThreads + thread);
      store16_global(static_cast<T*>(in.out) + at, y);
      if constexpr (PASS == NormPass::kDoubleBackward) store16_global(static_cast<T*>(in.out_x) + at, y_x);
    }
    slab = next;
  }
}

// ---- host -----------------------------------------------------------------------------------------------

// Bytes of shared memory: of sums and coefficients, and of a row of all maps.
template <class T, NormPass PASS, bool LAST>
constexpr size_t kFixed =
    size_t(kSumsOf<PASS> * Slab<T, LAST>::kChannels * kThreadsOf<PASS> / kWarp) * 8 +
    size_t(kCoefficientsOf<PASS> * Slab<T, LAST>::kChannels + 3) / 4 * 4 * sizeof(Sum<T>);
template <NormPass PASS>
constexpr size_t kRow = size_t(kMapsOf<PASS>) * kThreadsOf<PASS> * kVectorBytes;

template <class T, NormPass PASS, bool LAST>
Problem problem_of(const BatchNorm& in) {
  constexpr auto kKernel = held_kernel<T, PASS, LAST>;
  constexpr int kThreads = kThreadsOf<PASS>;
  const size_t shared = most_shared<kKernel>();
  Problem p{};
  p.in = in;
  p.rows = int((shared - kFixed<T, PASS, LAST>) / kRow<PASS>);
  const int64_t positions = in.samples * in.plane;
  p.slabs = ceil_div(in.channels, Slab<T, LAST>::kChannels);
  p.vectors = LAST ? positions * Slab<T, LAST>::kParts : positions / kVector<T>;
  const int64_t blocks = resident_blocks<kKernel>(kThreads, shared, 1), whole = ceil_div(p.vectors, kThreads);
  int64_t team = std::min(ceil_div(3 * whole, 2 * p.rows), blocks);
  if (team * p.slabs < blocks)  // all of them, where each has work
    team = std::max(team, std::min(blocks / p.slabs, whole));
  else
    team = blocks / (blocks / team);
  p.team = int(team);
  p.teams = int(std::min(p.slabs, blocks / team));
  p.range = ceil_div(ceil_div(p.vectors, team), kThreads) * kThreads;
  if (p.range * kVector<T> >= int64_t(1) << 30 || in.plane >= int64_t(1) << 30)
    throw std::runtime_error(
        "batch_norm_act: a plane, or what a block has of a channel, is more than 2^30 elements");
  // For divisors and dividends below 2^31 (Granlund and Montgomery 1994).
  while (int64_t(1) << p.shift < in.plane) ++p.shift;
  p.multiplier = uint32_t((uint64_t((int64_t(1) << p.shift) - in.plane) << 32) / uint64_t(in.plane) + 1);
  return p;
}

// f of the problem's kernel: its type, pass and layout.
template <class F>
void by_kernel(const BatchNorm& in, int dtype, const F& f) {
  by_dtype(dtype, [&](auto* type) {
    const auto by_layout = [&](auto pass) {
      if (in.channels_last)
        f(type, pass, std::true_type());
      else
        f(type, pass, std::false_type());
    };
    switch (in.pass) {
      case NormPass::kForward: return by_layout(std::integral_constant<NormPass, NormPass::kForward>());
      case NormPass::kBackward: return by_layout(std::integral_constant<NormPass, NormPass::kBackward>());
      case NormPass::kDoubleBackward:
        return by_layout(std::integral_constant<NormPass, NormPass::kDoubleBackward>());
    }
  });
}

template <class T, NormPass PASS, bool LAST>
int64_t partial_values(const Problem& p) {
  return p.slabs * p.team * kSumsOf<PASS> * Slab<T, LAST>::kChannels;
}

}  // namespace

int64_t batch_norm_act_scratch(const BatchNorm& in, int dtype) {
  int64_t bytes = 0;
  by_kernel(in, dtype, [&](auto* type, auto pass, auto last) {
    using T = std::remove_pointer_t<decltype(type)>;
    const Problem p = problem_of<T, pass(), last()>(in);
    bytes = 8 * partial_values<T, pass(), last()>(p) + 4 * p.slabs;
  });
  return bytes;
}

void batch_norm_act(const BatchNorm& in, int dtype, void* scratch, void* stream) {
  by_kernel(in, dtype, [&](auto* type, auto pass, auto last) {
    using T = std::remove_pointer_t<decltype(type)>;
    Problem p = problem_of<T, pass(), last()>(in);
    p.partial = static_cast<double*>(scratch);
    p.arrived = reinterpret_cast<unsigned*>(p.partial + partial_values<T, pass(), last()>(p));
    const size_t shared = kFixed<T, pass(), last()> + size_t(p.rows) * kRow<pass()>;
    launch_cooperative(held_kernel<T, pass(), last()>, int64_t(p.team) * p.teams, kThreadsOf<pass()>, shared,
                       stream, p);
  });
}

}  // namespace gankern::cuda
