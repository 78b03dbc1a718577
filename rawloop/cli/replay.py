"""`rawloop replay CAPSULE`: runs a kept step again, compares its bits, and narrows down what is wrong with it."""

import code
import math
import sys
from dataclasses import replace
from os.path import expanduser
from pathlib import Path
from textwrap import fill
from typing import Any

import torch
from torch import Tensor

from rawloop.cli import read_options
from rawloop.dist import World, open_world
from rawloop.errors import UserError, first_few
from rawloop.origin import batch_size, damaged
from rawloop.replay import Replay, load_loop, load_run
from rawloop.versions import changed_versions, installed_versions
from rawloop.watch.capsule import read_facts
from rawloop.watch.nest import map_tensors, tensors_in
from rawloop.watch.rerun import Rerun, digest, digests
from rawloop.watch.tracer import trace

NO_BACKWARD = "no backward pass was recorded"
HELD = {  # in a capsule, by the name of the state
    "passes": "the batch",
    "weights": "the weights before the step",
    "frozen": "the frozen weights that had changed",
    "optimizer": "the optimizer's state",
    "earlier": "the batches of the steps before",
}
MOVED = (
    "the loop gave the same as now when it ran the passes again: weights or buffers had changed since they ran first, "
    "by a forward pass or by code beside the optimizer"
)


def run(argv: list[str]) -> None:
    """Print what the capsule is about, and how its losses and gradients compare with the recorded ones."""
    options = read_options("replay", argv)
    path = Path(expanduser(options.capsule))
    facts = read_facts(path)
    show(*about(facts))
    with open_world(options.device) as world:
        if world.size > 1:
            raise UserError("rawloop replay runs in one process: start it without torchrun")
        replay = load(path, facts, options.precision, options.model, world)
        if options.bisect and not replay.passes:
            raise UserError(nothing_runs(facts))
        show(*compared(replay, replay.run()))
        if options.bisect:
            show(*(fill(text, 120) for text in narrowed(replay)))
        if options.shell:
            shell(replay)


def show(*lines: str) -> None:
    """Print lines, at once."""
    print(*lines, sep="\n", flush=True)


def tell(line: str) -> None:
    """Print a line for the user to stderr."""
    print(f"rawloop replay: {line}", file=sys.stderr, flush=True)


def about(facts: dict[str, Any]) -> list[str]:
    """Return lines about a capsule, from its manifest alone."""
    rank, ranks = facts["rank"], facts["world_size"]
    others = "the replay has this rank's batches only; the other ranks' are in capsules of their own, if they wrote any"
    return [
        f"step {facts['step']}, rank {rank} of {ranks}, {facts['precision']}, {facts['device']}",
        f"kept because: {facts['why']}",
        *(f"finding: {finding['what']}" for finding in facts["findings"]),
        *([others] if ranks > 1 else []),
        *(f"left out: {name}: {why}" for name, why in facts["left_out"].items()),
    ]


def load(path: Path, facts: dict[str, Any], mode: str | None, function: str | None, world: World) -> Replay:
    """Make a capsule ready to run.

    Raises:
        UserError: an option does not fit the kind of capsule, or the model is not the one of the capsule.
        RawloopError: the capsule is damaged.
    """
    if facts["kind"] == "run":
        if function is not None:
            raise UserError("--model is for capsules of foreign loops: this one is of a run, whose config is in it")
        return load_run(path, facts, mode, world, tell)
    if mode is not None:
        raise UserError("--precision is for capsules of runs: in a foreign loop, dtypes are the loop's own")
    if function is None:
        raise UserError(
            f"{path} is a capsule of a foreign loop: name the function that builds its model ({facts['model']}), "
            "with --model package.module:function"
        )
    return load_loop(path, facts, function, world)


def shell(replay: Replay) -> None:
    """Open a Python prompt with the capsule's objects."""
    model, passes = replay.subject.model, replay.passes
    names = {"replay": replay, "facts": replay.facts, "model": model, "passes": passes, "again": replay.run}
    banner = f"{', '.join(names)} are loaded; again() runs the passes and returns roots and gradients"
    code.interact(banner=banner, local=names, exitmsg="")


def nothing_runs(facts: dict[str, Any]) -> str:
    """Return why a capsule has no pass to run again, and what it has."""
    held = [text for name, text in HELD.items() if f"{name}.json" in facts["files"]]
    return f"nothing can run again: {facts.get('why_no_passes') or NO_BACKWARD}; the capsule has {', '.join(held)}"


def compared(replay: Replay, again: Rerun) -> list[str]:
    """Return lines that say whether losses and gradients are those that were recorded, bit for bit, or how far off."""
    facts = replay.facts
    if not replay.passes:
        return [nothing_runs(facts)]
    lines, unequal, size = list[str](), list[int](), len(replay.passes)
    for number, (one, then, root) in enumerate(zip(replay.passes, replay.roots, again.roots, strict=True), start=1):
        ids = f" ({', '.join(one.ids)})" if one.ids else ""
        name, now = f"pass {number} of {size}{ids}", root.item() / one.scale
        if then is None:
            lines.append(f"{name}: loss {now:.9g}; it was not recorded")
            continue
        same, before = digest(then) == digest(root), then.item() / one.scale
        unequal += [] if same else [number]
        off = _not_finite(before, now) or f"off by {abs(now - before):.3g} ({abs(_ratio(now, before)):.2g} of it)"
        lines.append(f"{name}: loss {before:.9g} then, {now:.9g} now: {'equal bit for bit' if same else off}")
    gradients = facts.get("gradients")
    if not gradients:
        return [*lines, "gradients: none were recorded"]
    factor = facts.get("left_on_gradients", facts["scale"]) / facts["scale"]
    found = digests({name: g * factor if factor != 1 else g for name, g in again.gradients.items()})
    differ = [name for name in gradients if found.get(name, {}).get("sha256") != gradients[name]["sha256"]]
    whose = "gradients"
    if facts["world_size"] > 1:
        whose += f" of rank {facts['rank']} before they were averaged"
    if not differ:
        lines.append(f"{whose}: all {len(gradients)} equal bit for bit")
        return [*lines, _why_not(replay, again, unequal) if unequal else "the replay is equal, bit for bit"]
    norms = {name: (found.get(name, {}).get("norm"), gradients[name]["norm"]) for name in differ}
    worst = max(differ, key=lambda name: abs(_ratio(*norms[name])))
    now, then = norms[worst]
    lines.append(f"{whose}: {len(differ)} of {len(gradients)} differ, most {worst}: norm {then} then, {now} now")
    return [*lines, _why_not(replay, again, unequal)]


def _why_not(replay: Replay, again: Rerun, unequal: list[int]) -> str:
    """Return why a replay differs; `unequal` are the numbers of the passes with another loss, from 1."""
    why = [] if replay.exact else ["its weights are not those of the step"]
    changed = changed_versions(replay.facts["versions"], installed_versions())
    why += [f"it was written by another version{changed}"] if changed else []
    shas = replay.facts.get("again", ())  # of the losses that the loop gave when it ran the passes again
    moved = [
        number for number in unequal if number <= len(shas) and shas[number - 1] == digest(again.roots[number - 1])
    ]
    if moved:
        why.append(f"{MOVED} (pass {', '.join(map(str, moved))})")
    wrong = [f"the loss of pass {n}" for n, root in enumerate(again.roots, start=1) if not bool(root.isfinite().all())]
    wrong += [f"the gradient of {name}" for name, g in again.gradients.items() if not bool(g.isfinite().all())]
    if wrong:
        damage = damaged(replay.subject.model)
        why.append(f"{damage or first_few(wrong, most=3)}{'' if damage else ' not finite'}: NaN cannot be compared")
    return f"the replay differs: {'; '.join(why) or 'other hardware, or kernels that are not deterministic'}"


def _not_finite(then: float, now: float) -> str:
    times = [name for name, value in (("then", then), ("now", now)) if not math.isfinite(value)]
    return f"not finite {' and '.join(times)}" if times else ""


def _ratio(now: Any, then: Any) -> float:
    after, before = math.nan if now is None else float(now), float(then)
    return (after - before) / before if before else after


def narrowed(replay: Replay) -> list[str]:
    """Return findings: the origin of what is not finite, or else the passes, samples and parameters that weigh most."""
    again = replay.run()
    losses = [root.item() / one.scale for root, one in zip(again.roots, replay.passes, strict=True)]
    norms = {name: gradient.float().norm().item() for name, gradient in again.gradients.items()}
    if not all(map(math.isfinite, [*losses, *norms.values()])):
        record = replay.record
        record.loss = sum(losses)
        return [finding.text() for finding in trace(replay.subject, record)]
    ordered = sorted(range(len(losses)), key=lambda number: -abs(losses[number]))
    names = [", ".join(one.ids) or f"pass {number}" for number, one in enumerate(replay.passes, start=1)]
    passes = (f"{losses[number]:.6g} ({names[number]})" for number in ordered)
    total = math.sqrt(sum(norm * norm for norm in norms.values())) or 1.0
    shares = (f"{name} {100 * (norm / total) ** 2:.3g}%" for name, norm in sorted(norms.items(), key=lambda i: -i[1]))
    return [
        f"all numbers are finite; losses by pass, the largest first: {first_few(passes, '; ')}",
        _by_sample(replay, ordered[0]),
        f"share of the squared gradient norm by parameter: {first_few(shares)}",
    ]


def _by_sample(replay: Replay, number: int) -> str:
    """Return the samples of a pass, by the gradient of a batch of each sample alone."""
    one, found = replay.passes[number], []
    size = batch_size((tensor for _, tensor in tensors_in(one.inputs)), one.ids)
    if not size:
        return f"samples of pass {number + 1}: none of its tensors has rows"
    for row, name in enumerate(one.ids or [f"row {row}" for row in range(size)]):

        def pick(tensor: Tensor, row: int = row) -> Tensor:
            return tensor[[row] * size] if tensor.dim() and tensor.shape[0] == size else tensor

        try:
            again = replace(replay, passes=[one._replace(inputs=map_tensors(pick, one.inputs))]).run()
        except RuntimeError as error:
            return f"samples of pass {number + 1}: they cannot be run alone: {str(error).splitlines()[0]}"
        norm = torch.stack([g.float().norm() for g in again.gradients.values()]).norm().item() / one.scale
        found.append((norm, f"{name}: loss {again.roots[0].item() / one.scale:.6g}, gradient norm {norm:.4g}"))
    shown = (text for _, text in sorted(found, key=lambda pair: -pair[0]))
    return f"samples of pass {number + 1}, each alone, the largest gradient first: {first_few(shown, '; ')}"
