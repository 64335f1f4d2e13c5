// CUTLASS's own sm_90a convolution wgrad, untouched: an implicit GEMM whose activations arrive by TMA im2col. bf16 in, float out, NHWC.
#include "cutlass/cutlass.h"

#include "cute/tensor.hpp"
#include "cutlass/kernel_hardware_info.hpp"
#include "cutlass/conv/collective/collective_builder.hpp"
#include "cutlass/conv/convnd_problem_shape.hpp"
#include "cutlass/conv/convolution.h"
#include "cutlass/conv/device/conv_universal_adapter.hpp"
#include "cutlass/conv/dispatch_policy.hpp"
#include "cutlass/conv/kernel/conv_universal.hpp"
#include "cutlass/epilogue/collective/collective_builder.hpp"
#include "cutlass/util/packed_stride.hpp"

using Element = cutlass::bfloat16_t;
constexpr auto kOperator = cutlass::conv::Operator::kWgrad;
using Tile = cute::Shape<cute::_128, cute::Shape<cute::_64>, cute::Shape<cute::_64>>;
using Cluster = cute::Shape<cute::_1, cute::_1, cute::_1>;
using NHWC = cutlass::layout::TensorNHWC;
using Filter = cutlass::layout::TensorKCSR;
using Epilogue = typename cutlass::epilogue::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, Tile, Cluster, cutlass::epilogue::collective::EpilogueTileAuto, float, float,
    float, Filter, 4, float, Filter, 4, cutlass::epilogue::collective::EpilogueScheduleAuto>::CollectiveOp;
using Mainloop = typename cutlass::conv::collective::CollectiveBuilder<
    cutlass::arch::Sm90, cutlass::arch::OpClassTensorOp, kOperator, Element, NHWC, 8, Element, NHWC, 8, float, Tile, Cluster,
    cutlass::conv::collective::StageCountAutoCarveout<static_cast<int>(sizeof(typename Epilogue::SharedStorage))>,
    cutlass::conv::KernelImplicitTmaWarpSpecializedSm90>::CollectiveOp;
using Problem = cutlass::conv::ConvProblemShape<kOperator, Mainloop::DispatchPolicy::NumSpatialDimensions>;
using Kernel = cutlass::conv::kernel::ConvUniversal<Problem, Mainloop, Epilogue>;
using Convolution = cutlass::conv::device::ConvUniversalAdapter<Kernel>;

extern "C" int run(int n, int h, int w, int c, int k, int r, int s, int pad, int stride, int dilation, Element* dy, Element* x, float* dw) {
  Problem problem(cutlass::conv::Mode::kCrossCorrelation, {n, h, w, c}, {k, r, s, c}, {pad, pad}, {pad, pad}, {stride, stride},
                  {dilation, dilation}, 1);
  auto stride_d = cutlass::make_cute_packed_stride(typename Kernel::StrideD{}, problem.shape_C, problem.stride_C, kOperator);
  typename Convolution::Arguments arguments{problem, {dy, x}, {{1.f, 0.f}, dw, stride_d, dw, stride_d}};
  static Convolution convolution;
  cutlass::Status status = convolution.can_implement(arguments);
  if (status == cutlass::Status::kSuccess) status = convolution.initialize(arguments, nullptr);
  if (status == cutlass::Status::kSuccess) status = convolution.run(nullptr);
  return static_cast<int>(status);
}
