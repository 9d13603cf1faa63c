// gankern.fast_double_backward in torch's dispatcher: what gankern/core/double_backward.py says, without Python. The
// entries are there for good once they were asked for; where the running thread does not want them they call torch's
// kernels, so that nothing has to be taken out of the table while another thread is on its way into it.
#include <ATen/ThreadLocalPythonObjects.h>
#include <ATen/ops/convolution.h>
#include <ATen/ops/convolution_backward.h>
#include <torch/csrc/PyInterpreter.h>
#include <torch/library.h>

#include <atomic>

#include "call.h"
#include "zeros.h"

namespace gankern::nodes {
namespace double_backward {

std::atomic<bool> permanent{false};

// As _is_on has it there. torch passes what a thread keeps here on to the engine's threads.
bool is_on() {
  using Kept = at::impl::ThreadLocalPythonObjects;
  static const std::string blocks = "gankern.fast_double_backward";
  if (permanent.load(std::memory_order_relaxed)) return true;
  return Kept::contains(blocks) && Kept::get(blocks)->ptr(getPyInterpreter()) != Py_None;
}

struct Entry : c10::OperatorKernel {
  explicit Entry(c10::SafeKernelFunction kernel) : original(std::move(kernel)) {}
  const c10::SafeKernelFunction original;
};

// (ggI, ggW, ggb, gO, weight, input, stride, padding, dilation, transposed, output_padding, groups, output_mask)
struct Convolution : Entry {
  using Entry::Entry;

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    if (!is_on()) return original.callBoxed(op, keys, stack);
    constexpr size_t kArguments = 13;
    const std::vector<c10::IValue> in(stack->end() - kArguments, stack->end());
    const auto tensor = [&](size_t i) { return in[i].isNone() ? Tensor() : in[i].toTensor(); };
    const Tensor to_x = tensor(0), to_w = tensor(1), grad = tensor(3), weight = tensor(4), x = tensor(5);
    Tensor to_b = tensor(2);
    const auto stride = in[6].toSymIntVector(), padding = in[7].toSymIntVector(),
               dilation = in[8].toSymIntVector(), output_padding = in[10].toSymIntVector();
    const bool transposed = in[9].toBool();
    const c10::SymInt groups = in[11].toSymInt();
    const auto needed = in[12].toBoolList();
    const auto convolve = [&](const Tensor& x, const Tensor& w, const Tensor& b) {
      return at::convolution_symint(x, w, optional(b), stride, padding, dilation, transposed, output_padding,
                                    groups);
    };
    const auto backward = [&](const Tensor& x, const Tensor& w, std::array<bool, 3> mask) {
      return at::convolution_backward_symint(grad, x, w, std::nullopt, stride, padding, dilation, transposed,
                                             output_padding, groups, mask);
    };

    Tensor results[3];
    if (needed[0]) {
      for (const auto& [input, kernel] : {std::pair(to_x, weight), std::pair(x, to_w)}) {
        if (!input.defined() || !kernel.defined()) continue;
        const Tensor term = convolve(input, kernel, to_b);
        results[0] = results[0].defined() ? results[0] + term : term;
        to_b = Tensor();
      }
      if (to_b.defined()) {
        std::vector<int64_t> along_channels(grad.dim() - 1, 1);
        along_channels[0] = -1;
        results[0] = to_b.view(along_channels).expand_as(grad);
      }
    }
    if (needed[1] && to_w.defined()) results[1] = std::get<0>(backward(x, to_w, {true, false, false}));
    if (needed[2] && to_x.defined()) results[2] = std::get<1>(backward(to_x, weight, {false, true, false}));
    torch::jit::drop(*stack, kArguments);
    for (Tensor& result : results) stack->emplace_back(std::move(result));
  }
};

// (gradient, input, ...)
struct ConstantInInput : Entry {
  using Entry::Entry;

  void operator()(const c10::OperatorHandle& op, c10::DispatchKeySet keys, torch::jit::Stack* stack) {
    if (!is_on()) return original.callBoxed(op, keys, stack);
    c10::IValue* const arguments = &(*stack)[stack->size() - op.schema().arguments().size()];
    const Tensor input = arguments[1].toTensor();
    if (is_left_to_torch(arguments[0].toTensor()) || is_left_to_torch(input) || !input.requires_grad() ||
        !at::GradMode::is_enabled() || !takes_calls() || transformed())
      return original.callBoxed(op, keys, stack);
    arguments[1] = input.detach();
    original.callBoxed(op, keys, stack);
    const pybind11::gil_scoped_acquire held;
    stack->back() =
        carry(stack->back().toTensor(),
              Witness(torch::autograd::impl::gradient_edge(input).function, Witness::kZeros, input));
  }

  // Sparse tensors, which have no views, and forward mode, which has rules for torch's operators alone.
  static bool is_left_to_torch(const Tensor& t) {
    return t.layout() != at::kStrided || torch::autograd::isFwGradDefined(t);
  }
};

void replace(const std::string& name, const std::string& device) {
  // Overriding is what this is for; torch would warn of it.
  struct : c10::WarningHandler {
    void process(const c10::Warning&) override {}
  } silent;
  const c10::WarningUtils::WarningHandlerGuard guard(&silent);
  static auto* library = new torch::Library(torch::Library::IMPL, "aten", std::nullopt, __FILE__, __LINE__);
  const auto key = c10::parseDispatchKey(device);
  const auto kernel = c10::Dispatcher::singleton()
                          .findSchemaOrThrow(("aten::" + name).c_str(), "")
                          .getComputedKernelForDispatchKey(key);
  auto put = [&](auto entry) {
    library->impl(name.c_str(),
                  torch::dispatch(key, torch::CppFunction::makeFromBoxedFunctor(std::move(entry))));
  };
  if (name == "_convolution_double_backward")
    put(std::make_unique<Convolution>(kernel));
  else
    put(std::make_unique<ConstantInInput>(kernel));
}

// (whether it is on everywhere, the operators' names, devices' dispatch keys): the entries are there from then on
PyObject* fast_double_backward(PyObject* const* in) {
  permanent = in[0] == Py_True;  // of entries that are there already, whoever answers now
  if (!takes_calls()) return decline();
  static bool there = false;
  if (!there) {
    there = true;
    for (const auto& name : py::handle(in[1]))
      for (const auto& device : py::handle(in[2]))
        replace(name.cast<std::string>(), device.cast<std::string>());
  }
  Py_RETURN_NONE;
}

const Functions functions = {method("fast_double_backward", entry<fast_double_backward, 3>)};

}  // namespace double_backward
}  // namespace gankern::nodes
