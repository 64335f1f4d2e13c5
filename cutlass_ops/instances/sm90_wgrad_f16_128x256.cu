#include "sdgp/sm90_sparse_gemm_launch.cuh"

SDGP_SM90_SPARSE_GEMM(sdgp_sm90_wgrad_f16_128x256, __half, MN, 128, 256, Cooperative)
