"""A small convolutional net for scikit-learn's 8x8 single-channel digits."""

from __future__ import annotations

from torch import Tensor, nn


class DigitsNet(nn.Module):
    """images [B, 1, H, W] float -> logits [B, num_classes] float; H and W at least 2 (8 in the data set).

    Every layer but the first has channel counts divisible by 16, so that all of them are 2:4 operands the
    kernels take, and the net still trains in seconds on one CPU core.
    """

    def __init__(self, num_classes: int = 10, width: int = 32) -> None:
        super().__init__()

        def conv_bn(in_channels: int, out_channels: int) -> nn.Sequential:
            return nn.Sequential(
                nn.Conv2d(in_channels, out_channels, 3, padding=1, bias=False),
                nn.BatchNorm2d(out_channels),
                nn.ReLU(inplace=True),
            )

        self.features = nn.Sequential(
            conv_bn(1, width),
            conv_bn(width, 2 * width),
            nn.MaxPool2d(2),
            conv_bn(2 * width, 2 * width),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.head = nn.Linear(2 * width, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.head(self.features(images))
        return logits
