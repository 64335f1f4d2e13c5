#include "sdgp/prune_compress_launch.cuh"
#include "sdgp/scope_scales.cuh"

SDGP_SCOPE_SCALES(sdgp_scope_scales_1_8_f16, __half, 1, 8)
SDGP_SCALED_MAGNITUDE(sdgp_scaled_magnitude_1_8_f16, __half, 1, 8)
SDGP_SCOPE_SCALES(sdgp_scope_scales_1_8_bf16, __nv_bfloat16, 1, 8)
SDGP_SCALED_MAGNITUDE(sdgp_scaled_magnitude_1_8_bf16, __nv_bfloat16, 1, 8)
