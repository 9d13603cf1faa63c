// What the files that launch Triton's kernels share: the words that tell a launcher's calls apart, and new tensors.
#pragma once

#include "call.h"

namespace gankern::nodes::launch {

using Words = c10::SmallVector<int64_t, 512>;

// What stands before each argument, so that no two lists of arguments have the same words.
enum Kind : int64_t { kNone, kFalse, kTrue, kInteger, kFraction, kText, kList, kTuple, kTensor };

inline int64_t counted(Kind kind, size_t length) { return kind | int64_t(length) << 8; }

// Whether a tensor has memory of its own, and its keys leave none of its facts to others.
bool strided(const Tensor& t);

void put_tensor(const Tensor& t, bool by_memory, Words* words);
void put_fraction(double fraction, Words* words);
void put_text(const char* text, size_t length, Words* words);

// The words of a launcher's arguments, a tuple of Python's; false for what only Python can tell apart.
bool put(PyObject* arguments, bool by_memory, Words* words);

// The words as a key of Python's dictionaries; a new reference.
PyObject* key_of(const Words& words);

// A tensor among the numbers of `layouts`, whose sizes and then strides follow.
enum Field : int { kDtype, kDevice, kIndex, kDim, kFields };

inline const int64_t* next_layout(const int64_t* at) { return at + kFields + 2 * at[kDim]; }

// A new tensor that lies as the numbers say.
Tensor empty(const int64_t* at);

}  // namespace gankern::nodes::launch
