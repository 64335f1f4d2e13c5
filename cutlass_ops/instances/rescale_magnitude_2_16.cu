#include "sdgp/prune_compress_launch.cuh"

SDGP_PRUNE_COMPRESS(sdgp_rescale_magnitude_2_16_f16, __half, RescaleMagnitude, 2, 16)
SDGP_PRUNE_COMPRESS(sdgp_rescale_magnitude_2_16_bf16, __nv_bfloat16, RescaleMagnitude, 2, 16)
