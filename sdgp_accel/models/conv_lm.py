"""A causal language model of dilated Conv2d layers and BatchNorm: a convolutional net with a hard task.

Image classifiers that fit a small machine learn too easily to tell prune functions apart; next-byte prediction
does not saturate.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class _CausalBlock(nn.Module):
    """x + ReLU(BN(conv(x))) on [B, C, T, 1]; position t sees t, t - dilation, ..., t - (kernel - 1) * dilation."""

    def __init__(self, width: int, kernel: int, dilation: int) -> None:
        super().__init__()
        self.left = (kernel - 1) * dilation
        self.conv = nn.Conv2d(width, width, (kernel, 1), dilation=(dilation, 1), bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return x + F.relu(self.norm(self.conv(F.pad(x, (0, 0, self.left, 0)))))


class ConvLM(nn.Module):
    """tokens [B, T] int64 -> logits [B, T, vocab_size] float.

    Dilations 1, 2, 4, ..., 2^(layers - 1), repeated `stacks` times. The layers are causal; BatchNorm's statistics are
    taken over all positions of the training batch, as in any convolutional net.
    """

    def __init__(
        self, vocab_size: int = 256, width: int = 128, kernel: int = 3, layers: int = 5, stacks: int = 1
    ) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab_size, width)
        dilations = [2**i for i in range(layers)] * stacks
        self.blocks = nn.Sequential(*(_CausalBlock(width, kernel, dilation) for dilation in dilations))
        self.head = nn.Conv2d(width, vocab_size, 1)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens).transpose(1, 2).unsqueeze(-1)  # [B, C, T, 1]
        logits: Tensor = self.head(self.blocks(x))
        return logits.squeeze(-1).transpose(1, 2)
