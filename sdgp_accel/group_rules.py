"""The prune functions on groups laid out as planes.

A batch of t * s groups is one contiguous tensor [t, m, s]: plane ``[:, i]`` holds element ``i`` of each group, so that
everything below is a few long elementwise operations, whatever m is. (Why not [m, b]: torch gives each thread one
stretch of memory of each operation, and with t > 1 that is the same groups for whole tensors and for single planes,
so that they stay in one core's cache.) Magnitudes are compared as integers, by their bit patterns, which order
NaN > inf > finite > 0.

Two habits come from measurements on a CPU: buffers are reused (page faults cost more than arithmetic), and masks
are 0 and 1 in the dtype they are next multiplied with (`torch.where`, `masked_fill` and bool outputs are not
vectorised there: 3 ns per element instead of 0.1).

Nothing here looks at a value from the host on CUDA (no synchronisation, safe inside a CUDA graph).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor

from sdgp_accel.huge_pages import in_huge_pages

BITS = {torch.float16: torch.int16, torch.bfloat16: torch.int16, torch.float32: torch.int32, torch.float64: torch.int64}
_INF_BITS = {torch.float16: 0x7C00, torch.bfloat16: 0x7F80, torch.float32: 0x7F800000, torch.float64: 0x7FF0 << 48}
UNIT = 1 << 24  # probabilities and uniforms are integers in units of 2^-24
SMALLEST_SUM = 2.0**-100
SLAB_BYTES = 1 << 24
SPARE_WORDS = 6  # what philox4x32 computes in at any one time

# The first `count` random words of each group, one after the other: int64 tensors [t * s] of 32-bit values, to consume.
Words = Callable[[int], Iterator[Tensor]]


class Scratch:
    """Uninitialised buffers by name; on a CPU one name is one piece of memory, used again and again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._buffers: dict[tuple[str, torch.dtype], Tensor] = {}
        self._spare: dict[int, list[Tensor]] = {}
        self._slab = torch.empty(0, dtype=torch.uint8)

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        if self.device.type != "cpu":
            return torch.empty(shape, dtype=dtype, device=self.device)
        count = math.prod(shape)
        buffer = self._buffers.get((name, dtype))
        if buffer is None or buffer.numel() < count:
            buffer = self._buffers[name, dtype] = self._allocate(count, dtype)
        return buffer[:count].view(shape)

    def spare_words(self, count: int) -> list[Tensor] | None:
        """A pool of int64 buffers [count] for `philox4x32`; None on CUDA."""
        if self.device.type != "cpu":
            return None
        if count not in self._spare:
            self._spare[count] = [self._allocate(count, torch.int64) for _ in range(SPARE_WORDS)]
        return self._spare[count]

    def _allocate(self, count: int, dtype: torch.dtype) -> Tensor:
        used = count * dtype.itemsize
        size = -(-used // 4096) * 4096
        if size < SLAB_BYTES // 256:
            return torch.empty(count, dtype=dtype)
        if self._slab.numel() < size:
            self._slab = in_huge_pages(torch.empty(max(size, SLAB_BYTES), dtype=torch.uint8))
        buffer, self._slab = self._slab[:used], self._slab[size:]
        return buffer.view(dtype)


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed and scaled: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def magnitude(x: Tensor, n: int, scratch: Scratch) -> Tensor:
    """Keep the n largest |x| of each group, ties to the lower index. x: [t, m, s]."""
    return _masked(x, select_largest(_order_keys(x, scratch), n, BITS[x.dtype], scratch))


def magnitude_quads(x: Tensor, n: int, out: Tensor, scratch: Scratch) -> None:
    """`magnitude` for consecutive groups of 4 in a contiguous x [4 b], on a little-endian CPU, without the planes.

    The four scores of a group (see `select_largest`) are the four bytes of one int32, each 128 too high, so that its
    top bit says whether the element is kept: 128 + i + n - 4, plus the later elements it beats, minus the earlier
    elements that beat it.
    """
    keys = _order_keys(x, scratch)
    scores = scratch("scores", (x.numel() // 4,), torch.int32)
    scores.fill_(sum((128 + i + n - 4) << (8 * i) for i in range(4)) - (1 << 32))
    beats = scratch("beats", (x.numel(),), torch.uint8)
    for distance in (1, 2, 3):
        torch.ge(keys[:-distance], keys[distance:], out=beats[:-distance])
        # Element i of a quad beats element i + distance: + 1 in byte i, - 1 in byte i + distance. Bytes that compare
        # with the next quad are masked away.
        inside = beats.view(torch.int32).bitwise_and_(0x010101 >> (8 * (distance - 1)))
        scores.add_(inside, alpha=1 - (1 << (8 * distance)))
    kept = scores.bitwise_right_shift_(7).bitwise_and_(0x01010101).view(torch.uint8)
    mask = scratch("mask", (x.numel(),), BITS[x.dtype]).copy_(kept)
    torch.mul(x.view(mask.dtype), mask, out=out.view(mask.dtype))


def random(x: Tensor, n: int, words: Words, scratch: Scratch) -> Tensor:
    """Keep the n elements with the largest random keys, unscaled; non-finite groups by `magnitude`."""
    keys = scratch("random_keys", tuple(x.shape), torch.int32)
    for plane, word in zip(keys.unbind(1), words(x.shape[1]), strict=True):
        plane.copy_(
            word.sub_(1 << 31).view(plane.shape)
        )  # the signed order of the keys is the unsigned order of the words
    result = _masked(x, select_largest(keys, n, BITS[x.dtype], scratch))
    return _with_non_finite(result, x, n, _largest_magnitude(x, scratch))


def rescale_magnitude(x: Tensor, n: int, eps: float, scratch: Scratch) -> Tensor:
    """As `magnitude`, then times s = sum |x| / (sum |kept| + eps) over the group.

    Both sums run from 0 in index order in the accumulation dtype. Non-finite groups stay unscaled. (Where
    sum |kept| is 0 there is nothing to scale: zeros stay zeros.)
    """
    dtype = accumulate_dtype(x.dtype)
    full, plane = tuple(x.shape), (x.shape[0], x.shape[2])
    magnitudes = torch.abs(x, out=scratch("magnitudes", full, x.dtype))
    total = _ordered_sum(magnitudes, scratch("total", plane, dtype))
    kept = _masked(x, select_largest(_order_keys(x, scratch), n, BITS[x.dtype], scratch))
    torch.abs(kept, out=magnitudes)
    kept_total = _ordered_sum(magnitudes, scratch("kept_total", plane, dtype))
    scale = torch.div(total, kept_total.add_(eps), out=total).unsqueeze(1)
    result = scale_nonzero(kept, scale, scratch("scaled", full, x.dtype), scratch)
    return _with_non_finite(result, x, n, _largest_magnitude(x, scratch))


def scale_nonzero(x: Tensor, scale: Tensor, out: Tensor, scratch: Scratch) -> Tensor:
    """out = round(x * scale), the product in scale's dtype; zeros become +0 even where the scale is inf or NaN.

    Without that rule one overflowing sum would fill the pruned positions with NaN and break the N:M pattern.
    """
    shape = tuple(x.shape)
    nonzero = torch.ne(x, 0, out=scratch("nonzero", shape, BITS[x.dtype]))
    product = torch.mul(x, scale, out=scratch("product", shape, scale.dtype))
    rounded = product if product.dtype == x.dtype else scratch("rounded", shape, x.dtype).copy_(product)
    torch.mul(rounded.view(nonzero.dtype), nonzero, out=out.view(nonzero.dtype))
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
       outside C with p_i >= 1 joins C. (A round that adds none changes nothing: an implementation may stop there. If
       every round adds one, k = 0: all others are dropped.)
    4. q_i = floor(p_i * 2^24) outside C, 0 in it. R_i = min(q_0 + .. + q_i, k * 2^24), but R_i = k * 2^24 from the
       last non-zero element outside C on. The weight of i is w_i = R_i - R_{i-1} (R_{-1} = 0).
    5. u = word 0 of the group's random block 0, shifted right by 8. Outside C, i is kept where some integer j has
       R_{i-1} <= j * 2^24 + u < R_i: exactly k elements are.
    6. A kept element outside C becomes x_i / (w_i * 2^-24) (w_i rounded to the computing dtype), saturated at the
       largest finite value of x's dtype, rounded once to it. Elements of C are kept as they are.
    """
    dtype = accumulate_dtype(x.dtype)
    integer = BITS[dtype]
    t, m, s = full = tuple(x.shape)
    plane = (t, s)
    wide = x if x.dtype == dtype else scratch("wide", full, dtype).copy_(x)
    a = torch.abs(wide, out=scratch("magnitudes", full, dtype))
    largest = _plane_maximum(a, scratch("largest", plane, dtype))

    # Steps 1 and 2. A group that keeps all it has becomes one in which everything is capped and k = 0.
    nonzero = torch.ne(a, 0, out=scratch("nonzero", full, integer))
    count = _ordered_sum(nonzero, scratch("count", plane, integer))
    many = torch.gt(count, n, out=scratch("many", plane, integer))
    free = torch.mul(nonzero, many.unsqueeze(1), out=scratch("free", full, integer))
    scale = _power_of_two(largest, scratch)
    a.mul_(scale.mul_(many).view(dtype).unsqueeze(1))

    # Step 3. Capped elements get magnitude 0.
    p = scratch("p", full, dtype)
    below_one = scratch("below_one", full, integer)
    total = scratch("total", plane, dtype)
    c = scratch("c", plane, dtype)
    k = many.mul_(n)
    for round_index in range(n):
        torch.clamp_min(_ordered_sum(a, total), SMALLEST_SUM, out=total)
        torch.mul(a, c.copy_(k).div_(total).unsqueeze(1), out=p)
        torch.lt(p, 1, out=below_one)
        uncapped = _ordered_sum(below_one, count)
        if a.device.type == "cpu" and uncapped.amin() == m:
            break
        k.add_(uncapped).sub_(m)
        free.mul_(below_one)
        if round_index < n - 1:
            a.view(integer).mul_(below_one)

    # Step 4. running[:, i + 1] is R_i, w becomes the weights. If the last round capped something p is stale, but k = 0.
    after = below_one  # now: 1 where a later element is free
    after[:, -1].zero_()
    for i in reversed(range(m - 1)):
        torch.maximum(after[:, i + 1], free[:, i + 1], out=after[:, i])
    w = a.view(integer).copy_(p.mul_(UNIT))
    w.add_(n * UNIT).sub_(after, alpha=n * UNIT)  # from the last free element on, enough to reach the end
    end = k.mul_(UNIT)
    running = scratch("running", (t, m + 1, s), integer)
    running[:, 0].zero_()
    for weight, before, now in zip(w.unbind(1), running[:, :-1].unbind(1), running[:, 1:].unbind(1), strict=True):
        torch.minimum(torch.add(before, weight, out=now), end, out=now)
    torch.sub(running[:, 1:], running[:, :-1], out=w)

    # Step 5. How many points j * 2^24 + u lie below each R, less one: floor((R - u - 1) / 2^24).
    offset = scratch("offset", plane, integer)
    for word in words(1):
        offset.copy_(word.bitwise_right_shift_(8).view(plane)).bitwise_not_()
    points = running.add_(offset.unsqueeze(1)).bitwise_right_shift_(24)
    keep = torch.ne(points[:, 1:], points[:, :-1], out=after)

    # Step 6. Capped elements have w = 0 so far: nothing else kept has.
    capped = nonzero.sub_(free)
    keep.add_(capped)
    probability = p.copy_(w.add_(capped, alpha=UNIT)).mul_(1 / UNIT)
    scaled = torch.div(wide, probability, out=p)
    largest_finite = torch.finfo(x.dtype).max
    if not _all_below(largest, largest_finite / (1 << 20)):  # a kept |x| grows less than that, remainder included
        scaled.clamp_(-largest_finite, largest_finite)
    if x.dtype != dtype:
        keep = scratch("mask", full, BITS[x.dtype]).copy_(keep)
        scaled = scratch("rounded", full, x.dtype).copy_(scaled)
    return _with_non_finite(_masked(scaled, keep), x, n, largest)


def select_largest(keys: Tensor, n: int, dtype: torch.dtype, scratch: Scratch) -> Tensor:
    """1 (in `dtype`) where an element is among the n largest of its group, ties to the lower index, else 0.

    keys: integers [t, m, s]. An element is kept if fewer than n others beat it; the lower index beats an equal key.
    All pairs are compared, one distance at a time: for m <= 32 that is cheaper than any sort made of torch operations.
    """
    m = keys.shape[1]
    # (later elements it beats) - (earlier elements that beat it), shifted so that kept elements end at 0 or above.
    score = scratch("score", tuple(keys.shape), torch.int8)
    for i in range(m):
        score[:, i].fill_(i + n - m)
    for distance in range(1, m):
        earlier, later = keys[:, :-distance], keys[:, distance:]
        beats = torch.ge(earlier, later, out=scratch("beats", tuple(earlier.shape), torch.int8))
        score[:, :-distance].add_(beats)
        score[:, distance:].sub_(beats)
    return torch.ge(score, 0, out=scratch("selected", tuple(keys.shape), dtype))


def _order_keys(x: Tensor, scratch: Scratch) -> Tensor:
    """Integers that order |x|; all NaNs are equal and largest."""
    bits = BITS[x.dtype]
    keys = scratch("order_keys", tuple(x.shape), bits)
    torch.bitwise_and(x.view(bits), torch.iinfo(bits).max, out=keys)
    return torch.clamp_max(keys, _INF_BITS[x.dtype] + 1, out=keys)


def _with_non_finite(pruned: Tensor, x: Tensor, n: int, largest: Tensor) -> Tensor:
    """`pruned`, but `magnitude` for groups whose `largest` magnitude is NaN or inf."""
    if _all_below(largest, math.inf):
        return pruned
    return torch.where(
        (largest < math.inf).unsqueeze(1), pruned, magnitude(x, n, Scratch(x.device))
    )  # `pruned` lives in the other scratch


def _all_below(values: Tensor, limit: float) -> bool:
    """Whether all `values` are below `limit`. Never looks on CUDA: there the answer is no."""
    return values.device.type == "cpu" and bool(values.amax() < limit)


def _power_of_two(largest: Tensor, scratch: Scratch) -> Tensor:
    """The bits of the power of two that brings `largest` near 1 (step 2 of `mvue`)."""
    bits = BITS[largest.dtype]
    mantissa, fields = (23, 254) if bits == torch.int32 else (52, 2046)
    exponent = scratch("exponent", tuple(largest.shape), bits)
    torch.bitwise_right_shift(largest.view(bits), mantissa, out=exponent)
    return exponent.neg_().add_(fields).clamp_(1, fields).bitwise_left_shift_(mantissa)


def _largest_magnitude(x: Tensor, scratch: Scratch) -> Tensor:
    magnitudes = torch.abs(x, out=scratch("magnitudes", tuple(x.shape), x.dtype))
    return _plane_maximum(magnitudes, scratch("largest", (x.shape[0], x.shape[2]), x.dtype))


def _plane_maximum(planes: Tensor, out: Tensor) -> Tensor:
    out.copy_(planes[:, 0])
    for plane in planes.unbind(1)[1:]:
        torch.maximum(out, plane, out=out)
    return out


def _ordered_sum(planes: Tensor, out: Tensor) -> Tensor:
    """((plane 0 + plane 1) + plane 2) + .. in out's dtype: the order is part of the rules."""
    out.copy_(planes[:, 0])
    for plane in planes.unbind(1)[1:]:
        torch.add(out, plane, out=out)
    return out


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where mask is 1, +0 where it is 0, in mask's memory; on the bits, because inf * 0 is NaN."""
    return torch.mul(x.view(mask.dtype), mask, out=mask).view(x.dtype)
