// torch.ops.gankern_cuda.minibatch_discrimination and its gradients on CUDA tensors. Schemas:
// gankern/ops/minibatch_discrimination.py.
#include "../../cuda/minibatch_discrimination.h"

#include "launching.h"

namespace gankern {
namespace {

constexpr const char* kName = "minibatch_discrimination";
using cuda::PairsPass;

// The problem in the kernels' own layout. The tensors that own the memory stay alive in here.
struct Problem {
  const Operand m, other;
  cuda::Pairs in{};

  Problem(PairsPass pass, const Tensor& m_in, const Optional& other_in)
      : m(compact(m_in)), other(compact(other_in)) {
    check(*m, "m");
    in.pass = pass;
    in.kernels = m->size(1);
    in.dims = m->size(2);
    in.points.count = m->size(0);
    in.points.m = m.data();
    in.one_set = !other;
    if (!other) return;
    check(*other, "other");
    STD_TORCH_CHECK(other->size(1) == in.kernels && other->size(2) == in.dims, kName,
                    ": m and other differ in kernels or dims");
    in.others.count = other->size(0);
    in.others.m = other.data();
  }

  void check(const Tensor& x, const char* name) const {
    STD_TORCH_CHECK(x.dim() == 3, kName, ": ", name, " must be 3-D, got ", x.dim(), " dimensions");
    STD_TORCH_CHECK(x.size(1) > 0 && x.size(2) > 0, kName, ": ", name, " has no kernels or no dims");
    STD_TORCH_CHECK(x.scalar_type() == m->scalar_type(), kName, ": all tensors must have one dtype");
  }
  void take_grad(const Operand& grad) {
    STD_TORCH_CHECK(grad->scalar_type() == m->scalar_type(), kName, ": all tensors must have one dtype");
    STD_TORCH_CHECK(grad->dim() == 2 && grad->size(0) == in.points.count && grad->size(1) == in.kernels,
                    kName, ": grad does not have the shape of the result");
    in.points.grad = grad.data();
  }
  // The results: of no points on the other side, zeros.
  Tensor result(std::initializer_list<int64_t> sizes, void** place) const {
    Tensor x = blank(*m, sizes);
    *place = x.mutable_data_ptr();
    if (pairless()) torch::stable::fill_(x, 0.0);
    return x;
  }
  Tensor sums(void** place) const { return result({in.points.count, in.kernels}, place); }
  Tensor gradient(const Tensor& like, void** place) const {
    return result({like.size(0), like.size(1), like.size(2)}, place);
  }
  bool pairless() const { return in.points.count == 0 || (!in.one_set && in.others.count == 0); }

  void run() const {
    if (pairless()) return;
    const Launching launching(*m);
    const int dtype = dtype_index(*m, kName);
    const Tensor scratch = scratch_of(cuda::minibatch_discrimination_scratch(in, dtype), *m);
    cuda::minibatch_discrimination(in, dtype, scratch.mutable_data_ptr(), launching.stream());
  }
};

Tensor forward(Tensor m, Optional other, bool include_self) {
  Problem problem(PairsPass::kForward, m, other);
  problem.in.include_self = include_self;
  Tensor sums = problem.sums(&problem.in.points.sums);
  problem.run();
  return sums;
}

std::tuple<Tensor, Tensor> backward(Tensor grad_in, Tensor m, Optional other) {
  Problem problem(PairsPass::kBackward, m, other);
  const Operand grad = compact(grad_in);
  problem.take_grad(grad);
  Tensor grad_m = problem.gradient(m, &problem.in.points.out_m);
  Tensor grad_other = other ? problem.gradient(*other, &problem.in.others.out_m) : missing(m);
  problem.run();
  return {grad_m, grad_other};
}

std::tuple<Tensor, Tensor, Tensor> double_backward(Optional grad_grad_m, Optional grad_grad_other,
                                                   Tensor grad_in, Tensor m, Optional other) {
  Problem problem(PairsPass::kDoubleBackward, m, other);
  const Operand grad = compact(grad_in);
  problem.take_grad(grad);
  STD_TORCH_CHECK(other || !grad_grad_other, kName, ": grad_grad_other without other");
  const Operand h = like(grad_grad_m, *problem.m, kName),
                h_other = grad_grad_other ? like(*grad_grad_other, *problem.other, kName) : Operand();
  problem.in.points.grad_m = h.data();
  problem.in.others.grad_m = h_other.data();
  Tensor grad_grad = problem.sums(&problem.in.points.sums);
  Tensor grad_m = problem.gradient(m, &problem.in.points.out_m);
  Tensor grad_other = other ? problem.gradient(*other, &problem.in.others.out_m) : missing(m);
  problem.run();
  return {grad_grad, grad_m, grad_other};
}

}  // namespace
}  // namespace gankern

STABLE_TORCH_LIBRARY_IMPL(gankern_cuda, GANKERN_DEVICE, m) {
  m.impl("minibatch_discrimination", TORCH_BOX(&gankern::forward));
  m.impl("minibatch_discrimination_backward", TORCH_BOX(&gankern::backward));
  m.impl("minibatch_discrimination_double_backward", TORCH_BOX(&gankern::double_backward));
}
