#include "sdgp/prune_compress_launch.cuh"
#include "sdgp/scope_scales.cuh"

SDGP_SCOPE_SCALES(sdgp_scope_scales_2_4_f16, __half, 2, 4)
SDGP_SCALED_MAGNITUDE(sdgp_scaled_magnitude_2_4_f16, __half, 2, 4)
SDGP_SCOPE_SCALES(sdgp_scope_scales_2_4_bf16, __nv_bfloat16, 2, 4)
SDGP_SCALED_MAGNITUDE(sdgp_scaled_magnitude_2_4_bf16, __nv_bfloat16, 2, 4)
