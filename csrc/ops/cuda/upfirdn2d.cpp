// torch.ops.gankern_cuda.upfirdn2d on CUDA tensors. Schema: gankern/ops/upfirdn2d.py.
#include "../../cuda/upfirdn2d.h"

#include "../upfirdn2d.h"
#include "launching.h"

namespace gankern {
namespace {

Tensor forward(Tensor x_in, Tensor filter_in, Sizes up, Sizes down, Sizes start, Sizes size, bool flip_filter,
               double gain) {
  check(x_in, filter_in, up, down, start, size);
  const Operand filter = compact(filter_in);
  const bool last = has_whole_pixels(x_in);
  const int64_t group = last ? x_in.size(1) : 1;
  // Samples of a row must lie side by side, as the kernels go through them.
  const bool side_by_side = x_in.size(3) <= 1 || x_in.strides()[3] == group;
  const Operand x = side_by_side ? Operand(x_in) : in_layout(x_in, last);
  Tensor out = empty_in_layout(x_in, {x_in.size(0), x_in.size(1), size[0], size[1]}, last);
  if (out.numel() == 0) return out;

  const auto narrow = [](int64_t value) {
    STD_TORCH_CHECK(value >= INT32_MIN && value <= INT32_MAX, kName,
                    ": sizes and starts must fit into 32 bits");
    return int32_t(value);
  };
  cuda::Upfirdn2d problem{};
  const int64_t taps[2] = {filter->size(0), filter->size(filter->dim() - 1)};
  cuda::ResampledAxis* axes[2] = {&problem.rows, &problem.columns};
  for (int i = 0; i < 2; ++i)
    *axes[i] = {narrow(x->size(2 + i)), narrow(size[i]),  narrow(up[i]),
                narrow(down[i]),        narrow(start[i]), narrow(taps[i])};
  problem.planes_a_batch = last ? 1 : x->size(1);
  problem.planes = x->size(0) * problem.planes_a_batch;
  problem.batch_stride = x->strides()[0];
  problem.channel_stride = x->strides()[1];
  problem.row_stride = x->strides()[2];
  problem.group = narrow(group);
  problem.separable = filter->dim() == 1;
  problem.flip = flip_filter;
  problem.gain = gain;
  problem.filter = filter.data();
  problem.filter_dtype = dtype_index(*filter, kName);
  problem.x = x.data();
  problem.out = out.mutable_data_ptr();
  const Launching launching(*x);
  cuda::upfirdn2d(problem, dtype_index(*x, kName), launching.stream());
  return out;
}

}  // namespace
}  // namespace gankern

STABLE_TORCH_LIBRARY_IMPL(gankern_cuda, GANKERN_DEVICE, m) {
  m.impl("upfirdn2d", TORCH_BOX(&gankern::forward));
}
