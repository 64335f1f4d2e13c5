"""The prune functions in a few large tensor operations: for many small training runs on a GPU.

`sdgp_accel.pruning` fixes every bit and its random numbers, at the price of hundreds of small operations per
gradient; on a GPU their launches, not the arithmetic, would set how many runs fit into an hour. Here are the same
rules by pairwise comparisons and prefix sums, with torch's own random numbers. Given the same random numbers both
agree up to rounding (tests compare them).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sdgp_accel.config import PruneSpec
from sdgp_accel.philox import Rng


def prune_matrix(
    dy2d: Tensor,
    spec: PruneSpec,
    axis: int,
    positions_per_sample: int,
    rng: Rng | None,
    uniform: Tensor | None = None,
) -> Tensor:
    """As `sdgp_accel.pruning.prune_matrix` on dY [T, C], for finite values.

    `uniform` replaces the random numbers: for ``mvue`` each group's u, [T, ceil(C / m), 1] or [ceil(T / m), 1, C]; for
    ``random`` each element's key, [T, C]. `rng` is ignored but for being in the signature.
    """
    dim = axis + 1
    x = groups(dy2d, axis, spec.m)
    a = x.abs()
    if spec.function == "mvue":
        return matrix(mvue(x, a, spec.n, dim, uniform), dy2d, axis)
    order = a
    if spec.function == "random":
        order = groups(torch.rand_like(dy2d) if uniform is None else uniform, axis, spec.m, padding=-1)
    kept = torch.where(rank(order, dim) < spec.n, x, 0)
    if spec.function == "rescale_magnitude" and spec.scope == "group":
        kept = kept * ratio(a.sum(dim, keepdim=True), kept.abs().sum(dim, keepdim=True), spec.eps)
    result = matrix(kept, dy2d, axis)
    if spec.function == "rescale_magnitude" and spec.scope != "group":
        positions = positions_per_sample if spec.scope == "sample_channel" else len(dy2d)
        over = 1 if spec.scope == "sample_channel" else (1, 2)
        x, kept = (t.unflatten(0, (-1, positions)) for t in (dy2d, result))
        total, kept_total = (t.abs().sum(over, keepdim=True) for t in (x, kept))
        result = (kept * ratio(total, kept_total, spec.eps)).flatten(0, 1)
    return result


def groups(dy2d: Tensor, axis: int, m: int, padding: float = 0) -> Tensor:
    """[T, ceil(C / m), m] for axis 1, [ceil(T / m), m, C] for axis 0; a last partial group is padded."""
    missing = -dy2d.shape[axis] % m
    return F.pad(dy2d, (0, missing) if axis == 1 else (0, 0, 0, missing), value=padding).unflatten(axis, (-1, m))


def matrix(grouped: Tensor, dy2d: Tensor, axis: int) -> Tensor:
    """The inverse of `groups`."""
    return grouped.flatten(axis, axis + 1).narrow(axis, 0, dy2d.shape[axis])


def ratio(total: Tensor, kept_total: Tensor, eps: float) -> Tensor:
    """The factor of ``rescale_magnitude``."""
    return torch.where(kept_total == 0, 1, total / (kept_total + eps))


def mvue(x: Tensor, a: Tensor, n: int, dim: int, uniform: Tensor | None) -> Tensor:
    """The minimum-variance unbiased estimate: probabilities min(1, c a), systematic sampling with one u per group."""
    place = rank(a, dim)
    after = pairs(place, dim, torch.ge)  # [i, j]: j is not larger than i
    not_larger = (a.unsqueeze(dim) * after).sum(dim + 1)
    # With the r larger ones capped, the next is capped where c a >= 1, c = (n - r) / (sum of the others and itself).
    capped = (a * (n - place) >= not_larger) & (a > 0)
    left = n - capped.sum(dim, keepdim=True)
    free = a.masked_fill(capped, 0)
    sums = free.cumsum(dim)
    total = sums.narrow(dim, -1, 1)
    reached = sums / total.clamp_min(torch.finfo(total.dtype).tiny) * left
    before = torch.cat([torch.zeros_like(total), reached.narrow(dim, 0, reached.shape[dim] - 1)], dim)
    u = torch.rand_like(total) if uniform is None else uniform
    sampled = (reached - u).ceil() > (before - u).ceil()
    return torch.where(capped, x, torch.where(sampled, x / (reached - before), 0))


def rank(a: Tensor, dim: int) -> Tensor:
    """How many elements of the group come before each in descending order, ties to the lower index."""
    index = torch.arange(a.shape[dim], device=a.device)
    lower = (index[None, :] < index[:, None]).view(len(index), len(index), *[1] * (a.ndim - dim - 1))
    return (pairs(a, dim, torch.gt) | pairs(a, dim, torch.eq) & lower).sum(dim + 1)


def pairs(a: Tensor, dim: int, relation: torch._ops.OpOverloadPacket) -> Tensor:
    """[.., i, j, ..] with relation(a_j, a_i) for all i and j of the group."""
    return relation(a.unsqueeze(dim), a.unsqueeze(dim + 1))
