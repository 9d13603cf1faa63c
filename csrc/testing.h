// What the tests of both kinds of kernels count: csrc/cpu/testing and csrc/cuda/testing.
#pragma once

#include <cstdarg>
#include <cstdint>
#include <cstdio>

namespace gankern::testing {

struct Counts {
  int64_t checks = 0, failures = 0;
};
inline Counts& counts() {
  static Counts all;
  return all;
}

__attribute__((format(printf, 2, 3))) inline void check(bool good, const char* format, ...) {
  ++counts().checks;
  if (good || ++counts().failures > 20) return;  // the first ones say enough
  std::va_list arguments;
  va_start(arguments, format);
  std::printf("FAILED: ");
  std::vprintf(format, arguments);
  std::printf("\n");
  va_end(arguments);
}

}  // namespace gankern::testing
