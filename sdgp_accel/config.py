"""What the user asks for (`SDGPConfig`) and what one pass of one layer is told (`PruneSpec`).

Everything that can be wrong in a configuration is found here, when it is constructed; the code below it
trusts what it is given.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, get_args

Function = Literal["magnitude", "random", "rescale_magnitude", "mvue"]
Scope = Literal["group", "sample_channel", "tensor"]
Pass = Literal["grad_input", "grad_weight"]
PassMode = Literal["sparse", "dense"]
BackendName = Literal["auto", "reference", "cutlass"]
Fallback = Literal["dense", "emulate", "error"]

FUNCTIONS: tuple[str, ...] = get_args(Function)
SCOPES: tuple[str, ...] = get_args(Scope)
PASSES: tuple[str, ...] = get_args(Pass)
MAX_M = 32


class PruneFunctions(NamedTuple):
    """The prune function of each pass."""

    grad_input: str
    grad_weight: str


def check_choice(argument: str, value: object, accepted: tuple[str, ...]) -> None:
    """Raise ValueError naming `argument`, `value` and `accepted` unless `value` is one of `accepted`."""
    if value not in accepted:
        raise ValueError(f"{argument} must be one of {', '.join(map(repr, accepted))}; got {value!r}")


def check_pattern(n: object, m: object) -> None:
    """Raise unless 1 <= n <= m <= 32 are integers (TypeError for other types, ValueError for other values)."""
    for name, value in (("n", n), ("m", m)):
        if not isinstance(value, int) or isinstance(value, bool):
            raise TypeError(f"{name} must be an int; got {value!r} of type {type(value).__name__}")
    assert isinstance(n, int) and isinstance(m, int)
    if not 1 <= m <= MAX_M:
        raise ValueError(f"m must be between 1 and {MAX_M}; got {m}")
    if not 1 <= n <= m:
        raise ValueError(f"n must be between 1 and m = {m}; got {n}")


@dataclass(frozen=True, slots=True)
class PruneSpec:
    """How one gradient is pruned along one axis: at most `n` of every `m` values kept by `function`.

    `scope` is resolved (never None) and only matters for ``rescale_magnitude``; `eps` is added to that
    function's denominator.
    """

    function: str
    n: int
    m: int
    scope: str = "group"
    eps: float = 0.0

    def __post_init__(self) -> None:
        check_choice("function", self.function, FUNCTIONS)
        check_pattern(self.n, self.m)
        check_choice("scope", self.scope, SCOPES)
        if not (isinstance(self.eps, (int, float)) and 0.0 <= self.eps < float("inf")):
            raise ValueError(f"eps must be a finite number >= 0; got {self.eps!r}")

    @property
    def is_dense(self) -> bool:
        """True where n == m: nothing is pruned."""
        return self.n == self.m

    @property
    def is_random(self) -> bool:
        """True where the function draws random numbers."""
        return self.function in ("random", "mvue") and not self.is_dense

    @property
    def fits_2_4(self) -> bool:
        """True where every aligned group of 4 holds at most 2 non-zeros, so that the result is a 2:4 operand."""
        # A quad meets at most two groups of any 1:M with M >= 2; with 2:M it must lie inside one group.
        return (self.n == 1 and self.m >= 2) or (self.n == 2 and self.m % 4 == 0)


@dataclass(frozen=True)
class SDGPConfig:
    """What `accelerate_` does to the backward passes of the layers it swaps.

    prune: one function name for both passes, or a mapping with the keys ``"grad_input"`` and
        ``"grad_weight"``. ``"mvue"`` (the default) is unbiased; ``"rescale_magnitude"`` is the function of
        the SDGP paper (arXiv:2202.00774).
    n, m: at most `n` of every `m` consecutive values along the reduction axis are kept, 1 <= n <= m <= 32.
    grad_input, grad_weight: ``"sparse"`` prunes the output gradient that this pass consumes, ``"dense"``
        leaves it alone.
    scope: the values over which ``rescale_magnitude`` sums: ``"group"``, ``"sample_channel"``, ``"tensor"``,
        or None for the layer's default (``"sample_channel"`` for Conv2d, ``"group"`` for Linear).
    eps: added to the denominator of ``rescale_magnitude``.
    backend: ``"reference"`` (prune, then dense ops, any device), ``"cutlass"`` (sparse tensor cores) or
        ``"auto"``.
    fallback: what a layer does that the kernels cannot take on a GPU that has them: ``"dense"``,
        ``"emulate"`` or ``"error"``.
    min_in_channels: layers with fewer input channels stay as they are.

    Raises ValueError or TypeError naming the field, the value and what is accepted.
    """

    prune: str | Mapping[str, str] | PruneFunctions = "mvue"
    n: int = 2
    m: int = 4
    grad_input: PassMode = "sparse"
    grad_weight: PassMode = "sparse"
    scope: Scope | None = None
    eps: float = 0.0
    backend: BackendName = "auto"
    fallback: Fallback = "dense"
    min_in_channels: int = 4

    def __post_init__(self) -> None:
        if isinstance(self.prune, Mapping):
            if set(self.prune) != set(PASSES):
                raise ValueError(f"prune as a mapping needs exactly the keys {PASSES}; got {tuple(self.prune)}")
            # Hashable and immutable: a frozen config must not change under the layers that share it.
            object.__setattr__(self, "prune", PruneFunctions(**self.prune))
        elif not isinstance(self.prune, (str, PruneFunctions)):
            raise TypeError(f"prune must be a function name or a mapping; got {self.prune!r}")
        for function in self.functions:
            check_choice("prune", function, FUNCTIONS)
        check_pattern(self.n, self.m)
        check_choice("grad_input", self.grad_input, get_args(PassMode))
        check_choice("grad_weight", self.grad_weight, get_args(PassMode))
        if self.scope is not None:
            check_choice("scope", self.scope, SCOPES)
        check_choice("backend", self.backend, get_args(BackendName))
        check_choice("fallback", self.fallback, get_args(Fallback))
        if not (isinstance(self.eps, (int, float)) and 0.0 <= self.eps < float("inf")):
            raise ValueError(f"eps must be a finite number >= 0; got {self.eps!r}")
        if not isinstance(self.min_in_channels, int) or self.min_in_channels < 0:
            raise ValueError(f"min_in_channels must be an int >= 0; got {self.min_in_channels!r}")

    @property
    def functions(self) -> PruneFunctions:
        """The prune function of each pass."""
        if isinstance(self.prune, str):
            return PruneFunctions(self.prune, self.prune)
        assert isinstance(self.prune, PruneFunctions)
        return self.prune

    def spec(self, pass_name: Pass, default_scope: Scope) -> PruneSpec | None:
        """The `PruneSpec` of one pass, or None where that pass is dense; `default_scope` fills ``scope=None``."""
        if getattr(self, pass_name) == "dense" or self.n == self.m:
            return None
        function = getattr(self.functions, pass_name)
        return PruneSpec(function, self.n, self.m, self.scope or default_scope, float(self.eps))
