#include "sdgp/sm90_sparse_conv_launch.cuh"

SDGP_SM90_SPARSE_CONV_WGRAD(sdgp_sm90_conv_wgrad_bf16_64x192_pingpong, __nv_bfloat16, 64, 192, PingPong)
