"""The lines of the user's code."""

import linecache
from contextvars import ContextVar
from pathlib import Path
from types import FrameType

import torch

# The line of the user's code whose operation runs, for code that runs operations which it has recorded, so that the
# line is not on the stack: set it around each of them, as `train.py:41: loss = torch.log(p).mean()`. It is used for
# operations outside the model's modules.
current_line: ContextVar[str] = ContextVar("current_line", default="")

OUR_OWN = tuple(str(Path(__file__).parent.parent / room) for room in ("origin", "watch", "diagnose"))
NOT_THE_USERS = (str(Path(torch.__file__).parent), "<")  # torch, and generated code such as <frozen contextlib>


def line_of(frame: FrameType | None) -> str:
    """Return the innermost line outside torch and this package, up to the call that started the pass."""
    left = False
    while frame is not None:
        file = frame.f_code.co_filename
        ours = file.startswith(OUR_OWN[0])
        if ours and left:
            return ""
        left = left or not ours
        if not file.startswith((*OUR_OWN, *NOT_THE_USERS)) and "contextlib" not in file:
            text = linecache.getline(file, frame.f_lineno).partition("  #")[0].strip()
            return f"{Path(file).name}:{frame.f_lineno}: {text}".rstrip(": ")
        frame = frame.f_back
    return ""
