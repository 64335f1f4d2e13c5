#include "sdgp/sm80_launch.cuh"

SDGP_SM80_WGRAD(sdgp_sm80_wgrad_bf16_128x256, __nv_bfloat16, 128x256)
