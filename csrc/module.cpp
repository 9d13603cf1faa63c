// gankern._C: the facts of this build. The operators themselves are in the library next to it, which torch
// loads (gankern/core/native.py); this module answers questions about it without torch.
#include <pybind11/pybind11.h>

#include "cpu/isa.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "Facts about gankern's native build.";
  m.def(
      "instruction_set", [] { return gankern::isa_name(gankern::current_isa()); },
      "The instruction set that the CPU kernels run with on this machine.");
  m.attr("instruction_sets") = gankern::built_isas();
  m.attr("compiler") = GANKERN_COMPILER;
  m.attr("build_type") = GANKERN_BUILD_TYPE;
  m.attr("torch_version") = GANKERN_TORCH_VERSION;
}
