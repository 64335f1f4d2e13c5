// One warpgroup computes D[64, 64] = A[64, 64] B[64, 64]^T with wgmma, A in registers, dense or 2:4; B, K-major, comes by TMA in boxes of
// 64 rows of `width` bytes, swizzled over that width (16: not at all). `mistake` omits a wgmma.fence after something else used a register.
#include <cuda.h>
#include <cuda_bf16.h>
#include <cuda_runtime.h>

#include <cstdint>

enum Mistake { kNone, kNeverFenced, kLateFragments, kLateAccumulator };

constexpr int kN = 64, kBytes = kN * kN * 2;

#define ACCUMULATORS                                                                                                                   \
  "{%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, %24, %25, %26, %27," \
  " %28, %29, %30, %31}"
#define OPERANDS                                                                                                                        \
  "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3]), "+f"(d[4]), "+f"(d[5]), "+f"(d[6]), "+f"(d[7]), "+f"(d[8]), "+f"(d[9]), "+f"(d[10]),  \
      "+f"(d[11]), "+f"(d[12]), "+f"(d[13]), "+f"(d[14]), "+f"(d[15]), "+f"(d[16]), "+f"(d[17]), "+f"(d[18]), "+f"(d[19]), "+f"(d[20]), \
      "+f"(d[21]), "+f"(d[22]), "+f"(d[23]), "+f"(d[24]), "+f"(d[25]), "+f"(d[26]), "+f"(d[27]), "+f"(d[28]), "+f"(d[29]), "+f"(d[30]), \
      "+f"(d[31])

template <bool kSparse>
__device__ void multiply(float (&d)[32], const uint32_t (&a)[4], uint64_t b, uint32_t metadata) {
  if constexpr (kSparse)
    asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sp.sync.aligned.m64n64k32.f32.bf16.bf16 " ACCUMULATORS
                 ", {%32, %33, %34, %35}, %36, %37, 0, p, 1, 1, 0; }"
                 : OPERANDS
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b), "r"(metadata));
  else
    asm volatile("{ .reg .pred p; setp.ne.b32 p, 1, 0; wgmma.mma_async.sync.aligned.m64n64k16.f32.bf16.bf16 " ACCUMULATORS
                 ", {%32, %33, %34, %35}, %36, p, 1, 1, 0; }"
                 : OPERANDS
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(b));
}

// a: pairs of values [64, k / 2], packed ones where sparse; metadata: [64, 4], 16 k to a word.
template <bool kSparse>
__global__ void __launch_bounds__(128)
    product(const uint32_t* a, const uint16_t* metadata, const __grid_constant__ CUtensorMap b_map, float* out, int width, int mistake) {
  __shared__ __align__(1024) uint4 b_tile[kBytes / 16];
  __shared__ uint64_t full;
  const uint32_t b_at = static_cast<uint32_t>(__cvta_generic_to_shared(b_tile));
  const uint32_t barrier = static_cast<uint32_t>(__cvta_generic_to_shared(&full));
  if (threadIdx.x == 0) {
    asm volatile("mbarrier.init.shared::cta.b64 [%0], 1;" ::"r"(barrier));
    asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
    asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(kBytes) : "memory");
    for (int k = 0; k < kN * 2; k += width)
      asm volatile(
          "cp.async.bulk.tensor.2d.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1, {%3, %4}], [%2];" ::"r"(b_at + k * kN),
          "l"(&b_map), "r"(barrier), "r"(k / 2), "r"(0)
          : "memory");
  }
  __syncthreads();
  asm volatile("{ .reg .pred p; retry: mbarrier.try_wait.parity.shared::cta.b64 p, [%0], 0; @!p bra retry; }" ::"r"(barrier) : "memory");

  constexpr int kSteps = kSparse ? 2 : 4, kPairs = kSparse ? kN / 4 : kN / 2;
  const int row = threadIdx.x / 32 * 16 + threadIdx.x % 32 / 4, lane = threadIdx.x % 4;
  const uint64_t layout = width == 128 ? 1 : width == 64 ? 2 : width == 32 ? 3 : 0;
  float d[32] = {};
  for (int step = 0; step < kSteps; ++step) {
    uint32_t fragments[4];
    for (int i = 0; i < 4; ++i) fragments[i] = a[(row + i % 2 * 8) * kPairs + step * 8 + i / 2 * 4 + lane];
    const uint32_t words = kSparse ? metadata[row * 4 + step * 2 + lane % 2] | metadata[(row + 8) * 4 + step * 2 + lane % 2] << 16 : 0;
    const int k = step * kN * 2 / kSteps;
    const uint64_t start = b_at + k / width * width * kN + k % width;
    const uint64_t b = layout << 62 | uint64_t(8 * width >> 4) << 32 | uint64_t(width * kN >> 4) << 16 | (start >> 4 & 0x3fff);
    if (mistake != kNeverFenced && (mistake != kLateFragments || step == 0)) asm volatile("wgmma.fence.sync.aligned;" ::: "memory");
    if (mistake == kLateAccumulator) asm volatile("add.f32 %0, %0, 0f00000000;" : "+f"(d[5]));
    multiply<kSparse>(d, fragments, b, words);
    asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory");
    asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory");
  }
  for (int i = 0; i < 32; ++i) out[(row + i / 2 % 2 * 8) * kN + lane * 2 + i / 4 * 8 + i % 2] = d[i];
}

extern "C" int run(const void* a, const void* metadata, void* b, float* out, int width, int mistake) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  cudaGetDriverEntryPointByVersion("cuTensorMapEncodeTiled", &function, 12000, cudaEnableDefault, &status);
  CUtensorMap map;
  const cuuint64_t extents[] = {kN, kN}, strides[] = {kN * 2};
  const cuuint32_t box[] = {static_cast<cuuint32_t>(width / 2), kN}, steps[] = {1, 1};
  const auto swizzle = width == 128  ? CU_TENSOR_MAP_SWIZZLE_128B
                       : width == 64 ? CU_TENSOR_MAP_SWIZZLE_64B
                       : width == 32 ? CU_TENSOR_MAP_SWIZZLE_32B
                                     : CU_TENSOR_MAP_SWIZZLE_NONE;
  auto encode = reinterpret_cast<decltype(&cuTensorMapEncodeTiled)>(function);
  if (encode(&map, CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, 2, b, extents, strides, box, steps, CU_TENSOR_MAP_INTERLEAVE_NONE, swizzle,
             CU_TENSOR_MAP_L2_PROMOTION_NONE, CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE))
    return -1;
  const auto kernel = metadata ? product<true> : product<false>;
  kernel<<<1, 128>>>(static_cast<const uint32_t*>(a), static_cast<const uint16_t*>(metadata), map, out, width, mistake);
  return cudaGetLastError();
}
