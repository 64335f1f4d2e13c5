#include "sdgp/prune_compress_launch.cuh"

SDGP_SAMPLE_COMPRESS(sdgp_random_2_4_f16, __half, RandomQuad)
SDGP_SAMPLE_COMPRESS(sdgp_random_2_4_bf16, __nv_bfloat16, RandomQuad)
