// Gradients of zero at leaves: what gankern/core/zeros.py says, without Python. The names are the same there.
#pragma once

#include <mutex>
#include <unordered_set>

#include "node.h"

namespace gankern::nodes {

class Bits {
 public:
  std::string key() const;
  void set(size_t i);
  bool test(size_t i) const;
  bool any() const;
  void operator|=(const Bits& other);

 private:
  std::vector<uint64_t> words_;
};

class Absent;

// Of one operator's backward that is being recorded, or nothing: where no leaves are below, or no second
// backward will come.
//
// Where what is below is watched, by hooks or by a Function of somebody's own, nothing is cut short: it is given what
// torch gives it, along the same edges.
class Witness {
 public:
  // What torch's own derivative by the input is: zeros, or none, along an edge that is there all the same.
  enum Derivative : bool { kNone, kZeros };

  Witness() = default;
  // `input`: of the operator, where the root is not its own node but the input's.
  explicit Witness(const NodePtr& root, Derivative derivative = kZeros, const Tensor& input = {});

  explicit operator bool() const { return direct_ || absent_; }
  // Gives the node that the backward leaves its last edges: to the collector, or, where nothing but leaves is right
  // below the root, to these.
  void attach(torch::autograd::Node* node) const;
  // The node runs, with a gradient that came in. Its edges from the first one on are those of `attach`; what goes
  // along them is put into its results. `swap`: not the engine, but compiled autograd runs it.
  void note(const torch::autograd::Node& node, size_t first, Tensors* results,
            torch::dynamo::autograd::SwapSavedVariables* swap = nullptr) const;
  // For compiled autograd: what tells it apart in a graph of known edges, and its tensors.
  std::string key() const;
  void collect(torch::dynamo::autograd::CompiledNodeArgs& args) const;

 private:
  torch::autograd::edge_list direct_edges_;
  bool direct_ = false;
  bool passes_ = false;  // along edges that do not all end in leaves
  Derivative derivative_ = kZeros;
  std::shared_ptr<Absent> absent_;
  Bits leaves_;
  Tensor token_;
};

// The leaves that collectors would give zeros to, where these keep them back: whoever asked for that gives zeros to those
// alone that nothing else came to. Of one backward.
class KeptBack {
 public:
  void add(const Tensor& leaf);
  // Of the leaves, those that zeros were kept back from.
  std::vector<bool> among(const Tensors& leaves) const;

 private:
  mutable std::mutex mutex_;
  std::unordered_set<c10::TensorImpl*> leaves_;  // which the graph holds
};

// The collector of a backward that was recorded with this number or a later one keeps its zeros back from now on; false
// for another node.
bool keep_back(torch::autograd::Node* node, uint64_t since, const std::shared_ptr<KeptBack>& to);

// A result with that witness behind it; the result itself where it is none.
Tensor carry(const Tensor& result, const Witness& witness);

}  // namespace gankern::nodes
