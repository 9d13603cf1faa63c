// Stands for a GPU on a machine without one: CUDA's runtime and driver as far as torch and Triton call them, and of cuBLAS
// and cuDNN what matrix products, convolutions and batch norm call. It is loaded before all else (LD_PRELOAD), so that
// its functions are found before those of the libraries that torch has brought along, and as libcuda.so.1, which is
// asked for by name: tests/standin/device.py.
//
// The device is one H200. Its memory is the CPU's, zero at first, and copied and set for real. Streams are done at once.
// Kernels are counted and not run, and so are the computations of cuBLAS and cuDNN: what they would have written stays as
// it was, so values mean nothing, and are zero for the most part. Captures hold copies, sets and kernels, which a replay
// does again, and what the driver refuses meanwhile is refused: memory, modules, waiting, the legacy stream, and ends with
// streams that were not joined.
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <cudnn_graph.h>
#include <dlfcn.h>
#include <sys/mman.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <cstring>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <shared_mutex>
#include <string>
#include <thread>
#include <unordered_map>
#include <utility>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace {

constexpr int kMultiprocessors = 132, kThreads = 2048, kSharedMemory = 227 << 10, kL2 = 50 << 20;
constexpr int kVersion = CUDART_VERSION;  // of the runtime and of the driver
constexpr size_t kMemory = size_t(141) << 30;

std::mutex mutex;  // of all that is not a kernel

int anything;  // what handles point to that nobody looks into
// Of a thread that has had something to do with the device.
thread_local CUcontext context = nullptr;
void has_context() { context = reinterpret_cast<CUcontext>(&anything); }

thread_local cudaError_t last_error = cudaSuccess;

cudaError_t fails(cudaError_t error) {
  if (error != cudaSuccess) last_error = error;
  return error;
}
// The driver's errors have the runtime's numbers, of a launch it says less, and the runtime does not know of them.
CUresult of_driver(cudaError_t error) {
  last_error = cudaSuccess;
  return error == cudaErrorInvalidConfiguration ? CUDA_ERROR_INVALID_VALUE : CUresult(error);
}

// ---- kernels -------------------------------------------------------------------------------------------------

std::atomic<uint64_t> launches{0}, library_calls{0}, graph_launches{0}, copies{0};

struct Kernel {  // or what a library launches in a call of it
  std::string name;
  bool of_library = false;
  std::atomic<uint64_t> launches{0};

  void count() {
    ++(of_library ? library_calls : ::launches);
    ++launches;
  }
};

std::shared_mutex kernels_mutex;
struct Kernels {
  std::map<std::string, std::unique_ptr<Kernel>> by_name;
  std::unordered_map<const void*, Kernel*> by_host_function;

  Kernel* named(const std::string& name) {
    const std::unique_lock lock(kernels_mutex);
    auto& kernel = by_name[name];
    if (!kernel) (kernel = std::make_unique<Kernel>())->name = name;
    return kernel.get();
  }
};
Kernels& kernels() {  // other libraries' constructors put theirs there
  static auto* const all = new Kernels;
  return *all;
}

Kernel* of_host(const void* function) {
  const std::shared_lock lock(kernels_mutex);
  const auto found = kernels().by_host_function.find(function);
  return found == kernels().by_host_function.end() ? nullptr : found->second;
}

// ---- streams, events, captures, graphs -----------------------------------------------------------------------

struct Node {
  Kernel* kernel = nullptr;
  std::function<void()> effect;  // of a copy, or a call of the host

  void run() const { kernel ? kernel->count() : effect(); }
};
struct Graph {
  std::vector<Node> nodes;
};

struct Stream;
using Clock = std::map<const Stream*, uint64_t>;  // how much of each stream of a capture comes before

struct Capture {
  uint64_t id;
  cudaStreamCaptureMode mode;
  std::thread::id thread;
  Stream* origin;
  std::map<Stream*, Clock> streams;
  Graph graph;
  bool invalid = false;
};
std::vector<Capture*> captures;
std::atomic<int> capturing{0};
thread_local cudaStreamCaptureMode thread_mode = cudaStreamCaptureModeGlobal;

struct Stream {
  bool blocking = true;  // waits for the legacy stream
  int priority = 0;
  Capture* capture = nullptr;
};
struct Event {
  int64_t nanoseconds = 0;
  Capture* capture = nullptr;
  Clock clock;
};
Stream legacy_stream;

Stream* stream_of(cudaStream_t stream) {
  return reinterpret_cast<uintptr_t>(stream) <= 2 ? &legacy_stream : reinterpret_cast<Stream*>(stream);
}
Event* event_of(cudaEvent_t event) { return reinterpret_cast<Event*>(event); }

int64_t now() {
  return std::chrono::duration_cast<std::chrono::nanoseconds>(
             std::chrono::steady_clock::now().time_since_epoch())
      .count();
}

// What may not happen while a capture is under way, by this thread's mode and the captures'.
cudaError_t unsafe() {
  if (!capturing || thread_mode == cudaStreamCaptureModeRelaxed) return cudaSuccess;
  const std::lock_guard lock(mutex);
  bool refused = false;
  for (Capture* capture : captures) {
    const bool own = capture->thread == std::this_thread::get_id();
    const bool of_all = capture->mode == cudaStreamCaptureModeGlobal && thread_mode == capture->mode;
    if (capture->mode == cudaStreamCaptureModeRelaxed || !(own || of_all)) continue;
    refused = capture->invalid = true;
  }
  return refused ? fails(cudaErrorStreamCaptureUnsupported) : cudaSuccess;
}

// Waiting for what is captured.
cudaError_t waits(Capture* capture) {
  if (!capture) return cudaSuccess;
  const std::lock_guard lock(mutex);
  capture->invalid = true;
  return fails(cudaErrorStreamCaptureUnsupported);
}

// A stream's next piece of work: at once, or into the graph that it is captured into.
template <class Run, class Make>
cudaError_t submit(cudaStream_t handle, const Run& run, const Make& node) {
  if (capturing) {
    Stream* const stream = stream_of(handle);
    const std::lock_guard lock(mutex);
    if (stream == &legacy_stream)
      for (Capture* capture : captures)
        for (auto& [other, clock] : capture->streams)
          if (other->blocking) return capture->invalid = true, fails(cudaErrorStreamCaptureImplicit);
    if (Capture* const capture = stream->capture) {
      if (capture->invalid) return fails(cudaErrorStreamCaptureInvalidated);
      capture->graph.nodes.push_back(node());
      ++capture->streams[stream][stream];
      return cudaSuccess;
    }
  }
  run();
  return cudaSuccess;
}

cudaError_t launch(Kernel* kernel, cudaStream_t stream, dim3 grid = {1, 1, 1}, dim3 block = {1, 1, 1},
                   size_t shared = 0) {
  has_context();
  if (!kernel) return fails(cudaErrorInvalidDeviceFunction);
  const uint64_t threads = uint64_t(block.x) * block.y * block.z,
                 programs = uint64_t(grid.x) * grid.y * grid.z;
  const bool too_large = grid.x > INT32_MAX || grid.y > 65535 || grid.z > 65535 || threads > 1024;
  if (too_large || threads == 0 || programs == 0) return fails(cudaErrorInvalidConfiguration);
  if (shared > kSharedMemory) return fails(cudaErrorInvalidValue);
  return submit(stream, [&] { kernel->count(); }, [&] { return Node{kernel, {}}; });
}

template <class Effect>
cudaError_t calls(cudaStream_t stream, const Effect& effect) {
  return submit(stream, effect, [&] { return Node{nullptr, effect}; });
}

std::atomic<bool> moving{true};  // whether bytes are copied and set

template <class Effect>
cudaError_t copies_by(cudaStream_t stream, const Effect& effect) {
  return calls(stream, [=] {
    ++copies;
    if (moving) effect();
  });
}

cudaError_t begin_capture(Stream* stream, cudaStreamCaptureMode mode) {
  static uint64_t id = 0;
  const std::lock_guard lock(mutex);
  if (stream == &legacy_stream) return fails(cudaErrorStreamCaptureUnsupported);
  if (stream->capture) return fails(cudaErrorIllegalState);
  auto* const capture = new Capture{++id, mode, std::this_thread::get_id(), stream, {{stream, {}}}, {}};
  captures.push_back(stream->capture = capture);
  ++capturing;
  return cudaSuccess;
}

cudaError_t end_capture(Stream* stream, cudaGraph_t* graph) {
  const std::lock_guard lock(mutex);
  Capture* const capture = stream->capture;
  *graph = nullptr;
  if (!capture) return fails(cudaErrorIllegalState);
  if (capture->origin != stream) return fails(cudaErrorStreamCaptureUnmatched);
  const bool elsewhere =
      capture->mode != cudaStreamCaptureModeRelaxed && capture->thread != std::this_thread::get_id();
  if (elsewhere) return fails(cudaErrorStreamCaptureWrongThread);
  cudaError_t error = capture->invalid ? cudaErrorStreamCaptureInvalidated : cudaSuccess;
  Clock& seen = capture->streams[stream];
  for (auto& [other, clock] : capture->streams) {
    if (seen[other] < clock[other] && !error) error = cudaErrorStreamCaptureUnjoined;
    other->capture = nullptr;
  }
  if (!error) *graph = reinterpret_cast<cudaGraph_t>(new Graph(std::move(capture->graph)));
  captures.erase(std::find(captures.begin(), captures.end(), capture));
  --capturing;  // a few words stay, for events that were recorded in it
  capture->streams.clear(), capture->graph.nodes.clear();
  return fails(error);
}

cudaError_t record(Event* event, cudaStream_t handle) {
  has_context();
  event->nanoseconds = now();
  event->capture = nullptr;
  if (!capturing) return cudaSuccess;
  Stream* const stream = stream_of(handle);
  const std::lock_guard lock(mutex);
  if ((event->capture = stream->capture)) event->clock = event->capture->streams[stream];
  return cudaSuccess;
}

cudaError_t wait_for(Stream* stream, Event* event) {
  if (!capturing) return cudaSuccess;
  const std::lock_guard lock(mutex);
  Capture* const capture = event->capture;
  if (!capture || std::find(captures.begin(), captures.end(), capture) == captures.end())
    return stream->capture ? (stream->capture->invalid = true, fails(cudaErrorStreamCaptureIsolation))
                           : cudaSuccess;
  if (stream == &legacy_stream) return capture->invalid = true, fails(cudaErrorStreamCaptureImplicit);
  if (stream->capture && stream->capture != capture) return fails(cudaErrorStreamCaptureMerge);
  stream->capture = capture;
  Clock& clock = capture->streams[stream];
  for (const auto& [other, count] : event->clock) clock[other] = std::max(clock[other], count);
  return cudaSuccess;
}

// ---- memory --------------------------------------------------------------------------------------------------

struct Block {
  size_t bytes;
  bool on_device;
};
std::map<uintptr_t, Block> blocks;  // by where they begin
size_t allocated = 0;               // on the device

cudaError_t allocate(void** to, size_t bytes, bool on_device) {
  has_context();
  *to = nullptr;
  if (const cudaError_t error = unsafe()) return error;
  if (bytes == 0) return cudaSuccess;
  const std::lock_guard lock(mutex);
  if (on_device && allocated + bytes > kMemory) return fails(cudaErrorMemoryAllocation);
  void* const made =
      mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (made == MAP_FAILED) return fails(cudaErrorMemoryAllocation);
  blocks[reinterpret_cast<uintptr_t>(*to = made)] = {bytes, on_device};
  if (on_device) allocated += bytes;
  return cudaSuccess;
}

cudaError_t release(void* pointer) {
  if (!pointer) return cudaSuccess;
  if (const cudaError_t error = unsafe()) return error;
  const std::lock_guard lock(mutex);
  const auto found = blocks.find(reinterpret_cast<uintptr_t>(pointer));
  if (found == blocks.end()) return fails(cudaErrorInvalidValue);
  munmap(pointer, found->second.bytes);
  if (found->second.on_device) allocated -= found->second.bytes;
  blocks.erase(found);
  return cudaSuccess;
}

const Block* block_of(const void* pointer) {
  const auto at = reinterpret_cast<uintptr_t>(pointer);
  auto next = blocks.upper_bound(at);
  if (next == blocks.begin()) return nullptr;
  --next;
  return at - next->first < next->second.bytes ? &next->second : nullptr;
}

// ---- the device ----------------------------------------------------------------------------------------------

int attribute(int which) {
  switch (which) {
    case cudaDevAttrMaxThreadsPerBlock: return 1024;
    case cudaDevAttrMaxBlockDimX: return 1024;
    case cudaDevAttrMaxBlockDimY: return 1024;
    case cudaDevAttrMaxBlockDimZ: return 64;
    case cudaDevAttrMaxGridDimX: return INT32_MAX;
    case cudaDevAttrMaxGridDimY: return 65535;
    case cudaDevAttrMaxGridDimZ: return 65535;
    case cudaDevAttrMaxSharedMemoryPerBlock: return 48 << 10;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: return kSharedMemory;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: return kSharedMemory + (1 << 10);
    case cudaDevAttrReservedSharedMemoryPerBlock: return 1 << 10;
    case cudaDevAttrTotalConstantMemory: return 64 << 10;
    case cudaDevAttrWarpSize: return 32;
    case cudaDevAttrMaxRegistersPerBlock: return 65536;
    case cudaDevAttrMaxRegistersPerMultiprocessor: return 65536;
    case cudaDevAttrMaxBlocksPerMultiprocessor: return 32;
    case cudaDevAttrMaxThreadsPerMultiProcessor: return kThreads;
    case cudaDevAttrMultiProcessorCount: return kMultiprocessors;
    case cudaDevAttrClockRate: return 1980000;
    case cudaDevAttrMemoryClockRate: return 3201000;
    case cudaDevAttrGlobalMemoryBusWidth: return 6144;
    case cudaDevAttrL2CacheSize: return kL2;
    case cudaDevAttrComputeCapabilityMajor: return 9;
    case cudaDevAttrTextureAlignment: return 512;
    case cudaDevAttrMaxPitch: return INT32_MAX;
    case cudaDevAttrAsyncEngineCount: return 3;
    case cudaDevAttrConcurrentKernels:
    case cudaDevAttrUnifiedAddressing:
    case cudaDevAttrStreamPrioritiesSupported:
    case cudaDevAttrManagedMemory:
    case cudaDevAttrCooperativeLaunch:
    case cudaDevAttrClusterLaunch:
    case cudaDevAttrMemoryPoolsSupported:
    case cudaDevAttrCanMapHostMemory: return 1;
    default: return 0;
  }
}

int blocks_per_multiprocessor(int threads, size_t shared) {
  const int by_threads = kThreads / std::max(threads, 1);
  const int by_memory = shared ? int((kSharedMemory + 1024) / (shared + 1024)) : 32;
  return std::min({by_threads, by_memory, 32});
}

int not_supported() { return CUDA_ERROR_NOT_SUPPORTED; }

void* function_named(const char* name) {
  for (const char* version : {"_v4", "_v3", "_v2", ""})
    if (void* const found = dlsym(RTLD_DEFAULT, (std::string(name) + version).c_str())) return found;
  return reinterpret_cast<void*>(&not_supported);  // torch looks up more than it calls
}

template <class T, class Handle>
cudaError_t deletes(Handle handle) {
  delete reinterpret_cast<T*>(handle);
  return cudaSuccess;
}

}  // namespace

// ---- for Python ------------------------------------------------------------------------------------------------

// How many kernels were launched, those of graphs among them; what cuBLAS and cuDNN were asked to compute; how much was
// copied or set; and how many graphs were launched.
EXPORTED void standin_counts(uint64_t counts[4]) {
  counts[0] = launches, counts[1] = library_calls, counts[2] = copies, counts[3] = graph_launches;
}
// Whether bytes are copied and set: on a device that takes the host no time.
EXPORTED void standin_moves(int moves) { moving = moves != 0; }
// A line for each kernel that was launched: how often, and its name. Into so many bytes; how many it takes.
EXPORTED size_t standin_kernels(char* text, size_t bytes) {
  const std::shared_lock lock(kernels_mutex);
  std::string all;
  for (const auto& [name, kernel] : kernels().by_name)
    if (kernel->launches) all += std::to_string(kernel->launches) + " " + name + "\n";
  if (all.size() < bytes) std::memcpy(text, all.c_str(), all.size() + 1);
  return all.size() + 1;
}

// ---- CUDA's runtime --------------------------------------------------------------------------------------------

// What nvcc's host code calls.
EXPORTED void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
EXPORTED void __cudaRegisterFatBinaryEnd(void**) {}
EXPORTED void __cudaUnregisterFatBinary(void**) {}
EXPORTED char __cudaInitModule(void**) { return 1; }
EXPORTED void __cudaRegisterVar(void**, char*, char*, const char*, int, size_t, int, int) {}
EXPORTED void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, uint3*, uint3*,
                                     dim3*, dim3*, int*) {
  Kernel* const kernel = kernels().named(name);
  const std::unique_lock lock(kernels_mutex);
  kernels().by_host_function[host] = kernel;
}
namespace {
struct Configuration {
  dim3 grid, block;
  size_t shared;
  void* stream;
};
thread_local std::vector<Configuration> configurations;
}  // namespace
EXPORTED unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
EXPORTED cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  if (configurations.empty()) return fails(cudaErrorInvalidConfiguration);
  const Configuration& top = configurations.back();
  *grid = top.grid, *block = top.block, *shared = top.shared, *static_cast<void**>(stream) = top.stream;
  configurations.pop_back();
  return cudaSuccess;
}
EXPORTED cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* host) {
  *kernel = reinterpret_cast<cudaKernel_t>(of_host(host));
  return *kernel ? cudaSuccess : fails(cudaErrorInvalidDeviceFunction);
}
EXPORTED cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3, dim3, void**, size_t,
                                        cudaStream_t stream) {
  return launch(reinterpret_cast<Kernel*>(kernel), stream);
}
EXPORTED cudaError_t cudaLaunchKernel(const void* host, dim3 grid, dim3 block, void**, size_t shared,
                                      cudaStream_t stream) {
  return launch(of_host(host), stream, grid, block, shared);
}
EXPORTED cudaError_t cudaLaunchCooperativeKernel(const void* host, dim3 grid, dim3 block, void**,
                                                 size_t shared, cudaStream_t stream) {
  return launch(of_host(host), stream, grid, block, shared);
}
EXPORTED cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t* config, const void* host, void**) {
  return launch(of_host(host), config->stream, config->gridDim, config->blockDim, config->dynamicSmemBytes);
}
EXPORTED cudaError_t cudaFuncGetAttributes(cudaFuncAttributes* attributes, const void*) {
  *attributes = {};
  attributes->maxThreadsPerBlock = 1024;
  attributes->numRegs = 32;
  attributes->ptxVersion = attributes->binaryVersion = 90;
  attributes->maxDynamicSharedSizeBytes = 48 << 10;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaFuncSetAttribute(const void*, cudaFuncAttribute, int) { return cudaSuccess; }
EXPORTED cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* count, const void*, int threads,
                                                                   size_t shared) {
  *count = blocks_per_multiprocessor(threads, shared);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* count, const void*,
                                                                            int threads, size_t shared,
                                                                            unsigned) {
  *count = blocks_per_multiprocessor(threads, shared);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGetSymbolAddress(void**, const void*) { return fails(cudaErrorInvalidSymbol); }
EXPORTED cudaError_t cudaMemcpyToSymbol(const void*, const void*, size_t, size_t, cudaMemcpyKind) {
  return cudaSuccess;  // only kernels read it
}

// Errors and versions.
EXPORTED cudaError_t cudaGetLastError() { return std::exchange(last_error, cudaSuccess); }
EXPORTED cudaError_t cudaPeekAtLastError() { return last_error; }
EXPORTED const char* cudaGetErrorName(cudaError_t) { return "an error"; }
EXPORTED const char* cudaGetErrorString(cudaError_t error) {
  switch (error) {
    case cudaSuccess: return "no error";
    case cudaErrorInvalidValue: return "invalid argument";
    case cudaErrorMemoryAllocation: return "out of memory";
    case cudaErrorInvalidConfiguration: return "invalid configuration argument";
    case cudaErrorInvalidDeviceFunction: return "invalid device function";
    case cudaErrorStreamCaptureUnsupported: return "operation not permitted when stream is capturing";
    case cudaErrorStreamCaptureInvalidated: return "operation failed due to a previous error during capture";
    case cudaErrorStreamCaptureMerge:
      return "operation would result in a merge of separate capture sequences";
    case cudaErrorStreamCaptureUnmatched: return "capture was not ended in the same stream as it began";
    case cudaErrorStreamCaptureUnjoined: return "capturing stream has unjoined work";
    case cudaErrorStreamCaptureIsolation: return "dependency created on uncaptured work in another stream";
    case cudaErrorStreamCaptureImplicit:
      return "operation would make the legacy stream depend on a capturing blocking stream";
    case cudaErrorStreamCaptureWrongThread:
      return "attempt to terminate a thread-local capture sequence from another thread";
    default: return "an error that the stand-in has no words for";
  }
}
EXPORTED cudaError_t cudaDriverGetVersion(int* version) { return *version = kVersion, cudaSuccess; }
EXPORTED cudaError_t cudaRuntimeGetVersion(int* version) { return *version = kVersion, cudaSuccess; }
EXPORTED cudaError_t cudaGetDriverEntryPointByVersion(const char* symbol, void** function, unsigned,
                                                      unsigned long long,
                                                      cudaDriverEntryPointQueryResult* result) {
  *function = function_named(symbol);
  if (result) *result = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

// The device.
EXPORTED cudaError_t cudaGetDeviceCount(int* count) { return *count = 1, cudaSuccess; }
EXPORTED cudaError_t cudaGetDevice(int* device) { return *device = 0, cudaSuccess; }
EXPORTED cudaError_t cudaSetDevice(int device) {
  if (device != 0) return fails(cudaErrorInvalidDevice);
  has_context();
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGetDeviceProperties(cudaDeviceProp* of, int) {
  *of = {};
  std::strcpy(of->name, "stand-in for an H200");  // a name of its own: figures from here are no H200's
  of->uuid.bytes[0] = 1;
  of->totalGlobalMem = kMemory;
  of->sharedMemPerBlock = attribute(cudaDevAttrMaxSharedMemoryPerBlock);
  of->sharedMemPerBlockOptin = kSharedMemory;
  of->sharedMemPerMultiprocessor = attribute(cudaDevAttrMaxSharedMemoryPerMultiprocessor);
  of->reservedSharedMemPerBlock = 1024;
  of->regsPerBlock = of->regsPerMultiprocessor = 65536;
  of->warpSize = 32;
  of->memPitch = INT32_MAX;
  of->maxThreadsPerBlock = of->maxThreadsDim[0] = of->maxThreadsDim[1] = 1024;
  of->maxThreadsDim[2] = 64;
  of->maxGridSize[0] = INT32_MAX;
  of->maxGridSize[1] = of->maxGridSize[2] = 65535;
  of->totalConstMem = 64 << 10;
  of->major = 9;
  of->textureAlignment = 512;
  of->multiProcessorCount = kMultiprocessors;
  of->maxThreadsPerMultiProcessor = kThreads;
  of->maxBlocksPerMultiProcessor = 32;
  of->memoryBusWidth = attribute(cudaDevAttrGlobalMemoryBusWidth);
  of->l2CacheSize = kL2;
  of->canMapHostMemory = of->concurrentKernels = of->unifiedAddressing = of->managedMemory = 1;
  of->streamPrioritiesSupported = of->cooperativeLaunch = of->memoryPoolsSupported = of->clusterLaunch = 1;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr which, int) {
  return *value = attribute(which), cudaSuccess;
}
EXPORTED cudaError_t cudaDeviceGetPCIBusId(char* id, int bytes, int) {
  std::strncpy(id, "0000:00:00.0", size_t(bytes));
  return cudaSuccess;
}
EXPORTED cudaError_t cudaDeviceGetStreamPriorityRange(int* least, int* greatest) {
  *least = 0, *greatest = -5;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaDeviceCanAccessPeer(int* can, int, int) { return *can = 0, cudaSuccess; }
EXPORTED cudaError_t cudaDeviceEnablePeerAccess(int, unsigned) { return cudaSuccess; }
EXPORTED cudaError_t cudaDeviceSynchronize() { return unsafe(); }
EXPORTED cudaError_t cudaProfilerStart() { return cudaSuccess; }
EXPORTED cudaError_t cudaProfilerStop() { return cudaSuccess; }

// Memory.
EXPORTED cudaError_t cudaMalloc(void** to, size_t bytes) { return allocate(to, bytes, true); }
EXPORTED cudaError_t cudaFree(void* pointer) { return release(pointer); }
EXPORTED cudaError_t cudaHostAlloc(void** to, size_t bytes, unsigned) { return allocate(to, bytes, false); }
EXPORTED cudaError_t cudaFreeHost(void* pointer) { return release(pointer); }
EXPORTED cudaError_t cudaMallocAsync(void** to, size_t bytes, cudaStream_t) {
  const auto mode = std::exchange(thread_mode, cudaStreamCaptureModeRelaxed);  // which a capture takes
  const cudaError_t error = allocate(to, bytes, true);
  thread_mode = mode;
  return error;
}
EXPORTED cudaError_t cudaFreeAsync(void* pointer, cudaStream_t stream) {
  return stream_of(stream)->capture ? cudaSuccess : release(pointer);
}
EXPORTED cudaError_t cudaHostRegister(void* pointer, size_t bytes, unsigned) {
  if (const cudaError_t error = unsafe()) return error;
  const std::lock_guard lock(mutex);
  blocks[reinterpret_cast<uintptr_t>(pointer)] = {bytes, false};
  return cudaSuccess;
}
EXPORTED cudaError_t cudaHostUnregister(void* pointer) {
  const std::lock_guard lock(mutex);
  return blocks.erase(reinterpret_cast<uintptr_t>(pointer)) ? cudaSuccess : fails(cudaErrorInvalidValue);
}
EXPORTED cudaError_t cudaMemGetInfo(size_t* unused, size_t* total) {
  const std::lock_guard lock(mutex);
  *unused = kMemory - allocated, *total = kMemory;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaPointerGetAttributes(cudaPointerAttributes* attributes, const void* pointer) {
  const std::lock_guard lock(mutex);
  const Block* const block = block_of(pointer);
  *attributes = {};
  attributes->type = !block             ? cudaMemoryTypeUnregistered
                     : block->on_device ? cudaMemoryTypeDevice
                                        : cudaMemoryTypeHost;
  attributes->device = block ? 0 : -2;
  attributes->devicePointer = block ? const_cast<void*>(pointer) : nullptr;
  attributes->hostPointer = block && block->on_device ? nullptr : const_cast<void*>(pointer);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaMemcpyAsync(void* to, const void* from, size_t bytes, cudaMemcpyKind,
                                     cudaStream_t stream) {
  return copies_by(stream, [=] { std::memmove(to, from, bytes); });
}
EXPORTED cudaError_t cudaMemcpy(void* to, const void* from, size_t bytes, cudaMemcpyKind kind) {
  if (const cudaError_t error = unsafe()) return error;
  return cudaMemcpyAsync(to, from, bytes, kind, nullptr);
}
EXPORTED cudaError_t cudaMemcpyPeerAsync(void* to, int, const void* from, int, size_t bytes,
                                         cudaStream_t stream) {
  return cudaMemcpyAsync(to, from, bytes, cudaMemcpyDefault, stream);
}
EXPORTED cudaError_t cudaMemcpy2DAsync(void* to, size_t to_pitch, const void* from, size_t from_pitch,
                                       size_t width, size_t height, cudaMemcpyKind, cudaStream_t stream) {
  return copies_by(stream, [=] {
    for (size_t y = 0; y < height; ++y)
      std::memmove(static_cast<char*>(to) + y * to_pitch, static_cast<const char*>(from) + y * from_pitch,
                   width);
  });
}
EXPORTED cudaError_t cudaMemsetAsync(void* at, int value, size_t bytes, cudaStream_t stream) {
  return copies_by(stream, [=] { std::memset(at, value, bytes); });
}
EXPORTED cudaError_t cudaMemset(void* at, int value, size_t bytes) {
  return cudaMemsetAsync(at, value, bytes, nullptr);
}
EXPORTED cudaError_t cudaDeviceGetDefaultMemPool(cudaMemPool_t* pool, int) {
  return *pool = reinterpret_cast<cudaMemPool_t>(&anything), cudaSuccess;
}
EXPORTED cudaError_t cudaMemPoolGetAttribute(cudaMemPool_t, cudaMemPoolAttr, void* value) {
  return std::memset(value, 0, sizeof(uint64_t)), cudaSuccess;
}
EXPORTED cudaError_t cudaMemPoolSetAttribute(cudaMemPool_t, cudaMemPoolAttr, void*) { return cudaSuccess; }
EXPORTED cudaError_t cudaMemPoolSetAccess(cudaMemPool_t, const cudaMemAccessDesc*, size_t) {
  return cudaSuccess;
}
EXPORTED cudaError_t cudaMemPoolTrimTo(cudaMemPool_t, size_t) { return cudaSuccess; }

// Streams and events.
EXPORTED cudaError_t cudaStreamCreateWithPriority(cudaStream_t* stream, unsigned flags, int priority) {
  *stream = reinterpret_cast<cudaStream_t>(new Stream{!(flags & cudaStreamNonBlocking), priority});
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamCreate(cudaStream_t* stream) {
  return cudaStreamCreateWithPriority(stream, 0, 0);
}
EXPORTED cudaError_t cudaStreamDestroy(cudaStream_t stream) { return deletes<Stream>(stream); }
EXPORTED cudaError_t cudaStreamGetPriority(cudaStream_t stream, int* priority) {
  return *priority = stream_of(stream)->priority, cudaSuccess;
}
EXPORTED cudaError_t cudaStreamQuery(cudaStream_t stream) { return waits(stream_of(stream)->capture); }
EXPORTED cudaError_t cudaStreamSynchronize(cudaStream_t stream) {
  if (stream_of(stream) == &legacy_stream) return unsafe();
  return waits(stream_of(stream)->capture);
}
EXPORTED cudaError_t cudaStreamWaitEvent(cudaStream_t stream, cudaEvent_t event, unsigned) {
  return wait_for(stream_of(stream), event_of(event));
}
EXPORTED cudaError_t cudaLaunchHostFunc(cudaStream_t stream, cudaHostFn_t function, void* data) {
  return calls(stream, [=] { function(data); });
}
EXPORTED cudaError_t cudaStreamAddCallback(cudaStream_t stream, cudaStreamCallback_t function, void* data,
                                           unsigned) {
  if (const cudaError_t error = waits(stream_of(stream)->capture)) return error;
  return function(stream, cudaSuccess, data), cudaSuccess;
}
EXPORTED cudaError_t cudaEventCreateWithFlags(cudaEvent_t* event, unsigned) {
  return *event = reinterpret_cast<cudaEvent_t>(new Event), cudaSuccess;
}
EXPORTED cudaError_t cudaEventCreate(cudaEvent_t* event) { return cudaEventCreateWithFlags(event, 0); }
EXPORTED cudaError_t cudaEventDestroy(cudaEvent_t event) { return deletes<Event>(event); }
EXPORTED cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) {
  return record(event_of(event), stream);
}
EXPORTED cudaError_t cudaEventRecordWithFlags(cudaEvent_t event, cudaStream_t stream, unsigned) {
  return record(event_of(event), stream);
}
EXPORTED cudaError_t cudaEventQuery(cudaEvent_t event) {
  return event_of(event)->capture ? fails(cudaErrorCapturedEvent) : unsafe();
}
EXPORTED cudaError_t cudaEventSynchronize(cudaEvent_t event) {
  return event_of(event)->capture ? fails(cudaErrorCapturedEvent) : unsafe();
}
EXPORTED cudaError_t cudaEventElapsedTime(float* milliseconds, cudaEvent_t begin, cudaEvent_t end) {
  *milliseconds = float(event_of(end)->nanoseconds - event_of(begin)->nanoseconds) * 1e-6f;
  return cudaSuccess;
}

// Captures and graphs.
EXPORTED cudaError_t cudaStreamBeginCapture(cudaStream_t stream, cudaStreamCaptureMode mode) {
  return begin_capture(stream_of(stream), mode);
}
EXPORTED cudaError_t cudaStreamEndCapture(cudaStream_t stream, cudaGraph_t* graph) {
  return end_capture(stream_of(stream), graph);
}
EXPORTED cudaError_t cudaThreadExchangeStreamCaptureMode(cudaStreamCaptureMode* mode) {
  std::swap(*mode, thread_mode);
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamGetCaptureInfo(cudaStream_t stream, cudaStreamCaptureStatus* status,
                                              unsigned long long* id, cudaGraph_t* graph,
                                              const cudaGraphNode_t** nodes, const cudaGraphEdgeData** edges,
                                              size_t* count) {
  const Capture* const capture = capturing ? stream_of(stream)->capture : nullptr;
  *status = !capture           ? cudaStreamCaptureStatusNone
            : capture->invalid ? cudaStreamCaptureStatusInvalidated
                               : cudaStreamCaptureStatusActive;
  if (id) *id = capture ? capture->id : 0;
  if (graph) *graph = nullptr;
  if (nodes) *nodes = nullptr;
  if (edges) *edges = nullptr;
  if (count) *count = 0;
  return cudaSuccess;
}
EXPORTED cudaError_t cudaStreamIsCapturing(cudaStream_t stream, cudaStreamCaptureStatus* status) {
  return cudaStreamGetCaptureInfo(stream, status, nullptr, nullptr, nullptr, nullptr, nullptr);
}
EXPORTED cudaError_t cudaGraphInstantiateWithFlags(cudaGraphExec_t* made, cudaGraph_t graph,
                                                   unsigned long long) {
  *made = reinterpret_cast<cudaGraphExec_t>(new Graph(*reinterpret_cast<Graph*>(graph)));
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphLaunch(cudaGraphExec_t graph, cudaStream_t stream) {
  if (const cudaError_t error = waits(stream_of(stream)->capture)) return error;
  ++graph_launches;
  for (const Node& node : reinterpret_cast<Graph*>(graph)->nodes) node.run();
  return cudaSuccess;
}
EXPORTED cudaError_t cudaGraphGetNodes(cudaGraph_t graph, cudaGraphNode_t*, size_t* count) {
  return *count = reinterpret_cast<Graph*>(graph)->nodes.size(), cudaSuccess;
}
EXPORTED cudaError_t cudaGraphNodeGetDependencies(cudaGraphNode_t, cudaGraphNode_t*, cudaGraphEdgeData*,
                                                  size_t* count) {
  return *count = 0, cudaSuccess;
}
EXPORTED cudaError_t cudaGraphDebugDotPrint(cudaGraph_t, const char*, unsigned) { return cudaSuccess; }
EXPORTED cudaError_t cudaGraphDestroy(cudaGraph_t graph) { return deletes<Graph>(graph); }
EXPORTED cudaError_t cudaGraphExecDestroy(cudaGraphExec_t graph) { return deletes<Graph>(graph); }

// ---- CUDA's driver ---------------------------------------------------------------------------------------------

EXPORTED CUresult cuInit(unsigned) { return CUDA_SUCCESS; }
EXPORTED CUresult cuDriverGetVersion(int* version) { return *version = kVersion, CUDA_SUCCESS; }
EXPORTED CUresult cuGetErrorString(CUresult error, const char** text) {
  return *text = cudaGetErrorString(cudaError_t(error)), CUDA_SUCCESS;
}
EXPORTED CUresult cuDeviceGetCount(int* count) { return *count = 1, CUDA_SUCCESS; }
EXPORTED CUresult cuDeviceGet(CUdevice* device, int) { return *device = 0, CUDA_SUCCESS; }
EXPORTED CUresult cuDeviceGetAttribute(int* value, CUdevice_attribute which, CUdevice) {
  return *value = attribute(which), CUDA_SUCCESS;
}
EXPORTED CUresult cuDevicePrimaryCtxRetain(CUcontext* retained, CUdevice) {
  return *retained = reinterpret_cast<CUcontext>(&anything), CUDA_SUCCESS;
}
EXPORTED CUresult cuDevicePrimaryCtxGetState(CUdevice, unsigned* flags, int* active) {
  return *flags = 0, *active = 1, CUDA_SUCCESS;
}
EXPORTED CUresult cuCtxGetCurrent(CUcontext* current) { return *current = context, CUDA_SUCCESS; }
EXPORTED CUresult cuCtxSetCurrent(CUcontext current) { return context = current, CUDA_SUCCESS; }
EXPORTED CUresult cuCtxGetLimit(size_t* value, CUlimit) { return *value = 0, CUDA_SUCCESS; }
EXPORTED CUresult cuCtxSetLimit(CUlimit, size_t) { return CUDA_SUCCESS; }
EXPORTED CUresult cuPointerGetAttribute(void* value, CUpointer_attribute which, CUdeviceptr pointer) {
  const std::lock_guard lock(mutex);
  const Block* const block = block_of(reinterpret_cast<void*>(pointer));
  if (!block) return CUDA_ERROR_INVALID_VALUE;
  if (which == CU_POINTER_ATTRIBUTE_DEVICE_POINTER) *static_cast<CUdeviceptr*>(value) = pointer;
  return CUDA_SUCCESS;
}

// What a module is made of is not looked at: it has every kernel that it is asked for.
EXPORTED CUresult cuModuleLoadData(CUmodule* module, const void*) {
  if (const cudaError_t error = unsafe()) return of_driver(error);
  return *module = reinterpret_cast<CUmodule>(&anything), CUDA_SUCCESS;
}
EXPORTED CUresult cuModuleLoadDataEx(CUmodule* module, const void* image, unsigned, CUjit_option*, void**) {
  return cuModuleLoadData(module, image);
}
EXPORTED CUresult cuModuleLoad(CUmodule* module, const char*) { return cuModuleLoadData(module, nullptr); }
EXPORTED CUresult cuModuleUnload(CUmodule) { return of_driver(unsafe()); }
EXPORTED CUresult cuModuleGetFunction(CUfunction* function, CUmodule, const char* name) {
  return *function = reinterpret_cast<CUfunction>(kernels().named(name)), CUDA_SUCCESS;
}
EXPORTED CUresult cuFuncGetAttribute(int* value, CUfunction_attribute which, CUfunction) {
  *value = which == CU_FUNC_ATTRIBUTE_MAX_THREADS_PER_BLOCK ? 1024
           : which == CU_FUNC_ATTRIBUTE_NUM_REGS            ? 32
                                                            : 0;
  return CUDA_SUCCESS;
}
EXPORTED CUresult cuFuncSetAttribute(CUfunction, CUfunction_attribute, int) { return CUDA_SUCCESS; }
EXPORTED CUresult cuFuncSetCacheConfig(CUfunction, CUfunc_cache) { return CUDA_SUCCESS; }
EXPORTED CUresult cuOccupancyMaxActiveClusters(int* count, CUfunction, const CUlaunchConfig*) {
  return *count = kMultiprocessors, CUDA_SUCCESS;
}
EXPORTED CUresult cuOccupancyMaxActiveBlocksPerMultiprocessor(int* count, CUfunction, int threads,
                                                              size_t shared) {
  return *count = blocks_per_multiprocessor(threads, shared), CUDA_SUCCESS;
}
EXPORTED CUresult cuLaunchKernel(CUfunction function, unsigned x, unsigned y, unsigned z, unsigned threads_x,
                                 unsigned threads_y, unsigned threads_z, unsigned shared, CUstream stream,
                                 void**, void**) {
  const dim3 grid{x, y, z}, block{threads_x, threads_y, threads_z};
  return of_driver(launch(reinterpret_cast<Kernel*>(function), stream, grid, block, shared));
}
EXPORTED CUresult cuLaunchKernelEx(const CUlaunchConfig* config, CUfunction function, void**, void**) {
  const auto& [x, y, z, threads_x, threads_y, threads_z, shared, stream, attributes, count] = *config;
  return cuLaunchKernel(function, x, y, z, threads_x, threads_y, threads_z, shared, stream, nullptr, nullptr);
}
EXPORTED CUresult cuLaunchCooperativeKernel(CUfunction function, unsigned x, unsigned y, unsigned z,
                                            unsigned threads_x, unsigned threads_y, unsigned threads_z,
                                            unsigned shared, CUstream stream, void**) {
  return cuLaunchKernel(function, x, y, z, threads_x, threads_y, threads_z, shared, stream, nullptr, nullptr);
}
EXPORTED CUresult cuMemsetD32Async(CUdeviceptr at, unsigned value, size_t count, CUstream stream) {
  return of_driver(copies_by(stream, [=] { std::fill_n(reinterpret_cast<unsigned*>(at), count, value); }));
}

// What libraries are linked to and nothing here calls.
#define REFUSES(name)                           \
  EXPORTED int refuses_##name() __asm__(#name); \
  int refuses_##name() { return not_supported(); }
REFUSES(cuTensorMapEncodeTiled)
REFUSES(cuLinkCreate_v2)
REFUSES(cuLinkAddData_v2)
REFUSES(cuLinkComplete)

// ---- cuBLAS and cuDNN: each computation is a launch that is counted ----------------------------------------------

namespace {
struct Library {
  cudaStream_t stream = nullptr;
};

int computes(Kernel* kernel, cudaStream_t stream) { return launch(kernel, stream) ? 1 : 0; }

Kernel* library_kernel(const char* name) {
  Kernel* const kernel = kernels().named(name);
  kernel->of_library = true;
  return kernel;
}

int creates(void** handle) { return *handle = &anything, 0; }
}  // namespace

// Functions of which nothing is wanted but that they succeed take whatever they are given.
#define SUCCEEDS(name) \
  EXPORTED int name() { return 0; }
#define CREATES(name) \
  EXPORTED int name(void** handle) { return creates(handle); }
#define COMPUTES(name)                                   \
  EXPORTED int name(const Library* library) {            \
    static Kernel* const kernel = library_kernel(#name); \
    return computes(kernel, library->stream);            \
  }

EXPORTED int cublasCreate_v2(Library** library) { return *library = new Library, 0; }
EXPORTED int cublasDestroy_v2(Library* library) { return delete library, 0; }
EXPORTED int cublasSetStream_v2(Library* library, cudaStream_t stream) { return library->stream = stream, 0; }
EXPORTED int cublasGetMathMode(const Library*, int* mode) { return *mode = 0, 0; }
EXPORTED int cublasGetPointerMode_v2(const Library*, int* mode) { return *mode = 0, 0; }
SUCCEEDS(cublasSetMathMode)
SUCCEEDS(cublasSetPointerMode_v2)
SUCCEEDS(cublasSetWorkspace_v2)
COMPUTES(cublasSgemm_v2)
COMPUTES(cublasDgemm_v2)
COMPUTES(cublasSgemmEx)
COMPUTES(cublasGemmEx)
COMPUTES(cublasSgemmStridedBatched)
COMPUTES(cublasDgemmStridedBatched)
COMPUTES(cublasGemmStridedBatchedEx)
COMPUTES(cublasSgemv_v2)
COMPUTES(cublasDgemv_v2)
COMPUTES(cublasSdot_v2)
COMPUTES(cublasDdot_v2)
COMPUTES(cublasDotEx)

CREATES(cublasLtMatmulDescCreate)
CREATES(cublasLtMatrixLayoutCreate)
CREATES(cublasLtMatmulPreferenceCreate)
SUCCEEDS(cublasLtMatmulDescDestroy)
SUCCEEDS(cublasLtMatrixLayoutDestroy)
SUCCEEDS(cublasLtMatmulPreferenceDestroy)
SUCCEEDS(cublasLtMatmulDescSetAttribute)
SUCCEEDS(cublasLtMatrixLayoutSetAttribute)
SUCCEEDS(cublasLtMatmulPreferenceSetAttribute)
EXPORTED int cublasLtMatmulAlgoGetHeuristic(void*, void*, void*, void*, void*, void*, void*, int, void*,
                                            int* found) {
  return *found = 1, 0;  // the way of all zeros, without a workspace
}
EXPORTED int cublasLtMatmul(void*, void*, void*, void*, void*, void*, void*, void*, void*, void*, void*,
                            void*, void*, void*, size_t, cudaStream_t stream) {
  static Kernel* const kernel = library_kernel("cublasLtMatmul");
  return computes(kernel, stream);
}

EXPORTED cudnnStatus_t cudnnCreate(cudnnHandle_t* library) {
  return *library = reinterpret_cast<cudnnHandle_t>(new Library), CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnSetStream(cudnnHandle_t library, cudaStream_t stream) {
  return reinterpret_cast<Library*>(library)->stream = stream, CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnGetStream(cudnnHandle_t library, cudaStream_t* stream) {
  return *stream = reinterpret_cast<Library*>(library)->stream, CUDNN_STATUS_SUCCESS;
}

// Convolutions: what torch's descriptors hold is kept and given back; where a descriptor is asked for that nobody has
// put there, as of the ways that a convolution may go, there is one, and of all else there is nothing or zero.
namespace {
struct Descriptor {
  struct Values {
    int64_t count;
    std::vector<char> bytes;
  };
  std::map<cudnnBackendAttributeName_t, Values> attributes;
};
Descriptor* descriptor_of(cudnnBackendDescriptor_t of) { return static_cast<Descriptor*>(of); }

size_t size_of(cudnnBackendAttributeType_t type) {
  switch (type) {
    case CUDNN_TYPE_BOOLEAN:
    case CUDNN_TYPE_CHAR: return 1;
    case CUDNN_TYPE_HANDLE:
    case CUDNN_TYPE_INT64:
    case CUDNN_TYPE_DOUBLE:
    case CUDNN_TYPE_VOID_PTR:
    case CUDNN_TYPE_FRACTION:
    case CUDNN_TYPE_BACKEND_DESCRIPTOR: return 8;
    default: return 4;
  }
}
}  // namespace

EXPORTED cudnnStatus_t cudnnBackendCreateDescriptor(cudnnBackendDescriptorType_t,
                                                    cudnnBackendDescriptor_t* made) {
  return *made = new Descriptor, CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnBackendDestroyDescriptor(cudnnBackendDescriptor_t descriptor) {
  return delete descriptor_of(descriptor), CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnBackendFinalize(cudnnBackendDescriptor_t) { return CUDNN_STATUS_SUCCESS; }
EXPORTED cudnnStatus_t cudnnBackendSetAttribute(cudnnBackendDescriptor_t descriptor,
                                                cudnnBackendAttributeName_t name,
                                                cudnnBackendAttributeType_t type, int64_t count,
                                                const void* values) {
  const char* const from = static_cast<const char*>(values);
  descriptor_of(descriptor)->attributes[name] = {count, {from, from + size_t(count) * size_of(type)}};
  return CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnBackendGetAttribute(const cudnnBackendDescriptor_t descriptor,
                                                cudnnBackendAttributeName_t name,
                                                cudnnBackendAttributeType_t type, int64_t most,
                                                int64_t* count, void* values) {
  const auto& attributes = descriptor_of(descriptor)->attributes;
  const auto found = attributes.find(name);
  const bool is_descriptor = type == CUDNN_TYPE_BACKEND_DESCRIPTOR;
  const bool is_number = type == CUDNN_TYPE_INT64 || type == CUDNN_TYPE_INT32;
  const int64_t there = found != attributes.end() ? found->second.count : is_descriptor || is_number;
  if (count) *count = there;
  const size_t bytes = size_t(std::min(there, most)) * size_of(type);
  if (values && !is_descriptor && bytes) {  // a descriptor is filled, of which nothing is asked
    if (found != attributes.end())
      std::memcpy(values, found->second.bytes.data(), bytes);
    else
      std::memset(values, 0, bytes);
  }
  return CUDNN_STATUS_SUCCESS;
}
EXPORTED cudnnStatus_t cudnnBackendExecute(cudnnHandle_t library, cudnnBackendDescriptor_t,
                                           cudnnBackendDescriptor_t) {
  static Kernel* const kernel = library_kernel("cudnnBackendExecute");
  return cudnnStatus_t(computes(kernel, reinterpret_cast<Library*>(library)->stream));
}

// Batch norm.
CREATES(cudnnCreateTensorDescriptor)
CREATES(cudnnCreateActivationDescriptor)
SUCCEEDS(cudnnDestroyTensorDescriptor)
SUCCEEDS(cudnnDestroyActivationDescriptor)
SUCCEEDS(cudnnSetTensorNdDescriptor)
SUCCEEDS(cudnnSetActivationDescriptor)
EXPORTED int cudnnGetBatchNormalizationForwardTrainingExWorkspaceSize(void*, int, int, void*, void*, void*,
                                                                      void*, void*, size_t* bytes) {
  return *bytes = 0, 0;
}
EXPORTED int cudnnGetBatchNormalizationBackwardExWorkspaceSize(void*, int, int, void*, void*, void*, void*,
                                                               void*, void*, void*, size_t* bytes) {
  return *bytes = 0, 0;
}
EXPORTED int cudnnGetBatchNormalizationTrainingExReserveSpaceSize(void*, int, int, void*, void*,
                                                                  size_t* bytes) {
  return *bytes = 0, 0;
}
COMPUTES(cudnnBatchNormalizationForwardInference)
COMPUTES(cudnnBatchNormalizationForwardTrainingEx)
COMPUTES(cudnnBatchNormalizationBackwardEx)
