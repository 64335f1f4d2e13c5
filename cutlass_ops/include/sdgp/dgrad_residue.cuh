// Which taps of a filter meet a gradient pixel at an input pixel of a strided convolution.
#pragma once

#include <cuda_runtime.h>

namespace sdgp {

// One spatial axis, seen from the input pixels first, first + stride, ...: tap first_tap + t * tap_step meets, at input
// pixel first + i * stride, gradient pixel i + highest - t * offset_step, for each t < taps. With g the greatest common
// divisor of stride and dilation, tap_step is stride / g and offset_step is dilation / g.
struct ResidueClass {
  int taps, first_tap, highest;
};

__host__ __device__ inline ResidueClass residue_class(int first, int filter, int stride, int padding, int dilation,
                                                      int tap_step) {
  ResidueClass c{};
  // first + padding - tap * dilation must be a multiple of the stride.
  while (c.first_tap < tap_step && (first + padding - c.first_tap * dilation) % stride != 0) ++c.first_tap;
  if (c.first_tap == tap_step || c.first_tap >= filter) return c;  // no tap gets here
  c.taps = (filter - c.first_tap - 1) / tap_step + 1;
  c.highest = (first + padding - c.first_tap * dilation) / stride;
  return c;
}

}  // namespace sdgp
