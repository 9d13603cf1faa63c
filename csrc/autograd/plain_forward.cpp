// The forward of an accelerated module for calls of which it is known that they gain nothing: its class's own, for the
// price of a look at the arguments. gankern/acceleration/_root.py says which calls these are.
#include <torch/csrc/utils/object_ptr.h>

#include <cstring>

#include "call.h"

namespace gankern::nodes {
namespace {

constexpr size_t kWords = 24, kMost = 16;

// What decides: modes and arguments, as whole numbers.
struct Kind {
  size_t count = 0;
  int64_t words[kWords];

  bool push(int64_t word) {
    if (count == kWords) return false;
    words[count++] = word;
    return true;
  }
  bool operator==(const Kind& other) const {
    return count == other.count && std::memcmp(words, other.words, count * sizeof(int64_t)) == 0;
  }
};

// What is kept behind the fields of a functools.partial; zeros at first. `module` is the first of the partial's
// arguments, which holds it.
struct Known {
  PyObject* module;
  size_t count;
  Kind kinds[kMost];
  bool differentiates[kMost];  // whether the gradient of such a call may be differentiated
};

PyObject* state = nullptr;  // gankern.acceleration._scope's

PyTypeObject* partial = nullptr;  // functools.partial

Known& known(PyObject* self) {
  return *reinterpret_cast<Known*>(reinterpret_cast<char*>(self) + partial->tp_basicsize);
}

// Whether somebody else runs Python's frames: torch.compile, which has to meet root_forward's.
bool frames_are_taken() {
  return _PyInterpreterState_GetEvalFrameFunc(PyInterpreterState_Get()) != _PyEval_EvalFrameDefault;
}

// False for arguments that only Python can tell apart.
bool read(PyObject* module, PyObject* arguments, Kind* kind) {
  enum : int64_t { kNone, kFalse, kTrue, kTensor };
  static PyObject* const training = PyUnicode_InternFromString("training");
  PyObject* const mode = PyObject_GetAttr(module, training);
  if (!mode) throw python_error();
  Py_DECREF(mode);  // True and False live on
  if (mode != Py_True && mode != Py_False) return false;
  kind->push(int64_t(mode == Py_True) | int64_t(at::GradMode::is_enabled()) << 1);
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) {
    PyObject* const argument = PyTuple_GET_ITEM(arguments, i);
    if (argument == Py_None || argument == Py_True || argument == Py_False) {
      if (!kind->push(argument == Py_None ? kNone : argument == Py_True ? kTrue : kFalse)) return false;
      continue;
    }
    if (reinterpret_cast<PyObject*>(Py_TYPE(argument)) != THPVariableClass) return false;
    const Tensor& x = THPVariable_Unpack(argument);
    if (x.layout() != at::kStrided || x.unsafeGetTensorImpl()->has_symbolic_sizes_strides()) return false;
    if (!kind->push(kTensor | int64_t(x.requires_grad()) << 2 | x.dim() << 3)) return false;
    for (const int64_t size : x.sizes())
      if (!kind->push(size)) return false;
  }
  return true;
}

// The class's forward; `state.double` says meanwhile whether its gradient may be differentiated.
PyObject* run(PyObject* module, PyObject* arguments, bool differentiates) {
  static PyObject *const forward = PyUnicode_InternFromString("forward"), *const name =
                                                                              PyUnicode_InternFromString(
                                                                                  "double");
  THPObjectPtr function(PyObject_GetAttr(reinterpret_cast<PyObject*>(Py_TYPE(module)), forward));
  if (!function) return nullptr;
  c10::SmallVector<PyObject*, 8> all{module};
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) all.push_back(PyTuple_GET_ITEM(arguments, i));
  if (!differentiates) return PyObject_Vectorcall(function, all.data(), all.size(), nullptr);
  THPObjectPtr before(PyObject_GetAttr(state, name));
  if (!before || PyObject_SetAttr(state, name, Py_True) < 0) return nullptr;
  THPObjectPtr result(PyObject_Vectorcall(function, all.data(), all.size(), nullptr));
  PyObject *type, *value, *trace;
  PyErr_Fetch(&type, &value, &trace);
  if (PyObject_SetAttr(state, name, before) < 0) return nullptr;
  PyErr_Restore(type, value, trace);
  return result.release();
}

PyObject* call(PyObject* self, PyObject* arguments, PyObject* names) {
  HANDLE_TH_ERRORS
  const Known& calls = known(self);
  Kind kind;
  const bool may_be_known = calls.count && (!names || !PyDict_GET_SIZE(names)) && !frames_are_taken();
  if (may_be_known && read(calls.module, arguments, &kind))
    for (size_t i = 0; i < calls.count; ++i)
      if (calls.kinds[i] == kind) return run(calls.module, arguments, calls.differentiates[i]);
  return partial->tp_call(self, arguments, names);
  END_HANDLE_TH_ERRORS
}

// (the module, the arguments of a call, whether its gradient may be differentiated): from now on such calls run the
// class's forward.
PyObject* remember(PyObject* self, PyObject* const* in, Py_ssize_t) {
  HANDLE_TH_ERRORS
  Known& calls = known(self);
  Kind kind;
  calls.module = in[0];
  if (calls.count < kMost && read(calls.module, in[1], &kind)) {
    calls.differentiates[calls.count] = in[2] == Py_True;
    calls.kinds[calls.count++] = kind;
  }
  Py_RETURN_NONE;
  END_HANDLE_TH_ERRORS
}

PyObject* forget(PyObject* self, PyObject*) {
  known(self).count = 0;
  Py_RETURN_NONE;
}

// (gankern.acceleration._scope.state) -> the class
PyObject* plain_forward(PyObject* const* in) {
  state = Py_NewRef(in[0]);
  static PyMethodDef methods[] = {
      method("remember", remember), {"forget", forget, METH_NOARGS, nullptr}, {nullptr, nullptr, 0, nullptr}};
  static PyType_Slot slots[] = {
      {Py_tp_call, reinterpret_cast<void*>(call)},
      {Py_tp_methods, methods},
      {Py_tp_doc, const_cast<char*>("A functools.partial that knows for which calls it is not needed.")},
      {0, nullptr}};
  THPObjectPtr functools(PyImport_ImportModule("functools"));
  PyObject* const base = functools ? PyObject_GetAttrString(functools, "partial") : nullptr;
  if (!base) throw python_error();
  partial = reinterpret_cast<PyTypeObject*>(base);  // for good
  static PyType_Spec spec = {"gankern._nodes.PlainForward", 0, 0, Py_TPFLAGS_DEFAULT | Py_TPFLAGS_BASETYPE,
                             slots};
  spec.basicsize = int(partial->tp_basicsize + sizeof(Known));
  PyObject* const made = PyType_FromSpecWithBases(&spec, base);
  if (!made) throw python_error();
  return made;
}

const Functions functions = {method("plain_forward", entry<plain_forward, 1>)};

}  // namespace
}  // namespace gankern::nodes
