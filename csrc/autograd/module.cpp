// gankern's C++ autograd nodes as a Python module, for the one version of torch that it was built for
// (gankern/core/native.py loads it).
#include <ATen/ThreadLocalPythonObjects.h>
#include <torch/csrc/PyInterpreter.h>

#include <algorithm>
#include <cstring>
#include <map>
#include <memory>
#include <vector>

#include "call.h"

namespace gankern::nodes {
namespace {

// Counts up where what Python passes to a function here changes: gankern/core/native.py has the same number.
constexpr int kInterface = 20;

// Set up once, by `start`.
PyObject *registry, *locals[kLocals], *wish, *last, *forward_ad, *level, *own_mode;
PyObject *precisions, *environment, *variable;
size_t large;          // bytes, above which a tensor on a GPU is a large one
bool enabled = false;  // until `start`

// Of all files; filled before the module is made, as the library is loaded.
std::vector<PyMethodDef>& methods() {
  static std::vector<PyMethodDef> all;
  return all;
}

// (gankern.core.dispatch's state of a thread, its registry, torch.autograd.forward_ad's own names, the dictionary of
// os.environ, the key of GANKERN_IMPLEMENTATION in it, gankern.core.dispatch.LARGE)
PyObject* start(PyObject* const* in) {
  wish = PyUnicode_InternFromString("wish");
  last = PyUnicode_InternFromString("last");
  locals[kDispatch] = Py_NewRef(in[0]);
  registry = Py_NewRef(in[1]);
  forward_ad = Py_NewRef(in[2]);
  environment = Py_NewRef(in[3]);
  variable = Py_NewRef(in[4]);
  large = PyLong_AsSize_t(in[5]);
  level = PyUnicode_InternFromString("_current_level");
  enabled = true;
  Py_RETURN_NONE;
}

// (gankern.core.precision's state of a thread, and its global names)
PyObject* set_precision(PyObject* const* in) {
  locals[kPrecision] = Py_NewRef(in[0]);
  precisions = Py_NewRef(in[1]);
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

// ---- whether functions of torch are what they were: gankern/core/torch_internals.py asks before anything runs in the
// place of one -----------------------------------------------------------------------------------------------------

// Counts up with every change of a dictionary; 0 where Python keeps no such count.
uint64_t version_of(PyObject* attributes) {
#if PY_VERSION_HEX < 0x030E0000
#pragma GCC diagnostic push
#pragma GCC diagnostic ignored "-Wdeprecated-declarations"
  return reinterpret_cast<PyDictObject*>(attributes)->ma_version_tag;
#pragma GCC diagnostic pop
#else
  return 0;
#endif
}

// The attributes of a module or class, and what some names in them meant; null for nothing.
struct Place {
  PyObject* attributes;
  std::vector<std::pair<PyObject*, PyObject*>> known;
  uint64_t version;  // at which they were looked at

  bool changed() {
    const uint64_t now = version_of(attributes);
    if (now && now == version) return false;
    for (const auto& [name, function] : known)
      if (PyDict_GetItem(attributes, name) != function) return true;
    version = now;
    return false;
  }
};
std::vector<Place> places;

// (a module or class, a name in it, what it means; NotImplemented for nothing). All of them are kept for good.
PyObject* watch_function(PyObject* const* in) {
  PyObject* const attributes =
      PyType_Check(in[0]) ? reinterpret_cast<PyTypeObject*>(in[0])->tp_dict : PyModule_GetDict(in[0]);
  if (!attributes) throw python_error();
  auto place = std::find_if(places.begin(), places.end(),
                            [&](const Place& each) { return each.attributes == attributes; });
  if (place == places.end()) place = places.insert(place, {Py_NewRef(attributes), {}, 0});
  place->known.emplace_back(Py_NewRef(in[1]), in[2] == Py_NotImplemented ? nullptr : Py_NewRef(in[2]));
  place->version = 0;
  Py_RETURN_NONE;
}

PyObject* functions_replaced(PyObject* const*) {
  for (Place& place : places)
    if (place.changed()) Py_RETURN_TRUE;
  Py_RETURN_FALSE;
}

// gankern.core.torch_internals.keep_in_thread: (a key, None, True, False or a small number). torch's own function wraps
// the value anew each time, and the thread that drops a wrapper last takes the interpreter's lock: a thread of the
// engine's or of a process group's, too, which while the interpreter ends is thrown out of frames that nothing may be
// thrown through. Here each value has one wrapper, for good.
PyObject* keep_in_thread(PyObject* const* in) {
  static auto* wrapped = new std::map<PyObject*, std::shared_ptr<c10::SafePyObject>>;
  const char* key = PyUnicode_AsUTF8(in[0]);
  if (!key) throw python_error();
  auto& wrapper = (*wrapped)[in[1]];
  if (!wrapper) wrapper = std::make_shared<c10::SafePyObject>(Py_NewRef(in[1]), getPyInterpreter());
  at::impl::ThreadLocalPythonObjects::set(key, wrapper);
  Py_RETURN_NONE;
}

int dtype_index(const Tensor& t) {
  switch (t.scalar_type()) {
    case at::kDouble: return 0;
    case at::kFloat: return 1;
    case at::kBFloat16: return 2;
    default: return 3;
  }
}

void set_last(Primitive& primitive, PyObject* name) {
  if (PyDict_SetItem(PyDict_GetItem(attributes(kDispatch), last), primitive.key(), name) < 0)
    throw python_error();
}

const Functions functions_of_module = {method("start", entry<start, 6>),
                                       method("set_own_mode", entry<set_own_mode, 1>),
                                       method("set_precision", entry<set_precision, 2>),
                                       method("enable", entry<enable, 1>),
                                       method("watch_function", entry<watch_function, 3>),
                                       method("functions_replaced", entry<functions_replaced, 0>),
                                       method("keep_in_thread", entry<keep_in_thread, 2>)};

}  // namespace

Functions::Functions(std::initializer_list<PyMethodDef> functions) {
  methods().insert(methods().end(), functions);
}

PyObject* Primitive::key() {
  if (!key_) key_ = PyUnicode_InternFromString(name);
  return key_;
}

PyObject* attributes(Local local) {
  // Asking the object takes longer than a small kernel. The attributes live as long as the thread's own dictionary.
  struct Known {
    uint64_t thread = 0;  // Python counts from 1, and gives no number twice
    PyObject *owner = nullptr, *attributes = nullptr;
  };
  static thread_local Known known[kLocals];
  Known& mine = known[local];
  const uint64_t thread = PyThreadState_GetID(PyThreadState_Get());
  PyObject* const owner = PyThreadState_GetDict();
  if (mine.thread != thread || mine.owner != owner) {
    PyObject* found = PyObject_GetAttrString(locals[local], "__dict__");
    if (!found) throw python_error();
    Py_DECREF(found);
    mine = {thread, owner, found};
  }
  return mine.attributes;
}

PyObject* convolution_precision() {
  static PyObject *const of_thread = PyUnicode_InternFromString("precision"), *const of_process =
                                                                                  PyUnicode_InternFromString(
                                                                                      "_precision");
  PyObject* const set = PyDict_GetItem(attributes(kPrecision), of_thread);
  return set != Py_None ? set : PyDict_GetItem(precisions, of_process);
}

bool takes_calls() { return enabled; }

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

namespace {
bool is_auto(PyObject* implementation) {
  static PyObject* const automatic = PyUnicode_InternFromString("auto");
  return implementation == automatic ||
         (PyUnicode_CheckExact(implementation) && PyUnicode_Compare(implementation, automatic) == 0);
}
}  // namespace

bool left_to_auto(PyObject* implementation) {
  if (implementation != Py_None) return is_auto(implementation);
  // getenv goes through all variables.
  PyObject* const asked = PyDict_GetItem(environment, variable);
  if (asked && PyObject_IsTrue(asked)) return false;
  return PyDict_GetItem(attributes(kDispatch), wish) == Py_None;
}

const char* selected(Primitive& primitive, PyObject* object, PyObject* implementation) {
  const Tensor& like = THPVariable_Unpack(object);
  if (!(like.is_cpu() || like.is_cuda())) return nullptr;
  const bool chooses = left_to_auto(implementation);
  if (!chooses && !PyUnicode_CheckExact(implementation)) return nullptr;
  const bool is_large = like.is_cuda() && like.nbytes() > large;
  Primitive::Choice& choice = primitive.choices[like.is_cuda()][is_large][dtype_index(like)];
  if (!choice.name) {
    const py::object chosen = py::reinterpret_borrow<py::dict>(registry)[primitive.key()].attr("select")(
        py::handle(object), "auto");
    choice.name = PyUnicode_InternFromString(chosen.cast<std::string>().c_str());
    choice.text = PyUnicode_AsUTF8(choice.name);
  }
  if (!chooses && PyUnicode_Compare(implementation, choice.name) != 0) return nullptr;
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
