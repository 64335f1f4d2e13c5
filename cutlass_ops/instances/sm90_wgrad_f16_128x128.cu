#include "sdgp/sm90_sparse_gemm_launch.cuh"

SDGP_SM90_SPARSE_GEMM(sdgp_sm90_wgrad_f16_128x128, __half, MN, 128, 128, Cooperative)
