"""A run's model becomes sharded over the ranks, if the config says so."""

from collections.abc import Callable

from rawloop.adapters.files import ModelFiles
from rawloop.config import RunConfig
from rawloop.dist import World
from rawloop.losses import LossModule
from rawloop.precision.policy import PrecisionPolicy
from rawloop.sharding import shard


def to_be_sharded(config: RunConfig, world: World) -> bool:
    """Return whether a run shards its model. In a single process there is nothing to share."""
    return world.size > 1 and config.parallel == "fsdp"


def shard_model(
    config: RunConfig,
    module: LossModule,
    policy: PrecisionPolicy,
    files: ModelFiles,
    world: World,
    say: Callable[[str], None],
) -> None:
    """Shard a prepared model over the ranks if the config says so. Call it before the optimizer exists.

    The loss is inside, so that the heads that it applies are gathered.
    """
    if not to_be_sharded(config, world):
        return
    files.keep_form()
    runs, fallbacks = shard(module, world.device), ", ".join(policy.chain.remaining)
    policy.take_shards(runs)
    off = ["the watch"] if config.watch.enabled else []
    off += [f"falling back to {fallbacks}"] if fallbacks else []
    needs = f"; off, as it needs whole weights: {', '.join(off)}" if off else ""
    say(f"parallel: fsdp, {len(runs.blocks)} blocks and the rest sharded over {world.size} processes{needs}")
