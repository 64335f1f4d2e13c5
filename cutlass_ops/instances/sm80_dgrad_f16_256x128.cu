#include "sdgp/sm80_launch.cuh"

SDGP_SM80_DGRAD(sdgp_sm80_dgrad_f16_256x128, __half, 256x128)
