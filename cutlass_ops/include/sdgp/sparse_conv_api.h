// Host interface of the sparse convolution gradients: plain C, raw device pointers and a stream.
#pragma once

#include <cstdint>

#include "sdgp/sparse_gemm_api.h"  // SDGP_STEP_..

#ifdef __cplusplus
extern "C" {
#endif

// y[n, p, q, c_out] = conv(x[n, h, w, c_in], filter[c_out, r, s, c_in]), NHWC, one group. The compressed operand is dy
// along c_out (dgrad: values [n, p, q, padded_k / 2]) or along positions (wgrad: values [padded_k / 2, c_out], rows in
// whole chunks of 8).
struct SdgpSparseConv {
  const void* values;
  const void* metadata;
  const void* b;    // dgrad: the filter; wgrad: x
  void* out;        // dgrad: dx, 16-bit; wgrad: dw [c_out, r, s, c_in], 16-bit or float32 where out_is_float
  void* workspace;  // as SdgpSparseGemm's, for partials [c_out, r, s, c_in]; wgrad only
  int32_t n, h, w, c_in, p, q, c_out, r, s;
  int32_t stride_h, stride_w, padding_h, padding_w, dilation_h, dilation_w;
  int32_t padded_k;
  int32_t splits, owned_blocks, group_n, cluster_size, sm_count;
  int32_t out_is_float, accumulate;
  int32_t step, overlaps;  // as SdgpSparseGemm's
  void* stream;
};

// Returns 0 or a cudaError_t / (1000 + CUresult) code. Nothing is synchronised.
typedef int SdgpSparseConvFunction(const struct SdgpSparseConv*);

#ifdef __cplusplus
}
#endif
