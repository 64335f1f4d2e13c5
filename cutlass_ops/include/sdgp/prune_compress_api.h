// Host interface of the prune+compress kernels: plain C, raw device pointers and a stream.
#pragma once

#include <cstdint>

#ifdef __cplusplus
extern "C" {
#endif

// Prunes dY [t, c] along its channels (dgrad operand) and its positions (wgrad operand) and compresses both, in one
// pass over dY. An output whose pointers are null is not computed. The operands' layout is in
// sdgp_accel/semi_structured.py ("row_major").
struct SdgpPruneCompress {
  const void* dy;  // 16-bit, row_stride elements from one position to the next, channels contiguous
  int64_t t, c, row_stride;
  void* dgrad_values;    // [t, dgrad_k / 2]
  void* dgrad_metadata;  // 16-bit words [t, dgrad_words], row-major
  int64_t dgrad_k;       // c padded to a multiple of 16 or more
  int64_t dgrad_words;   // dgrad_k / 16, or that padded to a multiple of 8, 16 bytes: with legal metadata
  void* wgrad_values;    // [wgrad_k / 2, wgrad_pitch]
  void* wgrad_metadata;  // 16-bit words [wgrad_k / 16, wgrad_pitch], in a tiled layout of c rows
  int64_t wgrad_k;       // t padded to a multiple of 16 or more
  int64_t wgrad_pitch;   // c, or c padded to a multiple of 8: with zeros and legal metadata
  void* bias;            // [c]: sum of dy over its positions, in a fixed order; null: not wanted
  float* bias_partials;  // workspace [sdgp_bias_partial_rows(t, c), c]
  // For random and mvue: two numbers in device memory, or, where that pointer is null, the two that follow.
  const int64_t* seed;
  int64_t seed_values[2];
  uint32_t rank;
  float eps;  // rescale_magnitude
  // rescale_magnitude over more than one group: a factor per (sample, channel), [samples, c], or a single one where
  // positions_per_sample is 0. Null for the scope of one group.
  const float* dgrad_scale;
  const float* wgrad_scale;
  int64_t positions_per_sample;
  int32_t metadata_layout;  // SDGP_LAYOUT_..; the metadata of a tiled layout has to hold 0x4444 everywhere beforehand,
                            // because rows that only fill up a tile are not written
  int32_t bias_is_float;    // else of dy's type
  void* stream;
};

// Layouts of metadata, described in sdgp_accel/layouts.py. Tiled ones need dgrad_k and wgrad_k in whole tiles, and
// dgrad_words = dgrad_k / 16.
enum { SDGP_LAYOUT_ROW_MAJOR, SDGP_LAYOUT_SM80, SDGP_LAYOUT_SM90_K32, SDGP_LAYOUT_SM90_K64, SDGP_LAYOUT_SM90_K128 };

// The factors of rescale_magnitude for a scope wider than a group: sum |dy| / (sum |kept| + eps) per (sample, channel).
struct SdgpScopeScales {
  const void* dy;
  int64_t t, c, row_stride;
  int64_t positions_per_sample;  // 0: one factor for the whole tensor
  float eps;
  double* sums;        // workspace of sdgp_scope_workspace(t, c, positions_per_sample) values; null where it says 0
  float* dgrad_scale;  // [scopes], or null
  float* wgrad_scale;  // [scopes], or null
  void* stream;
};

// Return a cudaError_t; nothing is synchronised.
typedef int SdgpPruneCompressFunction(const struct SdgpPruneCompress*);
typedef int SdgpScopeScalesFunction(const struct SdgpScopeScales*);

// The rows of the bias gradient's workspace, and its second stage: the sums of the workspace's columns, in float32 or
// rounded to bfloat16 or float16.
int64_t sdgp_bias_partial_rows(int64_t t, int64_t c);
int sdgp_sum_bias_partials(const struct SdgpPruneCompress* problem, int is_bfloat16);

// The last stage of the factors, and the float64 values that the first hands on to it.
int64_t sdgp_scope_workspace(int64_t t, int64_t c, int64_t positions_per_sample);
int sdgp_finish_scope_scales(const struct SdgpScopeScales* problem);

#ifdef __cplusplus
}
#endif
