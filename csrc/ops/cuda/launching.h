// From an operator's tensors to a launch: the device's guard, its current stream, and scratch memory.
//
// These files are compiled without CUDA's headers and linked with the kernels of csrc/cuda. With GANKERN_EMULATED
// the operators take CPU tensors, and the kernels run in csrc/cuda/emulate.h: for tests.
#pragma once

#include "../../cuda/device.h"
#include "../common.h"

#if defined(GANKERN_EMULATED)
#define GANKERN_DEVICE CPU
#else
#define GANKERN_DEVICE CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace gankern {

#if !defined(GANKERN_EMULATED)
// The current stream of a device. This function of the stable ABI is in torch's CUDA library, which a torch without
// CUDA has not, so that nothing can be linked with it; where a CUDA tensor is, it is loaded.
inline void* current_stream(int32_t device) {
  using Get = AOTITorchError (*)(int32_t device_index, void** stream);
  static const Get get = [] {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    void* found = library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr;
    STD_TORCH_CHECK(found, "this torch has no CUDA library that knows its streams");
    return reinterpret_cast<Get>(found);
  }();
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(get(device, &stream));
  return stream;
}
#endif

// While it lives, the device of a tensor is the current one.
class Launching {
 public:
#if defined(GANKERN_EMULATED)
  explicit Launching(const Tensor&) {}
  void* stream() const { return nullptr; }
#else
  explicit Launching(const Tensor& tensor) : device_(tensor.get_device_index()), guard_(device_) {
    cuda::use_device(device_);
  }
  void* stream() const { return current_stream(device_); }

 private:
  const int32_t device_;
  const torch::stable::accelerator::DeviceGuard guard_;
#endif
};

// Uninitialised memory of the caching allocator. It may be given back while a launch still uses it: what takes
// it next is on the same stream.
inline Tensor scratch_of(int64_t bytes, const Tensor& like) {
  return blank(like, {(bytes + 7) / 8}, ScalarType::Double);
}

}  // namespace gankern
