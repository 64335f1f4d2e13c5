// Host interface of the Hopper sparse GEMM: plain C, raw device pointers and a stream.
#pragma once

#include <cstdint>

#ifdef __cplusplus
extern "C" {
#endif

// D[m, n] (+)= A[m, k at 2:4] * B[k, n]; shapes of the operands in sm90_sparse_gemm.cuh.
struct SdgpSm90SparseGemm {
  const void* values;
  const void* metadata;
  const void* b;
  void* out;        // 16-bit like the operands, or float32 where out_is_float
  void* workspace;  // float32 [splits, m, n] where splits > 1
  int32_t m, n, k;
  int32_t padded_k;      // length of k in values and metadata: the stored rows hold padded_k / 2 and padded_k / 16
  int32_t splits;        // 1 .. ceil(k / 128) parts of the k range, added up afterwards in a fixed order
  int32_t group_n;       // tile columns that run together, for reuse in L2
  int32_t cluster_size;  // 1 or 2
  int32_t sm_count;
  int32_t out_is_float, accumulate;
  void* stream;
};

// Returns 0 or a cudaError_t / (1000 + CUresult) code. Nothing is synchronised.
typedef int SdgpSm90SparseGemmFunction(const struct SdgpSm90SparseGemm*);

#ifdef __cplusplus
}
#endif
