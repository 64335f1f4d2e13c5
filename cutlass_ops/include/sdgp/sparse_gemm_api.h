// Host interface of the sparse GEMM kernels: plain C, raw device pointers and a stream.
#pragma once

#include <cstdint>

#ifdef __cplusplus
extern "C" {
#endif

// What a call does: all of it, or only what prepares the workspace, or the product alone behind that. (Between a kernel
// and the one that is to overlap it nothing else may be in the stream.)
enum { SDGP_STEP_ALL, SDGP_STEP_PREPARE, SDGP_STEP_MULTIPLY };

// D[m, n] (+)= A[m, k at 2:4] * B[k, n]; shapes of the operands in sm80_sparse_gemm.cuh and sm90_sparse_gemm.cuh.
struct SdgpSparseGemm {
  const void* values;
  const void* metadata;  // legal in all of its memory, padding included
  const void* b;
  void* out;        // 16-bit like the operands, or float32 where out_is_float
  // float32 [splits, m, n] where splits > 1; where owned_blocks > 0, a float32 tile for each CTA that runs at a time
  // (sm_count, rounded down to whole clusters) and behind those 8 uint32 for each
  void* workspace;
  int32_t m, n, k;
  int32_t padded_k;      // length of k in the values; rows along k hold padded_k / 2 values and padded_k / 16 words of
                         // metadata, padded to whole chunks of 8 words
  int32_t splits;        // 1 .. ceil(k / 128) parts of the k range, added up afterwards in a fixed order
  int32_t owned_blocks;  // of 128 k, by the owner of a unit in the last round, shared (sm90_schedule.cuh); 0: not shared
  int32_t group_n;       // tile columns that run together, for reuse in L2
  int32_t cluster_size;  // 1 or 2; Hopper only
  int32_t sm_count;
  int32_t out_is_float, accumulate;
  int32_t step;  // SDGP_STEP_..
  // Hopper only: blocks begin while the last ones of the kernel before it in the stream run, and the product ends
  // behind that one. For operands that were complete before that kernel began, and memory that it does not use.
  int32_t overlaps;
  void* stream;
};

// Returns 0 or a cudaError_t / (1000 + CUresult) code. Nothing is synchronised.
typedef int SdgpSparseGemmFunction(const struct SdgpSparseGemm*);

#ifdef __cplusplus
}
#endif
