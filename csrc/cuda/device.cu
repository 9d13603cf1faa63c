#include "common.h"
#include "device.h"

namespace gankern::cuda {

#if defined(__CUDACC__)
void use_device(int index) { check(cudaSetDevice(index), "the device of a tensor"); }
#else
void use_device(int) {}
#endif

}  // namespace gankern::cuda
