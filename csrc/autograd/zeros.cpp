#include "zeros.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/zeros_like.h>
#include <torch/csrc/autograd/engine.h>
#include <torch/csrc/autograd/functions/accumulate_grad.h>
#include <torch/csrc/autograd/functions/utils.h>
#include <torch/csrc/autograd/graph_task.h>

#include <map>
#include <mutex>
#include <thread>
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

// Of the backwards through one that was recorded, by the engine's number: the leaves that are to have zeros.
class Absent : public std::enable_shared_from_this<Absent> {
 public:
  void note(const Bits& leaves) {
    const int task = torch::autograd::get_current_graph_task_id();
    bool first;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      first = of_task_.find(task) == of_task_.end();
      of_task_[task] |= leaves;
    }
    if (first && task >= 0) at_the_end([self = shared_from_this(), task] { self->forget(task); });
  }
  Bits noted() const {
    const std::lock_guard<std::mutex> lock(mutex_);
    const auto found = of_task_.find(torch::autograd::get_current_graph_task_id());
    return found == of_task_.end() ? Bits() : found->second;
  }

 private:
  void forget(int task) {
    const std::lock_guard<std::mutex> lock(mutex_);
    of_task_.erase(task);
  }

  mutable std::mutex mutex_;  // a backward runs on a thread a device
  std::unordered_map<int, Bits> of_task_;
};

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

// Its edges go to the collector before and to each of its leaves. Its output is a token, which nobody reads and
// which no gradient comes to.
struct Collector final : Node {
  std::shared_ptr<Absent> absent;
  size_t first;  // the number of its first leaf

  Collector(std::shared_ptr<Absent> a, size_t f) : absent(std::move(a)), first(f) {}
  std::string name() const override { return "GankernZerosCollector"; }

  variable_list apply(variable_list&&) override {
    const Bits noted = absent->noted();
    variable_list zeros(num_outputs());
    for (size_t i = 1; i < zeros.size(); ++i) {
      if (!noted.test(first + i - 1) || !task_should_compute_output(i)) continue;
      const Tensor& leaf = static_cast<AccumulateGrad&>(*next_edge(i).function).variable;
      const at::NoGradGuard constant;
      zeros[i] = at::zeros_like(leaf);
    }
    return zeros;
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

  // The leaves below a node; those that are new get a collector.
  const Bits& walk(const NodePtr& root) {
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
      Bits leaves;
      if (dynamic_cast<AccumulateGrad*>(node.get())) {
        leaves.set(leaves_++);
        found.emplace_back(node, 0);
      } else {
        each_before(node->next_edges(),
                    [&](const Edge& edge) { leaves |= below_.find(edge.function.get())->second.leaves; });
      }
      below_.emplace(node.get(), Below{node, std::move(leaves)});
    }
    if (!found.empty()) collect(first, found);
    return below_.find(root.get())->second.leaves;
  }

  const Tensor& token() const { return token_; }  // there since the first leaf was found
  const std::shared_ptr<Absent>& absent() const { return absent_; }

 private:
  struct Below {
    NodePtr node;  // so that no other node has its place in memory
    Bits leaves;
  };

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
  variable_list apply(variable_list&& grads) override {
    variable_list passed(num_outputs());
    if (grads[0].defined()) {
      witness.note();
      passed[0] = std::move(grads[0]);
    }
    return passed;
  }
};

}  // namespace

Witness::Witness(const NodePtr& root) {
  if (!root || !at::GradMode::is_enabled() || transformed()) return;
  const auto backward = RecordedBackward::running();
  leaves_ = backward->walk(root);
  if (!leaves_.any()) return;
  absent_ = backward->absent();
  token_ = backward->token();
}

void Witness::note() const { absent_->note(leaves_); }

Tensor carry(const Tensor& result, const NodePtr& root) {
  auto* node = new Carry;
  const NodePtr owner = owned(node);
  node->witness = Witness(root);
  if (!node->witness) return result;
  node->depends_on(result);
  node->depends_on(node->witness.token());
  Tensor carried = [&] {
    const BelowAutograd below;
    return result.view_as(result);
  }();
  torch::autograd::set_history(carried, owner);
  return carried;
}

namespace {

// gankern.core.zeros.carry: (result, the tensor below which the leaves are, or None for the node that runs)
PyObject* carry_call(PyObject* const* in) {
  if (!THPVariable_Check(in[0]) || !plain()) return decline();
  const Tensor& result = THPVariable_Unpack(in[0]);
  NodePtr root;
  if (in[1] == Py_None)
    root = torch::autograd::get_current_node();
  else
    root = torch::autograd::impl::gradient_edge(THPVariable_Unpack(in[1])).function;
  return THPVariable_Wrap(carry(result, root));
}

const Functions functions_of_zeros = {method("carry", entry<carry_call, 2>)};

}  // namespace

}  // namespace gankern::nodes
