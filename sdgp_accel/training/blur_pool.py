"""Anti-aliased downsampling (Zhang, ICML 2019, arXiv:1904.11486): a low-pass filter before strided convolutions."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Blur(nn.Module):
    """Filters each channel of [N, C, H, W] with the 3x3 binomial kernel (1 2 1)ᵀ(1 2 1) / 16, zero-padded."""

    kernel: Tensor

    def __init__(self, channels: int) -> None:
        super().__init__()
        row = torch.tensor([1.0, 2.0, 1.0]) / 4
        # A constant: it follows .to(), but a checkpoint need not hold it.
        self.register_buffer("kernel", torch.outer(row, row).repeat(channels, 1, 1, 1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(x, self.kernel.to(x.dtype), padding=1, groups=x.shape[1])


def add_blur_pool_(model: nn.Module, min_in_channels: int = 16) -> nn.Module:
    """Put a `Blur` before every strided Conv2d of `model` with at least `min_in_channels` input channels, in place.

    The convolution keeps its Parameters; its name gains a ``.1`` (it becomes the second of a Sequential).
    """
    for parent in list(model.modules()):
        for name, child in parent.named_children():
            if isinstance(child, nn.Conv2d) and max(child.stride) > 1 and child.in_channels >= min_in_channels:
                setattr(parent, name, nn.Sequential(Blur(child.in_channels), child))
    return model
