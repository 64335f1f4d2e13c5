"""The prune+compress kernel against the reference, bit for bit."""

from __future__ import annotations

import itertools

import pytest
import torch

from sdgp_accel.config import PruneSpec
from sdgp_accel.philox import Rng
from sdgp_accel.pruning import prune_matrix
from sdgp_accel.semi_structured import SparseOperand

DTYPES = {"f16": torch.float16, "bf16": torch.bfloat16}
SHAPES = [(1, 1), (3, 5), (16, 16), (37, 24), (130, 72), (64, 264)]
PATTERNS = [(n, m) for n in (1, 2) for m in (4, 8, 16)]
FUNCTIONS = ["magnitude", "random", "rescale_magnitude", "mvue"]


def _gradient(t: int, c: int, dtype: torch.dtype, special: bool) -> torch.Tensor:
    """Random values over many magnitudes with zeros and ties; `special` adds infinities and NaN."""
    x = torch.randn(t, c) * torch.exp2(torch.randint(-8, 8, (t, c)))
    x = torch.where(torch.rand(t, c) < 0.2, torch.zeros(()), x)
    x = torch.where(torch.rand(t, c) < 0.1, x.round(), x).to(dtype)
    if special:
        for value in (float("inf"), float("-inf"), float("nan"), torch.finfo(dtype).max):
            x[torch.rand(t, c) < 0.02] = value
    return x


def _bits(x: torch.Tensor) -> torch.Tensor:
    """Patterns with -0 as +0 and every NaN alike."""
    x = torch.where(x == 0, torch.zeros_like(x), x)
    return torch.where(x.isnan(), torch.full_like(x, float("nan")), x).view(torch.int16)


def _run(engine, extension, x: torch.Tensor, spec: PruneSpec, rng: Rng, row_stride: int, extra: int = 0):
    """Both operands and the bias gradient from the kernel."""
    t, c = x.shape
    padded = torch.full((t, row_stride), float("nan"), dtype=x.dtype)
    padded[:, :c] = x
    dy, seed = engine.put(padded), engine.put(rng.seed)
    kd, kw = -(-c // 16) * 16 + extra, -(-t // 16) * 16 + extra
    dgrad = engine.empty(t, kd // 2, dtype=x.dtype), engine.empty(t, kd // 16, dtype=torch.int16)
    wgrad = engine.empty(kw // 2, c, dtype=x.dtype), engine.empty(kw // 16, c, dtype=torch.int16)
    bias, partials = engine.empty(c), engine.empty(extension.bias_partial_rows(t, c), c)
    with engine.checked():
        extension.prune_compress(
            function=spec.function,
            n=spec.n,
            m=spec.m,
            dtype=next(name for name, dtype in DTYPES.items() if dtype == x.dtype),
            dy=dy.data_ptr(),
            t=t,
            c=c,
            row_stride=row_stride,
            dgrad_values=dgrad[0].data_ptr(),
            dgrad_metadata=dgrad[1].data_ptr(),
            dgrad_k=kd,
            wgrad_values=wgrad[0].data_ptr(),
            wgrad_metadata=wgrad[1].data_ptr(),
            wgrad_k=kw,
            bias=bias.data_ptr(),
            bias_partials=partials.data_ptr(),
            seed=seed.data_ptr(),
            rank=rng.rank,
            eps=spec.eps,
        )
    operands = [SparseOperand(v.cpu(), m.cpu(), axis, (t, c)) for axis, (v, m) in ((1, dgrad), (0, wgrad))]
    return *operands, bias.cpu()


def _check_legal(metadata: torch.Tensor) -> None:
    nibbles = (metadata.int()[..., None] >> torch.arange(0, 16, 4)) & 15
    assert (nibbles >> 2 > (nibbles & 3)).all()


CASES = list(itertools.product(FUNCTIONS, PATTERNS, DTYPES))


@pytest.mark.timeout(1800)  # the first test compiles the extension
@pytest.mark.parametrize(("function", "pattern", "dtype"), CASES, ids=[f"{f}-{n}:{m}-{d}" for f, (n, m), d in CASES])
def test_operands_equal_the_reference(engine, extension, function, pattern, dtype):
    spec = PruneSpec(function, *pattern, scope="group", eps=1e-3 if function == "rescale_magnitude" else 0.0)
    seed = torch.randint(-(2**62), 2**62, (2,))
    for (t, c), special in (
        (SHAPES[torch.randint(len(SHAPES), ()).item()], False),
        ((130, 72), False),
        ((37, 24), True),
    ):
        x = _gradient(t, c, DTYPES[dtype], special)
        rank = int(torch.randint(8, ()))
        dgrad, wgrad, bias = _run(engine, extension, x, spec, Rng(seed, rank, 0), c)
        for pass_index, operand in enumerate((dgrad, wgrad)):
            reference = prune_matrix(x, spec, operand.axis, t, Rng(seed, rank, pass_index))
            assert torch.equal(_bits(operand.decompress()), _bits(reference)), f"axis {operand.axis} of {t} x {c}"
            _check_legal(operand.metadata)
        if not special:
            torch.testing.assert_close(
                bias.double(), x.double().sum(0), rtol=1e-5, atol=1e-5 * float(x.abs().sum(0).max())
            )


@pytest.mark.parametrize(
    ("t", "c", "row_stride", "extra"), [(1, 1, 1, 0), (5, 3, 7, 16), (100, 33, 40, 0), (64, 96, 128, 112)]
)
def test_odd_shapes_strides_and_padding(engine, extension, t, c, row_stride, extra):
    """Nothing is read between rows or beyond them (there are NaNs), and padding holds zeros with legal metadata."""
    x = _gradient(t, c, torch.bfloat16, False)
    spec = PruneSpec("mvue", 2, 4, scope="group")
    rng = Rng(torch.tensor([7, 11]), 0, 0)
    for operand in _run(engine, extension, x, spec, rng, row_stride, extra)[:2]:
        reference = prune_matrix(x, spec, operand.axis, t, rng._replace(pass_index=1 - operand.axis))
        assert torch.equal(_bits(operand.decompress()), _bits(reference))
        _check_legal(operand.metadata)
        k = (t, c)[operand.axis]
        beyond = operand.values.narrow(
            operand.axis, -(-k // 4) * 2, operand.values.shape[operand.axis] - -(-k // 4) * 2
        )
        assert not beyond.any()


def test_bytes_moved(engine, extension):
    """Per value of a large layer: 2 bytes read, 9/16 of 2 written twice; measured by the simulator."""
    if engine.name != "sim":
        pytest.skip("the simulator counts bytes")
    t, c = 512, 256
    x = _gradient(t, c, torch.float16, False)
    engine.counters()
    _run(engine, extension, x, PruneSpec("magnitude", 2, 4, scope="group"), Rng(torch.tensor([1, 2]), 0, 0), c)
    counters = engine.counters()
    # The bias gradient's partial sums: c floats per block of positions, written and read again.
    bias = 4 * c * (2 * extension.bias_partial_rows(t, c) + 1)
    assert 2 * t * c <= counters.global_load <= 2 * t * c + bias
    assert 2.25 * t * c <= counters.global_store <= 2.25 * t * c + bias


@pytest.mark.parametrize(
    ("argument", "value"),
    [("dy", 0), ("dy", 3), ("t", 0), ("c", -1), ("row_stride", 1), ("dgrad_k", 8), ("dtype", "f64")],
)
def test_bad_arguments_are_refused_by_name(extension, argument, value):
    good = {"function": "magnitude", "n": 2, "m": 4, "dtype": "f16", "dy": 256, "t": 4, "c": 16, "row_stride": 16}
    good |= {"dgrad_values": 256, "dgrad_metadata": 256, "dgrad_k": 16}
    with pytest.raises(ValueError, match="no kernel" if argument == "dtype" else argument):
        extension.prune_compress(**(good | {argument: value}))
