"""The cause of a failure, left for torchrun, so that it is the last thing that a user reads.

torchrun names a file to each process. It shows the message in the file of the earliest failure at the end of its own
table, and launch/torchrun.py prints it as its last line. No torch is imported here: a command may fail before that.
"""

import json
import os
import time
from pathlib import Path

from rawloop.errors import LostRank, Preempted

ERROR_FILE = "TORCHELASTIC_ERROR_FILE"  # set by torchrun, for each process
# Seconds that a failure is dated later, because torchrun has whole seconds and takes the earliest for the cause: a
# process that is told to stop, or that misses another one, is hardly ever the cause.
LATER = {Preempted: 30, LostRank: 60}


def leave_cause(line: str, error: BaseException | None = None, trace: str = "") -> None:
    """Leave the line about a failure, and a bug's traceback, where torchrun looks for them."""
    name = os.environ.get(ERROR_FILE)
    if not name:
        return
    later = next((seconds for kind, seconds in LATER.items() if isinstance(error, kind)), 0)
    extra = {"timestamp": str(int(time.time()) + later)} | ({"py_callstack": trace} if trace else {})
    Path(name).write_text(json.dumps({"message": {"message": line, "extraInfo": extra}}), encoding="utf-8")
