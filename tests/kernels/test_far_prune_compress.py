"""Prune + compress and the factors of wide scopes on gradients of up to 2^37 elements, bit for bit: as in
`test_far_products`, selected blocks on the simulator. Group indices and the random numbers' counters pass 2^32.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from sdgp_accel import group_rules
from sdgp_accel.config import PruneSpec
from sdgp_accel.philox import GroupWords, Rng
from sdgp_accel.pruning import prune_matrix
from sdgp_accel.semi_structured import compress_matrix
from tests.kernels.products import assert_close
from tests.kernels.test_far_products import ends, only, span
from tests.kernels.test_prune_compress import DTYPES, make_gradient, new_seed

pytestmark = [
    pytest.mark.timeout(1800),  # the first test may have to compile the kernels
    pytest.mark.skipif(torch.cuda.is_available(), reason="for the simulator"),
]

ROWS, CHANNELS = 64, 256  # of a block, for layers as wide as these
T, C = (1 << 22) + 21, 60008


@pytest.fixture(scope="module")
def memory(engine):
    from tests.ptxsim.engine import SimEngine

    return SimEngine((8, 0))


class Gradient(NamedTuple):
    """dY [t, c] of which only the parts that blocks read exist, and its operands likewise."""

    memory: Any
    dy: Tensor
    c: int
    dgrad: tuple[Tensor, Tensor]  # values, metadata
    wgrad: tuple[Tensor, Tensor]

    @classmethod
    def reserve(cls, memory: Any, t: int, c: int, stride: int, dtype: torch.dtype) -> Gradient:
        dgrad_k, wgrad_k, pitch = (-(-size // step) * step for size, step in ((c, 16), (t, 16), (c, 8)))
        return cls(
            memory, memory.reserve(t, stride, dtype=dtype), c,
            (memory.reserve(t, dgrad_k // 2, dtype=dtype), memory.reserve(t, dgrad_k // 16, dtype=torch.int16)),
            (memory.reserve(wgrad_k // 2, pitch, dtype=dtype), memory.reserve(wgrad_k // 16, pitch, dtype=torch.int16)),
        )  # fmt: skip

    def shape(self) -> dict[str, Any]:
        t, stride = self.dy.shape
        return {"dtype": DTYPES[self.dy.dtype], "t": t, "c": self.c, "row_stride": stride}

    def operand_shape(self) -> dict[str, Any]:
        (dgrad_values, _), (wgrad_values, _) = self.dgrad, self.wgrad
        k = {"dgrad_k": dgrad_values.shape[1] * 2, "wgrad_k": wgrad_values.shape[0] * 2}
        return self.shape() | k | {"wgrad_pitch": wgrad_values.shape[1]}

    def addresses(self) -> dict[str, int]:
        tensors = (self.dy, *self.dgrad, *self.wgrad)
        names = ("dy", "dgrad_values", "dgrad_metadata", "wgrad_values", "wgrad_metadata")
        return {name: tensor.data_ptr() for name, tensor in zip(names, tensors, strict=True)}

    def part(self, row: int, channel: int) -> tuple[slice, slice]:
        """What the block at a row and a channel reads."""
        return span(row // ROWS, ROWS, len(self.dy)), span(channel // CHANNELS, CHANNELS, self.c)

    def block(self, row: int, channel: int) -> tuple[int, int, int]:
        return row // ROWS * -(-self.c // CHANNELS) + channel // CHANNELS, 0, 0

    def open(self, row: int, channel: int, x: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Makes the part of a block accessible, with the values x; returns its part of both operands."""
        rows, channels = self.part(row, channel)
        self.memory.open(self.dy[rows, channels], x)
        operands = []
        for arrays, axis in ((self.dgrad, 1), (self.wgrad, 0)):
            parts = []
            for array, per_entry in zip(arrays, (2, 16), strict=True):
                along = (channels, rows)[1 - axis]
                packed = slice(along.start // per_entry, -(-along.stop // 16) * 16 // per_entry)
                across = rows if axis == 1 else slice(channels.start, min(-(-channels.stop // 8) * 8, array.shape[1]))
                parts.append(self.memory.open(array[(across, packed) if axis == 1 else (packed, across)]))
            operands.append((parts[0], parts[1]))
        return operands

    def check(self, operands: list[tuple[Tensor, Tensor]], pruned: tuple[Tensor, Tensor]) -> None:
        """The operands are the compressed form of what is left along channels and along positions."""
        for (values, metadata), matrix, axis in zip(operands, pruned, (1, 0), strict=True):
            if axis == 0:
                matrix = torch.nn.functional.pad(matrix, (0, values.shape[1] - matrix.shape[1]))
            expected = compress_matrix(matrix, axis, k_align=16)
            assert ((values == expected.values) | (values.isnan() & expected.values.isnan())).all()
            assert torch.equal(metadata, expected.metadata)


def pruned(x: Tensor, spec: PruneSpec, axis: int, row: int, channel: int, c: int, rng: Rng) -> Tensor:
    """The part x, from `row` and `channel` on, of a gradient of c channels, pruned: a group of each line at a time."""
    m, lines = spec.m, x if axis == 1 else x.t()
    out = torch.empty_like(lines)
    rule, scratch = getattr(group_rules, spec.function), group_rules.Scratch(x.device)
    words = GroupWords(rng, 1 << 40)
    for start in range(0, lines.shape[1], m):
        values = lines[:, start : start + m].t().contiguous()
        arguments: list[Any] = [values, min(spec.n, len(values))]
        if spec.function in ("mvue", "random"):
            along = torch.arange(len(lines))
            index = (row + along) * -(-c // m) + (channel + start) // m
            if axis == 0:
                index = (row + start) // m * c + channel + along
            arguments.append(partial(words, index))
        if spec.function == "rescale_magnitude":
            arguments.append(spec.eps)
        out[:, start : start + m] = rule(*arguments, scratch).t()
    return out if axis == 1 else out.t()


def passed(total: int, groups_per_row: int, rows_of_tile: int) -> tuple[int, int]:
    """(row, column) of the last group with an index that is a multiple of 2^32, if possible inside a thread's tile."""
    multiples = range(total - 1 >> 32 << 32, 0, -(1 << 32))
    inside = [index for index in multiples if index // groups_per_row % rows_of_tile]
    return divmod((inside or multiples)[0], groups_per_row)


def places(t: int, c: int, m: int) -> Iterator[tuple[int, int]]:
    """(row, channel) of the first element, of the last, and of where the indices of groups pass a multiple of 2^32."""
    yield 0, 0
    row, group = passed(t * -(-c // m), -(-c // m), 16)
    yield row, group * m
    row_of_groups, channel = passed(t // m * c, c, 16 // m)
    yield row_of_groups * m, channel
    yield t - 1, c - 1


@pytest.mark.parametrize(
    ("function", "n", "m", "c", "stride"),
    [
        ("mvue", 2, 4, C, C),
        ("random", 2, 4, C - 3, C + 1),  # no vector loads
        ("random", 1, 4, C, C + 8),
        ("mvue", 1, 8, C, C),
        ("random", 2, 16, C, C),
        ("magnitude", 2, 4, C, C),
        ("rescale_magnitude", 2, 8, C - 3, C),
    ],
)
def test_prune_compress(engine, memory, function, n, m, c, stride):
    gradient = Gradient.reserve(memory, T, c, stride, torch.bfloat16 if m == 4 else torch.float16)
    check_blocks(engine, memory, PruneSpec(function, n, m), gradient, places(T, c, m), "normal")


@pytest.mark.parametrize(("function", "m"), [("random", 4), ("random", 8), ("mvue", 4), ("magnitude", 4)])
def test_more_positions_than_32_bits_count(engine, memory, function, m):
    """With groups that not every way through the kernels takes."""
    gradient = Gradient.reserve(memory, (1 << 31) + 21, CHANNELS, CHANNELS, torch.bfloat16)
    rows = (0, len(gradient.dy) - 1)
    for kind in ("not finite", "many zeros"):
        check_blocks(engine, memory, PruneSpec(function, 2, m), gradient, [(row, 0) for row in rows], kind)


def check_blocks(engine, memory, spec, gradient, where, kind):
    """Both operands of the blocks at these rows and channels are what the reference makes of values of this kind."""
    seed, rank, c = new_seed(), 3, gradient.c
    blocks = {}
    for row, channel in where:
        rows, channels = gradient.part(row, channel)
        if gradient.block(row, channel) not in blocks:
            x = make_gradient(kind, rows.stop - rows.start, channels.stop - channels.start, gradient.dy.dtype)
            blocks[gradient.block(row, channel)] = rows, channels, x, gradient.open(row, channel, x)
    device_seed = memory.put(seed)
    launch = engine.kernels.PruneCompress(function=spec.function, n=spec.n, m=spec.m, **gradient.operand_shape())
    with memory.only_blocks(only(blocks, "compress_kernel")), engine.launching():
        launch(seed=device_seed.data_ptr(), rank=rank, **gradient.addresses())
    for rows, channels, x, operands in blocks.values():
        kept = [pruned(x, spec, axis, rows.start, channels.start, c, Rng(seed, rank, 1 - axis)) for axis in (1, 0)]
        gradient.check(operands, (kept[0], kept[1]))


def test_sample_channel_scope(engine, memory):
    """As many factors as groups of 16: more than 2^33."""
    t, per_sample, dtype = (1 << 22) + 3 * 16, 16, torch.bfloat16
    spec = PruneSpec("rescale_magnitude", 2, 4, "sample_channel")
    gradient = Gradient.reserve(memory, t, C, C, dtype)
    factors = [memory.reserve(t // per_sample, C, dtype=torch.float32) for _ in range(2)]
    blocks, sum_blocks = {}, []
    for row, channel in ((0, 0), (t // 2, C // 2), (t - 1, C - 1)):
        rows, channels = gradient.part(row, channel)
        samples = range(rows.start // per_sample, rows.stop // per_sample)
        x = make_gradient("normal", rows.stop - rows.start, channels.stop - channels.start, dtype)
        blocks[gradient.block(row, channel)] = x, gradient.open(row, channel, x)
        for factor in factors:
            memory.open(factor[samples.start : samples.stop, channels])
        sum_blocks += [(sample * -(-C // CHANNELS) + channel // CHANNELS, 0, 0) for sample in samples]
    scales = {"dgrad_scale": factors[0].data_ptr(), "wgrad_scale": factors[1].data_ptr()}
    rule = {"n": 2, "m": 4, "eps": spec.eps, "positions_per_sample": per_sample}
    scope_scales = engine.kernels.ScopeScales(**rule, **gradient.shape())
    with memory.only_blocks(only(sum_blocks, "scope_sums")), engine.launching():
        scope_scales(dy=gradient.dy.data_ptr(), **scales)
    launch = engine.kernels.PruneCompress(function=spec.function, **rule, **gradient.operand_shape())
    with memory.only_blocks(only(blocks, "compress_kernel")), engine.launching():
        launch(**gradient.addresses(), **scales)
    for x, operands in blocks.values():
        gradient.check(operands, tuple(prune_matrix(x, spec, axis, per_sample, None) for axis in (1, 0)))


def kept_sums(x: Tensor, axes: tuple[int, ...]) -> list[Tensor]:
    """Of |x|, and of what 2:4 magnitude pruning along channels and along positions keeps of it; float64."""
    kept = [x, *(prune_matrix(x, PruneSpec("magnitude", 2, 4), axis, 1, None) for axis in (1, 0))]
    return [matrix.double().abs().sum(axes) for matrix in kept]


def test_scopes_of_several_parts(engine, memory):
    """Partial sums [2 parts, 3, scopes] of more than 2^31 values."""
    per_sample, samples, dtype = 512, 8200, torch.float16
    gradient = Gradient.reserve(memory, samples * per_sample, C, C, dtype)
    scopes, channel_blocks = samples * C, -(-C // CHANNELS)
    sums = memory.reserve(2, 3, scopes, dtype=torch.float64)
    assert sums.numel() == engine.kernels.scope_workspace(len(gradient.dy), C, per_sample) > 1 << 31
    factors = [memory.reserve(scopes, dtype=torch.float32) for _ in range(2)]
    sum_blocks, factor_blocks, expected = [], [], []
    for sample, channels in ((0, slice(0, CHANNELS)), (samples - 1, slice((channel_blocks - 2) * CHANNELS, C))):
        x = make_gradient("normal", per_sample, channels.stop - channels.start, dtype)
        memory.open(gradient.dy[sample * per_sample : (sample + 1) * per_sample, channels], x)
        memory.open(sums[:, :, sample * C + channels.start : sample * C + channels.stop])
        for part in range(2):
            for block in range(channels.start // CHANNELS, -(-channels.stop // CHANNELS)):
                sum_blocks.append(((sample * 2 + part) * channel_blocks + block, 0, 0))
        # The last block that adds up parts whose sums are all there.
        block = (sample * C + channels.stop - 1) // 256
        where = slice(block * 256, sample * C + channels.stop)
        factor_blocks.append((block, 0, 0))
        total, *kept = (s[where.start - sample * C - channels.start :].float() for s in kept_sums(x, (0,)))
        expected += [(memory.open(f[where]), total / s) for f, s in zip(factors, kept, strict=True)]

    def choice(kernel, grid):
        return sum_blocks if "scope_sums" in kernel else factor_blocks

    scope_scales = engine.kernels.ScopeScales(n=2, m=4, eps=0.0, positions_per_sample=per_sample, **gradient.shape())
    with memory.only_blocks(choice), engine.launching():
        scope_scales(gradient.dy.data_ptr(), sums.data_ptr(), *(factor.data_ptr() for factor in factors))
    for part, exact in expected:
        assert torch.equal(part, exact)


def test_tensor_scope(engine, memory):
    """The sums of 120 555 blocks, of which one is computed here."""
    t, dtype = (1 << 17) + 256, torch.bfloat16
    gradient = Gradient.reserve(memory, t, C, C, dtype)
    channel_blocks = -(-C // CHANNELS)
    sums = memory.put(torch.rand(513 * channel_blocks, 3, dtype=torch.float64))
    assert sums.numel() == engine.kernels.scope_workspace(t, C, 0)
    channels = slice((channel_blocks - 1) * CHANNELS, C)
    x = make_gradient("normal", 256, channels.stop - channels.start, dtype)
    memory.open(gradient.dy[-256:, channels], x)
    exact = sums.sum(0) - sums[-1] + torch.stack(kept_sums(x, (0, 1)))
    factors = [memory.empty(1) for _ in range(2)]

    def choice(kernel, grid):
        return [(grid[0] - 1, 0, 0)]

    scope_scales = engine.kernels.ScopeScales(n=2, m=4, eps=0.0, positions_per_sample=0, **gradient.shape())
    with memory.only_blocks(choice), engine.launching():
        scope_scales(gradient.dy.data_ptr(), sums.data_ptr(), *(factor.data_ptr() for factor in factors))
    torch.testing.assert_close(torch.cat(factors).double(), exact[0] / exact[1:], rtol=1e-6, atol=0)


def test_bias_gradient(engine, memory):
    """Partial sums [46, c] of more than 2^31 values: more rows than a block has."""
    t, c, dtype = 2900, (1 << 27) + 24, torch.bfloat16
    gradient = Gradient.reserve(memory, t, c, c, dtype)
    rows = -(-t // ROWS)
    assert engine.kernels.bias_partial_rows(t, c) == rows
    partials, bias = memory.reserve(rows, c, dtype=torch.float32), memory.reserve(c, dtype=dtype)
    blocks, sum_blocks, expected = [], [], []
    for channel in ends(c):
        part, channels = gradient.part(t - 1, channel)
        width = channels.stop - channels.start
        x = make_gradient("normal", part.stop - part.start, width, dtype)
        gradient.open(t - 1, channel, x)
        others = memory.open(partials[:-1, channels], torch.randn(rows - 1, width))
        memory.open(partials[-1:, channels])
        blocks.append(gradient.block(t - 1, channel))
        sum_blocks += [(block, 0, 0) for block in range(channels.start // 32, -(-channels.stop // 32))]
        terms = torch.cat([others.double(), x.double()])
        exact, magnitude = terms.sum(0), terms.abs().sum(0)
        expected.append((memory.open(bias[channels]), exact, magnitude))

    def choice(kernel, grid):
        return blocks if "compress_kernel" in kernel else sum_blocks

    launch = engine.kernels.PruneCompress(function="magnitude", n=2, m=4, **gradient.operand_shape())
    with memory.only_blocks(choice), engine.launching():
        launch(bias=bias.data_ptr(), bias_partials=partials.data_ptr(), **gradient.addresses())
    for part, exact, magnitude in expected:
        assert_close(part, exact, magnitude, t)
