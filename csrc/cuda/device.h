// Which device the kernels of this folder are launched on.
#pragma once

namespace gankern::cuda {

// Makes a device this thread's current one, for this library: it has a CUDA runtime of its own, so that it loads
// beside any torch, and that one does not always see what torch's runtime was told.
void use_device(int index);

}  // namespace gankern::cuda
