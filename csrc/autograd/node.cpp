#include "node.h"

#include <ATen/functorch/BatchedTensorImpl.h>
// Its functions of the same names would be found in the other one's calls of its own.
#define isBatchedTensor isLegacyBatchedTensor
#define unsafeGetBatchedImpl unsafeGetLegacyBatchedImpl
#define maybeGetBatchedImpl maybeGetLegacyBatchedImpl
#include <ATen/LegacyBatchedTensorImpl.h>
#undef isBatchedTensor
#undef unsafeGetBatchedImpl
#undef maybeGetBatchedImpl
#include <ATen/ops/_add_batch_dim.h>
#include <ATen/ops/_remove_batch_dim.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>
#include <ATen/ops/stack.h>
#include <ATen/ops/zeros.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/variable.h>
#include <torch/csrc/dynamo/compiled_autograd.h>
#include <torch/csrc/utils/pybind.h>

#include <algorithm>
#include <mutex>

#include "zeros.h"

namespace gankern::nodes {

namespace {

using torch::autograd::Node;
using torch::autograd::SavedVariable;
using torch::autograd::variable_list;

bool any_defined(const Tensors& tensors) {
  return std::any_of(tensors.begin(), tensors.end(), [](const Tensor& t) { return t.defined(); });
}
// Kernels take no sparse gradients, as an embedding's may be; with grad mode on, the change is recorded.
Tensor dense(const Tensor& t) { return t.defined() && t.layout() != at::kStrided ? t.to_dense() : t; }

bool any_requires_grad(const Tensors& tensors) {
  return std::any_of(tensors.begin(), tensors.end(),
                     [](const Tensor& t) { return t.defined() && t.requires_grad(); });
}

Tensors concat(const Tensors& a, const Tensors& b) {
  Tensors all(a);
  all.insert(all.end(), b.begin(), b.end());
  return all;
}

void set_outputs(const NodePtr& node, const Tensors& outputs) {
  for (const Tensor& y : outputs) torch::autograd::set_history(y, node);
}

struct OfRule : Recorded {
  RulePtr rule;
  explicit OfRule(RulePtr r) : rule(std::move(r)) {}
  std::string key() const override {
    return std::string(rule->primitive()) + "," + rule->implementation + "," + bytes(rule->options());
  }

  // What is kept, in blocks of one tensor a layer and one that belongs to all; of the layers without a gradient, which
  // somebody may have overwritten or released, nothing.
  Tensors unpack_reached(const Tensors& arrived) {
    const std::lock_guard<std::mutex> lock(mutex_);
    const size_t layers = rule->layers();
    Tensors tensors(saved.size());
    reached_.assign(layers, false);
    for (size_t i = 0; i < layers; ++i) reached_[i] = arrived[i].defined();
    for (size_t i = 0; i < saved.size(); ++i)
      if (const size_t layer = i % (layers + 1); layer == layers || reached_[layer])
        tensors[i] = saved[i].unpack(getptr());
    return tensors;
  }

  void release_variables() override {
    if (!rule->layers()) return Recorded::release_variables();
    const std::lock_guard<std::mutex> lock(mutex_);
    for (size_t i = 0; i < saved.size(); ++i)
      if (const size_t layer = i % (reached_.size() + 1); layer < reached_.size() && reached_[layer])
        saved[i].reset_data();
  }

 private:
  std::vector<bool> reached_;  // by the last backward; what belongs to all stays
};

// What torch makes of a tensor that stands for a batch of them: torch.func.vmap's, or, of a kind of its own, that of
// torch.autograd.grad(..., is_grads_batched=True). Several may be around each other; a level names one.
struct Batch {
  bool legacy;
  int64_t level;

  // The innermost that any of the tensors is of.
  static std::optional<Batch> of(const Tensors& tensors) {
    std::optional<Batch> found;
    for (const Tensor& t : tensors) {
      if (!t.defined()) continue;
      const auto* of_legacy = at::maybeGetLegacyBatchedImpl(t);
      const auto* functorch = of_legacy ? nullptr : at::functorch::maybeGetBatchedImpl(t);
      if (!of_legacy && !functorch) continue;
      const Batch batch{of_legacy != nullptr,
                        of_legacy ? of_legacy->bdims().back().level() : functorch->level()};
      if (!found || std::pair(batch.legacy, batch.level) > std::pair(found->legacy, found->level))
        found = batch;
    }
    return found;
  }

  // Its values, along the first dimension; undefined for a tensor that is the same for all entries.
  Tensor values(const Tensor& t) const {
    if (!t.defined()) return {};
    if (legacy) {
      const auto* batched = at::maybeGetLegacyBatchedImpl(t);
      const bool has = batched && batched->bdims().back().level() == level;
      return has ? at::_remove_batch_dim(t, level, 0, 0) : Tensor();
    }
    const auto* batched = at::functorch::maybeGetBatchedImpl(t);
    return batched && batched->level() == level ? batched->value().movedim(batched->bdim(), 0) : Tensor();
  }

  Tensor made_of(const Tensor& values) const {
    return legacy ? at::_add_batch_dim(values, 0, level) : at::functorch::addBatchDim(values, 0, level);
  }
};

// Of a gradient of second order: refuses.
struct Third final : OfRule {
  using OfRule::OfRule;
  std::string name() const override { return std::string("GankernThirdOrder_") + rule->primitive(); }
  variable_list apply_once(variable_list&&) override { rule->refuse_third_order(); }
  Work work() const override { rule->refuse_third_order(); }
};

// Of a gradient of first order. Keeps the gradients of the outputs, then what the forward kept.
struct Second final : OfRule {
  size_t outputs = 0;
  Witness witness;

  using OfRule::OfRule;
  std::string name() const override { return std::string("GankernDoubleBackward_") + rule->primitive(); }

  variable_list apply_once(variable_list&& grad_grads) override {
    if (!any_defined(grad_grads)) return variable_list(num_outputs());
    for (Tensor& g : grad_grads) g = dense(g);
    const Tensors all = rule->layers() ? unpack_reached(grad_grads) : unpack(0, saved.size());
    const Tensors grads(all.begin(), all.begin() + outputs), kept(all.begin() + outputs, all.end());
    refuse_tangents(rule->primitive(), grad_grads);
    refuse_tangents(rule->primitive(), grads);
    Needed needed = asked();
    needed.resize(saved.size());  // without the token's
    const bool recording =
        at::GradMode::is_enabled() &&
        (any_requires_grad(grad_grads) || any_requires_grad(grads) || any_requires_grad(kept));
    Tensors results;
    {
      const BelowAutograd guard;
      results = or_memory_error([&] { return rule->double_backward(needed, grad_grads, grads, kept); });
    }
    if (recording) {
      auto* third = new Third(rule);
      const NodePtr node = owned(third);
      for (const Tensor& t : concat(grad_grads, concat(grads, kept))) third->depends_on(t);
      set_outputs(node, results);
    }
    results.resize(num_outputs());
    if (witness) witness.note(*this, saved.size(), &results);
    return results;
  }

  std::string key() const override {
    return OfRule::key() + "," + std::to_string(outputs) + "," + witness.key();
  }
  Work work() const override {
    return [rule = rule, outputs = outputs](Needed needed, Tensors grad_grads, const Tensors& tensors) {
      for (Tensor& g : grad_grads) g = dense(g);
      const auto middle = tensors.begin() + int64_t(outputs);
      const size_t count = needed.size();
      needed.resize(tensors.size());
      Tensors results =
          rule->double_backward(needed, grad_grads, {tensors.begin(), middle}, {middle, tensors.end()});
      results.resize(count);
      return results;
    };
  }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    Recorded::compiled_args(args);
    witness.collect(args);
  }
  void traced(const Tensors&, Tensors* results, torch::dynamo::autograd::SwapSavedVariables* swap) override {
    if (witness) witness.note(*this, saved.size(), results, swap);
  }
};

// Of a forward.
struct First final : OfRule {
  using OfRule::OfRule;
  std::string name() const override { return std::string("GankernBackward_") + rule->primitive(); }
  size_t layers() const override { return rule->layers(); }

  variable_list apply_once(variable_list&& grads) override {
    if (!any_defined(grads)) return variable_list(num_outputs());
    for (Tensor& g : grads) g = dense(g);
    const Tensors kept = rule->layers() ? unpack_reached(grads) : unpack_kept();
    refuse_tangents(rule->primitive(), grads);
    refuse_tangents(rule->primitive(), kept);
    const Needed needed = asked();
    const bool recording =
        at::GradMode::is_enabled() && (any_requires_grad(grads) || any_requires_grad(kept));
    Tensors results;
    {
      const BelowAutograd guard;
      results = or_memory_error([&] { return rule->backward(needed, grads, kept); });
    }
    if (recording) {
      auto* second = new Second(rule);
      const NodePtr node = owned(second);
      if (rule->layers()) grads.emplace_back();  // of what belongs to all
      second->outputs = grads.size();
      for (const Tensor& t : grads) {
        second->depends_on(t);
        second->saved.emplace_back(t, false);
      }
      for (const Tensor& t : kept) {
        second->depends_on(rule->bends() ? t : Tensor());
        second->saved.emplace_back(t, false);
      }
      if (rule->pieces()) {
        second->witness = Witness(getptr());
        second->witness.attach(second);
      }
      set_outputs(node, results);
    }
    return results;
  }

  // The others may have been overwritten.
  size_t first_for_work() const override { return rule->spares() ? saved.size() - rule->spares() : 0; }
  Work work() const override {
    return [rule = rule](const Needed& needed, Tensors grads, const Tensors& kept) {
      for (Tensor& g : grads) g = dense(g);
      return rule->backward(needed, grads, rule->spares() ? rule->again(kept) : kept);
    };
  }

 private:
  Tensors unpack_kept() {
    const size_t kept = saved.size() - rule->spares();
    if (!rule->spares()) return unpack(0, kept);
    try {
      return unpack(0, kept);
    } catch (const c10::Error&) {  // one of them was overwritten
      return rule->again(unpack(kept, saved.size()));
    }
  }
};

}  // namespace

Tensors Recorded::unpack(size_t begin, size_t end) {
  const std::lock_guard<std::mutex> lock(mutex_);
  Tensors tensors;
  tensors.reserve(end - begin);
  for (size_t i = begin; i < end; ++i) tensors.push_back(saved[i].unpack(getptr()));
  return tensors;
}

void Recorded::release_variables() {
  const std::lock_guard<std::mutex> lock(mutex_);
  for (SavedVariable& s : saved) s.reset_data();
}

void Recorded::compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  args.collect(key());
  for (bool needed : asked()) args.collect(needed);
  for (size_t i = first_for_work(); i < saved.size(); ++i) args.collect(saved[i], /*is_output=*/true);
}

variable_list Recorded::apply_with_saved(const variable_list& grads,
                                         torch::dynamo::autograd::SwapSavedVariables& swap) {
  variable_list results(num_outputs());
  if (!any_defined(grads)) return results;
  const auto unpacked = [this] {
    Tensors tensors;
    for (size_t i = first_for_work(); i < saved.size(); ++i) tensors.push_back(saved[i].unpack(getptr()));
    return tensors;
  };
  const Needed needed = asked(), there = exist(needed, grads, unpacked());
  for (size_t i = first_for_work(); i < saved.size(); ++i) swap.before(saved[i]);
  results = trace(name(), work(), needed, there, grads, unpacked(), next_edges(), swap);
  traced(grads, &results, &swap);
  for (size_t i = first_for_work(); i < saved.size(); ++i) swap.after(saved[i]);
  return results;
}

variable_list Recorded::apply(variable_list&& grads) {
  const auto batch = Batch::of(grads);
  if (!batch) return apply_once(std::move(grads));
  Tensors values;
  int64_t size = 0;
  for (const Tensor& g : grads) {
    values.push_back(batch->values(g));
    if (values.back().defined()) size = values.back().size(0);
  }
  std::vector<Tensors> found(num_outputs());
  for (int64_t i = 0; i < std::max<int64_t>(size, 1); ++i) {
    variable_list entry;
    for (size_t j = 0; j < grads.size(); ++j) {
      const Tensor& all = values[j];
      entry.push_back(!all.defined() ? grads[j]
                      : size ? all.select(0, i)
                             : at::zeros(all.sizes().slice(1), all.options()));  // for its results' sizes
    }
    const Tensors results = apply(std::move(entry));  // which another batch may be around
    for (size_t j = 0; j < results.size(); ++j)
      if (results[j].defined()) found[j].push_back(results[j]);
  }
  variable_list results(found.size());
  for (size_t j = 0; j < found.size(); ++j)
    if (!found[j].empty()) results[j] = batch->made_of(at::stack(found[j]).narrow(0, 0, size));
  return results;
}

Needed Recorded::exist(const Needed& needed, const Tensors& grads, const Tensors& kept) const {
  const at::NoGradGuard constant;
  const BelowAutograd guard;
  Tensors grads_like(grads.size()), kept_like(kept.size());
  for (size_t i = 0; i < grads.size(); ++i)
    if (grads[i].defined())
      grads_like[i] = at::empty_symint(input_metadata(i).shape_as_dim_vector(),
                                       input_metadata(i).options().device(at::kMeta));
  for (size_t i = 0; i < kept.size(); ++i)
    if (kept[i].defined()) kept_like[i] = at::empty_like(kept[i], kept[i].options().device(at::kMeta));
  const Tensors results = work()(needed, grads_like, kept_like);
  Needed there(needed.size());
  for (size_t i = 0; i < results.size(); ++i) there[i] = needed[i] && results[i].defined();
  return there;
}

Tensors trace(const std::string& name, const Work& work, const Needed& needed, const Needed& exist,
              const Tensors& grads, const Tensors& kept, const torch::autograd::edge_list& edges,
              torch::dynamo::autograd::SwapSavedVariables& swap) {
  using namespace torch::dynamo::autograd;
  const auto call = [work, needed, exist](const variable_list& given,
                                          const std::vector<c10::IValue>& packed) {
    const at::NoGradGuard constant;
    const BelowAutograd guard;
    Tensors results = work(needed, given, PackedArgs(packed).unpack<Tensors>());
    for (size_t i = 0; i < results.size(); ++i)
      if (!exist[i]) results[i] = Tensor();
    return results;
  };
  PackedArgs packed;
  packed.pack(kept);
  const auto& compiler = getPyCompilerInterface();
  const std::string bound =
      compiler->bind_function(swap.get_py_compiler(), name, call, {IValuePacker<Tensors>::packed_type()},
                              /*is_custom_function=*/true, /*is_traceable=*/false);
  const auto metadata = IValuePacker<std::vector<std::optional<torch::autograd::InputMetadata>>>::pack(
      get_input_metadata(edges));
  Tensors results = compiler->call_function(swap.get_py_compiler(), "apply_functional", bound, grads,
                                            packed.vec(), metadata);
  for (size_t i = 0; i < results.size(); ++i)
    if (!exist[i]) results[i] = Tensor();
  return results;
}

Needed Recorded::asked() const {
  Needed needed(num_outputs());
  for (size_t i = 0; i < needed.size(); ++i) needed[i] = task_should_compute_output(i);
  return needed;
}

void Recorded::depends_on(const Tensor& t) {
  add_next_edge(t.defined() && t.requires_grad() ? torch::autograd::impl::gradient_edge(t)
                                                 : torch::autograd::Edge());
}

void raise_memory_error(const char* what) {
  const pybind11::gil_scoped_acquire gil;
  PyErr_SetString(PyExc_MemoryError, what);
  python_error error;
  error.persist();
  throw error;
}

void refuse_tangents(const char* primitive, const Tensors& tensors) {
  for (const Tensor& t : tensors)
    TORCH_CHECK_NOT_IMPLEMENTED(!torch::autograd::isFwGradDefined(t), primitive,
                                ": its backward has no forward-mode derivative (jvp); pass "
                                "implementation='reference', which has every order");
}

void Rule::refuse_third_order() const {
  TORCH_CHECK(false, primitive(), ": the ", implementation,
              " implementation is exact to gradient order 2, and a higher one was asked for; pass "
              "implementation='reference', which has every order");
}

void record(RulePtr rule, at::ArrayRef<const Tensor*> inputs, at::ArrayRef<const Tensor*> outputs,
            at::ArrayRef<Kept> saved, bool in_place) {
  auto* first = new First(std::move(rule));
  const NodePtr node = owned(first);
  for (const Tensor* t : inputs) first->depends_on(*t);
  for (const Tensor* y : outputs) {
    if (in_place)
      torch::autograd::impl::rebase_history(*y, {node, first->add_input_metadata(*y)});
    else
      torch::autograd::set_history(*y, node);
  }
  for (const Kept& kept : saved) first->saved.emplace_back(kept.tensor, kept.output);
}

}  // namespace gankern::nodes
