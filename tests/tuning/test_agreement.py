"""Ranks decide alike although their clocks differ, without waiting for each other."""

from __future__ import annotations

import os
import pickle
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sdgp_accel import SDGPConfig, accelerate_, backends, tune
from sdgp_accel.backends.reference import ReferenceBackend
from sdgp_accel.nn import SDGPLinear
from sdgp_accel.tuning import agreement, measurement
from sdgp_accel.tuning.agreement import agreed

# What the clock of each rank says: sparse gains for rank 0 and loses for rank 1.
SPARSE_MS = (0.1, 100.0)


class FakeKernels(ReferenceBackend):
    name = backends.KERNELS


def _pretend_kernels(rank: int) -> None:
    """A machine with kernels and a clock of its own."""
    fake = FakeKernels()
    backends._no_sparse_tensor_cores = lambda device: None
    backends.load = lambda name: fake if name == backends.KERNELS else ReferenceBackend()
    measurement.median_milliseconds = lambda candidates, device: {
        name: measurement.Milliseconds(1.0 if name.startswith("dense") else SPARSE_MS[rank], 0.0) for name in candidates
    }


def _step(features: int) -> str:
    """Forward and backward of a layer of this shape; what ran it."""
    layer = SDGPLinear(features, 8, config=SDGPConfig())
    layer(torch.randn(4, features)).sum().backward()
    decision = backends.decide_linear(
        layer._sdgp_plan, (4, features), 8, torch.float32, torch.device("cpu"), False, torch.float32
    )
    return decision.name


def _worker(rank: int, folder: str) -> None:
    os.environ["SDGP_TUNING_CACHE"] = "off"
    _pretend_kernels(rank)
    results: dict[str, Any] = {}
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        os.environ["WORLD_SIZE"] = "2"
        results["before"] = _step(12)
    results["warned"] = [str(warning.message) for warning in caught]
    dist.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=2)
    # Opposite orders, and one shape that the other rank never sees: nobody may wait for anybody.
    own = 100 + 4 * rank
    results["steps"] = {features: _step(features) for features in ((16, 24, own) if rank == 0 else (own, 24, 16))}
    if rank == 0:
        model = torch.nn.Sequential(torch.nn.Linear(32, 8))
        accelerate_(model)
        results["tuned"] = tune(model, torch.randn(4, 32)).layers[0].backend
    dist.barrier()
    results["after tune"] = _step(32)
    model = torch.nn.Sequential(torch.nn.Linear(12, 8))
    accelerate_(model)
    results["again"] = tune(model, torch.randn(4, 12)).layers[0].backend
    dist.barrier()
    Path(folder, f"rank{rank}.pickle").write_bytes(pickle.dumps(results))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    mp.spawn(_worker, (str(folder),), nprocs=2)
    return [pickle.loads((folder / f"rank{rank}.pickle").read_bytes()) for rank in range(2)]


@pytest.mark.timeout(300)
def test_ranks_with_different_clocks_decide_alike(ranks: list[dict[str, Any]]) -> None:
    first, second = (rank["steps"] for rank in ranks)
    assert {features: first[features] for features in (16, 24)} == {features: second[features] for features in (16, 24)}
    assert first[100] == backends.KERNELS  # nobody else had an opinion
    assert second[104] == "dense"


def test_tune_in_one_rank_decides_for_all(ranks: list[dict[str, Any]]) -> None:
    assert ranks[0]["tuned"] == backends.KERNELS  # rank 0 measured it first
    assert [rank["after tune"] for rank in ranks] == [backends.KERNELS] * 2


def test_a_choice_before_the_group_exists_warns_and_tune_takes_it_again(ranks: list[dict[str, Any]]) -> None:
    assert [rank["before"] for rank in ranks] == [backends.KERNELS, "dense"]
    assert all("before torch.distributed.init_process_group" in rank["warned"][-1] for rank in ranks)
    assert ranks[0]["again"] == ranks[1]["again"]


def test_one_process_proposes_for_itself() -> None:
    assert agreed("key", lambda: "value") == "value"
    assert agreed("key", lambda: "other") == "other"


class FailingStore:
    def __init__(self, fails: str) -> None:
        self._fails = fails

    def check(self, keys: list[str]) -> bool:
        if self._fails == "check":
            raise RuntimeError("connection lost")
        return False

    def compare_set(self, *arguments: str) -> bytes:
        raise NotImplementedError("compare_set")


@pytest.mark.parametrize("fails", ["check", "compare_set"])
def test_a_store_that_fails_leaves_each_rank_its_own(fails: str, monkeypatch: pytest.MonkeyPatch) -> None:
    backends.warn_once.cache_clear()
    monkeypatch.setattr(agreement, "_store", lambda: FailingStore(fails))
    proposals = iter(["mine", "never asked"])
    with pytest.warns(UserWarning, match="ranks cannot agree"):
        assert agreed("key", lambda: next(proposals)) == "mine"


@pytest.mark.parametrize("kind", ["hash", "file", "tcp", "prefix"])
def test_the_first_value_stays_in_every_kind_of_store(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = {
        "hash": dist.HashStore,
        "file": lambda: dist.FileStore(str(tmp_path / "store"), 1),
        "tcp": lambda: dist.TCPStore("127.0.0.1", 0, 1, is_master=True),
        "prefix": lambda: dist.PrefixStore("default", dist.HashStore()),
    }[kind]()
    monkeypatch.setattr(agreement, "_store", lambda: store)
    assert agreed("a", lambda: "first") == "first"
    assert agreed("a", lambda: pytest.fail("asked although the store knows")) == "first"

    def overtaken() -> str:
        assert agreed("b", lambda: "faster") == "faster"
        return "slower"

    assert agreed("b", overtaken) == "faster"


@pytest.mark.parametrize("size", ["", "1", "eight"])
def test_a_world_size_of_whatever_kind_is_no_error(monkeypatch: pytest.MonkeyPatch, size: str) -> None:
    backends.warn_once.cache_clear()
    monkeypatch.setenv("WORLD_SIZE", size)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert agreed("key", lambda: "value") == "value"
    assert len(caught) == (size == "eight")


@pytest.mark.parametrize("size", [1, 2])
def test_a_group_of_several_shares_what_is_proposed_under_a_name_of_its_own(
    size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Others keep keys in that store, too; and one process alone has no use for it."""
    store = dist.HashStore()
    monkeypatch.setattr(dist, "is_initialized", lambda: True)
    monkeypatch.setattr(dist, "get_world_size", lambda: size)
    monkeypatch.setattr(dist.distributed_c10d, "_get_default_store", lambda: store)
    assert agreed("key", lambda: "value") == "value"
    assert store.check(["sdgp_accel/key"]) == (size > 1)
    assert not store.check(["key"])
