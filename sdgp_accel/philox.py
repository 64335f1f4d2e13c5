"""Counter-based random numbers: Philox4x32-10 (Salmon et al., SC 2011; the constants of Random123).

A random number here is a pure function of *where* it is used, so that every backend, with or without a GPU,
draws the same ones. For group ``g`` of a pruned tensor, the words of block ``b`` are::

    key     = (k0, k1)          the low and high 32 bits of seed[0]
    counter = (c0, c1, c2, c3)
      c0 = bits 0..31 of g
      c1 = bits 32..55 of g  |  b << 24
      c2 = bits 0..31 of seed[1]
      c3 = 2 * rank + pass_index        (pass_index: 0 = grad_input, 1 = grad_weight)

``seed`` is two 64-bit values that come from torch's own generator of the gradient's device (`draw`): a step takes fresh
ones, a checkpoint that holds the generator's state repeats them, and a CUDA graph advances them on replay.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

ROUNDS = 10
MULTIPLIER_0, MULTIPLIER_1 = 0xD2511F53, 0xCD9E8D57
WEYL = (0x9E3779B9, 0xBB67AE85)
MASK32 = 0xFFFFFFFF
_INT64 = torch.iinfo(torch.int64)
_HAS_RANKS = torch.distributed.is_available()  # a property of torch's build


# Gives a buffer by its name, shape and dtype, uninitialised.
Buffers = Callable[[str, tuple[int, ...], torch.dtype], Tensor]


# Two signed 64-bit values, the key and the offset: a tensor [2] on the gradient's device, or numbers on the host.
Seed = Tensor | tuple[int, int]


class Rng(NamedTuple):
    """What the random numbers of one pruned gradient depend on, apart from the group's index.

    seed: see `draw` and `next_seed`.
    rank: data-parallel rank; ranks that share a seed still draw different numbers.
    pass_index: 0 for grad_input, 1 for grad_weight.
    """

    seed: Seed
    rank: int = 0
    pass_index: int = 0


def draw(device: torch.device | str, generator: torch.Generator | None = None) -> Tensor:
    """A fresh seed, int64 of shape [2], from torch's generator of `device` (or `generator`).

    The numbers stay on the device: no synchronisation, safe inside a CUDA graph.
    """
    return torch.randint(_INT64.min, _INT64.max, (2,), dtype=torch.int64, device=device, generator=generator)


def next_seed(device: torch.device) -> Seed:
    """A fresh seed from torch's generator of `device`, at the least cost to the host.

    A CUDA generator is itself a seed and an offset, both known to the host: `take` launches nothing. While a CUDA graph
    is captured only the device will know them, and a CPU's generator is of another kind: those are drawn from.
    """
    if device.type != "cuda" or torch.cuda.is_current_stream_capturing():
        return draw(device)
    # The index first: to ask for the device initialises CUDA, and before that there are no generators.
    index = torch.cuda.current_device() if device.index is None else device.index
    return take(torch.cuda.default_generators[index])


# Sets the keys apart from those of torch's own kernels, which count under the bare seed: 64 bits of the golden ratio.
_KEY_MASK = 0x9E3779B97F4A7C15
_PHILOX_STEP = 4  # torch's offsets count words, and a Philox block has 4


def take(generator: torch.Generator) -> tuple[int, int]:
    """The next seed of a generator that counts, as CUDA's do: its own seed under a mask, and where it has come to."""
    offset = generator.get_offset()
    generator.set_offset(offset + _PHILOX_STEP)
    return _key_of(generator.initial_seed()), offset // _PHILOX_STEP


@functools.lru_cache(maxsize=64)  # a run has few seeds, and Python's 64-bit arithmetic is slow
def _key_of(seed: int) -> int:
    key = (seed ^ _KEY_MASK) & (1 << 64) - 1
    return key - (1 << 64) if key >> 63 else key


_rank: int | None = None


def set_data_parallel_rank(rank: int | None) -> None:
    """Let this process draw as data-parallel rank `rank` (0 or larger); None: as its rank in the default group.

    Where not all processes are data-parallel ones (tensor or pipeline parallelism), pass this one's place among those
    that are, such as ``mesh["dp"].get_local_rank()``: processes that hold copies of one layer and feed them the same
    data have to draw alike, or the copies drift apart. Raises ValueError for anything else.
    """
    global _rank
    if rank is not None and (isinstance(rank, bool) or not isinstance(rank, int) or not 0 <= rank < 1 << 31):
        raise ValueError(f"rank must be an int from 0 to 2^31 - 1, or None; got {rank!r}")
    _rank = rank


def data_parallel_rank() -> int:
    """What `set_data_parallel_rank` has set, else this process's rank in torch.distributed's default group, else 0."""
    if _rank is not None:
        return _rank
    # What torch.distributed.get_rank() says, several times as fast.
    group = torch.distributed.GroupMember.WORLD if _HAS_RANKS else None
    return 0 if group is None else group.rank()


class GroupWords:
    """The random words of the groups of one pruned gradient."""

    def __init__(self, rng: Rng, total: int = 1 << 56) -> None:
        """total: how many groups there are; fewer than 2^32 take less time."""
        # On the host two 0-dim tensors, which torch takes as numbers on any device.
        key, offset = (rng.seed if isinstance(rng.seed, Tensor) else torch.tensor(rng.seed, device="cpu")).unbind()
        self._keys = round_keys((key & MASK32, (key >> 32) & MASK32))
        self._c2 = offset & MASK32
        self._c3 = torch.full_like(offset, (2 * rng.rank + rng.pass_index) & MASK32)
        self._wide = total > 1 << 32

    def __call__(self, index: Tensor, count: int, memory: Buffers | None = None) -> Iterator[Tensor]:
        """Words 0 .. count-1 of each group in `index` (int64 [b]): int64 tensors [b] with values < 2^32.

        Word ``i`` is word ``i % 4`` of block ``i // 4``.
        memory: see `philox4x32_cpu`; a word is then only valid until the next one is asked for. None: plain torch.
        """
        for block in range((count + 3) // 4):
            wanted = min(4, count - 4 * block)
            if memory is None or self._wide:
                low, high = (index & MASK32, (index >> 32) & 0xFFFFFF) if self._wide else (index, self._c2 * 0)
                yield from philox4x32((low, high | (block << 24), self._c2, self._c3), self._keys)[:wanted]
            else:
                constants = block << 24, int(self._c2), int(self._c3)
                yield from philox4x32_cpu(index, constants, self._keys, wanted, memory)


def round_keys(key: tuple[Tensor, Tensor]) -> list[tuple[Tensor, Tensor]]:
    """The key of each round, 0-dim. key: 0-dim int64 tensors of 32-bit values."""
    rounds = torch.arange(ROUNDS, device=key[0].device)
    k0, k1 = (((k + rounds * step) & MASK32).unbind() for k, step in zip(key, WEYL, strict=True))
    return list(zip(k0, k1, strict=True))


def philox4x32(
    counter: tuple[Tensor, Tensor, Tensor, Tensor], keys: Sequence[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The four words of each counter under the round keys `keys`.

    counter: int64 tensors of 32-bit values that broadcast together. What is the same for all counters should be 0-dim:
        its rounds are free until it meets a lane that varies.
    """
    c0, c1, c2, c3 = counter
    for k0, k1 in keys:
        p0, p1 = c0 * MULTIPLIER_0, c2 * MULTIPLIER_1  # modulo 2^64, and signed
        c0, c1 = ((p1 >> 32) ^ c1) & MASK32 ^ k0, p1 & MASK32
        c2, c3 = ((p0 >> 32) ^ c3) & MASK32 ^ k1, p0 & MASK32
    return c0, c1, c2, c3


def philox4x32_cpu(
    c0: Tensor, constants: tuple[int, int, int], keys: Sequence[tuple[Tensor, Tensor]], count: int, memory: Buffers
) -> list[Tensor]:
    """The first `count` words of `philox4x32` for counters (c0, constants), c0 an int64 [b] on a CPU.

    The words lie in buffers that `memory` gives by name, shape and dtype. NumPy, because its 64-bit product takes
    0.3 ns an element on a core with AVX2, and torch's 0.7; and because a round is five operations on both even lanes at
    once there. The two change places every round: ``lanes`` [2, b] is (lane 0, lane 2), then (lane 2, lane 0), ..
    """
    even, *low = (memory(name, (2, len(c0)), torch.int64) for name in ("lanes", "products", "last"))
    lanes, (products, last) = _unsigned(even), map(_unsigned, low)
    half, mask = np.uint64(32), np.uint64(MASK32)
    c1, c2, c3 = constants
    (k0, k1), (next_k0, next_k1), *others = ((int(a), int(b)) for a, b in keys)
    # Round 1, in which only lane 0 varies, and round 2, in which only lane 2 does.
    fixed_1 = c2 * MULTIPLIER_1
    fixed_0 = ((fixed_1 >> 32) ^ c1 ^ k0) * MULTIPLIER_0
    np.multiply(_unsigned(c0), np.uint64(MULTIPLIER_0), out=products[1])
    np.right_shift(products[1], half, out=lanes[0])
    lanes[0] ^= np.uint64(c3 ^ k1)
    np.multiply(lanes[0], np.uint64(MULTIPLIER_1), out=last[0])
    last[1] = fixed_0 & MASK32
    np.right_shift(last[0], half, out=lanes[0])
    lanes[0] ^= np.uint64(fixed_1 & MASK32 ^ next_k0)
    np.bitwise_and(products[1], mask, out=lanes[1])
    lanes[1] ^= np.uint64((fixed_0 >> 32) ^ next_k1)
    # The others. The low halves of the products of the round before are the odd lanes, left unmasked.
    factors = np.array([[MULTIPLIER_0], [MULTIPLIER_1]], np.uint64)
    for r, (k0, k1) in enumerate(others):
        order = 1 if r % 2 == 0 else -1
        final = r == len(others) - 1
        # The last round yields word 0 from one lane, and the round before has that lane in front.
        rows = slice(1 if final and count == 1 else 2)
        mixed = slice(1 if r >= len(others) - 2 and count == 1 else 2)
        np.multiply(lanes[rows], factors[::order][rows], out=products[rows])
        np.right_shift(products[mixed], half, out=lanes[mixed])
        lanes[mixed] ^= last[::-1][mixed]
        lanes[mixed] &= mask
        lanes[mixed] ^= np.array([[k1], [k0]], np.uint64)[::order][mixed]
        products, last = last, products
    if count > 1:
        last &= mask
    odd = low[len(others) % 2 - 1]
    return [even[0], odd[0], even[1], odd[1]][:count]


def _unsigned(x: Tensor) -> NDArray[np.uint64]:
    return x.numpy().view(np.uint64)
