"""N:M pruning of a gradient along one axis, in vectorised torch (any device, dtype and memory format).

`prune` is the public function, `prune_matrix` what backends call. The rules for one group are in `group_rules`;
here a tensor is cut into groups, and on a CPU into pieces that fit the cache.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from functools import partial
from typing import TypeGuard

import torch
from torch import Tensor

from sdgp_accel import group_rules as rules
from sdgp_accel.config import PASSES, Pass, PruneSpec, SDGPConfig, check_choice
from sdgp_accel.cpu_threads import PIECES_PER_THREAD, for_each, is_plain_cpu
from sdgp_accel.huge_pages import in_huge_pages
from sdgp_accel.philox import GroupWords, Rng, Seed, data_parallel_rank, draw

# Values per piece on a CPU, at most and at least. Smaller pieces stay in a closer cache (their scratch is 6 times their
# values), but threads that start many short operations wait for each other (Python's lock): on two cores of an EPYC
# with 32 MiB of last-level cache, mvue on 13 million values takes 131 ms with 2^19, 116 ms with 2^20. Half as many for
# 16-bit values: their scratch is float32 all the same, and would be twice as large as the tensor.
CPU_PIECE = 1 << 20
SMALLEST_CPU_PIECE = 1 << 18

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def prune(
    x: Tensor,
    config: SDGPConfig | None = None,
    dim: int = -1,
    *,
    pass_name: Pass = "grad_input",
    seed: int | Seed | Rng | None = None,
) -> Tensor:
    """Prune `x` to at most `config.n` non-zeros in each `config.m` consecutive values along `dim`.

    x: fp16, bf16, fp32 or fp64, any shape with at least one dimension, any strides. A last partial group of length
        L keeps min(n, L) values.
    config: the prune function, the pattern and the scope; default `SDGPConfig()`. With ``scope=None``,
        ``rescale_magnitude`` sums over ``"sample_channel"`` for a 4-D `x` and over the ``"group"`` for any other.
        ``"sample_channel"`` reads a 4-D `x` as [N, C, P, Q] (sums over P, Q) and a 3-D one as [N, T, C] (over T).
    dim: the axis of the groups.
    pass_name: ``"grad_input"`` or ``"grad_weight"``: selects the prune function where `config` names two, and the
        random numbers.
    seed: for ``random`` and ``mvue``: an int, two of them or an int64 tensor [2] as `philox.draw` returns them, or a
        whole `Rng`. The default draws from torch's generator of x's device. Random numbers are indexed by the row-major
        index of the group in the grid of groups (x's shape with ``ceil(size / m)`` in place of `dim`'s size).

    Returns a new tensor of x's shape, dtype and (where x is dense) strides, without a graph. Dropped values are +0. A
    group that holds a NaN or inf is pruned by magnitude and left unscaled, whatever the function.

    Raises TypeError for anything but a floating-point tensor of these dtypes and for a `dim` that is no int, ValueError
    for a `dim` out of range and for a scope that x's shape does not have.
    """
    config = SDGPConfig() if config is None else config
    if not isinstance(config, SDGPConfig):
        raise TypeError(f"config must be an SDGPConfig or None; got {type(config).__name__}")
    check_values("x", x)
    check_choice("pass_name", pass_name, PASSES)
    if not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        error = ValueError if isinstance(dim, int) else TypeError
        raise error(f"dim must be an int in [{-x.ndim}, {x.ndim - 1}] for a {x.ndim}-D tensor; got {dim!r}")
    scope = config.scope or ("sample_channel" if x.ndim == 4 else "group")
    spec = PruneSpec(getattr(config.functions, pass_name), config.n, config.m, scope, config.eps)
    if spec.is_dense:
        return x.detach().clone()
    rng = _as_rng(seed, pass_name, x.device) if spec.is_random else None
    return _prune(x, spec, dim % x.ndim, _sum_dims(spec, x), rng)


def prune_matrix(dy: Tensor, spec: PruneSpec, axis: int, positions_per_sample: int, rng: Rng | None) -> Tensor:
    """Prune the matrix view [T, C] of a gradient along its positions (axis 0) or its channels (axis 1).

    dy: [T, C], any strides; the result has the same ones where dy is dense.
    positions_per_sample: T of one sample, for the scope ``"sample_channel"``; T must be a multiple of it.
    rng: needed where `spec.is_random`. Group index: ``t * ceil(C / m) + j`` for axis 1, ``i * C + c`` for axis 0.
    """
    check_values("dy", dy)
    if dy.ndim != 2 or axis not in (0, 1):
        raise ValueError(f"dy must be 2-D and axis 0 or 1; got shape {tuple(dy.shape)} and axis {axis!r}")
    if spec.is_dense:
        return dy.clone()
    if spec.is_random and rng is None:
        raise ValueError(f"rng must be given for the function {spec.function!r}; got None")
    if spec.function != "rescale_magnitude" or spec.scope != "sample_channel":
        return _prune(dy, spec, axis, _sum_dims(spec, dy), rng)
    if positions_per_sample < 1 or dy.shape[0] % positions_per_sample:
        raise ValueError(
            f"positions_per_sample must be a positive divisor of dy's {dy.shape[0]} rows; got {positions_per_sample}"
        )
    pruned = _prune(dy, _as_magnitude(spec), axis, None, rng)
    samples = (dy.shape[0] // positions_per_sample, positions_per_sample, dy.shape[1])
    _rescale_scopes(dy.view(samples), pruned.view(samples), (1,), spec.eps)
    return pruned


def check_values(name: str, x: object) -> None:
    """Raise unless `x`, an argument called `name`, is a strided tensor of one of `DTYPES`, not 0-dim."""
    if not isinstance(x, Tensor) or x.dtype not in DTYPES:
        got = f"dtype {x.dtype}" if isinstance(x, Tensor) else type(x).__name__
        raise TypeError(f"{name} must be a tensor of dtype {', '.join(map(str, DTYPES))}; got {got}")
    if x.layout != torch.strided or x.ndim == 0:
        raise ValueError(f"{name} must be a strided tensor of at least 1 dimension; got {x.layout}, {x.ndim}-D")


def _sum_dims(spec: PruneSpec, x: Tensor) -> tuple[int, ...] | None:
    """The dimensions of x that the rescaling sums run over; None where they stay inside the groups."""
    if spec.function != "rescale_magnitude" or spec.scope == "group":
        return None
    if spec.scope == "tensor":
        return tuple(range(x.ndim))
    if x.ndim == 4:
        return (2, 3)
    if x.ndim == 3:
        return (1,)
    raise ValueError(
        f'scope "sample_channel" needs a 4-D x [N, C, P, Q] or a 3-D x [N, T, C]; got shape {tuple(x.shape)}'
    )


def _as_rng(seed: int | Seed | Rng | None, pass_name: str, device: torch.device) -> Rng:
    if isinstance(seed, Rng):
        return seed
    if seed is None:
        words: Seed = draw(device)
    elif isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (2,) or seed.device != device:
            raise ValueError(
                f"seed as a tensor must be int64 of shape [2] on {device}; "
                f"got {seed.dtype} of shape {list(seed.shape)} on {seed.device}"
            )
        words = seed
    elif _is_word(seed):
        words = (seed, 0)
    elif isinstance(seed, tuple) and len(seed) == 2 and all(map(_is_word, seed)):
        words = seed
    else:
        raise ValueError(f"seed must be a 64-bit int, two of them, an int64 tensor [2], an Rng or None; got {seed!r}")
    return Rng(words, data_parallel_rank(), PASSES.index(pass_name))


def _is_word(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and -(1 << 63) <= value < 1 << 63


def _as_magnitude(spec: PruneSpec) -> PruneSpec:
    return PruneSpec("magnitude", spec.n, spec.m)


def _prune(x: Tensor, spec: PruneSpec, dim: int, sum_dims: tuple[int, ...] | None, rng: Rng | None) -> Tensor:
    x = x.detach()
    out = in_huge_pages(torch.empty_like(x))
    if out.numel() > 0:
        # Inference mode for the scratch only: it makes each of the many operations on it cheaper to start.
        with torch.inference_mode(not torch.compiler.is_compiling()):
            _prune_groups(x, out, spec if sum_dims is None else _as_magnitude(spec), dim, rng)
            if sum_dims is not None:
                _rescale_scopes(x, out, sum_dims, spec.eps)
    return out


def _prune_groups(x: Tensor, out: Tensor, spec: PruneSpec, dim: int, rng: Rng | None) -> None:
    # Everything below walks the tensor in the order of its memory, but counts groups in the order of its dimensions.
    order = _memory_order(out)
    dim_in_order = order.index(dim)
    source, target = x.permute(order), out.permute(order)
    size, m = x.shape[dim], spec.m
    if spec.function == "magnitude" and m == 4 and size % 4 == 0 and order[-1] == dim and _is_flat(x, source, target):
        quads_in, quads_out = source.view(-1, 4), target.view(-1, 4)

        def prune_quads(piece: tuple[slice, ...], scratch: rules.Scratch) -> None:
            rules.magnitude_quads(quads_in[piece].view(-1), spec.n, quads_out[piece].view(-1), scratch)

        for_each(list(_pieces(quads_in.shape[:1], 4, x)), prune_quads, x)
        return
    grid_shape = [-(-size // m) if i == dim else s for i, s in enumerate(x.shape)]
    strides = [math.prod(grid_shape[d + 1 :]) for d in order]
    group_words = None if rng is None else GroupWords(rng, math.prod(grid_shape))
    boxes: list[tuple[Tensor, Tensor, list[int]]] = []  # source, target and the coordinates of the first group
    full_groups, rest = divmod(size, m)
    for first_group, groups, length in ((0, full_groups, m), (full_groups, min(rest, 1), rest)):
        planes_in = _planes(source, dim_in_order, first_group * m, groups, length)
        planes_out = _planes(target, dim_in_order, first_group * m, groups, length)
        for piece in _pieces(planes_in.shape[1:], length, x) if groups else ():
            starts = [cells.start for cells in piece]
            starts[dim_in_order] += first_group
            box: tuple[slice, ...] = (slice(None), *piece)
            boxes.append((planes_in[box], planes_out[box], starts))

    def prune_box(box: tuple[Tensor, Tensor, list[int]], scratch: rules.Scratch) -> None:
        planes_in, planes_out, starts = box
        values = scratch("values", (len(planes_in), planes_in[0].numel()), x.dtype)
        _copy_planes(values.view(planes_in.shape), planes_in)
        words = None
        if group_words is not None:
            index = _group_indices(starts, planes_in.shape[1:], strides, scratch)
            words = partial(group_words, index, memory=scratch.for_words if is_plain_cpu(x) else None)
        _copy_planes(planes_out, _apply(spec, values, words, scratch).view(planes_out.shape))

    for_each(boxes, prune_box, x)


def _apply(spec: PruneSpec, values: Tensor, words: rules.Words | None, scratch: rules.Scratch) -> Tensor:
    n = min(spec.n, values.shape[0])
    if spec.function == "magnitude":
        return rules.magnitude(values, n, scratch)
    if spec.function == "rescale_magnitude":
        return rules.rescale_magnitude(values, n, spec.eps, scratch)
    assert words is not None
    if spec.function == "random":
        return rules.random(values, n, words, scratch)
    return rules.mvue(values, n, words, scratch)


def _group_indices(starts: Sequence[int], sizes: torch.Size, strides: Sequence[int], scratch: rules.Scratch) -> Tensor:
    """sum_d (starts[d] + i_d) * strides[d] for all i in `sizes`, flattened: the row-major indices of a box's groups."""
    relative = scratch.constant(("relative indices", sizes), lambda: _relative_indices(sizes, strides, scratch.device))
    first = sum(map(operator.mul, starts, strides))
    return torch.add(relative, first, out=scratch("index", (sizes.numel(),), torch.int64))


def _relative_indices(sizes: Sequence[int], strides: Sequence[int], device: torch.device) -> Tensor:
    index = torch.zeros((), dtype=torch.int64, device=device)
    for size, stride in zip(sizes, strides, strict=True):
        index = index.unsqueeze(-1) + torch.arange(size, dtype=torch.int64, device=device) * stride
    return index.view(-1)


def _rescale_scopes(x: Tensor, kept: Tensor, dims: tuple[int, ...], eps: float) -> None:
    """kept *= sum |x| / (sum |kept| + eps), in place; sums over `dims`, in float64, each rounded once."""
    dtype = rules.accumulate_dtype(x.dtype)
    total, kept_total = (_absolute_sum(t, dims).to(dtype) for t in (x.detach(), kept))
    scale = (total / (kept_total + eps)).expand(x.shape)
    order = _memory_order(kept)
    kept, scale = kept.permute(order), scale.permute(order)

    def scale_piece(piece: tuple[slice, ...], scratch: rules.Scratch) -> None:
        rules.scale_nonzero(kept[piece], scale[piece], kept[piece], scratch)

    for_each(list(_pieces(kept.shape, 1, x)), scale_piece, x)


def _absolute_sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """sum |x| over `dims`, which stay as size 1, in float64."""
    order = _memory_order(x)
    shape = [1 if d in dims else s for d, s in enumerate(x.shape)]
    total = torch.zeros(shape, dtype=torch.float64, device=x.device)
    source, target = x.permute(order), total.permute(order)
    dims_in_order = [order.index(d) for d in dims]
    for piece in _pieces(source.shape, 1, x):
        where = tuple(slice(0, 1) if d in dims_in_order else s for d, s in enumerate(piece))
        target[where] += source[piece].abs().sum(dims_in_order, keepdim=True, dtype=torch.float64)
    return total


def _memory_order(x: Tensor) -> list[int]:
    """Dimensions from the largest stride to the smallest."""
    strides = x.stride()
    return sorted(range(x.ndim), key=lambda d: (-strides[d], d))


def _is_flat(x: Tensor, source: Tensor, target: Tensor) -> bool:
    return x.device.type == "cpu" and source.is_contiguous() and target.is_contiguous()


def _planes(x: Tensor, dim: int, start: int, groups: int, length: int) -> Tensor:
    """View of the groups in x from `start`: [length, *x.shape with groups in place of dim's size]."""
    shape = (*x.shape[:dim], groups, length, *x.shape[dim + 1 :])
    return x.narrow(dim, start, groups * length).view(shape).movedim(dim + 1, 0)


def _copy_planes(target: Tensor, source: Tensor) -> None:
    """target.copy_(source), on a CPU plane by plane: its copy would make the short dimension the inner loop."""
    if target.device.type != "cpu":
        target.copy_(source)
    else:
        for to, what in zip(target.unbind(), source.unbind(), strict=True):
            to.copy_(what)


def _pieces(shape: Sequence[int], depth: int, x: Tensor) -> Iterator[tuple[slice, ...]]:
    """Boxes that cover a grid of `shape`, whose cells are `depth` values of x; on a CPU many small ones, else one."""
    values = x.numel()
    if x.device.type == "cpu":
        most = CPU_PIECE * min(4, x.element_size()) // 4
        values = min(most, max(SMALLEST_CPU_PIECE, values // (PIECES_PER_THREAD * torch.get_num_threads())))
    limit = max(1, values // depth)
    steps = []
    inner = math.prod(shape)
    for size in shape:
        inner //= max(size, 1)
        steps.append(max(1, min(size, limit // max(inner, 1))))
    yield from itertools.product(
        *(
            [slice(i, min(i + step, size)) for i in range(0, size, step)]
            for size, step in zip(shape, steps, strict=True)
        )
    )
