// How a primitive is differentiated in C++: what gankern/core/autograd.py does with a Rule, without Python in
// the backward. Needs torch's full C++ API; where this library does not fit the running torch, Python does
// the same.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/Tensor.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/InferenceMode.h>
#include <c10/util/SmallVector.h>
#include <torch/csrc/autograd/function.h>
#include <torch/csrc/autograd/saved_variable.h>
#include <torch/csrc/python_headers.h>

#include <functional>
#include <memory>
#include <new>
#include <string>
#include <vector>

namespace torch::autograd {
TORCH_API void deleteNode(Node* function);  // there while nodes are held by std::shared_ptr
}

namespace gankern::nodes {

using at::Tensor;
using Tensors = std::vector<Tensor>;  // an undefined one is Python's None
using Needed = c10::SmallVector<bool, 12>;
using NodePtr = decltype(torch::autograd::Edge::function);
using Options = std::vector<double>;

// A primitive's gradients for given options; shared by the nodes of all orders of one call. The tensors are
// those of the Rule of the same name in gankern/ops: the arguments there say what comes and what is returned.
struct Rule {
  virtual ~Rule() = default;
  virtual const char* primitive() const = 0;
  // All that decides the gradients but the tensors: rules of one primitive with the same options give the same.
  virtual Options options() const = 0;
  // Gradients of the tensors that the forward recorded, for those of its outputs.
  virtual Tensors backward(const Needed& needed, const Tensors& grads, const Tensors& saved) const = 0;
  // Gradients of `grads`, then of `saved`, for those of what backward returned.
  virtual Tensors double_backward(const Needed& needed, const Tensors& grad_grads, const Tensors& grads,
                                  const Tensors& saved) const = 0;

  // The number of layers, where each output comes of the input of the same number alone and one more kept tensor
  // belongs to all: each is differentiated when its gradient comes, whatever became of the others.
  virtual size_t layers() const { return 0; }

  // Whether the result goes through a function that is linear in pieces: see gankern/core/zeros.py.
  virtual bool pieces() const { return false; }
  // Whether a gradient of second order comes to what the forward kept.
  virtual bool bends() const { return true; }

  // How many of the tensors that the forward keeps, the last ones, are there only for `again`: what the others
  // are, computed and recorded anew, for a result that was kept and then overwritten.
  virtual size_t spares() const { return 0; }
  virtual Tensors again(const Tensors& /*spares*/) const { return {}; }

  [[noreturn]] void refuse_third_order() const;

  const char* implementation = "cpu";
};
using RulePtr = std::shared_ptr<const Rule>;

// What a forward keeps: (tensor, whether it is one of its outputs).
struct Kept {
  const Tensor& tensor;
  bool output = false;
};

// Whether a forward of these tensors is to be recorded: not in inference mode, where the grad mode may be on.
inline bool records(std::initializer_list<const Tensor*> tensors) {
  if (!at::GradMode::is_enabled() || c10::InferenceMode::is_enabled()) return false;
  for (const Tensor* t : tensors)
    if (t->defined() && t->requires_grad()) return true;
  return false;
}

// A node's work without the node, for compiled autograd: which gradients are wanted, the gradients that came, what
// was kept -> the gradients.
using Work = std::function<Tensors(const Needed&, Tensors, const Tensors&)>;

// Compiled autograd puts a call of `work` into its graph, which runs as it is: Dynamo does not look into it. `exist`:
// which results there will be.
Tensors trace(const std::string& name, const Work& work, const Needed& needed, const Needed& exist,
              const Tensors& grads, const Tensors& kept, const torch::autograd::edge_list& edges,
              torch::dynamo::autograd::SwapSavedVariables& swap);

// The bytes of numbers, for a key.
template <class Numbers>
std::string bytes(const Numbers& numbers) {
  return std::string(reinterpret_cast<const char*>(numbers.data()), numbers.size() * sizeof(numbers[0]));
}

// What all nodes share: tensors that they keep for the backward.
struct Recorded : torch::autograd::Node {
  c10::SmallVector<torch::autograd::SavedVariable, 6> saved;

  // For compiled autograd, which keeps what it compiled by the nodes' keys: all that decides what the node does but
  // its tensors; its work; and, for a node with witnesses, what it notes while that is traced.
  virtual std::string key() const = 0;
  virtual Work work() const = 0;
  virtual size_t first_for_work() const { return 0; }  // of what is kept
  // Which results the work has, by running it on tensors without values.
  Needed exist(const Needed& needed, const Tensors& grads, const Tensors& kept) const;
  virtual void traced(const Tensors& /*grads*/, Tensors* /*results*/,
                      torch::dynamo::autograd::SwapSavedVariables* /*swap*/) {}
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override;
  torch::autograd::variable_list apply_with_saved(const torch::autograd::variable_list& grads,
                                                  torch::dynamo::autograd::SwapSavedVariables& swap) override;

  // Its work. Where a gradient stands for a batch of them (torch.vmap of a backward, is_grads_batched=True) it is done
  // for one after the other, so that nothing below meets such tensors, and what is recorded is recorded of the values.
  virtual torch::autograd::variable_list apply_once(torch::autograd::variable_list&& grads) = 0;
  torch::autograd::variable_list apply(torch::autograd::variable_list&& grads) final;

  void release_variables() override;
  // See Rule; of the node of a forward alone.
  virtual size_t layers() const { return 0; }
  // The lock is not held while a kernel runs, which may be Python's and wait for the interpreter's.
  Tensors unpack(size_t begin, size_t end);
  // Which gradients the running backward has a use for.
  Needed asked() const;
  // The next of its gradients is that of t, which may be undefined.
  void depends_on(const Tensor& t);
};

// As torch holds nodes: by std::shared_ptr in 2.11, by an intrusive pointer later.
template <class N, class Pointer = NodePtr>
Pointer owned(N* node) {
  if constexpr (std::is_same_v<Pointer, std::shared_ptr<torch::autograd::Node>>)
    return Pointer(node, torch::autograd::deleteNode);
  else
    return Pointer::unsafe_steal_from_new(node);
}

// body(), in a backward: a lack of memory becomes Python's MemoryError, where the engine would make a RuntimeError
// of it.
[[noreturn]] void raise_memory_error(const char* what);
template <class Body>
auto or_memory_error(Body body) -> decltype(body()) {
  try {
    return body();
  } catch (const std::bad_alloc& error) {
    raise_memory_error(error.what());
  }
}

// Forward mode has no rule for what runs in a backward: an error, rather than a tangent that is quietly lost.
void refuse_tangents(const char* primitive, const Tensors& tensors);

// Makes `outputs`, computed with autograd off, results of `inputs` by a rule. `in_place`: the output is the
// input.
void record(RulePtr rule, at::ArrayRef<const Tensor*> inputs, at::ArrayRef<const Tensor*> outputs,
            at::ArrayRef<Kept> saved, bool in_place = false);

// While operators are called that are not to be recorded.
using BelowAutograd = at::AutoDispatchBelowADInplaceOrView;

}  // namespace gankern::nodes
