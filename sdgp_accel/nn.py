"""Drop-in `nn.Linear` and `nn.Conv2d` whose backward passes consume pruned gradients."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from sdgp_accel import functional
from sdgp_accel.backends import warn_once
from sdgp_accel.config import SDGPConfig
from sdgp_accel.layer_plan import plan_string


class SDGPLinear(nn.Linear):
    """`nn.Linear` with SDGP backward passes; takes its arguments plus `config`. Same state_dict, same forward.

    `sdgp_config` is the layer's configuration; assigning it changes the next forward.
    """

    _sdgp_config: SDGPConfig
    _sdgp_plan: str

    def __init__(self, *args: Any, config: SDGPConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sdgp_config = SDGPConfig() if config is None else config

    @property
    def sdgp_config(self) -> SDGPConfig:
        """How this layer's gradients are pruned."""
        return self._sdgp_config

    @sdgp_config.setter
    def sdgp_config(self, config: SDGPConfig) -> None:
        if config.scope == "sample_channel" and "rescale_magnitude" in config.functions:
            warn_once(
                "scope='sample_channel' sums over the tokens of [..., T, C]; on a 2-D input, where each row is its own "
                "sample, a Linear layer uses scope='group'"
            )
        self._sdgp_config = config
        self._sdgp_plan = plan_string("linear", config)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        return functional.linear(input, self.weight, self.bias, self._sdgp_plan)

    def extra_repr(self) -> str:
        """The dense layer's, and the pruning."""
        return f"{super().extra_repr()}, {describe(self.sdgp_config)}"


class SDGPConv2d(nn.Conv2d):
    """`nn.Conv2d` with SDGP backward passes; takes its arguments plus `config`. Same state_dict, same forward.

    `sdgp_config` is the layer's configuration; assigning it changes the next forward.
    """

    _sdgp_config: SDGPConfig
    _sdgp_plan: str

    def __init__(self, *args: Any, config: SDGPConfig | None = None, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.sdgp_config = SDGPConfig() if config is None else config

    @property
    def sdgp_config(self) -> SDGPConfig:
        """How this layer's gradients are pruned."""
        return self._sdgp_config

    @sdgp_config.setter
    def sdgp_config(self, config: SDGPConfig) -> None:
        self._sdgp_config = config
        self._sdgp_plan = plan_string("conv2d", config)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        padding: Any = self.padding
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        return functional.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups, self._sdgp_plan)

    def extra_repr(self) -> str:
        """The dense layer's, and the pruning."""
        dense = super().extra_repr()  # type: ignore[no-untyped-call]
        return f"{dense}, {describe(self.sdgp_config)}"


def describe(config: SDGPConfig) -> str:
    """One phrase for a layer's repr, e.g. ``sdgp=2:4 mvue/mvue``."""
    functions = [
        function if mode == "sparse" else "dense"
        for function, mode in zip(config.functions, (config.grad_input, config.grad_weight), strict=True)
    ]
    return f"sdgp={config.n}:{config.m} {'/'.join(functions)}"
