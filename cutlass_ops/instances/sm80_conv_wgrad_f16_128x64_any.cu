#include "sdgp/sm80_launch.cuh"

SDGP_SM80_CONV_WGRAD(sdgp_sm80_conv_wgrad_f16_128x64_any, __half, 128x64_any)
