"""What tuning finds out about one layer shape: the times, and the choice that follows from them."""

from __future__ import annotations

from typing import Any, NamedTuple


class BackwardTimes(NamedTuple):
    """Milliseconds of the parts of one layer's backward; None where the plan does not prune that pass.

    dense_both, sparse_both: all of it in one call, where there is one; then the parts tell where its time goes.
    """

    dense_dgrad: float
    dense_wgrad: float
    sparse_dgrad: float | None = None
    sparse_wgrad: float | None = None
    compress_both: float | None = None
    compress_dgrad: float | None = None
    compress_wgrad: float | None = None
    dense_both: float | None = None
    sparse_both: float | None = None

    @property
    def dense(self) -> float:
        """The ordinary backward."""
        return self.dense_dgrad + self.dense_wgrad if self.dense_both is None else self.dense_both

    def single(self, index: int) -> dict[bool, float]:
        """Milliseconds of dgrad (0) or wgrad (1) as the only pass that is wanted: not pruned, and pruned."""
        product, compress, dense = (
            (self.sparse_wgrad, self.compress_wgrad, self.dense_wgrad)
            if index
            else (self.sparse_dgrad, self.compress_dgrad, self.dense_dgrad)
        )
        return {False: dense} if product is None or compress is None else {False: dense, True: compress + product}

    def totals(self) -> dict[tuple[bool, bool], float]:
        """Milliseconds of the whole backward for each choice (dgrad pruned, wgrad pruned) that can run."""
        totals = {(False, False): self.dense}
        if self.sparse_dgrad is not None and self.compress_dgrad is not None:
            totals[True, False] = self.compress_dgrad + self.sparse_dgrad + self.dense_wgrad
        if self.sparse_wgrad is not None and self.compress_wgrad is not None:
            totals[False, True] = self.compress_wgrad + self.dense_dgrad + self.sparse_wgrad
        if self.sparse_both is not None:
            totals[True, True] = self.sparse_both
        elif self.sparse_dgrad is not None and self.sparse_wgrad is not None and self.compress_both is not None:
            totals[True, True] = self.compress_both + self.sparse_dgrad + self.sparse_wgrad
        return totals


class Tuned(NamedTuple):
    """The choice for one layer shape.

    prunes: whether (dgrad, wgrad) run pruned. tilings: `str` of the tiling of each pass, None for the backend's own.
    times: on the GPU; None where the choice was not measured. single: whether each pass runs pruned where it is the
    only one that is wanted, and has to make up for prune + compress alone.
    """

    prunes: tuple[bool, bool]
    reason: str
    tilings: tuple[str | None, str | None] = (None, None)
    times: BackwardTimes | None = None
    single: tuple[bool, bool] = (False, False)

    def single_reason(self, index: int) -> str:
        """`reason`, where dgrad (0) or wgrad (1) is the only pass that is wanted."""
        if self.times is None:
            return self.reason
        times, name = self.times.single(index), ("dgrad", "wgrad")[index]
        if True not in times:
            return f"{name} alone, which is not to be pruned"
        comparison = f"{name} alone takes {times[True]:.3f} ms, dense {times[False]:.3f} ms"
        return f"measured: {comparison}" if self.single[index] else f"dense is faster here: {comparison}"

    def to_dict(self) -> dict[str, Any]:
        """Plain types only, for JSON."""
        times = None if self.times is None else self.times._asdict()
        pairs = {"prunes": list(self.prunes), "tilings": list(self.tilings), "single": list(self.single)}
        return {**self._asdict(), **pairs, "times": times}

    @classmethod
    def from_dict(cls, values: Any) -> Tuned:
        """The choice that `to_dict` has written. Raises ValueError for anything else."""
        try:
            times = values["times"]
            if times is not None:
                times = BackwardTimes(**{name: _checked(ms, float, type(None)) for name, ms in times.items()})
            tuned = cls(
                _pair(values["prunes"], bool),
                _checked(values["reason"], str),
                _pair(values["tilings"], str, type(None)),
                times,
                _pair(values["single"], bool),
            )
        except (AttributeError, KeyError, TypeError) as error:
            raise ValueError(f"not a tuned layer: {values!r:.200}") from error
        if times is not None and not (
            tuned.prunes in times.totals() and all(tuned.single[index] in times.single(index) for index in (0, 1))
        ):
            raise ValueError(f"not a tuned layer, its choice was never timed: {values!r:.200}")
        return tuned


def _checked(value: Any, *types: type) -> Any:
    if not isinstance(value, types):
        raise TypeError(value)
    return value


def _pair(values: Any, *types: type) -> tuple[Any, Any]:
    if len(_checked(values, list)) != 2:
        raise TypeError(values)
    return _checked(values[0], *types), _checked(values[1], *types)
