"""The prune functions on groups laid out as planes.

A batch of b groups is one contiguous tensor [m, b]: plane ``i`` holds element ``i`` of each group, so that everything
below is a few long elementwise operations, whatever m is. Magnitudes are compared as integers, by their bit patterns,
which order NaN > inf > finite > 0.

Two habits come from measurements on a CPU: buffers are reused (page faults cost more than arithmetic), and masks
are 0 and 1 in the dtype they are next multiplied with, which is also the dtype of what is compared (`torch.where`,
`masked_fill` and bool outputs are not vectorised there: 3 ns per element instead of 0.1; an output of another dtype
than the operands' costs twice as much).

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
# Memory reserved at a time; what is not written to stays virtual. More than the 32 MiB up to which glibc's malloc may
# take it from its heap, where it would stay after its release.
SLAB_BYTES = 1 << 26

# The first `count` random words of each group, one after the other: int64 tensors [b] of 32-bit values, to consume.
Words = Callable[[int], Iterator[Tensor]]


class Planes:
    """A batch of groups: one tensor [m, b], and its m planes as tensors [b].

    Views are made once and kept: each takes a microsecond or two.
    """

    def __init__(self, planes: Tensor) -> None:
        self.all = planes
        self.each = planes.unbind() if planes.ndim > 1 else ()
        self._views: dict[torch.dtype, Planes] = {}

    def viewed(self, dtype: torch.dtype) -> Planes:
        """The same memory as another dtype of the same size."""
        if dtype not in self._views:
            self._views[dtype] = Planes(self.all.view(dtype))
        return self._views[dtype]


class Scratch:
    """Uninitialised buffers by name; on a CPU one name is one piece of memory, used again and again."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._memory: dict[str, Tensor] = {}
        self._buffers: dict[tuple[str, tuple[int, ...], torch.dtype], Planes] = {}
        self._constants: dict[object, Tensor] = {}
        self._slab = self._bytes(0)

    def planes(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Planes:
        if self.device.type != "cpu":
            return Planes(torch.empty(shape, dtype=dtype, device=self.device))
        key = (name, shape, dtype)
        if key not in self._buffers:
            size = math.prod(shape) * dtype.itemsize
            memory = self._memory.get(name)
            if memory is None or memory.numel() < size:
                memory = self._memory[name] = self._allocate(size)
            self._buffers[key] = Planes(memory[:size].view(dtype).view(shape))
        return self._buffers[key]

    def __call__(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return self.planes(name, shape, dtype).all

    def constant(self, key: object, make: Callable[[], Tensor]) -> Tensor:
        """What `make` returned when first asked for `key`."""
        if key not in self._constants:
            self._constants[key] = make()
        return self._constants[key]

    def for_words(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """The buffers of `philox4x32_cpu`, in memory that `mvue` writes only when it has its words."""
        return self({"lanes": "running", "products": "capped", "last": "newly"}[name], shape, dtype)

    def _allocate(self, size: int) -> Tensor:
        aligned = -(-size // 4096) * 4096
        if aligned < 1 << 16:
            return self._bytes(size)
        if self._slab.numel() < aligned:
            self._slab = in_huge_pages(self._bytes(max(aligned, SLAB_BYTES)))
        memory, self._slab = self._slab[:size], self._slab[aligned:]
        return memory

    @staticmethod
    def _bytes(size: int) -> Tensor:
        return torch.empty(size, dtype=torch.uint8, device="cpu")  # whatever torch.set_default_device says


def accumulate_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which values of `dtype` are summed and scaled: float32 at least."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def magnitude(x: Tensor, n: int, scratch: Scratch) -> Tensor:
    """Keep the n largest |x| of each group, ties to the lower index. x: [m, b]."""
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
    keys = scratch.planes("random_keys", tuple(x.shape), torch.int32)
    for plane, word in zip(keys.each, words(x.shape[0]), strict=True):
        plane.copy_(word.sub_(1 << 31))  # the signed order of the keys is the unsigned order of the words
    result = _masked(x, select_largest(keys.all, n, BITS[x.dtype], scratch))
    return _with_non_finite(result, x, n, _largest_magnitude(x, scratch))


def rescale_magnitude(x: Tensor, n: int, eps: float, scratch: Scratch) -> Tensor:
    """As `magnitude`, then times s = sum |x| / (sum |kept| + eps) over the group.

    Both sums run from 0 in index order in the accumulation dtype. Non-finite groups stay unscaled. (Where
    sum |kept| is 0 there is nothing to scale: zeros stay zeros.)
    """
    dtype = accumulate_dtype(x.dtype)
    full, plane = tuple(x.shape), (x.shape[1],)
    magnitudes = scratch.planes("magnitudes", full, x.dtype)
    torch.abs(x, out=magnitudes.all)
    total = _ordered_sum(magnitudes, scratch("total", plane, dtype))
    kept = _masked(x, select_largest(_order_keys(x, scratch), n, BITS[x.dtype], scratch))
    torch.abs(kept, out=magnitudes.all)
    kept_total = _ordered_sum(magnitudes, scratch("kept_total", plane, dtype))
    scale = torch.div(total, kept_total.add_(eps), out=total)
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
       R_{i-1} <= j * 2^24 + u < R_i: k elements are (where S was less than 2^-100 the last one may stand for two).
    6. A kept element outside C becomes x_i / (w_i * 2^-24) (w_i rounded to the computing dtype), saturated at the
       largest finite value of x's dtype, rounded once to it. Elements of C are kept as they are.
    """
    dtype = accumulate_dtype(x.dtype)
    integer = BITS[dtype]
    m, b = full = tuple(x.shape)
    plane = (b,)
    wide = x if x.dtype == dtype else scratch("wide", full, dtype).copy_(x)
    magnitudes = scratch.planes("magnitudes", full, dtype)
    offset = scratch("offset", plane, integer)
    for word in words(1):
        offset.copy_(word.bitwise_right_shift_(8)).bitwise_not_()  # -u - 1
    a = torch.abs(wide, out=magnitudes.all)
    bits = magnitudes.viewed(integer)
    largest = _plane_maximum(magnitudes, scratch("largest", plane, dtype))

    # Steps 1 and 2. A group that keeps all it has becomes one in which everything is capped and k = 0.
    scale = _power_of_two(largest, scratch)
    k = scratch("k", plane, integer)
    zero = few = None
    if n == m or not _all_positive(bits.all):
        zero = scratch.planes("zero", full, integer)
        torch.eq(bits.all, 0, out=zero.all)
        few = torch.ge(_ordered_sum(zero, k), m - n, out=scratch("few", plane, integer))
        torch.eq(few, 0, out=k)
        scale.mul_(k)
        k.mul_(n)
    else:
        k.fill_(n)
    c = scale.view(dtype)
    a.mul_(c)

    # Step 3. Capped elements get magnitude 0. Probabilities, here in units of 2^-24 already, are positive: ordered as
    # their bits. (But c * 2^24 < 2^128 only for k < 16: else the units come later.)
    exponent = 24 if n < 16 else 0
    running = scratch.planes("running", (m + 1, b), integer)
    p = running.viewed(dtype).all[:m]  # in the same memory: read to the end before those are written, and afterwards
    p_bits = running.all[:m]
    capped, newly = (scratch.planes(name, full, integer) for name in ("capped", "newly"))
    total = scratch("total", plane, dtype)
    count = scratch("count", plane, integer)
    for round_index in range(n):
        _ordered_sum(magnitudes, total).clamp_min_(SMALLEST_SUM)
        torch.mul(a, c.copy_(k).mul_(1 << exponent).div_(total), out=p)
        found = newly if round_index else capped
        torch.ge(p_bits, _bits_of_power(exponent, dtype), out=found.all)
        k.sub_(_ordered_sum(found, count))
        if a.device.type == "cpu" and count.amax() == 0:
            break
        if round_index:
            capped.all.add_(newly.all)
        if round_index < n - 1:
            bits.all.addcmul_(bits.all, found.all, value=-1)
    if exponent == 0:
        p.mul_(UNIT)
    if zero is not None and few is not None:
        capped.all.add_(few).bitwise_or_(zero.all)

    # Step 4. running[i + 1] is R_i - u - 1, and w becomes the weights. If the last round capped something p is stale,
    # but k = 0.
    w = bits.all.copy_(p)
    rest = newly  # now: what brings the last free element, and those behind it, to the end: n * UNIT, else 0
    rest.each[-1].fill_(n * UNIT)
    for i in reversed(range(m - 1)):
        torch.mul(rest.each[i + 1], capped.each[i + 1], out=rest.each[i])
    w.add_(rest.all)
    running.each[0].copy_(offset)
    end = k.mul_(UNIT).add_(offset)
    for before, weight, now in zip(running.each[:-1], bits.each, running.each[1:], strict=True):
        torch.minimum(torch.add(before, weight, out=now), end, out=now)
    torch.sub(running.all[1:], running.all[:-1], out=w)

    # Step 5. How many points j * 2^24 + u lie below each R, less one: floor((R - u - 1) / 2^24).
    points = running.all.bitwise_right_shift_(24)
    keep = torch.ne(points[1:], points[:-1], out=rest.all)

    # Step 6. Capped elements have w = 0 so far: nothing else kept has.
    if zero is not None:
        capped.all.sub_(zero.all)
    keep.add_(capped.all)
    probability = p.copy_(w.add_(capped.all, alpha=UNIT)).mul_(1 / UNIT)
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

    keys: integers [m, b]. An element is kept if fewer than n others beat it; the lower index beats an equal key.
    All pairs are compared, one distance at a time: for m <= 32 that is cheaper than any sort made of torch operations.
    """
    m = keys.shape[0]
    # (later elements it beats) - (earlier elements that beat it), shifted so that kept elements end at 0 or above.
    score = scratch("score", tuple(keys.shape), torch.int8)
    for i in range(m):
        score[i].fill_(i + n - m)
    for distance in range(1, m):
        earlier, later = keys[:-distance], keys[distance:]
        beats = torch.ge(earlier, later, out=scratch("beats", tuple(earlier.shape), torch.int8))
        score[:-distance].add_(beats)
        score[distance:].sub_(beats)
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
    # In a scratch of its own: `pruned` lives in the other.
    return torch.where(largest < math.inf, pruned, magnitude(x, n, Scratch(x.device)))


def _all_below(values: Tensor, limit: float) -> bool:
    """Whether all `values` are below `limit`. Never looks on CUDA: there the answer is no."""
    return values.device.type == "cpu" and bool(values.amax() < limit)


def _all_positive(values: Tensor) -> bool:
    """Whether all `values` are above 0. Never looks on CUDA: there the answer is no."""
    return values.device.type == "cpu" and bool(values.amin() > 0)


def _bits_of_power(exponent: int, dtype: torch.dtype) -> int:
    """The bits of 2^exponent."""
    return (127 + exponent) << 23 if dtype == torch.float32 else (1023 + exponent) << 52


def _power_of_two(largest: Tensor, scratch: Scratch) -> Tensor:
    """The bits of the power of two that brings `largest` near 1 (step 2 of `mvue`)."""
    bits = BITS[largest.dtype]
    mantissa, fields = (23, 254) if bits == torch.int32 else (52, 2046)
    exponent = scratch("exponent", tuple(largest.shape), bits)
    torch.bitwise_right_shift(largest.view(bits), mantissa, out=exponent)
    return exponent.neg_().add_(fields).clamp_(1, fields).bitwise_left_shift_(mantissa)


def _largest_magnitude(x: Tensor, scratch: Scratch) -> Tensor:
    magnitudes = scratch.planes("magnitudes", tuple(x.shape), x.dtype)
    torch.abs(x, out=magnitudes.all)
    return _plane_maximum(magnitudes, scratch("largest", (x.shape[1],), x.dtype))


def _plane_maximum(planes: Planes, out: Tensor) -> Tensor:
    out.copy_(planes.each[0])
    for plane in planes.each[1:]:
        torch.maximum(out, plane, out=out)
    return out


def _ordered_sum(planes: Planes, out: Tensor) -> Tensor:
    """((plane 0 + plane 1) + plane 2) + .. in out's dtype: the order is part of the rules."""
    first, *others = planes.each
    if others and first.dtype == out.dtype:
        torch.add(first, others.pop(0), out=out)
    else:
        out.copy_(first)
    for plane in others:
        torch.add(out, plane, out=out)
    return out


def _masked(x: Tensor, mask: Tensor) -> Tensor:
    """x where mask is 1, +0 where it is 0, in mask's memory; on the bits, because inf * 0 is NaN."""
    return torch.mul(x.view(mask.dtype), mask, out=mask).view(x.dtype)
