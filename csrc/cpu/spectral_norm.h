// Spectral norm of many weights at once. See spectral_norm.cpp for how.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gankern {

// A weight as it lies in memory, [outer, rows, inner]; as a matrix M[row, (outer, inner)], h = rows and
// w = outer * inner. u has h and v has w entries, in float (double for a double weight), v in memory order.
struct SpectralNormLayer {
  int64_t outer, rows, inner;
  const void* weight;
  const void* u;
  const void* v;
};

struct SpectralNormForward {
  SpectralNormLayer in;
  void* normalized;  // weight / sigma
  void* u;           // after the iteration; float or double
  void* v;
  void* sigma;  // one value, float or double
};

struct SpectralNormBackward {
  SpectralNormLayer in;  // u and v are the ones the forward ended with
  const void* sigma;
  const void* grad;   // of normalized, laid out as weight
  void* grad_weight;  // g/sigma - <g,W>/sigma^2 u v^T
};

struct SpectralNormDoubleBackward {
  SpectralNormLayer in;
  const void* sigma;
  const void* grad;              // g
  const void* grad_grad_weight;  // h, the gradient that reached grad_weight
  void* grad_grad;               // h/sigma - <h,u v^T>/sigma^2 W
  void* grad_weight;             // see spectral_norm.cpp
};

struct SpectralNormOptions {
  int64_t n_power_iterations;  // 0: sigma = u^T M v of the given u and v
  double eps;
  bool u_first;  // u <- Mv then v <- M^T u; otherwise v <- M^T u then u <- Mv
  bool add_eps;  // x / (|x| + eps); otherwise x / max(|x|, eps)
};

struct SpectralNormKernels {
  void (*forward[kDtypes])(SpectralNormForward*, int64_t layers, const SpectralNormOptions&, const Parallel&);
  void (*backward[kDtypes])(SpectralNormBackward*, int64_t layers, const Parallel&);
  void (*double_backward[kDtypes])(SpectralNormDoubleBackward*, int64_t layers, const Parallel&);
};

GANKERN_KERNELS(SpectralNormKernels, spectral_norm)

}  // namespace gankern
