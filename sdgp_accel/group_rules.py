"""The prune functions on groups laid out as planes.

A batch of groups is one contiguous tensor [m, b]: plane ``i`` holds element ``i`` of each of the ``b`` groups,
so that everything below is an elementwise operation between planes, and vectorises whatever m is. Comparisons
work on the values' bit patterns: as integers, the magnitudes order NaN > inf > finite > 0.

Nothing here looks at a value from the host on CUDA (no synchronisation, safe inside a CUDA graph).
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
_INF_BITS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.float64: 0x7FF0 << 48}
# Random words: int64 tensors [b] with values < 2^32; the argument says how many per group.
Words = Callable[[int], "list[Tensor]"]
UNIT = 1 << 24  # probabilities and uniforms are integers in units of 2^-24
SMALLEST_SUM = 2.0**-100


class Scratch:
    """Reused buffers, by name: on a CPU, fresh memory costs more (page faults) than most of the arithmetic."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[str, Tensor] = {}

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """An uninitialised contiguous tensor; on the CPU it shares memory with earlier ones of this name."""
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self.device)
        count = 1
        for size in shape:
            count *= size
        buffer = self._buffers.get(name)
        if buffer is None or buffer.numel() < count or buffer.dtype != dtype:
            buffer = self._buffers[name] = torch.empty(count, dtype=dtype)
        return buffer[:count].view(shape)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed and scaled: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def magnitude(x: Tensor, n: int, scratch: Scratch) -> Tensor:
    """Keep the n largest |x| of each group, ties to the lower index. x: [m, b]; may share memory with the result."""
    return _masked(x, select_largest(_order_keys(x, scratch), n, scratch), scratch)


def random(x: Tensor, n: int, words: Words, scratch: Scratch) -> Tensor:
    """Keep the n elements with the largest random keys, unscaled; non-finite groups by magnitude."""
    m, b = x.shape
    keys = scratch("random_keys", (m, b), torch.int32)
    for plane, word in zip(keys.unbind(), words(m), strict=True):
        plane.copy_(word - (1 << 31))  # the signed order of the result is the unsigned order of the words
    keep = select_largest(keys, n, scratch)
    order = _order_keys(x, scratch)
    bad = _non_finite(order, x.dtype, scratch)
    if _maybe_any(bad):
        keep = torch.where(bad, select_largest(order, n, scratch, name="keep_bad"), keep)
    return _masked(x, keep, scratch)


def rescale_magnitude(x: Tensor, n: int, eps: float, scratch: Scratch) -> Tensor:
    """As `magnitude`, then times s = sum |x| / (sum |kept| + eps) over the group; s = 1 where sum |kept| = 0.

    Both sums run from 0 in index order in the accumulation dtype. Non-finite groups stay unscaled.
    """
    dtype = accumulate_dtype(x.dtype)
    m, b = x.shape
    order = _order_keys(x, scratch)
    bad = _non_finite(order, x.dtype, scratch)
    wide = scratch("wide", (m, b), dtype)
    total = _ordered_sum(torch.abs(wide.copy_(x), out=wide), scratch("total", (b,), dtype))
    kept = _masked(x, select_largest(order, n, scratch), scratch)
    kept_total = _ordered_sum(torch.abs(wide.copy_(kept), out=wide), scratch("kept_total", (b,), dtype))
    scale = rescale_factor(total, kept_total, eps)
    scale = torch.where(bad, torch.ones((), dtype=dtype, device=x.device), scale)
    return scale_nonzero(kept, scale, kept, scratch)


def rescale_factor(total: Tensor, kept_total: Tensor, eps: float) -> Tensor:
    """total / (kept_total + eps), 1 where kept_total is 0."""
    one = torch.ones((), dtype=total.dtype, device=total.device)
    return torch.where(kept_total == 0, one, total / (kept_total + eps))


def scale_nonzero(x: Tensor, scale: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
    """out = round(x * scale), the product in scale's dtype; zeros stay +0 even where the scale is inf or NaN.

    Without that rule one overflowing sum would fill the pruned positions with NaN and break the N:M pattern.
    """
    shape = tuple(x.shape)
    nonzero = torch.ne(x, 0, out=scratch("nonzero", shape, torch.uint8))
    mask = scratch("nonzero_mask", shape, BITS[x.dtype]).copy_(nonzero)
    product = torch.mul(x, scale, out=scratch("product", shape, scale.dtype))
    rounded = product if product.dtype == x.dtype else scratch("rounded", shape, x.dtype).copy_(product)
    torch.mul(rounded.view(mask.dtype), mask, out=out.view(mask.dtype))
    return out


def mvue(x: Tensor, n: int, words: Words, scratch: Scratch) -> Tensor:
    """Minimum-variance unbiased estimate with at most n kept values per group.

    The arithmetic, fixed to the bit, in float32 (float64 for float64 values), IEEE round-to-nearest, no fused
    multiply-add. For the values x_0 .. x_{m-1} of one group:

    1. At most n non-zeros: all are kept as they are. A NaN or inf among them: as `magnitude`.
    2. a_i = |x_i| times the power of two with the exponent field clamp(254 - E, 1, 254), E the exponent field of the
       largest |x_i| (float64: clamp(2046 - E, 1, 2046)): no sum or quotient below can overflow.
    3. C = {}, the capped elements. n times: k = n - |C|; S = the sum, from 0 and in index order, of a_i outside C, but
       2^-100 at least (c must stay finite where all of them are tiny beside C); c = k / S; p_i = c * a_i; every i
       outside C with p_i >= 1 joins C. (A round that adds none changes nothing, so an implementation may stop there,
       and at k = 0, where all others are dropped.) c and p then once more for the final C.
    4. q_i = floor(p_i * 2^24) outside C, 0 in it. R_i = min(q_0 + .. + q_i, k * 2^24), but R_i = k * 2^24 from the
       last non-zero element outside C on. The weight of i is w_i = R_i - R_{i-1} (R_{-1} = 0).
    5. u = word 0 of the group's random block 0, shifted right by 8. Outside C, i is kept where some integer j has
       R_{i-1} <= j * 2^24 + u < R_i: exactly k elements are.
    6. A kept element outside C becomes x_i / (w_i * 2^-24) (w_i rounded to the computing dtype), saturated at the
       largest finite value of x's dtype, rounded once to it. Elements of C are kept as they are.
    """
    m, b = x.shape
    dtype = accumulate_dtype(x.dtype)
    device = x.device
    full, plane = (m, b), (b,)
    order = _order_keys(x, scratch)
    bad = _non_finite(order, x.dtype, scratch)

    magnitudes = scratch("magnitudes", full, dtype)
    torch.abs(magnitudes.copy_(x), out=magnitudes)
    nonzero = torch.ne(magnitudes, 0, out=scratch("nonzero", full, torch.uint8))
    few = _ordered_sum(nonzero, scratch("few", plane, torch.uint8)) <= n
    torch.mul(magnitudes, _normaliser(magnitudes, scratch), out=magnitudes)

    # Step 3. `free` marks what is outside C; magnitudes inside C are set to 0.
    free = nonzero.clone()
    remaining = torch.full(plane, float(n), dtype=dtype, device=device)
    total = scratch("total", plane, dtype)
    p = scratch("p", full, dtype)
    below_one = scratch("below_one", full, torch.uint8)
    for round_index in range(n + 1):
        torch.clamp_min(_ordered_sum(magnitudes, total), SMALLEST_SUM, out=total)
        torch.mul(magnitudes, torch.div(remaining, total, out=total), out=p)
        if round_index == n:
            break
        torch.ge(p, 1, out=below_one)  # for now: what this round caps
        capped_now = _ordered_sum(below_one, scratch("count", plane, torch.uint8))
        if not _maybe_any(capped_now):
            break
        remaining.sub_(capped_now)
        torch.eq(below_one, 0, out=below_one)
        torch.mul(magnitudes, below_one, out=magnitudes)
        torch.mul(free, below_one, out=free)

    # Step 4, on integers: units of 2^-24.
    torch.mul(p, UNIT, out=p)
    q = scratch("q", full, torch.int32).copy_(p)
    limit = scratch("limit", plane, torch.int32).copy_(remaining).mul_(UNIT)
    seen = torch.zeros(plane, dtype=torch.uint8, device=device)
    for i in reversed(range(m)):
        last = torch.gt(free[i], seen)
        q[i].masked_fill_(last, n * UNIT)  # anything >= the limit
        torch.maximum(seen, free[i], out=seen)

    # Steps 4 and 5: passed(R) = how many of the points u + j * 2^24 (j = 0, 1, ..) lie below R.
    uniform = words(1)[0] >> 8
    shift = scratch("shift", plane, torch.int32).copy_(UNIT - 1 - uniform)
    running = torch.zeros(plane, dtype=torch.int32, device=device)
    passed = (running + shift) >> 24
    keep = scratch("keep", full, torch.uint8)
    for i in range(m):
        previous_running, previous_passed = running, passed
        running = torch.minimum(running + q[i], limit)
        passed = (running + shift) >> 24
        torch.ne(passed, previous_passed, out=keep[i])
        q[i] = running - previous_running

    # Step 6. Weight 1 for what is kept as it is: capped, or in a group with at most n non-zeros.
    as_is = torch.maximum(torch.gt(nonzero, free), torch.mul(nonzero, few), out=scratch("as_is", full, torch.uint8))
    weight = p.copy_(q)
    torch.mul(weight, 1 / UNIT, out=weight)
    weight.masked_fill_(as_is.bool(), 1.0)
    result = scratch("result", full, dtype).copy_(x)
    torch.div(result, weight, out=result)
    largest = torch.finfo(x.dtype).max
    torch.clamp(result, -largest, largest, out=result)
    rounded = result if result.dtype == x.dtype else scratch("rounded", full, x.dtype).copy_(result)
    pruned = _masked(rounded, torch.maximum(keep * ~few, as_is), scratch)
    if _maybe_any(bad):
        by_magnitude = select_largest(order, n, scratch, name="keep_bad")
        pruned = torch.where(bad, torch.where(by_magnitude.bool(), x, x.new_zeros(())), pruned)
    return pruned


def select_largest(keys: Tensor, n: int, scratch: Scratch, name: str = "keep") -> Tensor:
    """1 where an element is among the n largest of its group, ties to the lower index. keys: [m, b] int -> uint8."""
    m, b = keys.shape
    keep = scratch(name, (m, b), torch.uint8)
    if n >= m:
        return keep.fill_(1)
    threshold = _nth_largest(keys, n, scratch)
    torch.gt(keys, threshold, out=keep)
    equal = torch.eq(keys, threshold, out=scratch("equal", (m, b), torch.uint8))
    vacant = n - _ordered_sum(keep, scratch("count", (b,), torch.uint8))
    for i in range(m):
        taken = torch.minimum(equal[i], vacant)
        keep[i].add_(taken)
        vacant.sub_(taken)
    return keep


def _nth_largest(keys: Tensor, n: int, scratch: Scratch) -> Tensor:
    m, b = keys.shape
    values = list(keys.unbind())
    free = list(scratch("network", (m + 2, b), keys.dtype).unbind())
    borrowed = [False] * m
    for high, low, needs_high, needs_low in selection_network(m, n - 1):
        old = [values[i] for i in (high, low) if borrowed[i]]
        first, second = values[high], values[low]
        if needs_high:
            values[high] = torch.maximum(first, second, out=free.pop())
        if needs_low:
            values[low] = torch.minimum(first, second, out=free.pop())
        borrowed[high], borrowed[low] = needs_high, needs_low
        free.extend(old)
    return values[n - 1]


@functools.cache
def selection_network(m: int, rank: int) -> tuple[tuple[int, int, bool, bool], ...]:
    """Comparators (high, low, needs_high, needs_low) after which position `rank` of m holds that rank, largest first.

    Batcher's odd-even merge sort (Knuth, TAOCP 3, 5.2.2, algorithm M), less every comparator and every half of a
    comparator that position `rank` does not depend on.
    """
    comparators = []
    size = 1 << max(m - 1, 1).bit_length()
    p = size // 2
    while p > 0:
        q, r, d = size // 2, 0, p
        while True:
            comparators += [(i, i + d) for i in range(m - d) if i & p == r]
            if q == p:
                break
            d, q, r = q - p, q // 2, p
        p //= 2
    needed = {rank}
    useful = []
    for high, low in reversed(comparators):
        if high in needed or low in needed:
            useful.append((high, low, high in needed, low in needed))
            needed |= {high, low}
    return tuple(reversed(useful))


def _order_keys(x: Tensor, scratch: Scratch) -> Tensor:
    """Integers that order |x|; all NaNs are equal and largest."""
    bits = BITS[x.dtype]
    keys = scratch("order_keys", tuple(x.shape), bits)
    torch.bitwise_and(x.view(bits), torch.iinfo(bits).max, out=keys)
    return torch.clamp_max(keys, _INF_BITS[x.dtype] + 1, out=keys)


def _non_finite(order_keys: Tensor, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """Which groups hold a NaN or an inf: bool [b]."""
    largest = scratch("largest", tuple(order_keys.shape[1:]), order_keys.dtype).copy_(order_keys[0])
    for plane in order_keys.unbind()[1:]:
        torch.maximum(largest, plane, out=largest)
    return largest >= _INF_BITS[dtype]


def _normaliser(magnitudes: Tensor, scratch: Scratch) -> Tensor:
    """The power of two that brings the largest magnitude of each group near 1 (step 2 of `mvue`)."""
    bits = BITS[magnitudes.dtype]
    mantissa, fields = (23, 254) if bits == torch.int32 else (52, 2046)
    largest = scratch("largest_magnitude", tuple(magnitudes.shape[1:]), magnitudes.dtype).copy_(magnitudes[0])
    for plane in magnitudes.unbind()[1:]:
        torch.maximum(largest, plane, out=largest)
    exponent = largest.view(bits)
    exponent >>= mantissa
    torch.clamp(exponent.neg_().add_(fields), 1, fields, out=exponent)
    exponent <<= mantissa
    return largest


def _ordered_sum(planes: Tensor, out: Tensor) -> Tensor:
    """((plane 0 + plane 1) + plane 2) + ..: the order is part of the rules."""
    out.copy_(planes[0])
    for plane in planes.unbind()[1:]:
        torch.add(out, plane, out=out)
    return out


def _masked(x: Tensor, keep: Tensor, scratch: Scratch) -> Tensor:
    """x where keep is 1, +0 where it is 0; on the bits, because inf * 0 is NaN."""
    bits = BITS[x.dtype]
    mask = scratch("mask", tuple(x.shape), bits).copy_(keep)
    return torch.mul(x.view(bits), mask, out=mask).view(x.dtype)


def _maybe_any(flags: Tensor) -> bool:
    """False only if no flag is set. On CUDA always True: looking would synchronise."""
    return flags.device.type != "cpu" or bool(flags.any())
