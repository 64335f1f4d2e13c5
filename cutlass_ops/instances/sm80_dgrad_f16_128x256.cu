#include "sdgp/sm80_launch.cuh"

SDGP_SM80_DGRAD(sdgp_sm80_dgrad_f16_128x256, __half, 128x256)
