"""Loads a capsule of a foreign loop: the user's function builds the model, and the tape runs on it."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from rawloop.dist import World
from rawloop.errors import UserError, first_few
from rawloop.families import imported
from rawloop.replay import Replay, left_out, load_run
from rawloop.watch.capsule import read_states
from rawloop.watch.rerun import digest
from rawloop.watch.subject import Pass, Subject
from rawloop.watch.tape_state import tape_from_state

Say = Callable[[str], None]


def load(path: Path, facts: dict[str, Any], mode: str | None, function: str | None, world: World, say: Say) -> Replay:
    """Load a capsule of a run or of a foreign loop.

    Args:
        path: the capsule.
        facts: its manifest.
        mode: a precision mode in place of the recorded one.
        function: `package.module:function`, which builds the model of a foreign loop.
        world: one process.
        say: called with lines for the user.

    Raises:
        UserError: an option does not fit the kind of capsule, or the model is not the one of the loop.
        RawloopError: the capsule is damaged.
    """
    if facts["kind"] == "run":
        if function is not None:
            raise UserError("--model is for capsules of foreign loops: this one is of a run, whose config is in it")
        return load_run(path, facts, mode, world, say)
    if mode is not None:
        raise UserError("--precision is for capsules of runs: in a foreign loop, dtypes are the loop's own")
    if function is None:
        raise UserError(
            f"{path} is a capsule of a foreign loop: name the function that builds its model ({facts['model']}), "
            "with --model package.module:function"
        )
    return _load_loop(path, facts, function, world)


def _load_loop(path: Path, facts: dict[str, Any], function: str, world: World) -> Replay:
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
        for name, device in devices.items():
            if not device.startswith("cpu"):
                tape.leaves[name].tensor = tape.leaves[name].tensor.to(world.device)
                tape.leaves[name].version = tape.leaves[name].tensor._version
    passes = []
    for one in stored["passes"]:
        replay = tapes[one["tape"]].replays[one["replay"]]
        passes.append(Pass(replay.inputs, replay, replay.rng, tuple(one["ids"]), one["scale"]))
    subject = Subject(model, [], None, lambda: list(model.named_parameters()), world)
    return Replay(facts, subject, passes, [one["root"] for one in stored["passes"]])


def _load_weights(model: nn.Module, stored: Mapping[str, Any], facts: Mapping[str, Any], function: str) -> None:
    named, buffers = dict(model.named_parameters()), dict(model.named_buffers())
    for kind, there, here in (("weight", stored["trained"], named), ("buffer", stored["buffers"], buffers)):
        for name, tensor in there.items():
            found = here.get(name)
            now = "none" if found is None else f"{tuple(found.shape)} {found.dtype}"
            then = f"{tuple(tensor.shape)} {tensor.dtype}"
            if now != then:
                raise UserError(
                    f"the model of --model {function} is not that of the loop: the {kind} {name} was {then}, and is "
                    f"{now}; build and cast it as the loop does"
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
        for name, tensor in [*stored["trained"].items(), *stored["buffers"].items()]:
            (named.get(name) if name in named else buffers[name]).copy_(tensor)  # type: ignore[union-attr]


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
