// Spectral norm of all layers of a network on a CUDA device. See spectral_norm.cu for how.
#pragma once

#include <cstdint>
#include <vector>

namespace gankern::cuda {

constexpr int kGroups = 4;  // of columns that lie together

// A dense weight, in memory [outer, rows, inner]; column c, counted in memory order, is (c / inner, c % inner).
struct SpectralNormLayer {
  int64_t outer, rows, inner;
  // From a column in memory order to the logical one, whose order u and v are in: (size, step) of each group,
  // innermost first. One group of step 1 where both orders are one.
  int32_t groups;
  int32_t group_size[kGroups], group_step[kGroups];
  const void* weight;
  const void* u;  // these in the type of sums
  const void* v;
  void *new_u, *new_v, *sigma;  // forward writes these, gradients read sigma alone
  const void *grad, *grad_grad;
  void *result, *second_result;  // normalized; or the weight's gradient, and that of the gradient
};

struct SpectralNormRules {
  int64_t iterations;
  double eps;
  bool u_first, add_eps;
};

enum class SpectralNormPass { kForward, kBackward, kDoubleBackward };

// Bytes of scratch memory that a call needs, at a multiple of 16.
int64_t spectral_norm_scratch(const std::vector<SpectralNormLayer>& layers, int dtype);

// One cooperative launch for each 24 layers. dtype: as in csrc/cpu/vec.h.
void spectral_norm(SpectralNormPass pass, const std::vector<SpectralNormLayer>& layers,
                   const SpectralNormRules& rules, int dtype, void* scratch, void* stream);

}  // namespace gankern::cuda
