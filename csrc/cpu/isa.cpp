#include "isa.h"

#include <cstdlib>
#include <cstring>

namespace gankern {

namespace {

Isa detect() {
#if defined(GANKERN_HAS_AVX2)
  __builtin_cpu_init();
  Isa best = Isa::kBaseline;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) {
    best = Isa::kAvx2;
#if defined(GANKERN_HAS_AVX512)
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
        __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
      best = Isa::kAvx512;
    }
#endif
  }
  Isa allowed = Isa::kAvx512;
  if (const char* wish = std::getenv("ATEN_CPU_CAPABILITY")) {
    if (std::strcmp(wish, "avx2") == 0) allowed = Isa::kAvx2;
    if (std::strcmp(wish, "default") == 0) allowed = Isa::kBaseline;
  }
  return best < allowed ? best : allowed;
#else
  return Isa::kBaseline;
#endif
}

}  // namespace

Isa current_isa() {
  static const Isa isa = detect();
  return isa;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx512: return "avx512";
    case Isa::kAvx2: return "avx2";
    default: return "baseline";
  }
}

#define GANKERN_NAME_OF(isa, ...) " " #isa
const char* built_isas() {
  static constexpr const char names[] = GANKERN_EACH_ISA(GANKERN_NAME_OF);
  return names + 1;  // without the space before the first one
}

}  // namespace gankern
