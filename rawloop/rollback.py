"""Going back to the last checkpoint inside a run, after a spike."""

from rawloop.checkpoint.slots import find_slots
from rawloop.run import Run


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
