"""The prune functions in a few large tensor operations: for many small training runs on a GPU.

`sdgp_accel.pruning` fixes every bit and its random numbers, at the price of hundreds of small operations per
gradient; on a GPU their launches, not the arithmetic, would set how many runs fit into an hour. Here are the same
rules by pairwise comparisons and prefix sums, with torch's own random numbers. Given the same random numbers both
agree up to rounding (tests compare them). Groups must be whole and values finite.
"""

from __future__ import annotations

import torch
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
    """As `sdgp_accel.pruning.prune_matrix` on dY [T, C], T and C multiples of m along `axis`.

    `uniform` replaces the random numbers: the groups' u for ``mvue``, the elements' keys for ``random``; group layout,
    [T, C / m, m] or [T / m, m, C], with m or 1 along the group. `rng` is ignored but for being in the signature.
    """
    x = dy2d.unflatten(axis, (-1, spec.m))
    dim = axis + 1
    a = x.abs()
    if spec.function == "mvue":
        return mvue(x, a, spec.n, dim, uniform).flatten(axis, dim)
    order = a
    if spec.function == "random":
        order = torch.rand_like(a) if uniform is None else uniform.expand_as(a)
    kept = torch.where(rank(order, dim) < spec.n, x, 0)
    if spec.function == "rescale_magnitude":
        kept = kept * rescaling(a, kept.abs(), spec, axis, dim, positions_per_sample)
    return kept.flatten(axis, dim)


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


def rescaling(a: Tensor, kept: Tensor, spec: PruneSpec, axis: int, dim: int, positions_per_sample: int) -> Tensor:
    """sum |x| / sum |kept| over the spec's scope, broadcastable to the groups' layout."""
    if spec.scope == "group":
        total, kept_total = (t.sum(dim, keepdim=True) for t in (a, kept))
    elif spec.scope == "sample_channel":
        matrices = (t.flatten(axis, dim).unflatten(0, (-1, positions_per_sample)) for t in (a, kept))
        spread = (t.sum(1, keepdim=True).expand(-1, positions_per_sample, -1).flatten(0, 1) for t in matrices)
        total, kept_total = (t.unflatten(axis, (-1, spec.m)) for t in spread)
    else:
        total, kept_total = a.sum(), kept.sum()
    return torch.where(kept_total == 0, 1, total / (kept_total + spec.eps))


def rank(a: Tensor, dim: int) -> Tensor:
    """How many elements of the group come before each in descending order, ties to the lower index."""
    index = torch.arange(a.shape[dim], device=a.device)
    lower = (index[None, :] < index[:, None]).view(len(index), len(index), *[1] * (a.ndim - dim - 1))
    return (pairs(a, dim, torch.gt) | pairs(a, dim, torch.eq) & lower).sum(dim + 1)


def pairs(a: Tensor, dim: int, relation: torch._ops.OpOverloadPacket) -> Tensor:
    """[.., i, j, ..] with relation(a_j, a_i) for all i and j of the group."""
    return relation(a.unsqueeze(dim), a.unsqueeze(dim + 1))
