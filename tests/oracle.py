"""The rules of pruning, one group and one element at a time: slow, obvious, and the yardstick of the fast code.

Values are numpy scalars of the computing dtype (float32, or float64 for float64 tensors), so that each operation
below is one IEEE operation; random numbers come from a Philox written with Python integers.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence

import numpy as np
import torch

TWO24 = 1 << 24
MASK32 = 0xFFFFFFFF


def philox(counter: Sequence[int], key: Sequence[int]) -> list[int]:
    """Philox4x32-10, after Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011)."""
    c, k = list(counter), list(key)
    for _ in range(10):
        product0, product1 = 0xD2511F53 * c[0], 0xCD9E8D57 * c[2]
        c = [(product1 >> 32) ^ c[1] ^ k[0], product1 & MASK32, (product0 >> 32) ^ c[3] ^ k[1], product0 & MASK32]
        k = [(k[0] + 0x9E3779B9) & MASK32, (k[1] + 0xBB67AE85) & MASK32]
    return c


def group_word(seed: Sequence[int], rank: int, pass_index: int, group: int, word: int) -> int:
    block, lane = divmod(word, 4)
    key = (seed[0] & MASK32, (seed[0] >> 32) & MASK32)
    counter = (
        group & MASK32,
        ((group >> 32) & 0xFFFFFF) | (block << 24),
        seed[1] & MASK32,
        (2 * rank + pass_index) & MASK32,
    )
    return philox(counter, key)[lane]


def order(value: np.floating) -> float:
    """Sort key of a magnitude: NaN above inf above everything finite."""
    return math.inf if np.isnan(value) else 1e308 if np.isinf(value) else float(abs(value)) / 16


def largest(keys: Sequence[float], n: int) -> set[int]:
    """The indices of the n largest keys; ties to the lower index."""
    return set(sorted(range(len(keys)), key=lambda i: (-keys[i], i))[:n])


def ordered_sum(values: Sequence[np.floating], zero: np.floating) -> np.floating:
    total = zero
    for value in values:
        total = total + value
    return total


def prune_group(
    x: Sequence[np.floating],
    function: str,
    n: int,
    word: Callable[[int], int],
    eps: float = 0.0,
    largest_finite: float = math.inf,
) -> list[np.floating]:
    """One group under `function` (rescale_magnitude: scope "group"), before rounding to the tensor's dtype."""
    dtype = type(x[0])
    zero = dtype(0)
    by_magnitude = largest([order(v) for v in x], n)
    magnitude = [v if i in by_magnitude else zero for i, v in enumerate(x)]
    if function == "magnitude" or not all(np.isfinite(v) for v in x):
        return magnitude
    if function == "random":
        kept = largest([word(i) for i in range(len(x))], n)
        return [v if i in kept else zero for i, v in enumerate(x)]
    if function == "rescale_magnitude":
        total = ordered_sum([abs(v) for v in x], zero)
        kept_total = ordered_sum([abs(v) for v in magnitude], zero)
        scale = dtype(1) if kept_total == 0 else total / (kept_total + dtype(eps))
        return [zero if v == 0 else v * scale for v in magnitude]
    return mvue_group(x, n, word(0) >> 8, largest_finite)


def mvue_group(x: Sequence[np.floating], n: int, u: int, largest_finite: float) -> list[np.floating]:
    dtype = type(x[0])
    zero = dtype(0)
    nonzero = [i for i, v in enumerate(x) if v != 0]
    if len(nonzero) <= n:
        return list(x)
    # 2. The exponent field of the largest magnitude decides the power of two.
    fields, bias, smallest = (254, 127, -126) if dtype is np.float32 else (2046, 1023, -1022)
    exponent = math.frexp(float(max(abs(v) for v in x)))[1] - 1
    field = exponent + bias if exponent >= smallest else 0
    a = [abs(v) * dtype(2.0 ** (min(max(fields - field, 1), fields) - bias)) for v in x]
    # 3. Cap what would be kept with certainty.
    capped: set[int] = set()
    while True:
        k = n - len(capped)
        total = ordered_sum([zero if i in capped else v for i, v in enumerate(a)], zero)
        c = dtype(k) / max(total, dtype(2.0**-100))
        p = [c * v for v in a]
        reached = {i for i in nonzero if i not in capped and p[i] >= 1}
        if k == 0 or not reached:
            break
        capped |= reached
    # 4. to 6. Systematic sampling of the others, in integers.
    free = [i for i in nonzero if i not in capped]
    result = [v if i in capped else zero for i, v in enumerate(x)]
    running = 0
    for i in free:
        previous = running
        running = min(running + math.floor(float(p[i]) * TWO24), k * TWO24)
        if i == free[-1]:
            running = k * TWO24
        if any(previous <= j * TWO24 + u < running for j in range(k + 1)):
            value = x[i] / (dtype(running - previous) * dtype(2.0**-24))
            result[i] = min(max(value, dtype(-largest_finite)), dtype(largest_finite))
    return result


def prune(
    x: torch.Tensor,
    function: str,
    n: int,
    m: int,
    dim: int,
    *,
    scope_dims: Sequence[int] | None = None,
    eps: float = 0.0,
    seed: Sequence[int] = (0, 0),
    rank: int = 0,
    pass_index: int = 0,
) -> torch.Tensor:
    """Prune x along dim; `scope_dims`: the dimensions a rescaling sum runs over (None: within the group)."""
    computing = np.float64 if x.dtype == torch.float64 else np.float32
    values = x.detach().to(torch.float64 if computing is np.float64 else torch.float32).numpy()
    result = np.zeros(values.shape, computing)
    dim %= x.ndim
    size = x.shape[dim]
    grid = [range(-(-size // m) if d == dim else s) for d, s in enumerate(x.shape)]
    rule = "magnitude" if scope_dims is not None else function
    with np.errstate(all="ignore"):
        for group, cell in enumerate(itertools.product(*grid)):
            where = tuple(
                slice(i * m, min((i + 1) * m, size)) if d == dim else slice(i, i + 1) for d, i in enumerate(cell)
            )
            members = list(values[where].reshape(-1))

            def word(i: int, group: int = group) -> int:
                return group_word(seed, rank, pass_index, group, i)

            group_result = prune_group(members, rule, n, word, eps, torch.finfo(x.dtype).max)
            result[where] = np.array(group_result, computing).reshape(result[where].shape)
    pruned = torch.from_numpy(result).to(x.dtype)
    return pruned if scope_dims is None else rescale(x, pruned, scope_dims, eps)


def rescale(x: torch.Tensor, kept: torch.Tensor, dims: Sequence[int], eps: float) -> torch.Tensor:
    """kept * sum |x| / (sum |kept| + eps), sums over `dims` in float64, rounded once; zeros stay zeros."""
    computing = np.float64 if x.dtype == torch.float64 else np.float32
    values = kept.double().numpy()
    with np.errstate(all="ignore"):
        sums = [np.abs(v.double().numpy()).sum(tuple(dims), keepdims=True).astype(computing) for v in (x, kept)]
        scale = np.where(sums[1] == 0, computing(1), sums[0] / (sums[1] + computing(eps)))
        scaled = np.where(values == 0, computing(0), values.astype(computing) * scale)
    return torch.from_numpy(scaled).to(x.dtype)
