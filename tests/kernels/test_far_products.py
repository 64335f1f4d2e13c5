"""Tensors beyond 2^31 elements on the simulator: of each launch, only blocks at the beginning, in the middle and at the
end run, and of each tensor only what those blocks may touch exists. Whatever else they read or write is a fault.

`test_large` runs whole launches of such sizes on a GPU with the memory for them.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from sdgp_accel.backends.products import MAX_SIZE
from sdgp_accel.semi_structured import compress_matrix
from tests.kernels.products import (
    ConvCase,
    GemmCase,
    SimulatorEngine,
    assert_close,
    compile_for_simulator,
    conv_gradient,
    dtype_of,
    out_size,
    sparse_matrix,
)
from tests.ptxsim import toolchain

pytestmark = [
    pytest.mark.timeout(1800),  # the first test may have to compile the kernels
    pytest.mark.skipif(torch.cuda.is_available(), reason="for the simulator, which a GPU's runtime would displace"),
    pytest.mark.skipif(toolchain.missing() is not None, reason=str(toolchain.missing())),
]

Block = tuple[int, int, int]


class Simulator(SimulatorEngine):
    """As many multiprocessors as tiles, so that a persistent block has one of them, and its index says which."""

    sm_count = 1 << 28

    def __init__(self, arch: str) -> None:
        from tests.ptxsim.engine import SimEngine

        super().__init__(arch)
        self.memory = SimEngine((int(arch[0]), int(arch[1])))


@pytest.fixture(scope="module")
def simulators() -> dict[str, Simulator]:
    """By the prefix of instances."""
    cases = [*DGRAD, *WGRAD, *LARGE_DW, *CONV_DGRAD, *CONV_WGRAD]
    for arch in ("80", "90a"):
        compile_for_simulator(sorted({c.instance for c in cases if c.instance.startswith(f"sm{arch[:2]}")}), arch)
    return {f"sm{arch[:2]}": Simulator(arch) for arch in ("80", "90a")}


class Tiling(NamedTuple):
    """How a launch with group_n = 1 cuts its output into tiles: down the rows, then to the next columns."""

    case: GemmCase | ConvCase
    rows: int  # of a unit: the tiles of a cluster, above each other
    columns: int
    units: int  # along the rows
    column_tiles: int

    @property
    def hopper(self) -> bool:
        return self.case.instance.startswith("sm90")

    def block(self, unit: int, column_tile: int, part: int = 0, split: int = 0) -> Block:
        tile = column_tile * self.units + unit
        if not self.hopper:
            return tile, part, split
        return ((part + split) * self.units * self.column_tiles + tile) * self.case.cluster_size, 0, 0

    def k_range(self, k: int, split: int) -> range:
        """Of a split, as the launchers cut it: in tiles of 64, or Hopper's in blocks of two, longer ones first."""
        step = 128 if self.hopper else 64
        pieces, splits = -(-k // step), self.case.splits
        whole, longer = divmod(pieces, splits)
        bounds = (split, split + 1)
        first, last = (s * whole + min(s, longer) if self.hopper else pieces * s // splits for s in bounds)
        return range(first * step, min(last * step, k))


def tiling(case: GemmCase | ConvCase, rows: int, columns: int) -> Tiling:
    match = re.search(r"_(\d+)x(\d+)", case.instance)
    assert match is not None
    block_m, block_n = int(match[1]) * case.cluster_size, int(match[2])
    return Tiling(case, block_m, block_n, -(-rows // block_m), -(-columns // block_n))


def ends(count: int) -> list[int]:
    return sorted({0, count // 2, count - 1})


def span(index: int, step: int, size: int) -> slice:
    return slice(index * step, min((index + 1) * step, size))


def only(blocks: Iterable[Block], kernel: str = "sparse_gemm_kernel") -> Callable[[str, Block], list[Block]]:
    """Of launches of `kernel` these blocks, of others none."""
    blocks = list(blocks)
    return lambda name, grid: blocks if kernel in name else []


def random(*shape: int, dtype: torch.dtype) -> Tensor:
    return torch.randn(shape).to(dtype)


def product(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    """In float64, and of the absolute values."""
    a, b = a.double(), b.double()
    return a @ b, a.abs() @ b.abs()


# m: the most rows that the backend lets through; out and both parts of A are beyond 2^34 elements.
DGRAD = [
    GemmCase("sm80_dgrad_bf16_256x128", MAX_SIZE - 3, 136, 72),
    GemmCase("sm80_dgrad_f16_128x128", MAX_SIZE, 264, 200, float_out=True),
    GemmCase("sm80_dgrad_bf16_128x64_any", MAX_SIZE - 3, 67, 101),
    GemmCase("sm90_dgrad_bf16_128x256", MAX_SIZE - 3, 264, 200, cluster_size=2),
    GemmCase("sm90_dgrad_f16_128x128_pingpong", MAX_SIZE, 136, 136),
]


@pytest.mark.parametrize("case", DGRAD, ids=lambda case: case.instance)
def test_dgrad(simulators: dict[str, Simulator], case: GemmCase) -> None:
    simulator = simulators[case.instance[:4]]
    memory, dtype, cut = simulator.memory, dtype_of(case), tiling(case, case.m, case.n)
    padded_k = -(-case.k // 128) * 128
    values = memory.reserve(case.m, padded_k // 2, dtype=dtype)
    metadata = memory.reserve(case.m, padded_k // 16, dtype=torch.int16)
    out = memory.reserve(case.m, case.n, dtype=torch.float32 if case.float_out else dtype)
    weight = random(case.k, case.n, dtype=dtype)
    blocks, expected = [], []
    for unit, column_tile in zip(ends(cut.units), (0, cut.column_tiles - 1, cut.column_tiles - 1), strict=True):
        rows, columns = span(unit, cut.rows, case.m), span(column_tile, cut.columns, case.n)
        dy = sparse_matrix(rows.stop - rows.start, case.k, 1, dtype)
        operand = compress_matrix(dy, 1, k_align=128)
        memory.open(values[rows], operand.values)
        memory.open(metadata[rows], operand.metadata)
        blocks.append(cut.block(unit, column_tile))
        expected.append((memory.open(out[rows, columns]), *product(dy, weight[:, columns])))
    with memory.only_blocks(only(blocks)):
        simulator.gemm(
            case.instance, m=case.m, n=case.n, k=case.k, padded_k=padded_k, splits=1, group_n=1,
            cluster_size=case.cluster_size, out_is_float=case.float_out, values=values, metadata=metadata,
            b=memory.put(weight), out=out,
        )  # fmt: skip
    for part, exact, magnitude in expected:
        assert_close(part, exact, magnitude, case.k)


# X, both parts of A and the partial sums beyond 2^31 elements.
WGRAD = [
    GemmCase("sm80_wgrad_bf16_64x128", 1032, 1032, (1 << 25) + 333, splits=65535),
    GemmCase("sm80_wgrad_f16_128x64_any", 1029, 1029, (1 << 25) + 333, splits=65535),
    GemmCase("sm90_wgrad_bf16_256x128", 1032, 1032, (1 << 25) + 333, splits=1 << 17, cluster_size=2),
    GemmCase("sm90_wgrad_f16_64x256_pingpong", 8, 264, MAX_SIZE, splits=1 << 23),
]


@pytest.mark.parametrize("case", WGRAD, ids=lambda case: case.instance)
def test_wgrad(simulators: dict[str, Simulator], case: GemmCase) -> None:
    simulator = simulators[case.instance[:4]]
    memory, dtype, cut = simulator.memory, dtype_of(case), tiling(case, case.m, case.n)
    padded_k, pitch = -(-case.k // 128) * 128, -(-case.m // 8) * 8
    values = memory.reserve(padded_k // 2, pitch, dtype=dtype)
    metadata = memory.reserve(padded_k // 16, pitch, dtype=torch.int16)
    x = memory.reserve(case.k, case.n, dtype=dtype)
    partials = memory.reserve(case.splits, case.m, case.n, dtype=torch.float32)
    blocks, expected = [], []
    for i, split in enumerate(ends(case.splits)):
        unit, column_tile = (cut.units - 1, cut.column_tiles - 1) if i else (0, 0)
        rows, columns = span(unit, cut.rows, case.m), span(column_tile, cut.columns, case.n)
        ks = cut.k_range(case.k, split)
        dy = sparse_matrix(len(ks), pitch, 0, dtype)
        dy[:, case.m :] = 0
        operand = compress_matrix(dy, 0, k_align=128 if cut.hopper else 64)
        memory.open(values[ks.start // 2 :][: len(operand.values)], operand.values)
        memory.open(metadata[ks.start // 16 :][: len(operand.metadata)], operand.metadata)
        b = memory.open(x[ks.start : ks.stop], random(len(ks), case.n, dtype=dtype))
        blocks.append(cut.block(unit, column_tile, split=split))
        part = memory.open(partials[split, rows, columns])
        expected.append((part, *product(dy[:, rows].t(), b[:, columns]), len(ks)))
    with memory.only_blocks(only(blocks)):
        simulator.gemm(
            case.instance, m=case.m, n=case.n, k=case.k, padded_k=padded_k, splits=case.splits, group_n=1,
            cluster_size=case.cluster_size, values=values, metadata=metadata, b=x, out=memory.put(torch.zeros(8)),
            workspace=partials,
        )  # fmt: skip
    for part, exact, magnitude, k in expected:
        assert_close(part, exact, magnitude, k)


# dW beyond 2^31 elements.
LARGE_DW = [
    GemmCase("sm80_wgrad_bf16_256x128", 70_000, 70_008, 100),
    GemmCase("sm80_wgrad_f16_128x64_any", 70_001, 70_001, 100, float_out=True, accumulate=True),
    GemmCase("sm90_wgrad_bf16_128x192", 70_000, 70_008, 100, cluster_size=2, float_out=True, accumulate=True),
]


@pytest.mark.parametrize("case", LARGE_DW, ids=lambda case: case.instance)
def test_large_dw(simulators: dict[str, Simulator], case: GemmCase) -> None:
    simulator = simulators[case.instance[:4]]
    memory, dtype, cut = simulator.memory, dtype_of(case), tiling(case, case.m, case.n)
    dy, x = sparse_matrix(case.k, -(-case.m // 8) * 8, 0, dtype), random(case.k, case.n, dtype=dtype)
    operand = compress_matrix(dy, 0, k_align=128)
    out = memory.reserve(case.m, case.n, dtype=torch.float32 if case.float_out else dtype)
    blocks, expected = [], []
    for unit, column_tile in zip(ends(cut.units), ends(cut.column_tiles), strict=True):
        rows, columns = span(unit, cut.rows, case.m), span(column_tile, cut.columns, case.n)
        part = out[rows, columns]
        before = random(*part.shape, dtype=out.dtype) if case.accumulate else None
        memory.open(part, before)
        exact, magnitude = product(dy[:, rows].t(), x[:, columns])
        if before is not None:
            exact, magnitude = exact + before.double(), magnitude + before.double().abs()
        blocks.append(cut.block(unit, column_tile))
        expected.append((part, exact, magnitude))
    with memory.only_blocks(only(blocks)):
        simulator.gemm(
            case.instance, m=case.m, n=case.n, k=case.k, padded_k=128, splits=1, group_n=1,
            cluster_size=case.cluster_size, out_is_float=case.float_out, accumulate=case.accumulate,
            values=memory.put(operand.values), metadata=memory.put(operand.metadata), b=memory.put(x), out=out,
        )  # fmt: skip
    for part, exact, magnitude in expected:
        assert_close(part, exact, magnitude, case.k)


@pytest.mark.parametrize(
    ("instance", "m", "n"), [("sm80_wgrad_bf16_64x128", 1 << 16, 1 << 16), ("sm80_wgrad_f16_128x64_any", 65537, 65537)]
)
def test_sum_of_large_partial_products(
    simulators: dict[str, Simulator], monkeypatch: pytest.MonkeyPatch, instance: str, m: int, n: int
) -> None:
    """out [2^32 elements] = the sum of three such; blocks of 256 threads take a stride of the whole grid."""
    simulator = simulators["sm80"]
    monkeypatch.setattr(simulator, "sm_count", 1 << 20)  # of which each gets four blocks at most
    memory, count, splits = simulator.memory, m * n, 3
    width = 4 if count % 4 == 0 else 1
    grid = min(-(-count // (256 * width)), 4 * simulator.sm_count)
    partials, out = memory.reserve(splits, count, dtype=torch.float32), memory.reserve(count, dtype=torch.float32)
    expected = []
    for block in ends(grid):
        for first in range(block * 256 * width, count, grid * 256 * width):
            where = slice(first, min(first + 256 * width, count))
            parts = memory.open(partials[:, where], torch.randn(splits, where.stop - where.start))
            expected.append((memory.open(out[where]), parts[0] + parts[1] + parts[2]))
    nothing = memory.put(torch.zeros(8))
    with memory.only_blocks(only(((block, 0, 0) for block in ends(grid)), "sum_partials")):
        simulator.gemm(
            instance, m=m, n=n, k=300, padded_k=384, splits=splits, group_n=1, cluster_size=1, out_is_float=True,
            values=nothing, metadata=nothing, b=nothing, out=out, workspace=partials,
        )  # fmt: skip
    assert len(expected) >= 3
    for part, exact in expected:
        assert torch.equal(part, exact)


# Images, gradients and results beyond 2^31 elements; in all but one as many pixels as the backend lets through.
CONV_DGRAD = [
    ConvCase("sm80_conv_dgrad_bf16_128x128", (MAX_SIZE // 48, 136, 6, 8), (72, 3, 3), (2, 2)),
    ConvCase("sm80_conv_dgrad_f16_128x64_any", (MAX_SIZE // 36, 67, 6, 6), (35, 2, 3), (1, 3), (1, 1)),
    ConvCase("sm90_conv_dgrad_bf16_128x128", (MAX_SIZE // 48, 136, 6, 8), (72, 3, 3), (2, 2)),
    ConvCase("sm90_conv_dgrad_bf16_256x64_pingpong", (1 << 19, 64, 12, 8), (136, 3, 3), cluster_size=2),
]


@pytest.mark.parametrize("case", CONV_DGRAD, ids=lambda case: case.instance)
def test_conv_dgrad(simulators: dict[str, Simulator], case: ConvCase) -> None:
    simulator = simulators[case.instance[:4]]
    memory, dtype = simulator.memory, dtype_of(case)
    (images, c_in, h, w), (c_out, r, s), (p, q) = case.x, case.filter, out_size(case)
    height, width = h // case.stride[0], w // case.stride[1]  # of a residue class; all are of one size
    padded_k = -(-c_out // 128) * 128
    values = memory.reserve(images, p * q, padded_k // 2, dtype=dtype)
    metadata = memory.reserve(images, p * q, padded_k // 16, dtype=torch.int16)
    dx = memory.reserve(images * h * w, c_in, dtype=dtype)
    weight = random(c_out, c_in, r, s, dtype=dtype)
    cut = tiling(case, images * height * width, c_in)
    blocks, expected = [], []
    for unit, column_tile in zip(ends(cut.units), (0, cut.column_tiles - 1, cut.column_tiles - 1), strict=True):
        rows, columns = span(unit, cut.rows, images * height * width), span(column_tile, cut.columns, c_in)
        first, last = rows.start // (height * width), (rows.stop - 1) // (height * width)
        count = last + 1 - first
        dy = sparse_matrix(count * p * q, c_out, 1, dtype)
        operand = compress_matrix(dy, 1, k_align=128)
        memory.open(values[first : last + 1], operand.values.view(count, p * q, -1))
        memory.open(metadata[first : last + 1], operand.metadata.view(count, p * q, -1))
        few = case._replace(x=(count, *case.x[1:]))
        tensors = (torch.empty(few.x), weight, dy.view(count, p, q, c_out).permute(0, 3, 1, 2))
        exact = conv_gradient(few, *(t.double() for t in tensors)).reshape(-1, c_in)[:, columns]
        magnitude = conv_gradient(few, *(t.double().abs() for t in tensors)).reshape(-1, c_in)[:, columns]
        line, j = (torch.arange(rows.start, rows.stop) // width, torch.arange(rows.start, rows.stop) % width)
        for residue in range(case.stride[0] * case.stride[1]):
            blocks.append(cut.block(unit, column_tile, part=residue))
            i = line % height * case.stride[0] + residue // case.stride[1]
            pixels = (line // height * h + i) * w + j * case.stride[1] + residue % case.stride[1]
            for pixel in pixels.tolist():
                memory.open(dx[pixel, columns])
            near = pixels - first * h * w
            expected.append((pixels, columns, exact[near], magnitude[near]))
    with memory.only_blocks(only(blocks)):
        simulator.conv(
            case.instance, shape=(images, h, w, c_in, p, q, c_out, r, s),
            window=[*case.stride, *case.padding, *case.dilation], padded_k=padded_k, splits=1, group_n=1,
            cluster_size=case.cluster_size, values=values, metadata=metadata,
            b=memory.put(weight.permute(0, 2, 3, 1).contiguous()), out=dx,
        )  # fmt: skip
    for pixels, columns, exact, magnitude in expected:
        assert_close(dx[pixels, columns], exact, magnitude, c_out * r * s)


CONV_WGRAD = [
    ConvCase("sm80_conv_wgrad_bf16_64x128", (1 << 20, 72, 12, 14), (72, 3, 3), (2, 2), splits=65535),
    ConvCase("sm80_conv_wgrad_f16_128x64_any", (1 << 20, 67, 6, 7), (67, 3, 2), splits=65535),
    ConvCase("sm90_conv_wgrad_bf16_128x256", (MAX_SIZE // 168, 72, 12, 14), (72, 3, 3), (2, 2), splits=1 << 21),
    ConvCase("sm90_conv_wgrad_bf16_64x192_pingpong", (MAX_SIZE // 42, 8, 6, 7), (8, 3, 3), splits=1 << 21),
]


@pytest.mark.parametrize("case", CONV_WGRAD, ids=lambda case: case.instance)
def test_conv_wgrad(simulators: dict[str, Simulator], case: ConvCase) -> None:
    simulator = simulators[case.instance[:4]]
    memory, dtype = simulator.memory, dtype_of(case)
    (images, c_in, h, w), (c_out, r, s), (p, q) = case.x, case.filter, out_size(case)
    positions, pitch = images * p * q, -(-c_out // 8) * 8
    padded_k = -(-positions // 128) * 128
    values = memory.reserve(padded_k // 2, pitch, dtype=dtype)
    metadata = memory.reserve(padded_k // 16, pitch, dtype=torch.int16)
    x = memory.reserve(images, h * w, c_in, dtype=dtype)
    partials = memory.reserve(case.splits, c_out, r * s, c_in, dtype=torch.float32)
    per_tap = -(-c_in // 64) * 64 if case.instance.startswith("sm90") else -(-c_in // 8) * 8
    cut = tiling(case, c_out, r * s * per_tap)
    blocks, expected = [], []
    for split in ends(case.splits):
        ks = cut.k_range(positions, split)
        first, last = ks.start // (p * q), ks[-1] // (p * q)
        dy = torch.zeros(last + 1 - first, p * q, c_out, dtype=dtype)
        near = slice(ks.start - first * p * q, ks.stop - first * p * q)
        dy.view(-1, c_out)[near] = sparse_matrix(len(ks), c_out, 0, dtype)
        padded = torch.nn.functional.pad(dy.view(-1, c_out)[near], (0, pitch - c_out))
        operand = compress_matrix(padded, 0, k_align=128 if cut.hopper else 64)
        memory.open(values[ks.start // 2 :][: len(operand.values)], operand.values)
        memory.open(metadata[ks.start // 16 :][: len(operand.metadata)], operand.metadata)
        some = memory.open(x[first : last + 1], random(last + 1 - first, h * w, c_in, dtype=dtype))
        part = memory.open(partials[split])
        blocks += [cut.block(u, v, split=split) for u in range(cut.units) for v in range(cut.column_tiles)]
        x_near = some.view(-1, h, w, c_in).permute(0, 3, 1, 2).double()
        dy_near = dy.view(-1, p, q, c_out).permute(0, 3, 1, 2).double()
        weight = torch.empty(c_out, c_in, r, s, dtype=torch.float64)
        exact = conv_gradient(case, x_near, weight, dy_near)
        magnitude = conv_gradient(case, x_near.abs(), weight, dy_near.abs())
        expected.append((part, exact, magnitude, len(ks)))
    with memory.only_blocks(only(blocks)):
        simulator.conv(
            case.instance, shape=(images, h, w, c_in, p, q, c_out, r, s),
            window=[*case.stride, *case.padding, *case.dilation], padded_k=padded_k, splits=case.splits, group_n=1,
            cluster_size=case.cluster_size, values=values, metadata=metadata, b=x, out=memory.put(torch.zeros(8)),
            workspace=partials,
        )  # fmt: skip
    for part, exact, magnitude, k in expected:
        assert_close(part, exact.reshape(part.shape), magnitude.reshape(part.shape), k)


# Sizes whose products wrap around to something small in 32 bits.
TOO_LARGE = [
    ConvCase("sm80_conv_dgrad_bf16_128x128", ((1 << 20) + 1, 8, 64, 64), (64, 3, 3)),  # pixels of x
    ConvCase("sm80_conv_dgrad_bf16_128x128", ((1 << 18) + 1, 8, 8, 8), (64, 1, 1), padding=(60, 60)),  # and of dY
    ConvCase("sm80_conv_wgrad_f16_128x64_any", (1, 1, 24576, 24576), (8, 24576, 24576), padding=(0, 0)),  # columns
    ConvCase("sm80_conv_wgrad_bf16_64x128", ((1 << 20) + 1, 8, 64, 64), (64, 3, 3)),
    ConvCase("sm90_conv_dgrad_bf16_128x128", ((1 << 20) + 1, 8, 64, 64), (64, 3, 3)),
    ConvCase("sm90_conv_dgrad_bf16_128x128", ((1 << 18) + 1, 8, 8, 8), (64, 1, 1), padding=(60, 60)),
    ConvCase("sm90_conv_wgrad_bf16_128x256", ((1 << 20) + 1, 8, 64, 64), (64, 3, 3)),
]


@pytest.mark.parametrize("case", TOO_LARGE, ids=lambda case: f"{case.instance}-{case.x}")
def test_sizes_beyond_32_bits_are_refused(simulators: dict[str, Simulator], case: ConvCase) -> None:
    simulator, (images, c_in, h, w) = simulators[case.instance[:4]], case.x
    nothing = simulator.memory.put(torch.zeros(64))
    with pytest.raises(RuntimeError, match="status 9"), simulator.memory.only_blocks(only([])):
        simulator.conv(
            case.instance, shape=(images, h, w, c_in, *out_size(case), *case.filter),
            window=[*case.stride, *case.padding, *case.dilation], padded_k=128, splits=1, group_n=1, cluster_size=1,
            values=nothing, metadata=nothing, b=nothing, out=nothing,
        )  # fmt: skip
