// What the kernels of this folder share: types, 16-byte accesses, sums over a block, launches.
//
// A .cu file is compiled by nvcc for devices, and by any C++ compiler for emulate.h. It uses nothing of torch:
// csrc/ops/cuda/ turns tensors into pointers and sizes. Kernels are launched in one dimension; their threads
// all reach every barrier; shared memory comes from shared_memory() alone, its size from the launch.
#pragma once

#include <cstdint>
#include <limits>
#include <type_traits>

#if defined(__CUDACC__)
#include <cooperative_groups.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <atomic>
#include <stdexcept>
#include <string>
#else
#include "emulate.h"
#endif

namespace gankern::cuda {

// ---- types ----------------------------------------------------------------------------------------------

#if defined(__CUDACC__)
using BFloat16 = __nv_bfloat16;
using Half = __half;
__device__ inline float widen(BFloat16 x) { return __bfloat162float(x); }
__device__ inline float widen(Half x) { return __half2float(x); }
__device__ inline void narrow(float x, BFloat16* to) { *to = __float2bfloat16_rn(x); }
__device__ inline void narrow(float x, Half* to) { *to = __float2half_rn(x); }
#else
struct BFloat16 {
  uint16_t bits;
};
struct Half {
  _Float16 value;
};
inline float widen(BFloat16 x) {
  const uint32_t bits = uint32_t(x.bits) << 16;
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}
inline float widen(Half x) { return float(x.value); }
inline void narrow(float x, BFloat16* to) {
  uint32_t bits;
  std::memcpy(&bits, &x, 4);
  to->bits = x != x ? uint16_t(0x7fc0) : uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}
inline void narrow(float x, Half* to) { to->value = _Float16(x); }
#endif
__device__ inline float widen(float x) { return x; }
__device__ inline double widen(double x) { return x; }
__device__ inline void narrow(float x, float* to) { *to = x; }
__device__ inline void narrow(double x, double* to) { *to = x; }

// What values of a type are summed up in.
template <class T>
using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;

// ---- memory ---------------------------------------------------------------------------------------------

constexpr int kVectorBytes = 16;
template <class T>
constexpr int kVector = kVectorBytes / int(sizeof(T));

// 16 bytes from an address that is a multiple of 16.
template <class T>
__device__ inline void load16(const T* from, Sum<T> (&to)[kVector<T>]) {
  alignas(16) T values[kVector<T>];
  const uint4 raw = *reinterpret_cast<const uint4*>(from);
  memcpy(values, &raw, sizeof raw);
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) to[j] = widen(values[j]);
}
template <class T>
__device__ inline uint4 narrowed(const Sum<T> (&from)[kVector<T>]) {
  alignas(16) T values[kVector<T>];
#pragma unroll
  for (int j = 0; j < kVector<T>; ++j) narrow(from[j], &values[j]);
  uint4 raw;
  memcpy(&raw, values, sizeof raw);
  return raw;
}
template <class T>
__device__ inline void store16(T* to, const Sum<T> (&from)[kVector<T>]) {
  *reinterpret_cast<uint4*>(to) = narrowed<T>(from);
}
// To global memory. Where another branch writes the same values one by one, the compiler makes that of an assignment,
// too; not of an instruction.
template <class T>
__device__ inline void store16_global(T* to, const Sum<T> (&from)[kVector<T>]) {
#if defined(__CUDACC__)
  const uint4 raw = narrowed<T>(from);
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(to)), "r"(raw.x),
               "r"(raw.y), "r"(raw.z), "r"(raw.w)
               : "memory");
#else
  store16(to, from);
#endif
}

template <class V>
__device__ inline V* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char shared_bytes[];
  return reinterpret_cast<V*>(shared_bytes);
#else
  return reinterpret_cast<V*>(emulate::Machine::get().shared());
#endif
}

// ---- threads --------------------------------------------------------------------------------------------

constexpr int kWarp = 32;

// The sum of a value over groups of WIDTH lanes, in each of them.
template <int WIDTH, class S>
__device__ inline S sum_of_lanes(S value) {
#pragma unroll
  for (int mask = WIDTH / 2; mask > 0; mask /= 2) value += __shfl_xor_sync(0xffffffffu, value, mask);
  return value;
}

// The sum over a block of THREADS, in each thread. `scratch` is shared, of THREADS / 32 values; behind the call
// nobody reads it any more.
template <int THREADS, class S>
__device__ inline S sum_of_block(S value, S* scratch) {
  constexpr int kWarps = THREADS / kWarp;
  value = sum_of_lanes<kWarp>(value);
  if (threadIdx.x % kWarp == 0) scratch[threadIdx.x / kWarp] = value;
  __syncthreads();
  S total = 0;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += scratch[w];
  __syncthreads();
  return total;
}

// All blocks of a cooperative launch wait for each other, and see what the others wrote.
__device__ inline void grid_barrier() {
#if defined(__CUDACC__)
  cooperative_groups::this_grid().sync();
#else
  emulate::Machine::get().wait(emulate::Machine::get().whole());
#endif
}

// A counter, 0 at first, by which blocks of a cooperative launch wait for each other. Who waits sees what those
// wrote who signalled; what other threads of a block wrote, or are to see, is on the other side of a __syncthreads.
__device__ inline void signal(unsigned* counter) {
#if defined(__CUDACC__)
  asm volatile("red.release.gpu.global.add.u32 [%0], 1;" ::"l"(__cvta_generic_to_global(counter)) : "memory");
#else
  emulate::Machine::get().signal(counter);
#endif
}
__device__ inline void wait_for(unsigned* counter, unsigned count) {
#if defined(__CUDACC__)
  unsigned seen;
  do
    asm volatile("ld.acquire.gpu.global.u32 %0, [%1];"
                 : "=r"(seen)
                 : "l"(__cvta_generic_to_global(counter))
                 : "memory");
  while (seen < count);
#else
  emulate::Machine::get().wait_for(counter, count);
#endif
}

// ---- arithmetic -----------------------------------------------------------------------------------------

__device__ inline float absolute(float x) { return fabsf(x); }
__device__ inline double absolute(double x) { return fabs(x); }
__device__ inline float root(float x) { return sqrtf(x); }
__device__ inline double root(double x) { return sqrt(x); }
__device__ inline double exponential(double x) { return exp(x); }
__device__ inline float exponential(float x) {
#if defined(__CUDACC__)
  return __expf(x);
#else
  return expf(x);
#endif
}

// ---- launches -------------------------------------------------------------------------------------------

inline int64_t ceil_div(int64_t count, int64_t size) { return (count + size - 1) / size; }

#if defined(__CUDACC__)

inline void check(cudaError_t status, const char* what) {
  if (status != cudaSuccess)
    throw std::runtime_error(std::string("gankern: ") + what + ": " + cudaGetErrorString(status));
}

template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared, void* stream,
            const Parameters& parameters) {
  if (blocks == 0) return;
  kernel<<<dim3(unsigned(blocks)), dim3(unsigned(threads)), shared, cudaStream_t(stream)>>>(parameters);
  check(cudaGetLastError(), "a kernel was not launched");
}

// What the current device has, asked once for each device.
template <class Ask>
int64_t of_device(std::atomic<int64_t> (&known)[64], const Ask& ask) {
  int device;
  check(cudaGetDevice(&device), "the current device");
  if (device >= 64) return ask(device);
  int64_t value = known[device].load(std::memory_order_relaxed);
  if (value == 0) known[device].store(value = ask(device), std::memory_order_relaxed);
  return value;
}
// How many blocks of a kernel it holds at once, of a multiprocessor no more than most_each.
template <auto kKernel>
int64_t resident_blocks(int threads, size_t shared, int most_each) {
  static std::atomic<int64_t> known[64];
  return of_device(known, [&](int device) {
    int multiprocessors, each;
    check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device),
          "multiprocessors");
    check(cudaOccupancyMaxActiveBlocksPerMultiprocessor(&each, kKernel, threads, shared),
          "a kernel's occupancy");
    return int64_t(multiprocessors) * (each < most_each ? each : most_each);
  });
}
// The bytes of shared memory that one of a kernel's blocks may have, which the kernel may then be launched with.
template <auto kKernel>
int64_t most_shared() {
  static std::atomic<int64_t> known[64];
  return of_device(known, [](int device) {
    int bytes;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
          "a block's shared memory");
    check(cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes),
          "a kernel's shared memory");
    return int64_t(bytes);
  });
}
inline int64_t l2_bytes() {
  static std::atomic<int64_t> known[64];
  return of_device(known, [](int device) {
    int bytes;
    check(cudaDeviceGetAttribute(&bytes, cudaDevAttrL2CacheSize, device), "the size of the L2 cache");
    return int64_t(bytes);
  });
}

// All blocks at once, at most resident_blocks of them; they may use grid_barrier().
template <class Parameters>
void launch_cooperative(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared, void* stream,
                        const Parameters& parameters) {
  void* arguments[] = {const_cast<Parameters*>(&parameters)};
  check(cudaLaunchCooperativeKernel(reinterpret_cast<const void*>(kernel), dim3(unsigned(blocks)),
                                    dim3(unsigned(threads)), arguments, shared, cudaStream_t(stream)),
        "a kernel was not launched");
}

#else

template <class Parameters>
void launch(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared, void*,
            const Parameters& parameters) {
  if (blocks == 0) return;
  emulate::Machine::get().launch({unsigned(blocks)}, unsigned(threads), shared, false,
                                 [&] { kernel(parameters); });
}
template <auto kKernel>
int64_t resident_blocks(int, size_t, int) {
  return 3;
}
template <auto kKernel>
int64_t most_shared() {
  return emulate::kShared;
}
inline int64_t l2_bytes() { return 32 << 10; }
template <class Parameters>
void launch_cooperative(void (*kernel)(Parameters), int64_t blocks, int threads, size_t shared, void*,
                        const Parameters& parameters) {
  emulate::Machine::get().launch({unsigned(blocks)}, unsigned(threads), shared, true,
                                 [&] { kernel(parameters); });
}

#endif

// f of a null pointer of the type that stands at a place of the tables in csrc/cpu/vec.h.
template <class F>
void by_dtype(int dtype, const F& f) {
  switch (dtype) {
    case 0: return f(static_cast<double*>(nullptr));
    case 1: return f(static_cast<float*>(nullptr));
    case 2: return f(static_cast<BFloat16*>(nullptr));
    default: return f(static_cast<Half*>(nullptr));
  }
}

}  // namespace gankern::cuda
