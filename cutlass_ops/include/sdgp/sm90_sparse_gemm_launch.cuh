// Host side of sm90_sparse_gemm.cuh: tensor maps of matrices, launch, reduction of split-K partials.
#pragma once

#include <cuda_runtime.h>

#include <algorithm>
#include <type_traits>

#include "sdgp/partial_sums_api.h"
#include "sdgp/sm90_sparse_gemm.cuh"
#include "sdgp/sm90_tensor_map.h"
#include "sdgp/sparse_gemm_api.h"

namespace sdgp::sm90 {

// Map of a dense row-major [rows, columns] matrix of 16-bit elements for boxes of [box_rows, box_columns].
inline int matrix_map(CUtensorMap& map, CUtensorMapDataType type, const void* matrix, int64_t rows, int64_t columns,
                      int box_rows, int box_columns, CUtensorMapSwizzle swizzle) {
  TensorMapRequest request;
  request.address = reinterpret_cast<cuuint64_t>(matrix);
  request.extent[0] = columns;
  request.extent[1] = rows;
  request.stride_bytes[0] = columns * 2;
  request.box[0] = box_columns;
  request.box[1] = box_rows;
  request.type = type;
  request.swizzle = swizzle;
  request.rank = 2;
  return tensor_map(map, request);
}

template <typename Element>
constexpr CUtensorMapDataType kTensorMapType =
    std::is_same_v<Element, __half> ? CU_TENSOR_MAP_DATA_TYPE_FLOAT16 : CU_TENSOR_MAP_DATA_TYPE_BFLOAT16;

// Maps of the compressed operand as a matrix.
template <typename Config>
int matrix_operand_maps(TensorMaps& maps, const void* values, const void* metadata, int64_t m, int64_t padded_k) {
  constexpr auto kType = kTensorMapType<typename Config::Element>;
  constexpr auto kWords = CU_TENSOR_MAP_DATA_TYPE_UINT16;
  constexpr int kValues = kBlockK / 2, kMetadataWords = kBlockK / 16;
  const int64_t stored_values = padded_k / 2;
  if constexpr (Config::kMajorA == Major::K) {
    const int error =
        matrix_map(maps.values, kType, values, m, stored_values, Config::kBlockM, kValues, CU_TENSOR_MAP_SWIZZLE_128B);
    return error != 0 ? error
                      : matrix_map(maps.metadata, kWords, metadata, m, metadata_pitch(padded_k), Config::kBlockM,
                                   kMetadataWords, CU_TENSOR_MAP_SWIZZLE_NONE);
  } else {
    const int64_t pitch = operand_pitch(m);
    const int error =
        matrix_map(maps.values, kType, values, stored_values, pitch, kValues, kSlabM, CU_TENSOR_MAP_SWIZZLE_128B);
    return error != 0 ? error
                      : matrix_map(maps.metadata, kWords, metadata, padded_k / 16, pitch, kMetadataWords, kSlabM,
                                   CU_TENSOR_MAP_SWIZZLE_128B);
  }
}

// Where the result goes, for both kinds of product: SdgpSparseGemm's and SdgpSparseConv's fields of these names.
struct Target {
  void* out;
  void* workspace;
  bool is_float, accumulate, overlaps;
  int splits, owned_blocks, group_n, cluster_size, sm_count, step;
  cudaStream_t stream;

  template <typename Arguments>
  explicit Target(const Arguments& arguments)
      : out(arguments.out),
        workspace(arguments.workspace),
        is_float(arguments.out_is_float != 0),
        accumulate(arguments.accumulate != 0),
        overlaps(arguments.overlaps != 0),
        splits(arguments.splits),
        owned_blocks(arguments.owned_blocks),
        group_n(arguments.group_n),
        cluster_size(arguments.cluster_size),
        sm_count(arguments.sm_count),
        step(arguments.step),
        stream(static_cast<cudaStream_t>(arguments.stream)) {}

  // A part of an empty k range would have nothing to write.
  bool fits(int k_tiles) const { return splits >= 1 && splits <= (k_tiles + kBlockTiles - 1) / kBlockTiles; }
};

// What every launch begins with: the attribute belongs to the current device. And the driver encodes tensor maps only
// where a context is current, which it is in a thread from the first call of the runtime on; one of autograd's threads
// may begin with a product.
template <typename Config>
cudaError_t allow_shared_memory() {
  return cudaFuncSetAttribute(sparse_gemm_kernel<Config>, cudaFuncAttributeMaxDynamicSharedMemorySize,
                              Config::kSharedBytes);
}

// The product has `parts` parts of `m` rows, `columns` columns and `k_tiles` (of which clusters may share some; 0:
// not); the output is [rows, row_length].
template <typename Config>
int launch(const TensorMaps& maps, const typename Config::Gather& gather, const Target& target, int64_t m,
           int64_t columns, int k_tiles, int parts, int64_t rows, int64_t row_length) {
  // The kernel counts in 32 bits, rows and columns in whole tiles.
  const int rows_per_unit = Config::kBlockM * target.cluster_size;
  const int64_t m_units = (m + rows_per_unit - 1) / rows_per_unit;
  const int64_t n_tiles = (columns + Config::kBlockN - 1) / Config::kBlockN, units = m_units * n_tiles * parts;
  if (m_units * rows_per_unit > INT_MAX || n_tiles * Config::kBlockN > INT_MAX || units > INT_MAX || rows > INT_MAX ||
      row_length > INT_MAX)
    return cudaErrorInvalidConfiguration;
  const int clusters = target.sm_count / target.cluster_size;
  Schedule schedule(static_cast<int>(m_units), static_cast<int>(n_tiles), parts, target.group_n, target.cluster_size);
  float* pieces = nullptr;
  uint32_t* piece_flags = nullptr;
  if (target.owned_blocks > 0) {
    if (!Config::kSharesTiles || parts != 1 || !schedule.share_last_round(clusters, k_tiles, target.owned_blocks))
      return cudaErrorInvalidValue;
    const int64_t ctas = int64_t{clusters} * target.cluster_size;
    pieces = static_cast<float*>(target.workspace);
    piece_flags = reinterpret_cast<uint32_t*>(pieces + ctas * Config::kBlockM * Config::kBlockN);
    if (target.step != SDGP_STEP_MULTIPLY) {
      const cudaError_t cleared =
          cudaMemsetAsync(piece_flags, 0, ctas * (4 * kConsumers * sizeof(uint32_t)), target.stream);
      if (cleared != cudaSuccess) return cleared;
    }
  }
  if (target.step == SDGP_STEP_PREPARE) return cudaSuccess;

  const bool split = target.splits > 1;
  const Problem problem{schedule,
                        static_cast<int>(rows),
                        static_cast<int>(row_length),
                        split ? target.workspace : target.out,
                        split             ? Output::kPartial
                        : target.is_float ? Output::kFloat
                                          : Output::kElement,
                        !split && target.accumulate,
                        target.overlaps,
                        pieces,
                        piece_flags};
  cudaLaunchAttribute attributes[2];
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(target.cluster_size), 1, 1};
  attributes[1] = overlapping();
  cudaLaunchConfig_t launch{};
  launch.gridDim = static_cast<unsigned>(std::min(schedule.units, clusters) * target.cluster_size);
  launch.blockDim = Config::kThreads;
  launch.dynamicSmemBytes = Config::kSharedBytes;
  launch.stream = target.stream;
  launch.attrs = attributes;
  launch.numAttrs = target.overlaps ? 2 : 1;
  const cudaError_t launched = cudaLaunchKernelEx(&launch, sparse_gemm_kernel<Config>, maps, gather, problem);
  if (launched != cudaSuccess || !split) return launched;
  const SdgpPartialSums sums{static_cast<const float*>(target.workspace),
                             target.out,
                             rows * row_length,
                             target.splits,
                             target.is_float,
                             std::is_same_v<typename Config::Element, __nv_bfloat16>,
                             target.accumulate,
                             target.sm_count,
                             true,
                             target.stream};
  return sdgp_sum_partials(&sums);
}

template <typename Config>
int launch_sparse_gemm(const SdgpSparseGemm& gemm) {
  const Target target(gemm);
  if (gemm.k > INT_MAX - kStageK) return cudaErrorInvalidConfiguration;
  const int k_tiles = (gemm.k + kStageK - 1) / kStageK;
  if (!target.fits(k_tiles)) return cudaErrorInvalidValue;
  TensorMaps maps;
  int error = allow_shared_memory<Config>();
  if (error == 0) error = matrix_operand_maps<Config>(maps, gemm.values, gemm.metadata, gemm.m, gemm.padded_k);
  if (error == 0)
    error = matrix_map(maps.b, kTensorMapType<typename Config::Element>, gemm.b, gemm.k, gemm.n,
                       kStageK / gemm.cluster_size, kSwizzleElements, CU_TENSOR_MAP_SWIZZLE_128B);
  if (error != 0) return error;
  return launch<Config>(maps, MatrixGather{gemm.m, gemm.n, SplitRange(k_tiles, target.splits)}, target, gemm.m, gemm.n,
                        k_tiles, target.splits, gemm.m, gemm.n);
}

}  // namespace sdgp::sm90

// Defines the entry point of one instance. CONSUMERS: PingPong or Cooperative.
#define SDGP_SM90_SPARSE_GEMM(NAME, ELEMENT, MAJOR, BLOCK_M, BLOCK_N, CONSUMERS)                                     \
  using NAME##_config = sdgp::sm90::TileConfig<ELEMENT, sdgp::sm90::MatrixGather, sdgp::sm90::Major::MAJOR, BLOCK_M, \
                                               BLOCK_N, sdgp::sm90::Consumers::k##CONSUMERS>;                        \
  SDGP_LAUNCH_FACTS(NAME, NAME##_config)                                                                             \
  extern "C" int NAME(const SdgpSparseGemm* gemm) { return sdgp::sm90::launch_sparse_gemm<NAME##_config>(*gemm); }
