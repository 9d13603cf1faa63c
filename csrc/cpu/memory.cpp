#include <cstdio>
#include <cstdlib>
#include <new>

#include "common.h"

namespace gankern {
namespace {

class OutOfMemory : public std::bad_alloc {
 public:
  OutOfMemory(int64_t count, int64_t size) {
    std::snprintf(message_, sizeof message_, "gankern: no memory for %lld values of %lld bytes of scratch",
                  static_cast<long long>(count), static_cast<long long>(size));
  }
  const char* what() const noexcept override { return message_; }

 private:
  char message_[96];
};

}  // namespace

void* take_scratch(int64_t count, int64_t size) {
  int64_t bytes, padded;
  const bool fits = count >= 0 && !__builtin_mul_overflow(count, size, &bytes) &&
                    !__builtin_add_overflow(bytes, kScratchAlignment, &padded);
  void* memory =
      fits ? std::aligned_alloc(kScratchAlignment, size_t(padded / kScratchAlignment * kScratchAlignment))
           : nullptr;
  if (!memory) throw OutOfMemory(count, size);
  return memory;
}

void give_scratch(void* memory) { std::free(memory); }

}  // namespace gankern
