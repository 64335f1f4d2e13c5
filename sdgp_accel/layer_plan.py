"""What one layer's backward does, as a value that fits into a string argument of a custom op."""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple

from sdgp_accel.config import PruneSpec, Scope, SDGPConfig

LayerKind = Literal["linear", "conv2d"]

# The paper sums over the positions of one (sample, channel); a Linear layer has no such natural neighbourhood.
DEFAULT_SCOPE: dict[LayerKind, Scope] = {"linear": "group", "conv2d": "sample_channel"}


class LayerPlan(NamedTuple):
    """The pruning of both passes (None: that pass consumes the dense gradient) and who computes them."""

    grad_input: PruneSpec | None
    grad_weight: PruneSpec | None
    backend: str
    fallback: str

    @property
    def prunes(self) -> bool:
        """False where both passes are dense."""
        return self.grad_input is not None or self.grad_weight is not None

    @property
    def draws(self) -> bool:
        """True where some pass needs random numbers."""
        return any(spec is not None and spec.is_random for spec in (self.grad_input, self.grad_weight))


_NO_PASS = "-;-;"  # how the strings of plans begin that prune nothing


def encode(plan: LayerPlan) -> str:
    """The canonical string of `plan`: equal plans have equal strings. `decode` inverts it."""
    return ";".join((_encode_spec(plan.grad_input), _encode_spec(plan.grad_weight), plan.backend, plan.fallback))


def prunes(text: str) -> bool:
    """`LayerPlan.prunes` of the plan that `text` encodes; torch.compile evaluates it while tracing."""
    return not text.startswith(_NO_PASS)


@functools.cache
def decode(text: str) -> LayerPlan:
    """The plan that `text` encodes, parsed once per distinct string. Raises ValueError for other strings."""
    fields = text.split(";")
    if len(fields) != 4 or any(field != "-" and field.count(",") != 4 for field in fields[:2]):
        raise ValueError(f"plan must be a string made by plan_string; got {text!r}")
    return LayerPlan(_decode_spec(fields[0]), _decode_spec(fields[1]), fields[2], fields[3])


@functools.cache
def plan_string(kind: LayerKind, config: SDGPConfig) -> str:
    """The encoded plan of a layer of `kind` under `config`; TypeError for anything but an `SDGPConfig`."""
    if not isinstance(config, SDGPConfig):
        raise TypeError(f"config must be an SDGPConfig; got {config!r}")
    scope = DEFAULT_SCOPE[kind]
    return encode(
        LayerPlan(config.spec("grad_input", scope), config.spec("grad_weight", scope), config.backend, config.fallback)
    )


def _encode_spec(spec: PruneSpec | None) -> str:
    return "-" if spec is None else f"{spec.function},{spec.n},{spec.m},{spec.scope},{spec.eps!r}"


def _decode_spec(text: str) -> PruneSpec | None:
    if text == "-":
        return None
    function, n, m, scope, eps = text.split(",")
    return PruneSpec(function, int(n), int(m), scope, float(eps))


INACTIVE = encode(LayerPlan(None, None, "auto", "dense"))
