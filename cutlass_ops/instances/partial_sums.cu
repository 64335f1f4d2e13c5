// The sum of the partial results of a split reduction, for every instance of the sparse products. Here and not in their
// headers: of kernels with the same name the linker keeps one object's, which could be one for Hopper alone.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "sdgp/partial_sums_api.h"

namespace sdgp {
namespace {

constexpr int kThreads = 256;

// kVector: 4, or 1 where that does not divide `count` or `out` is not aligned for it.
template <typename Out, int kVector>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const float* __restrict__ partials, Out* __restrict__ out, const int64_t count,
                        const int splits, const bool accumulate) {
  struct alignas(4 * kVector) Floats {
    float at[kVector];
  };
  struct alignas(sizeof(Out) * kVector) Outs {
    Out at[kVector];
  };
  const int64_t stride = static_cast<int64_t>(gridDim.x) * kThreads * kVector;
  for (int64_t i = (static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x) * kVector; i < count; i += stride) {
    Floats sum = *reinterpret_cast<const Floats*>(partials + i);
    for (int split = 1; split < splits; ++split) {
      const Floats part = *reinterpret_cast<const Floats*>(partials + split * count + i);
#pragma unroll
      for (int j = 0; j < kVector; ++j) sum.at[j] += part.at[j];
    }
    Outs* target = reinterpret_cast<Outs*>(out + i);
    Outs result{};
    if (accumulate) result = *target;
#pragma unroll
    for (int j = 0; j < kVector; ++j)
      result.at[j] = static_cast<Out>(accumulate ? sum.at[j] + static_cast<float>(result.at[j]) : sum.at[j]);
    *target = result;
  }
}

template <typename Out>
int launch(const SdgpPartialSums& sums) {
  const bool is_vector = sums.count % 4 == 0 && reinterpret_cast<uintptr_t>(sums.out) % (4 * sizeof(Out)) == 0;
  const auto kernel = is_vector ? sum_partials_kernel<Out, 4> : sum_partials_kernel<Out, 1>;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>((sums.count + 1023) / 1024, 4 * sums.sm_count));
  kernel<<<blocks, kThreads, 0, static_cast<cudaStream_t>(sums.stream)>>>(
      sums.partials, static_cast<Out*>(sums.out), sums.count, sums.splits, sums.accumulate != 0);
  return cudaGetLastError();
}

}  // namespace
}  // namespace sdgp

extern "C" int sdgp_sum_partials(const SdgpPartialSums* sums) {
  if (sums->out_is_float != 0) return sdgp::launch<float>(*sums);
  return sums->is_bfloat16 != 0 ? sdgp::launch<__nv_bfloat16>(*sums) : sdgp::launch<__half>(*sums);
}
