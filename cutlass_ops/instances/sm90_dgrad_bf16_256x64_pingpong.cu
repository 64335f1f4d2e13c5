#include "sdgp/sm90_sparse_gemm_launch.cuh"

SDGP_SM90_SPARSE_GEMM(sdgp_sm90_dgrad_bf16_256x64_pingpong, __nv_bfloat16, K, 256, 64, PingPong)
