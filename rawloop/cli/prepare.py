"""`rawloop prepare`: encode the audio of a data set once, so that training never runs the codec.

Under torchrun, several processes share the work: `torchrun --nproc_per_node=4 -m rawloop prepare --config FILE`.
"""

import json
import sys
from contextlib import ExitStack
from os.path import expanduser
from pathlib import Path

from tqdm import tqdm

from rawloop.cli import read_config
from rawloop.components import checked_with
from rawloop.data import DataConfig
from rawloop.data.measure import excerpt, measure_pairs, pairs_of
from rawloop.data.samples import read_samples
from rawloop.data.splits import prepare_codes
from rawloop.dist import open_world
from rawloop.errors import UserError
from rawloop.families import load_family
from rawloop.files import readable, replace_file
from rawloop.preempt import watch_signals
from rawloop.report.page import check_output, check_packages, write_page


def run(argv: list[str]) -> None:
    """Encode data.train and data.eval of a config into the cache of codes."""
    config, options, _ = read_config("prepare", argv)
    page = Path(expanduser(options.report)) if options.report else None
    if page is not None:
        check_packages()
        check_output(page)
    with ExitStack() as outside, open_world(config.device, config.ddp.timeout) as world:
        preemption = outside.enter_context(watch_signals())  # before, a signal ends a process that waits for others
        if page is not None:
            world.on_all_ranks(lambda: print(write_report(config.data, page), flush=True), only_main=True)
        family = world.on_all_ranks(lambda: load_family(config.model))
        assert family is not None, "it is loaded on every rank"
        line = prepare_codes(config.data, family, world, preemption, checked_with(config, family))
        if world.is_main:
            print(line, flush=True)


def write_report(config: DataConfig, page: Path) -> str:
    """Measure all pairs of clip and words, write a page and a JSON file about them, and return a line about it."""
    from rawloop.report.clips import data_page

    splits = [path for path in (config.train, config.eval) if path is not None]
    samples = [sample for path in splits for sample in read_samples(path, config)]
    number = len(list(pairs_of(samples)))
    if not number:
        raise UserError(f"--report is '{page}', and no sample has a clip that is learnt and the words it speaks")
    with tqdm(total=number, desc="measuring", unit="clip", mininterval=0.1 if sys.stderr.isatty() else 60.0) as bar:
        report = measure_pairs(samples, bar.update)
    write_page(page, data_page(", ".join(splits), report, excerpt))
    facts = page.with_suffix(".json")
    replace_file(facts, json.dumps(report, ensure_ascii=False, indent=1).encode(errors="backslashreplace"))
    unusual = sum(bool(clip["flags"]) for clip in report["clips"])
    return f"report: {unusual} of {number} clips are unusual: {page} ({readable(page.stat().st_size)}), {facts}"
