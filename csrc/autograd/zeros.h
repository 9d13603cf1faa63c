// Gradients of zero at leaves: what gankern/core/zeros.py says, without Python. The names are the same there.
#pragma once

#include "node.h"

namespace gankern::nodes {

class Bits {
 public:
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
class Witness {
 public:
  Witness() = default;
  explicit Witness(const NodePtr& root);

  explicit operator bool() const { return bool(absent_); }
  // To be an input of the node that the backward leaves.
  const Tensor& token() const { return token_; }
  // The node runs, with a gradient that came in.
  void note() const;

 private:
  std::shared_ptr<Absent> absent_;
  Bits leaves_;
  Tensor token_;
};

// A result with a witness behind it, for the node of its forward; the result itself where there is no witness.
Tensor carry(const Tensor& result, const NodePtr& root);

}  // namespace gankern::nodes
