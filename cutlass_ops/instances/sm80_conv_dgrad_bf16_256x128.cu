#include "sdgp/sm80_launch.cuh"

SDGP_SM80_CONV_DGRAD(sdgp_sm80_conv_dgrad_bf16_256x128, __nv_bfloat16, 256x128)
