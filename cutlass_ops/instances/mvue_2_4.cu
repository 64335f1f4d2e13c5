#include "sdgp/prune_compress_launch.cuh"

SDGP_SAMPLE_COMPRESS(sdgp_mvue_2_4_f16, __half, MvueQuad)
SDGP_SAMPLE_COMPRESS(sdgp_mvue_2_4_bf16, __nv_bfloat16, MvueQuad)
