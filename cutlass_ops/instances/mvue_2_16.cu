#include "sdgp/prune_compress_launch.cuh"

SDGP_PRUNE_COMPRESS(sdgp_mvue_2_16_f16, __half, Mvue, 2, 16)
SDGP_PRUNE_COMPRESS(sdgp_mvue_2_16_bf16, __nv_bfloat16, Mvue, 2, 16)
