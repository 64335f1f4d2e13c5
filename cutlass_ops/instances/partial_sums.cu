// The sum of the partial results of a split reduction, for every instance of the sparse products. Here and not in their
// headers: of kernels with the same name the linker keeps one object's, which could be one for Hopper alone.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <algorithm>

#include "sdgp/grid_dependency.cuh"
#include "sdgp/partial_sums_api.h"

namespace sdgp {
namespace {

constexpr int kThreads = 256;
constexpr int kMaxRows = 32;

// A block has `rows` rows of threads over kThreads / rows runs of kVector outputs; each row adds up a stretch of the
// splits, and the first the rows. kVector: 4, or 1 where that does not divide `count` or `out` is not aligned for it.
// The pointers are not __restrict__: what is read through such ones has to be constant from the kernel's start on, and
// the kernel before may still be writing the partial results then.
template <typename Out, int kVector>
__global__ void __launch_bounds__(kThreads)
    sum_partials_kernel(const float* partials, Out* out, const int64_t count, const int splits, const int rows,
                        const bool accumulate) {
  struct alignas(4 * kVector) Floats {
    float at[kVector];
    __device__ __forceinline__ static Floats load(const float* from) {  // at once: of a struct, float by float
      if constexpr (kVector == 1) {
        return {*from};
      } else {
        const float4 value = *reinterpret_cast<const float4*>(from);
        return {value.x, value.y, value.z, value.w};
      }
    }
    __device__ __forceinline__ void add(const Floats& other) {
#pragma unroll
      for (int j = 0; j < kVector; ++j) at[j] += other.at[j];
    }
  };
  struct alignas(sizeof(Out) * kVector) Outs {
    Out at[kVector];
  };
  __shared__ Floats row_sums[kThreads];
  wait_for_preceding_grid();

  const int columns = kThreads / rows, thread = static_cast<int>(threadIdx.x);
  const int column = thread % columns, row = thread / columns;
  const int stretch = (splits + rows - 1) / rows, first = row * stretch, last = min(first + stretch, splits);
  const int64_t stride = static_cast<int64_t>(gridDim.x) * columns * kVector;
  for (int64_t block = static_cast<int64_t>(blockIdx.x) * columns * kVector; block < count; block += stride) {
    const int64_t i = block + column * kVector;
    Floats sum{};
    if (i < count) {
      const float* part = partials + first * count + i;
#pragma unroll 4
      for (int split = first; split < last; ++split, part += count) sum.add(Floats::load(part));
    }
    if (rows > 1) {
      __syncthreads();  // the block before has been read
      row_sums[thread] = sum;
      __syncthreads();
      if (row > 0) continue;
      for (int r = 1; r < rows; ++r) sum.add(row_sums[r * columns + column]);
    }
    if (i >= count) continue;
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
  const int64_t runs = is_vector ? sums.count / 4 : sums.count, most_blocks = int64_t{4} * sums.sm_count;
  // Few outputs of many splits: rows until the blocks are as many as run at a time, or a row has two splits left.
  int rows = 1;
  while (rows < kMaxRows && 4 * rows <= sums.splits && runs * rows < most_blocks * kThreads / 2) rows *= 2;
  const int columns = kThreads / rows;
  const auto blocks = static_cast<unsigned>(std::min((runs + columns - 1) / columns, most_blocks));
  cudaLaunchAttribute overlap = overlapping();
  cudaLaunchConfig_t launch{};
  launch.gridDim = blocks;
  launch.blockDim = kThreads;
  launch.stream = static_cast<cudaStream_t>(sums.stream);
  launch.attrs = &overlap;
  launch.numAttrs = sums.overlaps != 0 ? 1 : 0;
  return cudaLaunchKernelEx(&launch, kernel, sums.partials, static_cast<Out*>(sums.out), sums.count,
                            static_cast<int>(sums.splits), rows, sums.accumulate != 0);
}

}  // namespace
}  // namespace sdgp

extern "C" int sdgp_sum_partials(const SdgpPartialSums* sums) {
  if (sums->out_is_float != 0) return sdgp::launch<float>(*sums);
  return sums->is_bfloat16 != 0 ? sdgp::launch<__nv_bfloat16>(*sums) : sdgp::launch<__half>(*sums);
}
