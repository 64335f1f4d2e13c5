"""The numbers of the method on any device, without its speed: prune, then dense ops."""

from __future__ import annotations

import torch
from torch import Tensor

from sdgp_accel.backends import Needs, Operands, check_out, dense
from sdgp_accel.config import Pass
from sdgp_accel.geometry import Geometry
from sdgp_accel.layer_plan import LayerPlan
from sdgp_accel.philox import Rng
from sdgp_accel.pruning import prune_matrix


class ReferenceBackend:
    """Operands are pruned dense [T, C] matrices. Takes every device, dtype, pattern and geometry."""

    name = "reference"

    def unavailable(self, device: torch.device) -> str | None:
        """Never: it is made of ordinary tensor ops."""
        return None

    def fingerprint(self) -> str:
        """Empty: it comes with torch."""
        return ""

    def unsupported(self, geometry: Geometry, plan: LayerPlan, dtype: torch.dtype, device: torch.device) -> str | None:
        """Never: see `unavailable`."""
        return None

    def prune_compress(
        self, dy: Tensor, geometry: Geometry, plan: LayerPlan, rng: Rng | None, needs: Needs
    ) -> Operands:
        """Prune dY once per needed pass."""
        dgrad = wgrad = bias = None
        matrix, positions_per_sample = dense.matrix_view(dy, geometry), geometry.positions_per_sample
        if needs.dgrad and plan.grad_input is not None:
            dgrad = prune_matrix(matrix, plan.grad_input, 1, positions_per_sample, rng)
        if needs.wgrad and plan.grad_weight is not None:
            rng = rng and rng._replace(pass_index=1)
            wgrad = prune_matrix(matrix, plan.grad_weight, 0, positions_per_sample, rng)
        if needs.bias:
            bias = matrix.sum(0)
        return Operands(dgrad, wgrad, bias)

    def tilings(self, geometry: Geometry, pass_name: Pass, dtype: torch.dtype, device: torch.device) -> tuple[()]:
        """None: torch launches its own kernels."""
        return ()

    def dgrad(
        self,
        operand: Tensor,
        weight: Tensor,
        geometry: Geometry,
        tiling: None = None,
        shape: tuple[int, ...] | None = None,
    ) -> Tensor:
        """Dense dgrad of the pruned gradient."""
        dx = dense.dgrad(dense.layer_view(operand, geometry), weight, geometry)
        return dx if shape is None else dx.view(shape)

    def wgrad(
        self,
        operand: Tensor,
        x: Tensor,
        geometry: Geometry,
        tiling: None = None,
        out: Tensor | None = None,
        accumulate: bool = False,
    ) -> Tensor:
        """Dense wgrad of the pruned gradient."""
        check_out(out, accumulate, x, geometry)
        return dense.wgrad_into(dense.layer_view(operand, geometry), x, geometry, out, accumulate)

    def bind(self, *shape: object) -> None:
        """Never: these are many ops, whatever the calls around them cost."""


BACKEND = ReferenceBackend()
