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

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL_0, WEYL_1 = 0x9E3779B9, 0xBB67AE85
MASK32 = 0xFFFFFFFF
_INT64 = torch.iinfo(torch.int64)


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


def group_words(
    rng: Rng, index: Tensor, count: int, *, total: int = 1 << 56, spare: list[Tensor] | None = None
) -> Iterator[Tensor]:
    """Words 0 .. count-1 of each group in `index` (int64 [b]): int64 tensors [b] with values < 2^32.

    Word ``i`` is word ``i % 4`` of block ``i // 4``. All indices are below `total` (knowing it saves time). With
    `spare`, see `philox4x32`, a word is only valid until the next one is asked for.
    """
    key, offset = rng.seed.unbind()
    keys = (key & MASK32, (key >> 32) & MASK32)
    low, high = index, torch.zeros_like(offset)
    if total > 1 << 32:
        low, high = index & MASK32, (index >> 32) & 0xFFFFFF
    c3 = torch.full_like(offset, (2 * rng.rank + rng.pass_index) & MASK32)
    for block in range((count + 3) // 4):
        counter = (low, high | (block << 24), offset & MASK32, c3)
        words = philox4x32(counter, keys, min(4, count - 4 * block), spare)
        for word in words:
            yield word
            if spare is not None:
                spare.append(word)


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor],
    key: tuple[Tensor, Tensor],
    count: int = 4,
    spare: list[Tensor] | None = None,
) -> list[Tensor]:
    """The first `count` words of each counter under `key`.

    counter, key: int64 tensors of 32-bit values, each either 0-dim or of one common shape [b]. What is the same for
        all counters should be 0-dim: its rounds are free until it meets a lane that varies.
    spare: int64 buffers [b] to compute in, replenished with those no longer needed; None allocates instead.
    """
    lanes = counter
    rounds = torch.arange(ROUNDS, device=key[0].device)
    round_keys = [((k + rounds * step) & MASK32).unbind() for k, step in zip(key, (WEYL_0, WEYL_1), strict=True)]

    def take() -> Tensor | None:
        return spare.pop() if spare else None

    def give(*tensors: Tensor) -> None:
        if spare is not None:
            spare.extend(t for t in tensors if t.ndim and all(t is not c for c in counter))

    def multiply(lane: Tensor, factor: int) -> Tensor:
        return torch.mul(lane, factor, out=take() if lane.ndim else None)

    def mix(product: Tensor, lane: Tensor, k: Tensor) -> Tensor:
        """(high half of product) ^ lane ^ k. Lanes may carry bits above the 32nd, which are masked away here."""
        if product.ndim >= lane.ndim:
            mixed = torch.bitwise_right_shift(product, 32, out=take() if product.ndim else None).bitwise_xor_(lane)
        else:
            mixed = torch.bitwise_xor(lane, product >> 32, out=take())
        return mixed.bitwise_and_(MASK32).bitwise_xor_(k)

    for k0, k1 in list(zip(*round_keys, strict=True))[:-1]:
        c0, c1, c2, c3 = lanes
        p0, p1 = multiply(c0, MULTIPLIER_0), multiply(c2, MULTIPLIER_1)
        give(c0, c2)
        # The odd lanes are the low halves of the products: left unmasked.
        lanes = (mix(p1, c1, k0), p1, mix(p0, c3, k1), p0)
        give(c1, c3)
    c0, c1, c2, c3 = lanes
    p1 = multiply(c2, MULTIPLIER_1)
    words = [mix(p1, c1, round_keys[0][-1])]
    give(c1, c2)
    if count == 1:
        give(c0, c3, p1)
        return words
    p0 = multiply(c0, MULTIPLIER_0)
    words += [p1.bitwise_and_(MASK32), mix(p0, c3, round_keys[1][-1]), p0.bitwise_and_(MASK32)]
    give(c0, c3, *words[count:])
    return words[:count]
