#include "sdgp/prune_compress_launch.cuh"

SDGP_PRUNE_COMPRESS(sdgp_mvue_1_8_f16, __half, Mvue, 1, 8)
SDGP_PRUNE_COMPRESS(sdgp_mvue_1_8_bf16, __nv_bfloat16, Mvue, 1, 8)
