// Small kernels with one mistake each, chosen by the first argument of run(); case 0 of each pair is the correct twin.
#include <cstdint>
#include <cuda_fp16.h>

constexpr int kThreads = 128;

__global__ void shift_store(const float* x, float* y, int n, bool broken) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  if (broken ? i <= n : i < n) y[i] = i < n ? x[i] : 0.f;
}

__global__ void reverse_block(const float* x, float* y, bool broken) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = x[blockIdx.x * kThreads + threadIdx.x];
  if (!broken) __syncthreads();
  y[blockIdx.x * kThreads + threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

__global__ void reuse_tile(const float* x, float* y, bool broken) {  // write after read
  __shared__ float tile[kThreads];
  float sum = 0;
  for (int k = 0; k < 3; ++k) {
    tile[threadIdx.x] = x[threadIdx.x] * k;
    __syncthreads();
    sum += tile[(threadIdx.x + 32) % kThreads];
    if (!broken) __syncthreads();
  }
  y[threadIdx.x] = sum;
}

__global__ void copy_async(const float* x, float* y, bool broken) {
  __shared__ __align__(16) float tile[4 * kThreads];
  uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(tile + 4 * threadIdx.x));
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + 4 * threadIdx.x));
  asm volatile("cp.async.commit_group;");
  if (!broken) asm volatile("cp.async.wait_group 0;" ::: "memory");
  __syncthreads();
  for (int i = 0; i < 4; ++i) y[i * kThreads + threadIdx.x] = tile[i * kThreads + threadIdx.x];
}

// Two stages in flight, but only the older one is waited for when the younger is read.
__global__ void copy_stages(const float* x, float* y, bool broken) {
  __shared__ __align__(16) float tile[2][4 * kThreads];
  for (int s = 0; s < 2; ++s) {
    uint32_t to = static_cast<uint32_t>(__cvta_generic_to_shared(tile[s] + 4 * threadIdx.x));
    asm volatile("cp.async.ca.shared.global [%0], [%1], 16;" ::"r"(to), "l"(x + (s * kThreads + threadIdx.x) * 4));
    asm volatile("cp.async.commit_group;");
  }
  if (broken) {
    asm volatile("cp.async.wait_group 1;" ::: "memory");
  } else {
    asm volatile("cp.async.wait_all;" ::: "memory");
  }
  __syncthreads();
  y[threadIdx.x] = tile[0][threadIdx.x] + tile[1][threadIdx.x];
}

__global__ void vector_load(const float* x, float* y, bool broken) {
  float4 v = *reinterpret_cast<const float4*>(x + 4 * threadIdx.x + (broken ? 1 : 0));
  y[threadIdx.x] = v.x + v.y + v.z + v.w;
}

__global__ void read_unwritten(const float*, float* y, bool broken) {
  __shared__ float tile[kThreads];
  if (!broken || threadIdx.x != 77) tile[threadIdx.x] = threadIdx.x;
  __syncthreads();
  y[threadIdx.x] = tile[kThreads - 1 - threadIdx.x];
}

__global__ void read_output(const float*, float* y, bool broken) {
  if (!broken) y[threadIdx.x] = 1.f;
  y[threadIdx.x] += 1.f;
}

__global__ void shuffle_divergent(const float* x, float* y, bool broken) {
  float v = x[threadIdx.x];
  int n = broken ? 20 : 32;
  if (threadIdx.x % 32 < n) v += __shfl_xor_sync(~0u, v, 1);
  y[threadIdx.x] = v;
}

__global__ void barrier_divergent(const float* x, float* y, bool broken) {
  float v = x[threadIdx.x];
  if (!broken || threadIdx.x < 16) {
    __syncthreads();
    v += 1.f;
  }
  y[threadIdx.x] = v;
}

__global__ void barrier_lost(const float* x, float* y, bool broken) {  // a whole warp does not come
  if (!broken || threadIdx.x < 96) asm volatile("barrier.sync 1, %0;" ::"n"(kThreads) : "memory");
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void wild_shared(const float* x, float* y, bool broken) {
  __shared__ float tile[kThreads];
  tile[threadIdx.x + (broken ? 1 : 0)] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[broken ? (threadIdx.x == 0 ? 1 : threadIdx.x) : threadIdx.x];
}

__global__ void warp_exchange(const float* x, float* y, bool broken) {  // lanes of one warp, no __syncwarp
  __shared__ float tile[kThreads];
  tile[threadIdx.x] = x[threadIdx.x];
  if (!broken) __syncwarp();
  y[threadIdx.x] = tile[threadIdx.x ^ 1];
}

__global__ void store_conflict(const float* x, float* y, bool broken) {
  __shared__ float tile[kThreads];
  tile[broken ? threadIdx.x / 2 : threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  y[threadIdx.x] = tile[broken ? threadIdx.x / 2 : threadIdx.x];
}

// One mma.sp of a 16x32 sparse A; the broken twin flips one metadata bit: a nibble becomes 0101 (illegal), which `run` cannot see.
__global__ void sparse_mma(const float* x, float* y, bool broken) {
  if (threadIdx.x >= 32) return;
  uint32_t e = 0x44444444u;
  if (broken && threadIdx.x == 5) e ^= 1u;
  uint32_t a = 0x3c003c00u, b = 0x3c003c00u;
  float d0, d1, d2, d3;
  asm volatile(
      "mma.sp::ordered_metadata.sync.aligned.m16n8k32.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%4,%4,%4}, {%5,%5,%5,%5}, "
      "{%6,%6,%6,%6}, %7, 0x0;"
      : "=f"(d0), "=f"(d1), "=f"(d2), "=f"(d3)
      : "r"(a), "r"(b), "f"(x[0]), "r"(e));
  y[threadIdx.x] = d0 + d1 + d2 + d3;
}

__global__ void endless(const float* x, float* y, bool broken) {
  volatile float* flag = y;
  y[0] = broken ? 0.f : x[0] + 1e3f;
  while (flag[0] < 1.f) {
  }
}

__global__ void overlapping_blocks(const float* x, float* y, bool broken) {
  const int first = blockIdx.x * (broken ? kThreads - 1 : kThreads);
  y[first + threadIdx.x] = x[first + threadIdx.x];
}

__global__ void read_neighbour(const float* x, float* y, bool broken) {
  const int i = blockIdx.x * kThreads + threadIdx.x, other = i ^ kThreads;
  y[i] = x[i];
  const float theirs = broken ? y[other] : x[other];
  if (theirs > 1e30f) y[i] = theirs;
}

// The block that comes last adds up what all have written; the broken twin takes the one with the highest number for it.
__device__ unsigned arrived;
__global__ void last_block(const float* x, float* y, bool broken) {
  __shared__ bool is_last;
  y[blockIdx.x * kThreads + threadIdx.x] = x[blockIdx.x * kThreads + threadIdx.x];
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) is_last = (broken ? blockIdx.x : atomicInc(&arrived, gridDim.x - 1)) == gridDim.x - 1;
  __syncthreads();
  if (!is_last) return;
  float sum = 0;
  for (int block = 0; block < gridDim.x; ++block) sum += y[block * kThreads + threadIdx.x];
  y[threadIdx.x] = sum;
}

__global__ void count_arrivals(const float* x, float* y, bool broken) {  // the broken twin reads a counter that others still change
  y[blockIdx.x * kThreads + threadIdx.x] = x[threadIdx.x];
  if (threadIdx.x == 0) atomicInc(&arrived, gridDim.x - 1);
  if (broken && threadIdx.x == 0) y[blockIdx.x * kThreads] = arrived;
}

// The first block waits for the second one's flag; the broken twin trusts that it has come.
__device__ unsigned flag;
__global__ void await_flag(const float* x, float* y, bool broken) {
  if (blockIdx.x == 1) {
    y[threadIdx.x] = x[threadIdx.x];
    __syncthreads();
    if (threadIdx.x == 0) asm volatile("st.release.gpu.u32 [%0], 1;" ::"l"(&flag) : "memory");
    return;
  }
  for (unsigned seen = broken; seen == 0;) asm volatile("ld.acquire.gpu.u32 %0, [%1];" : "=r"(seen) : "l"(&flag) : "memory");
  y[kThreads + threadIdx.x] = y[threadIdx.x];
}

__global__ void read_sum(const float*, float* y, bool broken) {  // of a counter in shared memory that others still change
  __shared__ unsigned count;
  if (threadIdx.x == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, threadIdx.x);
  if (!broken) __syncthreads();
  y[threadIdx.x] = count;
}

__global__ void clear_sum(const float*, float* y, bool broken) {  // while others add to it
  __shared__ unsigned count;
  if (threadIdx.x == 0) count = 0;
  if (!broken) __syncthreads();
  atomicAdd(&count, threadIdx.x);
  __syncthreads();
  y[threadIdx.x] = count;
}

__global__ void shuffle_from_absent(const float* x, float* y, bool broken) {  // all lanes of the mask come; the source is no such lane
  float v = x[threadIdx.x];
  if (threadIdx.x % 32 < 16) v = __shfl_sync(0xffffu, v, broken ? 20 : 3);
  y[threadIdx.x] = v;
}

__global__ void barrier_crowded(const float* x, float* y, bool broken) {  // more threads than the barrier expects
  asm volatile("barrier.sync 1, %0;" ::"r"(broken ? kThreads / 2 : kThreads) : "memory");
  y[threadIdx.x] = x[threadIdx.x];
}

__global__ void load_matrix_divergent(const float* x, float* y, bool broken) {
  __shared__ __align__(16) float tile[kThreads];
  tile[threadIdx.x] = x[threadIdx.x];
  __syncthreads();
  unsigned v = 0;
  if (!broken || threadIdx.x % 32 < 16)
    asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
                 : "=r"(v)
                 : "r"(static_cast<unsigned>(__cvta_generic_to_shared(tile + threadIdx.x % 8 * 4)))
                 : "memory");
  y[threadIdx.x] = v;
}

__global__ void copy_too_much(const float* x, float* y, bool broken) {  // a source larger than the copy
  __shared__ __align__(16) float tile[kThreads * 4];
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(static_cast<unsigned>(__cvta_generic_to_shared(tile + threadIdx.x * 4))),
               "l"(x + threadIdx.x * 4), "r"(broken ? 32 : 16) : "memory");
  asm volatile("cp.async.wait_all;" ::: "memory");
  y[threadIdx.x] = tile[threadIdx.x * 4];
}

extern "C" int run(int which, const float* x, float* y, int n, bool broken) {
  switch (which) {
    case 0: shift_store<<<(n + kThreads) / kThreads, kThreads>>>(x, y, n, broken); break;
    case 1: reverse_block<<<n / kThreads, kThreads>>>(x, y, broken); break;
    case 2: reuse_tile<<<1, kThreads>>>(x, y, broken); break;
    case 3: copy_async<<<1, kThreads>>>(x, y, broken); break;
    case 4: copy_stages<<<1, kThreads>>>(x, y, broken); break;
    case 5: vector_load<<<1, kThreads>>>(x, y, broken); break;
    case 6: read_unwritten<<<1, kThreads>>>(x, y, broken); break;
    case 7: read_output<<<1, kThreads>>>(x, y, broken); break;
    case 8: shuffle_divergent<<<1, kThreads>>>(x, y, broken); break;
    case 9: barrier_divergent<<<1, kThreads>>>(x, y, broken); break;
    case 10: barrier_lost<<<1, kThreads>>>(x, y, broken); break;
    case 11: wild_shared<<<1, kThreads>>>(x, y, broken); break;
    case 12: warp_exchange<<<1, kThreads>>>(x, y, broken); break;
    case 13: store_conflict<<<1, kThreads>>>(x, y, broken); break;
    case 14: sparse_mma<<<1, kThreads>>>(x, y, broken); break;
    case 15: endless<<<1, 1>>>(x, y, broken); break;
    case 16: overlapping_blocks<<<n / kThreads, kThreads>>>(x, y, broken); break;
    case 17: read_neighbour<<<n / kThreads, kThreads>>>(x, y, broken); break;
    case 18: last_block<<<n / kThreads, kThreads>>>(x, y, broken); break;
    case 19: count_arrivals<<<n / kThreads, kThreads>>>(x, y, broken); break;
    case 20: await_flag<<<2, kThreads>>>(x, y, broken); break;
    case 21: read_sum<<<1, kThreads>>>(x, y, broken); break;
    case 22: clear_sum<<<1, kThreads>>>(x, y, broken); break;
    case 23: shuffle_from_absent<<<1, kThreads>>>(x, y, broken); break;
    case 24: barrier_crowded<<<1, kThreads>>>(x, y, broken); break;
    case 25: load_matrix_divergent<<<1, kThreads>>>(x, y, broken); break;
    case 26: copy_too_much<<<1, kThreads>>>(x, y, broken); break;
    default: return -1;
  }
  return cudaGetLastError();
}
