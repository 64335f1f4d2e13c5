#include "sdgp/sm80_launch.cuh"

SDGP_SM80_DGRAD(sdgp_sm80_dgrad_bf16_128x256, __nv_bfloat16, 128x256)
