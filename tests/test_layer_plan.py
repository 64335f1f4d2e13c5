"""Plans as strings: every configuration survives the round trip, and equal configurations share a string."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sdgp_accel.config import FUNCTIONS, SCOPES, SDGPConfig
from sdgp_accel.layer_plan import decode, encode, plan_string, prunes

CONFIGS = st.builds(
    lambda nm, **fields: SDGPConfig(n=min(nm), m=max(nm), **fields),
    nm=st.tuples(st.integers(1, 32), st.integers(1, 32)),
    prune=st.sampled_from(FUNCTIONS)
    | st.fixed_dictionaries({"grad_input": st.sampled_from(FUNCTIONS), "grad_weight": st.sampled_from(FUNCTIONS)}),
    grad_input=st.sampled_from(("sparse", "dense")),
    grad_weight=st.sampled_from(("sparse", "dense")),
    scope=st.sampled_from((None, *SCOPES)),
    eps=st.floats(0, 1),
    backend=st.sampled_from(("auto", "reference", "cutlass")),
    fallback=st.sampled_from(("dense", "emulate", "error")),
)


@given(config=CONFIGS, kind=st.sampled_from(("linear", "conv2d")))
def test_round_trip(config: SDGPConfig, kind: str) -> None:
    text = plan_string(kind, config)
    plan = decode(text)
    assert encode(plan) == text
    default = "group" if kind == "linear" else "sample_channel"
    assert plan.grad_input == config.spec("grad_input", default)
    assert plan.grad_weight == config.spec("grad_weight", default)
    assert (plan.backend, plan.fallback) == (config.backend, config.fallback)
    assert plan.prunes == (config.n < config.m and "sparse" in (config.grad_input, config.grad_weight))
    assert prunes(text) == plan.prunes


def test_draws_only_where_a_pruned_pass_is_random() -> None:
    mixed = {"grad_input": "mvue", "grad_weight": "magnitude"}
    assert decode(plan_string("linear", SDGPConfig(prune=mixed))).draws
    assert not decode(plan_string("linear", SDGPConfig(prune=mixed, grad_input="dense"))).draws
    assert not decode(plan_string("linear", SDGPConfig(prune="mvue", n=4))).draws


@pytest.mark.parametrize(
    "text", ["", "mvue", "-;-;auto", "mvue,2,4,group;-;auto;dense", "mvue,5,4,group,0.0;-;auto;dense"]
)
def test_other_strings_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"plan must be a string made by plan_string|n must be"):
        decode(text)
