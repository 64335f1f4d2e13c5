// Host side of TMA: tensor maps, encoded by the driver once per set of arguments and remembered.
#pragma once

#include <cudaTypedefs.h>
#include <cuda_runtime.h>

#include <cstdint>
#include <cstring>
#include <memory>
#include <mutex>
#include <type_traits>

namespace sdgp::sm90 {

constexpr int kDriverErrorBase = 1000;  // added to a CUresult, to tell it from a cudaError_t

// Everything a map depends on; dimensions innermost first. Unused places stay 0: requests are compared byte by byte.
struct TensorMapRequest {
  cuuint64_t address = 0;
  cuuint64_t extent[5] = {};
  cuuint64_t stride_bytes[4] = {};  // from the second dimension on
  cuuint32_t box[5] = {};           // im2col: channels, pixels
  cuuint32_t step[5] = {1, 1, 1, 1, 1};
  int lower[3] = {}, upper[3] = {};  // im2col: corners of the pixel box
  CUtensorMapDataType type{};
  CUtensorMapSwizzle swizzle{};
  cuuint32_t rank = 0, is_im2col = 0;
};
static_assert(std::has_unique_object_representations_v<TensorMapRequest>);

template <typename Function>
Function driver_function(const char* name) {
  void* function = nullptr;
  cudaDriverEntryPointQueryResult status;
  cudaGetDriverEntryPointByVersion(name, &function, 12000, cudaEnableDefault, &status);
  return reinterpret_cast<Function>(status == cudaDriverEntryPointSuccess ? function : nullptr);
}

// Loads outside the tensor give zeros. Returns 0 or an error code.
inline int encode(CUtensorMap& map, const TensorMapRequest& request) {
  static const auto tiled = driver_function<PFN_cuTensorMapEncodeTiled_v12000>("cuTensorMapEncodeTiled");
  static const auto im2col = driver_function<PFN_cuTensorMapEncodeIm2col_v12000>("cuTensorMapEncodeIm2col");
  if (tiled == nullptr || im2col == nullptr) return cudaErrorNotSupported;
  constexpr auto kInterleave = CU_TENSOR_MAP_INTERLEAVE_NONE;
  constexpr auto kPromotion = CU_TENSOR_MAP_L2_PROMOTION_L2_256B;
  constexpr auto kOutside = CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE;
  const auto& r = request;
  auto* const address = reinterpret_cast<void*>(r.address);
  const CUresult result = r.is_im2col != 0
                              ? im2col(&map, r.type, r.rank, address, r.extent, r.stride_bytes, r.lower, r.upper,
                                       r.box[0], r.box[1], r.step, kInterleave, r.swizzle, kPromotion, kOutside)
                              : tiled(&map, r.type, r.rank, address, r.extent, r.stride_bytes, r.box, r.step,
                                      kInterleave, r.swizzle, kPromotion, kOutside);
  return result == CUDA_SUCCESS ? 0 : kDriverErrorBase + result;
}

// `encode`, remembered: a training step asks for the same maps again and again, as its allocator hands out the same
// addresses. Each request has one slot, where it replaces what was there. A map stays right when its memory is freed:
// it holds nothing but the request.
inline int tensor_map(CUtensorMap& map, const TensorMapRequest& request) {
  struct Slot {
    CUtensorMap map;
    TensorMapRequest request;
    bool used = false;
  };
  constexpr size_t kSlots = 4096;  // a 24-layer transformer has some 600 maps; 1.3 MB
  static std::mutex mutex;
  static const std::unique_ptr<Slot[]> slots(new Slot[kSlots]);

  uint64_t words[sizeof(request) / 8];
  std::memcpy(words, &request, sizeof(request));
  uint64_t hash = 0;
  for (const uint64_t word : words) hash = (hash ^ word) * 0x9e3779b97f4a7c15u, hash ^= hash >> 32;
  Slot& slot = slots[hash % kSlots];

  const std::lock_guard lock(mutex);
  if (!slot.used || std::memcmp(&slot.request, &request, sizeof(request)) != 0) {
    slot.used = false;
    const int error = encode(slot.map, request);
    if (error != 0) return error;
    slot.request = request;
    slot.used = true;
  }
  map = slot.map;
  return 0;
}

}  // namespace sdgp::sm90
