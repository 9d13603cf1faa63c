// torch.ops.gankern.upfirdn2d on CPU tensors. Schema: gankern/ops/upfirdn2d.py.
#include "../cpu/upfirdn2d.h"

#include "../cpu/vec.h"
#include "upfirdn2d.h"

namespace gankern {
namespace {

template <class T>
std::vector<double> widen_all(const Operand& x) {
  const T* p = static_cast<const T*>(x.data());
  std::vector<double> values;
  for (int64_t i = 0; i < x->numel(); ++i) values.push_back(double(GANKERN_ISA::widen(p[i])));
  return values;
}

// The values of a small tensor of any floating dtype.
std::vector<double> to_double(const Tensor& tensor) {
  const Operand x = compact(tensor);
  switch (dtype_index(tensor, kName)) {
    case 0: return widen_all<double>(x);
    case 1: return widen_all<float>(x);
    case 2: return widen_all<BFloat16>(x);
    default: return widen_all<Half>(x);
  }
}

// Whether the kernel can go through the samples of a row as they lie.
bool rows_are_dense(const Tensor& x, int64_t group) {
  return (x.size(3) <= 1 || x.strides()[3] == group) && (group == 1 || x.strides()[1] == 1);
}

Tensor upfirdn2d_cpu(Tensor x_in, Tensor filter, Sizes up, Sizes down, Sizes start, Sizes size,
                     bool flip_filter, double gain) {
  check(x_in, filter, up, down, start, size);
  const bool grouped = has_whole_pixels(x_in);
  const int64_t group = grouped ? x_in.size(1) : 1;
  const Operand owner = rows_are_dense(x_in, group) ? Operand(x_in) : in_layout(x_in, grouped);
  const Tensor& x = *owner;
  Tensor out = empty_in_layout(x, {x.size(0), x.size(1), size[0], size[1]}, grouped);

  // The kernel correlates. The gain goes to one of a separable filter's two factors.
  std::vector<double> across = to_double(filter);
  if (!flip_filter) std::reverse(across.begin(), across.end());
  const bool separable = filter.dim() == 1;
  const std::vector<double> along = across;
  for (double& weight : across) weight *= gain;

  Upfirdn2d problem{};
  problem.rows = {x.size(2), size[0], up[0], down[0], start[0]};
  problem.columns = {x.size(3), size[1], up[1], down[1], start[1]};
  problem.row_taps = filter.size(0);
  problem.column_taps = filter.size(separable ? 0 : 1);
  problem.row_weights = separable ? along.data() : nullptr;
  problem.column_weights = across.data();
  problem.batches = x.size(0);
  problem.channels = x.size(1);
  problem.group = group;
  problem.batch_stride = x.strides()[0];
  problem.channel_stride = x.strides()[1];
  problem.row_stride = x.strides()[2];
  problem.x = owner.data();
  problem.out = out.mutable_data_ptr();
  upfirdn2d().run[dtype_index(x, kName)](problem, torch_threads());
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) { m.impl("upfirdn2d", TORCH_BOX(&upfirdn2d_cpu)); }

}  // namespace
}  // namespace gankern
