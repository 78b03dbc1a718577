"""Checkpoints of a loop of one's own: what is kept of plain objects, what a resume restores, and what is refused."""

import json
import logging
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.optim import AdamW
from torch.optim.lr_scheduler import MultiStepLR

from rawloop.checkpoints import Checkpoints
from rawloop.dist import World
from rawloop.errors import CheckpointError, UserError
from rawloop.evaluate import Evaluation
from rawloop.records import read_events, read_metrics
from tests.forks import Forks


def net() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.2), nn.Linear(8, 2))


class Holder:
    """A part of one's own."""

    def __init__(self, **state: Any) -> None:
        self.state = state

    def state_dict(self) -> dict[str, Any]:
        return dict(self.state)

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state = dict(state)


class Loop:
    """A loop of one's own over whatever model it is given."""

    def __init__(self, folder: Path, model: nn.Module | None = None, **options: Any) -> None:
        self.model = model or net()
        self.optimizer = AdamW([p for p in self.model.parameters() if p.requires_grad], lr=0.05)
        self.schedule = MultiStepLR(self.optimizer, [3, 5, 7], 0.5)
        given: dict[str, Any] = {"optimizer": self.optimizer, "scheduler": self.schedule, "save_every": 2, "log": None}
        self.checkpoints = Checkpoints(folder, model=self.model, **{**given, **options})

    def step(self) -> None:
        self.model(torch.randn(6, 4)).square().mean().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.schedule.step()

    def run(self, total: int, metrics: Callable[[int], Any] = lambda step: None) -> "Loop":
        with self.checkpoints:
            for step in range(self.checkpoints.resume_or_start(), total):
                self.step()
                self.checkpoints.save(step, metrics(step))
        return self


def same(one: nn.Module, other: nn.Module) -> bool:
    pairs = zip(one.state_dict().items(), other.state_dict().items(), strict=True)
    return all(a == b and torch.equal(x, y) for (a, x), (b, y) in pairs)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name.removeprefix("step-")) for path in (folder / "checkpoints").glob("step-*"))


# -- what is kept --------------------------------------------------------------------------------------------------


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.other = nn.Linear(4, 4), nn.Linear(4, 4)
        self.other.weight = self.one.weight

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.other(self.one(x).relu())
        return result


class Around(nn.Module):
    """An adapter inside a module of one's own, beside a head that is trained and a norm that moves."""

    def __init__(self, head: bool = True) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.inner = get_peft_model(net(), LoraConfig(target_modules=["0", "3"], r=2))
        self.norm = nn.BatchNorm1d(2)
        self.head = nn.Linear(2, 2).requires_grad_(head)

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.head(self.norm(self.inner(x)))
        return result


class Two(Around):
    """Two adapters in two places."""

    def __init__(self) -> None:
        super().__init__()
        self.second = get_peft_model(nn.Sequential(nn.Linear(2, 2)), LoraConfig(target_modules=["0"], r=1))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.second(super().forward(x))
        return result


def adapter(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    model: nn.Module = get_peft_model(net(), LoraConfig(target_modules=["0", "3"], r=2, **options))
    return model


def two_names() -> nn.Module:
    """An adapter of two names in one place, of which one is trained at a time."""
    model = adapter()
    model.add_adapter("b", LoraConfig(target_modules=["0"], r=1))  # type: ignore[operator]
    return model


def unfrozen() -> nn.Module:
    """An adapter, and a weight of its base that is trained beside it."""
    model = adapter()
    model.get_parameter("base_model.model.3.base_layer.bias").requires_grad_(True)
    return model


def half_frozen() -> nn.Module:
    model = net()
    model.get_submodule("0").requires_grad_(False)
    return model


def compiled() -> nn.Module:
    model: Any = torch.compile(net(), backend="eager")
    return model  # type: ignore[no-any-return]


MODELS: dict[str, tuple[Callable[[], nn.Module], dict[str, Any], set[str]]] = {
    "plain": (net, {}, {"model"}),
    "tied": (Tied, {}, {"model"}),
    "adapter": (adapter, {}, {"adapter"}),
    "adapter with modules": (lambda: adapter(modules_to_save=["1"]), {}, {"adapter"}),
    "adapter and base": (unfrozen, {}, {"adapter"}),
    "two names": (two_names, {}, set()),
    "inside": (Around, {}, {"adapter"}),
    "two places": (Two, {}, {"adapter.inner", "adapter.second"}),
    "half frozen": (half_frozen, {"what": "trained"}, set()),
    "all of an adapter": (adapter, {"what": "all"}, set()),
    "compiled": (compiled, {}, {"model"}),
}


@pytest.mark.parametrize("kind", MODELS)
def test_ten_and_ten_steps_are_twenty_whatever_the_model_is(kind: str, tmp_path: Path) -> None:
    make, options, folders = MODELS[kind]
    torch.manual_seed(1)
    straight = Loop(tmp_path / "straight", make(), **options).run(8)
    torch.manual_seed(1)
    stopped = Loop(tmp_path / "stopped", make(), **options).run(4)
    assert not same(stopped.model, make())
    torch.manual_seed(5)
    resumed = Loop(tmp_path / "stopped", make(), **options).run(8)
    assert same(resumed.model, straight.model)
    assert resumed.optimizer.param_groups[0]["lr"] == straight.optimizer.param_groups[0]["lr"] != 0.05
    found = {path.name for path in (tmp_path / "stopped" / "checkpoints" / "step-00000008").iterdir()}
    assert found == {"MANIFEST.json", "state", *folders}


def test_a_slot_is_read_without_rawloop(tmp_path: Path) -> None:
    plain, lora = Loop(tmp_path / "plain").run(2), Loop(tmp_path / "lora", adapter()).run(2)
    other = net()
    slots = [tmp_path / name / "checkpoints" / "step-00000002" for name in ("plain", "lora")]
    other.load_state_dict(load_file(slots[0] / "model" / "model.safetensors"))
    assert same(other, plain.model)
    opened = PeftModel.from_pretrained(net(), slots[1] / "adapter")
    lora_weights = {name: tensor for name, tensor in opened.state_dict().items() if "lora" in name}
    assert lora_weights
    assert all(torch.equal(lora.model.state_dict()[name], tensor) for name, tensor in lora_weights.items())


def test_several_models_and_optimizers_and_a_dict_of_values(tmp_path: Path) -> None:
    def opened() -> tuple[list[nn.Module], dict[str, AdamW], dict[str, Any], Checkpoints]:
        models, values = [net(), nn.Linear(2, 2)], {"epoch": 0, "order": [1, 2]}
        optimizers = {name: AdamW(model.parameters(), lr=0.1) for name, model in zip("gd", models, strict=True)}
        given = {"model": {"g": models[0], "d": models[1]}, "optimizer": optimizers, "extra": values}
        return models, optimizers, values, Checkpoints(tmp_path, log=None, **given)  # type: ignore[arg-type]

    models, optimizers, values, checkpoints = opened()
    with checkpoints:
        checkpoints.resume_or_start()
        models[1](models[0](torch.randn(5, 4))).sum().backward()
        for optimizer in optimizers.values():
            optimizer.step()
        values |= {"epoch": 3, "seen": 7}
        checkpoints.save(0)
    found, others, restored, again = opened()
    with again:
        assert again.resume_or_start() == 1
    assert restored == {"epoch": 3, "order": [1, 2], "seen": 7}
    assert all(same(a, b) for a, b in zip(models, found, strict=True))
    assert [len(optimizer.state) for optimizer in others.values()] == [6, 2]
    slot = tmp_path / "checkpoints" / "step-00000001"
    assert {path.name for path in slot.iterdir()} == {"MANIFEST.json", "state", "model.g", "model.d"}


# -- when it saves, and which is best ------------------------------------------------------------------------------


def test_it_saves_when_due_when_asked_when_best_and_at_the_end(tmp_path: Path) -> None:
    losses = {1: 3.0, 4: 1.0, 6: 2.0}
    Loop(tmp_path, save_every=6, keep_last=0).run(
        8, lambda step: {"eval_loss": losses[step]} if step in losses else None
    )
    assert steps(tmp_path) == [2, 5, 6, 8]
    assert (tmp_path / "best").resolve().name == "step-00000005"
    assert json.loads((tmp_path / "best.json").read_text())["value"] == 1.0
    assert [line["step"] for line in read_metrics(tmp_path)] == [2, 5, 7]
    loop = Loop(tmp_path, save_every=0)
    with loop.checkpoints as checkpoints:
        assert checkpoints.resume_or_start() == 8
        assert not checkpoints.save(8)
        assert checkpoints.save(9, now=True)
        assert checkpoints.best.value == 1.0


def test_the_best_may_be_a_metric_of_ones_own_and_the_largest(tmp_path: Path) -> None:
    scores = [0.2, 0.7, 0.5, 0.7]
    Loop(tmp_path, best_metric="accuracy", best_mode="max", save_every=0).run(
        4, lambda step: {"accuracy": scores[step]}
    )
    assert (tmp_path / "best").resolve().name == "step-00000002"
    invalid = Evaluation({"accuracy": 9.0}, valid=False, bad_ids=["x"])
    Loop(tmp_path, best_metric="accuracy", best_mode="max").run(5, lambda step: invalid)
    assert (tmp_path / "best").resolve().name == "step-00000002"


def test_an_exception_ends_the_block_after_the_saves_under_way_and_writes_no_other(tmp_path: Path) -> None:
    def fail(step: int) -> None:
        if step == 2:
            raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        Loop(tmp_path).run(8, fail)
    assert steps(tmp_path) == [2]
    assert [event["step"] for event in read_events(tmp_path) if event["kind"] == "save"] == [2]
    assert Loop(tmp_path).run(4).checkpoints.best.value is None


# -- what is refused -----------------------------------------------------------------------------------------------


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in folder.rglob("*") if path.is_file() and path.suffix != ".jsonl"}


def test_another_set_of_parts_is_refused_by_name_and_nothing_is_moved(tmp_path: Path) -> None:
    """A forgotten part would train steps again over old weights, and move good checkpoints aside."""
    Loop(tmp_path, extra={"state": Holder(step=1)}).run(4)
    before = contents(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be restored: it holds state, which this run does not have"):
        Loop(tmp_path).run(8)
    with pytest.raises(CheckpointError, match="it lacks ema"):
        Loop(tmp_path, extra={"state": Holder(step=1), "ema": net()}).run(8)
    assert contents(tmp_path) == before
    model = net()
    with (
        Checkpoints(tmp_path, model=model, optimizer=AdamW(model.parameters()), log=None) as checkpoints,
        pytest.raises(UserError, match=r"save was called before checkpoints.resume_or_start\(\): call that first"),
    ):
        checkpoints.save(0)
    assert contents(tmp_path) == before


def test_a_weight_that_is_unfrozen_later_is_not_lost_without_a_word(tmp_path: Path) -> None:
    for make, name in ((half_frozen, "0.weight"), (adapter, "base_model.model.0.base_layer.weight")):
        loop = Loop(tmp_path / name, make(), what="trained" if make is half_frozen else "auto")
        with loop.checkpoints as checkpoints:
            checkpoints.resume_or_start()
            loop.model.requires_grad_(True)
            with pytest.raises(UserError, match=f"{name} is trained, and was frozen when the checkpoints were opened"):
                checkpoints.save(0, now=True)
            loop.model.requires_grad_(False)


def test_frozen_weights_that_are_others_are_refused(tmp_path: Path) -> None:
    Loop(tmp_path, adapter()).run(2)
    torch.manual_seed(3)
    kinds: list[Any] = [nn.Linear, nn.BatchNorm1d, nn.Dropout, nn.Linear]
    other = get_peft_model(nn.Sequential(*(kind(*sizes) for kind, sizes in zip(kinds, LAYERS, strict=True))), LORA)
    with pytest.raises(UserError, match="the frozen weights are not those that the checkpoint was trained on"):
        Loop(tmp_path, other).run(4)


LAYERS: list[tuple[Any, ...]] = [(4, 8), (8,), (0.2,), (8, 2)]
LORA = LoraConfig(target_modules=["0", "3"], r=2)


def refused(folder: Path, **options: Any) -> None:
    model = net()
    given: dict[str, Any] = {"model": model, "optimizer": AdamW(model.parameters()), "log": None}
    with Checkpoints(folder, **{**given, **options}) as checkpoints:
        checkpoints.resume_or_start()


def test_what_cannot_be_saved_is_refused_when_it_is_opened(tmp_path: Path) -> None:
    stranger = AdamW(nn.Linear(2, 2).parameters())
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"model": net().requires_grad_(False)}, "the Sequential that is to be saved trains nothing"),
        ({"model": net().state_dict()}, "a model of the checkpoints is a Tensor: pass modules, or state as `extra`"),
        ({"optimizer": stranger}, "2 of the 2 parameters that the optimizer trains have no name in"),
        ({"scheduler": MultiStepLR(stranger, [1])}, "scheduler sets the learning rate of an optimizer that is not sav"),
        ({"extra": {"epoch": 1, "net": net()}}, "the part 'epoch' of a checkpoint is a int"),
        ({"extra": {"f": open}}, "state at /f is a builtins.builtin_function_or_method"),
        ({"extra": 3}, "the part 'extra' of a checkpoint is a int"),
        ({"what": "some"}, "what is 'some': it must be auto, all or trained"),
    ]
    for options, message in wrong:
        with pytest.raises(UserError, match=message):
            refused(tmp_path / "run", **options)
    refused(tmp_path / "run")


def test_steps_and_metrics_that_make_no_sense_are_refused(tmp_path: Path) -> None:
    loop = Loop(tmp_path)
    with loop.checkpoints as checkpoints:
        checkpoints.resume_or_start()
        checkpoints.save(3)
        with pytest.raises(UserError, match=r"checkpoints.save\(1\) comes after step 3"):
            checkpoints.save(1)
        with pytest.raises(UserError, match=r"best_metric is 'eval_loss', .* \(did you mean 'eval_los'\?\)"):
            checkpoints.save(4, {"eval_los": 1.0})


def test_a_folder_that_another_process_trains_into_is_refused(forks: Forks, tmp_path: Path) -> None:
    code = f"from tests.test_checkpoints import Loop; from pathlib import Path; Loop(Path({str(tmp_path)!r})).run(1)"
    with Loop(tmp_path).checkpoints:
        done = forks.run("-c", code)
    assert "is training now" in done.stderr


# -- in a notebook -------------------------------------------------------------------------------------------------


def test_a_notebook_opens_it_again_and_again(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    before = set(threading.enumerate())
    for total in (2, 4):
        loop = Loop(tmp_path)  # the cell is run again while the last one is still open
        checkpoints = loop.checkpoints
        for step in range(checkpoints.resume_or_start(), total):
            loop.step()
            checkpoints.save(step)
        last = Loop(tmp_path)
        assert last.checkpoints.resume_or_start() >= total - 2
        for one in (checkpoints, checkpoints, last.checkpoints):
            one.close()
    assert set(threading.enumerate()) == before
    assert capfd.readouterr() == ("", "")


def test_events_go_to_a_logger_of_ones_own(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "mine"):
        Loop(tmp_path, log=logging.getLogger("mine").info).run(2)
    assert [record.message[:19] for record in caplog.records] == ["[save] step 2: wrote"[:19]]


# -- several ranks -------------------------------------------------------------------------------------------------


def train_on_ranks(world: World, folder: Path, total: int) -> tuple[list[Tensor], float, int]:
    """DDP around the model; rank 0 alone evaluates, as many loops have it."""
    torch.manual_seed(0 if total == 4 else world.rank)
    inner = nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 2))
    for weight in inner.parameters():
        nn.init.constant_(weight, 0.1)
    torch.manual_seed(world.rank)
    model = world.wrap(inner)
    loop = Loop.__new__(Loop)
    loop.model, loop.optimizer = model, AdamW(model.parameters(), lr=0.05)
    loop.schedule = MultiStepLR(loop.optimizer, [3, 5], 0.5)
    loop.checkpoints = Checkpoints(
        folder, model=model, optimizer=loop.optimizer, scheduler=loop.schedule, save_every=2, log=None
    )
    loop.run(total, lambda step: {"eval_loss": float(step)} if world.is_main and step % 2 else None)
    return [p.detach().clone() for p in inner.parameters()], float(torch.rand(())), int(loop.checkpoints.best.step or 0)


def ranks_stop_and_resume(world: World, folder: Path) -> list[Any]:
    straight = train_on_ranks(world, folder / "straight", 8)
    train_on_ranks(world, folder / "stopped", 4)
    return [straight, train_on_ranks(world, folder / "stopped", 8)]


def test_ranks_stop_and_resume_under_ddp(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    """Each rank's own random stream goes on; a process on its own resumes what two have begun."""
    results = run_ranks(ranks_stop_and_resume, tmp_path)
    for (weights, drawn, best), (again, drawn_again, best_again) in results:
        assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))
        assert (drawn, best) == (drawn_again, best_again)
    assert results[0][0][1] != results[1][0][1]
    assert results[0][0][2] == 2
    assert train_on_ranks(World(), tmp_path / "stopped", 9)[2] == 2


def other_parts_on_a_rank(world: World, folder: Path) -> str:
    try:
        Loop(folder, extra={"bad": 1 if world.rank else open}).run(1)
    except UserError as error:
        return str(error)
    return ""


def test_an_error_of_one_rank_ends_all(run_ranks: Callable[..., list[Any]], tmp_path: Path) -> None:
    one, other = run_ranks(other_parts_on_a_rank, tmp_path)
    assert "state at /bad" in one
    assert one == other
