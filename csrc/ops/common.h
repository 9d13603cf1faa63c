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
#include <exception>
#include <initializer_list>
#include <mutex>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../cpu/parallel.h"

namespace gankern {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// Torch's own thread pool, for as many threads as torch.set_num_threads allows. An exception of a thread (out
// of memory) is the caller's: the stable ABI would keep no more of it than that there was one.
inline Parallel torch_threads() {
  return {static_cast<int>(torch::stable::get_num_threads()),
          [](int64_t count, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
            std::exception_ptr error;
            std::mutex taking;
            torch::stable::parallel_for(0, count, grain, [&](int64_t begin, int64_t end) {
              try {
                body(context, begin, end);
              } catch (...) {
                const std::lock_guard<std::mutex> lock(taking);
                error = std::current_exception();
              }
            });
            if (error) std::rethrow_exception(error);
          }};
}

// The position of a dtype in a kernel table (csrc/cpu/kernels.h, Dtype). Python has checked it: this is the guard
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

using Optional = std::optional<Tensor>;

// A tensor argument as a kernel takes it: in a dtype and an order of memory that the kernel knows. It owns
// the memory that data() points to, the argument's own or a copy's, and must live as long as the call.
// Therefore a temporary gives no pointer, and an operand is never assigned another tensor: what needs one
// more conversion makes one more operand.
class Operand {
 public:
  Operand() = default;  // an argument that was not given
  explicit Operand(const Tensor& tensor) : tensor_(tensor) {}
  explicit Operand(const Optional& tensor) : tensor_(tensor) {}
  Operand(const Operand&) = default;
  Operand(Operand&&) = default;
  Operand& operator=(const Operand&) = delete;
  Operand& operator=(Operand&&) = delete;

  explicit operator bool() const { return tensor_.has_value(); }
  const Tensor& operator*() const& { return *tensor_; }
  const Tensor* operator->() const& { return &*tensor_; }
  const Tensor& operator*() const&& = delete;
  const Tensor* operator->() const&& = delete;

  const void* data() const& { return tensor_ ? tensor_->const_data_ptr() : nullptr; }
  const void* data() const&& = delete;

 private:
  Optional tensor_;
};

inline bool same_sizes(const Tensor& a, const Tensor& b) {
  const auto x = a.sizes(), y = b.sizes();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}
inline bool same_strides(const Tensor& a, const Tensor& b) {
  const auto x = a.strides(), y = b.strides();
  return std::equal(x.begin(), x.end(), y.begin(), y.end());
}

// An uninitialised tensor, by the one call of the stable ABI that goes straight to the allocation:
// torch::stable::empty_like and new_empty look an operator up by its name, which takes as long as a small
// kernel.
inline Tensor blank(const Tensor& like, const int64_t* sizes, const int64_t* strides, int64_t dim,
                    ScalarType dtype) {
  int32_t device_type, device_index;
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(like.get(), &device_index));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(dim, sizes, strides, code, device_type, device_index, &handle));
  return Tensor(handle);
}
// As a tensor without gaps lies in memory.
inline Tensor blank_like(const Tensor& dense) {
  return blank(dense, dense.sizes().data(), dense.strides().data(), dense.dim(), dense.scalar_type());
}
// Contiguous.
inline Tensor blank(const Tensor& like, std::initializer_list<int64_t> sizes, ScalarType dtype) {
  int64_t strides[8], step = 1;
  STD_TORCH_CHECK(sizes.size() <= 8, "a tensor of ", sizes.size(), " dimensions");
  for (size_t d = sizes.size(); d-- > 0; step *= std::max<int64_t>(sizes.begin()[d], 1)) strides[d] = step;
  return blank(like, sizes.begin(), strides, int64_t(sizes.size()), dtype);
}
inline Tensor blank(const Tensor& like, std::initializer_list<int64_t> sizes) {
  return blank(like, sizes, like.scalar_type());
}

// A result, contiguous, of whose memory the kernel is told by `place`.
inline Tensor result(const Tensor& like, std::initializer_list<int64_t> sizes, void** place) {
  Tensor x = blank(like, sizes);
  *place = x.mutable_data_ptr();
  return x;
}

// The elements in their logical order.
inline Operand compact(const Tensor& tensor) {
  return Operand(tensor.is_contiguous() ? tensor : torch::stable::contiguous(tensor));
}
inline Operand compact(const Optional& tensor) { return tensor ? compact(*tensor) : Operand(); }

// The same in another dtype.
inline Operand converted(const Tensor& tensor, ScalarType dtype) {
  return compact(tensor.scalar_type() == dtype ? tensor : torch::stable::to(tensor, dtype));
}

// The elements without gaps, in whatever order they have in memory.
inline Operand dense(const Tensor& tensor) {
  if (tensor.is_contiguous()) return Operand(tensor);
  Tensor like = torch::stable::empty_like(tensor);
  if (same_strides(tensor, like)) return Operand(tensor);
  torch::stable::copy_(like, tensor);
  return Operand(like);
}

// A tensor that belongs to a dense one, such as its gradient: of its dtype and shape, in its order of memory.
inline Operand like(const Tensor& tensor, const Tensor& model, const char* op) {
  STD_TORCH_CHECK(tensor.scalar_type() == model.scalar_type() && same_sizes(tensor, model), op,
                  ": a gradient does not have the dtype or shape of its tensor");
  if (same_strides(tensor, model)) return Operand(tensor);
  Tensor same = blank_like(model);
  torch::stable::copy_(same, tensor);
  return Operand(same);
}
inline Operand like(const Optional& tensor, const Tensor& model, const char* op) {
  return tensor ? like(*tensor, model, op) : Operand();
}

// What stands for a result that nobody asked for.
inline Tensor missing(const Tensor& x) { return blank(x, {0}); }

// As `result`, of the sizes and strides of a dense tensor; where nobody asked for it, what stands for it.
inline Tensor result_like(const Tensor& dense, void** place, bool asked = true) {
  if (!asked) return missing(dense);
  Tensor x = blank_like(dense);
  *place = x.mutable_data_ptr();
  return x;
}

// Registers an operator and its gradients: `name`, `name`_backward, `name`_double_backward.
template <auto forward, auto backward, auto double_backward>
void implement_orders(torch::stable::detail::StableLibrary& library, const std::string& name) {
  library.impl(name.c_str(), TORCH_BOX(forward));
  library.impl((name + "_backward").c_str(), TORCH_BOX(backward));
  library.impl((name + "_double_backward").c_str(), TORCH_BOX(double_backward));
}

}  // namespace gankern
