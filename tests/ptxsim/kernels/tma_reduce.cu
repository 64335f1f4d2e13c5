// Blocks of one warp add (or store, take the minimum or maximum of) a tile in shared memory to a matrix through TMA. `mistake` breaks
// one rule: kNoFence lets the async proxy read what ordinary stores wrote, kNoWait overwrites the tile while TMA may still read it.
#include <cuda.h>
#include <cuda_runtime.h>

#include <cstdint>

enum Operation { kStore, kAdd, kMin, kMax };
enum Mistake { kNone, kNoFence, kNoWait };

constexpr int kRows = 8, kRowBytes = 64;  // a box

#define TMA(INSTRUCTION, SUFFIX)                                                                                        \
  asm volatile(INSTRUCTION ".tensor.2d.global.shared::cta" SUFFIX ".tile.bulk_group [%0, {%2, %3}], [%1];" ::"l"(&map), \
               "r"(at), "r"(column), "r"(row)                                                                           \
               : "memory")

__global__ void reduce_tile(const __grid_constant__ CUtensorMap map, const uint32_t* tiles, int row, int column, int operation,
                            int mistake) {
  __shared__ __align__(128) uint32_t tile[kRows * kRowBytes / 4];
  const auto at = static_cast<uint32_t>(__cvta_generic_to_shared(tile));
  for (int i = threadIdx.x; i < kRows * kRowBytes / 4; i += 32) tile[i] = tiles[blockIdx.x * kRows * kRowBytes / 4 + i];
  if (mistake != kNoFence) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
  if (threadIdx.x == 0) {
    if (operation == kStore) TMA("cp.async.bulk", "");
    if (operation == kAdd) TMA("cp.reduce.async.bulk", ".add");
    if (operation == kMin) TMA("cp.reduce.async.bulk", ".min");
    if (operation == kMax) TMA("cp.reduce.async.bulk", ".max");
    asm volatile("cp.async.bulk.commit_group;" ::: "memory");
    if (mistake != kNoWait) asm volatile("cp.async.bulk.wait_group.read 0;" ::: "memory");
  }
  __syncwarp();
  tile[threadIdx.x] = 0;
}

// matrix: [rows, columns] of elements of `bytes`, type a CUtensorMapDataType; tiles: one [8, 64 bytes] per block.
extern "C" int run(void* matrix, const void* tiles, int type, int bytes, int rows, int columns, int row, int column, int blocks,
                   int operation, int mistake) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
  CUtensorMap map;
  const cuuint64_t extents[] = {static_cast<cuuint64_t>(columns), static_cast<cuuint64_t>(rows)};
  const cuuint64_t strides[] = {static_cast<cuuint64_t>(columns) * bytes};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(kRowBytes / bytes), kRows}, steps[] = {1, 1};
  auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  if (encode(&map, static_cast<CUtensorMapDataType>(type), 2, matrix, extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE,
             CU_TENSOR_MAP_SWIZZLE_NONE, CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
    return -1;
  reduce_tile<<<blocks, 32>>>(map, static_cast<const uint32_t*>(tiles), row, column, operation, mistake);
  return cudaGetLastError();
}
