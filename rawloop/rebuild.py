"""Changes of a run between two steps: after a fallback to another mode, and back to a checkpoint after a spike."""

import gc
from functools import partial

import torch
from torch import Tensor, nn

from rawloop.checkpoint.slots import find_slots
from rawloop.contracts import Batch
from rawloop.dist import unwrap_ddp
from rawloop.errors import happening
from rawloop.moving_buffers import MovingBuffers, find_moving_buffers
from rawloop.precision.preflight import preflight
from rawloop.run import Run


def trial_loss(module: nn.Module, batch: Batch, device: torch.device) -> Tensor:
    """Return the sum of a micro-batch's losses, for the trial of a precision mode. An error names the samples."""
    with happening(f"in the trial of one pass, on the samples {', '.join(batch.ids)}", name_own=True):
        losses = module(batch.to(device))
    return torch.stack([loss.total for loss in losses.values()]).sum()


def find_buffers(run: Run, batch: Batch) -> MovingBuffers:
    """Find the buffers that training moves, by a trial pass whose changes are undone. All ranks call this.

    Raises:
        UserError: no checkpoint could hold one of them.
    """
    model = run.policy.model
    assert model is not None, "run.policy has prepared the model"
    if next(model.buffers(), None) is None:
        return MovingBuffers(model)
    trial = preflight(run.policy, partial(trial_loss, unwrap_ddp(run.module), batch, run.world.device))
    return find_moving_buffers(model, trial.moves, run.world, watch=not getattr(run.module, "broadcast_buffers", False))


def rebuild_ddp(run: Run, change: str, batch: Batch) -> None:
    """Rebuild DDP after all ranks fell back to another precision mode, which may have changed the weights' dtype.

    The old DDP is deleted first, because its hooks stay on the weights. The mode is tried on a batch, as before
    training: if the device cannot run the model in it, the next mode is taken.
    """
    step, policy = run.state.step, run.policy
    assert run.wrap is not None or run.world.size == 1, "a run of several ranks must say how its module is wrapped"
    bare, run.module = unwrap_ddp(run.module), nn.Identity()
    gc.collect()
    entered = policy.name
    preflight(policy, partial(trial_loss, bare, batch, run.world.device))
    if policy.name != entered:
        change = f"{change} -> {policy.chain.trail().partition(f'{entered} -> ')[2]}"
    run.module = run.wrap() if run.wrap is not None else bare
    if run.world.is_main:
        run.record_or_defer(lambda: run.records.event("fallback", step=step, reason=policy.reason, change=change))
    run.record_or_defer(lambda: run.records.metrics(step, {"precision": policy.name, "fallback": change}))


def roll_back(run: Run) -> bool:
    """Restore the newest checkpoint, and leave out the window before `run.state.window`, which was the spike's.

    All ranks call this. Without a checkpoint nothing is restored.

    Returns:
        whether the run has gone back.
    """
    checkpoints, state = run.checkpoints, run.state
    spike, step, left_out = state.window - 1, state.step, list(state.left_out)
    if checkpoints is None:
        return False
    run.wait_until_written()
    if not run.world.from_main(bool(find_slots(checkpoints.folder)) if run.world.is_main else False):
        return False
    run.raise_deferred()
    restored = checkpoints.load("latest")
    state.left_out = sorted({*state.left_out, *left_out, spike})
    run.records.rewind(state.step, state.visited == state.step, [left["to"] for left in run.policy.chain.history])
    checkpoints.mark_changed()
    if run.world.is_main:
        reason = f"went back from step {step} to {restored.slot.name} after a spike; window {spike} is left out"
        run.record_or_defer(lambda: run.records.event("restore", step=state.step, reason=reason, window=spike))
    if run.watch:
        run.watch.restart()
    return True
