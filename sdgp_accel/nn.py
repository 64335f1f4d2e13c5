"""Drop-in `nn.Linear` and `nn.Conv2d` whose backward passes consume pruned gradients."""

from __future__ import annotations

from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sdgp_accel.backends import Decision, decide_conv2d, decide_linear, warn_once
from sdgp_accel.config import SDGPConfig
from sdgp_accel.functional import conv2d, convolve, is_channels_last, linear, resolve_padding
from sdgp_accel.geometry import pair
from sdgp_accel.layer_plan import INACTIVE, LayerKind, plan_string

# torch.fx (torchvision's feature extraction) traces into layers that are not torch's own: these stay calls there.
torch.fx.wrap("linear")
torch.fx.wrap("conv2d")
torch.fx.wrap("convolve")


class SDGPLayer(nn.Module):
    """What both layers share: a configuration, and the plan string that their forward passes on.

    `sdgp_config` and `sdgp_active` may be assigned; the next forward uses them.
    """

    kind: ClassVar[LayerKind]
    _sdgp_config: SDGPConfig
    _sdgp_active: bool = True
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
        plan = plan_string(self.kind, config)
        warn_of_scope(self.kind, config)
        self._sdgp_config = config
        self._sdgp_plan = plan if self._sdgp_active else INACTIVE

    @property
    def sdgp_active(self) -> bool:
        """False where this layer runs the ordinary dense backward for now; see `sdgp_accel.set_active_`."""
        return self._sdgp_active

    @sdgp_active.setter
    def sdgp_active(self, active: bool) -> None:
        if not isinstance(active, bool):
            raise TypeError(f"sdgp_active must be True or False; got {active!r}")
        self._sdgp_active = active
        self._sdgp_plan = plan_string(self.kind, self._sdgp_config) if active else INACTIVE

    def extra_repr(self) -> str:
        """The dense layer's, and e.g. ``sdgp=2:4 mvue/dense``: the functions of dgrad and wgrad."""
        config = self.sdgp_config
        modes = zip(config.functions, (config.grad_input, config.grad_weight), strict=True)
        functions = [function if mode == "sparse" else "dense" for function, mode in modes]
        off = "" if self.sdgp_active else " (inactive)"
        return f"{super().extra_repr()}, sdgp={config.n}:{config.m} {'/'.join(functions)}{off}"


class SDGPLinear(SDGPLayer, nn.Linear):
    """`nn.Linear` with SDGP backward passes; takes its arguments plus `config`. Same state_dict, same forward."""

    kind = "linear"

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        device: Any = None,
        dtype: Any = None,
        *,
        config: SDGPConfig | None = None,
    ) -> None:
        super().__init__(in_features, out_features, bias, device, dtype, config=config)

    def forward(self, input: Tensor) -> Tensor:
        """[..., in_features] → [..., out_features]."""
        return linear(input, self.weight, self.bias, self._sdgp_plan)


class SDGPConv2d(SDGPLayer, nn.Conv2d):
    """`nn.Conv2d` with SDGP backward passes; takes its arguments plus `config`. Same state_dict, same forward."""

    kind = "conv2d"

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        stride: int | tuple[int, int] = 1,
        padding: str | int | tuple[int, int] = 0,
        dilation: int | tuple[int, int] = 1,
        groups: int = 1,
        bias: bool = True,
        padding_mode: Literal["zeros", "reflect", "replicate", "circular"] = "zeros",
        device: Any = None,
        dtype: Any = None,
        *,
        config: SDGPConfig | None = None,
    ) -> None:
        window = (kernel_size, stride, padding, dilation, groups)
        super().__init__(in_channels, out_channels, *window, bias, padding_mode, device, dtype, config=config)

    def _conv_forward(self, input: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        stride, padding, dilation = self.stride, self.padding, self.dilation
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
            padding = (0, 0)
        elif isinstance(padding, str):
            return conv2d(input, weight, bias, stride, padding, dilation, self.groups, self._sdgp_plan)
        # Numbers and lists have been assigned since the layer was made: torch takes them, too.
        if not (type(stride) is type(padding) is type(dilation) is tuple):
            stride, padding, dilation = pair("stride", stride), pair("padding", padding), pair("dilation", dilation)
        return convolve(input, weight, bias, (stride, padding, dilation, self.groups), self._sdgp_plan)


def warn_of_scope(kind: LayerKind, config: SDGPConfig) -> None:
    """Warn, once, where `config` sums over what a 2-D input of such a layer does not have."""
    if kind == "linear" and config.scope == "sample_channel" and "rescale_magnitude" in config.functions:
        warn_once(
            "scope='sample_channel' sums over the tokens of [..., T, C]; on a 2-D input, where each row is its own "
            "sample, a Linear layer uses scope='group'"
        )


def layer_kind(module: nn.Linear | nn.Conv2d) -> LayerKind:
    """What kind of plan `module` takes."""
    return "linear" if isinstance(module, nn.Linear) else "conv2d"


def layer_input(args: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """The input of a layer that was called with these arguments, as a forward hook gets them."""
    return args[0] if args else named["input"]


def decide_layer(module: nn.Linear | nn.Conv2d, input: Tensor, config: SDGPConfig) -> tuple[Tensor, Decision]:
    """What runs the backward of `module` under `config` on this input, and the input as that backward sees it:
    batched, and padded where the convolution itself does not pad. The input has the dtype that the layer computes in.
    """
    deterministic = torch.are_deterministic_algorithms_enabled()
    if isinstance(module, nn.Linear):
        plan = plan_string("linear", config)
        return input, decide_linear(
            plan, input.shape, module.out_features, input.dtype, input.device, deterministic, module.weight.dtype
        )
    x = input.unsqueeze(0) if input.dim() == 3 else input
    stride, dilation = pair("stride", module.stride), pair("dilation", module.dilation)
    if module.padding_mode != "zeros":
        padded = F.pad(x, module._reversed_padding_repeated_twice, mode=module.padding_mode)
        x, padding = padded.to(x.dtype), (0, 0)  # autocast pads in float32 on a CPU
    elif isinstance(module.padding, str):
        x, padding = resolve_padding(x, module.weight, module.padding, stride, dilation)
    else:
        padding = pair("padding", module.padding)
    window = (stride, padding, dilation, module.groups)
    channels_last = is_channels_last(x) or is_channels_last(module.weight)
    plan, weight = plan_string("conv2d", config), module.weight
    return x, decide_conv2d(
        plan, x.shape, weight.shape, window, channels_last, x.dtype, x.device, deterministic, weight.dtype
    )
