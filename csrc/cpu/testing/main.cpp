// kernel_tests [primitive ...]: all primitives, or the named ones. tests/native/test_sanitizers.py runs it.
#include "testing.h"

namespace {

struct Test {
  const char* primitive;
  void (*run)();
};

constexpr Test kTests[] = {
    {"batch_norm_act", gankern::testing::test_batch_norm_act},
    {"bias_act", gankern::testing::test_bias_act},
    {"gradient_penalty", gankern::testing::test_gradient_penalty},
    {"convolution", gankern::testing::test_convolution},
    {"minibatch_discrimination", gankern::testing::test_minibatch_discrimination},
    {"minibatch_stddev", gankern::testing::test_minibatch_stddev},
    {"pixel_norm", gankern::testing::test_pixel_norm},
    {"spectral_norm", gankern::testing::test_spectral_norm},
    {"upfirdn2d", gankern::testing::test_upfirdn2d},
    {"virtual_batch_norm", gankern::testing::test_virtual_batch_norm},
};

}  // namespace

int main(int argc, char** argv) {
  std::printf("instruction sets built: %s, best here: %s\n", gankern::built_isas(),
              gankern::isa_name(gankern::current_isa()));
  int ran = 0;
  for (const Test& test : kTests) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], test.primitive) == 0;
    if (!wanted) continue;
    const gankern::testing::Counts before = gankern::testing::counts();
    test.run();
    const gankern::testing::Counts after = gankern::testing::counts();
    std::printf("%s: %lld checks, %lld failures\n", test.primitive,
                static_cast<long long>(after.checks - before.checks),
                static_cast<long long>(after.failures - before.failures));
    ++ran;
  }
  if (ran == 0) {
    std::printf("no such primitive; there are:");
    for (const Test& test : kTests) std::printf(" %s", test.primitive);
    std::printf("\n");
    return 2;
  }
  return gankern::testing::counts().failures > 0;
}
