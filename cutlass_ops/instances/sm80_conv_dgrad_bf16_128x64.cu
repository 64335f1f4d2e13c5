#include "sdgp/sm80_launch.cuh"

SDGP_SM80_CONV_DGRAD(sdgp_sm80_conv_dgrad_bf16_128x64, __nv_bfloat16, 128x64)
