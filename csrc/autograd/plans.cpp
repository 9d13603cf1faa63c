// Launchers of Triton kernels whose plans are known, without Python: gankern/triton/tracing.py writes down what a
// launcher allocates and launches for a signature, and where that is all that it does, it is done here. Everything
// else, and whatever this file cannot vouch for, goes Python's way.
#include <ATen/core/boxing/KernelFunction.h>
#include <ATen/core/stack.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <dlfcn.h>
#include <torch/csrc/jit/python/pybind_utils.h>
#include <torch/csrc/utils/object_ptr.h>

#include <memory>
#include <stdexcept>
#include <string>
#include <unordered_map>

#include "launch.h"

namespace gankern::nodes {
namespace plans {

using launch::Words;
using Given =
    c10::SmallVector<const Tensor*, 24>;   // the tensors among the arguments, those of lists among them
using Made = c10::SmallVector<Tensor, 8>;  // what the launcher allocates, in its order

// ---- CUDA's driver: what Triton's own launcher calls (triton/backends/nvidia/driver.py), in its order ---------

struct Driver {
  struct Config {  // CUlaunchConfig
    unsigned x, y, z, threads_x, threads_y, threads_z, shared;
    void* stream;
    void* attributes;
    unsigned attribute_count;
  };
  int (*cuCtxGetCurrent)(void**);
  int (*cuDeviceGet)(int*, int);
  int (*cuDevicePrimaryCtxRetain)(void**, int);
  int (*cuCtxSetCurrent)(void*);
  int (*cuLaunchKernelEx)(const Config*, void*, void**, void**);
  int (*cuGetErrorString)(int, const char**);
  bool found = false;

  Driver() {
    void* library = dlopen("libcuda.so.1", RTLD_LAZY);  // which torch has loaded, where it runs on CUDA
    if (!library) return;
    const auto look_up = [&](const char* name, auto** function) {
      *function = reinterpret_cast<std::remove_pointer_t<decltype(function)>>(dlsym(library, name));
      return *function != nullptr;
    };
    found = look_up("cuCtxGetCurrent", &cuCtxGetCurrent) && look_up("cuDeviceGet", &cuDeviceGet) &&
            look_up("cuDevicePrimaryCtxRetain", &cuDevicePrimaryCtxRetain) &&
            look_up("cuCtxSetCurrent", &cuCtxSetCurrent) && look_up("cuLaunchKernelEx", &cuLaunchKernelEx) &&
            look_up("cuGetErrorString", &cuGetErrorString);
  }

  void check(int result) const {
    if (result == 0) return;
    const char* text = nullptr;
    cuGetErrorString(result, &text);
    throw std::runtime_error(std::string("Triton Error [CUDA]: ") + (text ? text : ""));
  }

  // A thread that has not called CUDA's runtime yet has no context.
  void ensure_context() const {
    void* context;
    check(cuCtxGetCurrent(&context));
    if (context) return;
    int device;
    check(cuDeviceGet(&device, 0));
    check(cuDevicePrimaryCtxRetain(&context, device));
    check(cuCtxSetCurrent(context));
  }
};

const Driver& driver() {
  static const Driver loaded;
  return loaded;
}

// In the driver's place, for tests without a device: called with what the driver would be, and for tensors of the
// CPU too. Null for none.
PyObject* recorder = nullptr;
int64_t recorder_device = 0;  // which stands for the current one

// ---- plans ------------------------------------------------------------------------------------------------

struct Parameter {
  enum From : int64_t { kNumber, kGiven, kMade };
  From from;
  int64_t value;  // the number, or which tensor
};

struct Kernel {
  void* function;
  unsigned x, y, z, threads, shared;
  std::vector<Parameter> parameters;

  void launch(uint64_t stream, const Given& given, const Made& made) const;
};

// What a launcher returns, from left to right; a tuple's and a list's length, and which tensor, stands behind it.
enum Result : int64_t { kNothing, kGivenTensor, kMadeTensor, kTupleOf, kListOf };

struct Plan {
  int64_t device;  // -1 for the CPU: only for a recorder
  size_t given;    // how many tensors the arguments have
  Words layouts;   // of what is allocated
  struct Lies {
    size_t made;
    int64_t at;  // its address, between multiples of 16
  };
  std::vector<Lies> conditions;  // of the compiled kernels, on what is allocated
  std::vector<Kernel> kernels;
  std::vector<int64_t> result;

  // Allocates and launches. False, and nothing is launched, where this is not what Python would do now.
  bool run(const Given& given, Made* made) const;
};
using PlanPtr = std::shared_ptr<const Plan>;

uint64_t address(const Tensor& t) { return reinterpret_cast<uint64_t>(t.data_ptr()); }

void Kernel::launch(uint64_t stream, const Given& given, const Made& made) const {
  const size_t count = parameters.size();
  // Behind the kernel's own parameters two more, of memory that Triton provides where a kernel asks for it.
  c10::SmallVector<uint64_t, 32> values(count + 2);
  for (size_t i = 0; i < count; ++i) {
    const auto& [from, value] = parameters[i];
    values[i] = from == Parameter::kNumber  ? uint64_t(value)
                : from == Parameter::kGiven ? address(*given[value])
                                            : address(made[value]);
  }
  if (recorder) {
    const pybind11::gil_scoped_acquire gil;
    PyObject* const bytes = PyBytes_FromStringAndSize(reinterpret_cast<const char*>(values.data()),
                                                      Py_ssize_t(count * sizeof(values[0])));
    const THPObjectPtr recorded(bytes ? PyObject_CallFunction(recorder, "KIIIIIKN",
                                                              reinterpret_cast<uint64_t>(function), x, y, z,
                                                              threads, shared, stream, bytes)
                                      : nullptr);
    if (!recorded.get()) throw python_error();
    return;
  }
  c10::SmallVector<void*, 32> pointers(count + 2);
  for (size_t i = 0; i < pointers.size(); ++i) pointers[i] = &values[i];
  const Driver::Config config{x, y, z, threads, 1, 1, shared, reinterpret_cast<void*>(stream), nullptr, 0};
  driver().check(driver().cuLaunchKernelEx(&config, function, pointers.data(), nullptr));
}

// Whether a plan's device is the current one, and its current stream.
bool ready(int64_t device, uint64_t* stream) {
  if (recorder) {
    *stream = uint64_t(device);
    return device < 0 || device == recorder_device;
  }
  if (device < 0 || !driver().found || !c10::impl::hasDeviceGuardImpl(c10::DeviceType::CUDA)) return false;
  const auto* cuda = c10::impl::getDeviceGuardImpl(c10::DeviceType::CUDA);
  const c10::Device current = cuda->getDevice();
  if (current.index() != device) return false;
  *stream = reinterpret_cast<uint64_t>(cuda->getStreamNativeHandle(cuda->getStream(current)));
  return true;
}

bool Plan::run(const Given& tensors, Made* made) const {
  uint64_t stream;
  if (tensors.size() != given || !ready(device, &stream)) return false;
  // All of it first, and in the launcher's order: of memory that comes and goes launches know nothing.
  for (const int64_t* at = layouts.begin(); at < layouts.end(); at = launch::next_layout(at))
    made->push_back(launch::empty(at));
  for (const Lies& condition : conditions)
    if (int64_t(address((*made)[condition.made]) & 15) != condition.at) return made->clear(), false;
  if (!recorder && !kernels.empty()) driver().ensure_context();
  for (const Kernel& kernel : kernels) kernel.launch(stream, tensors, *made);
  return true;
}

// ---- plans, as Python makes and keeps them ----------------------------------------------------------------

constexpr const char* kCapsule = "gankern plan";

struct Reader {  // of whole numbers in bytes
  const int64_t *at, *end;
  explicit Reader(PyObject* bytes)
      : at(reinterpret_cast<const int64_t*>(PyBytes_AS_STRING(bytes))),
        end(at + PyBytes_GET_SIZE(bytes) / sizeof(int64_t)) {}
  int64_t next() {
    TORCH_CHECK_VALUE(at < end, "a plan that ends too early");
    return *at++;
  }
};

void check_place(int64_t place, size_t count) {
  TORCH_CHECK_VALUE(place >= 0 && size_t(place) < count, "a plan of a tensor that it does not have");
}

// (device, how many tensors are given, `layouts` of those that are made, kernels, the result) -> a plan. Of a kernel:
// its function, three sizes of its grid, threads, shared memory, how many parameters, and of each Parameter::From, its
// value, and where a tensor that is made has to lie between multiples of 16. All of them whole numbers in bytes.
PyObject* plan(PyObject* const* in) {
  int64_t device, given;
  if (!integer(in[0], &device) || !integer(in[1], &given)) return decline();
  for (int i = 2; i < 5; ++i)
    if (!PyBytes_CheckExact(in[i])) return decline();
  auto made = std::make_shared<Plan>();
  made->device = device;
  made->given = size_t(given);
  const Reader layouts(in[2]);
  made->layouts.append(layouts.at, layouts.end);
  size_t count = 0;
  for (const int64_t* at = made->layouts.begin(); at < made->layouts.end(); at = launch::next_layout(at))
    ++count;
  for (Reader numbers(in[3]); numbers.at < numbers.end;) {
    Kernel kernel;
    kernel.function = reinterpret_cast<void*>(numbers.next());
    for (unsigned* number : {&kernel.x, &kernel.y, &kernel.z, &kernel.threads, &kernel.shared})
      *number = unsigned(numbers.next());
    kernel.parameters.resize(numbers.next());
    for (auto& [from, value] : kernel.parameters) {
      from = Parameter::From(numbers.next());
      value = numbers.next();
      const int64_t at = numbers.next();
      if (from != Parameter::kNumber) check_place(value, from == Parameter::kMade ? count : made->given);
      if (from == Parameter::kMade) made->conditions.push_back({size_t(value), at});
    }
    made->kernels.push_back(std::move(kernel));
  }
  for (Reader numbers(in[4]); numbers.at < numbers.end;) {
    const int64_t kind = numbers.next();
    made->result.push_back(kind);
    if (kind == kNothing) continue;
    made->result.push_back(numbers.next());
    if (kind == kGivenTensor || kind == kMadeTensor)
      check_place(made->result.back(), kind == kMadeTensor ? count : made->given);
  }
  return PyCapsule_New(new PlanPtr(std::move(made)), kCapsule, [](PyObject* capsule) {
    delete static_cast<PlanPtr*>(PyCapsule_GetPointer(capsule, kCapsule));
  });
}

// gankern/triton/launch.py's names and state of a thread, triton.knobs.runtime and .compilation.
PyObject *names = nullptr, *state, *runtime, *compilation;

// (these four): from now on they are asked
PyObject* set_launching(PyObject* const* in) {
  state = Py_NewRef(in[1]);
  runtime = Py_NewRef(in[2]);
  compilation = Py_NewRef(in[3]);
  names = Py_NewRef(in[0]);
  Py_RETURN_NONE;
}

bool is_empty_list(PyObject* owner, PyObject* name) {
  static PyObject* const calls = PyUnicode_InternFromString("calls");
  THPObjectPtr hooks(PyObject_GetAttr(owner, name));
  const THPObjectPtr list(hooks.get() ? PyObject_GetAttr(hooks.get(), calls) : nullptr);
  return list.get() && PyList_CheckExact(list.get()) && PyList_GET_SIZE(list.get()) == 0;
}

bool has_no_attributes(PyObject* object) {
  const THPObjectPtr dictionary(PyObject_GenericGetDict(object, nullptr));
  return dictionary.get() && PyDict_CheckExact(dictionary.get()) && PyDict_GET_SIZE(dictionary.get()) == 0;
}

// Whether launchers go by their plans now, and these by handle: as `planned` and `_nobody_listens` there.
bool by_handle() {
  static PyObject *const by_handle = PyUnicode_InternFromString("BY_HANDLE"),
                         *const held_off = PyUnicode_InternFromString("_held_off"),
                         *const tracing = PyUnicode_InternFromString("tracing"),
                         *const enter = PyUnicode_InternFromString("launch_enter_hook"),
                         *const exit = PyUnicode_InternFromString("launch_exit_hook");
  if (!names || PyDict_GetItem(names, by_handle) != Py_True) return false;
  PyObject* const held = PyDict_GetItem(names, held_off);
  if (!held || PyObject_IsTrue(held)) return false;
  const THPObjectPtr traced(PyObject_GetAttr(state, tracing));
  const bool free = traced.get() == Py_None && has_no_attributes(runtime) && has_no_attributes(compilation) &&
                    is_empty_list(runtime, enter) && is_empty_list(runtime, exit);
  PyErr_Clear();
  return free;
}

// The plan for a key, with the interpreter's lock held; null for none that is known here.
PlanPtr look_up(PyObject* plans, PyObject* key) {
  PyObject* const entry =
      PyDict_GetItemWithError(plans, key);  // (Python's plan, its device, one of this file or None)
  if (!entry) {
    if (PyErr_Occurred()) throw python_error();
    return nullptr;
  }
  PyObject* const capsule = PyTuple_GET_ITEM(entry, 2);
  if (capsule == Py_None) return nullptr;
  return *static_cast<PlanPtr*>(PyCapsule_GetPointer(capsule, kCapsule));
}

// ---- launchers that Python calls --------------------------------------------------------------------------

using Objects = c10::SmallVector<PyObject*, 24>;

void tensors_of(PyObject* arguments, Objects* objects) {
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(arguments); ++i) {
    PyObject* argument = PyTuple_GET_ITEM(arguments, i);
    if (THPVariable_CheckExact(argument)) {
      objects->push_back(argument);
    } else if (PyList_CheckExact(argument) || PyTuple_CheckExact(argument)) {
      for (Py_ssize_t k = 0; k < PySequence_Fast_GET_SIZE(argument); ++k)
        if (PyObject* entry = PySequence_Fast_GET_ITEM(argument, k); THPVariable_CheckExact(entry))
          objects->push_back(entry);
    }
  }
}

PyObject* as_object(const int64_t** at, const Objects& given, const Made& made) {
  const int64_t kind = *(*at)++;
  if (kind == kNothing) return Py_NewRef(Py_None);
  const int64_t number = *(*at)++;
  if (kind == kGivenTensor) return Py_NewRef(given[number]);
  if (kind == kMadeTensor) return THPVariable_Wrap(made[number]);
  THPObjectPtr all(kind == kTupleOf ? PyTuple_New(number) : PyList_New(number));
  if (!all) throw python_error();
  for (int64_t i = 0; i < number; ++i) {
    PyObject* entry = as_object(at, given, made);
    if (!entry) throw python_error();
    if (kind == kTupleOf)
      PyTuple_SET_ITEM(all.get(), i, entry);
    else
      PyList_SET_ITEM(all.get(), i, entry);
  }
  return all.release();
}

// (a launcher's plans, its arguments, whether the size of a tensor's memory matters) -> a tuple of its result alone,
// where it went by its plan here; else the arguments' signature
PyObject* by_plan(PyObject* const* in) {
  Words words;
  if (!PyDict_CheckExact(in[0]) || !launch::put(in[1], in[2] == Py_True, &words)) return decline();
  THPObjectPtr key(launch::key_of(words));
  const PlanPtr plan = by_handle() ? look_up(in[0], key.get()) : nullptr;
  if (!plan) return key.release();
  Objects objects;
  tensors_of(in[1], &objects);
  c10::SmallVector<Tensor, 24> held;  // another thread may change what a list or a tensor's object holds
  held.reserve(objects.size());
  Given given;
  for (PyObject* object : objects) held.push_back(THPVariable_Unpack(object));
  for (const Tensor& t : held) given.push_back(&t);
  Made made;
  const bool ran = [&] {
    const pybind11::gil_scoped_release released;
    return plan->run(given, &made);
  }();
  if (!ran) return key.release();
  const int64_t* at = plan->result.data();
  THPObjectPtr result(PyTuple_New(1));
  if (!result) throw python_error();
  PyObject* value = as_object(&at, objects, made);
  if (!value) throw python_error();
  PyTuple_SET_ITEM(result.get(), 0, value);
  return result.release();
}

// ---- operators whose kernels for CUDA are launchers -------------------------------------------------------

// The words of an operator's argument, as `launch::put` has those of what Python makes of it.
bool put(const c10::IValue& value, int depth, Words* words, Given* given) {
  if (value.isTensor()) {
    const Tensor& t = value.toTensor();
    if (!t.defined()) return words->push_back(launch::kNone), true;
    if (!launch::strided(t)) return false;
    launch::put_tensor(t, false, words);
    given->push_back(&t);
  } else if (value.isNone()) {
    words->push_back(launch::kNone);
  } else if (value.isBool()) {
    words->push_back(value.toBool() ? launch::kTrue : launch::kFalse);
  } else if (value.isInt()) {
    words->append({launch::kInteger, value.toInt()});
  } else if (value.isDouble()) {
    launch::put_fraction(value.toDouble(), words);
  } else if (value.isString()) {
    launch::put_text(value.toStringRef().data(), value.toStringRef().size(), words);
  } else if (value.isList() && depth < 1) {
    const c10::ArrayRef<c10::IValue> entries = value.toListRef();
    words->push_back(launch::counted(launch::kList, entries.size()));
    for (const c10::IValue& entry : entries)
      if (!put(entry, depth + 1, words, given)) return false;
  } else {
    return false;
  }
  return true;
}

bool is_tensor(int64_t kind) { return kind == kNothing || kind == kGivenTensor || kind == kMadeTensor; }

// The next of an operator's results, of a plan that `fits`.
c10::IValue as_value(const int64_t** at, const c10::Type& type, const Given& given, const Made& made) {
  const auto tensor = [&] {
    const int64_t kind = *(*at)++;
    if (kind == kNothing) return Tensor();
    const int64_t number = *(*at)++;
    return kind == kGivenTensor ? *given[number] : made[number];
  };
  if (type.kind() == c10::TypeKind::TensorType) return tensor();
  c10::List<Tensor> list;
  const int64_t count = (*at)[1];
  *at += 2;
  for (int64_t i = 0; i < count; ++i) list.push_back(tensor());
  return list;
}

// Whether a plan's result is one of the operator's: Python's way says what is wrong with another one.
bool fits(const std::vector<int64_t>& result, const std::vector<c10::Argument>& returns) {
  const int64_t* at = result.data();
  if (returns.empty()) return *at == kNothing;
  if (returns.size() > 1) {
    if ((*at != kTupleOf && *at != kListOf) || at[1] != int64_t(returns.size())) return false;
    at += 2;
  }
  for (const c10::Argument& each : returns) {
    const c10::Type& type = *each.real_type();
    int64_t count = 1;
    if (type.kind() == c10::TypeKind::ListType) {
      if (*at != kListOf ||
          type.castRaw<c10::ListType>()->getElementType()->kind() != c10::TypeKind::TensorType)
        return false;
      count = at[1];
      at += 2;
    } else if (type.kind() != c10::TypeKind::TensorType) {
      return false;
    }
    const bool within = type.kind() == c10::TypeKind::ListType;
    for (int64_t i = 0; i < count; ++i) {
      if (!is_tensor(*at) || (within && *at == kNothing)) return false;
      at += *at == kNothing ? 1 : 2;
    }
  }
  return true;
}

struct Operator : c10::OperatorKernel {
  PyObject* launcher;         // for good, as operators are
  PyObject* plans = nullptr;  // once Python has the launcher's

  explicit Operator(PyObject* python) : launcher(Py_NewRef(python)) {}

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet, torch::jit::Stack* stack) {
    if (!by_plan(op.schema(), stack)) by_python(op.schema(), stack);
  }

 private:
  bool by_plan(const c10::FunctionSchema& schema, torch::jit::Stack* stack) const {
    Words words;
    Given given;
    const auto arguments = torch::jit::last(*stack, schema.arguments().size());
    words.push_back(launch::counted(launch::kTuple, arguments.size()));
    for (const c10::IValue& argument : arguments)
      if (!put(argument, 0, &words, &given)) return false;
    const PlanPtr plan = [&]() -> PlanPtr {
      const pybind11::gil_scoped_acquire gil;
      if (!plans || !by_handle()) return nullptr;
      THPObjectPtr key(launch::key_of(words));
      return look_up(plans, key.get());
    }();
    const auto& returns = schema.returns();
    Made made;
    if (!plan || !fits(plan->result, returns) || !plan->run(given, &made)) return false;
    c10::SmallVector<c10::IValue, 6> results(returns.size());
    const int64_t* at = plan->result.data() + (returns.size() > 1 ? 2 : 0);
    for (size_t i = 0; i < returns.size(); ++i)
      results[i] = as_value(&at, *returns[i].real_type(), given, made);
    torch::jit::drop(*stack, schema.arguments().size());
    for (c10::IValue& result : results) stack->push_back(std::move(result));
    return true;
  }

  // As torch calls a kernel that is a function of Python.
  void by_python(const c10::FunctionSchema& schema, torch::jit::Stack* stack) const {
    auto arguments = torch::jit::pop(*stack, schema.arguments().size());
    const pybind11::gil_scoped_acquire gil;
    py::tuple given(arguments.size());
    for (size_t i = 0; i < arguments.size(); ++i) given[i] = torch::jit::toPyObject(std::move(arguments[i]));
    const auto result = py::reinterpret_steal<py::object>(PyObject_CallObject(launcher, given.ptr()));
    if (!result) {
      python_error error;
      error.persist();
      throw error;
    }
    const auto& returns = schema.returns();
    if (returns.empty()) {
      TORCH_CHECK(result.is_none(), schema.name(), ": a launcher returns what its operator does not");
    } else if (returns.size() == 1) {
      stack->push_back(torch::jit::toIValue(result, returns[0].real_type()));
    } else {
      const auto results = py::cast<py::sequence>(result);
      TORCH_CHECK(results.size() == returns.size(), schema.name(), ": a launcher returns ", results.size(),
                  " results, its operator ", returns.size());
      for (size_t i = 0; i < returns.size(); ++i)
        stack->push_back(torch::jit::toIValue(py::object(results[i]), returns[i].real_type()));
    }
  }
};

std::unordered_map<std::string, Operator*>& operators() {
  static auto* all = new std::unordered_map<std::string, Operator*>;
  return *all;
}

// (an operator's name, the function of Python that is its kernel for CUDA): registers that, and goes by plans where
// `share_plans` brings them
PyObject* implement(PyObject* const* in) {
  const char* name = PyUnicode_AsUTF8(in[0]);
  if (!name) throw python_error();
  auto kernel = std::make_unique<Operator>(in[1]);
  operators()[name] = kernel.get();
  // Never taken back: the operators are there as long as the process.
  static auto* registered = new std::vector<c10::RegistrationHandleRAII>;
  registered->push_back(c10::Dispatcher::singleton().registerImpl(
      {name, ""}, c10::DispatchKey::CUDA, c10::KernelFunction::makeFromBoxedFunctor(std::move(kernel)),
      std::nullopt, nullptr, "gankern's launchers"));
  Py_RETURN_NONE;
}

// (an operator's name, the plans of its launcher)
PyObject* share_plans(PyObject* const* in) {
  const char* name = PyUnicode_AsUTF8(in[0]);
  if (!name) throw python_error();
  if (!PyDict_CheckExact(in[1])) return decline();
  const auto found = operators().find(name);
  if (found == operators().end()) return decline();
  found->second->plans = Py_NewRef(in[1]);
  Py_RETURN_NONE;
}

// For tests. (what is called in the driver's place with a function, three sizes of a grid, threads, shared memory, the
// stream and the parameters in bytes, or None; the device that stands for the current one)
PyObject* record_launches(PyObject* const* in) {
  if (!integer(in[1], &recorder_device)) return decline();
  PyObject* before = recorder;
  recorder = in[0] == Py_None ? nullptr : Py_NewRef(in[0]);
  Py_XDECREF(before);
  Py_RETURN_NONE;
}

const Functions functions = {method("plan", entry<plan, 5>),
                             method("by_plan", entry<by_plan, 3>),
                             method("set_launching", entry<set_launching, 4>),
                             method("implement", entry<implement, 2>),
                             method("share_plans", entry<share_plans, 2>),
                             method("record_launches", entry<record_launches, 2>)};

}  // namespace plans
}  // namespace gankern::nodes
