// What a penalty has to know of a graph that autograd recorded (gankern/penalties/_double_backward.py), and of a network.
#include <ATen/ops/zeros.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/utils/object_ptr.h>

#include <unordered_set>

#include "call.h"
#include "zeros.h"

namespace gankern::nodes {
namespace graph {

using torch::autograd::Node;
using Pointer = decltype(torch::autograd::Edge::function);  // of another kind in each torch

PyObject* listed(const std::vector<THPObjectPtr>& objects) {
  PyObject* list = PyTuple_New(Py_ssize_t(objects.size()));
  if (!list) throw python_error();
  for (size_t i = 0; i < objects.size(); ++i)
    PyTuple_SET_ITEM(list, Py_ssize_t(i), Py_NewRef(objects[i].get()));
  return list;
}

constexpr const char* kKeptBack = "gankern zeros that are kept back";
using KeptBackPtr = std::shared_ptr<KeptBack>;

// (tensors, from which recorded backward on zeros are kept back, or None) -> (the leaves of their graph, its
// nodes that only raise an error, the least of its nodes' numbers, what `with_zeros` takes: None where no zeros
// are kept back)
PyObject* of_tensors(PyObject* const* in) {
  if (!PyTuple_CheckExact(in[0])) return decline();
  int64_t since = 0;
  const KeptBackPtr kept_back = integer(in[1], &since) ? std::make_shared<KeptBack>() : nullptr;
  bool keeps_back = false;
  std::vector<Pointer> stack;
  for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(in[0]); ++i) {
    PyObject* object = PyTuple_GET_ITEM(in[0], i);
    if (!THPVariable_Check(object)) return decline();
    if (auto node = THPVariable_Unpack(object).grad_fn()) stack.push_back(std::move(node));
  }
  std::unordered_set<Node*> seen;
  std::vector<THPObjectPtr> leaves, errors;
  uint64_t least = std::numeric_limits<uint64_t>::max();
  while (!stack.empty()) {
    const Pointer node = std::move(stack.back());
    stack.pop_back();
    if (!seen.insert(node.get()).second) continue;
    least = std::min(least, node->sequence_nr());
    if (auto* leaf = dynamic_cast<torch::autograd::AccumulateGrad*>(node.get())) {
      leaves.emplace_back(THPVariable_Wrap(leaf->variable));
      if (!leaves.back()) throw python_error();
    } else if (dynamic_cast<torch::autograd::Error*>(node.get()) ||
               dynamic_cast<torch::autograd::DelayedError*>(node.get())) {
      errors.emplace_back(torch::autograd::functionToPyObject(node));
      if (!errors.back()) throw python_error();
    } else if (kept_back) {
      keeps_back |= keep_back(node.get(), uint64_t(since), kept_back);
    }
    for (const auto& edge : node->next_edges())
      if (edge.function) stack.push_back(edge.function);
  }
  THPObjectPtr first(listed(leaves)), second(listed(errors)), third(PyLong_FromUnsignedLongLong(least));
  THPObjectPtr fourth(keeps_back ? PyCapsule_New(new KeptBackPtr(kept_back), kKeptBack,
                                                 [](PyObject* capsule) {
                                                   delete static_cast<KeptBackPtr*>(
                                                       PyCapsule_GetPointer(capsule, kKeptBack));
                                                 })
                                 : Py_NewRef(Py_None));
  if (!third || !fourth) throw python_error();
  PyObject* found = PyTuple_Pack(4, first.get(), second.get(), third.get(), fourth.get());
  if (!found) throw python_error();
  return found;
}

constexpr int64_t kSmall = 4096;  // values of a leaf whose zeros lie beside others'

// (what `graph` gave, leaves, a gradient or None for each) -> the gradients; zeros in place of None where these
// were kept back. Those of small leaves are parts of one tensor, made at once.
PyObject* with_zeros(PyObject* const* in) {
  if (!PyTuple_CheckExact(in[1]) || !PyTuple_CheckExact(in[2])) return decline();
  const auto* kept_back = static_cast<KeptBackPtr*>(PyCapsule_GetPointer(in[0], kKeptBack));
  if (!kept_back) throw python_error();
  const Py_ssize_t count = PyTuple_GET_SIZE(in[1]);
  Tensors leaves;
  for (Py_ssize_t i = 0; i < count; ++i) leaves.push_back(THPVariable_Unpack(PyTuple_GET_ITEM(in[1], i)));
  const std::vector<bool> wanted = (*kept_back)->among(leaves);
  Tensors zeros(leaves.size());
  {
    const BelowAutograd below;
    std::vector<size_t> small;  // alike
    int64_t total = 0;
    for (size_t i = 0; i < leaves.size(); ++i) {
      if (!wanted[i] || PyTuple_GET_ITEM(in[2], Py_ssize_t(i)) != Py_None) continue;
      const Tensor &leaf = leaves[i], &first = leaves[small.empty() ? i : small[0]];
      if (leaf.numel() <= kSmall && leaf.is_contiguous() && leaf.scalar_type() == first.scalar_type() &&
          leaf.device() == first.device()) {
        small.push_back(i);
        total += leaf.numel();
      } else {
        zeros[i] = at::zeros_like(leaf);
      }
    }
    const Tensor all = small.empty() ? Tensor() : at::zeros({total}, leaves[small[0]].options());
    int64_t begin = 0;
    for (const size_t i : small) {
      zeros[i] = all.narrow(0, begin, leaves[i].numel()).view(leaves[i].sizes());
      begin += leaves[i].numel();
    }
  }
  THPObjectPtr all(PyTuple_New(count));
  if (!all) throw python_error();
  for (Py_ssize_t i = 0; i < count; ++i) {
    PyObject* each = zeros[i].defined() ? THPVariable_Wrap(zeros[i]) : Py_NewRef(PyTuple_GET_ITEM(in[2], i));
    if (!each) throw python_error();
    PyTuple_SET_ITEM(all.get(), i, each);
  }
  return all.release();
}

// gankern.core.torch_internals.modules_of
PyObject* modules_of(PyObject* const* in) {
  static PyObject* const name = PyUnicode_InternFromString("_modules");
  if (!PyTuple_CheckExact(in[1])) return decline();
  std::vector<THPObjectPtr> stack, found;
  std::unordered_set<PyObject*> seen{in[0]};
  stack.emplace_back(Py_NewRef(in[0]));
  while (!stack.empty()) {
    THPObjectPtr module = std::move(stack.back());
    stack.pop_back();
    THPObjectPtr inner(PyObject_GetAttr(module.get(), name));
    if (!inner.get()) return PyErr_Clear(), decline();
    if (!PyDict_CheckExact(inner.get())) return decline();
    Py_ssize_t place = 0;
    PyObject* child;
    while (PyDict_Next(inner.get(), &place, nullptr, &child))
      if (child != Py_None && seen.insert(child).second) stack.emplace_back(Py_NewRef(child));
    const int is_one = PyObject_IsInstance(module.get(), in[1]);
    if (is_one < 0) throw python_error();
    if (is_one) found.push_back(std::move(module));
  }
  return listed(found);
}

const Functions functions = {method("graph", entry<of_tensors, 2>),
                             method("with_zeros", entry<with_zeros, 3>),
                             method("modules_of", entry<modules_of, 2>)};

}  // namespace graph
}  // namespace gankern::nodes
