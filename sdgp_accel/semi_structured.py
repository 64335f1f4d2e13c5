"""The 2:4 operand: the two kept values of each group of 4, and where in the group they were.

`compress` prunes and compresses a tensor; `compress_matrix` takes a matrix that is pruned already. With K the length
of the compressed axis, padded to Kp:

======  ======================  ============  ====================  ========================
axis    operand A of the GEMM   values        metadata (row_major)  reduction axis
======  ======================  ============  ====================  ========================
1       dY    [T, K = C]        [T, Kp / 2]   int16 [T, Kp / 16]    channels (grad_input)
0       dY^T  [C, K = T]        [Kp / 2, C]   int16 [Kp / 16, C]    positions (grad_weight)
======  ======================  ============  ====================  ========================

A group's nibble of metadata is ``first | second << 2``, the indices of its two values in ascending order. Fewer
than two non-zeros: a zero is stored at the lowest free index. What the bits of a word mean, and the layouts other than
``row_major``, are in `layouts`.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from sdgp_accel.config import Pass, PruneSpec, SDGPConfig, check_choice
from sdgp_accel.group_rules import BITS
from sdgp_accel.layouts import K_PER_WORD, LAYOUTS
from sdgp_accel.philox import Rng, Seed
from sdgp_accel.pruning import check_values, prune

ROW_MAJOR = "row_major"


class SparseOperand(NamedTuple):
    """A matrix [T, C] with at most two non-zeros in each aligned group of 4 along `axis`, compressed along it.

    values, metadata: see the table above. Metadata in a layout other than ``"row_major"`` is one-dimensional.
    shape: (T, C).
    layout: ``"row_major"`` or a name in `layouts.LAYOUTS`.
    source: shape and dimension of the tensor behind the matrix; None where that is the matrix itself.
    """

    values: Tensor
    metadata: Tensor
    axis: int
    shape: tuple[int, int]
    layout: str = ROW_MAJOR
    source: tuple[tuple[int, ...], int] | None = None

    @property
    def nbytes(self) -> int:
        """Bytes of values and metadata: 9/16 of the dense matrix if its values have 16 bits and K needs no padding."""
        return self.values.nbytes + self.metadata.nbytes

    def decompress(self) -> Tensor:
        """The dense matrix [T, C], or the tensor of shape `source[0]` that was given to `compress`."""
        outer, inner = (self.shape[0], 1) if self.axis == 1 else (1, self.shape[1])
        quads = self.values.shape[self.axis] // 2
        words = self._row_major_words().reshape(outer, quads // 4, 1, inner).int()
        shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=words.device).view(4, 1)
        nibbles = (words >> shifts).reshape(outer, quads, 1, inner)
        indices = torch.cat([nibbles & 3, (nibbles >> 2) & 3], dim=2).long()
        kept = self.values.view(BITS[self.values.dtype])
        dense = kept.new_zeros(outer, quads, 4, inner)
        dense.scatter_(2, indices, kept.reshape(outer, quads, 2, inner))
        padded = (self.shape[0], quads * 4) if self.axis == 1 else (quads * 4, self.shape[1])
        matrix = dense.view(self.values.dtype).view(padded)[: self.shape[0], : self.shape[1]]
        if self.source is None:
            return matrix
        shape, dim = self.source
        rest = [size for d, size in enumerate(shape) if d != dim]
        return matrix.reshape(*rest, shape[dim]).movedim(-1, dim)

    def _row_major_words(self) -> Tensor:
        if self.layout == ROW_MAJOR:
            return self.metadata
        words = self.values.shape[self.axis] * 2 // K_PER_WORD
        decoded = LAYOUTS[self.layout].decode(self.metadata, self.shape[1 - self.axis], words)
        return decoded if self.axis == 1 else decoded.t()


def compress(
    x: Tensor,
    config: SDGPConfig | None = None,
    dim: int = -1,
    *,
    pass_name: Pass = "grad_input",
    seed: int | Seed | Rng | None = None,
    layout: str = ROW_MAJOR,
) -> SparseOperand:
    """Prune `x` along `dim` as `prune` does, with the same arguments, and compress the result along `dim`.

    x: at least one dimension. A 2-D `x` is compressed as it is, along axis `dim`. Any other is viewed as a matrix
        [everything else, dim's size] and compressed along axis 1: for a convolution's [N, C, P, Q] and ``dim=1`` that
        is [N P Q, C], a view without a copy if x is channels_last.
    layout: of the metadata: ``"row_major"`` or a name in `layouts.LAYOUTS`.

    ``compress(x, config, dim, seed=s).decompress()`` equals ``prune(x, config, dim, seed=s)`` bit for bit.

    Raises as `prune` does, and ValueError for a pattern whose result is not a 2:4 operand: it must be 1:M with
    M >= 2, or 2:M with M a multiple of 4.
    """
    config = SDGPConfig() if config is None else config
    if isinstance(config, SDGPConfig) and not PruneSpec("magnitude", config.n, config.m).fits_2_4:
        raise ValueError(
            f"config must have a pattern n:m that gives a 2:4 operand (n = 1 and m >= 2, or n = 2 and m a multiple "
            f"of 4); got {config.n}:{config.m}"
        )
    pruned = prune(x, config, dim, pass_name=pass_name, seed=seed)
    if x.ndim == 2:
        return compress_matrix(pruned, dim % 2, layout=layout)
    size = x.shape[dim]
    matrix = pruned.movedim(dim, -1).reshape(math.prod(x.shape) // size if size else 0, size)
    operand = compress_matrix(matrix, 1, layout=layout)
    source = (tuple(x.shape), dim % x.ndim)
    return SparseOperand(operand.values, operand.metadata, 1, operand.shape, layout, source)


def compress_matrix(pruned: Tensor, axis: int, *, layout: str = ROW_MAJOR, k_align: int = K_PER_WORD) -> SparseOperand:
    """Compress a matrix [T, C] that has at most two non-zeros in each aligned group of 4 along `axis`.

    k_align: Kp is a multiple of this, itself a multiple of 16. Padding stores zeros with a legal nibble. A `layout`
        other than ``"row_major"`` also pads K to its tile; rows beyond the matrix exist in the metadata only.

    Raises ValueError if a group holds more than two non-zeros (a check that waits for the device) and for bad
    arguments, TypeError for a dtype that `prune` does not take.
    """
    check_values("pruned", pruned)
    check_choice("layout", layout, (ROW_MAJOR, *LAYOUTS))
    if pruned.ndim != 2 or axis not in (0, 1):
        raise ValueError(f"pruned must be 2-D and axis 0 or 1; got shape {tuple(pruned.shape)} and axis {axis!r}")
    if k_align < 1 or k_align % K_PER_WORD:
        raise ValueError(f"k_align must be a positive multiple of {K_PER_WORD}; got {k_align}")
    if layout != ROW_MAJOR:
        k_align = math.lcm(k_align, LAYOUTS[layout].tile_words * K_PER_WORD)
    t, c = pruned.shape
    k = pruned.shape[axis]
    padding = -k % k_align
    padded = torch.cat([pruned, pruned.new_zeros((t, padding) if axis == 1 else (padding, c))], axis)
    outer, inner = (t, 1) if axis == 1 else (1, c)
    # By the bits, so that a kept -0 comes back as one, and a 16-bit NaN as itself: torch gathers those as float32.
    quads = padded.reshape(outer, (k + padding) // 4, 4, inner).view(BITS[pruned.dtype])

    e0, e1, e2, e3 = (quads != 0).int().unbind(2)
    if bool((e0 + e1 + e2 + e3 > 2).any()):
        raise ValueError(f"pruned must have at most 2 non-zeros in each group of 4 along axis {axis}; it has more")
    # The last non-zero is stored second, at 1 at least; the first one before it, or else a zero at 0, is stored first.
    second = torch.maximum(torch.maximum(3 * e3, 2 * e2), torch.ones_like(e1))
    first = (1 - e0) * torch.where((e1 > 0) & (second > 1), 1, 2 * e2 * (second > 2))
    indices = torch.stack([first, second], dim=2)
    values = quads.gather(2, indices.long()).view(pruned.dtype)
    nibbles = (first | second << 2).view(outer, (k + padding) // K_PER_WORD, 4, inner)
    shifts = torch.arange(0, 16, 4, dtype=torch.int32, device=nibbles.device).view(4, 1)
    words = (nibbles << shifts).sum(2).to(torch.int16)

    def as_matrix(tensor: Tensor, ratio: int) -> Tensor:
        length = (k + padding) // ratio
        return tensor.reshape((t, length) if axis == 1 else (length, c))

    metadata = as_matrix(words, K_PER_WORD)
    if layout != ROW_MAJOR:
        metadata = LAYOUTS[layout].encode(metadata if axis == 1 else metadata.t())
    return SparseOperand(as_matrix(values, 2), metadata, axis, (t, c), layout)
