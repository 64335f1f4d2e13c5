#include "sdgp/sm90_sparse_gemm_launch.cuh"

SDGP_SM90_SPARSE_GEMM(sdgp_sm90_wgrad_bf16_128x256, __nv_bfloat16, MN, 128, 256, Cooperative)
