"""A run's model becomes sharded over the ranks, if the config says so."""

from rawloop.adapters.files import ModelFiles
from rawloop.config import RunConfig
from rawloop.dist import World
from rawloop.listen.listener import Listener
from rawloop.losses import LossModule
from rawloop.precision.policy import PrecisionPolicy
from rawloop.sharding import BlockRuns, shard


def to_be_sharded(config: RunConfig, world: World) -> bool:
    """Return whether a run shards its model. In a single process there is nothing to share."""
    return world.size > 1 and config.parallel == "fsdp"


def shard_model(module: LossModule, files: ModelFiles, listener: Listener | None, world: World) -> BlockRuns:
    """Shard a loaded model over the ranks, and move its parts to their devices. Call it before the policy prepares it.

    The loss is inside, so that the heads that it applies are gathered.
    """
    files.keep_form()
    if listener is not None:
        listener.keep_form()
    return shard(module, world.device)


def sharded_line(config: RunConfig, policy: PrecisionPolicy) -> str:
    """Return a line that says what is sharded, and what is off for that."""
    assert policy.block_runs is not None
    guards = config.watch.spikes != "off"
    off = [f"the watch{' except for spikes' if guards else ''}"] if config.watch.enabled else []
    off += [f"falling back to {', '.join(policy.fallbacks_off)}"] if policy.fallbacks_off else []
    needs = f"; off, as it needs whole weights: {', '.join(off)}" if off else ""
    blocks, size = len(policy.block_runs.blocks), policy.world.size
    return f"parallel: fsdp, {blocks} blocks and the rest sharded over {size} processes{needs}"
