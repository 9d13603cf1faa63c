// Runs the kernels without torch and without Python, so that the sanitizers see nothing else.
//
// One file a primitive: it calls the tables of all instruction sets that this processor has, with memory that
// ends where the data ends and with several numbers of threads, and compares with a plain double
// implementation. Its GANKERN_TEST makes it known to main.cpp. These files are tests: unlike kernel files they
// may use the standard library, and they are compiled for the baseline alone.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <random>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include "../../testing.h"
#include "../isa.h"
#include "../parallel.h"
#include "../vec.h"

namespace gankern {
namespace testing {

// ThreadSanitizer looks for races only and slows everything down: what shares no memory between threads, and
// what does it for another dtype once more, need not run under it.
#if defined(__SANITIZE_THREAD__)
constexpr bool kRacesOnly = true;
#else
constexpr bool kRacesOnly = false;
#endif

// ---- dtypes ---------------------------------------------------------------------------------------------

template <class T>
constexpr int kDtype = 0;
template <>
constexpr int kDtype<float> = 1;
template <>
constexpr int kDtype<BFloat16> = 2;
template <>
constexpr int kDtype<Half> = 3;

template <class T>
using Acc = baseline::Acc<T>;

// One unit in the last place of 1.
template <class T>
constexpr double kEps = std::numeric_limits<T>::epsilon();
template <>
constexpr double kEps<BFloat16> = 0x1p-7;
template <>
constexpr double kEps<Half> = 0x1p-10;

template <class T>
const char* dtype_name() {
  constexpr const char* names[] = {"float64", "float32", "bfloat16", "float16"};
  return names[kDtype<T>];
}

// f is called with a value of each dtype, of which only the type counts: [](auto type) { ... decltype(type)
// ... }.
template <class F>
void each_dtype(const F& f) {
  f(double{});
  f(float{});
  f(BFloat16{});
  f(Half{});
}

// ---- instruction sets -----------------------------------------------------------------------------------

template <class Table>
struct IsaTable {
  const char* isa;
  const Table& kernels;
};

// A vector of the tables of a primitive, for the instruction sets that this processor has (and that
// ATEN_CPU_CAPABILITY allows): GANKERN_TEST_TABLES(spectral_norm).
#define GANKERN_TEST_TABLES(name) \
  ::gankern::testing::supported({GANKERN_EACH_ISA(GANKERN_TABLE_ADDRESS, name)})

template <class Table>
std::vector<IsaTable<Table>> supported(std::initializer_list<const Table*> all) {
  std::vector<IsaTable<Table>> result;
  for (int i = 0; i <= int(current_isa()); ++i) result.push_back({isa_name(Isa(i)), *all.begin()[i]});
  return result;
}

// ---- threads --------------------------------------------------------------------------------------------

// A Parallel of the given number of threads; valid until the next call. More threads than processors are
// meant: they are what brings unusual interleavings.
inline Parallel threads(int count) {
  static int wanted;
  wanted = count;
  return {count, [](int64_t total, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
            const int64_t step = std::max((total + wanted - 1) / wanted, std::max<int64_t>(grain, 1));
            std::vector<std::thread> others;
            for (int64_t begin = step; begin < total; begin += step) {
              others.emplace_back(body, context, begin, std::min(begin + step, total));
            }
            body(context, 0, std::min(step, total));
            for (std::thread& other : others) other.join();
          }};
}

// Promises `count` threads and then runs all ranges one after the other, last one first: a pool may do so.
inline Parallel one_after_the_other(int count) {
  static int wanted;
  wanted = count;
  return {count, [](int64_t total, int64_t grain, void (*body)(void*, int64_t, int64_t), void* context) {
            const int64_t step = std::max((total + wanted - 1) / wanted, std::max<int64_t>(grain, 1));
            for (int64_t begin = (total - 1) / step * step; begin >= 0; begin -= step) {
              body(context, begin, std::min(begin + step, total));
            }
          }};
}

// ---- memory ---------------------------------------------------------------------------------------------

enum class Placement {
  kHeap,     // a block of exactly the right size: AddressSanitizer sees what goes beyond it
  kShifted,  // the same, but the data starts one element into it: aligned to nothing but the element
  kGuarded,  // ends at a page that may not be touched: also for the instructions that no sanitizer
             // instruments
};
using Placements = std::vector<Placement>;
inline const Placements kEveryPlacement = {Placement::kHeap, Placement::kShifted, Placement::kGuarded};

inline const char* placement_name(Placement placement) {
  constexpr const char* names[] = {"heap", "shifted", "guarded"};
  return names[int(placement)];
}

// `size` elements with nothing behind them.
template <class T>
class Buffer {
 public:
  Buffer(int64_t size, Placement placement) : size_(size), placement_(placement) {
    const size_t bytes = sizeof(T) * size_t(size);
    if (placement == Placement::kGuarded) {
      const size_t page = size_t(sysconf(_SC_PAGESIZE));
      const size_t used = (bytes + page - 1) / page * page;
      mapped_ = used + page;
      block_ = mmap(nullptr, mapped_, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
      if (block_ == MAP_FAILED || mprotect(static_cast<char*>(block_) + used, page, PROT_NONE) != 0) {
        std::perror("mmap");
        std::exit(2);
      }
      data_ = reinterpret_cast<T*>(static_cast<char*>(block_) + used - bytes);
    } else {
      const size_t before = placement == Placement::kShifted ? sizeof(T) : 0;
      block_ = std::malloc(before + bytes);
      if (block_ == nullptr && before + bytes > 0) {
        std::perror("malloc");
        std::exit(2);
      }
      data_ = reinterpret_cast<T*>(static_cast<char*>(block_) + before);
    }
    // A recognisable value that is neither zero nor small, so that reading what was never written shows.
    if (bytes) std::memset(static_cast<void*>(data_), 0x6d, bytes);
  }
  Buffer(int64_t size, Placement placement, const std::vector<T>& values) : Buffer(size, placement) {
    if (size) std::memcpy(static_cast<void*>(data_), values.data(), sizeof(T) * size_t(size));
  }
  Buffer(const std::vector<T>& values, Placement placement)
      : Buffer(int64_t(values.size()), placement, values) {}
  ~Buffer() {
    if (mapped_) {
      munmap(block_, mapped_);
    } else {
      std::free(block_);
    }
  }
  Buffer(Buffer&& other) noexcept
      : block_(std::exchange(other.block_, nullptr)),
        mapped_(std::exchange(other.mapped_, 0)),
        data_(other.data_),
        size_(other.size_),
        placement_(other.placement_) {}
  Buffer& operator=(Buffer&&) = delete;

  T* data() { return data_; }
  const T* data() const { return data_; }
  int64_t size() const { return size_; }
  bool same_bits(const Buffer& other) const {
    return size_ == other.size_ && std::memcmp(data_, other.data_, sizeof(T) * size_t(size_)) == 0;
  }
  bool same_bits(const std::vector<T>& values) const {
    return size_ == int64_t(values.size()) &&
           std::memcmp(data_, values.data(), sizeof(T) * size_t(size_)) == 0;
  }

 private:
  void* block_;
  size_t mapped_ = 0;  // bytes; 0 where it was allocated
  T* data_;
  int64_t size_;
  Placement placement_;
};

// ---- values ---------------------------------------------------------------------------------------------

// Uniform in [low, high], rounded to T.
template <class T>
std::vector<T> random_values(int64_t size, uint64_t seed, double low, double high) {
  std::mt19937_64 generator(seed);
  std::vector<T> values(static_cast<size_t>(size));
  for (T& x : values) {
    const double unit = double(generator() >> 11) * 0x1p-53;
    x = baseline::narrow<T>(Acc<T>(low + (high - low) * unit));
  }
  return values;
}

template <class T>
std::vector<double> to_double(const std::vector<T>& values) {
  std::vector<double> wide;
  wide.reserve(values.size());
  for (T x : values) wide.push_back(double(baseline::widen(x)));
  return wide;
}

// The largest |ours - exact|; infinity where one of them is NaN or infinite and the other is not.
template <class T>
double largest_error(const Buffer<T>& ours, const std::vector<double>& exact) {
  double largest = 0;
  for (int64_t i = 0; i < ours.size(); ++i) {
    const double error = std::fabs(double(baseline::widen(ours.data()[i])) - exact[size_t(i)]);
    if (!(error <= largest)) largest = std::isnan(error) ? std::numeric_limits<double>::infinity() : error;
  }
  return largest;
}

inline double largest(const std::vector<double>& values) {
  double result = 0;
  for (double x : values) result = std::max(result, std::fabs(x));
  return result;
}

// ---- one problem in many ways ---------------------------------------------------------------------------

// As printf.
__attribute__((format(printf, 1, 2))) inline std::string text(const char* format, ...) {
  char buffer[256];
  std::va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(buffer, sizeof buffer, format, arguments);
  va_end(arguments);
  return buffer;
}

// With every instruction set: one call, which compare(call, what) holds against the definition; then the same
// call in memory of each placement and with each number of threads, all of which must agree with the first bit
// by bit and leave their inputs as they are. A negative number: so many threads promised, and one given. A
// Call is made of {inputs, placement}, and has run(kernels, parallel), same(other) and inputs_unchanged().
template <class Call, class Table, class Inputs, class Compare>
void test_every_way(const std::vector<IsaTable<Table>>& tables, const Inputs& inputs, const std::string& name,
                    const Placements& placements, const std::vector<int>& counts, const Compare& compare) {
  for (const auto& [isa, kernels] : tables) {
    const std::string all = isa + (", " + name);
    const char* what = all.c_str();
    Call first{inputs, Placement::kHeap};
    first.run(kernels, threads(1));
    compare(first, what);
    for (Placement placement : placements) {
      for (int count : counts) {
        Call call{inputs, placement};
        call.run(kernels, count < 0 ? one_after_the_other(-count) : threads(count));
        check(call.same(first), "%s: differs with %d threads, %s memory", what, count,
              placement_name(placement));
        check(call.inputs_unchanged(), "%s: inputs were written to", what);
      }
    }
  }
}

template <class T>
std::vector<Buffer<T>> buffers(int count, int64_t size, Placement placement) {
  std::vector<Buffer<T>> all;
  for (int i = 0; i < count; ++i) all.emplace_back(size, placement);
  return all;
}
// Whether all buffers of two lists have the same bits.
template <class T>
bool all_same(const std::vector<Buffer<T>>& some, const std::vector<Buffer<T>>& others) {
  return std::equal(some.begin(), some.end(), others.begin(), others.end(),
                    [](const Buffer<T>& a, const Buffer<T>& b) { return a.same_bits(b); });
}

// ---- the primitives -------------------------------------------------------------------------------------

struct Test {
  const char* primitive;
  void (*run)();
};
// In the order of their names.
std::vector<Test>& tests();
inline bool add_test(const char* primitive, void (*run)()) {
  tests().push_back({primitive, run});
  return true;
}
// The one test of a file: GANKERN_TEST(pixel_norm) { ... }
#define GANKERN_TEST(primitive)                                                 \
  static void test_##primitive();                                               \
  static const bool added_##primitive = add_test(#primitive, test_##primitive); \
  static void test_##primitive()

}  // namespace testing
}  // namespace gankern
