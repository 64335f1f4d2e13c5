"""The record of one tuned layer: what it adds up, and that only its own JSON is read back."""

from __future__ import annotations

import json

import pytest

from sdgp_accel.tuning import BackwardTimes, Tuned

TIMES = BackwardTimes(4.0, 3.0, sparse_dgrad=2.0, compress_dgrad=0.5)
TUNED = Tuned((True, False), "measured", ("128x256", None), TIMES)


def test_a_pass_that_is_dense_by_configuration_is_no_candidate() -> None:
    times = BackwardTimes(dense_dgrad=4.0, dense_wgrad=4.0, sparse_wgrad=0.1, compress_wgrad=0.1)
    assert times.totals() == {(False, False): 8.0, (False, True): pytest.approx(4.2)}
    both = BackwardTimes(1.0, 2.0, 0.5, 0.75, compress_both=0.25, compress_dgrad=0.125, compress_wgrad=0.0625)
    assert both.totals() == {
        (False, False): 3.0, (True, False): 0.125 + 0.5 + 2.0, (False, True): 0.0625 + 1.0 + 0.75,
        (True, True): 0.25 + 0.5 + 0.75,
    }  # fmt: skip


def test_what_was_timed_as_one_call_counts_and_not_its_parts() -> None:
    times = BackwardTimes(1.0, 2.0, 0.5, 0.75, 0.25, 0.125, 0.0625, dense_both=2.5, sparse_both=1.25)
    assert times.dense == 2.5
    assert times.totals() == {
        (False, False): 2.5, (True, False): 0.125 + 0.5 + 2.0, (False, True): 0.0625 + 1.0 + 0.75, (True, True): 1.25,
    }  # fmt: skip


def test_a_pass_that_is_the_only_one_pays_for_its_own_compression() -> None:
    times = BackwardTimes(1.0, 2.0, 0.5, 0.75, 0.25, 0.125, 0.0625, dense_both=2.5, sparse_both=1.25)
    assert times.single(0) == {False: 1.0, True: 0.125 + 0.5}
    assert times.single(1) == {False: 2.0, True: 0.0625 + 0.75}
    assert TIMES.single(1) == {False: 3.0}
    tuned = Tuned((True, True), "measured", times=times, single=(True, False))
    assert tuned.single_reason(0) == "measured: dgrad alone takes 0.625 ms, dense 1.000 ms"
    assert tuned.single_reason(1) == "dense is faster here: wgrad alone takes 0.812 ms, dense 2.000 ms"
    assert TUNED.single_reason(1) == "wgrad alone, which is not to be pruned"
    assert Tuned((True, True), "predicted").single_reason(0) == "predicted"


@pytest.mark.parametrize("tuned", [TUNED, TUNED._replace(single=(True, False)), Tuned((False, False), "no memory")])
def test_round_trip(tuned: Tuned) -> None:
    assert Tuned.from_dict(json.loads(json.dumps(tuned.to_dict()))) == tuned


@pytest.mark.parametrize(
    "change",
    [
        {"prunes": [True]}, {"prunes": [1, 0]}, {"prunes": "tf"}, {"prunes": [False, True]}, {"reason": None},
        {"single": [True]}, {"single": [False, True]},
        {"tilings": ["128x256"]}, {"tilings": [None, 3]}, {"times": {"dense_dgrad": 1.0}}, {"times": [1.0]},
        {"times": {"dense_dgrad": "1", "dense_wgrad": 1.0}}, {"times": {"dense": 1.0, "dense_wgrad": 1.0}},
    ],
    ids=str,
)  # fmt: skip
def test_anything_else_is_refused(change: dict[str, object]) -> None:
    with pytest.raises(ValueError, match="not a tuned layer"):
        Tuned.from_dict(TUNED.to_dict() | change)
    values = TUNED.to_dict()
    del values[next(iter(change))]
    with pytest.raises(ValueError, match="not a tuned layer"):
        Tuned.from_dict(values)
    for other in (None, [], "text", 3):
        with pytest.raises(ValueError, match="not a tuned layer"):
            Tuned.from_dict(other)
