"""The prune functions as one Triton kernel: for many small training runs on a GPU.

`sdgp_accel.pruning` fixes every bit, at the price of hundreds of small operations per gradient; on a GPU their
launches, not the arithmetic, would set how many runs fit into an hour. This kernel follows the same rules with the same
random numbers, so that the masks are the same but for rounding (tests compare them, in Triton's interpreter).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from sdgp_accel.config import FUNCTIONS, PruneSpec
from sdgp_accel.philox import Rng, Seed

PAIRS_PER_PROGRAM = 4096  # the kernel compares all pairs of a group: m^2 of them, in registers
MVUE, RANDOM = (tl.constexpr(FUNCTIONS.index(name)) for name in ("mvue", "random"))
RESCALE = tl.constexpr(FUNCTIONS.index("rescale_magnitude"))


def prune_matrix(dy2d: Tensor, spec: PruneSpec, axis: int, positions_per_sample: int, rng: Rng | None) -> Tensor:
    """As `sdgp_accel.pruning.prune_matrix` on dY [T, C], for finite float32 values and m a power of two."""
    out = torch.empty_like(dy2d)
    per_row = triton.cdiv(dy2d.shape[1], spec.m) if axis == 1 else dy2d.shape[1]
    groups = per_row * (dy2d.shape[0] if axis == 1 else triton.cdiv(dy2d.shape[0], spec.m))
    block = max(1, PAIRS_PER_PROGRAM // spec.m**2)
    scaled_after = spec.function == "rescale_magnitude" and spec.scope != "group"
    _prune[(triton.cdiv(groups, block),)](
        dy2d,
        out,
        dy2d if rng is None else _on_device(rng.seed, dy2d.device),  # not read by the functions that draw nothing
        groups,
        per_row,
        dy2d.shape[axis],
        *dy2d.stride(),
        *out.stride(),
        0 if rng is None else 2 * rng.rank + rng.pass_index,
        spec.eps,
        FUNCTION=FUNCTIONS.index("magnitude" if scaled_after else spec.function),
        N=spec.n,
        M=spec.m,
        AXIS=axis,
        BLOCK=block,
    )
    if scaled_after:
        positions = positions_per_sample if spec.scope == "sample_channel" else len(dy2d)
        over = 1 if spec.scope == "sample_channel" else (1, 2)
        x, kept = (t.unflatten(0, (-1, positions)) for t in (dy2d, out))
        total, kept_total = (t.abs().sum(over, keepdim=True) for t in (x, kept))
        out = (kept * torch.where(kept_total == 0, 1, total / (kept_total + spec.eps))).flatten(0, 1)
    return out


def _on_device(seed: Seed, device: torch.device) -> Tensor:
    return seed if isinstance(seed, Tensor) else torch.tensor(seed, device=device)


@triton.jit
def _prune(
    x_ptr,
    out_ptr,
    seed_ptr,
    groups,
    per_row,
    length,
    x_row,
    x_column,
    out_row,
    out_column,
    counter3,
    eps,
    FUNCTION: tl.constexpr,
    N: tl.constexpr,
    M: tl.constexpr,
    AXIS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    group = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    i = tl.arange(0, M)
    outer = (group // per_row)[:, None]
    inner = (group % per_row)[:, None]
    if AXIS == 1:
        row, column = outer, inner * M + i[None, :]
        valid = (group < groups)[:, None] & (column < length)
    else:
        row, column = outer * M + i[None, :], inner
        valid = (group < groups)[:, None] & (row < length)
    x = tl.load(x_ptr + row * x_row + column * x_column, mask=valid, other=0.0)
    a = tl.abs(x)

    if FUNCTION == RANDOM:
        index, element = tl.broadcast(group[:, None], i[None, :])
        w0, w1, w2, w3 = words(seed_ptr, counter3, index, element // 4)
        which = element % 4
        word = tl.where(which == 0, w0, tl.where(which == 1, w1, tl.where(which == 2, w2, w3)))
        order = tl.where(valid, word.to(tl.int64), -1)
    else:
        order = a

    # [group, i, j]: j comes before i in descending order, ties to the lower index.
    lower = i[None, None, :] < i[None, :, None]
    same = i[None, None, :] == i[None, :, None]
    larger = order[:, None, :] > order[:, :, None]
    tied = order[:, None, :] == order[:, :, None]
    place = tl.sum((larger | (tied & lower)).to(tl.int32), axis=2)

    if FUNCTION == MVUE:
        # With the r larger ones capped, the next is capped where c a >= 1, c = (n - r) / (sum of itself and the rest).
        rest = tl.sum(tl.where(place[:, None, :] >= place[:, :, None], a[:, None, :], 0.0), axis=2)
        capped = (a * (N - place) >= rest) & (a > 0)
        left = (N - tl.sum(capped.to(tl.int32), axis=1)).to(tl.float32)[:, None]
        free = tl.where(capped, 0.0, a)
        # Prefix sums on one fixed summation tree, hence monotone: the largest is the total.
        sums = tl.sum(tl.where(lower | same, free[:, None, :], 0.0), axis=2)
        total = tl.max(sums, axis=1)[:, None]
        unit = left / tl.where(total > 0, total, 1.0)
        reached = tl.minimum(sums * unit, left)
        before = tl.minimum(tl.sum(tl.where(lower, free[:, None, :], 0.0), axis=2) * unit, left)
        w0, _, _, _ = words(seed_ptr, counter3, group, group * 0)
        u = ((w0 >> 8).to(tl.float32) * (1.0 / 16777216.0))[:, None]
        sampled = tl.ceil(reached - u) > tl.ceil(before - u)
        out = tl.where(capped, x, tl.where(sampled, x / tl.where(sampled, reached - before, 1.0), 0.0))
    else:
        out = tl.where(place < N, x, 0.0)
        if FUNCTION == RESCALE:
            kept = tl.sum(tl.abs(out), axis=1)
            scale = tl.where(kept == 0, 1.0, tl.sum(a, axis=1) / tl.where(kept == 0, 1.0, kept + eps))
            out = out * scale[:, None]
    tl.store(out_ptr + row * out_row + column * out_column, out, mask=valid)


@triton.jit
def words(seed_ptr, counter3, group, block):
    """The four random words of each group's block; layout in `sdgp_accel.philox`."""
    key = tl.load(seed_ptr).to(tl.uint64)
    zero = (group * 0).to(tl.uint32)
    c2 = zero + tl.load(seed_ptr + 1).to(tl.uint32)
    c3 = (zero + counter3).to(tl.uint32)
    return tl.philox(key, group.to(tl.uint32), (block << 24).to(tl.uint32), c2, c3)
