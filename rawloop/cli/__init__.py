"""The door: `rawloop COMMAND`. One small module per command, imported when it is called.

A mistake of the user's ends in one line and exit code 2, any other failure that rawloop can name in one line and exit
code 1. A command that a signal or a stop file has ended, and that can go on, has exit code 75. Only a bug shows a
traceback.
"""

import errno
import importlib
import os
import select
import signal
import sys
from pathlib import Path
from tempfile import mkstemp

from rawloop.errors import LibraryError, LostRank, RawloopError, UserError, nearest
from rawloop.preempt import end_early, ignore_signals

COMMANDS = {
    "demo": "build the demo checkpoint and encode the bundled speech",
    "prepare": "encode the audio of a data set once, into a cache of codes",
    "inspect": "show a batch as the model reads it: turns, codes, and what of them is learnt",
    "train": "fine-tune a model; start it with torchrun for several processes",
    "evaluate": "evaluate a model or a checkpoint of a run",
    "merge": "merge a LoRA adapter into its base model",
    "verify": "check every file of a run's checkpoints against its digest",
    "doctor": "check on your own model and data that training does what it says",
}


# How to go on with a command that was ended in the middle; others are only run again.
GO_ON = {"train": ": go on with --resume auto", "prepare": ": run it again to go on"}
# A file for the exit code, named by launch/torchrun.py: of what its workers return, torchrun keeps only that it failed.
EXIT_CODE_FILE = "RAWLOOP_EXIT_CODE_FILE"


def help_text() -> str:
    """Return what `rawloop --help` prints."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, text in COMMANDS.items()]
    promise = "it trains correctly, or it says exactly why not"
    head = f"usage: rawloop COMMAND [options]\n\nFine-tunes Hugging Face audio and text models: {promise}.\n"
    return "\n".join([head, "commands:", *lines, "", "`rawloop COMMAND --help` lists the options of a command."])


def main(argv: list[str] | None = None) -> int:
    """Run a command and return the exit code."""
    arguments = sys.argv[1:] if argv is None else argv
    if not arguments or arguments[0] in ("-h", "--help"):
        print(help_text())
        return 0 if arguments else 2
    command, rest = arguments[0], arguments[1:]
    if command not in COMMANDS:
        print(
            f"rawloop: no command '{command}'{nearest(command, COMMANDS)}; there are {', '.join(COMMANDS)}",
            file=sys.stderr,
        )
        return 2
    own_process = argv is None and command in GO_ON
    if own_process:
        end_early(command, GO_ON[command], os.environ.get(EXIT_CODE_FILE))
    code = call(command, rest)
    if own_process:
        ignore_signals()
    if EXIT_CODE_FILE in os.environ:
        leave_exit_code(Path(os.environ[EXIT_CODE_FILE]), code)
    return code


def traceback_kept(error: BaseException | None) -> str:
    """Write the traceback of a library into a file, if an error has one, and say where."""
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


def check_words(words: list[str]) -> None:
    """Refuse arguments that are not UTF-8: no file of a run could hold them."""
    for word in words:
        try:
            word.encode()
        except UnicodeEncodeError as error:
            raise UserError(f"the argument {os.fsencode(word)!r} is not UTF-8: rename what it names") from error


def leave_exit_code(file: Path, code: int) -> None:
    """Write the exit code down for the launcher of this machine; the first of its processes does."""
    from rawloop.launcher import read_ranks

    if read_ranks()[2] == 0:
        file.write_text(str(code))


def stdout_is_gone() -> bool:
    """Whether the reader of standard output has ended, as `head` does."""
    try:
        watched = select.poll()
        watched.register(sys.stdout.fileno(), 0)
        return bool(watched.poll(0))
    except (OSError, ValueError, AttributeError):  # no file, or a system without poll
        return False


def call(command: str, rest: list[str]) -> int:
    """Run a command, say in one line why it failed if it did, and return its exit code."""
    try:
        check_words(rest)
        importlib.import_module(f"rawloop.cli.{command}").run(rest)
    except RawloopError as error:
        if error.is_reporter:
            line = " ".join(str(error).splitlines()) + traceback_kept(error)  # what it quotes may have several lines
            saved = f"; what was saved is whole{GO_ON.get(command, '')}" if isinstance(error, LostRank) else ""
            print(f"rawloop {command}: {line}{saved}", file=sys.stderr, flush=True)
        return error.exit_code
    except BrokenPipeError:
        if not stdout_is_gone():
            raise
        if command in GO_ON:  # of others the output is all there was to do
            print(f"rawloop {command}: nobody reads its output any more{GO_ON[command]}", file=sys.stderr, flush=True)
        return 128 + signal.SIGPIPE
    except OSError as error:
        from rawloop.checkpoint.disk import WORDS, in_words

        if error.errno not in WORDS or error.errno == errno.ENOENT:
            raise
        print(f"rawloop {command}: {in_words(error)}", file=sys.stderr, flush=True)
        return 1
    except KeyboardInterrupt:
        saved = f"what was saved is whole{GO_ON.get(command, '')}"
        print(f"rawloop {command}: interrupted; {saved}", file=sys.stderr, flush=True)
        return 130
    return 0
