// gankern's C++ autograd nodes as a Python module, for the one version of torch that it was built for
// (gankern/core/native.py loads it).
#include <torch/csrc/PyInterpreter.h>

#include <cstdlib>
#include <cstring>

#include "call.h"

namespace gankern::nodes {
namespace {

// Counts up where what Python passes to a function here changes: gankern/core/native.py has the same number.
constexpr int kInterface = 4;

// Set up once, by `start`.
PyObject *registry, *thread, *wish, *last, *forward_ad, *level, *own_mode;
bool enabled = false;  // until `start`

// Of all files; filled before the module is made, as the library is loaded.
std::vector<PyMethodDef>& methods() {
  static std::vector<PyMethodDef> all;
  return all;
}

// (gankern.core.dispatch's state of a thread, its registry, torch.autograd.forward_ad's own names)
PyObject* start(PyObject* const* in) {
  wish = PyUnicode_InternFromString("wish");
  last = PyUnicode_InternFromString("last");
  thread = Py_NewRef(in[0]);
  registry = Py_NewRef(in[1]);
  forward_ad = Py_NewRef(in[2]);
  level = PyUnicode_InternFromString("_current_level");
  enabled = true;
  Py_RETURN_NONE;
}

// (a class of function modes that have no interest in this library's own functions)
PyObject* set_own_mode(PyObject* const* in) {
  own_mode = Py_NewRef(in[0]);
  Py_RETURN_NONE;
}

// (whether functions here take calls) -> whether they did before
PyObject* enable(PyObject* const* in) {
  PyObject* before = PyBool_FromLong(enabled);
  enabled = in[0] == Py_True;
  return before;
}

int dtype_index(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return 0;
    case at::kFloat: return 1;
    case at::kBFloat16: return 2;
    default: return 3;
  }
}

py::object of_thread(PyObject* name) {
  PyObject* value = PyObject_GetAttr(thread, name);
  if (!value) throw python_error();
  return py::reinterpret_steal<py::object>(value);
}

void set_last(Primitive& primitive, PyObject* name) {
  if (PyDict_SetItem(of_thread(last).ptr(), primitive.key(), name) < 0) throw python_error();
}

const Functions functions_of_module = {method("start", entry<start, 3>),
                                       method("set_own_mode", entry<set_own_mode, 1>),
                                       method("enable", entry<enable, 1>)};

}  // namespace

Functions::Functions(std::initializer_list<PyMethodDef> functions) {
  methods().insert(methods().end(), functions);
}

PyObject* Primitive::key() {
  if (!key_) key_ = PyUnicode_InternFromString(name);
  return key_;
}

bool plain() {
  constexpr c10::DispatchKeySet kWatching({
      c10::DispatchKey::FuncTorchDynamicLayerFrontMode,
      c10::DispatchKey::FuncTorchDynamicLayerBackMode,
      c10::DispatchKey::Python,
      c10::DispatchKey::PythonTLSSnapshot,
      c10::DispatchKey::PreDispatch,
      c10::DispatchKey::Functionalize,
      c10::DispatchKey::Tracer,
  });
  if (!enabled || c10::impl::tls_local_dispatch_key_set().included_.has_any(kWatching)) return false;
  using Modes = at::impl::PythonTorchFunctionTLS;
  for (int64_t i = 0; i < Modes::stack_len(); ++i)
    if (reinterpret_cast<PyObject*>(Py_TYPE(Modes::get_stack_at(i)->ptr(getPyInterpreter()))) != own_mode)
      return false;
  return PyLong_AsLong(PyDict_GetItem(forward_ad, level)) < 0;  // as gankern.core.torch_internals has it
}

bool left_to_auto(PyObject* implementation) {
  if (implementation != Py_None) return false;
  const char* variable = std::getenv("GANKERN_IMPLEMENTATION");
  return !(variable && *variable) && of_thread(wish).is_none();
}

const char* selected(Primitive& primitive, PyObject* object, PyObject* implementation) {
  const Tensor& like = THPVariable_Unpack(object);
  if (!(like.is_cpu() || like.is_cuda())) return nullptr;
  if (implementation == Py_None ? !left_to_auto(implementation) : !PyUnicode_CheckExact(implementation))
    return nullptr;
  Primitive::Choice& choice = primitive.choices[like.is_cuda()][dtype_index(like)];
  if (!choice.name) {
    const py::object chosen = py::reinterpret_borrow<py::dict>(registry)[primitive.key()].attr("select")(
        py::handle(object), "auto");
    choice.name = PyUnicode_InternFromString(chosen.cast<std::string>().c_str());
    choice.text = PyUnicode_AsUTF8(choice.name);
  }
  if (implementation != Py_None && PyUnicode_Compare(implementation, choice.name) != 0) return nullptr;
  // Only the operators of torch.ops.gankern are called from here, and CUDA C++ has others.
  for (const char* other : {"reference", "cuda"})
    if (std::strcmp(choice.text, other) == 0) return nullptr;
  set_last(primitive, choice.name);
  return choice.text;
}

void put_on_record(Primitive& primitive, bool engine) {
  static PyObject *const cpu = PyUnicode_InternFromString("cpu"), *const reference =
                                                                      PyUnicode_InternFromString("reference");
  set_last(primitive, engine ? cpu : reference);
}

}  // namespace gankern::nodes

PyMODINIT_FUNC PyInit__nodes() {
  using namespace gankern::nodes;
  static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "gankern._nodes", "Differentiable calls in C++.",
                                   -1};
  if (!definition.m_methods) {
    methods().push_back({nullptr, nullptr, 0, nullptr});
    definition.m_methods = methods().data();
  }
  PyObject* module = PyModule_Create(&definition);
  if (module && PyModule_AddIntConstant(module, "interface", kInterface) < 0) Py_CLEAR(module);
  return module;
}
