#include "sdgp/prune_compress_launch.cuh"

SDGP_PRUNE_COMPRESS(sdgp_magnitude_1_8_f16, __half, Magnitude, 1, 8)
SDGP_PRUNE_COMPRESS(sdgp_magnitude_1_8_bf16, __nv_bfloat16, Magnitude, 1, 8)
