#include "sdgp/sm90_sparse_gemm_launch.cuh"

SDGP_SM90_SPARSE_GEMM(sdgp_sm90_dgrad_bf16_128x192, __nv_bfloat16, K, 128, 192, Cooperative)
