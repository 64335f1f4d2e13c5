#include "sdgp/sm80_launch.cuh"

SDGP_SM80_WGRAD(sdgp_sm80_wgrad_bf16_256x128, __nv_bfloat16, 256x128)
