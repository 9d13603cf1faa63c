// What every operator's registration shares. The files of this folder are the only C++ that knows torch; they
// use LibTorch's stable ABI, so that one library serves every torch from 2.11 on.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <tuple>
#include <vector>

#include "../cpu/parallel.h"

namespace gankern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Torch's own thread pool, for as many threads as torch.set_num_threads allows.
inline Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
            torch::stable::parallel_for(0, count, grain,
                                        [&](int64_t begin, int64_t end) { body(context, begin, end); });
          }};
}

// The position of a dtype in a kernel table (csrc/cpu/vec.h, Dtype). Python has checked it: this is the guard
// for callers of torch.ops.gankern.* themselves.
inline int dtype_index(const Tensor& tensor, const char* op) {
  switch (tensor.scalar_type()) {
    case ScalarType::Double: return 0;
    case ScalarType::Float: return 1;
    case ScalarType::BFloat16: return 2;
    case ScalarType::Half: return 3;
    default: break;
  }
  STD_TORCH_CHECK(false, op, ": dtype must be float64, float32, bfloat16 or float16");
  return -1;
}

// The dtype that values of a tensor's dtype are accumulated in.
inline ScalarType accumulation_type(const Tensor& tensor) {
  return tensor.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
}

// The tensor itself where its elements lie densely in some order, else a dense copy of it.
inline Tensor dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return tensor;
  Tensor like = torch::stable::empty_like(tensor);
  const auto a = tensor.strides(), b = like.strides();
  if (std::equal(a.begin(), a.end(), b.begin(), b.end())) return tensor;
  torch::stable::copy_(like, tensor);
  return like;
}

// The tensor itself where it lies in memory as `model` does, else a copy that does.
inline Tensor laid_out_as(const Tensor& tensor, const Tensor& model) {
  const auto a = tensor.strides(), b = model.strides();
  if (std::equal(a.begin(), a.end(), b.begin(), b.end())) return tensor;
  Tensor like = torch::stable::empty_like(model);
  torch::stable::copy_(like, tensor);
  return like;
}

}  // namespace gankern
