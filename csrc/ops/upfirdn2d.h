// What the operators of either device ask of their arguments.
#pragma once

#include "layout.h"

namespace gankern {
namespace {

constexpr const char* kName = "upfirdn2d";
using Sizes = std::vector<int64_t>;

void check(const Tensor& x, const Tensor& filter, const Sizes& up, const Sizes& down, const Sizes& start,
           const Sizes& size) {
  STD_TORCH_CHECK(x.dim() == 4, kName, ": x must be 4-D, got ", x.dim(), " dimensions");
  STD_TORCH_CHECK((filter.dim() == 1 || filter.dim() == 2) && filter.numel() > 0, kName,
                  ": filter must be 1-D or 2-D and not empty");
  for (const Sizes* pair : {&up, &down, &start, &size})
    STD_TORCH_CHECK(pair->size() == 2, kName, ": up, down, start and size are pairs");
  for (int i = 0; i < 2; ++i)
    STD_TORCH_CHECK(up[i] >= 1 && down[i] >= 1 && size[i] >= 0, kName,
                    ": up and down must be at least 1, and size 0");
}

}  // namespace
}  // namespace gankern
