// One kernel source, several instruction sets.
//
// CMake compiles each csrc/cpu/<primitive>.cpp once per instruction set with GANKERN_ISA set to `baseline`,
// `avx2` or `avx512`. Everything a kernel file defines lives in `namespace gankern::GANKERN_ISA`, and it
// ends with one table of function pointers. GANKERN_KERNELS(Table, name) in the primitive's header declares
// the tables and makes `gankern::name()` return the one for this processor.
//
// A kernel file must not instantiate templates of the standard library (std::vector, std::atomic, ...): the
// linker keeps one copy of such a function, perhaps the AVX-512 one, and an older processor would run it.
#pragma once

#ifndef GANKERN_ISA
#define GANKERN_ISA baseline
#endif

namespace gankern {

enum class Isa { kBaseline = 0, kAvx2 = 1, kAvx512 = 2 };

// The best instruction set that was built, that this processor has, and that ATEN_CPU_CAPABILITY (default,
// avx2, avx512: torch's own variable) allows. Decided once.
Isa current_isa();
const char* isa_name(Isa isa);
// The names of the instruction sets in this library, worst first, separated by spaces.
const char* built_isas();

}  // namespace gankern

#if defined(GANKERN_HAS_AVX2) && defined(GANKERN_HAS_AVX512)
#define GANKERN_KERNELS(Table, name)          \
  namespace baseline {                        \
  extern const Table name;                    \
  }                                           \
  namespace avx2 {                            \
  extern const Table name;                    \
  }                                           \
  namespace avx512 {                          \
  extern const Table name;                    \
  }                                           \
  inline const Table& name() {                \
    switch (current_isa()) {                  \
      case Isa::kAvx512: return avx512::name; \
      case Isa::kAvx2: return avx2::name;     \
      default: return baseline::name;         \
    }                                         \
  }
#else
#define GANKERN_KERNELS(Table, name) \
  namespace baseline {               \
  extern const Table name;           \
  }                                  \
  inline const Table& name() { return baseline::name; }
#endif
