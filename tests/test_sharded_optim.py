"""Optimizers over sharded weights: the updates, and the stored state, of the same optimizer over whole weights."""

import importlib.util
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rawloop.dist import World
from rawloop.optim import KINDS, OptimConfig, build_optimizer, use_average, use_trained
from rawloop.optim_state import NamedOptimizerState
from rawloop.pack import pack, unpack
from rawloop.sharded_optim import Of8BitParts, OfParts
from rawloop.sharding import shard, whole

NAMES = [name for name in KINDS if not name.startswith("paged")]
INSTALLED = [name for name in NAMES if not KINDS[name].package or importlib.util.find_spec(KINDS[name].package)]
TALL, UNEVEN, HALVES = "blocks.0.0.weight", "uneven.weight", "halves.weight"


class Weights(nn.Module):
    """Matrices that ranks hold in whole blocks of 256, unevenly, and in halves of a block; a row on one rank alone."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 128), nn.LayerNorm(128)) for _ in range(2))
        self.uneven, self.halves, self.row = nn.Linear(64, 129), nn.Linear(66, 194), nn.Linear(64, 1)
        self.embed_tokens = nn.Embedding(7, 64)

    def forward(self, x: Tensor) -> Tensor:
        sides = [block(x).square().mean() for block in self.blocks]
        halves = self.halves(torch.cat([x, x[:, :2]], dim=1))
        vectors = self.embed_tokens(torch.arange(7)).square()
        others = [self.uneven(x).square().mean(), halves.square().mean(), self.row(x).mean(), vectors.mean()]
        return torch.stack([*sides, *others]).sum()


class Trained:
    """Weights with an optimizer, whole or sharded, perhaps with a state that was stored before."""

    def __init__(
        self, world: World, name: str, sharded: bool, stored: tuple[Any, dict[str, Tensor]] | None = None
    ) -> None:
        torch.manual_seed(0)
        self.model = Weights()
        if stored:
            self.model.load_state_dict(stored[1])
        if sharded:
            shard(self.model, world.device)
        config = OptimConfig(name=name, lr=1e-2, weight_decay=0.1, schedule="constant")  # type: ignore[arg-type]
        self.optimizer = build_optimizer(self.model.named_parameters(), config)
        self.state = NamedOptimizerState(self.optimizer, self.model.named_parameters, restore_options=False)
        if stored:
            self.state.load_state_dict(unpack(stored[0]))
        use_trained(self.optimizer)

    def step(self, seeds: Sequence[int]) -> None:
        for seed in seeds:
            x = torch.randn(16, 64, generator=torch.Generator().manual_seed(seed))
            self.model(x).backward()
            self.optimizer.step()
            self.optimizer.zero_grad()

    def stored(self) -> tuple[Any, dict[str, Tensor]]:
        """Return state and weights as a checkpoint has them."""
        use_average(self.optimizer)
        packed = pack(self.state.state_dict())
        return packed, {name: whole(weight.detach()).clone() for name, weight in self.model.named_parameters()}


def train_all(world: World, names: Sequence[str]) -> dict[str, list[Any]]:
    """Train whole and sharded, and go on with the state of either as the other; return the ends of all."""
    found: dict[str, list[Any]] = {}
    for name in names:
        ends = []
        for sharded in (False, True):
            trained = Trained(world, name, sharded)
            trained.step([1, 2])
            stored = world.from_main(trained.stored())
            use_trained(trained.optimizer)
            trained.step([3])
            ends.append(trained.stored())
            for again in (False, True):
                resumed = Trained(world, name, again, stored)
                resumed.step([3])
                ends.append(resumed.stored())
        found[name] = ends
    return found


def numbers(packed: Any, weight: str) -> dict[str, Tensor]:
    return {path: tensor for path, tensor in packed.tensors.items() if path.startswith(f"/state/{weight}/")}


def check_close(found: dict[str, Tensor], right: dict[str, Tensor], message: str) -> None:
    """Compare by name. torch's fused AdamW rounds the last numbers of a tensor in another way."""
    assert found.keys() == right.keys() != set(), message
    for name, tensor in right.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-8, msg=f"{message} {name}")


@pytest.mark.parametrize("names", [("muon", "adafactor"), pytest.param(INSTALLED, marks=pytest.mark.slow)])
def test_sharded_weights_are_updated_as_whole_ones_and_state_goes_both_ways(
    run_ranks: Callable[..., list[Any]], names: Sequence[str]
) -> None:
    found, _ = run_ranks(train_all, names)
    for name, ends in found.items():
        packed, weights = ends[0]
        rough = ("uneven", "halves") if name == "adamw_8bit" else ()  # 32 bits as parts, and 8 as wholes
        in_32_bits = {key for key in weights if key.startswith(rough)} if rough else set()
        for other, others in ends[1:]:
            exact = weights.keys() - in_32_bits
            check_close({key: others[key] for key in exact}, {key: weights[key] for key in exact}, name)
            for key in exact:
                check_close(numbers(other, key), numbers(packed, key), name)
            for key in in_32_bits:
                torch.testing.assert_close(others[key], weights[key], rtol=0, atol=3e-3)


@pytest.mark.slow
@pytest.mark.skipif("adamw_8bit" not in INSTALLED, reason="adamw_8bit needs bitsandbytes")
def test_parts_have_8_bit_state_if_their_blocks_are_those_of_the_whole(run_ranks: Callable[..., list[Any]]) -> None:
    ends = run_ranks(train_all, ["adamw_8bit"])[0]["adamw_8bit"]
    dtypes = [{key: numbers(packed, key)[f"/state/{key}/state1"].dtype for key in weights} for packed, weights in ends]
    for key in (TALL, UNEVEN, HALVES):
        assert dtypes[0][key] == torch.uint8
        assert dtypes[3][key] == (torch.uint8 if key == TALL else torch.float32)
    whole_state, cut_state = (numbers(ends[index][0], TALL) for index in (0, 3))
    assert whole_state[f"/state/{TALL}/absmax1"].shape == (32,)
    assert all(torch.equal(whole_state[path], cut_state[path]) for path in whole_state)


class Counting(torch.optim.SGD):
    """An optimizer that counts its updates in its groups."""

    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            group["k"] = group.get("k", 0) + 1
        return super().step(closure)


def test_what_an_optimizer_writes_into_its_groups_is_kept() -> None:
    weight = nn.Parameter(torch.ones(2))
    optimizer = OfParts(Counting([weight], lr=0.5))
    for _ in range(2):
        weight.grad = torch.ones(2)
        optimizer.step()
    assert optimizer.param_groups[0]["k"] == 2
    assert weight.tolist() == [0, 0]


def step_a_vector(world: World) -> list[torch.Size]:
    """Update a vector whose part has as many numbers as a table of codes; return shapes of its state."""
    model, optim = nn.LayerNorm(512, bias=False), importlib.import_module("bitsandbytes.optim")
    shard(model, world.device)
    optimizer = Of8BitParts(optim.AdamW8bit(model.parameters(), min_8bit_size=256))
    model(torch.randn(2, 512)).square().sum().backward()
    optimizer.step()
    return [optimizer.state[model.weight][key].shape for key in ("state1", "absmax1", "qmap1")]


@pytest.mark.slow
@pytest.mark.skipif("adamw_8bit" not in INSTALLED, reason="adamw_8bit needs bitsandbytes")
def test_a_table_of_codes_is_no_part_of_a_weight(run_ranks: Callable[..., list[Any]]) -> None:
    assert run_ranks(step_a_vector) == [[(512,), (2,), (256,)]] * 2
