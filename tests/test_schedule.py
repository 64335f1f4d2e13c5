"""When a schedule prunes, and what it refuses."""

from __future__ import annotations

import pytest

from sdgp_accel import Schedule


@pytest.mark.parametrize(
    ("schedule", "on"),
    [
        (Schedule(), range(20)),
        (Schedule(end=0.9), range(18)),
        (Schedule(start=0.25, end=0.5), range(5, 10)),
        (Schedule(end=1.0), range(20)),
        (Schedule(start=1, end=3.5, unit="epochs"), range(4, 14)),
        (Schedule(end=30, unit="epochs"), range(20)),
        (Schedule(start=7, unit="steps"), range(7, 20)),
        (Schedule(start=7, end=8, unit="steps"), [7]),
    ],
    ids=str,
)
def test_on_from_start_up_to_end(schedule: Schedule, on: range) -> None:
    """Five epochs of four steps."""
    active = [step for step in range(20) if schedule.active(fraction=step / 20, epochs=step / 4, steps=step)]
    assert active == list(on)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"unit": "minutes"}, "unit must be one of 'fraction', 'epochs', 'steps'; got 'minutes'"),
        ({"start": -1.0}, "start must be at least 0 and below 1 fraction; got -1.0"),
        ({"start": 1.0}, "start must be at least 0 and below 1 fraction; got 1.0"),
        ({"start": float("nan")}, "start must be"),
        ({"start": float("inf"), "unit": "steps"}, "start must be at least 0 and below inf steps; got inf"),
        ({"end": 0.0}, "end must be greater than start = 0.0 and at most 1 fraction; got 0.0"),
        ({"end": 2}, "at most 1 fraction; got 2"),
        ({"start": 5, "end": 5, "unit": "epochs"}, "end must be greater than start = 5 and at most inf epochs; got 5"),
        ({"end": float("nan")}, "end must be"),
    ],
)
def test_what_cannot_be_is_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Schedule(**arguments)


@pytest.mark.parametrize("name", ["start", "end"])
@pytest.mark.parametrize("value", ["0.5", True, 1j, [0.5]])
def test_what_is_no_number_is_named(name: str, value: object) -> None:
    with pytest.raises(TypeError, match=f"{name} must be a number; got "):
        Schedule(**{name: value})
