// What each file of this folder brings to the module.
#pragma once

#include <torch/csrc/python_headers.h>

#include <vector>

namespace gankern::nodes {

// Counts up where what Python passes to a function here changes: gankern/core/native.py has the same number.
constexpr int kInterface = 3;

// In the order of kNames in module.cpp.
enum Primitive : int {
  kBatchNormAct,
  kBiasAct,
  kConvolution,
  kGradientPenalty,
  kInstanceNormAct,
  kMinibatchDiscrimination,
  kMinibatchStddev,
  kPixelNorm,
  kSpectralNorm,
  kUpfirdn2d,
  kVirtualBatchNorm,
  kPrimitives
};

inline PyMethodDef method(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}

void add_batch_norm_act(std::vector<PyMethodDef>* methods);
void add_bias_act(std::vector<PyMethodDef>* methods);
void add_convolution(std::vector<PyMethodDef>* methods);
void add_gradient_penalty(std::vector<PyMethodDef>* methods);
void add_instance_norm_act(std::vector<PyMethodDef>* methods);
void add_minibatch_discrimination(std::vector<PyMethodDef>* methods);
void add_minibatch_stddev(std::vector<PyMethodDef>* methods);
void add_pixel_norm(std::vector<PyMethodDef>* methods);
void add_spectral_norm(std::vector<PyMethodDef>* methods);
void add_upfirdn2d(std::vector<PyMethodDef>* methods);
void add_virtual_batch_norm(std::vector<PyMethodDef>* methods);
void add_zeros(std::vector<PyMethodDef>* methods);

}  // namespace gankern::nodes
