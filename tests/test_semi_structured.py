"""The 2:4 operand: compress and decompress."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sdgp_accel.config import FUNCTIONS, PASSES, SDGPConfig
from sdgp_accel.layouts import LAYOUTS
from sdgp_accel.pruning import prune
from sdgp_accel.semi_structured import compress, compress_matrix

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]
BITS = {2: torch.int16, 4: torch.int32, 8: torch.int64}
PATTERNS = [(1, 2), (1, 3), (1, 4), (2, 4), (1, 8), (2, 8), (1, 5), (2, 16), (2, 32), (1, 32)]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Bit for bit: -0 is not +0, and a NaN is that NaN."""
    bits = BITS[a.element_size()]
    return a.dtype == b.dtype and torch.equal(a.contiguous().view(bits), b.contiguous().view(bits))


def compress_by_hand(matrix: torch.Tensor, axis: int) -> tuple[list[list[float]], list[list[int]]]:
    """Rows of values and of metadata words of operand A, one group at a time."""
    all_values, all_words = [], []
    for row in (matrix if axis == 1 else matrix.t()).tolist():
        row += [0.0] * (-len(row) % 16)
        values: list[float] = []
        words: list[int] = []
        for start in range(0, len(row), 4):
            group = row[start : start + 4]
            kept = [i for i, v in enumerate(group) if v != 0 or math.copysign(1, v) < 0]
            kept = sorted(kept + [i for i in range(4) if i not in kept][: 2 - len(kept)])
            values += [group[i] for i in kept]
            shift = start % 16
            words = words if shift else [*words, 0]
            words[-1] |= (kept[0] | kept[1] << 2) << shift
        all_values.append(values)
        all_words.append(words)
    return all_values, all_words


@settings(max_examples=150, deadline=None)
@given(
    shape=st.tuples(st.integers(0, 40), st.integers(0, 40)),
    axis=st.integers(0, 1),
    pattern=st.sampled_from(PATTERNS),
    function=st.sampled_from(FUNCTIONS),
    dtype=st.sampled_from(DTYPES),
    layout=st.sampled_from(["row_major", *LAYOUTS]),
    seed=st.integers(0, 2**32),
    sparsity=st.sampled_from([0.0, 0.6]),
    transposed=st.booleans(),
)
def test_round_trip(
    shape: tuple[int, int],
    axis: int,
    pattern: tuple[int, int],
    function: str,
    dtype: torch.dtype,
    layout: str,
    seed: int,
    sparsity: float,
    transposed: bool,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape[::-1] if transposed else shape, generator=generator).to(dtype)
    x = x * (torch.rand(x.shape, generator=generator) >= sparsity)  # leaves -0 behind
    x = x.t() if transposed else x
    config = SDGPConfig(prune=function, n=pattern[0], m=pattern[1])
    operand = compress(x, config, axis, seed=seed, layout=layout)
    pruned = prune(x, config, axis, seed=seed)
    assert same_bits(operand.decompress(), pruned)
    assert operand.shape == shape
    if layout == "row_major":
        t, c = shape
        kp = -(-shape[axis] // 16) * 16
        assert operand.values.shape == ((t, kp // 2) if axis == 1 else (kp // 2, c))
        assert operand.metadata.shape == ((t, kp // 16) if axis == 1 else (kp // 16, c))
        values, words = (m if axis == 1 else m.t() for m in (operand.values, operand.metadata))
        by_hand = compress_by_hand(pruned, axis)
        assert (values.tolist(), (words.int() & 0xFFFF).tolist()) == by_hand


@pytest.mark.parametrize("layout", ["row_major", *LAYOUTS])
@pytest.mark.parametrize(
    ("shape", "dim"),
    [((7,), 0), ((2, 3, 20), -1), ((2, 12, 5, 3), 1), ((2, 12, 5, 3), 0), ((2, 0, 4), 1), ((0, 3, 4), 1)],
)
def test_any_shape_comes_back(shape: tuple[int, ...], dim: int, layout: str) -> None:
    x = torch.randn(shape, dtype=torch.float32).to(torch.bfloat16)
    operand = compress(x, dim=dim, seed=1, layout=layout)
    assert same_bits(operand.decompress(), prune(x, dim=dim, seed=1))


@pytest.mark.parametrize("axis", [0, 1])
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_nan_comes_back(dtype: torch.dtype, axis: int) -> None:
    """Whatever its sign and payload, signalling or quiet."""
    bits = BITS[dtype.itemsize]
    infinity = torch.tensor(torch.inf, dtype=dtype).view(bits).item()
    pruned = torch.zeros(16, 16, dtype=bits)
    pruned[1::4, 1::4] = torch.tensor([1, 2, 3, 99]) + infinity
    pruned[3::4, 3::4] = torch.tensor([1, 2, 3, 99]) + infinity + torch.iinfo(bits).min
    pruned = pruned.view(dtype)
    assert same_bits(compress_matrix(pruned, axis).decompress(), pruned)


def test_a_negative_dimension_of_a_matrix() -> None:
    x = torch.randn(8, 20)
    for dim in (0, 1):
        operand, same = (compress(x, dim=d, seed=1) for d in (dim, dim - 2))
        assert (same.axis, same.shape) == (operand.axis, operand.shape)
        assert same_bits(same.decompress(), operand.decompress())


def test_channels_last_compresses_in_its_own_order() -> None:
    x = torch.randn(2, 32, 3, 5).contiguous(memory_format=torch.channels_last)
    pruned = prune(x, dim=1, seed=2)
    operand = compress(x, dim=1, seed=2)
    matrix = compress_matrix(pruned.permute(0, 2, 3, 1).reshape(-1, 32), 1)
    assert operand.shape == (30, 32)
    assert torch.equal(operand.values, matrix.values)
    assert torch.equal(operand.metadata, matrix.metadata)


@pytest.mark.parametrize("axis", [0, 1])
def test_size_is_nine_sixteenths(axis: int) -> None:
    x = torch.randn(64, 128).half()
    assert compress(x, dim=axis).nbytes * 16 == x.nbytes * 9


@pytest.mark.parametrize("layout", ["row_major", *LAYOUTS])
@pytest.mark.parametrize("axis", [0, 1])
def test_every_nibble_is_legal(axis: int, layout: str) -> None:
    x = torch.randn(37, 53).half() * (torch.rand(37, 53) < 0.3)
    words = compress(x, SDGPConfig(prune="magnitude"), axis, layout=layout).metadata.int() & 0xFFFF
    nibbles = torch.stack([(words >> shift) & 15 for shift in (0, 4, 8, 12)])
    assert ((nibbles & 3) < (nibbles >> 2)).all()


@pytest.mark.parametrize("axis", [0, 1])
def test_k_align(axis: int) -> None:
    pruned = prune(torch.randn(20, 20), dim=axis)
    operand = compress_matrix(pruned, axis, k_align=64)
    assert operand.values.shape[axis] == 32
    assert operand.metadata.shape[axis] == 4
    assert torch.equal(operand.decompress(), pruned)
    tiled = compress_matrix(pruned, axis, k_align=48, layout="sm90_k64")
    assert tiled.values.shape[axis] == 96, "Kp is a multiple of 48 and of the layout's tile"
    assert torch.equal(tiled.decompress(), pruned)


@pytest.mark.parametrize("prune_function", ["mvue", {"grad_input": "magnitude", "grad_weight": "rescale_magnitude"}])
def test_each_pass_has_its_function_and_its_random_numbers(prune_function: str | dict[str, str]) -> None:
    x, config = torch.randn(32, 48), SDGPConfig(prune=prune_function)
    seed = int(torch.randint(2**62, ()))
    operands = [compress(x, config, pass_name=name, seed=seed).decompress() for name in PASSES]
    assert not torch.equal(*operands)
    for name, dense in zip(PASSES, operands, strict=True):
        assert same_bits(dense, prune(x, config, pass_name=name, seed=seed))


@pytest.mark.parametrize(("n", "m"), [(2, 2), (1, 1), (2, 6), (3, 4), (4, 8), (2, 3)])
def test_patterns_that_are_no_2_4_operand(n: int, m: int) -> None:
    with pytest.raises(ValueError, match=f"2:4 operand .* got {n}:{m}"):
        compress(torch.randn(8, 16), SDGPConfig(n=n, m=m))


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match=r"layout must be one of 'row_major', 'sm80'.*got 'sm70'"):
        compress(torch.randn(8, 16), layout="sm70")
    with pytest.raises(ValueError, match="at most 2 non-zeros in each group of 4 along axis 1"):
        compress_matrix(torch.ones(4, 4), 1)
    with pytest.raises(ValueError, match=r"k_align must be a positive multiple of 16; got 24"):
        compress_matrix(torch.zeros(4, 4), 1, k_align=24)
    with pytest.raises(ValueError, match=r"k_align must be a positive multiple of 16; got 0"):
        compress_matrix(torch.zeros(4, 4), 1, k_align=0)
    with pytest.raises(ValueError, match=r"2-D and axis 0 or 1; got shape \(4, 4\) and axis -1"):
        compress_matrix(torch.zeros(4, 4), -1)
    with pytest.raises(ValueError, match=r"2-D and axis 0 or 1; got shape \(4,\) and axis 0"):
        compress_matrix(torch.zeros(4), 0)
    with pytest.raises(TypeError, match=r"pruned must be a tensor of dtype .*; got dtype torch.int32"):
        compress_matrix(torch.zeros(4, 4, dtype=torch.int32), 0)
    with pytest.raises(TypeError, match="config must be an SDGPConfig or None; got str"):
        compress(torch.zeros(4, 4), "mvue")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"dim must be an int in \[-2, 1\] for a 2-D tensor; got 2"):
        compress(torch.zeros(4, 4), dim=2)
