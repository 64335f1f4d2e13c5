// Host side of the convolution gradients: im2col tensor maps, the residue classes of a strided dgrad, launch.
#pragma once

#include <algorithm>
#include <array>
#include <climits>
#include <numeric>

#include "sdgp/dgrad_residue.cuh"
#include "sdgp/sm90_sparse_gemm_launch.cuh"
#include "sdgp/sparse_conv_api.h"

namespace sdgp::sm90 {

// Map of an NHWC tensor of 16-bit elements [images, height, width, channels] for boxes of `box_channels` of
// `box_pixels` consecutive pixels of `grid`.
inline int im2col_map(CUtensorMap& map, CUtensorMapDataType type, const void* tensor, int images, int height, int width,
                      int64_t channels, const PixelGrid& grid, int box_channels, int box_pixels,
                      CUtensorMapSwizzle swizzle) {
  TensorMapRequest request;
  request.address = reinterpret_cast<cuuint64_t>(tensor);
  request.extent[0] = channels;
  request.extent[1] = width;
  request.extent[2] = height;
  request.extent[3] = images;
  request.stride_bytes[0] = channels * 2;
  request.stride_bytes[1] = channels * 2 * width;
  request.stride_bytes[2] = channels * 2 * width * height;
  request.box[0] = box_channels;
  request.box[1] = box_pixels;
  request.step[1] = grid.step_w;
  request.step[2] = grid.step_h;
  // The walk covers the pixels from the lower corner to (last pixel + upper corner), a step apart.
  request.lower[0] = grid.lower_w;
  request.lower[1] = grid.lower_h;
  request.upper[0] = grid.lower_w + (grid.width - 1) * grid.step_w - (width - 1);
  request.upper[1] = grid.lower_h + (grid.height - 1) * grid.step_h - (height - 1);
  request.type = type;
  request.swizzle = swizzle;
  request.rank = 4;
  request.is_im2col = 1;
  return tensor_map(map, request);
}

// Map of a filter [C_out, R, S, C_in] for boxes of 64 input channels of one tap of some output channels.
template <typename Config>
int filter_map(CUtensorMap& map, const SdgpSparseConv& conv) {
  TensorMapRequest request;
  request.address = reinterpret_cast<cuuint64_t>(conv.b);
  request.extent[0] = conv.c_in;
  request.extent[1] = conv.r * conv.s;
  request.extent[2] = conv.c_out;
  request.stride_bytes[0] = static_cast<cuuint64_t>(conv.c_in) * 2;
  request.stride_bytes[1] = request.stride_bytes[0] * conv.r * conv.s;
  request.box[0] = kSwizzleElements;
  request.box[1] = 1;
  request.box[2] = kStageK / conv.cluster_size;
  request.type = kTensorMapType<typename Config::Element>;
  request.swizzle = CU_TENSOR_MAP_SWIZZLE_128B;
  request.rank = 3;
  return tensor_map(map, request);
}

// The residues of one dimension of a dgrad, and in `lower` the first gradient pixel that any of them reads.
inline DgradAxis dgrad_axis(int extent, int filter, int stride, int padding, int dilation, int& lower) {
  const int common = std::gcd(stride, dilation);
  DgradAxis axis{extent, stride, stride / common, dilation / common, {}};
  int highest[kMaxStride] = {};  // gradient pixel under the first tap at the residue's first pixel
  lower = INT_MAX;
  for (int first = 0; first < std::min(stride, extent); ++first) {
    const ResidueClass residue = residue_class(first, filter, stride, padding, dilation, axis.tap_step);
    if (residue.taps == 0) continue;
    axis.residues[first] = {residue.taps, residue.first_tap, 0};
    highest[first] = residue.highest;
    lower = std::min(lower, highest[first] - (residue.taps - 1) * axis.offset_step);
  }
  if (lower == INT_MAX) lower = 0;
  for (int first = 0; first < kMaxStride; ++first)
    if (axis.residues[first].taps > 0) axis.residues[first].last_offset = highest[first] - lower;
  return axis;
}

template <typename Config>
int launch_sparse_dgrad(const SdgpSparseConv& conv) {
  if (std::max(conv.stride_h, conv.stride_w) > kMaxStride || conv.splits != 1) return cudaErrorInvalidValue;
  const int64_t pixels = int64_t{conv.n} * conv.h * conv.w;
  if (std::max(pixels, int64_t{conv.n} * conv.p * conv.q) > INT_MAX) return cudaErrorInvalidConfiguration;
  DgradGather gather{};
  int lower_h, lower_w;
  gather.vertical = dgrad_axis(conv.h, conv.r, conv.stride_h, conv.padding_h, conv.dilation_h, lower_h);
  gather.horizontal = dgrad_axis(conv.w, conv.s, conv.stride_w, conv.padding_w, conv.dilation_w, lower_w);
  gather.grid = {(conv.h + conv.stride_h - 1) / conv.stride_h,
                 (conv.w + conv.stride_w - 1) / conv.stride_w,
                 lower_h,
                 lower_w,
                 1,
                 1};
  gather.pixels = conv.n * gather.grid.height * gather.grid.width;
  gather.n = conv.c_in;
  const int tiles_per_tap = (conv.c_out + kStageK - 1) / kStageK;
  gather.by_tap = FastDivision(tiles_per_tap);
  gather.taps_w = conv.s;

  // What lasts longest starts first. Pixels without a tap get a zero gradient, which changes no sum.
  const auto taps = [&](uint8_t part) {
    return gather.vertical.residues[part / kMaxStride].taps * gather.horizontal.residues[part % kMaxStride].taps;
  };
  int parts = 0;
  for (int i = 0; i < std::min(conv.stride_h, conv.h); ++i) {
    for (int j = 0; j < std::min(conv.stride_w, conv.w); ++j) {
      const auto part = static_cast<uint8_t>(i * kMaxStride + j);
      if (taps(part) > 0 || conv.accumulate == 0) gather.parts[parts++] = part;
    }
  }
  if (parts == 0) return 0;
  std::stable_sort(gather.parts, gather.parts + parts, [&](uint8_t a, uint8_t b) { return taps(a) > taps(b); });

  constexpr auto kType = kTensorMapType<typename Config::Element>;
  const int64_t values = conv.padded_k / 2, words = metadata_pitch(conv.padded_k);
  TensorMaps maps;
  int error = allow_shared_memory<Config>();
  if (error == 0)
    error = im2col_map(maps.values, kType, conv.values, conv.n, conv.p, conv.q, values, gather.grid, kBlockK / 2,
                       Config::kBlockM, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error == 0)
    error = im2col_map(maps.metadata, CU_TENSOR_MAP_DATA_TYPE_UINT16, conv.metadata, conv.n, conv.p, conv.q, words,
                       gather.grid, kBlockK / 16, Config::kBlockM, CU_TENSOR_MAP_SWIZZLE_NONE);
  if (error == 0) error = filter_map<Config>(maps.b, conv);
  if (error != 0) return error;
  // The k tiles of the first part, which clusters may share if it is the only one and blocks of A end with its taps.
  const int k_tiles = tiles_per_tap % kBlockTiles == 0 ? taps(gather.parts[0]) * tiles_per_tap : 0;
  return launch<Config>(maps, gather, Target(conv), gather.pixels, conv.c_in, k_tiles, parts, pixels, conv.c_in);
}

template <typename Config>
int launch_sparse_wgrad(const SdgpSparseConv& conv) {
  const Target target(conv);
  const int64_t positions = int64_t{conv.n} * conv.p * conv.q;
  if (positions > INT_MAX - kStageK) return cudaErrorInvalidConfiguration;
  const int k_tiles = (static_cast<int>(positions) + kStageK - 1) / kStageK;
  if (!target.fits(k_tiles)) return cudaErrorInvalidValue;
  const PixelGrid grid{conv.p, conv.q, -conv.padding_h, -conv.padding_w, conv.stride_h, conv.stride_w};
  TensorMaps maps;
  int error = allow_shared_memory<Config>();
  if (error == 0) error = matrix_operand_maps<Config>(maps, conv.values, conv.metadata, conv.c_out, conv.padded_k);
  if (error == 0)
    error = im2col_map(maps.b, kTensorMapType<typename Config::Element>, conv.b, conv.n, conv.h, conv.w, conv.c_in,
                       grid, kSwizzleElements, kStageK / conv.cluster_size, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != 0) return error;
  const int taps = conv.r * conv.s, blocks_per_tap = (conv.c_in + kSwizzleElements - 1) / kSwizzleElements;
  const WgradGather gather{grid,
                           conv.c_out,
                           SplitRange(k_tiles, target.splits),
                           conv.c_in,
                           taps,
                           conv.s,
                           blocks_per_tap,
                           conv.dilation_h,
                           conv.dilation_w,
                           PixelStep(grid, kStageK)};
  const int64_t columns = int64_t{taps} * blocks_per_tap * kSwizzleElements;
  return launch<Config>(maps, gather, target, conv.c_out, columns, k_tiles, target.splits, conv.c_out,
                        int64_t{taps} * conv.c_in);
}

}  // namespace sdgp::sm90

// Define the entry point of one instance. CONSUMERS: PingPong or Cooperative.
#define SDGP_SM90_SPARSE_CONV(NAME, PASS, GATHER, ELEMENT, MAJOR, BLOCK_M, BLOCK_N, CONSUMERS)                 \
  using NAME##_config = sdgp::sm90::TileConfig<ELEMENT, sdgp::sm90::GATHER, sdgp::sm90::Major::MAJOR, BLOCK_M, \
                                               BLOCK_N, sdgp::sm90::Consumers::k##CONSUMERS>;                  \
  SDGP_LAUNCH_FACTS(NAME, NAME##_config)                                                                       \
  extern "C" int NAME(const SdgpSparseConv* conv) { return sdgp::sm90::launch_sparse_##PASS<NAME##_config>(*conv); }
#define SDGP_SM90_SPARSE_CONV_DGRAD(NAME, ELEMENT, BLOCK_M, BLOCK_N, CONSUMERS) \
  SDGP_SM90_SPARSE_CONV(NAME, dgrad, DgradGather, ELEMENT, K, BLOCK_M, BLOCK_N, CONSUMERS)
#define SDGP_SM90_SPARSE_CONV_WGRAD(NAME, ELEMENT, BLOCK_M, BLOCK_N, CONSUMERS) \
  SDGP_SM90_SPARSE_CONV(NAME, wgrad, WgradGather, ELEMENT, MN, BLOCK_M, BLOCK_N, CONSUMERS)
