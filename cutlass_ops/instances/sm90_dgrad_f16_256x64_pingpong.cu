#include "sdgp/sm90_sparse_gemm_launch.cuh"

SDGP_SM90_SPARSE_GEMM(sdgp_sm90_dgrad_f16_256x64_pingpong, __half, K, 256, 64, PingPong)
