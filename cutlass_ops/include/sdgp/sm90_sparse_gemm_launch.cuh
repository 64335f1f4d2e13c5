// Host side of sm90_sparse_gemm.cuh: tensor maps, launch, reduction of split-K partials.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "sdgp/sm90_sparse_gemm.cuh"
#include "sdgp/sm90_sparse_gemm_api.h"

namespace sdgp::sm90 {

constexpr int kDriverErrorBase = 1000;

inline PFN_cuTensorMapEncodeTiled_v12000 tensor_map_encoder() {
  static const auto encoder = [] {
    void* function = nullptr;
    cudaDriverEntryPointQueryResult status;
    cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
    return reinterpret_cast<PFN_cuTensorMapEncodeTiled_v12000>(status == cudaDriverEntryPointSuccess ? function
                                                                                                     : nullptr);
  }();
  return encoder;
}

// Map of a row-major [rows, columns] matrix of 16-bit elements for boxes of [box_rows, box_columns]; zero outside.
inline int encode_matrix(CUtensorMap& map, CUtensorMapDataType type, const void* matrix, int64_t rows, int64_t columns,
                         int64_t row_stride, int box_rows, int box_columns, CUtensorMapSwizzle swizzle) {
  if (tensor_map_encoder() == nullptr) return cudaErrorNotSupported;
  const cuuint64_t extent[2] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t stride_bytes[1] = {static_cast<cuuint64_t>(row_stride) * 2};
  const cuuint32_t box[2] = {static_cast<cuuint32_t>(box_columns), static_cast<cuuint32_t>(box_rows)};
  const cuuint32_t step[2] = {1, 1};
  const CUresult result = tensor_map_encoder()(
      &map, type, 2, const_cast<void*>(matrix), extent, stride_bytes, box, step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
      CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : kDriverErrorBase + result;
}

template <typename Element, typename Out>
int reduce_partials(const SdgpSm90SparseGemm& gemm) {
  const int64_t count = static_cast<int64_t>(gemm.m) * gemm.n;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((count + 1023) / 1024, 4 * gemm.sm_count));
  reduce_partials_kernel<Out><<<blocks, 256, 0, static_cast<cudaStream_t>(gemm.stream)>>>(
      static_cast<const float*>(gemm.workspace), static_cast<Out*>(gemm.out), count, gemm.splits, gemm.accumulate != 0);
  return cudaGetLastError();
}

template <typename Config>
int launch_sparse_gemm(const SdgpSm90SparseGemm& gemm) {
  using Element = typename Config::Element;
  constexpr bool kIsHalf = std::is_same_v<Element, __half>;
  constexpr auto kType = kIsHalf ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;
  constexpr auto kWords = CU_TENSOR_MAP_DATA_TYPE_UINT16;
  constexpr int kValues = kBlockK / 2, kMetadataWords = kMetadataK / 16;

  // A part of an empty k range would have nothing to write.
  if (gemm.splits < 1 || gemm.splits > (gemm.k + kMetadataK - 1) / kMetadataK) return cudaErrorInvalidValue;

  CUtensorMap values, metadata, b;
  const int64_t stored_values = gemm.padded_k / 2, stored_words = gemm.padded_k / 16;
  int error;
  if constexpr (Config::kMajorA == Major::K) {
    error = encode_matrix(values, kType, gemm.values, gemm.m, stored_values, stored_values, Config::kBlockM, kValues,
                          CU_TENSOR_MAP_SWIZZLE_64B);
    if (error == 0)
      error = encode_matrix(metadata, kWords, gemm.metadata, gemm.m, stored_words, stored_words, Config::kBlockM,
                            kMetadataWords, CU_TENSOR_MAP_SWIZZLE_NONE);
  } else {
    error = encode_matrix(values, kType, gemm.values, stored_values, gemm.m, gemm.m, kValues, kSlabM,
                          CU_TENSOR_MAP_SWIZZLE_128B);
    if (error == 0)
      error = encode_matrix(metadata, kWords, gemm.metadata, stored_words, gemm.m, gemm.m, kMetadataWords, kSlabM,
                            CU_TENSOR_MAP_SWIZZLE_128B);
  }
  if (error == 0)
    error = encode_matrix(b, kType, gemm.b, gemm.k, gemm.n, gemm.n, kBlockK / gemm.cluster_size, kSwizzleElements,
                          CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != 0) return error;

  // Every time: the attribute belongs to the current device.
  const cudaError_t attribute = cudaFuncSetAttribute(
      sparse_gemm_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (attribute != cudaSuccess) return attribute;

  const bool split = gemm.splits > 1;
  const Problem problem{gemm.m,
                        gemm.n,
                        gemm.k,
                        gemm.splits,
                        gemm.group_n,
                        split ? gemm.workspace : gemm.out,
                        split                ? Output::kPartial
                        : gemm.out_is_float ? Output::kFloat
                                            : Output::kElement,
                        !split && gemm.accumulate != 0};
  const int rows_per_unit = Config::kBlockM * gemm.cluster_size;
  const int64_t units = static_cast<int64_t>((gemm.m + rows_per_unit - 1) / rows_per_unit) *
                        ((gemm.n + Config::kBlockN - 1) / Config::kBlockN) * gemm.splits;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(gemm.cluster_size), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = static_cast<unsigned>(std::min<int64_t>(units, gemm.sm_count / gemm.cluster_size)) *
                   static_cast<unsigned>(gemm.cluster_size);
  launch.blockDim = Config::kThreads;
  launch.dynamicSmemBytes = Config::kSharedBytes;
  launch.stream = static_cast<cudaStream_t>(gemm.stream);
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  const cudaError_t launched =
      cudaLaunchKernelEx(&launch, sparse_gemm_kernel<Config>, values, metadata, b, problem, gemm.cluster_size);
  if (launched != cudaSuccess || !split) return launched;
  return gemm.out_is_float ? reduce_partials<Element, float>(gemm) : reduce_partials<Element, Element>(gemm);
}

}  // namespace sdgp::sm90

// Defines the entry point of one instance.
#define SDGP_SM90_SPARSE_GEMM(NAME, ELEMENT, MAJOR, BLOCK_M, BLOCK_N)                                              \
  extern "C" int NAME(const SdgpSm90SparseGemm* gemm) {                                                            \
    using Config = sdgp::sm90::TileConfig<ELEMENT, sdgp::sm90::Major::MAJOR, BLOCK_M, BLOCK_N>;                     \
    return sdgp::sm90::launch_sparse_gemm<Config>(*gemm);                                                           \
  }
