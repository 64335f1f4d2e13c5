#include "sdgp/sm80_launch.cuh"

SDGP_SM80_WGRAD(sdgp_sm80_wgrad_f16_256x128, __half, 256x128)
