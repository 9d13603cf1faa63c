// From a Python call to an operator: the arguments as they come, checked once. What a function here cannot
// vouch for it declines (NotImplemented), and Python then does the call, or raises the error that names the
// argument.
#pragma once

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/python_variable.h>
#include <torch/csrc/python_headers.h>
#include <torch/csrc/utils/pybind.h>

#include <cmath>
#include <optional>
#include <tuple>

#include "node.h"

namespace gankern::nodes {

// Whether a transform of torch.func is at work.
inline bool transformed() {
  return c10::impl::tls_local_dispatch_key_set().included_.has(
      c10::DispatchKey::FuncTorchDynamicLayerFrontMode);
}

// Whether functions here take calls: false for a test that wants Python's way.
bool takes_calls();

// Whether nothing transforms, traces or watches what is called now: no torch.func transform, no mode, no
// tracer, and no test that wants Python's way.
bool plain();

// A primitive as gankern.core.dispatch has it, by its name there; for as long as the module lives. Each file
// has one.
struct Primitive {
  explicit Primitive(const char* called) : name(called) {}
  PyObject* key();  // its name as Python has it

  const char* const name;
  // What "auto" is, on the CPU and on a GPU, for small and for large tensors, by dtype; asked once.
  struct Choice {
    PyObject* name = nullptr;
    const char* text = nullptr;
  };
  Choice choices[2][2][4];

 private:
  PyObject* key_ = nullptr;
};

// Attributes, for the running thread, of the threading.local objects of gankern.core.dispatch and .precision.
enum Local : int { kDispatch, kPrecision, kLocals };
PyObject* attributes(Local local);

// As gankern.get_convolution_precision; borrowed.
PyObject* convolution_precision();

// The implementation that "auto" runs on tensors like this one, which goes on record; nullptr where another
// one is asked for, or where that is Python's to say.
const char* selected(Primitive& primitive, PyObject* like, PyObject* implementation);

// Whether nobody asks for an implementation, here or by what holds for all calls.
bool left_to_auto(PyObject* implementation);

// Puts on record that a primitive that chooses for itself ran by its own engine, or as plain PyTorch.
void put_on_record(Primitive& primitive, bool engine);

// What a file brings to the module; each has one list.
struct Functions {
  Functions(std::initializer_list<PyMethodDef> functions);
};
inline PyMethodDef method(const char* name, PyObject* (*function)(PyObject*, PyObject* const*, Py_ssize_t)) {
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(function)), METH_FASTCALL, nullptr};
}

// ---- arguments ----------------------------------------------------------------------------------------

inline PyObject* decline() { return Py_NewRef(Py_NotImplemented); }

// A tensor (or parameter) of a dtype and layout that kernels take, without a forward-mode tangent; else
// nullptr.
inline const Tensor* tensor(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  if (t.layout() != at::kStrided || torch::autograd::isFwGradDefined(t)) return nullptr;
  switch (t.scalar_type()) {
    case at::kFloat:
    case at::kDouble:
    case at::kHalf:
    case at::kBFloat16: return &t;
    default: return nullptr;
  }
}

// Whether a buffer can be written to in place; else Python raises, before anything is written.
inline bool writable(const Tensor& t) {
  if (t.requires_grad() || (t.is_inference() && !c10::InferenceMode::is_enabled())) return false;
  for (int64_t d = 0; d < t.dim(); ++d)
    if (t.stride(d) == 0 && t.size(d) > 1) return false;
  return true;
}

// The same or None; false for what is neither.
inline bool optional_tensor(PyObject* object, std::optional<Tensor>* value) {
  if (object == Py_None) return true;
  const Tensor* t = tensor(object);
  if (!t) return false;
  *value = *t;
  return true;
}

inline bool integer(PyObject* object, int64_t* value) {
  if (!PyLong_CheckExact(object)) return false;
  int overflow = 0;
  *value = PyLong_AsLongLongAndOverflow(object, &overflow);
  return !overflow;
}
// A finite number.
inline bool number(PyObject* object, double* value) {
  if (PyFloat_CheckExact(object)) {
    *value = PyFloat_AS_DOUBLE(object);
    return std::isfinite(*value);
  }
  int64_t whole;
  if (!integer(object, &whole)) return false;
  *value = double(whole);
  return true;
}
inline bool flag(PyObject* object, bool* value) {
  *value = object == Py_True;
  return *value || object == Py_False;
}

// One of a function's accepted words; -1 for anything else.
class Words {
 public:
  explicit Words(std::initializer_list<const char*> words) {
    for (const char* word : words) add(word);
  }
  void add(const char* word) { words_.push_back(PyUnicode_InternFromString(word)); }
  int find(PyObject* object) const {
    for (size_t i = 0; i < words_.size(); ++i)
      if (words_[i] == object) return int(i);
    if (PyUnicode_CheckExact(object))  // of the same letters, but made at run time
      for (size_t i = 0; i < words_.size(); ++i)
        if (PyUnicode_Compare(words_[i], object) == 0) return int(i);
    return -1;
  }

 private:
  std::vector<PyObject*> words_;
};

// What an activation that is linear in pieces multiplies negative values with: 1 for none.
inline bool slope_of(PyObject* activation, PyObject* negative_slope, double* value) {
  static const Words names({"linear", "relu", "leaky_relu"});
  const int name = activation == Py_None ? 0 : names.find(activation);
  if (name < 0 || !number(negative_slope, value)) return false;
  if (name < 2) *value = name == 0 ? 1.0 : 0.0;
  return true;
}

inline bool same_kind(const Tensor& a, const Tensor& b) {
  return a.scalar_type() == b.scalar_type() && a.device() == b.device();
}

// Whether dim, made to count from the front, and a vector along it fit x.
inline bool channels_fit(const Tensor& x, const std::optional<Tensor>& bias, int64_t* dim) {
  if (*dim < 0) *dim += x.dim();
  if (*dim < 0 || *dim >= x.dim()) return false;
  return !bias || (bias->dim() == 1 && bias->size(0) == x.size(*dim) && same_kind(*bias, x));
}

inline at::ScalarType accumulation_type(const Tensor& x) {
  return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat;
}

// The tensor, or an undefined one.
inline const Tensor& value(const std::optional<Tensor>& t) {
  static const Tensor undefined;
  return t ? *t : undefined;
}

// ---- operators
// ----------------------------------------------------------------------------------------------------

template <class Signature>
c10::TypedOperatorHandle<Signature> find(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Signature>();
}

inline std::optional<Tensor> optional(const Tensor& t) {
  return t.defined() ? std::optional<Tensor>(t) : std::nullopt;
}

// While a kernel runs: other Python threads have their turn, and nothing is recorded.
struct Running {
  pybind11::gil_scoped_release released;
  BelowAutograd below;
};

// `body` with torch's exceptions turned into Python's; declines another number of arguments.
template <PyObject* (*body)(PyObject* const*), Py_ssize_t count>
PyObject* entry(PyObject*, PyObject* const* arguments, Py_ssize_t given) {
  HANDLE_TH_ERRORS
  TORCH_CHECK_TYPE(given == count, "takes ", count, " arguments, got ", given);
  // A tensor that its Python object alone holds takes the interpreter's lock with every copy of it; with one more
  // holder it does not, as torch's own calls have one.
  c10::SmallVector<Tensor, 6> held;
  for (Py_ssize_t i = 0; i < count; ++i)
    if (THPVariable_CheckExact(arguments[i])) held.push_back(THPVariable_Unpack(arguments[i]));
  try {
    return body(arguments);
  } catch (const std::bad_alloc& error) {  // torch would make a RuntimeError of it
    PyErr_SetString(PyExc_MemoryError, error.what());
    return nullptr;
  }
  END_HANDLE_TH_ERRORS
}

}  // namespace gankern::nodes
