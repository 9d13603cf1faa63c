// torch.ops.gankern.convolution_row and its weight gradient on CPU tensors. Schemas:
// gankern/ops/convolution.py.
#include "../cpu/convolution.h"

#include "layout.h"

namespace gankern {
namespace {

constexpr const char* kName = "convolution_row";
constexpr int64_t kTaps[kConvolutionRows] = {3, 3, 3, 3, 4, 4, 4, 4, 3, 3,
                                             4, 4, 0, 4, 4, 4, 4, 1, 4};  // 0: any

// A tensor densely in one of the two memory formats.
struct Images {
  const Operand tensor;
  const ConvolutionImages view;
  explicit Images(const Tensor& x)
      : tensor(in_layout(x, has_channels_together(x))),
        view{x.size(1), x.size(2), x.size(3), has_channels_together(x), const_cast<void*>(tensor.data())} {}
};

void check_images(const Tensor& x, const Tensor& model, const char* name) {
  STD_TORCH_CHECK(x.dim() == 4, kName, ": ", name, " must be 4-D, got ", x.dim(), " dimensions");
  STD_TORCH_CHECK(x.scalar_type() == model.scalar_type(), kName, ": all tensors must have one dtype");
}

void set_weight(Convolution& task, const Tensor& weight, bool swap) {
  task.weight = const_cast<void*>(weight.const_data_ptr());
  task.stride_out = weight.stride(swap ? 1 : 0);
  task.stride_in = weight.stride(swap ? 0 : 1);
  task.stride_y = weight.stride(2);
  task.stride_x = weight.stride(3);
}

void set_border(Convolution& task, int64_t border) {
  STD_TORCH_CHECK(border >= 0 && border <= 2, kName, ": border must be 0, 1 or 2, got ", border);
  STD_TORCH_CHECK(
      border != 1 || (task.in.height > 1 && task.in.width > 1) || task.images * task.in.channels == 0, kName,
      ": an image of one pixel has none to mirror");
  task.in.border = int(border);
}

int64_t checked_row(int64_t row) {
  STD_TORCH_CHECK(row >= 0 && row < kConvolutionRows, kName, ": there is no row ", row);
  return row;
}

Tensor forward(Tensor x, Tensor weight, Optional bias, int64_t row, int64_t height, int64_t width,
               int64_t padding, bool flip, bool swap, double scale, double slope, int64_t border) {
  const int64_t any = kTaps[checked_row(row)];
  check_images(x, x, "x");
  check_images(weight, x, "weight");
  const int64_t taps = any ? any : weight.size(2);
  STD_TORCH_CHECK(weight.size(2) == taps && weight.size(3) == taps, kName, ": the kernel must have ", taps,
                  " times ", taps, " taps");
  STD_TORCH_CHECK(weight.size(swap ? 0 : 1) == x.size(1), kName, ": weight and x differ in channels");
  STD_TORCH_CHECK(height >= 0 && width >= 0, kName, ": the result's size is negative");
  const int64_t channels = weight.size(swap ? 1 : 0);
  const Images in(x);
  const bool last = in.view.channels_last || has_channels_together(weight);
  Tensor out = empty_in_layout(x, {x.size(0), channels, height, width}, last);
  Convolution task{};
  task.images = x.size(0);
  task.in = in.view;
  set_border(task, border);
  task.out = {channels, height, width, last, out.mutable_data_ptr()};
  task.padding = padding;
  task.taps = taps;
  set_weight(task, weight, swap);
  task.flip = flip;
  task.scale = scale;
  task.slope = slope;
  if (bias)
    STD_TORCH_CHECK(bias->dim() == 1 && bias->size(0) == channels && bias->scalar_type() == x.scalar_type(),
                    kName, ": bias must be [", channels, "] of x's dtype");
  const Operand dense_bias = compact(bias);
  task.bias = dense_bias.data();
  convolution().forward[dtype_index(x, kName)][row](task, torch_threads());
  return out;
}

Tensor weight_gradient(Tensor x, Tensor grad, int64_t row, int64_t padding, bool flip, bool swap,
                       double scale, int64_t border) {
  const int64_t any = kTaps[checked_row(row)];
  check_images(x, x, "x");
  check_images(grad, x, "grad");
  const int64_t taps = any ? any : x.size(2) + 2 * padding + 1 - grad.size(2);
  STD_TORCH_CHECK(taps > 0, kName, ": grad is larger than a result can be");
  STD_TORCH_CHECK(grad.size(0) == x.size(0), kName, ": x and grad differ in the number of images");
  const Images in(x), out(grad);
  Tensor weight = blank(x, {swap ? x.size(1) : grad.size(1), swap ? grad.size(1) : x.size(1), taps, taps});
  Convolution task{};
  task.images = x.size(0);
  task.in = in.view;
  set_border(task, border);
  task.out = out.view;
  task.padding = padding;
  task.taps = taps;
  set_weight(task, weight, swap);
  task.flip = flip;
  task.scale = scale;
  task.slope = 1;
  convolution().weight_gradient[dtype_index(x, kName)][row](task, torch_threads());
  return weight;
}

STABLE_TORCH_LIBRARY_IMPL(gankern, CPU, m) {
  m.impl("convolution_row", TORCH_BOX(&forward));
  m.impl("convolution_row_weight_gradient", TORCH_BOX(&weight_gradient));
}

}  // namespace
}  // namespace gankern
