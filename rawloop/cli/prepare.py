"""`rawloop prepare`: encode the audio of a data set once, so that training never runs the codec.

Under torchrun, several processes share the work: `torchrun --nproc_per_node=4 -m rawloop prepare --config FILE`.
"""

from rawloop.cli import read_config
from rawloop.data.splits import prepare_codes
from rawloop.dist import open_world
from rawloop.families import load_family
from rawloop.preempt import watch_signals


def run(argv: list[str]) -> None:
    """Encode data.train and data.eval of a config into the cache of codes."""
    config, _ = read_config("prepare", argv)
    with watch_signals() as preemption, open_world(config.device, config.ddp.timeout) as world:
        family = world.on_all_ranks(lambda: load_family(config.model))
        assert family is not None, "it is loaded on every rank"
        line = prepare_codes(config.data, family, world, preemption)
        if world.is_main:
            print(line, flush=True)
