// What gankern/triton/launch.py asks of tensors at every launch, for all of them in one call: their signature,
// their addresses, and new ones. What is known of a launch goes without Python: plans.cpp.
#include "launch.h"

#include <ATen/EmptyTensor.h>
#include <torch/csrc/utils/object_ptr.h>

#include <cstring>

namespace gankern::nodes {
namespace launch {

// ---- keys ---------------------------------------------------------------------------------------------

// Whole numbers as a key of Python's dictionaries: equal where all of them are. A tuple of as many objects would
// take longer to make than a kernel to launch.
struct Key {
  PyObject_VAR_HEAD;
  Py_hash_t hash;
  int64_t words[1];
};

Py_hash_t hash_of(const int64_t* words, size_t count) {
  // Two at a time, so that one multiplication need not wait for the other.
  constexpr uint64_t kOdd = 0x9E3779B97F4A7C15;
  uint64_t lanes[2] = {count, ~uint64_t(count)};
  for (size_t i = 0; i < count; ++i) {
    uint64_t& lane = lanes[i & 1];
    lane = (lane ^ uint64_t(words[i])) * kOdd;
    lane ^= lane >> 29;
  }
  const Py_hash_t hash = Py_hash_t((lanes[0] ^ (lanes[1] >> 7)) * kOdd);
  return hash == -1 ? -2 : hash;
}

Py_hash_t key_hash(PyObject* self) { return reinterpret_cast<Key*>(self)->hash; }

PyObject* key_compare(PyObject* a, PyObject* b, int operation) {
  if (Py_TYPE(a) != Py_TYPE(b) || (operation != Py_EQ && operation != Py_NE)) Py_RETURN_NOTIMPLEMENTED;
  const Key *one = reinterpret_cast<Key*>(a), *other = reinterpret_cast<Key*>(b);
  const bool equal = one->hash == other->hash && Py_SIZE(a) == Py_SIZE(b) &&
                     std::memcmp(one->words, other->words, Py_SIZE(a) * sizeof(int64_t)) == 0;
  return PyBool_FromLong(equal == (operation == Py_EQ));
}

Py_ssize_t key_length(PyObject* self) { return Py_SIZE(self); }

PyObject* key_item(PyObject* self, Py_ssize_t place) {
  if (place < 0 || place >= Py_SIZE(self)) {
    PyErr_SetString(PyExc_IndexError, "no such word");
    return nullptr;
  }
  return PyLong_FromLongLong(reinterpret_cast<Key*>(self)->words[place]);
}

PyTypeObject* key_type() {
  static PySequenceMethods sequence = {};
  static PyTypeObject type = {PyVarObject_HEAD_INIT(nullptr, 0)};
  static const bool ready = [] {
    sequence.sq_length = key_length;
    sequence.sq_item = key_item;
    type.tp_name = "gankern._nodes.Key";
    type.tp_doc = "Whole numbers, as a key.";
    type.tp_basicsize = offsetof(Key, words);
    type.tp_itemsize = sizeof(int64_t);
    type.tp_flags = Py_TPFLAGS_DEFAULT;
    type.tp_hash = key_hash;
    type.tp_richcompare = key_compare;
    type.tp_as_sequence = &sequence;
    type.tp_free = PyObject_Free;
    type.tp_dealloc = [](PyObject* self) { Py_TYPE(self)->tp_free(self); };
    return PyType_Ready(&type) == 0;
  }();
  if (!ready) throw python_error();
  return &type;
}

PyObject* key_of(const Words& words) {
  Key* key = PyObject_NewVar(Key, key_type(), Py_ssize_t(words.size()));
  if (!key) throw python_error();
  std::memcpy(key->words, words.data(), words.size() * sizeof(int64_t));
  key->hash = hash_of(words.data(), words.size());
  return reinterpret_cast<PyObject*>(key);
}

// ---- what is read -------------------------------------------------------------------------------------

bool strided(const Tensor& t) {
  constexpr c10::DispatchKeySet kOthers({
      c10::DispatchKey::Python,
      c10::DispatchKey::FuncTorchGradWrapper,
      c10::DispatchKey::FuncTorchBatched,
      c10::DispatchKey::Functionalize,
  });
  const c10::TensorImpl* impl = t.unsafeGetTensorImpl();
  return t.layout() == at::kStrided && !t.key_set().has_any(kOthers) && impl->has_storage() &&
         !impl->has_symbolic_sizes_strides();
}

// The same of a tensor or parameter of torch's own class; else nullptr.
const Tensor* strided(PyObject* object) {
  if (!THPVariable_CheckExact(object)) return nullptr;
  const Tensor& t = THPVariable_Unpack(object);
  return strided(t) ? &t : nullptr;
}

void put_tensor(const Tensor& t, bool by_memory, Words* words) {
  const int64_t address = int64_t(reinterpret_cast<intptr_t>(t.data_ptr()));
  const bool wide = by_memory && t.storage().nbytes() > 0x7FFFFFFF;
  const c10::Device device = t.device();
  words->push_back(kTensor | int64_t(t.scalar_type()) << 8 | int64_t(device.type()) << 16 |
                   int64_t(uint8_t(device.index())) << 24 | (address & 15) << 32 | int64_t(wide) << 36 |
                   t.dim() << 40);
  words->append(t.sizes().begin(), t.sizes().end());
  words->append(t.strides().begin(), t.strides().end());
}

void put_fraction(double fraction,
                  Words* words) {  // its bits: zeros have signs, and NaN is not equal to itself
  int64_t bits;
  std::memcpy(&bits, &fraction, sizeof bits);
  words->push_back(kFraction);
  words->push_back(bits);
}

void put_text(const char* text, size_t length, Words* words) {
  words->push_back(counted(kText, length));
  const size_t first = words->size();
  words->resize(first + (length + 7) / 8, 0);
  std::memcpy(words->data() + first, text, length);
}

bool put(PyObject* object, bool by_memory, int depth, Words* words) {
  if (object == Py_None) return words->push_back(kNone), true;
  if (object == Py_False || object == Py_True)
    return words->push_back(object == Py_True ? kTrue : kFalse), true;
  if (const Tensor* t = strided(object)) return put_tensor(*t, by_memory, words), true;
  if (PyLong_CheckExact(object)) {
    int64_t number;
    if (!integer(object, &number)) return false;
    words->push_back(kInteger);
    words->push_back(number);
    return true;
  }
  if (PyFloat_CheckExact(object)) return put_fraction(PyFloat_AS_DOUBLE(object), words), true;
  if (PyUnicode_CheckExact(object)) {
    Py_ssize_t length;
    const char* text = PyUnicode_AsUTF8AndSize(object, &length);
    if (!text) return PyErr_Clear(), false;
    return put_text(text, length, words), true;
  }
  if ((PyList_CheckExact(object) || PyTuple_CheckExact(object)) && depth < 2) {
    const Py_ssize_t length = PySequence_Fast_GET_SIZE(object);
    words->push_back(counted(PyList_CheckExact(object) ? kList : kTuple, length));
    for (Py_ssize_t i = 0; i < length; ++i)
      if (!put(PySequence_Fast_GET_ITEM(object, i), by_memory, depth + 1, words)) return false;
    return true;
  }
  return false;
}

bool put(PyObject* arguments, bool by_memory, Words* words) {
  return PyTuple_CheckExact(arguments) && put(arguments, by_memory, 0, words);
}

// (a launcher's arguments, whether the size of a tensor's memory matters) -> what tells its calls apart
PyObject* signature(PyObject* const* in) {
  Words words;
  if (!put(in[0], in[1] == Py_True, &words)) return decline();
  return key_of(words);
}

// (tensors or None, an int64 for each: how many bytes behind its first element) -> the addresses; 0 for None
PyObject* addresses(PyObject* const* in) {
  if (!PyTuple_CheckExact(in[0]) || !PyBytes_CheckExact(in[1])) return decline();
  const size_t count = PyTuple_GET_SIZE(in[0]);
  if (size_t(PyBytes_GET_SIZE(in[1])) != count * sizeof(int64_t)) return decline();
  const auto* behind = reinterpret_cast<const int64_t*>(PyBytes_AS_STRING(in[1]));
  Words words(count, 0);
  for (size_t i = 0; i < count; ++i) {
    PyObject* object = PyTuple_GET_ITEM(in[0], i);
    if (object == Py_None) continue;
    const Tensor* t = strided(object);
    if (!t) return decline();
    words[i] = int64_t(reinterpret_cast<intptr_t>(t->data_ptr())) + behind[i];
  }
  return key_of(words);
}

// ---- what is made -------------------------------------------------------------------------------------

// (tensors) -> what `allocate` makes such ones of, in bytes
PyObject* layouts(PyObject* const* in) {
  if (!PyTuple_CheckExact(in[0])) return decline();
  Words words;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(in[0]); ++i) {
    const Tensor* t = strided(PyTuple_GET_ITEM(in[0], i));
    if (!t || !(t->is_cpu() || t->is_cuda())) return decline();
    words.append({int64_t(t->scalar_type()), int64_t(t->device().type()), t->device().index(), t->dim()});
    words.append(t->sizes().begin(), t->sizes().end());
    words.append(t->strides().begin(), t->strides().end());
  }
  return PyBytes_FromStringAndSize(reinterpret_cast<const char*>(words.data()),
                                   Py_ssize_t(words.size() * sizeof(int64_t)));
}

Tensor empty(const int64_t* at) {
  const auto dtype = at::ScalarType(at[kDtype]);
  const auto type = c10::DeviceType(at[kDevice]);
  const at::IntArrayRef sizes(at + kFields, at[kDim]), strides(at + kFields + at[kDim], at[kDim]);
  if (type == at::kCPU) return Tensor(at::detail::empty_strided_cpu(sizes, strides, dtype));
  static const auto allocator =
      find<Tensor(c10::SymIntArrayRef, c10::SymIntArrayRef, std::optional<at::ScalarType>,
                  std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>)>(
          "aten::empty_strided");
  return allocator.redispatch(c10::DispatchKeySet(c10::DispatchKey::CUDA), c10::fromIntArrayRefSlow(sizes),
                              c10::fromIntArrayRefSlow(strides), dtype, at::kStrided,
                              at::Device(type, c10::DeviceIndex(at[kIndex])), std::nullopt);
}

// (layouts) -> a tuple of new tensors
PyObject* allocate(PyObject* const* in) {
  if (!PyBytes_CheckExact(in[0])) return decline();
  const auto* at = reinterpret_cast<const int64_t*>(PyBytes_AS_STRING(in[0]));
  const auto* end = at + PyBytes_GET_SIZE(in[0]) / sizeof(int64_t);
  Py_ssize_t count = 0;
  for (const auto* next = at; next < end; next = next_layout(next)) ++count;
  THPObjectPtr made(PyTuple_New(count));
  if (!made) throw python_error();
  for (Py_ssize_t i = 0; i < count; ++i, at = next_layout(at)) {
    PyObject* tensor = THPVariable_Wrap(empty(at));
    if (!tensor) throw python_error();
    PyTuple_SET_ITEM(made.get(), i, tensor);
  }
  return made.release();
}

const Functions functions = {method("signature", entry<signature, 2>),
                             method("addresses", entry<addresses, 2>), method("layouts", entry<layouts, 1>),
                             method("allocate", entry<allocate, 1>)};

}  // namespace launch
}  // namespace gankern::nodes
