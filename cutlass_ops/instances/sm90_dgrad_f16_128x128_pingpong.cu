#include "sdgp/sm90_sparse_gemm_launch.cuh"

SDGP_SM90_SPARSE_GEMM(sdgp_sm90_dgrad_f16_128x128_pingpong, __half, K, 128, 128, PingPong)
