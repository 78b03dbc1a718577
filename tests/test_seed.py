"""Random streams: what is restored continues exactly where it stood, and every rank has its own."""

import hashlib
import random
import warnings
from contextlib import suppress
from typing import Any

import numpy
import pytest
import torch

from rawloop.seed import RngState, SampleStreams, capture_rng, derive_seed, preserved_rng, restore_rng, seed_all


def draw() -> tuple[list[float], float, float, float]:
    # an odd number of gaussians leaves one cached inside python's and numpy's generators
    return torch.randn(3).tolist(), random.gauss(0, 1), random.random(), float(numpy.random.randn())


def test_same_seed_and_rank_give_the_same_stream() -> None:
    seed_all(7, 1)
    first = draw()
    seed_all(7, 1)
    assert draw() == first


@pytest.mark.parametrize(("seed", "rank"), [(7, 0), (8, 1), (1, 7), (8, 0)])
def test_another_seed_or_rank_gives_another_stream(seed: int, rank: int) -> None:
    seed_all(7, 1)
    first = draw()
    seed_all(seed, rank)
    assert all(a != b for a, b in zip(draw(), first))


def test_derived_seeds_depend_on_every_part_and_its_place() -> None:
    parts: list[tuple[int | str, ...]] = [(1, 2), (2, 1), (12,), (1, 2, 0), ("1", 2), ("1/int:2",), (0, 1), (1, 0)]
    seeds = {derive_seed(*each) for each in parts}
    assert len(seeds) == len(parts)
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_derived_seeds_do_not_change_between_versions() -> None:
    assert derive_seed("rank", 0, 0) == int.from_bytes(hashlib.sha256(b'["rank", 0, 0]').digest()[:8], "big") // 2


def test_state_continues_every_stream_exactly() -> None:
    seed_all(3, 0)
    draw()
    state = RngState(3, 0).state_dict()
    expected = [draw() for _ in range(3)]
    seed_all(4, 0)
    RngState(3, 0).load_state_dict(state)
    assert [draw() for _ in range(3)] == expected


def test_state_holds_no_pickle_and_no_bytes() -> None:
    def leaves(value: object) -> list[object]:
        if isinstance(value, dict):
            return [leaf for item in value.values() for leaf in leaves(item)]
        return [leaf for item in value for leaf in leaves(item)] if isinstance(value, list | tuple) else [value]

    assert {type(leaf) for leaf in leaves(capture_rng())} <= {torch.Tensor, int, float, str, type(None)}


def test_preserved_rng_hides_what_is_drawn_inside_even_if_it_fails() -> None:
    seed_all(5, 0)
    expected = draw()
    seed_all(5, 0)
    with suppress(KeyError), preserved_rng():
        draw()
        raise KeyError
    assert draw() == expected


def test_starting_afresh_differs_by_step_and_rank_and_from_the_first_start() -> None:
    seed_all(5, 1)
    seen = [draw()]
    for rank, step in [(1, 0), (1, 10), (2, 10)]:
        RngState(5, rank).start_afresh(step)
        seen.append(draw())
    assert len({values[1] for values in seen}) == 4


class Gpus:
    """Stands for torch.cuda on a machine with some GPUs, of which this process uses one."""

    def __init__(self, patch: pytest.MonkeyPatch, number: int, current: int) -> None:
        self.asked: list[int] = []
        self.restored: list[tuple[int, int]] = []
        patch.setattr(torch.cuda, "is_available", lambda: True)
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "device_count", lambda: number)
        patch.setattr(torch.cuda, "current_device", lambda: current)
        patch.setattr(torch.cuda, "get_rng_state", self.get)
        patch.setattr(torch.cuda, "set_rng_state", lambda state, device: self.restored.append((int(state[0]), device)))

    def get(self, device: int) -> torch.Tensor:
        self.asked.append(device)
        return torch.tensor([100 + device], dtype=torch.uint8)


def test_a_rank_keeps_the_stream_of_its_own_gpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        gpus = Gpus(patch, number=4, current=2)  # the third of four on the second machine
        state = RngState(0, rank=6).state_dict()
        assert gpus.asked == [2]
    with monkeypatch.context() as patch:
        gpus = Gpus(patch, number=8, current=6)  # the same rank, on one machine
        RngState(0, rank=6).load_state_dict(state)
        assert gpus.restored == [(102, 6)]


def test_a_list_of_an_older_checkpoint_is_read_on_machines_of_the_same_size(monkeypatch: pytest.MonkeyPatch) -> None:
    state = {**capture_rng(), "cuda": [torch.tensor([number], dtype=torch.uint8) for number in range(4)]}
    with monkeypatch.context() as patch:
        gpus = Gpus(patch, number=4, current=2)
        restore_rng(state)
        assert gpus.restored == [(2, 2)]
    with monkeypatch.context() as patch:
        gpus = Gpus(patch, number=8, current=2)
        with pytest.warns(UserWarning, match=r"state of the GPU \(4 GPUs per machine then, 8 now\) is not restored"):
            restore_rng(state)
        assert gpus.restored == []


def test_streams_of_absent_devices_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    state = capture_rng()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    for name, device in (("cuda", "GPU"), ("mps", "MPS device")):
        with pytest.warns(UserWarning, match=f"{device} \\(there is none here\\) is not restored"):
            restore_rng({**state, name: torch.zeros(16, dtype=torch.uint8)})


def test_restoring_what_was_captured_here_says_nothing() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        restore_rng(capture_rng())


@pytest.mark.gpu
def test_the_gpu_stream_is_restored() -> None:
    torch.rand(1, device="cuda")
    state = capture_rng()
    expected = torch.rand(3, device="cuda").tolist()
    seed_all(1, 0)
    restore_rng(state)
    assert torch.rand(3, device="cuda").tolist() == expected


def test_pythons_stream_is_the_same_read_from_memory_and_without() -> None:
    def make(seed: Any) -> tuple[float, float]:
        if seed is not None:
            seed(5)
        return random.random(), random.gauss(0, 1)

    made, states = [], []
    for address in (SampleStreams()._python_address, None):
        random.seed(1)
        random.gauss(0, 1)  # stores a second number
        before, streams = random.getstate(), SampleStreams()
        streams._python_address = address
        made.append([streams.lend(make), streams.lend(make)])
        states.append(streams._python())
        assert random.getstate() == before
        assert streams.drawn
    assert made[0] == made[1] == [made[0][0]] * 2
    assert states[0] == states[1]
