"""The line of the user's code that is running, or that raised an error."""

import sys
import sysconfig
from pathlib import Path
from types import FrameType, TracebackType

import torch

from rawloop.watch.marks import Line


class Lines:
    """Finds the line of the user's code among the frames that run: the innermost one outside libraries."""

    def __init__(self) -> None:
        self.own = (str(Path(torch.__file__).parent), str(Path(__file__).parent.parent))
        self.libraries = (str(Path(torch.__file__).parent.parent), sysconfig.get_path("stdlib"), "<frozen")
        self.ranks: dict[str, int] = {}

    def current(self) -> Line:
        """Return the line; if all frames are those of libraries, the innermost outside torch and rawloop."""
        frame: FrameType | None = sys._getframe(1)
        second: FrameType | None = None
        while frame is not None:
            file = frame.f_code.co_filename
            rank = self.ranks[file] if file in self.ranks else self.rank(file)  # called for each operation
            if rank == 0:
                return Line(file, frame.f_lineno)
            if rank == 1 and second is None:
                second = frame
            frame = frame.f_back
        return Line(second.f_code.co_filename, second.f_lineno) if second is not None else Line()

    def rank(self, file: str) -> int:
        """Return 0 for the user's files, 1 for those of libraries, 2 for those of torch and rawloop."""
        if file not in self.ranks:
            self.ranks[file] = 2 if file.startswith(self.own) else int(file.startswith(self.libraries))
        return self.ranks[file]

    def in_traceback(self, traceback: TracebackType | None) -> Line:
        """Return the innermost line of the user's code in a traceback."""
        found = Line()
        while traceback is not None:
            file = traceback.tb_frame.f_code.co_filename
            found = Line(file, traceback.tb_lineno) if self.rank(file) == 0 else found
            traceback = traceback.tb_next
        return found
