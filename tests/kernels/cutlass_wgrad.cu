// CUTLASS's own sm_80 implicit-GEMM convolution wgrad, untouched: dw[k, r, s, c] from dy[n, p, q, k] and x[n, h, w, c].
#include "cutlass/conv/kernel/default_conv2d_wgrad.h"

#include "cutlass/conv/device/implicit_gemm_convolution.h"

using Half = cutlass::half_t;
using NHWC = cutlass::layout::TensorNHWC;
using Kernel = cutlass::conv::kernel::DefaultConv2dWgrad<
    Half, NHWC, Half, NHWC, float, NHWC, float, cutlass::arch::OpClassTensorOp, cutlass::arch::Sm80,
    cutlass::gemm::GemmShape<64, 64, 32>, cutlass::gemm::GemmShape<32, 32, 32>, cutlass::gemm::GemmShape<16, 8, 16>,
    cutlass::epilogue::thread::LinearCombination<float, 4, float, float>,
    cutlass::gemm::threadblock::GemmIdentityThreadblockSwizzle<>, 3, cutlass::arch::OpMultiplyAdd,
    cutlass::conv::IteratorAlgorithm::kOptimized>::Kernel;
using Convolution = cutlass::conv::device::ImplicitGemmConvolution<Kernel>;

extern "C" int run(int n, int h, int w, int c, int k, int r, int s, int pad, int stride, int dilation, Half* dy,
                   Half* x, float* dw) {
  int p = (h + 2 * pad - dilation * (r - 1) - 1) / stride + 1, q = (w + 2 * pad - dilation * (s - 1) - 1) / stride + 1;
  cutlass::conv::Conv2dProblemSize problem(n, h, w, c, k, r, s, p, q, pad, pad, stride, stride, dilation, dilation,
                                           cutlass::conv::Mode::kCrossCorrelation);
  Convolution convolution;
  Convolution::Arguments arguments(problem, {dy, NHWC::packed({n, p, q, k})}, {x, NHWC::packed({n, h, w, c})},
                                   {dw, NHWC::packed({k, r, s, c})}, {dw, NHWC::packed({k, r, s, c})}, {1.f, 0.f});
  cutlass::Status status = convolution.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = convolution.initialize(arguments, nullptr);
  if (status == cutlass::Status::kSuccess) status = convolution();
  return static_cast<int>(status);
}
