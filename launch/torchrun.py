"""torchrun, except that it ends with the exit code of its workers: 75 must reach the scheduler, torchrun makes it 1.

The workers' first process on this machine writes its code into a file; torchrun itself keeps only that one has failed.
A crash leaves no code, and torchrun's own ending stands.
"""

import os
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from torch.distributed.run import main


def run(arguments: list[str]) -> int:
    """Run torchrun; return the exit code that the workers left, if it has failed."""
    with TemporaryDirectory() as folder:
        file = Path(folder) / "code"
        os.environ["RAWLOOP_EXIT_CODE_FILE"] = str(file)
        try:
            main(arguments)
        except Exception as error:
            code = file.read_text() if file.exists() else "0"
            if code in ("0", "1"):
                raise
            print(f"torchrun: {type(error).__name__}; exit code {code} of the workers stands", file=sys.stderr)
            return int(code)
    return 0


if __name__ == "__main__":
    sys.exit(run(sys.argv[1:]))
