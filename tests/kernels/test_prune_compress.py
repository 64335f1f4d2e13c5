"""The prune+compress kernel against prune_matrix and compress_matrix, bit for bit, on fresh random inputs."""

from __future__ import annotations

import itertools
from typing import Any, NamedTuple

import pytest
import torch

from sdgp_accel.config import FUNCTIONS, PruneSpec
from sdgp_accel.layouts import LAYOUTS
from sdgp_accel.philox import GroupWords, Rng
from sdgp_accel.pruning import prune_matrix
from sdgp_accel.semi_structured import SparseOperand, compress_matrix
from tests.kernels.products import assert_close

pytestmark = pytest.mark.timeout(1800)  # the first test may have to compile the kernels

DTYPES = {torch.float16: "f16", torch.bfloat16: "bf16"}
PATTERNS = ((2, 4), (1, 4), (2, 8), (1, 8), (2, 16), (1, 16))
KINDS = ("normal", "many zeros", "ones and zeros", "wide", "ties", "huge", "tiny", "dwarfed", "twins", "not finite")


class Outputs(NamedTuple):
    dgrad: SparseOperand | None
    wgrad: SparseOperand | None
    bias: torch.Tensor | None


def make_gradient(kind, t, c, dtype, pad=0):
    """[t, c] with a row stride of c + pad."""
    x = torch.randn(t, c + pad)
    if kind == "many zeros":
        x *= torch.rand_like(x) < 0.4
    if kind == "ones and zeros":
        x = torch.randint(-1, 2, x.shape).float()
    if kind == "wide":  # exponents from end to end of the dtype
        low, high = (-24, 15) if dtype == torch.float16 else (-130, 126)
        x *= torch.exp2(torch.randint(low, high, x.shape).float())
    if kind == "ties":
        x = torch.randint(-2, 3, x.shape) * torch.exp2(torch.randint(-24, 1, x.shape).float())
    if kind == "dwarfed":  # of four channels, one is at least as large as two others together, one a few 2^-24 of that
        a, b = torch.rand(2, t, -(-(c + pad) // 4)) + 0.5
        large, tiny = (a + b) * torch.randint_like(a, 1, 4), (a + b) * torch.randint_like(a, 9) * 2.0**-24
        quads = torch.stack((a, b, large, tiny), -1)
        x = quads.gather(-1, torch.rand_like(quads).argsort(-1)).flatten(1)[:, : c + pad] * x.sign()
    if kind == "twins":  # of four channels, two are the same, the others about the last bit of their sum
        quads = (torch.rand(t, -(-(c + pad) // 4)) * 1024 + 512).unsqueeze(-1).repeat(1, 1, 4)
        quads[..., 2:] *= torch.exp2(-torch.randint(23, 28, quads[..., 2:].shape).float())
        x = quads.gather(-1, torch.rand_like(quads).argsort(-1)).flatten(1)[:, : c + pad] * x.sign()
    if kind == "tiny":  # where the dtype becomes denormal
        x *= torch.finfo(dtype).tiny * torch.exp2(torch.randint(-4, 12, (t, 1)).float())
    if kind == "huge":
        x *= torch.finfo(dtype).max
    x = x.to(dtype) + 0  # no -0: which of several zeros is stored is free
    if kind == "not finite":
        for value in (torch.finfo(dtype).max, float("nan"), float("inf"), -float("inf")):
            x[torch.rand_like(x, dtype=torch.float32) < 0.08] = value
    return x[:, :c]


def new_seed():
    return torch.randint(-(2**63), 2**63 - 1, (2,))


def run(
    engine, x, spec, seed, rank=0, positions_per_sample=1, k_align=16, dgrad=True, wgrad=True, bias=None,
    layout="row_major", pitch=None, whole_words=False,
):  # fmt: skip
    """The kernel's outputs for the gradient x; wgrad's with rows of `pitch` channels, default those of x.

    whole_words: dgrad's metadata in rows of whole chunks, what fills them up checked here.

    bias: dtype of the bias gradient, if it is wanted.
    """
    (t, c), device_x = x.shape, engine.put(x)
    pitch = pitch or c
    shape: dict[str, Any] = {"n": spec.n, "m": spec.m, "eps": spec.eps, "dtype": DTYPES[x.dtype]}
    shape |= {"t": t, "c": c, "row_stride": device_x.stride(0)}
    lengths: dict[str, Any] = {"positions_per_sample": None}
    arguments: dict[str, Any] = {"dy": device_x.data_ptr(), "rank": rank}
    if isinstance(seed, tuple):
        arguments["key"], arguments["offset"] = seed
    else:
        device_seed = engine.put(seed)
        arguments["seed"] = device_seed.data_ptr()
    operands = [None, None]
    for axis, name, wanted in ((1, "dgrad", dgrad), (0, "wgrad", wgrad)):
        if wanted:
            k = -(-x.shape[axis] // k_align) * k_align
            words = -(-k // 128) * 8 if whole_words else k // 16
            shapes = ((t, k // 2), (t, words)) if axis == 1 else ((k // 2, pitch), (k // 16, pitch))
            values, metadata = engine.empty(*shapes[0], dtype=x.dtype), engine.empty(*shapes[1], dtype=torch.int16)
            if layout != "row_major":
                padding = torch.full(shapes[1] if axis == 1 else shapes[1][::-1], 0x4444, dtype=torch.int16)
                metadata = engine.put(LAYOUTS[layout].encode(padding))
            operands[1 - axis] = SparseOperand(values, metadata, axis, (t, c if axis == 1 else pitch))
            arguments |= {f"{name}_values": values.data_ptr(), f"{name}_metadata": metadata.data_ptr()}
            lengths[f"{name}_k"] = k
            if axis == 1:
                lengths["dgrad_words"] = words
    keep = []
    if spec.scope != "group" and spec.function == "rescale_magnitude":
        samples = positions_per_sample if spec.scope == "sample_channel" else 0
        scopes = t // samples * c if samples else 1
        keep = [engine.empty(engine.kernels.scope_workspace(t, c, samples), dtype=torch.float64)]
        keep += [engine.empty(scopes, dtype=torch.float32) for _ in range(2)]
        scales = {"dgrad_scale": keep[1].data_ptr(), "wgrad_scale": keep[2].data_ptr()}
        scope_scales = engine.kernels.ScopeScales(**shape, positions_per_sample=samples)
        with engine.launching():
            scope_scales(dy=device_x.data_ptr(), sums=keep[0].data_ptr(), **scales)
        arguments |= scales
        lengths["positions_per_sample"] = samples
    db = None
    if bias is not None:
        db = engine.empty(c, dtype=bias)
        keep.append(engine.empty(engine.kernels.bias_partial_rows(t, c), c, dtype=torch.float32))
        arguments |= {"bias": db.data_ptr(), "bias_partials": keep[-1].data_ptr()}
    launch = engine.kernels.PruneCompress(
        function=spec.function, metadata_layout=layout, wgrad_pitch=pitch, bias_is_float=bias == torch.float32,
        **shape, **lengths,
    )  # fmt: skip
    with engine.launching():
        launch(**arguments)
    operands = [o and SparseOperand(o.values.cpu(), o.metadata.cpu(), o.axis, o.shape) for o in operands]
    if dgrad and whole_words:
        words = operands[0].values.shape[1] // 8
        assert (operands[0].metadata[:, words:] == 0x4444).all()
        operands[0] = operands[0]._replace(metadata=operands[0].metadata[:, :words])
    return Outputs(*operands, db)


def assert_same(operand, x, spec, rng, positions_per_sample=1, k_align=16):
    """The operand is what the reference makes of x."""
    pruned = prune_matrix(x, spec, operand.axis, positions_per_sample, rng)
    expected = compress_matrix(pruned, operand.axis, k_align=k_align)
    assert torch.equal(operand.metadata, expected.metadata)
    same = (operand.values == expected.values) | (operand.values.isnan() & expected.values.isnan())
    assert same.all()


def check(engine, x, spec, positions_per_sample=1, k_align=16, rank=3):
    seed = new_seed() if torch.rand(()) < 0.5 else tuple(new_seed().tolist())
    whole_words = bool(torch.rand(()) < 0.5)
    outputs = run(engine, x, spec, seed, rank, positions_per_sample, k_align, whole_words=whole_words)
    for operand in outputs[:2]:
        assert_same(operand, x, spec, Rng(seed, rank, 1 - operand.axis), positions_per_sample, k_align)


@pytest.mark.parametrize("scope", ["group", "sample_channel"])
@pytest.mark.parametrize(("function", "m"), [(function, m) for function in FUNCTIONS for m in (4, 8)])
def test_rows_of_wgrad_fill_whole_chunks(engine, function, m, scope):
    if scope != "group" and function != "rescale_magnitude":
        pytest.skip("no scope")
    t, c, pitch = 3 * 21, 13, 16
    x, seed, spec = make_gradient("normal", t, c, torch.bfloat16), new_seed(), PruneSpec(function, 2, m, scope)
    operand = run(engine, x, spec, seed, positions_per_sample=21, dgrad=False, pitch=pitch).wgrad
    inside = SparseOperand(operand.values[:, :c], operand.metadata[:, :c], 0, (t, c))
    assert_same(inside, x, spec, Rng(seed, 0, 1), 21)
    assert not operand.values[:, c:].any()
    nibbles = torch.stack([operand.metadata[:, c:].int() >> shift & 15 for shift in (0, 4, 8, 12)])
    assert (nibbles % 4 < nibbles // 4).all()


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_equals_reference(engine, function, n, m):
    few = zip(DTYPES, ("normal", "ties"), strict=True)
    for dtype, kind in itertools.product(DTYPES, KINDS) if engine.large else few:
        eps = 0.25 if kind == "normal" else 0.0
        check(engine, make_gradient(kind, 37, 24, dtype, pad=8), PruneSpec(function, n, m, eps=eps))


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kinds_of_values(engine, function, kind):
    for dtype in DTYPES:
        check(engine, make_gradient(kind, 32, 32, dtype), PruneSpec(function, 2, 4))


@pytest.mark.parametrize("kind", ["huge", "tiny", "not finite"])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_kinds_of_values_in_longer_groups(engine, function, kind):
    for dtype in DTYPES:
        check(engine, make_gradient(kind, 32, 16, dtype), PruneSpec(function, 2, 8))


@pytest.mark.parametrize(
    ("dtype", "group"),
    [(torch.float16, (0.0, 1.287109375, 1.306640625, 2.59375)), (torch.bfloat16, (1.34375, 0.0, 1.21875, 2.5625))],
    ids=str,
)
@pytest.mark.parametrize(("axis", "offset"), [(1, 1205178), (0, 9698461)])
def test_mvue_of_the_largest_uniform(engine, dtype, group, axis, offset):
    """Sums of probabilities that are rounded would let it take these groups' last element twice."""
    seed = (0, offset)
    (word,) = GroupWords(Rng(seed, 0, 1 - axis))(torch.zeros(1, dtype=torch.int64), 1)
    assert word >> 8 == (1 << 24) - 1  # of the first group along this axis
    x = make_gradient("normal", 16, 8, dtype)
    (x if axis == 1 else x.t())[0, :4] = torch.tensor(group, dtype=dtype)
    for operand in run(engine, x, PruneSpec("mvue", 2, 4), seed)[:2]:
        assert_same(operand, x, PruneSpec("mvue", 2, 4), Rng(seed, 0, 1 - operand.axis))


@pytest.mark.parametrize("shape", [(1, 1), (3, 5), (16, 8), (17, 9), (50, 36), (35, 264)])
@pytest.mark.parametrize("function", ["mvue", "random"])
def test_any_shape(engine, function, shape):
    """Channels that are no multiple of 8, odd row strides, partial groups."""
    for pad in (0, 3):
        check(engine, make_gradient("normal", *shape, torch.bfloat16, pad=pad), PruneSpec(function, 2, 4))


@pytest.mark.parametrize(("m", "c"), [(4, 24), (16, 24), (4, 256)])
def test_padding_to_the_gemm_tile(engine, m, c):
    """Of 256 channels a block has 64 positions: padding has blocks of its own."""
    check(engine, make_gradient("normal", 20, c, torch.float16), PruneSpec("mvue", 2, m), k_align=128)


@pytest.mark.parametrize(("t", "c"), [(70, 40), (64, 64)])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_cutlass(engine, layout, t, c):
    """Tiles that the operand's rows fill, and that they do not."""
    k_align = LAYOUTS[layout].tile_words * 16
    x, spec, seed = make_gradient("normal", t, c, torch.float16), PruneSpec("mvue", 2, 4), new_seed()
    row_major = run(engine, x, spec, seed, k_align=k_align)
    tiled = run(engine, x, spec, seed, k_align=k_align, layout=layout)
    for ours, operand in zip(tiled[:2], row_major[:2], strict=True):
        assert torch.equal(ours.values, operand.values)
        words = operand.metadata if operand.axis == 1 else operand.metadata.t()
        assert torch.equal(ours.metadata, LAYOUTS[layout].encode(words))


@pytest.mark.parametrize("positions_per_sample", [1, 4, 9, 36])
@pytest.mark.parametrize("m", [4, 8, 16])
def test_sample_channel_scope(engine, m, positions_per_sample):
    """Samples that end inside groups, tiles and steps."""
    dtype = torch.float16 if m == 8 else torch.bfloat16
    x = make_gradient("many zeros", 36, 24, dtype)
    check(engine, x, PruneSpec("rescale_magnitude", 2, m, "sample_channel", 1e-4), positions_per_sample)


@pytest.mark.parametrize("kind", ["normal", "not finite"])
def test_tensor_scope(engine, kind):
    for dtype in DTYPES:
        check(engine, make_gradient(kind, 40, 24, dtype), PruneSpec("rescale_magnitude", 2, 4, "tensor"))


@pytest.mark.parametrize("channel", [4, 5])
def test_one_value_makes_its_scope_non_finite(engine, channel):
    """In either half of a register."""
    for dtype, scope in zip(DTYPES, ("sample_channel", "tensor"), strict=True):
        x = make_gradient("normal", 40, 24, dtype)
        x[7, channel] = float("inf")
        check(engine, x, PruneSpec("rescale_magnitude", 2, 4, scope), 20)


def test_scopes_of_several_parts(engine):
    """Samples of more rows than one block takes, and of an odd number; channels that no vector load takes."""
    x = make_gradient("many zeros", 522, 9, torch.bfloat16)
    for scope in ("sample_channel", "tensor"):
        check(engine, x, PruneSpec("rescale_magnitude", 2, 4, scope), 261)


def assert_factors(engine, x, n, m, positions_per_sample):
    """Those that the first pass makes of x are of its sums, which are exact in float64."""
    (t, c), device_x = x.shape, engine.put(x)
    rule = {"n": n, "m": m, "dtype": DTYPES[x.dtype], "positions_per_sample": positions_per_sample, "eps": 0.0}
    sums = engine.empty(engine.kernels.scope_workspace(t, c, positions_per_sample), dtype=torch.float64)
    kept = [x, *(prune_matrix(x, PruneSpec("magnitude", n, m), axis, 1, None) for axis in (1, 0))]
    samples = (-1, positions_per_sample, c) if positions_per_sample else (1, t * c, 1)
    total, *exact = (matrix.double().abs().view(samples).sum(1).flatten().float() for matrix in kept)
    factors = [engine.empty(len(total), dtype=torch.float32) for _ in exact]
    launch = engine.kernels.ScopeScales(**rule, t=t, c=c, row_stride=c)
    with engine.launching():
        launch(device_x.data_ptr(), sums.data_ptr(), *(factor.data_ptr() for factor in factors))
    for factor, kept_sum in zip(factors, exact, strict=True):
        expected = torch.where(kept_sum == 0, 1.0, total / kept_sum)
        torch.testing.assert_close(factor.cpu(), expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_factors_of_every_pattern(engine, n, m):
    """That of a scope with inf is NaN, and no other."""
    for dtype in DTYPES:
        x = make_gradient("many zeros", 39, 21, dtype)
        x[38, 20] = float("inf")
        assert_factors(engine, x, n, m, 13)


@pytest.mark.parametrize(("n", "m"), PATTERNS)
def test_factors_of_huge_values(engine, n, m):
    """From 2^121 on a warp adds up bfloat16 in another way; here some of a sample's warps meet such values."""
    x = make_gradient("many zeros", 34, 250, torch.bfloat16) * 2.0**118
    x[:4] *= 8
    assert x.isfinite().all()
    assert_factors(engine, x, n, m, 34)


@pytest.mark.parametrize(
    ("m", "t", "c", "per_sample"),
    [(4, 30, 506, 15), (4, 30, 506, 0), (4, 1202, 9, 601), (4, 1202, 9, 0), (16, 80, 250, 80)],
)
def test_factors_of_many_sums(engine, m, t, c, per_sample):
    """Of more channels than a block has threads, in several blocks, where a group in front takes one more step of a
    thread; of more than two parts; of two steps where lanes share groups."""
    assert_factors(engine, make_gradient("normal", t, c, torch.float16), 2, m, per_sample)


@pytest.mark.parametrize("shape", [(5, 3), (70, 40)])
def test_bias_gradient(engine, shape):
    """Float32 sums in a fixed order, rounded once: twice the same bits."""
    for dtype in DTYPES:
        x = make_gradient("normal", *shape, dtype)
        spec, seed = PruneSpec("magnitude", 2, 4), new_seed()
        first, second = (run(engine, x, spec, seed, bias=dtype, wgrad=wgrad).bias for wgrad in (True, False))
        assert torch.equal(first, second)
        unrounded = run(engine, x, spec, seed, bias=torch.float32).bias
        assert torch.equal(unrounded.to(dtype), first)
        assert_close(unrounded, x.double().sum(0), x.double().abs().sum(0), shape[0])


def test_one_operand_alone(engine):
    x, spec, seed = make_gradient("normal", 20, 24, torch.float16), PruneSpec("mvue", 2, 4), new_seed()
    both = run(engine, x, spec, seed)
    assert torch.equal(run(engine, x, spec, seed, wgrad=False).dgrad.values, both.dgrad.values)
    assert torch.equal(run(engine, x, spec, seed, dgrad=False).wgrad.values, both.wgrad.values)


def test_random_numbers_differ(engine):
    """Between seeds, offsets, ranks and passes."""
    x, spec = torch.ones(16, 16, dtype=torch.float16), PruneSpec("random", 2, 4)
    seed = new_seed()
    results = [run(engine, x, spec, s, rank) for s, rank in ((seed, 0), (seed, 1), (seed + 1, 0), (seed.flip(0), 0))]
    words = [operand.decompress() for outputs in results for operand in (outputs.dgrad, outputs.wgrad)]
    assert all(not torch.equal(a, b) for a, b in itertools.combinations(words, 2))


@pytest.mark.parametrize("positions_per_sample", [0, 20, 520])
def test_one_factor_alone(engine, positions_per_sample):
    """Of a scope that blocks finish themselves and of others."""
    x, names = make_gradient("normal", 520, 24, torch.float16), ("dgrad_scale", "wgrad_scale")
    scopes = len(x) // positions_per_sample * 24 if positions_per_sample else 1
    device_x, sums = engine.put(x), engine.empty(520 * 24, dtype=torch.float64)
    launch = engine.kernels.ScopeScales(
        n=2, m=4, dtype="f16", t=520, c=24, row_stride=24, positions_per_sample=positions_per_sample, eps=0.0
    )
    factors = []
    for wanted in (names, names[:1], names[1:]):
        outputs = {name: engine.empty(scopes, dtype=torch.float32) for name in wanted}
        with engine.launching():
            launch(device_x.data_ptr(), sums.data_ptr(), **{name: out.data_ptr() for name, out in outputs.items()})
        factors.append(outputs)
    both, *alone = factors
    for (name,), outputs in zip((names[:1], names[1:]), alone, strict=True):
        assert torch.equal(outputs[name], both[name])
    assert not torch.equal(both["dgrad_scale"], both["wgrad_scale"])


def test_bytes_moved(engine):
    """Of a 16-bit value: 2 bytes read, 9/16 of them written for each operand, and the bias gradient's partial sums."""
    if engine.large:
        pytest.skip("it is the simulator that counts bytes")
    t, c = 512, 256
    engine.traffic()
    x = make_gradient("normal", t, c, torch.float16)
    run(engine, x, PruneSpec("magnitude", 2, 4), new_seed(), bias=x.dtype)
    read, written = engine.traffic()
    partial = 4 * c * engine.kernels.bias_partial_rows(t, c)
    assert (read, written) == (2 * t * c + partial, 2.25 * t * c + partial + 2 * c)


@pytest.mark.parametrize(("shape", "pad"), [((5000, 1024), 0), ((3137, 520), 24), ((2001, 333), 0), ((100_352, 64), 0)])
@pytest.mark.parametrize("function", FUNCTIONS)
def test_large(engine, function, shape, pad):
    if not engine.large:
        pytest.skip("too much for the simulator")
    for dtype in DTYPES:
        check(engine, make_gradient("wide", *shape, dtype, pad=pad), PruneSpec(function, 2, 4))


SHAPE = {"function": "mvue", "n": 2, "m": 4, "dtype": "f16", "t": 4, "c": 8, "row_stride": 8, "dgrad_k": 16}
ADDRESSES = dict.fromkeys(("dy", "dgrad_values", "dgrad_metadata", "seed"), 1 << 20)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("dy", 0), ("dy", 1), ("t", -1), ("c", 0), ("row_stride", 7), ("row_stride", 1 << 62), ("dgrad_values", 2),
     ("dgrad_metadata", 0), ("dgrad_k", 8), ("dgrad_k", 17), ("dgrad_words", 2), ("seed", 4),
     ("positions_per_sample", 4), ("dgrad_words", 16), ("metadata_layout", "sm70"), ("n", 3), ("n", 1 << 40), ("m", 6),
     ("dtype", "f32"), ("function", "topk"), ("function", "scope_scales"), ("function", "scaled_magnitude"),
     ("eps", -1.0), ("eps", float("nan")), ("eps", 1e300)],
)  # fmt: skip
def test_bad_arguments_are_named(engine, argument, value):
    shape, addresses = (given | ({argument: value} if argument in given else {}) for given in (SHAPE, ADDRESSES))
    if argument not in addresses:
        shape[argument] = value
    with pytest.raises(ValueError, match=argument):
        engine.kernels.PruneCompress(**shape)(**addresses)


@pytest.mark.parametrize(("t", "other"), [(1 << 58, "dgrad_k"), (1 << 59, "row_stride"), (1 << 61, "row_stride")])
def test_gradients_whose_bytes_cannot_be_counted_are_refused(engine, t, other):
    with pytest.raises(ValueError, match=rf"t and {other} must have a product below 2\^62; got {t} and"):
        engine.kernels.PruneCompress(**SHAPE | {"t": t})


@pytest.mark.parametrize(
    ("argument", "value"),
    [("n", 3), ("m", 5), ("dtype", "f32"), ("t", 0), ("positions_per_sample", 3), ("positions_per_sample", -4),
     ("eps", float("inf"))],
)  # fmt: skip
def test_bad_arguments_of_wider_scopes_are_named(engine, argument, value):
    rule = {name: SHAPE[name] for name in ("n", "m", "dtype", "t", "c", "row_stride")}
    arguments = rule | {"positions_per_sample": 4, "eps": 0.0, argument: value}
    with pytest.raises(ValueError, match=argument):
        engine.kernels.ScopeScales(**arguments)
    with pytest.raises(ValueError, match=argument):
        engine.kernels.PruneCompress(function="rescale_magnitude", **arguments)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("dy", 0), ("dy", 1), ("sums", 0), ("sums", 4), ("dgrad_scale", 2), ("wgrad_scale", 1)],
)  # fmt: skip
def test_bad_pointers_of_wider_scopes_are_named(engine, argument, value):
    rule = {name: SHAPE[name] for name in ("n", "m", "dtype", "c", "row_stride")}
    scope_scales = engine.kernels.ScopeScales(**rule, t=1 << 20, positions_per_sample=0, eps=0.0)
    pointers = dict.fromkeys(("dy", "sums", "dgrad_scale", "wgrad_scale"), 1 << 20) | {argument: value}
    with pytest.raises(ValueError, match=f"{argument} must be"):
        scope_scales(**pointers)


@pytest.mark.parametrize(
    ("argument", "value"), [("dgrad_scale", 0), ("dgrad_scale", 2), ("bias", 1), ("bias", 2), ("bias_partials", 0)]
)
def test_bad_pointers_beside_the_operands_are_named(engine, argument, value):
    shape = SHAPE | {"function": "rescale_magnitude", "positions_per_sample": 0, "bias_is_float": argument == "bias"}
    pointers = ADDRESSES | dict.fromkeys(("dgrad_scale", "bias", "bias_partials"), 1 << 20) | {argument: value}
    with pytest.raises(ValueError, match=f"{argument} must be"):
        engine.kernels.PruneCompress(**shape)(**pointers)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("wgrad_k", 24), ("wgrad_k", -16), ("wgrad_k", 1 << 61), ("wgrad_pitch", 7), ("wgrad_pitch", 16),
     ("wgrad_values", 2), ("wgrad_metadata", 0), ("wgrad_scale", 0), ("wgrad_scale", 2)],
)  # fmt: skip
def test_bad_arguments_of_the_operand_along_positions_are_named(engine, argument, value):
    operand = {"dgrad_k": 0, "wgrad_k": 16, "wgrad_pitch": 8}
    shape = SHAPE | operand | {"function": "rescale_magnitude", "positions_per_sample": 0}
    pointers = dict.fromkeys(("dy", "wgrad_values", "wgrad_metadata", "wgrad_scale"), 1 << 20)
    (pointers if argument in pointers else shape)[argument] = value
    with pytest.raises(ValueError, match=argument):
        engine.kernels.PruneCompress(**shape)(**pointers)


@pytest.mark.parametrize(
    ("argument", "value"), [("t", 0), ("c", 0), ("t", -5), ("positions_per_sample", -1), ("positions_per_sample", 7)]
)
def test_bad_sizes_of_workspaces_are_named(engine, argument, value):
    sizes = {"t": 36, "c": 8, "positions_per_sample": 0} | {argument: value}
    with pytest.raises(ValueError, match=argument):
        engine.kernels.scope_workspace(**sizes)
    if sizes.pop("positions_per_sample") == 0:
        with pytest.raises(ValueError, match=argument):
            engine.kernels.bias_partial_rows(**sizes)


def test_an_operand_fills_the_tiles_of_its_layout(engine):
    for name in ("dgrad_k", "wgrad_k"):
        shape = SHAPE | {"dgrad_k": 0, "metadata_layout": "sm90_k64"}
        engine.kernels.PruneCompress(**shape | {name: 64})
        with pytest.raises(ValueError, match=f"{name} must be a multiple of 64"):
            engine.kernels.PruneCompress(**shape | {name: 32})


def test_failed_launch_names_the_kernel_and_leaves_no_error(engine):
    """More blocks than a grid has: refused before anything is read."""
    with pytest.raises(RuntimeError, match=r"sdgp_mvue_2_4_f16: .*configuration"):
        engine.kernels.PruneCompress(**(SHAPE | {"t": 1 << 50}))(**ADDRESSES)
    check(engine, make_gradient("normal", 4, 8, torch.float16), PruneSpec("mvue", 2, 4))
