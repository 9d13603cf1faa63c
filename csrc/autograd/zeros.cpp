#include "zeros.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>
#include <torch/csrc/autograd/python_cpp_function.h>
#include <torch/csrc/dynamo/compiled_autograd.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <thread>
#include <typeinfo>
#include <unordered_map>

#include "call.h"

namespace gankern::nodes {

using torch::autograd::AccumulateGrad;
using torch::autograd::Edge;
using torch::autograd::Node;
using torch::autograd::variable_list;

namespace {

void at_the_end(std::function<void()> callback) {
  torch::autograd::Engine::get_default_engine().queue_callback(std::move(callback));
}

}  // namespace

std::string Bits::key() const { return bytes(words_); }
void Bits::set(size_t i) {
  if (words_.size() <= i / 64) words_.resize(i / 64 + 1);
  words_[i / 64] |= uint64_t(1) << i % 64;
}
bool Bits::test(size_t i) const { return i / 64 < words_.size() && (words_[i / 64] >> i % 64 & 1); }
bool Bits::any() const {
  return std::any_of(words_.begin(), words_.end(), [](uint64_t word) { return word != 0; });
}
void Bits::operator|=(const Bits& other) {
  if (words_.size() < other.words_.size()) words_.resize(other.words_.size());
  for (size_t i = 0; i < other.words_.size(); ++i) words_[i] |= other.words_[i];
}

// Of the backwards through one that was recorded, by the engine's number, or where compiled autograd traces one, by
// the address of its compiler: the leaves that are to have zeros.
class Absent : public std::enable_shared_from_this<Absent> {
 public:
  const uint64_t number = made++;  // of the recorded backward, over all threads
  static std::atomic<uint64_t> made;

  using Task = std::pair<int, void*>;
  static Task running(void* compiler = nullptr) {
    return {compiler ? -1 : torch::autograd::get_current_graph_task_id(), compiler};
  }

  void note(const Bits& leaves, const Task& task) {
    bool first;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      first = of_task_.find(task) == of_task_.end();
      of_task_[task] |= leaves;
    }
    if (first && task.first >= 0) at_the_end([self = shared_from_this(), task] { self->forget(task); });
  }
  Bits noted(const Task& task) const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = of_task_.find(task);
    return found == of_task_.end() ? Bits() : found->second;
  }
  void forget(const Task& task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    of_task_.erase(task);
  }

 private:
  mutable std::mutex mutex_;  // a backward runs on a thread a device
  std::map<Task, Bits> of_task_;
};

std::atomic<uint64_t> Absent::made{0};

namespace {

// f(edge) for each of these; for one to a node of layers, for what comes before its layer instead.
template <class F>
void each_before(at::ArrayRef<Edge> edges, const F& f) {
  for (const Edge& edge : edges) {
    if (!edge.is_valid()) continue;
    const auto* recorded = dynamic_cast<const Recorded*>(edge.function.get());
    if (recorded && recorded->layers())
      each_before(recorded->next_edge(edge.input_nr), f);
    else
      f(edge);
  }
}

Tensor& leaf(const Edge& edge) { return static_cast<AccumulateGrad&>(*edge.function).variable; }

Tensor zeros_of(const Tensor& leaf) {
  const BelowAutograd guard;
  return at::zeros_like(leaf);
}
Tensor zeros_along(const Edge& edge) {
  if (dynamic_cast<AccumulateGrad*>(edge.function.get())) return zeros_of(leaf(edge));
  const BelowAutograd guard;
  return edge.function->input_metadata(edge.input_nr).zeros_like();
}

// Whether a node is of an autograd.Function that is none of this library's. It is run with zeros where nothing comes to
// it, and gives zeros to what is below, or whatever it likes.
bool is_of_others(const NodePtr& node) {
  if (std::strcmp(typeid(*node).name(), "N5torch8autograd6PyNodeE") != 0) return false;
  const pybind11::gil_scoped_acquire gil;
  const auto object = pybind11::reinterpret_steal<pybind11::object>(functionToPyObject(node));
  const auto name = object.attr("_forward_cls").attr("__module__").cast<std::string>();
  return name.compare(0, 8, "gankern.") != 0;
}

// Whether somebody sees the gradients that come to a node, or changes them. Leaves have theirs in any case.
bool is_watched(const NodePtr& node) {
  if (dynamic_cast<AccumulateGrad*>(node.get())) return false;
  return !(node->pre_hooks().empty() && node->post_hooks().empty() && node->tensor_pre_hooks().empty() &&
           node->retains_grad_hooks().empty()) ||
         is_of_others(node);
}

// Along edges to leaves, those that are wanted, in compiled autograd's graph.
Tensors traced_zeros(const torch::autograd::edge_list& edges, const Needed& wanted,
                     torch::dynamo::autograd::SwapSavedVariables& swap) {
  Tensors leaves(edges.size());
  for (size_t i = 0; i < edges.size(); ++i) {
    if (!wanted[i]) continue;
    swap.before(leaf(edges[i]));
    leaves[i] = leaf(edges[i]);
  }
  const auto work = [](const Needed& needed, const Tensors&, const Tensors& kept) {
    Tensors zeros(kept.size());
    for (size_t i = 0; i < kept.size(); ++i)
      if (needed[i]) zeros[i] = zeros_of(kept[i]);
    return zeros;
  };
  Tensors zeros(edges.size());
  if (std::any_of(wanted.begin(), wanted.end(), [](bool w) { return w; }))
    zeros = trace("GankernZeros", work, wanted, wanted, {}, leaves, edges, swap);
  for (size_t i = 0; i < edges.size(); ++i)
    if (wanted[i]) swap.after(leaf(edges[i]));
  return zeros;
}

// Its edges go to the collector before and to each of its leaves. Its output is a token, which nobody reads and
// which no gradient comes to.
struct Collector final : Node {
  std::shared_ptr<Absent> absent;
  size_t first;                         // the number of its first leaf
  std::shared_ptr<KeptBack> kept_back;  // what takes a note in place of zeros, if any

  Collector(std::shared_ptr<Absent> a, size_t f) : absent(std::move(a)), first(f) {}
  std::string name() const override { return "GankernZerosCollector"; }

  variable_list apply(variable_list&&) override {
    const Bits noted = absent->noted(Absent::running());
    variable_list zeros(num_outputs());
    for (size_t i = 1; i < zeros.size(); ++i) {
      if (!noted.test(first + i - 1) || !task_should_compute_output(i)) continue;
      if (kept_back)
        kept_back->add(leaf(next_edge(i)));
      else
        zeros[i] = zeros_of(leaf(next_edge(i)));
    }
    return zeros;
  }

  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    args.collect(std::to_string(first));
    for (size_t i = 1; i < num_outputs(); ++i) {
      args.collect(task_should_compute_output(i));
      args.collect(leaf(next_edge(i)));
    }
  }
  variable_list apply_with_saved(const variable_list&,
                                 torch::dynamo::autograd::SwapSavedVariables& swap) override {
    const Absent::Task task = Absent::running(swap.get_py_compiler());
    const Bits noted = absent->noted(task);
    if (first == 0) absent->forget(task);  // it comes last of the chain
    Needed wanted(num_outputs());
    for (size_t i = 1; i < wanted.size(); ++i)
      wanted[i] = noted.test(first + i - 1) && task_should_compute_output(i);
    return traced_zeros(next_edges(), wanted, swap);
  }
};

// One backward that is recorded, on one thread.
class RecordedBackward {
 public:
  using Key = std::pair<int, std::thread::id>;  // the engine's number

  // That of the running backward. It lives as long as the engine's task, also where that ends in an error; outside
  // of a backward (an operator called by hand) as long as the caller has it.
  static std::shared_ptr<RecordedBackward> running() {
    const int task = torch::autograd::get_current_graph_task_id();
    if (task < 0) return std::make_shared<RecordedBackward>(std::nullopt);
    const Key key(task, std::this_thread::get_id());
    {
      const std::lock_guard<std::mutex> lock(mutex);
      const auto found = all.find(key);
      if (found != all.end())
        if (auto backward = found->second.lock()) return backward;
    }
    auto backward = std::make_shared<RecordedBackward>(key);
    {
      const std::lock_guard<std::mutex> lock(mutex);
      all[key] = backward;
    }
    at_the_end([backward] {});
    return backward;
  }

  explicit RecordedBackward(std::optional<Key> key) : key_(key) {}
  ~RecordedBackward() {
    if (!key_) return;
    const std::lock_guard<std::mutex> lock(mutex);
    all.erase(*key_);
  }

  struct Below {
    NodePtr node;  // so that no other node has its place in memory
    Bits leaves;
    bool watched;  // it, or anything below it
  };

  // What is below a node; leaves that are new get a collector.
  const Below& walk(const NodePtr& root) {
    const size_t first = leaves_;
    std::vector<Edge> found;
    std::vector<NodePtr> stack{root};
    while (!stack.empty()) {
      const NodePtr node = stack.back();
      if (below_.count(node.get())) {
        stack.pop_back();
        continue;
      }
      bool known = true;
      each_before(node->next_edges(), [&](const Edge& edge) {
        if (below_.count(edge.function.get())) return;
        stack.push_back(edge.function);
        known = false;
      });
      if (!known) continue;
      stack.pop_back();
      Below below{node, {}, is_watched(node)};
      if (dynamic_cast<AccumulateGrad*>(node.get())) {
        below.leaves.set(leaves_++);
        found.emplace_back(node, 0);
      } else {
        each_before(node->next_edges(), [&](const Edge& edge) {
          const Below& before = below_.find(edge.function.get())->second;
          below.leaves |= before.leaves;
          below.watched |= before.watched;
        });
      }
      below_.emplace(node.get(), std::move(below));
    }
    if (!found.empty()) collect(first, found);
    return below_.find(root.get())->second;
  }

  const Tensor& token() const { return token_; }  // there since the first leaf was found
  const std::shared_ptr<Absent>& absent() const { return absent_; }

 private:
  void collect(size_t first, const std::vector<Edge>& leaves) {
    const NodePtr collector = owned(new Collector(absent_, first));
    collector->add_next_edge(token_.defined() ? torch::autograd::impl::gradient_edge(token_) : Edge());
    for (const Edge& leaf : leaves) collector->add_next_edge(leaf);
    const Tensor& variable = static_cast<AccumulateGrad&>(*leaves[0].function).variable;
    token_ = at::empty({}, at::TensorOptions(variable.device()).dtype(at::kFloat));
    torch::autograd::set_history(token_, collector);
  }

  static std::mutex mutex;
  static std::map<Key, std::weak_ptr<RecordedBackward>> all;

  std::optional<Key> key_;
  std::unordered_map<Node*, Below> below_;
  size_t leaves_ = 0;
  Tensor token_;  // of the newest collector
  std::shared_ptr<Absent> absent_ = std::make_shared<Absent>();
};

std::mutex RecordedBackward::mutex;
std::map<RecordedBackward::Key, std::weak_ptr<RecordedBackward>> RecordedBackward::all;

// A result with a witness behind it.
struct Carry final : Recorded {
  Witness witness;
  std::string name() const override { return "GankernZerosCarry"; }
  variable_list apply_once(variable_list&& grads) override {
    variable_list passed(num_outputs());
    if (grads[0].defined()) {
      witness.note(*this, 1, &passed);
      passed[0] = std::move(grads[0]);
    }
    return passed;
  }

  std::string key() const override { return witness.key(); }
  Work work() const override {
    return [](const Needed& needed, Tensors grads, const Tensors&) {
      grads.resize(needed.size());
      return grads;
    };
  }
  void compiled_args(torch::dynamo::autograd::CompiledNodeArgs& args) const override {
    Recorded::compiled_args(args);
    witness.collect(args);
  }
  void traced(const Tensors&, Tensors* results, torch::dynamo::autograd::SwapSavedVariables* swap) override {
    witness.note(*this, 1, results, swap);
  }
};

}  // namespace

Witness::Witness(const NodePtr& root, Derivative derivative, const Tensor& input) : derivative_(derivative) {
  if (!root || !at::GradMode::is_enabled() || transformed()) return;
  if (derivative == kNone && dynamic_cast<AccumulateGrad*>(root.get()))
    return;  // nothing below, and nothing for it
  for (const Edge& edge : root->next_edges())
    if (edge.is_valid()) direct_edges_.push_back(edge);
  const bool seen = input.defined() && is_watched(root);
  // Right above leaves alone, as in a network of one layer, there is nothing to find out.
  direct_ = !seen && !direct_edges_.empty() &&
            std::all_of(direct_edges_.begin(), direct_edges_.end(), [](const Edge& edge) {
              return dynamic_cast<AccumulateGrad*>(edge.function.get()) != nullptr;
            });
  if (direct_) {
    direct_ = derivative == kZeros;
    if (!direct_) direct_edges_.clear();
    return;
  }
  const auto backward = RecordedBackward::running();
  const Bits leaves = backward->walk(root).leaves;
  passes_ = seen || std::any_of(direct_edges_.begin(), direct_edges_.end(),
                                [&](const Edge& edge) { return backward->walk(edge.function).watched; });
  if (passes_) {
    direct_ = true;
    if (input.defined()) direct_edges_ = {torch::autograd::impl::gradient_edge(input)};
    return;
  }
  direct_edges_.clear();
  leaves_ = leaves;
  if (!leaves_.any() || derivative == kNone) return;
  absent_ = backward->absent();
  token_ = backward->token();
}

void Witness::attach(Node* node) const {
  for (const Edge& edge : direct_edges_) node->add_next_edge(edge);
  if (absent_) node->add_next_edge(torch::autograd::impl::gradient_edge(token_));
}

void Witness::note(const Node& node, size_t first, Tensors* results,
                   torch::dynamo::autograd::SwapSavedVariables* swap) const {
  if (absent_) absent_->note(leaves_, Absent::running(swap ? swap->get_py_compiler() : nullptr));
  Needed wanted;
  for (size_t i = 0; i < direct_edges_.size(); ++i)
    wanted.push_back(node.task_should_compute_output(first + i));
  Tensors zeros(wanted.size());
  TORCH_CHECK_NOT_IMPLEMENTED(
      !(swap && passes_),
      "gankern: compiled autograd of a second derivative that goes through hooks or an "
      "autograd.Function; run it without compiled autograd");
  if (swap)
    zeros = traced_zeros(direct_edges_, wanted, *swap);
  else if (derivative_ == kZeros)
    for (size_t i = 0; i < zeros.size(); ++i)
      if (wanted[i]) zeros[i] = zeros_along(direct_edges_[i]);
  std::move(zeros.begin(), zeros.end(), results->begin() + int64_t(first));
}

void Witness::collect(torch::dynamo::autograd::CompiledNodeArgs& args) const {
  if (passes_) return;
  for (const Edge& edge : direct_edges_) args.collect(leaf(edge));
}

std::string Witness::key() const { return (direct_ ? "leaves," : "") + leaves_.key(); }

void KeptBack::add(const Tensor& leaf) {
  const std::lock_guard<std::mutex> lock(mutex_);
  leaves_.insert(leaf.unsafeGetTensorImpl());
}
std::vector<bool> KeptBack::among(const Tensors& leaves) const {
  const std::lock_guard<std::mutex> lock(mutex_);
  std::vector<bool> found;
  for (const Tensor& leaf : leaves) found.push_back(leaves_.count(leaf.unsafeGetTensorImpl()) > 0);
  return found;
}

bool keep_back(Node* node, uint64_t since, const std::shared_ptr<KeptBack>& to) {
  auto* collector = dynamic_cast<Collector*>(node);
  if (!collector || collector->absent->number < since) return false;
  collector->kept_back = to;
  return true;
}

Tensor carry(const Tensor& result, const Witness& witness) {
  if (!witness) return result;
  auto* node = new Carry;
  const NodePtr owner = owned(node);
  node->witness = witness;
  node->depends_on(result);
  node->witness.attach(node);
  Tensor carried = [&] {
    const BelowAutograd below;
    return result.view_as(result);
  }();
  torch::autograd::set_history(carried, owner);
  return carried;
}

namespace {

// gankern.core.zeros.carry: (result, the operator's input, whether torch has zeros there)
PyObject* carry_call(PyObject* const* in) {
  if (!THPVariable_Check(in[0]) || !THPVariable_Check(in[1]) || !takes_calls() || transformed())
    return decline();
  const Tensor& result = THPVariable_Unpack(in[0]);
  const auto derivative = in[2] == Py_True ? Witness::kZeros : Witness::kNone;
  const Tensor& input = THPVariable_Unpack(in[1]);
  return THPVariable_Wrap(
      carry(result, Witness(torch::autograd::impl::gradient_edge(input).function, derivative, input)));
}

// How many backwards were recorded that have zeros for somebody: the number of the next one.
PyObject* recorded_backwards(PyObject* const*) { return PyLong_FromUnsignedLongLong(Absent::made); }

const Functions functions_of_zeros = {method("carry", entry<carry_call, 3>),
                                      method("recorded_backwards", entry<recorded_backwards, 0>)};

}  // namespace

}  // namespace gankern::nodes
