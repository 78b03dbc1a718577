"""Packing: whatever can be packed comes back the same, type by type and bit by bit; the rest is refused by name."""

import json
import math
import random
import struct
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn

from rawloop.pack import DTYPES, pack, read_state, safetensors_header, write_packed

KEYS = [
    "",
    "a",
    "a/b",
    "~",
    "~1",
    "$tensor",
    "$float",
    "$tuple",
    "$dict",
    "0",
    "lm_head.weight",
    "ключ",
    "__metadata__",
]
NAN = struct.unpack(">d", bytes.fromhex("7ff80000deadbeef"))[0]  # a nan with bits of its own
FLOATS = [0.0, -0.0, 0.1, 1e-320, 5e-324, 1.7976931348623157e308, math.pi, NAN, math.inf, -math.inf]
LEAVES = [None, True, False, 0, -1, 2**70, "", "nan", "$float", "\x00\n\ud800", *FLOATS]


def random_tensor(rng: random.Random) -> Tensor:
    shape = [rng.randrange(4) for _ in range(rng.randrange(4))]
    dtype = rng.choice(list(DTYPES))
    count = math.prod(shape) * torch.empty(0, dtype=dtype).element_size()
    raw = torch.tensor([rng.randrange(2 if dtype == torch.bool else 256) for _ in range(count)], dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def random_tree(rng: random.Random, depth: int) -> Any:
    kind = rng.randrange(6) if depth else rng.randrange(2)
    if kind == 0:
        return random_tensor(rng)
    if kind == 1:
        return rng.choice(LEAVES)
    items = [random_tree(rng, depth - 1) for _ in range(rng.randrange(4))]
    if kind == 2:
        return items
    return tuple(items) if kind == 3 else dict(zip(rng.sample(KEYS, len(items)), items))


def assert_same(left: Any, right: Any) -> None:
    assert type(left) is type(right)
    if isinstance(left, Tensor):
        assert (left.dtype, left.shape) == (right.dtype, right.shape)
        assert left.reshape(-1).view(torch.uint8).tolist() == right.reshape(-1).view(torch.uint8).tolist()
    elif isinstance(left, dict):
        assert list(left) == list(right)
        for key in left:
            assert_same(left[key], right[key])
    elif isinstance(left, list | tuple):
        assert len(left) == len(right)
        for one, other in zip(left, right):
            assert_same(one, other)
    elif isinstance(left, float):
        assert struct.pack(">d", left) == struct.pack(">d", right)
    else:
        assert left == right


def through_files(state: Any, folder: Path) -> Any:
    write_packed(pack(state), folder, "part")
    return read_state(folder, "part")


@pytest.mark.parametrize("seed", range(150))
def test_random_trees_come_back_the_same(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    state = {key: random_tree(rng, 4) for key in rng.sample(KEYS, 4)}
    assert_same(through_files(state, tmp_path), state)


def test_every_leaf_and_every_dtype_comes_back(tmp_path: Path) -> None:
    state = {"leaves": LEAVES, "tensors": {str(dtype): torch.zeros(3, dtype=dtype) for dtype in DTYPES}}
    assert_same(through_files(state, tmp_path), state)


def test_tensors_that_are_views_shared_or_trained_come_back_by_value(tmp_path: Path) -> None:
    base = torch.arange(12.0).reshape(3, 4)
    state = {"t": base.t(), "part": base[1:, ::2], "same": base, "parameter": nn.Parameter(base), "none": base[:0]}
    back = through_files(state, tmp_path)
    for name, tensor in state.items():
        assert torch.equal(back[name], tensor)
        assert type(back[name]) is Tensor
        assert not back[name].requires_grad


def test_the_state_of_torch_modules_and_optimizers_fits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))  # else torch sets it with its first optimizer
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = torch.optim.AdamW(model.named_parameters())
    model(torch.randn(5, 3)).sum().backward()
    optimizer.step()
    state = optimizer.state_dict()
    state = {**state, "state": {str(index): values for index, values in state["state"].items()}}
    assert_same(through_files({"optimizer": state}, tmp_path)["optimizer"], state)
    assert_same(through_files({"model": model.state_dict()}, tmp_path / "..")["model"], dict(model.state_dict()))


def test_safetensors_itself_reads_what_we_write(tmp_path: Path) -> None:
    write_packed(pack({"a": torch.arange(3), "b": {"c": torch.ones(2, 2, dtype=torch.bfloat16)}}), tmp_path, "part")
    with safe_open(tmp_path / "part.safetensors", framework="pt") as file:
        assert sorted(file.keys()) == ["/a", "/b/c"]
        assert file.get_tensor("/a").tolist() == [0, 1, 2]
    assert json.loads((tmp_path / "part.json").read_text()) == {"a": {"$tensor": "/a"}, "b": {"c": {"$tensor": "/b/c"}}}


def test_every_tensor_starts_at_a_multiple_of_its_element_size(tmp_path: Path) -> None:
    tensors = {str(dtype): torch.zeros(3, dtype=dtype) for dtype in DTYPES}  # three: odd sizes push others off
    header, order = safetensors_header(tensors)
    starts = {name: entry["data_offsets"][0] for name, entry in json.loads(header[8:]).items()}
    assert sorted(starts, key=starts.__getitem__) == order
    assert all((len(header) + starts[name]) % tensor.element_size() == 0 for name, tensor in tensors.items())


def test_a_state_without_tensors_is_a_json_file_only(tmp_path: Path) -> None:
    assert list(write_packed(pack({"step": 3}), tmp_path, "part")) == ["part.json"]


def test_what_is_read_no_longer_depends_on_the_file(tmp_path: Path) -> None:
    back = through_files({"a": torch.zeros(1000)}, tmp_path)
    with (tmp_path / "part.safetensors").open("r+b") as file:
        file.seek(-4000, 2)
        file.write(b"\x11" * 4000)
    assert not back["a"].any()


class Level(IntEnum):
    LOW = 1


@pytest.mark.parametrize(
    ("value", "named"),
    [
        ({1, 2}, "builtins.set"),
        (b"x", "builtins.bytes"),
        (numpy.float64(1.0), "numpy.float64"),
        (numpy.zeros(2), "numpy.ndarray"),
        (Level.LOW, "Level"),
        (object(), "builtins.object"),
        (torch.float32, "torch.dtype"),
        (torch.zeros(2, 2).to_sparse(), "sparse"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
    ],
)
def test_what_cannot_be_stored_is_refused_with_its_place(value: Any, named: str) -> None:
    with pytest.raises(TypeError, match=rf"state at /groups/0/lr~1x is a .*{named}"):
        pack({"groups": [{"lr/x": value}]})


def test_keys_must_be_strings() -> None:
    with pytest.raises(TypeError, match=r"state at /state has the key 0, a builtins\.int"):
        pack({"state": {0: 1}})
