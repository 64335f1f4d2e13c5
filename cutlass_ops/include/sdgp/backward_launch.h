// All launches of one layer's backward as one object: from Python a single call with addresses.
#pragma once

#include <memory>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "sdgp/launches.h"

namespace sdgp {

// Prune + compress passes over dY and the products that take what they wrote, all in one block of memory. Places in it
// are bytes from its beginning.
class Backward {
 public:
  // Values and metadata of an operand.
  using Operand = std::pair<int64_t, int64_t>;
  // One pass: its launches (no scope_scales where the scope is the group), its operands, its workspace and its scales.
  using Sweep = std::tuple<std::shared_ptr<PruneCompress>, std::shared_ptr<ScopeScales>, std::optional<Operand>,
                           std::optional<Operand>, int64_t, int64_t, int64_t>;
  // A product, its operand and its workspace.
  using Part = std::tuple<std::shared_ptr<Product>, Operand, int64_t>;

  Backward(std::vector<Sweep> sweeps, std::optional<Part> dgrad, std::optional<Part> wgrad)
      : sweeps_(std::move(sweeps)), dgrad_(std::move(dgrad)), wgrad_(std::move(wgrad)) {}

  // bias: 0 where it is not wanted. seed, key, offset, rank: as PruneCompress takes them. weight and dx, x and dw: of
  // the products that there are.
  void operator()(int64_t dy, int64_t block, int64_t bias, int64_t seed, int64_t key, int64_t offset, uint32_t rank,
                  int64_t weight, int64_t dx, int64_t x, int64_t dw, int64_t stream) const {
    run(dgrad_, block, weight, dx, stream, SDGP_STEP_PREPARE);
    run(wgrad_, block, x, dw, stream, SDGP_STEP_PREPARE);
    for (const auto& [launch, scope_scales, dgrad, wgrad, workspace_at, dgrad_scale_at, wgrad_scale_at] : sweeps_) {
      const auto [dgrad_values, dgrad_metadata] = addresses(block, dgrad);
      const auto [wgrad_values, wgrad_metadata] = addresses(block, wgrad);
      const int64_t workspace = block + workspace_at;
      int64_t dgrad_scale = 0, wgrad_scale = 0;
      if (scope_scales != nullptr) {
        dgrad_scale = block + dgrad_scale_at;
        wgrad_scale = block + wgrad_scale_at;
        // Its sums lie where the partial sums of the bias gradient will: it ends before the launch begins.
        (*scope_scales)(dy, workspace, dgrad_scale, wgrad_scale, stream);
      }
      (*launch)(dy, dgrad_values, dgrad_metadata, wgrad_values, wgrad_metadata, bias, workspace, seed, key, offset,
                rank, dgrad_scale, wgrad_scale, stream);
      bias = 0;  // the first pass has summed it
    }
    run(dgrad_, block, weight, dx, stream, SDGP_STEP_MULTIPLY);
    // What it reads was complete before dgrad began, if that is one kernel at least and directly before it.
    run(wgrad_, block, x, dw, stream, SDGP_STEP_MULTIPLY,
        dgrad_.has_value() && std::get<0>(*dgrad_)->always_launches());
  }

 private:
  static Operand addresses(int64_t block, const std::optional<Operand>& operand) {
    return operand.has_value() ? Operand{block + operand->first, block + operand->second} : Operand{0, 0};
  }

  static void run(const std::optional<Part>& part, int64_t block, int64_t b, int64_t out, int64_t stream, int32_t step,
                  bool overlaps = false) {
    if (!part.has_value()) return;
    const auto& [product, operand, workspace] = *part;
    if (step == SDGP_STEP_PREPARE && !product->needs_preparation()) return;
    (*product)(block + operand.first, block + operand.second, b, out, block + workspace, stream, step, overlaps);
  }

  std::vector<Sweep> sweeps_;
  std::optional<Part> dgrad_, wgrad_;
};

}  // namespace sdgp
