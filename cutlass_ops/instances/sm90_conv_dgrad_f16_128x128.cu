#include "sdgp/sm90_sparse_conv_launch.cuh"

SDGP_SM90_SPARSE_CONV_DGRAD(sdgp_sm90_conv_dgrad_f16_128x128, __half, 128, 128, Cooperative)
