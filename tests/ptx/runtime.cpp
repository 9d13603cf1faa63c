// What the host code of csrc/cuda, as nvcc compiles it, and the operators of csrc/ops/cuda ask for, in a process without
// CUDA: of CUDA's runtime, which launches kernels, and of torch. Kernels are run by the emulator, of the modules that
// ptx_runtime_module was given, and may touch the tensors whose addresses the operator asked for since the last launch.
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

extern "C" {
void ptx_register(const void* first, size_t bytes, const char* name);
void ptx_unregister_all();
int ptx_parameters(void* module, const char* kernel, size_t* sizes, int most);
int ptx_launch(void* module, const char* kernel, const unsigned grid[3], const unsigned block[3],
               unsigned shared, void** parameters, int cooperative, char* error, size_t bytes);
void ptx_seed(uint64_t value);

int __real_torch_get_mutable_data_ptr(void* tensor, void** address);
int __real_torch_get_const_data_ptr(void* tensor, const void** address);
int aoti_torch_get_dim(void* tensor, int64_t* dim);
int aoti_torch_get_sizes(void* tensor, int64_t** sizes);
int aoti_torch_get_strides(void* tensor, int64_t** strides);
int aoti_torch_get_dtype(void* tensor, int32_t* dtype);
size_t aoti_torch_dtype_element_size(int32_t dtype);
}

namespace {

struct Dim3 {
  unsigned x, y, z;
};
struct Configuration {
  Dim3 grid, block;
  size_t shared;
  void* stream;
};

// Of kernels, by what stands for them on the host: other files' constructors put them there.
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> of_kernels;
  return of_kernels;
}
std::vector<void*> modules;
std::vector<Configuration> configurations;
std::string message;  // of the launch that failed last
bool failed = false, launched = false;
uint64_t launches = 0;

int launch(const void* function, Dim3 grid, Dim3 block, void** parameters, size_t shared, bool cooperative) {
  const char* name = names().at(function).c_str();
  std::string error(1 << 16, '\0');
  launched = true;
  message = std::string("no module has ") + name;
  ptx_seed(++launches);
  for (void* module : modules) {
    if (ptx_parameters(module, name, nullptr, 0) < 0) continue;
    const unsigned of_grid[3] = {grid.x, grid.y, grid.z}, of_block[3] = {block.x, block.y, block.z};
    if (ptx_launch(module, name, of_grid, of_block, unsigned(shared), parameters, cooperative, &error[0],
                   error.size()) == 0)
      return 0;
    message = error.c_str();
  }
  failed = true;
  return 719;  // a launch failure
}

void seen(void* tensor, const void* address) {
  if (launched) ptx_unregister_all();
  launched = false;
  int64_t dim = 0, last = 0, *sizes = nullptr, *strides = nullptr;
  int32_t dtype = 0;
  aoti_torch_get_dim(tensor, &dim), aoti_torch_get_sizes(tensor, &sizes),
      aoti_torch_get_strides(tensor, &strides);
  aoti_torch_get_dtype(tensor, &dtype);
  std::string name = "a tensor[";
  for (int64_t k = 0; k < dim; ++k) {
    if (sizes[k] == 0) return;
    last += (sizes[k] - 1) * strides[k];
    name += (k ? ", " : "") + std::to_string(sizes[k]);
  }
  ptx_register(address, size_t(last + 1) * aoti_torch_dtype_element_size(dtype), (name + "]").c_str());
}

}  // namespace

EXPORTED void ptx_runtime_module(void* module) { modules.push_back(module); }

extern "C" {

int __wrap_torch_get_mutable_data_ptr(void* tensor, void** address) {
  const int status = __real_torch_get_mutable_data_ptr(tensor, address);
  if (status == 0) seen(tensor, *address);
  return status;
}
int __wrap_torch_get_const_data_ptr(void* tensor, const void** address) {
  const int status = __real_torch_get_const_data_ptr(tensor, address);
  if (status == 0) seen(tensor, *address);
  return status;
}

void** __cudaRegisterFatBinary(void*) {
  static void* handle;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
void __cudaRegisterFunction(void**, const char* host, char*, const char* name, int, void*, void*, void*,
                            void*, int*) {
  names()[host] = name;
}
int __cudaGetKernel(const void** kernel, const void* function) {
  *kernel = function;
  return 0;
}
unsigned __cudaPushCallConfiguration(Dim3 grid, Dim3 block, size_t shared, void* stream) {
  configurations.push_back({grid, block, shared, stream});
  return 0;
}
int __cudaPopCallConfiguration(Dim3* grid, Dim3* block, size_t* shared, void** stream) {
  const Configuration last = configurations.back();
  configurations.pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared, *stream = last.stream;
  return 0;
}
int __cudaLaunchKernel(const void* kernel, Dim3 grid, Dim3 block, void** parameters, size_t shared, void*) {
  return launch(kernel, grid, block, parameters, shared, false);
}
int cudaLaunchCooperativeKernel(const void* function, Dim3 grid, Dim3 block, void** parameters, size_t shared,
                                void*) {
  return launch(function, grid, block, parameters, shared, true);
}
int cudaGetLastError() {
  const int status = failed ? 719 : 0;
  failed = false;
  return status;
}
const char* cudaGetErrorString(int) { return message.c_str(); }
int cudaGetDevice(int* device) {
  *device = 0;
  return 0;
}
int cudaSetDevice(int) { return 0; }
int cudaDeviceGetAttribute(int* value, int attribute, int) {
  // Multiprocessors, bytes of the second-level cache, and of a block's shared memory: small ones.
  static const std::map<int, int> known = {{16, 3}, {38, 32 << 10}, {97, 48 << 10}};
  const auto found = known.find(attribute);
  if (found == known.end()) return 1;
  *value = found->second;
  return 0;
}
int cudaFuncSetAttribute(const void*, int attribute, int value) {
  return attribute == 8 && value == 48 << 10 ? 0 : 1;  // a block's shared memory
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return 0;
}
int cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 1;
  return 0;
}
}
