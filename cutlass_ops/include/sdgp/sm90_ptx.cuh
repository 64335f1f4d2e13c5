// Thin named wrappers around the Hopper (sm_90a) instructions the sparse kernels use.
// One function per instruction, named after it; no policy here.
#pragma once

#include <cuda.h>

#include <cstdint>
#include <utility>

#include <cute/arch/mma_sm90_gmma_sparse.hpp>

namespace sdgp::sm90 {

using cute::SM90::GMMA::Major;
using cute::SM90::GMMA::ScaleOut;
using cute::SM90::GMMA::SparseSel;

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

// Arrives on the barrier at the same shared-memory offset in CTA `cta` of the cluster. Without .release.cluster: what it
// orders are reads by wgmma that have completed, and the qualifier costs a membar of ~1000 cycles.
__device__ __forceinline__ void mbarrier_arrive_cluster(uint32_t barrier, uint32_t cta) {
  asm volatile(
      "{\n"
      ".reg .b32 remote;\n"
      "mapa.shared::cluster.u32 remote, %0, %1;\n"
      "mbarrier.arrive.shared::cluster.b64 _, [remote];\n"
      "}\n" ::"r"(barrier), "r"(cta)
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
      "}\n" ::"r"(barrier), "r"(parity)
      : "memory");
}

// ---- cluster -------------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t cluster_cta_rank() {
  uint32_t rank;
  asm volatile("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ void cluster_sync() {
  asm volatile("barrier.cluster.arrive.release.aligned;\nbarrier.cluster.wait.acquire.aligned;" ::: "memory");
}

// ---- TMA -----------------------------------------------------------------------------------------------

__device__ __forceinline__ void prefetch_tensor_map(const CUtensorMap* map) {
  asm volatile("prefetch.tensormap [%0];" ::"l"(map) : "memory");
}

// The loads below write a box of a tensor into shared memory and complete its bytes on `barrier`. With a cluster size of
// 2 they write it to both CTAs, at the same offsets of data and barrier in each.

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
enum class Swizzle : uint64_t { k128B = 1, k64B = 2 };

// Descriptor of a matrix in shared memory without its start address (`descriptor_address`).
// MN-major, 128 B swizzle: `leading_bytes` from one 64-wide MN block to the next, `stride_bytes` from 8 k to the next 8 k.
// K-major: `stride_bytes` from 8 rows to the next 8 rows, `leading_bytes` unused.
constexpr uint64_t matrix_descriptor(Swizzle swizzle, int leading_bytes, int stride_bytes) {
  return static_cast<uint64_t>(swizzle) << 62 | static_cast<uint64_t>(stride_bytes >> 4) << 32 |
         static_cast<uint64_t>(leading_bytes >> 4) << 16;
}

// The start address in a descriptor: bits 0-13, in units of 16 bytes. In a cluster, bits 24 and up of a shared-memory
// address hold the rank of the CTA; they must not reach the other fields.
__device__ __forceinline__ uint64_t descriptor_address(uint32_t address) { return (address & 0x3ffff) >> 4; }

// D[64, kN] (+)= A[64, 32 at 2:4] * B[32, kN], float32 accumulators, A and B in shared memory, B MN-major.
template <typename Element, int kN, Major kMajorA, SparseSel kSelector>
struct SparseWgmma;

#define SDGP_SPARSE_WGMMA(ELEMENT, N, NAME)                                                                           \
  template <Major kMajorA, SparseSel kSelector>                                                                       \
  struct SparseWgmma<ELEMENT, N, kMajorA, kSelector> {                                                                \
    using Atom = cute::SM90::GMMA::SPARSE::NAME<kMajorA, Major::MN, cute::SM90::GMMA::ScaleIn::One,                   \
                                                cute::SM90::GMMA::ScaleIn::One, kSelector>;                           \
    __device__ __forceinline__ static void issue(uint64_t a, uint64_t b, uint32_t metadata, float (&d)[N / 2],        \
                                                 bool accumulate) {                                                   \
      issue(a, b, metadata, d, accumulate, std::make_index_sequence<N / 2>{});                                        \
    }                                                                                                                 \
                                                                                                                      \
   private:                                                                                                           \
    template <size_t... kIndex>                                                                                       \
    __device__ __forceinline__ static void issue(uint64_t a, uint64_t b, uint32_t metadata, float (&d)[N / 2],        \
                                                 bool accumulate, std::index_sequence<kIndex...>) {                   \
      Atom::fma(a, b, d[kIndex]..., metadata, accumulate ? ScaleOut::One : ScaleOut::Zero);                           \
    }                                                                                                                 \
  };
SDGP_SPARSE_WGMMA(__half, 128, GMMA_64x128x32_F32F16F16_SS)
SDGP_SPARSE_WGMMA(__half, 192, GMMA_64x192x32_F32F16F16_SS)
SDGP_SPARSE_WGMMA(__half, 256, GMMA_64x256x32_F32F16F16_SS)
SDGP_SPARSE_WGMMA(__nv_bfloat16, 128, GMMA_64x128x32_F32BF16BF16_SS)
SDGP_SPARSE_WGMMA(__nv_bfloat16, 192, GMMA_64x192x32_F32BF16BF16_SS)
SDGP_SPARSE_WGMMA(__nv_bfloat16, 256, GMMA_64x256x32_F32BF16BF16_SS)
#undef SDGP_SPARSE_WGMMA

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
