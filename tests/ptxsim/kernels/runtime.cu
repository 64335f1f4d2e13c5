// Host-side behaviour of the simulated runtime.
#include <cuda_runtime.h>

__device__ int counter = 5;
__constant__ float table[4] = {1, 2, 3, 4};

__global__ void __launch_bounds__(256) fill(float* y, int n) {
  extern __shared__ float scratch[];
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= n) return;
  scratch[threadIdx.x] = table[i % 4] + counter;
  y[i] = scratch[threadIdx.x];
}

extern "C" int launch(float* y, int n, int block, int shared, int allow) {
  if (allow) {
    cudaError_t error = cudaFuncSetAttribute(fill, cudaFuncAttributeMaxDynamicSharedMemorySize, allow);
    if (error != cudaSuccess) return error + 1000;
  }
  fill<<<(n + block - 1) / block, block, shared>>>(y, n);
  return cudaGetLastError();
}

extern "C" int last_error() { return cudaGetLastError(); }
extern "C" const char* message(int error) { return cudaGetErrorString(static_cast<cudaError_t>(error)); }

extern "C" int set_symbols(int value, const float* values) {
  cudaError_t error = cudaMemcpyToSymbol(counter, &value, sizeof value);
  return error != cudaSuccess ? error : cudaMemcpyToSymbol(table, values, sizeof table);
}

// Allocates, copies there and back, frees twice; returns the second free's error.
extern "C" int allocate(const float* from, float* to, int n) {
  float* device;
  if (cudaMalloc(&device, n * sizeof(float)) != cudaSuccess) return -1;
  cudaMemcpy(device, from, n * sizeof(float), cudaMemcpyHostToDevice);
  cudaMemcpy(to, device, n * sizeof(float), cudaMemcpyDeviceToHost);
  if (cudaFree(device) != cudaSuccess) return -2;
  return cudaFree(device);
}

extern "C" int attribute(int which) {
  int value = -1;
  cudaDeviceGetAttribute(&value, static_cast<cudaDeviceAttr>(which), 0);
  return value;
}
