"""Work spread over Python threads: all of it, once, with torch's number of threads as it was."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from sdgp_accel.cpu_threads import PIECES_PER_THREAD, for_each, is_plain_cpu
from sdgp_accel.group_rules import Scratch


@pytest.fixture(autouse=True)
def three_threads() -> Iterator[None]:
    own = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(own)


@pytest.mark.parametrize("count", [0, 1, PIECES_PER_THREAD * 3 - 1, PIECES_PER_THREAD * 3, 1000])
def test_every_item_once(count: int) -> None:
    done: list[int] = []
    for_each(range(count), lambda item, scratch: done.append(item), torch.empty(1))
    assert sorted(done) == list(range(count))
    assert torch.get_num_threads() == 3


def test_each_thread_has_its_scratch_and_one_torch_thread() -> None:
    scratches: set[Scratch] = set()
    threads: set[int] = set()

    def work(item: int, scratch: Scratch) -> None:
        scratches.add(scratch)
        threads.add(torch.get_num_threads())

    for_each(range(1000), work, torch.empty(1))
    assert 1 <= len(scratches) <= 3
    assert threads == {1}


@pytest.mark.parametrize(("count", "expected"), [(1, 1), (2, 2), (4, 2), (16, 2), (24, 3), (99, 3)])
def test_there_are_threads_for_the_pieces_and_all_write_where_the_caller_may(count: int, expected: int) -> None:
    seen: set[int] = set()
    together = threading.Barrier(expected, timeout=10)
    with torch.inference_mode():
        x = torch.zeros(count)

        def work(item: int, scratch: Scratch) -> None:
            if threading.get_ident() not in seen:
                seen.add(threading.get_ident())
                together.wait()  # so that each thread gets a piece
            time.sleep(0.001)
            x[item].add_(1)  # of a tensor that only inference mode may change

        for_each(range(count), work, x)
    assert len(seen) == expected
    assert x.tolist() == [1.0] * count


def test_an_error_comes_out() -> None:
    def work(item: int, scratch: Scratch) -> None:
        if item == 700:
            raise ValueError("item 700")

    with pytest.raises(ValueError, match="item 700"):
        for_each(range(1000), work, torch.empty(1))
    assert torch.get_num_threads() == 3


def test_what_is_not_memory_of_a_cpu() -> None:
    assert is_plain_cpu(torch.empty(1))
    assert not is_plain_cpu(torch.nn.Parameter(torch.empty(1)))
    assert not is_plain_cpu(torch.empty(1, device="meta"))
    with FakeTensorMode():
        assert not is_plain_cpu(torch.empty(1))
