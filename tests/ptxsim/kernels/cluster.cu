// Two blocks of a cluster swap their numbers through each other's shared memory. `mistake`: the one or the other does not
// wait, or waits for an arrival that orders nothing, or the blocks do not for the kernel that they overlap, or too late.
#include <cuda_runtime.h>

#include <cstdint>

enum Mistake { kNone, kReadsEarly, kLeavesEarly, kExitsEarly, kRelaxed, kEndsEarly, kWaitsLate };

constexpr int kThreads = 64;

__device__ uint32_t at_other(const void* mine) {
  uint32_t rank, address = static_cast<uint32_t>(__cvta_generic_to_shared(mine));
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  asm("mapa.shared::cluster.u32 %0, %0, %1;" : "+r"(address) : "r"(rank ^ 1));
  return address;
}

__device__ void meet(bool relaxed = false) {
  if (relaxed) {
    asm volatile("barrier.cluster.arrive.relaxed.aligned;" ::: "memory");
  } else {
    asm volatile("barrier.cluster.arrive.aligned;" ::: "memory");
  }
  asm volatile("barrier.cluster.wait.aligned;" ::: "memory");
}

__global__ void swap(const int* x, int* y, int mistake) {
  __shared__ int pushed[kThreads], pulled[kThreads];
  if (mistake < kEndsEarly) asm volatile("griddepcontrol.wait;" ::: "memory");
  const int i = threadIdx.x, here = blockIdx.x * kThreads + i;
  pulled[i] = x[here];
  if (mistake == kWaitsLate) asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("st.shared::cluster.u32 [%0], %1;" ::"r"(at_other(&pushed[i])), "r"(x[here]) : "memory");
  if (mistake != kReadsEarly) meet(mistake == kRelaxed);
  int theirs;
  asm volatile("ld.shared::cluster.u32 %0, [%1];" : "=r"(theirs) : "r"(at_other(&pulled[i])) : "memory");
  y[here] = theirs + 1000 * pushed[i];
  asm volatile("griddepcontrol.launch_dependents;");
  if (mistake == kExitsEarly) return;
  if (mistake != kLeavesEarly) meet();
  pulled[i] = 0;
}

// Which CTA of the cluster the address of a shared variable names, as it is taken.
__global__ void name_cta(int* ranks) {
  __shared__ int mine[kThreads];
  mine[threadIdx.x] = 0;
  ranks[blockIdx.x] = static_cast<int>(static_cast<uint32_t>(__cvta_generic_to_shared(mine)) >> 24);
}

extern "C" int name(int* ranks, int blocks, int cluster) {
  cudaLaunchAttribute attribute{cudaLaunchAttributeClusterDimension};
  attribute.val.clusterDim = {static_cast<unsigned>(cluster), 1, 1};
  cudaLaunchConfig_t launch{dim3(blocks), 1, 0, nullptr, &attribute, 1};
  cudaLaunchKernelEx(&launch, name_cta, ranks);
  return cudaGetLastError();
}

extern "C" int run(const int* x, int* y, int blocks, int mistake) {
  cudaLaunchAttribute attributes[2] = {{cudaLaunchAttributeClusterDimension},
                                       {cudaLaunchAttributeProgrammaticStreamSerialization}};
  attributes[0].val.clusterDim = {2, 1, 1};
  attributes[1].val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t launch{dim3(blocks), kThreads, 0, nullptr, attributes, 2};
  cudaLaunchKernelEx(&launch, swap, x, y, mistake);
  return cudaGetLastError();
}
