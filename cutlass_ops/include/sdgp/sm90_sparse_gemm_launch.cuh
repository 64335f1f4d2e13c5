// Host side of sm90_sparse_gemm.cuh: tensor maps of matrices, launch, reduction of split-K partials.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "sdgp/sm90_sparse_gemm.cuh"
#include "sdgp/sparse_gemm_api.h"

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
  const CUresult result = tensor_map_encoder()(&map, type, 2, const_cast<void*>(matrix), extent, stride_bytes, box,
                                               step, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
                                               CU_TENSOR_MAP_L2_PROMOTION_L2_256B, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE);
  return result == CUDA_SUCCESS ? 0 : kDriverErrorBase + result;
}

template <typename Element>
constexpr CUtensorMapDataType kTensorMapType =
    std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// Maps of the compressed operand as a matrix.
template <typename Config>
int encode_matrix_operand(TensorMaps& maps, const void* values, const void* metadata, int64_t m, int64_t padded_k) {
  constexpr auto kType = kTensorMapType<typename Config::Element>;
  constexpr auto kWords = CU_TENSOR_MAP_DATA_TYPE_UINT16;
  constexpr int kValues = kBlockK / 2, kMetadataWords = kBlockK / 16;
  const int64_t stored_values = padded_k / 2, stored_words = padded_k / 16;
  if constexpr (Config::kMajorA == Major::K) {
    const int error = encode_matrix(maps.values, kType, values, m, stored_values, stored_values, Config::kBlockM,
                                    kValues, CU_TENSOR_MAP_SWIZZLE_128B);
    return error != 0 ? error
                      : encode_matrix(maps.metadata, kWords, metadata, m, stored_words, stored_words, Config::kBlockM,
                                      kMetadataWords, CU_TENSOR_MAP_SWIZZLE_NONE);
  } else {
    const int error =
        encode_matrix(maps.values, kType, values, stored_values, m, m, kValues, kSlabM, CU_TENSOR_MAP_SWIZZLE_128B);
    return error != 0 ? error
                      : encode_matrix(maps.metadata, kWords, metadata, stored_words, m, m, kMetadataWords, kSlabM,
                                      CU_TENSOR_MAP_SWIZZLE_128B);
  }
}

// Where the result goes and how it is cut, for both kinds of product.
struct Target {
  void* out;        // 16-bit like the operands, or float32 where is_float
  void* workspace;  // float32 [splits, rows, row_length] where splits > 1
  bool is_float, accumulate;
  int splits, group_n, cluster_size, sm_count;
  cudaStream_t stream;
};

// The product has `m` rows, `columns` columns and `k_tiles` k tiles; the output [rows, row_length].
template <typename Config>
int launch(const TensorMaps& maps, const typename Config::Gather& gather, const Target& target, int m, int columns,
           int k_tiles, int rows, int row_length) {
  // A part of an empty k range would have nothing to write.
  if (target.splits < 1 || target.splits > (k_tiles + kBlockTiles - 1) / kBlockTiles) return cudaErrorInvalidValue;
  // Every time: the attribute belongs to the current device.
  const cudaError_t attribute = cudaFuncSetAttribute(sparse_gemm_kernel<Config>,
                                                     cudaFuncAttributeMaxDynamicSharedMemorySize, Config::kSharedBytes);
  if (attribute != cudaSuccess) return attribute;

  const bool split = target.splits > 1;
  const int n_tiles = (columns + Config::kBlockN - 1) / Config::kBlockN;
  const Problem problem{m,
                        n_tiles,
                        k_tiles,
                        rows,
                        row_length,
                        target.splits,
                        target.group_n,
                        split ? target.workspace : target.out,
                        split             ? Output::kPartial
                        : target.is_float ? Output::kFloat
                                          : Output::kElement,
                        !split && target.accumulate};
  const int rows_per_unit = Config::kBlockM * target.cluster_size;
  const int64_t units = static_cast<int64_t>((m + rows_per_unit - 1) / rows_per_unit) * n_tiles * target.splits;
  cudaLaunchAttribute cluster;
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim = {static_cast<unsigned>(target.cluster_size), 1, 1};
  cudaLaunchConfig_t launch{};
  launch.gridDim = static_cast<unsigned>(std::min<int64_t>(units, target.sm_count / target.cluster_size)) *
                   static_cast<unsigned>(target.cluster_size);
  launch.blockDim = Config::kThreads;
  launch.dynamicSmemBytes = Config::kSharedBytes;
  launch.stream = target.stream;
  launch.attrs = &cluster;
  launch.numAttrs = 1;
  const cudaError_t launched =
      cudaLaunchKernelEx(&launch, sparse_gemm_kernel<Config>, maps, gather, problem, target.cluster_size);
  if (launched != cudaSuccess || !split) return launched;
  const int64_t count = static_cast<int64_t>(rows) * row_length;
  const auto reduce = target.is_float ? reduce_partials<float> : reduce_partials<typename Config::Element>;
  return reduce(target.workspace, target.out, count, target.splits, target.accumulate, target.sm_count, target.stream);
}

template <typename Config>
int launch_sparse_gemm(const SdgpSparseGemm& gemm) {
  TensorMaps maps;
  int error = encode_matrix_operand<Config>(maps, gemm.values, gemm.metadata, gemm.m, gemm.padded_k);
  if (error == 0)
    error = encode_matrix(maps.b, kTensorMapType<typename Config::Element>, gemm.b, gemm.k, gemm.n, gemm.n,
                          kStageK / gemm.cluster_size, kSwizzleElements, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != 0) return error;
  const Target target{gemm.out,
                      gemm.workspace,
                      gemm.out_is_float != 0,
                      gemm.accumulate != 0,
                      gemm.splits,
                      gemm.group_n,
                      gemm.cluster_size,
                      gemm.sm_count,
                      static_cast<cudaStream_t>(gemm.stream)};
  return launch<Config>(maps, MatrixGather{gemm.m, gemm.n}, target, gemm.m, gemm.n, (gemm.k + kStageK - 1) / kStageK,
                        gemm.m, gemm.n);
}

}  // namespace sdgp::sm90

// Defines the entry point of one instance.
#define SDGP_SM90_SPARSE_GEMM(NAME, ELEMENT, MAJOR, BLOCK_M, BLOCK_N)                                          \
  extern "C" int NAME(const SdgpSparseGemm* gemm) {                                                            \
    using Config =                                                                                             \
        sdgp::sm90::TileConfig<ELEMENT, sdgp::sm90::MatrixGather, sdgp::sm90::Major::MAJOR, BLOCK_M, BLOCK_N>; \
    return sdgp::sm90::launch_sparse_gemm<Config>(*gemm);                                                      \
  }
