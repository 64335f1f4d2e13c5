#include "sdgp/prune_compress_launch.cuh"

SDGP_PRUNE_COMPRESS(sdgp_rescale_magnitude_1_4_f16, __half, RescaleMagnitude, 1, 4)
SDGP_PRUNE_COMPRESS(sdgp_rescale_magnitude_1_4_bf16, __nv_bfloat16, RescaleMagnitude, 1, 4)
