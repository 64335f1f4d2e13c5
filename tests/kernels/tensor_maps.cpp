// Host test of sm90_tensor_map.h against a driver that counts what it is asked to encode. Prints nanoseconds per map
// that is remembered; returns 0 where everything holds.
#include <atomic>
#include <chrono>
#include <cstdio>
#include <thread>
#include <vector>

#include "sdgp/sm90_tensor_map.h"

using sdgp::sm90::tensor_map;
using sdgp::sm90::TensorMapRequest;

static std::atomic<int> encoded{0};

// What tells requests of this test apart.
static CUresult note(CUtensorMap* map, void* address, const cuuint64_t* extent, cuuint64_t kind) {
  ++encoded;
  *map = {};
  map->opaque[0] = reinterpret_cast<cuuint64_t>(address);
  map->opaque[1] = extent[0];
  map->opaque[2] = kind;
  return address == nullptr ? CUDA_ERROR_INVALID_VALUE : CUDA_SUCCESS;
}

static CUresult tiled(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void* address, const cuuint64_t* extent,
                      const cuuint64_t*, const cuuint32_t*, const cuuint32_t*, CUtensorMapInterleave,
                      CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return note(map, address, extent, 0);
}

static CUresult im2col(CUtensorMap* map, CUtensorMapDataType, cuuint32_t, void* address, const cuuint64_t* extent,
                       const cuuint64_t*, const int*, const int*, cuuint32_t, cuuint32_t, const cuuint32_t*,
                       CUtensorMapInterleave, CUtensorMapSwizzle, CUtensorMapL2promotion, CUtensorMapFloatOOBfill) {
  return note(map, address, extent, 1);
}

extern "C" cudaError_t cudaGetDriverEntryPointByVersion(const char* name, void** function, unsigned int,
                                                        unsigned long long, cudaDriverEntryPointQueryResult* status) {
  *function = std::strcmp(name, "cuTensorMapEncodeTiled") == 0 ? reinterpret_cast<void*>(tiled)
                                                               : reinterpret_cast<void*>(im2col);
  *status = cudaDriverEntryPointSuccess;
  return cudaSuccess;
}

static TensorMapRequest request(cuuint64_t address, cuuint64_t columns, bool is_im2col = false) {
  TensorMapRequest result;
  result.address = address;
  result.extent[0] = columns;
  result.is_im2col = is_im2col;
  return result;
}

static bool right(const TensorMapRequest& r) {
  CUtensorMap map;
  return tensor_map(map, r) == 0 && map.opaque[0] == r.address && map.opaque[1] == r.extent[0] &&
         map.opaque[2] == r.is_im2col;
}

#define CHECK(condition)                                                            \
  if (!(condition)) {                                                               \
    std::printf("line %d: %s; encoded %d\n", __LINE__, #condition, encoded.load()); \
    return 1;                                                                       \
  }

int main() {
  CHECK(right(request(256, 64)) && right(request(256, 64)) && encoded == 1);
  CHECK(right(request(256, 72)) && right(request(512, 64)) && right(request(256, 64, true)) && encoded == 4);
  CHECK(right(request(256, 64)) && right(request(256, 72)) && encoded == 4);

  CUtensorMap map;
  CHECK(tensor_map(map, request(0, 64)) == sdgp::sm90::kDriverErrorBase + CUDA_ERROR_INVALID_VALUE);
  CHECK(tensor_map(map, request(0, 64)) != 0 && encoded == 6);  // a failure is not remembered

  // Whatever failed in the slot of a map, that map is right when it is asked for again.
  for (cuuint64_t i = 1; i <= 40000; ++i) CHECK(tensor_map(map, request(0, 64 + i)) != 0);
  CHECK(right(request(256, 64)) && right(request(256, 72)) && right(request(512, 64)));

  // More requests than slots, for one address.
  for (cuuint64_t i = 1; i <= 10000; ++i) CHECK(right(request(256, 64 + i)));

  // More requests than slots, from several threads.
  std::atomic<int> wrong{0};
  std::vector<std::thread> threads;
  for (int thread = 0; thread < 4; ++thread) {
    threads.emplace_back([&] {
      for (int round = 0; round < 3; ++round)
        for (cuuint64_t i = 1; i <= 10000; ++i) wrong += !right(request(256 * i, 8 + i % 7, i % 2));
    });
  }
  for (auto& thread : threads) thread.join();
  CHECK(wrong == 0);

  CHECK(right(request(256, 64)));
  const int before = encoded;
  constexpr int kCalls = 100000;
  const auto start = std::chrono::steady_clock::now();
  for (int i = 0; i < kCalls; ++i) tensor_map(map, request(256, 64));
  const std::chrono::duration<double, std::nano> elapsed = std::chrono::steady_clock::now() - start;
  CHECK(encoded == before);
  std::printf("%.0f\n", elapsed.count() / kCalls);
  return 0;
}
