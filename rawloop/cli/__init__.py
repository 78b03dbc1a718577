"""`rawloop COMMAND`: one small module per command, imported when the command is called.

A user's mistake ends in one line and exit code 2; any other failure that rawloop can name in one line and exit code 1.
The exit code is 75 if a signal or a stop file stopped the command and it can continue. Only a bug shows a traceback.
"""

import errno
import gc
import importlib
import logging
import os
import select
import signal
import sys
import traceback
from pathlib import Path
from tempfile import mkstemp
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rawloop.causes import leave_cause
from rawloop.errors import LibraryError, LostRank, Mistakes, RawloopError, UserError, nearest
from rawloop.preempt import exit_on_signals, ignore_signals

if TYPE_CHECKING:
    from rawloop.config import Parsed

COMMANDS = {
    "demo": "build the demo checkpoint and encode the bundled speech",
    "import": "write data files from recordings and chats in the layouts of others",
    "prepare": "encode the audio of a data set once, into a cache of codes",
    "inspect": "show a batch as the model reads it: turns, codes, and which of them are learnt",
    "plan": "estimate memory and time of a run, and the cards that it fits, without a GPU and without weights",
    "train": "fine-tune a model; start it with torchrun for several processes",
    "train-higgs": "train with the flags of an HF Trainer script for Higgs Audio v2",
    "from-trainer": "write a config from the settings of HF Trainer, TRL, axolotl, LLaMA-Factory or ms-swift",
    "evaluate": "evaluate a model or a checkpoint of a run",
    "generate": "hear what a trained model says, as wav files; or read what it writes",
    "export": "write a trained model as a folder that transformers opens, with a model card",
    "merge": "merge a LoRA adapter into its base model",
    "report": "show what a run has recorded, or several runs, as one HTML page",
    "verify": "check every file of a run's checkpoints against its digest",
    "replay": "run a kept step again, and find what is wrong with it",
    "precision": "probe the range of numbers in one batch, or compare the precision modes",
    "launch-check": "check, before anything expensive, that all processes can train together; start it like train",
    "doctor": "check on your own model and data that training does what it says",
}
# The first word after a command that does several things.
ACTIONS = {"precision": ("probe", "compare")}
HELP = frozenset({"-h", "--help"})
OWN_HELP = ("train-higgs",)  # its options are another program's
# How to continue a command that was interrupted. The other commands start from the beginning.
CONTINUE = {
    "train": ": continue with --resume auto",
    "train-higgs": ": continue with --resume auto",
    "prepare": ": run it again to continue",
}
# launch/torchrun.py names a file for the exit code here: torchrun itself does not pass it on.
EXIT_CODE_FILE = "RAWLOOP_EXIT_CODE_FILE"


def help_text() -> str:
    """Return what `rawloop --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    promise = "it trains correctly, or it says exactly why not"
    head = f"usage: rawloop COMMAND [options]\n\nFine-tunes Hugging Face audio and text models: {promise}.\n"
    return "\n".join([head, "commands:", *lines, "", "`rawloop COMMAND --help` lists the options of a command."])


def read_config(command: str, arguments: list[str]) -> "Parsed":
    """Read a command's config and its other options."""
    from rawloop.cli.table import TABLE
    from rawloop.config import parse

    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads and DataLoader's forks do not mix
    return parse(arguments, f"rawloop {command}", TABLE[command].options, TABLE[command].unread())


def read_options(command: str, arguments: list[str]) -> Any:
    """Read the options of a command that has no config into the dataclass of its options."""
    from rawloop import parser
    from rawloop.cli.table import TABLE

    row = TABLE[command]
    return parser.read_options(f"rawloop {command}", row.options, arguments, row.alone, row.meant)


def with_action(command: str, rest: list[str]) -> str:
    """Return a command's name with its action, such as `precision probe`. Refuse a wrong action."""
    actions, given = ACTIONS.get(command, ()), rest[0] if rest else ""
    if not actions or given in HELP:
        return command
    if given not in actions:
        hint = nearest(given, actions) if given else ""
        raise UserError(
            f"rawloop {command} needs one of {', '.join(actions)} first, as in `rawloop {command} {actions[0]} "
            f"my.yaml`; it got '{given}'{hint}"
        )
    return f"{command} {given}"


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in HELP:
        print(help_text())
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(
            f"rawloop: no command '{command}'{nearest(command, COMMANDS)}; there are {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    own_process = argv is None and command in CONTINUE
    if own_process:
        exit_on_signals(command, CONTINUE[command], os.environ.get(EXIT_CODE_FILE))
    file = Path(os.environ[EXIT_CODE_FILE]) if EXIT_CODE_FILE in os.environ else None
    try:
        code = call(command, rest, argv is None)
    except Exception as error:
        leave_cause(" ".join(f"{type(error).__name__}: {error}".split()), error, traceback.format_exc())
        raise
    if own_process:
        ignore_signals()
    if file and is_first_of_machine():
        file.write_text(str(code))
    return code


def keep_traceback(error: BaseException | None) -> str:
    """Write the traceback of a LibraryError to a file. Return a clause that names the file, or an empty string."""
    while error is not None and not (isinstance(error, LibraryError) and error.trace):
        error = error.__cause__
    if error is None:
        return ""
    try:
        handle, name = mkstemp(prefix="rawloop-traceback-", suffix=".txt", dir=error.folder)
        with open(handle, "w", encoding="utf-8", errors="backslashreplace") as file:
            file.write(error.trace)
    except OSError as failed:
        return f" (its traceback cannot be kept: {failed.strerror})"
    return f" (its traceback: {name})"


def is_first_of_machine() -> bool:
    """Return whether this process is the first one of its machine."""
    from rawloop.launcher import read_ranks  # imports torch

    return read_ranks()[2] == 0


def stdout_is_gone() -> bool:
    """Return whether the reader of standard output has ended, as `head` does."""
    try:
        poll = select.poll()
        poll.register(sys.stdout.fileno(), 0)
        return bool(poll.poll(0))
    except (OSError, ValueError, AttributeError):  # no file, or a system without poll
        return False


def tell(line: str, error: BaseException, shown: bool = True) -> None:
    """Print the line about a failure, and leave it for the launcher."""
    leave_cause(line, error)
    if shown:
        print(line, file=sys.stderr, flush=True)


def imported(command: str, own_process: bool) -> ModuleType:
    """Import a command's module. In a process of its own, without collecting garbage meanwhile: what is imported stays,
    and the collector would look at it again and again (docs/benchmarks.md).
    """
    name = f"rawloop.cli.{command.replace('-', '_')}"
    if not own_process:
        return importlib.import_module(name)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # PEFT imports it; it warns of kernels it can do without
    gc.disable()
    try:
        return importlib.import_module(name)
    finally:
        gc.freeze()
        gc.enable()


def call(command: str, rest: list[str], own_process: bool) -> int:
    """Run a command and return its exit code. A failure is explained in one line."""
    try:
        broken = next((word for word in rest if word.encode(errors="ignore").decode() != word), None)
        if broken is not None:  # it could not be written into the files of a run
            raise UserError(f"the argument {os.fsencode(broken)!r} is not UTF-8: rename what it names")
        name = with_action(command, rest)
        if not HELP.isdisjoint(rest) and command not in OWN_HELP:
            from rawloop.cli.help import help_of

            print(help_of(name, COMMANDS[command], ACTIONS.get(name, ()), is_all="all" in rest), flush=True)
            return 0
        imported(command, own_process).run(rest)
    except RawloopError as error:
        shown = error.is_reporter
        quoted = " ".join(str(error).splitlines())  # it may quote several lines
        line = (str(error) if isinstance(error, Mistakes) else quoted) + (keep_traceback(error) if shown else "")
        saved = f"; what was saved is whole{CONTINUE.get(command, '')}" if isinstance(error, LostRank) else ""
        tell(f"rawloop {command}: {line}{saved}", error, shown)
        return error.exit_code
    except BrokenPipeError as error:
        if not stdout_is_gone():
            raise
        if command in CONTINUE:  # the other commands only print
            tell(f"rawloop {command}: nobody reads its output any more{CONTINUE[command]}", error)
        return 128 + signal.SIGPIPE
    except OSError as error:
        from rawloop.files import WORDS, in_words

        if error.errno not in WORDS or error.errno == errno.ENOENT:
            raise
        tell(f"rawloop {command}: {in_words(error)}", error)
        return 2 if error.errno == errno.ENAMETOOLONG else 1  # the user's mistake, or the disk's
    except KeyboardInterrupt as error:
        tell(f"rawloop {command}: interrupted; what was saved is whole{CONTINUE.get(command, '')}", error)
        return 130
    return 0
