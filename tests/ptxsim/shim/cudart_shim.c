/* A CUDA runtime that hands kernel launches to the simulator.
 *
 * It stands in for libcudart.so.13 under the library under test. Device memory is host memory; streams and events complete at once;
 * everything with a decision in it is a callback into Python, installed by ptxsim_install() before the library is loaded.
 */
#include <cuda.h>
#include <cuda_runtime_api.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

struct callbacks {
  void (*register_image)(int image, const void *data);
  void (*register_function)(int image, const void *host, const char *name);
  void (*register_variable)(int image, const void *host, const char *name, size_t size);
  int (*launch)(const void *host, const unsigned *dims, size_t shared, void **args, void *stream);
  void *(*allocate)(size_t size);
  int (*release)(void *pointer);
  void (*written)(void *pointer, size_t size);
  void (*cleared)(void *stream);
  int (*set_attribute)(const void *host, int attribute, int value);
  int (*get_attribute)(const void *host, int what); /* 0 static shared bytes, 1 max threads, 2 local bytes; or minus an error */
  void *(*symbol)(const void *host);
  const char *(*message)(int error);
};

/* Python's, where the process has one. */
extern int PyGILState_Check(void) __attribute__((weak));

static struct callbacks cb;
static int major = 8, minor = 0;
static cudaError_t last = cudaSuccess;
static int images = 0;
/* A thread has a context from its first call of the runtime on that needs one; the driver's functions do not give it any. */
static __thread int has_context = 0;

void ptxsim_install(const struct callbacks *table) { cb = *table; }

void ptxsim_select(int cc_major, int cc_minor) {
  major = cc_major;
  minor = cc_minor;
  has_context = 1; /* as of a thread that has memory on the device */
}

static cudaError_t done(cudaError_t error) {
  if (error != cudaSuccess) last = error;
  return error;
}

/* ---- registration: called by code that nvcc puts into every object ---- */

struct fatbin_wrapper {
  int magic, version;
  const void *data;
  void *unused;
};

void **__cudaRegisterFatBinary(void *wrapper) {
  int *handle = malloc(sizeof *handle);
  *handle = images++;
  cb.register_image(*handle, ((struct fatbin_wrapper *)wrapper)->data);
  return (void **)handle;
}
void __cudaRegisterFatBinaryEnd(void **handle) { (void)handle; }
void __cudaUnregisterFatBinary(void **handle) { free(handle); }
char __cudaInitModule(void **handle) { (void)handle; return 1; }
void __cudaRegisterFunction(void **handle, const char *host, char *device, const char *name, int limit, void *tid, void *bid,
                            void *block, void *grid, int *warp) {
  (void)device, (void)limit, (void)tid, (void)bid, (void)block, (void)grid, (void)warp;
  cb.register_function(*(int *)handle, host, name);
}
void __cudaRegisterVar(void **handle, char *host, char *address, const char *name, int ext, size_t size, int constant, int global) {
  (void)address, (void)ext, (void)constant, (void)global;
  cb.register_variable(*(int *)handle, host, name, size);
}

/* ---- launches ---- */

static struct { dim3 grid, block; size_t shared; void *stream; } config[16];
static int depth = 0;

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, void *stream) {
  if (depth == 16) return 1;
  config[depth].grid = grid, config[depth].block = block, config[depth].shared = shared, config[depth].stream = stream;
  depth++;
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3 *grid, dim3 *block, size_t *shared, void *stream) {
  if (depth == 0) return done(cudaErrorMissingConfiguration);
  depth--;
  *grid = config[depth].grid, *block = config[depth].block, *shared = config[depth].shared;
  *(void **)stream = config[depth].stream;
  return cudaSuccess;
}
static cudaError_t launch(const void *host, dim3 grid, dim3 block, size_t shared, void **args, cudaStream_t stream, dim3 cluster,
                          unsigned overlaps) {
  has_context = 1;
  unsigned holds_gil = PyGILState_Check && PyGILState_Check();
  unsigned dims[11] = {grid.x,    grid.y,    grid.z,    block.x,  block.y,  block.z,
                       cluster.x, cluster.y, cluster.z, overlaps, holds_gil};
  return done((cudaError_t)cb.launch(host, dims, shared, args, stream));
}
cudaError_t cudaLaunchKernel(const void *host, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
  dim3 one = {1, 1, 1};
  return launch(host, grid, block, shared, args, stream, one, 0);
}
cudaError_t __cudaGetKernel(cudaKernel_t *kernel, const void *host) {
  *kernel = (cudaKernel_t)host;
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void **args, size_t shared, cudaStream_t stream) {
  return cudaLaunchKernel((const void *)kernel, grid, block, args, shared, stream);
}
cudaError_t cudaLaunchKernelExC(const cudaLaunchConfig_t *c, const void *host, void **args) {
  dim3 cluster = {1, 1, 1};
  unsigned overlaps = 0;
  for (unsigned i = 0; i < c->numAttrs; i++)
    if (c->attrs[i].id == cudaLaunchAttributeClusterDimension) {
      cluster.x = c->attrs[i].val.clusterDim.x, cluster.y = c->attrs[i].val.clusterDim.y, cluster.z = c->attrs[i].val.clusterDim.z;
    } else if (c->attrs[i].id == cudaLaunchAttributeProgrammaticStreamSerialization) {
      overlaps = c->attrs[i].val.programmaticStreamSerializationAllowed != 0;
      if (overlaps && major < 9) return done(cudaErrorNotSupported);
    }
  return launch(host, c->gridDim, c->blockDim, c->dynamicSmemBytes, args, c->stream, cluster, overlaps);
}

/* ---- memory ---- */

cudaError_t cudaMalloc(void **pointer, size_t size) {
  has_context = 1;
  *pointer = size ? cb.allocate(size) : NULL;
  return done(size && !*pointer ? cudaErrorMemoryAllocation : cudaSuccess);
}
cudaError_t cudaMallocAsync(void **pointer, size_t size, cudaStream_t stream) { (void)stream; return cudaMalloc(pointer, size); }
cudaError_t cudaFree(void *pointer) { return done(pointer ? (cudaError_t)cb.release(pointer) : cudaSuccess); }
cudaError_t cudaFreeAsync(void *pointer, cudaStream_t stream) { (void)stream; return cudaFree(pointer); }
cudaError_t cudaMemcpy(void *to, const void *from, size_t size, enum cudaMemcpyKind kind) {
  memmove(to, from, size);
  if (kind == cudaMemcpyHostToDevice || kind == cudaMemcpyDeviceToDevice || kind == cudaMemcpyDefault) cb.written(to, size);
  return cudaSuccess;
}
cudaError_t cudaMemcpyAsync(void *to, const void *from, size_t size, enum cudaMemcpyKind kind, cudaStream_t stream) {
  (void)stream;
  return cudaMemcpy(to, from, size, kind);
}
cudaError_t cudaMemset(void *to, int value, size_t size) {
  has_context = 1;
  memset(to, value, size);
  cb.written(to, size);
  return cudaSuccess;
}
cudaError_t cudaMemsetAsync(void *to, int value, size_t size, cudaStream_t stream) {
  cb.cleared(stream);
  return cudaMemset(to, value, size);
}
cudaError_t cudaGetSymbolAddress(void **pointer, const void *symbol) {
  *pointer = cb.symbol(symbol);
  return done(*pointer ? cudaSuccess : cudaErrorInvalidSymbol);
}
cudaError_t cudaMemcpyToSymbol(const void *symbol, const void *from, size_t size, size_t offset, enum cudaMemcpyKind kind) {
  void *address;
  cudaError_t error = cudaGetSymbolAddress(&address, symbol);
  return error != cudaSuccess ? error : cudaMemcpy((char *)address + offset, from, size, kind);
}

/* ---- errors, device, streams, events ---- */

cudaError_t cudaGetLastError(void) {
  cudaError_t error = last;
  last = cudaSuccess;
  return error;
}
cudaError_t cudaPeekAtLastError(void) { return last; }
const char *cudaGetErrorString(cudaError_t error) { return cb.message(error); }
const char *cudaGetErrorName(cudaError_t error) { return cb.message(error); }
cudaError_t cudaGetDevice(int *device) { *device = 0; return cudaSuccess; }
cudaError_t cudaSetDevice(int device) { return done(device == 0 ? cudaSuccess : cudaErrorInvalidDevice); }
cudaError_t cudaGetDeviceCount(int *count) { *count = 1; return cudaSuccess; }
cudaError_t cudaDeviceSynchronize(void) { return cudaSuccess; }
cudaError_t cudaDriverGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }
cudaError_t cudaRuntimeGetVersion(int *version) { *version = CUDART_VERSION; return cudaSuccess; }

static int shared_optin(void) { return (major == 8 && minor == 0) ? 163 * 1024 : major == 8 ? 99 * 1024 : 227 * 1024; }
static int multiprocessors(void) { return major == 8 ? 108 : 132; }

cudaError_t cudaDeviceGetAttribute(int *value, enum cudaDeviceAttr attribute, int device) {
  (void)device;
  switch (attribute) {
    case cudaDevAttrMaxThreadsPerBlock: *value = 1024; break;
    case cudaDevAttrMaxBlockDimX: case cudaDevAttrMaxBlockDimY: *value = 1024; break;
    case cudaDevAttrMaxBlockDimZ: *value = 64; break;
    case cudaDevAttrMaxGridDimX: *value = 2147483647; break;
    case cudaDevAttrMaxGridDimY: case cudaDevAttrMaxGridDimZ: *value = 65535; break;
    case cudaDevAttrWarpSize: *value = 32; break;
    case cudaDevAttrMultiProcessorCount: *value = multiprocessors(); break;
    case cudaDevAttrComputeCapabilityMajor: *value = major; break;
    case cudaDevAttrComputeCapabilityMinor: *value = minor; break;
    case cudaDevAttrMaxSharedMemoryPerBlock: *value = 48 * 1024; break;
    case cudaDevAttrMaxSharedMemoryPerBlockOptin: *value = shared_optin(); break;
    case cudaDevAttrMaxSharedMemoryPerMultiprocessor: *value = shared_optin() + 1024; break;
    case cudaDevAttrReservedSharedMemoryPerBlock: *value = 1024; break;
    case cudaDevAttrMaxThreadsPerMultiProcessor: *value = 2048; break;
    case cudaDevAttrMaxBlocksPerMultiprocessor: *value = 32; break;
    case cudaDevAttrMaxRegistersPerBlock: case cudaDevAttrMaxRegistersPerMultiprocessor: *value = 65536; break;
    case cudaDevAttrL2CacheSize: *value = major == 8 ? 40 << 20 : 50 << 20; break;
    case cudaDevAttrCooperativeLaunch: case cudaDevAttrMemoryPoolsSupported: *value = 1; break;
    default: *value = 0; return done(cudaErrorInvalidValue);
  }
  return cudaSuccess;
}
cudaError_t cudaGetDeviceProperties(struct cudaDeviceProp *p, int device) {
  (void)device;
  memset(p, 0, sizeof *p);
  strcpy(p->name, "PTX simulator");
  p->major = major, p->minor = minor;
  p->multiProcessorCount = multiprocessors();
  p->sharedMemPerBlock = 48 * 1024;
  p->sharedMemPerBlockOptin = shared_optin();
  p->sharedMemPerMultiprocessor = shared_optin() + 1024;
  p->maxThreadsPerBlock = 1024, p->maxThreadsPerMultiProcessor = 2048;
  p->warpSize = 32, p->regsPerBlock = p->regsPerMultiprocessor = 65536;
  p->totalGlobalMem = 80ull << 30;
  p->l2CacheSize = major == 8 ? 40 << 20 : 50 << 20;
  p->maxGridSize[0] = 2147483647, p->maxGridSize[1] = p->maxGridSize[2] = 65535;
  p->maxThreadsDim[0] = p->maxThreadsDim[1] = 1024, p->maxThreadsDim[2] = 64;
  return cudaSuccess;
}
cudaError_t cudaFuncSetAttribute(const void *host, enum cudaFuncAttribute attribute, int value) {
  has_context = 1;
  return done((cudaError_t)cb.set_attribute(host, attribute, value));
}
cudaError_t cudaFuncGetAttributes(struct cudaFuncAttributes *a, const void *host) {
  memset(a, 0, sizeof *a);
  int shared = cb.get_attribute(host, 0);
  if (shared < 0) return done((cudaError_t)-shared);
  a->sharedSizeBytes = shared;
  a->maxThreadsPerBlock = cb.get_attribute(host, 1);
  a->localSizeBytes = cb.get_attribute(host, 2);
  a->numRegs = 128;
  a->ptxVersion = a->binaryVersion = major * 10 + minor;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int *blocks, const void *host, int threads, size_t dynamic, unsigned flags) {
  (void)flags;
  int shared = cb.get_attribute(host, 0);
  if (shared < 0) return done((cudaError_t)-shared);
  size_t bytes = shared + dynamic + 1024;
  int by_threads = 2048 / threads, by_shared = (int)((shared_optin() + 1024) / bytes);
  *blocks = by_threads < by_shared ? by_threads : by_shared;
  if (*blocks > 32) *blocks = 32;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int *blocks, const void *host, int threads, size_t dynamic) {
  return cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(blocks, host, threads, dynamic, 0);
}
cudaError_t cudaStreamCreate(cudaStream_t *stream) { *stream = NULL; return cudaSuccess; }
cudaError_t cudaStreamCreateWithFlags(cudaStream_t *stream, unsigned flags) { (void)flags; *stream = NULL; return cudaSuccess; }
cudaError_t cudaStreamDestroy(cudaStream_t stream) { (void)stream; return cudaSuccess; }
cudaError_t cudaStreamSynchronize(cudaStream_t stream) { (void)stream; return cudaSuccess; }
cudaError_t cudaStreamIsCapturing(cudaStream_t stream, enum cudaStreamCaptureStatus *status) {
  (void)stream;
  *status = cudaStreamCaptureStatusNone;
  return cudaSuccess;
}
cudaError_t cudaEventCreate(cudaEvent_t *event) { *event = NULL; return cudaSuccess; }
cudaError_t cudaEventCreateWithFlags(cudaEvent_t *event, unsigned flags) { (void)flags; *event = NULL; return cudaSuccess; }
cudaError_t cudaEventDestroy(cudaEvent_t event) { (void)event; return cudaSuccess; }
cudaError_t cudaEventRecord(cudaEvent_t event, cudaStream_t stream) { (void)event, (void)stream; return cudaSuccess; }
cudaError_t cudaEventSynchronize(cudaEvent_t event) { (void)event; return cudaSuccess; }

/* ---- tensor maps: recorded in the map's 128 bytes; tests/ptxsim/tma.py reads them ---- */

struct tensor_map {
  uint32_t magic;
  uint8_t type, rank, swizzle, interleave;
  uint64_t address;
  uint32_t extents[5], unused;
  uint64_t strides[4];
  uint16_t box[5];                /* im2col: channels per pixel, pixels per column */
  int16_t lower[3], upper[3];     /* im2col: corners of the pixel box */
  uint8_t steps[5], is_im2col;
};
_Static_assert(sizeof(struct tensor_map) <= sizeof(CUtensorMap), "a tensor map has 128 bytes");

static int element_bytes(CUtensorMapDataType type) {
  switch (type) {
    case CU_TENSOR_MAP_DATA_TYPE_UINT8: return 1;
    case CU_TENSOR_MAP_DATA_TYPE_UINT16: case CU_TENSOR_MAP_DATA_TYPE_FLOAT16: case CU_TENSOR_MAP_DATA_TYPE_BFLOAT16: return 2;
    case CU_TENSOR_MAP_DATA_TYPE_UINT64: case CU_TENSOR_MAP_DATA_TYPE_INT64: case CU_TENSOR_MAP_DATA_TYPE_FLOAT64: return 8;
    default: return 4;
  }
}

/* Both refuse what the driver's documentation says it refuses. */
static CUresult record(struct tensor_map *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *extents,
                       const cuuint64_t *strides, const cuuint32_t *steps, unsigned inner, CUtensorMapInterleave interleave,
                       CUtensorMapSwizzle swizzle, CUtensorMapFloatOOBfill fill) {
  if (!has_context) return CUDA_ERROR_INVALID_CONTEXT;
  if (rank < 1 || rank > 5 || (uintptr_t)address % 16 || type > CU_TENSOR_MAP_DATA_TYPE_TFLOAT32_FTZ) return CUDA_ERROR_INVALID_VALUE;
  if (interleave != CU_TENSOR_MAP_INTERLEAVE_NONE || swizzle > CU_TENSOR_MAP_SWIZZLE_128B || fill) return CUDA_ERROR_NOT_SUPPORTED;
  static const unsigned span[] = {1u << 30, 32, 64, 128};
  if (inner * element_bytes(type) % 16 || inner * element_bytes(type) > span[swizzle]) return CUDA_ERROR_INVALID_VALUE;
  map->magic = 0x50545854, map->type = type, map->rank = rank, map->swizzle = swizzle, map->address = (uintptr_t)address;
  for (unsigned i = 0; i < rank; i++) {
    if (extents[i] == 0 || extents[i] > (1ull << 32) - 1 || steps[i] == 0 || steps[i] > 8) return CUDA_ERROR_INVALID_VALUE;
    map->extents[i] = extents[i], map->steps[i] = steps[i];
    if (i + 1 < rank) {
      if (strides[i] % 16 || strides[i] >= 1ull << 40) return CUDA_ERROR_INVALID_VALUE;
      map->strides[i] = strides[i];
    }
  }
  return CUDA_SUCCESS;
}
static CUresult encode_tiled(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *extents,
                             const cuuint64_t *strides, const cuuint32_t *box, const cuuint32_t *steps,
                             CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle, CUtensorMapL2promotion promotion,
                             CUtensorMapFloatOOBfill fill) {
  (void)promotion;
  struct tensor_map recorded = {0};
  CUresult error = record(&recorded, type, rank, address, extents, strides, steps, box[0], interleave, swizzle, fill);
  for (unsigned i = 0; i < rank && error == CUDA_SUCCESS; i++) {
    if (box[i] == 0 || box[i] > 256) return CUDA_ERROR_INVALID_VALUE;
    if (steps[i] != 1) return CUDA_ERROR_NOT_SUPPORTED;
    recorded.box[i] = box[i];
  }
  memcpy(map, &recorded, sizeof recorded);
  return error;
}
static CUresult encode_im2col(CUtensorMap *map, CUtensorMapDataType type, cuuint32_t rank, void *address, const cuuint64_t *extents,
                              const cuuint64_t *strides, const int *lower, const int *upper, cuuint32_t channels, cuuint32_t pixels,
                              const cuuint32_t *steps, CUtensorMapInterleave interleave, CUtensorMapSwizzle swizzle,
                              CUtensorMapL2promotion promotion, CUtensorMapFloatOOBfill fill) {
  (void)promotion;
  if (rank < 3 || channels == 0 || channels > 256 || pixels == 0 || pixels > 1024) return CUDA_ERROR_INVALID_VALUE;
  struct tensor_map recorded = {.is_im2col = 1, .box = {channels, pixels}};
  int limit = rank == 3 ? 1 << 15 : rank == 4 ? 1 << 7 : 1 << 4;
  for (unsigned i = 0; i < rank - 2; i++) {
    if (lower[i] < -limit || lower[i] >= limit || upper[i] < -limit || upper[i] >= limit) return CUDA_ERROR_INVALID_VALUE;
    recorded.lower[i] = lower[i], recorded.upper[i] = upper[i];
  }
  CUresult error = record(&recorded, type, rank, address, extents, strides, steps, channels, interleave, swizzle, fill);
  memcpy(map, &recorded, sizeof recorded);
  return error;
}

cudaError_t cudaGetDriverEntryPointByVersion(const char *symbol, void **function, unsigned version, unsigned long long flags,
                                             enum cudaDriverEntryPointQueryResult *status) {
  (void)version, (void)flags;
  *function = !strcmp(symbol, "cuTensorMapEncodeTiled")    ? (void *)encode_tiled
              : !strcmp(symbol, "cuTensorMapEncodeIm2col") ? (void *)encode_im2col
                                                           : NULL;
  if (status) *status = *function ? cudaDriverEntryPointSuccess : cudaDriverEntryPointSymbolNotFound;
  return done(*function ? cudaSuccess : cudaErrorInvalidValue);
}
cudaError_t cudaGetDriverEntryPoint(const char *symbol, void **function, unsigned long long flags, enum cudaDriverEntryPointQueryResult *status) {
  return cudaGetDriverEntryPointByVersion(symbol, function, 12000, flags, status);
}
cudaError_t cudaOccupancyMaxActiveClusters(int *clusters, const void *host, const cudaLaunchConfig_t *c) {
  (void)host, (void)c;
  *clusters = multiprocessors() / 2;
  return cudaSuccess;
}
