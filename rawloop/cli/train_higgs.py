"""`rawloop train-higgs`: takes the flags of HF Trainer scripts for Higgs Audio v2, and runs `rawloop train`.

It prints the command that is equivalent, and what has no counterpart. Options of rawloop may stand between the flags.
"""

from collections.abc import Iterator

from rawloop.cli import read_config
from rawloop.cli.table import TABLE
from rawloop.config import known_keys
from rawloop.data.config import codes_folder
from rawloop.errors import UserError
from rawloop.translation.flags import read_flags
from rawloop.translation.higgs import HIGGS
from rawloop.translation.telling import as_command, options, our_defaults, told
from rawloop.translation.translate import Translation, translate

NEEDED = {"model.path": "--model_path", "data.train": "--train_data_dir or --train_data_file"}


def run(argv: list[str]) -> None:
    """Translate the flags, print the command, and train, unless --dry-run is given."""
    if not {"-h", "--help"}.isdisjoint(argv):
        print(help_text())
        return
    flags = [word for word in argv if word not in ("--dry-run", "--dry_run")]
    given, own, twice = read_flags(flags, HIGGS, known_keys())
    translation = translate(HIGGS, given, our_defaults())
    settings = merged(translation, own)
    from rawloop.launcher import local_size, read_ranks  # imports torch

    rank, size, _ = read_ranks()
    is_main = rank == 0
    if is_main:
        print("\n".join(report(translation, settings, twice, launch(size, local_size()))), flush=True)
    if len(flags) == len(argv):
        train(settings, is_main)


def merged(translation: Translation, own: list[list[str]]) -> list[list[str]]:
    """Return all options of `rawloop train`, each with its value. Those that were given override defaults.

    Raises:
        UserError: a flag and an option decide the same key; or the model or the data are not given.
    """
    keys = {key_of(words): words for words in own}
    setters = {key: line for line in translation.of("taken", "changed") for key in line.settings}
    for key in keys.keys() & setters.keys():
        raise UserError(f"--{setters[key].name} and {keys[key][0]} both decide '{key}': keep one")
    settings = {
        key: translation.settings[key] for key in our_defaults() if key in translation.settings and key not in keys
    }
    absent = [flags for key, flags in NEEDED.items() if key not in {*settings, *keys}]
    if absent:
        raise UserError(f"{' and '.join(absent)} must be given; `rawloop train-higgs --help` lists all flags")
    return [*options(settings), *own]


def key_of(words: list[str]) -> str:
    """Return the key of an option and its values: `optim.lr` of `--optim.lr=1e-5`."""
    return words[0].removeprefix("--").partition("=")[0].removesuffix("+")


def launch(size: int, local: int) -> list[str]:
    """Return how `rawloop` is started in so many processes, `local` of them on this machine."""
    nodes = [f"--nnodes={size // local}"] if size > local else []
    return ["torchrun", *nodes, f"--nproc_per_node={local}", "-m", "rawloop"] if size > 1 else ["rawloop"]


def report(translation: Translation, settings: list[list[str]], twice: list[str], start: list[str]) -> Iterator[str]:
    """Yield what became of the flags, the equivalent command, and that which encodes the audio."""
    num_taken = len(translation.of("taken", "default"))
    yield f"{num_taken} of {num_taken + len(translation.of('changed', 'idle', 'without'))} flags are taken as they are"
    yield from told(translation, "changed", "idle", "without", "assumed", label=HIGGS.label)
    if twice:
        yield f"given twice, and the last counts: {', '.join(f'--{name}' for name in twice)}"
    yield "this is:" if len(start) < 5 else "this is, with the rendezvous options that you gave to torchrun:"
    yield as_command([*start, "train", *(word for words in settings for word in words)])
    yield f"before it, once, and again if the data change:\n{as_command(prepare_command(settings))}"


def prepare_command(settings: list[list[str]]) -> list[str]:
    """Return the command that encodes the audio of these settings."""
    unread = TABLE["prepare"].unread()
    needed = [words for words in settings if key_of(words) not in unread]
    return ["rawloop", "prepare", *(word for words in needed for word in words)]


def train(settings: list[list[str]], is_main: bool) -> None:
    """Run `rawloop train`. Raises UserError if nothing is encoded yet."""
    from rawloop.cli.train import run as run_train
    from rawloop.data.shards import CODEC_FILE

    words = [word for pair in settings for word in pair]
    folder = codes_folder(read_config("train", words).config.data)
    if not any(folder.glob(f"*/{CODEC_FILE}")):
        command = " ".join(as_command(prepare_command(settings)).replace("\\\n", "").split())
        error = UserError(f"{folder} has no codes yet: run `{command}`, and then this command again")
        error.is_reporter = is_main
        raise error
    run_train(words)


def help_text() -> str:
    """Return what `--help` prints: the flags by what they become."""
    rules = HIGGS.rules.values()
    width = max(len(rule.name) for rule in rules if rule.keys)
    known = [f"  --{rule.name:<{width}}  {', '.join(rule.keys)}" for rule in rules if rule.keys]
    others = ", ".join(f"--{rule.name}" for rule in rules if not rule.keys)
    return "\n".join(
        [
            "usage: rawloop train-higgs [--FLAG VALUE ...] [--KEY VALUE ...] [--dry-run]\n",
            "Takes the flags of HF Trainer scripts for Higgs Audio v2, prints the equivalent `rawloop train` command",
            "and what has no counterpart, and trains. Keys of rawloop may stand between them (`rawloop train --help`).",
            "--dry-run only prints. docs/from-trainer.md has every flag, its default and what is different here.\n",
            "flag and key:",
            *known,
            f"\nwithout a key, each with its reason on that page: {others}",
        ]
    )
