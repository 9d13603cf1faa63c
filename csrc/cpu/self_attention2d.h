// Attention between the positions of a map, without a table of queries by keys. See self_attention2d.cpp for how.
#pragma once

#include <cstdint>

#include "kernels.h"

namespace gankern {

// All tensors are contiguous and of one dtype, `stats` of the accumulation type. Keys are the first `dims` channels
// of what has dims + values of them, values the others.
struct SelfAttention {
  int64_t samples, dims, values;  // dims: of queries and keys
  int64_t queries, keys;          // positions, at least one of each
  const void* q;                  // [samples, dims, queries]
  const void* kv;                 // [samples, dims + values, keys]
  const void* o;                  // backward, double backward: the result
  const void* stats;              // the same: [samples, 2, queries], what the forward wrote there
  const void* grad;               // the same: gradient of the result, [samples, values, queries]
  const void* h_q;                // double backward: gradient of the queries' gradient; null for zeros
  const void* h_kv;               // double backward: gradient of the keys' and values'; null for zeros
  void* out;                      // forward: the result; double backward: gradient of `grad`
  void* out_stats;  // forward: of each query its largest score, and 1 over the sum of exponentials
  void* out_q;      // backward, double backward: gradient of the queries
  void* out_kv;     // the same: of keys and values
};

GANKERN_KERNELS(Orders<SelfAttention>, self_attention2d)

}  // namespace gankern
