// One warpgroup computes D[64, 64] = A[64, 64] B[64, 64]^T with wgmma: A stored by the threads, half of it by cp.async, B loaded by
// TMA, both K-major with a 128-byte swizzle. `mistake` breaks one rule of the asynchronous machinery.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

enum Mistake { kNone, kLostArrive, kWrongBytes, kWrongSwizzle, kNoBarrierWait, kNoProxyFence, kNoWgmmaWait, kHalfWarpgroup, kEarlyRead, kNoFence,
               kNoCopyWait, kFillOverStore, kFillOverCopy, kEarlyRefill, kMisplaced, kOtherRank, kIm2col,
               kNoMap, kEarlyWait, kNoInitFence };

constexpr int kN = 64, kTileBytes = kN * kN * 2;

__device__ uint64_t descriptor(uint32_t address, uint64_t swizzle) {
  return swizzle << 62 | uint64_t(1024 >> 4) << 32 | uint64_t(1) << 16 | (address >> 4 & 0x3fff);
}

__device__ void multiply(float (&d)[32], uint64_t a, uint64_t b) {
  asm volatile(
      "{ .reg .pred p; setp.ne.b32 p, 1, 0;\n"
      "wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 "
      "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26,"
      " %27, %28, %29, %30, %31}, %32, %33, p, 1, 1, 0, 0; }"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]),
        "+f"(d[10]), "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]),
        "+f"(d[19]), "+f"(d[20]), "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]),
        "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), "+f"(d[31])
      : "l"(a), "l"(b));
}

__device__ void load_tile(uint32_t target, const CUtensorMap& map, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %3}], [%2];" ::"r"(target),
               "l"(&map), "r"(barrier), "r"(0) : "memory");
}

__device__ void load_3d_tile(uint32_t target, const CUtensorMap& map, uint32_t barrier) {
  asm volatile("cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %3, %3}], [%2];" ::"r"(target),
               "l"(&map), "r"(barrier), "r"(0) : "memory");
}

__device__ void copy(uint4* target, const uint4* source) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(target))), "l"(source) : "memory");
}

__global__ void __launch_bounds__(128) product(const __nv_bfloat16* a, const __grid_constant__ CUtensorMap b_map, float* out, int mistake) {
  __shared__ __align__(1024) uint4 a_tile[kTileBytes / 16];
  __shared__ __align__(1024) uint4 b_tile[kTileBytes / 16];
  __shared__ uint64_t full;
  const uint32_t a_at = static_cast<uint32_t>(__cvta_generic_to_shared(a_tile));
  const uint32_t b_at = static_cast<uint32_t>(__cvta_generic_to_shared(b_tile));
  const uint32_t barrier = static_cast<uint32_t>(__cvta_generic_to_shared(&full));
  const int thread = threadIdx.x;
  const auto a_units = reinterpret_cast<const uint4*>(a);

  if (mistake == kFillOverStore && thread != 0) b_tile[thread] = make_uint4(0, 0, 0, 0);
  if (mistake == kFillOverCopy && thread != 0) copy(b_tile + thread, a_units + thread);
  if (mistake == kFillOverCopy) __syncthreads();
  if (thread == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
    if (mistake != kNoInitFence) asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    if (mistake == kIm2col) load_3d_tile(b_at, b_map, barrier);
    else load_tile(b_at + (mistake == kMisplaced ? 64 : 0), b_map, barrier);
    const uint32_t bytes = kTileBytes + (mistake == kWrongBytes ? 16 : 0);
    if (mistake != kLostArrive) asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
  }
  for (int unit = thread; unit < kTileBytes / 32; unit += 128) a_tile[unit ^ (unit / 8 & 7)] = a_units[unit];
  for (int unit = kTileBytes / 32 + thread; unit < kTileBytes / 16; unit += 128) copy(a_tile + (unit ^ (unit / 8 & 7)), a_units + unit);
  if (mistake != kNoCopyWait) asm volatile("cp.async.wait_all;" ::: "memory");
  if (mistake != kNoProxyFence) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  if (mistake != kEarlyWait) __syncthreads();
  if (mistake != kNoBarrierWait)
    asm volatile("{ .reg .pred p; retry: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @!p bra retry; }" ::"r"(barrier) : "memory");
  if (mistake == kEarlyWait) __syncthreads();

  float d[32] = {};
  if (mistake != kHalfWarpgroup || thread < 64) {
    if (mistake != kNoFence) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    for (int k = 0; k < 4; ++k)
      multiply(d, descriptor(a_at + 32 * k, mistake == kWrongSwizzle ? 2 : 1), descriptor(b_at + 32 * k, 1));
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    if (mistake == kEarlyRead) out[thread] = d[0];
    if (mistake == kEarlyRefill && thread == 0) load_tile(b_at, b_map, barrier);
    if (mistake != kNoWgmmaWait) asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  __syncthreads();
  a_tile[thread] = make_uint4(0, 0, 0, 0);  // the next stage's data
  if (mistake == kNone && thread == 0) load_tile(b_at, b_map, barrier);

  const int row = thread / 32 * 16 + thread % 32 / 4, column = thread % 4 * 2;
  for (int i = 0; i < 32; ++i) out[(row + i / 2 % 2 * 8) * kN + column + i / 4 * 8 + i % 2] = d[i];
}

__device__ void arrive(uint32_t barrier) { asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory"); }

__device__ void wait(uint32_t barrier, int parity) {
  asm volatile("{ .reg .pred p; retry: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], %1; @!p bra retry; }" ::"r"(barrier), "r"(parity) : "memory");
}

// Warp 0 fills twice, warp 1 waits for the second time; `mistake`: without having seen the first. The same wait passes at once before
// the first, and here only after the second because warp 0 is not ready earlier.
__global__ void __launch_bounds__(64) fill_twice(int mistake) {
  __shared__ uint64_t barriers[3];
  const uint32_t ready = static_cast<uint32_t>(__cvta_generic_to_shared(barriers)), full = ready + 8, empty = ready + 16;
  if (threadIdx.x == 0)
    for (int i = 0; i < 3; ++i) asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(ready + 8 * i));
  __syncthreads();
  if (threadIdx.x == 0) {
    arrive(ready);
    arrive(full);
    wait(empty, 0);
    arrive(full);
  } else if (threadIdx.x == 32) {
    if (mistake) arrive(empty);
    wait(ready, 0);
    if (!mistake) {
      wait(full, 0);
      arrive(empty);
    }
    wait(full, 1);
  }
}

// Two warpgroups take registers that the third gives up; `mistake`: it does not.
__global__ void __launch_bounds__(384, 1) take_registers(int mistake) {
  if (threadIdx.x >= 128) asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(232));
  else if (!mistake) asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(40));
}

extern "C" int share_registers(int mistake) {
  take_registers<<<1, 384>>>(mistake);
  return cudaGetLastError();
}

extern "C" int run_twice(int mistake) {
  fill_twice<<<1, 64>>>(mistake);
  return cudaGetLastError();
}

// A thread copies kN bytes through shared memory at `target` bytes from a whole unit of 16, with a barrier at `barrier` bytes.
__global__ void bulk_copy(const char* from, char* to, int size, int target, int barrier) {
  __shared__ __align__(16) char bytes[kN + 16];
  __shared__ __align__(16) char barriers[16];
  const uint32_t bytes_at = static_cast<uint32_t>(__cvta_generic_to_shared(bytes)) + target;
  const uint32_t full = static_cast<uint32_t>(__cvta_generic_to_shared(barriers)) + barrier;
  asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(full));
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(bytes_at), "l"(from),
               "r"(size), "r"(full) : "memory");
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(full), "r"(size) : "memory");
  wait(full, 0);
  for (int i = 0; i < size; ++i) to[i] = bytes[target + i];
}

extern "C" int run_bulk_copy(const char* from, char* to, int size, int target, int barrier) {
  bulk_copy<<<1, 1>>>(from, to, size, target, barrier);
  return cudaGetLastError();
}

template <typename Function>
static Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &status);
  return reinterpret_cast<Function>(function);
}

static CUresult encode_tiled(CUtensorMap* map, int type, int rank, void* address, const cuuint64_t* extents, const cuuint64_t* strides,
                             const cuuint32_t* box, const cuuint32_t* steps, int interleave, int swizzle, int fill) {
  return driver_function<decltype(&cuTensorMapEncodeTiled)>("cuTensorMapEncodeTiled")(
      map, CUtensorMapDataType(type), rank, address, extents, strides, box, steps, CUtensorMapInterleave(interleave),
      CUtensorMapSwizzle(swizzle), CU_TENSOR_MAP_L2_PROMOTION_NONE, CUtensorMapFloatOOBfill(fill));
}

static CUresult encode_im2col(CUtensorMap* map, int type, int rank, void* address, const cuuint64_t* extents, const cuuint64_t* strides,
                              const cuuint32_t* box, const cuuint32_t* steps, int interleave, int swizzle, int fill, const int* lower,
                              const int* upper) {
  return driver_function<decltype(&cuTensorMapEncodeIm2col)>("cuTensorMapEncodeIm2col")(
      map, CUtensorMapDataType(type), rank, address, extents, strides, lower, upper, box[0], box[1], steps,
      CUtensorMapInterleave(interleave), CUtensorMapSwizzle(swizzle), CU_TENSOR_MAP_L2_PROMOTION_NONE, CUtensorMapFloatOOBfill(fill));
}

// lower: of an im2col map, else null.
extern "C" int encode(int type, int rank, void* address, const cuuint64_t* extents, const cuuint64_t* strides, const cuuint32_t* box,
                      const cuuint32_t* steps, int interleave, int swizzle, int fill, const int* lower, const int* upper) {
  CUtensorMap map;
  return lower == nullptr ? encode_tiled(&map, type, rank, address, extents, strides, box, steps, interleave, swizzle, fill)
                          : encode_im2col(&map, type, rank, address, extents, strides, box, steps, interleave, swizzle, fill, lower, upper);
}

extern "C" int run(const void* a, void* b, float* out, int mistake) {
  CUtensorMap map = {};
  const cuuint64_t extents[] = {kN, kN, 1}, strides[] = {kN * 2, kN * kN * 2};
  const cuuint32_t box[] = {kN, kN, 1}, steps[] = {1, 1, 1};
  const int corner[] = {0};
  const int type = CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, swizzle = CU_TENSOR_MAP_SWIZZLE_128B, rank = mistake == kOtherRank || mistake == kIm2col ? 3 : 2;
  const CUresult error = mistake == kNoMap    ? CUDA_SUCCESS
                         : mistake == kIm2col ? encode_im2col(&map, type, rank, b, extents, strides, box, steps, 0, swizzle, 0, corner, corner)
                                              : encode_tiled(&map, type, rank, b, extents, strides, box, steps, 0, swizzle, 0);
  if (error) return -1;
  product<<<1, 128>>>(static_cast<const __nv_bfloat16*>(a), map, out, mistake);
  return cudaGetLastError();
}
