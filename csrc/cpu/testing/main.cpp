// kernel_tests [primitive ...]: all primitives, or the named ones. tests/native/test_sanitizers.py runs it.
// kernel_tests --overflow: a fault, by which the tests know that UBSan sees such faults.
#include "testing.h"

namespace gankern {
namespace testing {

std::vector<Test>& tests() {
  static std::vector<Test> all;
  return all;
}

}  // namespace testing
}  // namespace gankern

int main(int argc, char** argv) {
  using namespace gankern::testing;
  if (argc > 1 && std::strcmp(argv[1], "--overflow") == 0) {
    volatile int largest = std::numeric_limits<int>::max();
    largest = largest + argc;
    return 0;
  }
  std::printf("instruction sets built: %s, best here: %s\n", gankern::built_isas(),
              gankern::isa_name(gankern::current_isa()));
  std::sort(tests().begin(), tests().end(),
            [](const Test& a, const Test& b) { return std::strcmp(a.primitive, b.primitive) < 0; });
  int ran = 0;
  for (const Test& test : tests()) {
    bool wanted = argc < 2;
    for (int i = 1; i < argc; ++i) wanted = wanted || std::strcmp(argv[i], test.primitive) == 0;
    if (!wanted) continue;
    const Counts before = counts();
    test.run();
    std::printf("%s: %lld checks, %lld failures\n", test.primitive,
                static_cast<long long>(counts().checks - before.checks),
                static_cast<long long>(counts().failures - before.failures));
    ++ran;
  }
  if (ran == 0) {
    std::printf("no such primitive; there are:");
    for (const Test& test : tests()) std::printf(" %s", test.primitive);
    std::printf("\n");
    return 2;
  }
  return counts().failures > 0;
}
