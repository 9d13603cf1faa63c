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

// each(isa, ...) for every instruction set that is built; who builds for AVX-512 builds for AVX2 too.
#if defined(GANKERN_HAS_AVX512)
#define GANKERN_EACH_ISA(each, ...) \
  each(baseline, __VA_ARGS__) each(avx2, __VA_ARGS__) each(avx512, __VA_ARGS__)
#elif defined(GANKERN_HAS_AVX2)
#define GANKERN_EACH_ISA(each, ...) each(baseline, __VA_ARGS__) each(avx2, __VA_ARGS__)
#else
#define GANKERN_EACH_ISA(each, ...) each(baseline, __VA_ARGS__)
#endif

#define GANKERN_DECLARE_TABLE(isa, Table, name) \
  namespace isa {                               \
  extern const Table name;                      \
  }
#define GANKERN_TABLE_ADDRESS(isa, name) &::gankern::isa::name,
#define GANKERN_KERNELS(Table, name)                                                           \
  GANKERN_EACH_ISA(GANKERN_DECLARE_TABLE, Table, name)                                         \
  inline const Table& name() {                                                                 \
    static constexpr const Table* kTables[] = {GANKERN_EACH_ISA(GANKERN_TABLE_ADDRESS, name)}; \
    return *kTables[int(current_isa())];                                                       \
  }
