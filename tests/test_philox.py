"""Philox against Random123's published vectors and a pure-Python version; seeds."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import sdgp_accel as sdgp
from sdgp_accel import philox
from sdgp_accel.philox import GroupWords, Rng, draw, next_seed, philox4x32, philox4x32_cpu, round_keys, take
from sdgp_accel.pruning import prune
from tests import oracle

ONES = 0xFFFFFFFF
# Random123, examples/kat_vectors, philox4x32 with 10 rounds.
KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((ONES, ONES, ONES, ONES), (ONES, ONES), (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


def lanes(values: tuple[int, ...]) -> tuple[torch.Tensor, ...]:
    return tuple(torch.tensor(v, dtype=torch.int64) for v in values)


def empty(name: str, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype)


@pytest.mark.parametrize(("counter", "key", "words"), KNOWN)
def test_known_answers(counter: tuple[int, ...], key: tuple[int, ...], words: tuple[int, ...]) -> None:
    keys = round_keys(lanes(key))
    assert tuple(int(w) for w in philox4x32(lanes(counter), keys)) == words
    for count in range(1, 5):
        fast = philox4x32_cpu(torch.tensor([counter[0]] * 3), counter[1:], keys, count, empty)
        assert [word.tolist() for word in fast] == [[word] * 3 for word in words[:count]]
    assert tuple(oracle.philox(counter, key)) == words


@given(
    seed=st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2),
    rank=st.integers(0, 2**20),
    pass_index=st.integers(0, 1),
    groups=st.lists(st.integers(0, 2**56 - 1), min_size=1, max_size=5),
    count=st.integers(1, 32),
)
def test_group_words(seed: tuple[int, int], rank: int, pass_index: int, groups: list[int], count: int) -> None:
    rng = Rng(torch.tensor(seed), rank, pass_index)
    words = GroupWords(rng)(torch.tensor(groups), count)
    expected = [[oracle.group_word(seed, rank, pass_index, g, i) for g in groups] for i in range(count)]
    assert torch.stack(list(words)).tolist() == expected
    few = [g % 2**32 for g in groups]
    words = GroupWords(rng, 1 << 32)(torch.tensor(few), count, empty)
    assert [word.tolist() for word in words] == [
        [oracle.group_word(seed, rank, pass_index, g, i) for g in few] for i in range(count)
    ]


def test_groups_beyond_32_bits_have_words_of_their_own() -> None:
    """From the first tensor on that has such groups."""
    rng, groups = Rng(draw("cpu"), 1, 0), [0, (1 << 32) - 1, 1 << 32]
    words = GroupWords(rng, (1 << 32) + 1)(torch.tensor(groups), 4, empty)
    seed = tuple(rng.seed.tolist())
    expected = [[oracle.group_word(seed, 1, 0, g, i) for g in groups] for i in range(4)]
    assert [word.tolist() for word in words] == expected


def test_draw_follows_the_generator() -> None:
    torch.manual_seed(3)
    state = torch.get_rng_state()
    first, second = draw("cpu"), draw("cpu")
    assert first.shape == (2,)
    assert first.dtype == torch.int64
    assert not torch.equal(first, second)
    torch.set_rng_state(state)
    assert torch.equal(draw("cpu"), first)
    generator = torch.Generator().manual_seed(3)
    assert torch.equal(draw("cpu", generator), first)


class Counting:
    """A generator as CUDA's are: a seed and an offset that counts random words."""

    def __init__(self, seed: int) -> None:
        self.seed, self.offset = seed, 0

    def initial_seed(self) -> int:
        return self.seed

    def get_offset(self) -> int:
        return self.offset

    def set_offset(self, offset: int) -> None:
        assert offset % 4 == 0, "torch refuses other offsets"
        self.offset = offset


@pytest.mark.parametrize("seed", [0, 3, -1 % 2**64])
def test_a_counting_generator_gives_seeds_on_the_host(seed: int) -> None:
    generator: Any = Counting(seed)
    seeds = [take(generator) for _ in range(3)]
    assert len(set(seeds)) == 3
    assert [offset for _, offset in seeds] == [0, 1, 2]
    assert all(-(1 << 63) <= word < 1 << 63 for pair in seeds for word in pair)
    generator.set_offset(4)
    assert take(generator) == seeds[1]
    assert take(cast("Any", Counting(seed + 1)))[0] != seeds[0][0]
    words = [
        torch.stack(list(GroupWords(Rng(s, 1, 1))(torch.arange(8), 4))) for s in (seeds[2], torch.tensor(seeds[2]))
    ]
    assert torch.equal(*words)


def test_a_cpu_draws_its_seeds() -> None:
    torch.manual_seed(3)
    seed = next_seed(torch.device("cpu"))
    torch.manual_seed(3)
    assert isinstance(seed, Tensor)
    assert torch.equal(seed, draw("cpu"))


def test_words_are_uniform() -> None:
    words = GroupWords(Rng(draw("cpu")))(torch.arange(1 << 16), 4)
    for word in words:
        counts = torch.bincount(word >> 24, minlength=256).double()
        # chi-squared with 255 degrees of freedom: mean 255, standard deviation 22.6
        assert ((counts - 256) ** 2 / 256).sum() < 255 + 7 * 22.6


def test_ranks_and_passes_differ() -> None:
    seed, index = torch.tensor([5, 7]), torch.arange(100)
    streams = [next(GroupWords(Rng(seed, rank, p))(index, 1)) for rank in range(3) for p in range(2)]
    for i, a in enumerate(streams):
        for b in streams[:i]:
            assert not torch.equal(a, b)


def test_the_data_parallel_rank_may_be_set(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where tensor-parallel processes have ranks of their own in the default group."""
    monkeypatch.setattr(philox, "_rank", None)
    x, weight = torch.randn(8, 8), torch.randn(8, 8, requires_grad=True)

    def gradient() -> torch.Tensor:
        torch.manual_seed(3)
        (dw,) = torch.autograd.grad(sdgp.functional.linear(x, weight), weight, torch.linspace(-1, 2, 64).view(8, 8))
        return dw

    own = gradient()
    sdgp.set_data_parallel_rank(2)
    assert philox.data_parallel_rank() == 2
    assert not torch.equal(gradient(), own)
    assert torch.equal(prune(x, seed=5), prune(x, seed=Rng((5, 0), rank=2)))
    sdgp.set_data_parallel_rank(None)
    assert torch.equal(gradient(), own)
    for rank in (-1, 1 << 31, True, 1.0, "0"):
        with pytest.raises(ValueError, match=r"rank must be an int from 0 to 2\^31 - 1, or None; got"):
            sdgp.set_data_parallel_rank(rank)  # type: ignore[arg-type]


def test_a_cuda_device_may_be_asked_for_a_seed_first_of_all(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its generators do not exist before CUDA is initialised, which asking for the current device does."""

    class Generator:
        offset = 8

        def get_offset(self) -> int:
            return self.offset

        def set_offset(self, offset: int) -> None:
            self.offset = offset

        def initial_seed(self) -> int:
            return 3

    def current_device() -> int:
        monkeypatch.setattr(torch.cuda, "default_generators", (Generator(),))
        return 0

    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_device", current_device)
    monkeypatch.setattr(torch.cuda, "default_generators", ())
    assert philox.next_seed(torch.device("cuda"))[1] == 2


def test_drawn_seeds_have_all_their_bits() -> None:
    drawn = torch.stack([draw("cpu") for _ in range(64)])
    assert all(bool(((drawn >> bit) & 1).any(0).all()) and not bool(((drawn >> bit) & 1).all()) for bit in range(64))
