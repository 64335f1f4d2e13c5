#include "sdgp/sm80_launch.cuh"

SDGP_SM80_WGRAD(sdgp_sm80_wgrad_f16_128x256, __half, 128x256)
