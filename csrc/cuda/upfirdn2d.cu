// Up, FIR filter, down on every plane of a batch: zero-insertion, a filter, decimation, in one pass.
//
// Formula: on each axis, with z[i up] = x[i] and z zero elsewhere, out[o] = sum_j taps[j] z[o down + j - start].
// Only every up-th tap meets a sample: with s = o down - start, tap j = i up - s for the sample i = ceil(s / up),
// and each following sample the tap `up` after.
//
// tiled_kernel (a separable filter, up and down of 1 or 2, at most 12 taps) works in two steps. A block makes a
// tile of outputs of one plane. First it goes down the columns: a thread takes 16 bytes of neighbouring columns
// and 8 rows of the result (4 where down is 2); it reads each row that these need once, 16 bytes at a time, and
// keeps the sums in registers. Within the image all of these loads are done at once, with nothing asked about
// any of them; at its upper and lower edge rows are asked for, and element by element is read where 16 bytes
// are not all there or do not begin at a multiple of 16: three branches, of which a thread takes one. Rows
// filtered this way go to shared memory in the type of sums. Then each thread takes 8 neighbouring outputs of a
// row of the tile: it reads what they meet from shared memory, 16 bytes at a time, filters, and writes 16 bytes
// at a time. Taps are in registers, and which of them meets which row or column is known when this is compiled.
// In channels_last a column is a pixel's channel, up to 32 channels of a pixel side by side, and a thread's
// outputs are 16 bytes of channels of one pixel.
//
// Traffic: x is read once, and what neighbouring tiles share again from the caches; the result is written once.
// For four taps without resampling an output takes 5 multiply-adds down and 4 along, and by 16 bytes 0.5 reads
// and 0.3 writes of shared memory.
//
// direct_kernel does everything else: a thread an output, all taps from memory by way of the L1 cache, 64-bit
// indices.
#include <algorithm>
#include <stdexcept>
#include <type_traits>

#include "common.h"
#include "upfirdn2d.h"

namespace gankern::cuda {
namespace {

constexpr int kThreads = 128;
constexpr size_t kShared = 48 << 10;
constexpr int kNarrowest =
    16;  // outputs of a tile's row, at least, where those of one channel are neighbours

struct Problem {
  Upfirdn2d in;
  int32_t width, channels;  // of a tile, powers of two: outputs of a row, and channels of each
  int32_t threads_bits;     // of the number of threads that filter along one of its rows
  int32_t groups;           // of rows of a tile
  int32_t span, pitch;      // samples that a tile's row reads, and values of a row of shared memory
  int32_t tiles_y, tiles_x, tiles_c;
  bool vectors;         // 16 bytes at a time: all rows begin at multiples of 16 bytes
  bool result_vectors;  // and so do the result's
};

// Blocks of a multiprocessor, at least: in half precision a thread holds 64 sums and 11 times 16 bytes, which three
// blocks of 4 warps have in 168 registers; of 12 taps and no factor it takes up to 234.
template <class T, int UP, int DOWN, int TAPS>
constexpr int kResident = TAPS > 4 && UP == 1 && DOWN == 1 ? (sizeof(T) == 8 ? 3 : 2)
                          : sizeof(T) == 2                 ? 3
                                                           : 4;

// Rows of the result that a thread has.
template <int DOWN>
constexpr int kRows = DOWN == 1 ? 8 : 4;

// For an output: the first sample that it reads, and the tap that this meets.
__host__ __device__ inline int64_t first_sample(int64_t output, const ResampledAxis& axis, int* tap) {
  const int64_t s = output * axis.down - axis.start;
  const int64_t sample = s > 0 ? (s + axis.up - 1) / axis.up : -((-s) / axis.up);
  *tap = int(sample * axis.up - s);
  return sample;
}

// The same of small factors, in 32 bits.
template <int UP, int DOWN>
__device__ int first_sample(int output, int start, int* tap) {
  const int s = output * DOWN - start;
  const int sample = UP == 1 ? s : (s + 1) >> 1;
  *tap = sample * UP - s;
  return sample;
}

template <class S>
__device__ S filter_value(const Upfirdn2d& in, int64_t place) {
  switch (in.filter_dtype) {
    case 0: return S(static_cast<const double*>(in.filter)[place]);
    case 1: return S(static_cast<const float*>(in.filter)[place]);
    case 2: return S(widen(static_cast<const BFloat16*>(in.filter)[place]));
    default: return S(widen(static_cast<const Half*>(in.filter)[place]));
  }
}
// Tap j of an axis in the order of a correlation.
__device__ inline int tap_place(int j, int taps, bool flip) { return flip ? j : taps - 1 - j; }

// A filter in registers: at most MOST taps in the order of a correlation, ALL of them or fewer. Those that are not there
// meet nothing: a 0 would make a NaN of what is infinite.
template <class S, int MOST, bool ALL>
struct Filter {
  static constexpr int kMost = MOST;
  S taps[MOST];
  int count;
  __device__ bool has(int j) const { return j < MOST && (ALL || j < count); }
};

// ---- down the columns -----------------------------------------------------------------------------------

// What a thread has of x: 16 bytes of columns of one channel or, with `last`, of channels of one column.
struct Columns {
  int at;               // their first element's place in a row
  int first, count;     // the first one, and how many there are of them
  bool exists;          // the column, with `last`
  bool whole, outside;  // all 16 bytes are there, and can be loaded at once; nothing is
};
template <class T>
__device__ Columns columns_of(const Upfirdn2d& in, bool vectors, int column, int channel) {
  constexpr int kLanes = kVector<T>;
  const bool last = in.group > 1;
  Columns own;
  own.at = last ? column * in.group + channel : column;
  own.first = last ? channel : column;
  own.count = last ? in.group : in.columns.in;
  own.exists = !last || (column >= 0 && column < in.columns.in);
  own.outside = !own.exists || own.first + kLanes <= 0 || own.first >= own.count;
  own.whole = vectors && own.exists && own.first >= 0 && own.first + kLanes <= own.count;
  return own;
}

// Which of a thread's loads are asked about: none, whether there is such a row, or that and each element.
enum class Edge { kNone, kRows, kElements };

// Rows that a thread's sums meet.
template <int UP, int DOWN, int TAPS>
constexpr int kWindow = UP == 1 ? (kRows<DOWN> - 1) * DOWN + TAPS : kRows<DOWN> / 2 + (TAPS + 1) / 2;

// The sums of a thread's rows. PHASE: the first tap of the first one, where up is 2.
template <class T, int UP, int DOWN, int PHASE, Edge EDGE, class F>
__device__ void down_columns(const T* x, const Columns& own, int first_row, const Upfirdn2d& in,
                             const F& filter, Sum<T> (&sums)[kRows<DOWN>][kVector<T>]) {
  constexpr int kLanes = kVector<T>;
  const T* row = x + int64_t(first_row) * in.row_stride + own.at;
#pragma unroll
  for (int q = 0; q < kWindow<UP, DOWN, F::kMost>; ++q) {
    Sum<T> values[kLanes] = {};
    if (EDGE == Edge::kNone) {
      load16(row + q * in.row_stride, values);
    } else if (first_row + q >= 0 && first_row + q < in.rows.in) {
      if (EDGE == Edge::kRows) {
        load16(row + q * in.row_stride, values);
      } else {
#pragma unroll
        for (int j = 0; j < kLanes; ++j)
          if (own.first + j >= 0 && own.first + j < own.count) values[j] = widen(row[q * in.row_stride + j]);
      }
    }
#pragma unroll
    for (int k = 0; k < kRows<DOWN>; ++k) {
      // Of output k: the sample that it starts with, and its tap.
      const int start = UP == 1 ? k * DOWN : (k + 1 - PHASE) / 2;
      const int tap = UP == 1 ? 0 : (k + PHASE) % 2;
      const int j = tap + (q - start) * UP;
      if (q >= start && filter.has(j)) {
#pragma unroll
        for (int e = 0; e < kLanes; ++e) sums[k][e] += filter.taps[j] * values[e];
      }
    }
  }
}

template <class T, int UP, int DOWN, int PHASE, class F>
__device__ void down_columns(const T* x, const Columns& own, int first_row, const Upfirdn2d& in,
                             const F& filter, Sum<T> (&sums)[kRows<DOWN>][kVector<T>]) {
  if (own.outside) return;
  if (!own.whole)
    down_columns<T, UP, DOWN, PHASE, Edge::kElements>(x, own, first_row, in, filter, sums);
  else if (first_row >= 0 && first_row + kWindow<UP, DOWN, F::kMost> <= in.rows.in)
    down_columns<T, UP, DOWN, PHASE, Edge::kNone>(x, own, first_row, in, filter, sums);
  else
    down_columns<T, UP, DOWN, PHASE, Edge::kRows>(x, own, first_row, in, filter, sums);
}

// ---- along the rows -------------------------------------------------------------------------------------

// 16 bytes of shared memory.
template <class S>
__device__ void read_shared(const S* from, S* to) {
  S part[kVector<S>];
  load16(from, part);
#pragma unroll
  for (int j = 0; j < kVector<S>; ++j) to[j] = part[j];
}

// Neighbouring outputs: 16 bytes at a time where all are there, else those below `count`.
template <class T, int COUNT>
__device__ void write(T* to, const Sum<T> (&sums)[COUNT], int count, bool vectors) {
  if (vectors && count >= COUNT) {
#pragma unroll
    for (int i = 0; i < COUNT; i += kVector<T>) {
      Sum<T> part[kVector<T>];
#pragma unroll
      for (int l = 0; l < kVector<T>; ++l) part[l] = sums[i + l];
      store16_global(to + i, part);
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < COUNT; ++i)
    if (i < count) narrow(sums[i], to + i);
}

// Outputs of a row of one channel that a thread has: what they meet begins as far behind a multiple of 16 bytes of
// shared memory for each thread of a tile.
template <class T>
constexpr int kAlong = sizeof(T) == 8 ? 4 : 8;

// The sums of neighbouring outputs. `from`: a multiple of 16 bytes, SHIFT values before the first sample. PHASE as
// above, of the columns.
template <class T, int UP, int DOWN, int PHASE, int SHIFT, class F>
__device__ void along_row(const Sum<T>* from, const F& filter, Sum<T> (&sums)[kAlong<T>]) {
  using S = Sum<T>;
  constexpr int kOutputs = kAlong<T>, kPart = kVector<S>;
  constexpr int kWhole = UP == 1 ? (kOutputs - 1) * DOWN + F::kMost : kOutputs / 2 + (F::kMost + 1) / 2;
  constexpr int kRead = (SHIFT + kWhole + kPart - 1) / kPart * kPart;
  S values[kRead];
#pragma unroll
  for (int j = 0; j < kRead; j += kPart) read_shared(from + j, values + j);
#pragma unroll
  for (int i = 0; i < kOutputs; ++i) {
    const int start = UP == 1 ? i * DOWN : (i + 1 - PHASE) / 2;
    const int tap = UP == 1 ? 0 : (i + PHASE) % 2;
    sums[i] = 0;
#pragma unroll
    for (int j = tap; j < F::kMost; j += UP)
      if (filter.has(j)) sums[i] += filter.taps[j] * values[SHIFT + start + (j - tap) / UP];
  }
}

// The tile's rows of one channel, each thread some neighbours of a row at a time.
template <class T, int UP, int DOWN, int PHASE, int SHIFT, class F>
__device__ void along_rows(const Sum<T>* tile, int first_sample_at, int rows, int columns, T* to,
                           int64_t line, const Problem& problem, const F& filter) {
  for (int item = int(threadIdx.x); item < rows << problem.threads_bits; item += kThreads) {
    const int r = item >> problem.threads_bits;
    const int k = (item - (r << problem.threads_bits)) * kAlong<T>;
    if (k >= columns) continue;
    Sum<T> sums[kAlong<T>];
    along_row<T, UP, DOWN, PHASE, SHIFT>(tile + r * problem.pitch + first_sample_at - SHIFT + k * DOWN / UP,
                                         filter, sums);
    write(to + r * line + k, sums, columns - k, problem.result_vectors);
  }
}

template <class T, int UP, int DOWN, int PHASE, int SHIFT, class F>
__device__ void along_rows_of(int shift, const Sum<T>* tile, int first_sample_at, int rows, int columns,
                              T* to, int64_t line, const Problem& problem, const F& filter) {
  if constexpr (SHIFT < kVector<Sum<T>>) {
    if (shift == SHIFT)
      along_rows<T, UP, DOWN, PHASE, SHIFT>(tile, first_sample_at, rows, columns, to, line, problem, filter);
    else
      along_rows_of<T, UP, DOWN, PHASE, SHIFT + 1>(shift, tile, first_sample_at, rows, columns, to, line,
                                                   problem, filter);
  }
}

// The tile's rows of pixels, each thread some channels of a pixel at a time.
template <class T, int UP, int DOWN, class F>
__device__ void along_pixels(const Sum<T>* tile, int base, int first_x, int first_c, int rows, T* to,
                             int64_t line, const Problem& problem, const F& filter) {
  using S = Sum<T>;
  constexpr int kLanes = kVector<T>, kPart = kVector<S>;
  const Upfirdn2d& in = problem.in;
  const int of_pixel = problem.channels / kLanes;
  for (int item = int(threadIdx.x); item < rows << problem.threads_bits; item += kThreads) {
    const int r = item >> problem.threads_bits, k = item - (r << problem.threads_bits);
    const int ox = first_x + k / of_pixel, own = k % of_pixel * kLanes;
    if (ox >= in.columns.out || first_c + own >= in.group) continue;
    int tap;
    const int sample = first_sample<UP, DOWN>(ox, in.columns.start, &tap);
    const S* from = tile + r * problem.pitch + (sample - base) * problem.channels + own;
    S sums[kLanes] = {};
#pragma unroll
    for (int m = 0; m < (F::kMost + UP - 1) / UP; ++m) {
      if (!filter.has(m * UP + tap)) continue;
      S weight = filter.taps[m * UP];
      if (UP == 2 && tap == 1 && m * UP + 1 < F::kMost)
        weight = filter.taps[m * UP + (m * UP + 1 < F::kMost)];
#pragma unroll
      for (int j = 0; j < kLanes; j += kPart) {
        S values[kPart];
        load16(from + m * problem.channels + j, values);
#pragma unroll
        for (int l = 0; l < kPart; ++l) sums[j + l] += weight * values[l];
      }
    }
    write(to + r * line + int64_t(ox) * in.group + first_c + own, sums, in.group - first_c - own,
          problem.result_vectors);
  }
}

// ---- the kernel -----------------------------------------------------------------------------------------

template <class T, int UP, int DOWN, int TAPS, bool ALL>
__global__ void __launch_bounds__(kThreads, kResident<T, UP, DOWN, TAPS>)
    tiled_kernel(const __grid_constant__ Problem problem) {
  using S = Sum<T>;
  constexpr int kLanes = kVector<T>, kOutputs = kRows<DOWN>;
  const Upfirdn2d& in = problem.in;
  S* tile = shared_memory<S>();
  int block = int(blockIdx.x);
  const int tile_c = block % problem.tiles_c;
  block /= problem.tiles_c;
  const int tile_x = block % problem.tiles_x;
  block /= problem.tiles_x;
  const int tile_y = block % problem.tiles_y;
  const int64_t plane = block / problem.tiles_y;
  const T* x = static_cast<const T*>(in.x) + plane / in.planes_a_batch * in.batch_stride +
               plane % in.planes_a_batch * in.channel_stride;

  Filter<S, TAPS, ALL> filter;
  filter.count = in.rows.taps;
#pragma unroll
  for (int j = 0; j < TAPS; ++j)
    filter.taps[j] = filter.has(j) ? filter_value<S>(in, tap_place(j, filter.count, in.flip)) : S(0);

  const int first_y = tile_y * problem.groups * kOutputs, first_x = tile_x * problem.width;
  const int first_c = tile_c * problem.channels;
  int phase_x;
  const int first = first_sample<UP, DOWN>(first_x, in.columns.start, &phase_x);
  int base = first;  // the sample that a row of the tile begins with
  // Rows of one channel begin where 16 bytes of memory do.
  if (in.group == 1) base = base >= 0 ? base / kLanes * kLanes : -((-base + kLanes - 1) / kLanes * kLanes);

  const int across = problem.pitch / kLanes;
  for (int item = int(threadIdx.x); item < problem.groups * across; item += kThreads) {
    const int group = item / across, e = item % across * kLanes;
    const int y = first_y + group * kOutputs;
    if (y >= in.rows.out) continue;
    const int column = base + (in.group == 1 ? e : e / problem.channels);
    const int channel = in.group == 1 ? 0 : first_c + e % problem.channels;
    const Columns own = columns_of<T>(in, problem.vectors, column, channel);
    S sums[kOutputs][kLanes] = {};
    int phase;
    const int row = first_sample<UP, DOWN>(y, in.rows.start, &phase);
    if (UP == 1 || phase == 0)
      down_columns<T, UP, DOWN, 0>(x, own, row, in, filter, sums);
    else
      down_columns<T, UP, DOWN, UP - 1>(x, own, row, in, filter, sums);
    S* to = tile + group * kOutputs * problem.pitch + e;
#pragma unroll
    for (int k = 0; k < kOutputs; ++k)
#pragma unroll
      for (int j = 0; j < kLanes; j += kVector<S>) {
        S part[kVector<S>];
#pragma unroll
        for (int l = 0; l < kVector<S>; ++l) part[l] = sums[k][j + l];
        store16(to + k * problem.pitch + j, part);
      }
  }
  __syncthreads();

#pragma unroll
  for (int j = 0; j < TAPS; ++j) filter.taps[j] *= S(in.gain);
  const int64_t line = int64_t(in.columns.out) * in.group;
  const int rows =
      in.rows.out - first_y < problem.groups * kOutputs ? in.rows.out - first_y : problem.groups * kOutputs;
  T* to = static_cast<T*>(in.out) + (plane * in.rows.out + first_y) * line;
  if (in.group > 1)
    return along_pixels<T, UP, DOWN>(tile, base, first_x, first_c, rows, to, line, problem, filter);
  const int columns = in.columns.out - first_x < problem.width ? in.columns.out - first_x : problem.width;
  const int at = first - base, shift = at % kVector<S>;
  if (UP == 1 || phase_x == 0)
    along_rows_of<T, UP, DOWN, 0, 0>(shift, tile, at, rows, columns, to + first_x, line, problem, filter);
  else
    along_rows_of<T, UP, DOWN, UP - 1, 0>(shift, tile, at, rows, columns, to + first_x, line, problem,
                                          filter);
}

// ---- everything else ------------------------------------------------------------------------------------

template <class T>
__global__ void __launch_bounds__(kThreads, 4) direct_kernel(const __grid_constant__ Problem problem) {
  using S = Sum<T>;
  const Upfirdn2d& in = problem.in;
  const int64_t line = int64_t(in.columns.out) * in.group, of_plane = line * in.rows.out;
  const int64_t step = int64_t(gridDim.x) * kThreads;
  for (int64_t k = int64_t(blockIdx.x) * kThreads + threadIdx.x; k < in.planes * of_plane; k += step) {
    const int64_t plane = k / of_plane, e = k % line;
    int tap_y, tap_x;
    const int64_t y = first_sample(k % of_plane / line, in.rows, &tap_y);
    const int64_t column = first_sample(e / in.group, in.columns, &tap_x);
    const T* x = static_cast<const T*>(in.x) + plane / in.planes_a_batch * in.batch_stride +
                 plane % in.planes_a_batch * in.channel_stride + e % in.group;
    S sum = 0;
    for (int64_t i = y, j = tap_y; j < in.rows.taps; ++i, j += in.rows.up) {
      if (i < 0 || i >= in.rows.in) continue;
      const int row_place = tap_place(int(j), in.rows.taps, in.flip);
      S along = 0;
      for (int64_t l = column, m = tap_x; m < in.columns.taps; ++l, m += in.columns.up) {
        if (l < 0 || l >= in.columns.in) continue;
        const int place = tap_place(int(m), in.columns.taps, in.flip);
        const S weight =
            filter_value<S>(in, in.separable ? place : int64_t(row_place) * in.columns.taps + place);
        along += weight * widen(x[i * in.row_stride + l * in.group]);
      }
      sum += in.separable ? filter_value<S>(in, row_place) * along : along;
    }
    narrow(sum * S(in.gain), static_cast<T*>(in.out) + k);
  }
}

// ---- host -----------------------------------------------------------------------------------------------

// Behind its rows there are 16 bytes more, since what is read by 16 may end behind the last one.
template <class T, int DOWN>
size_t shared_bytes(const Problem& problem) {
  return sizeof(Sum<T>) * size_t(problem.pitch) * size_t(problem.groups * kRows<DOWN>) + kVectorBytes;
}

// A tile that fits into shared memory; false where none does, or the tiled kernel is not for this.
template <class T, int UP, int DOWN, int TAPS>
bool choose_tile(Problem* problem) {
  const Upfirdn2d& in = problem->in;
  const bool last = in.group > 1;
  const auto power = [](int64_t count, int least, int most) {
    int size = least;
    while (size < most && size < count) size *= 2;
    return size;
  };
  problem->channels = last ? power(in.group, kVector<T>, std::max(32, kVector<T>)) : 1;
  problem->width =
      last ? power(in.columns.out, 4, DOWN == 1 ? 16 : 8) : power(in.columns.out, kNarrowest, 128);
  problem->groups = int(std::min<int64_t>(last ? 2 : 4, ceil_div(in.rows.out, kRows<DOWN>)));
  for (;;) {
    problem->span = ((problem->width - 1) * DOWN + TAPS - 1) / UP + 2;
    problem->pitch = last ? problem->span * problem->channels
                          : int(ceil_div(problem->span + kVector<T> - 1, kVector<T>)) * kVector<T>;
    if (shared_bytes<T, DOWN>(*problem) <= kShared) break;
    if (problem->groups > 1)
      problem->groups /= 2;
    else if (problem->width > (last ? 4 : kNarrowest))
      problem->width /= 2;
    else
      return false;
  }
  const int threads = problem->width * problem->channels / (last ? kVector<T> : kAlong<T>);
  problem->threads_bits = 0;
  while (1 << problem->threads_bits < threads) ++problem->threads_bits;
  problem->tiles_y = int(ceil_div(in.rows.out, problem->groups * kRows<DOWN>));
  problem->tiles_x = int(ceil_div(in.columns.out, problem->width));
  problem->tiles_c = int(ceil_div(in.group, problem->channels));
  const int64_t step = last ? in.group : kVector<T>;
  const auto whole = [](int64_t count) { return count % kVector<T> == 0; };
  problem->vectors = reinterpret_cast<uintptr_t>(in.x) % kVectorBytes == 0 && whole(step) &&
                     whole(in.row_stride) && whole(in.batch_stride) && whole(in.channel_stride);
  problem->result_vectors = reinterpret_cast<uintptr_t>(in.out) % kVectorBytes == 0 &&
                            whole(last ? int64_t(in.group) : int64_t(in.columns.out));
  return in.planes * problem->tiles_y * problem->tiles_x * problem->tiles_c <= INT32_MAX;
}

template <class T, int UP, int DOWN, int TAPS, bool ALL>
bool run_tiled(Problem* problem, void* stream) {
  if (!choose_tile<T, UP, DOWN, TAPS>(problem)) return false;
  const int64_t blocks = problem->in.planes * problem->tiles_y * problem->tiles_x * problem->tiles_c;
  launch(tiled_kernel<T, UP, DOWN, TAPS, ALL>, blocks, kThreads, shared_bytes<T, DOWN>(*problem), stream,
         *problem);
  return true;
}

template <class T, int UP, int DOWN>
bool run_taps(Problem* problem, void* stream) {
  const int taps = problem->in.rows.taps;
  if (taps == 4) return run_tiled<T, UP, DOWN, 4, true>(problem, stream);
  if (taps < 4) return run_tiled<T, UP, DOWN, 4, false>(problem, stream);
  return run_tiled<T, UP, DOWN, 12, false>(problem, stream);
}

template <class T>
void run(const Upfirdn2d& in, void* stream) {
  Problem problem{};
  problem.in = in;
  const ResampledAxis &rows = in.rows, &columns = in.columns;
  const int64_t most = std::max({int64_t(rows.in) * std::max<int64_t>(in.row_stride, 1),
                                 int64_t(columns.in) * in.group, int64_t(rows.out) * columns.out * in.group});
  const bool fits = in.separable && rows.up == columns.up && rows.down == columns.down && rows.taps <= 12 &&
                    rows.up * rows.down <= 2 && most < 1 << 30;
  if (fits) {
    const bool done = rows.up == 2     ? run_taps<T, 2, 1>(&problem, stream)
                      : rows.down == 2 ? run_taps<T, 1, 2>(&problem, stream)
                                       : run_taps<T, 1, 1>(&problem, stream);
    if (done) return;
  }
  const int64_t outputs = in.planes * rows.out * columns.out * in.group;
  launch(direct_kernel<T>, std::min<int64_t>(ceil_div(outputs, kThreads), 1 << 20), kThreads, 0, stream,
         problem);
}

}  // namespace

void upfirdn2d(const Upfirdn2d& problem, int dtype, void* stream) {
  by_dtype(dtype, [&](auto* type) { run<std::remove_pointer_t<decltype(type)>>(problem, stream); });
}

}  // namespace gankern::cuda
