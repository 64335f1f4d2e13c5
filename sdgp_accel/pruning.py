"""N:M pruning of a gradient along one axis, in vectorised torch (any device, dtype and memory format).

`prune` is the public function, `prune_matrix` what backends call. The rules for one group are in `group_rules`;
here a tensor is cut into groups, and on a CPU into pieces that fit the cache.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from functools import partial

import torch
from torch import Tensor

from sdgp_accel import group_rules as rules
from sdgp_accel.config import PASSES, Pass, PruneSpec, SDGPConfig, check_choice
from sdgp_accel.huge_pages import in_huge_pages
from sdgp_accel.philox import Rng, data_parallel_rank, draw, group_words

# Values per piece on a CPU: the scratch of a piece (about 10 times its values) stays in the last-level cache, while
# each operation is long enough to be worth splitting over threads.
CPU_PIECE = 1 << 19

DTYPES = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


def prune(
    x: Tensor,
    config: SDGPConfig | None = None,
    dim: int = -1,
    *,
    pass_name: Pass = "grad_input",
    seed: int | Tensor | Rng | None = None,
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
    seed: for ``random`` and ``mvue``: an int, an int64 tensor [2] as `philox.draw` returns it, or a whole `Rng`. The
        default draws from torch's generator of x's device. Random numbers are indexed by the row-major index of the
        group in the grid of groups (x's shape with ``ceil(size / m)`` in place of `dim`'s size).

    Returns a new tensor of x's shape, dtype and (where x is dense) strides. Dropped values are +0. A group that
    holds a NaN or inf is pruned by magnitude and left unscaled, whatever the function.

    Raises TypeError for anything but a floating-point tensor of these dtypes, IndexError for `dim`, ValueError for
    a scope that x's shape does not have.
    """
    config = SDGPConfig() if config is None else config
    if not isinstance(config, SDGPConfig):
        raise TypeError(f"config must be an SDGPConfig or None; got {type(config).__name__}")
    check_values("x", x)
    check_choice("pass_name", pass_name, PASSES)
    if not isinstance(dim, int) or not -x.ndim <= dim < x.ndim:
        raise IndexError(f"dim must be an int in [{-x.ndim}, {x.ndim - 1}] for a {x.ndim}-D tensor; got {dim!r}")
    scope = config.scope or ("sample_channel" if x.ndim == 4 else "group")
    spec = PruneSpec(getattr(config.functions, pass_name), config.n, config.m, scope, config.eps)
    if spec.is_dense:
        return x.clone()
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


def _as_rng(seed: int | Tensor | Rng | None, pass_name: str, device: torch.device) -> Rng:
    if isinstance(seed, Rng):
        return seed
    if seed is None:
        words = draw(device)
    elif isinstance(seed, Tensor):
        if seed.dtype != torch.int64 or seed.shape != (2,) or seed.device != device:
            raise ValueError(
                f"seed as a tensor must be int64 of shape [2] on {device}; "
                f"got {seed.dtype} of shape {list(seed.shape)} on {seed.device}"
            )
        words = seed
    elif isinstance(seed, int) and not isinstance(seed, bool) and -(1 << 63) <= seed < 1 << 63:
        words = torch.tensor([seed, 0], dtype=torch.int64, device=device)
    else:
        raise ValueError(f"seed must be a 64-bit int, an int64 tensor [2], an Rng or None; got {seed!r}")
    return Rng(words, data_parallel_rank(), PASSES.index(pass_name))


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
    scratch = rules.Scratch(x.device)
    if spec.function == "magnitude" and m == 4 and size % 4 == 0 and order[-1] == dim and _is_flat(x, source, target):
        flat_in, flat_out = source.view(-1), target.view(-1)
        for (chunk,) in _pieces(flat_in.shape, 1, x.device):
            rules.magnitude_quads(flat_in[chunk], spec.n, flat_out[chunk], scratch)
        return
    grid_shape = [-(-size // m) if i == dim else s for i, s in enumerate(x.shape)]
    indices = _GroupIndices([math.prod(grid_shape[d + 1 :]) for d in order], scratch)
    total = math.prod(grid_shape)
    full_groups, rest = divmod(size, m)
    parts = [(0, full_groups, m)] if full_groups else []
    if rest:
        parts.append((full_groups, 1, rest))
    for first_group, groups, length in parts:
        planes_in = _planes(source, dim_in_order, first_group * m, groups, length)
        planes_out = _planes(target, dim_in_order, first_group * m, groups, length)
        first_index = [first_group if d == dim_in_order else 0 for d in range(x.ndim)]
        for piece in _pieces(planes_in.shape[1:], length, x.device):
            box: tuple[slice, ...] = (slice(None), *piece)
            tiles = _tile_count(planes_in[box].shape[1:], x.device)
            part_in, part_out = _tiled(planes_in[box], tiles), _tiled(planes_out[box], tiles)
            values = scratch("values", (tiles, length, part_in[0, 0].numel()), x.dtype)
            _copy_planes(values.movedim(1, 0).view(part_in.shape), part_in)
            words = None
            if rng is not None:
                starts = [cells.start + first for cells, first in zip(piece, first_index, strict=True)]
                index = indices(starts, [cells.stop - cells.start for cells in piece])
                words = partial(group_words, rng, index, total=total, spare=scratch.spare_words(index.numel()))
            result = _apply(spec, values, words, scratch)
            _copy_planes(part_out, result.movedim(1, 0).view(part_out.shape))


def _apply(spec: PruneSpec, values: Tensor, words: rules.Words | None, scratch: rules.Scratch) -> Tensor:
    n = min(spec.n, values.shape[1])
    if spec.function == "magnitude":
        return rules.magnitude(values, n, scratch)
    if spec.function == "rescale_magnitude":
        return rules.rescale_magnitude(values, n, spec.eps, scratch)
    assert words is not None
    if spec.function == "random":
        return rules.random(values, n, words, scratch)
    return rules.mvue(values, n, words, scratch)


class _GroupIndices:
    """Row-major indices of the groups in boxes of the grid; boxes of one size share most of the work."""

    def __init__(self, strides: Sequence[int], scratch: rules.Scratch) -> None:
        self._strides, self._scratch = strides, scratch
        self._sizes: list[int] = []
        self._relative = torch.empty(0)

    def __call__(self, starts: Sequence[int], sizes: list[int]) -> Tensor:
        """sum_d (starts[d] + i_d) * strides[d] for all i in `sizes`, flattened."""
        if sizes != self._sizes:
            device = self._scratch.device
            index = torch.zeros((), dtype=torch.int64, device=device)
            for size, stride in zip(sizes, self._strides, strict=True):
                index = index.unsqueeze(-1) + torch.arange(size, dtype=torch.int64, device=device) * stride
            self._sizes, self._relative = sizes, index.view(-1)
        first = sum(start * stride for start, stride in zip(starts, self._strides, strict=True))
        return torch.add(self._relative, first, out=self._scratch("index", tuple(self._relative.shape), torch.int64))


def _rescale_scopes(x: Tensor, kept: Tensor, dims: tuple[int, ...], eps: float) -> None:
    """kept *= sum |x| / (sum |kept| + eps), in place; sums over `dims`, in float64, each rounded once."""
    dtype = rules.accumulate_dtype(x.dtype)
    total, kept_total = (_absolute_sum(t, dims).to(dtype) for t in (x.detach(), kept))
    scale = (total / (kept_total + eps)).expand(x.shape)
    order = _memory_order(kept)
    kept, scale = kept.permute(order), scale.permute(order)
    scratch = rules.Scratch(x.device)
    for piece in _pieces(kept.shape, 1, x.device):
        part = kept[piece]
        rules.scale_nonzero(part, scale[piece], part, scratch)


def _absolute_sum(x: Tensor, dims: tuple[int, ...]) -> Tensor:
    """sum |x| over `dims`, which stay as size 1, in float64."""
    order = _memory_order(x)
    shape = [1 if d in dims else s for d, s in enumerate(x.shape)]
    total = torch.zeros(shape, dtype=torch.float64, device=x.device)
    source, target = x.permute(order), total.permute(order)
    dims_in_order = [order.index(d) for d in dims]
    for piece in _pieces(source.shape, 1, x.device):
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


def _tile_count(shape: Sequence[int], device: torch.device) -> int:
    """In how many equal tiles a piece of `shape` is laid out for the threads of a CPU (see `group_rules`)."""
    if device.type != "cpu":
        return 1
    leading = next((size for size in shape if size > 1), 1)
    fitting = (t for t in (32, 16, 8, 4, 2) if leading % t == 0 and math.prod(shape) // t >= 1024)
    return next(fitting, 1)


def _tiled(planes: Tensor, tiles: int) -> Tensor:
    """View [length, *cells] as [length, tiles, *cells of a tile]."""
    cells = list(itertools.dropwhile(lambda size: size == 1, planes.shape[1:])) or [1]
    return planes.view(planes.shape[0], tiles, cells[0] // tiles, *cells[1:])


def _copy_planes(target: Tensor, source: Tensor) -> None:
    """target.copy_(source), on a CPU plane by plane: its copy would make the short dimension the inner loop."""
    if target.device.type != "cpu":
        target.copy_(source)
    else:
        for to, what in zip(target.unbind(), source.unbind(), strict=True):
            to.copy_(what)


def _pieces(shape: Sequence[int], depth: int, device: torch.device) -> Iterator[tuple[slice, ...]]:
    """Boxes that cover a grid of `shape`; on a CPU each of at most about CPU_PIECE / depth cells, else just one."""
    limit = max(1, CPU_PIECE // depth) if device.type == "cpu" else math.prod(shape)
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
