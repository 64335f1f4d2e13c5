// Whether the driver takes the code of this build, asked of a kernel that does nothing: before a layer is decided,
// since its backward could not fall back any more.
#include <cuda_runtime.h>

#include "sdgp/device_check_api.h"

namespace {

__global__ void check_kernel() {}

}  // namespace

extern "C" int sdgp_check_device(void) {
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, check_kernel);
  if (error != cudaSuccess) cudaGetLastError();  // or the next call that looks would report this failure as its own
  return error;
}
