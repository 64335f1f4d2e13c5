#include "sdgp/prune_compress_launch.cuh"

SDGP_PRUNE_COMPRESS(sdgp_magnitude_2_4_f16, __half, Magnitude, 2, 4)
SDGP_PRUNE_COMPRESS(sdgp_magnitude_2_4_bf16, __nv_bfloat16, Magnitude, 2, 4)
