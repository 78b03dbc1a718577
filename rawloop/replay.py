"""Loads a capsule: builds its model, and makes its passes ready to run again in one process."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.adapters.files import ModelFiles
from rawloop.buffers import MovingBuffers
from rawloop.checkpoint.reader import stored_part
from rawloop.checkpoint.slots import read_manifest
from rawloop.components import build_family, build_model
from rawloop.config import parse
from rawloop.contracts import Family
from rawloop.dist import World
from rawloop.errors import UserError, first_few
from rawloop.kept import Again, batch_from
from rawloop.losses import LossModule
from rawloop.precision.config import PrecisionConfig
from rawloop.precision.policy import PrecisionPolicy
from rawloop.watch.capsule import read_states
from rawloop.watch.rerun import Rerun, run_again
from rawloop.watch.subject import Pass, StepRecord, Subject

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
        """The step as a watch sees it."""
        ids = tuple(name for one in self.passes for name in one.ids)
        facts = self.facts
        record = StepRecord(facts["step"], [one.inputs for one in self.passes], ids, self.passes, probing=True)
        record.loss, record.grad_norm = _number(facts.get("loss")), _number(facts.get("grad_norm"))
        record.scale = self.passes[0].scale
        return record

    def run(self) -> Rerun:
        """Run the passes, and leave the model as it is."""
        model = self.subject.model
        named = [(name, weight) for name, weight in model.named_parameters() if weight.requires_grad]
        return run_again(model, named, self.passes, buffers=self.buffers, before=self.before)


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def load_run(path: Path, facts: dict[str, Any], mode: str | None, world: World, say: Say) -> Replay:
    """Build a run's model from its capsule.

    Args:
        path: the capsule.
        facts: its manifest.
        mode: a precision mode in place of the recorded one.
        world: one process.
        say: called with lines for the user.

    Raises:
        UserError: the base model is missing, or another one.
        RawloopError: the capsule is damaged.
    """
    state = read_states(path, facts)
    config, _ = parse(["--config", str(path / "config.yaml")], "rawloop replay")
    config = replace(config, device=world.device.type)  # type: ignore[arg-type]
    if mode is not None and mode != facts["precision"]:
        config = replace(config, precision=PrecisionConfig(mode=mode))  # type: ignore[arg-type]
    torch.set_num_threads(facts["threads"])  # sums on the CPU depend on it
    kept, stored = state("weights"), state("passes")
    if stored is None:
        raise UserError(f"the capsule {path} has no batches to replay: {left_out(facts)}")
    family = build_family(config)
    slot = Path(facts["follows"]) if kept is None and facts["follows"] else None
    policy_state = _policy_state(kept, slot)
    same_mode = config.precision.mode == facts["precision"] or mode is None
    model, policy, base = build_model(config, world, family, [], policy_state if same_mode else None)
    base_state = state("base")
    if base_state is not None:
        base.load_state_dict(base_state)
    exact = _load_weights(kept, slot, policy_state, model, policy, family, facts, say)
    module = LossModule(model, family.losses).train()
    buffers, before = _buffers(model, kept, facts)
    passes, roots = [], []
    for one in stored["passes"]:
        batch = batch_from(one["batch"])
        scale = facts["scale"] if same_mode else 1.0
        again = Again(
            module, policy, family.stream_weights, facts["targets"], facts["world_size"], scale, batch.to(policy.device)
        )
        passes.append(Pass(again.inputs, again, one["rng"], tuple(batch.ids), scale))
        roots.append(None if one["loss"] is None else one["loss"].float() * scale)
    subject = Subject(model, [], policy.scaler, policy.named_parameters, world, config.watch)
    return Replay(facts, subject, passes, roots, buffers, before, exact)


def left_out(facts: Mapping[str, Any]) -> str:
    """Return what a capsule does not have, and why."""
    return "; ".join(f"{name} left out: {why}" for name, why in facts["left_out"].items()) or "nothing was left out"


def _policy_state(kept: Any, slot: Path | None) -> dict[str, Any] | None:
    if kept is not None:
        state: dict[str, Any] = kept["policy"]
        return state
    return stored_part(slot, "precision") if slot is not None and slot.is_dir() else None


def _load_weights(
    kept: Any,
    slot: Path | None,
    policy_state: dict[str, Any] | None,
    model: nn.Module,
    policy: PrecisionPolicy,
    family: Family,
    facts: Mapping[str, Any],
    say: Say,
) -> bool:
    """Load the trained weights, and return whether they are those that the step started from."""
    if kept is not None:
        _copy_weights(kept["trained"], policy_state, policy)
        return True
    if slot is None or not slot.is_dir():
        at = f"it follows {slot}, which is not there" if slot else "no checkpoint was written before it"
        say(f"the capsule has no trained weights ({left_out(facts)}; {at}): the base model's are taken")
        return False
    files = ModelFiles(model, family.load_model)
    files.load(slot / files.folder)
    if policy_state is not None and policy_state["mode"] == policy.name:
        policy.load_state_dict(policy_state)
    behind = facts["step"] - read_manifest(slot).step
    if behind:
        say(f"the capsule has no trained weights: those of {slot} are taken, {behind} updates before its step")
    return not behind


def _copy_weights(trained: Mapping[str, Tensor], state: Mapping[str, Any] | None, policy: PrecisionPolicy) -> None:
    weights = policy.trained.weights
    if weights.keys() != trained.keys():
        names = first_few(sorted(weights.keys() ^ trained.keys()))
        raise UserError(f"the capsule's trained weights are not those of the model that its config builds: {names}")
    exact = state["masters"]["kept"] if state is not None else {}
    with torch.no_grad():
        for name, weight in weights.items():
            weight.copy_(trained[name])
            if name in policy.trained.masters:
                policy.trained.masters[name].copy_(exact.get(name, trained[name]))
            elif name in exact:
                weight.copy_(exact[name])
    if state is not None and policy.scaler and state["scaler"]:
        policy.scaler.load_state_dict(state["scaler"])


def _buffers(model: nn.Module, kept: Any, facts: Mapping[str, Any]) -> tuple[MovingBuffers | None, list[Tensor]]:
    found = kept["buffers"] if kept is not None else {}
    if not found:
        return None, []
    return MovingBuffers(model, list(found), twice=facts["moves_twice"]), list(found.values())
