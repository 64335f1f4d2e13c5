"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011; the constants of Random123).

A random number here is a pure function of *where* it is used, so that every backend, with or without a GPU,
draws the same ones. For group ``g`` of a pruned tensor, the words of block ``b`` are::

    key     = (k0, k1)          the low and high 32 bits of seed[0]
    counter = (c0, c1, c2, c3)
      c0 = bits 0..31 of g
      c1 = bits 32..55 of g  |  b << 24
      c2 = bits 0..31 of seed[1]
      c3 = 2 * rank + pass_index        (pass_index: 0 = grad_input, 1 = grad_weight)

``seed`` is two int64 values on the gradient's device, drawn from torch's own generator (`draw`): a step draws
fresh ones, a checkpoint that holds torch's generator state repeats them, and a CUDA graph advances them on replay.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK32 = 0xFFFFFFFF
_INT64 = torch.iinfo(torch.int64)

# Lanes are int64 tensors that hold 32-bit words. Lanes that are the same for every group stay 0-dim: their
# rounds cost nothing until they meet a lane that varies.
Lanes = tuple[Tensor, Tensor, Tensor, Tensor]


class Rng(NamedTuple):
    """What the random numbers of one pruned gradient depend on, apart from the group's index.

    seed: int64 tensor of shape [2] on the gradient's device: the 64-bit key and the offset (see `draw`).
    rank: data-parallel rank; ranks that share a seed still draw different numbers.
    pass_index: 0 for grad_input, 1 for grad_weight.
    """

    seed: Tensor
    rank: int = 0
    pass_index: int = 0


def draw(device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
    """A fresh seed, int64 of shape [2], from torch's generator of `device` (or `generator`).

    The numbers stay on the device: no synchronisation, safe inside a CUDA graph.
    """
    return torch.randint(_INT64.min, _INT64.max, (2,), dtype=torch.int64, device=device, generator=generator)


def data_parallel_rank() -> int:
    """This process's rank in torch.distributed's default group; 0 where there is none."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank()
    return 0


def group_words(rng: Rng, index: Tensor, count: int, total: int = 1 << 56) -> list[Tensor]:
    """Words 0 .. count-1 of each group in `index` (int64 [b]): int64 tensors [b] with values < 2^32.

    Word ``i`` is word ``i % 4`` of block ``i // 4``. All indices are below `total` (knowing it saves time).
    """
    key, offset = rng.seed.unbind()
    keys = (key & MASK32, (key >> 32) & MASK32)
    low, high = index, torch.zeros_like(offset)
    if total > 1 << 32:
        low, high = index & MASK32, (index >> 32) & 0xFFFFFF
    c3 = torch.full_like(offset, (2 * rng.rank + rng.pass_index) & MASK32)
    words: list[Tensor] = []
    for block in range((count + 3) // 4):
        counter = (low, high | (block << 24), offset & MASK32, c3)
        words += philox4x32(counter, keys, min(4, count - 4 * block))
    return words


def philox4x32(counter: Lanes, key: tuple[Tensor, Tensor], count: int = 4) -> list[Tensor]:
    """The first `count` words of each counter under `key`.

    Lanes are int64 tensors of 32-bit values, each either 0-dim or of one common shape [b].
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    # A new odd lane is the low half of a product; its high half is only masked away where that matters.
    for _ in range(ROUNDS - 1):
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1
        c0, c1 = _mix(p1, c1, k0), p1
        c2, c3 = _mix(p0, c3, k1), p0
        k0, k1 = (k0 + WEYL_0) & MASK32, (k1 + WEYL_1) & MASK32
    p1 = c2 * MULTIPLIER_1
    words = [_mix(p1, c1, k0)]
    if count > 1:
        p0 = c0 * MULTIPLIER_0
        words += [p1.bitwise_and_(MASK32), _mix(p0, c3, k1), p0.bitwise_and_(MASK32)]
    return words[:count]


def _mix(product: Tensor, lane: Tensor, key: Tensor) -> Tensor:
    """(high half of product) ^ lane ^ key, as a 32-bit value."""
    high = product >> 32
    mixed = high.bitwise_xor_(lane) if high.ndim >= lane.ndim else high ^ lane
    return mixed.bitwise_and_(MASK32).bitwise_xor_(key)
