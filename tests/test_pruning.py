"""Every pruning rule against the per-group oracle, and the promises around it."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import FakeTensorMode

import sdgp_accel.pruning as pruning
from sdgp_accel import group_rules
from sdgp_accel.config import FUNCTIONS, PruneSpec, SDGPConfig
from sdgp_accel.philox import Rng
from sdgp_accel.pruning import prune, prune_matrix
from sdgp_accel.semi_structured import compress
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


@settings(max_examples=80, deadline=None)
@given(
    samples=st.integers(1, 4),
    positions=st.integers(1, 30),
    channels=st.integers(1, 20),
    axis=st.integers(0, 1),
    scope=st.sampled_from(["group", "sample_channel", "tensor"]),
    pattern=st.sampled_from([(1, 4), (2, 4), (3, 5), (4, 8)]),
    dtype=st.sampled_from(DTYPES),
    eps=st.sampled_from([0.0, 1e-4]),
    seed=st.integers(0, 2**32),
    piece=st.sampled_from([16, 100, 1 << 18]),
    special=st.sampled_from([None, math.inf, -math.inf, math.nan, "overflow"]),
)
def test_scopes_of_a_matrix(
    samples: int,
    positions: int,
    channels: int,
    axis: int,
    scope: str,
    pattern: tuple[int, int],
    dtype: torch.dtype,
    eps: float,
    seed: int,
    piece: int,
    special: float | str | None,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    # Multiples of 2^-6: the sums are exact, whatever their order.
    x = (torch.randn(samples * positions, channels, generator=generator) * 64).round() / 64
    x = x.to(dtype)
    if special == "overflow":
        x[:: positions + 1] = torch.finfo(dtype).max
    elif special is not None:
        x[seed % x.shape[0], seed % channels] = special
    spec = PruneSpec("rescale_magnitude", *pattern, scope=scope, eps=eps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pruning, "CPU_PIECE", piece)
        pruned = prune_matrix(x, spec, axis, positions, None)
    grouped = x.view(samples, positions, channels)
    if scope == "group":
        expected = oracle.prune(x, "rescale_magnitude", *pattern, axis, eps=eps)
    elif scope == "tensor":
        expected = oracle.prune(x, "rescale_magnitude", *pattern, axis, eps=eps, scope_dims=(0, 1))
    else:
        magnitude = oracle.prune(x, "magnitude", *pattern, axis).view(samples, positions, channels)
        expected = oracle.rescale(grouped, magnitude, (1,), eps).view_as(x)
    assert same_bits(pruned, expected)


@pytest.mark.parametrize(("shape", "sum_dims"), [((3, 8, 4, 5), (2, 3)), ((3, 8, 6), (1,))])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_sample_channel_scope_of_a_tensor(shape: tuple[int, ...], sum_dims: tuple[int, ...], dim: int) -> None:
    x = torch.randn(shape, dtype=torch.float64)
    config = SDGPConfig(prune="rescale_magnitude", scope="sample_channel")
    pruned = prune(x, config, dim)
    magnitude = prune(x, SDGPConfig(prune="magnitude"), dim)
    scale = x.abs().sum(sum_dims, keepdim=True) / magnitude.abs().sum(sum_dims, keepdim=True)
    torch.testing.assert_close(pruned, magnitude * scale)
    torch.testing.assert_close(pruned.abs().sum(sum_dims), x.abs().sum(sum_dims))


def test_default_scope() -> None:
    config = SDGPConfig(prune="rescale_magnitude")
    for shape, scope in (((2, 8, 4, 4), "sample_channel"), ((6, 8), "group"), ((2, 6, 8), "group")):
        x = torch.randn(shape)
        explicit = SDGPConfig(prune="rescale_magnitude", scope=scope)  # type: ignore[arg-type]
        assert torch.equal(prune(x, config, 1), prune(x, explicit, 1))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_memory_formats_change_nothing(function: str, dtype: torch.dtype) -> None:
    x = torch.randn(3, 10, 5, 7).to(dtype)
    config = SDGPConfig(prune=function, n=3, m=8)
    expected = prune(x, config, 1, seed=4)
    expanded = x[:1].expand(3, -1, -1, -1)
    forms = {
        "channels_last": x.contiguous(memory_format=torch.channels_last),
        "permuted": x.permute(3, 1, 0, 2).contiguous().permute(2, 1, 3, 0),
        "every other": torch.stack([x, x], -1)[..., 0],
        "slice": torch.cat([x, x], 1)[:, :10],
    }
    for name, form in forms.items():
        pruned = prune(form, config, 1, seed=4)
        assert same_bits(pruned, expected), name
        assert pruned.stride() == torch.empty_like(form).stride(), name
    assert same_bits(prune(expanded, config, 1, seed=4), prune(expanded.contiguous(), config, 1, seed=4))


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("axis", [0, 1])
def test_matrix_agrees_with_prune(function: str, axis: int) -> None:
    x, seed = torch.randn(24, 40), torch.tensor([11, 12])
    config = SDGPConfig(prune=function, scope="group")
    for index, name in enumerate(("grad_input", "grad_weight")):
        matrix = prune_matrix(x, PruneSpec(function, 2, 4), axis, 24, Rng(seed, 0, index))
        assert same_bits(matrix, prune(x, config, axis, pass_name=name, seed=seed))  # type: ignore[arg-type]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("shape", [(0,), (0, 8), (8, 0), (2, 0, 3, 3), (2, 4, 0, 3)])
def test_empty_tensors(function: str, shape: tuple[int, ...]) -> None:
    for dim in range(len(shape)):
        assert prune(torch.empty(shape), SDGPConfig(prune=function), dim).shape == shape


@pytest.mark.parametrize("function", FUNCTIONS)
def test_n_equal_to_m_keeps_everything(function: str) -> None:
    x = torch.randn(5, 9, requires_grad=True)
    pruned = prune(x, SDGPConfig(prune=function, n=4, m=4))
    assert torch.equal(pruned, x)
    assert not pruned.requires_grad  # as every pruned tensor
    assert pruned.data_ptr() != x.data_ptr()


@pytest.mark.parametrize("function", ["magnitude", "random", "mvue"])  # rescaling may overflow, as any product may
@pytest.mark.parametrize("dtype", DTYPES)
def test_finite_in_finite_out_and_at_most_n(function: str, dtype: torch.dtype) -> None:
    limit = torch.finfo(dtype).max
    x = (torch.rand(200, 64, dtype=torch.float64) * 2 - 1).mul(limit).to(dtype)
    for n, m in ((1, 4), (2, 4), (3, 7), (16, 32)):
        pruned = prune(x, SDGPConfig(prune=function, n=n, m=m))
        assert pruned.isfinite().all()
        padded = torch.nn.functional.pad(pruned, (0, -64 % m))
        assert ((padded != 0).unflatten(1, (-1, m)).sum(-1) <= n).all()


def test_tiny_values_beside_a_large_one_do_not_exceed_n() -> None:
    # The capped 1 leaves k = 1 for values whose k / sum overflows.
    x = torch.tensor([1, 1e-40, 1e-40, 1e-40]).repeat(100)
    pruned = prune(x, SDGPConfig())
    assert ((pruned != 0).view(-1, 4).sum(1) == 2).all()


@pytest.mark.parametrize("n", [15, 16, 17, 24, 31])
def test_many_tiny_values_beside_a_large_one_do_not_exceed_n(n: int) -> None:
    """The more are left to keep, the sooner k / sum in units of 2^-24 overflows."""
    x = torch.full((64, 32), 1e-38)
    x[torch.arange(64), torch.randint(32, (64,))] = 1
    pruned = prune(x, SDGPConfig(n=n, m=32))
    assert ((pruned != 0).sum(1) <= n).all()
    assert (pruned.amax(1) == 1).all()


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("scope", ["group", "sample_channel", "tensor"])
def test_non_finite_values_survive(scope: str, function: str, value: float) -> None:
    for position in range(8):
        x = torch.randn(3, 8, 5, 5)
        x[1, position, 2, 3] = value
        pruned = prune(x, SDGPConfig(prune=function, scope=scope), 1)  # type: ignore[arg-type]
        assert not pruned[1, position, 2, 3].isfinite()
        if function != "rescale_magnitude" or scope == "group":
            group = x[1, position // 4 * 4 :, 2, 3][:4]
            expected = oracle.prune(group, "magnitude", 2, 4, 0)
            assert same_bits(pruned[1, position // 4 * 4 :, 2, 3][:4], expected)


@pytest.mark.parametrize(("n", "m"), [(1, 2), (1, 4), (2, 4), (3, 7), (2, 8), (8, 16), (16, 32)])
def test_mvue_is_unbiased_with_the_least_variance(n: int, m: int) -> None:
    generator = torch.Generator().manual_seed(n * 100 + m)
    x = torch.randn(m, generator=generator, dtype=torch.float64)
    draws = 40_000
    pruned = prune(x.float().repeat(draws, 1), SDGPConfig(n=n, m=m), seed=5).double()
    p = inclusion_probabilities(x, n)
    variance = x**2 * (1 / p - 1)
    error = pruned.mean(0) - x.float()
    assert (error.abs() <= 5 * (variance / draws).sqrt() + 1e-6).all()
    torch.testing.assert_close((pruned != 0).double().mean(0), p, atol=5 * 0.5 / math.sqrt(draws), rtol=0)
    torch.testing.assert_close(pruned.var(0).sum(), variance.sum(), rtol=0.1, atol=1e-3)
    # No other inclusion probabilities that keep n values on average do better.
    for _ in range(100):
        other = inclusion_probabilities(torch.rand(m, generator=generator, dtype=torch.float64) + 0.05, n)
        assert (x**2 * (1 / other - 1)).sum() >= variance.sum() * (1 - 1e-9)


def inclusion_probabilities(x: torch.Tensor, n: int) -> torch.Tensor:
    """min(1, c |x|) with sum n, by bisection."""
    low, high = 0.0, 1e9
    for _ in range(200):
        c = (low + high) / 2
        low, high = (c, high) if (c * x.abs()).clamp(max=1).sum() < n else (low, c)
    return (high * x.abs()).clamp(max=1)


def test_random_keeps_every_subset_equally_often() -> None:
    draws = 60_000
    kept = prune(torch.ones(draws, 4), SDGPConfig(prune="random"), seed=9)
    subsets = torch.bincount((kept * torch.tensor([1, 2, 4, 8])).sum(1).int(), minlength=16)
    assert subsets[[3, 5, 6, 9, 10, 12]].sum() == draws
    deviation = math.sqrt(draws / 6 * 5 / 6)
    assert ((subsets[[3, 5, 6, 9, 10, 12]] - draws / 6).abs() < 5 * deviation).all()


@pytest.mark.parametrize("groups", [1_500_030, 1_500_031])
def test_pieces_hold_whole_groups(groups: int) -> None:
    """A thread's share of the values is no multiple of 4."""
    x = torch.randn(groups, 4)
    kept = prune(x, SDGPConfig(prune="magnitude"))
    largest = x.abs().sort(dim=1, descending=True, stable=True).indices[:, :2]  # of so many groups some have ties
    assert torch.equal(kept, torch.zeros_like(x).scatter(1, largest, x.gather(1, largest)))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_the_default_device_changes_nothing(function: str) -> None:
    x, config = torch.randn(64, 96), SDGPConfig(prune=function)
    expected = prune(x, config, seed=3)
    with torch.device("meta"):  # as torch.set_default_device, of whatever x is not on
        assert torch.equal(prune(x, config, seed=3), expected)
        assert torch.equal(compress(x, config, seed=3, layout="sm90_k64").decompress(), expected)


def test_seeds() -> None:
    x, config = torch.randn(64, 64), SDGPConfig()
    torch.manual_seed(1)
    first, second = prune(x, config), prune(x, config)
    torch.manual_seed(1)
    assert torch.equal(prune(x, config), first)
    assert not torch.equal(first, second)
    assert torch.equal(prune(x, config, seed=7), prune(x, config, seed=torch.tensor([7, 0])))
    assert torch.equal(prune(x, config, seed=7), prune(x, config, seed=Rng(torch.tensor([7, 0]))))
    assert torch.equal(prune(x, config, seed=(7, -5)), prune(x, config, seed=torch.tensor([7, -5])))
    assert not torch.equal(prune(x, config, seed=7), prune(x, config, seed=7, pass_name="grad_weight"))
    assert not torch.equal(prune(x, config, seed=7), prune(x, config, seed=Rng(torch.tensor([7, 0]), rank=1)))
    # Pruning that needs no random numbers must not advance the generator.
    state = torch.get_rng_state()
    prune(x, SDGPConfig(prune="magnitude"))
    assert torch.equal(torch.get_rng_state(), state)


def test_prune_function_of_the_pass() -> None:
    x = torch.randn(16, 16)
    config = SDGPConfig(prune={"grad_input": "magnitude", "grad_weight": "rescale_magnitude"})
    for name in ("grad_input", "grad_weight"):
        single = SDGPConfig(prune=getattr(config.functions, name))
        assert torch.equal(prune(x, config, pass_name=name), prune(x, single))  # type: ignore[arg-type]


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("scope", ["group", "sample_channel", "tensor"])
def test_nothing_waits_for_a_gpu(function: str, scope: str) -> None:
    # A fake CUDA tensor has no values: looking at one from the host raises.
    with FakeTensorMode():
        x = torch.empty(8, 64, 7, 7, device="cuda")
        try:
            x[0]
        except RuntimeError:
            pytest.skip(f"torch {torch.__version__} needs a CUDA driver to index a fake CUDA tensor")
        for n, m in ((2, 4), (3, 5), (16, 32)):
            pruned = prune(x, SDGPConfig(prune=function, n=n, m=m, scope=scope), 1)  # type: ignore[arg-type]
            assert pruned.shape == x.shape
            assert pruned.device.type == "cuda"


@pytest.mark.parametrize(
    ("error", "message", "call"),
    [
        (TypeError, r"x must be a tensor of dtype .*got dtype torch.int64", lambda: prune(torch.arange(8))),
        (TypeError, r"got dtype torch.complex64", lambda: prune(torch.zeros(8, dtype=torch.complex64))),
        (TypeError, r"x must be a tensor .* got list", lambda: prune([1.0])),
        (ValueError, r"at least 1 dimension", lambda: prune(torch.tensor(1.0))),
        (ValueError, r"strided tensor", lambda: prune(torch.eye(4).to_sparse())),
        (TypeError, r"config must be an SDGPConfig or None; got str", lambda: prune(torch.ones(8), "mvue")),
        (ValueError, r"dim must be an int in \[-2, 1\].*got 2", lambda: prune(torch.ones(8, 8), dim=2)),
        (ValueError, r"dim must be an int in \[-2, 1\].*got -3", lambda: prune(torch.ones(8, 8), dim=-3)),
        (TypeError, r"dim must be an int .*got 0.5", lambda: prune(torch.ones(8, 8), dim=0.5)),
        (ValueError, r"pass_name must be one of .*got 'dgrad'", lambda: prune(torch.ones(8), pass_name="dgrad")),
        (ValueError, r"seed must be a 64-bit int.*got 1.5", lambda: prune(torch.ones(8), seed=1.5)),
        (ValueError, r"seed must be a 64-bit int", lambda: prune(torch.ones(8), seed=1 << 63)),
        (ValueError, r"int64 of shape \[2\].*got torch.float32", lambda: prune(torch.ones(8), seed=torch.ones(2))),
        (
            ValueError,
            r'scope "sample_channel" needs a 4-D x .* got shape \(4, 8\)',
            lambda: prune(torch.ones(4, 8), SDGPConfig(prune="rescale_magnitude", scope="sample_channel")),
        ),
        (
            ValueError,
            r"rng must be given for the function 'mvue'; got None",
            lambda: prune_matrix(torch.ones(4, 4), PruneSpec("mvue", 2, 4), 1, 4, None),
        ),
        (
            ValueError,
            r"dy must be 2-D and axis 0 or 1; got shape \(4,\) and axis 1",
            lambda: prune_matrix(torch.ones(4), PruneSpec("magnitude", 2, 4), 1, 4, None),
        ),
        (
            ValueError,
            r"positive divisor of dy's 4 rows; got 3",
            lambda: prune_matrix(torch.ones(4, 4), PruneSpec("rescale_magnitude", 2, 4, "sample_channel"), 1, 3, None),
        ),
    ],
)
def test_bad_arguments(error: type[Exception], message: str, call: Callable[[], object]) -> None:
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("dtype", pruning.DTYPES)
def test_scratch_is_no_larger_than_the_tensor(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """On two threads: 6 values of float32 at least for each value of a piece."""
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    x = torch.empty(1, dtype=dtype).expand(64 * 256 * 28 * 28)
    largest = max(piece[0].stop - piece[0].start for piece in pruning._pieces(x.shape, 1, x))
    assert 2 * 6 * max(4, x.element_size()) * largest <= x.numel() * x.element_size()


def test_result_is_an_ordinary_tensor_also_under_compile() -> None:
    x, config = torch.randn(8, 16, requires_grad=True), SDGPConfig(prune="magnitude")
    pruned = prune(x, config)
    assert not pruned.is_inference()
    assert not pruned.requires_grad
    compiled = torch.compile(lambda t: prune(t, config) * 2, backend="aot_eager")
    assert torch.equal(compiled(x), pruned * 2)


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_mvue_at_the_boundaries_of_the_uniform(n: int, dtype: torch.dtype) -> None:
    # With equal magnitudes the running sums are multiples of n * 2^22: a uniform that meets one tells < from <=.
    near = [i * 2**22 + d for i in range(5) for d in (-1, 0, 1)]
    u = torch.tensor([v for v in near if 0 <= v < 2**24])
    x = torch.tensor([3.0, -3.0, 3.0, 3.0], dtype=dtype).view(4, 1).repeat(1, len(u))
    pruned = group_rules.mvue(x, n, lambda _: iter([u << 8]), group_rules.Scratch(x.device))
    group = list(x[:, 0].numpy())
    expected = [oracle.mvue_group(group, n, int(v), float(torch.finfo(dtype).max)) for v in u]
    assert pruned.t().tolist() == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("group", [[2.0, 4.0, 3.0, 9.0], [1.0, 3.0, 3.0, 7.0], [1.0, 5.0, 4.0, 10.0]])
def test_mvue_caps_what_reaches_one_exactly(group: list[float], dtype: torch.dtype) -> None:
    u = torch.arange(0, 1 << 24, 65521)
    x = torch.tensor(group, dtype=dtype).view(4, 1).repeat(1, len(u))
    pruned = group_rules.mvue(x, 2, lambda _: iter([u << 8]), group_rules.Scratch(x.device))
    values = list(x[:, 0].numpy())
    assert pruned.t().tolist() == [oracle.mvue_group(values, 2, int(v), torch.finfo(dtype).max) for v in u]
    assert (pruned[3] == group[3]).all()


@pytest.mark.parametrize("exponent", [-15, -30, -60, -90])
def test_mvue_samples_what_is_tiny_beside_a_capped_value(exponent: int) -> None:
    u = torch.arange(0, 1 << 24, 65521)
    x = torch.tensor([1.0, *(value * 2.0**exponent for value in (1, 2, 3))]).view(4, 1).repeat(1, len(u))
    pruned = group_rules.mvue(x, 2, lambda _: iter([u << 8]), group_rules.Scratch(x.device))
    assert (pruned[0] == 1).all()
    kept = (pruned[1:] != 0).float().mean(1)
    assert torch.allclose(kept, torch.tensor([1, 2, 3]) / 6, atol=0.01)


def test_mvue_drops_negative_zeros() -> None:
    """In groups that keep all they have, too: what is dropped is +0, so that every backend gives the same bits."""
    x = torch.tensor([-0.0, 1, 2, 3, -0.0, 1, -0.0, 2, -0.0, -0.0, -0.0, -0.0, -0.0, 1, 0, -0.0])
    pruned = prune(x, seed=0)
    assert not pruned[pruned == 0].signbit().any()


def test_all_nans_are_equal() -> None:
    quiet, signalling = 0x7FC00000, 0x7F800002
    x = torch.tensor([0, signalling, quiet, 0, quiet, -1, 0, signalling], dtype=torch.int32).view(torch.float32)
    kept = prune(x, SDGPConfig(prune="magnitude", n=1)).isnan()
    assert kept.tolist() == [False, True, False, False, True, False, False, False]
