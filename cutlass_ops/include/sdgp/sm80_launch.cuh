// Host side of sm80_sparse_gemm.cuh: gathers of the C interface's structs, launch, the entry points of instances.
#pragma once

#include <algorithm>
#include <numeric>
#include <type_traits>

#include "sdgp/partial_sums_api.h"
#include "sdgp/sm80_sparse_gemm.cuh"
#include "sdgp/sparse_conv_api.h"
#include "sdgp/sparse_gemm_api.h"

namespace sdgp::sm80 {

// `arguments`: SdgpSparseGemm or SdgpSparseConv. The product has `m` rows in its largest part and `columns` columns;
// the output is [rows, row_length].
template <typename Config, typename Arguments>
int launch(const typename Config::Gather& gather, const Arguments& arguments, int64_t m, int64_t columns, int64_t rows,
           int64_t row_length) {
  const int64_t m_tiles = (m + Config::kBlockM - 1) / Config::kBlockM;
  const int64_t n_tiles = (columns + Config::kBlockN - 1) / Config::kBlockN;
  const bool split = arguments.splits > 1;
  // The kernel counts in 32 bits, rows and columns in whole tiles.
  if (m_tiles * Config::kBlockM > INT_MAX || n_tiles * Config::kBlockN > INT_MAX || m_tiles * n_tiles > INT_MAX ||
      rows > INT_MAX || row_length > INT_MAX || gather.parts() > 65535)
    return cudaErrorInvalidConfiguration;
  // Every time: the attribute belongs to the current device.
  const cudaError_t attribute = cudaFuncSetAttribute(sparse_gemm_kernel<Config>,
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (attribute != cudaSuccess) return attribute;
  const bool is_float = arguments.out_is_float != 0, accumulate = arguments.accumulate != 0;
  const Problem problem{static_cast<int>(m_tiles),
                        static_cast<int>(n_tiles),
                        static_cast<int>(rows),
                        static_cast<int>(row_length),
                        arguments.splits,
                        std::min(arguments.group_n, static_cast<int>(n_tiles)),
                        split ? arguments.workspace : arguments.out,
                        split      ? Output::kPartial
                        : is_float ? Output::kFloat
                                   : Output::kElement,
                        !split && accumulate};
  const dim3 grid(static_cast<unsigned>(m_tiles * n_tiles), gather.parts(), arguments.splits);
  const auto stream = static_cast<cudaStream_t>(arguments.stream);
  sparse_gemm_kernel<Config><<<grid, Config::kThreads, Config::kSharedBytes, stream>>>(gather, problem);
  const cudaError_t launched = cudaGetLastError();
  if (launched != cudaSuccess || !split) return launched;
  const SdgpPartialSums sums{static_cast<const float*>(arguments.workspace),
                             arguments.out,
                             rows * row_length,
                             arguments.splits,
                             is_float,
                             std::is_same_v<typename Config::Element, __nv_bfloat16>,
                             accumulate,
                             arguments.sm_count,
                             false,
                             stream};
  return sdgp_sum_partials(&sums);
}

// A part of the k range for every split, and one for every block of the grid's z axis.
inline bool splits_fit(int splits, int64_t k) { return splits <= 65535 && splits <= (k + kTileK - 1) / kTileK; }

template <typename Config>
int launch_gemm(const SdgpSparseGemm& gemm) {
  if (!splits_fit(gemm.splits, gemm.k) || gemm.owned_blocks != 0) return cudaErrorInvalidValue;
  if (gemm.k > INT_MAX - kTileK) return cudaErrorInvalidConfiguration;
  const MatrixGather gather{gemm.values, gemm.metadata, gemm.b, gemm.m, gemm.n, gemm.k, gemm.padded_k};
  return launch<Config>(gather, gemm, gemm.m, gemm.n, gemm.m, gemm.n);
}

inline DgradAxis dgrad_axis(int in, int out, int filter, int stride, int padding, int dilation) {
  const int common = std::gcd(stride, dilation);
  return {in, out, filter, stride, padding, dilation, stride / common, dilation / common};
}

template <typename Config>
int launch_conv_dgrad(const SdgpSparseConv& conv) {
  if (conv.splits != 1 || conv.owned_blocks != 0 || conv.out_is_float != 0) return cudaErrorInvalidValue;
  const DgradGather gather{conv.values,
                           conv.metadata,
                           conv.b,
                           conv.n,
                           conv.c_in,
                           conv.c_out,
                           conv.padded_k,
                           dgrad_axis(conv.h, conv.p, conv.r, conv.stride_h, conv.padding_h, conv.dilation_h),
                           dgrad_axis(conv.w, conv.q, conv.s, conv.stride_w, conv.padding_w, conv.dilation_w)};
  const int64_t pixels = int64_t{conv.n} * conv.h * conv.w;
  if (int64_t{conv.n} * conv.p * conv.q > INT_MAX) return cudaErrorInvalidConfiguration;
  // The first class is the largest.
  const int64_t largest = int64_t{conv.n} * ((conv.h - 1) / conv.stride_h + 1) * ((conv.w - 1) / conv.stride_w + 1);
  return launch<Config>(gather, conv, largest, conv.c_in, pixels, conv.c_in);
}

template <typename Config>
int launch_conv_wgrad(const SdgpSparseConv& conv) {
  const int64_t positions = static_cast<int64_t>(conv.n) * conv.p * conv.q;
  if (!splits_fit(conv.splits, positions) || conv.owned_blocks != 0) return cudaErrorInvalidValue;
  if (positions > INT_MAX - kTileK || static_cast<int64_t>(conv.n) * conv.h * conv.w > INT_MAX)
    return cudaErrorInvalidConfiguration;
  const WgradGather gather{conv.values,
                           conv.metadata,
                           conv.b,
                           conv.c_out,
                           conv.c_in,
                           static_cast<int>(positions),
                           {conv.h, conv.r, conv.stride_h, conv.padding_h, conv.dilation_h},
                           {conv.w, conv.s, conv.stride_w, conv.padding_w, conv.dilation_w},
                           FastDivision(conv.q),
                           FastDivision(conv.p),
                           -conv.q,
                           -conv.p};
  return launch<Config>(gather, conv, conv.c_out, gather.columns(), conv.c_out,
                        static_cast<int64_t>(conv.r) * conv.s * conv.c_in);
}

// The tiles that instances are made of: rows, columns, those of a warp, stages, thread blocks that share a
// multiprocessor. An A100 has 163 KB of shared memory for all its blocks, sm_86 and sm_89 99 KB.
template <typename Element, typename Gather, Major kMajorA>
struct Tiles {
  using T256x128 = TileConfig<Element, Gather, kMajorA, 256, 128, 64, 64, 4, 1, true>;  // 136 KB: not sm_86, sm_89
  using T128x128 = TileConfig<Element, Gather, kMajorA, 128, 128, 64, 64, 3, 2, true>;  // 75 KB
  using T128x64 = TileConfig<Element, Gather, kMajorA, 128, 64, 64, 32, 4, 2, true>;    // 68 KB
  using T64x128 = TileConfig<Element, Gather, kMajorA, 64, 128, 64, 32, 3, 2, true>;    // 62 KB
  using T128x64_any = TileConfig<Element, Gather, kMajorA, 128, 64, 64, 32, 3, 2, false>;
};

}  // namespace sdgp::sm80

// Define the entry point of one instance. TILE: a member of Tiles without its T.
#define SDGP_SM80(NAME, ARGUMENTS, LAUNCH, GATHER, ELEMENT, MAJOR, TILE)                                   \
  using NAME##_config = sdgp::sm80::Tiles<ELEMENT, sdgp::sm80::GATHER, sdgp::sm80::Major::MAJOR>::T##TILE; \
  SDGP_LAUNCH_FACTS(NAME, NAME##_config)                                                                   \
  extern "C" int NAME(const ARGUMENTS* arguments) { return sdgp::sm80::LAUNCH<NAME##_config>(*arguments); }
#define SDGP_SM80_DGRAD(NAME, ELEMENT, TILE) \
  SDGP_SM80(NAME, SdgpSparseGemm, launch_gemm, MatrixGather, ELEMENT, K, TILE)
#define SDGP_SM80_WGRAD(NAME, ELEMENT, TILE) \
  SDGP_SM80(NAME, SdgpSparseGemm, launch_gemm, MatrixGather, ELEMENT, MN, TILE)
#define SDGP_SM80_CONV_DGRAD(NAME, ELEMENT, TILE) \
  SDGP_SM80(NAME, SdgpSparseConv, launch_conv_dgrad, DgradGather, ELEMENT, K, TILE)
#define SDGP_SM80_CONV_WGRAD(NAME, ELEMENT, TILE) \
  SDGP_SM80(NAME, SdgpSparseConv, launch_conv_wgrad, WgradGather, ELEMENT, MN, TILE)
