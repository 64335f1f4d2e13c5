#include "sdgp/sm90_sparse_gemm_launch.cuh"

SDGP_SM90_SPARSE_GEMM(sdgp_sm90_wgrad_f16_256x128, __half, MN, 256, 128, Cooperative)
