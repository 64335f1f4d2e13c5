// Kernels of one stream that overlap: programmatic dependent launch (CUDA programming guide; griddepcontrol in the PTX
// ISA). From compute capability 9.0 on; for others these are nothing, and no launch may ask for overlap.
#pragma once

#include <cuda_runtime.h>

namespace sdgp {

// Blocks of the next kernel, if it was launched to overlap, may start where there is room once every block of this one
// has said so or ended: none takes the place of a block of this one.
__device__ __forceinline__ void launch_dependents() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Returns when the kernel before this one in the stream has ended and what it wrote can be read.
__device__ __forceinline__ void wait_for_preceding_grid() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// An attribute of launches of kernels that do so.
inline cudaLaunchAttribute overlapping() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

}  // namespace sdgp
