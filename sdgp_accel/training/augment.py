"""Random augmentation of a whole batch at once, on the batch's device.

Each image gets its own draw (torchvision's transforms give one draw to the whole batch). All draws come
from the CPU generator `rng`, so that the same generator state gives the same images on every device.
Images are normalised before they get here: the fill value 0 is the data set's mean colour.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def random_flip(images: Tensor, rng: torch.Generator) -> Tensor:
    """Mirror each image of [N, C, H, W] left to right with probability 1/2."""
    flip = (torch.rand(len(images), generator=rng) < 0.5).to(images.device)
    return torch.where(flip[:, None, None, None], images.flip(3), images)


def pad_crop(images: Tensor, padding: int, rng: torch.Generator) -> Tensor:
    """Translate each image of [N, C, H, W] by up to `padding` pixels along both axes: pad with 0, crop to H by W."""
    count, _, height, width = images.shape
    top, left = torch.randint(2 * padding + 1, (2, count), generator=rng).to(images.device)
    crops = F.pad(images, [padding] * 4).unfold(2, height, 1).unfold(3, width, 1)  # [N, C, top, left, H, W]
    return crops[torch.arange(count, device=images.device), :, top, left]


def cutout(images: Tensor, size: int, rng: torch.Generator) -> Tensor:
    """Set one square of side `size` inside each image of [N, C, H, W] to 0 (DeVries & Taylor, arXiv:1708.04552)."""
    count, _, height, width = images.shape
    top = torch.randint(height - size + 1, (count, 1), generator=rng)
    left = torch.randint(width - size + 1, (count, 1), generator=rng)
    rows, columns = torch.arange(height), torch.arange(width)
    in_rows = (rows >= top) & (rows < top + size)
    in_columns = (columns >= left) & (columns < left + size)
    hole = in_rows[:, None, :, None] & in_columns[:, None, None, :]
    return images.masked_fill(hole.to(images.device), 0.0)
