"""`rawloop prepare`: encode the audio of a data set once, so that training never runs the codec."""

from rawloop.cli import read_config
from rawloop.data.splits import prepare_codes
from rawloop.errors import UserError
from rawloop.families import load_family
from rawloop.launcher import choose_device, read_ranks
from rawloop.preempt import watch_signals


def run(argv: list[str]) -> None:
    """Encode data.train and data.eval of a config into the cache of codes."""
    config, _ = read_config("prepare", argv)
    if read_ranks()[1] > 1:
        raise UserError("rawloop prepare is one process: start it without torchrun")
    device = choose_device(config.device, 0)
    with watch_signals() as preemption:
        print(prepare_codes(config.data, load_family(config.model), device, preemption), flush=True)
