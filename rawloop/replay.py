"""Loads a capsule, of a run or of a foreign loop: builds its model, and makes its passes ready to run again."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.adapters.files import ModelFiles
from rawloop.checkpoint.reader import stored_part
from rawloop.checkpoint.slots import read_manifest
from rawloop.components import build_family, build_model
from rawloop.config import parse
from rawloop.contracts import Family
from rawloop.dist import World
from rawloop.errors import UserError, first_few
from rawloop.families import imported
from rawloop.kept import Again, batch_from
from rawloop.losses import LossModule
from rawloop.moving_buffers import MovingBuffers
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.watch.capsule import read_states
from rawloop.watch.rerun import Rerun, digest, run_again
from rawloop.watch.subject import Pass, StepRecord, Subject
from rawloop.watch.tape_state import tape_from_state

Say = Callable[[str], None]


@dataclass
class Replay:
    """A capsule that is ready to run.

    Args:
        facts: the capsule's manifest.
        subject: the model and what belongs to it.
        passes: of the window.
        roots: where each backward pass started, as it was recorded, multiplied by the loss scale; None if it was not.
        buffers: the moving buffers.
        before: their values before the window.
        exact: whether the weights are those that the step started from.
    """

    facts: dict[str, Any]
    subject: Subject
    passes: list[Pass]
    roots: list[Tensor | None]
    buffers: MovingBuffers | None = None
    before: Sequence[Tensor] = ()
    exact: bool = True

    @property
    def record(self) -> StepRecord:
        """The step as a watch sees it, without its numbers."""
        ids = tuple(name for one in self.passes for name in one.ids)
        record = StepRecord(self.facts["step"], [one.inputs for one in self.passes], ids, self.passes, probing=True)
        record.scale = self.passes[0].scale
        return record

    def run(self) -> Rerun:
        """Run the passes, and leave the model as it is."""
        model = self.subject.model
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        return run_again(model, named, self.passes, buffers=self.buffers, before=self.before)


def load_run(path: Path, facts: dict[str, Any], mode: str | None, world: World, say: Say) -> Replay:
    """Build a run's model from its capsule, and make it ready to run.

    `facts` is its manifest, `mode` a precision mode in place of the recorded one; `say` is called with lines for the
    user.

    Raises:
        UserError: the base model is missing, or another one.
        RawloopError: the capsule is damaged.
    """
    state = read_states(path, facts)
    stored, kept, base_state = state("passes"), state("weights"), state("base")
    if stored is None:
        raise UserError(f"the capsule {path} has no batches to replay: {left_out(facts)}")
    config = parse(["--config", str(path / "config.yaml")], "rawloop replay").config
    config = replace(config, device=world.device.type)  # type: ignore[arg-type]
    same_mode = mode in (None, facts["precision"])
    if not same_mode:
        config = replace(config, precision=PrecisionConfig(mode=mode))  # type: ignore[arg-type]
    torch.set_num_threads(facts["threads"])
    family = build_family(config)
    slot = Path(facts["follows"] or "")
    from_slot = kept is None and bool(facts["follows"]) and slot.is_dir()
    known = kept["policy"] if kept is not None else stored_part(slot, "precision") if from_slot else None
    model, policy, base = build_model(config, world, family, [], known if same_mode else None)
    if base_state is not None:
        base.load_state_dict(base_state)
    exact, buffers = True, None
    if kept is not None:
        _copy_weights(kept["trained"], kept["policy"], policy)
        if kept["buffers"]:
            buffers = MovingBuffers(model, list(kept["buffers"]), twice=facts["moves_twice"])
    elif from_slot:
        exact = _load_slot(slot, known, model, policy, family, facts, say)
    else:
        exact = False
        at = f"it follows {slot}, which is not there" if facts["follows"] else "no checkpoint was written before it"
        say(f"the capsule has no trained weights ({left_out(facts)}; {at}): the base model's are taken")
    module, scale = LossModule(model, family.losses).train(), facts["scale"] if same_mode else 1.0
    targets, ranks, weights = facts["targets"], facts["world_size"], family.stream_weights
    passes, roots = [], []
    for one in stored["passes"]:
        batch = batch_from(one["batch"])
        again = Again(module, policy, weights, targets, ranks, scale, batch.to(policy.device))
        passes.append(Pass(again.inputs, again, one["rng"], tuple(batch.ids), scale))
        roots.append(None if one["loss"] is None else one["loss"].float() * scale)
    subject = Subject(model, [], policy.scaler, policy.named_parameters, world, config.watch)
    return Replay(facts, subject, passes, roots, buffers, list(kept["buffers"].values()) if kept else (), exact)


def left_out(facts: Mapping[str, Any]) -> str:
    """Return what a capsule does not have, and why."""
    return "; ".join(f"{name} left out: {why}" for name, why in facts["left_out"].items()) or "nothing was left out"


def _load_slot(
    slot: Path,
    state: Mapping[str, Any] | None,
    model: nn.Module,
    policy: PrecisionPolicy,
    family: Family,
    facts: Mapping[str, Any],
    say: Say,
) -> bool:
    """Load the weights of the checkpoint before the step, and return whether they are those that it started from."""
    files = ModelFiles(model, family.load_model)
    files.load(slot / files.folder)
    if state is not None and state["mode"] == policy.name:
        policy.load_state_dict(dict(state))
    behind = facts["step"] - read_manifest(slot).step
    if behind:
        say(f"the capsule has no trained weights: those of {slot} are taken, {behind} updates before its step")
    return not behind


def _copy_weights(trained: Mapping[str, Tensor], state: Mapping[str, Any], policy: PrecisionPolicy) -> None:
    weights, masters = policy.trained.weights, policy.trained.masters
    if weights.keys() != trained.keys():
        names = first_few(sorted(weights.keys() ^ trained.keys()))
        raise UserError(f"the capsule's trained weights are not those of the model that its config builds: {names}")
    exact = {**trained, **state["masters"]["kept"]}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(trained[name] if name in masters else exact[name])
            if name in masters:
                masters[name].copy_(exact[name])
    if policy.scaler and state["scaler"]:
        policy.scaler.load_state_dict(state["scaler"])


def load_loop(path: Path, facts: dict[str, Any], function: str, world: World) -> Replay:
    """Make a capsule of a foreign loop ready to run, on the model that `function` (`package.module:function`) builds.

    Raises:
        UserError: the model is not the one of the loop.
        RawloopError: the capsule is damaged.
    """
    state = read_states(path, facts)
    torch.set_num_threads(facts["threads"])
    stored, weights, frozen = state("passes"), state("weights"), state("frozen") or {}
    if stored is None or weights is None:
        raise UserError(f"the capsule {path} cannot be replayed: {left_out(facts)}")
    model = imported(function, "--model")()
    if not isinstance(model, nn.Module):
        raise UserError(f"--model is '{function}', which returned a {type(model).__name__}, not an nn.Module")
    _load_model(model, {**weights, "frozen": frozen}, facts, function)
    model.to(world.device)
    tapes = [tape_from_state(_moved(tape, facts["device"], world.device), model) for tape in stored["tapes"]]
    for tape, devices in zip(tapes, stored.get("devices", []), strict=True):
        for name in (name for name, device in devices.items() if not device.startswith("cpu")):
            leaf = tape.leaves[name]
            leaf.tensor = leaf.tensor.to(world.device)
            leaf.version = leaf.tensor._version
    passes = []
    for one in stored["passes"]:
        replay = tapes[one["tape"]].replays[one["replay"]]
        passes.append(Pass(replay.inputs, replay, replay.rng, tuple(one["ids"]), one["scale"]))
    subject = Subject(model, [], None, lambda: list(model.named_parameters()), world)
    return Replay(facts, subject, passes, [one["root"] for one in stored["passes"]])


def _load_model(model: nn.Module, stored: Mapping[str, Any], facts: Mapping[str, Any], function: str) -> None:
    named, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    pairs: list[tuple[str, str, Tensor | None, Tensor]] = [
        ("weight", name, named.get(name), tensor) for name, tensor in (stored["trained"] | stored["frozen"]).items()
    ]
    pairs += [("buffer", name, buffers.get(name), tensor) for name, tensor in stored["buffers"].items()]
    for kind, name, found, tensor in pairs:
        if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"the model of --model {function} is not that of the loop: the {kind} {name} was {_form(tensor)}, and "
                f"is {_form(found)}; build and cast it as the loop does"
            )
    shas = {name: sha for name, sha in facts.get("frozen", {}).items() if name in named.keys() - stored["frozen"]}
    other = [name for name, sha in shas.items() if digest(named[name]) != sha]
    if other:
        raise UserError(
            f"{len(other)} frozen weights of --model {function} are not those of the loop ({first_few(other)}): load "
            "the same base weights in it"
        )
    with torch.no_grad():
        for name, weight in named.items():
            weight.requires_grad_(name in stored["trained"])
        for _, _, found, tensor in pairs:
            assert found is not None
            found.copy_(tensor)


def _form(tensor: Tensor | None) -> str:
    return "none" if tensor is None else f"{tuple(tensor.shape)} {tensor.dtype}"


def _moved(state: Any, device: str, to: torch.device) -> Any:
    """Return a tape's state with another device in place of the one that the loop ran on."""
    kind = device.partition(":")[0]
    if isinstance(state, list):
        if len(state) == 2 and state[0] == kind and isinstance(state[1], str):  # of autocast
            return [to.type, state[1]]
        return [_moved(item, device, to) for item in state]
    if isinstance(state, dict):
        if state.keys() == {"device"} and str(state["device"]).startswith(kind):
            return {"device": str(to)}
        return {name: _moved(item, device, to) for name, item in state.items()}
    return state
