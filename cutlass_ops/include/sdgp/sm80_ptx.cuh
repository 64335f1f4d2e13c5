// Thin named wrappers around the instructions of the sm_80 family of kernels: one function per instruction, named after
// it; no policy here.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace sdgp::sm80 {

__device__ __forceinline__ uint32_t smem_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

// Keeps the compiler from taking an address apart to add its parts anew for every copy. It no longer knows then that
// the address is global, which cp.async says by itself.
__device__ __forceinline__ const uint8_t* whole(const uint8_t* address) {
  asm("" : "+l"(address));
  return address;
}

// Starts a copy of kBytes from global to shared memory, or of as many zeros where not `valid`.
template <int kBytes>
__device__ __forceinline__ void cp_async(uint32_t target, const void* source, bool valid) {
  static_assert(kBytes == 8 || kBytes == 16);
  if constexpr (kBytes == 16) {  // .cg bypasses L1, where nothing would be used again
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(target), "l"(source), "r"(valid ? 16 : 0)
                 : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 8, %2;" ::"r"(target), "l"(source), "r"(valid ? 8 : 0)
                 : "memory");
  }
}

__device__ __forceinline__ void cp_async_commit_group() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kPending>
__device__ __forceinline__ void cp_async_wait_group() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kPending) : "memory");
}

// Four 8 x 8 matrices of 16-bit elements; lane l brings the address of row l % 8 of matrix l / 8.
__device__ __forceinline__ void ldmatrix_x4(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void ldmatrix_x4_trans(uint32_t (&r)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(address)
               : "memory");
}

__device__ __forceinline__ void store_shared_v4(uint32_t address, const uint32_t (&words)[4]) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(words[0]), "r"(words[1]), "r"(words[2]),
               "r"(words[3])
               : "memory");
}

// d[16, 8] += a[16, 32 at 2:4] * b[32, 8]. Lanes 2 kSelector and 2 kSelector + 1 of each quad bring the metadata: rows
// g (low half) and g + 8 (high half) for g = lane / 4, k 0-15 in the first, k 16-31 in the second of the two lanes.
// ordered_metadata promises ascending indices; without it the instruction may run much slower (PTX ISA, mma.sp).
template <typename Element, int kSelector>
__device__ __forceinline__ void mma_sp_m16n8k32(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[4],
                                                uint32_t metadata) {
#define SDGP_MMA_SP(TYPE)                                                                                 \
  asm volatile("mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32." TYPE "." TYPE                \
               ".f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9, %10, %11}, {%0, %1, %2, %3}, %12, %13;" \
               : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])                                           \
               : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]), "r"(b[2]), "r"(b[3]),  \
                 "r"(metadata), "n"(kSelector))
  if constexpr (std::is_same_v<Element, __half>) {
    SDGP_MMA_SP("f16");
  } else {
    SDGP_MMA_SP("bf16");
  }
#undef SDGP_MMA_SP
}

}  // namespace sdgp::sm80
