"""Loads a capsule of a foreign loop: the user's function builds the model, and the tape runs on it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rawloop.dist import World
from rawloop.errors import UserError, first_few
from rawloop.families import imported
from rawloop.replay import Replay, left_out
from rawloop.watch.capsule import read_states
from rawloop.watch.rerun import digest
from rawloop.watch.subject import Pass, Subject
from rawloop.watch.tape_state import tape_from_state


def load_loop(path: Path, facts: dict[str, Any], function: str, world: World) -> Replay:
    """Make a capsule ready to run.

    Args:
        path: the capsule.
        facts: its manifest.
        function: `package.module:function`, which builds the model.
        world: one process.

    Raises:
        UserError: the model is not the one of the loop.
        RawloopError: the capsule is damaged.
    """
    state = read_states(path, facts)
    torch.set_num_threads(facts["threads"])
    stored, weights = state("passes"), state("weights")
    if stored is None or weights is None:
        raise UserError(f"the capsule {path} cannot be replayed: {left_out(facts)}")
    model = imported(function, "--model")()
    if not isinstance(model, nn.Module):
        raise UserError(f"--model is '{function}', which returned a {type(model).__name__}, not an nn.Module")
    _load_weights(model, weights, facts, function)
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


def _load_weights(model: nn.Module, stored: Mapping[str, Any], facts: Mapping[str, Any], function: str) -> None:
    named, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    pairs: list[tuple[str, str, Tensor | None, Tensor]] = [
        ("weight", name, named.get(name), tensor) for name, tensor in stored["trained"].items()
    ]
    pairs += [("buffer", name, buffers.get(name), tensor) for name, tensor in stored["buffers"].items()]
    for kind, name, found, tensor in pairs:
        if found is None or (found.shape, found.dtype) != (tensor.shape, tensor.dtype):
            raise UserError(
                f"the model of --model {function} is not that of the loop: the {kind} {name} was {_form(tensor)}, and "
                f"is {_form(found)}; build and cast it as the loop does"
            )
    other = [name for name, sha in facts.get("frozen", {}).items() if name in named and digest(named[name]) != sha]
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
