"""The CIFAR-10 network of the SDGP paper (arXiv:2202.00774): nine weight layers, 32x32 images."""

from __future__ import annotations

from torch import Tensor, nn


def _conv_bn(in_channels: int, out_channels: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(in_channels, out_channels, kernel, stride, padding, bias=False),
        nn.BatchNorm2d(out_channels),
        nn.ReLU(inplace=True),
    )


class _Residual(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.body = nn.Sequential(_conv_bn(channels, channels), _conv_bn(channels, channels))

    def forward(self, x: Tensor) -> Tensor:
        residual: Tensor = self.body(x)
        return x + residual


class ResNet9(nn.Module):
    """images [B, 3, H, W] float -> logits [B, num_classes] float, H and W at least 12 (32 in the paper)."""

    LOGIT_SCALE = 0.2

    def __init__(self, num_classes: int = 10) -> None:
        super().__init__()
        self.features = nn.Sequential(
            _conv_bn(3, 128),
            _conv_bn(128, 256, kernel=5, stride=2, padding=2),
            _Residual(256),
            _conv_bn(256, 512),
            nn.MaxPool2d(2),
            _Residual(512),
            _conv_bn(512, 256, padding=0),
            nn.AdaptiveMaxPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(256, num_classes, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits * self.LOGIT_SCALE
