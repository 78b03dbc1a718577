"""What a replay says: how its bits compare with the recorded ones, and which samples and parameters weigh most."""

import math
from collections.abc import Mapping
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
    lines, equal = [], True
    for number, (one, then, root) in enumerate(zip(replay.passes, replay.roots, again.roots, strict=True), start=1):
        name = f"pass {number} of {len(replay.passes)} ({', '.join(one.ids)})"
        now = root.item() / one.scale
        if then is None:
            lines.append(f"{name}: loss {now:.9g}; it was not recorded")
            continue
        same, before = digest(then) == digest(root), then.item() / one.scale
        equal = equal and same
        off = "equal bit for bit" if same else f"off by {_off(now, before)}"
        lines.append(f"{name}: loss {before:.9g} then, {now:.9g} now: {off}")
    gradients = recorded_gradients(replay.facts)
    if not replay.passes:
        return [f"nothing can run again: {replay.facts.get('why_no_passes') or 'no backward pass was recorded'}"]
    if not gradients:
        return [*lines, "gradients: none were recorded"]
    left = replay.facts["left_on_gradients"] if "own_gradients" not in replay.facts else replay.facts["scale"]
    factor = left / replay.facts["scale"]
    found = digests({name: g * factor if factor != 1 else g for name, g in again.gradients.items()})
    differ = [name for name in gradients if found.get(name, {}).get("sha256") != gradients[name]["sha256"]]
    whose = (
        f"gradients of rank {replay.facts['rank']} before they were averaged"
        if replay.facts["world_size"] > 1
        else "gradients"
    )
    if not differ:
        lines.append(f"{whose}: all {len(gradients)} equal bit for bit")
    else:
        worst = max(differ, key=lambda name: abs(_ratio(found.get(name, {}).get("norm"), gradients[name]["norm"])))
        then, now = gradients[worst]["norm"], found.get(worst, {}).get("norm")
        lines.append(f"{whose}: {len(differ)} of {len(gradients)} differ, most {worst}: norm {then} then, {now} now")
    return [*lines, _verdict(equal and not differ, replay)]


def recorded_gradients(facts: Mapping[str, Any]) -> dict[str, Any]:
    """Return digest and norm of each recorded gradient of this rank; empty if there are none."""
    gradients: dict[str, Any] = facts.get("own_gradients") or (
        facts.get("gradients", {}) if facts["world_size"] == 1 else {}
    )
    return gradients


def _verdict(equal: bool, replay: Replay) -> str:
    if equal:
        return "the replay is equal, bit for bit"
    facts = replay.facts
    why = [] if replay.exact else ["its weights are not those of the step"]
    why += [f"it was written by another version{changed}"] if (changed := versions_changed(facts)) else []
    return f"the replay differs: {'; '.join(why) or 'other hardware, or kernels that are not deterministic'}"


def versions_changed(facts: Mapping[str, Any]) -> str:
    """Return a clause that names the packages with another version than when the capsule was written."""
    return changed_versions(facts["versions"], installed_versions())


def _off(now: float, then: float) -> str:
    return f"{abs(now - then):.3g} ({abs(_ratio(now, then)):.2g} of it)"


def _ratio(now: Any, then: Any) -> float:
    after, before = math.nan if now is None else float(now), float(then)
    return (after - before) / before if before else after


def narrowed(replay: Replay) -> list[str]:
    """Return findings: the origin of what is not finite, or else the passes, samples and parameters that weigh most."""
    record = replay.record
    again = replay.run()
    roots = [root.item() for root in again.roots]
    norms = {name: gradient.float().norm().item() for name, gradient in again.gradients.items()}
    if not all(map(math.isfinite, [*roots, *norms.values()])):
        record.loss = sum(root / one.scale for root, one in zip(roots, replay.passes, strict=True))
        return [finding.text() for finding in trace(replay.subject, record)]
    return [*_by_pass(replay, roots), *_by_sample(replay, roots), *_by_parameter(norms)]


def _by_pass(replay: Replay, roots: list[float]) -> list[str]:
    ordered = sorted(zip(roots, replay.passes, strict=True), key=lambda pair: -abs(pair[0] / pair[1].scale))
    shown = [f"{root / one.scale:.6g} ({', '.join(one.ids)})" for root, one in ordered]
    return [f"all numbers are finite; losses by pass, the largest first: {first_few(shown, '; ')}"]


def _by_sample(replay: Replay, roots: list[float]) -> list[str]:
    """Return the samples of the pass with the largest loss, by the loss of a batch of that sample alone."""
    number = max(range(len(roots)), key=lambda n: abs(roots[n] / replay.passes[n].scale))
    one = replay.passes[number]
    size = len(one.ids)
    found = []
    for row in range(size):

        def pick(tensor: Tensor, row: int = row) -> Tensor:
            return tensor[[row] * size] if tensor.dim() and tensor.shape[0] == size else tensor

        alone = one._replace(inputs=map_tensors(pick, one.inputs))
        part = replace(replay, passes=[alone])
        try:
            again = part.run()
        except RuntimeError as error:
            return [f"samples of pass {number + 1}: they cannot be run alone: {str(error).splitlines()[0]}"]
        norm = torch.stack([g.float().norm() for g in again.gradients.values()]).norm().item()
        found.append((again.roots[0].item() / one.scale, norm, one.ids[row]))
    found.sort(key=lambda row: -row[1])
    shown = [f"{name}: loss {loss:.6g}, gradient norm {norm / one.scale:.4g}" for loss, norm, name in found]
    return [f"samples of pass {number + 1}, each alone, the largest gradient first: {first_few(shown, '; ')}"]


def _by_parameter(norms: dict[str, float]) -> list[str]:
    total = math.sqrt(sum(norm * norm for norm in norms.values())) or 1.0
    ordered = sorted(norms, key=lambda name: -norms[name])
    shown = [f"{name} {100 * (norms[name] / total) ** 2:.3g}%" for name in ordered]
    return [f"share of the squared gradient norm by parameter: {first_few(shown)}"]
