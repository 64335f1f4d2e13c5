#include "sdgp/sm80_launch.cuh"

SDGP_SM80_DGRAD(sdgp_sm80_dgrad_bf16_256x128, __nv_bfloat16, 256x128)
