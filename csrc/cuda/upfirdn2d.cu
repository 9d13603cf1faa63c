// Up, FIR filter, down on every plane of a batch: zero-insertion, a filter, decimation, in one pass.
//
// Formula: on each axis, with z[i up] = x[i] and z zero elsewhere, out[o] = sum_j taps[j] z[o down + j - start].
// Only every up-th tap meets a sample: with s = o down - start, tap j = i up - s for the sample i = ceil(s / up),
// and each following sample the tap `up` after.
//
// tiled_kernel (a separable filter, up and down of 1 or 2, at most 12 taps) works in two steps. A block makes a
// tile of outputs of one plane. First it goes down the columns: a thread takes 16 bytes of neighbouring columns
// and 8 rows of the result (4 where down is 2); it reads each row that these need once, 16 bytes at a time, and
// keeps the sums in registers. Rows filtered this way go to shared memory in the type of sums. Then each thread
// takes a column of the tile and filters along its rows, from shared memory. Taps are in registers, and which
// of them meets which row is known when this is compiled. In channels_last a column is a pixel's channel, up to
// 32 channels of a pixel side by side; nothing else differs.
//
// Traffic: x is read once, and what neighbouring tiles share again from the caches; the result is written once.
// For four taps without resampling an output takes 5 multiply-adds down, 4 along, 4 reads and 1.3 writes of
// shared memory: less time than its bytes take, in bf16 about as much.
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

struct Problem {
  Upfirdn2d in;
  int32_t width, channels;  // of a tile: outputs of a row, and channels of each
  int32_t groups;           // of rows of a tile
  int32_t span, pitch;      // samples that a tile's row reads, and values of a row of shared memory
  int32_t tiles_y, tiles_x, tiles_c;
  bool vectors;  // 16 bytes at a time: all rows begin at multiples of 16 bytes
};

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

// ---- down the columns -----------------------------------------------------------------------------------

// 16 bytes of a row, zeros where there is no sample. `at`: the first element, of `columns` samples or, with
// `last`, of the channels from `channel` on of one of them.
template <class T>
__device__ void read_columns(const T* row, int at, int column, int channel, const Upfirdn2d& in, bool vectors,
                             Sum<T> (&to)[kVector<T>]) {
  constexpr int kLanes = kVector<T>;
  const bool last = in.group > 1;
  const int first = last ? channel : column, count = last ? in.group : in.columns.in;
  const bool exists = !last || (column >= 0 && column < in.columns.in);
  if (vectors && exists && first >= 0 && first + kLanes <= count) return load16(row + at, to);
#pragma unroll
  for (int j = 0; j < kLanes; ++j)
    to[j] = exists && first + j >= 0 && first + j < count ? widen(row[at + j]) : Sum<T>(0);
}

// The sums of a thread's rows. PHASE: the first tap of the first one, where up is 2.
template <class T, int UP, int DOWN, int TAPS, int PHASE>
__device__ void down_columns(const T* x, int at, int column, int channel, int first_row,
                             const Problem& problem, const Sum<T> (&taps)[TAPS],
                             Sum<T> (&sums)[kRows<DOWN>][kVector<T>]) {
  constexpr int kOutputs = kRows<DOWN>;
  constexpr int kWindow = UP == 1 ? (kOutputs - 1) * DOWN + TAPS : kOutputs / 2 + (TAPS + 1) / 2;
  const Upfirdn2d& in = problem.in;
#pragma unroll
  for (int q = 0; q < kWindow; ++q) {
    const int y = first_row + q;
    Sum<T> values[kVector<T>] = {};
    if (y >= 0 && y < in.rows.in)
      read_columns(x + int64_t(y) * in.row_stride, at, column, channel, in, problem.vectors, values);
#pragma unroll
    for (int k = 0; k < kOutputs; ++k) {
      // Of output k: the sample that it starts with, and its tap.
      const int start = UP == 1 ? k * DOWN : (k + 1 - PHASE) / 2;
      const int tap = UP == 1 ? 0 : (k + PHASE) % 2;
      const int j = tap + (q - start) * UP;
      if (q >= start && j < TAPS && j < in.rows.taps) {
#pragma unroll
        for (int e = 0; e < kVector<T>; ++e) sums[k][e] += taps[j] * values[e];
      }
    }
  }
}

template <class T, int UP, int DOWN, int TAPS>
__global__ void __launch_bounds__(kThreads, 4) tiled_kernel(const __grid_constant__ Problem problem) {
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

  S taps[TAPS];
#pragma unroll
  for (int j = 0; j < TAPS; ++j)
    taps[j] = j < in.rows.taps ? filter_value<S>(in, tap_place(j, in.rows.taps, in.flip)) : S(0);

  const int first_y = tile_y * problem.groups * kOutputs, first_x = tile_x * problem.width;
  const int first_c = tile_c * problem.channels;
  int tap;
  int base = int(first_sample(first_x, in.columns, &tap));  // the sample that a row of the tile begins with
  // Rows of one channel begin where 16 bytes of memory do.
  if (in.group == 1) base = base >= 0 ? base / kLanes * kLanes : -((-base + kLanes - 1) / kLanes * kLanes);

  const int across = problem.pitch / kLanes;
  for (int item = int(threadIdx.x); item < problem.groups * across; item += kThreads) {
    const int group = item / across, e = item % across * kLanes;
    const int y = first_y + group * kOutputs;
    if (y >= in.rows.out) continue;
    const int column = base + (in.group == 1 ? e : e / problem.channels);
    const int channel = in.group == 1 ? 0 : first_c + e % problem.channels;
    const int at = in.group == 1 ? column : column * in.group + channel;
    S sums[kOutputs][kLanes] = {};
    int phase;
    const int row = int(first_sample(y, in.rows, &phase));
    if (UP == 1 || phase == 0)
      down_columns<T, UP, DOWN, TAPS, 0>(x, at, column, channel, row, problem, taps, sums);
    else
      down_columns<T, UP, DOWN, TAPS, 1>(x, at, column, channel, row, problem, taps, sums);
    S* to = tile + int64_t(group) * kOutputs * problem.pitch + e;
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

  // Along the rows.
  constexpr int kMeet = (TAPS + UP - 1) / UP;  // taps that an output meets
  const int64_t line = int64_t(in.columns.out) * in.group;
  const int rows =
      in.rows.out - first_y < problem.groups * kOutputs ? in.rows.out - first_y : problem.groups * kOutputs;
  for (int k = int(threadIdx.x); k < problem.width * problem.channels; k += kThreads) {
    const int ox = first_x + k / problem.channels, c = first_c + k % problem.channels;
    if (ox >= in.columns.out || c >= in.group) continue;
    const int sample = int(first_sample(ox, in.columns, &tap));
    S weights[kMeet];
#pragma unroll
    for (int m = 0; m < kMeet; ++m) {
      const S own = UP == 1 || tap == 0 ? taps[m * UP] : m * UP + 1 < TAPS ? taps[m * UP + (UP > 1)] : S(0);
      weights[m] = own * S(in.gain);
    }
    const int meets = (in.columns.taps - tap + UP - 1) / UP;
    const S* from = tile + (sample - base) * problem.channels + k % problem.channels;
    T* to = static_cast<T*>(in.out) + (plane * in.rows.out + first_y) * line + int64_t(ox) * in.group + c;
#pragma unroll 4
    for (int r = 0; r < rows; ++r) {
      S sum = 0;
#pragma unroll
      for (int m = 0; m < kMeet; ++m)
        if (m < meets) sum += weights[m] * from[m * problem.channels];
      narrow(sum, to);
      from += problem.pitch;
      to += line;
    }
  }
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
  problem->width = last ? power(in.columns.out, 4, DOWN == 1 ? 16 : 8) : power(in.columns.out, 16, 128);
  problem->groups = int(std::min<int64_t>(last ? 2 : 4, ceil_div(in.rows.out, kRows<DOWN>)));
  for (;;) {
    problem->span = ((problem->width - 1) * DOWN + TAPS - 1) / UP + 2;
    problem->pitch = last ? problem->span * problem->channels
                          : int(ceil_div(problem->span + kVector<T> - 1, kVector<T>)) * kVector<T>;
    const size_t bytes = sizeof(Sum<T>) * size_t(problem->pitch) * size_t(problem->groups * kRows<DOWN>);
    if (bytes <= kShared) break;
    if (problem->groups > 1)
      problem->groups /= 2;
    else if (problem->width > 4)
      problem->width /= 2;
    else
      return false;
  }
  problem->tiles_y = int(ceil_div(in.rows.out, problem->groups * kRows<DOWN>));
  problem->tiles_x = int(ceil_div(in.columns.out, problem->width));
  problem->tiles_c = int(ceil_div(in.group, problem->channels));
  const int64_t step = last ? in.group : kVector<T>;
  const auto whole = [](int64_t count) { return count % kVector<T> == 0; };
  problem->vectors = reinterpret_cast<uintptr_t>(in.x) % kVectorBytes == 0 && whole(step) &&
                     whole(in.row_stride) && whole(in.batch_stride) && whole(in.channel_stride);
  return in.planes * problem->tiles_y * problem->tiles_x * problem->tiles_c <= INT32_MAX;
}

template <class T, int UP, int DOWN, int TAPS>
bool run_tiled(Problem* problem, void* stream) {
  if (!choose_tile<T, UP, DOWN, TAPS>(problem)) return false;
  const int64_t blocks = problem->in.planes * problem->tiles_y * problem->tiles_x * problem->tiles_c;
  const size_t shared = sizeof(Sum<T>) * size_t(problem->pitch) * size_t(problem->groups * kRows<DOWN>);
  launch(tiled_kernel<T, UP, DOWN, TAPS>, blocks, kThreads, shared, stream, *problem);
  return true;
}

template <class T, int UP, int DOWN>
bool run_taps(Problem* problem, void* stream) {
  const int taps = problem->in.rows.taps;
  if (taps <= 4) return run_tiled<T, UP, DOWN, 4>(problem, stream);
  return run_tiled<T, UP, DOWN, 12>(problem, stream);
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
