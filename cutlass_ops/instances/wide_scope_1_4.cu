#include "sdgp/prune_compress_launch.cuh"
#include "sdgp/scope_scales.cuh"

SDGP_SCOPE_SCALES(sdgp_scope_scales_1_4_f16, __half, 1, 4)
SDGP_SCALED_MAGNITUDE(sdgp_scaled_magnitude_1_4_f16, __half, 1, 4)
SDGP_SCOPE_SCALES(sdgp_scope_scales_1_4_bf16, __nv_bfloat16, 1, 4)
SDGP_SCALED_MAGNITUDE(sdgp_scaled_magnitude_1_4_bf16, __nv_bfloat16, 1, 4)
