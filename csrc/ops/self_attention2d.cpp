// torch.ops.gankern.self_attention2d and its gradients on CPU tensors. Schemas: gankern/ops/self_attention2d.py.
#include "../cpu/self_attention2d.h"

#include "common.h"

namespace gankern {
namespace {

constexpr const char* kName = "self_attention2d";

// The problem in the kernels' own layout. The tensors that own the memory stay alive in here.
struct Problem {
  const Operand q, kv;
  SelfAttention in{};

  Problem(const Tensor& q_in, const Tensor& kv_in) : q(compact(q_in)), kv(compact(kv_in)) {
    STD_TORCH_CHECK(q->dim() == 3 && kv->dim() == 3, kName, ": queries, keys and values must be 3-D, got ",
                    q->dim(), " and ", kv->dim(), " dimensions");
    STD_TORCH_CHECK(q->scalar_type() == kv->scalar_type(), kName, ": all tensors must have one dtype");
    STD_TORCH_CHECK(q->size(0) == kv->size(0), kName, ": queries and keys differ in samples");
    in.samples = q->size(0);
    in.dims = q->size(1);
    in.values = kv->size(1) - in.dims;
    in.queries = q->size(2);
    in.keys = kv->size(2);
    STD_TORCH_CHECK(in.dims > 0 && in.values > 0 && in.queries > 0 && in.keys > 0, kName,
                    ": needs channels of keys and of values, a query and a key");
    in.q = q.data();
    in.kv = kv.data();
  }
  Tensor empty_result() const { return blank(*q, {in.samples, in.values, in.queries}); }

  // What both gradients read.
  struct Results {
    const Operand o, stats, grad;
  };
  Results take(const Tensor& grad, const Tensor& o, const Tensor& stats) {
    STD_TORCH_CHECK(o.dim() == 3 && o.size(0) == in.samples && o.size(1) == in.values &&
                        o.size(2) == in.queries && o.scalar_type() == q->scalar_type(),
                    kName, ": the result does not fit queries and values");
    STD_TORCH_CHECK(
        stats.numel() == in.samples * 2 * in.queries && stats.scalar_type() == accumulation_type(*q), kName,
        ": stats do not fit the queries");
    const Operand result = compact(o);
    return {result, compact(stats), like(grad, *result, kName)};
  }
  void take(const Results& r) {
    in.o = r.o.data();
    in.stats = r.stats.data();
    in.grad = r.grad.data();
  }
};

std::tuple<Tensor, Tensor> forward(Tensor q, Tensor kv) {
  Problem problem(q, kv);
  Tensor o = problem.empty_result(),
         stats = blank(q, {problem.in.samples, 2, problem.in.queries}, accumulation_type(q));
  problem.in.out = o.mutable_data_ptr();
  problem.in.out_stats = stats.mutable_data_ptr();
  self_attention2d().forward[dtype_index(q, kName)](problem.in, torch_threads());
  return {o, stats};
}

std::tuple<Tensor, Tensor> backward(Tensor grad, Tensor q, Tensor kv, Tensor o, Tensor stats) {
  Problem problem(q, kv);
  const auto results = problem.take(grad, o, stats);
  problem.take(results);
  Tensor grad_q = blank_like(*problem.q), grad_kv = blank_like(*problem.kv);
  problem.in.out_q = grad_q.mutable_data_ptr();
  problem.in.out_kv = grad_kv.mutable_data_ptr();
  self_attention2d().backward[dtype_index(q, kName)](problem.in, torch_threads());
  return {grad_q, grad_kv};
}

std::tuple<Tensor, Tensor, Tensor> double_backward(Optional grad_grad_q, Optional grad_grad_kv, Tensor grad,
                                                   Tensor q, Tensor kv, Tensor o, Tensor stats) {
  Problem problem(q, kv);
  const auto results = problem.take(grad, o, stats);
  problem.take(results);
  const Operand h_q = like(grad_grad_q, *problem.q, kName), h_kv = like(grad_grad_kv, *problem.kv, kName);
  problem.in.h_q = h_q.data();
  problem.in.h_kv = h_kv.data();
  Tensor grad_grad = problem.empty_result(), grad_q = blank_like(*problem.q),
         grad_kv = blank_like(*problem.kv);
  problem.in.out = grad_grad.mutable_data_ptr();
  problem.in.out_q = grad_q.mutable_data_ptr();
  problem.in.out_kv = grad_kv.mutable_data_ptr();
  self_attention2d().double_backward[dtype_index(q, kName)](problem.in, torch_threads());
  return {grad_grad, grad_q, grad_kv};
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) { implement_orders<forward, backward, double_backward>(m, kName); }

}  // namespace
}  // namespace gankern
