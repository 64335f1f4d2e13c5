// Host interface of the sum that ends a product with a split reduction: plain C, raw device pointers and a stream.
#pragma once

#include <cstdint>

#ifdef __cplusplus
extern "C" {
#endif

// out[count] (+)= sum over splits of partials[splits, count], added in an order that depends on the sizes alone: the
// same bits on every run. Rounded once.
struct SdgpPartialSums {
  const float* partials;  // aligned to 16 bytes
  void* out;  // float32, bfloat16 or float16
  int64_t count;
  int32_t splits;
  int32_t out_is_float, is_bfloat16;
  int32_t accumulate;
  int32_t sm_count;
  int32_t overlaps;  // is launched while the product before it in the stream ends; compute capability 9.0 on
  void* stream;
};

// Returns 0 or a cudaError_t. Nothing is synchronised.
int sdgp_sum_partials(const struct SdgpPartialSums*);

#ifdef __cplusplus
}
#endif
