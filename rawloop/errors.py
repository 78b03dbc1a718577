"""The errors of rawloop, by who can fix them.

A `UserError` is a mistake in a config, a data file or a command line: one message, exit code 2, no traceback.
Any other `RawloopError` is a failure of the run or the machine (disk full, corrupt file, diverged loss): exit code 1.
`Preempted` is no failure: the run was asked to stop, and can continue: exit code 75.
Everything else is a bug in rawloop and keeps its traceback.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path

LESS_MEMORY = (
    "lower train.batch_size or train.max_frames and raise train.accumulation by the same factor, or set "
    "model.activation_checkpointing if it is not set; `rawloop plan` with the same settings says what each change saves"
)


class RawloopError(Exception):
    """A failure that rawloop can name: disk full, corrupt checkpoint, lost rank, diverged run."""

    exit_code = 1
    is_reporter = True  # whether this rank prints the error; false on all ranks but one if all of them raise it


class UserError(RawloopError, ValueError):
    """A mistake that the user can fix. The message names the value, its origin, the allowed values and the fix."""

    exit_code = 2


class Mistakes(UserError):
    """Several mistakes of a user, told together: the first line says how many, each other line is one."""


class BadSample(UserError):
    """A sample that is too long, has unknown letters or an unusable clip. `data.on_bad_sample: skip` leaves it out."""


class LibraryError(UserError):
    """A library has failed on a user's file. `trace` is the library's traceback.

    The command writes it to a file, in `folder` if that is set, and names the file in its message of one line.
    """

    trace = ""
    folder: Path | None = None


class TrainingError(RawloopError):
    """Training cannot continue correctly, for example after too many non-finite steps in a row."""


class InterruptedUpdate(TrainingError):
    """An optimizer failed in the middle of an update: training can continue only from a checkpoint."""


class OutOfMemory(TrainingError):
    """The memory of the device, or of the machine, does not suffice for a batch."""


class LostRank(RawloopError):
    """Another process of the run has ended, or did not come to a collective in time."""


class CheckpointError(RawloopError):
    """A checkpoint cannot be written, or is damaged, or does not fit the run."""


@contextmanager
def happening(where: str, *, name_own: bool = False, less: Callable[[], str] | None = None) -> Iterator[None]:
    """Add to an error where it happened; see `add_place`.

    Raises:
        OutOfMemory: memory was used up, and `less` returns what to do about it.
    """
    try:
        yield
    except Exception as error:
        if less is not None and is_out_of_memory(error) and not isinstance(error, OutOfMemory):
            raise OutOfMemory(f"{first_line(error)} ({where}): {less()}") from error
        add_place(error, where, name_own=name_own)
        raise


def add_place(error: Exception, where: str, *, name_own: bool = False) -> None:
    """Add to an error where it happened: a note to a foreign error, and to the message of ours if `name_own`."""
    if not isinstance(error, RawloopError):
        error.add_note(where)
    elif name_own:
        error.args = (f"{error} ({where})",)


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that the memory of the device, or of the machine, is used up.

    torch raises its `OutOfMemoryError`, and a RuntimeError on the CPU, on MPS and in CUDA's libraries.
    """
    if isinstance(error, MemoryError | OutOfMemory):
        return True
    words = ("not enough memory", "can't allocate memory", "out of memory", "_ALLOC_FAILED")
    named = type(error).__name__ == "OutOfMemoryError"  # of torch, which this file does not import
    return isinstance(error, RuntimeError) and (named or any(word in str(error) for word in words))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's class: Python's own MemoryError says nothing."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


class Preempted(RawloopError):
    """Stopped by a signal or a stop file. A scheduler may requeue the run: all that it needs is on disk."""

    exit_code = 75  # EX_TEMPFAIL of sysexits.h

    def __init__(self, message: str, is_reporter: bool = True) -> None:
        super().__init__(message)
        self.is_reporter = is_reporter


def nearest(name: str, known: Iterable[str]) -> str:
    """Return a clause naming the nearest of `known`, such as ` (did you mean 'lr'?)`, or an empty string."""
    matches = get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean '{matches[0]}'?)" if matches else ""


def first_few(names: Iterable[object], separator: str = ", ", most: int = 5) -> str:
    """Return the first names in a line, and the number of the others: `a, b, c, d, e and 7 more`."""
    listed = list(names)
    more = f"{separator.replace(',', '')}and {len(listed) - most} more" if len(listed) > most else ""
    return separator.join(map(str, listed[:most])) + more
