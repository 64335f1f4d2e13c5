// Thin named wrappers around the Hopper (sm_90a) instructions the sparse kernels use.
// One function per instruction, named after it; no policy here.
#pragma once

#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sdgp::sm90 {

// Which way a 16-bit operand in shared memory is contiguous; the value is wgmma's transpose bit.
enum class Major : int { K = 0, MN = 1 };

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// ---- mbarrier ------------------------------------------------------------------------------------------

__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

// Makes the initialised barriers visible to the copy engine and to the other CTAs of the cluster.
__device__ __forceinline__ void fence_mbarrier_init() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive_expect_tx(uint32_t barrier, uint32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

// Arrives on the barrier at the same shared-memory offset in CTA `cta` of the cluster. Without .release.cluster: what
// it orders are reads by wgmma that have completed, and the qualifier costs a membar of ~1000 cycles.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier, uint32_t cta) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier),
      "r"(cta)
      : "memory");
}

// Blocks until the phase of parity `parity` has completed.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  asm volatile(
      "{\n"
      ".reg .pred done;\n"
      "retry:\n"
      "mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1;\n"
      "@done bra finished;\n"
      "bra retry;\n"
      "finished:\n"
      "}\n" ::"r"(barrier),
      "r"(parity)
      : "memory");
}

// ---- flags in global memory ----------------------------------------------------------------------------

// What this thread did before, and what reached it through barriers, is done for whoever reads the flag with
// `load_acquire`.
__device__ __forceinline__ void store_release(uint32_t* flag, uint32_t value) {
  asm volatile("st.release.gpu.global.u32 [%0], %1;" ::"l"(flag), "r"(value) : "memory");
}

__device__ __forceinline__ uint32_t load_acquire(const uint32_t* flag) {
  uint32_t value;
  asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(value) : "l"(flag) : "memory");
  return value;
}

// ---- named barriers ------------------------------------------------------------------------------------

// Barrier `number` of the CTA lets go of those that `barrier_sync` when `threads` have come to it, warps that only
// `barrier_arrive` included. 0 is __syncthreads.
__device__ __forceinline__ void barrier_sync(int number, int threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

__device__ __forceinline__ void barrier_arrive(int number, int threads) {
  asm volatile("bar.arrive %0, %1;" ::"r"(number), "r"(threads) : "memory");
}

// ---- cluster -------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_cta_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ int cluster_index() {
  int index;
  asm volatile("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
}

__device__ __forceinline__ int cluster_count() {
  int count;
  asm volatile("mov.u32 %0, %%nclusterid.x;" : "=r"(count));
  return count;
}

// All threads of the cluster meet. Of what they did before, only what fence_mbarrier_init released is visible to the
// others: the qualifier .release would be a membar of the whole GPU for every warp.
__device__ __forceinline__ void cluster_meet() {
  asm volatile("barrier.cluster.arrive.relaxed.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- TMA -----------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The loads below write a box of a tensor into shared memory and complete its bytes on `barrier`. With a cluster size
// of 2 they write it to both CTAs, at the same offsets of data and barrier in each.

// Box at (x, y) of a matrix, x innermost.
__device__ __forceinline__ void tma_load(const CUtensorMap* map, uint32_t barrier, uint32_t destination, int x, int y) {
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(
          destination),
      "l"(map), "r"(barrier), "r"(x), "r"(y)
      : "memory");
}

__device__ __forceinline__ void tma_load(const CUtensorMap* map, uint32_t barrier, uint32_t destination,
                                         int cluster_size, int x, int y) {
  if (cluster_size == 1) return tma_load(map, barrier, destination, x, y);
  asm volatile(
      "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
      "[%0], [%1, {%3, %4}], [%2], %5;" ::"r"(destination),
      "l"(map), "r"(barrier), "r"(x), "r"(y), "h"(static_cast<uint16_t>(3))
      : "memory");
}

// Box at (x, y, z) of a 3-D tensor, x innermost.
__device__ __forceinline__ void tma_load_3d(const CUtensorMap* map, uint32_t barrier, uint32_t destination,
                                            int cluster_size, int x, int y, int z) {
  if (cluster_size == 1) {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4, %5}], "
        "[%2];" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.3d.shared::cluster.global.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5}], [%2], %6;" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(x), "r"(y), "r"(z), "h"(static_cast<uint16_t>(3))
        : "memory");
  }
}

// Channels from c on of consecutive pixels of an NHWC tensor: the walk starts at pixel (n, h, w) and each pixel is read
// (offset_h, offset_w) further on.
__device__ __forceinline__ void tma_load_im2col(const CUtensorMap* map, uint32_t barrier, uint32_t destination,
                                                int cluster_size, int c, int w, int h, int n, int offset_w,
                                                int offset_h) {
  const auto short_w = static_cast<uint16_t>(offset_w), short_h = static_cast<uint16_t>(offset_h);
  if (cluster_size == 1) {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8};" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(short_w), "h"(short_h)
        : "memory");
  } else {
    asm volatile(
        "cp.async.bulk.tensor.4d.shared::cluster.global.im2col.mbarrier::complete_tx::bytes.multicast::cluster "
        "[%0], [%1, {%3, %4, %5, %6}], [%2], {%7, %8}, %9;" ::"r"(destination),
        "l"(map), "r"(barrier), "r"(c), "r"(w), "r"(h), "r"(n), "h"(short_w), "h"(short_h),
        "h"(static_cast<uint16_t>(3))
        : "memory");
  }
}

// ---- warpgroup MMA -------------------------------------------------------------------------------------

__device__ __forceinline__ void wgmma_fence() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }

__device__ __forceinline__ void wgmma_commit_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void wgmma_wait_group() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(kPending) : "memory");
}

// Tells the compiler that a register may have changed: keeps accumulator traffic on its side of a wait.
template <int kCount>
__device__ __forceinline__ void fence_registers(float (&values)[kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) asm volatile("" : "+f"(values[i])::"memory");
}

// Keeps registers allocated up to this point: operands of instructions in flight must not be reused for something else.
template <int kSets, int kRows, int kColumns>
__device__ __forceinline__ void keep_registers(const uint32_t (&values)[kSets][kRows][kColumns]) {
#pragma unroll
  for (int i = 0; i < kSets; ++i)
#pragma unroll
    for (int j = 0; j < kRows; ++j)
#pragma unroll
      for (int k = 0; k < kColumns; ++k) asm volatile("" ::"r"(values[i][j][k]));
}

// Bits 62-63 of a shared-memory matrix descriptor.
enum class Swizzle : uint64_t { k128B = 1 };

// Descriptor of a matrix in shared memory without its start address (`descriptor_address`).
// MN-major: `leading_bytes` from one 64-wide MN block to the next, `stride_bytes` from 8 k to the next 8 k.
// K-major: `stride_bytes` from 8 rows to the next 8 rows, `leading_bytes` unused.
__host__ __device__ constexpr uint64_t matrix_descriptor(Swizzle swizzle, int leading_bytes, int stride_bytes) {
  return static_cast<uint64_t>(swizzle) << 62 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
         static_cast<uint64_t>(leading_bytes >> 4) << 16;
}

// The start address in a descriptor: bits 0-13, in units of 16 bytes. In a cluster, bits 24 and up of a shared-memory
// address hold the rank of the CTA; they must not reach the other fields.
__device__ __forceinline__ uint64_t descriptor_address(uint32_t address) { return (address & 0x3ffff) >> 4; }

// The registers of d as asm operands: 32, 64, 96 or 128.
#define SDGP_NAMES_32                                                    \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15" \
  ", %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27, %28, %29, %30, %31"
#define SDGP_NAMES_64                                                                \
  SDGP_NAMES_32                                                                      \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47" \
  ", %48, %49, %50, %51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define SDGP_NAMES_96                                                                \
  SDGP_NAMES_64                                                                      \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79" \
  ", %80, %81, %82, %83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95"
#define SDGP_NAMES_128                                                                           \
  SDGP_NAMES_96                                                                                  \
  ", %96, %97, %98, %99, %100, %101, %102, %103, %104, %105, %106, %107, %108, %109, %110, %111" \
  ", %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, %122, %123, %124, %125, %126, %127"
#define SDGP_OPERANDS_8(i)                                                                                    \
  "+f"(d[i]), "+f"(d[i + 1]), "+f"(d[i + 2]), "+f"(d[i + 3]), "+f"(d[i + 4]), "+f"(d[i + 5]), "+f"(d[i + 6]), \
      "+f"(d[i + 7])
#define SDGP_OPERANDS_32(i) SDGP_OPERANDS_8(i), SDGP_OPERANDS_8(i + 8), SDGP_OPERANDS_8(i + 16), SDGP_OPERANDS_8(i + 24)
#define SDGP_OPERANDS_64 SDGP_OPERANDS_32(0), SDGP_OPERANDS_32(32)
#define SDGP_OPERANDS_96 SDGP_OPERANDS_64, SDGP_OPERANDS_32(64)
#define SDGP_OPERANDS_128 SDGP_OPERANDS_96, SDGP_OPERANDS_32(96)

// OPERANDS: the COUNT registers of d. Numbered operands after them: a, b, metadata, selector, accumulate, transpose of
// A.
#define SDGP_SPARSE_WGMMA(TYPE, N, COUNT, OPERANDS, A, B, E, SELECTOR, ACCUMULATE, TRANSPOSE_A)        \
  template <Major kMajorA, int kSelector>                                                              \
  __device__ __forceinline__ void sparse_wgmma_##TYPE##_##N(float (&d)[COUNT], uint64_t a, uint64_t b, \
                                                            uint32_t metadata, bool accumulate) {      \
    asm volatile(                                                                                      \
        "{\n"                                                                                          \
        ".reg .pred accumulate;\n"                                                                     \
        "setp.ne.b32 accumulate, " ACCUMULATE                                                          \
        ", 0;\n"                                                                                       \
        "wgmma.mma_async.sp.sync.aligned.m64n" #N "k32.f32." #TYPE "." #TYPE " {" SDGP_NAMES_##COUNT   \
        "}, " A ", " B ", " E ", " SELECTOR ", accumulate, 1, 1, " TRANSPOSE_A                         \
        ", 1;\n"                                                                                       \
        "}\n"                                                                                          \
        : OPERANDS                                                                                     \
        : "l"(a), "l"(b), "r"(metadata), "n"(kSelector), "r"(static_cast<int>(accumulate)),            \
          "n"(static_cast<int>(kMajorA)));                                                             \
  }
SDGP_SPARSE_WGMMA(f16, 64, 32, SDGP_OPERANDS_32(0), "%32", "%33", "%34", "%35", "%36", "%37")
SDGP_SPARSE_WGMMA(f16, 128, 64, SDGP_OPERANDS_64, "%64", "%65", "%66", "%67", "%68", "%69")
SDGP_SPARSE_WGMMA(f16, 192, 96, SDGP_OPERANDS_96, "%96", "%97", "%98", "%99", "%100", "%101")
SDGP_SPARSE_WGMMA(f16, 256, 128, SDGP_OPERANDS_128, "%128", "%129", "%130", "%131", "%132", "%133")
SDGP_SPARSE_WGMMA(bf16, 64, 32, SDGP_OPERANDS_32(0), "%32", "%33", "%34", "%35", "%36", "%37")
SDGP_SPARSE_WGMMA(bf16, 128, 64, SDGP_OPERANDS_64, "%64", "%65", "%66", "%67", "%68", "%69")
SDGP_SPARSE_WGMMA(bf16, 192, 96, SDGP_OPERANDS_96, "%96", "%97", "%98", "%99", "%100", "%101")
SDGP_SPARSE_WGMMA(bf16, 256, 128, SDGP_OPERANDS_128, "%128", "%129", "%130", "%131", "%132", "%133")
#undef SDGP_SPARSE_WGMMA
#undef SDGP_OPERANDS_128
#undef SDGP_OPERANDS_96
#undef SDGP_OPERANDS_64
#undef SDGP_OPERANDS_32
#undef SDGP_OPERANDS_8
#undef SDGP_NAMES_128
#undef SDGP_NAMES_96
#undef SDGP_NAMES_64
#undef SDGP_NAMES_32

// D[64, kN] (+)= A[64, 32 at 2:4] * B[32, kN], float32 accumulators, A and B in shared memory, B MN-major. kSelector:
// the lanes of each quad whose `metadata` counts, 0 and 1 or 2 and 3.
template <typename Element, int kN, Major kMajorA, int kSelector>
__device__ __forceinline__ void sparse_wgmma(float (&d)[kN / 2], uint64_t a, uint64_t b, uint32_t metadata,
                                             bool accumulate) {
  constexpr bool kIsHalf = std::is_same_v<Element, __half>;
  if constexpr (kN == 64 && kIsHalf) sparse_wgmma_f16_64<kMajorA, kSelector>(d, a, b, metadata, accumulate);
  if constexpr (kN == 128 && kIsHalf) sparse_wgmma_f16_128<kMajorA, kSelector>(d, a, b, metadata, accumulate);
  if constexpr (kN == 192 && kIsHalf) sparse_wgmma_f16_192<kMajorA, kSelector>(d, a, b, metadata, accumulate);
  if constexpr (kN == 256 && kIsHalf) sparse_wgmma_f16_256<kMajorA, kSelector>(d, a, b, metadata, accumulate);
  if constexpr (kN == 64 && !kIsHalf) sparse_wgmma_bf16_64<kMajorA, kSelector>(d, a, b, metadata, accumulate);
  if constexpr (kN == 128 && !kIsHalf) sparse_wgmma_bf16_128<kMajorA, kSelector>(d, a, b, metadata, accumulate);
  if constexpr (kN == 192 && !kIsHalf) sparse_wgmma_bf16_192<kMajorA, kSelector>(d, a, b, metadata, accumulate);
  if constexpr (kN == 256 && !kIsHalf) sparse_wgmma_bf16_256<kMajorA, kSelector>(d, a, b, metadata, accumulate);
}

// ---- registers and warps -------------------------------------------------------------------------------

// True in one lane of the (converged) warp; the compiler knows that, and issues uniform instructions without a loop.
__device__ __forceinline__ bool elect_one() {
  uint32_t elected;
  asm volatile(
      "{\n"
      ".reg .pred chosen;\n"
      "elect.sync _|chosen, 0xffffffff;\n"
      "selp.b32 %0, 1, 0, chosen;\n"
      "}\n"
      : "=r"(elected));
  return elected != 0;
}

template <int kRegisters>
__device__ __forceinline__ void increase_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void decrease_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// Two 8x8 matrices of 16-bit words; lanes 0-7 and 8-15 give the addresses of their rows. Lane l receives words 2(l%4)
// and 2(l%4)+1 of row l/4 of each; transposed: of column l/4.
template <bool kTranspose>
__device__ __forceinline__ void load_matrix_x2(uint32_t& first, uint32_t& second, uint32_t row_address) {
  if constexpr (kTranspose) {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
                 : "=r"(first), "=r"(second)
                 : "r"(row_address)
                 : "memory");
  } else {
    asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
                 : "=r"(first), "=r"(second)
                 : "r"(row_address)
                 : "memory");
  }
}

}  // namespace sdgp::sm90
