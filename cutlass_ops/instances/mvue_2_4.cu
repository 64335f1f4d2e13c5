#include "sdgp/prune_compress_launch.cuh"

SDGP_PRUNE_COMPRESS(sdgp_mvue_2_4_f16, __half, Mvue, 2, 4)
SDGP_PRUNE_COMPRESS(sdgp_mvue_2_4_bf16, __nv_bfloat16, Mvue, 2, 4)
