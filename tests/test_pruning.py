"""Every pruning rule against the per-group oracle, and the promises around it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import sdgp_accel.pruning as pruning
from sdgp_accel.config import FUNCTIONS, SDGPConfig
from sdgp_accel.pruning import prune
from tests import oracle

DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64]


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Equal bit for bit, all NaNs alike, +0 and -0 alike."""
    return a.shape == b.shape and a.dtype == b.dtype and bool(((a == b) | (a.isnan() & b.isnan())).all())


@st.composite
def tensors(draw: st.DrawFn, max_size: int = 400) -> torch.Tensor:
    """Tensors of 1 to 4 dimensions whose values make every rule's corner cases likely."""
    shape = draw(st.lists(st.integers(1, 40), min_size=1, max_size=4).filter(lambda s: math.prod(s) <= max_size))
    dtype = draw(st.sampled_from(DTYPES))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    kind = draw(st.sampled_from(["normal", "ties", "zeros", "wide", "huge", "tiny", "constant"]))
    if kind == "ties":
        x = (x * 1.5).round()
    elif kind == "zeros":
        x = x * (torch.rand(shape, generator=generator) < 0.3)
    elif kind == "wide":
        x = x * 2.0 ** torch.randint(-160, 140, shape, generator=generator)
    elif kind == "huge":
        x = x.sign() * torch.finfo(dtype).max * torch.rand(shape, generator=generator, dtype=torch.float64)
    elif kind == "tiny":
        x = x * torch.finfo(dtype).smallest_normal
    elif kind == "constant":
        x = torch.full(shape, 0.3, dtype=torch.float64)
    limit = torch.finfo(dtype).max
    x = x.clamp(-limit, limit).to(dtype)
    if draw(st.booleans()):
        special = torch.rand(shape, generator=generator)
        x[special < 0.03] = math.inf
        x[special > 0.97] = math.nan
        x[(special > 0.5) & (special < 0.53)] = -math.inf
    return x


patterns = st.integers(1, 32).flatmap(lambda m: st.tuples(st.integers(1, m), st.just(m))) | st.sampled_from(
    [(1, 4), (2, 4), (1, 8), (2, 8), (4, 8), (2, 16), (8, 16), (16, 32)]
)


@settings(max_examples=400, deadline=None)
@given(
    x=tensors(),
    pattern=patterns,
    function=st.sampled_from(FUNCTIONS),
    data=st.data(),
    seed=st.integers(-(2**63), 2**63 - 1),
    eps=st.sampled_from([0.0, 1e-4]),
    piece=st.sampled_from([16, 100, 1 << 18]),
)
def test_matches_oracle(
    x: torch.Tensor, pattern: tuple[int, int], function: str, data: st.DataObject, seed: int, eps: float, piece: int
) -> None:
    n, m = pattern
    dim = data.draw(st.integers(-x.ndim, x.ndim - 1), label="dim")
    permutation = data.draw(st.permutations(range(x.ndim)), label="memory order")
    x = x.permute(permutation).contiguous().permute(sorted(range(x.ndim), key=permutation.__getitem__))
    config = SDGPConfig(prune=function, n=n, m=m, scope="group", eps=eps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "CPU_PIECE", piece)
        pruned = prune(x, config, dim, seed=seed)
    assert pruned.stride() == torch.empty_like(x).stride()
    expected = x if n == m else oracle.prune(x, function, n, m, dim, eps=eps, seed=(seed, 0))
    assert same_bits(pruned, expected)
