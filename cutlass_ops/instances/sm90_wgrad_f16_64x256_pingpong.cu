#include "sdgp/sm90_sparse_gemm_launch.cuh"

SDGP_SM90_SPARSE_GEMM(sdgp_sm90_wgrad_f16_64x256_pingpong, __half, MN, 64, 256, PingPong)
