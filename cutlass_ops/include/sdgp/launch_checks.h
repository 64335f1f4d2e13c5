// What the launches of launches.h have in common: how an instance is found by its name, how arguments are checked, and
// what becomes of a launch that fails. std::invalid_argument is Python's ValueError.
#pragma once

#include <cuda_runtime_api.h>
#include <dlfcn.h>

#include <cmath>
#include <cstdint>
#include <initializer_list>
#include <stdexcept>
#include <string>

namespace sdgp {

// A kernel's entry point; not what else this library and those that it needs export.
inline void* find_function(const std::string& name) {
  if (!name.starts_with("sdgp_")) return nullptr;
  static void* const library = [] {
    Dl_info self;
    dladdr(reinterpret_cast<void*>(&find_function), &self);
    return dlopen(self.dli_fname, RTLD_LAZY | RTLD_NOLOAD);
  }();
  return library == nullptr ? nullptr : dlsym(library, name.c_str());
}

template <typename Function>
Function* instance(const std::string& name) {
  void* const function = find_function(name);
  if (function == nullptr) throw std::invalid_argument("this build has no kernel " + name + "; built for " SDGP_ARCHS);
  return reinterpret_cast<Function*>(function);
}

constexpr int kDriverErrorBase = 1000;  // entry points add it to a CUresult

inline void check_launch(const std::string& name, int error) {
  if (error == cudaSuccess) return;
  if (error >= kDriverErrorBase) {
    throw std::runtime_error(name + ": tensor map rejected, CUresult " + std::to_string(error - kDriverErrorBase));
  }
  cudaGetLastError();  // or the next call that looks would report this failure as its own
  throw std::runtime_error(name + ": " + cudaGetErrorString(static_cast<cudaError_t>(error)));
}

inline void check_pointer(const char* argument, int64_t pointer, int64_t alignment) {
  if (pointer == 0) throw std::invalid_argument(std::string(argument) + " must be a device pointer; got 0");
  if (pointer % alignment != 0) {
    throw std::invalid_argument(std::string(argument) + " must be aligned to " + std::to_string(alignment) +
                                " bytes; got " + std::to_string(pointer));
  }
}

inline void check_choice(const char* argument, const std::string& value, std::initializer_list<const char*> accepted) {
  std::string list;
  for (const char* const choice : accepted) {
    if (value == choice) return;
    list += (list.empty() ? "" : ", ") + std::string(choice);
  }
  throw std::invalid_argument(std::string(argument) + " must be one of " + list + "; got '" + value + "'");
}

inline void check_size(const char* argument, int64_t size, int64_t least) {
  // Beyond 2^62 the addresses of 16-bit elements could not be counted in 64 bits.
  if (size < least || size >= int64_t{1} << 62) {
    throw std::invalid_argument(std::string(argument) + " must be at least " + std::to_string(least) +
                                " and below 2^62; got " + std::to_string(size));
  }
}

inline void check_padded(const char* argument, int64_t padded, int64_t length, int64_t multiple = 16) {
  if (padded % multiple != 0 || padded < length) {
    throw std::invalid_argument(std::string(argument) + " must be a multiple of " + std::to_string(multiple) +
                                ", at least " + std::to_string(length) + "; got " + std::to_string(padded));
  }
}

// rows * stride must be countable.
inline void check_extent(const char* arguments, int64_t rows, int64_t stride) {
  int64_t extent;
  if (__builtin_mul_overflow(rows, stride, &extent) || extent >= int64_t{1} << 62) {
    throw std::invalid_argument(std::string(arguments) + " must have a product below 2^62; got " +
                                std::to_string(rows) + " and " + std::to_string(stride));
  }
}

inline void check_eps(float eps) {
  if (!(eps >= 0 && std::isfinite(eps)))
    throw std::invalid_argument("eps must be finite and not negative; got " + std::to_string(eps));
}

// Samples of one length make up the matrix; 0: it is one sample.
inline void check_samples(int64_t positions_per_sample, int64_t t) {
  check_size("positions_per_sample", positions_per_sample, 0);
  if (positions_per_sample > 0 && t % positions_per_sample != 0) {
    throw std::invalid_argument("positions_per_sample must divide t = " + std::to_string(t) + "; got " +
                                std::to_string(positions_per_sample));
  }
}

// A size of the products, which count in 32 bits what is rounded up to tiles.
inline int32_t checked(const char* argument, int64_t size, int64_t least = 1) {
  constexpr int64_t kMost = (int64_t{1} << 31) - 1024;
  if (size < least || size > kMost) {
    throw std::invalid_argument(std::string(argument) + " must be at least " + std::to_string(least) + " and at most " +
                                std::to_string(kMost) + "; got " + std::to_string(size));
  }
  return static_cast<int32_t>(size);
}

inline void check_matrix(int64_t t, int64_t c, int64_t row_stride) {
  check_size("t", t, 1);
  check_size("c", c, 1);
  check_size("row_stride", row_stride, c);
  check_extent("t and row_stride", t, row_stride);
}

template <typename T>
T* pointer(int64_t address) {
  return reinterpret_cast<T*>(address);
}

}  // namespace sdgp
