#include "sdgp/sm80_launch.cuh"

SDGP_SM80_CONV_WGRAD(sdgp_sm80_conv_wgrad_bf16_128x64_any, __nv_bfloat16, 128x64_any)
