"""Everything that can be wrong in a configuration is found when it is made, by name, value and what is accepted."""

from __future__ import annotations

import dataclasses
import pickle
from typing import Any

import pytest

from sdgp_accel import SDGPConfig
from sdgp_accel.config import FUNCTIONS, PruneSpec

NAMES = {
    "prune": "'magnitude', 'random', 'rescale_magnitude', 'mvue'",
    "grad_input": "'sparse', 'dense'",
    "grad_weight": "'sparse', 'dense'",
    "scope": "'group', 'sample_channel', 'tensor'",
    "backend": "'auto', 'reference', 'cutlass'",
    "fallback": "'dense', 'emulate', 'error'",
}
BOTH = dict.fromkeys(("grad_input", "grad_weight"), "mvue")


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"n": 5, "m": 4}, ValueError, "n must be between 1 and m = 4; got 5"),
        ({"n": 0}, ValueError, "n must be between 1 and m = 4; got 0"),
        ({"n": -1}, ValueError, "n must be between 1 and m = 4; got -1"),
        ({"m": 33}, ValueError, "m must be between 1 and 32; got 33"),
        ({"n": 0, "m": 0}, ValueError, "m must be between 1 and 32; got 0"),
        ({"n": 2.0}, TypeError, "n must be an int; got 2.0 of type float"),
        ({"n": True}, TypeError, "n must be an int; got True of type bool"),
        ({"m": "4"}, TypeError, "m must be an int; got '4' of type str"),
        ({"prune": None}, TypeError, "prune must be a function name or a mapping; got None"),
        (
            {"prune": {"grad_input": "mvue"}},
            ValueError,
            r"prune as a mapping needs .*'grad_weight'.*; got \('grad_input',",
        ),
        ({"prune": {**BOTH, "bias": "mvue"}}, ValueError, r"prune as a mapping needs .*; got .*'bias'"),
        ({"prune": {**BOTH, "grad_weight": "best"}}, ValueError, "prune must be one of .*; got 'best'"),
        ({"eps": -1.0}, ValueError, "eps must be a finite number >= 0; got -1.0"),
        ({"eps": float("nan")}, ValueError, "eps must be a finite number >= 0; got nan"),
        ({"eps": float("inf")}, ValueError, "eps must be a finite number >= 0; got inf"),
        ({"eps": "0"}, ValueError, "eps must be a finite number >= 0; got '0'"),
        ({"min_in_channels": -1}, ValueError, "min_in_channels must be an int >= 0; got -1"),
        ({"min_in_channels": 2.5}, ValueError, "min_in_channels must be an int >= 0; got 2.5"),
        *(
            ({name: "bogus"}, ValueError, f"{name} must be one of {names}; got 'bogus'")
            for name, names in NAMES.items()
        ),
    ],
)
def test_what_is_wrong_is_named(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        SDGPConfig(**fields)


def test_a_spec_checks_itself_too() -> None:
    with pytest.raises(ValueError, match=r"function must be one of 'magnitude', .*; got 'best'"):
        PruneSpec("best", 2, 4)
    with pytest.raises(ValueError, match="m must be between 1 and 32; got 64"):
        PruneSpec("mvue", 2, 64)


@pytest.mark.parametrize("m", range(1, 33))
def test_every_pattern_up_to_32_is_accepted(m: int) -> None:
    for n in range(1, m + 1):
        spec = SDGPConfig(n=n, m=m).spec("grad_input", "group")
        assert (spec is None) == (n == m)
        # By enumeration: does any aligned group of 4 meet more than 2 values that may be kept?
        if spec is not None:
            most = max(
                sum(min(n, sum(i // m == group for i in range(4 * quad, 4 * quad + 4))) for group in range(4 * m))
                for quad in range(m)
            )
            assert spec.fits_2_4 == (most <= 2)


def test_one_function_for_each_pass() -> None:
    config = SDGPConfig(prune={"grad_input": "magnitude", "grad_weight": "mvue"}, grad_weight="dense")
    assert config.functions == ("magnitude", "mvue")
    assert config.spec("grad_input", "group") == PruneSpec("magnitude", 2, 4)
    assert config.spec("grad_weight", "group") is None


@pytest.mark.parametrize("function", FUNCTIONS)
def test_configurations_are_frozen_hashable_and_picklable(function: str) -> None:
    config = SDGPConfig(prune={"grad_input": function, "grad_weight": "mvue"})
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.n = 1  # type: ignore[misc]
    assert pickle.loads(pickle.dumps(config)) == config
    assert hash(config) == hash(dataclasses.replace(config))
