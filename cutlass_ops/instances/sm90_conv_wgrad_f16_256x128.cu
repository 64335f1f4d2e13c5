#include "sdgp/sm90_sparse_conv_launch.cuh"

SDGP_SM90_SPARSE_CONV_WGRAD(sdgp_sm90_conv_wgrad_f16_256x128, __half, 256, 128, Cooperative)
