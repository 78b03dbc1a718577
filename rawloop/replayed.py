"""What a replay says: how its bits compare with the recorded ones, and which samples and parameters weigh most."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from rawloop.errors import first_few
from rawloop.replay import Replay
from rawloop.versions import changed_versions, installed_versions
from rawloop.watch.nest import map_tensors
from rawloop.watch.rerun import Rerun, digest, digests
from rawloop.watch.tracer import trace


def compared(replay: Replay, again: Rerun) -> list[str]:
    """Return lines that say whether losses and gradients are those that were recorded, bit for bit, or how far off."""
    facts = replay.facts
    if not replay.passes:
        return [f"nothing can run again: {facts.get('why_no_passes') or 'no backward pass was recorded'}"]
    lines, equal = [], True
    for number, (one, then, root) in enumerate(zip(replay.passes, replay.roots, again.roots, strict=True), start=1):
        name, now = f"pass {number} of {len(replay.passes)} ({', '.join(one.ids)})", root.item() / one.scale
        if then is None:
            lines.append(f"{name}: loss {now:.9g}; it was not recorded")
            continue
        same, before = digest(then) == digest(root), then.item() / one.scale
        equal = equal and same
        off = f"off by {abs(now - before):.3g} ({abs(_ratio(now, before)):.2g} of it)"
        lines.append(f"{name}: loss {before:.9g} then, {now:.9g} now: {'equal bit for bit' if same else off}")
    alone = facts["world_size"] == 1
    gradients = facts.get("own_gradients") or (facts.get("gradients") if alone else None)
    if not gradients:
        return [*lines, "gradients: none were recorded"]
    factor = 1.0 if "own_gradients" in facts else facts["left_on_gradients"] / facts["scale"]
    found = digests({name: g * factor if factor != 1 else g for name, g in again.gradients.items()})
    differ = [name for name in gradients if found.get(name, {}).get("sha256") != gradients[name]["sha256"]]
    whose = "gradients" if alone else f"gradients of rank {facts['rank']} before they were averaged"
    if not differ:
        lines.append(f"{whose}: all {len(gradients)} equal bit for bit")
        return [*lines, "the replay is equal, bit for bit" if equal else _why_not(replay)]
    norms = {name: (found.get(name, {}).get("norm"), gradients[name]["norm"]) for name in differ}
    worst = max(differ, key=lambda name: abs(_ratio(*norms[name])))
    now, then = norms[worst]
    lines.append(f"{whose}: {len(differ)} of {len(gradients)} differ, most {worst}: norm {then} then, {now} now")
    return [*lines, _why_not(replay)]


def _why_not(replay: Replay) -> str:
    why = [] if replay.exact else ["its weights are not those of the step"]
    changed = changed_versions(replay.facts["versions"], installed_versions())
    why += [f"it was written by another version{changed}"] if changed else []
    return f"the replay differs: {'; '.join(why) or 'other hardware, or kernels that are not deterministic'}"


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
    passes = (f"{losses[number]:.6g} ({', '.join(replay.passes[number].ids)})" for number in ordered)
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
    size = len(one.ids)
    for row, name in enumerate(one.ids):

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
