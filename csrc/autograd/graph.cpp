// What a penalty has to know of a graph that autograd recorded (gankern/penalties/_double_backward.py), and of a network.
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/basic_ops.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/utils/object_ptr.h>

#include <unordered_set>

#include "call.h"

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

// (tensors) -> (the leaves of their graph, its nodes that only raise an error, the least of its nodes' numbers)
PyObject* of_tensors(PyObject* const* in) {
  if (!PyTuple_CheckExact(in[0])) return decline();
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
    }
    for (const auto& edge : node->next_edges())
      if (edge.function) stack.push_back(edge.function);
  }
  THPObjectPtr first(listed(leaves)), second(listed(errors)), third(PyLong_FromUnsignedLongLong(least));
  if (!third) throw python_error();
  PyObject* found = PyTuple_Pack(3, first.get(), second.get(), third.get());
  if (!found) throw python_error();
  return found;
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

const Functions functions = {method("graph", entry<of_tensors, 1>),
                             method("modules_of", entry<modules_of, 2>)};

}  // namespace graph
}  // namespace gankern::nodes
