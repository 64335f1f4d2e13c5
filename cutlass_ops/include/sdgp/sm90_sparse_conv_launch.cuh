// Host side of the convolution gradients: im2col tensor maps, the residue classes of a strided dgrad, launch.
#pragma once

#include <numeric>

#include "sdgp/sm90_sparse_gemm_launch.cuh"
#include "sdgp/sparse_conv_api.h"

namespace sdgp::sm90 {

inline PFN_cuTensorMapEncodeIm2col_v12000 im2col_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeIm2col", &function, 12000, cudaEnableDefault, &status);
    return reinterpret_cast<PFN_cuTensorMapEncodeIm2col_v12000>(status == cudaDriverEntryPointSuccess ? function
                                                                                                      : nullptr);
  }();
  return encoder;
}

// Map of an NHWC tensor of 16-bit elements [images, height, width, channels], pixels `pixel_stride` elements apart, for
// boxes of `box_channels` of `box_pixels` consecutive pixels of `grid`.
inline int encode_im2col(CUtensorMap& map, CUtensorMapDataType type, const void* tensor, int images, int height,
                         int width, int64_t channels, int64_t pixel_stride, const PixelGrid& grid, int box_channels,
                         int box_pixels, CUtensorMapSwizzle swizzle) {
  if (im2col_map_encoder() == nullptr) return cudaErrorNotSupported;
  const auto bytes = static_cast<cuuint64_t>(pixel_stride) * 2;
  const cuuint64_t extent[4] = {static_cast<cuuint64_t>(channels), static_cast<cuuint64_t>(width),
                                static_cast<cuuint64_t>(height), static_cast<cuuint64_t>(images)};
  const cuuint64_t strides[3] = {bytes, bytes * width, bytes * width * height};
  // The walk covers the pixels from the lower corner to (last pixel + upper corner), `step` apart.
  const int lower[2] = {grid.lower_w, grid.lower_h};
  const int upper[2] = {grid.lower_w + (grid.width - 1) * grid.step_w - (width - 1),
                        grid.lower_h + (grid.height - 1) * grid.step_h - (height - 1)};
  const cuuint32_t step[4] = {1, static_cast<cuuint32_t>(grid.step_w), static_cast<cuuint32_t>(grid.step_h), 1};
  const CUresult result = im2col_map_encoder()(
      &map, type, 4, const_cast<void*>(tensor), extent, strides, lower, upper, static_cast<cuuint32_t>(box_channels),
      static_cast<cuuint32_t>(box_pixels), step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  if (result != CUDA_SUCCESS) return kDriverErrorBase + result;
  return 0;
}

// One spatial dimension of a strided dgrad, seen from the input pixels first, first + stride, ...: which taps meet a
// gradient pixel there. Tap first_tap + t * tap_step reads gradient pixel i + last_offset - t * offset_step, where
// offsets are counted from `lower`.
struct ResidueClass {
  int positions, taps, first_tap, tap_step, lower, last_offset, offset_step;
};

inline ResidueClass residue_class(int first, int extent, int filter, int stride, int padding, int dilation) {
  const int common = std::gcd(stride, dilation);
  ResidueClass c{};
  c.positions = (extent - first + stride - 1) / stride;
  c.tap_step = stride / common;
  c.offset_step = dilation / common;
  // first + padding - tap * dilation must be a multiple of the stride.
  while (c.first_tap < c.tap_step && (first + padding - c.first_tap * dilation) % stride != 0) ++c.first_tap;
  c.taps = c.first_tap == c.tap_step || c.first_tap >= filter ? 0 : (filter - c.first_tap - 1) / c.tap_step + 1;
  if (c.taps == 0) return c;
  const int highest = (first + padding - c.first_tap * dilation) / stride;
  c.last_offset = (c.taps - 1) * c.offset_step;
  c.lower = highest - c.last_offset;
  return c;
}

template <typename Config>
int launch_dgrad_class(const SdgpSparseConv& conv, const ResidueClass& vertical, const ResidueClass& horizontal,
                       int first_h, int first_w, const Target& target) {
  constexpr auto kType = kTensorMapType<typename Config::Element>;
  const PixelGrid grid{vertical.positions, horizontal.positions, vertical.lower, horizontal.lower, 1, 1};
  TensorMaps maps;
  int error = encode_im2col(maps.values, kType, conv.values, conv.n, conv.p, conv.q, conv.padded_k / 2,
                            conv.padded_k / 2, grid, kBlockK / 2, Config::kBlockM, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error == 0)
    error = encode_im2col(maps.metadata, CU_TENSOR_MAP_DATA_TYPE_UINT16, conv.metadata, conv.n, conv.p, conv.q,
                          conv.padded_k / 16, conv.padded_k / 16, grid, kBlockK / 16, Config::kBlockM,
                          CU_TENSOR_MAP_SWIZZLE_NONE);
  if (error == 0) {
    if (tensor_map_encoder() == nullptr) return cudaErrorNotSupported;
    const int taps = conv.r * conv.s;
    const cuuint64_t extent[3] = {static_cast<cuuint64_t>(conv.c_in), static_cast<cuuint64_t>(taps),
                                  static_cast<cuuint64_t>(conv.c_out)};
    const cuuint64_t strides[2] = {static_cast<cuuint64_t>(conv.c_in) * 2,
                                   static_cast<cuuint64_t>(conv.c_in) * taps * 2};
    const cuuint32_t box[3] = {kSwizzleElements, 1, static_cast<cuuint32_t>(kStageK / conv.cluster_size)};
    const cuuint32_t step[3] = {1, 1, 1};
    const CUresult result = tensor_map_encoder()(&maps.b, kType, 3, const_cast<void*>(conv.b), extent, strides, box,
                                                 step, CU_TENSOR_MAP_INTERLEAVE_NONE, CU_TENSOR_MAP_SWIZZLE_128B,
                                                 CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
    if (result != CUDA_SUCCESS) error = kDriverErrorBase + result;
  }
  if (error != 0) return error;
  DgradGather gather{};
  gather.grid = grid;
  gather.pixels = conv.n * vertical.positions * horizontal.positions;
  gather.n = conv.c_in;
  gather.tiles_per_tap = (conv.c_out + kStageK - 1) / kStageK;
  gather.taps_w = horizontal.taps;
  gather.last_offset_h = vertical.last_offset;
  gather.last_offset_w = horizontal.last_offset;
  gather.offset_step_h = vertical.offset_step;
  gather.offset_step_w = horizontal.offset_step;
  gather.first_tap = vertical.first_tap * conv.s + horizontal.first_tap;
  gather.tap_step_h = vertical.tap_step * conv.s;
  gather.tap_step_w = horizontal.tap_step;
  gather.out_height = conv.h;
  gather.out_width = conv.w;
  gather.first_h = first_h;
  gather.first_w = first_w;
  gather.stride_h = conv.stride_h;
  gather.stride_w = conv.stride_w;
  return launch<Config>(maps, gather, target, gather.pixels, conv.c_in,
                        vertical.taps * horizontal.taps * gather.tiles_per_tap, conv.n * conv.h * conv.w, conv.c_in);
}

template <typename Config>
int launch_sparse_dgrad(const SdgpSparseConv& conv) {
  const Target target{conv.out,
                      nullptr,
                      false,
                      conv.accumulate != 0,
                      1,
                      conv.group_n,
                      conv.cluster_size,
                      conv.sm_count,
                      static_cast<cudaStream_t>(conv.stream)};
  // Pixels that no tap reaches (a stride larger than the filter's reach) get a zero gradient.
  bool covered = true;
  for (int i = 0; i < conv.stride_h; ++i)
    covered = covered && residue_class(i, conv.h, conv.r, conv.stride_h, conv.padding_h, conv.dilation_h).taps > 0;
  for (int j = 0; j < conv.stride_w; ++j)
    covered = covered && residue_class(j, conv.w, conv.s, conv.stride_w, conv.padding_w, conv.dilation_w).taps > 0;
  if (!covered && conv.accumulate == 0) {
    const size_t bytes = static_cast<size_t>(conv.n) * conv.h * conv.w * conv.c_in * 2;
    const cudaError_t cleared = cudaMemsetAsync(conv.out, 0, bytes, target.stream);
    if (cleared != cudaSuccess) return cleared;
  }
  for (int i = 0; i < std::min(conv.stride_h, conv.h); ++i) {
    const ResidueClass vertical = residue_class(i, conv.h, conv.r, conv.stride_h, conv.padding_h, conv.dilation_h);
    for (int j = 0; j < std::min(conv.stride_w, conv.w); ++j) {
      const ResidueClass horizontal = residue_class(j, conv.w, conv.s, conv.stride_w, conv.padding_w, conv.dilation_w);
      if (vertical.taps == 0 || horizontal.taps == 0) continue;
      const int error = launch_dgrad_class<Config>(conv, vertical, horizontal, i, j, target);
      if (error != 0) return error;
    }
  }
  return 0;
}

template <typename Config>
int launch_sparse_wgrad(const SdgpSparseConv& conv) {
  const PixelGrid grid{conv.p, conv.q, -conv.padding_h, -conv.padding_w, conv.stride_h, conv.stride_w};
  TensorMaps maps;
  int error = encode_matrix_operand<Config>(maps, conv.values, conv.metadata, conv.c_out, conv.padded_k);
  if (error == 0)
    error = encode_im2col(maps.b, kTensorMapType<typename Config::Element>, conv.b, conv.n, conv.h, conv.w, conv.c_in,
                          conv.c_in, grid, kSwizzleElements, kStageK / conv.cluster_size, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != 0) return error;
  const int taps = conv.r * conv.s, blocks_per_tap = (conv.c_in + kSwizzleElements - 1) / kSwizzleElements;
  const WgradGather gather{grid, conv.c_out, conv.c_in, taps, conv.s, blocks_per_tap, conv.dilation_h, conv.dilation_w};
  const Target target{conv.out,
                      conv.workspace,
                      conv.out_is_float != 0,
                      conv.accumulate != 0,
                      conv.splits,
                      conv.group_n,
                      conv.cluster_size,
                      conv.sm_count,
                      static_cast<cudaStream_t>(conv.stream)};
  const int positions = conv.n * conv.p * conv.q;
  return launch<Config>(maps, gather, target, conv.c_out, taps * blocks_per_tap * kSwizzleElements,
                        (positions + kStageK - 1) / kStageK, conv.c_out, taps * conv.c_in);
}

}  // namespace sdgp::sm90

// Define the entry point of one instance.
#define SDGP_SM90_SPARSE_CONV(NAME, PASS, GATHER, ELEMENT, MAJOR, BLOCK_M, BLOCK_N)                                 \
  extern "C" int NAME(const SdgpSparseConv* conv) {                                                                 \
    using Config = sdgp::sm90::TileConfig<ELEMENT, sdgp::sm90::GATHER, sdgp::sm90::Major::MAJOR, BLOCK_M, BLOCK_N>; \
    return sdgp::sm90::launch_sparse_##PASS<Config>(*conv);                                                         \
  }
#define SDGP_SM90_SPARSE_CONV_DGRAD(NAME, ELEMENT, BLOCK_M, BLOCK_N) \
  SDGP_SM90_SPARSE_CONV(NAME, dgrad, DgradGather, ELEMENT, K, BLOCK_M, BLOCK_N)
#define SDGP_SM90_SPARSE_CONV_WGRAD(NAME, ELEMENT, BLOCK_M, BLOCK_N) \
  SDGP_SM90_SPARSE_CONV(NAME, wgrad, WgradGather, ELEMENT, MN, BLOCK_M, BLOCK_N)
